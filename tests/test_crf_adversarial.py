"""Inputs that break CRF implementations: sizes, scales, bans, ties, and the ways in which a training loop calls."""

import math

import pytest
import torch
from crf_problems import (
    FUNCTIONS,
    check_backward,
    check_forward,
    entropy,
    gradients,
    log_likelihood,
    log_partition,
    make_problem,
    marginals,
    partial_log_likelihood,
)
from tools import assert_same

import fastnlp_ops
from fastnlp_ops import reference

INF = math.inf
VALUES = [log_partition, log_likelihood, partial_log_likelihood]
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)


def assert_accurate(problem, lead=0.0):
    """The goals of the project: |log Z - float64| <= 1e-6 |log Z| + 1e-4, marginals that sum to 1 within 1e-5.

    Gradients within the error rule, and within a float32 spacing of the largest score: messages are float32 numbers
    relative to the largest one, and the error of a message is the relative error of a probability. `lead`: the largest
    message is this far above those that count in the end.
    """
    spacing = torch.finfo(torch.float32).eps
    ours = log_partition(fastnlp_ops, problem)
    exact = log_partition(reference, problem.to(torch.float64))
    assert exact.isfinite().all()
    error = (ours.double() - exact).abs()
    assert (error <= 1e-6 * exact.abs() + 1e-4 + lead * spacing).all(), f"log Z is off by {error.max().item():.3g}"
    sums = marginals(fastnlp_ops, problem).double().sum(2)
    assert (sums - 1).abs().max() <= 1e-5, f"marginals sum to {sums.flatten()[(sums - 1).abs().argmax()].item():.6f}"
    weights = torch.ones_like(exact)
    plain = gradients(log_likelihood, reference, problem, torch.float32, weights)
    exact = gradients(log_likelihood, reference, problem, torch.float64, weights)
    ours = gradients(log_likelihood, fastnlp_ops, problem, None, weights)
    size = problem.emissions.abs().max().item()
    for name, gradient, reference_gradient, right in zip(NAMES, ours, plain, exact, strict=True):
        # Sums of as many probabilities as there are sequences and, for transitions, steps.
        terms = problem.emissions.shape[0] * (problem.emissions.shape[1] if name == "dtransitions" else 1)
        slack = spacing * size * (1 if name == "demissions" else terms)
        budget = 2 * (reference_gradient.double() - right).abs().max().item() + 4 * spacing * terms + slack
        error = (gradient.double() - right).abs().max().item()
        assert error <= budget, f"{name} is off by {error:.3g}, allowed is {budget:.3g}"


NAMES = ["demissions", "dtransitions", "dstart_transitions", "dend_transitions"]
SIZES = [1, 2, 9, 31, 32, 33, 50, 64, 65, 127, 128, 129, 256, 257]


@pytest.mark.parametrize("N", SIZES + [pytest.param(N, marks=pytest.mark.long) for N in (500, 1024)])
def test_numbers_of_tags(N, device):
    """Around every power of two that a kernel may tile by."""
    problem = make_problem(3, 6 if N < 100 else 3, N, device, mask="left", ban=0.1)
    check_forward(log_partition, problem)
    check_backward(log_likelihood, problem)
    check_forward(entropy, problem)
    expected = reference.crf_viterbi(*problem.scores, mask=problem.mask)[0]
    assert_same(fastnlp_ops.crf_viterbi(*problem.scores, mask=problem.mask)[0], expected)


@pytest.mark.parametrize("N", [500, 1024])
def test_many_tags(N, device):
    """Two sequences of two steps are one matrix of transitions: enumerated here without the reference."""
    problem = make_problem(2, 2, N, device, dtype=torch.float64)
    emissions, transitions, start, end = problem.scores
    pair = (start + emissions[:, 0])[:, :, None] + transitions + (emissions[:, 1] + end)[:, None, :]  # [B, N, N]
    single = problem.to(torch.float32)
    log_z = pair.flatten(1).logsumexp(1)
    value = log_partition(fastnlp_ops, single)
    # log Z is about 15: a few spacings of float32, and the logarithm of sums of N terms.
    torch.testing.assert_close(value.double(), log_z, rtol=1e-6, atol=0)
    p = (pair - log_z[:, None, None]).exp()
    demissions, dtransitions, dstart, dend = gradients(
        log_partition, fastnlp_ops, single, None, torch.ones(2, device=device)
    )
    close = {"rtol": 2e-5, "atol": 1e-9}  # probabilities as float32 sums and exponentials of numbers near 15
    torch.testing.assert_close(demissions.double(), torch.stack([p.sum(2), p.sum(1)], 1), **close)
    torch.testing.assert_close(dtransitions.double(), p.sum(0), **close)
    torch.testing.assert_close(dstart.double(), p.sum((0, 2)), **close)
    torch.testing.assert_close(dend.double(), p.sum((0, 1)), **close)
    best = fastnlp_ops.crf_viterbi(*single.scores)[0]
    assert_same(best[:, 0] * N + best[:, 1], pair.flatten(1).argmax(1))


def matrix_chain_log_partition(problem):
    """log Z [B] in float64 by a tree of matrix products in the log semiring: depth log T instead of T."""
    emissions, transitions, start, end = problem.to(torch.float64).scores
    steps = transitions + emissions[:, 1:, None, :]  # [B, T-1, N, N]
    while steps.shape[1] > 1:
        odd = steps[:, -1:] if steps.shape[1] % 2 else steps[:, :0]
        left, right = steps[:, 0 : steps.shape[1] // 2 * 2 : 2], steps[:, 1::2]
        steps = torch.cat([torch.logsumexp(left[..., None] + right[:, :, None], 3), odd], 1)
    return torch.logsumexp((start + emissions[:, 0])[:, :, None] + steps[:, 0] + end, (1, 2))


@pytest.mark.parametrize(("T", "N"), [(65537, 3), (20001, 7)])
def test_long_sequences(T, N, device):
    """Longer than a 16-bit step, with drifting scores: offsets must not lose the fraction."""
    problem = make_problem(2, T, N, device)
    problem.emissions += 3
    exact_log_z = matrix_chain_log_partition(problem)
    value = log_partition(fastnlp_ops, problem)
    assert ((value.double() - exact_log_z).abs() <= 1e-6 * exact_log_z.abs() + 1e-4).all()
    probabilities = marginals(fastnlp_ops, problem)
    assert (probabilities.sum(2) - 1).abs().max() <= 1e-5
    # Far from the ends a marginal knows nothing of them: that of the middle alone, computed in float64.
    middle = slice(T // 2 - 100, T // 2 + 100)
    exact = reference.crf_marginals(problem.emissions[:, middle].double(), problem.transitions.double())
    assert (probabilities[:, middle][:, 50:-50].double() - exact[:, 50:-50]).abs().max() <= 1e-5
    paths, scores = fastnlp_ops.crf_viterbi(*problem.scores)
    own = reference.crf_score(problem.emissions.double(), paths, *(s.double() for s in problem.scores[1:]))
    # T additions of float32, as pytorch-crf adds: random roundings by half a spacing of sums that grow to `own`.
    slack = 16 * math.sqrt(T) * 2**-24 * own.abs()
    assert ((scores.double() - own).abs() <= slack).all()
    assert (own <= exact_log_z).all()


BIO = ["O", "B-A", "I-A", "B-B", "I-B", "B-C", "I-C", "B-D", "I-D"]


def bio_problem(B, T, labels, device, std, ban):
    """Random emissions under BIO constraints, with gold tags that a legal path has."""
    problem = make_problem(B, T, len(labels), device, std=std)
    allowed, starts, _ = (table.to(device) for table in fastnlp_ops.transition_mask(labels, "BIO"))
    problem.transitions[~allowed] = ban
    problem.start[~starts] = ban
    problem.tags = torch.zeros_like(problem.tags)
    return problem


@pytest.mark.parametrize("ban", [-INF, -1e4], ids=["inf", "1e4"])
@pytest.mark.parametrize("std", [1, 30, 100, 3e4])
@pytest.mark.parametrize(("T", "types"), [(128, 4), pytest.param(512, 16, marks=pytest.mark.long)])
def test_accuracy(T, types, std, ban, device):
    """Plain scaled exponentials are off by 2.8 nats at std 30 with bans, and -inf at 100."""
    labels = ["O", *(f"{prefix}-{kind}" for kind in range(types) for prefix in "BI")]
    assert_accurate(bio_problem(2, T, labels, device, std, ban))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_largest_half_numbers(dtype, device):
    """Emissions of the largest finite half numbers, both signs: 65504 in float16."""
    problem = bio_problem(3, 20, BIO, device, 1.0, -INF)
    signs = torch.randint(-1, 2, problem.emissions.shape, device=device)
    large = signs * (torch.finfo(torch.float16).max if dtype is torch.float16 else 3e4)
    half = problem.with_scores(large.to(dtype), *problem.scores[1:])
    assert_accurate(problem.with_scores(half.emissions.float(), *problem.scores[1:]))
    assert_same(
        log_likelihood(fastnlp_ops, half),
        log_likelihood(fastnlp_ops, problem.with_scores(half.emissions.float(), *problem.scores[1:])),
    )


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("lead", [20.0, 80.0, 200.0, 1e4])
@pytest.mark.parametrize("T", [2, 3, 8, 9])
def test_dominating_state_is_killed(direction, lead, T, device):
    """A tag leads by `lead` nats, so that all others vanish beside it, and then it may not go on (or be come from)."""
    problem = make_problem(3, T, 5, device)
    emissions = problem.emissions
    if direction == "forward":
        emissions[:, T // 2 - 1, 2] += lead
        problem.transitions[2, :] = -INF
    else:
        emissions[:, (T + 1) // 2, 2] += lead
        problem.transitions[:, 2] = -INF
    problem.tags = problem.tags % 2
    # The goal for log Z stands without `lead` up to 200 nats; a dead leader of 1e4 costs messages their fraction.
    assert_accurate(problem, lead=lead if lead > 200 else 0)


@pytest.mark.parametrize("N", [2, 9, 40])
def test_dominating_state_is_killed_at_every_step(N, device):
    """Every step favours a tag by 150 nats that the next step forbids, at per-position transitions."""
    problem = make_problem(4, 12, N, device, per_position=True)
    for t in range(12):
        problem.emissions[:, t, t % N] += 150
        if t < 11:
            problem.transitions[:, t, t % N] = -INF
    problem.tags[:] = (torch.arange(12, device=device) + 1) % N
    assert_accurate(problem)


@pytest.mark.parametrize("what", ["emissions", "transitions", "start", "end", "one step"])
@pytest.mark.parametrize("std", [1.0, 100.0])
def test_all_forbidden(what, std, device):
    """log Z = -inf: log-likelihood -inf, marginals, entropy and all gradients exactly 0, nothing NaN."""
    problem = make_problem(3, 5, 4, device, std=std)
    if what == "one step":
        problem.emissions[:, 3] = -INF
    else:
        getattr(problem, what)[...] = -INF
    for function in VALUES:
        assert_same(function(fastnlp_ops, problem), torch.full((3,), -INF, device=device))
        for gradient in gradients(function, fastnlp_ops, problem, None, torch.randn(3, device=device)):
            assert (gradient == 0).all()
    assert_same(marginals(fastnlp_ops, problem), torch.zeros(3, 5, 4, device=device))
    assert_same(entropy(fastnlp_ops, problem), torch.zeros(3, device=device))
    paths, scores = fastnlp_ops.crf_viterbi(*problem.scores)
    assert (scores == -INF).all()
    assert ((paths >= 0) & (paths < 4)).all()


@pytest.mark.parametrize("batch", [3, 12])
def test_one_of_the_batch_is_forbidden(batch, device):
    """The others do not notice, in values and gradients."""
    problem = make_problem(batch, 6, 5, device)
    problem.emissions[1, 3] = -INF
    kept = [b for b in range(batch) if b != 1]
    others = problem.with_scores(problem.emissions[kept], *problem.scores[1:])
    others.tags, others.allowed = problem.tags[kept], problem.allowed[kept]
    for function in VALUES:
        value = function(fastnlp_ops, problem)
        assert_same(value[kept], function(fastnlp_ops, others))
        weights = torch.randn(batch, device=device)
        whole = gradients(function, fastnlp_ops, problem, None, weights)
        part = gradients(function, fastnlp_ops, others, None, weights[kept])
        assert_same(whole[0][kept], part[0])
        for ours, expected in zip(whole[1:], part[1:], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)  # summed in another order, if so


def test_everything_equally_bad(device):
    """All scores -1e4: a plain exponential underflows everywhere. The distribution is uniform."""
    problem = make_problem(2, 50, 7, device)
    for score in problem.scores:
        score[...] = -1e4
    # 50 emissions, 49 transitions and two bounds of -1e4, and 7^50 paths.
    log_z = -1e4 * 101 + 50 * math.log(7)
    assert abs(log_partition(fastnlp_ops, problem)[0].item() - log_z) <= 1e-6 * abs(log_z)
    assert (marginals(fastnlp_ops, problem) - 1 / 7).abs().max() < 1e-6
    assert abs(entropy(fastnlp_ops, problem)[0].item() - 50 * math.log(7)) < 1e-4
    assert_accurate(problem)


def test_forbidden_gold_path(device):
    """Loss +inf, and the gradient indicator - marginals: finite, right, and its own derivative too."""
    problem = make_problem(3, 5, 4, device, dtype=torch.float64)
    problem.transitions[1, 2] = -INF
    problem.tags[0] = torch.tensor([0, 1, 2, 0, 3], device=device)
    problem.tags[1:] = torch.tensor([3, 3, 0, 0, 1], device=device)
    value = log_likelihood(fastnlp_ops, problem)
    assert value.isfinite().tolist() == [False, True, True]
    assert value[0] == -INF
    weights = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64, device=device)
    demissions = gradients(log_likelihood, fastnlp_ops, problem, None, weights)[0]
    indicator = torch.nn.functional.one_hot(problem.tags, 4)
    expected = weights[:, None, None] * (indicator - reference.crf_marginals(*problem.scores))
    torch.testing.assert_close(demissions, expected, rtol=0, atol=1e-12)

    def second_derivatives(module):
        leaf_problem, leaves = problem.leaves()
        value = log_likelihood(module, leaf_problem)
        first = torch.autograd.grad(value, leaves, weights, create_graph=True)
        return torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), leaves)

    for ours, expected in zip(second_derivatives(fastnlp_ops), second_derivatives(reference), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", VALUES, ids=lambda function: function.__name__)
def test_nan_stays_in_its_sequence(function, device):
    """NaN in a valid emission: that sequence is NaN, the others have the same bits as without it."""
    problem = make_problem(4, 6, 5, device)
    expected = function(fastnlp_ops, problem)
    weights = torch.ones(4, device=device)
    clean = gradients(function, fastnlp_ops, problem, None, weights)[0]
    problem.emissions[1, 3, 2] = math.nan
    problem.allowed[1, 3, 2] = True
    value = function(fastnlp_ops, problem)
    assert value.isnan().tolist() == [False, True, False, False]
    assert_same(value[[0, 2, 3]], expected[[0, 2, 3]])
    demissions = gradients(function, fastnlp_ops, problem, None, weights)[0]
    assert_same(demissions[[0, 2, 3]], clean[[0, 2, 3]])


def test_exact_ties(device):
    """Equal scores everywhere, and integer scores with many equal paths: the lowest tag at every step, from the end."""
    N = 6
    zeros = torch.zeros(3, 5, N, device=device), torch.zeros(N, N, device=device)
    assert (fastnlp_ops.crf_viterbi(*zeros)[0] == 0).all()
    for _ in range(20):
        emissions = torch.randint(-1, 2, (8, 7, N), device=device).float()
        transitions = torch.randint(-1, 2, (N, N), device=device).float()
        expected = reference.crf_viterbi(emissions.double(), transitions.double())
        paths, scores = fastnlp_ops.crf_viterbi(emissions, transitions)
        assert_same(paths, expected[0])
        assert_same(scores.double(), expected[1])


def test_zero_upstream(device):
    """A weight of 0 gives 0 in float32, even where the gold path is forbidden and the loss is infinite."""
    problem = make_problem(3, 5, 4, device)
    problem.transitions[1, 2] = -INF
    problem.tags[0] = torch.tensor([0, 1, 2, 0, 3], device=device)
    for function in VALUES:
        for gradient in gradients(function, fastnlp_ops, problem, None, torch.zeros(3, device=device)):
            assert (gradient == 0).all()


@each_function
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_frozen_arguments(function, packed, device):
    """Any subset of the scores may need gradients: the others get none and the result is the same."""
    problem = make_problem(4, 6, 5, device, mask="holes", packed=packed)
    expected_value = function(fastnlp_ops, problem)
    weights = torch.randn_like(expected_value)
    expected = gradients(function, fastnlp_ops, problem, None, weights)
    for pattern in range(1, 16):
        scores = [
            score.detach().clone().requires_grad_(bool(pattern >> i & 1)) for i, score in enumerate(problem.scores)
        ]
        value = function(fastnlp_ops, problem.with_scores(*scores))
        assert_same(value.detach(), expected_value)
        value.backward(weights)
        for i, score in enumerate(scores):
            if pattern >> i & 1:
                assert_same(score.grad, expected[i])
            else:
                assert score.grad is None


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("function", [log_partition, log_likelihood, entropy], ids=lambda function: function.__name__)
def test_vmap(function, device):
    """Over emissions and transitions: an ensemble of models on one batch."""
    problems = [make_problem(3, 5, 4, device) for _ in range(4)]
    emissions = torch.stack([problem.emissions for problem in problems])
    transitions = torch.stack([problem.transitions for problem in problems])
    one = problems[0]

    def call(emissions, transitions):
        return function(fastnlp_ops, one.with_scores(emissions, transitions, one.start, one.end))

    together = torch.vmap(call)(emissions, transitions)
    for ours, *scores in zip(together, emissions, transitions, strict=True):
        assert_same(ours, call(*scores))


@each_function
def test_no_grad(function, device):
    problem, _ = make_problem(3, 5, 4, device).leaves()
    value = function(fastnlp_ops, problem)
    assert value.requires_grad
    with torch.no_grad():
        plain = function(fastnlp_ops, problem)
    assert not plain.requires_grad
    with torch.inference_mode():
        inference = function(fastnlp_ops, problem)
    assert_same(plain, value.detach())
    assert_same(inference.clone(), value.detach())


def test_two_calls_interleaved(device):
    """Forward, forward, backward, backward: nothing is kept between calls but what autograd saves."""
    problems = [make_problem(3, 6, 5, device), make_problem(4, 9, 3, device, mask="left")]
    weights = [torch.randn(problem.batch, device=device) for problem in problems]
    expected = [
        gradients(log_likelihood, fastnlp_ops, problem, None, weight)
        for problem, weight in zip(problems, weights, strict=True)
    ]
    leaves, values = [], []
    for problem in problems:
        copy, own = problem.leaves()
        leaves.append(own)
        values.append(log_likelihood(fastnlp_ops, copy))
    for i in (1, 0):
        for ours, alone in zip(torch.autograd.grad(values[i], leaves[i], weights[i]), expected[i], strict=True):
            assert_same(ours, alone)


def test_backward_twice(device):
    """retain_graph: the saved messages are read, not used up."""
    problem, leaves = make_problem(3, 6, 5, device).leaves()
    value = log_likelihood(fastnlp_ops, problem).sum()
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    for again, once in zip(torch.autograd.grad(value, leaves), first, strict=True):
        assert_same(again, once)


def test_input_changed_before_backward(device):
    """Autograd notices, as for any torch op."""
    problem, _ = make_problem(3, 6, 5, device).leaves()
    emissions = problem.emissions * 1
    value = fastnlp_ops.crf_log_partition(emissions, *problem.scores[1:])
    with torch.no_grad():
        emissions.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_deterministic_mode(device):
    """The kernels are deterministic: strict mode raises nothing and changes no bit."""
    problem = make_problem(5, 9, 6, device, mask="holes")
    weights = torch.randn(5, device=device)
    relaxed = gradients(log_likelihood, fastnlp_ops, problem, None, weights)
    try:
        torch.use_deterministic_algorithms(True)
        strict = gradients(log_likelihood, fastnlp_ops, problem, None, weights)
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
    for ours, expected in zip(strict, relaxed, strict=True):
        assert_same(ours, expected)


def test_weights_of_samples_and_classes(device):
    """Upstream gradients that differ by sequence, from a function of the log-likelihood: a focal loss."""
    problem, leaves = make_problem(4, 6, 5, device, dtype=torch.float64).leaves()
    plain, plain_leaves = problem.leaves()
    for module, own, own_leaves in ((fastnlp_ops, problem, leaves), (reference, plain, plain_leaves)):
        value = log_likelihood(module, own)
        (-(1 - value.exp()).square() * value).sum().backward()
        assert all(leaf.grad is not None for leaf in own_leaves)
    for ours, expected in zip(leaves, plain_leaves, strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=0, atol=1e-12)


@pytest.mark.long
def test_many_rows(device):
    """More than 2^31 / 64 numbers: offsets that a 32-bit product of strides would wrap. 300 MB of float16 emissions."""
    B, T, N = 2, 1 << 20, 72
    emissions = torch.zeros(1, T, N, dtype=torch.float16, device=device).expand(B, T, N)
    value = fastnlp_ops.crf_log_partition(emissions, torch.zeros(N, N, device=device))
    assert ((value - T * math.log(N)).abs() <= 1e-6 * T * math.log(N)).all()
