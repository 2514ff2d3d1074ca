"""Linear attention. What is kept for the backward pass beside inputs and results is a number for
each query; what waits for other tokens is a state of Dk x Dv, of which causal passes keep as many as fill the GPU.
"""

from typing import Any

import torch
from torch import Tensor

from fastnlp_ops._triton.global_pointer_spans import check_tensor, guard
from fastnlp_ops._triton.linear_attention_call import Call, State
from fastnlp_ops._triton.linear_attention_gradients import gradients, over_sums
from fastnlp_ops._triton.linear_attention_tiles import IDENTITY, SOFTMAX


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, ...]:
    """(out [B, Tq, H, Dv], normalizer [B, Tq, H], kv [N, Hkv, F, Dv], key_sum [N, Hkv, F], key_max [N, Hkv, Dk])"""
    with guard(q):
        call = Call(q, k, v, *options)
        out = torch.empty(call.B, call.Tq, call.H, call.DV, dtype=v.dtype, device=v.device)
        none = torch.empty(0, dtype=call.compute, device=v.device)
        softmax = call.feature_map == SOFTMAX.value
        normalizer = none.new_empty(call.B, call.Tq, call.H) if call.normalize and not softmax else none
        last = call.state(call.N)
        results = out, normalizer, last.kv, last.key_sum, none if last.key_max is None else last.key_max
        if call.N * call.H == 0:
            return results
        if call.causal and call.Tq == call.Tk:
            segment = call.whole(call.Tk, call.DV)
            state = call.initial if segment > call.Tk else call.sums(call.initial, segment)
            call.queries(
                out, state, segment, normalizer=normalizer, scale=call.scale, last=last, normalize=call.normalize
            )
            return results
        call.sums(call.initial, call.part(call.Tk, call.DV), last=last)
        if out.numel() == 0:
            return results
        segment = call.part(call.Tq, call.DV)
        if softmax:
            scale = 1.0 if call.normalize else call.scale
            call.queries(out, over_sums(last), segment, scale=scale, as_map=IDENTITY.value)
        else:
            call.queries(out, last, segment, normalizer=normalizer, scale=call.scale, normalize=call.normalize)
    return results


def linear_attention_backward(
    dout: Tensor | None,
    dkv: Tensor | None,
    dkey_sum: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    normalizer: Tensor,
    kv: Tensor,
    key_sum: Tensor,
    key_max: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    """(dq, dk, dv, dlog_decay, dinitial_kv, dinitial_key_sum), of size 0 for inputs that are not given."""
    with guard(q):
        call = Call(q, k, v, *options)
        if dout is None:
            dout = torch.zeros_like(out)
        check_tensor("dout", dout, (call.B, call.Tq, call.H, call.DV), v.dtype, q)
        check_tensor("out", out, tuple(dout.shape), v.dtype, q)
        final = State(kv.contiguous(), key_sum.contiguous(), key_max.contiguous() if call.exponential else None)
        for name, x in (("dkv", dkv), ("kv", final.kv)):
            check_tensor(name, x, (call.N, call.heads, call.F, call.DV), call.compute, q)
        for name, x in (("dkey_sum", dkey_sum), ("key_sum", final.key_sum)):
            check_tensor(name, x, (call.N, call.heads, call.F), call.compute, q)
        check_tensor("key_max", final.key_max, (call.N, call.heads, call.DK), call.compute, q)
        dkv, dkey_sum = (x if x is None else x.contiguous() for x in (dkv, dkey_sum))
        above = (dout.contiguous(), out.contiguous(), normalizer.contiguous() if call.normalize else None)
        dq, dk, dv, dlog_decay, dinitial = gradients(call, *above, final, State(dkv, dkey_sum))
    none = kv.new_empty(0)
    return dq, dk, dv, *(none if x is None else x for x in (dlog_decay, dinitial.kv, dinitial.key_sum))
