"""Triples that are true of Python's own standard library, found by `ast`: what a function calls and returns, ..."""

from __future__ import annotations

import ast
import random
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from python_corpus import library_paths, not_python, read_python
from relation_texts import TOKEN, Text, make_text
from sentences import InputError

# class - defines - method, function - calls - function, module - imports - name, ...
RELATIONS = ("calls", "defines", "imports", "inherits", "returns")
MAX_TOKENS = 192
KEYWORD = {ast.FunctionDef: "def ", ast.AsyncFunctionDef: "async def ", ast.ClassDef: "class "}
DEFINITION = re.compile(r"\s*(@|def |async def |class )")
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef

Offsets = tuple[int, int]  # [start, end) of characters


class Finder:
    """The triples of a source text, by the offsets of subject and object."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.lines = code.split("\n")
        self.line_starts = [0]
        for line in self.lines:
            self.line_starts.append(self.line_starts[-1] + len(line) + 1)
        self.triples = [triple for node in ast.walk(ast.parse(code)) for triple in self.found_at(node)]

    def found_at(self, node: ast.AST) -> Iterator[tuple[Offsets, str, Offsets]]:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                for call in calls(node.body):
                    if isinstance(call.func, ast.Name | ast.Attribute):
                        yield self.name(node), "calls", self.dotted_name(call.func)
                if node.returns:
                    yield self.name(node), "returns", self.extent(node.returns)
            case ast.ClassDef():
                for method in node.body:
                    if isinstance(method, FUNCTION):
                        yield self.name(node), "defines", self.name(method)
                for base in node.bases:
                    if isinstance(base, ast.Name | ast.Attribute):
                        yield self.name(node), "inherits", self.dotted_name(base)
            case ast.ImportFrom():
                start = self.extent(node)[0] + len("from ")
                module = start, self.code.index(" import ", start)
                for alias in node.names:
                    if alias.name != "*":
                        start = self.extent(alias)[0]
                        yield module, "imports", (start, start + len(alias.name))

    def extent(self, node: ast.AST) -> Offsets:
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def offset(self, line: int, byte_offset: int) -> int:
        return self.line_starts[line - 1] + len(self.lines[line - 1].encode()[:byte_offset].decode())

    def name(self, node: ast.AST) -> Offsets:
        start = self.extent(node)[0] + len(KEYWORD[type(node)])
        return start, start + len(node.name)

    def dotted_name(self, node: ast.AST) -> Offsets:
        """The dotted name at the end of an expression: all of `os.path.join`, but only `join` of `f(x).join`."""
        start, end = self.extent(node)
        return start + re.search(r"\w+(\.\w+)*$", self.code[start:end]).start(), end


def calls(body: list[ast.AST]) -> list[ast.Call]:
    """Calls in these statements, but not those inside of functions and classes that they define."""
    nodes = list(body)
    for node in nodes:
        if type(node) not in KEYWORD:
            nodes.extend(ast.iter_child_nodes(node))
    return [node for node in nodes if isinstance(node, ast.Call)]


def without_comments(source: str) -> str:
    """And without docstrings: what is left is as `ast` would write it. Raises SyntaxError like `ast.parse`."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | FUNCTION)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def pieces(code: str) -> Iterator[Offsets]:
    """Whole lines with up to MAX_TOKENS tokens together, cut before a definition where there is one in the second half.

    A line that has more is left out: it is a table, not code.
    """
    start = end = tokens = 0
    for line in re.finditer(r"[^\n]*\n?", code):
        length = len(TOKEN.findall(line.group()))
        full = tokens + length > MAX_TOKENS
        if tokens and (full or (tokens > MAX_TOKENS / 2 and DEFINITION.match(line.group()))):
            yield start, end
            tokens = 0
        if length > MAX_TOKENS:
            continue
        if not tokens:
            start = line.start()
        end, tokens = line.end(), tokens + length
    if tokens:
        yield start, end


def source_texts(source: str, where: str) -> list[Text]:
    code = without_comments(source)
    triples = Finder(code).triples
    texts = []
    for start, end in pieces(code):
        inside = [
            ([s - start for s in subject], relation, [o - start for o in object_])
            for subject, relation, object_ in triples
            if start <= min(subject[0], object_[0]) and max(subject[1], object_[1]) <= end
        ]
        texts.append(make_text(code[start:end], inside, where))
    return texts


def read_source_texts(path: Path) -> list[Text]:
    source = read_python(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Python thinks of the file's escapes and comparisons
            texts = source_texts(source, str(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: brackets in brackets
        raise not_python(path, error) from error
    if not texts:
        raise InputError(f"{path} is empty")
    return texts


def library_texts(seed: int, max_files: int, on_file: Callable[[], None] = lambda: None) -> list[list[Text]]:
    """Texts of up to `max_files` files of the standard library, the same ones for the same seed."""
    files = []
    for path in library_paths(random.Random(seed)):
        if len(files) == max_files:
            break
        try:
            texts = read_source_texts(path)
        except InputError:  # an empty file, or one that this Python cannot read
            continue
        files.append(texts)
        on_file()
    return files
