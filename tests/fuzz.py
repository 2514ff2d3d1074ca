"""`make fuzz MINUTES=n`: draws of tests/fuzz_draws.py with new seeds for n minutes, of every family in turn.

python tests/fuzz.py --minutes 10
python tests/fuzz.py crf 1234        runs one draw again, as the report of a failure says
"""

import argparse
import random
import sys
import time
import traceback

import fuzz_draws
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


def main() -> int:
    """The number of draws that failed, at most 1 as an exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", nargs="?", choices=fuzz_draws.FAMILIES, help="of one draw")
    parser.add_argument("seed", nargs="?", type=int, help="of one draw")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to go on")
    options = parser.parse_args()
    if options.seed is not None:
        fuzz_draws.run(options.family, options.seed)
        return 0
    families = [options.family] if options.family else list(fuzz_draws.FAMILIES)
    seed, console, failed, drawn = random.SystemRandom().randrange(10**9), Console(), 0, 0
    console.print(f"{', '.join(families)} from seed {seed} on, torch {torch.__version__}")
    begin = now = time.monotonic()
    seconds = options.minutes * 60
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=seconds)
        while now - begin < seconds:
            family = families[drawn % len(families)]
            try:
                fuzz_draws.run(family, seed + drawn)
            except Exception:  # whatever a draw raises is what is looked for
                failed += 1
                console.print(traceback.format_exc().splitlines()[-1], style="red", markup=False)
                console.print(f"  again: python tests/fuzz.py {family} {seed + drawn}", markup=False)
            drawn += 1
            now = time.monotonic()
            progress.update(task, completed=now - begin, description=f"{drawn} draws, {failed} failed, {family}")
    console.print(f"{drawn} draws, {failed} failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
