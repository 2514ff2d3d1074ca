"""Ops of torch that our functions use and the ONNX exporter has no form for."""

import torch
from torch import Tensor

from fastnlp_ops.export._scan import scan


def sort(x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """A stable sort from two that need not be: the second puts the indices of equal entries in order."""
    values, indices = torch.ops.aten.sort.default(x, dim, descending)
    part = torch.ops.aten.slice.Tensor
    before = torch.cat([part(values, dim, 0, 1), part(values, dim, 0, -1)], dim)
    group = (values != before).to(torch.int64).cumsum(dim)
    order = torch.ops.aten.sort.default(group * x.shape[dim] + indices, dim)[1]
    return values, indices.gather(dim, order)


def searchsorted(sorted_sequence: Tensor, values: Tensor, *, right: bool = False, **others: object) -> Tensor:
    """Of vectors: how many entries are below each value, or with `right` not above it."""
    if any(others.values()) or sorted_sequence.dim() != 1 or values.dim() != 1:
        return NotImplemented
    before = sorted_sequence <= values[:, None] if right else sorted_sequence < values[:, None]
    return before.sum(1)


def _running(greater: bool, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The largest (smallest) entry so far and where it is; of equals the last."""
    xs = x.movedim(dim, 0)
    index = torch.arange(xs.shape[0], device=x.device)

    def step(best: Tensor, place: Tensor, own: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        better = (own >= best if greater else own <= best) | (own != own)
        best, place = torch.where(better, own, best), torch.where(better, index, place)
        return best, place, best.clone(), place.clone()

    first = [xs[0].clone(), torch.zeros_like(xs[0], dtype=torch.int64)]
    _, _, values, places = scan(step, first, [xs, index])
    return values.movedim(0, dim), places.movedim(0, dim)


def cummax(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return _running(True, x, dim)


def cummin(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return _running(False, x, dim)
