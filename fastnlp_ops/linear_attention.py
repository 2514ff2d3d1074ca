"""Linear attention: time grows with the number of tokens, memory of decoding does not grow at all.

The similarity of a query and a key is a product of features, so that the sum over keys is taken once for all queries:

    out_t = phi(q_t)^T S / (phi(q_t) . s)        S = sum_j phi(k_j) v_j^T,  s = sum_j phi(k_j)

over all keys j, or where ``causal`` over j <= t. What the functions below share:

- q is [B, Tq, H, Dk], k [B, Tk, Hkv, Dk], v [B, Tk, Hkv, Dv], views into a projection as they are: nothing is copied
  where channels are adjacent. H is a multiple of Hkv; query head h reads key head h // (H / Hkv).
- Feature map, padding, normaliser and output are one kernel; no tensor of mapped features or of [Tq, Tk] is written.
- Sums are float32 (float64 for float64 inputs), whatever the dtype of the inputs.
"""

from typing import Any

import torch
from torch import Tensor

from fastnlp_ops._linear_attention_inputs import kernel_inputs, step_inputs
from fastnlp_ops._ops.linear_attention import run, step
from fastnlp_ops.linear_attention_state import LinearAttentionState


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
    """Linear attention over all keys, or causal, with any of seven feature maps.

    out_t = sum_j sim[t, j] v_j / sum_j sim[t, j],        sim[t, j] = scale * phi(q_t) . phi(k_j)

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> q, k, v = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 6)
        >>> phi = lambda x: torch.nn.functional.elu(x) + 1
        >>> sim = torch.einsum("bthd,bjhd->bhtj", phi(q), phi(k)).tril()
        >>> out = torch.einsum("bhtj,bjhe->bthe", sim / sim.sum(-1, keepdim=True), v)
        >>> torch.allclose(fastnlp_ops.linear_attention(q, k, v, causal=True), out, atol=1e-5)
        True

    Args:
        q (Tensor[B, Tq, H, Dk]): queries; float32, float64, float16 or bfloat16, any strides.
        k (Tensor[B, Tk, Hkv, Dk]): keys, of the dtype of q. Under autocast q, k and v may differ in dtype and become
            those of autocast.
        v (Tensor[B, Tk, Hkv, Dv]): values, of the dtype of q.
        feature_map (str): phi. "elu+1"; "relu"; "relu^2"; "exp"; "softmax": over the channels of q and the positions
            of k (causal: as "exp" with normalize, for a softmax over past positions alone is no product of features);
            "cosine+1": sim = 1 + cos(q, k); "identity" or None: q and k are mapped already.
        causal (bool): token t sees keys up to t. Tq = Tk then.
        normalize (bool): divide by the sum of similarities. With "softmax", whose weights sum to 1 anyway, it only
            says whether the result is multiplied by scale.
        scale (float): of similarities; None: 1 / sqrt(Dk). It cancels where normalize is on.
        eps (float): sums of similarities nearer to zero count as eps with their sign, and carry no gradient. Queries
            without a key get 0.
        key_padding_mask (Tensor[B, Tk]): bool, True for keys that count, in any pattern. What other keys hold, NaN
            included, is never read, and they do not decay anything.
        cu_seqlens_q (Tensor[N + 1]): int32 or int64 offsets 0, ..., Tq of N sequences that are packed in B = 1; one of
            the two serves for both. Sequences may be empty.
        cu_seqlens_k (Tensor[N + 1]): offsets 0, ..., Tk of the sequences of keys.
        log_decay (Tensor[Hkv] or Tensor[B, T, Hkv]): log of what is left of the past at each token, for causal
            attention without "exp" and "softmax": float32, float64 for float64 inputs.
        initial_state (LinearAttentionState): keys that came before, of N = B or packed sequences. A text that is cut
            anywhere and continued from the state gives what it gives in one pass.
        return_state (bool): return the state behind the last key too. Gradients flow through kv and key_sum.

    Returns:
        Tensor[B, Tq, H, Dv] in the dtype of the inputs, or (output, :class:`LinearAttentionState`).

    Raises:
        ValueError: for a shape, a size, a device or a combination of options that does not fit; on CPU offsets that do
            not rise from 0 to the number of tokens.
        TypeError: for a dtype that is not listed, or differs between q, k and v.
        RuntimeError: on a GPU whose processors have too little shared memory for the head size, as may happen with
            256 channels in float32.

    Preconditions:
        log_decay <= 0. On CUDA offsets are not checked.

    Precision:
        Products, sums and the normaliser in float32 (float64 for float64 inputs), the result rounded once. "exp" and
        "softmax" keep running maxima: no offset of q or k overflows or loses keys. Gradients read the rounded result,
        and of "exp" the rounded logarithm of the normaliser: an error of 1e-7 times the largest exponent. NaN or inf in
        a token stays in its sequence and the heads that share its key, causal in later tokens. Deterministic: the same
        bits for every run and number of threads. The backward pass saves inputs, output, one number for each token and
        head, and the state. Differentiable to any order and in forward mode, beyond the first through the plain
        PyTorch reference, which where causal holds a tensor of [T, T] for each head ("exp": [T, T, Dk]).

    References:
        Katharopoulos et al., "Transformers are RNNs" (2020), arXiv 2006.16236, equations (4) to (12). "softmax": Shen
        et al., "Efficient Attention" (2021), arXiv 1812.01243. "cosine+1": Su, https://kexue.fm/archives/7546 (2020).
        log_decay: Sun et al., "Retentive Network" (2023), arXiv 2307.08621, equation (6).
    """
    layout = (key_padding_mask, cu_seqlens_q, cu_seqlens_k, log_decay, initial_state)
    inputs, factor = kernel_inputs(q, k, v, feature_map, causal, normalize, scale, eps, *layout)
    out, _, kv, key_sum, key_max = run(*inputs)
    if factor != 1:
        out = out * factor
    if not return_state:
        return out
    return out, LinearAttentionState(kv, key_sum, key_max if feature_map in ("exp", "softmax") else None)


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
    """One token of causal linear attention in one launch: the state takes its key in, in place, the query reads it.

    S = e^g S + phi(k) v^T,    s = e^g s + phi(k),    out = phi(q)^T S / (phi(q) . s)

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> q, k, v = torch.randn(3, 2, 5, 4, 8)  # B = 2, T = 5, H = 4
        >>> out = fastnlp_ops.linear_attention(q, k, v, causal=True)
        >>> _, state = fastnlp_ops.linear_attention(q[:, :4], k[:, :4], v[:, :4], causal=True, return_state=True)
        >>> last = fastnlp_ops.linear_attention_step(q[:, 4], k[:, 4], v[:, 4], state)
        >>> torch.allclose(last, out[:, 4], atol=1e-5)
        True

    Args:
        q (Tensor[B, H, Dk]): the query; as in :func:`linear_attention` without the axis of tokens.
        k (Tensor[B, Hkv, Dk]): the key.
        v (Tensor[B, Hkv, Dv]): the value.
        state (LinearAttentionState): of N = B sequences, contiguous; from :func:`linear_attention`, where a text of no
            tokens gives that of none.
        feature_map, normalize, scale, eps: as in :func:`linear_attention`.
        log_decay (Tensor[Hkv] or Tensor[B, Hkv]): log of what is left of the past, as in :func:`linear_attention`.

    Returns:
        Tensor[B, H, Dv] in the dtype of the inputs.

    Raises:
        ValueError: as :func:`linear_attention`; a state that is not contiguous.
        TypeError: as :func:`linear_attention`.
        NotImplementedError: where grad mode is on and an input asks for gradients: training is for
            :func:`linear_attention` with ``initial_state``.

    Preconditions:
        log_decay <= 0.

    Precision:
        As :func:`linear_attention`; the state does not lose digits with the number of tokens as one in bfloat16 does.

    References:
        As :func:`linear_attention`: equations (18) to (20).
    """
    inputs, factor = step_inputs(q, k, v, state, feature_map, normalize, scale, eps, log_decay)
    if torch.compiler.is_exporting():  # the same without writing in place, which has no form in another program
        return _step_and_copy(q, k, v, state, log_decay, feature_map, normalize, scale, eps)
    out: Tensor = step(*inputs)
    return out if factor == 1 else out * factor


def _step_and_copy(
    q: Tensor, k: Tensor, v: Tensor, state: LinearAttentionState, log_decay: Tensor | None, *options: Any
) -> Tensor:
    """`linear_attention_step` as a text of one token, whose state is copied over the old one."""
    feature_map, normalize, scale, eps = options
    out, after = linear_attention(
        q[:, None],
        k[:, None],
        v[:, None],
        feature_map=feature_map,
        causal=True,
        normalize=normalize,
        scale=scale,
        eps=eps,
        log_decay=log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[:, None],
        initial_state=state,
        return_state=True,
    )
    for own, new in zip(state, after, strict=True):
        if own is not None:
            own.copy_(new)
    return out[:, 0]
