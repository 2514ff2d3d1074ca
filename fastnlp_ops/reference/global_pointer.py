r"""GlobalPointer in plain PyTorch: the mathematics that the compiled kernels must reproduce.

Every head h (an entity type, a relation) scores every span of tokens i..j, both ends inclusive (Su et al. 2022a):

    s[h, i, j] = scale * (R_i q_i) . (R_j k_j) + start_bias[i, h] + end_bias[j, h]            scale = 1 / sqrt(d)

q and k [n, H, d] are two projections of the tokens. GlobalPointer has a pair for each head and no biases; Efficient
GlobalPointer has one pair, H = 1, that finds spans, and the biases, cheap in parameters, that tell types apart.

R_i is the rotation of RoPE (Su et al. 2021) at position i: the pair (x_2m, x_2m+1) turns by the angle i theta_m with
theta_m = 10000^{-2m/d}, m = 0 .. d/2 - 1,

    (R_i x)_2m   = x_2m cos(i theta_m) - x_2m+1 sin(i theta_m)
    (R_i x)_2m+1 = x_2m sin(i theta_m) + x_2m+1 cos(i theta_m)

and as R_i^T R_j = R_{j-i}, a score knows how far apart its ends are and not where they stand: padding on the left
changes nothing. The angle is taken in float64: float32 rounds that of position 8,000 by up to 2e-4.

A cell (i, j) is valid where both ends are on in the mask, j >= i (tril_mask: spans do not end before they start) and
|j - i| < max_span_length. Scores of other cells are -inf, and what masked tokens hold is never read.

    loss         the multilabel cross entropy of the row of all valid cells of (b, h), reference/multilabel.py:
                 L = log(1 + sum_negative e^s) + log(1 + sum_positive e^-s)
    decode       the cells with s > threshold; the threshold of the loss is 0
    divergence   D = sum_valid (sigmoid(s1) - sigmoid(s2)) (s1 - s2): the two Kullback-Leibler divergences of R-Drop, as
                 they come out for this loss (Su 2022b); at least 0
    flat spans   greedy: the span of the highest score is kept if no kept span overlaps it, then the next

Gradients follow from dL/ds of reference/multilabel.py and ds: with G = dL/ds [n, n],

    dq_i = scale R_i^T sum_j G_ij R_j k_j      dstart_i = sum_j G_ij
    dk_j = scale R_j^T sum_i G_ij R_i q_i      dend_j   = sum_i G_ij

Any device; half precision is computed in float32; what returns numbers is differentiable to any order.

References:
    Su, Murtadha, Pan, Hou, Sun, Huang, Wen, Liu: Global Pointer: Novel Efficient Span-based Approach for Named Entity
    Recognition. arXiv 2208.03054, 2022a.
    Su, Lu, Pan, Murtadha, Wen, Liu: RoFormer: Enhanced Transformer with Rotary Position Embedding. arXiv 2104.09864,
    2021. Equation (34) is the rotation.
    Su, Zhu, Murtadha, Pan, Wen, Liu: ZLPR: A Novel Loss for Multi-label Classification. arXiv 2208.02955, 2022.
    Liang et al.: R-Drop: Regularized Dropout for Neural Networks. arXiv 2106.14448, 2021.
    Su: GlobalPointer, https://kexue.fm/archives/8373, 2021; Efficient GlobalPointer, https://kexue.fm/archives/8877,
    2022; R-Drop and VAT for multilabel classification, https://kexue.fm/archives/9039, 2022b.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fastnlp_ops.reference.multilabel import log_sums, reduce


def common_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The widest of their dtypes."""
    return functools.reduce(torch.promote_types, [x.dtype for x in tensors if x is not None])


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """R_i x_i for every token: x [B, n, H, d], positions [B, n]."""
    d = x.shape[-1]
    theta = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64, device=x.device) / d)  # [d / 2]
    angle = positions.to(torch.float64)[:, :, None, None] * theta  # [B, n, 1, d / 2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def valid_cells(q: Tensor, mask: Tensor | None, tril_mask: bool, max_span_length: int | None) -> Tensor:
    """Cells that take part, bool [B, 1, n, n]."""
    B, n = q.shape[:2]
    on = torch.ones(B, n, dtype=torch.bool, device=q.device) if mask is None else mask != 0
    token = torch.arange(n, device=q.device)
    span = token[None, :] - token[:, None]  # j - i
    valid = (on[:, :, None] & on[:, None, :])[:, None]
    if tril_mask:
        valid = valid & (span >= 0)
    if max_span_length is not None:
        valid = valid & (span.abs() < max_span_length)
    return valid


def plain_scores(
    q: Tensor,
    k: Tensor,
    start_bias: Tensor | None,
    end_bias: Tensor | None,
    rope: bool,
    position_ids: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """s of every cell, valid or not, [B, H, n, n] in the compute type; masked tokens count as zeros."""
    B, n, _, d = q.shape
    double = common_dtype(q, k, start_bias, end_bias) == torch.float64

    def read(x: Tensor) -> Tensor:
        x = x.to(torch.float64 if double else torch.float32)
        if mask is None:
            return x
        return torch.where((mask != 0).reshape(B, n, *[1] * (x.dim() - 2)), x, 0)

    q, k = read(q), read(k)
    if rope:
        positions = torch.arange(n, device=q.device).expand(B, n) if position_ids is None else position_ids
        q, k = rotate(q, positions), rotate(k, positions)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (d**-0.5 if scale is None else scale)
    if start_bias is not None and end_bias is not None:
        start, end = read(start_bias).transpose(1, 2), read(end_bias).transpose(1, 2)  # [B, H, n]
        scores = scores + start[:, :, :, None] + end[:, :, None, :]
    return scores


def labelled_cells(labels: Tensor, B: int, H: int, n: int) -> Tensor:
    """Labels as index rows [B, H, P, 2] or [M, 4] -> bool [B, H, n, n]. Rows that name no cell are dropped."""
    if labels.dim() == 4:
        row = torch.cartesian_prod(torch.arange(B), torch.arange(H)).to(labels.device)  # [B * H, 2]
        row = row.reshape(B, H, 1, 2).expand(*labels.shape[:3], 2)
        labels = torch.cat([row, labels], -1).reshape(-1, 4)
    labels = labels.long()
    sizes = torch.tensor([B, H, n, n], device=labels.device)
    labels = labels[((labels >= 0) & (labels < sizes)).all(1)]
    positive = torch.zeros(B, H, n, n, dtype=torch.bool, device=labels.device)
    positive[labels.unbind(1)] = True
    return positive


def global_pointer_scores(
    q: Tensor,
    k: Tensor,
    *,
    start_bias: Tensor | None = None,
    end_bias: Tensor | None = None,
    rope: bool = True,
    position_ids: Tensor | None = None,
    mask: Tensor | None = None,
    tril_mask: bool = True,
    max_span_length: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """s [B, H, start, end] in the dtype of the inputs, -inf at cells that are not valid."""
    scores = plain_scores(q, k, start_bias, end_bias, rope, position_ids, mask, scale)
    scores = torch.where(valid_cells(q, mask, tril_mask, max_span_length), scores, -math.inf)
    return scores.to(common_dtype(q, k, start_bias, end_bias))


def loss_log_sums(scores: Tensor, positive: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """(log_negative, log_positive) [B, H] of scores, labels and valid cells [B, H, n, n]."""
    return log_sums(torch.where(valid, scores, -math.inf).flatten(2), positive.flatten(2))


def global_pointer_loss(
    q: Tensor,
    k: Tensor,
    labels: Tensor,
    *,
    start_bias: Tensor | None = None,
    end_bias: Tensor | None = None,
    rope: bool = True,
    position_ids: Tensor | None = None,
    mask: Tensor | None = None,
    tril_mask: bool = True,
    max_span_length: int | None = None,
    scale: float | None = None,
    reduction: str = "mean",
    mask_zero: bool = False,
) -> Tensor:
    """Loss of the labelled spans: [B, H], or reduced. Labels at cells that are not valid take no part."""
    scores = plain_scores(q, k, start_bias, end_bias, rope, position_ids, mask, scale)
    B, H, n, _ = scores.shape
    positive = labelled_cells(labels, B, H, n)
    valid = valid_cells(q, mask, tril_mask, max_span_length)
    if mask_zero:  # (0, 0) is how labels are padded: it is neither positive nor negative
        valid[:, :, :1, :1] = False
    log_negative, log_positive = loss_log_sums(scores, positive, valid)
    return reduce(log_negative + log_positive, reduction)


def divergence(s1: Tensor, s2: Tensor, valid: Tensor) -> Tensor:
    """D [B, H] of scores [B, H, n, n]."""
    difference = torch.where(valid, s1 - s2, 0)
    return ((s1.sigmoid() - s2.sigmoid()) * difference).sum((2, 3))


def global_pointer_divergence(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    *,
    start_bias1: Tensor | None = None,
    end_bias1: Tensor | None = None,
    start_bias2: Tensor | None = None,
    end_bias2: Tensor | None = None,
    rope: bool = True,
    position_ids: Tensor | None = None,
    mask: Tensor | None = None,
    tril_mask: bool = True,
    max_span_length: int | None = None,
    scale: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """D of two passes over the same tokens: [B, H], or reduced."""
    s1 = plain_scores(q1, k1, start_bias1, end_bias1, rope, position_ids, mask, scale)
    s2 = plain_scores(q2, k2, start_bias2, end_bias2, rope, position_ids, mask, scale)
    return reduce(divergence(s1, s2, valid_cells(q1, mask, tril_mask, max_span_length)), reduction)


def flat_spans(spans: Tensor, scores: Tensor) -> Tensor:
    """Which of the spans [M, 4] (b, h, start, end), sorted, to keep: bool [M]. Overlap counts across heads."""
    keep = torch.zeros(len(spans), dtype=torch.bool)
    kept: dict[int, list[tuple[int, int]]] = {}
    for m in scores.sort(descending=True, stable=True).indices.tolist():  # equal scores: the first span first
        b, _, start, end = spans[m].tolist()
        first, last = min(start, end), max(start, end)  # without tril_mask a cell may lie below the diagonal
        taken = kept.setdefault(b, [])
        if all(last < other_first or other_last < first for other_first, other_last in taken):
            taken.append((first, last))
            keep[m] = True
    return keep.to(spans.device)


def best_spans(spans: Tensor, scores: Tensor, top_k: int) -> Tensor:
    """Which of the spans [M, 4], sorted, are among the best top_k of their sequence: bool [M]."""
    keep = torch.zeros(len(spans), dtype=torch.bool, device=spans.device)
    for b in spans[:, 0].unique():
        rows = (spans[:, 0] == b).nonzero()[:, 0]
        keep[rows[scores[rows].sort(descending=True, stable=True).indices[:top_k]]] = True
    return keep


def global_pointer_decode(
    q: Tensor,
    k: Tensor,
    *,
    start_bias: Tensor | None = None,
    end_bias: Tensor | None = None,
    rope: bool = True,
    position_ids: Tensor | None = None,
    mask: Tensor | None = None,
    tril_mask: bool = True,
    max_span_length: int | None = None,
    scale: float | None = None,
    threshold: float = 0.0,
    top_k: int | None = None,
    max_spans: int | None = None,
    nested: bool = True,
) -> tuple[Tensor, Tensor]:
    """Spans int64 [M, 4] (b, h, start, end) with s > threshold, sorted, and their scores [M] in the compute type.

    With max_spans: [B, max_spans, 4] and [B, max_spans], where rows of -100 and -inf stand behind those of a sequence.
    """
    with torch.no_grad():
        scores = plain_scores(q, k, start_bias, end_bias, rope, position_ids, mask, scale)
        scores = torch.where(valid_cells(q, mask, tril_mask, max_span_length), scores, -math.inf)
        spans = (scores > threshold).nonzero()  # NaN is above nothing
        found = scores[spans.unbind(1)]
        if not nested:
            keep = flat_spans(spans, found)
            spans, found = spans[keep], found[keep]
        best = top_k if max_spans is None else max_spans
        if best is not None:
            keep = best_spans(spans, found, best)
            spans, found = spans[keep], found[keep]
        if max_spans is None:
            return spans, found
        padded = torch.full((len(q), max_spans, 4), -100, device=q.device)
        padded_scores = found.new_full((len(q), max_spans), -math.inf)
        for b in range(len(q)):
            own = spans[:, 0] == b
            padded[b, : own.sum()], padded_scores[b, : own.sum()] = spans[own], found[own]
        return padded, padded_scores
