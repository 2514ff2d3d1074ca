"""Inputs that break span scoring: the bugs of its ports, sizes, masks, scales, and the ways in which a loop calls."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from global_pointer_problems import (
    FUNCTIONS,
    assert_all_same,
    check_backward,
    check_decode,
    check_forward,
    decode,
    divergence,
    gradients,
    loss,
    make_problem,
    problem_of,
    scores,
    used,
)
from tools import assert_same

import fastnlp_ops
from fastnlp_ops import reference
from fastnlp_ops._ops import global_pointer as glue

INF = math.inf
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)


def cell_gradients(problem):
    """Loss [B, H] and its gradient by the score of every cell [B, H, n, n]; for problems of `problem_of`."""
    q = problem.q.detach().clone().requires_grad_()
    value = loss(fastnlp_ops, problem.with_inputs(q, *problem.inputs[1:]))
    (dq,) = torch.autograd.grad(value.sum(), q)
    return value.detach(), dq.transpose(1, 2)


def exact_cell_gradients(s, positive):
    """The formulas of the documentation in float64; s and positive [n, n], all cells take part."""
    s = s.double().cpu()
    log_negative = torch.log1p(s[~positive].exp().sum()) if s.max() < 300 else torch.logsumexp(s[~positive], 0)
    log_positive = torch.log1p((-s[positive]).exp().sum())
    gradient = torch.where(positive, -(-s - log_positive).exp(), (s - log_negative).exp())
    return (log_negative + log_positive).item(), gradient


@pytest.mark.parametrize("positives", [1, 3])
@pytest.mark.parametrize("hard", [-20.0, 2.0])
@pytest.mark.parametrize("s_pos", [5.0, 12.0, 15.0, 16.0, 20.0, 30.0, 50.0, 100.0])
def test_confident_positives(s_pos, hard, positives, device):
    """Ports subtract the labels from the sum over all cells: past s = 12 their loss is negative, and its gradient
    pushes right spans down and leaves wrong ones alone. Here 4,096 cells at -20, a hard negative, labels at s_pos.
    """
    s = torch.full((1, 1, 64, 64), -20.0)
    s[0, 0, 40, 50] = hard
    positive = torch.zeros(64, 64, dtype=torch.bool)
    positive[3, 7 : 7 + positives] = True
    s[0, 0, positive] = s_pos
    rows = torch.cat([torch.zeros(positives, 2, dtype=torch.int64), positive.nonzero()], 1)
    value, gradient = cell_gradients(problem_of(s.to(device), rows.to(device), tril_mask=False))
    exact, exact_gradient = exact_cell_gradients(s[0, 0], positive)
    gradient = gradient[0, 0].cpu()
    assert value.item() >= 0
    assert abs(value.item() - exact) <= 1e-6 * max(1, exact)
    assert (gradient[positive] <= 0).all() and (gradient[~positive] >= 0).all()
    assert torch.allclose(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-12)
    if hard > 0:
        assert gradient[40, 50] > 0.5


@pytest.mark.parametrize("size", [100.0, 1e4, 1e30])
def test_far_scores(size, device):
    """Wrong by far: a negative at +size, a label at -size. No overflow, and gradients of +1 and -1."""
    s = torch.zeros(1, 1, 8, 8, device=device)
    s[0, 0, 1, 2], s[0, 0, 3, 3] = size, -size
    value, gradient = cell_gradients(problem_of(s, torch.tensor([[0, 0, 3, 3]], device=device)))
    assert value.item() == pytest.approx(2 * size, rel=1e-6)
    assert gradient[0, 0, 1, 2].item() == pytest.approx(1) and gradient[0, 0, 3, 3].item() == pytest.approx(-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_products_that_overflow_half(dtype, device):
    """q = k = 40, d = 64: the dot product is past float16 before it is scaled, and 12,800 after."""
    q = torch.full((1, 4, 1, 64), 40.0, dtype=dtype, device=device)
    problem = dataclasses.replace(make_problem(1, 4, 1, 64, device), q=q, k=q, rope=False)
    s = scores(fastnlp_ops, problem)
    assert s.dtype == dtype and (s[..., 0, :] == 12800).all()
    value = loss(fastnlp_ops, problem)
    assert value.isfinite().all() and value.dtype == torch.float32
    assert all(x.isfinite().all() for x in gradients(loss, fastnlp_ops, problem, None, torch.ones_like(value)))


@pytest.mark.parametrize(("n", "B", "H"), [(5000, 1, 1), (4097, 1, 2), (5000, 2, 100)])
def test_large_indices(n, B, H, device):
    """float32 takes (4998, 4999) of n = 5000 for its neighbour, and B * H * n * n is past 2^32: the right cells are
    found among all, in labels and in decoding. A band keeps it quick.
    """
    problem = make_problem(B, n, H, 2, device, shared=True, max_span_length=2)
    problem = problem.with_inputs(*(x.zero_() for x in problem.inputs))
    cell = [B - 1, H - 1, n - 2, n - 1]
    problem.labels = torch.tensor([cell], device=device)
    value, (dq, dk, dstart, dend) = (
        loss(fastnlp_ops, problem),
        gradients(loss, fastnlp_ops, problem, None, torch.ones(B, H, device=device)),
    )
    count = 2 * n - 1
    expected = torch.full((B, H), math.log(1 + count))
    expected[-1, -1] = math.log(count) + math.log(2)
    assert torch.allclose(value.cpu(), expected)
    assert (dstart < 0).nonzero().tolist() == [[B - 1, n - 2, H - 1]]
    assert (dend < 0).nonzero().tolist() == [[B - 1, n - 1, H - 1]]
    assert not dq.any() and not dk.any()
    problem.start_bias[B - 1, n - 2, H - 1] = 3.0
    problem.end_bias[B - 1, n - 1, H - 1] = 1.0
    problem.end_bias[B - 1, n - 2, H - 1] = -5.0
    spans, found = decode(fastnlp_ops, problem, threshold=1.5)
    assert spans.tolist() == [cell] and found.tolist() == [4.0]


def test_left_padding(device):
    """Padding on the left, on the right and in holes: values and gradients of the tokens that count are the same."""
    plain = make_problem(2, 21, 3, 8, device, dtype=torch.float64, labels=5)
    plain.labels = plain.labels.sort(-1).values
    for shift, extra in ((9, 9), (0, 9), (4, 9)):
        padded = make_problem(2, 30, 3, 8, device, dtype=torch.float64)
        padded.mask = torch.zeros(2, 30, dtype=torch.bool, device=device)
        padded.mask[:, shift : shift + 21] = True
        for own, x in zip(padded.inputs, plain.inputs, strict=True):
            if x is not None:
                own.fill_(math.nan)
                own[:, shift : shift + 21] = x
        padded.labels = torch.where(plain.labels < 0, -1, plain.labels + shift)
        inside = slice(shift, shift + 21)
        s = scores(fastnlp_ops, padded)
        assert torch.allclose(s[:, :, inside, inside], scores(fastnlp_ops, plain))
        assert (s == -INF).sum() == s.numel() - 2 * 3 * 21 * 11, "a cell of padding has a score"
        for function in (loss, divergence):
            value = function(fastnlp_ops, padded)
            assert torch.allclose(value, function(fastnlp_ops, plain))
            ones = torch.ones_like(value)
            pairs = zip(*(gradients(function, fastnlp_ops, p, None, ones) for p in (padded, plain)), strict=True)
            for own, expected in pairs:
                assert torch.allclose(own[:, inside], expected)
                assert own.shape[1] == expected.shape[1] + extra
                assert not own[~padded.mask].any()


def test_nothing_counts(device):
    """A sequence of padding: loss 0, gradients 0, no span, beside one that has tokens."""
    problem = make_problem(2, 9, 3, 4, device, shared=True)
    problem.mask = torch.ones(2, 9, device=device)
    problem.mask[1] = 0
    for x in problem.inputs:
        x[1] = math.nan
    assert (scores(fastnlp_ops, problem)[1] == -INF).all()
    assert 1 not in decode(fastnlp_ops, problem, threshold=-INF)[0][:, 0]
    for function in (loss, divergence):
        value = function(fastnlp_ops, problem)
        assert (value[1] == 0).all() and (value[0] > 0).all()
        for own in gradients(function, fastnlp_ops, problem, None, torch.ones_like(value)):
            assert not own[1].any() and own[0].any()


def test_labels_that_do_not_count(device):
    """Twice the same, below the diagonal, masked, too long, padding: dropped, to the bit."""
    problem = make_problem(2, 30, 3, 8, device, max_span_length=6, labels=0)
    problem.mask = torch.ones(2, 30, device=device)
    problem.mask[:, 11] = problem.mask[1, :5] = 0
    good = [[0, 0, 2, 4], [0, 2, 9, 9], [1, 1, 20, 25], [1, 1, 21, 25]]
    more = [*good, [0, 0, 2, 4], [1, 1, 20, 25], [1, 1, 20, 25]]  # again
    more += [[0, 0, 4, 2], [1, 1, 25, 20]]  # below the diagonal
    more += [[0, 0, 11, 12], [0, 0, 7, 11], [0, 0, 11, 11], [1, 0, 2, 3]]  # masked
    more += [[0, 1, 3, 9], [0, 1, 0, 29]]  # too long
    more += [[-1, -1, -1, -1], [0, 0, -1, 3]]
    found = []
    for labels in (good, more, more[::-1]):
        problem.labels = torch.tensor(labels, device=device)
        value = loss(fastnlp_ops, problem)
        found.append([value, *gradients(loss, fastnlp_ops, problem, None, torch.ones_like(value))])
    assert_all_same(found[1], found[0])
    assert_all_same(found[2], found[0])
    problem.labels = torch.tensor(good[1:], device=device)
    assert not torch.equal(loss(fastnlp_ops, problem), found[0][0])


@pytest.mark.parametrize("tril_mask", [True, False])
def test_every_cell_is_a_label(tril_mask, device):
    """log_negative is 0, and no cell has a negative's gradient."""
    s = torch.randn(2, 2, 11, 11)
    rows = torch.cartesian_prod(*(torch.arange(size) for size in s.shape))
    value, gradient = cell_gradients(problem_of(s.to(device), rows.to(device), tril_mask=tril_mask))
    upper = torch.ones(11, 11).bool().triu() if tril_mask else torch.ones(11, 11).bool()
    expected = torch.log1p((-s[:, :, upper].double()).exp().sum(2))
    assert torch.allclose(value.double().cpu(), expected)
    gradient = gradient.cpu()
    assert (gradient[:, :, upper] < 0).all() and not gradient[:, :, ~upper].any()


@pytest.mark.parametrize("form", ["padded", "rows"])
def test_mask_zero(form, device):
    """Zeros as padding: without the flag (0, 0) is a label, with it the cell is neither label nor negative."""
    s = torch.randn(1, 2, 7, 7, device=device)
    labels = torch.tensor([[[[2, 4], [0, 0]], [[0, 0], [0, 0]]]], device=device)
    if form == "rows":
        labels = torch.tensor([[0, 0, 2, 4], [0, 0, 0, 0], [0, 1, 0, 0]], device=device)
    plain, plain_gradient = cell_gradients(problem_of(s, labels))
    value, gradient = cell_gradients(problem_of(s, labels, mask_zero=True))
    assert (plain_gradient[..., 0, 0] < 0).all()
    assert not gradient[..., 0, 0].any()
    without = s.clone()
    without[..., 0, 0] = -1e30  # as good as not there
    expected, _ = cell_gradients(problem_of(without, torch.tensor([[0, 0, 2, 4]], device=device)))
    assert torch.allclose(value, expected) and not torch.allclose(value, plain)


def test_mask_zero_of_a_masked_corner(device):
    problem = make_problem(2, 8, 3, 4, device, mask_zero=True)
    problem.mask = torch.ones(2, 8, device=device)
    problem.mask[0, 0] = 0
    check_forward(loss, problem)
    check_backward(loss, problem)


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("place", ["q", "k", "start_bias", "end_bias"])
def test_bad_numbers_stay_in_their_rows(place, bad, device):
    """NaN or inf in one head of one sequence: its own rows say so, all others are what they were, to the bit."""
    problem = make_problem(3, 70, 3, 8, device, bias=True, labels=6)
    weights = torch.ones(3, 3, device=device)
    expected = [scores(fastnlp_ops, problem), loss(fastnlp_ops, problem), divergence(fastnlp_ops, problem)]
    slopes = [gradients(f, fastnlp_ops, problem, None, weights) for f in (loss, divergence)]
    spans = decode(fastnlp_ops, problem)[0]
    getattr(problem, place)[1, 40, 2] = bad
    found = [scores(fastnlp_ops, problem), loss(fastnlp_ops, problem), divergence(fastnlp_ops, problem)]
    others = torch.ones(3, 3, dtype=torch.bool, device=device)
    others[1, 2] = False
    for own, plain in zip(found, expected, strict=True):
        assert_same(own[others], plain[others])
        if math.isnan(bad):
            assert own[1, 2].isnan().any()
    for f, plain in zip((loss, divergence), slopes, strict=True):
        for own, x in zip(gradients(f, fastnlp_ops, problem, None, weights), plain, strict=True):
            assert_same(own.transpose(1, 2)[others], x.transpose(1, 2)[others])
            if math.isnan(bad) and f is loss:
                assert own[1, :, 2].isnan().any()
    ours = decode(fastnlp_ops, problem)[0]
    assert torch.equal(ours[others[ours[:, 0], ours[:, 1]]], spans[others[spans[:, 0], spans[:, 1]]])


@each_function
def test_some_inputs_ask_for_gradients(function, device):
    """Each input alone has the gradient that it has among all."""
    problem, leaves = make_problem(2, 15, 3, 4, device, shared=True, mask="left").leaves()
    weights = torch.randn(function(fastnlp_ops, problem).shape, device=device)
    expected = gradients(function, fastnlp_ops, problem, None, weights)
    for index in range(used(function, problem)):
        for number, leaf in enumerate(leaves):
            leaf.requires_grad_(number == index)
        (own,) = torch.autograd.grad(function(fastnlp_ops, problem), leaves[index], weights)
        assert_same(own, expected[index])
    with torch.no_grad():
        assert not function(fastnlp_ops, problem).requires_grad


@each_function
def test_rows_without_gradient(function, device):
    """A gradient of 0 from behind is a gradient of 0, whatever the scores are."""
    problem = make_problem(2, 20, 3, 4, device, std=30.0)
    value = function(fastnlp_ops, problem)
    weights = torch.zeros_like(value)
    weights[0, 1] = 1.0
    for own in gradients(function, fastnlp_ops, problem, None, weights):
        assert own[0, :, 1].any()
        own[0, :, 1] = 0
        assert not own.any()


def test_equal_passes(device):
    """The divergence of a pass from itself is 0 in value and gradient; that of passes that far disagree is finite."""
    problem = make_problem(2, 40, 3, 8, device, mask="left")
    same = problem.with_inputs(*problem.inputs[:4], *problem.inputs[:4])
    assert not divergence(fastnlp_ops, same).any()
    for own in gradients(divergence, fastnlp_ops, same, None, torch.ones(2, 3, device=device)):
        assert own.abs().max() <= 1e-7  # products of sigmoids, rounded apart
    far = problem_of(torch.full((1, 1, 4, 4), 1e30, device=device))
    far.second = (-far.q, far.k, None, None)
    assert divergence(fastnlp_ops, far).item() == pytest.approx(2e31, rel=1e-6)


def test_heads_are_independent(device):
    """RoPE turns by the position of a token (older bert4torch turned by the number of its head)."""
    problem = make_problem(2, 18, 4, 8, device, bias=True)
    order = torch.tensor([2, 0, 3, 1], device=device)
    permuted = problem.with_inputs(*(x[:, :, order] for x in problem.inputs))
    assert_same(scores(fastnlp_ops, permuted), scores(fastnlp_ops, problem)[:, order])


@pytest.mark.parametrize("shift", [-7, 1000, 10**6, 2**33])
def test_positions_far_out(shift, device):
    """Only differences of positions matter: float32 angles would be off by a turn."""
    problem = make_problem(2, 25, 2, 64, device)
    position = torch.arange(25, device=device).expand(2, 25)
    moved = dataclasses.replace(problem, position_ids=position + shift)
    s = torch.where(problem.valid, scores(fastnlp_ops, problem), 0)
    close = 1e-5 if abs(shift) < 2**30 else 1e-4  # 2^33 radians have 2^-20 left in float64
    assert torch.allclose(torch.where(problem.valid, scores(fastnlp_ops, moved), 0), s, atol=close)


@pytest.mark.parametrize("options", [{"n": 512, "H": 2, "d": 64}, {"n": 700, "H": 3, "d": 32, "shared": True}], ids=str)
def test_accuracy(options, device):
    """Scores to about 100: the loss within 1e-6 of float64, gradients within 1e-5 of the largest."""
    problem = make_problem(2, device=device, mask="left", labels=30, std=4.4, **options)
    exact = problem.to(torch.float64)
    s = scores(reference, exact)
    assert 60 < s[s.isfinite()].abs().max() < 160
    value, expected = loss(fastnlp_ops, problem).double(), loss(reference, exact)
    assert ((value - expected).abs() <= 1e-6 * expected.clamp(min=1)).all()
    ones = torch.ones_like(expected)
    pairs = zip(
        gradients(loss, fastnlp_ops, problem, None, ones), gradients(loss, reference, exact, None, ones), strict=True
    )
    for own, plain in pairs:
        assert (own.double() - plain).abs().max() <= 1e-5 * plain.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_accuracy_of_half(dtype, device):
    """Against float64 of the rounded inputs: the loss within 1e-3, gradients within half a unit of their dtype."""
    problem = make_problem(2, 200, 3, 64, device, dtype, mask="holes", labels=9)
    exact = problem.to(torch.float64)
    value, expected = loss(fastnlp_ops, problem).double(), loss(reference, exact)
    assert ((value - expected).abs() <= 1e-3 * expected.clamp(min=1)).all()
    ones = torch.ones_like(expected)
    pairs = zip(
        gradients(loss, fastnlp_ops, problem, None, ones), gradients(loss, reference, exact, None, ones), strict=True
    )
    for own, plain in pairs:
        assert ((own.double() - plain).abs() <= torch.finfo(dtype).eps * plain.abs() + 1e-3 * plain.abs().max()).all()


@pytest.mark.parametrize(("n", "H"), [(12, 10_000), (1030, 3)])
def test_sizes(n, H, device):
    """Ten thousand types (Efficient), and more tokens than the tables of 512 positions that ports build."""
    problem = make_problem(1, n, H, 16, device, shared=True, labels=1)
    for function in FUNCTIONS:
        check_forward(function, problem)
    check_backward(loss, problem)
    check_decode(problem, top_k=7)


def test_second_derivatives_by_parts(monkeypatch, device):
    """The reference behind second derivatives takes a few sequences at a time; how many changes nothing."""
    problem = make_problem(5, 9, 2, 4, device, dtype=torch.float64, shared=True, mask="holes", mask_zero=True)
    problem = problem.with_inputs(*(x.nan_to_num() for x in problem.inputs))

    def second(function):
        own, leaves = problem.leaves()
        leaves = leaves[: used(function, own)]
        value = function(fastnlp_ops, own)
        first = torch.autograd.grad(value[value.isfinite()].sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.sin().sum() for x in first), leaves)

    whole = [second(function) for function in FUNCTIONS]
    for cells in (1, 2 * 9 * 9 * 2):
        monkeypatch.setattr(glue, "_CELLS", cells)
        for function, expected in zip(FUNCTIONS, whole, strict=True):
            for own, x in zip(second(function), expected, strict=True):
                assert torch.allclose(own, x, rtol=1e-12, atol=1e-12)


def test_second_derivatives_read_no_invalid_cell(device):
    """What flows back into a cell of -inf may be NaN: derivatives of derivatives never see it either."""
    problem, leaves = make_problem(2, 9, 2, 4, device, mask="holes", shared=True).leaves()
    weights = torch.where(problem.valid, 1.0, math.nan).requires_grad_()
    s = scores(fastnlp_ops, problem)
    first = torch.autograd.grad(s, leaves[:4], weights, create_graph=True)
    for own in torch.autograd.grad(sum(x.nan_to_num().sin().sum() for x in first), [weights, *leaves[:2]]):
        assert own.isfinite().all() and own.any()


@pytest.mark.parametrize("output", [0, 1])
def test_one_of_the_two_sums(output, device):
    """The op has two outputs: each has its own gradient, which the loss adds up, to second order."""
    problem = make_problem(2, 8, 2, 4, device, dtype=torch.float64, labels=6)
    cells = torch.ops.fastnlp_ops.global_pointer_cells(problem.labels, None, 2, 2, 8, True, -1, False)

    def ours(q, k):
        return torch.ops.fastnlp_ops.global_pointer_loss(q, k, cells, *[None] * 4, True, True, -1, 0.5, True)[output]

    def plain(q, k):
        s = reference.global_pointer_scores(q, k, scale=0.5)
        positive = glue.reference.labelled_cells(problem.labels, 2, 2, 8)
        return glue.reference.log_sums(s.flatten(2), positive.flatten(2))[output]

    found = []
    for function in (ours, plain):
        q, k = (x.detach().clone().requires_grad_() for x in (problem.q, problem.k))
        first = torch.autograd.grad(function(q, k).cos().sum(), (q, k), create_graph=True)
        found.append([*first, *torch.autograd.grad((first[0] * first[1]).sum(), (q, k))])
    for own, expected in zip(*found, strict=True):
        assert torch.allclose(own, expected)


MEMORY = """
import resource, torch, fastnlp_ops
B, n, H, d = 1, {n}, {H}, 64
torch.manual_seed(0)
small = [torch.randn(1, 64, 1, d, requires_grad=True) for _ in range(2)]
fastnlp_ops.global_pointer_loss(*small, torch.zeros(0, 4, dtype=torch.int64)).backward()
q, k = (torch.randn(B, n, H, d, requires_grad=True) for _ in range(2))
labels = torch.randint(0, n, (B, H, 20, 2)).sort(-1).values
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss = fastnlp_ops.global_pointer_loss(q, k, labels)
loss.backward()
spans, _ = fastnlp_ops.global_pointer_decode(q.detach(), k.detach(), threshold=4.5)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(loss.item(), len(spans), (after - before) * 1024 / (q.nbytes + k.nbytes))
"""


@pytest.mark.parametrize(("n", "H"), [(2048, 4), pytest.param(8192, 4, marks=pytest.mark.long)])
def test_memory(n, H, device):
    """Forward, backward and decoding keep to a few times q and k, where the scores alone are n / 32 times them."""
    if device.type != "cpu":
        pytest.skip("the resident memory of a process says nothing of a GPU")
    command = [sys.executable, "-c", MEMORY.format(n=n, H=H)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    value, spans, growth = map(float, result.stdout.split())
    assert 0 < value < 1000 and spans > 0
    assert growth <= 3, f"memory grew by {growth:.1f} times q and k"
