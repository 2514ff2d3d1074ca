"""Labels as users have them, where constraints apply, and the check of gold tags."""

import math

import numpy as np
import pytest
import torch
from tools import assert_same

import fastnlp_ops
from fastnlp_ops import CRF

LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
N = len(LABELS)
SHUFFLED = [3, 0, 4, 2, 1]

# The same labels, as sequences and as dictionaries.
FORMS = {
    "tuple": LABELS,
    "list": list(LABELS),
    "array": np.array(LABELS),
    "id2label": dict(enumerate(LABELS)),
    "id2label in any order": {i: LABELS[i] for i in SHUFFLED},
    "id2label from JSON": {str(i): LABELS[i] for i in SHUFFLED},
    "ids of numpy": {np.int64(i): LABELS[i] for i in SHUFFLED},
    "values of id2label": dict(enumerate(LABELS)).values(),
    "keys of label2id": {label: i for i, label in enumerate(LABELS)}.keys(),
}
KEYS = "labels must have the keys 0 to {} where they are a dict, got {}"
KIND = "labels must be a sequence or a dict from ids to labels, got {}"
BAD = {
    "ids": ([0, 1, 2], TypeError, "labels must be strings, got 0 for tag 0"),
    "None": (["O", None, "I-X"], TypeError, "labels must be strings, got None for tag 1"),
    "None in a dict": ({1: None, 0: "O"}, TypeError, "labels must be strings, got None for tag 1"),
    "bytes": ([b"O"], TypeError, "labels must be strings, got b'O' for tag 0"),
    "tensor": (torch.arange(2), TypeError, "labels must be strings, got tensor(0) for tag 0"),
    "string": ("OBI", TypeError, KIND.format("str")),
    "set": ({"O", "B-X"}, TypeError, KIND.format("set")),
    "number": (5, TypeError, KIND.format("int")),
    "label2id": ({"O": 0, "B-X": 1}, ValueError, KEYS.format(1, "'O', 'B-X'")),
    "hole": ({0: "O", 2: "B-X"}, ValueError, KEYS.format(1, "0, 2")),
    "from one": ({1: "O", 2: "B-X"}, ValueError, KEYS.format(1, "1, 2")),
    "the same key twice": ({0: "O", "0": "B-X"}, ValueError, KEYS.format(1, "0, '0'")),
    "negative": ({-1: "O", 0: "B-X"}, ValueError, KEYS.format(1, "-1, 0")),
    "twice": (["O", "B-X", "B-X"], ValueError, "labels must be different tags, got 'B-X' and 'B-X'"),
    "none": ([], ValueError, "labels must not be empty"),
    "empty dict": ({}, ValueError, "labels must not be empty"),
    "names of transformers": (
        {0: "LABEL_0", 1: "LABEL_1"},
        ValueError,
        "labels of scheme BIO must be a prefix of B, I, O and a type, got 'LABEL_0'",
    ),
}
TAKERS = {
    "CRF": lambda labels: CRF(2, labels=labels),
    "transition_mask": fastnlp_ops.transition_mask,
    "tags_to_spans": lambda labels: fastnlp_ops.tags_to_spans([0], labels),
    "spans_to_tags": lambda labels: fastnlp_ops.spans_to_tags([], 1, labels),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    labels = FORMS[form]
    for ours, expected in zip(fastnlp_ops.transition_mask(labels), fastnlp_ops.transition_mask(LABELS), strict=True):
        assert_same(ours, expected)
    spans = fastnlp_ops.tags_to_spans([1, 2, 0, 3], labels)
    assert spans.tolist() == [[0, 1, 0], [3, 3, 1]]
    assert fastnlp_ops.spans_to_tags(spans, 4, labels).tolist() == [1, 2, 0, 3]
    crf, expected = CRF(N, batch_first=True, labels=labels), CRF(N, batch_first=True, labels=LABELS)
    expected.load_state_dict(crf.state_dict())
    emissions = 5 * torch.randn(30, 6, N)
    assert crf.decode(emissions) == expected.decode(emissions)


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("case", BAD)
def test_errors(case, taker):
    labels, error, sentence = BAD[case]
    with pytest.raises(error) as caught:
        TAKERS[taker](labels)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"labels": LABELS[:3]}, ValueError, "labels must name 5 tags, got 3"),
        ({"labels": dict(enumerate(LABELS[:3]))}, ValueError, "labels must name 5 tags, got 3"),
        ({"scheme": "BIO"}, ValueError, "labels must be given where scheme is"),
        ({"constrain": "decode"}, ValueError, "labels must be given where constrain is"),
        ({"labels": LABELS, "constrain": "loss"}, ValueError, "constrain must be both or decode, got 'loss'"),
        ({"ignore_index": "-100"}, TypeError, "ignore_index must be an int or None, got '-100'"),
        ({"ignore_index": True}, TypeError, "ignore_index must be an int or None, got True"),
    ],
)
def test_errors_of_options(options, error, sentence):
    with pytest.raises(error) as caught:
        CRF(N, **options)
    assert str(caught.value) == sentence


def test_labels_are_a_copy():
    labels = list(LABELS)
    crf = CRF(N, labels=labels)
    labels.reverse()
    with pytest.raises(ValueError, match=r"got I-PER as the first tag"):
        crf.check_tags(torch.tensor([[2]]))


def test_constrain_decode(device):
    """Trains as a CRF without labels, to the bit, and decodes as one with: a window may begin with I-PER."""
    free, crf = (
        CRF(N, batch_first=True, **options).to(device) for options in ({}, {"labels": LABELS, "constrain": "decode"})
    )
    both = CRF(N, batch_first=True, labels=LABELS).to(device)
    for other in (free, both):
        other.load_state_dict(crf.state_dict())
    emissions = 3 * torch.randn(50, 5, N, device=device)
    tags = torch.randint(N, (50, 5), device=device)
    tags[0, 0] = 2
    value = crf(emissions, tags, reduction="none")
    assert_same(value, free(emissions, tags, reduction="none"))
    assert value.isfinite().all()
    assert both(emissions, tags, reduction="none")[0] == -math.inf
    for ours, expected in zip(
        torch.autograd.grad(value.sum(), list(crf.parameters())),
        torch.autograd.grad(free(emissions, tags), list(free.parameters())),
        strict=True,
    ):
        assert_same(ours, expected)
    assert crf.decode(emissions) == both.decode(emissions) != free.decode(emissions)
    for ours, expected in zip(crf.viterbi(emissions, n_best=3), both.viterbi(emissions, n_best=3), strict=True):
        assert_same(ours, expected)
    assert_same(crf.marginals(emissions), free.marginals(emissions))


# (tags, mask, sentence); rows are sequences.
LATE, GAP = [[0, 1, 1, 1]] * 2, [[1, 0, 1, 1]] * 2
FAULTS = {
    "fine": ([[0, 1, 2, 0], [3, 4, 4, 1]], None, None),
    "after O": ([[0, 1, 2, 0], [0, 0, 2, 1]], None, "got I-PER after O at sequence 1, step 2"),
    "after another type": ([[0, 1, 4, 0], [2, 0, 0, 0]], None, "got I-LOC after B-PER at sequence 0, step 2"),
    "first": ([[0, 0, 0, 0], [2, 2, 0, 0]], None, "got I-PER as the first tag at sequence 1, step 0"),
    "first valid": (
        [[9, 2, 0, 0], [0, 0, 0, 0]],
        LATE,
        "got I-PER as the first tag at sequence 0, step 1",
    ),
    "across a gap": ([[1, 9, 4, 0], [0, 0, 0, 0]], GAP, "got I-LOC after B-PER at sequence 0, step 2"),
    "legal across a gap": ([[1, 9, 2, 0], [0, 0, 0, 0]], GAP, None),
    "masked": ([[1, 4, 0, 0], [0, 2, 2, 2]], [[1, 0, 1, 1], [1, 0, 0, 0]], None),
    "nothing": ([[9, 9, 9, 9]], [[0, 0, 0, 0]], None),
    "no sequences": ([], None, None),
    "out of range": ([[0, 2, 0, 0], [0, 0, 5, 0]], None, "[0, 5), got tag 5 at sequence 1, step 2"),
    "ignored elsewhere": ([[0, 0, 0, 0], [0, -100, 0, 0]], None, "[0, 5), got tag -100 at sequence 1, step 1"),
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("case", FAULTS)
def test_check_tags(case, batch_first, device):
    rows, mask, sentence = FAULTS[case]
    tags = torch.tensor(rows, dtype=torch.int64, device=device).reshape(len(rows), 4)
    mask = None if mask is None else torch.tensor(mask, device=device)
    if not batch_first:
        tags, mask = tags.t(), None if mask is None else mask.t()
    for constrain in ("both", "decode"):
        crf = CRF(N, batch_first=batch_first, labels=LABELS, constrain=constrain).to(device)
        if sentence is None:
            assert crf.check_tags(tags, mask) is None
            continue
        with pytest.raises(ValueError, match=r"^tags must ") as caught:
            crf.check_tags(tags, mask)
        start = "tags must be in " if sentence.startswith("[") else "tags must follow scheme BIO, "
        assert str(caught.value) == start + sentence


def test_check_tags_finds_what_makes_the_loss_infinite(device):
    """Exactly the sequences of log-likelihood -inf are refused, in every scheme and with any mask."""
    schemes = {
        "BIO": LABELS,
        "IOB1": LABELS,
        "BIOES": ("O", "B-X", "I-X", "E-X", "S-X"),
        "BMES": ("B-X", "M-X", "E-X", "S-X", "S-Y"),
    }
    for scheme, labels in schemes.items():
        crf = CRF(N, batch_first=True, labels=labels, scheme=scheme, ignore_index=-100).to(device)
        tags = torch.randint(N, (200, 3), device=device)
        tags[torch.rand(200, 3, device=device) < 0.3] = -100
        finite = crf(torch.randn(200, 3, N, device=device), tags, reduction="none").isfinite().tolist()
        assert 20 < sum(finite) < 180
        for row, fine in zip(tags, finite, strict=True):
            if fine:
                crf.check_tags(row[None])
            else:
                with pytest.raises(ValueError, match=f"^tags must follow scheme {scheme}, got ._?"):
                    crf.check_tags(row[None])


def test_check_tags_without_labels(device):
    crf = CRF(3, ignore_index=-100).to(device)
    crf.check_tags(torch.tensor([[0, 1], [2, -100]], device=device))
    with pytest.raises(ValueError, match=r"^tags must be in \[0, 3\), got tag 3 at sequence 1, step 0$"):
        crf.check_tags(torch.tensor([[0, 3], [2, -100]], device=device))


@pytest.mark.parametrize(
    ("tags", "mask", "error", "sentence"),
    [
        (torch.zeros(4), None, ValueError, "tags must be [T, B], got shape (4,)"),
        (torch.zeros(2, 4), None, TypeError, "tags must be integers, got torch.float32"),
        (
            torch.zeros(2, 4, dtype=torch.int64),
            torch.ones(4, 2),
            ValueError,
            "mask must have the shape of tags, got (4, 2) and (2, 4)",
        ),
    ],
)
def test_check_tags_errors(tags, mask, error, sentence):
    with pytest.raises(error) as caught:
        CRF(N, labels=LABELS).check_tags(tags, mask)
    assert str(caught.value) == sentence
