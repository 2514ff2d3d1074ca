"""Say what a run found, on the terminal and as markdown: times, ratios, memory and floors; accuracy; goals."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.harness import MIB, OURS, Goal, Outcome, Results


class Block(NamedTuple):
    title: str
    header: tuple[str, ...]
    lines: list[tuple[str, ...]]
    notes: list[str]


def blocks(results: Results, goals: Sequence[Goal], device: str) -> list[Block]:
    found = [times(results.outcomes)]
    if results.accuracy:
        header = ("set", "provider", "largest error", "allowed", "")
        lines = []
        for name, provider, error, allowed in results.accuracy:
            word = verdict(error <= allowed) if provider == OURS else ""
            lines.append((name, provider, f"{error:.2g}", f"{allowed:.2g}", word))
        found.append(Block("Accuracy against float64", header, lines, []))
    here = [goal for goal in goals if goal.device == device]
    if here:
        found.append(
            Block("Goals", ("goal", "wanted", "measured", ""), [goal_line(goal, results) for goal in here], [])
        )
    return found


def times(outcomes: Sequence[Outcome]) -> Block:
    """A line per provider: median time, how many times ours is faster, memory; ours with its distance to the floor."""
    header = (
        "pass",
        "shape",
        "thr",
        "provider",
        "ms p50",
        "ours faster",
        "peak MiB",
        "saved MiB",
        "floor ms",
        "over floor",
    )
    lines, notes = [], {}
    for o in outcomes:
        where = (
            o.case.pass_name,
            o.case.label + ("" if o.case.dtype == "float32" else f" {o.case.dtype}"),
            str(o.threads),
        )
        for name in o.rounds:
            ratio = "" if name == OURS or OURS not in o.rounds else f"{short(o.ratio(name))}x"
            memory = tuple(short(table[name] / MIB) if name in table else "" for table in (o.peak, o.saved))
            floor = (short(o.floor_ms), f"{short(o.median(name) / o.floor_ms)}x")
            lines.append((*where, name, short(o.median(name)), ratio, *memory, *floor))
        if o.graph:
            replay = statistics.median(o.graph)
            floor = (short(o.floor_ms), f"{short(replay / o.floor_ms)}x")
            lines.append((*where, f"{OURS}, graph", short(replay), "", "", "", *floor))
        lines += [(*where, name, "WRONG", reason, "", "", "", "") for name, reason in o.wrong.items()]
        for note in (o.case.note, *o.notes, *(f"{name} is not installed" for name in o.absent)):
            if note:
                notes.setdefault(note, []).append(f"{where[0]} {where[1]}")
    said = [f"{note} ({', '.join(dict.fromkeys(where))})" for note, where in notes.items()]
    return Block("Times, interleaved in one process", header, lines, said)


def short(value: float) -> str:
    """Three significant digits, never a power of ten."""
    return (
        f"{value:,.0f}"
        if value >= 100
        else f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"
        if value > 0
        else "0"
    )


def goal_line(goal: Goal, results: Results) -> tuple[str, str, str, str]:
    value = goal.measure(results)
    unit = "x" if goal.at_least is not None else ""
    wanted = f">= {goal.at_least}x" if goal.at_least is not None else f"<= {goal.at_most}"
    if math.isnan(value):
        return goal.text, wanted, "", "not measured"
    return goal.text, wanted, f"{short(value)}{unit}", verdict(goal.met(value))


def verdict(good: bool) -> str:
    return "met" if good else "MISSED"


def show(found: Sequence[Block], console: Console) -> None:
    for block in found:
        table = Table(title=block.title, title_justify="left", header_style="bold")
        for column, name in enumerate(block.header):
            table.add_column(name, justify="left" if column < 2 or name in ("provider", "") else "right")
        for index, line in enumerate(block.lines):
            same = index + 1 < len(block.lines) and block.lines[index + 1][:3] == line[:3]
            bad = "WRONG" in line or "MISSED" in line
            table.add_row(*line, style="red" if bad else None, end_section=block.title.startswith("Times") and not same)
        console.print(table)
        for note in block.notes:
            console.print(f"  {note}", highlight=False)


def markdown(found: Sequence[Block]) -> str:
    text = []
    for block in found:
        text += [f"### {block.title}", "", "| " + " | ".join(block.header) + " |", "|---" * len(block.header) + "|"]
        text += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in block.lines]
        text += ["", *(f"- {note}" for note in block.notes), ""]
    return "\n".join(text)
