"""Gradients of linear_attention: queries from left to right, keys from right to left, and what is left for states."""

import torch
import triton
from torch import Tensor

from fastnlp_ops._triton.linear_attention_call import NOTHING, Call, Gradients, State
from fastnlp_ops._triton.linear_attention_rows import map_rows, row_gradients
from fastnlp_ops._triton.linear_attention_tiles import COSINE, EXP, IDENTITY, SOFTMAX

Results = tuple[Tensor, Tensor, Tensor, Tensor | None, State]  # dq, dk, dv, dlog_decay, dinitial


def over_sums(state: State) -> State:
    """The state of softmax as one that is read with products alone: kv / key_sum, 0 where there is no key."""
    return State(state.kv * _inverse(state.key_sum)[..., None], state.key_sum, state.key_max)


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0, 1 / x)


def _behind(key_max: Tensor) -> Tensor:
    """Maxima as the sums over queries begin with them: a key is e^(k - key_max) in the final state."""
    return torch.where(key_max == -torch.inf, key_max, -key_max)


def _in_front(call: Call, last: State) -> State:
    """The gradient by the initial state, from the sums over queries in front of all tokens."""
    if call.initial.kv is None:
        return NOTHING
    if not call.exponential:
        return last
    weight = (call.initial.key_max + last.key_max).exp()
    return State(last.kv * weight[..., None], last.key_sum * weight)


def gradients(call: Call, dout: Tensor, out: Tensor, normalizer: Tensor | None, final: State, dfinal: State) -> Results:
    q, k, v = call.raw
    cosine = call.feature_map == COSINE.value
    # Of cosine+1 dq and dk are those of unit vectors first, which one more pass takes to q and k.
    dq, dk = (torch.empty(x.shape, dtype=call.compute if cosine else x.dtype, device=x.device) for x in (q, k))
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if call.feature_map == SOFTMAX.value:
        return _softmax(call, dout, final, dfinal, dk, dv)
    if call.N * call.H == 0:
        dlog_decay = None if call.log_decay is None else call.log_decay.new_zeros(call.decay_shape)
        return dq.to(q.dtype), dk.to(k.dtype), dv, dlog_decay, call.initial
    exponential = call.map == EXP.value
    if call.causal and call.Tq < call.Tk:  # a state was asked for and nothing else: queries that give no gradient
        call.without_queries()
        dout = torch.zeros(call.B, call.Tk, call.H, call.DV, dtype=v.dtype, device=v.device)
        logarithms = dout.new_full(dout.shape[:3], -torch.inf, dtype=call.compute) if exponential else None
        above = Gradients(dout, 1.0, logarithms=logarithms)
        products = dout.new_zeros(dout.shape[:3], dtype=call.compute)
    else:
        decays = call.log_decay is not None
        factor, delta, products = row_gradients(dout, out, normalizer, call.map, decays, call.eps)
        scale = 1.0 if call.normalize else call.scale
        above = Gradients(dout, scale, factor, delta, normalizer if exponential else None)
    given = dfinal.kv is not None or dfinal.key_sum is not None
    start = State(dfinal.kv, dfinal.key_sum, _behind(final.key_max) if exponential and given else None)
    parts = None
    if call.causal:
        if call.log_decay is not None:
            _, outer, _, _ = call.tile(turned=False)
            parts = products.new_empty(triton.cdiv(call.DV, outer), call.B, call.Tk, call.heads, dtype=call.compute)
        segment = call.whole(call.Tk, max(call.DK, call.DV))
        single = segment > call.Tk
        if dq.numel():
            call.queries(dq, call.initial if single else call.sums(call.initial, segment), segment, above=above)
        behind = start if single else call.sums(start, segment, above)
        last = NOTHING if call.initial.kv is None else call.state(call.N)
    else:
        segment = call.part(call.Tk, max(call.DK, call.DV))
        queries = call.part(call.Tq, max(call.DK, call.DV))
        if dq.numel():
            call.queries(dq, final, queries, above=above)
        behind = last = call.sums(start, queries, above, last=call.state(call.N))
    call.keys(dv, behind, segment, above, of_keys=False, last=last if call.causal else NOTHING, products=parts)
    call.keys(dk, behind, segment, above, of_keys=True)
    if cosine:
        dq = map_rows(q, call.feature_map, dphi=dq)
        dk = map_rows(k, call.feature_map, call.mask, dk)
    dlog_decay = None if parts is None else _decay_gradient(call, products, parts.sum(0), final, dfinal)
    return dq, dk, dv, dlog_decay, _in_front(call, last)


def _softmax(call: Call, dout: Tensor, final: State, dfinal: State, dk: Tensor, dv: Tensor) -> Results:
    """out = softmax(q) W, W = kv / key_sum: products alone for queries, and for keys those of exp."""
    q = call.raw[0]
    if call.N * call.H == 0:
        return torch.empty_like(q), dk, dv, None, call.initial
    above = Gradients(dout, 1.0 if call.normalize else call.scale)
    read = over_sums(final)
    dphi = torch.empty(q.shape, dtype=call.compute, device=q.device)
    segment = call.part(call.Tq, max(call.DK, call.DV))
    if dphi.numel():
        call.queries(dphi, read, segment, above=above, as_map=IDENTITY.value)
    last = call.sums(NOTHING, segment, above, last=call.state(call.N), as_map=IDENTITY.value)
    inverse = _inverse(final.key_sum)
    kv = last.kv * inverse[..., None]
    key_sum = -(last.kv * read.kv).sum(-1) * inverse
    if dfinal.kv is not None:
        kv = kv + dfinal.kv
    if dfinal.key_sum is not None:
        key_sum = key_sum + dfinal.key_sum
    behind = State(kv, key_sum, _behind(final.key_max))
    segment = call.part(call.Tk, max(call.DK, call.DV))
    call.keys(dv, behind, segment, above, of_keys=False)
    call.keys(dk, behind, segment, above, of_keys=True)
    return map_rows(q, call.feature_map, dphi=dphi), dk, dv, None, _in_front(call, behind)


def _decay_gradient(call: Call, of_queries: Tensor, of_keys: Tensor, final: State, dfinal: State) -> Tensor:
    """[B, T, Hkv]: sum over later tokens of phi(q) . dphi(q) - phi(k) . dphi(k), and the final state's part."""
    of_queries = of_queries.view(call.B, -1, call.heads, call.group).sum(3, dtype=torch.float64)
    later = torch.nn.functional.pad(of_queries - of_keys, (0, 0, 0, 1)).flip(1).cumsum(1).flip(1)  # [B, T + 1, Hkv]
    rest = later.new_zeros(call.N, call.heads)
    if dfinal.kv is not None:
        rest += (dfinal.kv.double() * final.kv).sum((2, 3))
    if dfinal.key_sum is not None:
        rest += (dfinal.key_sum.double() * final.key_sum).sum(2)
    if call.cu_seqlens_k is None:
        result = later[:, :-1] + rest[:, None]
        if call.mask is not None:
            result = torch.where(call.mask[..., None] != 0, result, 0)
    else:
        ends = call.cu_seqlens_k[1:].long()
        sequence = torch.searchsorted(ends, torch.arange(call.Tk, device=ends.device), right=True)
        sequence = sequence.clamp(max=call.N - 1)
        result = later[:, :-1] - later[:, ends[sequence].clamp(0, call.Tk)] + rest[sequence]
    return result.sum_to_size(call.decay_shape).to(call.compute)
