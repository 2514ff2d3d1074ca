"""Train a sequence tagger with a CRF on real text, and compare the compiled CRF with plain PyTorch.

python examples/label_python.py                                   the roles of names in Python's standard library
python examples/label_python.py --train a.conll --test b.conll    your own files (BIO, IOB1, BIOES, BMES)
python examples/label_python.py --predict my_module.py            tag a file with what was trained last
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

# Before torch starts its threads: on a machine that does other work as well, threads that spin while they wait for each
# other make a training step 5 to 30 times slower (measured: 1 to 4 s instead of 0.1 to 0.2 s).
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")

import torch
from conll import check_tags_seen, detect_scheme, read_conll
from picture import save_picture
from python_corpus import LABELS, ROLES, read_source, standard_library
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sentences import InputError, Score, Sentence, Span, entities, entity_scores, token_accuracy
from tagger import Tagger, batches, encode, load_checkpoint, save_checkpoint
from training import LOSS_TOLERANCE, Run, Trainer, compare, largest_loss_difference

BATCH_SIZE = 32
TEST_FRACTION = 0.2


@dataclass
class Size:
    files: int  # of the standard library
    steps: int
    compared_steps: int


FULL = Size(files=200, steps=400, compared_steps=20)
QUICK = Size(files=30, steps=60, compared_steps=5)
PALETTE = ("cyan", "green", "yellow", "blue", "magenta", "red", "bright_cyan", "bright_green")


@dataclass
class Corpus:
    name: str
    train: list[Sentence]
    test: list[Sentence]
    labels: list[str]
    scheme: str

    def entities(self, tags: list[list[str]]) -> list[list[Span]]:
        return [entities(sentence, self.labels, self.scheme) for sentence in tags]


def read_corpus(args: argparse.Namespace, size: Size) -> Corpus:
    if (args.train is None) != (args.test is None):
        raise InputError("--train and --test go together: give both, or neither for the standard library")
    if args.train is None:
        files = standard_library(args.seed, size.files)
        held_out = round(len(files) * TEST_FRACTION)
        test, train = (
            [sentence for file in part for sentence in file] for part in (files[:held_out], files[held_out:])
        )
        return Corpus("python", train, test, LABELS, "BIO")
    train, test = read_conll(args.train), read_conll(args.test)
    labels = sorted({tag for sentence in train for tag in sentence.tags})
    check_tags_seen(args.test, test, labels)
    return Corpus("conll", train, test, labels, detect_scheme({args.train: train, args.test: test}))


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from error


def progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=console)


def train_and_compare(args: argparse.Namespace, console: Console) -> int:
    size = QUICK if args.quick else FULL
    steps = size.steps if args.steps is None else args.steps
    if steps < 1:
        raise InputError(f"--steps must be at least 1, got {steps}")
    corpus = read_corpus(args, size)
    console.print(
        f"{len(corpus.train)} training and {len(corpus.test)} test sentences, "
        f"{sum(len(s.tokens) for s in corpus.train)} and {sum(len(s.tokens) for s in corpus.test)} tokens, "
        f"{len(corpus.labels)} tags, scheme {corpus.scheme}"
    )
    examples = encode(corpus.train, corpus.labels)

    def make_tagger(plain_crf: bool) -> Tagger:
        torch.manual_seed(args.seed)
        return Tagger(corpus.labels, corpus.scheme, plain_crf=plain_crf)

    make_folder(args.output)
    make_folder(args.checkpoint.parent)
    tagger = make_tagger(plain_crf=False)
    trainer = Trainer(tagger, steps)
    losses = []
    with progress(console) as bar:
        task = bar.add_task("training", total=steps, note="")
        for batch in batches(examples, BATCH_SIZE, steps, args.seed):
            losses.append(trainer.step(batch).loss)
            bar.update(task, advance=1, note=f"loss {losses[-1]:.4f}")
    save_checkpoint(args.checkpoint, tagger, corpus.name)

    gold, predicted = [sentence.tags for sentence in corpus.test], tagger.predict(corpus.test)
    scores = entity_scores(corpus.entities(gold), corpus.entities(predicted))
    console.print(score_table(scores), f"token accuracy {token_accuracy(gold, predicted):.4f}\n")

    compared_steps = min(size.compared_steps, steps)
    with progress(console) as bar:
        task = bar.add_task("comparing", total=compared_steps, note="the same model with the plain-PyTorch CRF")
        first_batches = islice(batches(examples, BATCH_SIZE, steps, args.seed), compared_steps)
        compiled, plain = compare(make_tagger, steps, first_batches, on_step=lambda: bar.advance(task))
    console.print(time_table(compiled, plain))
    status = report_losses(compiled, plain, console)

    picture = args.output / "label_python.png"
    save_picture(picture, losses, compiled, plain, scores)
    console.print(f"picture: {picture}    checkpoint: {args.checkpoint}    tag a file with it: --predict FILE")
    return status


def report_losses(compiled: Run, plain: Run, console: Console) -> int:
    difference = largest_loss_difference(compiled, plain)
    same_tags = torch.cat(compiled.paths).eq(torch.cat(plain.paths)).double().mean().item()
    console.print(
        f"over these {len(plain.steps)} steps the two losses differ by at most {difference:.1e} "
        f"(tolerance {LOSS_TOLERANCE:.0e}) and {100 * same_tags:.3f}% of the decoded tags are the same"
    )
    if difference <= LOSS_TOLERANCE:
        return 0
    print("label_python: the compiled and the plain CRF do not train alike, their losses differ", file=sys.stderr)
    return 1


def score_table(scores: dict[str, Score]) -> Table:
    table = Table("type", "precision", "recall", "F1", "entities", title="Entities on held-out text", box=SIMPLE_HEAD)
    for label, score in scores.items():
        numbers = (f"{value:.3f}" for value in (score.precision, score.recall, score.f1))
        table.add_row(label or "(no type)", *numbers, str(score.support))
    return table


def time_table(compiled: Run, plain: Run) -> Table:
    fast, slow = compiled.milliseconds(), plain.milliseconds()
    title = f"The first {len(plain.steps)} steps with both CRFs"
    table = Table("ms per batch, median", compiled.name, plain.name, "ratio", title=title, box=SIMPLE_HEAD)
    for part in fast:
        table.add_row(part, f"{fast[part]:.2f}", f"{slow[part]:.2f}", f"{slow[part] / fast[part]:.3g}x")
    return table


def predict(args: argparse.Namespace, console: Console) -> int:
    tagger, corpus = load_checkpoint(args.checkpoint)
    if corpus == "conll":
        sentences = read_conll(args.predict, tagged=False)
        for sentence, tags in zip(sentences, tagger.predict(sentences), strict=True):
            print("\n".join(f"{token}\t{tag}" for token, tag in zip(sentence.tokens, tags, strict=True)), end="\n\n")
        return 0
    sentences = read_source(args.predict)
    console.print("  line  role        text")
    for sentence, tags in zip(sentences, tagger.predict(sentences), strict=True):
        for start, stop, role in entities(tags, tagger.labels, tagger.scheme):
            text = " ".join("".join(sentence.tokens[start:stop]).split())
            console.print(
                f"{sentence.lines[start]:6}  {role:10}  {text[:80]}",
                style=PALETTE[ROLES.index(role) % len(PALETTE)],
                markup=False,
            )
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, metavar="FILE", help="CoNLL file to train on")
    parser.add_argument("--test", type=Path, metavar="FILE", help="CoNLL file to test on")
    parser.add_argument("--predict", type=Path, metavar="FILE", help="tag this file with a checkpoint and print it")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder for what is saved (default: out)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="default: checkpoint.pt in the output folder")
    parser.add_argument("--steps", type=int, help=f"training steps (default: {FULL.steps})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a small run, to see that everything works")
    args = parser.parse_args(argv)
    args.checkpoint = args.checkpoint or args.output / "checkpoint.pt"
    console = Console(highlight=False, soft_wrap=True)
    try:
        return predict(args, console) if args.predict else train_and_compare(args, console)
    except InputError as error:
        print(f"label_python: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
