"""Multilabel cross entropy over dense scores: a softmax loss whose number of labels is free, by itself.

Every label shall score above 0, every other class below:

    L = log(1 + sum over classes that are no labels of e^s) + log(1 + sum over labels of e^-s)

TPLinker, biaffine parsers, text classifiers and GlobalPointer's dense scores use it. A score of -inf marks a class that
takes no part. The loss from q and k without dense scores is :func:`fastnlp_ops.global_pointer_loss`.
"""

import torch
from torch import Tensor

from fastnlp_ops._global_pointer_inputs import check_integers, shape_of
from fastnlp_ops._layout import check_dense
from fastnlp_ops._ops import multilabel as ops
from fastnlp_ops._ops._autograd import is_dual
from fastnlp_ops._reduction import check_reduction, reduce_rows


def multilabel_categorical_crossentropy(scores: Tensor, labels: Tensor, *, reduction: str = "mean") -> Tensor:
    """Multilabel cross entropy (ZLPR) of every row of scores, for hard or soft labels, in one pass.

    L = log(1 + sum_c (1 - t_c) e^{s_c}) + log(1 + sum_c t_c e^{-s_c})

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> scores, labels = torch.randn(4, 7), torch.rand(4, 7) < 0.3
        >>> log_sum = lambda on, s: (1 + torch.where(on, s, -torch.inf).exp().sum(1)).log()
        >>> loss = (log_sum(~labels, scores) + log_sum(labels, -scores)).mean()
        >>> torch.allclose(fastnlp_ops.multilabel_categorical_crossentropy(scores, labels), loss)
        True

    Args:
        scores (Tensor[..., C]): float32, float64, float16 or bfloat16; -inf where a class takes no part, whatever its
            label.
        labels (Tensor[..., C]): bool or integer, nonzero for labels; or floating point, soft labels in [0, 1].
        reduction (str): "none": [...]; "mean" over rows; "sum"; "batchmean": the mean over the first dimension of sums.

    Returns:
        Tensor: a scalar, or [...]; float32, float64 for float64 scores. At least 0; 0 for a row without classes.

    Raises:
        ValueError: for a shape or a device that does not fit; an unknown reduction; labels that require a gradient.
        TypeError: for a dtype that is not listed.

    Preconditions:
        Soft labels are in [0, 1]: this is not checked.

    Precision:
        Against float64, |error| <= 1e-6 max(1, L) for float32 scores up to 100; finite for finite scores.
        Deterministic. Differentiable in the scores to any order and in forward mode.

    References:
        Su et al., "ZLPR: A Novel Loss for Multi-label Classification" (2022), arXiv 2208.02955, section 3. Soft
        labels: Su, https://kexue.fm/archives/9064 (2022). The calibrated probability of a class is sigmoid(2 s).
    """
    check_reduction(reduction)
    _check_scores(scores)
    check_dense("labels", labels)
    if labels.shape != scores.shape:
        raise ValueError(f"labels must be [..., C] = {tuple(scores.shape)} as scores, got {shape_of(labels)}")
    _check_device("labels", labels, scores)
    if labels.is_complex():
        raise TypeError(f"labels must be bool, integer or floating point, got {labels.dtype}")
    if labels.requires_grad or is_dual((labels,)):
        raise ValueError("labels must not require a gradient: detach them")
    if labels.is_floating_point():
        labels = labels.to(torch.float64 if scores.dtype == torch.float64 else torch.float32)
    elif labels.dtype != torch.bool:
        labels = labels != 0
    log_negative, log_positive = ops.hard_or_soft(_rows(scores), _rows(labels).contiguous())
    return reduce_rows((log_negative + log_positive).reshape(scores.shape[:-1]), reduction)


def sparse_multilabel_categorical_crossentropy(
    scores: Tensor, indices: Tensor, *, mask_zero: bool = False, reduction: str = "mean"
) -> Tensor:
    """Multilabel cross entropy (ZLPR) of every row of scores, for labels given as indices.

    L = log(1 + sum over c not in indices of e^{s_c}) + log(1 + sum over c in indices of e^{-s_c})

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> scores, indices = torch.randn(4, 7), torch.tensor([[3, 5], [0, -1], [-1, -1], [2, 2]])
        >>> labels = torch.zeros(4, 8, dtype=torch.bool).scatter(1, indices % 8, True)[:, :7]  # -1 % 8 is cut off
        >>> loss = fastnlp_ops.multilabel_categorical_crossentropy(scores, labels)
        >>> torch.allclose(fastnlp_ops.sparse_multilabel_categorical_crossentropy(scores, indices), loss)
        True

    Args:
        scores (Tensor[..., C]): as in :func:`multilabel_categorical_crossentropy`.
        indices (Tensor[..., P]): integers in [0, C), -1 or -100 for none, in any order; one that is given twice
            counts once.
        mask_zero (bool): index 0 is padding, as bert4keras pads, and class 0 takes no part.
        reduction (str): as in :func:`multilabel_categorical_crossentropy`.

    Returns:
        Tensor: as :func:`multilabel_categorical_crossentropy`.

    Raises:
        ValueError: for a shape or a device that does not fit; an unknown reduction; on CPU an index out of range.
        TypeError: for a dtype that is not listed.

    Preconditions:
        On CUDA indices are not checked: one out of range is dropped.

    Precision:
        As :func:`multilabel_categorical_crossentropy`. Labels are kept out of the sum over the others, where peers
        subtract them from the sum over all: the loss is at least 0 and gradients have the right sign, at any score.

    References:
        As :func:`multilabel_categorical_crossentropy`; index labels: Su, https://kexue.fm/archives/8888 (2022).
    """
    check_reduction(reduction)
    _check_scores(scores)
    check_dense("indices", indices)
    if indices.shape[:-1] != scores.shape[:-1] or indices.dim() == 0:
        raise ValueError(f"indices must be [..., P] with {tuple(scores.shape[:-1])}, got {shape_of(indices)}")
    check_integers("indices", indices)
    _check_device("indices", indices, scores)
    if mask_zero:
        scores = scores.masked_fill(torch.arange(scores.shape[-1], device=scores.device) == 0, -torch.inf)
    log_negative, log_positive = ops.sparse(_rows(scores), _rows(indices.to(torch.int64)).contiguous())
    return reduce_rows((log_negative + log_positive).reshape(scores.shape[:-1]), reduction)


def _check_scores(scores: Tensor) -> None:
    check_dense("scores", scores)
    if scores.dim() == 0:
        raise ValueError(f"scores must be [..., C], got {shape_of(scores)}")
    if scores.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise TypeError(f"scores must be float32, float64, float16 or bfloat16, got {scores.dtype}")


def _check_device(name: str, x: Tensor, scores: Tensor) -> None:
    if x.device != scores.device:
        raise ValueError(f"{name} must be on the device of scores, {scores.device}, got {x.device}")


def _rows(x: Tensor) -> Tensor:
    """[..., C] -> [R, C] with adjacent classes, a view where it can be."""
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    return rows if rows.stride(1) == 1 else rows.contiguous()
