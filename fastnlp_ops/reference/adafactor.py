r"""Adafactor in plain PyTorch: the mathematics that the compiled kernels must reproduce.

Adam divides a gradient by the root of a moving average V of its squares, which costs as much memory as the parameter.
Adafactor (Shazeer, Stern 2018) keeps of V the row means R [M] and the column means C [N] alone. Step t = 1, 2, ... of a
matrix X [M, N] with gradient G is Algorithm 4 with the schedules of Algorithm 6 (sums there are means here, the
quotient is the same):

    rho    = min(1e-2, 1 / sqrt(t))                                relative step
    alpha  = max(eps2, RMS(X)) rho                                 RMS(X) = sqrt(mean of X^2)
    beta2  = 1 - t^-0.8
    R      = beta2 R + (1 - beta2) mean_j (G^2 + eps1)             [M]
    C      = beta2 C + (1 - beta2) mean_i (G^2 + eps1)             [N]
    V      = R C / mean(R)                                         [M, N], never stored
    U      = G / sqrt(V)
    X     -= alpha U / max(1, RMS(U) / d)                          d = 1: no step is longer than alpha, in RMS

A vector has a V of its own (Algorithm 5): V = beta2 V + (1 - beta2) (G^2 + eps1). More than two dimensions are a batch
of matrices in the last two; RMS is that of the whole tensor. transformers adds to the paper a given learning rate (rho
= lr), momentum m = beta1 m + (1 - beta1) alpha U / max(...) with X -= m, and decay X -= wd alpha X. The other variant,
torch.optim's, keeps eps1 out of the averages:

    rho    = min(lr, 1 / sqrt(t))
    X     *= 1 - lr wd                                             after RMS(X) was taken
    R, C, V as above without eps1                                  V of a matrix: R C / max(mean(R), eps1)
    U      = G / sqrt(max(V, eps1^2))

Two reads of G are enough
-------------------------
RMS(U) needs C, C needs all of G: read once for R and C, once for RMS(U), once to apply, it seems. But

    sum_ij U_ij^2  =  sum_ij G_ij^2 mean(R) / (R_i C_j)  =  mean(R) sum_j W_j / C_j   with   W_j = sum_i G_ij^2 / R_i,

and W_j knows nothing of C. R_i needs row i of G alone: once the row has been summed, it goes, still in the cache, into
the sum of its column sum_i G_ij^2 and, divided by R_i, into W_j. When the last row is in, C, then sum U^2, follow
from vectors of length N. Read one: R, C, W (and sum X^2). Read two: X. The quotients are harmless: R_i >= (1 - beta2)
mean_j G_ij^2 bounds G_ij^2 / R_i by N / (1 - beta2); a row of zeros adds 0 (R_i may be 0 in torch's variant).
In the same way sum U X = sqrt(mean(R)) sum_j Y_j / sqrt(C_j) with Y_j = sum_i G_ij X_ij / sqrt(R_i): the norm of
U + wd X, which layer adaptation divides by, takes no read of its own either.
In torch's variant max(mean(R), eps1) stands for mean(R), and nothing changes until max(V, eps1^2) is eps1^2 somewhere;
min_i R_i min_j C_j >= eps1^2 max(mean(R), eps1) over rows and columns that hold a gradient excludes it. Otherwise sum
U^2 needs the third read.
Every one of these numbers is a plain sum over rows, so processes that hold rows of one matrix exchange them once.

References:
    Shazeer, Stern: Adafactor: Adaptive Learning Rates with Sublinear Memory Cost. ICML 2018, arXiv 1804.04235.
    Layer adaptation: You et al.: Large Batch Optimization for Deep Learning (LAMB). ICLR 2020, arXiv 1904.00962.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def adafactor_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    rows: Sequence[Tensor],
    cols: Sequence[Tensor],
    vectors: Sequence[Tensor],
    steps: Tensor,
    *,
    moments: Sequence[Tensor] = (),
    averages: Sequence[Tensor] = (),
    rms: Tensor | None = None,
    lr: float | Tensor | None = None,
    eps: tuple[float, float] = (1e-30, 1e-3),
    clip_threshold: float | None = 1.0,
    decay_rate: float = -0.8,
    beta1: float | None = None,
    weight_decay: float = 0.0,
    scale_parameter: bool = True,
    relative_step: bool = True,
    warmup_init: bool = False,
    variant: str = "transformers",
    lr_scale: float = 1.0,
    ema_decay: float | None = None,
    layer_adaptation: bool = False,
    lazy: bool = False,
    maximize: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    ids: Sequence[int] = (),
    skip_nonfinite: bool = False,
    max_grad_norm: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of every tensor, in place; maths in the dtype of the factors."""
    factored = iter(zip(rows, cols, strict=True))
    unfactored = iter(vectors)
    factors = [next(factored) if p.dim() > 1 else (next(unfactored),) for p in params]
    scaled = [g.to(f[0].dtype) / (1 if grad_scale is None else grad_scale) for g, f in zip(grads, factors, strict=True)]
    if found_inf is not None and found_inf.item() != 0:
        return
    if skip_nonfinite and not all((g * g).isfinite().all() for g in scaled):
        return
    if max_grad_norm is not None:
        norm = math.sqrt(sum(g.double().square().sum().item() for g in scaled))
        scaled = [g * min(1.0, max_grad_norm / (norm + 1e-6)) for g in scaled]
    steps += 1
    rate = math.nan if lr is None else float(lr)
    for k, (p, g, factor) in enumerate(zip(params, scaled, factors, strict=True)):
        if p.numel() == 0:
            continue
        t, x, g = int(steps[k]), p.to(g.dtype), -g if maximize else g
        rho = lr_scale * step_size(t, rate, relative_step, warmup_init, variant)
        alpha = rho
        if scale_parameter or variant == "torch":
            rms_of_x = root_mean_square(x)
            alpha = rho * max(eps[1], rms_of_x.item())
            if rms is not None:
                rms[k] = rms_of_x
        decay = weight_decay * (lr_scale * rate if variant == "torch" else alpha)

        u = normalised(g, factor, t**decay_rate, eps[0], variant)
        if clip_threshold is not None:
            u = u / (root_mean_square(u) / clip_threshold).clamp(min=1)
        if layer_adaptation:
            ratio = trust_ratio(x, alpha * u + decay * x, rho)
            alpha, decay = alpha * ratio, decay * ratio
        update = alpha * u
        if beta1 is not None:
            update = moments[k].mul_(beta1).add_(update, alpha=1 - beta1)
        new = x - decay * x - update
        if lazy and p.dim() > 1:
            new = torch.where((g == 0).all(-1, keepdim=True), x, new)
        p.copy_(rounded(new, p.dtype, rounding, seed, t, ids[k] if ids else k))
        if ema_decay is not None:
            averages[k].lerp_(p.to(x.dtype), 1 - ema_decay)


def root_mean_square(x: Tensor) -> Tensor:
    """sqrt(mean of x^2), 0-dim."""
    return x.norm() / math.sqrt(x.numel())


def step_size(t: int, lr: float, relative_step: bool, warmup_init: bool, variant: str) -> float:
    """rho_t of the docstring."""
    if variant == "torch":
        return min(lr, 1 / math.sqrt(t))
    if relative_step:
        return min(1e-6 * t if warmup_init else 1e-2, 1 / math.sqrt(t))
    return lr


def normalised(g: Tensor, factors: tuple[Tensor, ...], weight: float, eps1: float, variant: str) -> Tensor:
    """U = G / sqrt(V) after G^2 went into the averages with weight 1 - beta2; 0 where G or V is 0."""
    square, floor = (g * g, eps1) if variant == "torch" else (g * g + eps1, 0.0)
    if g.dim() < 2:
        v = factors[0].view(g.shape).lerp_(square, weight)
    else:
        r, c = factors[0].view(*g.shape[:-1], 1), factors[1].view(*g.shape[:-2], 1, g.shape[-1])
        r.lerp_(square.mean(-1, keepdim=True), weight)  # [..., M, 1]
        c.lerp_(square.mean(-2, keepdim=True), weight)  # [..., 1, N]
        v = r / r.mean(-2, keepdim=True).clamp(min=max(floor, torch.finfo(r.dtype).tiny)) * c
    if variant == "torch":
        v = v.clamp(min=eps1 * eps1)
    return torch.where((g == 0) | (v == 0), 0, g * v.rsqrt())


def trust_ratio(x: Tensor, dx: Tensor, rho: float) -> float:
    """||X|| / ||dX / rho||: with it as a factor every step is rho ||X|| long; 1 where either norm is 0."""
    length, step = x.norm().item(), dx.norm().item()
    return rho * length / step if length > 0 and step > 0 else 1.0


def mix64(z: int) -> int:
    """A bijection of 64 bits that leaves no pattern of its argument (the end of splitmix64)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & (1 << 64) - 1
    return z ^ (z >> 31)


def mix32(x: Tensor) -> Tensor:
    """The like of 32 bits, in int64."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def random_bits(begin: int, end: int, seed: int, step: int, tensor_id: int, device: torch.device) -> Tensor:
    """32 bits for each element of a range of flat indices: whoever draws them, and when, gets the same."""
    key = 0
    for part in (seed, step, tensor_id):
        key = mix64(key + part + 0x9E3779B97F4A7C15 & (1 << 64) - 1)
    blocks = []
    for high in range(begin >> 32, (end - 1 >> 32) + 1):
        low = torch.arange(max(begin, high << 32), min(end, (high + 1) << 32), device=device) & 0xFFFFFFFF
        block = mix64(key + high + 0x9E3779B97F4A7C15 & (1 << 64) - 1)
        blocks.append(mix32(mix32(low ^ (block & 0xFFFFFFFF)) ^ (block >> 32)))
    return torch.cat(blocks)


def rounded(x: Tensor, dtype: torch.dtype, rounding: str, seed: int, step: int, tensor_id: int) -> Tensor:
    """x in dtype; stochastic: up or down with the probabilities that make the mean x."""
    if rounding == "nearest" or dtype not in (torch.bfloat16, torch.float16):
        return x.to(dtype)
    x = x.float()
    random = random_bits(0, x.numel(), seed, step, tensor_id, x.device).view(x.shape)
    dropped = 16 if dtype == torch.bfloat16 else 13  # bits of the mantissa that float32 has and dtype has not
    bits = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    bits = (bits + (random >> 32 - dropped)) >> dropped << dropped  # up with probability (dropped bits) / 2^dropped
    result = torch.where(bits < 1 << 31, bits, bits - (1 << 32)).to(torch.int32).view(torch.float32)
    if dtype == torch.float16:  # below 2^-14 float16 is the multiples of 2^-24
        multiple = x.abs() * 2**24
        up = multiple - multiple.floor() > (random >> 8) * 2**-24
        result = torch.where(x.abs() < 2**-14, ((multiple.floor() + up) * 2**-24).copysign(x), result)
    limit = math.inf if dtype == torch.bfloat16 else 65504
    return torch.where(x.abs() < limit, result, x).to(dtype)
