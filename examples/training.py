"""Training, with the time of each part of a step, and the comparison of the compiled with the plain heads."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import mean, median
from typing import NamedTuple

import torch
from tagger import Batch, Tagger
from torch import Tensor, nn
from torch.optim import Optimizer

LEARNING_RATE = 1e-2
WARM_UP = 50  # steps; with fewer the first ones overshoot, and rounding grows to 3e-3 in 12 of them
# Adam divides a gradient that is nothing but rounding by its own size. With a larger epsilon than its 1e-8 the two
# taggers drift apart half as fast, and learn as fast.
ADAM_EPSILON = 1e-6
# The two round differently, and training amplifies that: over four seeds the losses came up to 5e-6 apart in 12 steps.
# A gradient that was left out showed as 4e-4 (the CRF's transitions) or 6e-3 (the span biases) in two.
LOSS_TOLERANCE = 1e-4
RUNNING = 10  # steps
# The plain GlobalPointer keeps about ten tensors of this many scores: where sentences are long, it gets fewer of them.
MOST_SCORES = 1 << 24


class HeadStep(NamedTuple):
    """One head's part of a step: the loss, its gradient of the head's input, and the seconds of both."""

    loss: float
    gradient: Tensor
    loss_time: float
    backward_time: float


class Step(NamedTuple):
    crf: HeadStep  # the loss: negative log-likelihood per token
    spans: HeadStep  # the loss: per sentence and kind of span
    update: float  # seconds of the optimizer
    total: float  # seconds, network and optimizer included


def head_step(loss_of: Callable[[Tensor], Tensor], head_input: Tensor) -> HeadStep:
    """The graph is cut at the head's input, so that the head can be timed by itself."""
    cut = head_input.detach().requires_grad_()
    begin = time.perf_counter()
    loss = loss_of(cut)
    before_backward = time.perf_counter()
    loss.backward()
    return HeadStep(loss.item(), cut.grad, before_backward - begin, time.perf_counter() - before_backward)


def adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.Adam(parameters, LEARNING_RATE, eps=ADAM_EPSILON)


class Trainer:
    """An optimizer whose learning rate rises over WARM_UP steps and falls linearly to zero at the last of `steps`."""

    def __init__(
        self, tagger: Tagger, steps: int, make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = adam
    ) -> None:
        self.tagger = tagger
        self.steps = steps
        self.optimizer = make_optimizer(tagger.parameters())
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)

    def rate(self, step: int) -> float:
        return min(1, (step + 1) / WARM_UP) * (1 - step / self.steps)

    def step(self, batch: Batch) -> Step:
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        hidden = self.tagger.encoder(batch.features, batch.mask)
        emissions = self.tagger.emissions(hidden)
        crf = head_step(lambda x: -self.tagger.crf(x, batch.tags, batch.mask) / batch.mask.sum(), emissions)
        spans = head_step(lambda x: self.tagger.spans.loss(x, batch.spans, batch.mask), hidden)
        torch.autograd.backward([emissions, hidden], [crf.gradient, spans.gradient])
        before_update = time.perf_counter()
        self.optimizer.step()
        end = time.perf_counter()
        self.schedule.step()
        return Step(crf, spans, end - before_update, end - begin)


@dataclass
class Trained:
    """One optimizer's training."""

    name: str
    trainer: Trainer
    losses: list[float] = field(default_factory=list)  # of both heads together
    updates: list[float] = field(default_factory=list)  # seconds

    def step(self, batch: Batch) -> None:
        step = self.trainer.step(batch)
        self.losses.append(step.crf.loss + step.spans.loss)
        self.updates.append(step.update)

    def running_losses(self) -> list[float]:
        """Means over the last RUNNING steps, so that one easy batch counts for little."""
        return [mean(self.losses[max(0, end - RUNNING) : end]) for end in range(1, len(self.losses) + 1)]

    def steps_to(self, level: float) -> int:
        return next(step for step, loss in enumerate(self.running_losses(), 1) if loss <= level)

    def milliseconds(self) -> float:
        return 1000 * median(self.updates)

    def state_bytes(self) -> int:
        states = self.trainer.optimizer.state.values()
        return sum(value.nbytes for state in states for value in state.values() if torch.is_tensor(value))


@dataclass
class Run:
    """One side of the comparison."""

    name: str
    tagger: Tagger
    trainer: Trainer
    steps: list[Step] = field(default_factory=list)
    crf_decoding: list[float] = field(default_factory=list)  # seconds per batch
    span_decoding: list[float] = field(default_factory=list)
    paths: list[Tensor] = field(default_factory=list)
    spans: list[Tensor] = field(default_factory=list)
    peak_bytes: int = 0  # of the span head's loss and gradients, over the comparison's batches

    def decode(self, batch: Batch) -> None:
        with torch.no_grad():
            hidden = self.tagger.encoder(batch.features, batch.mask)
            emissions = self.tagger.emissions(hidden)
            begin = time.perf_counter()
            paths, _ = self.tagger.crf.viterbi(emissions, batch.mask)
            between = time.perf_counter()
            spans, _ = self.tagger.spans.decode(hidden, batch.mask)
            end = time.perf_counter()
        self.crf_decoding.append(between - begin)
        self.span_decoding.append(end - between)
        self.paths.append(paths[batch.mask])
        self.spans.append(spans)

    def milliseconds(self) -> dict[str, float]:
        """The median time of each part, per batch."""
        parts = {
            "CRF loss": [step.crf.loss_time for step in self.steps],
            "CRF backward": [step.crf.backward_time for step in self.steps],
            "CRF decoding": self.crf_decoding,
            "span loss": [step.spans.loss_time for step in self.steps],
            "span backward": [step.spans.backward_time for step in self.steps],
            "span decoding": self.span_decoding,
            "whole step": [step.total for step in self.steps],
        }
        return {part: 1000 * median(seconds) for part, seconds in parts.items()}


def compare(
    make_tagger: Callable[[bool], Tagger], total_steps: int, batches: Iterable[Batch], on_step: Callable[[], None]
) -> tuple[Run, Run]:
    """Train and decode with the compiled and with the plain heads, from the same weights on the same batches.

    They take turns batch by batch, so that a machine which slows down slows both.
    """
    runs = []
    for name, plain in (("fastnlp_ops", False), ("plain PyTorch", True)):
        tagger = make_tagger(plain)
        runs.append(Run(name, tagger, Trainer(tagger, total_steps)))
    for batch in batches:
        few = batch.first(MOST_SCORES // (len(runs[0].tagger.labels.kinds) * batch.mask.shape[1] ** 2))
        for run in runs:
            run.steps.append(run.trainer.step(few))
            run.decode(few)
        on_step()
    for run in runs:
        run.peak_bytes = span_head_peak(run.tagger, few)
    compiled, plain = runs
    return compiled, plain


def largest_loss_difference(compiled: Run, plain: Run) -> float:
    losses = torch.tensor([[(step.crf.loss, step.spans.loss) for step in run.steps] for run in (compiled, plain)])
    return (losses[0] - losses[1]).abs().max().item()  # torch's max, because it lets a NaN through


def same_spans(compiled: Run, plain: Run) -> float:
    """The share of the decoded spans that both have found."""
    same = found = 0
    for ours, theirs in zip(compiled.spans, plain.spans, strict=True):
        times = torch.unique(torch.cat([ours, theirs]), dim=0, return_counts=True)[1]
        same += (times == 2).sum().item()
        found += len(times)
    return same / found if found else 1.0


def span_head_peak(tagger: Tagger, batch: Batch) -> int:
    """The most bytes that the span head's loss and gradients hold at once, beside their input, by torch's allocator."""
    with torch.no_grad():
        hidden = tagger.encoder(batch.features, batch.mask)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with silent(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        head_step(lambda x: tagger.spans.loss(x, batch.spans, batch.mask), hidden)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@contextmanager
def silent() -> Iterator[None]:
    """Without the standard error of C++, where torch's profiler announces each start and stop."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
