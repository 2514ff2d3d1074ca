"""python -m benchmarks gpu: prove the kernels on a CUDA machine, in parts that resume, in under 25 minutes.

The wheel is unpacked over a copy of this checkout, so that what is proved is what would be installed; nothing is
installed and nothing needs a network. Then come the parts: GPU tests, compute-sanitizer's memcheck and racecheck over
every op, and each family's benchmark against the peers present. A part that passed is not run again for the same
commit; one that was cut off or failed is. The machine's clocks and settings are left alone.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from benchmarks.harness import commit_id, facts, families, family_names

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu"
LEFT_OUT = (".git", ".venv", "build", "dist", "out", "*.so", "*.egg-info", "__pycache__", ".*_cache")
# Kernels of torch and of NVIDIA's libraries are not ours to check. Leaving those out by (mangled) name, and not picking
# ours by name, keeps a renamed kernel from slipping out of the check unseen.
NOT_OURS = "kns=at6native,kns=at4cuda,kns=cublas,kns=cutlass,kns=nvjet"


@dataclass
class Part:
    name: str
    seconds: int  # at most
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    must_say: str = ""  # besides exit code 0
    report: Path | None = None  # a markdown file that the command writes, for the summary


def parts(output: Path, commit: str) -> list[Part]:
    """Every part in the order they run. A later family needs no line here: its benchmark and its kernels are found."""
    python, module = sys.executable, ["-m", "benchmarks"]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    # Each tensor its own allocation: in torch's pool an access past the end of one lands in another and goes unseen.
    apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def watch(tool: str) -> list[str]:
        flags = ["--tool", tool, "--error-exitcode", "9", "--kernel-name-exclude", NOT_OURS]
        return [sanitizer, *flags, python, *module, "gpu", "--exercise"]

    def bench(family: str) -> Part:
        report = WORK / f"report-{family}.md"
        where = ["--output", str(output), "--report", str(report), "--commit", commit]
        command = [python, *module, family, "--device", "cuda", "--seconds", "2", *where]
        return Part(f"bench-{family}", 300, command, report=report)

    return [
        Part("tests", 420, [python, "-m", "pytest", "tests", "--device", "cuda", "-q", "-p", "no:cacheprovider"]),
        Part("memcheck", 240, watch("memcheck"), apart, must_say="SUMMARY: 0 errors"),
        Part("racecheck", 240, watch("racecheck"), apart, must_say="SUMMARY: 0 hazards"),
        *(bench(family) for family in family_names()),
    ]


# The stage: this checkout with the wheel's package in place of its own


def find_wheel(given: Path | None) -> Path:
    """The given wheel, the newest in dist/, or one built here and now."""
    if given:
        return given.resolve(strict=True)
    wheel = newest(ROOT / "dist")
    if wheel is None:
        folder = WORK / "wheel"
        shutil.rmtree(folder, ignore_errors=True)
        flags = ["--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", *flags, str(ROOT)], check=True)
        wheel = newest(folder)
    return wheel


def newest(folder: Path) -> Path | None:
    return max(folder.glob("*.whl"), key=lambda path: path.stat().st_mtime, default=None)


def set_stage(wheel: Path, peers: Path | None) -> tuple[Path, dict[str, str]]:
    """Copy the checkout, put the wheel's package over it, and return the folder and the environment to run in."""
    stage, beside = WORK / "stage", WORK / "peers"
    for folder in (stage, beside):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT, stage, ignore=shutil.ignore_patterns(*LEFT_OUT))
    shutil.rmtree(stage / "fastnlp_ops")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(stage)
    if peers:
        wheels = sorted(map(str, peers.resolve(strict=True).glob("*.whl")))
        flags = ["--no-index", "--no-deps", "--no-compile", "--target", str(beside)]
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *flags, *wheels], check=True)
    path = os.pathsep.join(map(str, filter(None, (stage, beside, os.environ.get("PYTHONPATH")))))
    return stage, os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


# Parts


def run_part(part: Part, stage: Path, environment: dict[str, str], log: Path, limit_s: float, console: Console) -> dict:
    """Run one part under its limit; everything it prints goes to the log, its last line into the result."""
    started, said, last = time.monotonic(), not part.must_say, ""
    if part.report:
        part.report.unlink(missing_ok=True)
    with log.open("a") as file, console.status(part.name) as line_below:
        file.write(f"\n=== {part.name}: {' '.join(part.command)}\n")
        flags = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        try:  # a session of its own, so that the limit ends its children too
            process = subprocess.Popen(
                part.command, cwd=stage, env=environment | part.environment, start_new_session=True, **flags
            )
        except OSError as error:
            return {"status": "failed", "seconds": 0, "last": f"{part.command[0]}: {error.strerror}"}
        overdue = threading.Event()

        def end() -> None:
            overdue.set()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit_s, end)
        timer.start()
        with process:
            for line in process.stdout:
                file.write(line)
                last = line.strip() or last
                said = said or part.must_say in line
                line_below.update(f"{part.name} {time.monotonic() - started:.0f}/{limit_s:.0f} s: {escape(last[:100])}")
        timer.cancel()
    seconds = round(time.monotonic() - started)
    if overdue.is_set():
        return {"status": "cut off", "seconds": seconds, "last": last[:300]}
    result = {
        "status": "passed" if process.returncode == 0 and said else "failed",
        "seconds": seconds,
        "last": last[:300],
    }
    if part.report and part.report.exists():
        result["report"] = part.report.read_text()
    return result


def load_state(path: Path, key: str) -> dict:
    """What an earlier run of the same key finished; nothing where the key is another."""
    state = json.loads(path.read_text()) if path.exists() else {}
    return state if state.get("key") == key else {"key": key, "parts": {}}


def run_parts(
    chosen: Sequence[Part],
    state_path: Path,
    key: str,
    stage: Path,
    environment: dict[str, str],
    seconds: float,
    console: Console,
) -> dict:
    """Run what has not passed yet, save the state after each part, and stop where less than 20 seconds are left."""
    state, deadline = load_state(state_path, key), time.monotonic() + seconds
    for part in chosen:
        before = state["parts"].get(part.name, {})
        left = deadline - time.monotonic()
        if before.get("status") == "passed":
            console.print(f"{part.name:12} passed before, skipped")
            continue
        if left < 20:
            console.print(f"{part.name:12} not started: no time left. Run the same command again")
            continue
        limit = min(part.seconds, left)
        result = run_part(part, stage, environment, state_path.parent / "log.txt", limit, console)
        state["parts"][part.name] = result
        state_path.write_text(json.dumps(state, indent=1))
        console.print(f"{part.name:12} {result['status']} in {result['seconds']} s: {escape(result['last'])}")
    return state


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    device = torch.cuda.get_device_properties(0)
    return {
        "GPU": f"{device.name}, {device.multi_processor_count} multiprocessors, {device.total_memory / 2**30:.0f} GiB",
        "driver": driver,
        "CUDA of torch": str(torch.version.cuda),
        "Python": sys.version.split()[0],
    }


def summary(state: dict, about: dict[str, str]) -> str:
    """The summary as markdown: what, where, each part's outcome, and the benchmark tables."""
    lines = ["# GPU proof", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    lines += ["| part | outcome | seconds | last line |", "|---|---|---|---|"]
    for name, part in state["parts"].items():
        lines.append(f"| {name} | {part['status']} | {part['seconds']} | {part['last'].replace('|', '/')} |")
    lines += ["", *(part["report"] for part in state["parts"].values() if "report" in part)]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0 where every chosen part has passed, 1 where not, 2 without CUDA."""
    parser = argparse.ArgumentParser("python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--wheel", type=Path, help="the wheel to prove (default: newest of dist/, else built here)")
    parser.add_argument("--peers", type=Path, help="folder of wheels of the packages to compare with")
    parser.add_argument("--output", type=Path, default=Path("out/gpu"), help="default: out/gpu")
    parser.add_argument("--part", nargs="+", default=[], help="of tests, memcheck, racecheck, bench-<family>")
    parser.add_argument("--minutes", type=float, default=24, help="start no part after this (default: 24)")
    parser.add_argument("--commit", help="what to call this version where there is no git checkout")
    parser.add_argument("--exercise", action="store_true", help="call every op once: what the sanitizers watch")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("The GPU proof needs a CUDA device, and torch finds none on this machine.")
        return 2
    if options.exercise:
        for family in families().values():
            family.exercise("cuda")
        return 0
    started, console = time.monotonic(), Console()
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    commit = options.commit or commit_id()
    every = parts(output, commit)
    unknown = set(options.part) - {part.name for part in every}
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    chosen = [part for part in every if not options.part or part.name in options.part]
    wheel = find_wheel(options.wheel)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()[:12]
    settled = commit != "unknown" and not commit.endswith("+")
    key = commit if settled else f"{commit} {digest}"  # a changed checkout is told apart by its wheel
    stage, environment = set_stage(wheel, options.peers)
    seconds = options.minutes * 60 - (time.monotonic() - started)
    state = run_parts(chosen, output / "state.json", key, stage, environment, seconds, console)
    about = {**machine(), **facts("cuda", commit), "wheel": f"{wheel.name}, sha256 {digest}"}
    (output / "summary.md").write_text(summary(state, about))
    console.print(f"{output / 'summary.md'}", highlight=False)
    return 0 if all(state["parts"].get(part.name, {}).get("status") == "passed" for part in chosen) else 1
