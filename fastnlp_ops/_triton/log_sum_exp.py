"""log(1 + sum e^x) of rows that several programs share: each leaves (m, sum e^(x - m)), m >= 0, and they are added in
order. The 1 of the sum is kept apart to the end, so that a sum of 1e-9 is not rounded away beside it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def tile_log_sum_exp(x):
    """(m, sum e^(x - m)) of a tile [M, N], with m = max(0, its maximum); -inf takes no part."""
    top = tl.maximum(tl.max(x, 1), 0.0)
    total = tl.sum(tl.exp(x - top[:, None]), 1)
    m = tl.max(top, 0)
    return m, tl.sum(total * tl.exp(top - m), 0)


@triton.jit
def _log1p(x):
    """For x >= 0. x / (1 + x - 1) undoes the rounding of 1 + x."""
    y = 1.0 + x
    rest = y - 1.0
    return tl.where(rest == 0.0, x, tl.log(y) * (x / tl.where(rest == 0.0, 1.0, rest)))


@triton.jit
def log_sum_exp_kernel(partials_ptr, log_negative_ptr, log_positive_ptr, parts, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    for side in tl.static_range(2):
        base = partials_ptr + row * parts * 4 + 2 * side
        top = tl.full((), 0.0, partials_ptr.dtype.element_ty)
        for first in range(0, parts, CHUNK):
            part = first + tl.arange(0, CHUNK)
            top = tl.maximum(top, tl.max(tl.load(base + part * 4, mask=part < parts, other=0.0), 0))
        total = tl.full((), 0.0, partials_ptr.dtype.element_ty)
        for first in range(0, parts, CHUNK):
            part = first + tl.arange(0, CHUNK)
            there = part < parts
            m = tl.load(base + part * 4, mask=there, other=0.0)
            total += tl.sum(tl.load(base + part * 4 + 1, mask=there, other=0.0) * tl.exp(m - top), 0)
        result = tl.where(top > 0.0, top + tl.log(total + tl.exp(-top)), _log1p(total))
        tl.store((log_negative_ptr if side == 0 else log_positive_ptr) + row, result)


def log_sum_exp(partials: Tensor) -> tuple[Tensor, Tensor]:
    """Partials [..., parts, 4]: (m, sum) of negatives, (m, sum) of positives -> (log_negative, log_positive) [...]."""
    log_negative, log_positive = (partials.new_empty(partials.shape[:-2]) for _ in range(2))
    chunk = min(256, triton.next_power_of_2(partials.shape[-2]))
    log_sum_exp_kernel[(log_negative.numel(),)](
        partials, log_negative, log_positive, partials.shape[-2], CHUNK=chunk, num_warps=1, enable_fp_fusion=True
    )
    return log_negative, log_positive


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
