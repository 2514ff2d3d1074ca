"""examples/extract_relations.py: triples made from Python source, JSON lines, and whole runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import extract_relations  # noqa: E402  (the examples are scripts, found next to each other)
import relation_model  # noqa: E402
from relation_corpus import MAX_TOKENS, RELATIONS, Finder, library_texts, source_texts, without_comments  # noqa: E402
from relation_model import Extractor, batches, encode  # noqa: E402
from relation_texts import Triple, make_text  # noqa: E402

SOURCE = '''"""Doc."""
from .ä.b import c as d, e
from x import *
@g.decorate(unasked())
class Größe(base.Class, metaclass=M):
    π = "ß" + str("é").x.y
    async def f(self, a=default()) -> dict[str, int]:  # comment()
        "Doc."
        def inner():
            h(u)(v)
        return [lambda: π.len(a), g().i.j(k)]
    @property
    def def_(self): ...
'''
TRIPLES_OF_SOURCE = """
.ä.b imports c; .ä.b imports e; Größe inherits base.Class; Größe defines f; Größe defines def_;
f returns dict[str, int]; f calls π.len; f calls g; f calls i.j; inner calls h
"""


def strings(text):
    return [f"{text.string(t.subject)} {t.relation} {text.string(t.object)}" for t in text.triples]


def test_triples_of_source():
    code = without_comments(SOURCE)
    assert "Doc" not in code and "comment" not in code
    found = [
        f"{code[slice(*subject)]} {relation} {code[slice(*object_)]}"
        for subject, relation, object_ in Finder(code).triples
    ]
    assert sorted(found) == sorted(part.strip() for part in TRIPLES_OF_SOURCE.split(";"))


def test_pieces_of_source():
    method = "    def f(self):\n        return g(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)\n"
    table = f"X = {list(range(MAX_TOKENS))}\n"
    texts = source_texts("class A:\n" + 20 * method + table + "def h():\n    f()\n", "here")
    assert all(len(text.words) <= MAX_TOKENS for text in texts)
    found = [triple for text in texts for triple in strings(text)]
    assert found.count("f calls g") == 20
    assert found[-1] == "h calls f"
    assert "A defines f" in found
    assert not any("X" in text.words for text in texts)


def test_standard_library():
    files = library_texts(seed=3, max_files=8)
    texts = [text for file in files for text in file]
    assert [text.text for text in texts] == [text.text for file in library_texts(seed=3, max_files=8) for text in file]
    for text in texts:
        assert 0 < len(text.words) <= MAX_TOKENS
        assert {triple.relation for triple in text.triples} <= set(RELATIONS)
    assert files[0][0].text != library_texts(seed=4, max_files=1)[0][0].text


@pytest.mark.parametrize(
    ("text", "part", "words"),
    [
        ("a cat, a cat", "cat", ["cat"]),
        ("concat a cat", "cat", ["cat"]),  # whole words come first
        ("two cats sat", "cat", ["cats"]),  # and then the words around
        ("two cats sat", " cats sat ", ["cats", "sat"]),
        ("two cats sat", [5, 10], ["cats", "sat"]),
        ("a.b\n    c", "a.b", ["a", ".", "b"]),
        ("张三生于北京", "北京", ["北", "京"]),
        ("张三born1", [0, 2], ["张", "三"]),
    ],
)
def test_where_a_subject_is(text, part, words):
    made = make_text(text, [[part, "is", part]], "here")
    first, last = made.triples[0].subject
    assert made.words[first : last + 1] == words
    assert made.triples == [Triple((first, last), "is", (first, last))]
    assert made.string((first, last)) == "".join(text[slice(made.offsets[first][0], made.offsets[last][1])])


def test_words_cover_the_text():
    text = "  def f(x_1):\n\n\treturn 'é'+x²"
    made = make_text(text, [], "here")
    assert made.words == ["  ", "def", "f", "(", "x_1", ")", ":", "\n\n\t", "return", "'", "é", "'", "+", "x²"]
    assert [text[start:end] for start, end in made.offsets] == made.words


def test_labels_of_a_batch():
    texts = [
        make_text("a b c", [["a b", "r", "c"]], ""),
        make_text("d", [], ""),
        make_text("e f", [["f", "s", "e f"]], ""),
    ]
    (batch,) = batches(encode(texts, ["r", "s"])[::-1], batch_size=3, steps=1, seed=0)
    order = [int(count) for count in batch.mask.sum(1)]
    first, third = order.index(3), order.index(2)
    rows = {name: sorted(getattr(batch, name).tolist()) for name in ("entities", "heads", "tails")}
    assert rows["entities"] == sorted([[first, 0, 0, 1], [first, 1, 2, 2], [third, 0, 1, 1], [third, 1, 0, 1]])
    assert rows["heads"] == sorted([[first, 0, 0, 2], [third, 1, 1, 0]])
    assert rows["tails"] == sorted([[first, 0, 1, 2], [third, 1, 1, 1]])


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def line(text="Ada met Bob", triples=(("Ada", "met", "Bob"),)):
    return json.dumps({"text": text, "triples": triples}) + "\n"


GOOD = line()


@pytest.mark.parametrize(
    ("train", "test", "sentence"),
    [
        ("", GOOD, "{train} is empty"),
        ("\n \n", GOOD, "{train} is empty"),
        (GOOD, None, "cannot read {test}: No such file or directory"),
        (GOOD, GOOD.encode() + b"\xff", "{test}:2: the line is not UTF-8 text: invalid start byte"),
        (GOOD + "\n{", GOOD, "{train}:3: the line is not JSON: Expecting property name enclosed in double quotes"),
        (GOOD, "[1]\n", "{test}:1: the line is no JSON object: [1]"),
        ('{"triples": []}', GOOD, '{train}:1: the line has no "text"'),
        ('{"text": "a"}', GOOD, '{train}:1: the line has no "triples"'),
        ('{"text": 1, "triples": []}', GOOD, '{train}:1: "text" must be a string, got 1'),
        ("[" * 10**5, GOOD, "{train}:1: the line is not JSON: "),
        (
            line(triples=[["Ada", "\ud83d", "Bob"]]),
            GOOD,
            '{train}:1: the predicate "\\ud83d" has half of a',
        ),
        (line(triples=[["\ud83d", "met", "Bob"]]), GOOD, '{train}:1: the subject "\\ud83d" is not in the text'),
        (line(triples=[["Ada", " ", "Bob"]]), GOOD, '{train}:1: a predicate is a string, got " "'),
        (
            GOOD,
            line(triples=[["Ada", "a\n[/b]\x1b", "Bob"]]),
            '{test}:1: the predicate "a\\n[/b]\\u001b" does not',
        ),
        (line("\ud800", []), GOOD, '{train}:1: "text" has half of a surrogate pair, which is no character'),
        (line(" ", []), GOOD, "{train}:1: the text is empty"),
        (line(triples={}), GOOD, '{train}:1: "triples" must be a list, got {}'),
        (line(triples=[["a", "b"]]), GOOD, '{train}:1: a triple is [subject, predicate, object], got ["a", "b"]'),
        (line(triples=[["Ada", 1, "Bob"]]), GOOD, "{train}:1: a predicate is a string, got 1"),
        (line(triples=[["Eve", "met", "Bob"]]), GOOD, '{train}:1: the subject "Eve" is not in the text'),
        (GOOD, GOOD + line(triples=[["Ada", "met", "Eve"]]), '{test}:2: the object "Eve" is not in the text'),
        (line(triples=[["", "met", "Bob"]]), GOOD, '{train}:1: the subject must be a string or [start, end], got ""'),
        (line(triples=[[[0], "met", "Bob"]]), GOOD, "{train}:1: the subject must be a string or [start, end], got [0]"),
        (
            line(triples=[[[0, 3], "met", [8, 12]]]),
            GOOD,
            "{train}:1: the object [8, 12] is no part of a text of 11 characters",
        ),
        (line(triples=[[[3, 4], "met", "Bob"]]), GOOD, "{train}:1: the subject is blank"),
        (line(triples=[]), GOOD, "{train} has no triples to learn from"),
        (
            GOOD,
            line(triples=[["Ada", "saw", "Bob"]]),
            '{test}:1: the predicate "saw" does not occur in the training file',
        ),
    ],
)
def test_bad_training_files(tmp_path, capsys, train, test, sentence):
    paths = {name: tmp_path / name for name in ("train", "test")}
    for path, content in zip(paths.values(), (train, test), strict=True):
        if content is not None:
            write(path, content)
    arguments = ["--train", str(paths["train"]), "--test", str(paths["test"]), "--output", str(tmp_path / "out")]
    assert extract_relations.main(arguments) == 2
    for name, path in paths.items():
        sentence = sentence.replace(f"{{{name}}}", str(path))
    printed = capsys.readouterr().err
    assert printed.startswith(f"extract_relations: {sentence}")
    assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_arguments(tmp_path, capsys):
    other = tmp_path / "checkpoint.pt"
    torch.save({"format": "fastnlp_ops example tagger 3"}, other)
    source = write(tmp_path / "bad.py", "x = (")
    for arguments, sentence in (
        (["--test", "a"], "--train and --test go together: give both, or neither for the standard library"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (
            ["--predict", str(source), "--output", "b"],
            "there is no checkpoint b/relations.pt: train first, or name one",
        ),
        (["--predict", str(source), "--checkpoint", str(other)], f"{other} is not a checkpoint of this script"),
    ):
        assert extract_relations.main(arguments) == 2
        assert capsys.readouterr().err.startswith(f"extract_relations: {sentence}")


def test_python_run(tmp_path, capsys):
    """As a user runs it, in processes of their own, so that nothing but the checkpoint goes from one to the other."""

    def run(*arguments):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, EXAMPLES / "extract_relations.py", "--output", tmp_path, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")

    trained = run("--quick", "--steps", "8")
    assert trained.returncode == 0, trained.stderr
    for part in ("test texts", "Triples of held-out texts", "calls", "inherits"):
        assert part in trained.stdout
    assert (tmp_path / "extract_relations.png").read_bytes().startswith(b"\x89PNG")

    found = run("--predict", write(tmp_path / "a.py", SOURCE))
    assert found.returncode == 0, found.stderr

    path = tmp_path / "bad.py"
    for content, problem in (
        ("", " is empty"),
        ("# no code\n", " is empty"),
        ("\nx = (", ":2 is not Python source: "),
        (b"x\n\xff", ":2 is not Python source: invalid"),
        ("x = 1\0", " is not Python source: "),
        ("x = " + 10**5 * "-" + "1", " is not Python source: it is nested too deep\n"),
    ):
        assert extract_relations.main(["--predict", str(write(path, content)), "--output", str(tmp_path)]) == 2
        sentence = capsys.readouterr().err
        assert sentence.startswith(f"extract_relations: {path}{problem}")
        assert sentence.count("\n") == 1


def test_json_run(tmp_path, capsys):
    """Texts in which the order tells who did what to whom; one is a relation of a name to a part of itself."""
    names = ["Ada", "Grace Hopper", "Alan", "Kurt", "Emmy Noether"]
    texts = []
    for a in names:
        for b in names:
            for verb in ("met", "taught"):
                if a != b:
                    texts.append(line(f"{a} {verb} {b} .", [[a, verb, b]]))
                    texts.append(line(f"{a} was {verb} by {b} .", [[b, verb, a]]))
    train, test = write(tmp_path / "train", "".join(texts[::2] + texts[1:50:2])), write(tmp_path / "test", texts[-1])
    output = ["--output", str(tmp_path)]
    assert extract_relations.main(["--train", str(train), "--test", str(test), "--steps", "60", *output]) == 0
    assert "relations: met, taught" in capsys.readouterr().out

    path = write(tmp_path / "a", '{"text": "Kurt was taught by Grace Hopper ."}\n{"text": "Alan met Emmy Noether ."}\n')
    assert extract_relations.main(["--predict", str(path), *output]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["triples"] == [["Grace Hopper", "taught", "Kurt"]]
    assert second == {"text": "Alan met Emmy Noether .", "triples": [["Alan", "met", "Emmy Noether"]]}


def test_prediction_is_that_of_dense_scores(monkeypatch):
    """Between the best spans, as many as words, decoding finds the triples that a look at all scores finds."""
    monkeypatch.setattr(relation_model, "MOST_TRIPLES", 100)
    torch.manual_seed(5)
    extractor = Extractor(["r", "s"])
    torch.nn.init.normal_(extractor.encoder.embedding.weight)  # words that say much, so that there are triples
    texts = [make_text(text, [], "") for text in ("a b c d", "c d e f g h")]
    for text, triples in zip(texts, extractor.predict(texts)[0], strict=True):
        (example,) = encode([text], ["r", "s"])
        features, mask = example.features[None], torch.ones(1, len(text.words), dtype=torch.bool)
        hidden = extractor.encoder(features, mask)
        spans, _ = extractor.entities.decode(hidden, mask, top_k=len(texts[1].words))
        subjects, objects = ([(first, last) for _, kind, first, last in spans.tolist() if kind == k] for k in (0, 1))
        heads, tails = (layer(hidden, mask)[0] > 0 for layer in (extractor.heads, extractor.tails))
        expected = [
            Triple((a, b), relation, (c, d))
            for a, b in subjects
            for c, d in objects
            for r, relation in enumerate(extractor.relations)
            if heads[r, a, c] and tails[r, b, d]
        ]
        assert expected
        assert sorted(triples) == sorted(expected)
