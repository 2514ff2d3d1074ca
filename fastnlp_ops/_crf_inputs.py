"""Argument checks of the CRF functions, and the form in which the ops take the arguments."""

import torch
from torch import Tensor

from fastnlp_ops._ops.crf import EagerLogLikelihood


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
    for name, boundary in (("start_transitions", start_transitions), ("end_transitions", end_transitions)):
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
        _check_like_steps("mask", mask, emissions)
        if mask.is_complex():
            raise TypeError(f"mask must be bool, integer or floating point, got {mask.dtype}")
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"cu_seqlens must be [B + 1], got {shape_of(cu_seqlens)}")
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
        if cu_seqlens.device != emissions.device:
            raise ValueError(
                f"cu_seqlens must be on the device of emissions, {emissions.device}, got {cu_seqlens.device}"
            )


def _check_like_steps(name: str, tensor: Tensor, emissions: Tensor) -> None:
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
    if double:
        emissions = emissions.to(torch.float64)
    dtype = torch.float64 if double else torch.float32
    if emissions.stride(-1) != 1:
        emissions = emissions.contiguous()
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


def needs_grad(emissions: Tensor, transitions: Tensor, start: Tensor | None, end: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    needs = emissions.requires_grad or transitions.requires_grad
    if start is not None:
        needs = needs or start.requires_grad
    if end is not None:
        needs = needs or end.requires_grad
    return needs


# The two calls of the module, with positional arguments only: TorchScript knows no others with defaults.
def log_likelihood(
    emissions: Tensor,
    tags: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None,
    end_transitions: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    e, t, start, end, mask, cu_seqlens = kernel_inputs(
        emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens
    )
    if not torch.jit.is_scripting():
        check_tags(tags, emissions)
    tags = tags.to(torch.int64).contiguous()
    save = needs_grad(e, t, start, end)
    if not torch.jit.is_scripting():
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if save and not traced:
            return EagerLogLikelihood.apply(e, tags, t, start, end, mask, cu_seqlens)
    value, _ = torch.ops.fastnlp_ops.crf_log_likelihood(e, tags, t, start, end, mask, cu_seqlens, save)
    return value


def viterbi(
    emissions: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None,
    end_transitions: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    n_best: int,
) -> tuple[Tensor, Tensor]:
    if n_best < 1:
        raise ValueError(f"n_best must be at least 1, got {n_best}")
    e, t, start, end, mask, cu_seqlens = kernel_inputs(
        emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens
    )
    if n_best == 1:
        paths, scores = torch.ops.fastnlp_ops.crf_viterbi(e, t, start, end, mask, cu_seqlens)
    else:
        paths, scores = torch.ops.fastnlp_ops.crf_viterbi_n_best(e, t, start, end, mask, cu_seqlens, n_best)
    return paths, scores
