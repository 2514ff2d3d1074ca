"""The pictures of runs: loss curves, time and memory of compiled and plain parts, and F1 by type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from sentences import Score
from training import Run, Step, Trained

if TYPE_CHECKING:
    from decode_stream import Stream

COMPILED, PLAIN = "tab:blue", "tab:orange"


def save_picture(
    path: Path,
    losses: list[tuple[float, float]],
    compiled: Run,
    plain: Run,
    scores: dict[str, dict[str, Score]],
) -> None:
    """One column for the losses (of CRF and spans), one for time and memory, one for the scores of each head."""
    figure, axes = plt.subplots(2, 3, figsize=(16, 10), layout="constrained", width_ratios=(1, 1.2, 1))
    parts = {
        "CRF": ("negative log-likelihood per token", lambda step: step.crf.loss),
        "GlobalPointer": ("multilabel cross entropy", lambda step: step.spans.loss),
    }
    for row, (head, (unit, loss_of)) in enumerate(parts.items()):
        draw_losses(axes[row, 0], [pair[row] for pair in losses], compiled, plain, loss_of)
        axes[row, 0].set(title=f"{head}: training loss", xlabel="step", ylabel=unit, yscale="log")
        draw_scores(axes[row, 2], scores[head])
        axes[row, 2].set_title(f"{head}: F1 on held-out text")
    draw_times(axes[0, 1], compiled, plain)
    draw_memory(axes[1, 1], compiled, plain)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save_loss_and_scores(path: Path, losses: list[float], scores: dict[str, Score]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(range(1, len(losses) + 1), losses, color=COMPILED, linewidth=1)
    left.set(title="Training loss", xlabel="step", ylabel="multilabel cross entropy", yscale="log")
    draw_scores(right, scores)
    right.set_title("F1 on held-out text")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save_optimizers(path: Path, optimizers: list[Trained], level: float) -> None:
    """Loss, memory of the optimizers' states and time of their steps."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 5), layout="constrained", width_ratios=(1.4, 1, 1))
    colors = [COMPILED, PLAIN, "tab:gray"][: len(optimizers)]
    for trained, color in zip(optimizers, colors, strict=True):
        # Ours under its twin: equal losses show as one line in two colours.
        line = "-" if color == COMPILED else "--"
        left.plot(range(1, len(trained.losses) + 1), trained.running_losses(), line, color=color, label=trained.name)
    left.axhline(level, color="black", linewidth=0.5)
    left.set(title="Training loss, running mean; all reach the line", xlabel="step", ylabel="CRF and spans")
    left.set_yscale("log")
    left.legend()
    names = [
        f"{trained.name}\n{trained.steps_to(level)} steps to the line".replace(" ", "\n", 1) for trained in optimizers
    ]
    memory, time = "Memory of the optimizer's state", "Median time of the optimizer's step"
    for axes, title, unit, values in (
        (middle, memory, "MiB", [trained.state_bytes() / 2**20 for trained in optimizers]),
        (right, time, "milliseconds", [trained.milliseconds() for trained in optimizers]),
    ):
        bars = axes.bar(names, values, color=colors)
        axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=2)
        axes.set(title=title, ylabel=unit, yscale="log", ylim=(min(values) / 3, 3 * max(values)))
        axes.tick_params("x", labelsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save_stream(path: Path, losses: list[float], streams: list[Stream]) -> None:
    """The training loss, and for each way of decoding time and memory by position."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    left.plot(range(1, len(losses) + 1), losses, color=COMPILED, linewidth=1)
    left.set(title="Training loss", xlabel="step", ylabel="nats per byte")
    for stream, color in zip(streams, (COMPILED, PLAIN), strict=True):
        positions = range(0, len(stream.seconds) - 1, max(2, len(stream.seconds) // 64))
        times = [stream.milliseconds(i, i + positions.step) for i in positions]
        middle.plot(positions, times, color=color, label=stream.name)
        right.plot([size / 1024 for size in stream.memory], color=color, label=stream.name)
    middle.set(title="Time of a token", xlabel="tokens before it", ylabel="milliseconds, median", ylim=0)
    right.set(title="Memory of the text so far", xlabel="tokens", ylabel="KiB", yscale="log")
    for axes in (middle, right):
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_losses(axes: Axes, losses: list[float], compiled: Run, plain: Run, loss_of: Callable[[Step], float]) -> None:
    axes.plot(range(1, len(losses) + 1), losses, color=COMPILED, linewidth=1, label=compiled.name)
    # The steps that both have trained are few and steep: they get axes of their own.
    steps = range(1, len(plain.steps) + 1)
    inset = axes.inset_axes((0.4, 0.5, 0.57, 0.42))
    ours, theirs = ([loss_of(step) for step in run.steps] for run in (compiled, plain))
    inset.plot(steps, ours, color=COMPILED, label=compiled.name)
    inset.plot(steps, theirs, "o", color=PLAIN, fillstyle="none", label=plain.name)
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    inset.set_title(f"both, {len(steps)} steps: equal to {difference:.0e}", fontsize=10)
    inset.legend(fontsize=9)


def draw_times(axes: Axes, compiled: Run, plain: Run) -> None:
    fast, slow = ({part.replace(" ", "\n"): ms for part, ms in run.milliseconds().items()} for run in (compiled, plain))
    draw_pairs(axes, compiled, plain, fast, slow)
    axes.set(title="Median time per batch, and how many times faster", ylabel="milliseconds", yscale="log")
    axes.set_ylim(top=5 * max(slow.values()))


def draw_memory(axes: Axes, compiled: Run, plain: Run) -> None:
    fast, slow = ({"span head:\nloss and backward": run.peak_bytes / 2**20} for run in (compiled, plain))
    draw_pairs(axes, compiled, plain, fast, slow)
    axes.set(title="Peak memory, and how many times less", ylabel="MiB", yscale="log", xlim=(-1, 1))
    axes.set_ylim(bottom=1, top=5 * max(slow.values()))


def draw_pairs(axes: Axes, compiled: Run, plain: Run, fast: dict[str, float], slow: dict[str, float]) -> None:
    for offset, run, values, color in ((-0.2, compiled, fast, COMPILED), (0.2, plain, slow, PLAIN)):
        bars = axes.bar([i + offset for i in range(len(values))], values.values(), 0.4, color=color, label=run.name)
        axes.bar_label(bars, [f"{x:.2f}" if x < 10 else f"{x:.0f}" for x in values.values()], padding=2, fontsize=9)
    axes.set_xticks(range(len(fast)), [f"{part}\n{slow[part] / fast[part]:.3g}x" for part in fast], fontsize=9)
    axes.legend(loc="upper left")


def draw_scores(axes: Axes, scores: dict[str, Score]) -> None:
    labels = list(reversed(scores))
    bars = axes.barh(labels, [scores[label].f1 for label in labels], color="tab:gray")
    bars[-1].set_color(COMPILED)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    axes.set(xlim=(0, 1.1))
    axes.tick_params("y", labelsize=9)
