"""Gradients of all GlobalPointer ops by q, k and biases: one kernel.

    dnear_x = scale * R_x^T sum_y dscores[x, y] R_y far_y        dbias_x = sum_y dscores[x, y]

A program owns a block of near tokens and walks along the far blocks in order: no atomics, the same bits in every run.
What the ops differ in is dscores, which a tile computes anew from its products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnlp_ops._triton.global_pointer_labels import label_range, take_listed
from fastnlp_ops._triton.global_pointer_spans import Call, Prepared
from fastnlp_ops._triton.global_pointer_tiles import (
    SIZES,
    dot_product,
    dot_products,
    far_blocks,
    load_block,
    place,
    tokens,
    valid_cells,
    with_biases,
)
from fastnlp_ops._triton.rotation import cos_sin, rotate


@triton.jit
def _dscores_of_loss(
    scores,  # -inf where a cell is not valid
    dloss_ptr,
    log_negative_ptr,
    log_positive_ptr,
    cells_ptr,
    ranges_ptr,
    row,
    rows,
    blocks,
    start_block,
    starts,
    ends,
    first_end,
    n,
    START: tl.constexpr,
):
    dloss = tl.load(dloss_ptr + row)
    log_negative = tl.load(log_negative_ptr + row)
    begin, end = label_range(ranges_ptr, row * blocks + start_block, rows * blocks, False)
    apart_begin, apart_end = label_range(ranges_ptr, row * blocks + start_block, rows * blocks, True)
    if (begin < end) | (apart_begin < apart_end):
        scores = take_listed(scores, cells_ptr, apart_begin, apart_end, row, starts, ends, first_end, n, START, True)[0]
        scores, positive = take_listed(scores, cells_ptr, begin, end, row, starts, ends, first_end, n, START, False)
        dscores = tl.exp(scores - log_negative) - tl.exp(-positive - tl.load(log_positive_ptr + row))
    else:
        dscores = tl.exp(scores - log_negative)
    return dscores * dloss


@triton.jit
def _dscores_of_divergence(scores, other_scores, valid, dvalue):
    p = tl.sigmoid(scores)
    difference = p - tl.sigmoid(other_scores) + p * (1.0 - p) * (scores - other_scores)
    return tl.where(valid, difference * dvalue, 0.0)


@triton.jit
def _add_product(dnear, dscores, far, PRECISION: tl.constexpr):
    """dnear + dscores . far. bfloat16 rounds dscores; float16, which would underflow, goes through TF32 instead."""
    if far.dtype == tl.float16:
        return tl.dot(dscores, far.to(tl.float32), dnear, input_precision="tf32")
    else:
        return tl.dot(dscores.to(far.dtype), far, dnear, input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES)
def global_pointer_gradient_kernel(
    near_ptr,  # [B, shared_heads, padded, D]
    far_ptr,
    near_bias_ptr,  # [B, n, heads]
    far_bias_ptr,
    other_near_ptr,  # divergence: the pass to compare with
    other_far_ptr,
    other_near_bias_ptr,
    other_far_bias_ptr,
    upstream_ptr,  # scores: dscores [B, heads, n, n], any strides; otherwise [B, heads]
    upstream_stride_b,
    upstream_stride_h,
    upstream_stride_near,
    upstream_stride_far,
    log_negative_ptr,  # loss
    log_positive_ptr,
    cells_ptr,
    ranges_ptr,
    dnear_ptr,  # [groups, B, n, shared_heads, SIZE]
    dbias_ptr,  # [B, n, heads]
    mask_ptr,
    extents_ptr,
    positions_ptr,
    n,
    padded,
    batch,
    heads,
    shared_heads,
    groups,
    blocks,
    max_span_length,
    scale: tl.float64,
    dscale: tl.float64,
    KIND: tl.constexpr,
    START: tl.constexpr,
    ROPE: tl.constexpr,
    TRIL: tl.constexpr,
    BAND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    index, group, pair, b, first_head = place(blocks * (D // CHANNELS), groups, shared_heads, GROUP)
    block = index % blocks
    first_channel = index // blocks * CHANNELS
    dtype: tl.constexpr = tl.float64 if near_ptr.dtype.element_ty == tl.float64 else tl.float32
    if GROUP == 1:
        count = 1  # a constant, so that the loop over heads vanishes and the one around it is pipelined
    else:
        count = tl.minimum(GROUP, heads - first_head)
    lane = tl.arange(0, BLOCK)
    near, near_there = tokens(block, b, mask_ptr, n, BLOCK)
    at_pair = pair * padded * D
    if DEPTH == D:
        x = load_block(near_ptr + at_pair, block, 0, BLOCK, D, D)
        if KIND == "divergence":
            other_x = load_block(other_near_ptr + at_pair, block, 0, BLOCK, D, D)
    dnear = tl.zeros([BLOCK, CHANNELS], dtype)
    dbias = tl.zeros([BLOCK, GROUP], dtype)
    begin, end = far_blocks(block, extents_ptr, b, n, max_span_length, START, TRIL, BAND, BLOCK)
    for far_block in range(begin, end):
        far, far_there = tokens(far_block, b, mask_ptr, n, BLOCK)
        y = load_block(far_ptr + at_pair, far_block, first_channel, BLOCK, D, CHANNELS)
        if KIND != "scores":
            if DEPTH == D:  # what a program keeps, and what it loads anyway
                products = dot_product(x, y, scale, PRECISION)
            else:
                products = dot_products(
                    near_ptr + at_pair, block, far_ptr + at_pair, far_block, scale, BLOCK, D, DEPTH, PRECISION
                )
        if KIND == "divergence":
            if DEPTH == D:
                other_y = load_block(other_far_ptr + at_pair, far_block, 0, BLOCK, D, D)
                other_products = dot_product(other_x, other_y, scale, PRECISION)
            else:
                other_products = dot_products(
                    other_near_ptr + at_pair,
                    block,
                    other_far_ptr + at_pair,
                    far_block,
                    scale,
                    BLOCK,
                    D,
                    DEPTH,
                    PRECISION,
                )
        valid = valid_cells(near, near_there, far, far_there, max_span_length, START, TRIL, BAND)
        if KIND == "loss":
            products = tl.where(valid, products, float("-inf"))
        total = tl.zeros([BLOCK, BLOCK], dtype)
        for i in range(count):
            h = first_head + i
            row = b * heads + h
            if KIND == "scores":
                source = upstream_ptr + b * upstream_stride_b + h * upstream_stride_h
                source += tl.full((), BLOCK, tl.int64) * block * upstream_stride_near
                source += tl.full((), BLOCK, tl.int64) * far_block * upstream_stride_far
                places = lane[:, None] * upstream_stride_near + lane[None, :] * upstream_stride_far
                dscores = tl.load(source + places, mask=valid, other=0.0).to(dtype)
            else:
                scores = with_biases(
                    products,
                    near_bias_ptr,
                    far_bias_ptr,
                    b,
                    block,
                    near_there,
                    far_block,
                    far_there,
                    h,
                    n,
                    heads,
                    BLOCK,
                )
            if KIND == "divergence":
                other_scores = with_biases(
                    other_products,
                    other_near_bias_ptr,
                    other_far_bias_ptr,
                    b,
                    block,
                    near_there,
                    far_block,
                    far_there,
                    h,
                    n,
                    heads,
                    BLOCK,
                )
                dscores = _dscores_of_divergence(scores, other_scores, valid, tl.load(upstream_ptr + row))
            if KIND == "loss":
                if START:
                    starts, ends, start_block, end_block = near, far, block, far_block
                else:
                    starts, ends, start_block, end_block = far, near, far_block, block
                dscores = _dscores_of_loss(
                    scores,
                    upstream_ptr,
                    log_negative_ptr,
                    log_positive_ptr,
                    cells_ptr,
                    ranges_ptr,
                    row,
                    batch.to(tl.int64) * heads,
                    blocks,
                    start_block,
                    starts,
                    ends,
                    end_block * BLOCK,
                    n,
                    START,
                )
            if dbias_ptr is not None:
                here = tl.arange(0, GROUP) == i
                dbias += tl.where(here[None, :], tl.sum(dscores, 1)[:, None], 0.0)
            total += dscores
        dnear = _add_product(dnear, total, y, PRECISION)
    # Whatever stood in the sums, masked tokens have no part in it.
    dnear = tl.where(near_there[:, None], dnear, 0.0)
    dbias = tl.where(near_there[:, None], dbias, 0.0)
    # Turned back and scaled; biases have neither rotation nor scale.
    if ROPE:
        if positions_ptr is None:
            position = near
        else:
            position = tl.load(positions_ptr + b * n + near, mask=near < n, other=0)
        cos, sin = cos_sin(position, first_channel, SIZE, CHANNELS, dtype)
        dnear = rotate(dnear, cos, -sin)
    dnear = (dnear * tl.full((), dscale, dtype)).to(dnear_ptr.dtype.element_ty)
    channel = first_channel + tl.arange(0, CHANNELS)
    place_of_block = (group.to(tl.int64) * batch + b) * n + block * BLOCK
    target = dnear_ptr + (place_of_block * shared_heads + pair % shared_heads) * SIZE
    filled = (near < n)[:, None] & (channel < SIZE)[None, :]
    tl.store(target + lane[:, None] * (shared_heads * SIZE) + channel[None, :], dnear, mask=filled)
    if dbias_ptr is not None:
        column = tl.arange(0, GROUP)
        target = dbias_ptr + (b * n + block * BLOCK) * heads + first_head
        rows = tl.where(first_channel == 0, n, 0)  # one of the programs of a block writes
        filled = (near < rows)[:, None] & (first_head + column < heads)[None, :]
        tl.store(target + lane[:, None] * heads + column[None, :], dbias.to(dbias_ptr.dtype.element_ty), mask=filled)


def gradients(
    call: Call, kind: str, upstream: Tensor, own: Prepared, other: Prepared | None = None, **of_loss: Tensor
) -> tuple[Tensor, ...]:
    """(dq, dk, dstart_bias, dend_bias) of the pass `own`; biases that are not there have gradients of size 0."""
    names = ("log_negative_ptr", "log_positive_ptr", "cells_ptr", "ranges_ptr")
    no_other = dict.fromkeys(f"other_{name}" for name in own.arguments())
    strides = upstream.stride() if kind == "scores" else (0, 0, 0, 0)
    found, biases = [], []
    for start in (True, False):
        near, far = (2, 3) if start else (3, 2)
        # Groups of heads add up in float32, in order.
        shape = (call.groups, call.B, call.n, call.shared_heads, call.d)
        dnear = torch.empty(shape, dtype=call.dtype if call.groups == 1 else call.compute, device=call.device)
        dbias = None
        if own.start_bias is not None:
            dbias = torch.empty(call.B, call.n, call.H, dtype=call.dtype, device=call.device)
        call.launch(
            global_pointer_gradient_kernel,
            call.blocks * (call.D // call.channels),
            **own.arguments(start),
            **(no_other if other is None else other.arguments(start, "other_")),
            **(dict.fromkeys(names) | of_loss),
            upstream_ptr=upstream,
            upstream_stride_b=strides[0],
            upstream_stride_h=strides[1],
            upstream_stride_near=strides[near],
            upstream_stride_far=strides[far],
            dnear_ptr=dnear,
            dbias_ptr=dbias,
            positions_ptr=call.positions,
            dscale=call.scale / call.shrink,
            KIND=kind,
            START=start,
            ROPE=call.rope,
            SIZE=call.d,
            CHANNELS=call.channels,
        )
        found.append(dnear[0] if call.groups == 1 else dnear.sum(0).to(call.dtype))
        biases.append(torch.empty(0, dtype=call.dtype, device=call.device) if dbias is None else dbias)
    return *found, *biases


def no_gradients(*inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Of a call without cells."""
    like = next(x for x in inputs if x is not None)
    return tuple(like.new_zeros(0 if x is None else x.shape) for x in inputs)
