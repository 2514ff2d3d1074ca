"""Defects of other Adafactors, each with what ours does in its place. Where the peer is at hand its defect is shown."""

import copy
import math

import pytest
import torch
from tools import assert_same
from torch import nn

import fastnlp_ops

OURS = [fastnlp_ops.Adafactor, fastnlp_ops.TorchAdafactor]
each_kind = pytest.mark.parametrize("kind", OURS)


@pytest.fixture(scope="module")
def theirs():
    """transformers' Adafactor."""
    return pytest.importorskip("transformers.optimization", reason="transformers is not installed").Adafactor


def parameter(*shape, dtype=torch.float32, device="cpu", grad=1.0):
    p = nn.Parameter(torch.randn(shape, device=device).to(dtype))
    p.grad = (grad * torch.randn(shape, device=device)).to(dtype)
    return p


def clone(p):
    q = nn.Parameter(p.detach().clone())
    q.grad = None if p.grad is None else p.grad.clone()
    return q


def moved(kind, p, **options):
    """Length of one step of a copy of p."""
    q = clone(p)
    kind([q], **options).step()
    return (q - p).double().norm().item()


@pytest.mark.parametrize("scale", [1e-3, 1e-4])
def test_bfloat16_trains(scale):
    """torch: eps1 of bfloat16, 7.8e-3, takes the place of the root of V, and small gradients do almost nothing."""
    p = parameter(64, 32, dtype=torch.bfloat16, grad=scale)
    p.data.zero_()  # where every step shows
    full = moved(fastnlp_ops.TorchAdafactor, clone_as(p, torch.float32))
    assert moved(fastnlp_ops.TorchAdafactor, p) == pytest.approx(full, rel=1e-2)
    assert moved(torch.optim.Adafactor, p) < 0.5 * full


def clone_as(p, dtype):
    q = nn.Parameter(p.detach().to(dtype))
    q.grad = p.grad.to(dtype)
    return q


def test_bfloat16_moments_move():
    """torch: averages in bfloat16 stand still where 1 - beta2 is small; ours are float32."""
    results = []
    for kind in (fastnlp_ops.TorchAdafactor, torch.optim.Adafactor):
        p = parameter(4, 3, dtype=torch.bfloat16)
        optimizer = kind([p])
        optimizer.step()
        state = optimizer.state[p]
        state["step"].fill_(3000)
        state["row_var"].fill_(1.0)
        p.grad.fill_(0.5)
        for _ in range(2000):
            optimizer.step()
        results.append(state["row_var"].float().mean().item())
    expected = 1.0
    for t in range(3001, 5001):
        expected += t**-0.8 * (0.25 - expected)
    assert results[0] == pytest.approx(expected, rel=1e-4)
    assert results[1] == 1.0


def test_eps_of_each_dtype():
    """torch: eps1 = None is resolved by the first parameter of a group and kept for those of other dtypes."""
    wide, narrow = parameter(8, 4, grad=1e-5), parameter(8, 4, grad=1e-5, dtype=torch.bfloat16)
    steps = {}
    for kind in (fastnlp_ops.TorchAdafactor, torch.optim.Adafactor):
        for order in ((0, 1), (1, 0)):
            pair = [clone(wide), clone(narrow)]
            kind([pair[k] for k in order]).step()
            steps[kind, order] = (pair[0] - wide).norm().item()
    ours = {round(math.log(steps[fastnlp_ops.TorchAdafactor, order]), 6) for order in ((0, 1), (1, 0))}
    assert len(ours) == 1
    assert steps[torch.optim.Adafactor, (0, 1)] > 3 * steps[torch.optim.Adafactor, (1, 0)]


def test_empty_parameters():
    """torch: ZeroDivisionError."""
    params = [nn.Parameter(torch.empty(0, 4)), parameter(3, 2)]
    params[0].grad = torch.empty(0, 4)
    fastnlp_ops.TorchAdafactor(params).step()
    with pytest.raises(ZeroDivisionError):
        torch.optim.Adafactor(params).step()


def test_closure(theirs):
    """transformers: the closure runs without gradients, and backward raises."""
    for kind in (theirs, *OURS):
        p = nn.Parameter(torch.ones(3, 2))
        optimizer = kind([p])

        def closure(p=p, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (p * p).sum()
            loss.backward()
            return loss

        if kind is theirs:
            with pytest.raises(RuntimeError, match="does not require grad"):
                optimizer.step(closure)
        else:
            assert optimizer.step(closure).item() == 6
            assert optimizer.step(closure).item() < 6


def test_load_keeps_full_precision(theirs):
    """transformers and torch: load_state_dict casts the factors to the dtype of the parameters."""
    for kind, peer, name in (
        (fastnlp_ops.Adafactor, theirs, "exp_avg_sq_row"),
        (fastnlp_ops.TorchAdafactor, torch.optim.Adafactor, "row_var"),
    ):
        p = parameter(16, 8, dtype=torch.bfloat16)
        ours = kind([p])
        ours.step()
        saved = copy.deepcopy(ours.state_dict())
        for other in (kind([clone(p)]), peer([clone(p)])):
            other.load_state_dict(copy.deepcopy(saved))
            factor = next(iter(other.state.values()))[name]
            if isinstance(other, kind):
                assert_same(factor, saved["state"][0][name])
            else:
                assert factor.dtype == torch.bfloat16


def test_learning_rate_is_asked_for(theirs):
    """transformers: no learning rate at all is a TypeError at the first step; ours a sentence at once."""
    with pytest.raises(TypeError):
        theirs([parameter(3, 2)], relative_step=False).step()
    with pytest.raises(ValueError, match="lr must be given where relative_step is off, got None"):
        fastnlp_ops.Adafactor([parameter(3, 2)], relative_step=False)


def test_complex_is_refused(theirs):
    """transformers: complex parameters are updated by a formula that is not theirs."""
    p = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
    p.grad = torch.randn_like(p)
    before = p.detach().clone()
    for kind in OURS:
        with pytest.raises(RuntimeError, match="Adafactor does not support complex parameters"):
            kind([p]).step()
    assert_same(torch.view_as_real(p.detach()), torch.view_as_real(before))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stagnation(dtype, theirs):
    """200 steps of 1e-3 on parameters near 1: rounding to nearest loses most of them, stochastic rounding none."""
    start = 1 + 0.1 * torch.randn(64, 64)
    grads = [torch.randn(64, 64) + 0.5 for _ in range(10)]

    def way(kind, dtype, **options):
        p = nn.Parameter(start.to(dtype, copy=True))
        optimizer = kind([p], lr=1e-3, relative_step=False, scale_parameter=False, **options)
        for k in range(200):
            p.grad = grads[k % 10].to(dtype)
            optimizer.step()
        return (start.to(dtype).float() - p.float()).mean().item()

    full = way(fastnlp_ops.Adafactor, torch.float32)
    assert way(fastnlp_ops.Adafactor, dtype, rounding="stochastic") == pytest.approx(full, rel=0.02)
    if dtype == torch.bfloat16:
        assert abs(way(theirs, dtype) / full - 1) > 0.2


def test_decay_in_bfloat16():
    """OneTrainer: a decay below half a unit in the last place is lost for good; with stochastic rounding it is not."""
    p = nn.Parameter(torch.ones(100, 100, dtype=torch.bfloat16))
    optimizer = fastnlp_ops.Adafactor(
        [p], lr=1e-3, relative_step=False, scale_parameter=False, weight_decay=1.0, rounding="stochastic"
    )
    for _ in range(100):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert p.float().mean().item() == pytest.approx(0.999**100, abs=1e-3)


@each_kind
def test_group_is_not_written(kind):
    """fairseq: the learning rate of the group is overwritten by each parameter's, and the next one starts from that."""
    options = {"lr": 1e-2} | ({"relative_step": False} if kind is fastnlp_ops.Adafactor else {})
    params = [parameter(4, 3), parameter(4, 3), parameter(5)]
    optimizer = kind(params, **options)
    before = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    optimizer.step()
    assert {name: value for name, value in optimizer.param_groups[0].items() if name != "params"} == before


@each_kind
def test_maximize(kind):
    """pytorch_optimizer's foreach path turns the sign of p.grad itself."""
    a, b = parameter(4, 3), parameter(5)
    twins = [clone(a), clone(b)]
    for q in twins:
        q.grad.neg_()
    grads = a.grad.clone(), b.grad.clone()
    kind([a, b], maximize=True).step()
    kind(twins).step()
    for p, q, g in zip((a, b), twins, grads, strict=True):
        assert_same(p.detach(), q.detach())
        assert_same(p.grad, g)


@each_kind
def test_tall_and_wide(kind):
    """timm: the row factor was not normalised in matrices with more rows than columns."""
    p = parameter(50, 7)
    q = nn.Parameter(p.detach().t().contiguous())
    q.grad = p.grad.t().contiguous()
    kind([p]).step()
    kind([q]).step()
    torch.testing.assert_close(p.detach(), q.detach().t())


@each_kind
def test_leading_dimensions(kind):
    """jettify: means over the wrong dimension of stacks of matrices; others: "tensors must be 2-D"."""
    p = parameter(3, 6, 4)
    alone = [nn.Parameter(x.clone()) for x in p.detach()]
    for x, g in zip(alone, p.grad, strict=True):
        x.grad = g.clone()
    optimizer, others = kind([p]), kind(alone)
    optimizer.step()
    others.step()
    for name in ("exp_avg_sq_row", "exp_avg_sq_col") if kind is fastnlp_ops.Adafactor else ("row_var", "col_var"):
        together = torch.stack([others.state[x][name] for x in alone])
        torch.testing.assert_close(optimizer.state[p][name], together)


@each_kind
def test_zero_gradient(kind):
    """LLM2CLIP: 0 / 0 where a gradient is all zeros."""
    p = parameter(4, 3, grad=0.0)
    before = p.detach().clone()
    kind([p]).step()
    assert_same(p.detach(), before)


def test_lookahead_begins_at_the_parameters():
    """bert4keras: slow weights begin at zero, and the first meeting halves the parameters."""
    p = parameter(4, 3, grad=0.0)
    before = p.detach().clone()
    optimizer = fastnlp_ops.Adafactor([p])
    fastnlp_ops.Lookahead(optimizer, k=1)
    optimizer.step()
    assert_same(p.detach(), before)


def test_accumulation_waits():
    """bert4keras: the first call applies a gradient of zeros, and schedules count backward passes."""
    p = parameter(4, 3)
    q = clone(p)
    optimizer = fastnlp_ops.Adafactor([p], accumulation_steps=2)
    p.grad = q.grad.clone()
    optimizer.step()
    assert len(optimizer.state) == 0
    assert p.grad is None  # the optimizer has taken it
    p.grad = q.grad.clone()
    optimizer.step()
    fastnlp_ops.Adafactor([q]).step()
    torch.testing.assert_close(p, q)
    assert optimizer.state[p]["step"].item() == 1


@each_kind
def test_views_survive(kind):
    """bitsandbytes assigns p.data anew: what shares its memory is left behind."""
    flat = torch.randn(12)
    p = nn.Parameter(flat.view(4, 3))
    p.grad = torch.randn(4, 3)
    kind([p]).step()
    assert_same(flat.view(4, 3), p.detach())


@each_kind
def test_nan_stays_in_its_parameter(kind):
    params = [parameter(4, 3), parameter(5), parameter(2, 2)]
    twins = [clone(p) for p in params]
    params[1].grad[2] = math.nan
    kind(params).step()
    kind(twins).step()
    assert_same(params[0].detach(), twins[0].detach())
    assert_same(params[2].detach(), twins[2].detach())
