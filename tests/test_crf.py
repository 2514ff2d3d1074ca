"""The CRF functions against their reference, and both against the enumeration of all paths."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tools import assert_same, assert_within_budget, enumerate_paths, make_problem

import fastnlp_ops
from fastnlp_ops import reference

CASES = {
    "aligned": {"B": 8, "T": 16, "N": 32},
    "ragged": {"B": 5, "T": 23, "N": 9, "mask": "prefix"},
    "left": {"B": 4, "T": 12, "N": 8, "mask": "left"},
    "prime": {"B": 7, "T": 13, "N": 17, "mask": "holes"},
    "packed": {"B": 6, "T": 11, "N": 5, "mask": "holes", "packed": True},
    "one": {"B": 1, "T": 1, "N": 1},
    "one_step": {"B": 3, "T": 1, "N": 6},
    "one_tag": {"B": 3, "T": 6, "N": 1, "mask": "holes"},
    "no_sequence": {"B": 0, "T": 4, "N": 3},
    "no_step": {"B": 3, "T": 0, "N": 4},
    "nothing_packed": {"B": 3, "T": 0, "N": 4, "packed": True},
    "two_steps": {"B": 3, "T": 2, "N": 4, "per_position": True},
    "position": {"B": 4, "T": 9, "N": 6, "mask": "holes", "per_position": True},
    "no_bounds": {"B": 3, "T": 7, "N": 5, "bounds": False},
    "banned": {"B": 6, "T": 15, "N": 7, "mask": "holes", "ban": 0.3},
    "peaked": {"B": 4, "T": 40, "N": 10, "std": 30.0, "ban": 0.3},
    "many": {"B": 67, "T": 9, "N": 4, "mask": "prefix"},
    "wide": {"B": 2, "T": 5, "N": 130, "mask": "prefix"},
    "long": {"B": 2, "T": 601, "N": 6, "mask": "holes"},
}
SMALL = ["left", "prime", "packed", "one", "one_tag", "no_step", "position", "no_bounds", "banned"]


def log_partition(module, problem):
    return module.crf_log_partition(*problem.scores, **problem.layout)


def log_likelihood(module, problem):
    emissions, *rest = problem.scores
    return module.crf_log_likelihood(emissions, problem.tags, *rest, **problem.layout)


def partial_log_likelihood(module, problem):
    emissions, *rest = problem.scores
    return module.crf_partial_log_likelihood(emissions, problem.allowed, *rest, **problem.layout)


def marginals(module, problem):
    return module.crf_marginals(*problem.scores, **problem.layout)


def entropy(module, problem):
    return module.crf_entropy(*problem.scores, **problem.layout)


def viterbi_score(module, problem):
    return module.crf_viterbi(*problem.scores, **problem.layout)[1]


FUNCTIONS = [log_partition, log_likelihood, partial_log_likelihood, marginals, entropy, viterbi_score]

each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def gradients(function, module, problem, dtype=None, weights=None):
    """Gradients of all scores of `problem` for the upstream gradient `weights`; 0 where nothing depends on a score."""
    problem, leaves = problem.leaves(dtype)
    output = function(module, problem)
    return torch.autograd.grad(output, leaves, weights.to(output.dtype), materialize_grads=True)


def compute_dtype(problem):
    return torch.float64 if problem.emissions.dtype == torch.float64 else torch.float32


def check_forward(function, problem):
    actual = function(fastnlp_ops, problem)
    assert actual.dtype == compute_dtype(problem)
    plain = function(reference, problem.to(torch.float32))
    assert_within_budget(actual, plain, function(reference, problem.to(torch.float64)), function.__name__)


def check_backward(function, problem):
    # Every sequence has its own upstream gradient, of any sign; the first has none.
    exact = function(reference, problem.to(torch.float64))
    weights = torch.randn(exact.shape, device=exact.device)
    weights[:1] = 0
    ours = gradients(function, fastnlp_ops, problem, None, weights)
    plain = gradients(function, reference, problem, torch.float32, weights)
    exact = gradients(function, reference, problem, torch.float64, weights)
    names = ["demissions", "dtransitions", "dstart_transitions", "dend_transitions"][: len(ours)]
    for name, gradient, plain_gradient, exact_gradient in zip(names, ours, plain, exact, strict=True):
        assert_within_budget(gradient, plain_gradient, exact_gradient, f"{name} of {function.__name__}")


@each_function
@each_dtype
@each_case
def test_forward(function, case, dtype, device):
    check_forward(function, make_problem(device=device, dtype=dtype, **CASES[case]))


@each_function
@each_dtype
@each_case
def test_backward(function, case, dtype, device):
    check_backward(function, make_problem(device=device, dtype=dtype, **CASES[case]))


def small_problem(case, device, T=4, B=3, N=3):
    # NaN cannot be perturbed by finite differences: padding holds numbers here.
    options = {**CASES[case], "poison": False, "ban": 0.0}
    options = {**options, "B": min(B, options["B"]), "T": min(T, options["T"]), "N": min(N, options["N"])}
    return make_problem(device=device, dtype=torch.float64, **options)


@each_function
@pytest.mark.parametrize("case", SMALL)
def test_gradcheck(function, case, device):
    problem, leaves = small_problem(case, device).leaves()

    def call(*leaves):
        scores = iter(leaves)
        return function(fastnlp_ops, problem.with_scores(*(s if s is None else next(scores) for s in problem.scores)))

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("function", [log_partition, log_likelihood, partial_log_likelihood], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", SMALL)
def test_gradgradcheck(function, case, device):
    problem, leaves = small_problem(case, device, T=3, B=2).leaves()

    def call(*leaves):
        scores = iter(leaves)
        return function(fastnlp_ops, problem.with_scores(*(s if s is None else next(scores) for s in problem.scores)))

    assert torch.autograd.gradgradcheck(call, leaves)


def op_arguments(problem):
    """Arguments of every op of the family, as the public functions give them to it."""
    emissions, transitions, start, end = problem.scores
    tail = (transitions, start, end, problem.mask, problem.cu_seqlens)
    uniforms = torch.rand(2, *emissions.shape[:-1], device=emissions.device)
    ops = torch.ops.fastnlp_ops
    detached = [score if score is None else score.detach() for score in tail]
    arguments = {
        "crf_log_partition": (emissions, *tail, True),
        "crf_log_likelihood": (emissions, problem.tags, *tail, True),
        "crf_viterbi": (emissions, *tail),
        "crf_viterbi_n_best": (emissions, *tail, 3),
        "crf_sample": (emissions.detach(), *detached, uniforms),
        "crf_entropy": (emissions, *tail),
    }
    _, messages = ops.crf_log_partition(emissions.detach(), *detached, True)
    grad = torch.randn(problem.batch, dtype=transitions.dtype, device=emissions.device)
    backward = (emissions.detach(), *detached, True)
    arguments["crf_log_partition_backward"] = (grad, messages, *backward)
    arguments["crf_log_likelihood_backward"] = (grad, messages, backward[0], problem.tags, *backward[1:])
    return arguments


OPS = [
    "crf_log_partition",
    "crf_log_partition_backward",
    "crf_log_likelihood",
    "crf_log_likelihood_backward",
    "crf_viterbi",
    "crf_viterbi_n_best",
    "crf_sample",
    "crf_entropy",
]


@pytest.mark.parametrize("case", ["ragged", "packed", "position", "no_bounds"])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, case, device):
    problem, _ = make_problem(device=device, poison=False, **CASES[case]).leaves()
    torch.library.opcheck(getattr(torch.ops.fastnlp_ops, op).default, op_arguments(problem)[op])


@each_function
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_compile(function, packed, device):
    torch._dynamo.reset()
    compiled = torch.compile(
        functools.partial(function, fastnlp_ops), fullgraph=True, dynamic=True, backend="aot_eager"
    )

    def step(call, problem):
        problem, leaves = problem.leaves()
        output = call(problem)
        return [output, *torch.autograd.grad(output.cos().sum(), leaves)]

    def check(B, T):
        problem = make_problem(B, T, 5, device, mask="holes", packed=packed)
        eager = step(functools.partial(function, fastnlp_ops), problem)
        for ours, expected in zip(step(compiled, problem), eager, strict=True):
            assert_same(ours, expected)

    check(4, 7)
    with torch.compiler.set_stance("fail_on_recompile"):
        check(6, 9)


def outputs(problem):
    """Everything that the family computes of one problem: values, gradients, paths."""
    leaf_problem, leaves = problem.leaves()
    results = []
    for function in FUNCTIONS:
        value = function(fastnlp_ops, leaf_problem)
        results += [value.detach(), *torch.autograd.grad(value.sin().sum(), leaves, materialize_grads=True)]
    results += fastnlp_ops.crf_viterbi(*problem.scores, **problem.layout)
    results += fastnlp_ops.crf_viterbi(*problem.scores, **problem.layout, n_best=3)
    generator = torch.Generator(problem.emissions.device).manual_seed(1)
    results.append(fastnlp_ops.crf_sample(*problem.scores, **problem.layout, num_samples=2, generator=generator))
    return results


def strided(tensor):
    """The same values with a gap behind every element, so that no dimension has stride 1."""
    return torch.stack([tensor, torch.full_like(tensor, 1)], -1)[..., 0]


def reversed_strides(tensor):
    """The same values, laid out with the first dimension innermost, as [L, B, N] data seen as [B, L, N]."""
    order = list(range(tensor.dim()))[::-1]
    return tensor.permute(order).contiguous().permute(order)


@pytest.mark.parametrize("layout", [strided, reversed_strides], ids=["strided", "reversed"])
@pytest.mark.parametrize("case", ["ragged", "packed", "position"])
def test_layouts_of_memory(layout, case, device):
    problem = make_problem(device=device, **CASES[case])
    expected = outputs(problem)
    for name in ("emissions", "tags", "transitions", "start", "end", "mask", "cu_seqlens", "allowed"):
        value = getattr(problem, name)
        if value is not None and not (layout is reversed_strides and value.dim() == 1):
            setattr(problem, name, layout(value))
            assert value.dim() == 1 or value.numel() < 2 or not getattr(problem, name).is_contiguous()
    # leaves() clones, which keeps these strides where they are dense; the detached calls see them as they are.
    for ours, plain in zip(outputs(problem), expected, strict=True):
        assert_same(ours, plain)


def test_layouts_expanded(device):
    """Stride 0: one sequence seen as a batch, one matrix seen as per-position matrices, one number seen as a vector."""
    B, T, N = 4, 6, 5
    one = make_problem(1, T, N, device)
    problem = one.with_scores(
        one.emissions.expand(B, T, N),
        one.transitions.expand(B, T - 1, N, N),
        one.start[:1].expand(N),
        one.end[:1].expand(N),
    )
    problem.tags = one.tags.expand(B, T)
    dense = problem.with_scores(*(score.contiguous() for score in problem.scores))
    dense.tags = problem.tags.contiguous()
    for function in (log_partition, log_likelihood, marginals, entropy, viterbi_score):
        assert_same(function(fastnlp_ops, problem), function(fastnlp_ops, dense))
        once = one.with_scores(one.emissions, one.transitions, problem.start, problem.end)
        # Per-position matrices may take another path through the kernel than a shared one: equal within the budget.
        assert_within_budget(
            function(fastnlp_ops, problem)[:1],
            function(reference, once),
            function(reference, once.to(torch.float64)),
        )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float32, torch.float16])
def test_layouts_of_masks(dtype, device):
    problem = make_problem(5, 9, 4, device, mask="holes")
    expected = outputs(problem)
    problem.mask = problem.mask.to(dtype)
    for ours, plain in zip(outputs(problem), expected, strict=True):
        assert_same(ours, plain)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_layouts_of_tags(dtype, device):
    problem = make_problem(5, 9, 4, device, mask="holes", poison=False)
    expected = log_likelihood(fastnlp_ops, problem)
    problem.tags = problem.tags.to(dtype)
    assert_same(log_likelihood(fastnlp_ops, problem), expected)


def test_layouts_of_cu_seqlens(device):
    problem = make_problem(device=device, **CASES["packed"])
    expected = outputs(problem)
    problem.cu_seqlens = problem.cu_seqlens.int()
    for ours, plain in zip(outputs(problem), expected, strict=True):
        assert_same(ours, plain)


@each_function
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("case", ["ragged", "packed", "position", "long"])
def test_layouts_half(function, case, dtype, device):
    """Half-precision emissions: values as of the same numbers in float32, gradients rounded once to their dtype."""
    problem = make_problem(device=device, **CASES[case])
    half = problem.with_scores(problem.emissions.to(dtype), *problem.scores[1:])
    same = problem.with_scores(half.emissions.float(), *problem.scores[1:])
    value, expected = function(fastnlp_ops, half), function(fastnlp_ops, same)
    assert_same(value, expected)
    weights = torch.randn_like(expected)
    ours = gradients(function, fastnlp_ops, half, None, weights)
    plain = gradients(function, fastnlp_ops, same, None, weights)
    assert_same(ours[0], plain[0].to(dtype), "demissions")
    for gradient, expected in zip(ours[1:], plain[1:], strict=True):
        assert_same(gradient, expected, "parameter gradient")


def test_half_parameters(device):
    """bf16 transitions beside bf16 emissions: computed in float32, gradients in the dtype of each parameter."""
    problem, leaves = make_problem(3, 8, 5, device, torch.bfloat16).leaves()
    value = log_likelihood(fastnlp_ops, problem)
    assert value.dtype == torch.float32
    assert_same(value, log_likelihood(fastnlp_ops, problem.to(torch.float32)))
    assert [g.dtype for g in torch.autograd.grad(value.sum(), leaves)] == [torch.bfloat16] * 4


def test_repeatable(device, threads):
    """Bitwise: run to run, and for any number of threads. 67 sequences give every thread several."""
    for case in ("many", "long", "position", "wide"):
        problem = make_problem(device=device, **CASES[case])
        runs = []
        for count in (1, 2, 2, 3):
            threads(count)
            runs.append(outputs(problem))
        for run in runs[1:]:
            for ours, first in zip(run, runs[0], strict=True):
                assert_same(ours, first, case)


fuzz = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
problems = st.fixed_dictionaries(
    {
        "B": st.integers(0, 6),
        "T": st.integers(0, 12),
        "N": st.integers(1, 40),
        "dtype": st.sampled_from([torch.float32, torch.float64]),
        "mask": st.sampled_from([None, "full", "prefix", "left", "holes"]),
        "form": st.sampled_from(["shared", "packed", "per_position"]),
        "bounds": st.booleans(),
        "std": st.sampled_from([0.0, 1.0, 10.0, 100.0]),
        "ban": st.sampled_from([0.0, 0.0, 0.2, 0.9]),
    }
)


@fuzz
@given(options=problems, seed=st.integers(0, 2**32))
def test_fuzz(device, options, seed):
    torch.manual_seed(seed)
    options = dict(options)
    form = options.pop("form")
    problem = make_problem(device=device, packed=form == "packed", per_position=form == "per_position", **options)
    for function in (log_partition, log_likelihood, entropy, viterbi_score):
        check_forward(function, problem)
    for function in (log_partition, log_likelihood):
        check_backward(function, problem)
    check_paths(problem, n_best=1)
    check_samples(problem)


def own_scores(problem, paths):
    """Float64 scores [B] of given paths, and a bound of what additions in the problem's dtype round off them."""
    emissions, *rest = problem.to(torch.float64).scores
    score = reference.crf_score(emissions, paths, *rest, **problem.layout)
    size = emissions.nan_to_num(0, 0, 0).abs()
    size = size.max().item() if size.numel() else 0.0
    # T partial sums, none larger than T + 2 terms; 8 bounds the normal draws of transitions and bounds.
    T = problem.emissions.shape[-2]
    return score, (T + 2) ** 2 * (size + 8) * torch.finfo(compute_dtype(problem)).eps


def padding_of(problem):
    """The steps [B, T] ([total]) that belong to no sequence."""
    on = torch.zeros(problem.emissions.shape[:-1], dtype=torch.bool, device=problem.emissions.device)
    for b in range(problem.batch):
        on[problem.rows(b)] = True
    return ~on


def check_paths(problem, n_best):
    """Paths are legal, -1 at masked steps, best first, distinct, and have the scores that they are given."""
    paths, scores = fastnlp_ops.crf_viterbi(*problem.scores, **problem.layout, n_best=n_best)
    exact = reference.crf_viterbi(*problem.to(torch.float64).scores, **problem.layout, n_best=n_best)[1]
    plain = reference.crf_viterbi(*problem.to(torch.float32).scores, **problem.layout, n_best=n_best)[1]
    assert_within_budget(scores, plain, exact, "scores")
    assert paths.dtype == torch.int64
    if n_best == 1:
        paths, scores = paths.unsqueeze(-2), scores[:, None]
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    padding = padding_of(problem)
    packed = problem.cu_seqlens is not None
    for rank in range(n_best):
        own = paths[rank] if packed else paths[:, rank]
        assert (own[padding] == -1).all()
        missing = scores[:, rank] == -math.inf
        for b in missing.nonzero()[:, 0].tolist() if rank > 0 else []:
            assert (own[problem.rows(b)] == -1).all()
        reachable = (~missing).nonzero()[:, 0].tolist()
        for b in reachable:
            tags = own[problem.rows(b)]
            assert ((tags >= 0) & (tags < problem.emissions.shape[-1])).all()
        score, slack = own_scores(problem, own)
        assert ((score - scores[:, rank])[reachable].abs() <= slack).all()
    for b in range(problem.batch):
        own = paths[:, problem.positions(b)] if packed else paths[b][:, problem.positions(b)]
        existing = [
            tuple(path) for path, score in zip(own.tolist(), scores[b].tolist(), strict=True) if score > -math.inf
        ]
        assert len(set(existing)) == len(existing)


@pytest.mark.parametrize("n_best", [1, 2, 5, 40])
@each_case
def test_paths(case, n_best, device):
    if case in ("wide", "long", "many") and n_best > 2:
        n_best = 3
    check_paths(make_problem(device=device, **CASES[case]), n_best)


def check_samples(problem, num_samples=2):
    """Samples are legal paths, -1 at masked steps."""
    samples = fastnlp_ops.crf_sample(*problem.scores, **problem.layout, num_samples=num_samples)
    assert samples.dtype == torch.int64
    assert samples.shape == (num_samples, *problem.emissions.shape[:-1])
    padding = padding_of(problem)
    possible = reference.crf_log_partition(*problem.to(torch.float64).scores, **problem.layout) > -math.inf
    for sample in samples:
        assert (sample[padding] == -1).all()
        for b in possible.nonzero()[:, 0].tolist():
            tags = sample[problem.rows(b)]
            assert ((tags >= 0) & (tags < problem.emissions.shape[-1])).all()
        score, _ = own_scores(problem, sample)
        assert (score[possible] > -math.inf).all(), "a forbidden path was drawn"


@pytest.mark.parametrize("case", [case for case in CASES if case != "peaked"])
def test_sample_inverts_distribution(case, device):
    """Given its successor, the drawn tag is the one whose stretch of the cumulative distribution holds the number."""
    problem = make_problem(device=device, **CASES[case])
    uniforms = torch.rand(3, *problem.emissions.shape[:-1], device=device)
    emissions, transitions, start, end = problem.scores
    arguments = (emissions, transitions, start, end, problem.mask, problem.cu_seqlens, uniforms)
    samples = torch.ops.fastnlp_ops.crf_sample(*arguments)
    for b in range(problem.batch):
        emissions, _, transitions, _ = problem.to(torch.float64).single(b)
        N = emissions.shape[-1]
        bounds = [torch.zeros(N, device=device) if bound is None else bound for bound in (problem.start, problem.end)]
        message = bounds[0].double() + emissions[:1]
        messages = [message]
        for k in range(1, len(emissions)):
            matrix = transitions if transitions.dim() == 2 else transitions[k - 1]
            messages.append(reference.crf.logsumexp(messages[-1][..., None] + matrix, 1) + emissions[k])
        for sample, numbers in zip(samples, uniforms, strict=True):
            path, number = sample[problem.rows(b)], numbers[problem.rows(b)].double()
            for k, message in enumerate(messages[: len(path)]):
                if k + 1 == len(path):
                    onward = bounds[1].double()
                else:
                    onward = (transitions if transitions.dim() == 2 else transitions[k])[:, path[k + 1]]
                probability = torch.softmax(message[0] + onward, 0)
                if probability.isnan().any():  # nothing is possible in this sequence
                    continue
                upper = probability.cumsum(0)[path[k]].item()
                lower = upper - probability[path[k]].item()
                # float32 messages: their rounding moves the borders by about 1e-5 at these lengths.
                assert lower - 1e-4 <= number[k].item() <= upper + 1e-4
                assert probability[path[k]] > 0


def test_sample_frequencies(device):
    """20,000 draws of a chain of three steps (one masked out between) against the enumerated distribution."""
    problem = make_problem(1, 4, 3, device, poison=False)
    problem.mask = torch.tensor([[True, False, True, True]], device=device)
    emissions, _, transitions, positions = problem.single(0)
    _, score = enumerate_paths(emissions, transitions, problem.start, problem.end)
    draws = 20000
    samples = fastnlp_ops.crf_sample(*problem.scores, mask=problem.mask, num_samples=draws)[:, 0, positions]
    index = (samples * torch.tensor([9, 3, 1], device=device)).sum(1)
    share = torch.bincount(index, minlength=27).double() / draws
    p = score.softmax(0)
    # Five standard deviations of a binomial share: one false alarm in about 60,000 runs over 27 paths.
    assert ((share - p).abs() <= 5 * (p * (1 - p) / draws).sqrt() + 1 / draws).all()


def test_sample_generator(device):
    problem = make_problem(4, 9, 6, device)

    def draw(seed):
        generator = torch.Generator(device).manual_seed(seed)
        return fastnlp_ops.crf_sample(*problem.scores, num_samples=5, generator=generator)

    assert_same(draw(1), draw(1))
    assert (draw(1) != draw(2)).any()
    assert (draw(1)[0] != draw(1)[1]).any()


BRUTE = ["left", "prime", "packed", "one", "one_tag", "no_step", "two_steps", "position", "no_bounds", "banned"]


@pytest.mark.parametrize("case", BRUTE)
def test_brute_force(case, device):
    """All functions against sums over all paths, in float64."""
    options = {**CASES[case], "N": min(4, CASES[case]["N"]), "T": min(6, CASES[case]["T"])}
    problem = make_problem(device=device, dtype=torch.float64, **options)
    results = {function: function(fastnlp_ops, problem) for function in FUNCTIONS}
    paths, path_scores = fastnlp_ops.crf_viterbi(*problem.scores, **problem.layout)
    n_paths, n_scores = fastnlp_ops.crf_viterbi(*problem.scores, **problem.layout, n_best=4)
    close = functools.partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)  # sums of up to 4096 float64 terms
    for b in range(problem.batch):
        emissions, tags, transitions, _ = problem.single(b)
        all_paths, score = enumerate_paths(emissions, transitions, problem.start, problem.end)
        rows = problem.rows(b)
        total = torch.logsumexp(score, 0)
        close(results[log_partition][b], total)
        if total == -math.inf:
            continue
        p = (score - total).exp()
        gold = score[(all_paths == tags).all(1)].squeeze(0)
        close(results[log_likelihood][b], gold - total)
        allowed = torch.ones(len(all_paths), dtype=torch.bool, device=device)
        for k, allowed_tags in enumerate(problem.allowed[rows]):
            allowed &= allowed_tags[all_paths[:, k]]
        close(results[partial_log_likelihood][b], torch.logsumexp(score[allowed], 0) - total)
        expected = torch.nn.functional.one_hot(all_paths, emissions.shape[-1]).double()  # [paths, L, N]
        close(results[marginals][rows], torch.einsum("p,pln->ln", p, expected))
        close(results[entropy][b], -torch.special.xlogy(p, p).sum())
        best = score.argsort(descending=True, stable=True)
        close(path_scores[b], score[best[0]])
        close(results[viterbi_score][b], score[best[0]])
        assert_same(paths[rows], all_paths[best[0]], "best path")
        for rank in range(4):
            own = n_paths[rank][rows] if problem.cu_seqlens is not None else n_paths[b, rank, rows[1]]
            if rank < len(score) and score[best[rank]] > -math.inf:
                close(n_scores[b, rank], score[best[rank]])
                assert_same(own, all_paths[best[rank]], f"path of rank {rank}")
            else:
                assert n_scores[b, rank] == -math.inf
                assert (own == -1).all()


@pytest.mark.parametrize("N", [1, 2, 3, 5])
@pytest.mark.parametrize("T", [1, 2, 4])
@pytest.mark.parametrize("per_position", [False, True])
def test_probabilities_sum_to_one(N, T, per_position, device):
    """The batch of all paths of one sequence. A normaliser that reads transitions as [to, from] fails this."""
    problem = make_problem(1, T, N, device, per_position=per_position)
    paths = torch.tensor(list(itertools.product(range(N), repeat=T)), device=device)
    emissions = problem.emissions.expand(len(paths), -1, -1)
    transitions = problem.transitions
    if per_position:
        transitions = transitions.expand(len(paths), -1, -1, -1)
    log_p = fastnlp_ops.crf_log_likelihood(emissions, paths, transitions, problem.start, problem.end)
    assert abs(log_p.double().exp().sum().item() - 1) < 1e-5  # 625 float32 terms


@each_function
def test_masked_equals_compacted(function, device):
    """A sequence with holes is, to the bit, the sequence without them: alone or in a batch, padded or packed."""
    problem = make_problem(5, 14, 6, device, mask="holes")
    together = function(fastnlp_ops, problem)
    for b in range(problem.batch):
        emissions, tags, _, _ = problem.single(b)
        alone = problem.with_scores(emissions[None], *problem.scores[1:])
        alone.mask, alone.tags, alone.allowed = None, tags[None], problem.allowed[problem.rows(b)][None]
        whole = together[problem.rows(b)] if function is marginals else together[b]
        assert_same(whole, function(fastnlp_ops, alone)[0])
