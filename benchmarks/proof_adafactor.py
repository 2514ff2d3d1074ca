"""What bench_adafactor needs beside times: errors after many steps, the bfloat16 probe, every kernel class once."""

import math
from typing import Any

import torch
from torch import Tensor, nn

import fastnlp_ops
from benchmarks.harness import OURS, Accuracy
from fastnlp_ops import reference

STEPS = 20
SHAPES = ((130, 70), (33, 1030), (700,), (6, 5, 3, 3))


def accuracy(device: str) -> list[Accuracy]:
    """Largest change that is off after 20 steps, relative to float64; and how far 200 steps of bfloat16 come."""
    found = []
    for exponent in (-8, -3, 0, 3):
        for name, options in (("transformers", {}), ("torch", {"variant": "torch", "eps": (2.0**-23, 1e-3)})):
            what = f"{name}, |g| about 1e{exponent}, {STEPS} steps"
            ours = drift(options, 10.0**exponent, torch.float32, fastnlp_ops.adafactor_step_, device)
            plain = drift(options, 10.0**exponent, torch.float32, reference.adafactor_step_, device)
            found += [Accuracy(what, OURS, ours, 2e-6), Accuracy(what, "reference", plain, 2e-6)]
    what = "bfloat16, 200 steps at lr 1e-3: distance gone, against float32"
    found.append(Accuracy(what, OURS, stagnation("stochastic", device), 0.02))
    return found


def drift(options: dict[str, Any], scale: float, dtype: torch.dtype, step: Any, device: str) -> float:
    """max |p - float64| / max |p| over all shapes."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for shape in SHAPES:
        start = torch.randn(shape, generator=generator, dtype=torch.float64)
        pair = [start.to(device, dtype), start.to(device)]
        states: list[tuple[list[Tensor], ...]] = []
        for p in pair:
            zeros = {"device": device, "dtype": dtype if p is pair[0] else torch.float64}
            if p.dim() > 1:
                row = torch.zeros(p.shape[:-1], **zeros)
                states.append(([row], [torch.zeros(p.shape[:-2] + p.shape[-1:], **zeros)], []))
            else:
                states.append(([], [], [torch.zeros(p.shape, **zeros)]))
        counts = [torch.zeros(1, device=device) for _ in pair]
        for _ in range(STEPS):
            grad = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)
            more = {"lr": 1e-2, "relative_step": False} | options
            step([pair[0]], [grad], *states[0], counts[0], **more)
            reference.adafactor_step_([pair[1]], [grad.double()], *states[1], counts[1], **more)
        worst = max(worst, ((pair[0].double() - pair[1]).abs().max() / pair[1].abs().max()).item())
    return worst


def stagnation(rounding: str, device: str) -> float:
    """|distance of bfloat16 / distance of float32 - 1| where every gradient points the same way."""
    moved = []
    for dtype in (torch.bfloat16, torch.float32):
        p = nn.Parameter(torch.ones(256, 256, device=device, dtype=dtype))
        p.grad = torch.ones_like(p)
        options = {"rounding": rounding} if dtype.itemsize == 2 else {}
        optimizer = fastnlp_ops.Adafactor([p], lr=1e-3, scale_parameter=False, relative_step=False, **options)
        for _ in range(200):
            optimizer.step()
        moved.append(1 - p.detach().double().mean().item())
    return abs(moved[0] / moved[1] - 1)


def exercise(device: str) -> None:
    """Every kernel class once: teams of each size, wide matrices, packed ones, strips, vectors, types, options."""
    shapes = [(70, 520), (66, 1030), (65, 2050), (70, 4100), (20, 3, 3), (400, 260), (5000,), (), (0, 5), (9, 1)]
    half = [torch.bfloat16, torch.float16]
    for dtypes in ([torch.float32, *half], [torch.float64]):
        for options in (
            {"beta1": 0.9, "weight_decay": 0.1, "rounding": "stochastic", "max_grad_norm": 0.1},
            {"ema_decay": 0.9, "layer_adaptation": True, "maximize": True, "skip_nonfinite": True},
            {"lazy": True, "scale_parameter": False},
            {"variant": "torch", "eps": (0.3, 1e-3), "lr": 1e-2},
        ):
            params = [torch.randn(shape, device=device).to(dtype) for dtype in dtypes for shape in shapes]
            params.append(torch.randn(40, 36, device=device).to(dtypes[0]).t())
            step_once(params, [torch.randn(p.shape, device=device).to(p.dtype) for p in params], options)
            step_once(params, [torch.full_like(p, math.inf) for p in params], {"skip_nonfinite": True})
    if device == "cuda":
        torch.cuda.synchronize()


def step_once(params: list[Tensor], grads: list[Tensor], options: dict[str, Any]) -> None:
    zeros = {"device": params[0].device, "dtype": torch.float64 if params[0].dtype == torch.float64 else torch.float32}
    matrices = [p for p in params if p.dim() > 1]
    rows = [torch.zeros(p.shape[:-1], **zeros) for p in matrices]
    cols = [torch.zeros(p.shape[:-2] + p.shape[-1:], **zeros) for p in matrices]
    vectors = [torch.zeros(p.shape, **zeros) for p in params if p.dim() < 2]
    moments = [torch.zeros(p.shape, **zeros) for p in params] if "beta1" in options else []
    averages = [torch.zeros(p.shape, **zeros) for p in params] if "ema_decay" in options else []
    steps = torch.zeros(len(params), device=params[0].device)
    more = {"moments": moments, "averages": averages, "rms": torch.zeros_like(steps)}
    fastnlp_ops.adafactor_step_(params, grads, rows, cols, vectors, steps, **more, **options)
