"""Rows of queries: the output, and dq. A program walks along a segment of tokens from left to right.

    out_t = (q_t S_t + sum_{j <= t in the block} sim_tj v_j) / z_t               S = sum_j k_j^T v_j before the block
    dq_t  = (dout_t S_t^T + delta_t z) + sum_j (dout_t . v_j + delta_t) k_j      through the feature map

Both are one kernel: a = q or dout meets a state [INNER, OUTER], held in registers, and scores a b^T of its block.
Without causal the state is that of all keys, and nothing is added to it.
"""

import triton
import triton.language as tl

from fastnlp_ops._triton.linear_attention_tiles import (
    EXP,
    SIZES,
    decays,
    decays_between,
    exp_from,
    exp_rows,
    exponents,
    feature_map,
    load_logarithm,
    load_maxima,
    load_state,
    load_tile,
    locate,
    rescaling,
    split_finite,
    steps_of,
    store_state,
    through_feature_map,
    times_exp,
)


@triton.jit(do_not_specialize=SIZES)
def linear_attention_queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,  # [B, T, heads * GROUP, DV]
    result_ptr,  # [B, T, heads * GROUP, DV or DK]: out or dq
    normalizer_ptr,  # [B, T, heads * GROUP]: written with out; of "exp" read for dq
    factor_ptr,  # [B, T, heads * GROUP] of dout, or None: `scale`
    delta_ptr,  # [B, T, heads * GROUP]: gradient of a row's denominator
    mask_ptr,
    decay_ptr,
    cu_ptr,
    kv_ptr,  # the state before each slot, or of each sequence without CAUSAL
    key_sum_ptr,
    key_max_ptr,
    last_kv_ptr,  # [sequences, heads, ..]: written with out
    last_key_sum_ptr,
    last_key_max_ptr,
    tokens,
    segment,
    segments,
    sequences,
    heads,
    columns,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    decay_stride_b,
    decay_stride_t,
    decay_stride_h,
    scale: "fp64",
    eps: "fp64",
    GRADIENT: tl.constexpr,
    CAUSAL: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MAP: tl.constexpr,
    BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    column, head, slot, n, b, begin, end, _, last = locate(cu_ptr, tokens, segment, segments, sequences, heads, columns)
    if (begin >= end) & (not last):
        return
    compute: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    operand: tl.constexpr = tl.bfloat16 if q_ptr.dtype.element_ty == tl.bfloat16 else compute
    X: tl.constexpr = OUTER if GRADIENT else INNER  # width of tiles of q and k, and their first channel
    WIDTH: tl.constexpr = DK if GRADIENT else DV
    first = column * OUTER
    x_first = first if GRADIENT else 0
    y_first = 0 if GRADIENT else first
    q_ptr += b * q_stride_b + head * GROUP * q_stride_h
    k_ptr += b * k_stride_b + head * k_stride_h
    v_ptr += b * v_stride_b + head * v_stride_h
    place = (slot if CAUSAL else n) * heads + head
    state, row0, sums, count = load_state(
        kv_ptr, key_sum_ptr, place, first, GRADIENT, BIAS, DK, DV, INNER, OUTER, compute
    )
    if MAP == EXP:
        top = load_maxima(key_max_ptr, place, x_first, DK, X, compute)
    local = tl.arange(0, BLOCK)
    for block in range(tl.cdiv(end - begin, BLOCK).to(tl.int32)):
        index = block * BLOCK + local
        past = index[:, None] >= index[None, :]  # of the loop's variable, or the compiler keeps it in registers
        row = begin + index
        inside = row < end
        there = inside
        if CAUSAL and mask_ptr is not None:
            there = inside & (tl.load(mask_ptr + b * tokens + row, mask=inside, other=0) != 0)
        if CAUSAL and MAP == EXP:
            x = load_tile(k_ptr, row, k_stride_t, there, x_first, DK, X).to(compute)
            x = exponents(x, there, x_first, DK)
            low = tl.min(tl.where(x == float("-inf"), float("inf"), x), 0)
            steps = steps_of(tl.max(x, 0), low, top, BLOCK)
        else:
            steps = 1
        for step in range(steps):
            live = inside
            if CAUSAL:
                if MAP == EXP:
                    live = tl.where(steps == 1, inside, inside & (local == step))
                seen = there & live
                k = load_tile(k_ptr, row, k_stride_t, seen, x_first, DK, X).to(compute)
                v = load_tile(v_ptr, row, v_stride_t, seen, y_first, DV, INNER if GRADIENT else OUTER)
                if MAP == EXP:
                    x = exponents(k, seen, x_first, DK)
                    before = top
                    top = tl.maximum(top, tl.max(x, 0))
                    k = exp_from(x, top)
                    ratio = rescaling(before, top)
                    if GRADIENT:
                        state *= ratio[None, :]
                        row0 *= ratio
                    else:
                        state *= ratio[:, None]
                        sums *= ratio
                else:
                    k = feature_map(k, seen, x_first, MAP, DK)
                weight = seen.to(compute)
                if decay_ptr is not None:
                    g, total = decays(decay_ptr + b * decay_stride_b + head * decay_stride_h, row, decay_stride_t, seen)
                    between = decays_between(g, g, past, compute)
                    near, carried = tl.exp(g.to(compute)), tl.exp(total.to(compute))
                    weight *= tl.exp((total - g).to(compute))
                # What the block adds to the state, as small as it can be before the queries need registers.
                if GRADIENT:
                    key, value = v.to(operand), k
                else:
                    key, value = k.to(operand), v.to(compute)
                    added_sums = tl.sum(k * weight[:, None], 0)
                clean, bad = split_finite(value)
                poison = tl.min(tl.where(bad, local, BLOCK), 0)
                clean = clean.to(operand)
                if decay_ptr is not None:
                    value *= weight[:, None]
                if GRADIENT or BIAS:
                    added_row0 = tl.sum(value, 0)
                added = value.to(operand)
            for h in range(GROUP):
                at = (b * tokens + row) * (heads * GROUP) + head * GROUP + h
                if GRADIENT:
                    dout = load_tile(dout_ptr, at, DV, live, 0, DV, INNER).to(compute)
                    if factor_ptr is None:
                        a = dout * tl.full((), scale, compute)
                    else:
                        a = dout * tl.load(factor_ptr + at, mask=live, other=0.0)[:, None]
                    if delta_ptr is not None:
                        delta = tl.load(delta_ptr + at, mask=live, other=0.0)
                else:
                    a = load_tile(q_ptr + h * q_stride_h, row, q_stride_t, live, 0, DK, INNER).to(compute)
                    if MAP == EXP:
                        a, shift = exp_rows(a, top)
                    else:
                        a = feature_map(a, live, 0, MAP, DK)
                if not GRADIENT:
                    z = tl.sum(a * sums[None, :], 1)
                a = a.to(operand)
                y = tl.dot(a, state.to(operand), input_precision=PRECISION)
                if BIAS and not GRADIENT:
                    y += row0[None, :]
                    z += count
                if CAUSAL:
                    scores = tl.dot(a, tl.trans(key), input_precision=PRECISION)
                    if GRADIENT:
                        if delta_ptr is not None:
                            scores += delta[:, None]
                    elif BIAS:
                        scores += 1.0
                    if decay_ptr is not None:
                        y *= near[:, None]
                        scores *= between
                        if not GRADIENT:
                            z *= near
                    if not GRADIENT:
                        counted = past & seen[None, :] if BIAS else past
                        z += tl.sum(tl.where(counted, scores, 0.0), 1)
                    scores = tl.where(past, scores, 0.0)
                    y += tl.where(local >= poison, float("nan"), 0.0)[:, None]
                    y = tl.dot(scores.to(operand), clean, acc=y, input_precision=PRECISION)
                if GRADIENT:
                    if delta_ptr is not None:
                        if CAUSAL and decay_ptr is not None:
                            delta *= near
                        y += delta[:, None] * row0[None, :]
                    x = load_tile(q_ptr + h * q_stride_h, row, q_stride_t, live, x_first, DK, X).to(compute)
                    if MAP == EXP:
                        x += top[None, :]
                        if normalizer_ptr is not None:
                            x -= load_logarithm(normalizer_ptr, at, live)[:, None]
                        y = times_exp(y, x)
                    else:
                        y = through_feature_map(y, x, MAP)
                else:
                    if NORMALIZE:
                        if MAP == EXP:
                            tl.store(normalizer_ptr + at, shift + tl.log(z), mask=tl.where(column == 0, live, False))
                            y = tl.where((z == 0.0)[:, None], 0.0, y / z[:, None])
                        else:
                            tl.store(normalizer_ptr + at, z, mask=tl.where(column == 0, live, False))
                            bound = tl.full((), eps, compute)
                            guarded = tl.where(tl.abs(z) < bound, tl.where(z < 0.0, -bound, bound), z)
                            y = y / guarded[:, None]
                    else:
                        y = y * tl.full((), scale, compute)
                        if MAP == EXP:
                            y = times_exp(y, shift[:, None])
                channel = first + tl.arange(0, OUTER)
                tl.store(
                    result_ptr + at[:, None] * WIDTH + channel[None, :],
                    y.to(result_ptr.dtype.element_ty),
                    mask=live[:, None] & (channel < WIDTH)[None, :],
                )
            if CAUSAL:
                if decay_ptr is not None:
                    state *= carried
                    row0 *= carried
                    sums *= carried
                    count *= carried
                state = tl.dot(tl.trans(key), added, acc=state, input_precision=PRECISION)
                if GRADIENT or BIAS:
                    row0 += added_row0
                if not GRADIENT:
                    sums += added_sums
                    count += tl.sum(weight, 0)
    if CAUSAL and not GRADIENT:
        if last:
            place = n * heads + head
            store_state(
                last_kv_ptr, last_key_sum_ptr, place, first, state, row0, sums, count, BIAS, DK, DV, INNER, OUTER
            )
            if MAP == EXP:
                channel = tl.arange(0, X)
                tl.store(last_key_max_ptr + place * DK + channel, top, mask=tl.where(column == 0, channel < DK, False))
