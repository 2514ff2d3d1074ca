"""The pictures of runs: loss curves, time and memory of compiled and plain parts, and F1 by type."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from files import write_bytes
from fonts import without_glyph
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from sentences import Score, name_of
from training import Run, Step, Trained

if TYPE_CHECKING:
    from decode_stream import Stream

COMPILED, PLAIN = "tab:blue", "tab:orange"
MOST_LABELS = 30  # in a picture; more would be too small to read
LABEL_LENGTH = 40
NO_GLYPH = "\N{WHITE SQUARE}"

# Names of types may hold $, _ and \\: all text is drawn as it is, whatever the user's own matplotlibrc says.
matplotlib.rcdefaults()
matplotlib.rcParams["text.parse_math"] = False


def save_picture(
    path: Path,
    losses: list[tuple[float, float]],
    compiled: Run,
    plain: Run,
    scores: dict[str, dict[str | None, Score]],
) -> str:
    """One column for the losses (of CRF and spans), one for time and memory, one for the scores of each head.

    What the picture could not show is told in the answer.
    """
    remark = missing_names(scores.values())  # before the axes are made, which take the fonts that there are then
    figure, axes = plt.subplots(2, 3, figsize=(16, 10), layout="constrained", width_ratios=(1, 1.2, 1))
    parts = {
        "CRF": ("negative log-likelihood per token", lambda step: step.crf.loss),
        "GlobalPointer": ("multilabel cross entropy", lambda step: step.spans.loss),
    }
    for row, (head, (unit, loss_of)) in enumerate(parts.items()):
        draw_losses(axes[row, 0], [pair[row] for pair in losses], compiled, plain, loss_of)
        axes[row, 0].set(title=f"{head}: training loss", xlabel="step", ylabel=unit)
        log_scale(axes[row, 0])
        draw_scores(axes[row, 2], f"{head}: F1 on held-out text", scores[head])
    draw_times(axes[0, 1], compiled, plain)
    draw_memory(axes[1, 1], compiled, plain)
    save(figure, path)
    return remark


def save_loss_and_scores(path: Path, losses: list[float], scores: dict[str | None, Score]) -> str:
    remark = missing_names([scores])
    height = max(4, min(len(scores), MOST_LABELS) / 5)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, height), layout="constrained")
    left.plot(range(1, len(losses) + 1), losses, color=COMPILED, linewidth=1)
    left.set(title="Training loss", xlabel="step", ylabel="multilabel cross entropy")
    log_scale(left)
    draw_scores(right, "F1 on held-out text", scores)
    save(figure, path)
    return remark


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
    log_scale(left)
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
        axes.set(title=title, ylabel=unit)
        log_scale(axes, bottom=min(values) / 3, top=3 * max(values))
        axes.tick_params("x", labelsize=8)
    save(figure, path)


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
    right.set(title="Memory of the text so far", xlabel="tokens", ylabel="KiB")
    log_scale(right)
    for axes in (middle, right):
        axes.legend()
    save(figure, path)


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
    axes.set(title="Median time per batch, and how many times faster", ylabel="milliseconds")
    log_scale(axes, top=5 * max(slow.values()))


def draw_memory(axes: Axes, compiled: Run, plain: Run) -> None:
    fast, slow = ({"span head:\nloss and backward": run.peak_bytes / 2**20} for run in (compiled, plain))
    draw_pairs(axes, compiled, plain, fast, slow)
    axes.set(title="Peak memory, and how many times less", ylabel="MiB", xlim=(-1, 1))
    log_scale(axes, bottom=min(fast.values()) / 3, top=5 * max(slow.values()))


def draw_pairs(axes: Axes, compiled: Run, plain: Run, fast: dict[str, float], slow: dict[str, float]) -> None:
    for offset, run, values, color in ((-0.2, compiled, fast, COMPILED), (0.2, plain, slow, PLAIN)):
        bars = axes.bar([i + offset for i in range(len(values))], values.values(), 0.4, color=color, label=run.name)
        axes.bar_label(bars, [f"{x:.2f}" if x < 10 else f"{x:.0f}" for x in values.values()], padding=2, fontsize=9)
    axes.set_xticks(range(len(fast)), [f"{part}\n{slow[part] / fast[part]:.3g}x" for part in fast], fontsize=9)
    axes.legend(loc="upper left")


def draw_scores(axes: Axes, title: str, scores: dict[str | None, Score]) -> None:
    labels = list(scores)[: 1 + MOST_LABELS]
    values = [scores[label].f1 for label in labels]
    bars = axes.barh(range(len(labels)), values, color=[COMPILED] + ["tab:gray"] * (len(labels) - 1))
    axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=9)
    axes.set(xlim=(0, 1.1), title=title)
    names = [name_of(label, LABEL_LENGTH) for label in labels]
    missing = without_glyph(names)
    axes.set_yticks(range(len(labels)), ["".join(NO_GLYPH if c in missing else c for c in name) for name in names])
    axes.tick_params("y", labelsize=9)
    axes.invert_yaxis()
    if len(scores) > len(labels):
        axes.set_xlabel(f"the {MOST_LABELS} most frequent of {len(scores) - 1} types")


def missing_names(heads: Iterable[dict[str | None, Score]]) -> str:
    """Finds fonts for the names; a sentence on those that no installed font can draw, empty where there are none."""
    shown = dict.fromkeys(label for scores in heads for label in list(scores)[: 1 + MOST_LABELS])
    names = [name_of(label, LABEL_LENGTH) for label in shown]
    missing = without_glyph(names)
    lost = [name for name in names if missing & set(name)]
    if not lost:
        return ""
    more = f" and {len(lost) - 10} more" if len(lost) > 10 else ""
    return (
        f"no installed font has all characters of {', '.join(lost[:10])}{more}: the picture has squares in their "
        "place (Debian and Ubuntu have fonts for Chinese, Japanese and Korean in the package fonts-noto-cjk, for other "
        "scripts in fonts-noto-core)"
    )


class PlainNumbers(LogFormatter):
    """0.1, where matplotlib would write 10^-1 as a formula: there are none, or names would be taken for some."""

    def __call__(self, value: float, position: int | None = None) -> str:
        return f"{value:g}" if super().__call__(value, position) else ""


def log_scale(axes: Axes, **limits: float) -> None:
    axes.set_yscale("log")
    axes.set_ylim(**limits)
    axes.yaxis.set_major_formatter(PlainNumbers())
    axes.yaxis.set_minor_formatter(PlainNumbers())


def save(figure: Figure, path: Path) -> None:
    content = BytesIO()
    figure.savefig(content, dpi=120)
    plt.close(figure)
    write_bytes(path, content.getvalue())
