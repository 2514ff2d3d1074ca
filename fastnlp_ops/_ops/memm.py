"""Fake kernels and autograd formulas of the MEMM ops. Schemas: csrc/ops.cpp. Kernels: csrc/{cpu,cuda}/memm.*.

First derivatives are kernels; derivatives of derivatives, and in forward mode, go through the differentiable reference.
"""

from typing import Any

import torch
from torch import Tensor

from fastnlp_ops import reference
from fastnlp_ops._ops._autograd import differentiable, through_plain, vjp


@torch.library.register_fake("fastnlp_ops::memm_log_likelihood")
def _(emissions, tags, transitions, mask, bidirectional):
    return transitions.new_empty(emissions.shape[0])


@torch.library.register_fake("fastnlp_ops::memm_log_likelihood_backward")
def _(grad, emissions, tags, transitions, mask, bidirectional, transition_grad):
    return emissions.new_empty(emissions.shape), transitions.new_empty(transitions.shape if transition_grad else 0)


def _plain(emissions: Tensor, tags: Tensor, transitions: Tensor, mask: Tensor | None, bidirectional: bool) -> Tensor:
    return reference.memm_log_likelihood(emissions, tags, transitions, mask=mask, bidirectional=bidirectional)


def _plain_backward(
    grad: Tensor,
    emissions: Tensor,
    tags: Tensor,
    transitions: Tensor,
    mask: Tensor | None,
    bidirectional: bool,
    transition_grad: bool,
) -> tuple[Tensor, Tensor]:
    def value(emissions: Tensor, transitions: Tensor) -> Tensor:
        return _plain(emissions, tags, transitions, mask, bidirectional)

    demissions, dtransitions = vjp(value, (emissions, transitions), (grad,))
    return demissions, dtransitions if transition_grad else grad.new_zeros(0)


_backward = through_plain("memm_log_likelihood_backward", _plain_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.bidirectional = inputs
    ctx.save_for_backward(*tensors)


def _formula(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    transition_grad = ctx.needs_input_grad[2]
    demissions, dtransitions = _backward(grad.contiguous(), *ctx.saved_tensors, ctx.bidirectional, transition_grad)
    return demissions, None, dtransitions if transition_grad else None, None, None


log_likelihood = differentiable("memm_log_likelihood", _plain, _setup, _formula)
