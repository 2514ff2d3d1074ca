"""One token: the state is read, moved on and written in one launch, and answers the queries of its key head."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnlp_ops._triton.global_pointer_spans import check, check_tensor, guard
from fastnlp_ops._triton.linear_attention_rows import map_rows
from fastnlp_ops._triton.linear_attention_tiles import (
    COSINE,
    EXP,
    SOFTMAX,
    feature_map,
    load_tile,
    rescaling,
    times_exp,
)
from fastnlp_ops._triton.log_sum_exp import compute_dtype


@triton.jit
def linear_attention_step_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [B, heads * GROUP, DV]
    kv_ptr,  # [B, heads, F, DV]
    key_sum_ptr,
    key_max_ptr,
    decay_ptr,
    heads,
    q_stride_b,
    q_stride_h,
    k_stride_b,
    k_stride_h,
    v_stride_b,
    v_stride_h,
    decay_stride_b,
    decay_stride_h,
    scale: "fp64",
    eps: "fp64",
    NORMALIZE: tl.constexpr,
    MAP: tl.constexpr,
    BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
):
    """A program has a sequence and key head: key_sum, which all columns divide by, is written once they are done."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    b = (tl.program_id(0) // heads).to(tl.int64)
    compute: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    place = b * heads + head
    kv_ptr += place * (DK + BIAS) * DV
    key_sum_ptr += place * (DK + BIAS)
    inner = tl.arange(0, INNER)
    one = tl.zeros([1], tl.int64)
    there = one == 0
    bound = tl.full((), eps, compute)
    carried = tl.full((), 1.0, compute)
    if decay_ptr is not None:
        carried = tl.exp(tl.load(decay_ptr + b * decay_stride_b + head * decay_stride_h))
    k = load_tile(k_ptr + b * k_stride_b + head * k_stride_h, one, 1, there, 0, DK, INNER).to(compute)
    old = tl.full([INNER], 1.0, compute) * carried
    if MAP == EXP:
        before = tl.load(key_max_ptr + place * DK + inner, mask=inner < DK, other=float("-inf"))
        k = tl.reshape(k, [INNER])
        top = tl.maximum(before, tl.where(inner < DK, k, float("-inf")))
        old = rescaling(before, top)
        k = tl.where(top == float("-inf"), 0.0, tl.exp(k - top))
    else:
        k = tl.reshape(feature_map(k, there, 0, MAP, DK), [INNER])
    sums = tl.load(key_sum_ptr + BIAS + inner, mask=inner < DK, other=0.0) * old + k
    if BIAS:
        count = tl.load(key_sum_ptr) * carried + 1.0
    for first in range(0, DV, OUTER):
        outer = first + tl.arange(0, OUTER)
        v = tl.load(v_ptr + b * v_stride_b + head * v_stride_h + outer, mask=outer < DV, other=0.0).to(compute)
        offset = (inner[:, None] + BIAS) * DV + outer[None, :]
        where = (inner < DK)[:, None] & (outer < DV)[None, :]
        state = tl.load(kv_ptr + offset, mask=where, other=0.0)
        state = state * old[:, None] + k[:, None] * v[None, :]
        if BIAS:
            row0 = tl.load(kv_ptr + outer, mask=outer < DV, other=0.0) * carried + v
        tl.debug_barrier()  # threads that hold the same element have all read it
        tl.store(kv_ptr + offset, state, mask=where)
        if BIAS:
            tl.store(kv_ptr + outer, row0, mask=outer < DV)
        for h in range(GROUP):
            q = load_tile(q_ptr + b * q_stride_b + (head * GROUP + h) * q_stride_h, one, 1, there, 0, DK, INNER).to(
                compute
            )
            if MAP == EXP:
                a = tl.reshape(q, [INNER]) + top
                shift = tl.max(a, 0)
                shift = tl.where(shift == float("-inf"), 0.0, shift)
                a = tl.exp(a - shift)
            else:
                a = tl.reshape(feature_map(q, there, 0, MAP, DK), [INNER])
            y = tl.sum(a[:, None] * state, 0)
            z = tl.sum(a * sums, 0)
            if BIAS:
                y += row0
                z += count
            if NORMALIZE:
                if MAP == EXP:
                    y = tl.where(z == 0.0, 0.0, y / z)
                else:
                    y = y / tl.where(tl.abs(z) < bound, tl.where(z < 0.0, -bound, bound), z)
            elif MAP == EXP:
                y = times_exp(y, shift)
            y = (y * tl.full((), scale, compute)).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + ((b * heads + head) * GROUP + h) * DV + outer, y, mask=outer < DV)
    tl.debug_barrier()
    tl.store(key_sum_ptr + BIAS + inner, sums, mask=inner < DK)
    if BIAS:
        tl.store(key_sum_ptr, count)
    if MAP == EXP:
        tl.store(key_max_ptr + place * DK + inner, top, mask=inner < DK)


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor,
    key_sum: Tensor,
    key_max: Tensor | None,
    log_decay: Tensor | None,
    feature_map: int,
    normalize: bool,
    scale: float,
    eps: float,
) -> Tensor:
    """out [B, H, Dv]; kv, key_sum and key_max are written in place."""
    check(q.dim() == 3, f"q must be [B, H, Dk], got shape {tuple(q.shape)}")
    check(k.dim() == 3, f"k must be [B, Hkv, Dk], got shape {tuple(k.shape)}")
    (B, H, DK), heads, DV, compute = q.shape, k.shape[1], v.shape[-1], compute_dtype(q)
    check(heads > 0 and H % heads == 0, f"q must have a multiple of {heads} heads, got {H}")
    check(1 <= DK <= 256, f"q must have 1 to 256 channels on CUDA, got {DK}")
    F = DK + (feature_map == COSINE.value)
    exponential = feature_map in (EXP.value, SOFTMAX.value)
    check_tensor("k", k, (B, heads, DK), q.dtype, q)
    check_tensor("v", v, (B, heads, DV), q.dtype, q)
    check_tensor("kv", kv, (B, heads, F, DV), compute, q)
    check_tensor("key_sum", key_sum, (B, heads, F), compute, q)
    check(exponential == (key_max is not None), "key_max must be given for exp and softmax, and for no other map")
    check_tensor("key_max", key_max, (B, heads, DK), compute, q)
    if log_decay is not None:
        shape = (heads,) if log_decay.dim() == 1 else (B, heads)
        check_tensor("log_decay", log_decay, shape, compute, q)
        log_decay = log_decay.expand(B, heads)
    out = torch.empty(B, H, DV, dtype=v.dtype, device=v.device)
    if B * H * DV == 0:
        return out
    with guard(q):
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        if feature_map == COSINE.value:
            q, k = (map_rows(x[:, None], feature_map)[:, 0] for x in (q, k))
        if feature_map != SOFTMAX.value:
            scale = 1.0 if normalize else scale
        else:  # normalised exp, times scale where it is not to be normalised
            normalize, scale = True, 1.0 if normalize else scale
        given = [x for x in (kv, key_sum, key_max) if x is not None]
        states = [x.contiguous() for x in given]
        inner = max(16, triton.next_power_of_2(DK))
        outer = min(max(16, triton.next_power_of_2(DV)), 16384 // inner // (2 if compute == torch.float64 else 1))
        linear_attention_step_kernel[(B * heads,)](
            q, k, v, out, states[0], states[1], states[2] if exponential else None, log_decay, heads,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            *((0, 0) if log_decay is None else log_decay.stride()), scale, eps,
            NORMALIZE=normalize, MAP=EXP.value if exponential else 0 if feature_map == COSINE.value else feature_map,
            BIAS=int(feature_map == COSINE.value), GROUP=H // heads, DK=DK, DV=DV, INNER=inner, OUTER=outer,
            num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
        for x, state in zip(given, states, strict=True):
            if state is not x:
                x.copy_(state)
    return out
