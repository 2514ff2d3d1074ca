"""Linear attention against its reference: values, gradients, compilation."""

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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
    plain,
    small_problem,
    third_derivative,
)

import fastnlp_ops
from fastnlp_ops.reference.linear_attention import EXPONENTIAL, FEATURE_MAPS

each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


@each_dtype
@each_case
def test_forward(case, dtype, device):
    check_forward(make_problem(device=device, dtype=dtype, **CASES[case]))


@each_dtype
@each_case
def test_backward(case, dtype, device):
    check_backward(make_problem(device=device, dtype=dtype, **CASES[case]))


@pytest.mark.parametrize("outputs", [["out"], ["kv"], ["key_sum"], ["kv", "key_sum"]], ids="+".join)
@pytest.mark.parametrize("case", ["gate_state-elu+1", "state_both-softmax", "packed_state-exp", "state-cosine+1"])
def test_backward_of_some(case, outputs, device):
    """Gradients of a part of the results: the others have none, which is not the same as zeros to every kernel."""
    check_backward(make_problem(device=device, **CASES[case]), outputs)


LAYOUTS = ["odd", "odd_both", "holes", "cross", "grouped", "sums", "sums_both", "packed_state", "packed_cross"]
LAYOUTS += ["decay", "gate_state", "gate_sums", "state", "state_both"]
SMALL = cases(LAYOUTS)


def as_function(problem):
    """The results by the inputs that are there. kv and key_sum of exponentials are relative to a constant key_max."""
    count = 1 if problem.kernel_map in EXPONENTIAL else 3

    def function(*leaves):
        found = iter(leaves)
        return ours(problem.with_inputs(*(None if x is None else next(found) for x in problem.inputs)))[:count]

    return function


@pytest.mark.parametrize("case", SMALL)
def test_gradcheck(case, device):
    problem, leaves = small_problem(case, device).leaves()
    assert torch.autograd.gradcheck(as_function(problem), leaves)


@pytest.mark.parametrize("case", SMALL)
def test_gradgradcheck(case, device):
    problem, leaves = small_problem(case, device).leaves()
    assert torch.autograd.gradgradcheck(as_function(problem), leaves, fast_mode=True)


@pytest.mark.parametrize("case", ["gate_state-elu+1", "packed_cross-exp", "state_both-softmax", "odd-relu^2"])
def test_third_derivatives(case, device):
    problem = small_problem(case, device)
    pairs = zip(third_derivative(ours, problem), third_derivative(plain, problem), strict=True)
    for own, expected in pairs:
        assert torch.allclose(own, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", ["gate_state-elu+1", "packed_state-exp", "state_both-softmax"])
def test_second_derivatives_of_the_state(case, device):
    """Where nothing flows back into the output."""
    drawn, found = small_problem(case, device), []
    for call in (ours, plain):
        problem, leaves = drawn.leaves()
        slopes = torch.autograd.grad(call(problem)[1].sin().sum(), leaves[1:3], create_graph=True)
        total = sum(slope.square().sum() for slope in slopes)
        found.append(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))
    for own, expected in zip(*found, strict=True):
        assert torch.allclose(own, expected, rtol=1e-9, atol=1e-11)
    assert found[1][1].any()


def op_arguments(problem):
    """Arguments of every op of the family."""
    inputs, _ = kernel_arguments(problem)
    q, k, v, *layout = inputs
    with torch.no_grad():
        found = torch.ops.fastnlp_ops.linear_attention(*inputs)
    upstream = [torch.randn_like(found[i]) for i in (0, 2, 3)]
    return {
        "linear_attention": inputs,
        "linear_attention_backward": (*upstream, q, k, v, *found, *layout),
    }


@pytest.mark.parametrize("case", ["gate_state-relu", "packed_state-exp", "state_both-cosine+1", "holes_both-softmax"])
@pytest.mark.parametrize("op", [f"linear_attention{part}" for part in ("", "_backward")])
def test_opcheck(op, case, device):
    problem, _ = make_problem(device=device, **CASES[case] | {"poison": False}).leaves()
    torch.library.opcheck(getattr(torch.ops.fastnlp_ops, op).default, op_arguments(problem)[op])


@pytest.mark.parametrize(
    "case", ["holes-elu+1", "state_both-exp", "gate_state-cosine+1", "cross-softmax", "decay-relu^2"]
)
def test_compile(case, device):
    torch._dynamo.reset()
    compiled = torch.compile(
        functools.partial(attention, fastnlp_ops), fullgraph=True, dynamic=True, backend="aot_eager"
    )

    def step(call, problem):
        problem, leaves = problem.leaves()
        found = call(problem)
        total = sum(x.cos().sum() for x in found[:3])
        return [*found[:3], *torch.autograd.grad(total, leaves)]

    def check(B, T, keys):
        options = {**CASES[case], "B": B, "T": T}
        if "keys" in options:
            options["keys"] = keys
        problem = make_problem(device=device, **options)
        assert_all_same(step(compiled, problem), step(functools.partial(attention, fastnlp_ops), problem))

    # No two sizes alike: dynamo takes equal sizes for the same symbol.
    check(21, 26, 31)
    with torch.compiler.set_stance("fail_on_recompile"):
        check(22, 27, 33)


def test_compile_packed(device):
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([5, 0, 8], [3, 9, 1, 4]):
        problem = make_problem(device=device, **CASES["packed-exp"] | {"lengths": lengths})
        assert_all_same(compiled(problem), ours(problem))


def test_compile_is_one_kernel_each_way(device):
    torch._dynamo.reset()
    problem, leaves = make_problem(device=device, **CASES["holes-elu+1"]).leaves()
    seen = []

    def backend(graph, example):
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def count(module, _):
            seen.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
            return make_boxed_func(module.forward)

        return aot_autograd(fw_compiler=count, bw_compiler=count)(graph, example)

    torch.compile(ours, fullgraph=True, backend=backend)(problem)[0].sum().backward()
    assert [name for name in seen if "linear_attention" in name] == [
        f"fastnlp_ops.linear_attention{way}.default" for way in ("", "_backward")
    ]
    assert leaves[0].grad.abs().sum() > 0


class Attention(torch.nn.Module):
    def forward(self, q, k, v, mask):
        return fastnlp_ops.linear_attention(q, k, v, key_padding_mask=mask, causal=True)


def test_export(device):
    options = CASES["grouped-elu+1"]
    B, T = torch.export.Dim("B", min=2), torch.export.Dim("T", min=2)
    first, other = (make_problem(device=device, **options | sizes) for sizes in ({"B": 4}, {"B": 3, "T": 7}))
    calls = [(x.q, x.k, x.v, x.key_padding_mask) for x in (first, other)]
    exported = torch.export.export(Attention(), calls[0], dynamic_shapes=({0: B, 1: T},) * 4).module()
    for call in calls:
        assert_all_same([exported(*call)], [Attention()(*call)])


def test_repeatable(device, threads):
    """Bitwise: run to run, and for any number of threads."""
    for layout in ("aligned", "odd_both", "grouped", "packed", "gate", "long", "long_both", "wide"):
        for name in ("elu+1", "exp", "cosine+1"):
            if f"{layout}-{name}" not in CASES:
                continue
            problem = make_problem(device=device, **CASES[f"{layout}-{name}"])
            runs = []
            for count in (1, 2, 2, 3):
                threads(count)
                runs.append(outputs(problem))
            for run in runs[1:]:
                assert_all_same(run, runs[0], f"{layout}-{name}")


fuzz = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
problems = st.fixed_dictionaries(
    {
        "B": st.integers(0, 4),
        "T": st.integers(0, 140),
        "keys": st.one_of(st.none(), st.integers(0, 140)),
        "groups": st.integers(1, 3),
        "queries": st.integers(1, 3),  # heads of queries for each of the keys
        "Dk": st.integers(1, 40),
        "Dv": st.integers(1, 40),
        "lengths": st.one_of(st.none(), st.lists(st.integers(0, 70), max_size=5)),
        "mask": st.sampled_from([None, "full", "prefix", "left", "holes"]),
        "decay": st.sampled_from([None, "head", "token"]),
        "state": st.booleans(),
        "std": st.sampled_from([0.3, 1.0, 2.0]),
        "feature_map": st.sampled_from([None, *FEATURE_MAPS]),
        "causal": st.booleans(),
        "normalize": st.booleans(),
        "scale": st.sampled_from([None, 1.0, -0.5]),
        "dtype": st.sampled_from([torch.float32, torch.float64]),
    }
)


@fuzz
@given(options=problems, seed=st.integers(0, 2**32))
def test_fuzz(device, options, seed):
    torch.manual_seed(seed)
    options = dict(options)
    options["H"] = options["groups"] * options.pop("queries")
    if options["causal"]:
        options["keys"] = None
    if not options["causal"] or options["feature_map"] in EXPONENTIAL:
        options["decay"] = None
    if options["lengths"] is not None:
        options["mask"] = None
    problem = make_problem(device=device, **options)
    check_forward(problem)
    check_backward(problem)
