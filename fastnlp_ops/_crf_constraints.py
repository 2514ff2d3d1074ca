"""What a tag scheme forbids, for the CRF layer: as tensors on any device, and as a check of gold tags.

A layer keeps its labels and no masks: loaders fill parameters and buffers from a checkpoint that has no masks, or with
uninitialised memory.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fastnlp_ops._crf_inputs import shape_of
from fastnlp_ops.tag_schemes import transition_mask

Forbidden = tuple[Tensor, Tensor, Tensor]  # bool: transitions [N, N], starts [N], ends [N]

_MADE: dict[tuple[tuple[str, ...], str, torch.device], Forbidden] = {}


def forbidden_by(labels: tuple[str, ...], scheme: str, device: torch.device) -> Forbidden:
    """What the scheme forbids, as tensors on the device; made once for each."""
    if torch._C._len_torch_dispatch_stack() > 0:  # fake tensors and export want their own
        return _make(labels, scheme, device)
    key = (labels, scheme, device)
    made = _MADE.get(key)
    if made is None:
        # In a thread of its own nothing is traced or transformed, and inference mode is off.
        with ThreadPoolExecutor(1) as pool:
            made = _MADE[key] = pool.submit(_make, *key).result()
    return made


# As torch.compiler.assume_constant_result does, which would import Dynamo. The arguments are guarded.
forbidden_by._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _make(labels: tuple[str, ...], scheme: str, device: torch.device) -> Forbidden:
    allowed, starts, ends = transition_mask(labels, scheme)
    return (~allowed).to(device), (~starts).to(device), (~ends).to(device)


def check_paths(
    tags: Tensor,
    mask: Tensor | None,
    ignore_index: int | None,
    batch_first: bool,
    num_tags: int,
    labels: tuple[str, ...] | None,
    scheme: str,
) -> None:
    """Raises for the first tag that is out of range or forbidden. Reads values."""
    if tags.dim() != 2:
        raise ValueError(f"tags must be {'[B, T]' if batch_first else '[T, B]'}, got {shape_of(tags)}")
    if tags.is_floating_point() or tags.is_complex() or tags.dtype == torch.bool:
        raise TypeError(f"tags must be integers, got {tags.dtype}")
    if mask is not None and mask.shape != tags.shape:
        raise ValueError(f"mask must have the shape of tags, got {tuple(mask.shape)} and {tuple(tags.shape)}")
    tags = tags.detach().to("cpu", torch.int64)
    on = torch.ones_like(tags, dtype=torch.bool) if mask is None else (mask != 0).cpu()
    if ignore_index is not None:
        on &= tags != ignore_index
    if not batch_first:
        tags, on = tags.t(), on.t()
    sequence, step = on.nonzero(as_tuple=True)
    tags = tags[sequence, step]
    outside = ((tags < 0) | (tags >= num_tags)).nonzero()
    if len(outside) > 0:
        at = int(outside[0])
        message = f"tags must be in [0, {num_tags}), got tag {int(tags[at])}"
    else:
        fault = None if labels is None else _first_fault(tags, sequence, labels, scheme)
        if fault is None:
            return
        at, got = fault
        message = f"tags must follow scheme {scheme}, got {got}"
    raise ValueError(f"{message} at sequence {int(sequence[at])}, step {int(step[at])}")


def _first_fault(tags: Tensor, sequence: Tensor, labels: tuple[str, ...], scheme: str) -> tuple[int, str] | None:
    """Index of the first of the valid steps, [M] in order, that the scheme forbids, and what is there."""
    transitions, starts, ends = forbidden_by(labels, scheme, tags.device)
    edge = sequence.new_tensor([-1])
    first, last = sequence.diff(prepend=edge) != 0, sequence.diff(append=edge) != 0
    before = tags.roll(1)
    bad_start, bad_step = first & starts[tags], ~first & transitions[before, tags]
    bad = (bad_start | bad_step | (last & ends[tags])).nonzero()
    if len(bad) == 0:
        return None
    at = int(bad[0])
    if bad_start[at]:
        place = "as the first tag"
    elif bad_step[at]:
        place = f"after {labels[int(before[at])]}"
    else:
        place = "as the last tag"
    return at, f"{labels[int(tags[at])]} {place}"
