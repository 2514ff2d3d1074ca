"""Fake kernels and autograd formulas of the multilabel ops. Schemas: csrc/ops.cpp. Kernels: csrc/cpu, _triton.

First derivatives are kernels; derivatives of derivatives, and in forward mode, go through the differentiable reference.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastnlp_ops._ops._autograd import differentiable, through_plain, vjp
from fastnlp_ops.reference.multilabel import compute_dtype, indices_to_labels, log_sums


def _register(name: str, to_labels: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """One of the two forms of the loss: what to call in its place. `to_labels` makes its labels dense."""

    @torch.library.register_fake(f"fastnlp_ops::{name}")
    def _(scores, labels):
        rows = scores.new_empty(scores.shape[0], dtype=compute_dtype(scores))
        return rows, torch.empty_like(rows)

    @torch.library.register_fake(f"fastnlp_ops::{name}_backward")
    def _(dloss, log_negative, log_positive, scores, labels):
        return scores.new_empty(scores.shape)

    def plain(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return log_sums(scores, to_labels(scores, labels))

    def plain_backward(
        dloss: Tensor, log_negative: Tensor, log_positive: Tensor, scores: Tensor, labels: Tensor
    ) -> Tensor:
        above = [torch.where(x == torch.inf, 0, dloss) for x in (log_negative, log_positive)]  # as in `formula`
        (dscores,) = vjp(lambda scores: plain(scores, labels), (scores,), above)
        return dscores

    # log_negative and log_positive are functions of the scores: their part is in that of the scores.
    backward = through_plain(f"{name}_backward", plain_backward, results=(1, 2))

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

    return differentiable(name, plain, setup, formula)


hard_or_soft = _register("multilabel_categorical_crossentropy", lambda _, labels: labels)
sparse = _register("sparse_multilabel_categorical_crossentropy", indices_to_labels)
