"""Fake kernels and autograd formulas of the GlobalPointer ops. Schemas: csrc/ops.cpp. Kernels: csrc/cpu, _triton.

First derivatives are kernels. Derivatives of derivatives go through the differentiable reference, a few sequences at a
time: they are right to any order, at the reference's speed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnlp_ops._global_pointer_inputs import heads_of, labels_to_cells
from fastnlp_ops._ops._through_reference import gradients, leaves, register_through_reference
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


@torch.library.register_fake("fastnlp_ops::global_pointer_scores_double_backward")
def _(dscores, dq_grad, dk_grad, dstart_grad, dend_grad, q, k, start, end, mask, position_ids, *options):
    return _like(dscores, q, k, start, end)


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


@torch.library.register_fake("fastnlp_ops::global_pointer_weigh_")
def _(saved, dloss, q, k, *others):
    pass


@torch.library.register_fake("fastnlp_ops::global_pointer_loss_double_backward")
def _(dloss, dq_grad, dk_grad, dstart_grad, dend_grad, log_negative, log_positive, q, k, cells, start, end, *others):
    return _like(dloss, q, k, start, end)


@torch.library.register_fake("fastnlp_ops::global_pointer_divergence")
def _(q1, k1, start1, end1, q2, k2, start2, end2, mask, position_ids, *options):
    return _row_values(q1, start1)


@torch.library.register_fake("fastnlp_ops::global_pointer_divergence_backward")
def _(ddivergence, q1, k1, start1, end1, q2, k2, start2, end2, mask, position_ids, *options):
    return _like(q1, k1, start1, end1, q2, k2, start2, end2)


@torch.library.register_fake("fastnlp_ops::global_pointer_divergence_double_backward")
def _(ddivergence, *others):
    return _like(ddivergence, *others[8:16])


@torch.library.register_fake("fastnlp_ops::global_pointer_decode")
def _(q, k, start, end, mask, position_ids, *options):
    found = torch.library.get_ctx().new_dynamic_size()
    return q.new_empty((found, 4), dtype=torch.int64), q.new_empty(found, dtype=_compute_dtype(q))


@torch.library.register_fake("fastnlp_ops::flat_spans")
def _(spans, scores, sequences, length):
    return spans.new_empty(spans.shape[0], dtype=torch.bool)


@torch.library.register_fake("fastnlp_ops::global_pointer_cells")
def _(labels, mask, batch, heads, length, tril_mask, max_span_length, mask_zero):
    count = labels.shape[0] if labels.dim() == 2 else batch * heads * labels.shape[2]
    return labels.new_empty(count + batch * heads if mask_zero else count, dtype=torch.int64)


torch.library.impl("fastnlp_ops::global_pointer_cells", "CompositeExplicitAutograd")(labels_to_cells)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.rope, ctx.tril_mask, ctx.max_span_length, ctx.scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _options(ctx: Any) -> tuple[bool, bool, int, float]:
    return ctx.rope, ctx.tril_mask, ctx.max_span_length, ctx.scale


def _no_gradients(ctx: Any) -> tuple[None, ...]:
    return (None,) * (len(ctx.saved_tensors) + _OPTIONS)


def _scores_formula(ctx: Any, dscores: Tensor | None) -> tuple[Tensor | None, ...]:
    if dscores is None:
        return _no_gradients(ctx)
    inputs = ctx.saved_tensors
    found = _OPS.global_pointer_scores_backward(dscores.contiguous(), *inputs, *_options(ctx))
    return (*_where_given(found, inputs[:4]), *[None] * (2 + _OPTIONS))


def _loss_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _save(ctx, (*output, *inputs[:-1]), output)


def _is_last_use(dloss: Tensor, saved: Tensor, q: Tensor) -> bool:
    """Whether the graph is freed behind this backward pass, so that what was saved may become the gradients."""
    return (
        type(saved) is Tensor
        and saved.numel() > 0
        and saved.dtype == q.dtype
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        # A batch of gradients (is_grads_batched, vmap) has no place in one that was saved.
        and not torch._C._functorch.is_legacy_batchedtensor(dloss)
        and not torch._C._functorch.is_functorch_wrapped_tensor(dloss)
        and not torch._C._autograd._get_current_graph_task_keep_graph()
    )


def _weigh(dloss: Tensor, saved: Tensor, inputs: Sequence[Any], options: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Gradients by q, k and biases, as views of `saved`."""
    q, k, _, start, *others = inputs
    _OPS.global_pointer_weigh_(saved, dloss.contiguous(), q, k, start, *others, *options)
    B, n, H, d = q.shape
    dq, dk = saved[: B * n * H * 2 * d].view(B, n, H, 2, d).unbind(3)
    dbiases = saved[B * n * H * 2 * d :].view(2, B, n, H) if start is not None else (saved, saved)
    return dq, dk, *dbiases


def _loss_formula(ctx: Any, dnegative: Tensor | None, dpositive: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    log_negative, log_positive, saved, *inputs = ctx.saved_tensors
    if dnegative is dpositive and dnegative is not None and _is_last_use(dnegative, saved, inputs[0]):
        dq, dk, *dbiases = _weigh(dnegative, saved.detach(), inputs, _options(ctx))
        return dq, dk, None, *_where_given(dbiases, inputs[3:5]), *[None] * (2 + _OPTIONS + 1)
    if dnegative is dpositive:  # their sum is the loss, and its gradient that of both
        parts = [(dnegative, log_negative, log_positive, saved)]
    else:  # e^{s - inf} is 0: a sum that is infinite gives no gradient
        nothing, anew = torch.full_like(log_negative, torch.inf), saved.new_empty(0)
        parts = [(dnegative, log_negative, nothing, anew), (dpositive, nothing, log_positive, anew)]
    op = _OPS.global_pointer_loss_backward
    found = [op(d.contiguous(), *sums, *inputs, *_options(ctx)) for d, *sums in parts if d is not None]
    if not found:
        return (None,) * (len(inputs) + _OPTIONS + 1)
    dq, dk, dstart, dend = (sum(x[1:], x[0]) for x in zip(*found, strict=True))
    dstart, dend = _where_given((dstart, dend), inputs[3:5])
    return dq, dk, None, dstart, dend, *[None] * (2 + _OPTIONS + 1)


def _divergence_formula(ctx: Any, ddivergence: Tensor | None) -> tuple[Tensor | None, ...]:
    if ddivergence is None:
        return _no_gradients(ctx)
    inputs = ctx.saved_tensors
    found = _OPS.global_pointer_divergence_backward(ddivergence.contiguous(), *inputs, *_options(ctx))
    return (*_where_given(found, inputs[:8]), *[None] * (2 + _OPTIONS))


def _decode_formula(ctx: Any, *_: Tensor | None) -> None:
    raise NotImplementedError("global_pointer_decode has no gradient: train on global_pointer_loss or _scores")


def _scores_backward_formula(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    dscores, *inputs = ctx.saved_tensors
    found = _OPS.global_pointer_scores_double_backward(dscores, *cotangents, *inputs, *_options(ctx))
    return (*_where_given(found, (dscores, *inputs[:4])), *[None] * (2 + _OPTIONS))


def _loss_backward_formula(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    dloss, log_negative, log_positive, _, *others = ctx.saved_tensors
    found = _OPS.global_pointer_loss_double_backward(
        dloss, *cotangents, log_negative, log_positive, *others, *_options(ctx)
    )
    ddloss, dq, dk, dstart, dend = found
    dstart, dend = _where_given((dstart, dend), others[3:5])
    # log_negative, log_positive and what is saved are functions of q and k: their part is in that of q and k.
    return ddloss, None, None, None, dq, dk, None, dstart, dend, *[None] * (2 + _OPTIONS)


def _divergence_backward_formula(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    ddivergence, *inputs = ctx.saved_tensors
    found = _OPS.global_pointer_divergence_double_backward(ddivergence, *cotangents, *inputs, *_options(ctx))
    return (*_where_given(found, (ddivergence, *inputs[:8])), *[None] * (2 + _OPTIONS))


for _name, _formula, _setup in (
    ("scores", _scores_formula, _save),
    ("loss", _loss_formula, _loss_save),
    ("divergence", _divergence_formula, _save),
    ("decode", _decode_formula, None),
    ("scores_backward", _scores_backward_formula, _save),
    ("loss_backward", _loss_backward_formula, _save),
    ("divergence_backward", _divergence_backward_formula, _save),
):
    torch.library.register_autograd(f"fastnlp_ops::global_pointer_{_name}", _formula, setup_context=_setup)


_CELLS = 2**22  # that the reference holds at a time: about a dozen float32 tensors of 16 MiB


def _second(
    function: Callable[..., Tensor],
    upstream: Tensor,
    cotangents: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
) -> list[Tensor]:
    """Gradients by `upstream` and `inputs` of sum(cotangents * gradients by inputs of function(upstream, *inputs))."""
    wide = leaves(*(None if x is None else x.to(upstream.dtype) for x in inputs))
    (upstream,) = leaves(upstream)
    total = function(upstream, *wide)
    there = [x for x in wide if x is not None]
    first = iter(gradients(total, there))
    pairs = [(c, next(first)) for c, x in zip(cotangents, wide, strict=True) if x is not None]
    parts = [(c * f).sum() for c, f in pairs if c is not None]
    dupstream, *found = gradients(torch.stack(parts).sum() if parts else total * 0, [upstream, *there])
    rest = iter(found)
    return [dupstream, *(upstream.new_zeros(0) if x is None else next(rest).to(x.dtype) for x in inputs)]


def _by_sequences(function: Callable[..., list[Tensor]], row_cells: int, *tensors: Tensor | None) -> list[Tensor]:
    """Calls `function` with a few sequences of the tensors at a time, and joins what it returns."""
    batch = next(len(x) for x in tensors if x is not None)
    step = max(1, _CELLS // max(1, row_cells))
    starts = range(0, max(1, batch), step)
    parts = [function(b, *(None if x is None else x[b : b + step] for x in tensors)) for b in starts]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def _longest(max_span_length: int) -> int | None:
    return None if max_span_length < 0 else max_span_length


def _scores_double_backward(dscores: Tensor, *arguments: Any) -> list[Tensor]:
    *tensors, rope, tril_mask, max_span_length, scale = arguments

    def part(_: int, dscores: Tensor, *tensors: Tensor | None) -> list[Tensor]:
        *others, mask, position_ids = tensors

        def total(dscores: Tensor, q: Tensor, k: Tensor, start: Tensor | None, end: Tensor | None) -> Tensor:
            scores = reference.plain_scores(q, k, start, end, rope, position_ids, mask, scale)
            valid = reference.valid_cells(q, mask, tril_mask, _longest(max_span_length))
            return (scores * torch.where(valid, dscores, 0)).sum()

        # dscores has the dtype of q: float16 and bfloat16 are computed in float32, and rounded once.
        wide = dscores.to(_compute_dtype(dscores))
        ddscores, *found = _second(total, wide, others[:4], others[4:])
        return [ddscores.to(dscores.dtype), *found]

    return _by_sequences(part, dscores[:1].numel(), dscores, *tensors)


def _positive(cells: Tensor, first: int, rows: int, n: int) -> tuple[Tensor, Tensor]:
    """Cells of the rows from `first` on that are labels, and those in neither sum: bool [rows, n, n] each."""
    count = rows * n * n

    def dense(keys: Tensor) -> Tensor:
        local = keys - first * n * n
        local = torch.where((local >= 0) & (local < count), local, count)
        flags = torch.zeros(count + 1, dtype=torch.bool, device=cells.device).index_fill(0, local, True)
        return flags[:count].reshape(rows, n, n)

    return dense(cells), dense(-1 - cells)


def _loss_double_backward(dloss: Tensor, *arguments: Any) -> list[Tensor]:
    *tensors, cells, start, end, mask, position_ids, rope, tril_mask, max_span_length, scale = arguments
    n, H = tensors[6].shape[1], dloss.shape[1]

    def part(b: int, dloss: Tensor, *tensors: Any) -> list[Tensor]:
        *others, mask, position_ids = tensors
        cotangents, (log_negative, log_positive), inputs = others[:4], others[4:6], others[6:]

        def total(dloss: Tensor, q: Tensor, k: Tensor, start: Tensor | None, end: Tensor | None) -> Tensor:
            scores = reference.plain_scores(q, k, start, end, rope, position_ids, mask, scale)
            valid = reference.valid_cells(q, mask, tril_mask, _longest(max_span_length))
            positive, neither = (x.reshape(scores.shape) for x in _positive(cells, b * H, dloss.numel(), n))
            negative, positive = reference.loss_log_sums(scores, positive, valid & ~neither)
            negative = negative.masked_fill(log_negative == torch.inf, 0)  # as in _loss_formula
            positive = positive.masked_fill(log_positive == torch.inf, 0)
            return (dloss * (negative + positive)).sum()

        return _second(total, dloss, cotangents, inputs)

    return _by_sequences(part, H * n * n, dloss, *tensors, start, end, mask, position_ids)


def _divergence_double_backward(ddivergence: Tensor, *arguments: Any) -> list[Tensor]:
    *tensors, rope, tril_mask, max_span_length, scale = arguments
    n = tensors[8].shape[1]

    def part(_: int, ddivergence: Tensor, *tensors: Tensor | None) -> list[Tensor]:
        *others, mask, position_ids = tensors

        def total(ddivergence: Tensor, *inputs: Any) -> Tensor:
            q, k, start, end, q2, k2, start2, end2 = inputs
            first = reference.plain_scores(q, k, start, end, rope, position_ids, mask, scale)
            second = reference.plain_scores(q2, k2, start2, end2, rope, position_ids, mask, scale)
            valid = reference.valid_cells(q, mask, tril_mask, _longest(max_span_length))
            return (ddivergence * reference.divergence(first, second, valid)).sum()

        return _second(total, ddivergence, others[:8], others[8:])

    return _by_sequences(part, ddivergence.shape[1] * n * n, ddivergence, *tensors)


register_through_reference("global_pointer_scores_double_backward", _scores_double_backward)
register_through_reference("global_pointer_loss_double_backward", _loss_double_backward)
register_through_reference("global_pointer_divergence_double_backward", _divergence_double_backward)
