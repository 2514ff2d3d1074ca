"""Fake kernels and autograd formulas of linear attention. Schemas: csrc/ops.cpp. Kernels: csrc/cpu, _triton.

First derivatives are kernels. Derivatives of derivatives, and in forward mode, go through the differentiable reference:
they are right to any order, at the reference's speed and memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnlp_ops._ops._autograd import differentiable, is_dual, library, through_plain, vjp
from fastnlp_ops.linear_attention_state import LinearAttentionState
from fastnlp_ops.reference.linear_attention import (
    EXPONENTIAL,
    FEATURE_MAPS,
    attend,
    bidirectional,
    compute_dtype,
    quadratic,
)

_OPTIONS = 5  # feature_map, causal, normalize, scale, eps: what is no tensor, behind all that is


def _like(q: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """What gradients look like: dense, and of size 0 for inputs that are not given."""
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _where_given(gradients: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else g for g, x in zip(gradients, inputs, strict=True))


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@torch.library.register_fake("fastnlp_ops::linear_attention")
def _(q, k, v, mask, cu_seqlens_q, cu_seqlens_k, log_decay, kv, key_sum, key_max, feature_map, causal, normalize, *_):
    name, (B, T, H, Dk) = FEATURE_MAPS[feature_map], q.shape
    sequences = B if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    groups, Dv = v.shape[2:]
    F = Dk + 1 if name == "cosine+1" else Dk
    wide = q.new_empty(0, dtype=compute_dtype(q))
    return (
        v.new_empty((B, T, H, Dv)),
        wide.new_empty((B, T, H) if normalize and name != "softmax" else 0),
        wide.new_empty((sequences, groups, F, Dv)),
        wide.new_empty((sequences, groups, F)),
        wide.new_empty((sequences, groups, Dk) if name in EXPONENTIAL else 0),
    )


@torch.library.register_fake("fastnlp_ops::linear_attention_backward")
def _(dout, dkv, dkey_sum, q, k, v, out, z, final_kv, final_sum, final_max, mask, cu_q, cu_k, log_decay, *others):
    return _like(q, q, k, v, log_decay, *others[:2])


@torch.library.register_fake("fastnlp_ops::linear_attention_step")
def _(q, k, v, *others):
    return v.new_empty((*q.shape[:2], v.shape[2]))


def _plain(q: Tensor, k: Tensor, v: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """The results in the compute type, but the output; without the normaliser, which the backward pass reads."""
    mask, cu_seqlens_q, cu_seqlens_k, log_decay, kv, key_sum, key_max, feature_map, causal, *options = inputs
    state = None if kv is None else LinearAttentionState(kv, key_sum, key_max)
    layout: Any = (*options, mask, cu_seqlens_q, cu_seqlens_k, log_decay, state)
    form = quadratic if causal else bidirectional
    out, after = attend(form, q, k, v, FEATURE_MAPS[feature_map], *layout)
    key_max = out.new_empty(0) if after.key_max is None else after.key_max
    return out.to(v.dtype), out.new_empty(0), after.kv, after.key_sum, key_max


def _plain_backward(dout: Any, dkv: Any, dkey_sum: Any, *inputs: Any) -> tuple[Tensor, ...]:
    q, k, v, *_ = inputs[:8]
    mask, cu_seqlens_q, cu_seqlens_k, log_decay, kv, key_sum, *others = inputs[8:]

    def outputs(q: Tensor, k: Tensor, v: Tensor, *scores: Any) -> tuple[Tensor, Tensor, Tensor]:
        out, _, kv, key_sum, _ = _plain(q, k, v, mask, cu_seqlens_q, cu_seqlens_k, *scores, *others)
        return out, kv, key_sum

    found = vjp(outputs, (q, k, v, log_decay, kv, key_sum), (dout, dkv, dkey_sum))
    return tuple(q.new_zeros(0) if x is None else x for x in found)


_backward = through_plain("linear_attention_backward", _plain_backward, results=range(6, 11))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[-_OPTIONS:]
    _, normalizer, _, _, key_max = output
    ctx.mark_non_differentiable(normalizer, key_max)
    ctx.save_for_backward(*inputs[:-_OPTIONS], *output)
    ctx.set_materialize_grads(False)


def _formula(ctx: Any, dout: Tensor | None, _: None, dkv: Tensor | None, dkey_sum: Tensor | None, __: None) -> Any:
    upstream = [_dense(x) for x in (dout, dkv, dkey_sum)]
    saved = ctx.saved_tensors  # once: under activation checkpointing each reading computes them anew
    (q, k, v, *layout), output = saved[:-5], saved[-5:]
    if all(x is None for x in upstream):
        return (None,) * (10 + _OPTIONS)
    dq, dk, dv, *others = _backward(*upstream, q, k, v, *output, *layout, *ctx.options)
    return dq, dk, dv, None, None, None, *_where_given(others, layout[3:6]), None, *[None] * _OPTIONS


run = differentiable("linear_attention", _plain, _save, _formula)


_STEP = torch.ops.fastnlp_ops.linear_attention_step.default


def _step(keyset: Any, *arguments: Any) -> Tensor:
    """In place: what torch does for its own ops of that kind, a version for each write, is done here."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
        sentence = "linear_attention_step has no gradient: call it under torch.no_grad(), or train on linear_attention"
        raise NotImplementedError(sentence)
    if is_dual(arguments):
        raise NotImplementedError("linear_attention_step has no forward-mode derivative: take that of linear_attention")
    torch.autograd.graph.increment_version([x for x in arguments[3:6] if x is not None])
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return _STEP.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)


library.impl("linear_attention_step", _step, "Autograd", with_keyset=True)


def step(*arguments: Any) -> Tensor:
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "linear_attention_step changes its state in place: under torch.func, give linear_attention the token and "
            "the state as initial_state"
        )
    return _STEP(*arguments)
