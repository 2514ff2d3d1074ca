"""Linear attention on every layout of its arguments: strides, dtypes, heads, packing, autocast."""

import dataclasses

import pytest
import torch
from linear_attention_problems import (
    CASES,
    assert_all_same,
    attention,
    cases,
    check_backward,
    check_forward,
    kernel_arguments,
    make_problem,
    ours,
    outputs,
    small_problem,
    third_derivative,
)
from tools import assert_same, reversed_strides, strided

import fastnlp_ops
from fastnlp_ops import reference


@pytest.mark.parametrize("layout", [strided, reversed_strides], ids=["strided", "reversed"])
@pytest.mark.parametrize("case", ["holes-elu+1", "gate_state-relu", "packed_state-exp", "cross-softmax"])
def test_layouts_of_memory(layout, case, device):
    plain, leaves = make_problem(device=device, **CASES[case]).leaves()
    expected = outputs(plain, leaves)
    problem = plain.with_inputs(*(None if x is None else layout(x) for x in plain.inputs))
    assert not problem.q.is_contiguous()
    for name in ("key_padding_mask", "key_max", "cu_seqlens_q"):
        if getattr(plain, name) is not None:
            setattr(problem, name, layout(getattr(plain, name)))
    assert_all_same(outputs(problem, leaves), expected)


def test_layouts_of_a_projection(device):
    """q, k and v as views into the output of one linear layer, [B, T, 3, H, D]: taken as they are."""
    plain = make_problem(device=device, **CASES["aligned-elu+1"])
    three = torch.stack([plain.q, plain.k, plain.v], 2).requires_grad_()
    problem = plain.with_inputs(*three.unbind(2), None, None, None)
    taken, _ = kernel_arguments(problem)
    assert [x.data_ptr() for x in taken[:3]] == [x.data_ptr() for x in (problem.q, problem.k, problem.v)]
    expected = outputs(plain)
    found = outputs(problem, [three])
    assert_all_same(found[:3], expected[:3])
    assert_same(found[3], torch.stack(expected[3:], 2))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both"])
def test_layouts_of_heads_first(causal, device):
    """[B, H, T, D] seen as [B, T, H, D], and a slice of a wider tensor: taken as they are."""
    plain = make_problem(device=device, **CASES["odd-exp"] | {"causal": causal})
    wide = [torch.nn.functional.pad(x.transpose(1, 2), (3, 2), value=torch.nan) for x in (plain.q, plain.k, plain.v)]
    views = [x[..., 3:-2].transpose(1, 2) for x in wide]
    problem = plain.with_inputs(*views, None, None, None)
    taken, _ = kernel_arguments(problem)
    assert [x.data_ptr() for x in taken[:3]] == [x.data_ptr() for x in views]
    assert_all_same(outputs(problem), outputs(plain))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both"])
def test_layouts_expanded(causal, device):
    """Stride 0: one sequence seen as a batch, one head seen as many."""
    one = make_problem(1, 12, 1, 8, 5, device, feature_map="relu", causal=causal)
    sizes = [(3, 12, 4, 8), (3, 12, 2, 8), (3, 12, 2, 5)]
    views = [x.expand(size) for x, size in zip((one.q, one.k, one.v), sizes, strict=True)]
    problem = one.with_inputs(*views, None, None, None)
    dense = problem.with_inputs(*(x.contiguous() for x in views), None, None, None)
    assert_all_same(outputs(problem), outputs(dense))
    assert_same(ours(problem)[0], ours(one)[0].expand(3, 12, 4, 5).contiguous())


def test_layouts_of_one_channel(device):
    """Strides of an axis of size 1 say nothing."""
    plain = make_problem(2, 9, 3, 1, 1, device, causal=True)
    odd = [x.as_strided(x.shape, (*x.stride()[:3], 7)) for x in (plain.q, plain.k, plain.v)]
    assert_all_same(outputs(plain.with_inputs(*odd, None, None, None)), outputs(plain))


@pytest.mark.parametrize("name", ["identity", "exp", "cosine+1"])
def test_layouts_of_one_tensor(name, device):
    """q is k is v: all gradients arrive at the one tensor, to any order."""
    x = (torch.rand(2, 7, 2, 4, dtype=torch.float64, device=device) + 0.1).requires_grad_()
    found = []
    for module in (fastnlp_ops, reference):
        value = module.linear_attention(x, x, x, causal=True, feature_map=name).sin().sum()
        for _ in range(3):
            (slope,) = torch.autograd.grad(value, x, create_graph=True)
            found.append(slope.detach())
            value = slope.sin().sum()
    for own, expected in zip(found[:3], found[3:], strict=True):
        assert torch.allclose(own, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", ["grouped-elu+1", "grouped_both-exp", "decay-cosine+1", "packed_state-relu^2"])
def test_layouts_of_groups(case, device):
    """Heads that share a key, against the keys repeated for each."""
    problem = make_problem(device=device, dtype=torch.float64, **CASES[case] | {"poison": False})
    repeats = problem.q.shape[2] // problem.k.shape[2]
    repeated = problem.with_inputs(
        problem.q,
        *(None if x is None else x.repeat_interleave(repeats, axis) for x, axis in repeatable(problem)),
    )
    out, shared = ours(repeated)[0], ours(problem)[0]
    assert torch.allclose(out, shared, rtol=1e-12, atol=1e-13)


def repeatable(problem):
    """The inputs behind q, each with its axis of heads."""
    log_decay = problem.log_decay
    return [(problem.k, 2), (problem.v, 2), (log_decay, -1), (problem.kv, 1), (problem.key_sum, 1)]


PACKED = ["packed", "packed_both", "packed_cross", "packed_state", "gate_packed"]


@pytest.mark.parametrize("case", cases(PACKED, ["elu+1", "exp", "softmax", "cosine+1"]))
def test_layouts_packed(case, device):
    """Packed sequences, one by one."""
    problem = make_problem(device=device, dtype=torch.float64, **CASES[case])
    found = ours(problem)
    ends_q = problem.cu_seqlens_q.tolist()
    ends_k = ends_q if problem.cu_seqlens_k is None else problem.cu_seqlens_k.tolist()
    for n in range(len(ends_q) - 1):
        at, of, own = slice(*ends_q[n : n + 2]), slice(*ends_k[n : n + 2]), slice(n, n + 1)
        alone = dataclasses.replace(
            problem,
            q=problem.q[:, at],
            k=problem.k[:, of],
            v=problem.v[:, of],
            log_decay=None if problem.log_decay is None else problem.log_decay[:, of],
            kv=None if problem.kv is None else problem.kv[own],
            key_sum=None if problem.key_sum is None else problem.key_sum[own],
            key_max=None if problem.key_max is None else problem.key_max[own],
            cu_seqlens_q=None,
            cu_seqlens_k=None,
        )
        out, *state = ours(alone)
        assert torch.allclose(found[0][:, at], out, rtol=1e-12, atol=1e-13)
        for own_state, expected in zip(found[1:], state, strict=True):
            if expected is not None:
                assert torch.allclose(own_state[own], expected, rtol=1e-12, atol=1e-13)


def test_layouts_of_offsets(device):
    """int32 or int64; one of the two for both."""
    problem = make_problem(device=device, **CASES["packed-elu+1"])
    expected = outputs(problem)
    ends = problem.cu_seqlens_q
    for pair in ((ends.int(), None), (None, ends), (ends, ends.int()), (None, ends.int())):
        same = dataclasses.replace(problem, cu_seqlens_q=pair[0], cu_seqlens_k=pair[1])
        assert_all_same(outputs(same), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize(
    "case", ["grouped-elu+1", "gate_state-relu", "long_both-exp", "packed-cosine+1", "cross-softmax"]
)
def test_layouts_half(case, dtype, device):
    """Half-precision inputs: the value of the same numbers in float32, rounded once; the state is not rounded."""
    half = make_problem(device=device, dtype=dtype, **CASES[case])
    same = half.to(torch.float32)
    found, expected = ours(half), ours(same)
    if device.type == "cpu":
        assert_same(found[0], expected[0].to(dtype))
        assert_all_same([x for x in found[1:] if x is not None], [x for x in expected[1:] if x is not None])
    check_forward(half)
    check_backward(half)


def test_mixed_dtypes_under_autocast(device):
    problem = make_problem(device=device, **CASES["holes-elu+1"])
    q, k, v = problem.q, problem.k.bfloat16(), problem.v.half()
    options = {"causal": True, "key_padding_mask": problem.key_padding_mask}
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = fastnlp_ops.linear_attention(q, k, v, **options)
    same = fastnlp_ops.linear_attention(q.bfloat16(), k, v.bfloat16(), **options)
    assert_same(found, same)


@pytest.mark.parametrize("case", ["gate_state-elu+1", "state_both-softmax"])
def test_autocast(case, device):
    """Under autocast kernels compute what they compute, and so does the reference behind second derivatives."""
    problem = make_problem(device=device, **CASES[case])
    small = small_problem(case, device).to(torch.float32)
    expected = outputs(problem), third_derivative(ours, small)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = outputs(problem), third_derivative(ours, small)
    assert_all_same(found[0], expected[0])
    assert_all_same(found[1], expected[1])


def test_functional_without_state(device):
    """Without return_state there is a tensor and no tuple, and the state of a map without maxima has none."""
    problem = make_problem(device=device, **CASES["odd-elu+1"])
    out = fastnlp_ops.linear_attention(problem.q, problem.k, problem.v, causal=True)
    assert_same(out, ours(problem)[0])
    assert attention(fastnlp_ops, problem)[3] is None
