"""Pictures of a run's rows: time against size, memory against size, distance to the floor."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.harness import OURS

# Okabe and Ito's colours, told apart by colour-blind readers, each with its own marker for print.
STYLES = [("#0072B2", "o"), ("#000000", "s"), ("#D55E00", "^"), ("#009E73", "D"), ("#CC79A7", "v"), ("#E69F00", "P")]
PLAIN = FuncFormatter(lambda value, _: f"{value:,.12g}")  # 0.01, 1, 1,000: no powers of ten
Row = dict[str, str]


def draw(rows: Sequence[Row], folder: Path, stem: str) -> list[Path]:
    """Write <stem>-{time,memory,floor}.png from CSV rows (float32, fewest threads) and return their paths."""
    if not rows:
        return []
    fewest = min(rows, key=lambda row: int(row["threads"]))["threads"]
    chosen = [row for row in rows if row["threads"] == fewest and row["dtype"] == "float32"]
    about = (
        f"{rows[0]['device']}, {fewest} thread{'s' * (fewest != '1')}, torch {rows[0]['torch']}, {rows[0]['commit']}"
    )
    figures = {
        "time": against_size(chosen, "ms_p50", "milliseconds (median; bar: p20-p80)", f"Time: {about}"),
        "memory": against_size(chosen, "peak_mib", "MiB beyond inputs at the peak", f"Peak memory: {about}"),
        "floor": distance(chosen, f"Time over the floor (bytes, multiply-adds, steps): {about}"),
    }
    paths = []
    for name, figure in figures.items():
        path = folder / f"{stem}-{name}.png"
        figure.savefig(path, dpi=120, bbox_inches="tight")
        plt.close(figure)
        paths.append(path)
    return paths


def scores(row: Row) -> int:
    """Size of a case: the product of its shape."""
    return math.prod(int(n) for n in row["shape"].split()[0].split("x"))


def timed(rows: Sequence[Row]) -> list[Row]:
    """Rows with a time; a graph replay becomes a provider of its pass."""
    found = []
    for row in rows:
        name, _, graph = row["pass"].partition(", ")
        if row["ms_p50"]:
            found.append({**row, "pass": name, "provider": f"{row['provider']}, {graph}" if graph else row["provider"]})
    return found


def style_of(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    names = [name for name in dict.fromkeys(row["provider"] for row in rows) if name != "floor"]
    return dict(zip(sorted(names, key=lambda name: not name.startswith(OURS)), STYLES, strict=False))


def finish(figure: Figure, title: str) -> Figure:
    """The title on top, one legend of every provider below the panels, outside the data."""
    handles = {text: line for axis in figure.axes for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", frameon=False, ncols=len(handles))
    figure.suptitle(title, fontsize=11)
    return figure


def against_size(rows: Sequence[Row], column: str, label: str, title: str) -> Figure:
    """One panel per pass, a line per provider over the number of emission scores; the floor dashed."""
    rows = [row for row in timed(rows) if row[column] and "ragged" not in row["shape"]]
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    across = min(2, len(passes))
    down = math.ceil(len(passes) / across)
    size = (5.5 * across, 3.9 * down + 0.5)
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, sharey=True, layout="constrained")
    styles = style_of(rows)
    for axis, name in zip(axes.flat, passes, strict=False):
        panel(axis, [row for row in rows if row["pass"] == name], column, styles)
        axis.set_title(name, fontsize=10)
    for axis in axes[:, 0]:
        axis.set_ylabel(label)
    for axis in axes.flat[len(passes) :]:
        axis.set_visible(False)
    return finish(figure, title)


def panel(axis: Axes, rows: Sequence[Row], column: str, styles: dict[str, tuple[str, str]]) -> None:
    for name in [*styles, "floor"]:
        found = sorted((row for row in rows if row["provider"] == name), key=scores)
        if not found:
            continue
        x, y = [scores(row) for row in found], [float(row[column]) for row in found]
        if name == "floor":
            axis.plot(x, y, color="0.5", linestyle="--", marker="_", markersize=12, label="floor", zorder=1)
            continue
        color, marker = styles[name]
        ours = name.startswith(OURS)
        axis.plot(
            x,
            y,
            color=color,
            marker=marker,
            markersize=6,
            label=name,
            linewidth=2 if ours else 1.2,
            zorder=3 if ours else 2,
        )
        if column == "ms_p50":
            axis.vlines(
                x, [float(r["ms_p20"]) for r in found], [float(r["ms_p80"]) for r in found], color=color, alpha=0.6
            )
    ticks = {scores(row): row["shape"] for row in rows}
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(list(ticks), list(ticks.values()), rotation=35, ha="right", fontsize=8)
    axis.set_xticks([], minor=True)
    axis.yaxis.set_major_formatter(PLAIN)
    axis.set_xlabel("shape (spaced by its number of emission scores)", fontsize=9)
    axis.margins(x=0.08)
    axis.grid(True, which="major", color="0.9")


def distance(rows: Sequence[Row], title: str) -> Figure:
    """A row per case: every provider's time as a multiple of the floor; the closer to 1, the less is left to gain."""
    floors = {(row["pass"], row["shape"]): float(row["ms_p50"]) for row in rows if row["provider"] == "floor"}
    found = [row for row in timed(rows) if row["provider"] != "floor"]
    cases = sorted(
        {(row["pass"], row["shape"]): scores(row) for row in found}.items(), key=lambda item: (item[0][0], item[1])
    )
    places = {case: -index for index, (case, _) in enumerate(cases)}
    figure, axis = plt.subplots(figsize=(9, 0.36 * len(cases) + 2), layout="constrained")
    styles = style_of(found)
    for index, (name, (color, marker)) in enumerate(styles.items()):
        mine = [((row["pass"], row["shape"]), float(row["ms_p50"])) for row in found if row["provider"] == name]
        y = [
            places[case] + 0.12 * ((len(styles) - 1) / 2 - index) for case, _ in mine
        ]  # apart, so that equals both show
        axis.scatter(
            [time / floors[case] for case, time in mine], y, color=color, marker=marker, s=40, label=name, zorder=3
        )
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(PLAIN)
    axis.axvline(1, color="0.5", linestyle="--", label="floor")
    axis.set_yticks(list(places.values()), [f"{name}   {shape}" for name, shape in places], fontsize=8)
    axis.set_xlabel("times the floor")
    axis.grid(True, axis="both", which="major", color="0.9")
    return finish(figure, title)
