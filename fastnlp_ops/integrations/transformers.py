"""Linear attention in Hugging Face models: `attn_implementation="fastnlp_linear"`, and a cache that does not grow.

    from fastnlp_ops.integrations.transformers import LinearAttentionCache, register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastnlp_linear")
    model.generate(**inputs, past_key_values=LinearAttentionCache())

The weights of a model that was trained with softmax attention want training again: it is another function. Attention
dropout must be 0 in training (`attention_dropout=0.0` beside the name, in BERT `attention_probs_dropout_prob=0.0`).
docs/transformers.md has the families that can, and what the others say.
"""

from collections.abc import Callable
from typing import Any

import transformers
from torch import Tensor, nn

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(f"fastnlp_ops.integrations.transformers needs transformers 5, found {transformers.__version__}")

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from fastnlp_ops.integrations._transformers_cache import LinearAttentionCache, take_layer
from fastnlp_ops.integrations._transformers_masks import KeyMask, key_mask, text_offsets
from fastnlp_ops.integrations._transformers_models import NAMES, check_model, guard_models, has_attention
from fastnlp_ops.linear_attention import linear_attention
from fastnlp_ops.reference.linear_attention import FEATURE_MAPS

__all__ = ["LinearAttentionCache", "register", "use_linear_attention"]

# What models hand to their attention beyond queries, keys and values that changes its result, and has no linear form.
_FOREIGN = {
    "sliding_window": "set config.sliding_window = None, or ",
    "softcap": "set config.attn_logit_softcapping = None, or ",
    "s_aux": "",
    "sinks": "",
    "position_bias": "",
    "head_mask": "",
    "indices": "",
    "block_indices": "",
    "output_attentions": "",
}


def register(name: str = "fastnlp_linear", feature_map: str | None = "elu+1") -> None:
    """Makes `name` an attention implementation of transformers: linear attention with this feature map.

    out_t = sum_j phi(q_t) . phi(k_j) v_j / sum_j phi(q_t) . phi(k_j)

    Encoders and cross-attention read all keys, decoders the past ones. Key heads are not repeated. Padding in any
    place counts for nothing, as in the model's ``attention_mask``. Texts packed in a row do not see each other: those
    of ``DataCollatorWithFlattening``, told by ``cu_seq_lens_q``, or by ``position_ids`` that start anew where
    transformers looks at them (in decoders; encoders need ``return_flash_attn_kwargs=True``). Decoding with
    transformers' own caches is right, and reads all past keys at each token; with :class:`LinearAttentionCache` a token
    takes constant time and memory. A model keeps the name in its config: ``from_pretrained`` of what it saved takes
    linear attention again, and fails where ``register`` was not called before. A model of several parts takes a
    dictionary: ``attn_implementation={"text_config": "fastnlp_linear"}``.

    Args:
        name (str): what ``attn_implementation`` says. Several maps may be registered under several names.
        feature_map (str): as in :func:`fastnlp_ops.linear_attention`.

    Returns:
        None.

    Raises:
        ValueError: for a feature map that there is none of. Models that compute their attention by themselves raise it
            where they are given the name, others at the call for what linear attention has no form for: attention
            dropout in training, sliding windows, soft caps, attention sinks, biases of positions, masks of
            [query, key], caches of a fixed length, and attention weights as output.

    Preconditions:
        ``scaling`` cancels in the normalised result. Under torch.compile ``position_ids`` that start anew are an error
        of the device (an assertion); ``cu_seq_lens_q`` is taken.
    """
    if feature_map is not None and feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map must be {', '.join(FEATURE_MAPS)} or None, got {feature_map}")
    AttentionInterface.register(name, _attention_with(feature_map))
    AttentionMaskInterface.register(name, key_mask)
    NAMES.add(name)
    guard_models()


def use_linear_attention(model: PreTrainedModel, name: str = "fastnlp_linear") -> None:
    """Gives a model that was built or loaded already linear attention, or says why it cannot have it.

    Args:
        model (PreTrainedModel): the model, which is changed in place.
        name (str): a name that :func:`register` made.

    Returns:
        None.

    Raises:
        ValueError: for a name that was not registered, and a model of which a part computes its attention by itself or
            has none; the model is as before then.
    """
    if name not in NAMES:
        raise ValueError(f"{name} is not a name of linear attention: call register({name!r}) before")
    check_model(model)
    if not has_attention(model):
        raise ValueError(f"{type(model).__name__} has no attention that could become linear attention")
    model.set_attn_implementation(name)


def _attention_with(feature_map: str | None) -> Callable[..., tuple[Tensor, None]]:
    def attention(
        module: nn.Module,
        query: Tensor,  # [B, H, Tq, D], keys and values [B, Hkv, Tk, D]
        key: Tensor,
        value: Tensor,
        attention_mask: KeyMask | Tensor | None = None,
        is_causal: bool | None = None,
        dropout: float = 0.0,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Output [B, Tq, H, D], and no weights."""
        layer = take_layer(key)
        _check_options(module, dropout, options)
        causal, mask, offsets = _read_mask(module, attention_mask, is_causal)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        past = k.shape[1] - q.shape[1] if causal else 0
        if layer is not None:
            past = layer.length
        if cu_seq_lens_q is not None:
            offsets = cu_seq_lens_q
        elif offsets is None and mask is None and causal and past == 0 and position_ids is not None:
            offsets = text_offsets(position_ids, *q.shape[:2])
        if offsets is not None:
            if layer is not None or past > 0:
                raise ValueError("texts packed in a row have no cache to be continued from: pass use_cache=False")
            return _packed(q, k, v, feature_map, causal, mask, offsets, cu_seq_lens_k), None
        if layer is not None:
            if not causal:
                raise ValueError(
                    "LinearAttentionCache is for causal attention alone: give an encoder-decoder model "
                    "EncoderDecoderCache(LinearAttentionCache(), DynamicCache())"
                )
            return layer.attend(q, k, v, mask, feature_map), None
        state = None
        if past > 0:  # from one of transformers' caches, which hold all keys
            _, state = linear_attention(
                q[:, :0],
                k[:, :past],
                v[:, :past],
                feature_map=feature_map,
                key_padding_mask=None if mask is None else mask[:, :past],
                return_state=True,
            )
            k, v = k[:, past:], v[:, past:]
            mask = None if mask is None else mask[:, past:]
        out: Any = linear_attention(
            q, k, v, feature_map=feature_map, causal=causal, key_padding_mask=mask, initial_state=state
        )
        return out, None

    return attention


def _check_options(module: nn.Module, dropout: float, options: dict[str, Any]) -> None:
    """Raises for what would change the result of softmax attention, and cannot that of linear attention."""
    for name, remedy in _FOREIGN.items():
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"{name} has no form in linear attention: {remedy}take another attn_implementation")
    if dropout:
        config = getattr(module, "config", None)
        names = [name for name in vars(config) if "att" in name and "drop" in name] if config is not None else []
        raise ValueError(
            f"attention dropout must be 0 in training, got {dropout}, for linear attention has no weights to drop: "
            f"load the model with {names[0] if names else 'attention_dropout'}=0.0"
        )


def _read_mask(
    module: nn.Module, mask: KeyMask | Tensor | None, is_causal: bool | None
) -> tuple[bool, Tensor | None, Tensor | None]:
    """Whether attention is causal, which keys count, and where packed texts begin."""
    if isinstance(mask, KeyMask):
        return mask.causal, mask.padding, mask.offsets
    if mask is not None and (mask.dim() != 2 or mask.is_floating_point()):
        form = f"{mask.dtype} of shape {tuple(mask.shape)}"
        raise ValueError(
            f"attention_mask must be [B, Tk] of bool or integers for linear attention, got {form}: masks of "
            "[query, key] have no form in it, take another attn_implementation"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and getattr(getattr(module, "config", None), "is_causal", True)
    return causal, None if mask is None else mask.bool(), None


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str | None,
    causal: bool,
    mask: Tensor | None,
    offsets: Tensor,
    offsets_k: Tensor | None,
) -> Tensor:
    """Texts in a row, each for itself: they are one row for the op, however many the model has."""
    if mask is not None:
        raise ValueError("attention_mask must be None or 1 everywhere where texts are packed in a row")
    if q.shape[:2] != k.shape[:2]:
        raise ValueError("texts packed in a row are for self-attention, and not for attention to an encoder's states")
    rows = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
    out: Any = linear_attention(
        *rows, feature_map=feature_map, causal=causal, cu_seqlens_q=offsets, cu_seqlens_k=offsets_k
    )
    return out.reshape(*q.shape[:2], *out.shape[2:])
