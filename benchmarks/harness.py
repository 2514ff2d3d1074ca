"""Time our ops beside what people use today, in one process, and refuse to time a wrong result.

A family hangs in by being a file bench_<family>.py here; nothing else knows its name. The file defines:

    PROVIDERS    {name: make}, ours first; make(case, inputs) -> Work, or None in its place where a package is absent
    cases(device, quick) -> list[Case]
    make_inputs(shape, dtype, device, ragged=False) -> whatever its providers share
    truth(case, inputs) -> {output name: (float64 tensor, tolerance)}, the reference in float64
    PEER_SLACK   if there is one: how many times our tolerance a peer may use
    floor(case, inputs, ceilings) -> seconds below which no implementation can go on this machine
    GOALS        list[Goal], printed at the end of a run
    accuracy(device) -> list[Accuracy], printed and never written to the CSV
    exercise(device)  every op once over every kernel class, for compute-sanitizer

How a time is taken. Every provider must first agree with the float64 truth. Then all run interleaved (A B C A B C ...)
in one process, because machines drift; a quick provider is called several times in its turn, so that turns are
comparable. The quoted ratio is the median over rounds of (peer's median in that round / ours in that round).
"""

import csv
import importlib
import importlib.util
import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import MOST_CALLS, Ceilings, call_cuda, capture, interleave, peak_bytes, saved_bytes

OURS = "fastnlp_ops"
COLUMNS = ("op", "provider", "pass", "shape", "dtype", "threads", "ms_p20", "ms_p50", "ms_p80", "peak_mib")
COLUMNS += ("device", "torch", "triton", "commit", "date")
MIB = 2**20


@dataclass(frozen=True)
class Case:
    op: str
    pass_name: str
    shape: tuple[int, ...]
    providers: tuple[str, ...]
    dtype: str = "float32"
    ragged: bool = False
    note: str = ""  # why some peers are left out

    @property
    def label(self) -> str:
        return "x".join(map(str, self.shape)) + (" ragged" if self.ragged else "")


class Work(NamedTuple):
    """One provider's part in one case."""

    run: Callable[[], Any]  # what is timed
    outputs: Callable[[Any], dict[str, Tensor]]  # what run() returned, named as in truth()
    inputs: Sequence[Tensor] = ()  # storages that do not count as saved for backward
    graph: bool = False  # on CUDA, time a graph replay too
    kept: float | None = None  # bytes that stay between two runs, an optimizer's state


class Accuracy(NamedTuple):
    name: str
    provider: str
    error: float
    allowed: float


@dataclass
class Outcome:
    """What one case gave on one thread count."""

    case: Case
    threads: int
    floor_ms: float = math.nan
    rounds: dict[str, list[list[float]]] = field(default_factory=dict)  # provider -> rounds -> milliseconds
    graph: list[float] = field(default_factory=list)  # ours, replayed from a CUDA graph
    peak: dict[str, float] = field(default_factory=dict)  # bytes
    saved: dict[str, float] = field(default_factory=dict)  # bytes
    wrong: dict[str, str] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def times(self, provider: str) -> list[float]:
        return [time for turn in self.rounds[provider] for time in turn]

    def median(self, provider: str) -> float:
        return statistics.median(self.times(provider))

    def ratio(self, peer: str) -> float:
        pairs = zip(self.rounds[peer], self.rounds[OURS], strict=True)
        return statistics.median(statistics.median(theirs) / statistics.median(ours) for theirs, ours in pairs)


@dataclass
class Results:
    """Everything one run measured; goals look their numbers up here and get NaN for what was not measured."""

    outcomes: list[Outcome] = field(default_factory=list)
    accuracy: list[Accuracy] = field(default_factory=list)

    def find(self, pass_name: str, label: str, threads: int | None = None) -> Outcome | None:
        for outcome in self.outcomes:
            same = (outcome.case.pass_name, outcome.case.label) == (pass_name, label)
            if same and threads in (None, outcome.threads):
                return outcome
        return None

    def ratio(self, pass_name: str, label: str, peer: str, threads: int | None = None) -> float:
        outcome = self.find(pass_name, label, threads)
        return outcome.ratio(peer) if outcome and {OURS, peer} <= outcome.rounds.keys() else math.nan

    def worst_error(self, provider: str = OURS) -> float:
        """The largest error of `provider` in units of what is allowed."""
        return max((row.error / row.allowed for row in self.accuracy if row.provider == provider), default=math.nan)


class Goal(NamedTuple):
    text: str
    device: str  # "cpu" or "cuda": where it is a goal
    measure: Callable[[Results], float]  # NaN: not measured
    at_least: float | None = None
    at_most: float | None = None

    def met(self, value: float) -> bool:
        return value >= self.at_least if self.at_least is not None else value <= self.at_most


def family_names() -> list[str]:
    """Every <family> of the bench_<family>.py beside this file."""
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def families() -> dict[str, ModuleType]:
    """The bench modules by family; importing them needs a built fastnlp_ops."""
    return {name: importlib.import_module(f"{__package__}.bench_{name}") for name in family_names()}


def optional(module: str) -> ModuleType | None:
    """A peer's module, or None where it is not installed."""
    return importlib.import_module(module) if importlib.util.find_spec(module) else None


# Where and with what


def device_slug(device: str) -> str:
    """The machine's file name in results/: what it computes with, never who it is."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
        name = found[1] if found else platform.machine()
        name = re.sub(r"\((R|TM)\)|CPU|Processor|\d+-Core|@.*", "", name, flags=re.IGNORECASE)
        name += f" {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit_id() -> str:
    """Short commit of this checkout, with a plus where tracked files were changed; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def facts(device: str, commit: str | None = None) -> dict[str, str]:
    triton = optional("triton")
    return {
        "device": device_slug(device),
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else "",
        "commit": commit or commit_id(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


# Rows


def rows(outcome: Outcome, where: dict[str, str]) -> list[dict[str, str]]:
    """CSV rows of one outcome: each provider's times, ours replayed from a graph, saved bytes, and the floor.

    The columns have no place for saved-for-backward bytes: they are rows of their own, pass "<pass>, saved", with the
    size in peak_mib and no times.
    """
    case = outcome.case
    shared = {"op": case.op, "shape": case.label, "dtype": case.dtype, "threads": str(outcome.threads), **where}

    def row(provider: str, pass_name: str, times: Sequence[float], size: float | None) -> dict[str, str]:
        quantiles = dict(zip(("ms_p20", "ms_p50", "ms_p80"), percentiles(times), strict=True)) if times else {}
        numbers = {name: f"{value:.5g}" for name, value in quantiles.items()}
        numbers["peak_mib"] = "" if size is None else f"{size / MIB:.4g}"
        return {name: {**shared, "provider": provider, "pass": pass_name, **numbers}.get(name, "") for name in COLUMNS}

    found = []
    for provider in outcome.rounds:
        found.append(row(provider, case.pass_name, outcome.times(provider), outcome.peak.get(provider)))
        if provider in outcome.saved:
            found.append(row(provider, f"{case.pass_name}, saved", (), outcome.saved[provider]))
    if outcome.graph:
        found.append(row(OURS, f"{case.pass_name}, graph", outcome.graph, None))
    if found:
        found.append(row("floor", case.pass_name, [outcome.floor_ms], None))
    return found


def append_rows(path: Path, new: Sequence[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(new)


def percentiles(times: Sequence[float]) -> tuple[float, float, float]:
    ordered = sorted(times)
    return tuple(ordered[min(len(ordered) - 1, round(p * (len(ordered) - 1)))] for p in (0.2, 0.5, 0.8))


# Correctness before time


def gate(found: dict[str, Tensor], truth: dict[str, tuple[Tensor, float]], slack: float = 1) -> str | None:
    """What is wrong with `found`, or None: no difference may exceed slack * tolerance * max(1, largest truth)."""
    for name, (expected, tolerance) in truth.items():
        if name not in found:
            return f"{name} is missing"
        if found[name].shape != expected.shape:
            return f"{name} has shape {tuple(found[name].shape)}, expected {tuple(expected.shape)}"
        error = (found[name].detach().to(expected) - expected).abs().max().item()
        allowed = slack * tolerance * max(1.0, expected.abs().max().item())
        if not error <= allowed:  # NaN never passes
            return f"{name} is off by {error:.2g}, allowed {allowed:.2g}"
    return None


# One case


def run_case(
    family: ModuleType, case: Case, device: str, threads: Sequence[int], budget_s: float, ceilings: dict[int, Ceilings]
) -> Iterator[Outcome]:
    """Gate, measure the memory of, and time one case on each thread count."""
    inputs = family.make_inputs(case.shape, case.dtype, device, case.ragged)
    torch.set_num_threads(1)  # a truth is thousands of small calls, and those lose time on more
    truth = family.truth(case, inputs)
    peak, saved = {}, {}
    for count in threads:
        torch.set_num_threads(count)
        outcome = Outcome(case, count, peak=peak, saved=saved)
        works = {}
        for name in case.providers:
            if family.PROVIDERS[name] is None:
                outcome.absent.append(name)
                continue
            try:
                work = family.PROVIDERS[name](case, inputs)
                slack = 1 if name == OURS else getattr(family, "PEER_SLACK", 1)
                reason = gate(work.outputs(work.run()), truth, slack)
            except Exception as error:  # a peer that raises is a wrong result with a reason, not the end of the run
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            if reason:
                outcome.wrong[name] = reason
                continue
            works[name] = work
            if name not in peak:
                for tensor in work.inputs:
                    tensor.grad = None  # left from the gate: run() would free it and look smaller than it is
                peak[name] = peak_bytes(work.run, device)
                if case.pass_name.endswith("forward+backward"):
                    saved[name] = saved_bytes(work.run, work.inputs)
                elif work.kept is not None:
                    saved[name] = work.kept
        if works:
            outcome.rounds = interleave({name: work.run for name, work in works.items()}, device, budget_s)
            outcome.floor_ms = family.floor(case, inputs, ceilings[count]) * 1e3
        if device == "cuda" and OURS in works and works[OURS].graph:
            try:
                outcome.graph = call_cuda(capture(works[OURS].run), MOST_CALLS)
            except RuntimeError as error:
                outcome.notes.append(f"not captured in a graph: {error}".splitlines()[0][:200])
        yield outcome
