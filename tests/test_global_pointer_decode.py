"""Decoding: which spans are found, in which order, flat, nested, the best of each sequence."""

import math

import pytest
import torch
from global_pointer_problems import check_decode, decode, make_problem, problem_of, scores

import fastnlp_ops
from fastnlp_ops import reference

INF = math.inf


def rows(*spans):
    return torch.tensor(spans, dtype=torch.int64).reshape(-1, 4)


def decoded(problem, **options):
    spans, found = decode(fastnlp_ops, problem, **options)
    return spans.cpu(), found.cpu()


def score_matrix(cells, B=1, H=1, n=6, fill=-1.0, device="cpu"):
    """[B, H, n, n], `fill` but where {(b, h, i, j): score} says otherwise."""
    s = torch.full((B, H, n, n), fill)
    for cell, score in cells.items():
        s[cell] = score
    return s.to(device)


@pytest.mark.parametrize("threshold", [-INF, -1.0, 0.0, 0.1, 0.5, 1.0, INF])
def test_threshold(threshold, device):
    """Strictly above, at exact ties too: scores are multiples of 1/8, and 0.1 as float32 has it."""
    s = torch.randint(-8, 9, (2, 3, 9, 9)) / 8
    s[0, 0, 0] = 0.1
    spans, found = decoded(problem_of(s.to(device), tril_mask=False), threshold=threshold)
    assert torch.equal(spans, (s > threshold).nonzero())
    assert torch.equal(found, s[s > threshold])
    spans, _ = decoded(problem_of(s.to(device)), threshold=threshold)
    assert torch.equal(spans, ((s > threshold) & ~torch.ones(9, 9).bool().tril(-1)).nonzero())


def test_threshold_of_minus_infinity(device):
    """All cells that take part, and none that does not."""
    problem = make_problem(3, 14, 2, 8, device, mask="holes", max_span_length=4)
    spans, _ = decoded(problem, threshold=-INF)
    assert torch.equal(spans, problem.valid.cpu().nonzero())
    spans, found = decoded(problem, threshold=INF)
    assert spans.shape == (0, 4) and found.shape == (0,)


def test_nan_is_above_nothing(device):
    s = torch.randn(1, 2, 8, 8)
    problem = problem_of(s.to(device), tril_mask=False)
    problem.q = problem.q.clone()
    problem.q[0, 3, 1] = math.nan
    s[0, 1, 3] = math.nan
    for threshold in (0.0, -INF):
        assert torch.equal(decoded(problem, threshold=threshold)[0], (s > threshold).nonzero())


@pytest.mark.parametrize("share", [0.0, 0.001, 0.25, 1.0])
def test_many_hits(share, device):
    """An untrained head scores about half of all cells above 0: buffers grow, nothing is cut off."""
    B, H, n = 2, 5, 193
    s = torch.rand(B, H, n, n) - (1 - share)
    problem = problem_of(s.to(device), tril_mask=False)
    spans, found = decoded(problem)
    assert torch.equal(spans, (s > 0).nonzero())
    assert torch.equal(found, s[s > 0])
    assert torch.equal(decoded(problem, top_k=10**9)[0], spans)


@pytest.mark.parametrize("bias", [False, True], ids=["standard", "efficient"])
def test_many_hits_of_projections(bias, device):
    spans = check_decode(make_problem(2, 150, 6, 32, device, mask="holes", shared=bias, tril_mask=False), top_k=100)
    assert len(spans) > 20000


def test_hits_in_one_place(device):
    """One row that is full between rows that are empty, and the last cell of all."""
    n = 200
    s = score_matrix({}, B=2, H=3, n=n)
    s[0, 1, 128, :] = 1.0
    s[1, 2, n - 1, n - 1] = 2.0
    spans, found = decoded(problem_of(s.to(device)))
    assert torch.equal(spans, ((s > 0) & ~torch.ones(n, n).bool().tril(-1)).nonzero())
    assert found[-1] == 2 and len(found) == n - 128 + 1


def test_top_k(device):
    """The best of each sequence over all heads; of equals the lowest (h, start, end); sorted as all spans are."""
    cells = {(0, 0, 1, 2): 3.0, (0, 0, 0, 5): 1.0, (0, 1, 0, 0): 2.0, (0, 1, 3, 3): 2.0, (0, 0, 4, 5): 2.0}
    cells |= {(2, 1, 5, 5): 0.5}
    problem = problem_of(score_matrix(cells, B=3, H=2, device=device))
    assert torch.equal(decoded(problem, top_k=1)[0], rows((0, 0, 1, 2), (2, 1, 5, 5)))
    assert torch.equal(decoded(problem, top_k=2)[0], rows((0, 0, 1, 2), (0, 0, 4, 5), (2, 1, 5, 5)))
    assert torch.equal(decoded(problem, top_k=3)[0], rows((0, 0, 1, 2), (0, 0, 4, 5), (0, 1, 0, 0), (2, 1, 5, 5)))
    for more in (5, 6, 2**40):
        assert torch.equal(decoded(problem, top_k=more)[0], rows(*sorted(cells)))
    assert decoded(problem, top_k=3)[1].tolist() == [3.0, 2.0, 2.0, 0.5]


def test_flat(device):
    """Overlap counts across heads, ends are inclusive, and sequences know nothing of each other."""
    cells = {
        (0, 0, 0, 2): 5.0,
        (0, 0, 2, 4): 9.0,  # shares token 2 with the first and beats it
        (0, 1, 0, 1): 4.0,  # free again, as the first is out
        (0, 1, 5, 5): 0.5,
        (0, 0, 5, 5): 0.5,  # the same span of a lower head: the tie is its own
        (1, 1, 0, 5): 1.0,
        (1, 0, 3, 3): 0.9,
    }
    problem = problem_of(score_matrix(cells, B=2, H=2, device=device))
    expected = rows((0, 0, 2, 4), (0, 0, 5, 5), (0, 1, 0, 1), (1, 1, 0, 5))
    assert torch.equal(decoded(problem, nested=False)[0], expected)
    assert decoded(problem, nested=False)[1].tolist() == [9.0, 0.5, 4.0, 1.0]
    # flat first, then the best of what is left: the winner's victim does not come back
    assert torch.equal(decoded(problem, nested=False, top_k=2)[0], rows((0, 0, 2, 4), (0, 1, 0, 1), (1, 1, 0, 5)))
    assert torch.equal(decoded(problem)[0], rows(*sorted(cells)))


def test_flat_without_tril(device):
    """A pair (i, j) with j < i covers the tokens from j to i."""
    cells = {(0, 0, 4, 1): 3.0, (0, 0, 2, 2): 2.0, (0, 0, 0, 0): 1.0, (0, 0, 5, 3): 1.5}
    problem = problem_of(score_matrix(cells, device=device), tril_mask=False)
    assert torch.equal(decoded(problem, nested=False)[0], rows((0, 0, 0, 0), (0, 0, 4, 1)))


@pytest.mark.parametrize("levels", [1, 3, 10**6])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 130])
def test_flat_among_ties(n, levels, device):
    """Few score levels make many ties; word boundaries of 64 tokens."""
    s = torch.randint(0, levels, (3, 2, n, n)) / 2**20 + 2.0**-10
    s[torch.rand(s.shape) < 0.9] = -1
    problem = problem_of(s.to(device))
    spans, found = decode(reference, problem, nested=False)
    ours, our_scores = decode(fastnlp_ops, problem, nested=False)
    assert torch.equal(ours, spans) and torch.equal(our_scores, found)


def test_flat_spans_do_not_overlap(device):
    problem = make_problem(4, 90, 3, 16, device, mask="left")
    spans, _ = decoded(problem, nested=False)
    for b in range(4):
        own = spans[spans[:, 0] == b]
        covered = torch.cat([torch.arange(i, j + 1) for _, _, i, j in own.tolist()])
        assert len(own) > 3 and len(covered.unique()) == len(covered)


def test_left_padding(device):
    """Spans stand where their tokens stand; padding shifts them and changes nothing else."""
    plain = make_problem(1, 20, 3, 8, device)
    padded = make_problem(1, 27, 3, 8, device)
    padded.mask = (torch.arange(27, device=device) >= 7)[None]
    padded.q[:, 7:], padded.k[:, 7:] = plain.q, plain.k
    padded.q[:, :7] = padded.k[:, :7] = 50.0
    shift = torch.tensor([0, 0, 7, 7], device=device)
    s = scores(fastnlp_ops, plain)
    threshold = midpoint(s)
    spans, found = decode(fastnlp_ops, plain, threshold=threshold)
    shifted, shifted_scores = decode(fastnlp_ops, padded, threshold=threshold)
    assert torch.equal(shifted, spans + shift)
    assert torch.allclose(shifted_scores, found, atol=1e-5)


def midpoint(s):
    """A threshold that no score comes near."""
    ordered = s[s.isfinite()].double().sort().values
    gap = ordered.diff()[len(ordered) // 4 : -len(ordered) // 4]
    place = gap.argmax().item() + len(ordered) // 4
    return (ordered[place] + ordered[place + 1]).item() / 2


def test_decoding_has_no_gradient(device):
    problem, _ = make_problem(2, 9, 2, 4, device).leaves()
    assert not decode(fastnlp_ops, problem)[1].requires_grad
    q, k = problem.q, problem.k
    _, found = torch.ops.fastnlp_ops.global_pointer_decode(q, k, None, None, None, None, True, True, -1, 0.5, 0.0)
    with pytest.raises(NotImplementedError, match="global_pointer_decode has no gradient"):
        found.sum().backward()


def test_probability(device):
    """sigmoid(2 s): the score at which the loss of a soft label t is least has t = sigmoid(2 s)."""
    t = torch.tensor([[0.02, 0.3, 0.5, 0.9, 0.999]], dtype=torch.float64, device=device).T
    s = torch.zeros_like(t, requires_grad=True)
    optimizer = torch.optim.LBFGS([s], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = fastnlp_ops.multilabel_categorical_crossentropy(s, t, reduction="sum")
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(torch.sigmoid(2 * s), t, atol=1e-5)
