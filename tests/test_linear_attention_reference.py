"""The reference of linear attention by itself: its two forms, and formulas by hand in float64."""

import math

import pytest
import torch
from linear_attention_problems import CASES, INPUTS, cases, gradients, make_problem, plain, recurrence, upstream

from fastnlp_ops import reference
from fastnlp_ops.reference.linear_attention import EXPONENTIAL, FEATURE_MAPS, features

CAUSAL = [case for case, options in CASES.items() if options.get("causal") and not case.startswith(("wide", "aligned"))]


def assert_close(found, expected, what):
    assert found.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(found[~finite], expected[~finite]), what
    assert torch.allclose(found[finite], expected[finite], rtol=1e-9, atol=1e-11), what


@pytest.mark.parametrize("case", CAUSAL)
def test_forms_agree(case, device):
    """The matrix of similarities and the recurrence over tokens: values and first derivatives."""
    problem = make_problem(device=device, dtype=torch.float64, **CASES[case])
    found, expected = plain(problem), recurrence(problem)
    for name, own, other in zip(("out", "kv", "key_sum", "key_max"), found, expected, strict=True):
        assert (own is None) == (other is None)
        if own is not None:
            assert_close(own, other, name)
    weights = upstream(problem)
    names = [name for name, x in zip(INPUTS, problem.inputs, strict=True) if x is not None]
    pairs = zip(names, gradients(plain, problem, weights), gradients(recurrence, problem, weights), strict=True)
    for name, own, other in pairs:
        assert_close(own, other, f"d{name}")


def phi(x, name):
    """A feature map of a list of numbers, from its definition."""
    if name == "cosine+1":
        return [1.0, *(y / math.sqrt(sum(z * z for z in x)) for y in x)]
    maps = {
        "identity": lambda y: y,
        "elu+1": lambda y: y + 1 if y > 0 else math.exp(y),
        "relu": lambda y: max(y, 0.0),
        "relu^2": lambda y: max(y, 0.0) ** 2,
        "exp": math.exp,
    }
    return [maps[name](y) for y in x]


def by_hand(problem, b, t, h):
    """One row of the output, number by number."""
    q, name = problem.q[b, t, h].tolist(), problem.kernel_map
    group = h * problem.k.shape[2] // problem.q.shape[2]
    last = t + 1 if problem.causal else problem.k.shape[1]
    keys = [j for j in range(last) if problem.key_padding_mask is None or problem.key_padding_mask[b, j]]
    k, v = ([x[b, j, group].tolist() for j in keys] for x in (problem.k, problem.v))
    width = len(q)
    if name == "softmax":
        total = sum(map(math.exp, q))
        sums = [sum(math.exp(row[d]) for row in k) for d in range(width)]
        weights = [sum(math.exp(q[d]) / total * math.exp(row[d]) / sums[d] for d in range(width)) for row in k]
    else:
        weights = [sum(x * y for x, y in zip(phi(q, name), phi(row, name), strict=True)) for row in k]
        if problem.log_decay is not None:
            g = problem.log_decay.expand(problem.k.shape[:3])[b, :, group].tolist()
            weights = [w * math.exp(sum(g[i] for i in keys if i > j)) for w, j in zip(weights, keys, strict=True)]
        if problem.normalize or problem.feature_map == "softmax":
            total = sum(weights)
            weights = [w / (total if abs(total) >= problem.eps else math.copysign(problem.eps, total)) for w in weights]
    scale = width**-0.5 if problem.scale is None else problem.scale
    factor = 1.0 if problem.normalize else scale
    return [factor * sum(w * row[e] for w, row in zip(weights, v, strict=True)) for e in range(problem.v.shape[3])]


def assert_by_hand(found, problem):
    B, T, H, _ = problem.q.shape
    for b in range(B):
        for t in range(T):
            for h in range(H):
                assert found[b, t, h].tolist() == pytest.approx(by_hand(problem, b, t, h), rel=1e-9, abs=1e-11)


BY_HAND = ["odd", "odd_both", "holes", "holes_both", "cross", "grouped", "grouped_both", "sums", "sums_both", "gate"]


@pytest.mark.parametrize("case", cases(BY_HAND))
def test_by_hand(case, device):
    options = CASES[case] | {"B": 2, "T": 6}
    problem = make_problem(device=device, dtype=torch.float64, **options)
    assert_by_hand(plain(problem)[0], problem)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_features(name, device):
    x = torch.randn(40, 5, dtype=torch.float64, device=device)
    if name not in EXPONENTIAL:
        expected = torch.tensor([phi(row, name) for row in x.tolist()], dtype=torch.float64, device=device)
        assert torch.allclose(features(x, name), expected, rtol=1e-14)


def test_far_exponents(device):
    """Offsets of thousands in q and k, keys that rise and fall by hundreds: exact where the result is."""
    problem = make_problem(2, 12, 2, 3, 4, device, torch.float64, causal=True, feature_map="exp")
    expected, _ = reference.linear_attention(problem.q, problem.k, problem.v, **problem.options, return_state=True)
    shifted = problem.with_inputs(problem.q + 5000, problem.k - 7000, *problem.inputs[2:])
    assert torch.allclose(plain(shifted)[0], expected)
    steep = problem.with_inputs(problem.q, problem.k + 100 * torch.randn_like(problem.k[:, :, :1]), *problem.inputs[2:])
    assert torch.allclose(plain(steep)[0], recurrence(steep)[0])
    assert_by_hand(plain(steep)[0][:1, :, :1], steep.with_inputs(steep.q[:1, :, :1], *steep.inputs[1:]))
