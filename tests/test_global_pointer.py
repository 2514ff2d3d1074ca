"""The GlobalPointer functions against their reference: values, gradients, compilation."""

import cmath
import functools
import itertools
import math

import pytest
import torch
from global_pointer_problems import (
    CASES,
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
    outputs,
    used,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastnlp_ops
from fastnlp_ops import reference

SMALL = ["ragged", "left", "efficient", "biased", "one", "odd", "relations", "band", "positions", "mask_zero"]

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


@each_dtype
@each_case
def test_decode(case, dtype, device):
    problem = make_problem(device=device, dtype=dtype, **CASES[case])
    check_decode(problem)
    check_decode(problem, threshold=0.7, top_k=3)
    check_decode(problem, nested=False)
    check_decode(problem, threshold=-0.2, nested=False, top_k=2)


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
@pytest.mark.parametrize("function", [loss, divergence], ids=lambda function: function.__name__)
@pytest.mark.parametrize("case", ["ragged", "no_sequence"])
def test_reductions(function, case, reduction, device):
    problem = make_problem(device=device, dtype=torch.float64, **CASES[case])
    rows = function(fastnlp_ops, problem)
    weight = {"sum": 1.0, "mean": 1 / max(1, rows.numel()), "batchmean": 1 / max(1, len(rows))}[reduction]
    problem, leaves = problem.leaves()
    value = function(fastnlp_ops, problem, reduction)
    assert torch.allclose(value, rows.sum() * weight)
    assert torch.allclose(value, function(reference, problem, reduction))
    found = torch.autograd.grad(value, leaves[: used(function, problem)])
    weights = torch.full_like(rows, weight)
    for own, plain in zip(found, gradients(function, reference, problem, None, weights), strict=True):
        assert torch.allclose(own, plain)


def score_by_hand(problem, b, h, i, j):
    """One score from the formula: RoPE as a product of complex numbers."""
    q, k = (x[b, t, h % x.shape[2]].tolist() for x, t in ((problem.q, i), (problem.k, j)))
    d, total = len(q), 0.0
    if problem.rope:
        positions = range(10**6) if problem.position_ids is None else problem.position_ids[b].tolist()
        for m in range(d // 2):
            theta = 10000 ** (-2 * m / d)
            start = complex(q[2 * m], q[2 * m + 1]) * cmath.exp(1j * positions[i] * theta)
            end = complex(k[2 * m], k[2 * m + 1]) * cmath.exp(1j * positions[j] * theta)
            total += (start * end.conjugate()).real
    else:
        total = sum(x * y for x, y in zip(q, k, strict=True))
    total *= d**-0.5 if problem.scale is None else problem.scale
    if problem.start_bias is not None:
        total += problem.start_bias[b, i, h].item() + problem.end_bias[b, j, h].item()
    return total


@pytest.mark.parametrize("case", ["prime", "efficient", "biased", "relations", "band_of_pairs", "positions", "scaled"])
def test_by_hand(case, device):
    """Every cell from the formulas of the documentation, without tensors and without the reference."""
    problem = make_problem(device=device, dtype=torch.float64, **{**CASES[case], "B": 2, "n": 7, "H": 2})
    other = problem.with_inputs(*problem.second, *problem.second)
    s, rows, spread = (function(fastnlp_ops, problem) for function in FUNCTIONS)
    spans = decode(fastnlp_ops, problem)[0].tolist()
    for b, h in itertools.product(range(2), range(2)):
        labels = [tuple(label) for label in problem.labels[b, h].tolist()]
        negative = positive = difference = 0.0
        for i, j in itertools.product(range(7), range(7)):
            if not problem.valid[b, h, i, j]:
                assert s[b, h, i, j] == -math.inf and [b, h, i, j] not in spans
                continue
            score = score_by_hand(problem, b, h, i, j)
            assert s[b, h, i, j].item() == pytest.approx(score, abs=1e-10)
            assert ([b, h, i, j] in spans) == (score > 0)
            positive += math.exp(-score) if (i, j) in labels else 0
            negative += 0 if (i, j) in labels else math.exp(score)
            gap = score - (twin := score_by_hand(other, b, h, i, j))
            difference += gap * (1 / (1 + math.exp(-score)) - 1 / (1 + math.exp(-twin)))
        assert rows[b, h].item() == pytest.approx(math.log1p(negative) + math.log1p(positive))
        assert spread[b, h].item() == pytest.approx(difference)


def small_problem(case, device, n=4, d=4):
    # NaN cannot be perturbed by finite differences: masked tokens hold numbers here.
    options = {**CASES[case], "poison": False}
    limits = {"B": 2, "n": n, "H": 2, "d": d if options.get("rope", True) else d - 1}
    options |= {name: min(limit, options[name]) for name, limit in limits.items()}
    return make_problem(device=device, dtype=torch.float64, **options)


def as_function(function, problem):
    """`function` of the leaves that it reads."""

    def call(*leaves):
        found = iter(leaves)
        inputs = [None if x is None else next(found, x) for x in problem.inputs]
        value = function(fastnlp_ops, problem.with_inputs(*inputs))
        return value[value.isfinite()]  # scores of cells that do not take part are -inf

    return call


@each_function
@pytest.mark.parametrize("case", SMALL)
def test_gradcheck(function, case, device):
    problem, leaves = small_problem(case, device).leaves()
    assert torch.autograd.gradcheck(as_function(function, problem), leaves[: used(function, problem)])


@each_function
@pytest.mark.parametrize("case", SMALL)
def test_gradgradcheck(function, case, device):
    problem, leaves = small_problem(case, device, n=3, d=2).leaves()
    assert torch.autograd.gradgradcheck(as_function(function, problem), leaves[: used(function, problem)])


def expected_cells(problem):
    """What the kernels are given as labels, one label after the other."""
    B, n = problem.q.shape[:2]
    none, cells = B * problem.heads * n * n, []
    valid = problem.valid
    for b, h, p in itertools.product(range(B), range(problem.heads), range(problem.labels.shape[2])):
        i, j = problem.labels[b, h, p].tolist()
        drop = i < 0 or j < 0 or not valid[b, h, i, j] or (problem.mask_zero and i == j == 0)
        cells.append(none if drop else ((b * problem.heads + h) * n + i) * n + j)
    if problem.mask_zero:  # the cell (0, 0) of each row is in neither sum
        cells += [-1 - row * n * n for row in range(B * problem.heads)]
    return sorted(cells)


@pytest.mark.parametrize("mask_zero", [False, True])
@pytest.mark.parametrize("case", ["prime", "band", "band_of_pairs", "relations", "no_label", "no_token", "no_sequence"])
def test_cells(case, mask_zero, device):
    problem = make_problem(device=device, **{"labels": 9, **CASES[case]}, mask_zero=mask_zero)
    B, n = problem.q.shape[:2]
    problem.labels[:, :, 3:4] = 0 if n else -1
    longest = -1 if problem.max_span_length is None else problem.max_span_length
    options = (problem.mask, B, problem.heads, n, problem.tril_mask, longest, mask_zero)
    assert torch.ops.fastnlp_ops.global_pointer_cells(problem.labels, *options).tolist() == expected_cells(problem)


OPTIONS = (True, True, 3, 0.5)


def op_arguments(problem):
    """Arguments of every op of the family, as the public functions give them to it."""
    ops = torch.ops.fastnlp_ops
    q, k, start, end, q2, k2, start2, end2 = problem.inputs
    tail = (problem.mask, problem.position_ids, *OPTIONS)
    first, second = (q, k, start, end), (q2, k2, start2, end2)
    B, H, n = q.shape[0], problem.heads, q.shape[1]
    labelling = (problem.labels, problem.mask, B, H, n, True, 3, True)
    with torch.no_grad():
        cells = ops.global_pointer_cells(*labelling)
        *sums, saved = ops.global_pointer_loss(q, k, cells, start, end, *tail, True)
        dscores = torch.randn_like(ops.global_pointer_scores(*first, *tail))
        spans, found = ops.global_pointer_decode(*first, *tail, 0.0)
    dloss = torch.randn_like(sums[0])
    still = [None if x is None else x.detach() for x in problem.inputs]
    labelled = (*still[:2], cells, *still[2:4], *tail)
    return {
        "global_pointer_scores": (*first, *tail),
        "global_pointer_scores_backward": (dscores, *first, *tail),
        "global_pointer_loss": (q, k, cells, start, end, *tail, True),
        "global_pointer_loss_backward": (dloss, *sums, saved, *labelled),
        "global_pointer_divergence": (*first, *second, *tail),
        "global_pointer_divergence_backward": (dloss, *still, *tail),
        "global_pointer_decode": (*still[:4], *tail, 0.0),
        "flat_spans": (spans, found, still[0]),
        "global_pointer_cells": labelling,
    }


OPS = [
    *(f"global_pointer_{name}{part}" for name in ("scores", "loss", "divergence") for part in ("", "_backward")),
    "global_pointer_decode",
    "global_pointer_cells",
    "flat_spans",
]


@pytest.mark.parametrize("case", ["efficient", "ragged", "positions"])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, case, device):
    options = {**CASES[case], "n": 6, "mask": "holes", "poison": False}
    problem, _ = make_problem(device=device, **options).leaves()
    torch.library.opcheck(getattr(torch.ops.fastnlp_ops, op).default, op_arguments(problem)[op])


@each_function
@pytest.mark.parametrize("case", ["ragged", "efficient", "positions"])
def test_compile(function, case, device):
    torch._dynamo.reset()
    compiled = torch.compile(
        functools.partial(function, fastnlp_ops), fullgraph=True, dynamic=True, backend="aot_eager"
    )

    def step(call, problem):
        problem, leaves = problem.leaves()
        output = call(problem)
        finite = torch.where(output.isfinite(), output, 0)
        return [output, *torch.autograd.grad(finite.cos().sum(), leaves[: used(function, problem)])]

    def check(B, n):
        problem = make_problem(device=device, **{**CASES[case], "B": B, "n": n})
        eager = step(functools.partial(function, fastnlp_ops), problem)
        assert_all_same(step(compiled, problem), eager)

    # No two sizes alike: dynamo takes equal sizes for the same symbol.
    check(9, 11)
    with torch.compiler.set_stance("fail_on_recompile"):
        check(10, 13)


def test_compile_is_one_kernel_each_way(device):
    """The loss is a sum of two outputs: its backward is one call all the same."""
    torch._dynamo.reset()
    problem, leaves = make_problem(device=device, **CASES["ragged"]).leaves()
    seen = []

    def backend(graph, example):
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def count(module, _):
            seen.extend(str(node.target) for node in module.graph.nodes if "global_pointer_loss" in str(node.target))
            return make_boxed_func(module.forward)

        return aot_autograd(fw_compiler=count, bw_compiler=count)(graph, example)

    torch.compile(loss, fullgraph=True, backend=backend)(fastnlp_ops, problem).sum().backward()
    assert seen == [f"fastnlp_ops.global_pointer_loss{way}.default" for way in ("", "_backward")]
    assert leaves[0].grad.abs().sum() > 0


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"nested": False}, {"max_spans": 3}])
def test_compile_decode(options, device):
    torch._dynamo.reset()
    compiled = torch.compile(decode, fullgraph=True, dynamic=True, backend="aot_eager")

    def check(B, n):
        problem = make_problem(device=device, **{**CASES["efficient"], "B": B, "n": n})
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            found = compiled(fastnlp_ops, problem, **options)
        assert_all_same(found, decode(fastnlp_ops, problem, **options))

    check(9, 11)
    with torch.compiler.set_stance("fail_on_recompile"):
        check(10, 13)


class Head(torch.nn.Module):
    def forward(self, q, k, labels, mask):
        scores = fastnlp_ops.global_pointer_scores(q, k, mask=mask)
        return scores, fastnlp_ops.global_pointer_loss(q, k, labels, mask=mask)


def test_export(device):
    problem = make_problem(device=device, **CASES["ragged"])
    inputs = (problem.q, problem.k, problem.labels, problem.mask)
    B, n = torch.export.Dim("B", min=2), torch.export.Dim("n", min=2)
    shapes = ({0: B, 1: n}, {0: B, 1: n}, {0: B}, {0: B, 1: n})
    exported = torch.export.export(Head(), inputs, dynamic_shapes=shapes).module()
    other = make_problem(device=device, **{**CASES["ragged"], "B": 3, "n": 7})
    for call in (inputs, (other.q, other.k, other.labels, other.mask)):
        assert_all_same(exported(*call), Head()(*call))


def test_repeatable(device, threads):
    """Bitwise: run to run, and for any number of threads."""
    for case in ("prime", "long", "uneven", "many_heads", "band", "all_pairs"):
        problem = make_problem(device=device, **CASES[case])
        runs = []
        for count in (1, 2, 2, 3):
            threads(count)
            runs.append(outputs(problem))
        for run in runs[1:]:
            assert_all_same(run, runs[0], case)


@pytest.mark.parametrize("case", ["ragged", "uneven", "biased", "efficient", "no_token"])
def test_gradients_saved_or_not(case, device):
    """What the forward op has not saved its gradient computes, to the bit; unasked it saves nothing."""
    problem = make_problem(device=device, **CASES[case])
    cells = torch.tensor(expected_cells(problem), device=device)

    def step(save):
        own, leaves = problem.leaves()
        *sums, saved = torch.ops.fastnlp_ops.global_pointer_loss(
            *own.inputs[:2], cells, *own.inputs[2:4], own.mask, None, True, True, -1, 0.5, save
        )
        total = (sums[0] + sums[1]).cos().sum()
        return saved.numel(), [*sums, *torch.autograd.grad(total, leaves[: used(loss, own)])]

    (size, found), (none, expected) = step(True), step(False)
    assert_all_same(found, expected)
    kept = device.type == "cpu" and case != "efficient"
    assert size == (sum(x.numel() for x in problem.inputs[:4] if x is not None) if kept else 0) and none == 0


fuzz = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
problems = st.fixed_dictionaries(
    {
        "B": st.integers(0, 4),
        "n": st.integers(0, 40),
        "H": st.integers(1, 6),
        "pairs": st.integers(1, 20),
        "odd": st.booleans(),
        "shared": st.booleans(),
        "bias": st.booleans(),
        "mask": st.sampled_from([None, "full", "prefix", "left", "holes"]),
        "positions": st.booleans(),
        "labels": st.sampled_from([0, 1, 5, 60]),
        "std": st.sampled_from([0.0, 1.0, 3.0]),
        "tril_mask": st.booleans(),
        "max_span_length": st.sampled_from([None, 1, 2, 7, 100]),
        "scale": st.sampled_from([None, 0.0, 1.0, -0.5]),
        "mask_zero": st.booleans(),
        "dtype": st.sampled_from([torch.float32, torch.float64]),
    }
)


@fuzz
@given(options=problems, seed=st.integers(0, 2**32))
def test_fuzz(device, options, seed):
    torch.manual_seed(seed)
    options = dict(options)
    odd = options.pop("odd")  # RoPE turns pairs of channels
    problem = make_problem(d=2 * options.pop("pairs") - odd, rope=not odd, device=device, **options)
    for function in FUNCTIONS:
        check_forward(function, problem)
        check_backward(function, problem)
    check_decode(problem)
    check_decode(problem, threshold=-0.5, nested=False, top_k=3)
