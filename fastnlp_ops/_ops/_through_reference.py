"""Ops whose kernel, on every device, is a differentiable plain-PyTorch function: derivatives of derivatives."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def leaves(*tensors: Tensor | None) -> list[Any]:
    """The tensors as something to differentiate by, each by itself if two are one; those on a graph stay on it."""
    return [None if x is None else x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in tensors]


def gradients(total: Tensor, inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """Differentiable gradients of a scalar, zeros where an input has no part in it; [N] zeros for a missing vector."""
    there = [x for x in inputs if x is not None]
    found = iter(torch.autograd.grad(total, there, create_graph=True, materialize_grads=True))
    width = next(x.shape[-1] for x in reversed(there) if x.dim() > 1)
    return [total.new_zeros(width) if x is None else next(found) for x in inputs]


def register_through_reference(name: str, function: Callable[..., list[Tensor]]) -> None:
    """Makes `function` the kernel of op `name` and, differentiated, its autograd formula.

    Its arguments are tensors and None, then, where there are any, options: bool, int, float.
    """
    # A kernel runs below autograd, where nothing is recorded; this one differentiates, so it starts afresh.
    include, exclude = torch._C._dispatch_tls_local_include_set, torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)

    def without_autocast(arguments: Sequence[Any]) -> torch.autocast:
        return torch.autocast(next(x.device.type for x in arguments if x is not None), enabled=False)

    def reference(arguments: Sequence[Any]) -> list[Tensor]:
        with torch.enable_grad(), without_autocast(arguments):
            return function(*arguments)

    def kernel(*arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._ForceDispatchKeyGuard(include(), exclude):
            return tuple(x.detach() for x in reference(arguments))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors = [x for x in inputs if x is None or isinstance(x, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.options = inputs[len(tensors) :]
        ctx.set_materialize_grads(False)

    def formula(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        create_graph = torch.is_grad_enabled()
        inputs = [x if x is None or not x.is_floating_point() else leaves(x)[0] for x in ctx.saved_tensors]
        pairs = zip(reference((*inputs, *ctx.options)), cotangents, strict=True)
        used = [(y, c) for y, c in pairs if c is not None and y.requires_grad]
        by = [x for x in inputs if x is not None and x.requires_grad]
        if not used:
            return (None,) * (len(inputs) + len(ctx.options))
        outputs, grads = zip(*used, strict=True)
        with without_autocast(inputs):
            found = iter(torch.autograd.grad(outputs, by, grads, create_graph=create_graph, allow_unused=True))
        dinputs = tuple(next(found) if x is not None and x.requires_grad else None for x in inputs)
        return dinputs + (None,) * len(ctx.options)

    torch.library.impl(f"fastnlp_ops::{name}", "CompositeExplicitAutograd")(kernel)
    torch.library.register_autograd(f"fastnlp_ops::{name}", formula, setup_context=setup)
