"""Argument checks of the GlobalPointer functions, and the form in which the ops take the arguments."""

import functools
from typing import Any

import torch
from torch import Tensor

from fastnlp_ops._layout import check_dense

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def shape_of(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def _check_projection(name: str, x: Tensor, rope: bool) -> None:
    check_dense(name, x)
    if x.dim() != 4:
        raise ValueError(f"{name} must be [B, n, H, d], got {shape_of(x)}")
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{name} must have at least one head and one channel, got {shape_of(x)}")
    if rope and x.shape[3] % 2:
        raise ValueError(f"{name} must have an even head size where rope is on, got {shape_of(x)}")
    _check_dtype(name, x)


def _check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {x.dtype}")


def _check_like(name: str, x: Tensor, axes: str, shape: tuple[int, ...], like: str, q: Tensor) -> None:
    check_dense(name, x)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must be {axes} = {shape}, got {shape_of(x)}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of {like}, {q.device}, got {x.device}")


def check_scoring(
    q: Tensor, k: Tensor, start_bias: Tensor | None, end_bias: Tensor | None, rope: bool, names: tuple[str, ...]
) -> None:
    """Raises what the functions promise of projections and biases, under the names they have there."""
    q_name, k_name, start_name, end_name = names
    _check_projection(q_name, q, rope)
    _check_like(k_name, k, "[B, n, H, d]", tuple(q.shape), q_name, q)
    _check_dtype(k_name, k)
    if (start_bias is None) != (end_bias is None):
        raise ValueError(f"{start_name} and {end_name} must be given together")
    if start_bias is None or end_bias is None:
        return
    B, n, heads, _ = q.shape
    if heads == 1 and start_bias.dim() == 3 and start_bias.shape[2] > 0:
        heads = start_bias.shape[2]
    for name, bias in ((start_name, start_bias), (end_name, end_bias)):
        _check_like(name, bias, "[B, n, H]", (B, n, heads), q_name, q)
        _check_dtype(name, bias)


def check_cells(
    q: Tensor, q_name: str, position_ids: Tensor | None, mask: Tensor | None, max_span_length: int | None
) -> None:
    """Raises what the functions promise of the options that say which cells take part."""
    tokens = tuple(q.shape[:2])
    if position_ids is not None:
        _check_like("position_ids", position_ids, "[B, n]", tokens, q_name, q)
        check_integers("position_ids", position_ids)
    if mask is not None:
        _check_like("mask", mask, "[B, n]", tokens, q_name, q)
        if mask.is_complex():
            raise TypeError(f"mask must be bool, integer or floating point, got {mask.dtype}")
    if max_span_length is not None and max_span_length < 1:
        raise ValueError(f"max_span_length must be at least 1, got {max_span_length}")


def check_integers(name: str, x: Tensor) -> None:
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {x.dtype}")


def heads_of(q: Tensor, start_bias: Tensor | None) -> int:
    """H: q has one head that all share where the biases have more."""
    return q.shape[2] if start_bias is None else start_bias.shape[2]


def alike(*tensors: Tensor | None) -> list[Any]:
    """The tensors in the widest of their dtypes, with adjacent channels."""
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in tensors if x is not None])
    return [None if x is None else _adjacent(x.to(dtype)) for x in tensors]


def _adjacent(x: Tensor) -> Tensor:
    # Biases are small; projections are views into the output of a linear layer, whose channels are adjacent.
    return x if x.dim() == 4 and x.stride(-1) == 1 else x.contiguous()


def cell_options(
    position_ids: Tensor | None,
    mask: Tensor | None,
    rope: bool,
    tril_mask: bool,
    max_span_length: int | None,
    scale: float | None,
    head_size: int,
) -> tuple[Tensor | None, Tensor | None, bool, bool, int, float]:
    """The options behind the biases, in the order of the schemas."""
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask != 0).contiguous()
    position_ids = position_ids.to(torch.int64).contiguous() if rope and position_ids is not None else None
    longest = -1 if max_span_length is None else max_span_length
    return mask, position_ids, rope, tril_mask, longest, head_size**-0.5 if scale is None else scale


def kernel_inputs(
    q: Tensor,
    k: Tensor,
    start_bias: Tensor | None,
    end_bias: Tensor | None,
    rope: bool,
    position_ids: Tensor | None,
    mask: Tensor | None,
    tril_mask: bool,
    max_span_length: int | None,
    scale: float | None,
) -> tuple[Any, ...]:
    """The arguments from q to scale as the ops take them, checked."""
    check_scoring(q, k, start_bias, end_bias, rope, ("q", "k", "start_bias", "end_bias"))
    check_cells(q, "q", position_ids, mask, max_span_length)
    options = cell_options(position_ids, mask, rope, tril_mask, max_span_length, scale, q.shape[3])
    return *alike(q, k, start_bias, end_bias), *options


def check_labels(labels: Tensor, q: Tensor, heads: int) -> None:
    check_dense("labels", labels)
    B = q.shape[0]
    padded = labels.dim() == 4 and (*labels.shape[:2], labels.shape[3]) == (B, heads, 2)
    if not padded and (labels.dim() != 2 or labels.shape[1] != 4):
        raise ValueError(f"labels must be [B, H, P, 2] = ({B}, {heads}, P, 2) or [M, 4], got {shape_of(labels)}")
    check_integers("labels", labels)
    if labels.device != q.device:
        raise ValueError(f"labels must be on the device of q, {q.device}, got {labels.device}")


def labels_to_cells(
    labels: Tensor,
    mask: Tensor | None,
    batch: int,
    heads: int,
    length: int,
    tril_mask: bool,
    max_span_length: int,
    mask_zero: bool,
) -> Tensor:
    """`label_cells`, checked. The kernel of an op, so that it may read values on a CPU where torch.compile traces."""
    cells, rows, wrong = label_cells(labels, mask, batch, heads, length, tril_mask, max_span_length, mask_zero)
    if labels.device.type == "cpu" and wrong.any():
        sizes, found = (batch, heads, length, length), tuple(rows[wrong][0].tolist())
        raise ValueError(f"labels must be (b, h, start, end) below {sizes}, or -1 or -100 for none, got {found}")
    return cells


def label_cells(
    labels: Tensor,
    mask: Tensor | None,
    batch: int,
    heads: int,
    length: int,
    tril_mask: bool,
    max_span_length: int,
    mask_zero: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels [B, H, P, 2] or [M, 4] -> `cells`, int64 [P'] sorted: ((b * H + h) * n + start) * n + end.

    A label that is padding, or no valid cell, becomes B * H * n * n, behind all cells. With mask_zero the cell (0, 0)
    of every row belongs to neither sum: -1 - cell says so, before all cells. Beside the cells stand the labels as rows
    [P', 4], and which of them are neither padding nor cells of the batch.
    """
    if labels.dim() == 4:
        row = torch.arange(batch * heads, device=labels.device)[:, None].expand(-1, labels.shape[2]).reshape(-1)
        rows = torch.cat([torch.stack([row // heads, row % heads], 1), labels.reshape(-1, 2).to(torch.int64)], 1)
    else:
        rows = labels.to(torch.int64)
    sequence, head, start, end = rows.unbind(1)
    spans = rows[:, 2:]
    padding = ((rows == -1) | (rows == -100)).any(1)
    outside = (spans >= length).any(1) | (rows < 0).any(1) | (sequence >= batch) | (head >= heads)
    if mask_zero:
        padding = padding | ((start == 0) & (end == 0))
    valid = ~(padding | outside)
    if tril_mask:
        valid = valid & (end >= start)
    if max_span_length > 0:
        valid = valid & ((end - start).abs() < max_span_length)
    if mask is not None and mask.numel():
        valid = valid & mask[sequence.clamp(0, batch - 1)[:, None], spans.clamp(0, length - 1)].all(1)
    cell = ((sequence * heads + head) * length + start) * length + end
    cells = torch.where(valid, cell, batch * heads * length * length)
    if mask_zero:
        cells = torch.cat([cells, -1 - torch.arange(batch * heads, device=cells.device) * (length * length)])
    return cells.sort().values, rows, outside & ~padding
