"""Adafactor: one optimizer step of BERT-base and BERT-large against the optimizers people use today.

All providers step the same parameters with the same gradients. Before it is timed, each proves on parameters of its own
that one step is what the same algorithm does in float64: AdamW against torch's AdamW, everything else against the
reference. torch.optim's Adafactor always scales by the parameter, so it meets the pass with a given learning rate too:
it is what one would use there.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastnlp_ops
from benchmarks.harness import OURS, Case, Goal, Results, Work, optional
from benchmarks.measure import Ceilings
from benchmarks.proof_adafactor import accuracy, exercise
from fastnlp_ops import reference

__all__ = ["GOALS", "PROVIDERS", "accuracy", "cases", "exercise", "floor", "make_inputs", "truth"]

GIVEN, SCALED = "step at a given lr", "step scaled by the parameter"
TRANSFORMERS, TORCH, FOREACH = "transformers", "torch.optim", "torch.optim foreach"
POPULAR, ADAMW = "pytorch_optimizer", "AdamW fused"
BASE, LARGE, SMALL = (12, 768), (24, 1024), (2, 128)
LR = 1e-3

Make = Callable[[Iterable[nn.Parameter], bool], torch.optim.Optimizer]


class Inputs(NamedTuple):
    params: list[nn.Parameter]  # with gradients
    bytes: int  # of all parameters


def bert_shapes(layers: int, hidden: int) -> list[tuple[int, ...]]:
    """Parameters of transformers' BertModel in their order; tests/test_benchmarks.py compares the two."""
    square, vector, inner = (hidden, hidden), (hidden,), 4 * hidden
    block = [square, vector] * 4 + [vector, vector, (inner, hidden), (inner,), (hidden, inner), vector, vector, vector]
    return [(30522, hidden), (512, hidden), (2, hidden), vector, vector, *block * layers, square, vector]


def make_inputs(shape: tuple[int, int], dtype: str, device: str, ragged: bool = False) -> Inputs:  # noqa: ARG001
    params = []
    for size in bert_shapes(*shape):
        params.append(nn.Parameter(torch.randn(size, device=device).mul_(0.02).to(getattr(torch, dtype))))
        params[-1].grad = torch.randn(size, device=device).mul_(1e-3).to(params[-1].dtype)
    return Inputs(params, sum(p.nbytes for p in params))


# Providers


def ours(params: Iterable[nn.Parameter], scaled: bool) -> torch.optim.Optimizer:
    return fastnlp_ops.Adafactor(params, lr=LR, scale_parameter=scaled, relative_step=False)


def transformers_adafactor(params: Iterable[nn.Parameter], scaled: bool) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(params, lr=LR, scale_parameter=scaled, relative_step=False)


def torch_adafactor(params: Iterable[nn.Parameter], _: bool, foreach: bool) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(params, lr=LR, foreach=foreach)


def popular_adafactor(params: Iterable[nn.Parameter], scaled: bool) -> torch.optim.Optimizer:
    from pytorch_optimizer import AdaFactor

    return AdaFactor(params, lr=LR, betas=(None, 0.999), scale_parameter=scaled, relative_step=False, foreach=True)


def adamw(params: Iterable[nn.Parameter], _: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR, fused=True)


def exact_step(name: str, p: Tensor, grad: Tensor, scaled: bool) -> Tensor:
    """The parameter after the first step, in float64."""
    p, grad = p.double(), grad.double()
    if name == ADAMW:
        leaf = nn.Parameter(p)
        leaf.grad = grad
        torch.optim.AdamW([leaf], lr=LR).step()
        return leaf.detach()
    factors = [p.new_zeros(p.shape[:-1])], [p.new_zeros(p.shape[:-2] + p.shape[-1:])]
    state = (*factors, []) if p.dim() > 1 else ([], [], [torch.zeros_like(p)])
    options: dict[str, Any] = {"lr": LR, "scale_parameter": scaled, "relative_step": False}
    if name in (TORCH, FOREACH):
        options = {"lr": LR, "variant": "torch", "eps": (torch.finfo(torch.float32).eps, 1e-3)}
    reference.adafactor_step_([p], [grad], *state, torch.zeros(1, device=p.device), **options)
    return p


def step_error(name: str, make: Make, inputs: Inputs, scaled: bool) -> float:
    """Largest error of one step over some of the tensors, in units of the largest change."""
    chosen = inputs.params[2:12]
    own = [nn.Parameter(p.detach().clone()) for p in chosen]
    for p, like in zip(own, chosen, strict=True):
        p.grad = like.grad
    make(own, scaled).step()
    worst = 0.0
    for p, before in zip(own, chosen, strict=True):
        exact = exact_step(name, before.detach(), before.grad, scaled)
        change = (exact - before.double()).abs().max().item()
        rounding = torch.finfo(p.dtype).eps * before.abs().max().item()
        worst = max(worst, ((p.double() - exact).abs().max().item() - rounding) / change)
    return worst


def provider(name: str, make: Make, needs: str | None = None):
    if needs and not optional(needs):
        return None

    def work(case: Case, inputs: Inputs) -> Work:
        scaled = case.pass_name == SCALED
        error = step_error(name, make, inputs, scaled)
        optimizer = make(inputs.params, scaled)
        optimizer.step()
        kept = {id(x): x.nbytes for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)}

        def outputs(found: Any) -> dict[str, Tensor]:  # noqa: ARG001
            return {"change": torch.tensor(error)}

        return Work(optimizer.step, outputs, kept=float(sum(kept.values())))

    return work


PROVIDERS = {
    OURS: provider(OURS, ours),
    TRANSFORMERS: provider(TRANSFORMERS, transformers_adafactor, "transformers"),
    TORCH: provider(TORCH, partial(torch_adafactor, foreach=False)),
    FOREACH: provider(FOREACH, partial(torch_adafactor, foreach=True)),
    POPULAR: provider(POPULAR, popular_adafactor, "pytorch_optimizer"),
    ADAMW: provider(ADAMW, adamw),
}


def cases(device: str, quick: bool) -> list[Case]:  # noqa: ARG001
    everyone = tuple(PROVIDERS)
    found = [Case("adafactor_step_", name, SMALL if quick else BASE, everyone) for name in (GIVEN, SCALED)]
    if quick:
        return found
    found.append(Case("adafactor_step_", GIVEN, LARGE, everyone))
    halves = tuple(name for name in everyone if name not in (TORCH, FOREACH, POPULAR))
    note = "the others compute in bfloat16"
    return [*found, Case("adafactor_step_", GIVEN, BASE, halves, dtype="bfloat16", note=note)]


def truth(case: Case, inputs: Inputs) -> dict[str, tuple[Tensor, float]]:  # noqa: ARG001
    """No error at all, beside the rounding of the parameter."""
    return {"change": (torch.zeros((), dtype=torch.float64), 1e-4)}


def floor(case: Case, inputs: Inputs, ceilings: Ceilings) -> float:  # noqa: ARG001
    """Seconds to read gradients and parameters once and write the parameters once, at the rate of an in-place update:
    the second reading of the gradients, and of the scaled pass's parameters, may come from a cache."""
    return ceilings.update_s(3 * inputs.bytes)


def against(peer: str, threads: int | None) -> Callable[[Results], float]:
    return lambda results: results.ratio(GIVEN, "x".join(map(str, BASE)), peer, threads)


def state_of_base(results: Results) -> float:
    """MB that the optimizer keeps between steps."""
    outcome = results.find(GIVEN, "x".join(map(str, BASE)))
    return outcome.saved.get(OURS, math.nan) / 1e6 if outcome else math.nan


BY = "BERT-base, given lr, against"
GOALS: list[Goal] = [
    Goal(f"{BY} torch.optim.Adafactor, 2 threads", "cpu", against(TORCH, 2), at_least=9),
    Goal(f"{BY} transformers' Adafactor, 2 threads", "cpu", against(TRANSFORMERS, 2), at_least=18),
    Goal(f"{BY} pytorch_optimizer's AdaFactor (foreach), 2 threads", "cpu", against(POPULAR, 2), at_least=4),
    Goal(f"{BY} torch.optim.AdamW(fused=True), 2 threads", "cpu", against(ADAMW, 2), at_least=1.25),
    Goal("BERT-base, state in MB", "cpu", state_of_base, at_most=1.30),
    Goal(f"{BY} transformers' Adafactor", "cuda", against(TRANSFORMERS, None), at_least=15),
    Goal(f"{BY} torch.optim.Adafactor(foreach=True)", "cuda", against(FOREACH, None), at_least=15),
    Goal(f"{BY} torch.optim.AdamW(fused=True)", "cuda", against(ADAMW, None), at_least=1 / 0.85),
]
