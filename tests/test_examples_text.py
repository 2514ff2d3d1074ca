"""The examples with any text that people have in files and names: columns, screens, pictures; and how they end."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import compare_optimizers  # noqa: E402  (the examples are scripts, found next to each other)
import decode_stream  # noqa: E402
import extract_relations  # noqa: E402
import label_python  # noqa: E402
import relation_model  # noqa: E402
import tagger  # noqa: E402
from conll import read_conll  # noqa: E402
from encoder import MOST_PAIRS, TOGETHER, consecutive  # noqa: E402
from files import check_writable, write_bytes  # noqa: E402
from fonts import without_glyph  # noqa: E402
from matplotlib import font_manager, rcParams  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from picture import MOST_LABELS, save_loss_and_scores  # noqa: E402
from screen import Screen, score_table  # noqa: E402
from sentences import InputError, Score, name_of  # noqa: E402
from tagger import best  # noqa: E402

SCRIPTS = (label_python, extract_relations, decode_stream, compare_optimizers)
FORMATS = (tagger.CHECKPOINT_FORMAT, relation_model.CHECKPOINT_FORMAT, "another")  # and nothing else in the file
HOSTILE = (
    *(
        "[/x]",
        "A[drug]",
        "[bold]",
        ":smile:",
        "$x$_^\\frac{",
        "$",
        "$^{$",
        "_hidden",
        "人名",
        "имя",
        "name of two words",
        "all",
    ),
    *("\x1b[31mred", "a\x85b", "\u202eback", "%s {0}", "x" * 5000, "3.5", "None", ""),
)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("New York\tB-LOC\n06 12 34\tB-TEL\n", [["New York/B-LOC", "06 12 34/B-TEL"]]),
        ("A\t NN \tB-X \nB \t\tNN\tO\t\n", [["A/B-X", "B/O"]]),
        (" \tO\n\xa0 O\n\u3000\tO\n\u2028 O\n", [[" /O", "\xa0/O", "\u3000/O", "\u2028/O"]]),
        ("1\tSchartau\tB-PER\tO\n2\tsagte\tO\tO\n\n1\tJa\tO\tO\n", [["Schartau/O", "sagte/O"], ["Ja/O"]]),
        ("0 A X O\n1 B X O\n\n2 C X O\n3 D X O\n", [["A/O", "B/O"], ["C/O", "D/O"]]),
        ("1 1 A O\n2 2 B O\n\n3 1 C O\n", [["A/O", "B/O"], ["C/O"]]),
        ("# text = dans l'an\n1\tdans\tO\n2-3\tdu\tO\n2\tde\tO\n3\tle\tO\n3.1\t_\tO\n", [["dans/O", "de/O", "le/O"]]),
        ("2 A O\n3 B O\n", [["2/O", "3/O"]]),  # does not begin at 1
        ("1 CD O\n1 CD O\n", [["1/O", "1/O"]]),  # does not count
        ("1 O\n2 O\n", [["1/O", "2/O"]]),  # no column but this one can be the token
        ("# id 7\tdomain=train\nking\tB-PER\n", [["king/B-PER"]]),
        ("#\tO\n", [["#/O"]]),
        ("# O\n", [["#/O"]]),
        ("A O\n# O\n#nlp B-X\n# a comment\n#begin document (x);\n", [["A/O", "#/O", "#nlp/B-X"]]),
        ("# # B-NP\nA NN O\n", [["#/B-NP", "A/O"]]),
        ("# text = I\n1\tA\tX\tO\n", [["A/O"]]),  # as many columns, but other lines have tabs
        ("#\thttp://a.b/c\t[2009-10-17]\n1\tA\tB-PER\tO\n", [["A/O"]]),
        ("-DOCSTART- -X- O\nA NN O\n-DOCSTART- -X- O\nB NN O\n-DOCSTART-\n", [["A/O"], ["B/O"]]),
        ("\ufeffA O\r\n\r\n\ufeffB O  \r\n\t\r\nC\tO\t\r\n", [["A/O"], ["B/O"], ["C/O"]]),
        ("A O\r\r\nB O\r\r\n\r\r\nC O", [["A/O", "B/O"], ["C/O"]]),
    ],
)
def test_columns(tmp_path, content, expected):
    sentences = read_conll(write(tmp_path / "a", content))
    read = [[f"{token}/{tag}" for token, tag in zip(s.tokens, s.tags, strict=True)] for s in sentences]
    assert read == expected


@pytest.mark.parametrize(
    ("content", "tokens"),
    [
        ("1\n2\n", ["1", "2"]),
        ("1 A\n2 B\n", ["A", "B"]),
        ("1 O\n2 B-X\n", ["1", "2"]),  # tagged
        ("1-2\tdu\n1\tde\n2\tle\n", ["de", "le"]),
        ("#\n# a comment\n#nlp\n", ["#", "#nlp"]),
        ("New York\t\nBonn\t\n", ["New York", "Bonn"]),
        ("A NN\n# NN\n# a\n", ["A", "#"]),
    ],
)
def test_columns_without_tags(tmp_path, content, tokens):
    (sentence,) = read_conll(write(tmp_path / "a", content), tagged=False)
    assert (sentence.tokens, sentence.tags) == (tokens, [])


def test_number_of_columns(tmp_path):
    path = write(tmp_path / "a", "\nNew York\nBonn\n")
    with pytest.raises(InputError, match=r"a:3: the number of columns is 1, in line 2 2$"):
        read_conll(path, tagged=False)


def scored(labels):
    return {label: Score(1.0, 0.5, 0.75, 3) for label in (None, *labels)}


def test_screen_shows_text_as_it_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    screen = Screen()
    for text in HOSTILE:
        screen.print(f"<{text}>", style="red")
    screen.print(score_table("[/title]", {"[/head]": scored(HOSTILE)}))
    printed = capsys.readouterr().out
    lines = [line.strip() for line in printed.split("\n")]
    for text in HOSTILE:
        escaped = text.replace("\x1b", "\\x1b").replace("\x85", "\\x85").replace("\u202e", "\\u202e")
        assert f"<{escaped}>" in lines
        assert any(line.startswith(f"{name_of(text)}  ") for line in lines), text
    assert "[/title]" in printed
    assert "[/head]" in printed
    assert not set(printed) & {"\x1b", "\x85", "\u202e"}


def test_type_names_are_not_cut(capsys, monkeypatch):
    """On a narrow terminal, beside the scores of both heads."""
    monkeypatch.setenv("COLUMNS", "80")
    Screen().print(score_table("", {"CRF": scored(["organisation_of_the_state"]), "GlobalPointer": scored([])}))
    printed = capsys.readouterr().out
    assert "".join(line[:14].strip() for line in printed.splitlines()).endswith("organisation_of_the_state")
    assert max(map(len, printed.splitlines())) <= 80


def picture(tmp_path, labels):
    """What the picture of scores says that it could not draw; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        remark = save_loss_and_scores(tmp_path / "a.png", [3.0, 0.2, 1e-3], scored(labels))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    return remark


@pytest.fixture
def no_fonts(monkeypatch):
    """As on a machine with matplotlib's own fonts alone."""
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    with matplotlib.rc_context():
        yield


@pytest.mark.usefixtures("no_fonts")
def test_picture_of_any_name(tmp_path, monkeypatch):
    drawn = []
    set_ticks = Axes.set_yticks
    monkeypatch.setattr(Axes, "set_yticks", lambda *given: drawn.extend(given[2]) or set_ticks(*given))
    remark = picture(tmp_path, HOSTILE)
    assert remark.startswith("no installed font has all characters of 人名: the picture has squares")
    assert drawn == [name_of(label, 40).replace("人名", "□□") for label in (None, *HOSTILE)]
    assert picture(tmp_path, [str(i) for i in range(200)]) == ""
    assert len(drawn) == 1 + len(HOSTILE) + 1 + MOST_LABELS


@pytest.mark.usefixtures("no_fonts")
def test_picture_with_an_installed_font(tmp_path, monkeypatch):
    """One that came after matplotlib made its list of fonts, between files that are none."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((500, 0), (500, 500), (0, 500)):
        pen.lineTo(point)
    pen.closePath()
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "ren"])
    font.setupCharacterMap({ord("人"): "ren"})
    font.setupGlyf({".notdef": pen.glyph(), "ren": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (600, 0), "ren": (600, 0)})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Ren", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "ren.ttf")
    paths = [str(tmp_path / "missing.ttf"), str(write(tmp_path / "bad.ttf", "x")), str(tmp_path / "ren.ttf")]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: paths)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    assert picture(tmp_path, ["人", "$人"]) == ""
    assert rcParams["font.family"] == ["sans-serif", "Ren"]
    assert without_glyph(["人名"]) == {"名"}


def test_best():
    rows = torch.tensor([[0, 1], [0, 2], [0, 3], [2, 1], [2, 2]])
    scores = torch.tensor([0.1, 0.3, 0.2, 0.4, 0.5])
    for most, kept in (([2, 2, 2], [1, 2, 3, 4]), ([1, 0, 1], [1, 4]), ([9, 9, 0], [0, 1, 2]), ([0, 0, 0], [])):
        assert torch.equal(best(rows, scores, torch.tensor(most)), rows[kept])
    assert best(rows[:0], scores[:0], torch.tensor([1])).shape == (0, 2)


@pytest.mark.parametrize("script", [label_python, extract_relations])
def test_models_that_have_learnt_nothing(tmp_path, capsys, script):
    """They find a quarter of everything: what is printed is no longer than the text, and a sentence has the rest."""
    torch.manual_seed(0)
    labels = tagger.Labels(["O", "B-X", "I-X"], "BIO", ["X", "Y", "Z"])
    model = tagger.Tagger(labels) if script is label_python else relation_model.Extractor(["r", "s"])
    torch.nn.init.normal_(model.encoder.embedding.weight)  # words that say much
    module = tagger if script is label_python else relation_model
    module.save_checkpoint(tmp_path / "a.pt", model, "python")
    source = write(tmp_path / "a.py", "".join(f"name_{i} = function_{i}({i})\n" for i in range(100)))
    assert script.main(["--predict", str(source), "--checkpoint", str(tmp_path / "a.pt")]) == 0
    printed = capsys.readouterr()
    assert 100 < len(printed.out.splitlines()) <= 1 + 2 * 700  # by CRF and by GlobalPointer
    number, rest = printed.err.split(" ", 1)
    assert int(number) > 700
    assert rest.startswith(("more spans score above 0: of each", "more triples score above 0: of each"))
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([3] * (TOGETHER + 1), [TOGETHER, 1]),
        ([int(MOST_PAIRS**0.5)] * 3, [1, 1, 1]),
        ([1, 1, int((MOST_PAIRS / 3) ** 0.5), 1, int(MOST_PAIRS**0.5) + 1, 1], [3, 1, 1, 1]),
    ],
)
def test_long_texts_are_predicted_few_at_a_time(lengths, groups):
    parts = [lengths[part] for part in consecutive(lengths)]
    assert [len(part) for part in parts] == groups
    assert [length for part in parts for length in part] == lengths


def test_nothing_is_half_written(tmp_path):
    path = tmp_path / "new" / "a"
    check_writable(path)
    assert list(path.parent.iterdir()) == []
    write_bytes(path, b"old")
    check_writable(path)
    (path.parent / "a.part").mkdir()  # in the way
    with pytest.raises(InputError, match=r"cannot write .*a: Is a directory"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    link = tmp_path / "link"
    link.symlink_to(write(tmp_path / "b", ""))
    write_bytes(link, b"new")
    assert (tmp_path / "b").read_bytes() == b"new"


@pytest.mark.parametrize("name", ["file/x/a", "folder", "n" * 300, "n" * 252])
def test_what_cannot_be_written_shows_at_once(tmp_path, capsys, name):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "file", "")
    train = write(tmp_path / "train", "A B-X\n")
    arguments = ["--train", str(train), "--test", str(train), "--output", str(tmp_path / "out")]
    assert label_python.main([*arguments, "--checkpoint", str(tmp_path / name)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("label_python: cannot ")
    assert printed.err.count("\n") == 1
    assert "loss of the CRF" not in printed.out  # nothing was trained


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("seed", ["-1", "x", str(1 << 63), "0" * 20 + "9" * 5000])
def test_bad_seed(script, seed, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.main(["--seed", seed])
    assert "argument --seed: must be a number from 0 to 2^63 - 1, got" in capsys.readouterr().err


@pytest.mark.parametrize("script", [label_python, extract_relations])
@pytest.mark.parametrize("path", ["one\nline", "[/b]", "\udcff", "n" * 300, "$x$", "file/a", ":smile:"])
def test_paths_in_messages(tmp_path, capsys, script, path):
    write(tmp_path / "file", "")
    path = str(tmp_path / path)
    shown = path.replace("\n", "\\n").replace("\udcff", "\\udcff")
    name = script.__name__
    assert script.main(["--train", path, "--test", path]) == 2
    assert capsys.readouterr().err.startswith(f"{name}: cannot read {shown}: ")
    assert script.main(["--predict", path, "--checkpoint", path]) == 2
    assert (
        capsys.readouterr().err
        == f"{name}: there is no checkpoint {shown}: train first, or name one with --checkpoint\n"
    )


@pytest.mark.parametrize("content", [*({"format": kind} for kind in FORMATS), {}, 3, torch.zeros(3), "cut"])
@pytest.mark.parametrize("script", [label_python, extract_relations])
def test_foreign_checkpoints(tmp_path, capsys, script, content):
    path = tmp_path / "a.pt"
    torch.save(content, path)
    if content == "cut":
        write(path, path.read_bytes()[:100])
    assert script.main(["--predict", str(path), "--checkpoint", str(path)]) == 2
    assert capsys.readouterr().err == f"{script.__name__}: {path} is not a checkpoint of this script\n"


ENDS = """
import os, sys
import compare_optimizers, decode_stream, extract_relations, label_python

def many_lines(args, screen):
    for _ in range(10**4):
        screen.print("a line")
    return 0

def interrupted(args, screen):
    raise KeyboardInterrupt

jobs = {label_python: "train_and_compare", extract_relations: "train", decode_stream: "train_and_decode",
        compare_optimizers: "train"}
read, written = os.pipe()
os.close(read)
nowhere = os.open(os.devnull, os.O_WRONLY)
for script, job in jobs.items():
    for what, arguments in ((many_lines, []), (None, ["--help"]), (interrupted, [])):
        if what:
            setattr(script, job, what)
        os.dup2(nowhere if what is interrupted else written, 1)
        try:
            print(script.__name__, script.main(arguments), file=sys.stderr)
        except SystemExit as error:  # of --help, where nothing is in its way
            print(script.__name__, error.code, file=sys.stderr)
        os.dup2(nowhere, 1)
        sys.stdout.flush()

def one_line(args, screen):
    print("a line that waits in the buffer")
    return 0

os.dup2(written, 1)
label_python.train_and_compare = one_line
sys.exit(label_python.main([]))
"""


def in_a_process(*arguments, env=None):
    """With a standard output that is buffered, as it is for users."""
    paths = os.pathsep.join([str(EXAMPLES), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": ""} | (env or {})
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True)


def test_ends():
    """A reader that closes the pipe, as head does, and Ctrl-C."""
    done = in_a_process("-c", ENDS)
    names = [script.__name__ for script in SCRIPTS]
    expected = "".join(f"{name} 141\n{name} 141\n\n{name}: interrupted\n{name} 130\n" for name in names)
    assert (done.stderr.decode(), done.returncode) == (expected, 141)


INTERRUPTED = """
import sys, before_torch
sys.argv = ["examples/label_python.py"]
{}
"""


def test_interrupted_while_torch_is_imported():
    done = in_a_process("-c", INTERRUPTED.format("raise KeyboardInterrupt"))
    assert done.returncode in (-signal.SIGINT, 130)  # the second on systems without signals
    assert done.stderr == b"\nlabel_python: interrupted\n"
    done = in_a_process("-c", INTERRUPTED.format("1 / 0"))
    assert done.stderr.startswith(b"Traceback")


NOT_UTF8 = """
import label_python, sys
from sentences import Sentence

def job(args, screen):
    screen.print("span types: 人名")
    label_python.print_columns([Sentence(["ä"], ["ä"], [1])], [["B-人名"]], [[]])
    return 0

label_python.train_and_compare = job
sys.exit(label_python.main([]))
"""


def test_terminals_that_are_not_utf8():
    """A type name that the terminal lacks must not be the end of a run; predictions are UTF-8, as the files are."""
    done = in_a_process("-c", NOT_UTF8, env={"PYTHONIOENCODING": "ascii"})
    assert (done.stderr, done.returncode) == (b"", 0)
    assert done.stdout == b"span types: \\u4eba\\u540d\n" + "ä\tB-人名\t_\n\n".encode()
