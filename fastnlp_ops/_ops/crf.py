"""Fake kernels and autograd formulas of the CRF ops. Schemas: csrc/ops.cpp. Kernels: csrc/cpu/crf.cpp, csrc/cuda/crf*.

First derivatives are kernels. Derivatives of derivatives, and of the entropy, go through the differentiable reference:
they are right to any order, at the reference's speed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnlp_ops import reference

_Scores = Tensor | None
_OPS = torch.ops.fastnlp_ops


def _compute_dtype(emissions: Tensor) -> torch.dtype:
    return torch.float64 if emissions.dtype == torch.float64 else torch.float32


def _batch(emissions: Tensor, cu_seqlens: _Scores) -> int | torch.SymInt:
    return emissions.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _fake_forward(emissions: Tensor, cu_seqlens: _Scores, save_messages: bool) -> tuple[Tensor, Tensor]:
    dtype, rows = _compute_dtype(emissions), 0
    if save_messages:
        rows = emissions.shape[:-1].numel()
        if emissions.device.type == "cuda":
            rows = rows + 2 * (rows // 256)  # the chunk boundaries of long sequences
    value = emissions.new_empty(_batch(emissions, cu_seqlens), dtype=dtype)
    return value, emissions.new_empty((rows, emissions.shape[-1]), dtype=dtype)


@torch.library.register_fake("fastnlp_ops::crf_log_partition")
def _(emissions, transitions, start, end, mask, cu_seqlens, save_messages):
    return _fake_forward(emissions, cu_seqlens, save_messages)


@torch.library.register_fake("fastnlp_ops::crf_log_likelihood")
def _(emissions, tags, transitions, start, end, mask, cu_seqlens, save_messages):
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
def _(emissions, transitions, start, end, mask, cu_seqlens):
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


def _reference_inputs(scores: Sequence[_Scores]) -> list[Any]:
    """The score tensors, as inputs that the reference can be differentiated by, still on the caller's graph."""
    return [s if s is None or s.requires_grad else s.detach().requires_grad_() for s in scores]


def _grads(output: Tensor, inputs: Sequence[_Scores], create_graph: bool) -> list[_Scores]:
    """Gradients of a scalar by the inputs that are there; None where an input is None or has no part in it."""
    there = [x for x in inputs if x is not None]
    grads = iter(torch.autograd.grad(output, there, create_graph=create_graph, allow_unused=True))
    return [None if x is None else next(grads) for x in inputs]


def _register_forward(name: str, has_tags: bool) -> None:
    """Autograd of crf_log_partition and crf_log_likelihood and, through the reference, of their backward ops."""
    forward, backward = getattr(_OPS, name), getattr(_OPS, f"{name}_backward")

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.saved_messages = inputs
        ctx.save_for_backward(output[1], *tensors)
        ctx.set_materialize_grads(False)

    def formula(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[_Scores, ...]:
        messages, *tensors = ctx.saved_tensors
        if grad is None:
            return (None,) * (len(tensors) + 1)
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
        )

    torch.library.register_autograd(f"fastnlp_ops::{name}", formula, setup_context=setup)

    def backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad, _, *tensors, ctx.transition_grad = inputs
        ctx.save_for_backward(grad, *tensors)
        ctx.set_materialize_grads(False)

    def backward_formula(ctx: Any, *cotangents: Tensor | None) -> tuple[_Scores, ...]:
        grad, *tensors = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        emissions, *tags, transitions, start, end, mask, cu_seqlens = tensors
        with torch.enable_grad():
            inputs = _reference_inputs((emissions, transitions, start, end))
            upstream = grad if grad.requires_grad else grad.detach().requires_grad_()
            value = getattr(reference, name)(inputs[0], *tags, *inputs[1:], mask=mask, cu_seqlens=cu_seqlens)
            # Where log Z or the gold score is -inf the value is constant or infinite: only gradients are used, and
            # they are finite.
            first = _grads((value.nan_to_num(neginf=0.0) * upstream).sum(), inputs, create_graph=True)
            inner = [(c * f).sum() for c, f in zip(cotangents, first, strict=True) if c is not None and f is not None]
            if not inner:
                return (None,) * (len(tensors) + 3)
            second = _grads(torch.stack([x.to(value.dtype) for x in inner]).sum(), [upstream, *inputs], create_graph)
        dgrad, demissions, *rest = second
        return (dgrad, None, demissions, *([None] if has_tags else []), *rest, None, None, None)

    torch.library.register_autograd(f"fastnlp_ops::{name}_backward", backward_formula, setup_context=backward_setup)


_register_forward("crf_log_partition", has_tags=False)
_register_forward("crf_log_likelihood", has_tags=True)


def _path_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.n_best = inputs[6] if len(inputs) == 7 else None
    ctx.save_for_backward(*inputs[:6], output[0])
    ctx.set_materialize_grads(False)


def _path_formula(ctx: Any, _: Tensor | None, grad: Tensor | None) -> tuple[_Scores, ...]:
    """The score of a best path is a sum of entries of the inputs: its gradient counts them."""
    *scores, mask, cu_seqlens, paths = ctx.saved_tensors
    rest = (None, None) if ctx.n_best is None else (None, None, None)
    if grad is None:
        return (None,) * 4 + rest
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = _reference_inputs(scores)
        if ctx.n_best is None:
            ranks = [(paths, grad)]
        else:
            ranks = list(zip(paths.unbind(-2), grad.unbind(-1), strict=True))
        counted = [
            (reference.crf_score(inputs[0], path, *inputs[1:], mask=mask, cu_seqlens=cu_seqlens) * g).sum()
            for path, g in ranks
        ]
        return (*_grads(torch.stack(counted).sum(), inputs, create_graph), *rest)


torch.library.register_autograd("fastnlp_ops::crf_viterbi", _path_formula, setup_context=_path_setup)
torch.library.register_autograd("fastnlp_ops::crf_viterbi_n_best", _path_formula, setup_context=_path_setup)


def _entropy_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _entropy_formula(ctx: Any, grad: Tensor) -> tuple[_Scores, ...]:
    *scores, mask, cu_seqlens = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = _reference_inputs(scores)
        value = reference.crf_entropy(*inputs, mask=mask, cu_seqlens=cu_seqlens)
        return (*_grads((value * grad).sum(), inputs, create_graph), None, None)


torch.library.register_autograd("fastnlp_ops::crf_entropy", _entropy_formula, setup_context=_entropy_setup)
