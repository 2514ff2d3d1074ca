"""Inputs that break linear attention: sums near zero, overflow, maxima that rise, NaN, cuts, and what its peers get
wrong."""

import dataclasses
import itertools
import math

import pytest
import torch
from linear_attention_problems import (
    CASES,
    FEATURE_MAPS,
    assert_all_same,
    cases,
    check_backward,
    check_forward,
    gradients,
    make_problem,
    ours,
    outputs,
)
from tools import assert_same

import fastnlp_ops

NAN, INF = math.nan, math.inf
each_map = pytest.mark.parametrize("name", FEATURE_MAPS)
each_way = pytest.mark.parametrize("causal", [True, False], ids=["causal", "both"])


@each_way
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_sums_past_half_precision(dtype, causal, device):
    """z = 2^21 and more: in float16 it is infinite from 65,504 on, and the output of peers 0; in bfloat16 a sum stops
    growing after 256 equal terms.
    """
    q = torch.full((1, 1024, 1, 32), 8.0, dtype=dtype, device=device)
    v = torch.randint(-1, 3, (1, 1024, 1, 4), device=device).to(dtype)
    out, state = fastnlp_ops.linear_attention(q, q, v, feature_map=None, causal=causal, return_state=True)
    total = v.double().cumsum(1) if causal else v.double().sum(1, keepdim=True).expand(v.shape)
    count = torch.arange(1, 1025, device=device)[:, None, None] if causal else 1024
    expected = total / count
    assert ((out.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs()).all()
    assert (state.key_sum == 8 * 1024).all() and state.key_sum.dtype == torch.float32


@each_way
def test_denominators_near_zero(causal, device):
    """z = 0, and z of either sign around eps: the guard as documented, and no gradient through a guarded z."""
    z = torch.tensor([0.0, -0.0, 2e-7, -2e-7, 3e-6, -3e-6, 1.0, -1.0], dtype=torch.float64, device=device)
    q = torch.stack([z, torch.ones_like(z)], -1)[None, :, None].requires_grad_()  # [1, 8, 1, 2]
    k = torch.tensor([1.0, 0.0], dtype=torch.float64, device=device).expand(1, 8, 1, 2).contiguous()
    k[:, 1:] = 0  # one key, the rest add nothing
    k = k.requires_grad_()
    v = torch.full((1, 8, 1, 1), 5.0, dtype=torch.float64, device=device)
    out = fastnlp_ops.linear_attention(q, k, v, feature_map="identity", causal=causal)
    guarded = torch.tensor([1e-6, 1e-6, 1e-6, -1e-6, 3e-6, -3e-6, 1, -1], dtype=torch.float64, device=device)
    assert torch.allclose(out.flatten(), 5 * z / guarded, rtol=1e-12, atol=0)
    dq, _ = torch.autograd.grad(out.sum(), [q, k])
    # d(5 z / eps) / dz = 5 / eps where guarded; else the quotient is 5 whatever z is
    expected = torch.where(z.abs() < 1e-6, 5 / guarded, 0)
    assert torch.allclose(dq[0, :, 0, 0], expected, rtol=1e-9, atol=1e-5)


def test_eps_is_an_option(device):
    q = torch.full((1, 1, 1, 1), 0.25, dtype=torch.float64, device=device)
    assert fastnlp_ops.linear_attention(q, q, q, feature_map=None).item() == 0.25
    assert fastnlp_ops.linear_attention(q, q, q, feature_map=None, eps=0.5).item() == 0.25**3 / 0.5


@each_map
@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
def test_zeros(dtype, causal, name, device):
    """Queries and keys of zeros, in float16 too: finite, and so are gradients."""
    x = torch.zeros(2, 9, 2, 8, dtype=dtype, device=device, requires_grad=True)
    v = torch.randn(2, 9, 2, 8, device=device).to(dtype)
    out = fastnlp_ops.linear_attention(x, x, v, feature_map=name, causal=causal)
    assert out.isfinite().all()
    if name in ("identity", "relu", "relu^2"):
        assert not out.any()
    elif causal:
        mean = v.float().cumsum(1) / torch.arange(1, 10, device=device)[:, None, None]
        assert torch.allclose(out.float(), mean, atol=4 * torch.finfo(dtype).eps)
    if dtype == torch.float32:
        assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


@each_map
@each_way
def test_nothing_to_attend_to(causal, name, device):
    """A sequence of padding, and rows before the first key: exactly 0, with gradients of exactly 0."""
    problem = make_problem(2, 9, 2, 8, 5, device, causal=causal, feature_map=name)
    mask = torch.ones(2, 9, dtype=torch.bool, device=device)
    mask[0, :4] = mask[1] = False
    problem.k[~mask] = problem.v[~mask] = NAN
    problem.key_padding_mask = mask
    out = ours(problem)[0]
    assert not out[1].any() and out[0, 4:].any()
    assert not causal or not out[0, :4].any()
    found = outputs(problem)
    assert all(x.isfinite().all() for x in found[:3] + found[-3:])
    assert not any(x[1].any() for x in found[-3:])


@pytest.mark.parametrize("case", cases(["prefix", "left", "holes", "holes_both", "gate"]))
def test_masked_tokens_are_not_read(case, device):
    """NaN, infinity or numbers in masked keys, values and gates: the same bits."""
    plain = make_problem(device=device, **CASES[case] | {"poison": False})
    on = plain.key_padding_mask
    found = []
    for fill in (0.0, NAN, INF, -1e30):
        k, v = (torch.where(on[..., None, None], x, fill) for x in (plain.k, plain.v))
        log_decay = None if plain.log_decay is None else torch.where(on[..., None], plain.log_decay, fill)
        found.append(outputs(plain.with_inputs(plain.q, k, v, log_decay, None, None)))
    for other in found[1:]:
        assert_all_same(other, found[0])


def steep_keys(kind, T):
    """A height for each key, up to thousands apart."""
    t = torch.arange(T)
    return {
        "rising": 40 * t,
        "falling": -40 * t,
        "saw": 500 * (t % 7),
        "late": torch.where(t == T - 1, 3000, 0),
        "early": torch.where(t == 0, 3000, 0),
        "steps": 59 * (t // 9),
        "slow": t // 2,
        "random": torch.randint(-400, 400, (T,)),
    }[kind].float()


@pytest.mark.parametrize("name", ["exp", "softmax"])
@each_way
@pytest.mark.parametrize("kind", ["rising", "falling", "saw", "late", "early", "steps", "slow", "random"])
def test_maxima_that_move(kind, causal, name, device):
    """No key overflows, and no early row of a causal pass loses its keys to a larger one that comes later."""
    T = 135
    problem = make_problem(2, T, 2, 6, 5, device, feature_map=name, causal=causal)
    height = steep_keys(kind, T).to(device)
    # Multiples of 1/64: sums of them are exact, so that what is tested is range and not rounding.
    problem.q, problem.k = ((x * 64).round() / 64 for x in (problem.q, problem.k))
    problem.k = problem.k + height[:, None, None] * torch.tensor([1, 1, 0.5, 0, -1, -2], device=device)
    problem.q[1] += 3000
    check_forward(problem)
    check_backward(problem, floor=rounding_of_exponents(problem))


def rounding_of_exponents(problem):
    """The backward pass reads log z in float32: its last place is a relative error of what is computed of it."""
    both = problem.q.abs().max() + problem.k.abs().max()
    return both.item() * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", ["exp", "softmax"])
@each_way
def test_queries_that_move(causal, name, device):
    """Queries thousands apart, channel by channel: the mirror image, for the sums over queries of the backward pass."""
    problem = make_problem(2, 135, 2, 6, 5, device, feature_map=name, causal=causal, state=True)
    problem.q, problem.k = ((x * 64).round() / 64 for x in (problem.q, problem.k))
    problem.q = problem.q + torch.randint(-500, 500, (2, 135, 2, 6), device=device)
    check_forward(problem)
    check_backward(problem, floor=rounding_of_exponents(problem))


def test_exponential_sums_without_normaliser(device):
    """Not normalised, the result is as large as it is: it overflows where it must, and not before."""
    options = {"feature_map": "exp", "normalize": False, "scale": 1.0, "dtype": torch.float32, "device": device}
    for causal in (True, False):
        problem = make_problem(1, 20, 1, 3, 2, causal=causal, **options)
        problem = problem.with_inputs(problem.q - 400, problem.k + 440, *problem.inputs[2:])
        check_forward(problem)
        assert ours(problem)[0].abs().max() > 1e17
        far = problem.with_inputs(problem.q, problem.k + 200, *problem.inputs[2:])
        assert not ours(far)[0].isfinite().any()


@pytest.mark.parametrize("bad", [NAN, INF], ids=str)
@pytest.mark.parametrize("which", ["q", "k", "v"])
@each_way
@each_map
def test_bad_numbers_stay_where_they_are(name, causal, which, bad, device):
    """In one token of one head: in its row (q), or from it on in the heads that share the key, in its sequence."""
    options = {"feature_map": name, "causal": causal, "groups": 2}
    clean = make_problem(3, 70, 4, 6, 5, device, **options)
    dirty = dataclasses.replace(clean, **{which: getattr(clean, which).clone()})
    b, t, head = 1, 37, 1
    getattr(dirty, which)[b, t, head, 2] = bad
    touched = torch.zeros(3, 70, 4, dtype=torch.bool, device=device)
    if which == "q":
        touched[b, t, head] = True
    else:
        touched[b, t if causal else 0 :, 2 * head : 2 * head + 2] = True
    found, expected = ours(dirty), ours(clean)
    untouched = ~touched[..., None].expand_as(found[0])
    assert torch.allclose(found[0][untouched], expected[0][untouched], rtol=1e-5, atol=1e-6)
    assert not found[0][touched].isfinite().all() or (which != "v" and bad == INF)
    weights = [torch.randn_like(x) for x in expected[:1]]
    group = head // 2 if which == "q" else head
    pairs = zip(gradients(ours, dirty, weights), gradients(ours, clean, weights), strict=True)
    for own, other in pairs:
        own, other = (x.unflatten(2, (2, -1)).clone() for x in (own, other))  # [B, T, Hkv, heads of a key, D]
        own[b, :, group] = other[b, :, group] = 0
        assert_same(own, other, "gradient of another sequence or head")


CUTS = cases(["odd", "holes", "decay", "gate", "sums", "grouped"])


@pytest.mark.parametrize("case", CUTS)
def test_cut_anywhere(case, device):
    """A text in two or three parts, each continued from the state: outputs, state, and gradients across the cut."""
    problem = make_problem(device=device, dtype=torch.float64, **CASES[case] | {"poison": False})
    T = problem.q.shape[1]
    weights = [torch.randn_like(x) for x in ours(problem)[:1]]

    def in_parts(problem, cuts):
        outs, state, bounds = [], (None, None, None), [0, *cuts, T]
        for first, last in itertools.pairwise(bounds):
            of = slice(first, last)
            log_decay, mask = problem.log_decay, problem.key_padding_mask
            part = dataclasses.replace(
                problem,
                q=problem.q[:, of],
                k=problem.k[:, of],
                v=problem.v[:, of],
                log_decay=log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[:, of],
                key_padding_mask=None if mask is None else mask[:, of],
                kv=state[0],
                key_sum=state[1],
                key_max=state[2],
            )
            out, *state = ours(part)
            outs.append(out)
        return torch.cat(outs, 1), *state

    whole, expected = ours(problem), gradients(ours, problem, weights)
    for cuts in ([0], [1], [T // 2], [T - 1], [T], [16, 32], [5, 6]):
        for own, other in zip(in_parts(problem, cuts), whole, strict=True):
            assert (own is None) == (other is None)
            assert own is None or torch.allclose(own, other, rtol=1e-11, atol=1e-12)
        found = gradients(lambda problem, cuts=cuts: in_parts(problem, cuts), problem, weights)
        for own, other in zip(found, expected, strict=True):
            assert torch.allclose(own, other, rtol=1e-9, atol=1e-10)


@each_map
def test_causal_and_not(name, device):
    """The last row of a causal pass has seen all keys; so has its state."""
    causal = make_problem(2, 77, 2, 8, 5, device, torch.float64, feature_map=name, causal=True)
    both = dataclasses.replace(causal, causal=False)
    found, expected = ours(causal), ours(both)
    if name != "softmax":  # over past positions it is another map
        assert torch.allclose(found[0][:, -1], expected[0][:, -1], rtol=1e-12)
    for own, other in zip(found[1:], expected[1:], strict=True):
        assert own is None or torch.allclose(own, other, rtol=1e-12)


@each_map
def test_order_of_keys(name, device):
    problem = make_problem(2, 20, 2, 8, 5, device, torch.float64, keys=50, feature_map=name)
    order = torch.randperm(50, device=device)
    mixed = problem.with_inputs(problem.q, problem.k[:, order], problem.v[:, order], None, None, None)
    for own, other in zip(ours(mixed), ours(problem), strict=True):
        assert own is None or torch.allclose(own, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["identity", "elu+1", "relu", "cosine+1"])
def test_decays_of_nothing_and_of_everything(name, device):
    """A log decay of 0 is none; one of -1000 begins a text anew, and its gradient is 0."""
    problem = make_problem(2, 70, 2, 16, 5, device, torch.float64, feature_map=name, causal=True)
    zeros = torch.zeros(2, 70, 2, dtype=torch.float64, device=device)
    for log_decay in (zeros, zeros[0, 0]):
        still = dataclasses.replace(problem, log_decay=log_decay)
        assert torch.allclose(ours(still)[0], ours(problem)[0], rtol=1e-12)
    for start in (0, 1, 16, 33):
        fresh = dataclasses.replace(problem, log_decay=zeros.index_fill(1, torch.tensor(start, device=device), -1000.0))
        out = ours(fresh)[0]
        after = problem.with_inputs(*(x[:, start:] for x in (problem.q, problem.k, problem.v)), None, None, None)
        assert torch.allclose(out[:, :start], ours(problem)[0][:, :start], rtol=1e-12)
        assert torch.allclose(out[:, start:], ours(after)[0], rtol=1e-12)
        slopes = gradients(ours, fresh, [torch.ones_like(out)])
        assert all(x.isfinite().all() for x in slopes)
        assert slopes[3][:, start].abs().max() <= 1e-12


def test_initial_state_is_left_alone(device):
    for case in ("gate_state-elu+1", "packed_state-exp", "state_both-softmax", "no_token-exp"):
        problem = make_problem(device=device, **CASES[case])
        before = [None if x is None else x.clone() for x in problem.state]
        found = ours(problem)[1:]
        for own, other, result in zip(problem.state, before, found, strict=True):
            if own is not None:
                assert_same(own, other)
                result.fill_(7)
                assert_same(own, other)


@pytest.mark.parametrize("asked", ["q", "k", "v", "log_decay", "kv", "key_sum"])
def test_gradients_of_one_input(asked, device):
    problem = make_problem(device=device, **CASES["gate_state-elu+1"])
    expected = outputs(problem)[3:]
    index = ["q", "k", "v", "log_decay", "kv", "key_sum"].index(asked)
    leaf = problem.inputs[index].detach().requires_grad_()
    alone = problem.with_inputs(*(leaf if i == index else x for i, x in enumerate(problem.inputs)))
    assert_same(outputs(alone, [leaf])[-1], expected[index])
    with torch.no_grad():
        assert not ours(alone)[0].requires_grad


def test_long_text(device):
    """100,000 tokens: a state that has not lost digits."""
    problem = make_problem(1, 100_000, 1, 8, 8, device, causal=True, feature_map="elu+1")
    found, exact = ours(problem), ours(problem.to(torch.float64))
    for own, other in zip(found[:3], exact[:3], strict=True):
        assert ((own - other).abs() <= 1e-5 * other.abs().max()).all()


@each_way
def test_strides_past_32_bits(causal, device, tmp_path):
    """Sequences 2^31 numbers apart: a sparse file of 17 GB, of which a few pages are written."""
    if device.type != "cpu":
        pytest.skip("a file is mapped into the memory of the CPU")
    plain = make_problem(2, 5, 2, 4, 4, causal=causal)
    stride = 2**31 + 64
    far = []
    for name in ("q", "k", "v"):
        path = tmp_path / name
        with path.open("wb") as file:
            file.truncate(4 * (stride + 1024))
        x = torch.from_file(str(path), shared=False, size=stride + 1024, dtype=torch.float32)
        view = x.as_strided((2, 5, 2, 4), (stride, 8, 4, 1))
        view.copy_(getattr(plain, name))
        far.append(view)
    assert_same(ours(plain.with_inputs(*far, None, None, None))[0], ours(plain)[0])
