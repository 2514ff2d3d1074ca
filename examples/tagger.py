"""The tagger: one encoder, a CRF on top of it for flat tags, and a GlobalPointer for nested spans."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from encoder import WIDTH, Encoder, consecutive, encode_words, pad, random_batches
from files import read_bytes, write_bytes
from sentences import InputError, Sentence, Span
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastnlp_ops import CRF, EfficientGlobalPointer, reference, transition_mask

HEAD_SIZE = 64
CHECKPOINT_FORMAT = "fastnlp_ops example tagger 3"
# A model that has learnt little finds a quarter of all spans, millions in a file of source.
MOST_SPANS = 1  # for each token; in the standard library there is one for 3, and never more than three for 4


Model = TypeVar("Model", bound=nn.Module)


class Labels(NamedTuple):
    """What the two heads choose from."""

    tags: list[str]
    scheme: str
    kinds: list[str]  # of spans


class Example(NamedTuple):
    """A sentence as tensors."""

    features: Tensor  # [T, F]
    tags: Tensor  # [T]
    spans: Tensor  # [M, 3]: kind, first and last token


class Batch(NamedTuple):
    features: Tensor  # [B, T, F], padded with zeros
    tags: Tensor  # [B, T]
    spans: Tensor  # [M, 4]: sentence, kind, first and last token
    mask: Tensor  # [B, T], on at the tokens

    def first(self, count: int) -> Batch:
        """The batch with its first `count` sentences, at least one."""
        count = max(1, count)
        spans = self.spans[self.spans[:, 0] < count]
        return Batch(self.features[:count], self.tags[:count], spans, self.mask[:count])


def encode(sentences: list[Sentence], labels: Labels) -> list[Example]:
    tag, kind = ({name: i for i, name in enumerate(names)} for names in (labels.tags, labels.kinds))
    examples = []
    for sentence in sentences:
        tags = torch.tensor([tag[name] for name in sentence.tags])
        spans = [[kind[span.label], span.start, span.stop - 1] for span in sentence.spans]
        examples.append(
            Example(encode_words(sentence.words), tags, torch.tensor(spans, dtype=torch.long).reshape(-1, 3))
        )
    return examples


def batches(examples: list[Example], batch_size: int, steps: int, seed: int) -> Iterator[Batch]:
    """`steps` batches of the examples in random order, the same ones for the same seed."""
    for chosen in random_batches(len(examples), batch_size, steps, seed):
        rows, tags, spans = zip(*(examples[i] for i in chosen), strict=True)
        features, mask = pad(list(rows))
        yield Batch(features, pad_sequence(list(tags), batch_first=True), number(spans), mask)


def number(labels: Sequence[Tensor]) -> Tensor:
    """Labels [M, 3] of several texts as one [M, 4], the number of the text before each."""
    return torch.cat([nn.functional.pad(rows, (1, 0), value=i) for i, rows in enumerate(labels)])


class PlainCRF(nn.Module):
    """`fastnlp_ops.CRF` in plain PyTorch, with the same parameters: what the comparison trains against."""

    def __init__(self, labels: list[str], scheme: str) -> None:
        super().__init__()
        self.start_transitions = nn.Parameter(torch.empty(len(labels)))
        self.end_transitions = nn.Parameter(torch.empty(len(labels)))
        self.transitions = nn.Parameter(torch.empty(len(labels), len(labels)))
        self.allowed = transition_mask(labels, scheme)

    def scores(self) -> tuple[Tensor, Tensor, Tensor]:
        allowed, starts, ends = self.allowed
        return (
            self.transitions.masked_fill(~allowed, -torch.inf),
            self.start_transitions.masked_fill(~starts, -torch.inf),
            self.end_transitions.masked_fill(~ends, -torch.inf),
        )

    def forward(self, emissions: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
        return reference.crf_log_likelihood(emissions, tags, *self.scores(), mask=mask).sum()

    def viterbi(self, emissions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return reference.crf_viterbi(emissions, *self.scores(), mask=mask)


class PlainGlobalPointer(EfficientGlobalPointer):
    """The same layer as it is mostly written: the scores of all n x n spans, and a loss with as many labels."""

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        q, k, start_bias, end_bias = self.project(hidden)
        return reference.global_pointer_scores(q, k, start_bias=start_bias, end_bias=end_bias, mask=mask)

    def loss(self, hidden: Tensor, spans: Tensor, mask: Tensor) -> Tensor:
        scores = self(hidden, mask)
        labels = torch.zeros_like(scores, dtype=torch.bool)
        labels[spans.unbind(1)] = True
        return reference.multilabel_categorical_crossentropy(scores.flatten(2), labels.flatten(2))

    def decode(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        scores = self(hidden, mask)
        spans = (scores > 0).nonzero()
        return spans, scores[spans.unbind(1)]


class Tagger(nn.Module):
    def __init__(self, labels: Labels, *, plain: bool = False) -> None:
        super().__init__()
        self.labels = labels
        self.encoder = Encoder()
        self.emissions = nn.Linear(WIDTH, len(labels.tags))
        self.crf = CRF(len(labels.tags), batch_first=True, labels=labels.tags, scheme=labels.scheme)
        self.spans = EfficientGlobalPointer(WIDTH, len(labels.kinds), HEAD_SIZE)
        if plain:
            self.crf = with_weights_of(self.crf, PlainCRF(labels.tags, labels.scheme))
            self.spans = with_weights_of(self.spans, PlainGlobalPointer(WIDTH, len(labels.kinds), HEAD_SIZE))

    @torch.no_grad()
    def predict(
        self, sentences: list[Sentence], on_batch: Callable[[int], None] = lambda _: None
    ) -> tuple[list[list[str]], list[list[Span]], int]:
        """The tags of every sentence, its best spans, MOST_SPANS for each token, and how many more there were."""
        all_tags, all_spans, left_out = [], [], 0
        for together in consecutive([len(sentence.words) for sentence in sentences]):
            features, mask = pad([encode_words(sentence.words) for sentence in sentences[together]])
            hidden = self.encoder(features, mask)
            paths, _ = self.crf.viterbi(self.emissions(hidden), mask)
            all_tags += [[self.labels.tags[tag] for tag in path[on]] for path, on in zip(paths, mask, strict=True)]
            found, scores = self.spans.decode(hidden, mask)
            kept = best(found, scores, MOST_SPANS * mask.sum(1))
            left_out += len(found) - len(kept)
            spans = [[] for _ in mask]
            for sentence, kind, first, last in kept.tolist():
                spans[sentence].append(Span(first, last + 1, self.labels.kinds[kind]))
            all_spans += spans
            on_batch(len(mask))
        return all_tags, all_spans, left_out


def best(rows: Tensor, scores: Tensor, most: Tensor) -> Tensor:
    """Of rows [M, ...] that begin with the number of their text, the best `most` [B] of each in their order."""
    order = scores.argsort(descending=True)
    order = order[rows[order, 0].argsort(stable=True)]  # text by text
    counts = rows[:, 0].bincount(minlength=len(most))
    rank = torch.arange(len(rows)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return rows[order[rank < most.repeat_interleave(counts)].sort().values]


def with_weights_of(layer: nn.Module, plain: nn.Module) -> nn.Module:
    plain.load_state_dict(layer.state_dict(), strict=False)  # the CRF has buffers besides
    return plain


def save_checkpoint(path: Path, tagger: Tagger, corpus: str) -> None:
    write_checkpoint(path, CHECKPOINT_FORMAT, corpus, tagger, labels=tuple(tagger.labels))


def load_checkpoint(path: Path) -> tuple[Tagger, str]:
    """The tagger, and which corpus ("python" or "conll") it was trained on."""
    return read_checkpoint(path, CHECKPOINT_FORMAT, lambda content: Tagger(Labels(*content["labels"])))


def write_checkpoint(path: Path, kind: str, corpus: str, model: nn.Module, **parts: Any) -> None:
    content = BytesIO()
    torch.save({"format": kind, "corpus": corpus, **parts, "weights": model.state_dict()}, content)
    write_bytes(path, content.getvalue())


def read_checkpoint(path: Path, kind: str, make_model: Callable[[dict], Model]) -> tuple[Model, str]:
    if not os.path.lexists(path):
        raise InputError(f"there is no checkpoint {path}: train first, or name one with --checkpoint")
    content = BytesIO(read_bytes(path))
    try:
        content = torch.load(content, weights_only=True)
        if not isinstance(content, dict) or content["format"] != kind:
            raise ValueError("another format")
        model = make_model(content)
        model.load_state_dict(content["weights"])
        return model, content["corpus"]
    except Exception as error:  # what a foreign file makes torch.load raise has no common class
        raise InputError(f"{path} is not a checkpoint of this script") from error
