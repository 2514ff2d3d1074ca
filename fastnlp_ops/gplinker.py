"""Relation extraction over span scores: which subject stands in which relation to which object."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastnlp_ops._global_pointer_inputs import check_cells, check_integers, check_scoring, heads_of, shape_of

# Numbers held at once, 16 MiB in float32. One sequence takes what it needs between its own tokens.
_NUMBERS = 1 << 22
_ROWS = 1 << 15  # of the result that are filled, column by column, while they are in a cache


class _Spans(NamedTuple):
    """Distinct spans of one role, sorted."""

    sequence: Tensor  # [M]
    start: Tensor
    end: Tensor


class _Tokens(NamedTuple):
    """The distinct tokens at which the spans of each sequence start, or end."""

    padded: Tensor  # [B, U]
    slot: Tensor  # [M], where in its row of `padded` the token of a span is

    @classmethod
    def of(cls, sequence: Tensor, position: Tensor, batch: int, length: int) -> "_Tokens":
        token, which = torch.unique(sequence * length + position, return_inverse=True)
        owner = token // length
        count = torch.bincount(owner, minlength=batch)
        slot = torch.arange(len(token), device=token.device) - (count.cumsum(0) - count)[owner]
        padded = token.new_zeros(batch, int(count.max()))
        padded[owner, slot] = token % length
        return cls(padded, slot[which])


class _Scorer(NamedTuple):
    """One of the two relation layers."""

    q: Tensor
    k: Tensor
    start_bias: Tensor | None
    end_bias: Tensor | None
    scale: float | None

    def table(self, starts: Tensor, ends: Tensor, here: slice, dtype: torch.dtype) -> Tensor:
        """Scores between tokens starts [b, U] and ends [b, V] of the sequences `here`, [b * U * V, R]."""
        row = torch.arange(len(starts), device=starts.device)[:, None]
        q, k = self.q[here][row, starts].to(dtype), self.k[here][row, ends].to(dtype)  # [b, U, H, d], [b, V, H, d]
        scale = q.shape[3] ** -0.5 if self.scale is None else self.scale
        scores = torch.einsum("buhd,bvhd->buvh", q, k) * scale
        if self.start_bias is not None and self.end_bias is not None:
            start, end = self.start_bias[here][row, starts].to(dtype), self.end_bias[here][row, ends].to(dtype)
            scores = scores + start[:, :, None] + end[:, None]
        return scores.flatten(0, 2)

    def cost(self, starts: Tensor, ends: Tensor) -> int:
        """Numbers that `table` holds for each sequence."""
        U, V = starts.shape[1], ends.shape[1]
        return U * V * heads_of(self.q, self.start_bias) + (U + V) * self.q.shape[2] * self.q.shape[3]


def gplinker_decode(
    spans: Tensor,
    head_q: Tensor,
    head_k: Tensor,
    tail_q: Tensor,
    tail_k: Tensor,
    *,
    head_start_bias: Tensor | None = None,
    head_end_bias: Tensor | None = None,
    tail_start_bias: Tensor | None = None,
    tail_end_bias: Tensor | None = None,
    mask: Tensor | None = None,
    threshold: float = 0.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The triples (subject span, relation, object span) of GPLinker, with relation scores only between found spans.

    head[r] = scale * q_r[start of subject] . k_r[start of object], tail[r] likewise of the ends (each plus its biases);
    a triple is found where head > threshold and tail > threshold

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> spans = torch.tensor([[0, 0, 1, 2], [0, 1, 4, 4]])  # tokens 1..2 as a subject, 4 as an object
        >>> head_q, head_k, tail_q, tail_k = torch.randn(4, 1, 6, 3, 8)  # three relations
        >>> head = (head_q[0, 1] * head_k[0, 4]).sum(-1) / 8**0.5
        >>> tail = (tail_q[0, 2] * tail_k[0, 4]).sum(-1) / 8**0.5
        >>> expected = [[0, 1, 2, r, 4, 4] for r in range(3) if head[r] > 0 and tail[r] > 0]
        >>> fastnlp_ops.gplinker_decode(spans, head_q, head_k, tail_q, tail_k)[0].tolist() == expected
        True

    Args:
        spans (Tensor[M, 4]): int (b, role, start, end) in any order, role 0 a subject and 1 an object: what
            :func:`global_pointer_decode` finds for an entity layer of two heads. A span listed twice counts once.
        head_q, head_k (Tensor[B, n, R, d]): projections for R relations between first tokens, without RoPE, as
            ``GlobalPointer.project`` gives them; [B, n, 1, d] where biases are given (``EfficientGlobalPointer``).
            float32, float64, float16 or bfloat16, any strides.
        tail_q, tail_k (Tensor[B, n, R, d]): those between last tokens.
        head_start_bias, head_end_bias (Tensor[B, n, R]): biases at the subject's and the object's token, or None.
        tail_start_bias, tail_end_bias (Tensor[B, n, R]): those of the tail scores, or None.
        mask (Tensor[B, n]): any dtype; spans that begin or end at a token where it is 0 take no part.
        threshold (float): scores above it count.
        scale (float): factor of the dot products; None is 1 / sqrt(d).

    Returns:
        (triples, scores): int64 Tensor[K, 6] (b, subject start, subject end, relation, object start, object end),
        sorted by its columns, and Tensor[K], the smaller of the two scores, in float32 (float64 where an input is). A
        span may stand in a relation to itself. Not differentiable.

    Raises:
        ValueError: for a shape or a device that does not fit; on CPU for a span outside the batch or the sequence, or
            of another role than 0 and 1.
        TypeError: for a dtype that is not listed.

    Preconditions:
        On CUDA spans that the check would refuse are left out.

    Precision:
        Dot products in float32 (float64 for float64 inputs). Scores are taken between the distinct first (last) tokens
        of the spans of a sequence; no tensor is of size B R n^2. Beside the result, memory is a few times 2^22 numbers,
        or the scores of one sequence where those are more. An untrained model, that finds a quarter of all spans, finds
        millions of triples in a sequence: ``global_pointer_decode(top_k=...)`` is the way to bound them.

    References:
        Su: GPLinker. kexue.fm/archives/8888, 2022.
    """
    head_names = ("head_q", "head_k", "head_start_bias", "head_end_bias")
    check_scoring(head_q, head_k, head_start_bias, head_end_bias, False, head_names)
    check_cells(head_q, "head_q", None, mask, None)
    check_scoring(
        tail_q, tail_k, tail_start_bias, tail_end_bias, False, ("tail_q", "tail_k", "tail_start_bias", "tail_end_bias")
    )
    B, n = head_q.shape[:2]
    R = heads_of(head_q, head_start_bias)
    relations = heads_of(tail_q, tail_start_bias)
    if tail_q.shape[:2] != head_q.shape[:2] or relations != R:
        raise ValueError(
            "tail_q and head_q must score the same tokens and relations, "
            f"got (B, n, R) = {(*tail_q.shape[:2], relations)} and {(B, n, R)}"
        )
    if spans.dim() != 2 or spans.shape[1] != 4:
        raise ValueError(f"spans must be [M, 4], got {shape_of(spans)}")
    check_integers("spans", spans)
    for name, tensor in (("tail_q", tail_q), ("spans", spans)):
        if tensor.device != head_q.device:
            raise ValueError(f"{name} must be on the device of head_q, {head_q.device}, got {tensor.device}")
    head = _Scorer(head_q, head_k, head_start_bias, head_end_bias, scale)
    tail = _Scorer(tail_q, tail_k, tail_start_bias, tail_end_bias, scale)
    # Autocast would take the dot products in half precision.
    with torch.no_grad(), torch.autocast(head_q.device.type, enabled=False):
        subjects, objects = _roles(spans.to(torch.int64), mask, B, n)
        key, scores = _search(subjects, objects, head, tail, threshold)
        key, order = key.sort()
        triples, width = key.new_empty(len(key), 6), max(1, len(objects.start))
        for found, row in zip(key.split(_ROWS), triples.split(_ROWS), strict=True):
            pair, o = found // width, found % width
            s = pair // R
            row[:, 0], row[:, 1], row[:, 2] = subjects.sequence[s], subjects.start[s], subjects.end[s]
            row[:, 3], row[:, 4], row[:, 5] = pair % R, objects.start[o], objects.end[o]
        return triples, scores[order]


def _roles(spans: Tensor, mask: Tensor | None, B: int, n: int) -> tuple[_Spans, _Spans]:
    """Subjects and objects: distinct, sorted, without those that end at a masked token."""
    sizes = spans.new_tensor([B, 2, n, n])
    inside = ((spans >= 0) & (spans < sizes)).all(1)
    if spans.device.type == "cpu" and not bool(inside.all()):
        row = tuple(spans[int((~inside).nonzero()[0])].tolist())
        raise ValueError(f"spans must be (b, role, start, end) below {(B, 2, n, n)}, got {row}")
    spans = spans[inside]
    if mask is not None:
        on = mask != 0
        spans = spans[on[spans[:, 0], spans[:, 2]] & on[spans[:, 0], spans[:, 3]]]
    b, role, start, end = spans.unbind(1)
    key = torch.unique(((role * B + b) * n + start) * n + end)
    first, end = key // max(1, n), key % max(1, n)
    row, start = first // max(1, n), first % max(1, n)
    subject = row < B
    subjects = _Spans(row[subject], start[subject], end[subject])
    return subjects, _Spans(row[~subject] - B, start[~subject], end[~subject])


def _search(subjects: _Spans, objects: _Spans, head: _Scorer, tail: _Scorer, threshold: float) -> tuple[Tensor, Tensor]:
    """What is found, as keys (subject * R + relation) * objects + object in no order, and the scores."""
    B, n = head.q.shape[:2]
    R = heads_of(head.q, head.start_bias)
    double = any(x is not None and x.dtype == torch.float64 for x in (*head[:4], *tail[:4]))
    dtype = torch.float64 if double else torch.float32
    keys, scores = [subjects.start.new_empty(0)], [head.q.new_empty(0, dtype=dtype)]
    if len(subjects.start) == 0 or len(objects.start) == 0:
        return keys[0], scores[0]
    subject_starts, subject_ends = (_Tokens.of(subjects.sequence, x, B, n) for x in subjects[1:])
    object_starts, object_ends = (_Tokens.of(objects.sequence, x, B, n) for x in objects[1:])
    cost = max(
        head.cost(subject_starts.padded, object_starts.padded), tail.cost(subject_ends.padded, object_ends.padded)
    )
    # Pairs of spans are numbered subject after subject, and `behind` is the first number after those of a subject.
    count = torch.bincount(objects.sequence, minlength=B)
    width = count[subjects.sequence]
    behind = width.cumsum(0)
    first_object = (count.cumsum(0) - count)[subjects.sequence]
    bounds = [0, *(torch.bincount(subjects.sequence, minlength=B) * count).cumsum(0).tolist()]
    group, pairs = max(1, _NUMBERS // cost), max(1, _NUMBERS // R)
    for b in range(0, B, group):
        here, begin, stop = slice(b, b + group), bounds[b], bounds[min(B, b + group)]
        if begin == stop:
            continue
        heads = head.table(subject_starts.padded[here], object_starts.padded[here], here, dtype)
        tails = tail.table(subject_ends.padded[here], object_ends.padded[here], here, dtype)
        head_found, tail_found = heads > threshold, tails > threshold
        for start in range(begin, stop, pairs):
            number = torch.arange(start, min(stop, start + pairs), device=behind.device)
            s = torch.searchsorted(behind, number, right=True)
            o = first_object[s] + number - (behind - width)[s]
            row = subjects.sequence[s] - b
            head_row = _row(row, subject_starts, s, object_starts, o)
            tail_row = _row(row, subject_ends, s, object_ends, o)
            found = head_found.index_select(0, head_row) & tail_found.index_select(0, tail_row)  # [pairs, R]
            hit, relation = found.nonzero().unbind(1)
            scores.append(torch.minimum(heads[head_row[hit], relation], tails[tail_row[hit], relation]))
            keys.append((s[hit] * R + relation) * len(objects.start) + o[hit])
    return torch.cat(keys), torch.cat(scores)


def _row(sequence: Tensor, starts: _Tokens, s: Tensor, ends: _Tokens, o: Tensor) -> Tensor:
    """The row of a scorer's table that belongs to subject s and object o."""
    return (sequence * starts.padded.shape[1] + starts.slot[s]) * ends.padded.shape[1] + ends.slot[o]
