"""GPLinker (Su, https://kexue.fm/archives/8888): relation triples by three GlobalPointers over one encoder.

One of two heads finds spans that are a subject or an object. The other two have a head for each relation: one scores
whether a subject's first token and an object's first token are so related, one does the same for their last tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from encoder import WIDTH, Encoder, consecutive, encode_words, pad, random_batches
from relation_texts import Text, Triple
from tagger import best, number, read_checkpoint, write_checkpoint
from torch import Tensor, nn

from fastnlp_ops import GlobalPointer, gplinker_decode

HEAD_SIZE = 64
CHECKPOINT_FORMAT = "fastnlp_ops example extractor 2"
MOST_TRIPLES = 1  # for each word; in the standard library there is one for 30, and never more than one for 4


class Example(NamedTuple):
    """A text as tensors."""

    features: Tensor  # [T, F]
    entities: Tensor  # [2M, 3]: 0 for a subject or 1 for an object, first and last token
    heads: Tensor  # [M, 3]: relation, first token of the subject and of the object
    tails: Tensor  # [M, 3]: relation, last token of the subject and of the object


class Batch(NamedTuple):
    """The labels as (text, head, row, column), as `global_pointer_loss` takes them."""

    features: Tensor  # [B, T, F]
    mask: Tensor  # [B, T]
    entities: Tensor  # [M, 4]
    heads: Tensor  # [M, 4]
    tails: Tensor  # [M, 4]


def encode(texts: list[Text], relations: list[str]) -> list[Example]:
    index = {relation: i for i, relation in enumerate(relations)}
    examples = []
    for text in texts:
        entities, heads, tails = [], [], []
        for subject, relation, object_ in text.triples:
            entities += [(0, *subject), (1, *object_)]
            heads.append((index[relation], subject[0], object_[0]))
            tails.append((index[relation], subject[1], object_[1]))
        labels = (torch.tensor(rows, dtype=torch.long).reshape(-1, 3) for rows in (entities, heads, tails))
        examples.append(Example(encode_words(text.words), *labels))
    return examples


def batches(examples: list[Example], batch_size: int, steps: int, seed: int) -> Iterator[Batch]:
    """`steps` batches of the examples in random order, the same ones for the same seed."""
    for chosen in random_batches(len(examples), batch_size, steps, seed):
        features, *labels = zip(*(examples[i] for i in chosen), strict=True)
        yield Batch(*pad(list(features)), *map(number, labels))


class Extractor(nn.Module):
    def __init__(self, relations: list[str]) -> None:
        super().__init__()
        self.relations = relations
        self.encoder = Encoder()
        self.entities = GlobalPointer(WIDTH, 2, HEAD_SIZE)
        # A relation may go from any token to any token, so no triangle, and how far apart they are says little.
        self.heads = GlobalPointer(WIDTH, len(relations), HEAD_SIZE, rope=False, tril_mask=False)
        self.tails = GlobalPointer(WIDTH, len(relations), HEAD_SIZE, rope=False, tril_mask=False)

    def loss(self, batch: Batch) -> Tensor:
        hidden = self.encoder(batch.features, batch.mask)
        losses = (
            layer.loss(hidden, labels, batch.mask, reduction="batchmean")
            for layer, labels in (
                (self.entities, batch.entities),
                (self.heads, batch.heads),
                (self.tails, batch.tails),
            )
        )
        return sum(losses) / 3

    @torch.no_grad()
    def predict(
        self, texts: list[Text], on_batch: Callable[[int], None] = lambda _: None
    ) -> tuple[list[list[Triple]], int]:
        """The best triples of every text, MOST_TRIPLES for each word, and how many more there were."""
        predicted, left_out = [], 0
        for together in consecutive([len(text.words) for text in texts]):
            features, mask = pad([encode_words(text.words) for text in texts[together]])
            hidden = self.encoder(features, mask)
            # No more subjects and objects than words: a model that has learnt nothing finds a quarter of all spans.
            spans, _ = self.entities.decode(hidden, mask, top_k=mask.shape[1])
            head_q, head_k, *_ = self.heads.project(hidden)
            tail_q, tail_k, *_ = self.tails.project(hidden)
            found, scores = gplinker_decode(spans, head_q, head_k, tail_q, tail_k, mask=mask)
            kept = best(found, scores, MOST_TRIPLES * mask.sum(1))
            left_out += len(found) - len(kept)
            triples = [[] for _ in mask]
            for text, first, last, relation, object_first, object_last in kept.tolist():
                triples[text].append(Triple((first, last), self.relations[relation], (object_first, object_last)))
            predicted += triples
            on_batch(len(mask))
        return predicted, left_out


def save_checkpoint(path: Path, extractor: Extractor, corpus: str) -> None:
    write_checkpoint(path, CHECKPOINT_FORMAT, corpus, extractor, relations=extractor.relations)


def load_checkpoint(path: Path) -> tuple[Extractor, str]:
    """The extractor, and which corpus ("python" or "json") it was trained on."""
    return read_checkpoint(path, CHECKPOINT_FORMAT, lambda content: Extractor(content["relations"]))
