"""The GlobalPointer layers: a projection of hidden states and the functions of global_pointer.py over it."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from fastnlp_ops.global_pointer import global_pointer_decode, global_pointer_loss, global_pointer_scores
from fastnlp_ops.global_pointer_state_dict import convert_global_pointer_state_dict


class _SpanHead(nn.Module):
    """What both layers are, the projection aside."""

    _efficient: ClassVar[bool]

    def __init__(
        self, hidden_size: int, heads: int, head_size: int, rope: bool, tril_mask: bool, use_bias: bool
    ) -> None:
        for name, size in (("hidden_size", hidden_size), ("heads", heads), ("head_size", head_size)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if rope and head_size % 2:
            raise ValueError(f"head_size must be even where rope is on, got {head_size}")
        super().__init__()
        self.hidden_size = hidden_size
        self.heads = heads
        self.head_size = head_size
        self.rope = rope
        self.tril_mask = tril_mask
        self.use_bias = use_bias

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(q, k, start_bias, end_bias) as the functions take them; views into one projection."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        max_span_length: int | None = None,
    ) -> Tensor:
        """Scores [B, H, start, end] of all spans; see :func:`global_pointer_scores`."""
        q, k, start_bias, end_bias = self.project(hidden_states)
        return global_pointer_scores(
            q,
            k,
            start_bias=start_bias,
            end_bias=end_bias,
            rope=self.rope,
            position_ids=position_ids,
            mask=mask,
            tril_mask=self.tril_mask,
            max_span_length=max_span_length,
        )

    def loss(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        max_span_length: int | None = None,
        reduction: str = "mean",
        mask_zero: bool = False,
    ) -> Tensor:
        """Loss of the labelled spans, without the scores of all spans; see :func:`global_pointer_loss`."""
        q, k, start_bias, end_bias = self.project(hidden_states)
        return global_pointer_loss(
            q,
            k,
            labels,
            start_bias=start_bias,
            end_bias=end_bias,
            rope=self.rope,
            position_ids=position_ids,
            mask=mask,
            tril_mask=self.tril_mask,
            max_span_length=max_span_length,
            reduction=reduction,
            mask_zero=mask_zero,
        )

    def decode(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        max_span_length: int | None = None,
        threshold: float = 0.0,
        top_k: int | None = None,
        max_spans: int | None = None,
        nested: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Spans above the threshold and their scores; see :func:`global_pointer_decode`."""
        q, k, start_bias, end_bias = self.project(hidden_states)
        return global_pointer_decode(
            q,
            k,
            start_bias=start_bias,
            end_bias=end_bias,
            rope=self.rope,
            position_ids=position_ids,
            mask=mask,
            tril_mask=self.tril_mask,
            max_span_length=max_span_length,
            threshold=threshold,
            top_k=top_k,
            max_spans=max_spans,
            nested=nested,
        )

    def load_peer_state_dict(self, state_dict: Mapping[str, Any], layout: str, *, prefix: str = "") -> None:
        """Takes the parameters of another package's layer; see :func:`convert_global_pointer_state_dict`."""
        converted = convert_global_pointer_state_dict(
            state_dict, layout, efficient=self._efficient, use_bias=self.use_bias, prefix=prefix
        )
        for name, own in self.state_dict().items():
            if converted[name].shape != own.shape:
                shape = tuple(converted[name].shape)
                raise ValueError(f"{name} must be {list(own.shape)} for this layer, got shape {shape} from {layout}")
        self.load_state_dict(converted)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, head_size={self.head_size}, rope={self.rope}, tril_mask={self.tril_mask}"

    def _check(self, hidden_states: Tensor) -> None:
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.hidden_size:
            shape = tuple(hidden_states.shape)
            raise ValueError(f"hidden_states must be [B, n, {self.hidden_size}], got shape {shape}")


class GlobalPointer(_SpanHead):
    """Span scoring with a query and a key of its own for each head: named entities, nested ones included, relations.

    s[b, h, i, j] = rope(q_h)[b, i] . rope(k_h)[b, j] / sqrt(d); i is the start of the span, j its end, inclusive

    The parameters are those of bert4keras and bert4torch, and mean the same: ``dense.weight`` [2 H d, hidden_size] and
    ``dense.bias`` [2 H d], head after head, d rows of the query before d rows of the key.

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> layer, x = fastnlp_ops.GlobalPointer(8, heads=3, head_size=4), torch.randn(2, 5, 8)
        >>> q, k = layer.dense(x).reshape(2, 5, 3, 2, 4).unbind(3)
        >>> torch.allclose(layer(x), fastnlp_ops.global_pointer_scores(q, k))
        True

    Args:
        hidden_size (int): channels of the hidden states.
        heads (int): span types H, at least 1.
        head_size (int): channels d of a query or a key; even where rope is on.
        rope (bool): rotate queries and keys by their positions, so that a score knows how far apart its ends are.
            False for the relation heads of GPLinker.
        tril_mask (bool): a span does not end before it starts. False for the relation heads of GPLinker.
        use_bias (bool): the projection has a bias.

    Returns:
        ``layer(hidden_states, mask=None, *, position_ids, max_span_length)``: scores [B, H, n, n], -inf at cells that
        are not valid. ``layer.loss(hidden_states, labels, mask=None, *, ..., reduction, mask_zero)``: the loss, without
        that tensor. ``layer.decode(hidden_states, mask=None, *, ..., threshold, top_k, max_spans, nested)``: (spans
        int64 [M, 4], scores [M]). ``layer.project(hidden_states)``: (q, k, start_bias, end_bias) for the functions,
        such as :func:`global_pointer_divergence` and :func:`gplinker_decode`.

    Raises:
        ValueError: for sizes below 1, an odd head_size with rope, hidden states that are not [B, n, hidden_size]; else
            as :func:`global_pointer_scores`, :func:`global_pointer_loss` and :func:`global_pointer_decode`.

    Preconditions:
        Masked tokens are projected like others: NaN in their hidden states reaches no score, no loss and no other
        token's gradient, but the gradient of the projection's weights, as it would in ``torch.nn.Linear``.

    Precision:
        The projection is that of ``torch.nn.Linear`` and obeys autocast; the rest as :func:`global_pointer_loss`.

    References:
        Su, Murtadha, Pan, Hou, Sun, Huang, Wen, Liu: Global Pointer: Novel Efficient Span-based Approach for Named
        Entity Recognition. arXiv 2208.03054, 2022.
    """

    _efficient = False

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        head_size: int,
        rope: bool = True,
        tril_mask: bool = True,
        use_bias: bool = True,
    ) -> None:
        super().__init__(hidden_size, heads, head_size, rope, tril_mask, use_bias)
        self.dense = nn.Linear(hidden_size, 2 * heads * head_size, bias=use_bias)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """(q, k, None, None): views [B, n, H, d] into one projection."""
        self._check(hidden_states)
        q, k = self.dense(hidden_states).unflatten(-1, (self.heads, 2, self.head_size)).unbind(-2)
        return q, k, None, None


class EfficientGlobalPointer(_SpanHead):
    """Span scoring with one query and key for all heads, and a bias for each head at each end: cheap for many types.

    y = W x + b;  s[b, h, i, j] = rope(y_even)[b, i] . rope(y_odd)[b, j] / sqrt(d) + start_h[b, i] + end_h[b, j]

    The biases are half of another linear layer of y. A further head costs 4 d parameters, one of :class:`GlobalPointer`
    2 d hidden_size. The parameters mean what bert4keras' mean: ``dense.weight`` [2 d, hidden_size] has queries in its
    even and keys in its odd rows; ``bias_dense.weight`` [2 H, 2 d] (bert4keras: ``q_dense``) has, for each head, the
    bias of the end before that of the start. Other packages keep tensors of the same shapes in another order, which
    ``layer.load_peer_state_dict`` knows; keys are named like none of theirs, so that ``load_state_dict`` takes none by
    mistake.

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> layer, x = fastnlp_ops.EfficientGlobalPointer(8, heads=3, head_size=4), torch.randn(2, 5, 8)
        >>> y = layer.dense(x)
        >>> biases = layer.bias_dense(y) / 2
        >>> dot = fastnlp_ops.global_pointer_scores(y[:, :, None, 0::2], y[:, :, None, 1::2])
        >>> start, end = biases[..., 1::2].mT[:, :, :, None], biases[..., 0::2].mT[:, :, None, :]
        >>> torch.allclose(layer(x), dot + start + end, atol=1e-6)
        True

    Args:
        hidden_size (int): channels of the hidden states.
        heads (int): span types H, at least 1.
        head_size (int): channels d of the query and the key; even where rope is on.
        rope (bool): rotate query and key by their positions; the biases stay as they are.
        tril_mask (bool): a span does not end before it starts.
        use_bias (bool): the linear layers have biases.
        bias_from_hidden (bool): the biases of the heads are a linear layer of the hidden states instead of y, as in
            xhw205's layer; ``bias_dense.weight`` is [2 H, hidden_size].

    Returns:
        As :class:`GlobalPointer`; ``layer.project`` returns q and k [B, n, 1, d] and biases [B, n, H].

    Raises:
        ValueError: as :class:`GlobalPointer`.

    Precision:
        As :class:`GlobalPointer`.

    References:
        Su: Efficient GlobalPointer. kexue.fm/archives/8877, 2022. Su et al.: Global Pointer. arXiv 2208.03054, 2022,
        equations (8)-(10).
    """

    _efficient = True

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        head_size: int,
        rope: bool = True,
        tril_mask: bool = True,
        use_bias: bool = True,
        *,
        bias_from_hidden: bool = False,
    ) -> None:
        super().__init__(hidden_size, heads, head_size, rope, tril_mask, use_bias)
        self.bias_from_hidden = bias_from_hidden
        self.dense = nn.Linear(hidden_size, 2 * head_size, bias=use_bias)
        self.bias_dense = nn.Linear(hidden_size if bias_from_hidden else 2 * head_size, 2 * heads, bias=use_bias)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(q, k, start_bias, end_bias): [B, n, 1, d] and [B, n, H], views into two projections."""
        self._check(hidden_states)
        projected = self.dense(hidden_states)
        q, k = projected[:, :, None, 0::2], projected[:, :, None, 1::2]
        biases = self.bias_dense(hidden_states if self.bias_from_hidden else projected) / 2
        return q, k, biases[..., 1::2], biases[..., 0::2]

    def load_peer_state_dict(self, state_dict: Mapping[str, Any], layout: str, *, prefix: str = "") -> None:
        """Takes the parameters of another package's layer; see :func:`convert_global_pointer_state_dict`."""
        # Shapes would not tell the two functions apart where hidden_size is 2 head_size.
        if layout == "xhw205" and not self.bias_from_hidden:
            raise ValueError("layout xhw205 makes biases from the hidden states: the layer needs bias_from_hidden=True")
        if layout != "xhw205" and self.bias_from_hidden:
            raise ValueError(f"bias_from_hidden=True is the form of layout xhw205 alone, got {layout!r}")
        super().load_peer_state_dict(state_dict, layout, prefix=prefix)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", bias_from_hidden=True" if self.bias_from_hidden else "")
