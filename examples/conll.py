"""CoNLL-style files: one token and its tag per line, a blank line between sentences."""

from __future__ import annotations

import re
from pathlib import Path

from sentences import InputError, Sentence

from fastnlp_ops import transition_mask

# In order of preference, for tags that are legal in several.
SCHEMES = ("BIO", "IOB1", "BIOES", "BMES", "BMESO")


def read_conll(path: Path, *, tagged: bool = True) -> list[Sentence]:
    """The token is the first column and the tag the last; without `tagged` only the tokens are read."""
    sentences = []
    sentence = Sentence([], [], [])
    for number, line in enumerate([*read_lines(path), ""], start=1):
        # Only blanks and tabs part columns: in Chinese files other white space can be a token.
        columns = re.split(r"[ \t]+", line.strip(" \t\r\n"))
        if columns == [""]:
            if sentence.tokens:
                sentences.append(sentence)
            sentence = Sentence([], [], [])
            continue
        if columns[0] == "-DOCSTART-":
            continue
        if tagged and len(columns) < 2:
            raise InputError(f"{path}:{number}: the line has a token and no tag: {columns[0]!r}")
        sentence.tokens.append(columns[0])
        sentence.lines.append(number)
        if tagged:
            sentence.tags.append(columns[-1])
    if not sentences:
        raise InputError(f"{path} is empty")
    for sentence in sentences:
        sentence.words = sentence.tokens
    return sentences


def read_lines(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig") as stream:
            return list(stream)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def detect_scheme(files: dict[Path, list[Sentence]]) -> str:
    """The scheme in which the tags of all files are legal.

    Where there is none, the message names the first illegal pair of the scheme that comes furthest,
    since that is most likely the scheme which the file was meant to be in.
    """
    labels = sorted({tag for sentences in files.values() for sentence in sentences for tag in sentence.tags})
    furthest = -1
    message = f"the tags are of no known scheme ({', '.join(SCHEMES)}): {', '.join(labels[:5])}"
    for scheme in SCHEMES:
        try:
            offence = first_offence(files, labels, scheme)
        except ValueError:  # a tag that is not of this scheme
            continue
        if offence is None:
            return scheme
        legal_tokens, where, what = offence
        if legal_tokens > furthest:
            furthest = legal_tokens
            message = f"{where}: the tags are of no known scheme: {what} is illegal in {scheme}, which fits best"
    raise InputError(message)


def first_offence(files: dict[Path, list[Sentence]], labels: list[str], scheme: str) -> tuple[int, str, str] | None:
    """(tokens before it, file:line, tags) of the first tag that may not stand where it stands."""
    allowed, starts, ends = (mask.tolist() for mask in transition_mask(labels, scheme))
    index = {label: i for i, label in enumerate(labels)}
    legal_tokens = 0
    for path, sentences in files.items():
        for sentence in sentences:
            previous = None
            for tag, line in zip(sentence.tags, sentence.lines, strict=True):
                if previous is None and not starts[index[tag]]:
                    return legal_tokens, f"{path}:{line}", f"a sentence that begins with {tag}"
                if previous is not None and not allowed[index[previous]][index[tag]]:
                    return legal_tokens, f"{path}:{line}", f"{tag} after {previous}"
                previous = tag
                legal_tokens += 1
            if not ends[index[previous]]:
                return legal_tokens, f"{path}:{line}", f"a sentence that ends with {previous}"
    return None


def check_tags_seen(path: Path, sentences: list[Sentence], labels: list[str]) -> None:
    seen = set(labels)
    for sentence in sentences:
        for tag, line in zip(sentence.tags, sentence.lines, strict=True):
            if tag not in seen:
                raise InputError(f"{path}:{line}: the tag {tag} does not occur in the training file")
