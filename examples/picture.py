"""The picture of a run: loss curves, the time of the two CRFs, and F1 by type."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from sentences import Score
from training import Run, largest_loss_difference

COMPILED, PLAIN = "tab:blue", "tab:orange"


def save_picture(path: Path, losses: list[float], compiled: Run, plain: Run, scores: dict[str, Score]) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    draw_losses(left, losses, compiled, plain)
    draw_times(middle, compiled, plain)
    draw_scores(right, scores)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_losses(axes: Axes, losses: list[float], compiled: Run, plain: Run) -> None:
    axes.plot(range(1, len(losses) + 1), losses, color=COMPILED, linewidth=1, label=compiled.name)
    axes.set(title="Training loss", xlabel="step", ylabel="negative log-likelihood per token", yscale="log")

    # The steps that both have trained are few and steep: they get axes of their own.
    steps = range(1, len(plain.steps) + 1)
    inset = axes.inset_axes((0.4, 0.5, 0.57, 0.42))
    inset.plot(steps, [step.loss for step in compiled.steps], color=COMPILED, label=compiled.name)
    inset.plot(steps, [step.loss for step in plain.steps], "o", color=PLAIN, fillstyle="none", label=plain.name)
    inset.set_title(f"both, {len(steps)} steps: equal to {largest_loss_difference(compiled, plain):.0e}", fontsize=10)
    inset.legend(fontsize=9)


def draw_times(axes: Axes, compiled: Run, plain: Run) -> None:
    fast, slow = compiled.milliseconds(), plain.milliseconds()
    for offset, run, times, color in ((-0.2, compiled, fast, COMPILED), (0.2, plain, slow, PLAIN)):
        bars = axes.bar([i + offset for i in range(len(times))], times.values(), 0.4, color=color, label=run.name)
        axes.bar_label(bars, [f"{ms:.2f}" if ms < 10 else f"{ms:.0f}" for ms in times.values()], padding=2, fontsize=9)
    axes.set_xticks(range(len(fast)), [f"{part}\n{slow[part] / fast[part]:.3g}x" for part in fast])
    axes.set(title="Median time per batch, and how many times faster", ylabel="milliseconds", yscale="log")
    axes.set_ylim(top=5 * max(slow.values()))
    axes.legend(loc="upper left")


def draw_scores(axes: Axes, scores: dict[str, Score]) -> None:
    labels = list(reversed(scores))
    bars = axes.barh(labels, [scores[label].f1 for label in labels], color="tab:gray")
    bars[-1].set_color(COMPILED)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    axes.set(title="Entity F1 on held-out text", xlim=(0, 1.1))
