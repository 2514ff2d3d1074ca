"""GlobalPointer's scores as a dense tensor, and its gradients."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnlp_ops._triton.global_pointer_gradients import gradients, no_gradients
from fastnlp_ops._triton.global_pointer_spans import Call, check_tensor, guard
from fastnlp_ops._triton.global_pointer_tiles import (
    SIZES,
    counts,
    dot_products,
    place,
    tokens,
    valid_cells,
    with_biases,
)


@triton.jit(do_not_specialize=SIZES)
def global_pointer_scores_kernel(
    near_ptr,  # [B, shared_heads, padded, D]
    far_ptr,
    near_bias_ptr,  # [B, n, heads]
    far_bias_ptr,
    scores_ptr,  # [B, heads, n, n]
    mask_ptr,
    extents_ptr,
    n,
    padded,
    batch,
    heads,
    shared_heads,
    groups,
    blocks,
    max_span_length,
    row_stride,  # n, of which the compiler may know that 16 divides it
    scale: tl.float64,
    TRIL: tl.constexpr,
    BAND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, _, pair, b, first_head = place(blocks * blocks, groups, shared_heads, GROUP)
    start, end = tile // blocks, tile % blocks
    dtype: tl.constexpr = tl.float64 if near_ptr.dtype.element_ty == tl.float64 else tl.float32
    near, near_there = tokens(start, b, mask_ptr, n, BLOCK)
    far, far_there = tokens(end, b, mask_ptr, n, BLOCK)
    valid = valid_cells(near, near_there, far, far_there, max_span_length, True, TRIL, BAND)
    products = tl.zeros([BLOCK, BLOCK], dtype)
    there = counts(start, end, blocks, extents_ptr, b, n, BLOCK)
    if TRIL:
        there = there & (start <= end)
    if there:
        near_ptr += pair * padded * D
        far_ptr += pair * padded * D
        products = dot_products(near_ptr, start, far_ptr, end, scale, BLOCK, D, DEPTH, PRECISION)
    inside = (near < n)[:, None] & (far < n)[None, :]
    lane = tl.arange(0, BLOCK)
    for h in range(first_head, tl.minimum(first_head + GROUP, heads)):
        scores = with_biases(
            products, near_bias_ptr, far_bias_ptr, b, start, near_there, end, far_there, h, n, heads, BLOCK
        )
        scores = tl.where(valid, scores, float("-inf")).to(scores_ptr.dtype.element_ty)
        target = scores_ptr + ((b * heads + h) * n + start * BLOCK) * row_stride + end * BLOCK
        tl.store(target + lane[:, None] * row_stride + lane[None, :], scores, mask=inside)


def global_pointer_scores(
    q: Tensor, k: Tensor, start_bias: Tensor | None, end_bias: Tensor | None, *options: Any
) -> Tensor:
    """[B, H, n, n]"""
    call = Call("scores", q, start_bias, *options)
    scores = torch.empty(call.B, call.H, call.n, call.n, dtype=q.dtype, device=q.device)
    if call.empty:
        return scores
    with guard(q):
        prepared = call.prepare(q, k, start_bias, end_bias)
        call.launch(
            global_pointer_scores_kernel,
            call.blocks**2,
            **prepared.arguments(),
            scores_ptr=scores,
            row_stride=call.n,
        )
    return scores


def global_pointer_scores_backward(
    dscores: Tensor,
    q: Tensor,
    k: Tensor,
    start_bias: Tensor | None,
    end_bias: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    """(dq, dk, dstart_bias, dend_bias)"""
    call = Call("scores_backward", q, start_bias, *options)
    check_tensor("dscores", dscores, (call.B, call.H, call.n, call.n), q.dtype, q)
    if call.empty:
        return no_gradients(q, k, start_bias, end_bias)
    with guard(q):
        return gradients(call, "scores", dscores, call.prepare(q, k, start_bias, end_bias))
