"""Texts with relation triples, in JSON lines: {"text": "Ada wrote it", "triples": [["Ada", "wrote", "it"]]}.

A subject or an object is a string of the text, or the [start, end) of its characters.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from files import read_lines
from sentences import InputError, short

# A line break with the indentation behind it, a Chinese or Japanese character, a word, or any other sign.
CHARACTERS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
TOKEN = re.compile(rf"\s*\n[ \t]*|^[ \t]+|[{CHARACTERS}]|[^\W{CHARACTERS}]+|[^\w\s]")


class Triple(NamedTuple):
    """Spans are first and last token."""

    subject: tuple[int, int]
    relation: str
    object: tuple[int, int]


@dataclass
class Text:
    text: str
    where: str  # it stands, for messages
    words: list[str]
    offsets: list[tuple[int, int]]  # [start, end) of each word in the text
    triples: list[Triple]

    def string(self, span: tuple[int, int]) -> str:
        return self.text[self.offsets[span[0]][0] : self.offsets[span[1]][1]]


def make_text(text: str, triples: list, where: str) -> Text:
    """Checks what a user wrote; the message of an InputError begins with `where`."""
    if not text.strip():
        raise InputError(f"{where}: the text is empty")
    found = [match.span() for match in TOKEN.finditer(text)]
    made = Text(text, where, [text[start:end] for start, end in found], found, [])
    if not isinstance(triples, list):
        raise InputError(f'{where}: "triples" must be a list, got {shown(triples)}')
    for triple in triples:
        if not isinstance(triple, list | tuple) or len(triple) != 3:
            raise InputError(f"{where}: a triple is [subject, predicate, object], got {shown(triple)}")
        subject, relation, object_ = triple
        if not isinstance(relation, str) or not relation.strip():
            raise InputError(f"{where}: a predicate is a string, got {shown(relation)}")
        check_characters(relation, f"{where}: the predicate {shown(relation)}")
        first = locate(made, subject, f"{where}: the subject")
        second = locate(made, object_, f"{where}: the object")
        made.triples.append(Triple(first, relation, second))
    return made


def locate(text: Text, part: str | list[int], what: str) -> tuple[int, int]:
    """First and last token of offsets, or of a string: where it first stands as whole words, or else as part of one."""
    if isinstance(part, str) and part.strip():
        escaped = re.escape(part.strip())
        match = re.search(rf"(?<!\w){escaped}(?!\w)", text.text) or re.search(escaped, text.text)
        if not match:
            raise InputError(f"{what} {shown(part)} is not in the text")
        start, end = match.span()
    elif isinstance(part, list | tuple) and len(part) == 2 and all(type(offset) is int for offset in part):
        start, end = part
        if not 0 <= start < end <= len(text.text):
            raise InputError(f"{what} [{start}, {end}] is no part of a text of {len(text.text)} characters")
    else:
        raise InputError(f"{what} must be a string or [start, end], got {shown(part)}")
    # The tokens that overlap [start, end).
    first = bisect_right([stop for _, stop in text.offsets], start)
    last = bisect_left([begin for begin, _ in text.offsets], end) - 1
    if first > last:
        raise InputError(f"{what} is blank")
    return first, last


def check_characters(text: str, what: str) -> None:
    if re.search("[\ud800-\udfff]", text):
        raise InputError(f"{what} has half of a surrogate pair, which is no character")


def shown(value: object) -> str:
    return short(json.dumps(value, ensure_ascii=False))


def read_texts(path: Path, *, labelled: bool = True) -> list[Text]:
    """Without `labelled` only the texts are read."""
    texts = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: the line is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise InputError(f"{where}: the line is no JSON object: {shown(record)}")
        for key in ("text", "triples") if labelled else ("text",):
            if key not in record:
                raise InputError(f'{where}: the line has no "{key}"')
        if not isinstance(record["text"], str):
            raise InputError(f'{where}: "text" must be a string, got {shown(record["text"])}')
        check_characters(record["text"], f'{where}: "text"')
        texts.append(make_text(record["text"], record["triples"] if labelled else [], where))
    if not texts:
        raise InputError(f"{path} is empty")
    return texts


def check_relations_seen(texts: list[Text], relations: list[str]) -> None:
    for text in texts:
        for triple in text.triples:
            if triple.relation not in relations:
                predicate = shown(triple.relation)
                raise InputError(f"{text.where}: the predicate {predicate} does not occur in the training file")
