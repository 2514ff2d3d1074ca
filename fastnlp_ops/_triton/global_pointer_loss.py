"""GlobalPointer's loss and its gradients from q and k: tiles of scores, never a tensor of n x n."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnlp_ops._triton.global_pointer_gradients import gradients, no_gradients
from fastnlp_ops._triton.global_pointer_labels import label_range, label_ranges, take_listed
from fastnlp_ops._triton.global_pointer_spans import Call, check_tensor, guard
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
from fastnlp_ops._triton.log_sum_exp import log_sum_exp, tile_log_sum_exp


@triton.jit(do_not_specialize=SIZES)
def global_pointer_loss_kernel(
    near_ptr,
    far_ptr,
    near_bias_ptr,
    far_bias_ptr,
    cells_ptr,
    ranges_ptr,
    partials_ptr,  # [B, heads, tiles, 4]
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
    partials_ptr += (b * heads * tiles + tile) * 4
    last_head = tl.minimum(first_head + GROUP, heads)
    if not counts(start, end, blocks, extents_ptr, b, n, BLOCK):
        for h in range(first_head, last_head):
            tl.store(partials_ptr + h * tiles * 4 + tl.arange(0, 4), tl.zeros([4], partials_ptr.dtype.element_ty))
        return
    near, near_there = tokens(start, b, mask_ptr, n, BLOCK)
    far, far_there = tokens(end, b, mask_ptr, n, BLOCK)
    near_ptr += pair * padded * D
    far_ptr += pair * padded * D
    products = dot_products(near_ptr, start, far_ptr, end, scale, BLOCK, D, DEPTH, PRECISION)
    valid = valid_cells(near, near_there, far, far_there, max_span_length, True, TRIL, BAND)
    products = tl.where(valid, products, float("-inf"))
    for h in range(first_head, last_head):
        scores = with_biases(
            products, near_bias_ptr, far_bias_ptr, b, start, near_there, end, far_there, h, n, heads, BLOCK
        )
        row = b * heads + h
        begin, finish = label_range(ranges_ptr, row * blocks + start, batch.to(tl.int64) * heads * blocks, False)
        apart_begin, apart_finish = label_range(
            ranges_ptr, row * blocks + start, batch.to(tl.int64) * heads * blocks, True
        )
        positive_top = tl.full((), 0.0, products.dtype)
        positive_total = tl.full((), 0.0, products.dtype)
        if (begin < finish) | (apart_begin < apart_finish):
            scores = take_listed(
                scores, cells_ptr, apart_begin, apart_finish, row, near, far, end * BLOCK, n, True, True
            )[0]
            scores, positive = take_listed(
                scores, cells_ptr, begin, finish, row, near, far, end * BLOCK, n, True, False
            )
            positive_top, positive_total = tile_log_sum_exp(-positive)
        top, total = tile_log_sum_exp(scores)
        target = partials_ptr + h * tiles * 4
        tl.store(target, top)
        tl.store(target + 1, total)
        tl.store(target + 2, positive_top)
        tl.store(target + 3, positive_total)


def _checked(cells: Tensor, q: Tensor) -> Tensor:
    check_tensor("cells", cells, (cells.numel(),), torch.int64, q)
    return cells.contiguous()


def global_pointer_loss(
    q: Tensor,
    k: Tensor,
    cells: Tensor,
    start_bias: Tensor | None,
    end_bias: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log_negative, log_positive) [B, H], and nothing saved: the gradient computes scores again."""
    *options, _ = options
    call = Call("loss", q, start_bias, *options)
    cells = _checked(cells, q)
    saved = torch.empty(0, dtype=call.compute, device=q.device)
    if call.empty:
        return call.rows(), call.rows(), saved
    with guard(q):
        prepared = call.prepare(q, k, start_bias, end_bias)
        partials = torch.empty(call.B, call.H, call.tiles, 4, dtype=call.compute, device=q.device)
        call.launch(
            global_pointer_loss_kernel,
            call.tiles,
            **prepared.arguments(),
            cells_ptr=cells,
            ranges_ptr=label_ranges(cells, call.B * call.H, call.blocks, call.n, call.block),
            partials_ptr=partials,
            tiles=call.tiles,
            width=call.width,
        )
        return *log_sum_exp(partials), saved


def global_pointer_loss_backward(
    dloss: Tensor,
    log_negative: Tensor,
    log_positive: Tensor,
    saved: Tensor,
    q: Tensor,
    k: Tensor,
    cells: Tensor,
    start_bias: Tensor | None,
    end_bias: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    """(dq, dk, dstart_bias, dend_bias)"""
    call = Call("loss_backward", q, start_bias, *options)
    cells = _checked(cells, q)
    rows = {"dloss": dloss, "log_negative": log_negative, "log_positive": log_positive}
    for name, x in rows.items():
        check_tensor(name, x, (call.B, call.H), call.compute, q)
    if call.empty:
        return no_gradients(q, k, start_bias, end_bias)
    with guard(q):
        prepared = call.prepare(q, k, start_bias, end_bias)
        return gradients(
            call,
            "loss",
            dloss.contiguous(),
            prepared,
            log_negative_ptr=log_negative.contiguous(),
            log_positive_ptr=log_positive.contiguous(),
            cells_ptr=cells,
            ranges_ptr=label_ranges(cells, call.B * call.H, call.blocks, call.n, call.block),
        )
