"""Fake kernels and autograd formulas of the CRF ops. Schemas: csrc/ops.cpp. Kernels: csrc/cpu/crf.cpp, csrc/cuda/crf*.

First derivatives are kernels. Derivatives of derivatives, of the entropy, and in forward mode go through the
differentiable reference: they are right to any order, at the reference's speed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnlp_ops import reference
from fastnlp_ops._ops._autograd import differentiable, through_plain, undifferentiable, vjp

_Scores = Tensor | None
_OPS = torch.ops.fastnlp_ops


def _compute_dtype(emissions: Tensor) -> torch.dtype:
    return torch.float64 if emissions.dtype == torch.float64 else torch.float32


def _batch(emissions: Tensor, cu_seqlens: _Scores) -> int | torch.SymInt:
    return emissions.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _fake_forward(emissions: Tensor, cu_seqlens: _Scores, save_messages: bool) -> tuple[Tensor, Tensor]:
    dtype, rows = _compute_dtype(emissions), 0
    if save_messages:
        rows = math.prod(emissions.shape[:-1])  # Size.numel() would make symbolic sizes constants
        if emissions.device.type == "cuda":
            rows = rows + 2 * (rows // 256)  # the chunk boundaries of long sequences
    value = emissions.new_empty(_batch(emissions, cu_seqlens), dtype=dtype)
    return value, emissions.new_empty((rows, emissions.shape[-1]), dtype=dtype)


@torch.library.register_fake("fastnlp_ops::crf_log_partition")
def _(emissions, transitions, start, end, mask, cu_seqlens, save_messages):
    return _fake_forward(emissions, cu_seqlens, save_messages)


@torch.library.register_fake("fastnlp_ops::crf_log_likelihood")
def _(emissions, tags, transitions, start, end, mask, cu_seqlens, save_messages, check_start=False):
    return _fake_forward(emissions, cu_seqlens, save_messages)


def _fake_backward(emissions: Tensor, transitions: Tensor, transition_grad: bool) -> tuple[Tensor, ...]:
    boundary = transitions.new_empty(emissions.shape[-1])
    dtransitions = transitions.new_empty(transitions.shape if transition_grad else 0)
    return emissions.new_empty(emissions.shape), dtransitions, boundary, torch.empty_like(boundary)


@torch.library.register_fake("fastnlp_ops::crf_log_partition_backward")
def _(grad, messages, emissions, transitions, start, end, mask, cu_seqlens, transition_grad):
    return _fake_backward(emissions, transitions, transition_grad)


@torch.library.register_fake("fastnlp_ops::crf_log_likelihood_backward")
def _(grad, messages, emissions, tags, transitions, start, end, mask, cu_seqlens, transition_grad):
    return _fake_backward(emissions, transitions, transition_grad)


@torch.library.register_fake("fastnlp_ops::crf_viterbi")
def _(emissions, transitions, start, end, mask, cu_seqlens, check_start=False):
    paths = emissions.new_empty(emissions.shape[:-1], dtype=torch.int64)
    return paths, emissions.new_empty(_batch(emissions, cu_seqlens), dtype=_compute_dtype(emissions))


@torch.library.register_fake("fastnlp_ops::crf_viterbi_n_best")
def _(emissions, transitions, start, end, mask, cu_seqlens, n_best):
    batch, steps = _batch(emissions, cu_seqlens), emissions.shape[-2]
    shape = (batch, n_best, steps) if cu_seqlens is None else (n_best, steps)
    scores = emissions.new_empty((batch, n_best), dtype=_compute_dtype(emissions))
    return emissions.new_empty(shape, dtype=torch.int64), scores


@torch.library.register_fake("fastnlp_ops::crf_sample")
def _(emissions, transitions, start, end, mask, cu_seqlens, uniforms):
    return emissions.new_empty(uniforms.shape, dtype=torch.int64)


@torch.library.register_fake("fastnlp_ops::crf_entropy")
def _(emissions, transitions, start, end, mask, cu_seqlens):
    return emissions.new_empty(_batch(emissions, cu_seqlens), dtype=_compute_dtype(emissions))


@torch.library.register_fake("fastnlp_ops::crf_log_partition_double_backward")
def _(grad, de, dt, ds, dn, emissions, transitions, start, end, mask, cu_seqlens):
    return torch.empty_like(grad), *_fake_backward(emissions, transitions, True)


@torch.library.register_fake("fastnlp_ops::crf_viterbi_backward")
def _(grad, paths, emissions, transitions, start, end, mask, cu_seqlens):
    return _fake_backward(emissions, transitions, True)


@torch.library.register_fake("fastnlp_ops::crf_entropy_backward")
def _(grad, emissions, transitions, start, end, mask, cu_seqlens):
    return _fake_backward(emissions, transitions, True)


def _where_given(gradients: Sequence[Tensor], inputs: Sequence[_Scores]) -> list[_Scores]:
    return [None if x is None else g for g, x in zip(gradients, inputs, strict=False)]


def _gradients(value: Callable[..., Tensor], grad: Tensor, scores: Sequence[_Scores]) -> tuple[Tensor, ...]:
    """By emissions, transitions, start and end, of the sum of grad * value(*scores); zeros for what is not given."""
    found = vjp(value, scores, (grad,))
    return tuple(grad.new_zeros(found[1].shape[-1]) if x is None else x for x in found)


def _plain_log_partition(*inputs: Any) -> tuple[Tensor, Tensor]:
    *scores, mask, cu_seqlens, _ = inputs
    value = reference.crf_log_partition(*scores, mask=mask, cu_seqlens=cu_seqlens)
    return value, value.new_empty(0)


def _plain_log_partition_backward(grad: Tensor, _: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    *scores, mask, cu_seqlens, transition_grad = inputs

    def value(*scores: Any) -> Tensor:
        return reference.crf_log_partition(*scores, mask=mask, cu_seqlens=cu_seqlens)

    found = _gradients(value, grad, scores)
    return found if transition_grad else (found[0], grad.new_zeros(0), *found[2:])


def _plain_double_backward(
    grad: Tensor, de: _Scores, dt: _Scores, ds: _Scores, dn: _Scores, *inputs: Any
) -> tuple[Tensor, ...]:
    *scores, mask, cu_seqlens = inputs

    def slopes(grad: Tensor, *scores: Any) -> tuple[Tensor, ...]:
        return _plain_log_partition_backward(grad, grad, *scores, mask, cu_seqlens, True)

    found = vjp(slopes, (grad, *scores), (de, dt, ds, dn))
    return tuple(grad.new_zeros(scores[1].shape[-1]) if x is None else x for x in found)


_double_backward = through_plain("crf_log_partition_double_backward", _plain_double_backward, kernel=True)


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad, _, *tensors, ctx.transition_grad = inputs
    ctx.save_for_backward(grad, *tensors)
    ctx.set_materialize_grads(False)


def _backward_formula(ctx: Any, de: _Scores, dt: _Scores, ds: _Scores, dn: _Scores) -> tuple[_Scores, ...]:
    """Through an op, for marginals are this in their forward pass: the loop over steps is no part of their graph."""
    grad, *inputs = ctx.saved_tensors
    cotangents = (de, dt if ctx.transition_grad else None, ds, dn)
    if all(x is None for x in cotangents):
        return (None,) * 9
    dgrad, *dscores = _double_backward(grad, *cotangents, *inputs)
    return (dgrad, None, *_where_given(dscores, inputs), None, None, None)


log_partition_backward = differentiable(
    "crf_log_partition_backward", _plain_log_partition_backward, _backward_setup, _backward_formula
)


def _plain_log_likelihood(emissions: Tensor, tags: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    *scores, mask, cu_seqlens = inputs[:5]
    value = reference.crf_log_likelihood(emissions, tags, *scores, mask=mask, cu_seqlens=cu_seqlens)
    return value, value.new_empty(0)


def _plain_log_likelihood_backward(
    grad: Tensor, _: Tensor, emissions: Tensor, tags: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    *scores, mask, cu_seqlens, transition_grad = inputs

    def value(emissions: Tensor, *scores: Any) -> Tensor:
        return reference.crf_log_likelihood(emissions, tags, *scores, mask=mask, cu_seqlens=cu_seqlens)

    found = _gradients(value, grad, (emissions, *scores))
    return found if transition_grad else (found[0], grad.new_zeros(0), *found[2:])


def _forward(
    name: str, plain: Callable[..., Any], backward: Callable[..., Any], has_tags: bool
) -> Callable[..., tuple[Tensor, Tensor]]:
    """What to call in the place of op `name`, crf_log_partition or crf_log_likelihood."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        tensors = inputs[: 7 if has_tags else 6]
        ctx.saved_messages, *ctx.options = inputs[len(tensors) :]
        ctx.save_for_backward(output[1], *tensors)
        ctx.set_materialize_grads(False)

    def formula(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[_Scores, ...]:
        messages, *tensors = ctx.saved_tensors
        if grad is None:
            return (None,) * (len(tensors) + 1 + len(ctx.options))
        if not ctx.saved_messages:
            messages = forward(*tensors, True)[1]
        transition_grad = ctx.needs_input_grad[2 if has_tags else 1]
        demissions, dtransitions, dstart, dend = backward(grad.contiguous(), messages, *tensors, transition_grad)
        tags = (None,) if has_tags else ()
        start, end = tensors[-4:-2]
        return (
            demissions,
            *tags,
            dtransitions if transition_grad else None,
            None if start is None else dstart,
            None if end is None else dend,
            None,
            None,
            None,
            *[None for _ in ctx.options],
        )

    forward = differentiable(name, plain, setup, formula)
    return forward


log_likelihood_backward = through_plain("crf_log_likelihood_backward", _plain_log_likelihood_backward, results=(1,))
log_partition = _forward("crf_log_partition", _plain_log_partition, log_partition_backward, has_tags=False)
log_likelihood = _forward("crf_log_likelihood", _plain_log_likelihood, log_likelihood_backward, has_tags=True)


class EagerLogLikelihood(torch.autograd.Function):
    """crf_log_likelihood, or its sum, for eager training: the sum is part of the node, and needs none of its own."""

    @staticmethod
    def forward(ctx: Any, summed: bool, check_start: bool, *inputs: _Scores) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            value, messages = _OPS.crf_log_likelihood.default(*inputs, True, check_start)
            ctx.save_for_backward(messages, *inputs)
            ctx.rows = value.shape
            return value.sum() if summed else value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[_Scores, ...]:
        transition_grad = ctx.needs_input_grad[4]
        arguments = (grad.expand(ctx.rows).contiguous(), *ctx.saved_tensors, transition_grad)
        demissions, dtransitions, dstart, dend = log_likelihood_backward(*arguments)
        start, end = arguments[5:7]
        return (
            None,
            None,
            demissions,
            None,
            dtransitions if transition_grad else None,
            None if start is None else dstart,
            None if end is None else dend,
            None,
            None,
        )


def _plain_path_score_gradients(grad: Tensor, paths: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """The score of a path is a sum of entries of the inputs: its gradient counts them."""
    *scores, mask, cu_seqlens = inputs

    def value(*scores: Any) -> Tensor:
        layout = {"mask": mask, "cu_seqlens": cu_seqlens}
        if grad.dim() == 1:
            return reference.crf_score(scores[0], paths, *scores[1:], **layout)
        ranks = [reference.crf_score(scores[0], path, *scores[1:], **layout) for path in paths.unbind(-2)]
        return torch.stack(ranks, -1)

    return _gradients(value, grad, scores)


_path_score_gradients = through_plain("crf_viterbi_backward", _plain_path_score_gradients, kernel=True)


def _path_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(output[0], *inputs[:6])
    ctx.others = len(inputs) - 4
    ctx.set_materialize_grads(False)


def _path_formula(ctx: Any, _: Tensor | None, grad: Tensor | None) -> tuple[_Scores, ...]:
    paths, *tensors = ctx.saved_tensors
    if grad is None:
        return (None,) * (4 + ctx.others)
    dscores = _path_score_gradients(grad, paths, *tensors)
    return (*_where_given(dscores, tensors), *[None] * ctx.others)


def _plain_viterbi(*inputs: Any) -> tuple[Tensor, Tensor]:
    *scores, mask, cu_seqlens = inputs[:6]
    return reference.crf_viterbi(*scores, mask=mask, cu_seqlens=cu_seqlens)


def _plain_viterbi_n_best(*inputs: Any) -> tuple[Tensor, Tensor]:
    *scores, mask, cu_seqlens, n_best = inputs
    paths, found = reference.crf_viterbi(*scores, mask=mask, cu_seqlens=cu_seqlens, n_best=n_best)
    return (paths, found) if n_best > 1 else (paths.unsqueeze(-2), found[:, None])


viterbi = differentiable("crf_viterbi", _plain_viterbi, _path_setup, _path_formula)
viterbi_n_best = differentiable("crf_viterbi_n_best", _plain_viterbi_n_best, _path_setup, _path_formula)
sample = undifferentiable("crf_sample")


def _plain_entropy(*inputs: Any) -> Tensor:
    *scores, mask, cu_seqlens = inputs
    return reference.crf_entropy(*scores, mask=mask, cu_seqlens=cu_seqlens)


def _plain_entropy_backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    *scores, mask, cu_seqlens = inputs
    return _gradients(lambda *scores: _plain_entropy(*scores, mask, cu_seqlens), grad, scores)


_entropy_backward = through_plain("crf_entropy_backward", _plain_entropy_backward, kernel=True)


def _entropy_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _entropy_formula(ctx: Any, grad: Tensor) -> tuple[_Scores, ...]:
    inputs = ctx.saved_tensors
    return (*_where_given(_entropy_backward(grad, *inputs), inputs), None, None)


entropy = differentiable("crf_entropy", _plain_entropy, _entropy_setup, _entropy_formula)
