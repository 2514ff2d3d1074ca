"""Linear attention: the sums of all keys at once, or causal by a scan over tokens, whose memory does not grow."""

import math
from typing import Any

from torch import Tensor

from fastnlp_ops.export._scan import scan
from fastnlp_ops.linear_attention_state import LinearAttentionState
from fastnlp_ops.reference.linear_attention import FEATURE_MAPS, absorb, attend, bidirectional, read


def _by_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    log_decay: Tensor | None,
    state: LinearAttentionState,
    *options: Any,
) -> tuple[Tensor, LinearAttentionState]:
    """The form `recurrent` of the reference, as a scan."""
    carry = [x.clone() for x in state if x is not None]
    xs = [*(x.movedim(2, 0) for x in (q, k, v)), mask.transpose(0, 1)]
    if log_decay is not None:
        xs.append(log_decay.movedim(2, 0))

    def step(*values: Tensor) -> tuple[Tensor, ...]:
        before, (q, k, v, on, *g) = LinearAttentionState(*values[: len(carry)]), values[len(carry) :]
        decay = g[0][:, :, None] if g else None
        after = absorb(before, k[:, :, None], v[:, :, None], on[:, None], decay, options[0])
        out = read(after, q[:, :, None], *options)[:, :, 0]
        return *(x for x in after if x is not None), out

    *sums, out = scan(step, carry, xs)
    return out.movedim(0, 2), LinearAttentionState(*sums)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    log_decay: Tensor | None,
    initial_kv: Tensor | None,
    initial_key_sum: Tensor | None,
    initial_key_max: Tensor | None,
    feature_map: int,
    causal: bool,
    normalize: bool,
    scale: float,
    eps: float,
) -> tuple[Tensor, ...]:
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        raise NotImplementedError(
            "packed sequences (cu_seqlens) have no form in export: pad them, and give a key_padding_mask"
        )
    state = None
    if initial_kv is not None and initial_key_sum is not None:
        state = LinearAttentionState(initial_kv, initial_key_sum, initial_key_max)
    name = FEATURE_MAPS[feature_map]
    layout = (key_padding_mask, None, None, log_decay, state)
    form = _by_token if causal else bidirectional
    out, (kv, key_sum, key_max) = attend(form, q, k, v, name, normalize, scale, eps, *layout)
    saved = kv.new_full(q.shape[:3] if normalize and name != "softmax" else (0,), math.nan)
    return out.to(v.dtype).contiguous(), saved, kv, key_sum, kv.new_zeros(0) if key_max is None else key_max
