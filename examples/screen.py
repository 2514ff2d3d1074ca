"""What the examples print on the terminal: text as it was written, progress, tables of scores; how they end."""

from __future__ import annotations

import os
import re
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text
from sentences import InputError, Score, name_of, short, visible


class Screen(Console):
    """A terminal that shows all text, tables' included, as it is: no markup, no emoji codes, no control characters."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text, kept="\n\t"), **options)

    def on_broken_pipe(self) -> None:
        raise  # rich calls this while it handles the BrokenPipeError


def run(name: str, parser: ArgumentParser, argv: list[str] | None, job: Callable[[Namespace, Screen], int]) -> int:
    """The exit code of a script: of its job, or the one that shells expect where the user's input or wish ends it."""
    errors = Screen(stderr=True)
    if sys.stdout is None:  # closed by the shell: >&-
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that are not UTF-8
    try:
        try:
            return job(parser.parse_args(argv), Screen())
        finally:
            sys.stdout.flush()  # here, and not while Python shuts down, a closed pipe can be handled
    except InputError as error:
        errors.print(visible(f"{name}: {error}"))
        return 2
    except KeyboardInterrupt:
        errors.print(f"\n{name}: interrupted")
        return 130
    except OSError as error:
        # Python flushes once more when it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has seen enough: | head
            return 141
        errors.print(f"{name}: {error}")
        return 1


def seed(text: str) -> int:
    """The type of --seed: what torch and random both take."""
    if not re.fullmatch("[0-9]{1,19}", text) or int(text) >= 1 << 63:
        raise ArgumentTypeError(f"must be a number from 0 to 2^63 - 1, got {short(text)}")
    return int(text)


def progress(console: Console, **options: Any) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}", markup=False), console=console, **options)


@contextmanager
def reading_progress(screen: Screen, files: int) -> Iterator[Callable[[], None]]:
    """What is to be called for each file."""
    with progress(screen) as bar:
        task = bar.add_task("reading", total=files, note="files of the standard library")
        yield lambda: bar.advance(task)


def prediction_progress() -> Progress:
    """On the standard error, and only where it is a terminal: the predictions themselves may go into a file."""
    errors = Screen(stderr=True)
    return progress(errors, transient=True, disable=not errors.is_terminal)


def score_table(title: str, heads: dict[str, dict[str | None, Score]]) -> Table:
    """Scores by label, those of several heads side by side."""
    columns = [Column("type", overflow="fold", vertical="bottom")]
    for head in heads:
        # GlobalPointer in two lines, to leave room for the types on a terminal of 80 characters.
        first = re.sub("(?<=[a-z])(?=[A-Z])", "\n", head) + "\nprecision"
        columns += [Column(name, justify="right", no_wrap=True) for name in (first, "recall", "F1", "gold")]
    table = Table(*columns, title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for label in dict.fromkeys(label for scores in heads.values() for label in scores):
        cells = []
        for scores in heads.values():
            score = scores.get(label)
            cells += [*(f"{value:.3f}" for value in score[:3]), str(score.support)] if score else [""] * 4
        table.add_row(name_of(label), *cells)
    return table
