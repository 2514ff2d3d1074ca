"""Train GPLinker, three GlobalPointers over one encoder, to find relation triples in real text.

python examples/extract_relations.py                                    what calls, defines, inherits, imports what in
                                                                        Python's standard library
python examples/extract_relations.py --train a.jsonl --test b.jsonl     your own texts, a JSON object in each line:
                                                                        {"text": "...", "triples": [[s, p, o], ...]}
python examples/extract_relations.py --predict my_module.py             triples of a file with what was trained last
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import before_torch  # noqa: F401

# isort: split
import torch
from files import check_writable
from picture import save_loss_and_scores
from relation_corpus import RELATIONS, library_texts, read_source_texts
from relation_model import Extractor, batches, encode, load_checkpoint, save_checkpoint
from relation_texts import Text, Triple, check_relations_seen, read_texts
from screen import Screen, prediction_progress, progress, reading_progress, run, score_table, seed
from sentences import InputError, scores_by_label

BATCH_SIZE = 32
TEST_FRACTION = 0.2
LEARNING_RATE = 4e-3
WARM_UP = 20  # steps


@dataclass
class Size:
    files: int  # of the standard library
    steps: int


FULL = Size(files=200, steps=400)
QUICK = Size(files=30, steps=60)


@dataclass
class Corpus:
    name: str
    train: list[Text]
    test: list[Text]
    relations: list[str]


class Found(NamedTuple):
    """A triple by its strings: it is right where they are, wherever in the text they were found."""

    subject: str
    label: str
    object: str


def by_strings(texts: list[Text], triples: list[list[Triple]]) -> list[set[Found]]:
    return [
        {Found(text.string(t.subject), t.relation, text.string(t.object)) for t in of_text}
        for text, of_text in zip(texts, triples, strict=True)
    ]


def read_corpus(args: argparse.Namespace, size: Size, screen: Screen) -> Corpus:
    if (args.train is None) != (args.test is None):
        raise InputError("--train and --test go together: give both, or neither for the standard library")
    if args.train is None:
        with reading_progress(screen, size.files) as on_file:
            files = library_texts(args.seed, size.files, on_file)
        held_out = round(len(files) * TEST_FRACTION)
        test, train = ([text for file in part for text in file] for part in (files[:held_out], files[held_out:]))
        return Corpus("python", train, test, list(RELATIONS))
    train, test = read_texts(args.train), read_texts(args.test)
    relations = sorted({triple.relation for text in train for triple in text.triples})
    if not relations:
        raise InputError(f"{args.train} has no triples to learn from")
    check_relations_seen(test, relations)
    return Corpus("json", train, test, relations)


def train(args: argparse.Namespace, screen: Screen) -> int:
    size = QUICK if args.quick else FULL
    steps = size.steps if args.steps is None else args.steps
    if steps < 1:
        raise InputError(f"--steps must be at least 1, got {steps}")
    corpus = read_corpus(args, size, screen)
    screen.print(
        f"{len(corpus.train)} training and {len(corpus.test)} test texts, "
        f"{sum(len(t.words) for t in corpus.train)} and {sum(len(t.words) for t in corpus.test)} words, "
        f"{sum(len(t.triples) for t in corpus.train)} and {sum(len(t.triples) for t in corpus.test)} triples, "
        f"relations: {', '.join(corpus.relations)}"
    )
    picture = args.output / "extract_relations.png"
    check_writable(picture)
    check_writable(args.checkpoint)
    torch.manual_seed(args.seed)
    extractor = Extractor(corpus.relations)
    optimizer = torch.optim.Adam(extractor.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARM_UP) * (1 - step / steps)
    )
    examples = encode(corpus.train, corpus.relations)
    losses = []
    with progress(screen) as bar:
        task = bar.add_task("training", total=steps, note="")
        for batch in batches(examples, BATCH_SIZE, steps, args.seed):
            optimizer.zero_grad()
            loss = extractor.loss(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(extractor.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.update(task, advance=1, note=f"loss {losses[-1]:.3f}")
    save_checkpoint(args.checkpoint, extractor, corpus.name)

    begin = time.perf_counter()
    predicted, left_out = predict_all(extractor, corpus.test)
    seconds = time.perf_counter() - begin
    gold = by_strings(corpus.test, [text.triples for text in corpus.test])
    scores = scores_by_label(gold, by_strings(corpus.test, predicted))
    screen.print(score_table("Triples of held-out texts", {"GPLinker": scores}))
    screen.print(f"{len(corpus.test)} texts read and {sum(map(len, predicted))} triples found in {seconds:.1f} s")
    screen.print(left_out, end="")
    remark = save_loss_and_scores(picture, losses, scores)
    screen.print(f"picture: {picture}    checkpoint: {args.checkpoint}    triples of a file with it: --predict FILE")
    if remark:
        screen.print(remark)
    return 0


def predict_all(extractor: Extractor, texts: list[Text]) -> tuple[list[list[Triple]], str]:
    """The triples, and a remark on triples that were too many."""
    with prediction_progress() as bar:
        task = bar.add_task("reading", total=len(texts), note="")
        triples, left_out = extractor.predict(texts, on_batch=lambda count: bar.advance(task, count))
    remark = (
        f"{left_out} more triples score above 0: of each text the best are taken, as many as words; a model that has "
        "been trained for longer finds fewer\n"
    )
    return triples, remark if left_out else ""


def predict(args: argparse.Namespace, screen: Screen) -> int:
    if args.train or args.test:
        raise InputError("--predict goes without --train and --test: it takes what was trained before")
    extractor, corpus = load_checkpoint(args.checkpoint)
    texts = read_texts(args.predict, labelled=False) if corpus == "json" else read_source_texts(args.predict)
    triples, left_out = predict_all(extractor, texts)
    found = by_strings(texts, triples)
    if corpus == "json":
        sys.stdout.reconfigure(encoding="utf-8")  # as the file was
        for text, of_text in zip(texts, found, strict=True):
            print(json.dumps({"text": text.text, "triples": sorted(of_text)}, ensure_ascii=False))
    else:
        for triple in sorted(set().union(*found)):
            screen.print("  ".join(" ".join(part.split()) for part in triple))
    Screen(stderr=True).print(left_out, end="")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, metavar="FILE", help="JSON lines to train on")
    parser.add_argument("--test", type=Path, metavar="FILE", help="JSON lines to test on")
    parser.add_argument("--predict", type=Path, metavar="FILE", help="print the triples of this file with a checkpoint")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder for what is saved (default: out)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="default: relations.pt in the output folder")
    parser.add_argument("--steps", type=int, help=f"training steps (default: {FULL.steps})")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--quick", action="store_true", help="a small run, to see that everything works")

    def job(args: argparse.Namespace, screen: Screen) -> int:
        args.checkpoint = args.checkpoint or args.output / "relations.pt"
        return predict(args, screen) if args.predict else train(args, screen)

    return run("extract_relations", parser, argv, job)


if __name__ == "__main__":
    sys.exit(main())
