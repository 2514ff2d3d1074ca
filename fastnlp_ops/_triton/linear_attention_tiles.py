"""What the linear_attention kernels do alike: places, feature maps, tiles, states.

Every kernel keeps a state for each sequence and key head, kv [F, Dv] = sum phi(k)^T v and key_sum [F] = sum phi(k), or
the same sums of phi(q), dout and the denominators' gradients. With "cosine+1", F = Dk + 1, and row 0 is the sum of v
and the count; for "exp" and "softmax" the rows are relative to e^key_max.
"""

import triton
import triton.language as tl

# Sizes that must not become part of what is compiled.
SIZES = ("tokens", "segment", "segments", "sequences", "heads", "columns")
IDENTITY, ELU, RELU, SQUARED_RELU, EXP, SOFTMAX, COSINE = (tl.constexpr(i) for i in range(7))
RISE = tl.constexpr(60.0)  # of a running maximum within a step; e^60 is 1e26


@triton.jit
def locate(cu_ptr, tokens, segment, segments, sequences, heads, columns):
    """(column, head, slot, sequence, batch, first token, one past the last, first and last segment of its sequence?)

    A slot is a segment of a sequence. Packed sequence i begins at slot cu[i] // segment + i, which leaves room for all
    before it, and needs no look at cu_seqlens on the host. Slots that are not used have no tokens and are neither the
    first nor the last.
    """
    column = tl.program_id(0) % columns
    head = (tl.program_id(0) // columns % heads).to(tl.int64)
    slot = (tl.program_id(0) // columns // heads).to(tl.int64)
    if cu_ptr is None:
        n = slot // segments
        index = slot % segments
        batch = n
        start = index * 0
        stop = start + tokens
    else:
        n = slot * 0
        after = n + sequences
        while after - n > 1:
            middle = (n + after) // 2
            if tl.load(cu_ptr + middle).to(tl.int64) // segment + middle <= slot:
                n = middle
            else:
                after = middle
        start = tl.maximum(tl.load(cu_ptr + n).to(tl.int64), 0)
        stop = tl.minimum(tl.load(cu_ptr + n + 1).to(tl.int64), tokens)
        index = slot - start // segment - n
        batch = slot * 0
    begin = start + index * segment
    end = tl.minimum(begin + segment, stop)
    first = index == 0
    last = (begin + segment >= stop) & (first | (begin < stop))
    return column, head, slot, n, batch, begin, end, first, last


@triton.jit
def load_tile(x_ptr, row, stride, there, first, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, WIDTH] from channel `first` on, 0 for rows that are not there and beyond the last channel."""
    channel = first + tl.arange(0, WIDTH)
    where = there[:, None] & (channel < SIZE)[None, :]
    return tl.load(x_ptr + row[:, None] * stride + channel[None, :], mask=where, other=0.0)


@triton.jit
def feature_map(x, there, first, MAP: tl.constexpr, SIZE: tl.constexpr):
    """phi(x) of what `load_tile` gave, 0 where that is. Comparisons are such that NaN stays NaN."""
    if MAP == ELU:
        channel = first + tl.arange(0, x.shape[1])
        phi = tl.where(x < 0.0, tl.exp(x), x + 1.0)
        x = tl.where(there[:, None] & (channel < SIZE)[None, :], phi, 0.0)
    elif MAP == RELU:
        x = tl.where(x < 0.0, 0.0, x)
    elif MAP == SQUARED_RELU:
        x = tl.where(x < 0.0, 0.0, x * x)
    return x


@triton.jit
def through_feature_map(dphi, x, MAP: tl.constexpr):
    """The gradient by x from that by phi(x)."""
    if MAP == ELU:
        dphi = tl.where(x < 0.0, dphi * tl.exp(x), dphi)
    elif MAP == RELU:
        dphi = tl.where(x <= 0.0, 0.0, dphi)
    elif MAP == SQUARED_RELU:
        dphi = tl.where(x <= 0.0, 0.0, dphi * 2.0 * x)
    return dphi


@triton.jit
def exponents(x, there, first, SIZE: tl.constexpr):
    """What `load_tile` gave as exponents: -inf where nothing was loaded."""
    channel = first + tl.arange(0, x.shape[1])
    return tl.where(there[:, None] & (channel < SIZE)[None, :], x, float("-inf"))


@triton.jit
def exp_from(x, top):
    """e^(x - top) of exponents [rows, channels] and a maximum of each channel."""
    return tl.where(x == float("-inf"), 0.0, tl.exp(x - top[None, :]))


@triton.jit
def rescaling(before, now):
    """e^(before - now) of maxima; of -inf and -inf it is 1."""
    return tl.exp(tl.where(before == now, 0.0, before - now))


@triton.jit
def times_exp(y, x):
    """y e^x, without an overflow on the way: y may be as small as e^x is large."""
    half = tl.exp(0.5 * x)
    return y * half * half


@triton.jit
def exp_rows(x, top):
    """(e^(x + top - M), M) with M the largest of a row, 0 where that is -inf."""
    x += top[None, :]
    shift = tl.max(x, 1)
    shift = tl.where(shift == float("-inf"), 0.0, shift)
    return tl.exp(x - shift[:, None]), shift


@triton.jit
def steps_of(top, low, before, BLOCK: tl.constexpr):
    """1, or BLOCK where rows must go one by one: a maximum would rise so far that the first rows lose their keys.

    top, low: of the block's exponents in each channel. Where no key was seen yet, none is lost before the first.
    """
    rise = top - tl.where(before == float("-inf"), low, before)
    return tl.where(tl.max(rise, 0) > RISE, BLOCK, 1)


@triton.jit
def split_finite(c):
    """c with 0 for what is not finite, and which rows had such.

    What is masked out of a tile of scores is 0, and 0 times infinity would still be NaN in rows of earlier tokens.
    """
    nothing = c * 0.0
    return tl.where(nothing == 0.0, c, 0.0), tl.sum(nothing, 1) != 0.0


@triton.jit
def decays(decay_ptr, row, stride, there):
    """(G, sum) of the block's log decays g, G_t = sum of g up to t, in float64. A masked token decays nothing.

    Beneath the bound e^g is 0 anyway, and -inf is no NaN.
    """
    g = tl.load(decay_ptr + row * stride, mask=there, other=0.0)
    lowest: tl.constexpr = -800.0 if g.dtype == tl.float64 else -120.0
    g = tl.where(g < lowest, lowest, g).to(tl.float64)
    return tl.cumsum(g, 0), tl.sum(g, 0)


@triton.jit
def decays_between(late, early, where, dtype: tl.constexpr):
    """e^(late - early) [rows of late, rows of early] of what `decays` gave, 1 elsewhere.

    As high and low parts: differences of float32 would lose digits, those of float64 are slow on most GPUs.
    """
    late_high, early_high = late.to(dtype), early.to(dtype)
    late_low, early_low = (late - late_high.to(tl.float64)).to(dtype), (early - early_high.to(tl.float64)).to(dtype)
    exponent = (late_high[:, None] - early_high[None, :]) + (late_low[:, None] - early_low[None, :])
    return tl.exp(tl.where(where, exponent, 0.0))


@triton.jit
def load_state(
    kv_ptr,
    key_sum_ptr,
    place,  # of the state among [.., heads]
    first,
    TURNED: tl.constexpr,
    BIAS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    dtype: tl.constexpr,
):
    """(state [INNER, OUTER], its row [OUTER], its column [INNER], corner) of the output's columns from `first` on.

    (kv, row 0, key_sum, count), or turned: (kv^T, key_sum, nothing, nothing). None is a state of zeros.
    """
    inner = tl.arange(0, INNER)
    outer = first + tl.arange(0, OUTER)
    state = tl.zeros([INNER, OUTER], dtype)
    row = tl.zeros([OUTER], dtype)
    column = tl.zeros([INNER], dtype)
    corner = tl.zeros([1], dtype)
    if kv_ptr is not None:
        kv_ptr += place * (DK + BIAS) * DV
        if TURNED:
            offset = (outer[None, :] + BIAS) * DV + inner[:, None]
            state = tl.load(kv_ptr + offset, mask=(outer < DK)[None, :] & (inner < DV)[:, None], other=0.0)
        else:
            offset = (inner[:, None] + BIAS) * DV + outer[None, :]
            state = tl.load(kv_ptr + offset, mask=(inner < DK)[:, None] & (outer < DV)[None, :], other=0.0)
            if BIAS:
                row = tl.load(kv_ptr + outer, mask=outer < DV, other=0.0)
    if key_sum_ptr is not None:
        key_sum_ptr += place * (DK + BIAS)
        if TURNED:
            row = tl.load(key_sum_ptr + BIAS + outer, mask=outer < DK, other=0.0)
        else:
            column = tl.load(key_sum_ptr + BIAS + inner, mask=inner < DK, other=0.0)
            if BIAS:
                corner = tl.load(key_sum_ptr + tl.arange(0, 1))
    return state, row, column, corner


@triton.jit
def store_state(
    kv_ptr,
    key_sum_ptr,
    place,
    first,
    state,
    row,
    column,
    corner,
    BIAS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
):
    """What `load_state` loads when it is not turned. key_sum is written with the first columns."""
    inner = tl.arange(0, INNER)
    outer = first + tl.arange(0, OUTER)
    kv_ptr += place * (DK + BIAS) * DV
    key_sum_ptr += place * (DK + BIAS)
    offset = (inner[:, None] + BIAS) * DV + outer[None, :]
    tl.store(kv_ptr + offset, state, mask=(inner < DK)[:, None] & (outer < DV)[None, :])
    tl.store(key_sum_ptr + BIAS + inner, column, mask=tl.where(first == 0, inner < DK, False))
    if BIAS:
        tl.store(kv_ptr + outer, row, mask=outer < DV)
        tl.store(key_sum_ptr + tl.arange(0, 1), corner, mask=first + tl.arange(0, 1) == 0)


@triton.jit
def load_maxima(max_ptr, place, first, SIZE: tl.constexpr, WIDTH: tl.constexpr, dtype: tl.constexpr):
    channel = first + tl.arange(0, WIDTH)
    top = tl.full([WIDTH], float("-inf"), dtype)
    if max_ptr is not None:
        top = tl.load(max_ptr + place * SIZE + channel, mask=channel < SIZE, other=float("-inf"))
    return top


@triton.jit
def load_logarithm(normalizer_ptr, place, there):
    """L of queries that saw a key; +inf elsewhere, so that what follows from it is e^-inf."""
    logarithm = tl.load(normalizer_ptr + place, mask=there, other=float("-inf"))
    return tl.where(logarithm == float("-inf"), float("inf"), logarithm)
