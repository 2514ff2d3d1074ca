"""Maximum-entropy Markov models: training step and decoding against the reference and plain vectorised PyTorch.

No package offers the layer for PyTorch: `plain torch` is bert4keras' computation (gather, softmax, gather over all
steps at once) written with torch's operators, as a user would write it. It has no decoder.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import fastnlp_ops
from benchmarks.harness import OURS, Case, Goal, Work
from benchmarks.measure import Ceilings
from fastnlp_ops.reference import memm as reference

__all__ = ["GOALS", "PROVIDERS", "accuracy", "cases", "exercise", "floor", "make_inputs", "truth"]

TRAIN, DECODE, PLAIN = "forward+backward", "decode to tensors", "plain torch"


class Inputs(NamedTuple):
    emissions: Tensor  # [B, T, N], a leaf that wants a gradient
    tags: Tensor  # [B, T]
    mask: Tensor  # bool [B, T]
    transitions: Tensor  # [N, N], a leaf


def make_inputs(shape: tuple[int, int, int], dtype: str, device: str, ragged: bool = False) -> Inputs:
    batch, steps, tags = shape
    emissions = torch.randn(shape, device=device).to(getattr(torch, dtype)).requires_grad_()
    lengths = torch.full((batch,), steps, device=device)
    if ragged:
        lengths[1:] = torch.randint(max(2, steps // 4), steps + 1, (batch - 1,), device=device)
    mask = torch.arange(steps, device=device) < lengths[:, None]
    transitions = torch.empty(tags, tags, device=device).uniform_(-1, 1).requires_grad_()
    return Inputs(emissions, torch.randint(tags, (batch, steps), device=device), mask, transitions)


def plain(emissions: Tensor, tags: Tensor, transitions: Tensor, *, mask: Tensor) -> Tensor:
    """Both directions of right-padded sequences."""
    total = 0.0
    given = torch.cat([emissions[:, :1], transitions[tags[:, :-1]]], 1)
    behind = torch.cat([transitions.t()[tags[:, 1:]], emissions[:, -1:]], 1)
    last = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    behind = torch.where(last[:, :, None], behind, emissions)
    for rows in (given, behind):
        log_p = ((emissions + rows) / 2).log_softmax(2).gather(2, tags[:, :, None])[:, :, 0]
        total = total + torch.where(mask, log_p, 0).sum(1)
    return total / 2


def provider(log_likelihood, viterbi):
    def make(case: Case, inputs: Inputs) -> Work:
        emissions, tags, mask, transitions = inputs

        def train() -> Tensor:
            emissions.grad = transitions.grad = None
            value = log_likelihood(emissions, tags, transitions, mask=mask).sum()
            value.backward()
            return value

        def trained(value: Tensor) -> dict[str, Tensor]:
            found = {"log_likelihood": value, "demissions": emissions.grad, "dtransitions": transitions.grad}
            return {name: tensor.double() for name, tensor in found.items()}

        def decode() -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                return viterbi(emissions, transitions, mask=mask)

        def decoded(found: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
            paths = found[0].clamp(min=0)
            wide = emissions.detach().double(), paths, transitions.detach().double()
            return {"path score": reference.memm_log_likelihood(*wide, mask=mask)}

        if case.pass_name == TRAIN:
            return Work(train, trained, list(inputs), graph=True)
        return Work(decode, decoded, (), graph=True)

    return make


PROVIDERS = {
    OURS: provider(fastnlp_ops.memm_log_likelihood, fastnlp_ops.memm_viterbi),
    "reference": provider(reference.memm_log_likelihood, reference.memm_viterbi),
    PLAIN: provider(plain, None),
}


def cases(device: str, quick: bool) -> list[Case]:
    small, wide, large = (32, 128, 9), (32, 128, 32), (256, 512, 32)
    everyone = tuple(PROVIDERS)
    found = [
        Case("memm_log_likelihood", TRAIN, shape, everyone) for shape in ((small,) if quick else (small, wide, large))
    ]
    found.append(Case("memm_log_likelihood", TRAIN, small, everyone, ragged=True))
    if device == "cuda" and not quick:
        found.append(Case("memm_log_likelihood", TRAIN, large, everyone, dtype="bfloat16"))
    decoders, note = (OURS, "reference"), "plain torch has no decoder"
    shapes = (small,) if quick else (small, wide)
    return found + [Case("memm_viterbi", DECODE, shape, decoders, note=note) for shape in shapes]


def truth(case: Case, inputs: Inputs) -> dict[str, tuple[Tensor, float]]:
    """The reference in float64; plain torch takes its softmax in the emissions' dtype, so bfloat16 allows for that."""
    leaves = [x.detach().double().requires_grad_() for x in (inputs.emissions, inputs.transitions)]
    if case.pass_name == DECODE:
        return {"path score": (reference.memm_viterbi(*leaves, mask=inputs.mask)[1].detach(), 1e-5)}
    value = reference.memm_log_likelihood(leaves[0], inputs.tags, leaves[1], mask=inputs.mask).sum()
    found = (value.detach(), *torch.autograd.grad(value, leaves))
    tolerance = 2e-5 if case.dtype == "float32" else 2e-2
    return {
        name: (x, tolerance) for name, x in zip(("log_likelihood", "demissions", "dtransitions"), found, strict=True)
    }


def floor(case: Case, inputs: Inputs, ceilings: Ceilings) -> float:
    """Seconds to read emissions and tags twice and write the gradients once (training), or, for decoding, to read the
    emissions, write the paths and do the N^2 multiply-adds per step of two normalisers and the recursion."""
    tokens = int(inputs.mask.sum())
    tags, element = case.shape[-1], inputs.emissions.element_size()
    if case.pass_name == TRAIN:
        return ceilings.copy_s(tokens * (3 * tags * element + 16))
    return max(ceilings.copy_s(tokens * (tags * element + 8)), ceilings.fma_s(3 * tokens * tags**2))


def against_plain(label: str):
    return lambda results: results.ratio(TRAIN, label, PLAIN)


GOALS: list[Goal] = [
    Goal(f"{TRAIN}, {label}, against {PLAIN}", "cpu", against_plain(label), at_least=2) for label in ("32x128x9",)
]


def accuracy(device: str) -> list:  # noqa: ARG001
    return []


def exercise(device: str) -> None:
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        for shape in ((3, 40, 9), (2, 5, 70)):
            inputs = make_inputs(shape, dtype, device, ragged=True)
            for bidirectional in (True, False):
                value = fastnlp_ops.memm_log_likelihood(
                    inputs.emissions, inputs.tags, inputs.transitions, mask=inputs.mask, bidirectional=bidirectional
                )
                value.sum().backward()
            fastnlp_ops.memm_viterbi(inputs.emissions.detach(), inputs.transitions.detach(), mask=inputs.mask)
