"""A cache of transformers that does not grow: the state of linear attention for each layer."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from fastnlp_ops.linear_attention import linear_attention, linear_attention_step
from fastnlp_ops.linear_attention_state import LinearAttentionState

_NO_WAY_BACK = (
    "LinearAttentionCache cannot go back, for a sum does not tell its terms: take DynamicCache for assisted decoding"
)


class LinearAttentionCache(Cache):
    """What a causal model remembers of a text with linear attention: sums for each layer, whatever the text's length.

    For ``past_key_values`` of a model's ``forward`` and ``generate``; one for each text or batch, or ``reset()``
    between them. Beam search and ``generate`` after ``generate`` work; going back (``crop``) does not. Models with
    cross-attention take ``EncoderDecoderCache(LinearAttentionCache(), DynamicCache())``.

    Returns:
        ``cache.layers[i].state``: the :class:`fastnlp_ops.LinearAttentionState` of layer i.

    Raises:
        RuntimeError: where the model's attention is not the one that :func:`register` made.
        ValueError: for a batch of another size, attention that is not causal, layers that are not attention, and
            texts packed in a row. The cache is as before then.
        NotImplementedError: for ``crop``, and so for assisted decoding.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_Layer)

    def activate_past_recording(self) -> None:
        """Asked for by assisted decoding, before its first step."""
        raise NotImplementedError(_NO_WAY_BACK)

    def _only_attention(self, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(
            "LinearAttentionCache is for models of attention layers alone: take DynamicCache(config=model.config)"
        )

    get_conv_state = update_conv_state = get_recurrent_state = update_recurrent_state = _only_attention
    update_indexer = _only_attention


class _Layer(CacheLayerMixin):
    """One layer's state. Keys and values pass through it, and tell the attention function whose they are."""

    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.state: LinearAttentionState | None = None
        self.length = 0
        self.waiting = False  # for the attention function to take the keys of the last update in

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The first keys make the state."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.waiting:
            raise RuntimeError(
                "LinearAttentionCache lost the keys of the last tokens: it needs a model whose attn_implementation "
                "register() made, and which hands the keys on as the cache returns them (others take DynamicCache)"
            )
        texts, batch = key_states.shape[0] if self.state is None else self.state.kv.shape[0], key_states.shape[0]
        if texts != batch:
            raise ValueError(f"LinearAttentionCache holds {texts} texts, got a batch of {batch}: reset() it in between")
        self.waiting = True
        key_states.fastnlp_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, feature_map: str | None) -> Tensor:
        """Causal attention to all that the state holds and to k, v [B, T, Hkv, D], which it takes in."""
        recorded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        if q.shape[1] == 1 and mask is None and self.state is not None and not recorded:
            out = linear_attention_step(q[:, 0], k[:, 0], v[:, 0], self.state, feature_map=feature_map)
            self.length += 1
            return out[:, None]
        out, self.state = linear_attention(
            q,
            k,
            v,
            feature_map=feature_map,
            causal=True,
            key_padding_mask=mask,
            initial_state=self.state,
            return_state=True,
        )
        self.length += k.shape[1]
        return out

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.length  # only the new keys: padding among the old ones is not in the state

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._over_sequences(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._over_sequences(lambda x: x.repeat_interleave(repeats, 0))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError(_NO_WAY_BACK)

    def _over_sequences(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            kv, key_sum, key_max = self.state
            self.state = LinearAttentionState(change(kv), change(key_sum), None if key_max is None else change(key_max))


def take_layer(key: Tensor) -> _Layer | None:
    """The cache's layer whose keys these are, which waits no longer for them to be taken in."""
    layer: _Layer | None = getattr(key, "fastnlp_layer", None)
    if layer is not None:
        if not layer.waiting:
            raise RuntimeError(
                "LinearAttentionCache needs a model that attends once to the keys of a layer: take DynamicCache"
            )
        layer.waiting = False
    return layer
