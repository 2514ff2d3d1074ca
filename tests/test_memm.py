"""The MEMM functions against their reference, and both against enumeration."""

import itertools
import math

import pytest
import torch
from crf_problems import make_problem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tools import assert_same, assert_within_budget

import fastnlp_ops
from fastnlp_ops import reference
from fastnlp_ops.reference.memm import memm_chain

CASES = {
    "aligned": {"B": 8, "T": 16, "N": 32},
    "ragged": {"B": 5, "T": 23, "N": 9, "mask": "prefix"},
    "left": {"B": 4, "T": 12, "N": 8, "mask": "left"},
    "prime": {"B": 7, "T": 13, "N": 17, "mask": "holes"},
    "one": {"B": 1, "T": 1, "N": 1},
    "one_step": {"B": 3, "T": 1, "N": 6},
    "one_tag": {"B": 3, "T": 6, "N": 1, "mask": "holes"},
    "no_sequence": {"B": 0, "T": 4, "N": 3},
    "no_step": {"B": 3, "T": 0, "N": 4},
    "banned": {"B": 6, "T": 15, "N": 7, "mask": "holes", "ban": 0.4},
    "peaked": {"B": 4, "T": 40, "N": 10, "std": 100.0, "ban": 0.3},
    "wide": {"B": 2, "T": 5, "N": 130, "mask": "prefix"},
    "blocks": {"B": 3, "T": 700, "N": 5, "mask": "holes"},  # three items of 256 steps for each sequence
    "long": {"B": 1, "T": 1025, "N": 3},
}
SMALL = ["left", "prime", "one", "one_tag", "no_step", "banned"]

each_case = pytest.mark.parametrize("case", CASES)
each_direction = pytest.mark.parametrize("bidirectional", [True, False], ids=["both", "forward"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def problem_of(case, device, dtype=torch.float32, **options):
    return make_problem(device=device, dtype=dtype, bounds=False, **{**CASES[case], **options})


def log_likelihood(module, problem, bidirectional=True):
    scores = problem.emissions, problem.tags, problem.transitions
    return module.memm_log_likelihood(*scores, mask=problem.mask, bidirectional=bidirectional)


def viterbi(module, problem, bidirectional=True, n_best=1):
    scores = problem.emissions, problem.transitions
    return module.memm_viterbi(*scores, mask=problem.mask, bidirectional=bidirectional, n_best=n_best)


def gradients(module, problem, bidirectional, weights, dtype=None):
    problem, leaves = problem.leaves(dtype)
    value = log_likelihood(module, problem, bidirectional)
    return torch.autograd.grad(value, leaves, weights.to(value.dtype), materialize_grads=True)


def every_log_p(emissions, transitions, bidirectional):
    """All paths of one sequence [L, N] and their log-probabilities, step by step from the definition."""
    L, N = emissions.shape
    paths = list(itertools.product(range(N), repeat=L))
    values = []
    for path in paths:
        forward, backward = 0.0, 0.0
        for k, tag in enumerate(path):
            given = emissions[k] if k == 0 else (emissions[k] + transitions[path[k - 1]]) / 2
            forward += given.log_softmax(0)[tag].item()
            given = emissions[k] if k == L - 1 else (emissions[k] + transitions[:, path[k + 1]]) / 2
            backward += given.log_softmax(0)[tag].item()
        values.append((forward + backward) / 2 if bidirectional else forward)
    return torch.tensor(paths).reshape(len(paths), L), torch.tensor(values, dtype=torch.float64)


@each_direction
@each_dtype
@each_case
def test_forward(case, dtype, bidirectional, device):
    problem = problem_of(case, device, dtype)
    assert_within_budget(
        log_likelihood(fastnlp_ops, problem, bidirectional),
        log_likelihood(reference, problem.to(torch.float32), bidirectional),
        log_likelihood(reference, problem.to(torch.float64), bidirectional),
        "log-likelihood",
    )


@each_direction
@each_dtype
@each_case
def test_backward(case, dtype, bidirectional, device):
    problem = problem_of(case, device, dtype)
    weights = torch.randn(problem.batch, dtype=torch.float64, device=device)
    weights[:1] = 0
    weights = weights.to(dtype).double()
    ours = gradients(fastnlp_ops, problem, bidirectional, weights)
    plain = gradients(reference, problem, bidirectional, weights, torch.float32)
    exact = gradients(reference, problem, bidirectional, weights, torch.float64)
    for name, *three in zip(["demissions", "dtransitions"], ours, plain, exact, strict=True):
        assert_within_budget(*three, name)


@each_direction
@pytest.mark.parametrize("case", SMALL)
def test_gradcheck(case, bidirectional, device):
    problem, leaves = problem_of(case, device, torch.float64, ban=0.0, poison=False).leaves()

    def function(emissions, transitions):
        scores = problem.with_scores(emissions, transitions, None, None)
        return log_likelihood(fastnlp_ops, scores, bidirectional)

    assert torch.autograd.gradcheck(function, leaves)


@each_direction
@pytest.mark.parametrize("case", ["left", "one", "one_tag", "no_step"])
def test_gradgradcheck(case, bidirectional, device):
    problem, leaves = problem_of(case, device, torch.float64, N=3, T=4, B=2, poison=False).leaves()

    def function(emissions, transitions):
        scores = problem.with_scores(emissions, transitions, None, None)
        return log_likelihood(fastnlp_ops, scores, bidirectional)

    assert torch.autograd.gradgradcheck(function, leaves)


def test_gradgrad_of_banned(device):
    """Second derivatives are finite where transitions are -inf, and where the gold path is forbidden."""
    problem, leaves = problem_of("banned", device, torch.float64).leaves()
    first = torch.autograd.grad(log_likelihood(fastnlp_ops, problem).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum((grad * torch.randn_like(grad)).sum() for grad in first), leaves)
    plain = torch.autograd.grad(log_likelihood(reference, problem).sum(), leaves, create_graph=True)
    for ours, theirs in zip(first, plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(grad.isfinite().all() for grad in second)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("op", ["memm_log_likelihood", "memm_log_likelihood_backward"])
def test_opcheck(op, masked, device):
    problem, leaves = problem_of("left" if masked else "aligned", device, poison=False).leaves()
    arguments = (leaves[0], problem.tags, leaves[1], problem.mask, True)
    if op.endswith("backward"):
        arguments = (torch.randn(problem.batch, device=device, requires_grad=True), *arguments, True)
    # test_aot_dispatch_dynamic asks for second derivatives inside a compiled graph, which torch itself does not have.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        getattr(torch.ops.fastnlp_ops, op), arguments, test_utils=utilities[: 3 if op.endswith("backward") else 4]
    )


@each_direction
def test_compile(bidirectional, device):
    def step(emissions, tags, transitions, mask):
        loss = -fastnlp_ops.memm_log_likelihood(emissions, tags, transitions, mask=mask, bidirectional=bidirectional)
        return loss, fastnlp_ops.memm_viterbi(emissions, transitions, mask=mask, bidirectional=bidirectional)[0]

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, T in ((3, 9), (5, 14), (2, 6)):
        problem, leaves = make_problem(B, T, 7, device, mask="holes", bounds=False).leaves()
        expected = step(leaves[0], problem.tags, leaves[1], problem.mask)
        actual = compiled(leaves[0], problem.tags, leaves[1], problem.mask)
        for ours, theirs in zip(actual, expected, strict=True):
            assert_same(ours, theirs)
        ours, theirs = (torch.autograd.grad(loss.sum(), leaves) for loss in (actual[0], expected[0]))
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)


def test_layouts(device):
    problem = problem_of("prime", device, T=12)
    expected = log_likelihood(fastnlp_ops, problem)
    best = viterbi(fastnlp_ops, problem)[0]
    e, T = problem.emissions, problem.transitions
    emissions = [e.transpose(0, 1).contiguous().transpose(0, 1), e.mT.contiguous().mT, e.repeat(1, 1, 2)[:, :, :17]]
    transitions = [T.t().contiguous().t(), T.repeat(1, 2)[:, :17]]
    masks = [problem.mask.to(dtype) for dtype in (torch.uint8, torch.int64, torch.float32)]
    masks += [problem.mask.t().contiguous().t()]
    tags = [problem.tags.int(), problem.tags.t().contiguous().t(), problem.tags.to(torch.int16)]
    for e in emissions:
        assert_same(fastnlp_ops.memm_log_likelihood(e, problem.tags, T, mask=problem.mask), expected)
        assert_same(fastnlp_ops.memm_viterbi(e, T, mask=problem.mask)[0], best)
    for matrix in transitions:
        assert_same(fastnlp_ops.memm_log_likelihood(e, problem.tags, matrix, mask=problem.mask), expected)
    for mask in masks:
        assert_same(fastnlp_ops.memm_log_likelihood(e, problem.tags, T, mask=mask), expected)
        assert_same(fastnlp_ops.memm_viterbi(e, T, mask=mask)[0], best)
    for y in tags:
        assert_same(fastnlp_ops.memm_log_likelihood(e, y, T, mask=problem.mask), expected)
    one = make_problem(1, 7, 5, device, bounds=False)
    many = fastnlp_ops.memm_log_likelihood(one.emissions.expand(4, -1, -1), one.tags.expand(4, -1), one.transitions)
    assert_same(many, log_likelihood(fastnlp_ops, one).expand(4))
    ones = torch.ones(1, 7, device=device)
    assert_same(
        fastnlp_ops.memm_log_likelihood(one.emissions, one.tags, one.transitions, mask=ones),
        log_likelihood(fastnlp_ops, one),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("case", ["aligned", "prime", "blocks", "wide"])
def test_half(case, dtype, device):
    """Half emissions give the values of the same numbers in float32; gradients are those, rounded once."""
    problem = problem_of(case, device, dtype)
    full = problem.to(torch.float32)
    assert_same(log_likelihood(fastnlp_ops, problem), log_likelihood(fastnlp_ops, full))
    weights = torch.randn(problem.batch, device=device)
    ours = gradients(fastnlp_ops, problem, True, weights)
    wide = gradients(fastnlp_ops, full, True, weights)
    assert_same(ours[0], wide[0].to(dtype), "demissions")
    assert ours[1].dtype == dtype
    assert_same(ours[1], wide[1].to(dtype), "dtransitions")


def test_only_one_gradient(device):
    problem, (emissions, transitions) = problem_of("prime", device).leaves()
    both = torch.autograd.grad(log_likelihood(fastnlp_ops, problem).sum(), (emissions, transitions))
    for leaf, other, expected in ((emissions, transitions, both[0]), (transitions, emissions, both[1])):
        other.requires_grad_(False)
        assert_same(torch.autograd.grad(log_likelihood(fastnlp_ops, problem).sum(), leaf)[0], expected)
        other.requires_grad_()


def test_errors(device):
    e, y, T = torch.zeros(2, 3, 4, device=device), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 4)
    y, T = y.to(device), T.to(device)
    likelihood, decode, layer = fastnlp_ops.memm_log_likelihood, fastnlp_ops.memm_viterbi, fastnlp_ops.MEMM
    cases = [
        (lambda: likelihood(e[0], y, T), ValueError, "emissions must be [B, T, N], got shape (3, 4)"),
        (lambda: decode(e[0], T), ValueError, "emissions must be [B, T, N], got shape (3, 4)"),
        (lambda: likelihood(e, y, T[:3]), ValueError, None),
        (lambda: likelihood(e, y, T[None, None]), ValueError, "transitions must be [N, N], got shape (1, 1, 4, 4)"),
        (lambda: likelihood(e, y[:1], T), ValueError, "tags must be [B, T] = (2, 3), got shape (1, 3)"),
        (lambda: likelihood(e, y.float(), T), TypeError, "tags must be integers, got torch.float32"),
        (lambda: likelihood(e, y, T, mask=y[:1]), ValueError, "mask must be [B, T] = (2, 3), got shape (1, 3)"),
        (lambda: likelihood(e.long(), y, T), TypeError, None),
        (lambda: decode(e, T, n_best=0), ValueError, "n_best must be at least 1, got 0"),
        (lambda: layer(0), ValueError, "num_tags must be at least 1, got 0"),
        (lambda: layer(3, hidden_dim=0), ValueError, "hidden_dim must be at least 1, got 0"),
        (lambda: layer(3).to(device)(e, y), ValueError, "emissions must be [T, B, 3], got shape (2, 3, 4)"),
        (lambda: layer(4).to(device)(e, y, None, "max"), ValueError, "invalid reduction: max"),
    ]
    for call, kind, sentence in cases:
        with pytest.raises(kind) as error:
            call()
        if sentence is not None:
            assert str(error.value) == sentence


def test_tags_out_of_range(device):
    problem, leaves = problem_of("left", device, poison=False).leaves()
    problem.mask[:, -1] = True
    problem.tags[2, -1] = 8
    if device.type == "cpu":
        sentence = "tags must be in [0, 8), got tag 8 at sequence 2, step 11"
        with pytest.raises(ValueError) as error:
            log_likelihood(fastnlp_ops, problem)
        assert str(error.value) == sentence
        with pytest.raises(ValueError) as error:
            torch.ops.fastnlp_ops.memm_log_likelihood_backward(
                torch.ones(4), leaves[0].detach(), problem.tags, leaves[1].detach(), problem.mask, True, True
            )
        assert str(error.value) == sentence
    for module in [reference] if device.type == "cpu" else [reference, fastnlp_ops]:
        value = log_likelihood(module, problem)
        assert value.isnan().tolist() == [False, False, True, False]
        demissions = torch.autograd.grad(value.sum(), leaves[0])[0]
        assert demissions[2][problem.mask[2]].isnan().all()
        assert demissions[[0, 1, 3]].isfinite().all()


def test_repeatable(device, threads):
    problem = make_problem(9, 300, 13, device, mask="holes", bounds=False)
    weights = torch.randn(9, device=device)
    runs = []
    for count in (1, 2, 5, 1):
        threads(count)
        value, grads = log_likelihood(fastnlp_ops, problem), gradients(fastnlp_ops, problem, True, weights)
        runs.append([value, *grads, *viterbi(fastnlp_ops, problem)])
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert_same(a, b)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 4),
    st.integers(0, 9),
    st.integers(1, 40),
    st.sampled_from([None, "prefix", "left", "holes"]),
    st.sampled_from([0.0, 0.3, 0.9]),
    st.sampled_from([0.1, 1.0, 100.0]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_fuzz(device, B, T, N, mask, ban, std, bidirectional, seed):
    torch.manual_seed(seed)
    problem = make_problem(B, T, N, device, mask=mask, bounds=False, ban=ban, std=std)
    exact = log_likelihood(reference, problem.to(torch.float64), bidirectional)
    plain = log_likelihood(reference, problem.to(torch.float32), bidirectional)
    assert_within_budget(log_likelihood(fastnlp_ops, problem, bidirectional), plain, exact)
    weights = torch.randn(B, device=device).double()
    three = (
        gradients(module, problem, bidirectional, weights, dtype)
        for module, dtype in ((fastnlp_ops, None), (reference, torch.float32), (reference, torch.float64))
    )
    for name, *grads in zip(["demissions", "dtransitions"], *three, strict=True):
        assert_within_budget(*grads, name)
    # The best path's score is the log-likelihood that it would have as gold.
    paths, scores = viterbi(fastnlp_ops, problem.to(torch.float64), bidirectional)
    possible = scores > -math.inf
    problem.tags = torch.where(paths < 0, 0, paths)
    again = log_likelihood(reference, problem.to(torch.float64), bidirectional)
    torch.testing.assert_close(scores[possible], again[possible], rtol=1e-9, atol=1e-9)


@each_direction
@pytest.mark.parametrize("case", ["left", "prime", "one", "one_step", "one_tag", "banned", "no_step"])
def test_brute_force(case, bidirectional, device):
    """Log-likelihood, best and n best paths against the enumeration of all paths, in float64."""
    options = {"N": min(3, CASES[case]["N"]), "T": min(5, CASES[case]["T"])}
    problem = problem_of(case, device, torch.float64, **options)
    value = log_likelihood(fastnlp_ops, problem, bidirectional)
    paths, scores = viterbi(fastnlp_ops, problem, bidirectional)
    n_paths, n_scores = viterbi(fastnlp_ops, problem, bidirectional, n_best=4)
    chain, half = memm_chain(problem.emissions, problem.transitions, mask=problem.mask, bidirectional=bidirectional)
    for b in range(problem.batch):
        emissions, tags, transitions, steps = problem.single(b)
        if len(steps) == 0:
            assert value[b] == scores[b] == 0
            assert (paths[b] == -1).all()
            continue
        all_paths, log_p = every_log_p(emissions.cpu(), transitions.cpu(), bidirectional)
        log_p = log_p.nan_to_num(nan=-math.inf, neginf=-math.inf)  # a step with no possible tag
        own = {tuple(path): p for path, p in zip(all_paths.tolist(), log_p.tolist(), strict=True)}
        assert value[b].item() == pytest.approx(own[tuple(tags.tolist())], abs=1e-10)
        if not bidirectional and problem.transitions.isfinite().all():
            assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-10)
        for path, p in own.items():  # the score of a path on the chain is its log-probability
            score = chain[b, steps, list(path)].sum() + half[list(path[:-1]), list(path[1:])].sum()
            assert score.item() == pytest.approx(p, abs=1e-10)
        assert scores[b].item() == pytest.approx(log_p.max().item(), abs=1e-10)
        if scores[b] > -math.inf:
            assert own[tuple(paths[b, steps].tolist())] == pytest.approx(log_p.max().item(), abs=1e-10)
        best = log_p.sort(descending=True).values
        for rank in range(min(4, len(best))):
            assert n_scores[b, rank].item() == pytest.approx(best[rank].item(), abs=1e-10)
            if best[rank] > -math.inf:
                assert own[tuple(n_paths[b, rank, steps].tolist())] == pytest.approx(best[rank].item(), abs=1e-10)


def test_ties_go_to_the_lowest_tag(device):
    paths, _ = fastnlp_ops.memm_viterbi(torch.zeros(2, 5, 4, device=device), torch.zeros(4, 4, device=device))
    assert paths.eq(0).all()


@pytest.mark.parametrize("N", [5, 257])  # 257: more terms than one temporary takes
def test_scores_far_apart(N, device):
    """A forbidden transition, and a tag whose likely successor is 3000 nats away: normalisers by the log domain."""
    problem = make_problem(2, 40, N, device, mask="holes", bounds=False)
    problem.transitions[0, 1:] = -6000.0
    problem.emissions[:, :, 0] -= 3000.0
    problem.transitions[1, 1] = -math.inf
    for bidirectional in (True, False):
        paths, scores = viterbi(fastnlp_ops, problem, bidirectional)
        expected, expected_scores = viterbi(reference, problem.to(torch.float64), bidirectional)
        torch.testing.assert_close(scores.double(), expected_scores, rtol=1e-5, atol=1e-3)
        assert (paths == expected).float().mean() > 0.99


def test_inputs_are_not_changed(device):
    problem = problem_of("prime", device)
    before = [x.clone() for x in (problem.emissions, problem.tags, problem.transitions, problem.mask)]
    gradients(fastnlp_ops, problem, True, torch.ones(problem.batch, device=device))
    viterbi(fastnlp_ops, problem)
    for a, b in zip((problem.emissions, problem.tags, problem.transitions, problem.mask), before, strict=True):
        assert_same(a, b)


def test_nan_stays_in_its_sequence(device):
    problem, leaves = make_problem(4, 6, 5, device, bounds=False).leaves()
    with torch.no_grad():
        leaves[0][1, 3, 2] = math.nan
    value = log_likelihood(fastnlp_ops, problem)
    assert value.isnan().tolist() == [False, True, False, False]
    demissions = torch.autograd.grad(value.sum(), leaves[0])[0]
    assert demissions[[0, 2, 3]].isfinite().all()
