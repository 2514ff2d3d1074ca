"""One call of a linear_attention op as its kernels take it: sizes, options, tiles, segments, and their launches."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
from torch import Tensor

from fastnlp_ops._triton.global_pointer_spans import check, check_tensor, precision
from fastnlp_ops._triton.linear_attention_keys import linear_attention_keys_kernel
from fastnlp_ops._triton.linear_attention_queries import linear_attention_queries_kernel
from fastnlp_ops._triton.linear_attention_rows import map_rows
from fastnlp_ops._triton.linear_attention_states import linear_attention_scan_kernel, linear_attention_sums_kernel
from fastnlp_ops._triton.linear_attention_tiles import COSINE, ELU, EXP, IDENTITY, SOFTMAX
from fastnlp_ops._triton.log_sum_exp import compute_dtype

# Tokens of a block, columns of the result that a program has, and warps: by bytes of a tile's elements, and by weight,
# for out and dv, and for dq and dk, which hold gradients of denominators besides. Weight is one for products over 128
# channels, two for 256, and more for what takes registers: cards whose warps cannot multiply from shared memory, and in
# causal passes decays, several query heads for a key, and maps other than elu+1 (relu^2 at 128 channels had 272 bytes
# on the stack in the tile of elu+1). tests/test_linear_attention_compiled.py sees what spills; causal float32 does so
# from 128 channels on, in any tile.
_TILES = {
    2: (
        ((32, 64, 4), (32, 64, 4)),
        ((32, 128, 8), (32, 64, 8)),
        ((16, 32, 8), (16, 32, 8)),
        ((16, 32, 8), (16, 16, 8)),
    ),
    4: (((16, 32, 4), (16, 32, 4)), ((16, 32, 8), (16, 32, 8))),
    8: (((16, 32, 4), (16, 32, 4)), ((16, 16, 8), (16, 16, 8))),
}
_LEAST_SEGMENT = 256  # tokens; a state of 128 x 128 is as much to write as 128 tokens are to read


def _architecture(x: Tensor) -> int:
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9


def _tile(dtype: torch.dtype, weight: int, turned: bool) -> tuple[int, int, int]:
    # float16 goes through TF32, which has as many digits, and the range of float32 for sums over tokens
    size = 4 if dtype == torch.float16 else dtype.itemsize
    return _TILES[size][min(weight, len(_TILES[size]) - 1)][turned]


def _programs(x: Tensor) -> int:
    """What fills the GPU, with a second one on each processor to hide what the first waits for."""
    return 2 * (torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132)


def _segment(tokens: int, lanes: int, programs: int) -> int:
    """Tokens of a segment, where all tokens of a batch are to be split among programs and each has `lanes` of them."""
    segment = triton.cdiv(tokens * lanes, programs)
    return max(_LEAST_SEGMENT, triton.cdiv(segment, 64) * 64)


@dataclasses.dataclass
class State:
    """kv [.., heads, F, Dv], key_sum [.., heads, F], key_max [.., heads, Dk] in exponentials; None: nothing yet."""

    kv: Tensor | None
    key_sum: Tensor | None
    key_max: Tensor | None = None

    def arguments(self, prefix: str = "") -> dict[str, Tensor | None]:
        return {f"{prefix}{field.name}_ptr": getattr(self, field.name) for field in dataclasses.fields(self)}


NOTHING = State(None, None)


@dataclasses.dataclass
class Gradients:
    """What comes from above, for each query: dout [B, T, H, Dv], a factor for it (None: a scale), the gradient of the
    denominator, and logarithms of denominators.
    """

    dout: Tensor
    scale: float
    factor: Tensor | None = None
    delta: Tensor | None = None
    logarithms: Tensor | None = None


class Call:
    """Sizes and options of one call. q, k, v are such that the kernels need no map but identity to exp."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
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
    ) -> None:
        check(q.dim() == 4, f"q must be [B, Tq, H, Dk], got shape {tuple(q.shape)}")
        check(k.dim() == 4, f"k must be [B, Tk, Hkv, Dk], got shape {tuple(k.shape)}")
        check(v.dim() == 4, f"v must be [B, Tk, Hkv, Dv], got shape {tuple(v.shape)}")
        (self.B, self.Tq, self.H, self.DK), (_, self.Tk, self.heads, self.DV) = q.shape, v.shape
        check(
            self.heads > 0 and self.H % self.heads == 0, f"q must have a multiple of {self.heads} heads, got {self.H}"
        )
        check(0 < self.DK <= 256, f"q must have 1 to 256 channels on CUDA, got {self.DK}")
        check(0 < self.DV <= 256, f"v must have 1 to 256 channels on CUDA, got {self.DV}")
        check_tensor("k", k, (self.B, self.Tk, self.heads, self.DK), q.dtype, q)
        check_tensor("v", v, (self.B, self.Tk, self.heads, self.DV), q.dtype, q)
        check(not causal or self.Tq in (0, self.Tk), f"q must have 0 or {self.Tk} tokens with causal, got {self.Tq}")
        check(not causal or feature_map != SOFTMAX.value, "softmax must not be causal")
        check(causal or log_decay is None, "log_decay must come with causal")
        self.device, self.dtype, self.compute = q.device, q.dtype, compute_dtype(q)
        self.group, self.causal, self.normalize, self.scale, self.eps = (
            self.H // self.heads,
            causal,
            normalize,
            scale,
            eps,
        )
        self.feature_map, self.bias = feature_map, int(feature_map == COSINE.value)
        self.exponential = feature_map in (EXP.value, SOFTMAX.value)
        self.map = EXP.value if self.exponential else IDENTITY.value if self.bias else feature_map
        check(not (self.exponential and log_decay is not None), "log_decay must not come with exp or softmax")

        check((cu_seqlens_q is None) == (cu_seqlens_k is None), "cu_seqlens_q and cu_seqlens_k must be given together")
        self.cu_seqlens_q, self.cu_seqlens_k, self.N = cu_seqlens_q, cu_seqlens_k, self.B
        if cu_seqlens_q is not None and cu_seqlens_k is not None:
            check(self.B == 1, f"packed sequences must be [1, T, H, Dk], got B = {self.B}")
            check(mask is None, "key_padding_mask must not come with cu_seqlens")
            check(cu_seqlens_q.dim() == 1, f"cu_seqlens_q must be [N + 1], got shape {tuple(cu_seqlens_q.shape)}")
            for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
                check(x.dtype in (torch.int32, torch.int64), f"{name} must be int32 or int64, got {x.dtype}")
                check_tensor(name, x, tuple(cu_seqlens_q.shape), x.dtype, q)
            self.N = cu_seqlens_q.shape[0] - 1
            self.cu_seqlens_q, self.cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        check_tensor("key_padding_mask", mask, (self.B, self.Tk), torch.bool, q)
        self.mask = None if mask is None else mask.contiguous().view(torch.uint8)
        if log_decay is not None:
            shape = (self.heads,) if log_decay.dim() == 1 else (self.B, self.Tk, self.heads)
            check_tensor("log_decay", log_decay, shape, self.compute, q)
            self.decay_shape = shape
            log_decay = log_decay.expand(self.B, self.Tk, self.heads)
        self.log_decay = log_decay

        self.F = self.DK + self.bias
        given = {"initial_kv": initial_kv is not None, "initial_key_sum": initial_key_sum is not None}
        check(len(set(given.values())) == 1, "initial_kv and initial_key_sum must be given together")
        check(
            (initial_key_max is not None) == (self.exponential and initial_kv is not None),
            "initial_key_max must be given with the initial state of exp and softmax, and with no other",
        )
        check_tensor("initial_kv", initial_kv, (self.N, self.heads, self.F, self.DV), self.compute, q)
        check_tensor("initial_key_sum", initial_key_sum, (self.N, self.heads, self.F), self.compute, q)
        check_tensor("initial_key_max", initial_key_max, (self.N, self.heads, self.DK), self.compute, q)
        initial = (x if x is None else x.contiguous() for x in (initial_kv, initial_key_sum, initial_key_max))
        self.initial = State(*initial)

        self.raw = tuple(x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        self.q, self.k, self.v = self.raw
        if self.feature_map in (SOFTMAX.value, COSINE.value):
            self.q = map_rows(self.q, feature_map)
        if self.feature_map == COSINE.value:
            self.k = map_rows(self.k, feature_map, self.mask)

    def without_queries(self) -> None:
        """Makes a call that has keys alone one whose queries are 0."""
        self.q = self.q.new_zeros(1, 1, 1, self.DK).expand(self.B, self.Tk, self.H, self.DK)
        self.Tq, self.cu_seqlens_q = self.Tk, self.cu_seqlens_k

    def state(self, *shape: int) -> State:
        """Memory for states [*shape, heads, ..]."""
        kv = torch.empty(*shape, self.heads, self.F, self.DV, dtype=self.compute, device=self.device)
        key_sum = kv.new_empty(*shape, self.heads, self.F)
        return State(kv, key_sum, kv.new_empty(*shape, self.heads, self.DK) if self.exponential else None)

    def _launch(
        self, kernel: Any, tokens: int, cu_seqlens: Tensor | None, segment: int, turned: bool, **arguments: Any
    ) -> None:
        """A program for each segment, key head and block of the result's columns: of v, or turned of k."""
        inner, outer, block, warps = self.tile(turned)
        width = self.DK if turned else self.DV
        columns = triton.cdiv(width, outer)
        decay = self.log_decay if self.causal else None
        grid = (self.slots(tokens, cu_seqlens, segment) * self.heads * columns,)
        try:
            kernel[grid](
                k_ptr=self.k, v_ptr=self.v, decay_ptr=decay, cu_ptr=cu_seqlens, tokens=tokens, segment=segment,
                segments=triton.cdiv(max(tokens, 1), segment), sequences=self.N, heads=self.heads, columns=columns,
                **_strides("q", arguments["q_ptr"]), **_strides("k", self.k), **_strides("v", self.v),
                **_strides("decay", decay), BIAS=self.bias, GROUP=self.group, DK=self.DK, DV=self.DV, INNER=inner,
                OUTER=outer, BLOCK=block, PRECISION="tf32" if self.dtype == torch.float16 else precision(self.dtype),
                num_warps=warps, num_stages=2, enable_fp_fusion=True, **arguments,
            )  # fmt: skip
        except triton.OutOfResources as error:
            raise RuntimeError(
                f"linear_attention of {self.DK} and {self.DV} channels in {self.dtype} needs {error.required} bytes of "
                f"{error.name}, this GPU has {error.limit}; bfloat16 needs less"
            ) from error

    def tile(self, turned: bool) -> tuple[int, int, int, int]:
        """Channels that a product is taken over, columns of the result in a program, tokens of a block, warps."""
        inner, outer = (max(16, triton.next_power_of_2(width)) for width in (self.DK, self.DV))
        if turned:
            inner, outer = outer, inner
        weight = max(0, inner.bit_length() - 7) + {9: 0, 10: 0, 12: 2}.get(_architecture(self.q), 1)
        heavy = self.log_decay is not None or self.map != ELU.value or self.group > 1
        weight += bool(self.causal and heavy)
        block, columns, warps = _tile(self.dtype, weight, turned)
        columns = min(columns, outer)
        if columns < 8 * warps:
            block = 16  # else warps would share the rows, and each hold those of several
        return inner, columns, block, warps

    def slots(self, tokens: int, cu_seqlens: Tensor | None, segment: int) -> int:
        if cu_seqlens is None:
            return self.B * triton.cdiv(max(tokens, 1), segment)
        return tokens // segment + self.N

    def whole(self, tokens: int, width: int) -> int:
        """Tokens of a causal pass's segments: all, in one kernel, or fewer where that would leave the GPU idle."""
        lanes = self.heads * triton.cdiv(width, 64)
        if self.N * lanes >= _programs(self.q):
            return tokens + 1
        segment = _segment(self.B * tokens, lanes, _programs(self.q))
        return segment if segment < tokens else tokens + 1

    def part(self, tokens: int, width: int) -> int:
        """Tokens of the segments of a pass in which no token waits for another."""
        return _segment(self.B * tokens, self.heads * triton.cdiv(width, 64), _programs(self.q))

    def sums(
        self, start: State, segment: int, above: Gradients | None = None, last: State | None = None,
        as_map: int | None = None,
    ) -> State:  # fmt: skip
        """Sums over keys, or with what comes from above over queries. The states before each segment (behind, of
        queries), or those after all in `last`.
        """
        queries = above is not None
        tokens, cu_seqlens = (self.Tq, self.cu_seqlens_q) if queries else (self.Tk, self.cu_seqlens_k)
        slots = self.slots(tokens, cu_seqlens, segment)
        state = self.state(slots)
        as_map = self.map if as_map is None else as_map
        total = self.q.new_empty(slots, self.heads, dtype=self.compute) if self.log_decay is not None else None
        above = above or Gradients(self.v, 1.0)
        self._launch(
            linear_attention_sums_kernel, tokens, cu_seqlens, segment, False, q_ptr=self.q,
            dout_ptr=above.dout, normalizer_ptr=above.logarithms, factor_ptr=above.factor, delta_ptr=above.delta,
            mask_ptr=self.mask if self.causal or not queries else None, total_ptr=total, scale=above.scale,
            QUERIES=queries, MAP=as_map, **state.arguments(),
        )  # fmt: skip
        outer, rows = max(16, triton.next_power_of_2(self.DV)), 16
        columns = triton.cdiv(self.F, rows)
        linear_attention_scan_kernel[(self.N * self.heads * columns,)](
            total_ptr=total, cu_ptr=cu_seqlens, tokens=tokens, segment=segment,
            segments=triton.cdiv(max(tokens, 1), segment), sequences=self.N, heads=self.heads, columns=columns,
            REVERSE=queries, MAP=as_map, F=self.F, DV=self.DV, ROWS=rows, OUTER=outer, num_warps=4,
            enable_fp_fusion=True, **state.arguments(), **start.arguments("start_"),
            **(last or NOTHING).arguments("last_"),
        )  # fmt: skip
        return last or state

    def queries(
        self, result: Tensor, state: State, segment: int, *, normalizer: Tensor | None = None, scale: float = 1.0,
        above: Gradients | None = None, last: State = NOTHING, normalize: bool = False, as_map: int | None = None,
    ) -> None:  # fmt: skip
        """out, or with what comes from above dq, of queries that read the state."""
        gradient = above is not None
        above = above or Gradients(self.v, scale, logarithms=normalizer)
        self._launch(
            linear_attention_queries_kernel, self.Tq, self.cu_seqlens_q, segment, gradient, q_ptr=self.q,
            dout_ptr=above.dout, result_ptr=result, normalizer_ptr=above.logarithms, factor_ptr=above.factor,
            delta_ptr=above.delta, mask_ptr=self.mask if self.causal else None, scale=above.scale, eps=self.eps,
            GRADIENT=gradient, CAUSAL=self.causal, NORMALIZE=normalize, MAP=self.map if as_map is None else as_map,
            **state.arguments(), **last.arguments("last_"),
        )  # fmt: skip

    def keys(
        self, result: Tensor, state: State, segment: int, above: Gradients, *, of_keys: bool, last: State = NOTHING,
        products: Tensor | None = None,
    ) -> None:  # fmt: skip
        """dv or dk of keys and values that read the sums of queries."""
        self._launch(
            linear_attention_keys_kernel, self.Tk, self.cu_seqlens_k, segment, of_keys, q_ptr=self.q,
            dout_ptr=above.dout, result_ptr=result, normalizer_ptr=above.logarithms, factor_ptr=above.factor,
            delta_ptr=above.delta, products_ptr=products, mask_ptr=self.mask, batch=self.B, scale=above.scale,
            OF_KEYS=of_keys, CAUSAL=self.causal, MAP=self.map, **state.arguments(), **last.arguments("last_"),
        )  # fmt: skip


def _strides(name: str, x: Tensor | None) -> dict[str, int]:
    strides = (0, 0, 0) if x is None else x.stride()[:3]
    return {f"{name}_stride_{axis}": stride for axis, stride in zip("bth", strides, strict=True)}
