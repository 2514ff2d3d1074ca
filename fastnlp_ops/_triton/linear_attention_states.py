"""States of segments: the sums of each, and the scan that turns them into the states before (or behind) each."""

import triton
import triton.language as tl

from fastnlp_ops._triton.linear_attention_keys import query_exponents, query_values
from fastnlp_ops._triton.linear_attention_tiles import (
    EXP,
    SIZES,
    decays,
    exp_from,
    exponents,
    feature_map,
    load_maxima,
    load_tile,
    locate,
    rescaling,
    store_state,
)


@triton.jit(do_not_specialize=SIZES)
def linear_attention_sums_kernel(
    q_ptr,  # of queries the sums of phi(q)^T dout and phi(q) delta are taken, of keys those of phi(k)^T v and phi(k)
    k_ptr,
    v_ptr,
    dout_ptr,
    normalizer_ptr,
    factor_ptr,
    delta_ptr,
    mask_ptr,
    decay_ptr,
    cu_ptr,
    kv_ptr,  # [slots, heads, ..]
    key_sum_ptr,
    key_max_ptr,
    total_ptr,  # [slots, heads]: sum of log decays
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
    QUERIES: tl.constexpr,
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
    column, head, slot, _, b, begin, end, is_first, _ = locate(
        cu_ptr, tokens, segment, segments, sequences, heads, columns
    )
    if (begin >= end) & (not is_first):
        return
    compute: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    operand: tl.constexpr = tl.bfloat16 if q_ptr.dtype.element_ty == tl.bfloat16 else compute
    first = column * OUTER
    q_ptr += b * q_stride_b + head * GROUP * q_stride_h
    k_ptr += b * k_stride_b + head * k_stride_h
    v_ptr += b * v_stride_b + head * v_stride_h
    state = tl.zeros([INNER, OUTER], compute)
    row0 = tl.zeros([OUTER], compute)
    sums = tl.zeros([INNER], compute)
    count = tl.zeros([1], compute)
    decayed = tl.zeros([1], tl.float64)
    if MAP == EXP:
        top = tl.full([INNER], float("-inf"), compute)
    local = tl.arange(0, BLOCK)
    blocks = tl.cdiv(end - begin, BLOCK).to(tl.int32)
    for i in range(blocks):
        block = blocks - 1 - i if QUERIES else i
        row = begin + (block * BLOCK + local)
        inside = row < end
        there = inside
        if mask_ptr is not None:
            there = inside & (tl.load(mask_ptr + b * tokens + row, mask=inside, other=0) != 0)
        if decay_ptr is not None:
            g, total = decays(decay_ptr + b * decay_stride_b + head * decay_stride_h, row, decay_stride_t, there)
            weight = tl.exp((g if QUERIES else total - g).to(compute))
            carried = tl.exp(total.to(compute))
            state *= carried
            row0 *= carried
            sums *= carried
            count *= carried
            decayed += total
        for h in range(GROUP if QUERIES else 1):
            if QUERIES:
                at = (b * tokens + row) * (heads * GROUP) + head * GROUP + h
                y = query_values(dout_ptr, factor_ptr, at, inside, first, scale, compute, DV, OUTER)
                e = inside.to(compute)
                if delta_ptr is not None:
                    e = tl.load(delta_ptr + at, mask=inside, other=0.0)
                x_ptr, stride, seen = q_ptr + h * q_stride_h, q_stride_t, inside
            else:
                y = load_tile(v_ptr, row, v_stride_t, there, first, DV, OUTER).to(compute)
                e = there.to(compute)
                x_ptr, stride, seen = k_ptr, k_stride_t, there
            if MAP == EXP:
                if QUERIES:
                    x = query_exponents(x_ptr, stride, normalizer_ptr, row, at, seen, 0, compute, DK, INNER)
                else:
                    x = load_tile(x_ptr, row, stride, seen, 0, DK, INNER).to(compute)
                    x = exponents(x, seen, 0, DK)
                before = top
                top = tl.maximum(top, tl.max(x, 0))
                x = exp_from(x, top)
                ratio = rescaling(before, top)
                state *= ratio[:, None]
                sums *= ratio
            else:
                x = load_tile(x_ptr, row, stride, seen, 0, DK, INNER).to(compute)
                x = feature_map(x, seen, 0, MAP, DK)
            if decay_ptr is not None:
                y *= weight[:, None]
                e *= weight
            state = tl.dot(tl.trans(x.to(operand)), y.to(operand), acc=state, input_precision=PRECISION)
            if BIAS:
                row0 += tl.sum(y, 0)
                count += tl.sum(e, 0)
            if not QUERIES or delta_ptr is not None:
                sums += tl.sum(e[:, None] * x, 0)
    place = slot * heads + head
    store_state(kv_ptr, key_sum_ptr, place, first, state, row0, sums, count, BIAS, DK, DV, INNER, OUTER)
    if MAP == EXP:
        channel = tl.arange(0, INNER)
        tl.store(key_max_ptr + place * DK + channel, top, mask=tl.where(column == 0, channel < DK, False))
    if decay_ptr is not None:
        tl.store(total_ptr + place + tl.arange(0, 1), decayed.to(compute), mask=column + tl.arange(0, 1) == 0)


@triton.jit(do_not_specialize=SIZES)
def linear_attention_scan_kernel(
    kv_ptr,  # [slots, heads, F, DV]: sums; become the states before each slot unless a total is asked for
    key_sum_ptr,  # [slots, heads, F]
    key_max_ptr,  # [slots, heads, F]
    total_ptr,  # [slots, heads]
    start_kv_ptr,  # [sequences, heads, ..] or None
    start_key_sum_ptr,
    start_key_max_ptr,
    last_kv_ptr,  # [sequences, heads, ..] or None
    last_key_sum_ptr,
    last_key_max_ptr,
    cu_ptr,
    tokens,
    segment,
    segments,
    sequences,
    heads,
    columns,
    REVERSE: tl.constexpr,
    MAP: tl.constexpr,
    F: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    OUTER: tl.constexpr,
):
    """A program has ROWS rows of the state of a sequence and head."""
    first = tl.program_id(0) % columns * ROWS
    head = (tl.program_id(0) // columns % heads).to(tl.int64)
    n = (tl.program_id(0) // columns // heads).to(tl.int64)
    compute: tl.constexpr = kv_ptr.dtype.element_ty
    if cu_ptr is None:
        slot = n * segments
        count = segments + tl.full((), 0, tl.int64)
    else:
        start = tl.maximum(tl.load(cu_ptr + n).to(tl.int64), 0)
        stop = tl.minimum(tl.load(cu_ptr + n + 1).to(tl.int64), tokens)
        slot = start // segment + n
        count = tl.maximum(tl.cdiv(stop - start, segment), 1)
    row = first + tl.arange(0, ROWS)
    channel = tl.arange(0, OUTER)
    place = n * heads + head
    offset = row[:, None] * DV + channel[None, :]
    where = (row < F)[:, None] & (channel < DV)[None, :]
    state = tl.zeros([ROWS, OUTER], compute)
    sums = tl.zeros([ROWS], compute)
    if start_kv_ptr is not None:
        state = tl.load(start_kv_ptr + place * F * DV + offset, mask=where, other=0.0)
    if start_key_sum_ptr is not None:
        sums = tl.load(start_key_sum_ptr + place * F + row, mask=row < F, other=0.0)
    if MAP == EXP:
        top = load_maxima(start_key_max_ptr, place, first, F, ROWS, compute)
    for i in range(count.to(tl.int32)):
        index = count - 1 - i if REVERSE else slot * 0 + i
        at = (slot + index) * heads + head
        next_state = tl.load(kv_ptr + at * F * DV + offset, mask=where, other=0.0)
        next_sums = tl.load(key_sum_ptr + at * F + row, mask=row < F, other=0.0)
        if MAP == EXP:
            next_top = load_maxima(key_max_ptr, at, first, F, ROWS, compute)
        if last_kv_ptr is None:
            tl.debug_barrier()  # threads that hold the same element have all read it
            tl.store(kv_ptr + at * F * DV + offset, state, mask=where)
            tl.store(key_sum_ptr + at * F + row, sums, mask=row < F)
            if MAP == EXP:
                tl.store(key_max_ptr + at * F + row, top, mask=row < F)
        if MAP == EXP:
            higher = tl.maximum(top, next_top)
            old, new = rescaling(top, higher), rescaling(next_top, higher)
            state = state * old[:, None] + next_state * new[:, None]
            sums = sums * old + next_sums * new
            top = higher
        elif total_ptr is not None:
            carried = tl.exp(tl.load(total_ptr + at))
            state = state * carried + next_state
            sums = sums * carried + next_sums
        else:
            state += next_state
            sums += next_sums
    if last_kv_ptr is not None:
        tl.store(last_kv_ptr + place * F * DV + offset, state, mask=where)
        tl.store(last_key_sum_ptr + place * F + row, sums, mask=row < F)
        if MAP == EXP:
            tl.store(last_key_max_ptr + place * F + row, top, mask=row < F)
