"""Multilabel cross entropy of dense scores: one pass over them in each direction.

Labels as indices are marked in a byte for each score first: a quarter of what float32 scores take, and any order and
number of labels costs the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnlp_ops._triton.global_pointer_spans import check, check_tensor, guard
from fastnlp_ops._triton.log_sum_exp import compute_dtype, log_sum_exp, tile_log_sum_exp

_CHUNK = 4096  # classes that a program reads


@triton.jit
def _sides(scores, labels):
    """(negative, positive): log((1 - t) e^s) and log(t e^-s), -inf where that is 0 and where a class takes no part."""
    there = scores != float("-inf")
    if labels.dtype == tl.uint8:
        negative = tl.where(there & (labels == 0), scores, float("-inf"))
        positive = tl.where(there & (labels != 0), -scores, float("-inf"))
    else:
        some, others = labels != 0.0, labels != 1.0
        negative = tl.where(there & others, scores + tl.log(tl.where(others, 1.0 - labels, 1.0)), float("-inf"))
        positive = tl.where(there & some, tl.log(tl.where(some, labels, 1.0)) - scores, float("-inf"))
    return negative, positive


@triton.jit(do_not_specialize=("chunks",))
def multilabel_kernel(scores_ptr, labels_ptr, partials_ptr, classes, chunks, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    row = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks).to(tl.int64) * CHUNK
    index = first + (tl.arange(0, CHUNK // WIDTH) * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    there = index < classes
    scores = tl.load(scores_ptr + row * classes + index, mask=there, other=float("-inf"))
    labels = tl.load(labels_ptr + row * classes + index, mask=there, other=0)
    negative, positive = _sides(scores.to(partials_ptr.dtype.element_ty), labels)
    top, total = tile_log_sum_exp(negative)
    positive_top, positive_total = tile_log_sum_exp(positive)
    target = partials_ptr + tl.program_id(0).to(tl.int64) * 4
    tl.store(target, top)
    tl.store(target + 1, total)
    tl.store(target + 2, positive_top)
    tl.store(target + 3, positive_total)


@triton.jit(do_not_specialize=("chunks",))
def multilabel_backward_kernel(
    dloss_ptr,
    log_negative_ptr,
    log_positive_ptr,
    scores_ptr,
    labels_ptr,
    dscores_ptr,
    classes,
    chunks,
    CHUNK: tl.constexpr,
):
    row = (tl.program_id(0) // chunks).to(tl.int64)
    index = (tl.program_id(0) % chunks).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    there = index < classes
    scores = tl.load(scores_ptr + row * classes + index, mask=there, other=float("-inf"))
    labels = tl.load(labels_ptr + row * classes + index, mask=there, other=0)
    dloss = tl.load(dloss_ptr + row)
    negative, positive = _sides(scores.to(dloss.dtype), labels)
    negative = tl.exp(negative - tl.load(log_negative_ptr + row))
    positive = tl.exp(positive - tl.load(log_positive_ptr + row))
    dscores = dloss * (negative - positive)
    tl.store(dscores_ptr + row * classes + index, dscores.to(dscores_ptr.dtype.element_ty), mask=there)


@triton.jit
def mark_labels_kernel(indices_ptr, marked_ptr, classes, per_row, count, CHUNK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    index = tl.load(indices_ptr + place, mask=place < count, other=-1)
    filled = (index >= 0) & (index < classes)
    tl.store(marked_ptr + place // per_row * classes + index, tl.full([CHUNK], 1, tl.uint8), mask=filled)


def _rows(scores: Tensor) -> Tensor:
    check(scores.dim() == 2, f"scores must be [R, C], got shape {tuple(scores.shape)}")
    return scores.contiguous()


def _labels(scores: Tensor, labels: Tensor) -> Tensor:
    dtype = torch.bool if labels.dtype == torch.bool else compute_dtype(scores)
    check_tensor("labels", labels, tuple(scores.shape), dtype, scores)
    return labels.contiguous().view(torch.uint8) if dtype == torch.bool else labels.contiguous()


def _marked(scores: Tensor, indices: Tensor) -> Tensor:
    """Indices [R, P] as labels [R, C]; those outside [0, C) are dropped."""
    check(indices.dim() == 2, f"indices must be [R, P], got shape {tuple(indices.shape)}")
    check_tensor("indices", indices, (scores.shape[0], indices.shape[1]), torch.int64, scores)
    marked = torch.zeros(scores.shape, dtype=torch.uint8, device=scores.device)
    if indices.numel():
        grid = (triton.cdiv(indices.numel(), 256),)
        mark_labels_kernel[grid](
            indices.contiguous(), marked, scores.shape[1], indices.shape[1], indices.numel(), CHUNK=256, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return marked


def _sums(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    R, C = scores.shape
    if scores.numel() == 0:
        zeros = torch.zeros(R, dtype=compute_dtype(scores), device=scores.device)
        return zeros, zeros.clone()
    chunk = max(128, min(_CHUNK, triton.next_power_of_2(C)))
    partials = torch.empty(R, triton.cdiv(C, chunk), 4, dtype=compute_dtype(scores), device=scores.device)
    multilabel_kernel[(R * partials.shape[1],)](
        scores, labels, partials, C, partials.shape[1], CHUNK=chunk, WIDTH=32, num_warps=4, enable_fp_fusion=True
    )
    return log_sum_exp(partials)


def _gradient(dloss: Tensor, log_negative: Tensor, log_positive: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    R, C = scores.shape
    rows = {"dloss": dloss, "log_negative": log_negative, "log_positive": log_positive}
    for name, x in rows.items():
        check_tensor(name, x, (R,), compute_dtype(scores), scores)
    dscores = torch.empty_like(scores)
    if scores.numel():
        chunk = max(128, min(_CHUNK, triton.next_power_of_2(C)))
        chunks = triton.cdiv(C, chunk)
        multilabel_backward_kernel[(R * chunks,)](
            *(x.contiguous() for x in rows.values()), scores, labels, dscores, C, chunks, CHUNK=chunk, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return dscores


def multilabel_categorical_crossentropy(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(log_negative, log_positive) [R] of scores [R, C]; labels [R, C]: bool, or soft in the compute type."""
    scores = _rows(scores)
    with guard(scores):
        return _sums(scores, _labels(scores, labels))


def multilabel_categorical_crossentropy_backward(
    dloss: Tensor, log_negative: Tensor, log_positive: Tensor, scores: Tensor, labels: Tensor
) -> Tensor:
    scores = _rows(scores)
    with guard(scores):
        return _gradient(dloss, log_negative, log_positive, scores, _labels(scores, labels))


def sparse_multilabel_categorical_crossentropy(scores: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(log_negative, log_positive) [R] of scores [R, C] and labels by index [R, P]."""
    scores = _rows(scores)
    with guard(scores):
        return _sums(scores, _marked(scores, indices))


def sparse_multilabel_categorical_crossentropy_backward(
    dloss: Tensor, log_negative: Tensor, log_positive: Tensor, scores: Tensor, indices: Tensor
) -> Tensor:
    scores = _rows(scores)
    with guard(scores):
        return _gradient(dloss, log_negative, log_positive, scores, _marked(scores, indices))
