"""Fake kernels and autograd formulas of the GlobalPointer ops. Schemas: csrc/ops.cpp. Kernels: csrc/cpu, _triton.

First derivatives are kernels. Derivatives of derivatives, and in forward mode, go through the differentiable reference:
they are right to any order, at the reference's speed; those of derivatives a few sequences at a time.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnlp_ops._global_pointer_inputs import heads_of, labels_to_cells
from fastnlp_ops._ops._autograd import differentiable, through_plain, undifferentiable, vjp
from fastnlp_ops.reference import global_pointer as reference

_OPS = torch.ops.fastnlp_ops
_OPTIONS = 4  # rope, tril_mask, max_span_length, scale: what is no tensor, behind all that is


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _row_values(q: Tensor, start_bias: Tensor | None) -> Tensor:
    return q.new_empty((q.shape[0], heads_of(q, start_bias)), dtype=_compute_dtype(q))


def _like(*inputs: Tensor | None) -> tuple[Tensor, ...]:
    """What gradients look like: dense, and of size 0 for biases that are not given."""
    like = next(x for x in inputs if x is not None)
    return tuple(like.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _where_given(gradients: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else g for g, x in zip(gradients, inputs, strict=True))


@torch.library.register_fake("fastnlp_ops::global_pointer_scores")
def _(q, k, start, end, mask, position_ids, *options):
    return q.new_empty((q.shape[0], heads_of(q, start), q.shape[1], q.shape[1]))


@torch.library.register_fake("fastnlp_ops::global_pointer_scores_backward")
def _(dscores, q, k, start, end, mask, position_ids, *options):
    return _like(q, k, start, end)


@torch.library.register_fake("fastnlp_ops::global_pointer_loss")
def _(q, k, cells, start, end, mask, position_ids, rope, tril_mask, max_span_length, scale, save_gradients):
    saved = 0
    if save_gradients and q.device.type == "cpu" and heads_of(q, start) == q.shape[2]:
        B, n, H, d = q.shape
        saved = B * n * H * 2 * (d if start is None else d + 1)
    return _row_values(q, start), _row_values(q, start), q.new_empty(saved, dtype=_compute_dtype(q))


@torch.library.register_fake("fastnlp_ops::global_pointer_loss_backward")
def _(dloss, log_negative, log_positive, saved, q, k, cells, start, end, mask, position_ids, *options):
    return _like(q, k, start, end)


@torch.library.register_fake("fastnlp_ops::global_pointer_divergence")
def _(q1, k1, start1, end1, q2, k2, start2, end2, mask, position_ids, *options):
    return _row_values(q1, start1)


@torch.library.register_fake("fastnlp_ops::global_pointer_divergence_backward")
def _(ddivergence, q1, k1, start1, end1, q2, k2, start2, end2, mask, position_ids, *options):
    return _like(q1, k1, start1, end1, q2, k2, start2, end2)


@torch.library.register_fake("fastnlp_ops::global_pointer_decode")
def _(q, k, start, end, mask, position_ids, *options):
    found = torch.library.get_ctx().new_dynamic_size()
    return q.new_empty((found, 4), dtype=torch.int64), q.new_empty(found, dtype=_compute_dtype(q))


@torch.library.register_fake("fastnlp_ops::flat_spans")
def _(spans, scores, q):
    return spans.new_empty(spans.shape[0], dtype=torch.bool)


@torch.library.register_fake("fastnlp_ops::global_pointer_cells")
def _(labels, mask, batch, heads, length, tril_mask, max_span_length, mask_zero):
    count = labels.shape[0] if labels.dim() == 2 else batch * heads * labels.shape[2]
    return labels.new_empty(count + batch * heads if mask_zero else count, dtype=torch.int64)


torch.library.impl("fastnlp_ops::global_pointer_cells", "CompositeExplicitAutograd")(labels_to_cells)

cells = undifferentiable("global_pointer_cells")
flat_spans = undifferentiable("flat_spans")


def _longest(max_span_length: int) -> int | None:
    return None if max_span_length < 0 else max_span_length


def _scoring(inputs: Sequence[Any]) -> dict[str, Any]:
    """Keywords of the reference for the arguments from start_bias to scale."""
    start, end, mask, position_ids, rope, tril_mask, max_span_length, scale = inputs
    return {
        "start_bias": start,
        "end_bias": end,
        "mask": mask,
        "position_ids": position_ids,
        "rope": rope,
        "tril_mask": tril_mask,
        "max_span_length": _longest(max_span_length),
        "scale": scale,
    }


def _complete(found: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Gradients as the ops give them: of size 0 for biases that are not given."""
    return tuple(like.new_zeros(0) if x is None else x for x in found)


_CELLS = 2**22  # that the reference holds at a time: about a dozen float32 tensors of 16 MiB


def _by_sequences(
    inputs: Sequence[Any], cotangents: Sequence[Tensor | None], cells_at: int | None = None
) -> Iterator[tuple[list[Any], list[Tensor | None]]]:
    """The arguments of a backward op for a few sequences of the batch at a time."""
    above, q = inputs[0], next(x for x in inputs[1:] if isinstance(x, Tensor) and x.dim() == 4)
    batch, n, rows = q.shape[0], q.shape[1], above.shape[1]
    step = max(1, _CELLS // max(1, rows * n * n))
    for b in range(0, max(1, batch), step):
        some = slice(b, b + step)
        part = [x[some] if isinstance(x, Tensor) and i != cells_at else x for i, x in enumerate(inputs)]
        if cells_at is not None:
            part[cells_at] = _cells_of(inputs[cells_at], b * rows * n * n, part[0].numel() * n * n)
        yield part, [None if c is None else c[some] for c in cotangents]


def _cells_of(cells: Tensor, first: int, count: int) -> Tensor:
    """`cells` of the `count` cells from `first` on, counted from there; `count` stands for all others."""
    local = torch.where(cells < 0, -1 - cells, cells) - first
    local = torch.where((local >= 0) & (local < count), local, count)
    return torch.where((cells < 0) & (local < count), -1 - local, local)


def _plain_scores(q: Tensor, k: Tensor, *inputs: Any) -> Tensor:
    return reference.global_pointer_scores(q, k, **_scoring(inputs))


def _plain_scores_backward(dscores: Tensor, q: Tensor, k: Tensor, start: Any, end: Any, *others: Any) -> Any:
    found = vjp(lambda *scores: _plain_scores(*scores, *others), (q, k, start, end), (dscores,))
    return _complete(found, dscores)


def dense_cells(cells: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cells that are labels, and those that are in neither sum: bool of `shape` each."""
    count = math.prod(shape)

    def flags(keys: Tensor) -> Tensor:
        at = torch.where((keys >= 0) & (keys < count), keys, count)
        return torch.zeros(count + 1, dtype=torch.bool, device=cells.device).scatter(0, at, True)[:count].reshape(shape)

    return flags(cells), flags(-1 - cells)


def _plain_loss(q: Tensor, k: Tensor, cells: Tensor, start: Any, end: Any, *others: Any) -> tuple[Tensor, ...]:
    mask, position_ids, rope, tril_mask, max_span_length, scale = others[:6]
    scores = reference.plain_scores(q, k, start, end, rope, position_ids, mask, scale)
    valid = reference.valid_cells(q, mask, tril_mask, _longest(max_span_length))
    positive, neither = dense_cells(cells, scores.shape)
    return *reference.loss_log_sums(scores, positive, valid & ~neither), scores.new_empty(0)


def _plain_loss_backward(
    dloss: Tensor,
    log_negative: Tensor,
    log_positive: Tensor,
    _: Tensor,
    q: Tensor,
    k: Tensor,
    cells: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    *others: Any,
) -> tuple[Tensor, ...]:
    def log_sums(q: Tensor, k: Tensor, start: Any, end: Any) -> tuple[Tensor, ...]:
        return _plain_loss(q, k, cells, start, end, *others)[:2]

    # As in _loss_formula.
    above = [torch.where(x == torch.inf, 0, dloss) for x in (log_negative, log_positive)]
    return _complete(vjp(log_sums, (q, k, start, end), above), dloss)


def _plain_divergence(*inputs: Any) -> Tensor:
    first, second = inputs[:4], inputs[4:8]
    mask, position_ids, rope, tril_mask, max_span_length, scale = inputs[8:]
    s1, s2 = (
        reference.plain_scores(q, k, start, end, rope, position_ids, mask, scale)
        for q, k, start, end in (first, second)
    )
    return reference.divergence(s1, s2, reference.valid_cells(first[0], mask, tril_mask, _longest(max_span_length)))


def _plain_divergence_backward(ddivergence: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    found = vjp(lambda *scores: _plain_divergence(*scores, *inputs[8:]), inputs[:8], (ddivergence,))
    return _complete(found, ddivergence)


_scores_backward = through_plain("global_pointer_scores_backward", _plain_scores_backward, parts=_by_sequences)
_loss_backward = through_plain(
    "global_pointer_loss_backward",
    _plain_loss_backward,
    results=(1, 2, 3),
    parts=functools.partial(_by_sequences, cells_at=6),
)
_divergence_backward = through_plain(
    "global_pointer_divergence_backward", _plain_divergence_backward, parts=_by_sequences
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.rope, ctx.tril_mask, ctx.max_span_length, ctx.scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _options(ctx: Any) -> tuple[bool, bool, int, float]:
    return ctx.rope, ctx.tril_mask, ctx.max_span_length, ctx.scale


def _scores_formula(ctx: Any, dscores: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    if dscores is None:
        return (None,) * (len(inputs) + _OPTIONS)
    found = _scores_backward(dscores.contiguous(), *inputs, *_options(ctx))
    return (*_where_given(found, inputs[:4]), *[None] * (2 + _OPTIONS))


def _loss_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _save(ctx, (*output, *inputs[:-1]), output)
    ctx.mark_non_differentiable(output[2])


def _loss_formula(ctx: Any, dnegative: Tensor | None, dpositive: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    log_negative, log_positive, saved, *inputs = ctx.saved_tensors
    if dnegative is dpositive:  # their sum is the loss, and its gradient that of both
        parts = [(dnegative, log_negative, log_positive, saved)]
    else:  # e^{s - inf} is 0: a sum that is infinite gives no gradient
        nothing, anew = torch.full_like(log_negative, torch.inf), saved.new_empty(0)
        parts = [(dnegative, log_negative, nothing, anew), (dpositive, nothing, log_positive, anew)]
    found = [_loss_backward(d.contiguous(), *sums, *inputs, *_options(ctx)) for d, *sums in parts if d is not None]
    if not found:
        return (None,) * (len(inputs) + _OPTIONS + 1)
    dq, dk, dstart, dend = (sum(x[1:], x[0]) for x in zip(*found, strict=True))
    dstart, dend = _where_given((dstart, dend), inputs[3:5])
    return dq, dk, None, dstart, dend, *[None] * (2 + _OPTIONS + 1)


def _divergence_formula(ctx: Any, ddivergence: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    if ddivergence is None:
        return (None,) * (len(inputs) + _OPTIONS)
    found = _divergence_backward(ddivergence.contiguous(), *inputs, *_options(ctx))
    return (*_where_given(found, inputs[:8]), *[None] * (2 + _OPTIONS))


def _decode_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _decode_formula(ctx: Any, *_: Tensor | None) -> None:
    raise NotImplementedError("global_pointer_decode has no gradient: train on global_pointer_loss or _scores")


def _plain_decode(q: Tensor, k: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    return reference.global_pointer_decode(q, k, **_scoring(inputs[:-1]), threshold=inputs[-1])


scores = differentiable("global_pointer_scores", _plain_scores, _save, _scores_formula)
loss = differentiable("global_pointer_loss", _plain_loss, _loss_save, _loss_formula)
divergence = differentiable("global_pointer_divergence", _plain_divergence, _save, _divergence_formula)
decode = differentiable(
    "global_pointer_decode",
    _plain_decode,
    _decode_save,
    _decode_formula,
    no_vmap="global_pointer_decode finds another number of spans in each slice of vmap: give it the slices as a batch",
)
