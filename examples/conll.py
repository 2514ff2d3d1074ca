"""CoNLL-style files: one token and its tag per line, a blank line between sentences."""

from __future__ import annotations

import re
from pathlib import Path

from files import read_lines
from sentences import InputError, Sentence, short

from fastnlp_ops import transition_mask

MOST_TOKENS = 4096  # of a sentence: there are as many spans as pairs of its tokens
# In order of preference, for tags that are legal in several.
SCHEMES = ("BIO", "IOB1", "BIOES", "BMES", "BMESO")
TAG = re.compile("O|[BILUMES](-.*)?")
# As in CoNLL-U, where 3-4 is a word that is written as one and counted as two, and 8.1 one that is not written.
TOKEN_NUMBER = re.compile(r"([0-9]{1,9})([-.][0-9]{1,9})?")

Line = tuple[int, list[str]]  # its number in the file, its columns


def read_conll(path: Path, *, tagged: bool = True) -> list[Sentence]:
    """The token is the first column that does not count tokens, the tag the last; without `tagged` there may be none.

    Comments (# id 7) and the lines -DOCSTART- are left out.
    """
    groups = parted(without_comments(read_lines(path)))
    rows = [line for group in groups for line in group]
    for number, columns in rows:
        if tagged and len(columns) < 2:
            raise InputError(f"{path}:{number}: the line has a token and no tag: {short(columns[0])!r}")
        if len(columns) != len(rows[0][1]):
            first, like = rows[0]
            raise InputError(f"{path}:{number}: the number of columns is {len(columns)}, in line {first} {len(like)}")
    own = 2 if tagged or all(TAG.fullmatch(columns[-1]) for _, columns in rows) else 1
    while groups and len(groups[0][0][1]) > own and count_tokens(groups):
        counted = [[(n, columns[1:]) for n, columns in group if columns[0].isdecimal()] for group in groups]
        groups = [group for group in counted if group]
    if not groups:
        raise InputError(f"{path} is empty")
    sentences = []
    for group in groups:
        if len(group) > MOST_TOKENS:
            raise InputError(f"{path}:{group[0][0]}: {len(group)} tokens without the blank line that ends a sentence")
        tokens = [columns[0] for _, columns in group]
        tags = [columns[-1] for _, columns in group] if tagged else []
        sentences.append(Sentence(tokens, tokens, [number for number, _ in group], tags))
    return sentences


def columns_of(line: str) -> list[str]:
    """Parted by tabs where there are any, else by blanks; other white space can be a token in Chinese files."""
    if "\t" not in line:
        return [column for column in line.split(" ") if column]
    first, *others = re.split("\t+", line.rstrip(" \t").lstrip("\t"))
    # A blank between tabs is a token as well.
    return [first.strip(" ") or first, *(column.strip(" ") for column in others)] if first or others else []


def without_comments(lines: list[str]) -> list[Line]:
    """A line with # is a token (#, #nlproc) where its columns are parted as others are, as many, and end with a tag."""
    rows = [(number, columns_of(line)) for number, line in enumerate(lines, start=1)]
    others = [(n, columns) for n, columns in rows if columns and columns[0][0] != "#" and not is_docstart(columns)]
    last = {columns[-1] for _, columns in others}

    def is_comment(number: int, columns: list[str]) -> bool:
        if not columns or columns[0][0] != "#":
            return False
        like_number, like = others[0] if others else (number, columns)
        if len(columns) != len(like) or ("\t" in lines[number - 1]) != ("\t" in lines[like_number - 1]):
            return True
        return len(columns) > 1 and columns[-1] not in last and not TAG.fullmatch(columns[-1])

    return [row for row in rows if not is_comment(*row)]


def is_docstart(columns: list[str]) -> bool:
    return columns[:1] == ["-DOCSTART-"]


def parted(lines: list[Line]) -> list[list[Line]]:
    """The lines of each sentence."""
    groups: list[list[Line]] = [[]]
    for number, columns in lines:
        if columns and not is_docstart(columns):
            groups[-1].append((number, columns))
        elif groups[-1]:
            groups.append([])
    return [group for group in groups if group]


def count_tokens(groups: list[list[Line]]) -> bool:
    """Whether the first column counts the tokens, from 0 or 1 on, of each sentence or of the file."""
    previous = -1
    for group in groups:
        begins = True
        for _, columns in group:
            match = TOKEN_NUMBER.fullmatch(columns[0])
            if not match:
                return False
            number, part = int(match[1]), match[2] or ""
            follows = number == previous + 1 or (number == previous and part.startswith("."))
            if not follows and not (begins and number <= 1):
                return False
            if not part:
                previous, begins = number, False
    return True


def detect_scheme(files: dict[Path, list[Sentence]]) -> str:
    """The scheme in which the tags of all files are legal.

    Where there is none, the message names the first illegal pair of the scheme that comes furthest,
    since that is most likely the scheme which the file was meant to be in.
    """
    labels = sorted({tag for sentences in files.values() for sentence in sentences for tag in sentence.tags})
    furthest, message = -1, ""
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
    raise InputError(message or no_scheme(files, labels))


def no_scheme(files: dict[Path, list[Sentence]], labels: list[str]) -> str:
    """The message for tags that no scheme has all of, with the first that is one too many."""
    fitting, seen = list(SCHEMES), set()
    for path, sentences in files.items():
        for sentence in sentences:
            for tag, line in zip(sentence.tags, sentence.lines, strict=True):
                if tag not in seen:
                    seen.add(tag)
                    fitting = [scheme for scheme in fitting if has_tag(scheme, tag)]
                if not fitting:
                    return f"{path}:{line}: the tags are of no known scheme ({', '.join(SCHEMES)}): {short(tag)}"
    return f"the tags are of no known scheme ({', '.join(SCHEMES)}): {short(', '.join(labels))}"  # E-X and L-X


def has_tag(scheme: str, tag: str) -> bool:
    try:
        transition_mask([tag], scheme)
    except ValueError:
        return False
    return True


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
                    return legal_tokens, f"{path}:{line}", f"a sentence that begins with {short(tag)}"
                if previous is not None and not allowed[index[previous]][index[tag]]:
                    return legal_tokens, f"{path}:{line}", f"{short(tag)} after {short(previous)}"
                previous = tag
                legal_tokens += 1
            if not ends[index[previous]]:
                return legal_tokens, f"{path}:{line}", f"a sentence that ends with {short(previous)}"
    return None


def check_tags_seen(path: Path, sentences: list[Sentence], labels: list[str]) -> None:
    seen = set(labels)
    for sentence in sentences:
        for tag, line in zip(sentence.tags, sentence.lines, strict=True):
            if tag not in seen:
                raise InputError(f"{path}:{line}: the tag {short(tag)} does not occur in the training file")
