"""The CRF functions against their reference: values, gradients, layouts, errors."""

import functools

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
    viterbi_score,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tools import assert_same, assert_within_budget, reversed_strides, strided

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
    "wide": {"B": 2, "T": 4, "N": 130, "mask": "prefix"},
    "long": {"B": 2, "T": 301, "N": 6, "mask": "holes"},
}
SMALL = ["left", "prime", "packed", "one", "one_tag", "no_step", "position", "no_bounds", "banned"]


each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


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
    detached = [score if score is None else score.detach() for score in tail]
    _, messages = torch.ops.fastnlp_ops.crf_log_partition(emissions.detach(), *detached, True)
    grad = torch.randn(problem.batch, dtype=transitions.dtype, device=emissions.device)
    backward = (emissions.detach(), *detached, True)
    paths, _ = torch.ops.fastnlp_ops.crf_viterbi(emissions.detach(), *detached)
    cotangents = [None if score is None else torch.randn_like(score) for score in detached[:3]]
    return {
        "crf_log_partition": (emissions, *tail, True),
        "crf_log_partition_backward": (grad, messages, *backward),
        "crf_log_likelihood": (emissions, problem.tags, *tail, True),
        "crf_log_likelihood_backward": (grad, messages, backward[0], problem.tags, *backward[1:]),
        "crf_viterbi": (emissions.detach(), *detached),
        "crf_viterbi_n_best": (emissions.detach(), *detached, 3),
        "crf_sample": (emissions.detach(), *detached, uniforms),
        "crf_entropy": (emissions, *tail),
        "crf_viterbi_backward": (grad, paths, emissions.detach(), *detached),
        "crf_entropy_backward": (grad, emissions.detach(), *detached),
        "crf_log_partition_double_backward": (grad, emissions.detach(), *cotangents, emissions.detach(), *detached),
    }


OPS = [
    "crf_log_partition",
    "crf_log_partition_backward",
    "crf_log_likelihood",
    "crf_log_likelihood_backward",
    "crf_viterbi",
    "crf_viterbi_n_best",
    "crf_viterbi_backward",
    "crf_sample",
    "crf_entropy",
    "crf_entropy_backward",
    "crf_log_partition_double_backward",
]


@pytest.mark.parametrize("case", ["masked", "packed", "position", "no_bounds"])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, case, device):
    """As opcheck adds up all outputs, Viterbi is given no leaves (its paths are integers; test_compile has leaves), and
    the mask is all on (nobody writes the rows of masked steps in the saved messages).
    """
    cases = {**CASES, "masked": {"B": 5, "T": 7, "N": 4, "mask": "full"}, "position": CASES["two_steps"]}
    problem, _ = make_problem(device=device, poison=False, **cases[case]).leaves()
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
        problem = make_problem(B, T, 3, device, mask="holes", packed=packed)
        eager = step(functools.partial(function, fastnlp_ops), problem)
        for ours, expected in zip(step(compiled, problem), eager, strict=True):
            assert_same(ours, expected)

    # No two sizes alike: dynamo takes equal sizes for the same symbol.
    check(7, 11)
    with torch.compiler.set_stance("fail_on_recompile"):
        check(9, 13)


def outputs(problem, functions=FUNCTIONS):
    """Everything that the family computes of one problem: values, gradients of `functions`, paths."""
    leaf_problem, leaves = problem.leaves()
    results = []
    for function in FUNCTIONS:
        value = function(fastnlp_ops, leaf_problem)
        results.append(value.detach())
        if function in functions:
            results += torch.autograd.grad(value.sin().sum(), leaves, materialize_grads=True)
    results += fastnlp_ops.crf_viterbi(*problem.scores, **problem.layout)
    results += fastnlp_ops.crf_viterbi(*problem.scores, **problem.layout, n_best=3)
    generator = torch.Generator(problem.emissions.device).manual_seed(1)
    results.append(fastnlp_ops.crf_sample(*problem.scores, **problem.layout, num_samples=2, generator=generator))
    return results


# The gradients of the other functions come from the reference, and torch sums in an order that depends on strides.
KERNEL_GRADIENTS = [log_partition, log_likelihood, partial_log_likelihood]


@pytest.mark.parametrize("layout", [strided, reversed_strides], ids=["strided", "reversed"])
@pytest.mark.parametrize("case", ["ragged", "packed", "position"])
def test_layouts_of_memory(layout, case, device):
    problem = make_problem(device=device, **CASES[case])
    expected = outputs(problem, KERNEL_GRADIENTS)
    for name in ("emissions", "tags", "transitions", "start", "end", "mask", "cu_seqlens", "allowed"):
        value = getattr(problem, name)
        if value is not None and not (layout is reversed_strides and value.dim() == 1):
            setattr(problem, name, layout(value))
            assert value.dim() == 1 or value.numel() < 2 or not getattr(problem, name).is_contiguous()
    # leaves() clones, which keeps these strides where they are dense; the detached calls see them as they are.
    for ours, plain in zip(outputs(problem, KERNEL_GRADIENTS), expected, strict=True):
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


fuzz = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
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
