"""The layer over linear_attention.py: what torch.nn.MultiheadAttention is over softmax attention."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (torch's own name for it)

from fastnlp_ops.linear_attention import linear_attention, linear_attention_step
from fastnlp_ops.linear_attention_state import LinearAttentionState


class LinearAttention(nn.MultiheadAttention):
    """Multi-head linear attention in the place of ``torch.nn.MultiheadAttention``: same call, same parameters.

    out = W_o concat_h(linear_attention(W_q x, W_k x, W_v x)_h) + b_o

    It takes the ``state_dict`` of ``nn.MultiheadAttention``, and the place of ``self_attn`` in
    ``nn.TransformerEncoderLayer`` and ``nn.TransformerDecoderLayer``. Decoding goes token by token over a state that
    does not grow: ``prefill`` reads a text, ``step`` adds a token.

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> layer, x = fastnlp_ops.LinearAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
        >>> q, k, v = (x @ layer.in_proj_weight.T + layer.in_proj_bias).unflatten(-1, (3, 2, 4)).unbind(2)
        >>> out = layer.out_proj(fastnlp_ops.linear_attention(q, k, v).flatten(2))
        >>> torch.allclose(layer(x, x, x)[0], out, atol=1e-6)
        True

    Args:
        embed_dim (int): channels of the queries and of the result, a multiple of num_heads.
        num_heads (int): heads H.
        dropout (float): 0. Linear attention has no weights that could be dropped.
        bias (bool): the projections have biases.
        add_bias_kv (bool): False; stands here for the order of arguments.
        add_zero_attn (bool): False, likewise.
        kdim (int): channels of the keys; None: embed_dim.
        vdim (int): channels of the values; None: embed_dim.
        batch_first (bool): tensors are [B, T, E] instead of [T, B, E].
        device (torch.device): of the parameters.
        dtype (torch.dtype): of the parameters.
        feature_map (str): as in :func:`linear_attention`.

    Returns:
        ``layer(query, key, value, key_padding_mask=None, need_weights=False, attn_mask=None,
        average_attn_weights=True, is_causal=False)``: (output, None), batched or not, as of ``nn.MultiheadAttention``.
        Nested tensors are taken for self-attention.
        key_padding_mask [B, Tk] has torch's meaning, which is the opposite of :func:`linear_attention`'s: True, or
        -inf in one of floats, is padding. ``is_causal`` alone makes it causal; an ``attn_mask`` may stand beside it.
        ``layer.prefill(x, state=None, key_padding_mask=None)``: (causal output, :class:`LinearAttentionState`), going
        on from a state where one is given. ``layer.step(x, state)``: output [B, E] of the token x [B, E], the state
        updated in place; without gradients.

    Raises:
        ValueError: for dropout, add_bias_kv and add_zero_attn; for need_weights, an attn_mask without is_causal, nested
            tensors in cross-attention or beside a mask; else as :func:`linear_attention`.
        TypeError: as :func:`linear_attention`.
        NotImplementedError: for ``step`` where gradients are recorded.

    Preconditions:
        An attn_mask given with is_causal is the causal one, and a key_padding_mask of floats holds 0 for keys that
        count and -inf (or a very negative number) for others: neither is read further. The hidden states of padding
        reach no result and no other token's gradient, but the gradient of the projection's weights, as in
        ``torch.nn.Linear``.

    Precision:
        Projections are those of ``torch.nn.Linear`` and obey autocast; the rest as :func:`linear_attention`. torch's
        fused inference path for encoder layers, which would compute softmax attention, is not taken.

    References:
        As :func:`linear_attention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        feature_map: str | None = "elu+1",
    ) -> None:
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        if dropout:
            raise ValueError(f"dropout must be 0, for linear attention has no weights to drop, got {dropout}")
        if add_bias_kv or add_zero_attn:
            raise ValueError("add_bias_kv and add_zero_attn must be False: linear attention adds no keys")
        super().__init__(
            embed_dim, num_heads, bias=bias, kdim=kdim, vdim=vdim, batch_first=batch_first, device=device, dtype=dtype
        )
        # nn.TransformerEncoderLayer in eval mode computes softmax attention from the weights, without a call of this
        # layer, unless one of its modules has a hook.
        self.register_forward_pre_hook(_no_fast_path)
        self.feature_map = feature_map

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,  # noqa: ARG002  (of the weights, which there are none of)
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """(output, None); the arguments are those of ``torch.nn.MultiheadAttention``."""
        if need_weights:
            raise ValueError("need_weights must be False: linear attention computes no weights")
        if attn_mask is not None and not is_causal:
            raise ValueError("attn_mask must be None, or the causal one with is_causal=True: no other is linear")
        if query.is_nested or key.is_nested or value.is_nested:
            if not (query is key and key is value and self.batch_first and key_padding_mask is None):
                raise ValueError("a nested tensor must be query, key and value in one, batch_first and without a mask")
            return self._over_nested(query, is_causal), None
        for name, x, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            self._check(name, x, width, (2, 3))
        if not query.dim() == key.dim() == value.dim():
            dims = f"{query.dim()}, {key.dim()} and {value.dim()}"
            raise ValueError(f"query, key and value must be batched or not alike, got {dims} dimensions")
        batched = query.dim() == 3
        q, k, v = self._project(query, key, value)
        out: Any = linear_attention(
            *(self._batch_first(x) if batched else x[None] for x in (q, k, v)),
            feature_map=self.feature_map,
            causal=is_causal,
            key_padding_mask=_kept(key_padding_mask, batched),
        )
        out = self.out_proj(out.flatten(2))
        return (self._batch_first(out) if batched else out[0]), None

    def _over_nested(self, x: Tensor, causal: bool) -> Tensor:
        """Self-attention of texts of several lengths, which nn.TransformerEncoder makes of padded ones in eval mode."""
        texts = x.unbind()
        lengths = [text.shape[0] for text in texts]
        packed = torch.cat(texts)[None]
        self._check("x", packed, self.embed_dim, (3,))
        out: Any = linear_attention(
            *self._project(packed, packed, packed),
            feature_map=self.feature_map,
            causal=causal,
            cu_seqlens_q=torch.tensor([0, *lengths], device=x.device).cumsum(0),
        )
        out = self.out_proj(out.flatten(2))[0]
        if x.layout == torch.jagged:
            return torch.nested.nested_tensor_from_jagged(out, x.offsets())  # type: ignore[attr-defined]
        return torch.nested.as_nested_tensor(list(out.split(lengths)))

    def prefill(
        self, x: Tensor, state: LinearAttentionState | None = None, key_padding_mask: Tensor | None = None
    ) -> tuple[Tensor, LinearAttentionState]:
        """Causal output for a text, or for the next part of one, and the state behind it; see the class."""
        self._check("x", x, self.embed_dim, (3,))
        out, state = linear_attention(
            *(self._batch_first(y) for y in self._project(x, x, x)),
            feature_map=self.feature_map,
            causal=True,
            key_padding_mask=_kept(key_padding_mask, batched=True),
            initial_state=state,
            return_state=True,
        )
        return self._batch_first(self.out_proj(out.flatten(2))), state

    def step(self, x: Tensor, state: LinearAttentionState) -> Tensor:
        """Output [B, E] of one token [B, E] after those of the state, which takes it in; see the class."""
        self._check("x", x, self.embed_dim, (2,))
        q, k, v = self._project(x, x, x)
        out = linear_attention_step(q, k, v, state, feature_map=self.feature_map)
        return self.out_proj(out.flatten(1))

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, batch_first={self.batch_first}, feature_map={self.feature_map!r}"

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k, v [..., H, D] of [..., E]; views into one projection where the three are one."""
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            projected = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            return projected.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        parts = zip((query, key, value), weights, biases, strict=True)
        return tuple(F.linear(*part).unflatten(-1, (self.num_heads, self.head_dim)) for part in parts)

    def _batch_first(self, x: Tensor) -> Tensor:
        """Between the layout of the caller and [B, T, ...], either way."""
        return x if self.batch_first else x.transpose(0, 1)

    def _check(self, name: str, x: Tensor, width: int, dims: tuple[int, ...]) -> None:
        if x.is_nested:
            raise ValueError(f"{name} must not be nested: prefill and step take padded texts")
        if x.dim() not in dims or x.shape[-1] != width:
            axes = {2: "[T, {}]", 3: "[B, T, {}]" if self.batch_first else "[T, B, {}]"}
            if dims == (2,):
                axes[2] = "[B, {}]"
            wanted = " or ".join(axes[dim].format(width) for dim in sorted(dims, reverse=True))
            raise ValueError(f"{name} must be {wanted}, got shape {tuple(x.shape)}")


def _no_fast_path(*_: Any) -> None:
    """A hook that does nothing but to be one."""


def _kept(key_padding_mask: Tensor | None, batched: bool) -> Tensor | None:
    """Torch's padding mask, True or -inf for padding, as one of keys that count."""
    if key_padding_mask is None:
        return None
    if key_padding_mask.dtype != torch.bool and not key_padding_mask.is_floating_point():
        raise TypeError(f"key_padding_mask must be bool or floating point, got {key_padding_mask.dtype}")
    mask = key_padding_mask if batched else key_padding_mask[None]
    return ~mask if mask.dtype == torch.bool else mask == 0
