"""Fake kernels and autograd formulas of the MEMM ops. Schemas: csrc/ops.cpp. Kernels: csrc/{cpu,cuda}/memm.*.

First derivatives are kernels; derivatives of derivatives go through the differentiable reference.
"""

from typing import Any

import torch
from torch import Tensor

_OPS = torch.ops.fastnlp_ops


@torch.library.register_fake("fastnlp_ops::memm_log_likelihood")
def _(emissions, tags, transitions, mask, bidirectional):
    return transitions.new_empty(emissions.shape[0])


@torch.library.register_fake("fastnlp_ops::memm_log_likelihood_backward")
def _(grad, emissions, tags, transitions, mask, bidirectional, transition_grad):
    return emissions.new_empty(emissions.shape), transitions.new_empty(transitions.shape if transition_grad else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.bidirectional = inputs
    ctx.save_for_backward(*tensors)


def _formula(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    transition_grad = ctx.needs_input_grad[2]
    demissions, dtransitions = _OPS.memm_log_likelihood_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.bidirectional, transition_grad
    )
    return demissions, None, dtransitions if transition_grad else None, None, None


torch.library.register_autograd("fastnlp_ops::memm_log_likelihood", _formula, setup_context=_setup)


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.bidirectional, ctx.transition_grad = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward_formula(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    from fastnlp_ops.reference.memm import memm_log_likelihood

    grad, emissions, tags, transitions, mask = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        upstream, *scores = (
            x if x.requires_grad else x.detach().requires_grad_() for x in (grad, emissions, transitions)
        )
        value = memm_log_likelihood(scores[0], tags, scores[1], mask=mask, bidirectional=ctx.bidirectional)
        # Where a value is -inf its gradients are finite: only they are used.
        total = (value.nan_to_num(neginf=0.0) * upstream).sum()
        first = torch.autograd.grad(total, scores, create_graph=True)
        inner = [(c * f).sum() for c, f in zip(cotangents, first, strict=True) if c is not None and c.numel()]
        if not inner:
            return (None,) * 7
        dgrad, demissions, dtransitions = torch.autograd.grad(
            torch.stack([x.to(value.dtype) for x in inner]).sum(),
            [upstream, *scores],
            create_graph=create_graph,
            materialize_grads=True,
        )
    return dgrad, demissions, None, dtransitions, None, None, None


torch.library.register_autograd(
    "fastnlp_ops::memm_log_likelihood_backward", _backward_formula, setup_context=_backward_setup
)
