"""Bad calls of the multilabel functions, and the exact sentences that they get."""

import pytest
import torch
from multilabel_problems import KINDS, loss, make_problem
from tools import assert_same

import fastnlp_ops

ERRORS = [
    (ValueError, "multi", (torch.tensor(1.0), torch.tensor(1)), "scores must be [..., C], got shape ()"),
    (
        TypeError,
        "multi",
        (torch.ones(3, 2).long(), torch.ones(3, 2)),
        "scores must be float32, float64, float16 or bfloat16, got torch.int64",
    ),
    (
        ValueError,
        "multi",
        (torch.ones(3, 2), torch.ones(3, 1)),
        "labels must be [..., C] = (3, 2) as scores, got shape (3, 1)",
    ),
    (
        TypeError,
        "multi",
        (torch.ones(3, 2), torch.ones(3, 2, dtype=torch.complex64)),
        "labels must be bool, integer or floating point, got torch.complex64",
    ),
    (
        ValueError,
        "multi",
        (torch.ones(3, 2), torch.ones(3, 2, requires_grad=True)),
        "labels must not require a gradient: detach them",
    ),
    (
        ValueError,
        "sparse",
        (torch.ones(3, 2), torch.ones(2, 3).long()),
        "indices must be [..., P] with (3,), got shape (2, 3)",
    ),
    (ValueError, "sparse", (torch.ones(2), torch.tensor(1)), "indices must be [..., P] with (), got shape ()"),
    (TypeError, "sparse", (torch.ones(3, 2), torch.ones(3, 2)), "indices must be integers, got torch.float32"),
    (TypeError, "sparse", (torch.ones(3, 2), torch.ones(3, 2).bool()), "indices must be integers, got torch.bool"),
]


@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_errors(number, device):
    error, kind, arguments, sentence = ERRORS[number]
    name = {"multi": "multilabel", "sparse": "sparse_multilabel"}[kind] + "_categorical_crossentropy"
    with pytest.raises(error) as caught:
        getattr(fastnlp_ops, name)(*(x.to(device) for x in arguments))
    assert str(caught.value) == sentence


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_options(kind, device):
    scores, labels = make_problem(kind, 3, 4, device)
    with pytest.raises(ValueError, match=r"^reduction must be none, mean, sum or batchmean, got max$"):
        loss(fastnlp_ops, scores, labels, "max")
    name = "indices" if kind == "sparse" else "labels"
    with pytest.raises(ValueError, match=f"^{name} must be on the device of scores, {scores.device}, got meta$"):
        loss(fastnlp_ops, scores, labels.to("meta"))


@pytest.mark.parametrize("index", [-2, 7, 49, 2**40])
def test_errors_of_indices(index, device):
    """Out of range: an error on the CPU, dropped on a GPU, where nothing reads values."""
    scores, indices = torch.randn(3, 7, device=device), torch.full((3, 4), -1, device=device)
    expected = loss(fastnlp_ops, scores, indices)
    indices[1, 2] = index
    if device.type == "cpu":
        with pytest.raises(ValueError) as caught:
            loss(fastnlp_ops, scores, indices)
        wanted = "indices must be in [0, 7), or -1 or -100 for none"
        assert str(caught.value) == f"{wanted}, got index {index} at row 1, position 2"
    else:
        assert_same(loss(fastnlp_ops, scores, indices), expected)
