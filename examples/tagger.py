"""The tagger: hashed word features, a small convolutional network, and a CRF on top."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from sentences import InputError, Sentence
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastnlp_ops import CRF, reference, transition_mask

BUCKETS = 1 << 14
WIDTH = 96
LAYERS = 3
CHECKPOINT_FORMAT = "fastnlp_ops example tagger 1"


@cache
def features(word: str) -> list[int]:
    """Hashed features of a word: itself, its affixes and its shape (`HTTPServer2` has the shape `XxX0x`)."""
    shape = re.sub(r"(.)\1+", r"\1", re.sub(r"\d", "0", re.sub("[a-z]", "x", re.sub("[A-Z]", "X", word))))
    lower = word.lower()
    texts = [f"word={word}", f"lower={lower}", f"shape={shape}", f"first={lower[:3]}", f"last={lower[-3:]}"]
    # crc32, because Python salts hash() anew in every process.
    return [zlib.crc32(text.encode()) % BUCKETS for text in texts]


class Example(NamedTuple):
    """A sentence as tensors."""

    features: Tensor  # [T, F]
    tags: Tensor  # [T]


class Batch(NamedTuple):
    features: Tensor  # [B, T, F], padded with zeros
    tags: Tensor  # [B, T]
    mask: Tensor  # [B, T], on at the tokens


def encode_words(sentence: Sentence) -> Tensor:
    return torch.tensor([features(word) for word in sentence.words])


def encode(sentences: list[Sentence], labels: list[str]) -> list[Example]:
    index = {label: i for i, label in enumerate(labels)}
    return [Example(encode_words(s), torch.tensor([index[tag] for tag in s.tags])) for s in sentences]


def pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Features of several sentences as one [B, T, F], and the mask [B, T] of their tokens."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = pad_sequence(rows, batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


def batches(examples: list[Example], batch_size: int, steps: int, seed: int) -> Iterator[Batch]:
    """`steps` batches of the examples in random order, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch_size:
            order += torch.randperm(len(examples), generator=generator).tolist()
        chosen = [examples[i] for i in order[:batch_size]]
        del order[:batch_size]
        padded, mask = pad([example.features for example in chosen])
        yield Batch(padded, pad_sequence([example.tags for example in chosen], batch_first=True), mask)


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


class Encoder(nn.Module):
    """Word features to emissions, by convolutions with residual connections."""

    def __init__(self, num_tags: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BUCKETS, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.1)  # small: an unseen word is to say little
        self.layers = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 5, padding="same") for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.output = nn.Linear(WIDTH, num_tags)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        on = mask[..., None]
        hidden = self.embedding(features).sum(2)  # [B, T, WIDTH]
        for layer, norm in zip(self.layers, self.norms, strict=True):
            # Padding goes in as zeros, so that a sentence is tagged alike in every batch.
            hidden = hidden + layer((norm(hidden) * on).transpose(1, 2)).transpose(1, 2).relu()
        return self.output(hidden)  # [B, T, num_tags]


class Tagger(nn.Module):
    def __init__(self, labels: list[str], scheme: str, *, plain_crf: bool = False) -> None:
        super().__init__()
        self.labels = labels
        self.scheme = scheme
        self.encoder = Encoder(len(labels))
        self.crf = CRF(len(labels), batch_first=True, labels=labels, scheme=scheme)
        if plain_crf:
            weights = self.crf.state_dict()
            self.crf = PlainCRF(labels, scheme)
            self.crf.load_state_dict(weights, strict=False)

    @torch.no_grad()
    def predict(self, sentences: list[Sentence], batch_size: int = 64) -> list[list[str]]:
        predicted = []
        for start in range(0, len(sentences), batch_size):
            padded, mask = pad([encode_words(sentence) for sentence in sentences[start : start + batch_size]])
            paths, _ = self.crf.viterbi(self.encoder(padded, mask), mask)
            predicted += [[self.labels[tag] for tag in path[on]] for path, on in zip(paths, mask, strict=True)]
        return predicted


def save_checkpoint(path: Path, tagger: Tagger, corpus: str) -> None:
    content = {
        "format": CHECKPOINT_FORMAT,
        "corpus": corpus,
        "labels": tagger.labels,
        "scheme": tagger.scheme,
        "weights": tagger.state_dict(),
    }
    torch.save(content, path)


def load_checkpoint(path: Path) -> tuple[Tagger, str]:
    """The tagger, and which corpus ("python" or "conll") it was trained on."""
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}: train first, or name one with --checkpoint")
    try:
        content = torch.load(path, weights_only=True)
        if content["format"] != CHECKPOINT_FORMAT:
            raise ValueError(content["format"])
        tagger = Tagger(content["labels"], content["scheme"])
        tagger.load_state_dict(content["weights"])
        return tagger, content["corpus"]
    except Exception as error:  # what a foreign file makes torch.load raise has no common class
        raise InputError(f"{path} is not a checkpoint of this script") from error
