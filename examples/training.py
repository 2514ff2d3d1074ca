"""Training, with the time of each part of a step, and the comparison of the compiled with the plain CRF."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

import torch
from tagger import Batch, Tagger

LEARNING_RATE = 6e-3
# Adam divides a gradient that is nothing but rounding by its own size. With a larger epsilon than its 1e-8 the two CRFs
# drift apart half as fast, and learn as fast.
ADAM_EPSILON = 1e-6
# The two round differently, and training amplifies that: over four seeds the losses (2.6 to 0.2 per token) came up to
# 2e-4 apart in 20 steps. A gradient of the transitions that was left out or transposed showed as 7e-3 or 3e-3 in six.
LOSS_TOLERANCE = 1e-3


class Step(NamedTuple):
    loss: float  # negative log-likelihood per token
    crf_loss: float  # seconds
    crf_backward: float  # seconds
    total: float  # seconds, network and optimizer included


class Trainer:
    """Adam with a learning rate that falls linearly to zero over `steps`."""

    def __init__(self, tagger: Tagger, steps: int) -> None:
        self.tagger = tagger
        self.optimizer = torch.optim.Adam(tagger.parameters(), LEARNING_RATE, eps=ADAM_EPSILON)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / steps)

    def step(self, batch: Batch) -> Step:
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        emissions = self.tagger.encoder(batch.features, batch.mask)
        # The graph is cut at the emissions, so that the CRF's backward can be timed by itself.
        crf_input = emissions.detach().requires_grad_()
        before_loss = time.perf_counter()
        loss = -self.tagger.crf(crf_input, batch.tags, batch.mask) / batch.mask.sum()
        before_backward = time.perf_counter()
        loss.backward()
        after_backward = time.perf_counter()
        emissions.backward(crf_input.grad)
        self.optimizer.step()
        self.schedule.step()
        end = time.perf_counter()
        return Step(loss.item(), before_backward - before_loss, after_backward - before_backward, end - begin)


@dataclass
class Run:
    """One CRF's side of the comparison."""

    name: str
    tagger: Tagger
    trainer: Trainer
    steps: list[Step] = field(default_factory=list)
    decoding: list[float] = field(default_factory=list)  # seconds per batch
    paths: list[torch.Tensor] = field(default_factory=list)

    def milliseconds(self) -> dict[str, float]:
        """The median time of each part, per batch."""
        parts = {
            "CRF loss": [step.crf_loss for step in self.steps],
            "CRF backward": [step.crf_backward for step in self.steps],
            "CRF decoding": self.decoding,
            "whole step": [step.total for step in self.steps],
        }
        return {part: 1000 * median(seconds) for part, seconds in parts.items()}


def compare(
    make_tagger: Callable[[bool], Tagger], total_steps: int, batches: Iterable[Batch], on_step: Callable[[], None]
) -> tuple[Run, Run]:
    """Train and decode the compiled and the plain CRF from the same weights on the same batches.

    They take turns batch by batch, so that a machine which slows down slows both.
    """
    runs = []
    for name, plain in (("fastnlp_ops", False), ("plain PyTorch", True)):
        tagger = make_tagger(plain)
        runs.append(Run(name, tagger, Trainer(tagger, total_steps)))
    for batch in batches:
        for run in runs:
            run.steps.append(run.trainer.step(batch))
            with torch.no_grad():
                emissions = run.tagger.encoder(batch.features, batch.mask)
                begin = time.perf_counter()
                paths, _ = run.tagger.crf.viterbi(emissions, batch.mask)
                run.decoding.append(time.perf_counter() - begin)
            run.paths.append(paths[batch.mask])
        on_step()
    compiled, plain = runs
    return compiled, plain


def largest_loss_difference(compiled: Run, plain: Run) -> float:
    losses = torch.tensor([[step.loss for step in run.steps] for run in (compiled, plain)])
    return (losses[0] - losses[1]).abs().max().item()  # torch's max, because it lets a NaN through
