"""What is computed for each row of q or k alone: softmax over features, unit length, and a row's share of gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnlp_ops._triton.linear_attention_tiles import EXP, SOFTMAX, load_tile
from fastnlp_ops._triton.log_sum_exp import compute_dtype


@triton.jit
def map_row(x, there, SIZE: tl.constexpr, MAP: tl.constexpr):
    """(phi(x), what its derivative is multiplied by): softmax, or x / |x|."""
    if MAP == SOFTMAX:
        channel = tl.arange(0, x.shape[1])
        x = tl.where((channel < SIZE)[None, :], x, float("-inf"))
        e = tl.exp(x - tl.max(x, 1)[:, None])
        phi = e / tl.sum(e, 1)[:, None]
        slope = phi
    else:  # by its largest value first: squares of 1e20 are no float32
        largest = tl.maximum(tl.max(tl.abs(x), 1), 1e-12)
        x = x / largest[:, None]
        length = tl.maximum(tl.sqrt(tl.sum(x * x, 1)) * largest, 1e-12)
        phi = x * (largest / length)[:, None]
        slope = (1.0 / length)[:, None] + tl.zeros_like(x)
    return phi, slope


@triton.jit(do_not_specialize=("rows", "tokens", "heads"))
def linear_attention_map_rows_kernel(
    x_ptr,
    dphi_ptr,  # [B, T, H, SIZE] of the compute type, or None
    result_ptr,  # [B, T, H, SIZE]: phi(x), or dx
    mask_ptr,  # [B, T] or None: what is masked is not read
    rows,
    tokens,
    heads,
    stride_b,
    stride_t,
    stride_h,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    MAP: tl.constexpr,
):
    compute: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    if mask_ptr is not None:
        there = there & (tl.load(mask_ptr + row // heads, mask=there, other=0) != 0)
    source = row // (tokens * heads) * stride_b + row // heads % tokens * stride_t + row % heads * stride_h
    phi, slope = map_row(load_tile(x_ptr, source, 1, there, 0, SIZE, WIDTH).to(compute), there, SIZE, MAP)
    if dphi_ptr is not None:
        dphi = load_tile(dphi_ptr, row, SIZE, there, 0, SIZE, WIDTH)
        phi = slope * (dphi - tl.sum(phi * dphi, 1)[:, None] * (1.0 if MAP == SOFTMAX else phi))
    channel = tl.arange(0, WIDTH)
    where = (row < rows)[:, None] & (channel < SIZE)[None, :]
    tl.store(result_ptr + row[:, None] * SIZE + channel[None, :], phi.to(result_ptr.dtype.element_ty), mask=where)


def map_rows(x: Tensor, feature_map: int, mask: Tensor | None = None, dphi: Tensor | None = None) -> Tensor:
    """phi(x) of "softmax" over features or "cosine+1", or the gradient by x, [B, T, H, D] contiguous in x's dtype."""
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, width = x.numel() // x.shape[3], triton.next_power_of_2(x.shape[3])
    block = max(1, 2048 // width)
    if rows:
        linear_attention_map_rows_kernel[(triton.cdiv(rows, block),)](
            x, dphi, result, mask, rows, x.shape[1], x.shape[2], *x.stride()[:3], SIZE=x.shape[3], WIDTH=width,
            ROWS=block, MAP=feature_map, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return result


@triton.jit(do_not_specialize=("rows",))
def linear_attention_delta_kernel(
    dout_ptr,  # [rows, DV]
    out_ptr,
    normalizer_ptr,  # [rows], or None
    factor_ptr,
    delta_ptr,
    products_ptr,  # None without a decay
    rows,
    eps: "fp64",
    MAP: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    compute: tl.constexpr = tl.float64 if dout_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    dout = load_tile(dout_ptr, row, DV, there, 0, DV, WIDTH).to(compute)
    out = load_tile(out_ptr, row, DV, there, 0, DV, WIDTH).to(compute)
    product = tl.sum(dout * out, 1)
    if normalizer_ptr is not None:
        delta = -product
        if MAP != EXP:
            z = tl.load(normalizer_ptr + row, mask=there, other=1.0)
            bound = tl.full((), eps, compute)
            guarded = tl.abs(z) < bound
            z = tl.where(guarded, tl.where(z < 0.0, -bound, bound), z)
            delta = tl.where(guarded, 0.0, delta / z)
            product = tl.where(guarded, product, 0.0)
            tl.store(factor_ptr + row, 1.0 / z, mask=there)
        tl.store(delta_ptr + row, delta, mask=there)
    if products_ptr is not None:
        tl.store(products_ptr + row, product, mask=there)


def row_gradients(
    dout: Tensor, out: Tensor, normalizer: Tensor | None, feature_map: int, decays: bool, eps: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(factor, delta, products) [B, T, H]: what dout is multiplied by (None: `scale`), gradients of denominators, and
    phi(q) . dphi(q), which a decay's gradient takes. Normalised rows do not change with the size of phi(q): there it is
    0, unless the denominator was guarded.
    """
    compute = compute_dtype(dout)

    def empty(wanted: bool) -> Tensor | None:
        return torch.empty(dout.shape[:3], dtype=compute, device=dout.device) if wanted else None

    normalize = normalizer is not None
    factor, delta, products = empty(normalize and feature_map != EXP.value), empty(normalize), empty(decays)
    rows, width = dout.numel() // dout.shape[3], triton.next_power_of_2(dout.shape[3])
    block = max(1, 2048 // width)
    if rows and (normalize or decays):
        linear_attention_delta_kernel[(triton.cdiv(rows, block),)](
            dout, out, normalizer, factor, delta, products, rows, eps, MAP=feature_map, DV=dout.shape[3], WIDTH=width,
            ROWS=block, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return factor, delta, products
