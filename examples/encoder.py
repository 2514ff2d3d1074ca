"""The network below every head: hashed word features, convolutions for the neighbours, and linear attention in both
directions for what is further.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (torch's own name for it)
from torch.nn.utils.rnn import pad_sequence

from fastnlp_ops import linear_attention

BUCKETS = 1 << 14
WIDTH = 96
LAYERS = 3
HEADS = 4  # in each direction
TOGETHER, MOST_PAIRS = 64, 1 << 24  # texts to predict at once, and pairs of their tokens


@cache
def features(word: str) -> list[int]:
    """Hashed features of a word: itself, its affixes and its shape (`HTTPServer2` has the shape `XxX0x`)."""
    shape = re.sub(r"(.)\1+", r"\1", re.sub(r"\d", "0", re.sub("[a-z]", "x", re.sub("[A-Z]", "X", word))))
    lower = word.lower()
    texts = [f"word={word}", f"lower={lower}", f"shape={shape}", f"first={lower[:3]}", f"last={lower[-3:]}"]
    # crc32, because Python salts hash() anew in every process.
    return [zlib.crc32(text.encode()) % BUCKETS for text in texts]


def encode_words(words: list[str]) -> Tensor:
    return torch.tensor([features(word) for word in words])  # [T, F]


def pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Features of several texts as one [B, T, F], and the mask [B, T] of their words."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = pad_sequence(rows, batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


def consecutive(lengths: list[int]) -> Iterator[slice]:
    """Texts to predict together: TOGETHER, or fewer where they are so long that they have more pairs of tokens."""
    start = longest = 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if i - start == TOGETHER or (i > start and (i + 1 - start) * longest**2 > MOST_PAIRS):
            yield slice(start, i)
            start, longest = i, length
    yield slice(start, len(lengths))


def random_batches(count: int, batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """`steps` batches of the numbers below `count`, all of them in one random order after the other."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch_size:
            order += torch.randperm(count, generator=generator).tolist()
        yield order[:batch_size]
        del order[:batch_size]


class Memory(nn.Module):
    """What a word finds in those before it [B, T, WIDTH / 2]; each word says how much of them is to fade."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(WIDTH, 3 * WIDTH // 2 + HEADS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        *parts, keep = self.projection(x).split([WIDTH // 2] * 3 + [HEADS], -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in parts)
        # Of what it remembers a head keeps 88% at each word to begin with.
        log_decay = F.logsigmoid(keep + 2)
        return linear_attention(q, k, v, causal=True, key_padding_mask=mask, log_decay=log_decay).flatten(2)


class Encoder(nn.Module):
    """Word features to hidden states [B, T, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BUCKETS, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.1)  # small: an unseen word is to say little
        self.layers = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 5, padding="same") for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.before, self.behind = Memory(), Memory()
        self.memory_norm = nn.LayerNorm(WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        on = mask[..., None]
        hidden = self.embedding(features).sum(2)  # [B, T, WIDTH]
        for layer, norm in zip(self.layers, self.norms, strict=True):
            # Padding goes in as zeros, so that a text gets the same labels in every batch.
            hidden = hidden + layer((norm(hidden) * on).transpose(1, 2)).transpose(1, 2).relu()
        x = self.memory_norm(hidden)
        before, behind = self.before(x, mask), self.behind(x.flip(1), mask.flip(1)).flip(1)
        return hidden + self.output(torch.cat([before, behind], -1))
