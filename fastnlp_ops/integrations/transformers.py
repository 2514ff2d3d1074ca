"""Linear attention in Hugging Face models: `attn_implementation="fastnlp_linear"`, and a cache that does not grow.

    from fastnlp_ops.integrations.transformers import LinearAttentionCache, register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastnlp_linear")
    model.generate(**inputs, past_key_values=LinearAttentionCache())

The weights of a model that was trained with softmax attention want training again: it is another function.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from fastnlp_ops.linear_attention import linear_attention, linear_attention_step
from fastnlp_ops.linear_attention_state import LinearAttentionState
from fastnlp_ops.reference.linear_attention import FEATURE_MAPS

# What models hand to their attention beyond queries, keys and values that changes its result, and has no linear form.
_FOREIGN = ("sliding_window", "softcap", "s_aux", "position_bias")


def register(name: str = "fastnlp_linear", feature_map: str | None = "elu+1") -> None:
    """Makes `name` an attention implementation of transformers: linear attention with this feature map.

    out_t = sum_j phi(q_t) . phi(k_j) v_j / sum_j phi(q_t) . phi(k_j)

    Encoders and cross-attention read all keys, decoders the past ones. Key heads are not repeated. Padding in any
    place counts for nothing, as in the model's ``attention_mask``. Decoding with transformers' own caches is right, and
    reads all past keys at each token; with :class:`LinearAttentionCache` a token takes constant time and memory.

    Args:
        name (str): what ``attn_implementation`` says. Several maps may be registered under several names.
        feature_map (str): as in :func:`fastnlp_ops.linear_attention`.

    Returns:
        None.

    Raises:
        ValueError: for a feature map that there is none of. The models raise it for masks and options that linear
            attention has no form for: sliding windows, soft caps, attention sinks, biases of positions, masks of
            [query, key], several texts packed in a row, and caches of a fixed length.

    Preconditions:
        Attention dropout of a config is not applied: there are no weights to drop. ``scaling`` cancels in the
        normalised result. Under torch.compile masks of [query, key], and with them texts packed in a row, are not seen.
    """
    if feature_map is not None and feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map must be {', '.join(FEATURE_MAPS)} or None, got {feature_map}")
    AttentionInterface.register(name, _attention_with(feature_map))
    AttentionMaskInterface.register(name, _mask)


class LinearAttentionCache(Cache):
    """What a causal model remembers of a text with linear attention: sums for each layer, whatever the text's length.

    For ``past_key_values`` of a model's ``forward`` and ``generate``; one for each text or batch, or ``reset()``
    between them. Beam search and ``generate`` after ``generate`` work; going back (``crop``) does not.

    Returns:
        ``cache.layers[i].state``: the :class:`fastnlp_ops.LinearAttentionState` of layer i.

    Raises:
        RuntimeError: where the model's attention is not the one that :func:`register` made.
        NotImplementedError: for ``crop``.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_Layer)


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
            sentence = (
                "LinearAttentionCache needs a model whose attn_implementation register() made: its keys were lost"
            )
            raise RuntimeError(sentence)
        self.waiting = True
        self.length += key_states.shape[-2]
        key_states.fastnlp_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, feature_map: str | None) -> Tensor:
        """Causal attention to all that the state holds and to k, v [B, T, Hkv, D], which it takes in."""
        self.waiting = False
        recorded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        if q.shape[1] == 1 and mask is None and self.state is not None and not recorded:
            out = linear_attention_step(q[:, 0], k[:, 0], v[:, 0], self.state, feature_map=feature_map)
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
            raise NotImplementedError("LinearAttentionCache cannot go back: a sum does not tell its terms")

    def _over_sequences(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            kv, key_sum, key_max = self.state
            self.state = LinearAttentionState(change(kv), change(key_sum), None if key_max is None else change(key_max))


def _attention_with(feature_map: str | None) -> Callable[..., tuple[Tensor, None]]:
    def attention(
        module: nn.Module,
        query: Tensor,  # [B, H, Tq, D], keys and values [B, Hkv, Tk, D]
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        is_causal: bool | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Output [B, Tq, H, D], and no weights."""
        for name in _FOREIGN:
            if options.get(name) is not None:
                raise ValueError(f"{name} has no form in linear attention: take another attn_implementation")
        if attention_mask is not None and attention_mask.dim() != 2:
            shape = tuple(attention_mask.shape)
            raise ValueError(f"attention_mask must be [B, Tk] for linear attention, got shape {shape}")
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = causal and getattr(getattr(module, "config", None), "is_causal", True)
        layer = getattr(key, "fastnlp_layer", None)
        if layer is not None:
            if not causal:
                raise ValueError("LinearAttentionCache is for causal attention alone")
            return layer.attend(q, k, v, attention_mask, feature_map), None
        past, state = k.shape[1] - q.shape[1] if causal else 0, None
        if past > 0:  # from one of transformers' caches, which hold all keys
            mask = None if attention_mask is None else attention_mask[:, :past]
            _, state = linear_attention(
                q[:, :0], k[:, :past], v[:, :past], feature_map=feature_map, key_padding_mask=mask, return_state=True
            )
            k, v = k[:, past:], v[:, past:]
            attention_mask = None if attention_mask is None else attention_mask[:, past:]
        out: Any = linear_attention(
            q, k, v, feature_map=feature_map, causal=causal, key_padding_mask=attention_mask, initial_state=state
        )
        return out, None

    return attention


def _mask(
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Tensor | None:
    """What the attention function gets as its mask: [B, Tk], True for keys that count, or None."""
    # Traced, transformers cannot know whether a row holds several texts, and always says that it may.
    if not torch.compiler.is_compiling() and mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise ValueError("masks of [query, key] (windows, packed texts) have no form in linear attention")
    if mask_function is causal_mask_function and (isinstance(q_offset, Tensor) or kv_length > q_offset + q_length):
        raise ValueError("caches of a fixed length are not for linear attention: take LinearAttentionCache")
    if attention_mask is None:
        return None
    mask = attention_mask[:, -kv_length:].bool()
    # None where all keys count: a step over a state takes no mask. One look at the values for all layers.
    return None if not torch.compiler.is_compiling() and mask.all() else mask
