"""GlobalPointer: scores of all spans of a text, their loss without a tensor of n x n, decoding, R-Drop's divergence.

Head h scores the span from token i to token j, both ends inclusive:

    s[b, h, i, j] = scale * (R_i q[b, i, h]) . (R_j k[b, j, h]) + start_bias[b, i, h] + end_bias[b, j, h]

R_i rotates pairs of channels by the position (RoPE). What the functions below share:

- q and k are [B, n, H, d], views into the projection as they are: nothing is copied where channels are adjacent.
  Efficient GlobalPointer has one q and k for all heads, [B, n, 1, d], and biases [B, n, H].
- A cell (i, j) is valid where the mask is on at both ends, j >= i (``tril_mask``), and |j - i| < ``max_span_length``.
  The mask [B, n] has any dtype and any pattern; what masked tokens hold, NaN included, is never read.
- Arithmetic is float32 (float64 for float64 inputs), whatever the dtype of the inputs.
"""

import torch
from torch import Tensor

from fastnlp_ops._global_pointer_inputs import (
    alike,
    cell_options,
    check_cells,
    check_labels,
    check_scoring,
    heads_of,
    kernel_inputs,
    shape_of,
)
from fastnlp_ops._ops import global_pointer as ops
from fastnlp_ops._reduction import check_reduction, reduce_rows


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
    """Scores of all spans, [B, H, start, end], -inf where a span is not valid. A span is predicted where s > 0.

    s[b, h, i, j] = scale * (R_i q[b, i, h]) . (R_j k[b, j, h]) + start_bias[b, i, h] + end_bias[b, j, h]

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> q, k = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
        >>> below = torch.ones(5, 5, dtype=torch.bool).tril(-1)
        >>> scores = (torch.einsum("bihd,bjhd->bhij", q, k) / 4**0.5).masked_fill(below, -torch.inf)
        >>> torch.allclose(fastnlp_ops.global_pointer_scores(q, k, rope=False), scores, atol=1e-6)
        True

    Args:
        q (Tensor[B, n, H, d] or Tensor[B, n, 1, d]): start side; float32, float64, float16 or bfloat16, any strides.
        k (Tensor, of the shape of q): end side.
        start_bias (Tensor[B, n, H]): added to all spans that start at a token; its last size is the number of heads
            where q and k have a single one for all. None: no biases.
        end_bias (Tensor[B, n, H]): added to all spans that end at a token; given with start_bias or not at all.
        rope (bool): rotate q and k by the positions of their tokens: interleaved pairs, base 10000; d must be even.
        position_ids (Tensor[B, n]): integer positions for RoPE; None: 0 to n - 1. Only differences matter, so left
            padding needs none.
        mask (Tensor[B, n]): tokens that count, any dtype (nonzero counts), any pattern; None: all.
        tril_mask (bool): spans end where they start or later. False, for relations: any pair of tokens.
        max_span_length (int): most tokens that a span may have, at least 1; None: any number.
        scale (float): of the dot product, not of the biases; None: 1 / sqrt(d).

    Returns:
        Tensor[B, H, n, n]: [start, end], in the dtype of the inputs (the widest, where they differ).

    Raises:
        ValueError: for a shape, a size or a device that does not fit.
        TypeError: for a dtype that is not listed.

    Precision:
        Angles of RoPE in float64, dot products in float32 (float64 for float64 inputs), rounded once to the dtype of
        the result: products that overflow float16 before they are scaled do no harm. Deterministic. Differentiable
        to any order and in forward mode, beyond the first through the plain PyTorch reference.

    References:
        Su et al., "Global Pointer: Novel Efficient Span-based Approach for Named Entity Recognition" (2022), arXiv
        2208.03054, section 3. Su et al., "RoFormer" (2021), arXiv 2104.09864, equation (34).
    """
    inputs = kernel_inputs(q, k, start_bias, end_bias, rope, position_ids, mask, tril_mask, max_span_length, scale)
    scores: Tensor = ops.scores(*inputs)
    return scores


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
    """Multilabel cross entropy of all spans of every (sequence, head), without a tensor of n x n in either direction.

    L[b, h] = log(1 + sum over valid cells that are no labels of e^s) + log(1 + sum over labels of e^-s)

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> q, k, labels = torch.randn(1, 5, 2, 4), torch.randn(1, 5, 2, 4), torch.tensor([[[[0, 3]], [[1, 1]]]])
        >>> positive = torch.zeros(1, 2, 5, 5, dtype=torch.bool)
        >>> positive[0, 0, 0, 3] = positive[0, 1, 1, 1] = True
        >>> scores = fastnlp_ops.global_pointer_scores(q, k)
        >>> loss = fastnlp_ops.multilabel_categorical_crossentropy(scores.flatten(2), positive.flatten(2))
        >>> torch.allclose(fastnlp_ops.global_pointer_loss(q, k, labels), loss)
        True

    Args:
        q, k, start_bias, end_bias, rope, position_ids: as in :func:`global_pointer_scores`.
        mask, tril_mask, max_span_length, scale: as in :func:`global_pointer_scores`.
        labels (Tensor[B, H, P, 2] or Tensor[M, 4]): integers: (start, end) of the P labels of every sequence and head,
            or a list of (b, h, start, end). A -1 or -100 in a label marks it as padding. Labels that are given twice
            count once; those at a cell that is not valid (masked, below the diagonal, too long) take no part. Dense or
            soft labels: :func:`multilabel_categorical_crossentropy` of the scores.
        reduction (str): "none": [B, H]; "mean" over sequences and heads; "sum"; "batchmean": the sum over heads, the
            mean over sequences, as GPLinker trains.
        mask_zero (bool): labels are padded with zeros, as bert4keras pads them; the cell (0, 0), which no label can
            name then, takes no part.

    Returns:
        Tensor: a scalar, or [B, H]; float32, float64 for float64 inputs. At least 0, and finite for finite scores; 0
        for a row without valid cells, and for the mean of no rows.

    Raises:
        ValueError: as :func:`global_pointer_scores`; an unknown reduction; on CPU a label out of range.
        TypeError: for a dtype that is not listed.

    Preconditions:
        On CUDA labels are not checked: one out of range is dropped.

    Precision:
        Against float64, |error| <= 1e-6 max(1, L), and 1e-5 of the gradients, for scores up to 100. Labels are kept out
        of the sum over negatives, not subtracted from it: gradients have the right sign at any score. Deterministic:
        the same bits for every run and number of threads. NaN or inf in a token that counts reach the rows (b, h) that
        read it, no others. Where a gradient will be needed, the forward pass on CPU computes it beside the loss and
        saves it, in the compute type; on CUDA, and where heads share q and k, the backward pass computes scores again.

    References:
        As :func:`global_pointer_scores`; the loss: Su et al., "ZLPR: A Novel Loss for Multi-label Classification"
        (2022), arXiv 2208.02955, section 3. Index labels: Su, https://kexue.fm/archives/8888 (2022).
    """
    check_reduction(reduction)
    inputs = kernel_inputs(q, k, start_bias, end_bias, rope, position_ids, mask, tril_mask, max_span_length, scale)
    q, k, start_bias, _, mask, _, _, _, longest, _ = inputs
    B, n = q.shape[:2]
    H = heads_of(q, start_bias)
    check_labels(labels, q, H)
    cells = ops.cells(labels, mask, B, H, n, tril_mask, longest, mask_zero)
    leaves = (x for x in inputs[:4] if x is not None)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
    log_negative, log_positive, _ = ops.loss(q, k, cells, *inputs[2:], save)
    return reduce_rows(log_negative + log_positive, reduction)


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
    """How far two passes over the same texts disagree (R-Drop, VAT), without a tensor of n x n in either direction.

    D[b, h] = sum over valid cells of (sigmoid(s1) - sigmoid(s2)) (s1 - s2)

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> q1, k1, q2, k2 = torch.randn(4, 2, 5, 3, 4)
        >>> s1, s2 = (fastnlp_ops.global_pointer_scores(q, k, tril_mask=False) for q, k in ((q1, k1), (q2, k2)))
        >>> expected = ((s1.sigmoid() - s2.sigmoid()) * (s1 - s2)).sum((2, 3)).mean()
        >>> torch.allclose(fastnlp_ops.global_pointer_divergence(q1, k1, q2, k2, tril_mask=False), expected)
        True

    Args:
        q1 (Tensor[B, n, H, d] or Tensor[B, n, 1, d]): start side of the first pass, as q in
            :func:`global_pointer_scores`.
        k1 (Tensor, of the shape of q1): end side of the first pass.
        q2 (Tensor, of the shape of q1): start side of the second pass.
        k2 (Tensor, of the shape of q1): end side of the second pass.
        start_bias1 (Tensor[B, n, H]): biases of the first pass; all four are given, or none.
        end_bias1 (Tensor[B, n, H]): likewise.
        start_bias2 (Tensor[B, n, H]): biases of the second pass.
        end_bias2 (Tensor[B, n, H]): likewise.
        rope, position_ids, mask, tril_mask, max_span_length, scale: as in :func:`global_pointer_scores`, for both.
        reduction (str): "none", "mean", "sum" or "batchmean", as in :func:`global_pointer_loss`.

    Returns:
        Tensor: a scalar, or [B, H]; float32, float64 for float64 inputs. At least 0; 0 where both passes agree.

    Raises:
        ValueError: for a shape, a size or a device that does not fit; an unknown reduction.
        TypeError: for a dtype that is not listed.

    Precision:
        float32 (float64 for float64 inputs). Deterministic. Differentiable in both passes, otherwise as
        :func:`global_pointer_scores`.

    References:
        Liang et al., "R-Drop: Regularized Dropout for Neural Networks" (2021), arXiv 2106.14448, equation (3). The form
        for this loss: Su, https://kexue.fm/archives/9039 (2022).
    """
    check_reduction(reduction)
    check_scoring(q1, k1, start_bias1, end_bias1, rope, ("q1", "k1", "start_bias1", "end_bias1"))
    check_scoring(q2, k2, start_bias2, end_bias2, rope, ("q2", "k2", "start_bias2", "end_bias2"))
    check_cells(q1, "q1", position_ids, mask, max_span_length)
    if q2.shape != q1.shape:
        raise ValueError(f"q2 must be [B, n, H, d] = {tuple(q1.shape)} as q1, got {shape_of(q2)}")
    if q2.device != q1.device:
        raise ValueError(f"q2 must be on the device of q1, {q1.device}, got {q2.device}")
    if heads_of(q1, start_bias1) != heads_of(q2, start_bias2) or (start_bias1 is None) != (start_bias2 is None):
        raise ValueError("start_bias1 and start_bias2 must have the same shape, or both be None")
    first = (q1, k1, start_bias1, end_bias1)
    tensors = alike(*first, q2, k2, start_bias2, end_bias2)
    options = cell_options(position_ids, mask, rope, tril_mask, max_span_length, scale, q1.shape[3])
    return reduce_rows(ops.divergence(*tensors, *options), reduction)


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
    """The spans whose score is above a threshold, and their scores, found on the device without a tensor of n x n.

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> q, k = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
        >>> scores = fastnlp_ops.global_pointer_scores(q, k)
        >>> spans, found = fastnlp_ops.global_pointer_decode(q, k)
        >>> torch.equal(spans, (scores > 0).nonzero()) and torch.allclose(found, scores[scores > 0], atol=1e-6)
        True

    Args:
        q, k, start_bias, end_bias, rope, position_ids: as in :func:`global_pointer_scores`.
        mask, tril_mask, max_span_length, scale: as in :func:`global_pointer_scores`.
        threshold (float): spans score above it, strictly; 0 is that of the loss.
        top_k (int): keep the best k spans of each sequence, over all heads; None: all.
        max_spans (int): as top_k, with results of one size, which a ``transformers.Trainer`` gathers from batches and
            processes: see below. Not beside top_k.
        nested (bool): False: keep no two spans of a sequence, of any heads, that overlap: from the highest score down,
            a span is kept where it overlaps none that is. This comes before top_k and max_spans.

    Returns:
        (spans, scores): int64 Tensor[M, 4] (b, h, start, end), sorted, ends inclusive; and Tensor[M], float32, or
        float64 for float64 inputs, without gradients. The calibrated probability of a span is
        ``torch.sigmoid(2 * scores)``. With max_spans: int64 Tensor[B, max_spans, 4], row b being the spans of sequence
        b, then rows of -100; and Tensor[B, max_spans], then -inf. ``spans[spans[:, :, 0] >= 0]`` is [M, 4] again.

    Raises:
        ValueError: as :func:`global_pointer_scores`; top_k or max_spans below 1, or both; a threshold that is NaN.
        TypeError: for a dtype that is not listed.

    Precision:
        As :func:`global_pointer_scores`. Of equal scores the lowest (h, start, end) goes first. A score of NaN is above
        nothing. Memory grows with the number of spans found, whatever it is.

    References:
        As :func:`global_pointer_scores`. That sigmoid(2 s) is the probability: Su, https://kexue.fm/archives/9064
        (2022).
    """
    for name, count in (("top_k", top_k), ("max_spans", max_spans)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if top_k is not None and max_spans is not None:
        raise ValueError("top_k must be None where max_spans is given")
    if threshold != threshold:
        raise ValueError(f"threshold must be a number, got {threshold}")
    with torch.no_grad():
        inputs = kernel_inputs(q, k, start_bias, end_bias, rope, position_ids, mask, tril_mask, max_span_length, scale)
        spans, scores = ops.decode(*inputs, float(threshold))
        if not nested:
            keep = ops.flat_spans(spans, scores, q)
            spans, scores = spans[keep], scores[keep]
        best = top_k if max_spans is None else max_spans
        if best is not None:
            keep = _best(spans, scores, q.shape[0], best)
            spans, scores = spans[keep], scores[keep]
        if max_spans is not None:
            return _padded(spans, scores, q.shape[0], max_spans)
    return spans, scores


def _best(spans: Tensor, scores: Tensor, sequences: int, top_k: int) -> Tensor:
    """Which spans are among the best top_k of their sequence, bool [M]; of equals the first."""
    by_score = scores.sort(descending=True, stable=True).indices
    order = by_score[spans[by_score, 0].sort(stable=True).indices]  # sequence after sequence, the best first
    return torch.zeros_like(order, dtype=torch.bool).index_put((order,), _place(spans[order, 0], sequences) < top_k)


def _padded(spans: Tensor, scores: Tensor, sequences: int, width: int) -> tuple[Tensor, Tensor]:
    """Sorted spans [M, 4] and scores [M], `width` of a sequence at most, as [B, width, 4] and [B, width]."""
    sequence = spans[:, 0].contiguous()
    place = (sequence, _place(sequence, sequences))
    padded = spans.new_full((sequences, width, 4), -100).index_put(place, spans)
    return padded, scores.new_full((sequences, width), -torch.inf).index_put(place, scores)


def _place(sequence: Tensor, sequences: int) -> Tensor:
    """How many of its own stand before each entry of a sorted list of sequences."""
    first = torch.searchsorted(sequence, torch.arange(sequences, device=sequence.device))
    return torch.arange(sequence.shape[0], device=sequence.device) - first[sequence]
