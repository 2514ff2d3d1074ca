"""Fake kernels and autograd formulas of the multilabel ops. Schemas: csrc/ops.cpp. Kernels: csrc/cpu, _triton.

First derivatives are kernels; derivatives of derivatives go through the differentiable reference.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastnlp_ops._ops._through_reference import gradients, leaves, register_through_reference
from fastnlp_ops.reference.multilabel import compute_dtype, indices_to_labels, log_sums

_OPS = torch.ops.fastnlp_ops


def _register(name: str, to_labels: Callable[[Tensor, Tensor], Tensor]) -> None:
    """One of the two forms of the loss; `to_labels` makes its labels dense."""
    backward, double_backward = getattr(_OPS, f"{name}_backward"), getattr(_OPS, f"{name}_double_backward")

    @torch.library.register_fake(f"fastnlp_ops::{name}")
    def _(scores, labels):
        rows = scores.new_empty(scores.shape[0], dtype=compute_dtype(scores))
        return rows, torch.empty_like(rows)

    @torch.library.register_fake(f"fastnlp_ops::{name}_backward")
    def _(dloss, log_negative, log_positive, scores, labels):
        return scores.new_empty(scores.shape)

    @torch.library.register_fake(f"fastnlp_ops::{name}_double_backward")
    def _(dloss, dscores_grad, log_negative, log_positive, scores, labels):
        return torch.empty_like(dloss), scores.new_empty(scores.shape)

    def setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output, *inputs)
        ctx.set_materialize_grads(False)

    def formula(ctx: Any, dnegative: Tensor | None, dpositive: Tensor | None) -> tuple[Tensor | None, None]:
        log_negative, log_positive, scores, labels = ctx.saved_tensors
        if dnegative is dpositive:  # their sum is the loss, and its gradient that of both
            parts = [(dnegative, log_negative, log_positive)]
        else:  # e^{s - inf} is 0: a sum that is infinite gives no gradient
            nothing = torch.full_like(log_negative, torch.inf)
            parts = [(dnegative, log_negative, nothing), (dpositive, nothing, log_positive)]
        found = [backward(d.contiguous(), *sums, scores, labels) for d, *sums in parts if d is not None]
        return (sum(found[1:], found[0]) if found else None), None

    def backward_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def backward_formula(ctx: Any, dscores_grad: Tensor) -> tuple[Tensor | None, ...]:
        dloss, *others = ctx.saved_tensors
        ddloss, dscores = double_backward(dloss, dscores_grad, *others)
        # log_negative and log_positive are functions of the scores: their part is in that of the scores.
        return ddloss, None, None, dscores, None

    def twice(
        dloss: Tensor, dscores_grad: Tensor, log_negative: Tensor, log_positive: Tensor, scores: Tensor, labels: Tensor
    ) -> list[Tensor]:
        dloss, wide = leaves(dloss, scores.to(dloss.dtype))
        pairs = zip(log_sums(wide, to_labels(scores, labels)), (log_negative, log_positive), strict=True)
        loss = sum(torch.where(given == torch.inf, 0, own) for own, given in pairs)
        (first,) = gradients((loss * dloss).sum(), [wide])
        ddloss, dscores = gradients((first * dscores_grad).sum(), [dloss, wide])
        return [ddloss, dscores.to(scores.dtype)]

    torch.library.register_autograd(f"fastnlp_ops::{name}", formula, setup_context=setup)
    torch.library.register_autograd(f"fastnlp_ops::{name}_backward", backward_formula, setup_context=backward_setup)
    register_through_reference(f"{name}_double_backward", twice)


_register("multilabel_categorical_crossentropy", lambda _, labels: labels)
_register("sparse_multilabel_categorical_crossentropy", indices_to_labels)
