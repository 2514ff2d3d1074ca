"""Fake kernels and autograd formulas of linear attention. Schemas: csrc/ops.cpp. Kernels: csrc/cpu, _triton.

First derivatives are kernels. Derivatives of derivatives go through the differentiable reference: they are right to any
order, at the reference's speed and memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnlp_ops._ops._through_reference import gradients, leaves, register_through_reference
from fastnlp_ops.linear_attention_state import LinearAttentionState
from fastnlp_ops.reference.linear_attention import (
    EXPONENTIAL,
    FEATURE_MAPS,
    attend,
    bidirectional,
    compute_dtype,
    quadratic,
)

_OPS = torch.ops.fastnlp_ops
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


@torch.library.register_fake("fastnlp_ops::linear_attention_double_backward")
def _(dout, dkv, dkey_sum, dq, dk, dv, dg, dkv0, dsum0, q, k, v, mask, cu_q, cu_k, log_decay, *others):
    return _like(q, dout, dkv, dkey_sum, q, k, v, log_decay, *others[:2])


@torch.library.register_fake("fastnlp_ops::linear_attention_step")
def _(q, k, v, *others):
    return v.new_empty((*q.shape[:2], v.shape[2]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[-_OPTIONS:]
    _, normalizer, _, _, key_max = output
    ctx.mark_non_differentiable(normalizer, key_max)
    ctx.save_for_backward(*inputs[:-_OPTIONS], *output)
    ctx.set_materialize_grads(False)


def _formula(ctx: Any, dout: Tensor | None, _: None, dkv: Tensor | None, dkey_sum: Tensor | None, __: None) -> Any:
    q, k, v, *layout = ctx.saved_tensors[:-5]
    output = ctx.saved_tensors[-5:]
    upstream = [_dense(x) for x in (dout, dkv, dkey_sum)]
    if all(x is None for x in upstream):
        return (None,) * (10 + _OPTIONS)
    dq, dk, dv, *others = _OPS.linear_attention_backward(*upstream, q, k, v, *output, *layout, *ctx.options)
    return dq, dk, dv, None, None, None, *_where_given(others, layout[3:6]), None, *[None] * _OPTIONS


torch.library.register_autograd("fastnlp_ops::linear_attention", _formula, setup_context=_save)


def _backward_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[-_OPTIONS:]
    # Not the results of the forward pass: they are functions of its inputs, which stand for them.
    ctx.save_for_backward(*inputs[:6], *inputs[11:-_OPTIONS])
    ctx.set_materialize_grads(False)


def _backward_formula(ctx: Any, *cotangents: Tensor | None) -> Any:
    upstream, inputs = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
    found = _OPS.linear_attention_double_backward(*upstream, *cotangents, *inputs, *ctx.options)
    dupstream, (dq, dk, dv, *others) = _where_given(found[:3], upstream), found[3:]
    others = _where_given(others, inputs[6:9])
    return *dupstream, dq, dk, dv, *[None] * 5, None, None, None, *others, None, *[None] * _OPTIONS


torch.library.register_autograd(
    "fastnlp_ops::linear_attention_backward", _backward_formula, setup_context=_backward_save
)


def _double_backward(*arguments: Any) -> list[Tensor]:
    """Gradients by upstream and inputs of sum(cotangents * gradients by inputs of sum(upstream * outputs))."""
    upstream, cotangents, given = arguments[:3], arguments[3:9], arguments[9:-_OPTIONS]
    feature_map, causal, normalize, scale, eps = arguments[-_OPTIONS:]
    q, k, v, mask, cu_seqlens_q, cu_seqlens_k, log_decay, kv, key_sum, key_max = given
    wide = compute_dtype(q)
    inputs = (q, k, v, log_decay, kv, key_sum)
    weights = leaves(*(None if x is None else x.to(wide) for x in upstream))
    q, k, v, log_decay, kv, key_sum = read = leaves(*(None if x is None else x.to(wide) for x in inputs))
    state = None if kv is None else LinearAttentionState(kv, key_sum, key_max)
    layout = (mask, cu_seqlens_q, cu_seqlens_k, log_decay, state)
    form = quadratic if causal else bidirectional
    out, after = attend(form, q, k, v, FEATURE_MAPS[feature_map], normalize, scale, eps, *layout)
    nothing = (q * 0).sum()  # on the graph, where no sequence is
    outputs = zip(weights, (out, after.kv, after.key_sum), strict=True)
    total = sum(((w * x).sum() for w, x in outputs if w is not None), nothing)
    there = [x for x in read if x is not None]
    first = iter(gradients(total, there))
    pairs = [(c, next(first)) for c, x in zip(cotangents, read, strict=True) if x is not None]
    asked = [x for x in (*weights, *there) if x is not None]
    second = iter(gradients(sum(((c * f).sum() for c, f in pairs if c is not None), nothing), asked))
    given = (*upstream, *inputs)  # dense, as the fake says
    return [inputs[0].new_empty(0) if x is None else next(second).to(x.dtype).contiguous() for x in given]


register_through_reference("linear_attention_double_backward", _double_backward)


_STEP = _OPS.linear_attention_step.default
_library = torch.library.Library("fastnlp_ops", "IMPL")


def _step(keyset: Any, *arguments: Any) -> Tensor:
    """In place: what torch does for its own ops of that kind, a version for each write, is done here."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
        sentence = "linear_attention_step has no gradient: call it under torch.no_grad(), or train on linear_attention"
        raise NotImplementedError(sentence)
    torch.autograd.graph.increment_version([x for x in arguments[3:6] if x is not None])
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return _STEP.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)


_library.impl("linear_attention_step", _step, "Autograd", with_keyset=True)
