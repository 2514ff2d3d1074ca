"""What the examples print on the terminal: progress bars and tables of scores."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sentences import Score


def progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=console)


def score_table(title: str, heads: dict[str, dict[str, Score]]) -> Table:
    """Scores by label, those of several heads side by side."""
    table = Table("\ntype", title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in heads:
        table.add_column(f"{head}\nprecision", justify="right")
        for name in ("recall", "F1", "number"):
            table.add_column(f"\n{name}", justify="right")
    for label in dict.fromkeys(label for scores in heads.values() for label in scores):
        cells = []
        for scores in heads.values():
            score = scores.get(label)
            cells += [*(f"{value:.3f}" for value in score[:3]), str(score.support)] if score else [""] * 4
        table.add_row(label or "(no type)", *cells)
    return table
