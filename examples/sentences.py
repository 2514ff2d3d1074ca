"""What both readers produce and what the scores are computed from: sentences of tokens, tags and spans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from fastnlp_ops import tags_to_spans


class InputError(Exception):
    """Bad input of the user's: the message is one sentence, shown without a traceback."""


class Span(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of a sentence carry `label`."""

    start: int
    stop: int
    label: str


@dataclass
class Sentence:
    tokens: list[str]  # as written in the file
    words: list[str]  # as the model reads them: equal to the tokens, or with the give-aways hidden
    lines: list[int]  # line of the file that each token starts on
    tags: list[str] = field(default_factory=list)  # one per token, empty where the file is only to be tagged
    spans: list[Span] = field(default_factory=list)  # nested, for a span head; the flat ones are in `tags` too


def entities(tags: list[str], labels: list[str], scheme: str) -> list[Span]:
    """The entities that the tags of one sentence spell out; their label is "" where tags have no type."""
    names = list(dict.fromkeys(label[2:] for label in labels if label != "O"))
    spans = tags_to_spans([labels.index(tag) for tag in tags], labels, scheme)
    return [Span(start, last + 1, names[kind]) for start, last, kind in spans.tolist()]


class Score(NamedTuple):
    precision: float
    recall: float
    f1: float
    support: int  # entities in the gold tags


def entity_scores(gold: list[list[Span]], predicted: list[list[Span]]) -> dict[str, Score]:
    """Scores of exactly matching entities: of "all" together, then of each type, the most frequent first."""
    correct, in_gold, in_predicted = Counter(), Counter(), Counter()
    for gold_spans, predicted_spans in zip(gold, predicted, strict=True):
        in_gold.update(span.label for span in gold_spans)
        in_predicted.update(span.label for span in predicted_spans)
        correct.update(span.label for span in set(gold_spans) & set(predicted_spans))

    def score(labels: Iterable[str]) -> Score:
        n_correct = sum(correct[label] for label in labels)
        n_gold = sum(in_gold[label] for label in labels)
        n_predicted = sum(in_predicted[label] for label in labels)
        precision = n_correct / n_predicted if n_predicted else 0.0
        recall = n_correct / n_gold if n_gold else 0.0
        f1 = 2 * n_correct / (n_gold + n_predicted) if n_gold + n_predicted else 0.0
        return Score(precision, recall, f1, n_gold)

    labels = sorted(in_gold.keys() | in_predicted.keys(), key=lambda label: (-in_gold[label], label))
    return {"all": score(labels), **{label: score([label]) for label in labels}}


def token_accuracy(gold: list[list[str]], predicted: list[list[str]]) -> float:
    pairs = [
        pair
        for gold_tags, predicted_tags in zip(gold, predicted, strict=True)
        for pair in zip(gold_tags, predicted_tags, strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)
