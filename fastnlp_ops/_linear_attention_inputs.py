"""Argument checks of the linear attention functions, and the form in which the ops take the arguments."""

from typing import Any

import torch
from torch import Tensor

from fastnlp_ops._layout import check_dense
from fastnlp_ops.linear_attention_state import LinearAttentionState
from fastnlp_ops.reference.linear_attention import EXPONENTIAL, FEATURE_MAPS, causal_softmax, compute_dtype

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _check_shape(name: str, x: Tensor, axes: tuple[str, ...], sizes: tuple[int | None, ...]) -> None:
    """Raises unless x has these axes; a size of None is any."""
    check_dense(name, x)
    if x.dim() == len(axes) and all(size is None or size == found for size, found in zip(sizes, x.shape, strict=True)):
        return
    wanted = f"[{', '.join(axes)}]"
    if any(size is not None for size in sizes):
        wanted += f" = ({', '.join(a if s is None else str(s) for a, s in zip(axes, sizes, strict=True))})"
    raise ValueError(f"{name} must be {wanted}, got shape {tuple(x.shape)}")


def _check_like(name: str, x: Tensor, dtype: torch.dtype, q: Tensor) -> None:
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} where q is {q.dtype}, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")


def _check_projections(q: Tensor, k: Tensor, v: Tensor, tokens: bool) -> None:
    """q [B, Tq, H, Dk], k [B, Tk, Hkv, Dk] and v [B, Tk, Hkv, Dv], or of one token each."""

    def axes(text: str) -> tuple[str, ...]:
        return tuple(axis for axis in text.split() if tokens or axis[0] != "T")

    _check_shape("q", q, axes("B Tq H Dk"), (None,) * (4 if tokens else 3))
    B, Dk = q.shape[0], q.shape[-1]
    _check_shape("k", k, axes("B Tk Hkv Dk"), (B, None, None, Dk) if tokens else (B, None, Dk))
    _check_shape("v", v, axes("B Tk Hkv Dv"), (*k.shape[:-1], None))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[-2] == 0 or x.shape[-1] == 0:
            raise ValueError(f"{name} must have at least one head and one channel, got shape {tuple(x.shape)}")
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(f"q must have a multiple of the heads of k, {k.shape[-2]}, got {q.shape[-2]}")
    if q.dtype not in _FLOATS:
        raise TypeError(f"q must be float32, float64, float16 or bfloat16, got {q.dtype}")
    _check_like("k", k, q.dtype, q)
    _check_like("v", v, q.dtype, q)


def _check_options(feature_map: str | None, eps: float) -> None:
    if feature_map is not None and feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map must be {', '.join(FEATURE_MAPS)} or None, got {feature_map}")
    if not eps > 0:
        raise ValueError(f"eps must be above 0, got {eps}")


def _check_cu_seqlens(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> None:
    if q.shape[0] != 1:
        raise ValueError(f"q must be [1, Tq, H, Dk] where cu_seqlens are given, got shape {tuple(q.shape)}")
    if (cu_seqlens_q is None or cu_seqlens_k is None) and q.shape[1] != k.shape[1]:
        lacking = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise ValueError(f"{lacking} must be given where q and k differ in length, got {q.shape[1]} and {k.shape[1]}")
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if x is None:
            continue
        check_dense(name, x)
        if x.dim() != 1 or x.shape[0] == 0:
            raise ValueError(f"{name} must be [N + 1], got shape {tuple(x.shape)}")
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        _check_shape("cu_seqlens_k", cu_seqlens_k, ("N + 1",), (cu_seqlens_q.shape[0],))


def _check_log_decay(log_decay: Tensor, q: Tensor, k: Tensor, feature_map: str | None) -> None:
    if feature_map in EXPONENTIAL:
        raise ValueError(f"log_decay must be None where feature_map is {feature_map}")
    check_dense("log_decay", log_decay)
    shapes = [("Hkv",), ("B", "T", "Hkv")] if k.dim() == 4 else [("Hkv",), ("B", "Hkv")]
    sizes = [tuple(k.shape[-2:-1]), tuple(k.shape[:-1])]
    # By the number of axes first: to compare a size of another axis would make a symbolic one a constant.
    if not any(log_decay.dim() == len(size) and tuple(log_decay.shape) == size for size in sizes):
        kinds = " or ".join(f"[{', '.join(axes)}] = {size}" for axes, size in zip(shapes, sizes, strict=True))
        raise ValueError(f"log_decay must be {kinds}, got shape {tuple(log_decay.shape)}")
    _check_like("log_decay", log_decay, compute_dtype(q), q)


def _check_state(
    name: str, state: LinearAttentionState, sequences: int, q: Tensor, k: Tensor, v: Tensor, feature_map: str | None
) -> None:
    if not isinstance(state, tuple) or len(state) != 3:
        raise TypeError(f"{name} must be a LinearAttentionState, got {type(state).__name__}")
    kv, key_sum, key_max = state
    heads, Dk, Dv = k.shape[-2], k.shape[-1], v.shape[-1]
    F = Dk + 1 if feature_map == "cosine+1" else Dk
    _check_shape(f"{name}.kv", kv, ("N", "Hkv", "F", "Dv"), (sequences, heads, F, Dv))
    _check_shape(f"{name}.key_sum", key_sum, ("N", "Hkv", "F"), (sequences, heads, F))
    if feature_map not in EXPONENTIAL:
        if key_max is not None:
            raise ValueError(f"{name}.key_max must be None where feature_map is {feature_map}")
    elif key_max is None:
        raise ValueError(f"{name}.key_max must be given where feature_map is {feature_map}")
    else:
        _check_shape(f"{name}.key_max", key_max, ("N", "Hkv", "Dk"), (sequences, heads, Dk))
    for part, x in (("kv", kv), ("key_sum", key_sum), ("key_max", key_max)):
        if x is not None:
            _check_like(f"{name}.{part}", x, compute_dtype(q), q)


def alike(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast tensors of several dtypes become those of its dtype; others stay as they are."""
    mixed = q.dtype != k.dtype or q.dtype != v.dtype
    if mixed and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        return q.to(dtype), k.to(dtype), v.to(dtype)
    return q, k, v


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def kernel_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str | None,
    causal: bool,
    normalize: bool,
    scale: float | None,
    eps: float,
    key_padding_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    log_decay: Tensor | None,
    initial_state: LinearAttentionState | None,
) -> tuple[Any, ...]:
    """The arguments of op linear_attention, checked, and the factor that its output takes."""
    q, k, v = alike(q, k, v)
    _check_projections(q, k, v, tokens=True)
    _check_options(feature_map, eps)
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"q and k must be of one length where causal is on, got {q.shape[1]} and {k.shape[1]}")
    sequences = q.shape[0]
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        if key_padding_mask is not None:
            raise ValueError("key_padding_mask must be None where cu_seqlens are given")
        _check_cu_seqlens(q, k, cu_seqlens_q, cu_seqlens_k)
        given = [x.to(torch.int64).contiguous() for x in (cu_seqlens_q, cu_seqlens_k) if x is not None]
        cu_seqlens_q, cu_seqlens_k = given[0], given[-1]
        sequences = cu_seqlens_q.shape[0] - 1
    if key_padding_mask is not None:
        _check_shape("key_padding_mask", key_padding_mask, ("B", "Tk"), tuple(k.shape[:2]))
        _check_like("key_padding_mask", key_padding_mask, torch.bool, q)
        key_padding_mask = key_padding_mask.contiguous()
    if log_decay is not None:
        if not causal:
            raise ValueError("log_decay must be None where causal is off")
        _check_log_decay(log_decay, q, k, feature_map)
        log_decay = log_decay.contiguous()
    state: tuple[Tensor | None, ...] = (None, None, None)
    if initial_state is not None:
        _check_state("initial_state", initial_state, sequences, q, k, v, feature_map)
        state = tuple(None if x is None else x.contiguous() for x in initial_state)
    name, factor = feature_map or "identity", 1.0
    if causal and name == "softmax":
        name, normalize, factor = causal_softmax(q, normalize, scale)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    tensors = (_adjacent(q), _adjacent(k), _adjacent(v), key_padding_mask, cu_seqlens_q, cu_seqlens_k, log_decay)
    return (*tensors, *state, FEATURE_MAPS.index(name), causal, normalize, scale, float(eps)), factor


def step_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearAttentionState,
    feature_map: str | None,
    normalize: bool,
    scale: float | None,
    eps: float,
    log_decay: Tensor | None,
) -> tuple[Any, ...]:
    """The arguments of op linear_attention_step, checked, and the factor that its output takes."""
    q, k, v = alike(q, k, v)
    _check_projections(q, k, v, tokens=False)
    _check_options(feature_map, eps)
    _check_state("state", state, q.shape[0], q, k, v, feature_map)
    for part, x in zip(state._fields, state, strict=True):
        if x is not None and not x.is_contiguous():
            raise ValueError(f"state.{part} must be contiguous: it is updated in place")
    if log_decay is not None:
        _check_log_decay(log_decay, q, k, feature_map)
        log_decay = log_decay.contiguous()
    name, factor = feature_map or "identity", 1.0
    if name == "softmax":
        name, normalize, factor = causal_softmax(q, normalize, scale)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    tensors = (_adjacent(q), _adjacent(k), _adjacent(v), *state, log_decay)
    return (*tensors, FEATURE_MAPS.index(name), normalize, scale, float(eps)), factor
