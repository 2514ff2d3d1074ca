"""What both readers produce and what the scores are computed from: sentences of tokens, tags and spans."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from fastnlp_ops import tags_to_spans


class InputError(Exception):
    """Bad input of the user's: the message is one sentence, shown without a traceback."""


# Control characters, lone surrogates, and the signs that turn the direction of writing.
INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, kept: str = "") -> str:
    """The text with an escape in place of whatever would be no character on a screen or in a picture."""

    def escaped(match: re.Match) -> str:
        return match.group() if match.group() in kept else match.group().encode("unicode_escape").decode()

    return INVISIBLE.sub(escaped, text)


def short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


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
    spans: list[Span] = field(default_factory=list)  # nested; the flat ones are in `tags` too


def span_types(labels: list[str]) -> list[str]:
    """The types that the labels of tags name, in the order in which `tags_to_spans` numbers them."""
    return list(dict.fromkeys(label[2:] for label in labels if label != "O"))


def entities(tags: list[str], labels: list[str], scheme: str) -> list[Span]:
    """The entities that the tags of one sentence spell out; their label is "" where tags have no type."""
    names = span_types(labels)
    spans = tags_to_spans([labels.index(tag) for tag in tags], labels, scheme)
    return [Span(start, last + 1, names[kind]) for start, last, kind in spans.tolist()]


def outside_in(extents: Iterable[tuple[int, int]]) -> list[tuple[tuple[int, int], int]]:
    """(start, stop) in the order of the text, outer before inner, each with the number of others around it."""
    open_ones: list[tuple[int, int]] = []
    found = []
    for start, stop in sorted(set(extents), key=lambda extent: (extent[0], -extent[1])):
        open_ones = [outer for outer in open_ones if outer[1] > start]
        found.append(((start, stop), sum(stop <= end for _, end in open_ones)))
        open_ones.append((start, stop))
    return found


def joined(tokens: list[str]) -> str:
    """Tokens as one line of text, with spaces only where words would run together."""
    text = ""
    for token in tokens:
        text += f" {token}" if re.search(r"\w$", text) and re.match(r"\w", token) else token
    return " ".join(text.split())


class Score(NamedTuple):
    precision: float
    recall: float
    f1: float
    support: int  # how many there are to find


class Labelled(Protocol):
    """What can be scored: equal ones match."""

    label: str


def scores_by_label(
    gold: Iterable[Iterable[Labelled]], predicted: Iterable[Iterable[Labelled]]
) -> dict[str | None, Score]:
    """Scores of exact matches, text by text: of all together (None), then of each label, the most frequent first."""
    correct, in_gold, in_predicted = Counter(), Counter(), Counter()
    for to_find, found in zip(gold, predicted, strict=True):
        in_gold.update(item.label for item in to_find)
        in_predicted.update(item.label for item in found)
        correct.update(item.label for item in set(to_find) & set(found))

    def score(labels: Iterable[str]) -> Score:
        n_correct = sum(correct[label] for label in labels)
        n_gold = sum(in_gold[label] for label in labels)
        n_predicted = sum(in_predicted[label] for label in labels)
        precision = n_correct / n_predicted if n_predicted else 0.0
        recall = n_correct / n_gold if n_gold else 0.0
        f1 = 2 * n_correct / (n_gold + n_predicted) if n_gold + n_predicted else 0.0
        return Score(precision, recall, f1, n_gold)

    labels = sorted(in_gold.keys() | in_predicted.keys(), key=lambda label: (-in_gold[label], label))
    return {None: score(labels), **{label: score([label]) for label in labels}}


def name_of(label: str | None, most: int = 60) -> str:
    """How tables and pictures call the label of scores."""
    return {None: "all", "": "(no type)"}.get(label) or visible(short(label, most))


def token_accuracy(gold: list[list[str]], predicted: list[list[str]]) -> float:
    pairs = [
        pair
        for gold_tags, predicted_tags in zip(gold, predicted, strict=True)
        for pair in zip(gold_tags, predicted_tags, strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)
