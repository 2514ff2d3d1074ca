"""Time every family on all that this machine can run; `python -m benchmarks gpu` is the proof on a CUDA machine."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import gpu, plots, report
from benchmarks.harness import Results, append_rows, facts, families, family_names, rows, run_case
from benchmarks.measure import Ceilings

RESULTS = Path(__file__).parent / "results"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    names = family_names()
    epilog = "python -m benchmarks gpu --help: tests, sanitizers and benchmarks on a CUDA machine."
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__, epilog=epilog)
    parser.add_argument("family", nargs="*", help=f"any of: {', '.join(names)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="few cases, short: does it run? Not for quoting")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the CPU, and CUDA where there is one")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads (default: 1 2)")
    parser.add_argument(
        "--output", type=Path, help="folder of CSV and PNG (default: benchmarks/results; --quick: out/bench)"
    )
    parser.add_argument("--seconds", type=float, help="time per case and thread count (default: 4; --quick: 0.3)")
    parser.add_argument("--only", default="", help="only cases whose 'pass shape' contains this")
    parser.add_argument("--report", type=Path, help="also write the tables as markdown")
    parser.add_argument("--commit", help="what to call this version where there is no git checkout")
    options = parser.parse_args(arguments)
    unknown = set(options.family) - set(names)
    if unknown:
        parser.error(f"no such family: {', '.join(sorted(unknown))}")
    options.output = options.output or (Path("out/bench") if options.quick else RESULTS)
    options.seconds = options.seconds or (0.3 if options.quick else 4.0)
    return options


def run(options: argparse.Namespace, device: str, console: Console) -> bool:
    """Run the chosen families on one device; False where a provider gave a wrong result."""
    where = facts(device, options.commit)
    threads = options.threads if device == "cpu" else [torch.get_num_threads()]
    console.rule(f"{where['device']}  torch {where['torch']}  commit {where['commit']}")
    ceilings = {count: Ceilings(device, count) for count in threads}
    right, text = True, []
    for name, family in families().items():
        if options.family and name not in options.family:
            continue
        results, found = Results(), []
        cases = [c for c in family.cases(device, options.quick) if options.only in f"{c.pass_name} {c.label}"]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(name, total=len(cases) * len(threads) + 1)
            for case in cases:
                progress.update(task, description=f"{name}: {case.pass_name} {case.label}")
                for outcome in run_case(family, case, device, threads, options.seconds, ceilings):
                    results.outcomes.append(outcome)
                    found += rows(outcome, where)
                    append_rows(options.output / f"{where['device']}.csv", rows(outcome, where))
                    progress.advance(task)
            progress.update(task, description=f"{name}: accuracy")
            results.accuracy = family.accuracy(device)
            progress.advance(task)
        blocks = report.blocks(results, family.GOALS, device)
        report.show(blocks, console)
        text.append(f"## {name} on {where['device']}\n\n{report.markdown(blocks)}")
        for picture in plots.draw(found, options.output, f"{where['device']}-{name}"):
            console.print(f"  {picture}", highlight=False)
        right &= not any(outcome.wrong for outcome in results.outcomes)
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text("\n".join(text))
    return right


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["gpu"]:
        return gpu.main(arguments[1:])
    options = parse(arguments)
    warnings.filterwarnings("ignore", category=UserWarning)  # peers call torch in ways it has deprecated
    console = Console(width=None if sys.stdout.isatty() else 160)
    devices = [options.device] if options.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    right = [run(options, device, console) for device in devices]
    if not all(right):
        console.print("[red]A provider disagrees with float64: its time is withheld, and this run fails.")
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
