"""Argument checks of the CRF functions, and the form in which the ops take the arguments."""

from typing import Any

import torch
from torch import Tensor

from fastnlp_ops._layout import check_dense
from fastnlp_ops._ops import crf as ops
from fastnlp_ops._ops._autograd import is_eager


def shape_of(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def _check(
    emissions: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None,
    end_transitions: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raises what every function of this file promises to raise. Reads shapes and dtypes, never values."""
    packed = cu_seqlens is not None
    check_dense("emissions", emissions)
    check_dense("transitions", transitions)
    boundaries = (("start_transitions", start_transitions), ("end_transitions", end_transitions))
    for name, tensor in (*boundaries, ("mask", mask), ("cu_seqlens", cu_seqlens)):
        if tensor is not None:
            check_dense(name, tensor)
    if emissions.dim() != (2 if packed else 3):
        raise ValueError(f"emissions must be {'[total, N]' if packed else '[B, T, N]'}, got {shape_of(emissions)}")
    if emissions.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise TypeError(f"emissions must be float32, float64, float16 or bfloat16, got {emissions.dtype}")
    N = emissions.shape[-1]
    if N == 0:
        raise ValueError(f"emissions must have at least one tag, got {shape_of(emissions)}")
    square = transitions.shape[-2:] == (N, N)
    if transitions.dim() == 4 and not packed:
        edges = max(emissions.shape[1] - 1, 0)
        square = square and transitions.shape[:2] == (emissions.shape[0], edges)
    else:
        square = square and transitions.dim() == 2
    if not square:
        kinds = "[N, N]" if packed else "[N, N] or [B, T-1, N, N]"
        raise ValueError(f"transitions must be {kinds} with N = {N}, got {shape_of(transitions)}")
    scores = [("transitions", transitions)]
    for name, boundary in boundaries:
        if boundary is not None:
            if boundary.shape != (N,):
                raise ValueError(f"{name} must be [N] with N = {N}, got {shape_of(boundary)}")
            scores.append((name, boundary))
    for name, score in scores:
        if not score.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {score.dtype}")
        if score.device != emissions.device:
            raise ValueError(f"{name} must be on the device of emissions, {emissions.device}, got {score.device}")
    if mask is not None:
        if packed:
            raise ValueError("mask must be None where cu_seqlens is given")
        check_mask(mask, emissions)
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"cu_seqlens must be [B + 1], got {shape_of(cu_seqlens)}")
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
        if cu_seqlens.device != emissions.device:
            raise ValueError(
                f"cu_seqlens must be on the device of emissions, {emissions.device}, got {cu_seqlens.device}"
            )


def check_mask(mask: Tensor, emissions: Tensor) -> None:
    _check_like_steps("mask", mask, emissions)
    if mask.is_complex():
        raise TypeError(f"mask must be bool, integer or floating point, got {mask.dtype}")


def _check_like_steps(name: str, tensor: Tensor, emissions: Tensor) -> None:
    check_dense(name, tensor)
    if tensor.shape != emissions.shape[:-1]:
        steps = "[total]" if emissions.dim() == 2 else "[B, T]"
        raise ValueError(f"{name} must be {steps} = {tuple(emissions.shape[:-1])}, got {shape_of(tensor)}")
    if tensor.device != emissions.device:
        raise ValueError(f"{name} must be on the device of emissions, {emissions.device}, got {tensor.device}")


def check_tags(tags: Tensor, emissions: Tensor) -> None:
    _check_like_steps("tags", tags, emissions)
    if tags.is_floating_point() or tags.is_complex() or tags.dtype == torch.bool:
        raise TypeError(f"tags must be integers, got {tags.dtype}")


def kernel_inputs(
    emissions: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None,
    end_transitions: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The arguments as the ops want them: one compute dtype for the scores, adjacent tags, a bool mask."""
    if not torch.jit.is_scripting():
        _check(emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens)
    double = emissions.dtype == torch.float64 or transitions.dtype == torch.float64
    if start_transitions is not None:
        double = double or start_transitions.dtype == torch.float64
    if end_transitions is not None:
        double = double or end_transitions.dtype == torch.float64
    if double:
        emissions = emissions.to(torch.float64)
    dtype = torch.float64 if double else torch.float32
    if emissions.stride(-1) != 1:  # contiguous() would return an empty tensor as it is
        emissions = emissions.clone(memory_format=torch.contiguous_format)
    transitions = transitions.to(dtype)
    if start_transitions is not None:
        start_transitions = start_transitions.to(dtype).contiguous()
    if end_transitions is not None:
        end_transitions = end_transitions.to(dtype).contiguous()
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask != 0).contiguous()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
    return emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens


def _is_taken(
    emissions: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None,
    end_transitions: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> bool:
    """Whether `kernel_inputs` has nothing to convert. Shapes the ops check themselves."""
    score = torch.float64 if emissions.dtype is torch.float64 else torch.float32
    device = emissions.device
    try:
        return (
            emissions.stride(-1) == 1
            and transitions.dtype is score
            and transitions.device == device
            and (start_transitions is None or _is_dense(start_transitions, score, device))
            and (end_transitions is None or _is_dense(end_transitions, score, device))
            and (mask is None or _is_dense(mask, torch.bool, device))
            and (cu_seqlens is None or _is_dense(cu_seqlens, torch.int64, device))
        )
    except (IndexError, RuntimeError):  # no dimensions, no strides
        return False


def _is_dense(x: Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    return x.dtype is dtype and x.device == device and x.layout is torch.strided and x.is_contiguous()


def needs_grad(emissions: Tensor, transitions: Tensor, start: Tensor | None, end: Tensor | None) -> bool:
    # A trace is made with gradients and checked without: both must be the same graph.
    if not torch.jit.is_scripting() and torch.jit.is_tracing():
        return True
    if not torch.is_grad_enabled():
        return False
    needs = emissions.requires_grad or transitions.requires_grad
    if start is not None:
        needs = needs or start.requires_grad
    if end is not None:
        needs = needs or end.requires_grad
    return needs


# The two calls of the module, with positional arguments only: TorchScript knows no others with defaults. Arguments that
# the op takes as they are are not checked twice: in a training loop, where none of this is in the processor's caches,
# the checks above cost as much as a small kernel. Where the op refuses, they say it in their words.
def log_likelihood(
    emissions: Tensor,
    tags: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None,
    end_transitions: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    summed: bool,
    check_start: bool,
) -> Tensor:
    """[B], or their sum; `check_start` raises on CPU where the first step of a sequence is masked."""
    if not torch.jit.is_scripting():
        return _log_likelihood(
            (emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens), tags, summed, check_start
        )
    e, t, start, end, mask, cu_seqlens = kernel_inputs(
        emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens
    )
    tags = tags.to(torch.int64).contiguous()
    save = needs_grad(e, t, start, end)
    value, _ = torch.ops.fastnlp_ops.crf_log_likelihood(e, tags, t, start, end, mask, cu_seqlens, save, check_start)
    return value.sum() if summed else value


def _log_likelihood(given: Any, tags: Tensor, summed: bool, check_start: bool) -> Tensor:
    emissions, *others = given
    taken = _is_taken(*given) and _is_dense(tags, torch.int64, emissions.device)
    if not taken:
        emissions, *others = kernel_inputs(*given)
        check_tags(tags, emissions)
        tags = tags.to(torch.int64).contiguous()
    save = needs_grad(emissions, *others[:3])
    try:
        if save and is_eager():
            return ops.EagerLogLikelihood.apply(summed, check_start, emissions, tags, *others)
        value, _ = ops.log_likelihood(emissions, tags, *others, save, check_start)
    except (ValueError, RuntimeError):
        if taken:
            _check(*given)
            check_tags(tags, emissions)
        raise
    return value.sum() if summed else value


def viterbi(
    emissions: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None,
    end_transitions: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    n_best: int,
    check_start: bool,
) -> tuple[Tensor, Tensor]:
    if n_best < 1:
        raise ValueError(f"n_best must be at least 1, got {n_best}")
    if not torch.jit.is_scripting():
        given = (emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens)
        return _viterbi(given, n_best, check_start)
    e, t, start, end, mask, cu_seqlens = kernel_inputs(
        emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens
    )
    return torch.ops.fastnlp_ops.crf_viterbi(e, t, start, end, mask, cu_seqlens, check_start)


def _viterbi(given: Any, n_best: int, check_start: bool) -> tuple[Tensor, Tensor]:
    taken = _is_taken(*given)
    arguments = given if taken else kernel_inputs(*given)
    try:
        if n_best == 1:
            return ops.viterbi(*arguments, check_start)
        return ops.viterbi_n_best(*arguments, n_best)
    except (ValueError, RuntimeError):
        if taken:
            _check(*given)
        raise
