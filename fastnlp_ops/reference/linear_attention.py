r"""Linear attention in plain PyTorch: the mathematics that the compiled kernels must reproduce.

Attention with the similarity of a query and a key that is a product of features, not the exponential of a product
(Katharopoulos et al. 2020):

    sim[t, j] = scale * phi(q_t) . phi(k_j)
    out_t     = sum_j sim[t, j] v_j / guard(sum_j sim[t, j])     normalize;  else sum_j sim[t, j] v_j

over all keys j, or with ``causal`` over j <= t. The scale cancels in the first form. As a product, the sum over keys
can be taken before the query is known:

    out_t = phi(q_t)^T S_t / guard(phi(q_t) . s_t),      S_t = sum_j phi(k_j) v_j^T [F, Dv],   s_t = sum_j phi(k_j) [F]

so that time grows with T and not with T^2, and a recurrence over tokens carries S and s. With the log of a decay g_t
<= 0 (Sun et al. 2023) it is S_t = e^{g_t} S_{t-1} + phi(k_t) v_t^T and likewise s: key j counts for query t with
e^{g_{j+1} + ... + g_t}. A masked key adds nothing and decays nothing.

    guard(z) = z where |z| >= eps, else eps with the sign of z, and no gradient flows through such a z; no key: 0 / eps

Feature maps phi:
    identity    x                    relu        max(x, 0)
    elu+1       x + 1, e^x for x < 0 relu^2      max(x, 0)^2
    cosine+1    (1, x / |x|): sim = 1 + cos(q, k), the first order of e^x (Su 2020); F = Dk + 1
    exp         e^x, computed as below
    softmax     softmax over the channels of q and over the positions of k (Shen et al. 2021):
                out_t = sum_d softmax(q_t)_d S_d / s_d with S and s of exp. Its weights sum to 1. Of past keys alone it
                is not a product any more: causal, it means exp normalised.

exp without overflow: the sums hold e^{k_jd - m_d} with m_d = max_j k_jd, and a query reads them with e^{q_td + m_d -
M_t}, M_t = max_d (q_td + m_d). All exponents are <= 0, and the largest term of a row is 1. m and M cancel in the
normalised result, and e^{M_t} restores the other; they are constants to differentiation. A causal row t may only know
its own m_d = max_{j <= t} k_jd: with that of all keys its own would underflow where a later one is larger.

Backward, with dnum_t = dout_t / guard(z_t), dz_t = -(dnum_t . out_t) (0 where guarded) and causal sums over t >= j:

    dphi(q_t) = S_t dnum_t + s_t dz_t        dphi(k_j) = sum_t phi(q_t) (dnum_t . v_j + dz_t)
    dv_j      = sum_t phi(q_t) . phi(k_j) dnum_t
    dg_t      = sum_{i >= t} (phi(q_i) . dphi(q_i) - phi(k_i) . dphi(k_i)) + <dS_T, S_T> + <ds_T, s_T>

Any device; half precision is computed in float32; differentiable to any order. :func:`linear_attention` takes the
recurrent sums of all keys at once where it is bidirectional, and where it is causal the matrix sim, [T, T] and for exp
[T, T, Dk]; :func:`linear_attention_recurrent` goes token by token in both.

References:
    Katharopoulos, Vyas, Pappas, Fleuret: Transformers are RNNs: Fast Autoregressive Transformers with Linear
    Attention. arXiv 2006.16236, 2020. Equations (4) to (6), (10) to (12).
    Shen, Zhang, Zhao, Yi, Li: Efficient Attention: Attention with Linear Complexities. arXiv 1812.01243, 2021.
    Sun, Dong, Huang, Ma, Xia, Xue, Wang, Wei: Retentive Network. arXiv 2307.08621, 2023. Equation (6) is the decay.
    Su: https://kexue.fm/archives/7546, 2020, on 1 + cos(q, k).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastnlp_ops.linear_attention_state import LinearAttentionState

# By the number that stands for them in the ops.
FEATURE_MAPS = ("identity", "elu+1", "relu", "relu^2", "exp", "softmax", "cosine+1")
EXPONENTIAL = ("exp", "softmax")


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def features(x: Tensor, feature_map: str) -> Tensor:
    """phi(x) [..., F] of x [..., Dk], for maps that need no maximum."""
    if feature_map == "elu+1":
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())  # not expm1 + 1, which is 0 from x = -17 on
    if feature_map == "relu":
        return x.relu()
    if feature_map == "relu^2":
        return x.relu().square()
    if feature_map == "cosine+1":
        square = x.square().sum(-1, keepdim=True)
        tiny = square < 1e-24
        length = torch.where(tiny, 1.0, square).sqrt()  # never the root of 0: its derivative would be NaN
        return torch.cat([torch.ones_like(square), x / torch.where(tiny, 1e-12, length)], -1)
    return x


def guard(z: Tensor, eps: float) -> Tensor:
    """A denominator that is not near zero. NaN stays NaN."""
    least = torch.full_like(z, eps)  # of two numbers torch.where would make float32
    return torch.where(z.abs() < eps, torch.where(z < 0, -least, least), z)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[B, Hkv, ...] -> [B, H, ...]: query head h reads key head h // (H / Hkv)."""
    return x.repeat_interleave(heads // x.shape[1], 1)


def empty_state(sequences: int, k: Tensor, v: Tensor, feature_map: str) -> LinearAttentionState:
    """That of no keys, for keys [..., Hkv, Dk] and values [..., Hkv, Dv]."""
    heads, width = k.shape[-2:]
    rows = width + 1 if feature_map == "cosine+1" else width
    kv = k.new_zeros((sequences, heads, rows, v.shape[-1]), dtype=compute_dtype(k))
    key_sum = kv.new_zeros((sequences, heads, rows))
    key_max = torch.full_like(key_sum, -math.inf) if feature_map in EXPONENTIAL else None
    return LinearAttentionState(kv, key_sum, key_max)


def subtrahend(maximum: Tensor) -> Tensor:
    """A maximum as something to subtract: a constant, and 0 where it is that of nothing."""
    return torch.where(maximum == -math.inf, 0, maximum).detach()


def decays(log_decay: Tensor, mask: Tensor) -> Tensor:
    """What is left at token t of what came in with token j: e^{g_{j+1} + ... + g_t}, and 0 for j > t.

    log_decay [B, Hkv, T] -> [B, Hkv, T + 1, T + 1] at [t, j], where tokens count from 1 and 0 is the initial state.
    Every sum is taken by itself: as the difference of two long ones it would lose digits.
    """
    g = torch.nn.functional.pad(torch.where(mask[:, None], log_decay, 0), (1, 0))
    token = torch.arange(g.shape[-1], device=g.device)
    total = torch.where(token[:, None] > token, g[..., None], 0).cumsum(-2)
    return torch.where(token[:, None] >= token, total.exp(), 0)


def sequences_of(state: LinearAttentionState, first: int, last: int) -> LinearAttentionState:
    kv, key_sum, key_max = state
    return LinearAttentionState(kv[first:last], key_sum[first:last], None if key_max is None else key_max[first:last])


def for_queries(state: LinearAttentionState, heads: int) -> LinearAttentionState:
    """The state [N, Hkv, ...] as every query head sees it, [N, H, ...]."""
    kv, key_sum, key_max = state
    maximum = None if key_max is None else repeat_heads(key_max, heads)
    return LinearAttentionState(repeat_heads(kv, heads), repeat_heads(key_sum, heads), maximum)


def absorb(
    state: LinearAttentionState, k: Tensor, v: Tensor, mask: Tensor, log_decay: Tensor | None, feature_map: str
) -> LinearAttentionState:
    """The state after keys [B, Hkv, T, Dk] and values [B, Hkv, T, Dv]; mask [B, T], log_decay [B, Hkv, T]."""
    kv, key_sum, key_max = state
    on = mask[:, None, :, None]
    v = torch.where(on, v, 0)  # selected, not multiplied: what a masked token holds is not read
    if key_max is None:
        phi = torch.where(on, features(torch.where(on, k, 0), feature_map), 0)
    else:
        k = torch.where(on, k, -math.inf)
        last_max, key_max = key_max, torch.cat([k, key_max[:, :, None]], 2).amax(2).detach()
        top = subtrahend(key_max)  # [B, Hkv, Dk]
        phi = (k - top[:, :, None]).exp()
        before = (last_max - top).exp()
        kv, key_sum = before[..., None] * kv, before * key_sum
    if log_decay is not None:
        left = decays(log_decay, mask)[:, :, -1]  # [B, Hkv, T + 1]
        kv, key_sum = left[:, :, :1, None] * kv, left[:, :, :1] * key_sum
        phi = phi * left[:, :, 1:, None]
    return LinearAttentionState(kv + phi.transpose(2, 3) @ v, key_sum + phi.sum(2), key_max)


def read(state: LinearAttentionState, q: Tensor, feature_map: str, normalize: bool, scale: float, eps: float) -> Tensor:
    """What queries [B, H, T, Dk] find in a state: [B, H, T, Dv]."""
    kv, key_sum, key_max = for_queries(state, q.shape[1])
    factor: Tensor | float = scale
    if feature_map == "softmax":
        out = q.softmax(-1) @ (kv / guard(key_sum, eps)[..., None])
        return out if normalize else out * scale
    if key_max is not None:  # exp
        exponent = q + key_max[:, :, None]
        top = subtrahend(exponent.amax(-1, keepdim=True))  # [B, H, T, 1]
        phi, factor = (exponent - top).exp(), scale * top.exp()
    else:
        phi = features(q, feature_map)
    out = phi @ kv
    return out / guard(phi @ key_sum[..., None], eps) if normalize else out * factor


def bidirectional(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    log_decay: Tensor | None,
    state: LinearAttentionState,
    feature_map: str,
    normalize: bool,
    scale: float,
    eps: float,
) -> tuple[Tensor, LinearAttentionState]:
    """Output [B, H, Tq, Dv] of queries [B, H, Tq, Dk] that read the sums of all keys, and those sums."""
    state = absorb(state, k, v, mask, log_decay, feature_map)
    return read(state, q, feature_map, normalize, scale, eps), state


def quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    log_decay: Tensor | None,
    state: LinearAttentionState,
    feature_map: str,
    normalize: bool,
    scale: float,
    eps: float,
) -> tuple[Tensor, LinearAttentionState]:
    """Causal attention from the matrix sim [T, T]. Tq = T, or 0 where nothing but the state is wanted."""
    H, T = q.shape[1:3]
    after = absorb(state, k, v, mask, log_decay, feature_map)
    k, v = (repeat_heads(torch.where(mask[:, None, :, None], x, 0), H) for x in (k, v))
    kv, key_sum, key_max = for_queries(state, H)
    factor: Tensor | float = scale
    token = torch.arange(k.shape[2], device=q.device)
    valid = ((token[:T, None] >= token) & mask[:, None])[:, None]  # [B, 1, T, T]
    if key_max is not None:  # exp
        exponent = torch.where(valid[..., None], q[:, :, :, None] + k[:, :, None], -math.inf)  # [B, H, T, T, Dk]
        initial = q + key_max[:, :, None]  # [B, H, T, Dk]: the exponents of what the state holds
        top = torch.cat([exponent.flatten(3), initial], -1).amax(-1, keepdim=True)
        top = subtrahend(top)  # [B, H, T, 1]
        sim, phi = (exponent - top[..., None]).exp().sum(-1), (initial - top).exp()
        factor = scale * top.exp()
    else:
        phi = features(q, feature_map)
        sim = torch.where(valid, phi @ features(k, feature_map).transpose(2, 3), 0)
    if log_decay is not None:
        left = repeat_heads(decays(log_decay, mask), H)[:, :, 1 : T + 1]
        sim, phi = sim * left[..., 1:], phi * left[..., :1]
    out = sim @ v + phi @ kv
    z = sim.sum(-1, keepdim=True) + phi @ key_sum[..., None]
    return out / guard(z, eps) if normalize else out * factor, after


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    log_decay: Tensor | None,
    state: LinearAttentionState,
    feature_map: str,
    normalize: bool,
    scale: float,
    eps: float,
) -> tuple[Tensor, LinearAttentionState]:
    """Causal attention, one token after the other."""
    outs = [v.new_zeros((*q.shape[:2], 0, v.shape[3]))]
    for t in range(k.shape[2]):
        now = slice(t, t + 1)
        g = None if log_decay is None else log_decay[:, :, now]
        state = absorb(state, k[:, :, now], v[:, :, now], mask[:, now], g, feature_map)
        outs.append(read(state, q[:, :, now], feature_map, normalize, scale, eps))
    return torch.cat(outs, 2), state


def attend(
    form: Callable[..., tuple[Tensor, LinearAttentionState]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str | None,
    normalize: bool,
    scale: float | None,
    eps: float,
    key_padding_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    log_decay: Tensor | None,
    initial_state: LinearAttentionState | None,
) -> tuple[Tensor, LinearAttentionState]:
    """`form` over a batch, or over packed sequences one by one: output in the compute type and state."""
    name = feature_map or "identity"
    options = (name, normalize, q.shape[3] ** -0.5 if scale is None else scale, eps)
    q, k, v = (x.to(compute_dtype(x)) for x in (q, k, v))
    cu_seqlens_q = cu_seqlens_k if cu_seqlens_q is None else cu_seqlens_q
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    sequences = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    state = empty_state(sequences, k, v, name) if initial_state is None else initial_state
    on = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if key_padding_mask is None else key_padding_mask
    g = None if log_decay is None else log_decay.expand(k.shape[:3]).transpose(1, 2)  # [B, Hkv, T]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if cu_seqlens_q is None or cu_seqlens_k is None:
        out, state = form(q, k, v, on, g, state, *options)
        return out.transpose(1, 2), state
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, states = [v.new_zeros((1, q.shape[1], 0, v.shape[3]))], [sequences_of(state, 0, 0)]
    for n in range(sequences):
        at, of = slice(*starts_q[n : n + 2]), slice(*starts_k[n : n + 2])
        part = None if g is None else g[:, :, of]
        before = sequences_of(state, n, n + 1)
        out, after = form(q[:, :, at], k[:, :, of], v[:, :, of], on[:, of], part, before, *options)
        outs.append(out)
        states.append(after)
    kv, key_sum = (torch.cat(parts) for parts in list(zip(*states, strict=True))[:2])
    maxima = [x.key_max for x in states if x.key_max is not None]
    return torch.cat(outs, 2).transpose(1, 2), LinearAttentionState(kv, key_sum, torch.cat(maxima) if maxima else None)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str | None = "elu+1",
    causal: bool = False,
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    log_decay: Tensor | None = None,
    initial_state: LinearAttentionState | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, LinearAttentionState]:
    """Output [B, Tq, H, Dv] in the dtype of v; with return_state also the state, in the compute type."""
    form, factor = quadratic if causal else bidirectional, 1.0
    if causal and feature_map == "softmax":
        feature_map, normalize, factor = causal_softmax(q, normalize, scale)
    layout = (key_padding_mask, cu_seqlens_q, cu_seqlens_k, log_decay, initial_state)
    out, state = attend(form, q, k, v, feature_map, normalize, scale, eps, *layout)
    out = (out * factor).to(v.dtype)
    return (out, state) if return_state else out


def causal_softmax(q: Tensor, normalize: bool, scale: float | None) -> tuple[str, bool, float]:
    """Causal softmax as another map, whether that is normalised, and a factor of the result."""
    return "exp", True, 1.0 if normalize else q.shape[-1] ** -0.5 if scale is None else scale


def linear_attention_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str | None = "elu+1",
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    log_decay: Tensor | None = None,
    initial_state: LinearAttentionState | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, LinearAttentionState]:
    """linear_attention(..., causal=True), token by token: slower for short texts, with memory for long ones."""
    factor = 1.0
    if feature_map == "softmax":
        feature_map, normalize, factor = causal_softmax(q, normalize, scale)
    layout = (key_padding_mask, cu_seqlens_q, cu_seqlens_k, log_decay, initial_state)
    out, state = attend(recurrent, q, k, v, feature_map, normalize, scale, eps, *layout)
    out = (out * factor).to(v.dtype)
    return (out, state) if return_state else out


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearAttentionState,
    *,
    feature_map: str | None = "elu+1",
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    log_decay: Tensor | None = None,
) -> Tensor:
    """One token: q [B, H, Dk], k [B, Hkv, Dk], v [B, Hkv, Dv] -> [B, H, Dv]; the state is updated in place."""
    g = None if log_decay is None else log_decay.expand(k.shape[:2])[:, None]  # [B, 1, Hkv]
    with torch.no_grad():
        out, after = linear_attention_recurrent(
            q[:, None],
            k[:, None],
            v[:, None],
            feature_map=feature_map,
            normalize=normalize,
            scale=scale,
            eps=eps,
            log_decay=g,
            initial_state=state,
            return_state=True,
        )
        for own, new in zip(state, after, strict=True):
            if own is not None:
                own.copy_(new)
    return out[:, 0]
