"""Train a tagger on real text, with a CRF for flat tags and a GlobalPointer for nested spans, and compare with plain
PyTorch.

python examples/label_python.py                                   names, calls, arguments, ... of the standard library
python examples/label_python.py --train a.conll --test b.conll    your own files (BIO, IOB1, BIOES, BMES)
python examples/label_python.py --predict my_module.py            tag a file with what was trained last
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import before_torch  # noqa: F401

# isort: split
import torch
from conll import check_tags_seen, detect_scheme, read_conll
from files import check_writable
from picture import save_picture
from python_corpus import KINDS, LABELS, read_source, standard_library
from rich.box import SIMPLE_HEAD
from rich.table import Table
from screen import Screen, prediction_progress, progress, reading_progress, run, score_table, seed
from sentences import (
    InputError,
    Sentence,
    Span,
    entities,
    joined,
    outside_in,
    scores_by_label,
    span_types,
    token_accuracy,
)
from tagger import Labels, Tagger, batches, encode, load_checkpoint, save_checkpoint
from training import LOSS_TOLERANCE, Run, Trainer, compare, largest_loss_difference, same_spans

BATCH_SIZE = 32
TEST_FRACTION = 0.2


@dataclass
class Size:
    files: int  # of the standard library
    steps: int
    compared_steps: int


FULL = Size(files=200, steps=400, compared_steps=12)
QUICK = Size(files=30, steps=60, compared_steps=4)
PALETTE = ("cyan", "green", "yellow", "blue", "magenta", "red", "bright_cyan", "bright_green")


@dataclass
class Corpus:
    name: str
    train: list[Sentence]
    test: list[Sentence]
    labels: Labels

    def entities(self, tags: list[list[str]]) -> list[list[Span]]:
        return [entities(sentence, self.labels.tags, self.labels.scheme) for sentence in tags]


def read_corpus(args: argparse.Namespace, size: Size, screen: Screen) -> Corpus:
    if (args.train is None) != (args.test is None):
        raise InputError("--train and --test go together: give both, or neither for the standard library")
    if args.train is None:
        with reading_progress(screen, size.files) as on_file:
            files = standard_library(args.seed, size.files, on_file)
        held_out = round(len(files) * TEST_FRACTION)
        test, train = (
            [sentence for file in part for sentence in file] for part in (files[:held_out], files[held_out:])
        )
        return Corpus("python", train, test, Labels(LABELS, "BIO", KINDS))
    train, test = read_conll(args.train), read_conll(args.test)
    tags = sorted({tag for sentence in train for tag in sentence.tags})
    check_tags_seen(args.test, test, tags)
    scheme = detect_scheme({args.train: train, args.test: test})
    kinds = span_types(tags)
    if not kinds:
        raise InputError(f"{args.train} has no entity to learn: every tag is O")
    for sentence in train + test:
        sentence.spans = entities(sentence.tags, tags, scheme)
    return Corpus("conll", train, test, Labels(tags, scheme, kinds))


def train_and_compare(args: argparse.Namespace, screen: Screen) -> int:
    size = QUICK if args.quick else FULL
    steps = size.steps if args.steps is None else args.steps
    if steps < 1:
        raise InputError(f"--steps must be at least 1, got {steps}")
    corpus = read_corpus(args, size, screen)
    screen.print(
        f"{len(corpus.train)} training and {len(corpus.test)} test sentences, "
        f"{sum(len(s.tokens) for s in corpus.train)} and {sum(len(s.tokens) for s in corpus.test)} tokens, "
        f"{len(corpus.labels.tags)} tags, scheme {corpus.labels.scheme}, span types: {', '.join(corpus.labels.kinds)}"
    )
    if corpus.name == "python":
        screen.print(nesting(corpus.train))
    examples = encode(corpus.train, corpus.labels)

    def make_tagger(plain: bool) -> Tagger:
        torch.manual_seed(args.seed)
        return Tagger(corpus.labels, plain=plain)

    picture = args.output / "label_python.png"
    check_writable(picture)
    check_writable(args.checkpoint)
    tagger = make_tagger(plain=False)
    trainer = Trainer(tagger, steps)
    losses = []
    with progress(screen) as bar:
        task = bar.add_task("training", total=steps, note="")
        for batch in batches(examples, BATCH_SIZE, steps, args.seed):
            step = trainer.step(batch)
            losses.append((step.crf.loss, step.spans.loss))
            bar.update(task, advance=1, note=f"loss of the CRF {step.crf.loss:.4f}, of spans {step.spans.loss:.4f}")
    save_checkpoint(args.checkpoint, tagger, corpus.name)

    tags, spans, left_out = predict_all(tagger, corpus.test)
    gold = [sentence.tags for sentence in corpus.test]
    scores = {
        "CRF": scores_by_label(corpus.entities(gold), corpus.entities(tags)),
        "GlobalPointer": scores_by_label([sentence.spans for sentence in corpus.test], spans),
    }
    screen.print(score_table("Entities and spans of held-out text", scores))
    screen.print(f"token accuracy {token_accuracy(gold, tags):.4f}\n{left_out}")

    compared_steps = min(size.compared_steps, steps)
    with progress(screen) as bar:
        task = bar.add_task("comparing", total=compared_steps, note="the same model with heads in plain PyTorch")
        first_batches = islice(batches(examples, BATCH_SIZE, steps, args.seed), compared_steps)
        compiled, plain = compare(make_tagger, steps, first_batches, on_step=lambda: bar.advance(task))
    screen.print(time_table(compiled, plain))
    status = report_losses(compiled, plain, screen)

    remark = save_picture(picture, losses, compiled, plain, scores)
    screen.print(f"picture: {picture}    checkpoint: {args.checkpoint}    tag a file with it: --predict FILE")
    if remark:
        screen.print(remark)
    return status


def nesting(sentences: list[Sentence]) -> str:
    depths = [depth for sentence in sentences for _, depth in outside_in(span[:2] for span in sentence.spans)]
    inside = sum(depth > 0 for depth in depths) / len(depths)
    return f"{100 * inside:.0f}% of the training spans lie inside others, up to {max(depths)} deep"


def report_losses(compiled: Run, plain: Run, screen: Screen) -> int:
    difference = largest_loss_difference(compiled, plain)
    same_tags = torch.cat(compiled.paths).eq(torch.cat(plain.paths)).double().mean().item()
    screen.print(
        f"over these {len(plain.steps)} steps the losses differ by at most {difference:.1e} (tolerance "
        f"{LOSS_TOLERANCE:.0e}), {100 * same_tags:.3f}% of the decoded tags are the same, "
        f"{100 * same_spans(compiled, plain):.3f}% of the decoded spans"
    )
    if difference <= LOSS_TOLERANCE:
        return 0
    print("label_python: the compiled and the plain heads do not train alike, their losses differ", file=sys.stderr)
    return 1


def time_table(compiled: Run, plain: Run) -> Table:
    fast, slow = compiled.milliseconds(), plain.milliseconds()
    title = f"The first {len(plain.steps)} steps with both"
    table = Table("per batch, median", compiled.name, plain.name, "ratio", title=title, box=SIMPLE_HEAD)
    for part in fast:
        table.add_row(part, f"{fast[part]:.2f} ms", f"{slow[part]:.2f} ms", f"{slow[part] / fast[part]:.3g}x")
    mib = [run.peak_bytes / 2**20 for run in (compiled, plain)]
    table.add_row("span head, peak memory", *(f"{size:.1f} MiB" for size in mib), f"{mib[1] / mib[0]:.3g}x")
    return table


def predict_all(tagger: Tagger, sentences: list[Sentence]) -> tuple[list[list[str]], list[list[Span]], str]:
    """The tags, the spans, and a remark on spans that were too many."""
    with prediction_progress() as bar:
        task = bar.add_task("tagging", total=len(sentences), note="")
        tags, spans, left_out = tagger.predict(sentences, on_batch=lambda count: bar.advance(task, count))
    remark = (
        f"{left_out} more spans score above 0: of each sentence the best are shown, as many as tokens; a model that "
        "has been trained for longer finds fewer\n"
    )
    return tags, spans, remark if left_out else ""


def predict(args: argparse.Namespace, screen: Screen) -> int:
    if args.train or args.test:
        raise InputError("--predict goes without --train and --test: it takes what was trained before")
    tagger, corpus = load_checkpoint(args.checkpoint)
    sentences = read_conll(args.predict, tagged=False) if corpus == "conll" else read_source(args.predict)
    tags, spans, left_out = predict_all(tagger, sentences)
    if corpus == "conll":
        print_columns(sentences, tags, spans)
    else:
        print_roles(sentences, tags, spans, tagger.labels, screen)
    Screen(stderr=True).print(left_out, end="")
    return 0


def print_columns(sentences: list[Sentence], all_tags: list[list[str]], all_spans: list[list[Span]]) -> None:
    """As the file was: UTF-8, tabs between columns."""
    sys.stdout.reconfigure(encoding="utf-8")
    for sentence, tags, spans in zip(sentences, all_tags, all_spans, strict=True):
        # Third column: the spans that begin at the token, each with its number of tokens; they may be nested.
        begins = [[f"{s.label}:{s.stop - s.start}" for s in spans if s.start == i] for i in range(len(tags))]
        for token, tag, here in zip(sentence.tokens, tags, begins, strict=True):
            print(token, tag, ",".join(here) or "_", sep="\t")
        print()


def print_roles(
    sentences: list[Sentence], all_tags: list[list[str]], all_spans: list[list[Span]], labels: Labels, screen: Screen
) -> None:
    screen.print("  line  role by CRF  spans by GlobalPointer                  text")
    for sentence, tags, spans in zip(sentences, all_tags, all_spans, strict=True):
        role = {(s.start, s.stop): s.label for s in entities(tags, labels.tags, labels.scheme)}
        kinds: dict[tuple[int, int], list[str]] = {extent: [] for extent in role}
        for start, stop, kind in spans:
            kinds.setdefault((start, stop), []).append(kind)
        for (start, stop), depth in outside_in(kinds):
            listed = "  " * depth + ", ".join(kinds[start, stop])
            text = joined(sentence.tokens[start:stop])[:60]
            line = f"{sentence.lines[start]:6}  {role.get((start, stop), ''):11}  {listed:38}  {text}"
            screen.print(line, style=PALETTE[depth % len(PALETTE)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, metavar="FILE", help="CoNLL file to train on")
    parser.add_argument("--test", type=Path, metavar="FILE", help="CoNLL file to test on")
    parser.add_argument("--predict", type=Path, metavar="FILE", help="tag this file with a checkpoint and print it")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder for what is saved (default: out)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="default: checkpoint.pt in the output folder")
    parser.add_argument("--steps", type=int, help=f"training steps (default: {FULL.steps})")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--quick", action="store_true", help="a small run, to see that everything works")

    def job(args: argparse.Namespace, screen: Screen) -> int:
        args.checkpoint = args.checkpoint or args.output / "checkpoint.pt"
        return predict(args, screen) if args.predict else train_and_compare(args, screen)

    return run("label_python", parser, argv, job)


if __name__ == "__main__":
    sys.exit(main())
