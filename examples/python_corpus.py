"""A labelled corpus that is on every machine: the source of Python's own standard library.

`tokenize` gives the tokens and `ast` the labels. The tags are flat: which role each name plays. The spans
are nested: the roles again, and the calls, arguments, conditions, ... around them.
"""

from __future__ import annotations

import ast
import io
import keyword
import random
import sysconfig
import token
import tokenize
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from sentences import InputError, Sentence, Span

from fastnlp_ops import spans_to_tags

ROLES = (
    *("function", "class", "base", "decorator", "parameter", "variable", "field", "module", "import", "alias"),
    *("callee", "attribute", "keyword", "exception", "docstring"),
)
LABELS = ["O", *(f"{prefix}-{role}" for role in ROLES for prefix in "BI")]
# Nested kinds beside the roles, which only a span head can learn: these nodes, and what KINDS adds.
PHRASE_OF_NODE = {
    ast.Call: "call",
    ast.Subscript: "subscript",
    ast.Lambda: "lambda",
    **dict.fromkeys((ast.BinOp, ast.BoolOp, ast.Compare), "operation"),
    **dict.fromkeys((ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp), "comprehension"),
    **dict.fromkeys((ast.List, ast.Tuple, ast.Set, ast.Dict), "collection"),
}
PHRASES = ("argument", "annotation", "condition", "function body", "class body", *sorted(set(PHRASE_OF_NODE.values())))
KINDS = [*ROLES, *PHRASES]

MIN_TOKENS, MAX_TOKENS = 32, 128  # the bounds between which the room of a sentence is drawn
# Tests would be most of the corpus, code page tables are no code, and what is installed differs between machines.
SKIPPED_FOLDERS = {"test", "tests", "encodings", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo"}

# Hidden from the model, with all keywords, because they tell which role the name beside them plays: `def` a function,
# `.` an attribute, `=` a variable or an argument. With nothing hidden there is little to learn (F1 0.987 in 400 steps),
# with every sign hidden more is guessing (0.824); with these hidden it is 0.932. Brackets, commas and colons stay.
GIVE_AWAYS = {".", "=", "@", "->", ":=", "*", "**"}
HIDDEN = "<hidden>"


def hide(kind: int, text: str) -> str:
    """What the model reads in place of a token."""
    if kind == tokenize.STRING:
        return "<string>"
    if kind == tokenize.NUMBER:
        return "<number>"
    if kind == tokenize.NEWLINE:
        return "<newline>"
    if keyword.iskeyword(text) or text in GIVE_AWAYS:
        return HIDDEN
    return text


class SourceFile:
    """The tokens of a file (no comments, no indentation) and where each of them starts and ends."""

    def __init__(self, source: str) -> None:
        self.kinds: list[int] = []
        self.texts: list[str] = []
        self.starts: list[tuple[int, int]] = []  # (line, column in characters)
        self.ends: list[tuple[int, int]] = []
        self.statement_starts: list[int] = []  # token index of the first token of each logical line
        new_statement = True
        for kind, text, start, end in merged_strings(source):
            if kind not in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING, tokenize.NEWLINE):
                continue
            if new_statement:
                self.statement_starts.append(len(self.texts))
            new_statement = kind == tokenize.NEWLINE
            self.kinds.append(kind)
            self.texts.append(text)
            self.starts.append(start)
            self.ends.append(end)

    def __len__(self) -> int:
        return len(self.texts)


def merged_strings(source: str) -> list[tuple[int, str, tuple[int, int], tuple[int, int]]]:
    """`tokenize` with f-strings (and t-strings) as one STRING each, as Python before 3.12 gives them."""
    opening = {getattr(token, name) for name in ("FSTRING_START", "TSTRING_START") if hasattr(token, name)}
    closing = {getattr(token, name) for name in ("FSTRING_END", "TSTRING_END") if hasattr(token, name)}
    merged = []
    depth, start_of_string = 0, (0, 0)
    for kind, text, start, end, _ in tokenize.generate_tokens(io.StringIO(source).readline):
        if kind in opening:
            start_of_string = start if depth == 0 else start_of_string
            depth += 1
        elif kind in closing:
            depth -= 1
            if depth == 0:
                merged.append((tokenize.STRING, '""', start_of_string, end))
        elif depth == 0:
            merged.append((kind, text, start, end))
    return merged


class Labeller:
    """Finds the roles and phrases of a parsed file as spans of token indices."""

    def __init__(self, file: SourceFile, source: str) -> None:
        self.file = file
        self.lines = source.split("\n")
        self.token_at = {start: i for i, start in enumerate(file.starts)}
        self.token_before = {end: i + 1 for i, end in enumerate(file.ends)}
        self.has_role = [False] * len(file)
        self.roles: list[Span] = []
        self.phrases: list[Span] = []
        # Parents come before their children, so that `os.path.join` is claimed whole before `os.path` is seen.
        for node in walk_outside_strings(ast.parse(source)):
            self.label(node)

    def position(self, line: int, byte_offset: int) -> tuple[int, int]:
        """`ast` counts UTF-8 bytes where `tokenize` counts characters."""
        text = self.lines[line - 1]
        return line, byte_offset if text.isascii() else len(text.encode()[:byte_offset].decode())

    def extent(self, node: ast.AST) -> tuple[int, int]:
        start = self.token_at[self.position(node.lineno, node.col_offset)]
        return start, self.token_before[self.position(node.end_lineno, node.end_col_offset)]

    def claim(self, role: str, start: int, stop: int) -> None:
        """Give tokens a role, unless a parent has given one to any of them."""
        if not any(self.has_role[start:stop]):
            self.has_role[start:stop] = [True] * (stop - start)
            self.roles.append(Span(start, stop, role))

    def claim_dotted(self, role: str, node: ast.AST | None) -> None:
        """The dotted name at the end of an expression: all of `os.path.join`, but only `join` of `f(x).join`."""
        if not isinstance(node, ast.Name | ast.Attribute):
            return
        texts = self.file.texts
        stop = self.extent(node)[1]
        start = stop - 1
        while start >= 2 and texts[start - 1] == "." and texts[start - 2].isidentifier():
            start -= 2
        self.claim(role, start, stop)

    def claim_name(self, role: str, node: ast.AST, name: str, after: ast.AST | None = None) -> None:
        """The first token `name` of a node, or behind a child of it: `ast` has no position for the name of a `def`."""
        start = self.extent(after)[1] if after else self.extent(node)[0]
        index = self.file.texts.index(name, start)
        self.claim(role, index, index + 1)

    def phrase(self, kind: str, node: ast.AST) -> None:
        self.phrases.append(Span(*self.extent(node), kind))

    def label(self, node: ast.AST) -> None:
        if type(node) in PHRASE_OF_NODE:
            self.phrase(PHRASE_OF_NODE[type(node)], node)
        match node:
            case ast.Module():
                self.docstring(node)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self.claim_name("function", node, node.name)
                self.docstring(node)
                self.decorators(node)
                self.annotation(node.returns)
                self.body("function body", node)
            case ast.ClassDef():
                self.claim_name("class", node, node.name)
                self.docstring(node)
                self.decorators(node)
                for base in node.bases:
                    self.claim_dotted("base", base)
                self.body("class body", node)
            case ast.arg():
                self.claim_name("parameter", node, node.arg)
                self.annotation(node.annotation)
            case ast.AnnAssign():
                self.annotation(node.annotation)
            case ast.Import():
                for alias in node.names:
                    self.imported("module", alias)
            case ast.ImportFrom():
                start = self.extent(node)[0]
                self.claim("module", start + 1, self.file.texts.index("import", start))
                for alias in node.names:
                    self.imported("import", alias)
            case ast.ExceptHandler():
                for kind in node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]:
                    self.claim_dotted("exception", kind)
                if node.name:
                    self.claim_name("alias", node, node.name, after=node.type)
            case ast.Raise():
                self.claim_dotted("exception", callee_or_self(node.exc))
            case ast.withitem(optional_vars=ast.Name()):
                self.claim_dotted("alias", node.optional_vars)
            case ast.Call():
                self.claim_dotted("callee", node.func)
                for argument in node.args:
                    self.phrase("argument", argument)
            case ast.keyword():
                if node.arg:
                    self.claim_name("keyword", node, node.arg)
                self.phrase("argument", node.value)
            case ast.If() | ast.While() | ast.IfExp() | ast.Assert():
                self.phrase("condition", node.test)
            case ast.Name(ctx=ast.Store()):
                self.claim_dotted("variable", node)
            case ast.Attribute():
                self.claim_dotted("field" if isinstance(node.ctx, ast.Store) else "attribute", node)

    def docstring(self, node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        if ast.get_docstring(node, clean=False) is not None:
            self.claim("docstring", *self.extent(node.body[0]))

    def decorators(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for decorator in node.decorator_list:
            self.claim_dotted("decorator", callee_or_self(decorator))

    def annotation(self, node: ast.AST | None) -> None:
        if node is not None:
            self.phrase("annotation", node)

    def body(self, kind: str, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        decorators = getattr(node.body[0], "decorator_list", [])
        start = self.extent(decorators[0])[0] - 1 if decorators else self.extent(node.body[0])[0]  # with the @
        self.phrases.append(Span(start, self.extent(node)[1], kind))

    def imported(self, role: str, alias: ast.alias) -> None:
        start, stop = self.extent(alias)
        if alias.asname:
            self.claim("alias", stop - 1, stop)
            stop -= 2  # `as` and the name
        self.claim(role, start, stop)


def callee_or_self(node: ast.AST | None) -> ast.AST | None:
    """`E` of both `raise E` and `raise E(...)`."""
    return node.func if isinstance(node, ast.Call) else node


def walk_outside_strings(tree: ast.AST) -> list[ast.AST]:
    """`ast.walk` that stays out of f-strings, whose inner positions are wrong before Python 3.12."""
    nodes = [tree]
    for node in nodes:
        if type(node).__name__ not in ("JoinedStr", "TemplateStr"):
            nodes.extend(ast.iter_child_nodes(node))
    return nodes


def label_source(source: str, room: Callable[[], int] = lambda: MAX_TOKENS) -> list[Sentence]:
    """The sentences of a source file with tags and nested spans. Raises SyntaxError like `ast.parse`."""
    file = SourceFile(source)
    labeller = Labeller(file, source)
    sentences = []
    for start, stop in sentence_bounds(file, room):
        # A span that a cut goes through is lost; only statements longer than a sentence are cut.
        roles, phrases = (
            [Span(a - start, b - start, label) for a, b, label in spans if start <= a and b <= stop]
            for spans in (labeller.roles, labeller.phrases)
        )
        sentence = cut(file, start, stop)
        triples = [(a, b - 1, ROLES.index(role)) for a, b, role in roles]
        sentence.tags = [LABELS[i] for i in spans_to_tags(triples, stop - start, LABELS, "BIO")]
        sentence.spans = sorted(roles + phrases)
        sentences.append(sentence)
    return sentences


def cut(file: SourceFile, start: int, stop: int) -> Sentence:
    tokens = file.texts[start:stop]
    words = [hide(kind, text) for kind, text in zip(file.kinds[start:stop], tokens, strict=True)]
    return Sentence(tokens, words, [line for line, _ in file.starts[start:stop]])


def sentence_bounds(file: SourceFile, room: Callable[[], int] = lambda: MAX_TOKENS) -> list[tuple[int, int]]:
    """Whole statements, as many as fit into `room()` tokens; a statement that needs more is cut."""
    bounds = []
    start, limit = 0, room()
    for statement, following in pairwise([*file.statement_starts, len(file)]):
        if following - start > limit and statement > start:
            bounds.append((start, statement))
            start, limit = statement, room()
        while following - start > limit:
            bounds.append((start, start + limit))
            start, limit = start + limit, room()
    if start < len(file):
        bounds.append((start, len(file)))
    return bounds


def read_python(path: Path) -> str:
    """The text of a source file, in the encoding that it declares."""
    try:
        with tokenize.open(path) as stream:
            source = stream.read()
        source.encode()  # some encodings can spell half of a surrogate pair
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (SyntaxError, ValueError, LookupError) as error:  # LookupError: # coding: hex
        raise not_python(path, error) from error
    return source


def not_python(path: Path, error: Exception) -> InputError:
    line, reason = getattr(error, "lineno", None), str(error) or "it is nested too deep"  # a MemoryError is empty
    match error:
        case SyntaxError():
            reason = error.msg
        case tokenize.TokenError():
            reason, (line, _) = error.args
        case UnicodeDecodeError():
            line, reason = 1 + error.object.count(b"\n", 0, error.start), f"{error.reason} for {error.encoding}"
        case UnicodeEncodeError():
            line, reason = 1 + error.object.count("\n", 0, error.start), error.reason
    return InputError(f"{path}{f':{line}' if line else ''} is not Python source: {reason}")


def read_source(path: Path) -> list[Sentence]:
    """A file of the user's, to be tagged: no labels, so that it need not be complete, only tokenise."""
    source = read_python(path)
    try:
        file = SourceFile(source)
    except (SyntaxError, tokenize.TokenError) as error:
        raise not_python(path, error) from error
    if not len(file):
        raise InputError(f"{path} is empty")
    return [cut(file, start, stop) for start, stop in sentence_bounds(file)]


def library_paths(draw: random.Random) -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts))
    if not paths:
        raise InputError(f"this Python has no source of its standard library in {root}")
    draw.shuffle(paths)
    return paths


def standard_library(seed: int, max_files: int, on_file: Callable[[], None] = lambda: None) -> list[list[Sentence]]:
    """Labelled sentences of up to `max_files` files, the same ones for the same seed."""
    draw = random.Random(seed)
    files = []
    for path in library_paths(draw):
        if len(files) == max_files:
            break
        try:
            sentences = label_source(read_python(path), room=lambda: draw.randint(MIN_TOKENS, MAX_TOKENS))
        except (InputError, SyntaxError):
            continue
        if sentences:
            files.append(sentences)
            on_file()
    return files
