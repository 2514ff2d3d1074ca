"""Tag schemes: how the tags of a sequence spell out its spans, for constraints, evaluation and data."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastnlp_ops import _host

_Labels = Sequence[str] | Mapping[Any, str]

# The numbers that csrc/python/host.cpp gives to roles and to families of schemes.
_OUTSIDE, _BEGIN, _INSIDE, _END, _SINGLE = range(5)
_BIO, _IOB1, _BIOES = range(3)

_IOB_PREFIXES = {"O": _OUTSIDE, "B": _BEGIN, "I": _INSIDE}
_BIOES_PREFIXES = {"O": _OUTSIDE, "B": _BEGIN, "I": _INSIDE, "E": _END, "L": _END, "S": _SINGLE, "U": _SINGLE}
_BMES_PREFIXES = {"B": _BEGIN, "M": _INSIDE, "E": _END, "S": _SINGLE}

_SCHEMES: dict[str, tuple[int, dict[str, int]]] = {
    "BIO": (_BIO, _IOB_PREFIXES),
    "IOB2": (_BIO, _IOB_PREFIXES),
    "IOB1": (_IOB1, _IOB_PREFIXES),
    "BIOES": (_BIOES, _BIOES_PREFIXES),
    "BILOU": (_BIOES, _BIOES_PREFIXES),
    "BMES": (_BIOES, _BMES_PREFIXES),
    "BMESO": (_BIOES, {"O": _OUTSIDE, **_BMES_PREFIXES}),
}


def transition_mask(labels: _Labels, scheme: str = "BIO") -> tuple[Tensor, Tensor, Tensor]:
    """Which tag may follow which, begin a sequence and end one, in a tag scheme.

    A label is a prefix, or a prefix, "-" and a type ("B-PER"; what follows the first "-" is the type). "O" has no type.

    ============== ============= ========================== ======================== ==================
    scheme         prefixes      a span of type x           may follow               sequence ends with
    ============== ============= ========================== ======================== ==================
    BIO, IOB2      B I O         B-x I-x*                   I-x: B-x, I-x            any
                                                            B, O: any, the start
    IOB1           I B O         I-x+; B-x I-x* right after B-x: I-x, B-x            any
                                 a span of the same type    I, O: any, the start
    BIOES, BILOU   B I E S O     S-x or B-x I-x* E-x        I-x, E-x: B-x, I-x       E, S, O
                   (E = L,                                  B, S, O: E, S, O, the
                   S = U)                                   start
    BMES           B M E S       S-x or B-x M-x* E-x        as BIOES with M for I    E, S
    BMESO          B M E S O     as BMES                    as BMES, and O           E, S, O
    ============== ============= ========================== ======================== ==================

    BMES is for data in which every step belongs to a span (word segmentation, part-of-speech tagging): it has no O.
    BMESO is for data in which steps may lie outside of every span.

    A sequence of tags can be written in the scheme if and only if it begins in ``starts``, ends in ``ends`` and makes
    only steps of ``allowed``.

    Args:
        labels (Sequence[str] or Mapping): label of each tag id, or a dict from ids to labels, as the ``id2label`` of a
            transformers config: keys 0 to N - 1 in any order, also as strings.
        scheme (str): "BIO" or "IOB2" (the same), "IOB1", "BIOES" or "BILOU" (the same), "BMES", "BMESO".

    Returns:
        (Tensor[N, N], Tensor[N], Tensor[N]): bool; ``allowed[from, to]``, ``starts``, ``ends``.

    Raises:
        ValueError: unknown scheme, no labels, a label whose prefix the scheme does not have, the same tag twice (in
            BIOES also as "E-PER" and "L-PER"), a dict whose keys are not 0 to N - 1.
        TypeError: labels that are not strings.

    References:
        Ramshaw and Marcus, "Text Chunking using Transformation-Based Learning" (1995), arXiv:cmp-lg/9505040: IOB1.
        Tjong Kim Sang and Veenstra, "Representing Text Chunks" (1999), arXiv:cs/9907006: IOB2.
        Ratinov and Roth, "Design Challenges and Misconceptions in Named Entity Recognition" (2009), W09-1119: BILOU.
        Xue, "Chinese Word Segmentation as Character Tagging" (2003), O03-4002: BMES.
    """
    family, roles, types, _ = _parse(labels, scheme)
    allowed, starts, ends = _host.transition_table(roles, types, family)
    return torch.from_numpy(allowed), torch.from_numpy(starts), torch.from_numpy(ends)


def tags_to_spans(
    tags: Tensor | Sequence[int], labels: _Labels, scheme: str = "BIO", mask: Tensor | None = None
) -> Tensor | list[Tensor]:
    """Spans that a sequence of tags spells out.

    Sequences that the scheme does not allow are read as the CoNLL evaluation script (conlleval) reads them: B and S
    always open a span; I (M) and E continue the span of the step before them if that step is a B or an I of the same
    type, and open a new one otherwise; a span that is never closed ends at its last step.

    Types are numbered in the order in which the labels first show them:
    ``list(dict.fromkeys(label[2:] for label in labels if label != "O"))``.

    Args:
        tags (Tensor[T], Tensor[B, T] or list of int): tag ids, as the decoders of this package return them.
        labels (Sequence[str] or Mapping): label of each tag id, see :func:`transition_mask`.
        scheme (str): see :func:`transition_mask`.
        mask (Tensor[T] or Tensor[B, T]): steps that count, any dtype; None: the steps whose tag is not negative. The
            other steps are skipped: a span goes on across them, and its ends are still positions in ``tags``.

    Returns:
        Tensor[M, 3], or a list of them for a batch: int64 on the CPU; start, end (inclusive) and type of each span, in
        the order of the sequence.

    Raises:
        ValueError: labels or scheme as in :func:`transition_mask`; shapes; a tag that is not in [0, N).
        TypeError: tags that are not integers, labels that are not strings.

    References:
        Tjong Kim Sang and Buchholz, "Introduction to the CoNLL-2000 Shared Task: Chunking" (2000), W00-0726.
    """
    _, roles, types, _ = _parse(labels, scheme)
    ids = _integers("tags", tags)
    if ids.dim() not in (1, 2):
        raise ValueError(f"tags must be [T] or [B, T], got shape {tuple(ids.shape)}")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"mask must have the shape of tags, got {tuple(mask.shape)} and {tuple(ids.shape)}")
    batch = ids.shape[0] if ids.dim() == 2 else 1
    on = None if mask is None else (mask != 0).cpu().reshape(batch, ids.shape[-1]).numpy()
    found = torch.from_numpy(_host.tags_to_spans(ids.reshape(batch, ids.shape[-1]).numpy(), roles, types, on))
    if ids.dim() == 1:
        return found[:, 1:]
    return list(found[:, 1:].split(torch.bincount(found[:, 0], minlength=batch).tolist())) if batch else []


def spans_to_tags(spans: Tensor | Sequence[Sequence[int]], length: int, labels: _Labels, scheme: str = "BIO") -> Tensor:
    """Tags of a sequence of ``length`` steps with the given spans; the inverse of :func:`tags_to_spans`.

    Args:
        spans (Tensor[M, 3] or list of triples): start, end (inclusive) and type of each span, in any order; types are
            numbered as in :func:`tags_to_spans`.
        length (int): number of steps.
        labels (Sequence[str] or Mapping): label of each tag id, see :func:`transition_mask`.
        scheme (str): see :func:`transition_mask`.

    Returns:
        Tensor[length]: int64 tag ids on the CPU.

    Raises:
        ValueError: labels or scheme as in :func:`transition_mask`; spans that overlap or leave the sequence; a tag
            that the labels do not have; a step outside of every span where the labels have no O.
        TypeError: spans that are not integers, labels that are not strings.
    """
    family, roles, types, names = _parse(labels, scheme)
    if length < 0:
        raise ValueError(f"length must be at least 0, got {length}")
    triples = _integers("spans", spans)
    if triples.numel() == 0:
        triples = triples.reshape(0, 3)
    if triples.dim() != 2 or triples.shape[1] != 3:
        raise ValueError(f"spans must be [M, 3], got shape {tuple(triples.shape)}")
    ids = np.full((len(names), 5), -1, np.int64)
    outside_id = -1
    for tag, (role, kind) in enumerate(zip(roles.tolist(), types.tolist(), strict=True)):
        if role == _OUTSIDE:
            outside_id = tag
        else:
            ids[kind, role] = tag
    return torch.from_numpy(_host.spans_to_tags(triples.numpy(), length, ids, outside_id, family))


def _label_of_each_tag(labels: _Labels) -> tuple[str, ...]:
    """Labels in the order of their ids."""
    unordered = isinstance(labels, (str, bytes, set, frozenset))  # characters are no labels, a set has no order
    if unordered or not isinstance(labels, Iterable):
        raise TypeError(f"labels must be a sequence or a dict from ids to labels, got {type(labels).__name__}")
    if isinstance(labels, Mapping):
        by_id = {_tag_id(key): label for key, label in labels.items()}
        if len(by_id) != len(labels) or set(by_id) != set(range(len(labels))):
            keys = ", ".join(map(repr, labels))
            raise ValueError(f"labels must have the keys 0 to {len(labels) - 1} where they are a dict, got {keys}")
        labels = [by_id[tag] for tag in range(len(by_id))]
    names = tuple(labels)
    for tag, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"labels must be strings, got {name!r} for tag {tag}")
    return names


def _tag_id(key: Any) -> Any:
    """A key of id2label as an integer: JSON turns it into a string."""
    return int(key) if isinstance(key, str) and key.isdecimal() else key


def _parse(labels: _Labels, scheme: str) -> tuple[int, np.ndarray, np.ndarray, list[str]]:
    """Family of the scheme, role and type id of each label (type -1: O), names of the types."""
    if scheme not in _SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(_SCHEMES)}, got {scheme!r}")
    labels = _label_of_each_tag(labels)
    if len(labels) == 0:
        raise ValueError("labels must not be empty")
    family, prefixes = _SCHEMES[scheme]
    names: dict[str, int] = {}
    seen: dict[tuple[int, str], str] = {}
    roles, types = [], []
    for label in labels:
        prefix, dash, name = label.partition("-")
        role = prefixes.get(prefix)
        if role is None or (role == _OUTSIDE and dash):
            expected = ", ".join(sorted(prefixes))
            raise ValueError(f"labels of scheme {scheme} must be a prefix of {expected} and a type, got {label!r}")
        if (role, name) in seen:
            raise ValueError(f"labels must be different tags, got {seen[role, name]!r} and {label!r}")
        seen[role, name] = label
        roles.append(role)
        types.append(-1 if role == _OUTSIDE else names.setdefault(name, len(names)))
    return family, np.array(roles, np.int64), np.array(types, np.int64), list(names)


def _integers(name: str, values: Tensor | Sequence) -> Tensor:
    tensor = torch.as_tensor(values)
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise TypeError(f"{name} must be integers, got {tensor.dtype}")
    return tensor.detach().to("cpu", torch.int64)
