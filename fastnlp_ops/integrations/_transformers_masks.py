"""The mask of linear attention in transformers: which keys count, and where texts packed in a row begin."""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

_OWN_ATTENTION = (
    "this model computes softmax attention by itself, and cannot use linear attention: "
    'take attn_implementation="sdpa" or "eager"'
)
_COMPILED = (
    "texts packed in a row need cu_seq_lens_q in a compiled model: "
    "take DataCollatorWithFlattening(return_flash_attn_kwargs=True)"
)


class KeyMask(NamedTuple):
    """The mask of linear attention. A model that reads it in another way than to pass it on gets an error.

    Never None: a model that adds its masks to scores would take that for full attention, and read the future.
    """

    causal: bool
    padding: Tensor | None = None  # [B, Tk] bool, True for keys that count
    offsets: Tensor | None = None  # [N + 1] of texts packed in rows of B * Tk tokens

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(_OWN_ATTENTION)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"the mask of linear attention has no {name}: {_OWN_ATTENTION}")

    def _refuse(self, *_: Any) -> NoReturn:
        raise ValueError(_OWN_ATTENTION)

    __getitem__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse  # type: ignore[misc]
    __and__ = __rand__ = __or__ = __ror__ = __invert__ = __neg__ = _refuse  # type: ignore[misc]
    __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = _refuse  # type: ignore[misc]


def key_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | None = None,
    **_: Any,
) -> KeyMask:
    """The mask function that transformers calls once for a forward pass."""
    if local_size is not None:
        raise ValueError(
            "sliding windows and chunks have no form in linear attention: set config.sliding_window = None "
            'and every layer type to "full_attention", or take another attn_implementation'
        )
    causal = mask_function is not bidirectional_mask_function
    offsets = None
    if causal and mask_function is not causal_mask_function:
        # Traced, transformers cannot know whether a row holds several texts, and always says that it may.
        if use_vmap or not (torch.compiler.is_compiling() or _is_packed(mask_function)):
            raise ValueError(
                "masks of [query, key] have no form in linear attention: take another attn_implementation "
                "(texts packed in a row are told by position_ids or cu_seq_lens_q)"
            )
        offsets = _packed_offsets(mask_function, batch_size, q_length, device)
    if causal and (isinstance(q_offset, Tensor) or kv_length > q_offset + q_length):
        raise ValueError(
            f"attention_mask and cache must be of the keys seen so far, got {kv_length}: caches of a fixed length are "
            "not for linear attention, take LinearAttentionCache"
        )
    padding = None if attention_mask is None else attention_mask[:, -kv_length:].bool()
    # None where all keys count: a step over a state takes no mask. One look at the values for all layers.
    if padding is not None and not torch.compiler.is_compiling() and padding.all():
        padding = None
    return KeyMask(causal, padding, offsets)


def text_offsets(position_ids: Tensor, rows: int, length: int) -> Tensor | None:
    """Where texts begin whose positions start anew, as :class:`KeyMask` has it; None where each row is one text."""
    if position_ids.dim() != 2 or position_ids.shape[1] != length or length < 2:
        return None  # of several axes, as those of images, or of other tokens
    joined = (position_ids.diff(dim=-1) == 1).expand(rows, -1)
    if torch.compiler.is_compiling():
        torch._assert_async(joined.all(), _COMPILED)
        return None
    key = None if position_ids.is_inference() else (position_ids._version, rows)
    known = getattr(position_ids, "fastnlp_offsets", None)
    if key is None or known is None or known[0] != key:
        known = key, None if joined.all() else _offsets(joined)
        position_ids.fastnlp_offsets = known  # type: ignore[attr-defined]  # one look at the values for all layers
    return known[1]


def _packed_offsets(mask: Callable[..., Any], rows: int, length: int, device: torch.device | None) -> Tensor | None:
    """The same from transformers' mask of packed texts: a text begins where a token does not see the one before."""
    row, token = torch.arange(rows, device=device)[:, None], torch.arange(1, length, device=device)
    joined = mask(row, 0, token, token - 1)
    if torch.compiler.is_compiling():
        torch._assert_async((joined & ~mask(row, 0, token - 1, token)).all(), _COMPILED)
        return None
    return _offsets(joined)


def _offsets(joined: Tensor) -> Tensor:
    """[N + 1] in the flattened rows, from [B, T - 1]: whether a token belongs to the text of the one before."""
    rows, length = joined.shape[0], joined.shape[1] + 1
    starts = torch.nn.functional.pad(~joined, (1, 0), value=True).flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([rows * length])])


def _is_packed(mask_function: Callable[..., Any]) -> bool:
    """Whether this is a causal mask within texts packed in a row: transformers' own parts of it and no others."""
    if mask_function is causal_mask_function:
        return True
    kind = mask_function.__qualname__.split(".")[0]
    if kind == "packed_sequence_mask_function":
        return True
    cells = (cell.cell_contents for cell in mask_function.__closure__ or ())
    parts = dict(zip(mask_function.__code__.co_freevars, cells, strict=True))
    if kind == "and_masks":
        return all(_is_packed(part) for part in parts["mask_functions"])
    return kind == "remap_positions_for_packed_sequence" and _is_packed(parts["mask_function"])
