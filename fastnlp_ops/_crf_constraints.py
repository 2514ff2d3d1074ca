"""What a tag scheme forbids, for the CRF layer: as tensors on any device, and as a check of gold tags."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fastnlp_ops._crf_inputs import shape_of
from fastnlp_ops.tag_schemes import _label_of_each_tag as label_of_each_tag
from fastnlp_ops.tag_schemes import transition_mask

Forbidden = tuple[Tensor, Tensor, Tensor]  # bool: transitions [N, N], starts [N], ends [N]


class Constraints:
    """The constraints of labels in a scheme. Labels and scheme are all that is copied or saved.

    A layer holds one of these and no buffers: loaders fill parameters and buffers, from a checkpoint that has no masks
    or with uninitialised memory.
    """

    def __init__(self, labels: Any, scheme: str) -> None:
        self.labels = label_of_each_tag(labels)
        self.scheme = scheme
        transition_mask(self.labels, scheme)  # raises what it has to say of them
        self._tables: dict[torch.device, Forbidden] = {}

    def __deepcopy__(self, memo: Any) -> "Constraints":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Constraints, (self.labels, self.scheme)

    def on(self, device: torch.device) -> Forbidden:
        """What is forbidden, as tensors on the device; made once for each."""
        if torch._C._len_torch_dispatch_stack() > 0:  # fake tensors, export: theirs alone
            return self._make(device)
        table = self._tables.get(device)
        if table is None:
            # In a thread of its own nothing is traced or transformed, and inference mode is off.
            with ThreadPoolExecutor(1) as pool:
                table = self._tables[device] = pool.submit(self._make, device).result()
        return table

    on._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result imports Dynamo

    def _make(self, device: torch.device) -> Forbidden:
        allowed, starts, ends = transition_mask(self.labels, self.scheme)
        return (~allowed).to(device), (~starts).to(device), (~ends).to(device)

    def first_fault(self, tags: Tensor, sequence: Tensor) -> tuple[int, str] | None:
        """Where the scheme forbids a step, and what is there. Both [M] on the CPU, in order, tags in [0, N)."""
        transitions, starts, ends = self.on(torch.device("cpu"))
        edge = sequence.new_tensor([-1])
        first, last = sequence.diff(prepend=edge) != 0, sequence.diff(append=edge) != 0
        before = tags.roll(1)
        bad_start, bad_step = first & starts[tags], ~first & transitions[before, tags]
        bad = (bad_start | bad_step | (last & ends[tags])).nonzero()
        if len(bad) == 0:
            return None
        at = int(bad[0])
        if bad_start[at]:
            place = " as the first tag"
        elif bad_step[at]:
            place = f" after {self.labels[int(before[at])]}"
        else:
            place = " as the last tag"
        return at, self.labels[int(tags[at])] + place


def check_paths(
    tags: Tensor,
    mask: Tensor | None,
    ignore_index: int | None,
    batch_first: bool,
    num_tags: int,
    constraints: Constraints | None,
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
        fault = None if constraints is None else constraints.first_fault(tags, sequence)
        if fault is None or constraints is None:
            return
        at, got = fault
        message = f"tags must follow scheme {constraints.scheme}, got {got}"
    raise ValueError(f"{message} at sequence {int(sequence[at])}, step {int(step[at])}")
