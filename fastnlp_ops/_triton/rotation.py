"""RoPE inside kernels: cosines and sines of positions, turning pairs of channels, turning them back."""

import triton
import triton.language as tl


@triton.jit
def cos_sin(position, first, SIZE: tl.constexpr, CHANNELS: tl.constexpr, dtype: tl.constexpr):
    """Of the angles position * 10000^(-2m / SIZE), two [tokens, CHANNELS / 2] in `dtype`, from channel `first` on.

    The angle is reduced to an eighth of a turn in float64, where float32 would be off by 2e-4 at position 8,000. What
    is left is a Taylor polynomial: sin and cos of CUDA keep a stack frame for angles of any size.
    """
    pair = (first // 2 + tl.arange(0, CHANNELS // 2)).to(tl.float64)
    turns = tl.exp2(pair * (-26.575424759098898 / SIZE)) * 0.15915494309189535  # 10000^(-2m / SIZE) / 2 pi
    quarters = position.to(tl.float64)[:, None] * (4.0 * turns)[None, :]
    nearest = tl.floor(quarters + 0.5)
    quadrant = (nearest - 4.0 * tl.floor(nearest * 0.25)).to(tl.int32)
    x = ((quarters - nearest) * 1.5707963267948966).to(dtype)  # in [-pi / 4, pi / 4]
    square = x * x
    cos = tl.full(x.shape, 1.0, dtype)
    sin = tl.full(x.shape, 1.0, dtype)
    TERMS: tl.constexpr = 8 if dtype == tl.float64 else 5
    for i in tl.static_range(TERMS):
        cos = 1.0 - cos * square * (1.0 / ((2 * TERMS - 2 * i - 1) * (2 * TERMS - 2 * i)))
        sin = 1.0 - sin * square * (1.0 / ((2 * TERMS - 2 * i) * (2 * TERMS - 2 * i + 1)))
    sin = x * sin
    odd = (quadrant & 1) != 0
    turned_cos = tl.where(odd, sin, cos)
    turned_sin = tl.where(odd, cos, sin)
    return (
        tl.where((quadrant == 1) | (quadrant == 2), -turned_cos, turned_cos),
        tl.where(quadrant >= 2, -turned_sin, turned_sin),
    )


@triton.jit
def rotate(x, cos, sin):
    """x [tokens, D] with its pairs (2m, 2m + 1) turned; with -sin, turned back."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return tl.interleave(even * cos - odd * sin, odd * cos + even * sin)
