"""Decoding token by token: the state in place, against one pass over the whole text."""

import pytest
import torch
from linear_attention_problems import CASES, FEATURE_MAPS, kernel_arguments, make_problem, ours
from tools import assert_same, strided

import fastnlp_ops
from fastnlp_ops import LinearAttentionState, reference

STEPS = {
    "plain": {"B": 2, "T": 23, "H": 3, "Dk": 8, "Dv": 5},
    "grouped": {"B": 3, "T": 9, "H": 6, "groups": 2, "Dk": 17, "Dv": 33},
    "sums": {"B": 2, "T": 9, "H": 2, "Dk": 8, "Dv": 8, "normalize": False, "scale": 0.7},
    "one": {"B": 1, "T": 4, "H": 1, "Dk": 1, "Dv": 1},
    "wide": {"B": 1, "T": 5, "H": 2, "Dk": 128, "Dv": 256},
    "no_sequence": {"B": 0, "T": 4, "H": 2, "Dk": 4, "Dv": 4},
}
each_map = pytest.mark.parametrize("name", FEATURE_MAPS)


def empty_state(problem):
    """What a text of no tokens leaves."""
    nothing = problem.with_inputs(*(x[:, :0] for x in (problem.q, problem.k, problem.v)), None, None, None)
    return LinearAttentionState(*ours(nothing)[1:])


def options_of(problem):
    return {name: getattr(problem, name) for name in ("feature_map", "normalize", "scale", "eps")}


def steps(problem, state, tokens, step=fastnlp_ops.linear_attention_step, decays=()):
    q, k, v = problem.q, problem.k, problem.v
    outs = [
        step(q[:, t], k[:, t], v[:, t], state, log_decay=decays[t] if len(decays) else None, **options_of(problem))
        for t in tokens
    ]
    return torch.stack(outs, 1)


@each_map
@pytest.mark.parametrize("layout", STEPS)
@pytest.mark.parametrize("first", [0, 3])
def test_steps_are_a_pass(first, layout, name, device):
    """From nothing, or from the state behind the first tokens."""
    problem = make_problem(device=device, dtype=torch.float64, causal=True, feature_map=name, **STEPS[layout])
    out, *last = ours(problem)
    head = problem.with_inputs(*(x[:, :first] for x in (problem.q, problem.k, problem.v)), None, None, None)
    state = LinearAttentionState(*ours(head)[1:]) if first else empty_state(problem)
    found = steps(problem, state, range(first, problem.q.shape[1]))
    assert torch.allclose(found, out[:, first:], rtol=1e-11, atol=1e-12)
    for own, other in zip(state, last, strict=True):
        assert (own is None) == (other is None)
        assert own is None or torch.allclose(own, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["identity", "elu+1", "relu", "relu^2", "cosine+1"])
@pytest.mark.parametrize("decay", ["head", "token"])
def test_steps_with_decay(decay, name, device):
    options = {"causal": True, "decay": decay, "groups": 2, "feature_map": name}
    problem = make_problem(2, 15, 4, 8, 5, device, torch.float64, **options)
    out, *last = ours(problem)
    state = empty_state(problem)
    g = problem.log_decay
    found = steps(problem, state, range(15), decays=g.expand(15, 2) if decay == "head" else g.transpose(0, 1))
    assert torch.allclose(found, out, rtol=1e-11, atol=1e-12)
    assert torch.allclose(state.kv, last[0], rtol=1e-11, atol=1e-12)


@each_map
def test_reference_step(name, device):
    problem = make_problem(2, 6, 4, 8, 5, device, torch.float64, causal=True, groups=2, feature_map=name)
    ours_state, their_state = empty_state(problem), empty_state(problem)
    found = steps(problem, ours_state, range(6))
    expected = steps(problem, their_state, range(6), reference.linear_attention_step)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-13)
    for own, other in zip(ours_state, their_state, strict=True):
        assert own is None or torch.allclose(own, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["elu+1", "exp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_half_precision_does_not_drift(dtype, name, device):
    """8,192 tokens: no more error at the end than that of one rounding (a peer's state in bfloat16: 18% at 640)."""
    T = 8192
    problem = make_problem(1, T, 1, 16, 16, device, dtype, causal=True, feature_map=name)
    state = empty_state(problem)
    steps(problem, state, range(T - 32))
    found = steps(problem, state, range(T - 32, T))
    exact = ours(problem.to(torch.float64))[0][:, -32:]
    error = (found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error <= torch.finfo(dtype).eps / 2
    assert all(x is None or x.dtype == torch.float32 for x in state)


@each_map
def test_maxima_and_bad_numbers(name, device):
    """Keys that rise by hundreds; NaN in one head stays there."""
    problem = make_problem(2, 8, 4, 6, 5, device, causal=True, groups=2, feature_map=name)
    if name in ("exp", "softmax"):
        problem.k += 150.0 * torch.arange(8, device=device)[:, None, None].remainder(3)
    problem.k[1, 3, 1, 2] = torch.nan
    state = empty_state(problem)
    found, expected = steps(problem, state, range(8)), ours(problem)[0]
    assert torch.equal(found.isnan(), expected.isnan()) and found.isnan().any()
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert not state.kv[0].isnan().any() and not state.kv[1, 0].isnan().any()


def test_in_place(device):
    """The tensors of the state are written to, and autograd is told of it."""
    problem = make_problem(2, 4, 2, 8, 5, device, causal=True, feature_map="exp")
    state = empty_state(problem)
    before = [(x.data_ptr(), x._version, x.clone()) for x in state]
    steps(problem, state, [0])
    for x, (pointer, version, old) in zip(state, before, strict=True):
        assert x.data_ptr() == pointer and x._version == version + 1
        assert not torch.equal(x, old)
    weight = torch.ones(2, 2, 8, 5, device=device, requires_grad=True)
    product = weight * state.kv
    steps(problem, state, [1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["f32", "bf16", "f64"])
def test_layouts(dtype, device):
    """Any strides; the heads of one projection."""
    problem = make_problem(2, 5, 4, 8, 8, device, dtype, causal=True, groups=2)
    wide = [strided(x) for x in (problem.q, problem.k, problem.v)]
    joint = torch.cat([problem.q, problem.k, problem.v], 2).split([4, 2, 2], 2)
    expected_state = empty_state(problem)
    expected = steps(problem, expected_state, range(5))
    assert expected.dtype == dtype
    for tensors in (wide, joint):
        state = empty_state(problem)
        assert_same(steps(problem.with_inputs(*tensors, None, None, None), state, range(5)), expected)
        assert_same(state.kv, expected_state.kv)


def test_modes(device):
    """Under inference_mode, no_grad, autocast with several dtypes; with grad mode on where nothing asks for one."""
    problem = make_problem(2, 3, 2, 8, 8, device, causal=True)
    expected = steps(problem, empty_state(problem), range(3))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_same(steps(problem, empty_state(problem), range(3)), expected)
    q, k, v = problem.q[:, 0], problem.k[:, 0].bfloat16(), problem.v[:, 0].half()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = fastnlp_ops.linear_attention_step(q, k, v, empty_state(problem))
    same = fastnlp_ops.linear_attention_step(q.bfloat16(), k, v.bfloat16(), empty_state(problem))
    assert_same(found, same)


@pytest.mark.parametrize("name", ["elu+1", "exp", "cosine+1"])
def test_repeatable(name, device, threads):
    problem = make_problem(3, 4, 8, 64, 64, device, causal=True, groups=4, feature_map=name)
    runs = []
    for count in (1, 2, 3):
        threads(count)
        state = empty_state(problem)
        runs.append([steps(problem, state, range(4)), state.kv])
    for run in runs[1:]:
        assert all(torch.equal(*pair) for pair in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("name", ["elu+1", "exp"])
def test_opcheck(name, device):
    problem = make_problem(2, 1, 4, 8, 5, device, causal=True, groups=2, feature_map=name)
    state = empty_state(problem)
    number = kernel_arguments(problem)[0][10]
    arguments = (problem.q[:, 0], problem.k[:, 0], problem.v[:, 0], *state, None, number, True, 1.0, 1e-6)
    torch.library.opcheck(torch.ops.fastnlp_ops.linear_attention_step.default, arguments)


def test_compile(device):
    torch._dynamo.reset()

    def decode(q, k, v, state):
        return fastnlp_ops.linear_attention_step(q, k, v, state, feature_map="exp") * 2

    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    problem = make_problem(2, 4, 4, 8, 5, device, causal=True, groups=2, feature_map="exp")
    state, other = empty_state(problem), empty_state(problem)
    with torch.no_grad():
        for t in range(4):
            tokens = [x[:, t] for x in (problem.q, problem.k, problem.v)]
            assert_same(compiled(*tokens, state), decode(*tokens, other))
            assert_same(state.kv, other.kv)


def test_prefill_then_steps_of_a_batch(device):
    """Texts of several lengths: padded on the left they end together, and go on token by token."""
    problem = make_problem(device=device, dtype=torch.float64, **CASES["left-elu+1"])
    state = LinearAttentionState(*ours(problem)[1:])
    more = make_problem(3, 2, 2, 8, 5, device, torch.float64, causal=True)
    found = steps(more, state, range(2))
    for b in range(3):
        on = problem.key_padding_mask[b]
        tensors = [torch.cat([x[b, on], y[b]])[None] for x, y in zip(problem.inputs[:3], more.inputs[:3], strict=True)]
        alone = ours(more.with_inputs(*tensors, None, None, None))[0]
        assert torch.allclose(found[b], alone[0, -2:], rtol=1e-11, atol=1e-12)
