"""R-Drop's divergence of two passes of GlobalPointer, and its gradients: tiles of scores, never a tensor of n x n."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnlp_ops._triton.global_pointer_gradients import gradients, no_gradients
from fastnlp_ops._triton.global_pointer_spans import Call, check, check_tensor, guard
from fastnlp_ops._triton.global_pointer_tiles import (
    SIZES,
    counts,
    dot_products,
    place,
    place_of_tile,
    tokens,
    valid_cells,
    with_biases,
)


@triton.jit(do_not_specialize=SIZES)
def global_pointer_divergence_kernel(
    near_ptr,  # [B, shared_heads, padded, D]
    far_ptr,
    near_bias_ptr,  # [B, n, heads]
    far_bias_ptr,
    other_near_ptr,
    other_far_ptr,
    other_near_bias_ptr,
    other_far_bias_ptr,
    partials_ptr,  # [B, heads, tiles]
    mask_ptr,
    extents_ptr,
    n,
    padded,
    batch,
    heads,
    shared_heads,
    groups,
    blocks,
    tiles,
    width,
    max_span_length,
    scale: tl.float64,
    TRIL: tl.constexpr,
    BAND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, _, pair, b, first_head = place(tiles, groups, shared_heads, GROUP)
    start, end = place_of_tile(tile, blocks, width, TRIL, BAND)
    partials_ptr += b * heads * tiles + tile
    last_head = tl.minimum(first_head + GROUP, heads)
    if not counts(start, end, blocks, extents_ptr, b, n, BLOCK):
        for h in range(first_head, last_head):
            tl.store(partials_ptr + h * tiles, 0.0)
        return
    near, near_there = tokens(start, b, mask_ptr, n, BLOCK)
    far, far_there = tokens(end, b, mask_ptr, n, BLOCK)
    at_pair = pair * padded * D
    products = dot_products(near_ptr + at_pair, start, far_ptr + at_pair, end, scale, BLOCK, D, DEPTH, PRECISION)
    other = dot_products(
        other_near_ptr + at_pair, start, other_far_ptr + at_pair, end, scale, BLOCK, D, DEPTH, PRECISION
    )
    valid = valid_cells(near, near_there, far, far_there, max_span_length, True, TRIL, BAND)
    for h in range(first_head, last_head):
        s1 = with_biases(
            products, near_bias_ptr, far_bias_ptr, b, start, near_there, end, far_there, h, n, heads, BLOCK
        )
        s2 = with_biases(
            other, other_near_bias_ptr, other_far_bias_ptr, b, start, near_there, end, far_there, h, n, heads, BLOCK
        )
        cells = tl.where(valid, (tl.sigmoid(s1) - tl.sigmoid(s2)) * (s1 - s2), 0.0)
        tl.store(partials_ptr + h * tiles, tl.sum(tl.sum(cells, 1), 0))


def global_pointer_divergence(
    q1: Tensor,
    k1: Tensor,
    start_bias1: Tensor | None,
    end_bias1: Tensor | None,
    q2: Tensor,
    k2: Tensor,
    start_bias2: Tensor | None,
    end_bias2: Tensor | None,
    *options: Any,
) -> Tensor:
    """[B, H]"""
    call = Call("divergence", q1, start_bias1, *options)
    check((start_bias1 is None) == (start_bias2 is None), "start_bias1 and start_bias2 must be given together")
    if call.empty:
        return call.rows()
    with guard(q1):
        first = call.prepare(q1, k1, start_bias1, end_bias1)
        second = call.prepare(q2, k2, start_bias2, end_bias2)
        partials = torch.empty(call.B, call.H, call.tiles, dtype=call.compute, device=q1.device)
        call.launch(
            global_pointer_divergence_kernel,
            call.tiles,
            **first.arguments(),
            **second.arguments(prefix="other_"),
            partials_ptr=partials,
            tiles=call.tiles,
            width=call.width,
        )
        return partials.sum(2)


def global_pointer_divergence_backward(
    ddivergence: Tensor,
    q1: Tensor,
    k1: Tensor,
    start_bias1: Tensor | None,
    end_bias1: Tensor | None,
    q2: Tensor,
    k2: Tensor,
    start_bias2: Tensor | None,
    end_bias2: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    """(dq1, dk1, dstart_bias1, dend_bias1, dq2, dk2, dstart_bias2, dend_bias2). Each pass moves in turn."""
    call = Call("divergence_backward", q1, start_bias1, *options)
    check((start_bias1 is None) == (start_bias2 is None), "start_bias1 and start_bias2 must be given together")
    check_tensor("ddivergence", ddivergence, (call.B, call.H), call.compute, q1)
    if call.empty:
        return no_gradients(q1, k1, start_bias1, end_bias1, q2, k2, start_bias2, end_bias2)
    with guard(q1):
        first = call.prepare(q1, k1, start_bias1, end_bias1)
        second = call.prepare(q2, k2, start_bias2, end_bias2)
        upstream = ddivergence.contiguous()
        return *gradients(call, "divergence", upstream, first, second), *gradients(
            call, "divergence", upstream, second, first
        )
