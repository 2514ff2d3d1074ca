"""Decoding of GlobalPointer: all spans above a threshold, in order, and the choice of those that do not overlap."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnlp_ops._triton.global_pointer_spans import Call, check, check_tensor, guard
from fastnlp_ops._triton.global_pointer_tiles import (
    SIZES,
    dot_products,
    far_blocks,
    place,
    tokens,
    valid_cells,
    with_biases,
)


@triton.jit(do_not_specialize=SIZES)
def global_pointer_decode_kernel(
    near_ptr,  # [B, shared_heads, padded, D]
    far_ptr,
    near_bias_ptr,  # [B, n, heads]
    far_bias_ptr,
    counts_ptr,  # [B, heads, n]: spans that begin at a token
    offsets_ptr,  # [B * heads * n + 1]: spans before it; None to count
    spans_ptr,  # [found, 4]
    scores_ptr,  # [found]
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
    scale: tl.float64,
    threshold: tl.float64,
    TRIL: tl.constexpr,
    BAND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, _, pair, b, first_head = place(blocks, groups, shared_heads, GROUP)
    near, near_there = tokens(block, b, mask_ptr, n, BLOCK)
    near_ptr += pair * padded * D
    far_ptr += pair * padded * D
    begin, end = far_blocks(block, extents_ptr, b, n, max_span_length, True, TRIL, BAND, BLOCK)
    for h in range(first_head, tl.minimum(first_head + GROUP, heads)):
        row = (b * heads + h) * n + near
        if offsets_ptr is None:
            found = tl.zeros([BLOCK], tl.int32)
        else:
            found = tl.load(offsets_ptr + row, mask=near < n, other=0)
            limit = tl.load(offsets_ptr + row + 1, mask=near < n, other=0)
        for other in range(begin, end):
            far, far_there = tokens(other, b, mask_ptr, n, BLOCK)
            products = dot_products(near_ptr, block, far_ptr, other, scale, BLOCK, D, DEPTH, PRECISION)
            scores = with_biases(
                products, near_bias_ptr, far_bias_ptr, b, block, near_there, other, far_there, h, n, heads, BLOCK
            )
            valid = valid_cells(near, near_there, far, far_there, max_span_length, True, TRIL, BAND)
            hit = (valid & (scores > tl.full((), threshold, scores.dtype))).to(tl.int32)
            in_row = tl.sum(hit, 1)
            if offsets_ptr is not None:
                if tl.max(in_row, 0) > 0:
                    rank = tl.cumsum(hit, 1) - hit
                    # Both passes compute the same scores; whatever they did, nothing is written past a row's end.
                    filled = (hit != 0) & (rank < (limit - found)[:, None])
                    target = (spans_ptr + found * 4)[:, None] + rank * 4
                    tl.store(target, b, mask=filled)
                    tl.store(target + 1, h, mask=filled)
                    tl.store(target + 2, near[:, None], mask=filled)
                    tl.store(target + 3, far[None, :], mask=filled)
                    tl.store((scores_ptr + found)[:, None] + rank, scores, mask=filled)
            found += in_row
        if offsets_ptr is None:
            tl.store(counts_ptr + row, found, mask=near < n)


def global_pointer_decode(
    q: Tensor,
    k: Tensor,
    start_bias: Tensor | None,
    end_bias: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """(spans int64 [M, 4], scores [M]). Counted, then written: the host waits once, for M."""
    *cells, threshold = options
    call = Call("decode", q, start_bias, *cells)
    offsets = torch.zeros(call.B * call.H * call.n + 1, dtype=torch.int64, device=q.device)
    spans = torch.empty(0, 4, dtype=torch.int64, device=q.device)
    scores = torch.empty(0, dtype=call.compute, device=q.device)
    if call.empty:
        return spans, scores
    with guard(q):
        # No contraction of products and sums: the two passes are two programs, which must agree to the bit.
        prepared = call.prepare(q, k, start_bias, end_bias)
        arguments = {**prepared.arguments(), "threshold": threshold, "enable_fp_fusion": False}
        counts = torch.empty(call.B * call.H * call.n, dtype=torch.int32, device=q.device)
        places = dict.fromkeys(("offsets_ptr", "spans_ptr", "scores_ptr"))
        call.launch(global_pointer_decode_kernel, call.blocks, counts_ptr=counts, **places, **arguments)
        torch.cumsum(counts, 0, out=offsets[1:])
        found = int(offsets[-1])
        if found:
            spans, scores = spans.new_empty(found, 4), scores.new_empty(found)
            places = {"offsets_ptr": offsets, "spans_ptr": spans, "scores_ptr": scores}
            call.launch(global_pointer_decode_kernel, call.blocks, counts_ptr=None, **places, **arguments)
    return spans, scores


@triton.jit(do_not_specialize=("length",))
def flat_spans_kernel(
    order_ptr,  # [M]: indices of spans, sequence after sequence, the best first
    bounds_ptr,  # [sequences + 1]: where each begins in `order`
    spans_ptr,  # [M, 4]
    keep_ptr,  # [M], zeros
    reach_ptr,  # [sequences, length], `length`: the first token from here on that a kept span covers
    length,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    reach_ptr += b * length
    lane = tl.arange(0, CHUNK)
    for first in range(tl.load(bounds_ptr + b), tl.load(bounds_ptr + b + 1), CHUNK):
        there = first + lane < tl.load(bounds_ptr + b + 1)
        span = tl.load(order_ptr + first + lane, mask=there, other=0)
        start = tl.load(spans_ptr + span * 4 + 2, mask=there, other=0)
        end = tl.load(spans_ptr + span * 4 + 3, mask=there, other=0)
        low, high = tl.minimum(start, end), tl.maximum(start, end)
        there = there & (low >= 0) & (high < length)
        free = there & (tl.load(reach_ptr + low, mask=there, other=0) > high)
        while tl.max(free.to(tl.int32), 0) > 0:
            best = tl.min(tl.where(free, lane, CHUNK), 0)
            chosen_low = tl.sum(tl.where(lane == best, low, 0), 0)
            chosen_high = tl.sum(tl.where(lane == best, high, 0), 0)
            tl.store(keep_ptr + tl.sum(tl.where(lane == best, span, 0), 0), 1)
            free = free & ((low > chosen_high) | (high < chosen_low))
            for token in range(0, chosen_high + 1, TOKENS):
                token = token + tl.arange(0, TOKENS)
                before = tl.load(reach_ptr + token, mask=token <= chosen_high, other=0)
                covered = tl.maximum(token, chosen_low).to(before.dtype)
                tl.store(reach_ptr + token, tl.minimum(before, covered), mask=token <= chosen_high)
        tl.debug_barrier()  # other threads read `reach` next


def flat_spans(spans: Tensor, scores: Tensor, q: Tensor) -> Tensor:
    """Which spans to keep, bool [M]: greedy by score; of equals the first."""
    found, (sequences, length) = spans.shape[0], q.shape[:2]
    check_tensor("spans", spans, (found, 4), torch.int64, spans)
    check(tuple(scores.shape) == (found,), f"scores must have shape ({found},), got shape {tuple(scores.shape)}")
    keep = torch.zeros(found, dtype=torch.bool, device=spans.device)
    if found == 0:
        return keep
    with guard(spans):
        spans = spans.contiguous()
        by_score = scores.sort(descending=True, stable=True).indices
        order = by_score[spans[by_score, 0].sort(stable=True).indices]
        bounds = torch.searchsorted(spans[order, 0], torch.arange(sequences + 1, device=spans.device))
        reach = torch.full((sequences, length), length, dtype=torch.int32, device=spans.device)
        flat_spans_kernel[(sequences,)](
            order, bounds, spans, keep.view(torch.uint8), reach, length, CHUNK=128, TOKENS=512, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return keep
