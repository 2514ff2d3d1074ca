"""What the CRF and the MEMM layer share: checks of parameters, tags that are no tags, means, lists of paths."""

from typing import Any

import torch
from torch import Tensor, nn

from fastnlp_ops import _host
from fastnlp_ops._crf_inputs import check_mask, check_tags
from fastnlp_ops._ops._autograd import is_eager


def is_concrete(tensor: Tensor) -> bool:
    """Whether a tensor has values of its own: not one that a compiler, tracer, transform or memory estimator runs."""
    return (
        is_eager()
        and type(tensor) in (Tensor, nn.Parameter)
        and not tensor.is_meta
        and torch._C._len_torch_dispatch_stack() == 0
    )


def check_parameters(module: nn.Module) -> bool:
    """Raises where a parameter is NaN; False where that cannot be seen yet. Waits for the device."""
    for name, parameter in module.named_parameters():
        if not is_concrete(parameter) or (parameter.is_cuda and torch.cuda.is_current_stream_capturing()):
            return False
        if bool(parameter.isnan().any()):
            raise ValueError(
                f"{name} of {type(module).__name__} must be initialised, got NaN: call reset_parameters(), in a "
                "transformers model from _init_weights(module), or load a checkpoint from before training diverged"
            )
    return True


def check_ignore_index(ignore_index: Any) -> None:
    if ignore_index is not None and type(ignore_index) is not int:
        raise TypeError(f"ignore_index must be an int or None, got {ignore_index!r}")


def steps_with_tags(emissions: Tensor, tags: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:
    """The steps that the mask lets through and whose tag is not `ignore_index`."""
    if not torch.jit.is_scripting():
        check_tags(tags, emissions)
        if mask is not None:
            check_mask(mask, emissions)
    on = tags != ignore_index
    return on if mask is None else on & (mask != 0)


def mean_over_steps(total: Tensor, tags: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of no steps is 0."""
    if mask is None:
        return total / max(tags.numel(), 1)
    return total / (mask if mask.dtype == torch.bool else mask != 0).sum().clamp(min=1)


def tag_lists(paths: Tensor) -> list[list[int]]:
    """Every path as a list, without its -1."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing() or type(paths) is not Tensor:
        raise RuntimeError("decode returns Python lists, which no graph holds: export or trace viterbi instead")
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("decode returns Python lists, which torch.func has no place for: call viterbi instead")
    return _host.paths_to_lists(paths.cpu().numpy())
