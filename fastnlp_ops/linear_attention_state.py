"""What linear attention remembers of all keys and values that it has seen: it does not grow with their number."""

from typing import NamedTuple

from torch import Tensor


class LinearAttentionState(NamedTuple):
    """Sums over the keys and values seen so far, for each sequence and each head of the keys.

    kv = sum_j phi(k_j) v_j^T,  key_sum = sum_j phi(k_j),  each term decayed by what came after it.

    :func:`linear_attention` returns one with ``return_state`` and goes on from one given as ``initial_state``;
    :func:`linear_attention_step` adds a token in place. Always float32 (float64 for float64 inputs): in bfloat16 a sum
    stops growing after a few hundred tokens.

    Args:
        kv (Tensor[N, Hkv, F, Dv]): sums of outer products, for N sequences. F is Dk, for "cosine+1" Dk + 1: row 0 is
            the sum of the values.
        key_sum (Tensor[N, Hkv, F]): sums of mapped keys; for "cosine+1" key_sum[0] counts the keys.
        key_max (Tensor[N, Hkv, Dk]): for "exp" and "softmax" the largest key in each channel, -inf where there was
            none; the sums are those of exp(k - key_max). None for other maps.
    """

    kv: Tensor
    key_sum: Tensor
    key_max: Tensor | None = None
