"""Parameters that are spread over processes (DTensor, FSDP2): which numbers of a step they exchange, and when."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnlp_ops._adafactor_call import Call, Split

# Phases of the op (csrc/adafactor.h).
_ROWS, _COLUMNS, _NORMS, _APPLY = 1, 2, 4, 8

Groups = tuple[Any, ...]  # of torch.distributed


def split_of(p: Any) -> Split | None:
    """How a DTensor is split; None where every process has it whole."""
    parts: dict[str, list[Any]] = {"rows": [], "cols": [], "lead": []}
    for dim, placement in enumerate(p.placements):
        if placement.is_partial():
            raise ValueError(f"params must be sharded or replicated, got {placement}")
        if not placement.is_replicate() and p.device_mesh.size(dim) > 1:
            where = placement.dim % p.dim() - p.dim()
            kind = "lead" if p.dim() < 2 or where < -2 else "rows" if where == -2 else "cols"
            parts[kind].append(p.device_mesh.get_group(dim))
    split = Split(*(tuple(groups) for groups in parts.values()))
    return split if split.all else None


def local(x: Any) -> Tensor:
    """The part of a DTensor that this process has; any other tensor itself."""
    if not hasattr(x, "placements"):
        return x
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    part = x.to_local()
    return part.wait() if isinstance(part, AsyncCollectiveTensor) else part


def _whole(x: Any) -> Tensor:
    return x.full_tensor() if hasattr(x, "placements") else x


def local_grad(p: Any, grad: Any) -> Tensor:
    """The part of the gradient that belongs to the local part of the parameter."""
    if hasattr(p, "placements") and getattr(grad, "placements", p.placements) != p.placements:
        grad = grad.redistribute(p.device_mesh, p.placements)
    return local(grad)


def geometry(p: Any) -> list[int]:
    """Numbers of elements, rows and columns of the whole; matrix, row and column at which the local part begins.

    Only stochastic rounding asks where a part begins. Of matrices that do not follow one another (where a leading
    dimension behind the first one is split) it takes the bits of others.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape = p.shape
    _, offset = compute_local_shape_and_global_offset(shape, p.device_mesh, p.placements)
    rows, cols = shape[-2] if p.dim() > 1 else 1, shape[-1] if p.dim() else 1
    first = [*offset[-2:]] if p.dim() > 1 else [0, *(offset or [0])]
    matrix = 0
    for size, begin in zip(shape[:-2], offset[:-2], strict=True):
        matrix = matrix * size + begin
    return [math.prod(shape), rows, cols, matrix, *first]


def _placements(p: Any, dims: dict[int, int]) -> list[Any]:
    """How a state tensor is split beside p; dims maps dimensions of p to those of the state."""
    from torch.distributed.tensor import Replicate, Shard

    wanted = [None if placement.is_replicate() else dims.get(placement.dim % p.dim()) for placement in p.placements]
    return [Replicate() if dim is None else Shard(dim) for dim in wanted]


def zeros_like_part(p: Any, shape: tuple[int, ...], dims: dict[int, int], dtype: torch.dtype) -> Tensor:
    """Zeros of a state tensor of this (whole) shape, split as p is."""
    if not hasattr(p, "placements"):
        return torch.zeros(shape, dtype=dtype, device=p.device)
    from torch.distributed.tensor import zeros

    return zeros(shape, dtype=dtype, device_mesh=p.device_mesh, placements=_placements(p, dims))


def placed_like_part(
    p: Any, shape: tuple[int, ...], dims: dict[int, int], dtype: torch.dtype, value: Any, name: str
) -> Tensor:
    """A state tensor that another has written as zeros_like_part has it; itself where it is so already."""
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name} of the state must have shape {shape}, got {got}")
    if value.layout != torch.strided or value.is_complex():
        raise ValueError(f"{name} of the state must be dense and real, got {value.layout} and {value.dtype}")
    value = (value.detach() if value.requires_grad else value).to(p.device, dtype)
    if not hasattr(p, "placements"):
        return _whole(value).contiguous()
    from torch.distributed.tensor import distribute_tensor

    placements = _placements(p, dims)
    if not hasattr(value, "placements"):  # a checkpoint of one process, which every process has read
        return distribute_tensor(value, p.device_mesh, placements, src_data_rank=None)
    if list(value.placements) != placements:
        value = value.redistribute(p.device_mesh, placements)
    return value.contiguous()


def number_on(device: torch.device, value: Any, name: str) -> Tensor:
    """A number of the state as float32 on the device, whoever has written it; itself where it is so already."""
    if isinstance(value, Tensor):
        value = _whole(value.detach() if value.requires_grad else value)
        if value.numel() == 1 and not value.is_complex():
            return (value.reshape(()) if value.dim() else value).to(device, torch.float32)
    elif hasattr(value, "__float__") and float(value) >= 0:
        return torch.full((), float(value), dtype=torch.float32, device=device)
    raise ValueError(f"{name} of the state must be a number of at least 0, got {value!r}")


def _room_for_sums(call: Call) -> tuple[Tensor, int]:
    """The op's argument `sums`, zeros, and where in it the row sums begin."""
    columns = rows = 0
    for p, group in zip(call.params, call.group_of, strict=True):
        if p.dim() > 1:
            batch = math.prod(p.shape[:-2])
            columns += batch * ((3 if call.option(group, "layer_adaptation") else 2) * p.shape[-1] + 2)
            rows += batch * p.shape[-2]
    begin = 1 + 3 * len(call.params) + columns
    dtype = torch.float64 if call.params[0].dtype == torch.float64 else torch.float32
    return torch.zeros(begin + rows, dtype=dtype, device=call.params[0].device), begin


Run = tuple[int, list[tuple[Tensor, Groups]]]  # phases, and what is added up over which groups after them


def _plan(call: Call, norm_before: int) -> list[Run]:
    """The phases of a call in as few runs as possible: a number is added up before the phase that reads it.

    norm_before: the phase that reads the norm of all gradients, of this call and of the others; 0 if none does.
    """
    split = call.split or Split((), (), ())
    call.sums, rows_at = _room_for_sums(call)
    scalars_end = 1 + 3 * len(call.params)
    scalars = call.sums[1:scalars_end].view(-1, 3)
    torch_mode = any(call.option(group, "torch_mode") for group in set(call.group_of))
    parts = {
        "norm": (call.sums[:1], split.all),
        "squares": (scalars[:, 0], split.all),
        "rows": (call.sums[rows_at:], split.cols),
        "columns": (call.sums[scalars_end:rows_at], split.rows),
        # From sums over whole columns every process gets those of its columns, in torch mode those of its elements.
        "update": (scalars[:, 1:], split.all if torch_mode else split.cols + split.lead),
    }
    runs: list[Run] = []
    phases, waiting = 0, dict[str, tuple[Tensor, Groups]]()
    for phase, reads, writes in (
        (_ROWS, (), ("norm", "squares", "rows")),
        (_COLUMNS, ("rows",), ("columns",)),
        (_NORMS, ("columns",), ("update",)),
        (_APPLY, ("squares", "update"), ()),
    ):
        if any(name in waiting for name in (*reads, *(["norm"] if phase == norm_before else []))):
            runs.append((phases, list(waiting.values())))
            phases, waiting = 0, {}
        phases |= phase
        waiting |= {name: parts[name] for name in writes if parts[name][1] or (name == "norm" and norm_before)}
    return [*runs, (phases, list(waiting.values()))]


def run_in_phases(calls: Sequence[Call]) -> None:
    """A step of calls that know each other's sums: one exchange for all where rows or leading dimensions are split.

    A second exchange where columns are split, in torch mode where rows are, and for max_grad_norm. All processes must
    have gradients for the same parameters.
    """
    clip, skip = calls[0].max_grad_norm is not None, calls[0].skip_nonfinite
    spread = any(call.split for call in calls)
    found = [call.found_inf for call in calls]
    if spread and found[0] is not None:
        # A process may have seen an infinity that others have not: the norm, which is infinite then, tells them.
        skip = True
        for call in calls:
            call.found_inf, call.skip_nonfinite = None, True
    norm_before = _COLUMNS if clip else _APPLY if skip else 0
    plans = [_plan(call, norm_before) for call in calls]
    for turn in range(max(map(len, plans))):
        exchanged = []
        for call, plan in zip(calls, plans, strict=True):
            if turn < len(plan):
                phases, parts = plan[turn]
                call.run(phases)
                exchanged += parts
        if turn == 0 and norm_before:
            norms = [call.sums[:1] for call in calls if call.sums is not None]
            for norm, infinite in zip(norms, found, strict=True):
                if spread and infinite is not None:
                    norm += torch.where(infinite.reshape(1) != 0, math.inf, 0.0)
            _add_up(exchanged)
            total = torch.stack([norm.to(norms[0].device, torch.float64) for norm in norms]).sum(0)
            for norm in norms:
                norm.copy_(total)
        else:
            _add_up(exchanged)


def _add_up(parts: Sequence[tuple[Tensor, Groups]]) -> None:
    """Sums over the processes of each part's groups, in place: one all-reduce for each group."""
    for group in dict.fromkeys(group for _, groups in parts for group in groups):
        mine = [tensor for tensor, groups in parts if group in groups]
        buffer = torch.cat([tensor.reshape(-1) for tensor in mine])
        torch.distributed.all_reduce(buffer, group=group)
        for tensor, summed in zip(mine, buffer.split([tensor.numel() for tensor in mine]), strict=True):
            tensor.copy_(summed.view(tensor.shape))
