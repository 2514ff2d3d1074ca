"""GlobalPointer on every layout of its arguments: strides, dtypes of inputs, masks and labels, autocast."""

import dataclasses

import pytest
import torch
from global_pointer_problems import (
    CASES,
    FUNCTIONS,
    assert_all_same,
    decode,
    gradients,
    loss,
    make_problem,
    outputs,
    scores,
    used,
)
from tools import assert_same, reversed_strides, strided

import fastnlp_ops
from fastnlp_ops import reference
from fastnlp_ops._global_pointer_inputs import alike

each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)


@pytest.mark.parametrize("layout", [strided, reversed_strides], ids=["strided", "reversed"])
@pytest.mark.parametrize("case", ["prime", "efficient", "positions"])
def test_layouts_of_memory(layout, case, device):
    plain, leaves = make_problem(device=device, **CASES[case]).leaves()
    expected = outputs(plain, leaves)
    problem = plain.with_inputs(*(None if x is None else layout(x) for x in plain.inputs))
    assert not problem.q.is_contiguous()
    for name in ("labels", "mask", "position_ids"):
        if getattr(plain, name) is not None:
            setattr(problem, name, layout(getattr(plain, name)))
    assert_all_same(outputs(problem, leaves), expected)


def test_layouts_of_a_projection(device):
    """q and k as views into the output of one linear layer, [B, n, H, 2, d]: taken as they are."""
    plain = make_problem(device=device, **CASES["prime"])
    both = torch.stack([plain.q, plain.k], 3).requires_grad_()
    problem = plain.with_inputs(both[..., 0, :], both[..., 1, :], *plain.inputs[2:])
    taken = alike(problem.q, problem.k)
    assert [x.data_ptr() for x in taken] == [problem.q.data_ptr(), problem.k.data_ptr()]
    value = loss(fastnlp_ops, problem)
    weights = torch.randn_like(value)
    assert_same(value, loss(fastnlp_ops, plain))
    expected = gradients(loss, fastnlp_ops, plain, None, weights)
    assert_same(torch.autograd.grad(value, both, weights)[0], torch.stack(expected[:2], 3))


@pytest.mark.parametrize("case", ["ragged", "uneven", "biased"])
def test_gradients_again(case, device):
    """The backward pass leaves alone what the forward pass saved: the same gradients each time."""
    problem, leaves = make_problem(device=device, **CASES[case]).leaves()
    leaves = leaves[: used(loss, problem)]
    total = loss(fastnlp_ops, problem).cos().sum()
    kept, again, last = (torch.autograd.grad(total, leaves, retain_graph=retain) for retain in (True, True, False))
    assert_all_same(again, kept)
    assert_all_same(last, kept)
    total = loss(fastnlp_ops, problem).cos().sum()
    first = torch.autograd.grad(total, leaves, create_graph=True)
    assert_all_same([x.detach() for x in first], kept)
    assert_all_same(torch.autograd.grad(total, leaves), kept)


def test_batched_gradients(device):
    problem, leaves = make_problem(device=device, **CASES["ragged"]).leaves()
    leaves = leaves[: used(loss, problem)]
    rows = loss(fastnlp_ops, problem)
    above = torch.randn(3, *rows.shape, dtype=rows.dtype, device=device)
    each = [torch.autograd.grad(rows, leaves, one, retain_graph=True) for one in above]
    batched = torch.autograd.grad(rows, leaves, above, is_grads_batched=True)
    assert_all_same(batched, [torch.stack(found) for found in zip(*each, strict=True)])


def test_layouts_expanded(device):
    """Stride 0: one sequence seen as a batch, one head seen as many."""
    one = make_problem(1, 12, 1, 8, device, bias=True)
    B, n, H = 3, 12, 4
    sizes = [(B, n, H, 8), (B, n, H, 8), (B, n, H), (B, n, H)] * 2
    problem = one.with_inputs(*(x.expand(size) for x, size in zip(one.inputs, sizes, strict=True)))
    problem.labels = one.labels.expand(B, H, *one.labels.shape[2:])
    dense = problem.with_inputs(*(x.contiguous() for x in problem.inputs))
    assert_all_same(outputs(problem), outputs(dense))
    assert_same(loss(fastnlp_ops, problem), loss(fastnlp_ops, one).expand(B, H).contiguous())


def test_layouts_of_nothing(device):
    """No tokens, in a view that keeps the strides of what it was cut from."""
    q = torch.randn(2, 3, 8, 5, device=device, requires_grad=True)
    nothing = q[..., :0].permute(0, 3, 1, 2)  # [2, 0, 3, 8], channels 5 apart
    none = torch.zeros(0, 4, dtype=torch.int64, device=device)
    value = fastnlp_ops.global_pointer_loss(nothing, nothing, none)
    assert value == 0
    assert not torch.autograd.grad(value, q)[0].any()
    assert fastnlp_ops.global_pointer_scores(nothing, nothing).shape == (2, 3, 0, 0)
    assert fastnlp_ops.global_pointer_decode(nothing, nothing)[0].shape == (0, 4)


def test_layouts_of_one_tensor(device):
    """q is k: both gradients arrive at the one tensor, to any order."""
    plain = make_problem(device=device, dtype=torch.float64, **CASES["left"])
    x = plain.q.nan_to_num().requires_grad_()
    problem = plain.with_inputs(x, x, None, None, *plain.second)
    found = []
    for module in (fastnlp_ops, reference):
        value = loss(module, problem).sum()
        for _ in range(3):
            (slope,) = torch.autograd.grad(value, x, create_graph=True)
            found.append(slope.detach())
            value = slope.sin().sum()
    for own, expected in zip(found[:3], found[3:], strict=True):
        assert torch.allclose(own, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float32, torch.float16])
def test_layouts_of_masks(dtype, device):
    problem = make_problem(device=device, **CASES["prime"])
    expected = outputs(problem)
    problem.mask = problem.mask.to(dtype) * 3
    assert_all_same(outputs(problem), expected)


@pytest.mark.parametrize("form", [torch.int32, torch.int16, torch.int8, "rows"], ids=str)
def test_layouts_of_labels(form, device):
    problem = make_problem(device=device, **CASES["mask_zero"])
    expected = loss(fastnlp_ops, problem)
    if form == "rows":  # [M, 4], in any order
        B, H, P, _ = problem.labels.shape
        row = torch.cartesian_prod(torch.arange(B), torch.arange(H), torch.arange(P)).to(device)
        rows = torch.cat([row[:, :2], problem.labels.reshape(-1, 2)], 1)
        problem.labels = rows[torch.randperm(len(rows), device=device)]
    else:
        problem.labels = problem.labels.to(form)
    assert_same(loss(fastnlp_ops, problem), expected)


def test_layouts_of_positions(device):
    problem = make_problem(device=device, **CASES["positions"])
    expected = scores(fastnlp_ops, problem)
    short = dataclasses.replace(problem, position_ids=problem.position_ids.int())
    assert_same(scores(fastnlp_ops, short), expected)
    n = problem.q.shape[1]
    counted = dataclasses.replace(problem, position_ids=torch.arange(n, device=device).expand(len(problem.q), n))
    assert_same(scores(fastnlp_ops, counted), scores(fastnlp_ops, dataclasses.replace(problem, position_ids=None)))


@each_function
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("case", ["ragged", "efficient", "relations", "long"])
def test_layouts_half(function, case, dtype, device):
    """Half-precision inputs: the value of the same numbers in float32, gradients rounded once to their dtype."""
    half = make_problem(device=device, dtype=dtype, **CASES[case])
    same = half.to(torch.float32)
    value, wide = function(fastnlp_ops, half), function(fastnlp_ops, same)
    assert value.dtype == (dtype if function is scores else torch.float32)
    weights = torch.randn_like(value)
    found = [value, *gradients(function, fastnlp_ops, half, None, weights)]
    expected = [wide, *gradients(function, fastnlp_ops, same, None, weights)]
    for own, plain in zip(found, expected, strict=True):
        if device.type == "cpu":
            assert_same(own, plain.to(own.dtype))
        else:  # products of tensor cores are added in another order there
            size = torch.where(plain.isfinite(), plain.abs(), 0).max().item()
            torch.testing.assert_close(own.float(), plain, rtol=4 * torch.finfo(dtype).eps, atol=1e-5 * max(1, size))
    spans = decode(fastnlp_ops, half)
    if device.type == "cpu":
        assert_all_same(spans, decode(fastnlp_ops, same))


def test_mixed_dtypes(device):
    """Inputs of several dtypes count as the widest; every gradient has the dtype of its input."""
    problem = make_problem(device=device, **CASES["efficient"])
    inputs = [x.to(dtype) for x, dtype in zip(problem.inputs, MIXED * 2, strict=True)]
    problem, leaves = problem.with_inputs(*inputs).leaves()
    assert scores(fastnlp_ops, problem).dtype == torch.float32
    for function in FUNCTIONS:
        value = function(fastnlp_ops, problem)
        assert_same(value, function(fastnlp_ops, problem.to(torch.float32)))
        found = torch.autograd.grad(value[value.isfinite()].sum(), leaves[: used(function, problem)])
        assert [x.dtype for x in found] == [x.dtype for x in leaves[: len(found)]]


MIXED = [torch.bfloat16, torch.float32, torch.float16, torch.bfloat16]


def second_derivative(problem):
    problem, leaves = problem.leaves()
    (first,) = torch.autograd.grad(loss(fastnlp_ops, problem).sum(), leaves[0], create_graph=True)
    return torch.autograd.grad(first.square().sum(), leaves[0])[0]


def test_autocast(device):
    """Under autocast kernels compute in float32, and so does the reference behind second derivatives."""
    problem = make_problem(device=device, **CASES["ragged"])
    exact = second_derivative(problem.to(torch.float64))
    expected = [function(fastnlp_ops, problem) for function in FUNCTIONS], second_derivative(problem)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = [function(fastnlp_ops, problem) for function in FUNCTIONS], second_derivative(problem)
    assert_all_same(found[0], expected[0])
    assert_same(found[1], expected[1])
    assert (found[1] - exact).abs().max() <= 1e-5 * exact.abs().max(), "bfloat16 is a thousand times as far off"
