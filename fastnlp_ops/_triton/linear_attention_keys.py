"""Rows of keys: dv and dk. A program walks along a segment of tokens from right to left.

    dv_j = k_j R_j + sum_{t >= j in the block} sim_tj dout_t                    R = sum_t q_t^T dout_t behind the block
    dk_j = (v_j R_j^T + dkey_sum) + sum_t (dout_t . v_j + delta_t) q_t          through the feature map

dout is divided by the denominator, delta is the denominator's gradient. Without causal R is that of all queries.
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


@triton.jit
def query_exponents(
    q_ptr, q_stride_t, normalizer_ptr, row, at, live, first, compute: tl.constexpr, DK: tl.constexpr, X: tl.constexpr
):
    """q - L, -inf for queries that saw no key."""
    q = load_tile(q_ptr, row, q_stride_t, live, first, DK, X).to(compute)
    if normalizer_ptr is not None:
        q -= load_logarithm(normalizer_ptr, at, live)[:, None]
    return exponents(q, live, first, DK)


@triton.jit
def query_values(
    dout_ptr, factor_ptr, at, live, first, scale, compute: tl.constexpr, DV: tl.constexpr, Y: tl.constexpr
):
    """dout over the denominator, or times `scale`."""
    dout = load_tile(dout_ptr, at, DV, live, first, DV, Y).to(compute)
    if factor_ptr is None:
        dout *= tl.full((), scale, compute)
    else:
        dout *= tl.load(factor_ptr + at, mask=live, other=0.0)[:, None]
    return dout


@triton.jit(do_not_specialize=SIZES)
def linear_attention_keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,  # [B, T, heads * GROUP, DV]
    result_ptr,  # [B, T, heads, DV or DK]: dv or dk
    normalizer_ptr,  # [B, T, heads * GROUP]: logarithms, of "exp" with normalize
    factor_ptr,  # [B, T, heads * GROUP] of dout, or None: `scale`
    delta_ptr,
    products_ptr,  # [columns, B, T, heads]: phi(k) . dphi(k), in parts; written with dv where there is a decay
    mask_ptr,
    decay_ptr,
    cu_ptr,
    kv_ptr,  # R behind each slot, or of each sequence without CAUSAL
    key_sum_ptr,
    key_max_ptr,
    last_kv_ptr,  # R in front of each sequence: written with dv
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
    batch,
    scale: "fp64",
    OF_KEYS: tl.constexpr,  # dk, not dv
    CAUSAL: tl.constexpr,
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
    column, head, slot, n, b, begin, end, is_first, _ = locate(
        cu_ptr, tokens, segment, segments, sequences, heads, columns
    )
    if (begin >= end) & (not is_first):
        return
    compute: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    operand: tl.constexpr = tl.bfloat16 if q_ptr.dtype.element_ty == tl.bfloat16 else compute
    X: tl.constexpr = OUTER if OF_KEYS else INNER
    Y: tl.constexpr = INNER if OF_KEYS else OUTER
    WIDTH: tl.constexpr = DK if OF_KEYS else DV
    first = column * OUTER
    x_first = first if OF_KEYS else 0
    y_first = 0 if OF_KEYS else first
    q_ptr += b * q_stride_b + head * GROUP * q_stride_h
    k_ptr += b * k_stride_b + head * k_stride_h
    v_ptr += b * v_stride_b + head * v_stride_h
    place = (slot if CAUSAL else n) * heads + head
    state, row0, sums, count = load_state(
        kv_ptr, key_sum_ptr, place, first, OF_KEYS, BIAS, DK, DV, INNER, OUTER, compute
    )
    if MAP == EXP:
        top = load_maxima(key_max_ptr, place, x_first, DK, X, compute)
    local = tl.arange(0, BLOCK)
    blocks = tl.cdiv(end - begin, BLOCK).to(tl.int32)
    for i in range(blocks):
        index = (blocks - 1 - i) * BLOCK + local
        future = index[:, None] <= index[None, :]  # of the loop's variable, or the compiler keeps it in registers
        row = begin + index
        inside = row < end
        there = inside
        if mask_ptr is not None:
            there = inside & (tl.load(mask_ptr + b * tokens + row, mask=inside, other=0) != 0)
        if CAUSAL and MAP == EXP:
            low = tl.full([X], float("inf"), compute)
            high = tl.full([X], float("-inf"), compute)
            for h in range(GROUP):
                at = (b * tokens + row) * (heads * GROUP) + head * GROUP + h
                x = query_exponents(
                    q_ptr + h * q_stride_h, q_stride_t, normalizer_ptr, row, at, inside, x_first, compute, DK, X
                )
                high = tl.maximum(high, tl.max(x, 0))
                low = tl.minimum(low, tl.min(tl.where(x == float("-inf"), float("inf"), x), 0))
            steps = steps_of(high, low, top, BLOCK)
        else:
            steps = 1
        for step in range(steps):
            live = inside
            if CAUSAL and MAP == EXP:
                live = tl.where(steps == 1, inside, inside & (local == BLOCK - 1 - step))
                before = top
                for h in range(GROUP):
                    at = (b * tokens + row) * (heads * GROUP) + head * GROUP + h
                    x = query_exponents(
                        q_ptr + h * q_stride_h, q_stride_t, normalizer_ptr, row, at, live, x_first, compute, DK, X
                    )
                    top = tl.maximum(top, tl.max(x, 0))
                ratio = rescaling(before, top)
                if OF_KEYS:
                    state *= ratio[None, :]
                    row0 *= ratio
                else:
                    state *= ratio[:, None]
                    sums *= ratio
            seen = there & live
            if OF_KEYS:
                a = load_tile(v_ptr, row, v_stride_t, seen, 0, DV, INNER).to(compute)
            else:
                a = load_tile(k_ptr, row, k_stride_t, seen, 0, DK, INNER).to(compute)
                if MAP == EXP:
                    a, shift = exp_rows(a, top)
                else:
                    a = feature_map(a, seen, 0, MAP, DK)
            z = tl.sum(a * sums[None, :], 1)
            a = a.to(operand)
            y = tl.dot(a, state.to(operand), input_precision=PRECISION)
            if BIAS:
                z += count
            behind = tl.zeros([BLOCK], compute) + 1.0
            if CAUSAL:
                gained = tl.zeros([OUTER], compute)
                if decay_ptr is not None:
                    g, total = decays(decay_ptr + b * decay_stride_b + head * decay_stride_h, row, decay_stride_t, seen)
                    between = decays_between(-g, -g, future, compute)
                    near, far = tl.exp((total - g).to(compute)), tl.exp(g.to(compute))
                    carried = tl.exp(total.to(compute))
                    behind = near
                    y *= near[:, None]
                    z *= near
                    state *= carried
                    sums *= carried
                    count *= carried
                for h in range(GROUP):
                    at = (b * tokens + row) * (heads * GROUP) + head * GROUP + h
                    if MAP == EXP:
                        x = query_exponents(
                            q_ptr + h * q_stride_h, q_stride_t, normalizer_ptr, row, at, live, x_first, compute, DK, X
                        )
                        q = exp_from(x, top)
                    else:
                        q = load_tile(q_ptr + h * q_stride_h, row, q_stride_t, live, x_first, DK, X).to(compute)
                        q = feature_map(q, live, x_first, MAP, DK)
                    dout = query_values(dout_ptr, factor_ptr, at, live, y_first, scale, compute, DV, Y)
                    weight = tl.full([BLOCK], 1.0, compute)
                    if decay_ptr is not None:
                        weight = far
                    if delta_ptr is not None:
                        delta = tl.load(delta_ptr + at, mask=live, other=0.0)
                        if OF_KEYS:
                            gained += tl.sum((delta * weight)[:, None] * q, 0)
                        else:
                            sums += tl.sum((delta * weight)[:, None] * q, 0)
                            count += tl.sum(delta * weight, 0)
                    if OF_KEYS:
                        query, value = dout.to(operand), q
                    else:
                        query, value = q.to(operand), dout
                    clean, bad = split_finite(value)
                    poison = tl.max(tl.where(bad, local, -1), 0)
                    clean = clean.to(operand)
                    if decay_ptr is not None:
                        value *= weight[:, None]
                    if BIAS and not OF_KEYS:
                        gained += tl.sum(value, 0)
                    value = value.to(operand)
                    scores = tl.dot(a, tl.trans(query), input_precision=PRECISION)
                    if OF_KEYS:
                        if delta_ptr is not None:
                            scores += delta[None, :]
                    elif BIAS:
                        scores += 1.0
                    if decay_ptr is not None:
                        scores *= between
                    if delta_ptr is not None and not OF_KEYS:
                        z += tl.sum(tl.where(future, scores * delta[None, :], 0.0), 1)
                    scores = tl.where(future, scores, 0.0)
                    y += tl.where(local <= poison, float("nan"), 0.0)[:, None]
                    y = tl.dot(scores.to(operand), clean, acc=y, input_precision=PRECISION)
                    state = tl.dot(tl.trans(query), value, acc=state, input_precision=PRECISION)
            if OF_KEYS or BIAS:  # late, when registers are free
                y += behind[:, None] * row0[None, :]
            if CAUSAL:
                if decay_ptr is not None:
                    row0 *= carried
                row0 += gained
            at = (b * tokens + row) * heads + head
            channel = first + tl.arange(0, OUTER)
            if OF_KEYS:
                x = load_tile(k_ptr, row, k_stride_t, seen, x_first, DK, X).to(compute)
                y = times_exp(y, x + top[None, :]) if MAP == EXP else through_feature_map(y, x, MAP)
            else:
                if MAP == EXP:
                    y = times_exp(y, shift[:, None])
                if products_ptr is not None:
                    v = load_tile(v_ptr, row, v_stride_t, seen, first, DV, Y).to(compute)
                    products = tl.sum(v * y, 1) + tl.where(column == 0, z, 0.0)
                    tl.store(
                        products_ptr + column.to(tl.int64) * batch * tokens * heads + at,
                        tl.where(seen, products, 0.0),
                        mask=live,
                    )
            tl.store(
                result_ptr + at[:, None] * WIDTH + channel[None, :],
                tl.where(seen[:, None], y, 0.0).to(result_ptr.dtype.element_ty),
                mask=live[:, None] & (channel < WIDTH)[None, :],
            )
    if CAUSAL and last_kv_ptr is not None:
        if is_first:
            place = n * heads + head
            store_state(
                last_kv_ptr, last_key_sum_ptr, place, first, state, row0, sums, count, BIAS, DK, DV, INNER, OUTER
            )
            if MAP == EXP:
                channel = tl.arange(0, X)
                tl.store(last_key_max_ptr + place * DK + channel, top, mask=tl.where(column == 0, channel < DK, False))
