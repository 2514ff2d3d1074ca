"""What bench_linear_attention needs beside times: inputs, float64 truth, hostile inputs, every op once."""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

import fastnlp_ops
from benchmarks.harness import OURS, Accuracy
from fastnlp_ops import LinearAttentionState, reference
from fastnlp_ops.reference.linear_attention import FEATURE_MAPS

CAUSAL, CAUSAL_TRAIN = "causal forward", "causal forward+backward"
BOTH, BOTH_TRAIN = "bidirectional forward", "bidirectional forward+backward"
DECODE = "decode"
EPS = 1e-6
CHUNK = 64
ROWS = 64  # of softmax attention, which is no product of features: so many are enough to know it by


class Inputs:
    """What the providers of a case share: q, k, v [B, T, H, D] and the gradient of the output."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: str, device: str, ragged: bool) -> None:
        B, T, _, _ = self.shape = shape
        self.dtype, self.device = getattr(torch, dtype), device
        self.q, self.k, self.v = self.leaves = [self.draw(*shape).requires_grad_() for _ in range(3)]
        self.dout = self.draw(*shape)
        self.mask = None
        if ragged:  # the mean is half of T
            lengths = torch.randint(1, T + 1, (B,), device=device)
            self.mask = torch.arange(T, device=device) < lengths[:, None]

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    @property
    def keys(self) -> int:
        """Tokens of all sequences that count as keys."""
        B, T, _, _ = self.shape
        return B * T if self.mask is None else int(self.mask.sum())

    def state(self) -> LinearAttentionState:
        """That of a hundred tokens, fresh: decoding moves it on."""
        B, _, H, D = self.shape
        generator = torch.Generator(self.device).manual_seed(0)
        kv = 10 * torch.randn((B, H, D, D), generator=generator, device=self.device)
        key_sum = 100 + 10 * torch.rand((B, H, D), generator=generator, device=self.device)
        return LinearAttentionState(kv, key_sum, None)

    @cached_property
    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v in float64, for autograd."""
        return tuple(x.detach().double().requires_grad_() for x in self.leaves)


def chunked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, normalize: bool = True) -> Tensor:
    """Causal attention of mapped q and k [B, T, H, D] by chunks of 64 tokens, as it is written by hand: a triangle of
    scores within a chunk, the sum over the chunks before it for the rest."""
    B, T, H, D = q.shape
    if mask is not None:
        k = k * mask[:, :, None, None]
    q, k, v = (x.transpose(1, 2).reshape(B, H, T // CHUNK, CHUNK, D) for x in (q, k, v))
    sums = k.transpose(3, 4) @ v  # [B, H, T / CHUNK, D, D]
    scores = (q @ k.transpose(3, 4)).tril()
    out = q @ (sums.cumsum(2) - sums) + scores @ v
    if normalize:
        key_sums = k.sum(3)  # [B, H, T / CHUNK, D]
        z = (q @ (key_sums.cumsum(2) - key_sums)[..., None]) + scores.sum(-1, keepdim=True)
        out = out / (z + EPS)
    return out.reshape(B, H, T, D).transpose(1, 2)


def einsum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Katharopoulos et al. 2020, equation (5), of mapped q and k."""
    if mask is not None:
        k = k * mask[:, :, None, None]
    kv = torch.einsum("bthd,bthm->bhmd", k, v)
    z = 1 / (torch.einsum("bthd,bhd->bth", q, k.sum(1)) + EPS)
    return torch.einsum("bthd,bhmd,bth->bthm", q, kv, z)


def elu_plus_one(x: Tensor) -> Tensor:
    return torch.nn.functional.elu(x) + 1


def truth(inputs: Inputs, pass_name: str, bare: bool = False) -> dict[str, Tensor]:
    """Output and, of training, gradients in float64; `bare`: q and k count as mapped, and nothing is divided."""
    q, k, v = inputs.exact
    mapped = (q, k) if bare else (elu_plus_one(q), elu_plus_one(k))
    if pass_name in (CAUSAL, CAUSAL_TRAIN):
        out = chunked(*mapped, v, inputs.mask, normalize=not bare)
    else:
        out = einsum(*mapped, v, inputs.mask)
    found = {"out": out.detach()}
    if pass_name in (CAUSAL_TRAIN, BOTH_TRAIN):
        gradients = torch.autograd.grad(out, (q, k, v), inputs.dout.double())
        found |= dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    return found


def softmax_rows(inputs: Inputs, causal: bool) -> Tensor:
    """The first rows of softmax attention in float64, [B, ROWS, H, D]."""
    q, k, v = (x.detach().transpose(1, 2) for x in inputs.exact)
    scores = (q[:, :, :ROWS] @ k.transpose(2, 3)) / math.sqrt(q.shape[3])
    seen = torch.ones_like(scores, dtype=torch.bool)
    if causal:
        seen = seen.tril()
    if inputs.mask is not None:
        seen = seen & inputs.mask[:, None, None]
    return (scores.masked_fill(~seen, -math.inf).softmax(-1) @ v).transpose(1, 2)


def decoded(inputs: Inputs) -> Tensor:
    """One step from inputs.state() in float64, [B, H, D]."""
    kv, key_sum, _ = inputs.state()
    q, k, v = (x.detach()[:, 0] for x in inputs.exact)
    q, k = elu_plus_one(q), elu_plus_one(k)
    kv, key_sum = kv.double() + k[..., None] * v[:, :, None], key_sum.double() + k
    return (q[:, :, None] @ kv)[:, :, 0] / (q * key_sum).sum(-1, keepdim=True)


def relative(found: Tensor, expected: Tensor) -> Tensor:
    """The largest difference over the largest number, as a tensor for the gate."""
    return ((found.detach().double() - expected).abs().max() / expected.abs().max()).reshape(1)


# Accuracy


def hostile(device: str) -> Iterator[tuple[str, dict, Tensor, Tensor, Tensor]]:
    """(name, options, q, k, v [1, T, 2, 16]): where running sums lose digits and exponentials overflow."""

    def draw(T: int) -> Tensor:
        return torch.randn(1, T, 2, 16, device=device)

    yield "elu+1, 4096 tokens", {}, draw(4096), draw(4096), draw(4096)
    yield "relu, features near zero", {"feature_map": "relu"}, 1e-2 * draw(300), 1e-2 * draw(300), draw(300)
    yield (
        "cosine+1, lengths of 1e15 and 1e-10",
        {"feature_map": "cosine+1"},
        1e15 * draw(300),
        1e-10 * draw(300),
        draw(300),
    )
    rise = torch.linspace(0, 300, 300, device=device)[None, :, None, None]
    yield "exp, keys that rise to e^300", {"feature_map": "exp"}, draw(300), draw(300) + rise, draw(300)
    yield "exp, keys that fall from e^300", {"feature_map": "exp"}, draw(300), draw(300) - rise, draw(300)


def accuracy(device: str) -> list[Accuracy]:
    """The worst difference from float64 in the output, causal, and its allowance, 1e-5 of the largest value."""
    found = []
    for name, options, *inputs in hostile(device):
        exact = reference.linear_attention_recurrent(*(x.double() for x in inputs), **options)
        own = fastnlp_ops.linear_attention(*inputs, causal=True, **options)
        found.append(Accuracy(name, OURS, relative(own, exact).item(), 1e-5))
    q, k, v = (torch.randn(1, 8192, 2, 64, device=device).bfloat16() for _ in range(3))
    exact = chunked(*(elu_plus_one(x.double()) for x in (q, k)), v.double())
    empty = fastnlp_ops.linear_attention(q[:, :0], k[:, :0], v[:, :0], causal=True, return_state=True)[1]
    with torch.no_grad():
        for t in range(8192):
            last = fastnlp_ops.linear_attention_step(q[:, t], k[:, t], v[:, t], empty)
    # Rounding the result to bfloat16 is 0.0016 of it already.
    error = (last.double() - exact[:, -1]).norm() / exact[:, -1].norm()
    found.append(Accuracy("8192 steps in bfloat16", OURS, error.item(), 2e-3))
    return found


# For compute-sanitizer


def exercise(device: str) -> None:
    """Every op once, forward and backward, over all maps and options; small, because the sanitizers are slow."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for T, Dk, Dv in ((1, 1, 3), (70, 64, 40), (33, 16, 128)):
            exercise_one(T, Dk, Dv, dtype, device)
    if device == "cuda":
        torch.cuda.synchronize()


def exercise_one(T: int, Dk: int, Dv: int, dtype: torch.dtype, device: str) -> None:
    B, H, groups = 2, 4, 2

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    q, k, v = draw(B, T, H, Dk), draw(B, T, groups, Dk), draw(B, T, groups, Dv)
    mask = torch.rand(B, T, device=device) < 0.8
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    log_decay = -torch.rand(B, T, groups, device=device, dtype=wide)
    cu_seqlens = torch.tensor([0, T // 2, T // 2, T], device=device)
    for name, causal in itertools.product(FEATURE_MAPS, (False, True)):
        options: list[dict] = [{"key_padding_mask": mask}, {"normalize": False}]
        if causal and name not in ("exp", "softmax"):
            options.append({"log_decay": log_decay.requires_grad_()})
        run: Callable[..., tuple[Tensor, LinearAttentionState]]
        for own in options:
            run = fastnlp_ops.linear_attention
            out, state = run(q, k, v, feature_map=name, causal=causal, return_state=True, **own)
            more = run(q, k, v, feature_map=name, causal=causal, initial_state=state, **own)
            (out.sum() + more.sum()).backward()
        packed = [x[:1] for x in (q, k, v)]
        run(*packed, feature_map=name, causal=causal, cu_seqlens_q=cu_seqlens).sum().backward()
        with torch.no_grad():
            state = LinearAttentionState(*(None if x is None else x.detach().clone() for x in state))
            fastnlp_ops.linear_attention_step(q[:, 0], k[:, 0], v[:, 0], state, feature_map=name)
