"""-100, with which Hugging Face pads labels, and padded spans, which its Trainer gathers."""

import pytest
import torch
from global_pointer_problems import CASES, decode, gradients, loss, make_problem
from tools import assert_same

import fastnlp_ops
from fastnlp_ops import reference


def as_list(labels):
    """[B, H, P, 2] as [M, 4], padding included."""
    B, H, P, _ = labels.shape
    row = torch.cartesian_prod(torch.arange(B), torch.arange(H), torch.arange(P)).to(labels.device)
    return torch.cat([row[:, :2], labels.reshape(-1, 2)], 1)


@pytest.mark.parametrize("layout", [lambda x: x, as_list], ids=["padded", "list"])
@pytest.mark.parametrize("case", ["ragged", "efficient", "mask_zero", "relations"])
def test_labels_padded_with_minus_100(case, layout, device):
    """As those padded with -1, in value and gradient; also where one of the two numbers alone is padding."""
    problem = make_problem(device=device, **CASES[case])
    labels = problem.labels
    padded = torch.where((labels == -1).all(-1, keepdim=True), torch.tensor([-100, 2], device=device), labels)
    assert (padded == -100).any() and not (padded == -1).any()
    problem.labels = layout(labels)
    expected = loss(fastnlp_ops, problem)
    weights = torch.rand_like(expected)
    grads = gradients(loss, fastnlp_ops, problem, None, weights)
    problem.labels = layout(padded)
    assert_same(loss(fastnlp_ops, problem), expected)
    for own, other in zip(gradients(loss, fastnlp_ops, problem, None, weights), grads, strict=True):
        assert_same(own, other)
    torch.testing.assert_close(loss(reference, problem), expected)


def test_rows_of_minus_100(device):
    """A list padded by Trainer: every number of the row is -100."""
    problem = make_problem(device=device, **CASES["ragged"])
    problem.labels = as_list(problem.labels)
    expected = loss(fastnlp_ops, problem)
    problem.labels = torch.cat([problem.labels, problem.labels.new_full((3, 4), -100)])
    assert_same(loss(fastnlp_ops, problem), expected)


def test_layer_loss(device):
    layer, x = fastnlp_ops.GlobalPointer(8, 2, 4).to(device), torch.randn(2, 5, 8, device=device)
    labels = torch.tensor([[[[0, 1]], [[2, 3]]], [[[-1, -1]], [[1, 4]]]], device=device)
    assert_same(layer.loss(x, labels), layer.loss(x, torch.where(labels < 0, -100, labels)))


def test_sparse_multilabel(device):
    scores = torch.randn(4, 7, device=device)
    indices = torch.tensor([[3, 5], [0, -1], [-1, -1], [2, 2]], device=device)
    padded = torch.where(indices < 0, -100, indices)
    for module in (fastnlp_ops, reference):
        value = module.sparse_multilabel_categorical_crossentropy
        assert_same(value(scores, padded), value(scores, indices))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("max_spans", [1, 3, 500])
@pytest.mark.parametrize("case", ["ragged", "efficient", "relations", "no_sequence", "no_token", "one"])
def test_max_spans(case, max_spans, nested, device):
    """The rows of top_k, one text in each row."""
    problem = make_problem(device=device, **CASES[case])
    expected, expected_scores = decode(fastnlp_ops, problem, top_k=max_spans, nested=nested)
    spans, scores = decode(fastnlp_ops, problem, max_spans=max_spans, nested=nested)
    B = problem.q.shape[0]
    assert spans.shape == (B, max_spans, 4) and scores.shape == (B, max_spans) and spans.dtype == torch.int64
    found = spans[:, :, 0] >= 0
    assert torch.equal(spans[found], expected)
    assert_same(scores[found], expected_scores)
    assert torch.equal(spans[:, :, 0][found], torch.arange(B, device=device)[:, None].expand(B, max_spans)[found])
    assert (spans[~found] == -100).all() and (scores[~found] == -torch.inf).all()
    assert not (found[:, 1:] & ~found[:, :-1]).any(), "padding stands behind the spans"
    plain, plain_scores = decode(reference, problem, max_spans=max_spans, nested=nested)
    assert torch.equal(plain, spans)
    torch.testing.assert_close(plain_scores, scores)


def test_max_spans_of_nothing(device):
    problem = make_problem(device=device, **CASES["ragged"])
    spans, scores = decode(fastnlp_ops, problem, max_spans=2, threshold=1e9)
    assert (spans == -100).all() and (scores == -torch.inf).all()


def test_max_spans_errors(device):
    layer, x = fastnlp_ops.GlobalPointer(8, 2, 4).to(device), torch.randn(2, 5, 8, device=device)
    with pytest.raises(ValueError, match=r"^max_spans must be at least 1, got 0$"):
        layer.decode(x, max_spans=0)
    with pytest.raises(ValueError, match=r"^top_k must be None where max_spans is given$"):
        layer.decode(x, top_k=2, max_spans=2)
