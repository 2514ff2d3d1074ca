"""Linear attention of a sequence that is split over processes: they exchange states, whose size no length changes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastnlp_ops._linear_attention_inputs import kernel_inputs
from fastnlp_ops._ops.linear_attention import run
from fastnlp_ops.linear_attention_state import LinearAttentionState
from fastnlp_ops.reference.linear_attention import EXPONENTIAL

_STATE = slice(7, 10)  # of the arguments of op linear_attention: kv, key_sum, key_max
_Parts = Sequence[Any]  # kv, key_sum, key_max or None, log of the decay or None


def linear_attention_context_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    feature_map: str | None = "elu+1",
    causal: bool = False,
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    log_decay: Tensor | None = None,
) -> Tensor:
    """:func:`linear_attention` of sequences whose tokens are split over processes, in the order of ranks.

    S_r = sum of phi(k_j) v_j^T over the tokens of rank r,  out_t = phi(q_t)^T (sum_r S_r),  causal: ranks before t's

    Every process calls it with its own tokens and gets their outputs. Forward is one all-gather of the states, Dk Dv +
    Dk numbers for each sequence and head, and backward one of their gradients, whatever the number of tokens.

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> q, k, v = torch.randn(3, 2, 6, 4, 8)  # T = 6, of which rank 0 holds the first 4 tokens and rank 1 two
        >>> _, state = fastnlp_ops.linear_attention(q[:, :4], k[:, :4], v[:, :4], causal=True, return_state=True)
        >>> late = fastnlp_ops.linear_attention(q[:, 4:], k[:, 4:], v[:, 4:], causal=True, initial_state=state)
        >>> torch.allclose(late, fastnlp_ops.linear_attention(q, k, v, causal=True)[:, 4:], atol=1e-5)
        True

    Args:
        q (Tensor[B, Tq, H, Dk]): queries of this process. Ranks may hold different numbers of tokens, none included;
            everything but that number, options included, is the same on all ranks.
        k (Tensor[B, Tk, Hkv, Dk]): keys of this process.
        v (Tensor[B, Tk, Hkv, Dv]): values of this process.
        group (ProcessGroup): of ``torch.distributed``; None: all processes.
        feature_map, causal, normalize, scale, eps: as in :func:`linear_attention`.
        key_padding_mask (Tensor[B, Tk]): bool, True for keys of this process that count.
        log_decay (Tensor[Hkv] or Tensor[B, T, Hkv]): as in :func:`linear_attention`, for the tokens of this process. Of
            a parameter [Hkv] each process gets the gradient of its own tokens, as of any other parameter.

    Returns:
        Tensor[B, Tq, H, Dv] in the dtype of the inputs: the outputs of this process' queries.

    Raises:
        ValueError: as :func:`linear_attention`; where no process group is initialised.
        TypeError: as :func:`linear_attention`.
        RuntimeError: for gradients of gradients.

    Preconditions:
        All processes of the group call it, forward and backward, in the same order.

    Precision:
        As :func:`linear_attention`. States travel as float32 (float64 for float64 inputs) and are added in the order of
        ranks: deterministic, and the same bits on all ranks where bidirectional.

    References:
        Sun et al., "LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid" (2025), arXiv
        2502.07563. Katharopoulos et al., arXiv 2006.16236.
    """
    if not dist.is_initialized():
        raise ValueError("group must be a process group: call torch.distributed.init_process_group first")
    layout = (key_padding_mask, None, None, log_decay, None)
    inputs, factor = kernel_inputs(q, k, v, feature_map, causal, normalize, scale, eps, *layout)
    q, k, v, *_ = inputs
    _, _, kv, key_sum, key_max = run(q[:, :0], *inputs[1:])
    decay = _total_decay(log_decay, k, key_padding_mask)
    state = _Exchange.apply(kv, key_sum, key_max if feature_map in EXPONENTIAL else None, decay, causal, group)
    if not causal:  # the keys of this process are in the sum of all
        inputs = (q, k[:, :0], v[:, :0], None, *inputs[4:])
    out, *_ = run(*inputs[: _STATE.start], *state, *inputs[_STATE.stop :])
    return out if factor == 1 else out * factor


def _total_decay(log_decay: Tensor | None, k: Tensor, mask: Tensor | None) -> Tensor | None:
    """Log of what all tokens of this process leave of what was before them [B, Hkv]."""
    if log_decay is None:
        return None
    each = log_decay.expand(k.shape[:3])
    return (each if mask is None else torch.where(mask[..., None], each, 0)).sum(1)


class _Exchange(torch.autograd.Function):
    """The state of this process in, that of the ranks before it (causal) or of all ranks out."""

    @staticmethod
    def forward(
        ctx: Any,
        kv: Tensor,
        key_sum: Tensor,
        key_max: Tensor | None,
        decay: Tensor | None,
        causal: bool,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor | None, ...]:
        ranks = _all_gather((kv, key_sum, key_max, decay), group)
        state = _combine(ranks, causal)[dist.get_rank(group) if causal else 0]
        ctx.causal, ctx.group = causal, group
        ctx.save_for_backward(*(x for rank in ranks for x in rank))
        if state.key_max is not None:
            ctx.mark_non_differentiable(state.key_max)
        return tuple(state)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dkv: Tensor, dkey_sum: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        # Every rank has all states, and now the gradients that all ranks have for what they made of them: it repeats
        # what they did, and differentiates all of it by its own state.
        gradients = _all_gather((dkv, dkey_sum, None, None), ctx.group)
        saved = ctx.saved_tensors
        ranks = [saved[i : i + 4] for i in range(0, len(saved), 4)]
        own = dist.get_rank(ctx.group)
        with torch.enable_grad():
            kv, key_sum, key_max, decay = (None if x is None else x.detach() for x in ranks[own])
            leaves = [x.requires_grad_() for x in (kv, key_sum, decay) if x is not None]
            ranks[own] = (kv, key_sum, key_max, decay)
            states = _combine(ranks, ctx.causal)
        if not ctx.causal:  # one sum, which all ranks have
            gradients = [tuple(torch.stack(parts).sum(0) for parts in zip(*(g[:2] for g in gradients), strict=True))]
        outputs = [x for state in states for x in state[:2]]
        upstream = [x for gradient in gradients for x in gradient[:2]]
        # Of a causal sequence the last rank's own state is in none of the outputs.
        used = [(y, g) for y, g in zip(outputs, upstream, strict=True) if y.requires_grad]
        found = iter([torch.zeros_like(x) for x in leaves])
        if used:
            ys, gs = zip(*used, strict=True)
            found = iter(torch.autograd.grad(ys, leaves, gs, materialize_grads=True))
        dkv, dkey_sum = next(found), next(found)
        return dkv, dkey_sum, None, None if decay is None else next(found), None, None


def _all_gather(parts: _Parts, group: dist.ProcessGroup | None) -> list[_Parts]:
    """The tensors of all ranks, of the same shapes on each, in one exchange."""
    there = [x for x in parts if x is not None]
    packed = torch.cat([x.reshape(-1) for x in there])
    gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, packed, group=group)
    ranks: list[_Parts] = []
    for row in gathered:
        found = iter(row.split([x.numel() for x in there]))
        ranks.append(tuple(None if x is None else next(found).view(x.shape) for x in parts))
    return ranks


def _combine(ranks: list[_Parts], causal: bool) -> list[LinearAttentionState]:
    """Causal: the state before each rank. Else one, that of all."""
    kv, key_sum, key_max, _ = ranks[0]
    none = None if key_max is None else torch.full_like(key_max, -math.inf)
    state = LinearAttentionState(torch.zeros_like(kv), torch.zeros_like(key_sum), none)
    states = [state]
    for rank in ranks[: len(ranks) - 1 if causal else len(ranks)]:
        state = _add(state, *rank)
        states.append(state)
    return states if causal else states[-1:]


def _add(
    state: LinearAttentionState, kv: Tensor, key_sum: Tensor, key_max: Tensor | None, decay: Tensor | None
) -> LinearAttentionState:
    """A state, and behind it the tokens of another, which decay it."""
    before, top = None, None
    if key_max is not None and state.key_max is not None:
        top = torch.maximum(state.key_max, key_max)
        shift = torch.where(top == -math.inf, 0, top)  # the maximum of nothing subtracts nothing
        before, after = (state.key_max - shift).exp(), (key_max - shift).exp()
        kv, key_sum = after[..., None] * kv, after * key_sum
    elif decay is not None:
        before = decay.exp()[..., None]
    if before is None:
        return LinearAttentionState(state.kv + kv, state.key_sum + key_sum)
    return LinearAttentionState(state.kv * before[..., None] + kv, state.key_sum * before + key_sum, top)
