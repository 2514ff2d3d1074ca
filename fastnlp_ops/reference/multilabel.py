r"""Multilabel cross entropy over dense scores in plain PyTorch: what the compiled kernels must reproduce.

A row of C classes has scores s and a set P of labels; all other classes are N. Every label shall score above every
other class, and a virtual class of score 0 shall stand between them, so that the labels are the classes with s > 0. The
log-sum-exp of all margins, one for each pair, factors into two (Su 2020; Su et al. 2022):

    L = log(1 + sum_{n in N, p in P} e^{s_n - s_p} + sum_{n in N} e^{s_n} + sum_{p in P} e^{-s_p})
      = log(1 + sum_{n in N} e^{s_n}) + log(1 + sum_{p in P} e^{-s_p})
      = log_negative                  + log_positive

Both are at least 0, so L is. The gradients are

    dL/ds_n = e^{s_n - log_negative}      dL/ds_p = -e^{-s_p - log_positive}

of the right sign always, and each kind adds up to less than 1. Soft labels t in [0, 1] weigh a class into both sums,

    L = log(1 + sum (1 - t) e^s) + log(1 + sum t e^{-s})
    dL/ds = (1 - t) e^{s - log_negative} - t e^{-s - log_positive}

which vanishes, for a class alone, where t = sigmoid(2 s): sigmoid(2 s) is the calibrated probability of a class, not
sigmoid(s) (Su 2022b).

A score of -inf marks a class that takes no part, whatever its label. A class that is listed twice counts once.

Sums over N are taken over N. bert4keras and its ports take the sum over all classes and subtract that of the labels
(Su 2022a), log_negative = a + log(1 - e^{b - a}): from s_p = 12 on, float32 cancels to a negative loss, and the clamp
that hides this gives gradients of the wrong sign. That is not reproduced.

Any device; half precision is computed in float32; differentiable to any order.

References:
    Su, Zhu, Murtadha, Pan, Wen, Liu: ZLPR: A Novel Loss for Multi-label Classification. arXiv 2208.02955, 2022.
    Su: softmax cross entropy carried over to multilabel classification, https://kexue.fm/archives/7359, 2020; its
    sparse form, https://kexue.fm/archives/8888, 2022a; soft labels, https://kexue.fm/archives/9064, 2022b.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def reduce(rows: Tensor, reduction: str) -> Tensor:
    """Losses of the rows [B, ...] as they are, their mean (0 without rows), their sum, or the mean over B of sums."""
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if reduction in ("mean", "batchmean"):
        return rows.sum() / max(1, rows.numel() if reduction == "mean" or rows.dim() == 0 else rows.shape[0])
    raise ValueError(f"reduction must be none, mean, sum or batchmean, got {reduction}")


def log_one_plus_sum(exponents: Tensor) -> Tensor:
    """log(1 + sum_c e^{x_c}) over the last dimension: [..., C] -> [...]."""
    zero = exponents.new_zeros((*exponents.shape[:-1], 1))  # the virtual class
    return torch.logsumexp(torch.cat([zero, exponents], -1), -1)


def log_sums(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(log_negative, log_positive) of every row, [...] each; scores and labels [..., C], labels bool or soft."""
    s = scores.to(compute_dtype(scores))
    on = s != -math.inf
    if labels.is_floating_point():
        t = labels.to(s.dtype)
        negative, positive = on & (t != 1), on & (t != 0)
        log_not_t = torch.log1p(-torch.where(negative, t, 0))
        log_t = torch.where(positive, t, 1).log()
    else:
        negative, positive = on & (labels == 0), on & (labels != 0)
        log_not_t = log_t = torch.zeros((), dtype=s.dtype, device=s.device)
    finite = torch.where(on, s, 0)  # -inf never enters a sum, so no gradient is inf * 0
    log_negative = log_one_plus_sum(torch.where(negative, finite + log_not_t, -math.inf))
    log_positive = log_one_plus_sum(torch.where(positive, log_t - finite, -math.inf))
    return log_negative, log_positive


def multilabel_categorical_crossentropy(scores: Tensor, labels: Tensor, *, reduction: str = "mean") -> Tensor:
    """Loss of every row of scores [..., C] given its labels [..., C]: bool, integer (nonzero) or soft in [0, 1]."""
    log_negative, log_positive = log_sums(scores, labels)
    return reduce(log_negative + log_positive, reduction)


def indices_to_labels(scores: Tensor, indices: Tensor) -> Tensor:
    """Indices [..., P] -> bool [..., C]; those outside [0, C) are dropped."""
    C = scores.shape[-1]
    labels = torch.zeros((*scores.shape[:-1], C + 1), dtype=torch.bool, device=scores.device)
    return labels.scatter(-1, torch.where((indices < 0) | (indices >= C), C, indices).long(), True)[..., :C]


def sparse_multilabel_categorical_crossentropy(
    scores: Tensor, indices: Tensor, *, mask_zero: bool = False, reduction: str = "mean"
) -> Tensor:
    """The same for labels as indices [..., P], -1 or -100 for none. mask_zero: so is 0; class 0 takes no part."""
    labels = indices_to_labels(scores, indices)
    if mask_zero:
        scores, labels = scores[..., 1:], labels[..., 1:]
    return multilabel_categorical_crossentropy(scores, labels, reduction=reduction)
