"""Tag schemes against an independent encoder: a path is allowed if and only if some set of spans is written so."""

import itertools
import random

import numpy as np
import pytest
import torch

from fastnlp_ops import _host
from fastnlp_ops.tag_schemes import spans_to_tags, tags_to_spans, transition_mask

LABELS = {
    "BIO": ["O", "B-X", "I-X", "B-Y", "I-Y"],
    "IOB2": ["I-Y", "B-Y", "O", "I-X", "B-X"],
    "IOB1": ["O", "B-X", "I-X", "B-Y", "I-Y"],
    "BIOES": ["O", "B-X", "I-X", "E-X", "S-X", "B-Y", "E-Y", "S-Y"],
    "BILOU": ["U-X", "L-X", "I-X", "B-X", "O", "U-Y"],
    "BMES": ["B-X", "M-X", "E-X", "S-X", "S-Y"],
    "BMESO": ["B", "M", "E", "S", "O"],
}
LONGEST = {"BIO": 5, "IOB2": 5, "IOB1": 5, "BIOES": 4, "BILOU": 5, "BMES": 5, "BMESO": 5}


def segmentations(length, types):
    """Every way to lay spans of the types over `length` steps: tuples of (start, end, type)."""
    if length <= 0:
        return [()] if length == 0 else []
    ways = list(segmentations(length - 1, types))
    for width in range(1, length + 1):
        start = length - width
        ways += [(*rest, (start, length - 1, name)) for rest in segmentations(start, types) for name in types]
    return ways


def encode(spans, length, scheme):
    """Labels of a segmentation, from the words of the papers and without the package."""
    labels = ["O"] * length
    ends = {end: name for _, end, name in spans}
    for start, end, name in spans:
        width = end - start + 1
        if scheme in ("BIO", "IOB2"):
            letters = "B" + "I" * (width - 1)
        elif scheme == "IOB1":
            letters = ("B" if ends.get(start - 1) == name else "I") + "I" * (width - 1)
        else:
            one, first, middle, last = {"BIOES": "SBIE", "BILOU": "UBIL"}.get(scheme, "SBME")
            letters = one if width == 1 else first + middle * (width - 2) + last
        labels[start : end + 1] = [f"{letter}-{name}" if name else letter for letter in letters]
    return labels


def type_names(labels):
    return list(dict.fromkeys(label[2:] for label in labels if label != "O"))


def conlleval_spans(tags, labels):
    """conlleval's two predicates, transition by transition, on letters."""
    letters = {"M": "I", "L": "E", "U": "S"}
    split = [(letters.get(label[0], label[0]), label[2:]) for label in labels]
    names = type_names(labels)
    spans, previous, before = [], "O", ""
    for step, tag in enumerate(tags):
        letter, name = split[tag]
        starts = letter in "BS" or previous + letter in ("EE", "EI", "SE", "SI", "OE", "OI")
        starts = starts or (letter != "O" and previous != "O" and before != name)
        if starts and letter != "O":
            spans.append([step, step, names.index(name)])
        elif letter != "O":
            spans[-1][1] = step
        previous, before = letter, name
    return spans


@pytest.mark.parametrize("scheme", LABELS)
def test_allowed_paths_are_the_encodings(scheme):
    labels = LABELS[scheme]
    allowed, starts, ends = transition_mask(labels, scheme)
    assert allowed.dtype == starts.dtype == ends.dtype == torch.bool
    names = type_names(labels)
    for length in range(1, LONGEST[scheme] + 1):
        written = {tuple(encode(spans, length, scheme)) for spans in segmentations(length, names)}
        written = {path for path in written if set(path) <= set(labels)}
        passed = {
            tuple(labels[tag] for tag in path)
            for path in itertools.product(range(len(labels)), repeat=length)
            if starts[path[0]] and ends[path[-1]] and all(allowed[i, j] for i, j in itertools.pairwise(path))
        }
        assert passed == written


@pytest.mark.parametrize("scheme", LABELS)
def test_spans_round_trip(scheme):
    labels = LABELS[scheme]
    names = type_names(labels)
    for length in range(LONGEST[scheme] + 1):
        for spans in segmentations(length, names):
            written = encode(spans, length, scheme)
            ids = [(start, end, names.index(name)) for start, end, name in spans]
            if not set(written) <= set(labels):
                with pytest.raises(ValueError, match="labels have no"):
                    spans_to_tags(ids, length, labels, scheme)
                continue
            tags = spans_to_tags(ids[::-1], length, labels, scheme)
            assert tags.dtype == torch.int64
            assert [labels[tag] for tag in tags] == written
            assert tags_to_spans(tags, labels, scheme).tolist() == [list(span) for span in ids]


@pytest.mark.parametrize("scheme", LABELS)
def test_any_tags_are_read_like_conlleval(scheme):
    labels = LABELS[scheme]
    for length in range(1, 5):
        paths = list(itertools.product(range(len(labels)), repeat=length))
        found = tags_to_spans(torch.tensor(paths), labels, scheme)
        assert [spans.tolist() for spans in found] == [conlleval_spans(path, labels) for path in paths]


def test_skipped_steps():
    labels = LABELS["BIO"]
    tags = torch.tensor([[0, 1, 4, 2, 0], [1, 2, 1, 2, 2]])
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0]])
    for mask_dtype in (torch.bool, torch.uint8, torch.int64, torch.float32):
        first, second = tags_to_spans(tags, labels, mask=mask.to(mask_dtype))
        assert first.tolist() == [[1, 3, 0]]
        assert second.tolist() == []
    # Decoders pad with -1, data with -100: both are skipped where there is no mask.
    assert tags_to_spans([1, -100, 2, -1, 0, -1], labels).tolist() == [[0, 2, 0]]
    assert tags_to_spans(torch.full((3,), 99), labels, mask=torch.zeros(3)).shape == (0, 3)


def test_layouts():
    labels = LABELS["BIOES"]
    rng = random.Random(0)
    tags = torch.tensor([[rng.randrange(len(labels)) for _ in range(6)] for _ in range(4)])
    expected = [spans.tolist() for spans in tags_to_spans(tags, labels, "BIOES")]
    for view in (tags.int(), tags.t().contiguous().t(), tags.to(torch.int16)):
        assert [spans.tolist() for spans in tags_to_spans(view, labels, "BIOES")] == expected
    assert [tags_to_spans(row.tolist(), labels, "BIOES").tolist() for row in tags] == expected
    assert tags_to_spans(tags[:0], labels, "BIOES") == []
    assert [spans.tolist() for spans in tags_to_spans(tags[:, :0], labels, "BIOES")] == [[]] * 4
    for empty in (tags[:0], tags[:, :0], tags[:0, :0]):  # a mask changes nothing
        found = tags_to_spans(empty, labels, "BIOES", torch.ones(empty.shape))
        assert [spans.shape for spans in found] == [(0, 3)] * len(empty)
    assert tags_to_spans(tags[0, :0], labels, "BIOES", torch.ones(0)).shape == (0, 3)
    assert spans_to_tags([], 3, labels, "BIOES").tolist() == [0, 0, 0]
    assert spans_to_tags([], 0, LABELS["BMES"], "BMES").tolist() == []
    assert spans_to_tags(torch.tensor([[0, 1, 0]], dtype=torch.int32), 2, labels, "BIOES").tolist() == [1, 3]


@pytest.mark.parametrize(
    ("labels", "scheme", "sentence"),
    [
        ([], "BIO", "labels must not be empty"),
        (
            ["O"],
            "BIOS",
            "scheme must be one of BIO, IOB2, IOB1, BIOES, BILOU, BMES, BMESO, got 'BIOS'",
        ),
        (["O", "S-X"], "BIO", "labels of scheme BIO must be a prefix of B, I, O and a type, got 'S-X'"),
        (["O", "B-X"], "BMES", "labels of scheme BMES must be a prefix of B, E, M, S and a type, got 'O'"),
        (["O-X"], "BIO", "labels of scheme BIO must be a prefix of B, I, O and a type, got 'O-X'"),
        (["<pad>", "O"], "BIO", "labels of scheme BIO must be a prefix of B, I, O and a type, got '<pad>'"),
        (["O", "B-X", "B-X"], "BIO", "labels must be different tags, got 'B-X' and 'B-X'"),
        (["E-X", "L-X"], "BIOES", "labels must be different tags, got 'E-X' and 'L-X'"),
    ],
)
def test_label_errors(labels, scheme, sentence):
    for call in (
        lambda: transition_mask(labels, scheme),
        lambda: tags_to_spans([0], labels, scheme),
        lambda: spans_to_tags([], 1, labels, scheme),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == sentence


def test_errors():
    bio, bmes = LABELS["BIO"], LABELS["BMES"]
    cases = [
        (lambda: tags_to_spans([0, 9], bio), ValueError, "tags must be in [0, 5), got tag 9 at sequence 0, step 1"),
        (
            lambda: tags_to_spans([-1], bio, mask=torch.ones(1)),
            ValueError,
            "tags must be in [0, 5), got tag -1 at sequence 0, step 0",
        ),
        (lambda: tags_to_spans(torch.tensor(1), bio), ValueError, "tags must be [T] or [B, T], got shape ()"),
        (lambda: tags_to_spans(torch.ones(2), bio), TypeError, "tags must be integers, got torch.float32"),
        (
            lambda: tags_to_spans([0], bio, mask=torch.ones(2)),
            ValueError,
            "mask must have the shape of tags, got (2,) and (1,)",
        ),
        (lambda: spans_to_tags([[0, 0]], 1, bio), ValueError, "spans must be [M, 3], got shape (1, 2)"),
        (lambda: spans_to_tags([], -1, bio), ValueError, "length must be at least 0, got -1"),
        (lambda: spans_to_tags([[0, 2, 0]], 2, bio), ValueError, "spans must have 0 <= start <= end < 2, got (0, 2)"),
        (lambda: spans_to_tags([[1, 0, 0]], 2, bio), ValueError, "spans must have 0 <= start <= end < 2, got (1, 0)"),
        (lambda: spans_to_tags([[0, 0, 2]], 2, bio), ValueError, "span types must be in [0, 2), got 2"),
        (
            lambda: spans_to_tags([[0, 1, 0], [1, 1, 0]], 2, bio),
            ValueError,
            "spans must not overlap, got one more on (1, 1)",
        ),
        (
            lambda: spans_to_tags([[1, 1, 0]], 2, bmes, "BMES"),
            ValueError,
            "labels have no O, but step 0 lies in no span",
        ),
        (
            lambda: spans_to_tags([[0, 0, 0]], 2, bmes, "BMES"),
            ValueError,
            "labels have no O, but step 1 lies in no span",
        ),
        (
            lambda: spans_to_tags([[0, 1, 1]], 2, bmes, "BMES"),
            ValueError,
            "labels have no tag for step 0 of span (0, 1)",
        ),
    ]
    for call, kind, sentence in cases:
        with pytest.raises(kind) as error:
            call()
        assert str(error.value) == sentence


def test_paths_to_lists():
    rng = np.random.default_rng(0)
    paths = rng.integers(-1, 1000, (7, 13))
    lists = _host.paths_to_lists(paths)
    assert lists == [[int(tag) for tag in row if tag >= 0] for row in paths]
    assert all(type(tag) is int for row in lists for tag in row)
    assert _host.paths_to_lists(paths.T.copy().T) == lists
    assert _host.paths_to_lists(paths[:0]) == []
    assert _host.paths_to_lists(paths[:, :0]) == [[]] * 7
    assert _host.paths_to_lists(np.array([[2**40, -1]])) == [[2**40]]


def test_packing_plan():
    order, cu_seqlens = _host.packing_plan(np.array([3, 0, 5, 3]))
    assert order.tolist() == [2, 0, 3, 1]
    assert cu_seqlens.tolist() == [0, 5, 8, 11, 11]
    order, cu_seqlens = _host.packing_plan(np.array([], np.int64))
    assert order.tolist() == []
    assert cu_seqlens.tolist() == [0]
    with pytest.raises(ValueError, match="lengths must be at least 0, got -1"):
        _host.packing_plan(np.array([1, -1]))


def test_cpu_features():
    assert _host.cpu_features() in ("x86-64-v3", "baseline")
