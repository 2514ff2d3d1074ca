"""Train the tagger of label_python.py with three optimizers, from the same weights on the same batches, and draw what
their states and their steps cost at equal loss: Adafactor of fastnlp_ops and of transformers, and torch's fused AdamW.

python examples/compare_optimizers.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

import before_torch  # noqa: F401

# isort: split
import torch
from files import check_writable
from picture import save_optimizers
from python_corpus import KINDS, LABELS, standard_library
from rich.box import SIMPLE_HEAD
from rich.table import Table
from screen import Screen, progress, reading_progress, run, seed
from sentences import InputError
from tagger import Labels, Tagger, batches, encode
from torch import nn
from torch.optim import AdamW, Optimizer
from training import ADAM_EPSILON, LEARNING_RATE, Trained, Trainer

from fastnlp_ops import Adafactor

BATCH_SIZE = 16
FILES = 40  # of the standard library
STEPS, QUICK_STEPS = 80, 20
COMPARED_STEPS = 10
# Of the two Adafactors, relative, over COMPARED_STEPS; later on training amplifies rounding. Over four seeds they came
# up to 4e-6 apart. A learning rate that is off by a hundredth showed as 1e-2.
LOSS_TOLERANCE = 1e-4
# Without momentum, half of Adam's learning rate. As there, a gradient that is nothing but rounding is not to count.
OPTIONS = {
    "lr": LEARNING_RATE / 2,
    "eps": (ADAM_EPSILON**2, 1e-3),
    "scale_parameter": False,
    "relative_step": False,
}


def ours(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return Adafactor(parameters, **OPTIONS)


def transformers_adafactor(parameters: Iterable[nn.Parameter]) -> Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(parameters, **OPTIONS)


def adamw(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return AdamW(parameters, LEARNING_RATE, eps=ADAM_EPSILON, fused=True)


def optimizers(screen: Screen) -> dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]]:
    found = {"fastnlp_ops Adafactor": ours, "transformers Adafactor": transformers_adafactor, "torch AdamW": adamw}
    if find_spec("transformers") is None:
        screen.print("transformers is not installed: its Adafactor is left out")
        del found["transformers Adafactor"]
    return found


def train(args: argparse.Namespace, screen: Screen) -> int:
    steps = (QUICK_STEPS if args.quick else STEPS) if args.steps is None else args.steps
    if steps < 1:
        raise InputError(f"--steps must be at least 1, got {steps}")
    labels = Labels(LABELS, "BIO", KINDS)
    with reading_progress(screen, FILES) as on_file:
        sentences = [sentence for file in standard_library(args.seed, FILES, on_file) for sentence in file]
    picture = args.output / "compare_optimizers.png"
    check_writable(picture)
    trained = []
    for name, make_optimizer in optimizers(screen).items():
        torch.manual_seed(args.seed)
        trained.append(Trained(name, Trainer(Tagger(labels), steps, make_optimizer)))
    count = sum(p.numel() for p in trained[0].trainer.tagger.parameters())
    screen.print(f"{len(sentences)} sentences, {count} parameters")
    with progress(screen) as bar:
        task = bar.add_task("training", total=steps, note="")
        # Step by step in turn, so that a machine which slows down slows all.
        for batch in batches(encode(sentences, labels), BATCH_SIZE, steps, args.seed):
            for one in trained:
                one.step(batch)
            bar.update(task, advance=1, note=", ".join(f"{one.losses[-1]:.4f}" for one in trained))

    level = equal_loss(trained)
    screen.print(cost_table(trained, level))
    save_optimizers(picture, trained, level)
    screen.print(f"picture: {picture}")
    return report_losses(trained, screen)


def equal_loss(trained: list[Trained]) -> float:
    """The lowest loss that all have reached."""
    return max(min(one.running_losses()) for one in trained)


def cost_table(trained: list[Trained], level: float) -> Table:
    title = f"The way to a loss of {level:.3f}"
    table = Table("optimizer", "state", "median step", "steps", "in the optimizer", title=title, box=SIMPLE_HEAD)
    for one in trained:
        steps, milliseconds = one.steps_to(level), one.milliseconds()
        state = f"{one.state_bytes() / 2**20:.3f} MiB"
        table.add_row(one.name, state, f"{milliseconds:.2f} ms", str(steps), f"{steps * milliseconds / 1000:.2f} s")
    return table


def report_losses(trained: list[Trained], screen: Screen) -> int:
    """The same algorithm has to train alike."""
    twins = [torch.tensor(one.losses[:COMPARED_STEPS]) for one in trained if one.name.endswith("Adafactor")]
    difference = ((twins[0] - twins[-1]) / twins[-1]).abs().max().item()
    screen.print(
        f"over the first {len(twins[0])} steps the losses of the two Adafactors differ by at most {difference:.1e} of "
        f"their value (tolerance {LOSS_TOLERANCE:.0e})"
    )
    if difference <= LOSS_TOLERANCE:
        return 0
    print("compare_optimizers: the two Adafactors do not train alike, their losses differ", file=sys.stderr)
    return 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder for the picture (default: out)")
    parser.add_argument("--steps", type=int, help=f"training steps (default: {STEPS})")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--quick", action="store_true", help="a small run, to see that everything works")
    return run("compare_optimizers", parser, argv, train)


if __name__ == "__main__":
    sys.exit(main())
