"""One call of a GlobalPointer op as its kernels take it: sizes, options, and q and k prepared for tiles.

q and k are rotated once per call and written to [B, Hq, padded, D]: padded to whole blocks and to a power of two of
channels, zeros where tokens are masked, so that tiles are loaded without conditions. That reads and writes q and k
once. To rotate in the tiles would do it again for each pair of blocks, and keep their loads from being fetched ahead.
"""

import contextlib
import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnlp_ops._triton.global_pointer_tiles import SIZES
from fastnlp_ops._triton.log_sum_exp import compute_dtype
from fastnlp_ops._triton.rotation import cos_sin, rotate


@triton.jit(do_not_specialize=SIZES)
def global_pointer_prepare_kernel(
    q_ptr,
    k_ptr,
    prepared_ptr,  # [2, B, heads, padded, D]
    mask_ptr,
    extents_ptr,  # [B, 2]
    positions_ptr,
    n,
    padded,
    heads,
    groups,
    batch,
    q_stride_b,
    q_stride_n,
    q_stride_h,
    k_stride_b,
    k_stride_n,
    k_stride_h,
    shrink: tl.float64,
    ROPE: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    blocks = tl.cdiv(padded, ROWS)
    block = tl.program_id(0) % blocks
    group = (tl.program_id(0) // blocks) % groups
    b = (tl.program_id(0) // (blocks * groups)).to(tl.int64)
    dtype: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    there = row < n
    if mask_ptr is not None:
        there = there & (tl.load(mask_ptr + b * n + row, mask=there, other=0) != 0)
        if (block == 0) & (group == 0):
            _store_extent(mask_ptr + b * n, extents_ptr + b * 2, n)
    if ROPE:
        if positions_ptr is None:
            position = row
        else:
            position = tl.load(positions_ptr + b * n + row, mask=there, other=0)
        cos, sin = cos_sin(position, 0, SIZE, D, dtype)
    factor = tl.full((), shrink, dtype)
    channel = tl.arange(0, D)
    filled = there[:, None] & (channel < SIZE)[None, :]
    for h in range(group * GROUP, tl.minimum(group * GROUP + GROUP, heads)):
        for side in tl.static_range(2):
            if side == 0:
                source = q_ptr + b * q_stride_b + row * q_stride_n + h * q_stride_h
            else:
                source = k_ptr + b * k_stride_b + row * k_stride_n + h * k_stride_h
            x = tl.load(source[:, None] + channel[None, :], mask=filled, other=0.0).to(dtype)
            if ROPE:
                x = rotate(x, cos, sin)
            target = prepared_ptr + (((side * batch + b) * heads + h) * padded + row) * D
            x = (x * factor).to(prepared_ptr.dtype.element_ty)
            tl.store(target[:, None] + channel[None, :], x, mask=(row < padded)[:, None])


@triton.jit
def _store_extent(mask_ptr, extent_ptr, n):
    """Index of the first and of the last token that is on; n and -1 where none is."""
    first = n + tl.full((), 0, tl.int32)
    last = tl.full((), -1, tl.int32)
    for start in range(0, n, 1024):
        token = start + tl.arange(0, 1024)
        on = tl.load(mask_ptr + token, mask=token < n, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(on, token, n), 0))
        last = tl.maximum(last, tl.max(tl.where(on, token, -1), 0))
    tl.store(extent_ptr, first)
    tl.store(extent_ptr + 1, last)


def check(holds: bool, sentence: str) -> None:
    """What protects memory where an op is called without its public function."""
    if not holds:
        raise ValueError(sentence)


def check_tensor(name: str, x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, q: Tensor) -> None:
    if x is not None:
        check(tuple(x.shape) == shape, f"{name} must have shape {shape}, got shape {tuple(x.shape)}")
        check(x.dtype == dtype, f"{name} must be {dtype}, got {x.dtype}")
        check(x.device == q.device, f"{name} must be on the device of q, {q.device}, got {x.device}")


# Up to how many channels the tiles of an op are 64 wide, and not 32: half precision, the same with heads that share q
# and k, and float32. Read off what ptxas makes of the kernels: the widest that keep everything in registers.
_WIDE = {
    "scores": (256, 256, 256),
    "scores_backward": (64, 0, 0),
    "loss": (256, 256, 256),
    "loss_backward": (128, 0, 0),
    "divergence": (128, 0, 0),
    "divergence_backward": (0, 0, 0),
    "decode": (0, 0, 0),
}


def _tile(op: str, dtype: torch.dtype, n: int, channels: int, shared: bool) -> tuple[int, int]:
    """Tokens of a tile's side, and warps."""
    half, half_shared, single = _WIDE[op]
    wide = (half_shared if shared else half) if dtype.itemsize == 2 else 0 if shared else single
    block = 64 if channels <= wide else 32
    small = op == "divergence_backward" if dtype.itemsize == 2 else op.endswith("backward")
    if dtype == torch.float64 or (shared and small):
        block = 16
    block = max(16, min(block, triton.next_power_of_2(n)))
    if op == "divergence_backward":  # holds the tiles of two passes
        return block, 4 if block == 16 else 8
    return block, 2 if block == 16 else 4


def precision(dtype: torch.dtype) -> str:
    """What tl.dot makes of float32: as torch's matrix products, exact unless they were allowed TF32."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def guard(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: it must be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@dataclasses.dataclass
class Prepared:
    """q, k and biases of one pass as kernels take them; divergence has two."""

    q: Tensor  # [B, shared_heads, padded, D]
    k: Tensor
    start_bias: Tensor | None  # [B, n, H]
    end_bias: Tensor | None

    def arguments(self, start: bool = True, prefix: str = "") -> dict[str, Tensor | None]:
        """Near are the starts, or the ends."""
        near, far = (self.q, self.start_bias), (self.k, self.end_bias)
        if not start:
            near, far = far, near
        names = ("near_ptr", "near_bias_ptr", "far_ptr", "far_bias_ptr")
        return {prefix + name: x for name, x in zip(names, (*near, *far), strict=True)}


class Call:
    """Sizes and options of one call, and what they choose."""

    def __init__(
        self,
        op: str,
        q: Tensor,
        start_bias: Tensor | None,
        mask: Tensor | None,
        position_ids: Tensor | None,
        rope: bool,
        tril_mask: bool,
        max_span_length: int,
        scale: float,
    ) -> None:
        check(q.dim() == 4, f"q must be [B, n, H, d], got shape {tuple(q.shape)}")
        self.B, self.n, self.shared_heads, self.d = q.shape
        self.H = self.shared_heads if start_bias is None else start_bias.shape[-1]
        check(self.shared_heads in (1, self.H), f"q must have 1 or {self.H} heads, got {self.shared_heads}")
        check(self.d > 0, f"q must have at least one channel, got shape {tuple(q.shape)}")
        check(not rope or self.d % 2 == 0, f"q must have an even head size where rope is on, got {self.d}")
        check_tensor("mask", mask, (self.B, self.n), torch.bool, q)
        check_tensor("position_ids", position_ids, (self.B, self.n), torch.int64, q)
        self.device, self.dtype, self.compute = q.device, q.dtype, compute_dtype(q)
        self.scale, self.rope, self.tril_mask = scale, rope, tril_mask
        self.mask = None if mask is None else mask.contiguous().view(torch.uint8)
        self.positions = None if position_ids is None else position_ids.contiguous()
        self.extents = None if mask is None else torch.empty(self.B, 2, dtype=torch.int32, device=q.device)
        # Rotation may lengthen a channel by sqrt(2), which float16 cannot always hold.
        self.shrink = 0.5 if rope and q.dtype == torch.float16 else 1.0
        self.D = max(16, triton.next_power_of_2(self.d))
        # Channels that tl.dot is given at a time, and whose gradients a program holds: half precision takes up to 256.
        whole = q.dtype.itemsize == 2 and self.D <= 256
        self.depth = self.D if whole else min(self.D, 32)
        self.channels = self.D if whole else min(self.D, 256 // max(4, q.dtype.itemsize))
        # Heads that share q and k go through a tile together, on products computed once.
        shared = self.shared_heads < self.H
        self.group = 16 if shared else 1
        self.groups = triton.cdiv(self.H, self.group) if shared else 1
        self.block, self.warps = _tile(op, q.dtype, self.n, self.D, shared)
        self.blocks = triton.cdiv(self.n, self.block)
        self.band = 0 < max_span_length < self.n
        self.longest = max_span_length if self.band else self.n
        # How tiles are counted, as `place_of_tile` finds them again.
        if self.band:
            reach = min(self.blocks - 1, (self.longest + self.block - 2) // self.block)
            self.width = reach + 1 if tril_mask else 2 * reach + 1
            self.tiles = self.blocks * self.width
        elif tril_mask:
            self.width = self.blocks + 1
            self.tiles = self.width * triton.cdiv(self.blocks, 2)
        else:
            self.width = self.blocks
            self.tiles = self.blocks**2

    @property
    def empty(self) -> bool:
        """There is no cell."""
        return self.B * self.H * self.n == 0

    def rows(self) -> Tensor:
        """Zeros [B, H] of the compute type."""
        return torch.zeros(self.B, self.H, dtype=self.compute, device=self.device)

    def prepare(self, q: Tensor, k: Tensor, start_bias: Tensor | None, end_bias: Tensor | None) -> Prepared:
        shape = (self.B, self.n, self.shared_heads, self.d)
        q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
        check_tensor("q", q, shape, self.dtype, q)
        check_tensor("k", k, shape, self.dtype, q)
        check((start_bias is None) == (end_bias is None), "start_bias and end_bias must be given together")
        biases = [None if x is None else x.contiguous() for x in (start_bias, end_bias)]
        for name, bias in zip(("start_bias", "end_bias"), biases, strict=True):
            check_tensor(name, bias, (self.B, self.n, self.H), self.dtype, q)
        padded = self.blocks * self.block
        out = torch.empty(2, self.B, self.shared_heads, padded, self.D, dtype=self.dtype, device=self.device)
        rows = max(1, 4096 // self.D)
        group = 4  # heads that use a cosine before it is forgotten
        groups = triton.cdiv(self.shared_heads, group)
        global_pointer_prepare_kernel[(triton.cdiv(padded, rows) * groups * self.B,)](
            q,
            k,
            out,
            self.mask,
            self.extents,
            self.positions,
            self.n,
            padded,
            self.shared_heads,
            groups,
            self.B,
            *q.stride()[:3],
            *k.stride()[:3],
            self.shrink,
            ROPE=self.rope,
            SIZE=self.d,
            D=self.D,
            ROWS=rows,
            GROUP=group,
            num_warps=4,
            enable_fp_fusion=True,
        )
        return Prepared(out[0], out[1], *biases)

    def launch(self, kernel: Any, inner: int, **arguments: Any) -> None:
        """Launches `inner` programs for each sequence and group of heads; see `place`."""
        kernel[(inner * self.groups * self.B * self.shared_heads,)](
            **({"enable_fp_fusion": True} | arguments),
            mask_ptr=self.mask,
            extents_ptr=self.extents,
            n=self.n,
            padded=self.blocks * self.block,
            batch=self.B,
            heads=self.H,
            shared_heads=self.shared_heads,
            groups=self.groups,
            blocks=self.blocks,
            max_span_length=self.longest,
            scale=self.scale / self.shrink**2,
            TRIL=self.tril_mask,
            BAND=self.band,
            GROUP=self.group,
            BLOCK=self.block,
            D=self.D,
            DEPTH=self.depth,
            PRECISION=precision(self.dtype),
            num_warps=self.warps,
            num_stages=2,
        )
