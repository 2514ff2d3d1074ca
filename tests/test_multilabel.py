"""Multilabel cross entropy over dense scores, with hard, soft and index labels, against its reference."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from multilabel_problems import KINDS, check, gradient, loss, make_problem
from tools import assert_same, reversed_strides, strided

import fastnlp_ops
from fastnlp_ops import reference
from fastnlp_ops.reference.multilabel import indices_to_labels, log_sums

INF = math.inf
CASES = {
    "aligned": {"R": 8, "C": 64},
    "ragged": {"R": 5, "C": 37, "masked": 0.3},
    "prime": {"R": 7, "C": 509, "masked": 0.1},
    "one": {"R": 1, "C": 1},
    "one_class": {"R": 5, "C": 1, "masked": 0.4},
    "no_row": {"R": 0, "C": 9},
    "no_class": {"R": 3, "C": 0},
    "all_masked": {"R": 3, "C": 20, "masked": 1.0},
    "no_label": {"R": 4, "C": 30, "share": 0.0},
    "all_labels": {"R": 4, "C": 30, "share": 1.0},
    "peaked": {"R": 6, "C": 100, "std": 40.0},
    "long": {"R": 2, "C": 70_001, "masked": 0.05, "share": 0.001},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


@each_kind
@each_dtype
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward(kind, case, dtype, device):
    check(*make_problem(kind, device=device, dtype=dtype, **CASES[case]))


@each_kind
def test_gradcheck(kind, device):
    scores, labels = make_problem(kind, 3, 5, device, torch.float64)
    assert torch.autograd.gradcheck(lambda s: loss(fastnlp_ops, s, labels), scores.requires_grad_())


@each_kind
def test_gradgradcheck(kind, device):
    scores, labels = make_problem(kind, 3, 5, device, torch.float64)
    assert torch.autograd.gradgradcheck(lambda s: loss(fastnlp_ops, s, labels), scores.requires_grad_())


@each_kind
def test_second_derivatives_of_masked_classes(kind, device):
    """-inf is neither in values nor in derivatives of any order, and no inf * 0 turns up."""
    scores, labels = make_problem(kind, 4, 9, device, torch.float64, masked=0.4, share=0.5)
    found = []
    for module in (fastnlp_ops, reference):
        s = scores.clone().requires_grad_()
        value = loss(module, s, labels).sin().sum()
        for _ in range(3):
            (slope,) = torch.autograd.grad(value, s, create_graph=True)
            found.append(slope.detach())
            value = slope.sin().sum()
    for own, plain in zip(found[:3], found[3:], strict=True):
        assert torch.allclose(own, plain) and not own[scores == -INF].any()


@each_kind
@pytest.mark.parametrize("order", ["", "_backward"])
def test_opcheck(kind, order, device):
    scores, labels = make_problem(kind, 4, 7, device)
    name = ("sparse_" if kind == "sparse" else "") + "multilabel_categorical_crossentropy"
    op = getattr(torch.ops.fastnlp_ops, name)
    sums = op(scores, labels)
    arguments = ((torch.randn_like(sums[0]), *sums) if order else ()) + (scores.requires_grad_(), labels)
    torch.library.opcheck(getattr(torch.ops.fastnlp_ops, name + order).default, arguments)


@each_kind
def test_compile(kind, device):
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")

    def check(R, C):
        scores, labels = make_problem(kind, R, C, device, masked=0.2)
        found = []
        for call in (loss, compiled):
            s = scores.clone().requires_grad_()
            value = call(fastnlp_ops, s, labels)
            found += [value, torch.autograd.grad(value.cos().sum(), s)[0]]
        assert_same(found[2], found[0])
        assert_same(found[3], found[1])

    check(5, 12)
    with torch.compiler.set_stance("fail_on_recompile"):
        check(7, 16)


@each_kind
@pytest.mark.parametrize("layout", [strided, reversed_strides], ids=["strided", "reversed"])
def test_layouts(kind, layout, device):
    scores, labels = make_problem(kind, 6, 40, device, masked=0.2)
    weights = torch.randn(6, device=device)
    other = layout(scores)
    assert not other.is_contiguous()
    assert_same(loss(fastnlp_ops, other, layout(labels)), loss(fastnlp_ops, scores, labels))
    expected = gradient(fastnlp_ops, scores, labels, weights)
    leaf = scores.clone().requires_grad_()
    value = loss(fastnlp_ops, layout(leaf), layout(labels))
    assert_same(torch.autograd.grad(value, leaf, weights)[0], expected)


@each_kind
def test_layouts_of_rows(kind, device):
    """Any number of dimensions before the classes, rows with a gap behind them, and a single row."""
    scores, labels = make_problem(kind, 12, 17, device)
    expected = loss(fastnlp_ops, scores, labels)
    shaped = loss(fastnlp_ops, scores.reshape(3, 4, -1), labels.reshape(3, 4, -1))
    assert_same(shaped, expected.reshape(3, 4))
    gap = torch.cat([scores, torch.full_like(scores, math.nan)], 1)[:, :17]
    assert_same(loss(fastnlp_ops, gap, labels), expected)
    assert_same(loss(fastnlp_ops, scores[3], labels[3]), expected[3])
    nothing = torch.randn(17, 3, device=device)[:, :0].t()  # no rows, and a stride of 3 between their classes
    assert loss(fastnlp_ops, nothing, labels[:0]).shape == (0,)
    assert_same(loss(fastnlp_ops, scores[:1].expand(4, -1), labels[:1].expand(4, -1)), expected[:1].expand(4).clone())


@each_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_layouts_half(kind, dtype, device):
    """The value of the same numbers in float32; the gradient is rounded once."""
    scores, labels = make_problem(kind, 6, 60, device, dtype, masked=0.1)
    value = loss(fastnlp_ops, scores, labels)
    assert_same(value, loss(fastnlp_ops, scores.float(), labels))
    weights = torch.randn_like(value)
    expected = gradient(fastnlp_ops, scores.float(), labels, weights)
    assert_same(gradient(fastnlp_ops, scores, labels, weights), expected.to(dtype))


def test_layouts_of_labels(device):
    """Integers, and floating point zeros and ones, are what bool labels are; indices have any integer type."""
    scores, labels = make_problem("bool", 5, 50, device, masked=0.2)
    expected = loss(fastnlp_ops, scores, labels)
    call = fastnlp_ops.multilabel_categorical_crossentropy
    for dtype in (torch.uint8, torch.int64):
        assert_same(call(scores, labels.to(dtype) * 2, reduction="none"), expected)
    for dtype in (torch.float32, torch.float16, torch.float64):
        assert torch.allclose(call(scores, labels.to(dtype), reduction="none"), expected)
    indices = torch.where(labels, torch.arange(50, device=device), -1)
    for dtype in (torch.int64, torch.int16, torch.int8):
        sparse = fastnlp_ops.sparse_multilabel_categorical_crossentropy(scores, indices.to(dtype), reduction="none")
        assert torch.allclose(sparse, expected)


@pytest.mark.parametrize("shape", [(3, 4, 7), (5, 7), (7,), (0, 4, 7)], ids=str)
def test_reductions(shape, device):
    scores, labels = torch.randn(shape, device=device), torch.rand(shape, device=device) < 0.3
    rows = loss(fastnlp_ops, scores, labels)
    assert rows.shape == shape[:-1]
    total = rows.double().sum()
    expected = {"sum": total, "mean": total / max(1, rows.numel()), "batchmean": total / max(1, (*shape[:-1], 1)[0])}
    for reduction, value in expected.items():
        for module in (fastnlp_ops, reference):
            assert torch.allclose(loss(module, scores, labels, reduction).double(), value)


@pytest.mark.parametrize("kind", ["bool", "sparse"])
@pytest.mark.parametrize("s_pos", [5.0, 12.0, 16.0, 20.0, 30.0, 100.0])
def test_confident_labels(kind, s_pos, device):
    """4,095 classes at -20, one at +2, one label: the exact loss, and no gradient of the wrong sign (see the notes of
    tests/test_global_pointer_adversarial.py).
    """
    scores = torch.full((1, 4096), -20.0, device=device)
    scores[0, 7], scores[0, 9] = 2.0, s_pos
    labels = torch.tensor([[9]], device=device)
    if kind == "bool":
        labels = indices_to_labels(scores, labels)
    value = loss(fastnlp_ops, scores, labels).item()
    exact = math.log(1 + math.exp(2) + 4094 * math.exp(-20)) + math.log1p(math.exp(-s_pos))
    assert value == pytest.approx(exact, rel=1e-6)
    (slope,) = gradient(fastnlp_ops, scores, labels, torch.ones(1, device=device))
    assert slope[9] <= 0 and slope[7].item() == pytest.approx(0.8808, abs=1e-3)
    assert (slope[[0, 1, 8, 10, 4095]] > 0).all()


@each_kind
@pytest.mark.parametrize("size", [100.0, 1e4, 1e38])
def test_far_scores(kind, size, device):
    """exp overflows at 89: the loss is the score, and gradients are 1."""
    scores = torch.tensor([[size, -size, 0.0]], device=device)
    labels = torch.tensor([[1]], device=device)
    if kind != "sparse":
        labels = indices_to_labels(scores, labels)
    if kind == "soft":
        labels = labels.float()
    size = scores[0, 0].item()
    ones = torch.ones(1, device=device)
    assert loss(fastnlp_ops, scores, labels).item() == pytest.approx(2 * size, rel=1e-6)
    slope = gradient(fastnlp_ops, scores, labels, ones)[0]
    assert slope[:2].tolist() == pytest.approx([1, -1]) and 0 <= slope[2] < 0.02


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 1.0])
def test_soft_labels_of_masked_classes(t, device):
    """Whatever the label of a class at -inf is, the class takes no part: no NaN, no inf."""
    scores = torch.tensor([[1.5, -INF, -0.5]], device=device)
    labels = torch.tensor([[0.9, t, 0.1]], device=device)
    expected = loss(fastnlp_ops, scores[:, ::2], labels[:, ::2])
    assert torch.allclose(loss(fastnlp_ops, scores, labels), expected)
    slope = gradient(fastnlp_ops, scores, labels, torch.ones(1, device=device))
    assert slope.isfinite().all() and slope[0, 1] == 0
    negative = math.log(1 + 0.1 * math.exp(1.5) + 0.9 * math.exp(-0.5))
    assert expected.item() == pytest.approx(negative + math.log(1 + 0.9 * math.exp(-1.5) + 0.1 * math.exp(0.5)))


@pytest.mark.parametrize("t", [1e-45, 1e-30, 1 - 2**-24])
def test_soft_labels_next_to_hard_ones(t, device):
    """A label of almost 0 at a score of -80, and one of almost 1 at +80, still count."""
    scores = torch.tensor([[-80.0, 80.0, 0.3]], device=device)
    labels = torch.tensor([[t, t, 0.5]], device=device)
    check(scores, labels)


@each_kind
@pytest.mark.parametrize("output", [0, 1])
def test_one_of_the_two_sums(kind, output, device):
    """The op has two outputs: each has its own gradient, which the loss adds up, to second order."""
    scores, labels = make_problem(kind, 4, 9, device, torch.float64, masked=0.2)
    name = ("sparse_" if kind == "sparse" else "") + "multilabel_categorical_crossentropy"
    dense = indices_to_labels(scores, labels) if kind == "sparse" else labels
    found = []
    for function in (
        lambda s: getattr(torch.ops.fastnlp_ops, name)(s, labels)[output],
        lambda s: log_sums(s, dense)[output],
    ):
        s = scores.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(s).cos().sum(), s, create_graph=True)
        found += [first.detach(), *torch.autograd.grad(first.sin().sum(), s)]
    assert torch.allclose(found[0], found[2]) and torch.allclose(found[1], found[3])


def test_mask_zero(device):
    """Index 0 is padding, and class 0 neither label nor other."""
    scores, indices = make_problem("sparse", 6, 30, device)
    call = fastnlp_ops.sparse_multilabel_categorical_crossentropy
    value = call(scores, indices, mask_zero=True, reduction="none")
    without = torch.where(indices > 0, indices - 1, -1)
    assert torch.allclose(value, call(scores[:, 1:], without, reduction="none"))
    check(scores, indices, mask_zero=True)
    check(scores[:, :0], indices[:, :0], mask_zero=True)
    assert not gradient(fastnlp_ops, scores, indices, torch.ones(6, device=device), mask_zero=True)[:, 0].any()
    assert not torch.allclose(value, call(scores, indices, reduction="none"))


@each_kind
@pytest.mark.parametrize("bad", [math.nan, INF])
def test_bad_numbers_stay_in_their_rows(kind, bad, device):
    scores, labels = make_problem(kind, 5, 600, device, share=0.3)
    weights = torch.ones(5, device=device)
    value, slope = loss(fastnlp_ops, scores, labels), gradient(fastnlp_ops, scores, labels, weights)
    scores[2, 500] = bad
    others = [0, 1, 3, 4]
    found = loss(fastnlp_ops, scores, labels)
    assert_same(found[others], value[others])
    assert_same(gradient(fastnlp_ops, scores, labels, weights)[others], slope[others])
    if math.isnan(bad):
        assert found[2].isnan() and gradient(fastnlp_ops, scores, labels, weights)[2, 500].isnan()


def test_scores_of_global_pointer(device):
    """The dense loss of the scores is the loss of q and k."""
    q, k = torch.randn(2, 2, 30, 3, 8, device=device)
    mask = torch.rand(2, 30, device=device) < 0.8
    labels = torch.randint(0, 30, (2, 3, 5, 2), device=device).sort(-1).values
    scores = fastnlp_ops.global_pointer_scores(q, k, mask=mask).flatten(2)
    indices = labels[..., 0] * 30 + labels[..., 1]
    expected = fastnlp_ops.global_pointer_loss(q, k, labels, mask=mask, reduction="none")
    assert torch.allclose(loss(fastnlp_ops, scores, indices), expected)
    assert torch.allclose(loss(fastnlp_ops, scores, indices_to_labels(scores, indices)), expected)


def test_repeatable(threads, device):
    """Bitwise: run to run, for any number of threads; long rows are cut into parts."""
    for kind in KINDS:
        scores, labels = make_problem(kind, 3, 100_003, device, masked=0.1)
        found = []
        for count in (1, 2, 2, 3):
            threads(count)
            weights = torch.ones(3, device=device)
            found.append([loss(fastnlp_ops, scores, labels), gradient(fastnlp_ops, scores, labels, weights)])
        for run in found[1:]:
            assert_same(run[0], found[0][0], kind)
            assert_same(run[1], found[0][1], kind)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    R=st.integers(0, 5),
    C=st.integers(0, 700),
    masked=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    share=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    std=st.sampled_from([0.0, 1.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**32),
)
def test_fuzz(device, kind, R, C, masked, share, std, dtype, seed):
    torch.manual_seed(seed)
    check(*make_problem(kind, R, C, device, dtype, masked=masked, share=share, std=std))
