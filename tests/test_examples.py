"""The main job: labels made from Python source, CoNLL files, scores, and whole runs of examples/label_python.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import label_python  # noqa: E402  (the examples are scripts, found next to each other)
import training  # noqa: E402
from conll import detect_scheme, read_conll  # noqa: E402
from python_corpus import HIDDEN, KINDS, LABELS, MAX_TOKENS, label_source, standard_library  # noqa: E402
from sentences import Sentence, Span, entities, joined, outside_in, scores_by_label, token_accuracy  # noqa: E402
from tagger import Labels, Tagger, batches, encode  # noqa: E402
from training import LOSS_TOLERANCE, compare, largest_loss_difference, same_spans  # noqa: E402

SOURCE = '''"""Doc."""
import os.path as p, sys
from .ä.b import c as d
@functools.cache
class Größe(base.Class, metaclass=M):
    π = "ß" + str("é").x.y
    async def f(self, a: int = 1, *ärgs) -> str:
        "Doc."
        if not self.größe.b: raise errors.Bad(f"{a.b(c)}")
        try: self.é, z = g(x)[0].h(k=[i for i in j])
        except (A, b.B) as e: pass
        with open(q) as r: return lambda u: u
'''
ROLES_OF_SOURCE = '''
docstring:"""Doc.""" module:os.path alias:p module:sys module:.ä.b import:c alias:d decorator:functools.cache
class:Größe base:base.Class keyword:metaclass variable:π callee:str attribute:x.y
function:f parameter:self parameter:a parameter:ärgs docstring:"Doc." attribute:self.größe.b exception:errors.Bad
field:self.é variable:z callee:g callee:h keyword:k variable:i exception:A exception:b.B alias:e
callee:open alias:r parameter:u
'''
SOME_SPANS_OF_SOURCE = """
condition:notself.größe.b call:g(x)[0].h(k=[iforiinj]) subscript:g(x)[0] argument:[iforiinj]
comprehension:[iforiinj] annotation:int operation:"ß"+str("é").x.y collection:self.é,z lambda:lambdau:u field:self.é
"""


def texts(sentence, spans):
    return [f"{label}:{''.join(sentence.tokens[start:stop])}" for start, stop, label in spans]


def test_labels_of_source():
    found = []
    for sentence in label_source(SOURCE):
        found += texts(sentence, entities(sentence.tags, LABELS, "BIO"))
    assert sorted(found) == sorted(ROLES_OF_SOURCE.split())


def test_spans_of_source():
    found = [text for sentence in label_source(SOURCE) for text in texts(sentence, sentence.spans)]
    assert set(SOME_SPANS_OF_SOURCE.split()) | set(ROLES_OF_SOURCE.split()) <= set(found)


def test_bodies_of_source():
    (sentence,) = label_source("class A:\n  @d\n  def f(a): return a\n")
    bodies = [span for span in sentence.spans if span.label.endswith("body")]
    assert texts(sentence, bodies) == ["class body:@d\ndeff(a):returna", "function body:returna"]


def test_give_aways_are_hidden():
    (sentence,) = label_source("def f(a=1): return a.b")
    assert sentence.words == [
        HIDDEN,
        "f",
        "(",
        "a",
        HIDDEN,
        "<number>",
        ")",
        ":",
        HIDDEN,
        "a",
        HIDDEN,
        "b",
        "<newline>",
    ]


def test_long_statements_are_cut():
    sentences = label_source(f"x = [{', '.join(['a.b'] * 100)}]\ny = 1\n")
    assert [len(sentence.tokens) for sentence in sentences] == [128, 128, 128, 24]
    assert all(len(sentence.tags) == len(sentence.tokens) == len(sentence.lines) for sentence in sentences)


def test_standard_library():
    files = standard_library(seed=3, max_files=8)
    assert files == standard_library(seed=3, max_files=8) != standard_library(seed=4, max_files=8)
    sentences = [sentence for file in files for sentence in file]
    for sentence in sentences:
        assert 0 < len(sentence.tokens) <= MAX_TOKENS
        assert_nested(sentence.spans)


def assert_nested(spans):
    open_ends = []
    for start, stop, _ in sorted(spans, key=lambda span: (span.start, -span.stop)):
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        assert not open_ends or stop <= open_ends[-1]
        open_ends.append(stop)


def test_scores():
    labels = ["O", "B-X", "I-X", "B-Y", "I-Y"]
    gold = ["B-X", "I-X", "O", "B-Y", "B-X"]
    predicted = ["B-X", "I-X", "O", "B-X", "I-X"]
    gold_entities = entities(gold, labels, "BIO")
    assert gold_entities == [Span(0, 2, "X"), Span(3, 4, "Y"), Span(4, 5, "X")]
    scores = scores_by_label([gold_entities], [entities(predicted, labels, "BIO")])
    assert scores[None] == (1 / 2, 1 / 3, 2 / 5, 3)
    assert scores["X"] == (1 / 2, 1 / 2, 1 / 2, 2)
    assert scores["Y"] == (0, 0, 0, 1)
    assert token_accuracy([gold], [predicted]) == 3 / 5


def test_joined():
    assert joined(["not", "self", ".", "x_1", "in", "(", "a", ",", '"b c"', ")", "\n"]) == 'not self.x_1 in(a,"b c")'


def test_outside_in():
    crossing_last = [(0, 9), (1, 4), (1, 2), (2, 4), (5, 9), (6, 7), (8, 12)]
    depths = [0, 1, 2, 2, 1, 2, 0]
    assert outside_in(reversed(crossing_last)) == list(zip(crossing_last, depths, strict=True))


@pytest.mark.parametrize(
    ("scheme", "tags", "spans"),
    [
        ("BIO", "B-X I-X B-X O B-Y", [(0, 2, "X"), (2, 3, "X"), (4, 5, "Y")]),
        ("IOB1", "I-X I-X B-X O I-Y", [(0, 2, "X"), (2, 3, "X"), (4, 5, "Y")]),
        ("BIOES", "B-X I-X E-X O S-Y", [(0, 3, "X"), (4, 5, "Y")]),
        ("BIOES", "B-X I-X L-X O U-Y", [(0, 3, "X"), (4, 5, "Y")]),
        ("BMES", "B M E S", [(0, 3, ""), (3, 4, "")]),
        ("BMESO", "B-X M-X E-X O S-Y", [(0, 3, "X"), (4, 5, "Y")]),
    ],
)
def test_schemes(scheme, tags, spans):
    tags = tags.split()
    assert detect_scheme({Path("a"): [Sentence(tags, tags, list(range(len(tags))), tags)]}) == scheme
    assert entities(tags, sorted(set(tags)), scheme) == spans


def test_conll_columns(tmp_path):
    path = write(tmp_path / "a", "\ufeff-DOCSTART- O\n\nA NN B-X\n\u3000\tNN\tO \r\n\n\n\nB NN O")
    first, second = read_conll(path)
    assert (first.tokens, first.tags, first.lines) == (["A", "\u3000"], ["B-X", "O"], [3, 4])
    assert (second.tokens, second.tags, second.lines) == (["B"], ["O"], [8])


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


GOOD = "A B-X\nB I-X\n\nC O\n"
ILLEGAL = "the tags are of no known scheme: "


@pytest.mark.parametrize(
    ("train", "test", "sentence"),
    [
        ("", GOOD, "{train} is empty"),
        ("\n \n", GOOD, "{train} is empty"),
        ("A B-X\nB\n", GOOD, "{train}:2: the line has a token and no tag: 'B'"),
        (GOOD, b"A O\n\xff O\n", "{test}:2: the line is not UTF-8 text: invalid start byte"),
        (GOOD, None, "cannot read {test}: No such file or directory"),
        (GOOD, "A B-X\n\nB I-Y\n", "{test}:3: the tag I-Y does not occur in the training file"),
        ("A O\nB VERB\n", "A O\n", "{train}:2: the tags are of no known scheme (BIO, IOB1, BIOES, BMES, BMESO): VERB"),
        (
            "A I-X\n\nA M-X\n",
            "A I-X\n",
            "{train}:3: the tags are of no known scheme (BIO, IOB1, BIOES, BMES, BMESO): M-X",
        ),
        ("A B-X\n\nB O O\n", GOOD, "{train}:3: the number of columns is 3, in line 1 2"),
        (b"A B-X\n\0 O\n", GOOD, "{train}:2: the line has a zero byte, so this is no UTF-8 text"),
        ("# id 7\tdomain=x\n\n# text = x\n", GOOD, "{train} is empty"),
        (
            GOOD,
            "A O\nB " + 99 * "B" + "\n",
            "{test}:2: the tag " + 57 * "B" + "... does not occur in the training file",
        ),
        ("A O\n\n" + 4097 * "A O\n", GOOD, "{train}:3: 4097 tokens without the blank line that ends a sentence"),
        (
            "A B-X\nB I-Y\nC B-Y\n",
            "A B-X\n",
            "{train}:2: {illegal}I-Y after B-X is illegal in BIO, which fits best",
        ),
        (
            GOOD + "D B-Y\nE E-Y\n\nF B-Y\n",
            GOOD,
            "{train}:2: {illegal}a sentence that ends with I-X is illegal in BIOES, which fits best",
        ),
        (GOOD, "A O\nB I-X\n", "{test}:2: {illegal}I-X after O is illegal in BIO, which fits best"),
        ("A O\n", "A O\n", "{train} has no entity to learn: every tag is O"),
    ],
)
def test_bad_training_files(tmp_path, capsys, train, test, sentence):
    paths = {name: tmp_path / name for name in ("train", "test")}
    for path, content in zip(paths.values(), (train, test), strict=True):
        if content is not None:
            write(path, content)
    arguments = ["--train", str(paths["train"]), "--test", str(paths["test"]), "--output", str(tmp_path / "out")]
    assert label_python.main(arguments) == 2
    assert capsys.readouterr().err == f"label_python: {sentence.format(**paths, illegal=ILLEGAL)}\n"
    assert not (tmp_path / "out").exists()


ADVICE = "train first, or name one with --checkpoint"


def test_bad_arguments(tmp_path, capsys):
    foreign = tmp_path / "foreign.pt"
    torch.save({"format": "another"}, foreign)
    own = tmp_path / "file"
    write(own, "x")
    for arguments, sentence in (
        (["--train", "a"], "--train and --test go together: give both, or neither for the standard library"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--predict", "a", "--output", "b"], "there is no checkpoint b/checkpoint.pt: " + ADVICE),
        (["--predict", "a", "--checkpoint", str(own)], f"{own} is not a checkpoint of this script"),
        (["--predict", "a", "--checkpoint", str(foreign)], f"{foreign} is not a checkpoint of this script"),
    ):
        assert label_python.main(arguments) == 2
        assert capsys.readouterr().err == f"label_python: {sentence}\n"


@pytest.mark.parametrize("spoilt", ["nothing", "crf.transitions", "spans.bias_dense.weight"])
def test_a_wrong_gradient_is_noticed(spoilt):
    sentences = [sentence for file in standard_library(seed=0, max_files=4) for sentence in file]
    labels = Labels(LABELS, "BIO", KINDS)

    def make_tagger(plain):
        torch.manual_seed(0)
        tagger = Tagger(labels, plain=plain)
        if not plain and spoilt != "nothing":
            tagger.get_parameter(spoilt).requires_grad_(False)
        return tagger

    first_batches = batches(encode(sentences, labels), batch_size=8, steps=6, seed=0)
    compiled, plain = compare(make_tagger, 100, first_batches, on_step=lambda: None)
    if spoilt == "nothing":
        assert largest_loss_difference(compiled, plain) < LOSS_TOLERANCE / 10
        assert same_spans(compiled, plain) > 0.99
        assert compiled.peak_bytes < plain.peak_bytes / 10
    else:
        assert largest_loss_difference(compiled, plain) > LOSS_TOLERANCE


def test_long_sentences_are_compared_few_at_a_time(monkeypatch):
    def sentence(length):
        return Sentence(["a"] * length, ["a"] * length, [1] * length, ["O"] * length, [Span(0, length, "x")])

    def make_tagger(plain):
        torch.manual_seed(0)
        return Tagger(labels, plain=plain)

    labels = Labels(["O"], "BIO", ["x"])
    (batch,) = batches(encode([sentence(20), sentence(10)], labels), batch_size=2, steps=1, seed=0)
    for scores, sentences in ((10, 1), (799, 1), (800, 2)):
        monkeypatch.setattr(training, "MOST_SCORES", scores)
        compiled, plain = compare(make_tagger, 10, [batch], on_step=lambda: None)
        assert len(compiled.paths[0]) == batch.mask[:sentences].sum()
        assert largest_loss_difference(compiled, plain) < LOSS_TOLERANCE


def test_python_run(tmp_path, capsys):
    """As a user runs it, in processes of their own, so that nothing but the checkpoint goes from one to the other."""

    def run(*arguments):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, EXAMPLES / "label_python.py", "--output", tmp_path, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")

    trained = run("--quick", "--steps", "8")
    assert trained.returncode == 0, trained.stderr
    for part in ("token accuracy", "callee", "comprehension", "span backward", "the losses differ by at most"):
        assert part in trained.stdout
    assert (tmp_path / "label_python.png").read_bytes().startswith(b"\x89PNG")

    tagged = run("--predict", write(tmp_path / "a.py", SOURCE))
    assert tagged.returncode == 0, tagged.stderr
    assert tagged.stdout.startswith("  line  role by CRF  spans by GlobalPointer")

    path = tmp_path / "bad.py"
    for content, problem in (
        ("", " is empty"),
        ("if x:\n    y\n  z\n", ":3 is not Python"),
        (b"\xff", " is not Python"),
        (b"# coding: hex", " is not Python"),
        (b"# coding: raw_unicode_escape\n'\\ud83d'", ":2 is not Python source: surrogates not allowed"),
    ):
        assert label_python.main(["--predict", str(write(path, content)), "--output", str(tmp_path)]) == 2
        sentence = capsys.readouterr().err
        assert sentence.startswith(f"label_python: {path}{problem}")
        assert sentence.count("\n") == 1


def test_conll_run(tmp_path, capsys):
    names = ["Ada", "Grace", "Alan", "Kurt", "Emmy"]
    sentences = [f"{a} B-PER\n{b} I-PER\nmet O\n{c} B-PER\n. O\n" for a in names for b in names for c in names]
    train = write(tmp_path / "train", "\n".join(sentences[:100]))
    test = write(tmp_path / "test", "\n".join(sentences[100:]))
    output = ["--output", str(tmp_path)]
    assert label_python.main(["--train", str(train), "--test", str(test), "--steps", "30", *output]) == 0
    printed = capsys.readouterr().out
    assert "3 tags, scheme BIO, span types: PER" in printed
    assert "token accuracy 1.0000" in printed

    path = write(tmp_path / "a", "Kurt\nAda\nmet\nAlan\n\nEmmy\n")
    assert label_python.main(["--predict", str(path), *output]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Kurt\tB-PER\tPER:2\nAda\tI-PER\t_\nmet\tO\t_\nAlan\tB-PER\tPER:1\n\nEmmy\t")


def test_unequal_losses_fail(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(label_python, "LOSS_TOLERANCE", -1.0)
    path = write(tmp_path / "a", GOOD)
    arguments = ["--train", str(path), "--test", str(path), "--steps", "2", "--output", str(tmp_path)]
    assert label_python.main(arguments) == 1
    assert "do not train alike" in capsys.readouterr().err
