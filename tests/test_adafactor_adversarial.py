"""Hostile inputs of the Adafactor optimizers: each has a defined result or a sentence, and touches nothing else."""

import copy
import math

import pytest
import torch
from adafactor_problems import Run, assert_runs_agree, draw, three_runs
from tools import assert_same
from torch import nn

import fastnlp_ops
from fastnlp_ops import reference

KINDS = [fastnlp_ops.Adafactor, fastnlp_ops.TorchAdafactor]
each_kind = pytest.mark.parametrize("kind", KINDS)


def parameters(*shapes, device="cpu", dtype=torch.float32):
    return [nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]


def with_gradients(params, scale=1.0):
    for p in params:
        p.grad = scale * torch.randn_like(p)
    return params


def values(params):
    return [p.detach().clone() for p in params]


def states(optimizer):
    return copy.deepcopy([dict(optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]])


def assert_unchanged(params, before, optimizer=None, state=None):
    for p, old in zip(params, before, strict=True):
        assert_same(p.detach(), old)
    if state is not None:
        for mine, old in zip(states(optimizer), state, strict=True):
            for name in old:
                assert_same(mine[name], old[name], name)


@each_kind
def test_zero_gradients(kind, device):
    """At the first step and later: nothing moves, nothing is NaN."""
    params = parameters((4, 3), (5,), (), device=device)
    optimizer = kind(params)
    before = values(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_unchanged(params, before)
    with_gradients(params)
    optimizer.step()
    before = values(params)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert_unchanged(params, before)
    assert all(x.isfinite().all() for state in optimizer.state.values() for x in state.values())
    assert optimizer.state[params[0]]["step"].item() == 3


@pytest.mark.parametrize("eps1", [1e-30, 0.0])
@pytest.mark.parametrize("variant", ["transformers", "torch"])
def test_zero_rows_and_columns(variant, eps1, device):
    """Elements without a gradient stay (where nothing decays); the others move as without eps1."""
    g = torch.randn(6, 5, device=device)
    g[[0, 3]], g[:, 2] = 0, 0
    p = torch.randn(6, 5, device=device)
    options = {"variant": variant, "eps": (eps1, 1e-3), "lr": 1e-2, "relative_step": False}
    run = Run([p.clone(), p[0].clone()], options)
    run.step(fastnlp_ops.adafactor_step_, [g, g[1]])
    assert run.params[0].isfinite().all()
    moved = run.params[0] != p
    assert_same(moved, g != 0)
    assert_same(run.params[1] != p[0], g[1] != 0)


@each_kind
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e25])
def test_non_finite_gradient(bad, kind, device):
    """It spoils the parameter that it belongs to and no other; with skip_nonfinite the whole step is left out."""
    params = with_gradients(parameters((40, 30), (7,), (3, 2), device=device))
    params[0].grad[11, 13] = bad
    optimizer = kind(params)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    twin = kind(twins)
    for p, q in list(zip(params, twins, strict=True))[1:]:
        q.grad = p.grad.clone()
    optimizer.step()
    twin.step()
    for p, q in list(zip(params, twins, strict=True))[1:]:
        assert_same(p.detach(), q.detach())
    if kind is fastnlp_ops.Adafactor:
        # A gradient beyond the range of squares: the step is as long as any other, or NaN, but not long.
        moved = (params[0] - twins[0]).norm() / params[0].norm()
        assert moved.isnan() or moved < 0.1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e25])
@pytest.mark.parametrize(("where", "double"), [(0, False), (1, False), (2, False), (0, True), (2, True), (3, True)])
def test_skip_nonfinite(where, double, bad, device):
    """Nothing at all changes, wherever it is: a matrix, a vector, a bfloat16 parameter, beside float64 or in it."""
    params = parameters((40, 30), (7,), device=device) + parameters((5, 6), device=device, dtype=torch.bfloat16)
    params += parameters((3, 4), device=device, dtype=torch.float64) if double else []
    options = {"beta1": 0.9, "ema_decay": 0.9, "skip_nonfinite": True}
    optimizer = fastnlp_ops.Adafactor([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}], **options)
    with_gradients(params)
    optimizer.step()
    before, state = values(params), states(optimizer)
    with_gradients(params)
    params[where].grad.view(-1)[3] = bad if where != 3 or bad != 1e25 else 1e200
    optimizer.step()
    assert_unchanged(params, before, optimizer, state)
    with_gradients(params)
    optimizer.step()
    assert all((p != old).any() for p, old in zip(params, before, strict=True))
    assert optimizer.state[params[0]]["step"].item() == 2


@pytest.mark.parametrize("scale", [1e-20, 1e-38, 1e-42, 1e18])
@pytest.mark.parametrize(
    "options", [{}, {"variant": "torch", "lr": 1e-2, "eps": (2.0**-23, 1e-3)}, {"max_grad_norm": 1.0}]
)
def test_tiny_and_huge(options, scale, device):
    assert_runs_agree(*three_runs([(9, 7), (5,)], options, device, scale=scale), level=2e-7)


def test_large_half_gradients(device):
    """float16 gradients at the end of their range."""
    params = parameters((9, 7), (5,), device=device, dtype=torch.float16)
    for p in params:
        p.grad = 6e4 * torch.randn_like(p).sign()
    before = values(params)
    fastnlp_ops.Adafactor(params, lr=1e-2, relative_step=False, scale_parameter=False).step()
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close((old - p).float(), 1e-2 * p.grad.sign().float(), atol=2e-3, rtol=0)


@each_kind
def test_missing_gradients(kind, device):
    """Parameters without a gradient keep value, state and step count; any of them may come and go."""
    params = parameters((4, 3), (5,), (2, 2), (6,), device=device)
    twins = [[nn.Parameter(p.detach().clone())] for p in params]
    optimizer, alone = kind(params), [kind(twin) for twin in twins]
    counts = [0] * 4
    for k, present in enumerate([(1, 2), (0, 1, 2, 3), (3,), (), (0, 3), (0, 1, 2, 3), (2,)]):
        torch.manual_seed(k)
        optimizer.zero_grad()
        for index in present:
            params[index].grad = torch.randn_like(params[index])
            twins[index][0].grad = params[index].grad.clone()
            alone[index].step()
            counts[index] += 1
        optimizer.step()
        for p, (q,), count in zip(params, twins, counts, strict=True):
            assert_same(p.detach(), q.detach())
            assert optimizer.state[p].get("step", torch.zeros(())).item() == count


@each_kind
def test_empty(kind, device):
    """Nothing to do beside parameters with something to do; a step of nothing at all."""
    params = with_gradients(parameters((0,), (0, 5), (5, 0), (2, 0, 3), (0, 0), (3, 2), device=device))
    before = values(params)
    optimizer = kind(params)
    optimizer.step()
    assert (params[-1] != before[-1]).all()
    assert all(state["step"].item() == 1 for state in optimizer.state.values())
    nothing = with_gradients(parameters((0,), (0, 5), device=device))
    kind(nothing).step()
    kind(parameters((3,), device=device)).step()


@pytest.mark.parametrize("shape", [(30522, 768), (768, 30522)])
def test_embedding(shape, device):
    """The shape of BERT's embeddings, and of its output: most rows without a gradient."""
    g = torch.randn(shape, device=device)
    g[torch.rand(shape[0], device=device) < 0.9] = 0
    p = torch.randn(shape, device=device)
    runs = [Run([p.to(d, copy=True)], {}, d) for d in (torch.float32, torch.float32, torch.float64)]
    functions = (fastnlp_ops.adafactor_step_, reference.adafactor_step_, reference.adafactor_step_)
    for run, function in zip(runs, functions, strict=True):
        run.step(function, [g.to(run.state_dtype)])
    assert_runs_agree(*runs, level=2e-7)


@pytest.mark.long
def test_more_than_two_to_the_31_elements():
    """Indices are 64 bits wide: the last row of a parameter of 2^31 + 2^15 elements moves as a small one's."""
    shape = (65537, 32768)
    try:
        p = torch.empty(shape, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no room for a parameter of 4 GiB")
    p.fill_(1.0)
    g = torch.ones(1, 1).expand(shape)
    run = Run([p], {"lr": 0.25, "relative_step": False, "scale_parameter": False, "rounding": "stochastic"})
    run.step(fastnlp_ops.adafactor_step_, [g])
    for row in (0, 32768, 65536):
        assert (p[row] == 0.75).all()
    assert (run.rows[0] == 1).all()
    assert (run.cols[0] == 1).all()


@each_kind
def test_stacked_experts(kind, device):
    """A batch of matrices; a view of one of them trains as itself."""
    shapes = [(3, 8, 5), (2, 3, 4, 6), (2, 1, 2, 3, 4)]
    params = with_gradients(parameters(*shapes, device=device))
    before = values(params)
    kind(params).step()
    for p, old in zip(params, before, strict=True):
        assert (p != old).all()


def test_overlapping_parameters(device):
    """A parameter whose elements share memory has no step; the sentence comes before anything is written."""
    other = parameters((3,), device=device)
    p = nn.Parameter(torch.randn(1, 4, device=device).expand(3, 4))
    before = values([*other, p])
    optimizer = fastnlp_ops.Adafactor([*other, p])
    with_gradients([*other, p])
    with pytest.raises(ValueError, match="must not overlap"):
        optimizer.step()
    assert_unchanged([*other, p], before)


def test_tied_parameters(device):
    """One parameter under two names is one parameter."""
    model = nn.Module()
    model.a = nn.Linear(4, 4, bias=False, device=device)
    model.b = nn.Linear(4, 4, bias=False, device=device)
    model.b.weight = model.a.weight
    x = torch.randn(3, 4, device=device)
    model.b(model.a(x)).sum().backward()
    optimizer = fastnlp_ops.Adafactor(model.parameters())
    optimizer.step()
    assert model.b.weight is model.a.weight
    assert optimizer.state[model.a.weight]["step"].item() == 1


def test_neighbours_in_one_storage(device):
    """Views that share a storage without sharing elements, as of one flat buffer."""
    flat = torch.randn(12 + 5 + 6, device=device)
    parts = [flat[:12].view(3, 4), flat[12:17], flat[17:].view(2, 3)]
    apart = [x.clone() for x in parts]
    grads = draw([x.shape for x in parts], device)
    Run(parts, {}).step(fastnlp_ops.adafactor_step_, grads)
    Run(apart, {}).step(fastnlp_ops.adafactor_step_, grads)
    assert_unchanged(parts, apart)


def test_gradient_in_the_memory_of_the_parameter(device):
    p = torch.randn(6, 5, device=device)
    twin = Run([p.clone()], {}).step(fastnlp_ops.adafactor_step_, [p.clone()])
    Run([p], {}).step(fastnlp_ops.adafactor_step_, [p.detach()])
    assert_same(p, twin.params[0])


def test_groups_of_all_kinds(device):
    """Groups with other options, dtypes and learning rates in one step: as many optimizers of one group each."""
    options = [
        {},
        {"lr": 1e-2, "relative_step": False, "beta1": 0.9, "weight_decay": 0.1},
        {"lr": torch.tensor(0.1), "relative_step": False, "scale_parameter": False, "layer_adaptation": True},
        {"warmup_init": True, "ema_decay": 0.9, "lazy": True, "lr_scale": 2.0},
        {"lr": 0.0, "relative_step": False},
        {"lr": 1e-2, "relative_step": False, "rounding": "stochastic", "maximize": True},
    ]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.bfloat16]
    groups = [parameters((5, 4), (3,), device=device, dtype=dtype) for dtype in dtypes]
    twins = [[nn.Parameter(p.detach().clone()) for p in group] for group in groups]
    optimizer = fastnlp_ops.Adafactor([{"params": group} | o for group, o in zip(groups, options, strict=True)])
    alone = [fastnlp_ops.Adafactor([{"params": twin} | o]) for twin, o in zip(twins, options, strict=True)]
    for _ in range(3):
        for group, twin in zip(groups, twins, strict=True):
            for p, q in zip(with_gradients(group), twin, strict=True):
                q.grad = p.grad.clone()
        optimizer.step()
        for other in alone:
            other.step()
    for group, twin, o in zip(groups, twins, options, strict=True):
        for p, q in zip(group, twin, strict=True):
            if o.get("rounding") == "stochastic":  # other numbers of the tensors, other random bits
                torch.testing.assert_close(p, q, atol=0.02, rtol=0.02)
            else:
                assert_same(p.detach(), q.detach())


@each_kind
def test_learning_rate_zero(kind, device):
    params = with_gradients(parameters((4, 3), (5,), device=device))
    before = values(params)
    options = {"relative_step": False} if kind is fastnlp_ops.Adafactor else {}
    optimizer = kind(params, lr=0.0, weight_decay=0.5, **options)
    optimizer.step()
    assert_unchanged(params, before)
    assert optimizer.state[params[0]]["step"].item() == 1


@each_kind
def test_learning_rate_as_tensor(kind, device):
    """A tensor is read at every step, and a number in its place gives the same."""
    options = {"relative_step": False} if kind is fastnlp_ops.Adafactor else {}
    a, b = parameters((4, 3), (5,), device=device), []
    b = [nn.Parameter(p.detach().clone()) for p in a]
    lr = torch.tensor(1e-2, device=device)
    first, second = kind(a, lr=lr, **options), kind(b, lr=lr.item(), **options)
    for rate in (1e-2, 3e-2, 0.0, 1e-3):
        lr.fill_(rate)
        second.param_groups[0]["lr"] = lr.item()
        for p, q in zip(with_gradients(a), b, strict=True):
            q.grad = p.grad.clone()
        first.step()
        second.step()
        assert_unchanged(a, values(b))


@pytest.mark.parametrize("step", [1, 1_000, 1_000_000, 16_000_000])
def test_late_steps(step, device):
    """1 - beta2 is t^-0.8, to the last digits: 1.6e-6 at a million steps."""
    runs = []
    p, g = torch.randn(8, 6, device=device), torch.randn(8, 6, device=device)
    state = torch.rand(8, device=device), torch.rand(6, device=device)
    for function, dtype in ((fastnlp_ops, torch.float32), (reference, torch.float32), (reference, torch.float64)):
        run = Run([p.to(dtype, copy=True)], {}, dtype)
        run.rows[0].copy_(state[0])
        run.cols[0].copy_(state[1])
        run.steps.fill_(step - 1)
        runs.append(run.step(function.adafactor_step_, [g.to(dtype)]))
        assert run.steps.item() == step
    assert_runs_agree(*runs)


def test_momentum_of_zero(device):
    """beta1 = 0 keeps a buffer and steps as None does."""
    a = parameters((4, 3), (5,), device=device)
    b = [nn.Parameter(p.detach().clone()) for p in a]
    first, second = fastnlp_ops.Adafactor(a, beta1=0.0), fastnlp_ops.Adafactor(b)
    for _ in range(3):
        for p, q in zip(with_gradients(a), b, strict=True):
            q.grad = p.grad.clone()
        first.step()
        second.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert "exp_avg" in first.state[a[0]]
    assert "exp_avg" not in second.state[b[0]]


def test_decay_past_zero(device):
    """weight_decay times learning rate above 1 turns the sign, as the formula says."""
    assert_runs_agree(
        *three_runs([(5, 4), (3,)], {"lr": 2.0, "weight_decay": 0.9, "relative_step": False}, device), level=2e-7
    )


def test_no_clipping(device):
    """None and infinity are the same, and not 1."""
    g, p = torch.randn(5, 4, device=device), torch.randn(5, 4, device=device)
    runs = [
        Run([p.clone()], {"clip_threshold": d, "decay_rate": -0.8})
        .step(fastnlp_ops.adafactor_step_, [g])
        .step(fastnlp_ops.adafactor_step_, [9 * g])
        for d in (None, math.inf, 1.0)
    ]
    assert_same(runs[0].params[0], runs[1].params[0])
    assert (runs[0].params[0] != runs[2].params[0]).any()


def test_groups_added_later(device):
    params = parameters((4, 3), (5,), device=device)
    optimizer = fastnlp_ops.Adafactor(params[:1])
    with_gradients(params)
    optimizer.step()
    optimizer.add_param_group({"params": params[1:], "lr": 1e-2, "relative_step": False})
    optimizer.step()
    assert optimizer.state[params[0]]["step"].item() == 2
    assert optimizer.state[params[1]]["step"].item() == 1
    with pytest.raises(ValueError, match="lr must be given"):
        optimizer.add_param_group({"params": parameters((2,)), "relative_step": False})


@each_kind
def test_modes(kind, device):
    """In no_grad, with frozen parameters and with a closure; inference tensors are refused or updated, not spoilt."""
    params = parameters((4, 3), (5,), device=device)
    params[1].requires_grad_(False)
    x = torch.randn(6, 4, device=device)

    def closure():
        optimizer.zero_grad()
        loss = (x @ params[0]).square().mean()
        loss.backward()
        return loss

    optimizer = kind(params)
    before = values(params)
    with torch.no_grad():
        loss = optimizer.step(closure)
        second = optimizer.step(closure)
    assert second < loss
    assert_unchanged(params[1:], before[1:])
    params[0].grad = torch.ones_like(params[0])
    with torch.inference_mode():
        optimizer.step()
    assert (params[0] != before[0]).all()
    closure()


@each_kind
def test_gradients_stay(kind, device):
    """p.grad is read and never written, and p.data stays where it is."""
    options = {"weight_decay": 0.1, "maximize": True}
    if kind is fastnlp_ops.Adafactor:
        options |= {"beta1": 0.9, "max_grad_norm": 0.1}
    params = with_gradients(parameters((4, 3), (5,), device=device))
    grads, homes = [p.grad.clone() for p in params], [p.data_ptr() for p in params]
    optimizer = kind(params, **options)
    optimizer.step()
    for p, g, home in zip(params, grads, homes, strict=True):
        assert_same(p.grad, g)
        assert p.data_ptr() == home


@each_kind
@pytest.mark.parametrize("unscale", [False, True])
def test_gradient_scaler(unscale, kind, device):
    """The scaled loss gives the step of the loss; an overflow leaves the step out and halves the scale."""
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    model, twin = nn.Linear(4, 3, device=device), nn.Linear(4, 3, device=device)
    twin.load_state_dict(model.state_dict())
    optimizer, other = kind(model.parameters()), kind(twin.parameters())
    x = torch.randn(5, 4, device=device)
    for factor in (1.0, math.inf, 1.0):
        before, state = values(model.parameters()), states(optimizer)
        optimizer.zero_grad()
        other.zero_grad()
        scaler.scale(factor * model(x).square().mean()).backward()
        twin(x).square().mean().backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if factor == 1.0:
            other.step()
        else:
            assert_unchanged(model.parameters(), before, optimizer, state)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert scaler.get_scale() == 2.0**9
    assert optimizer.state[model.weight]["step"].item() == 2


def test_clipping_by_the_global_norm(device):
    """As torch.nn.utils.clip_grad_norm_ before the step, over all groups and dtypes, without writing gradients."""
    for more in ([], parameters((3, 4), device=device, dtype=torch.float64)):
        params = parameters((9, 7), (5,), device=device) + more
        twins = [nn.Parameter(p.detach().clone()) for p in params]
        options = {"lr": 1e-2, "relative_step": False}
        optimizer = fastnlp_ops.Adafactor([{"params": [p]} for p in params], max_grad_norm=0.5, **options)
        other = fastnlp_ops.Adafactor(twins, **options)
        for scale in (1.0, 1e-3, 10.0, 1e-3):
            for p, q in zip(with_gradients(params, scale), twins, strict=True):
                q.grad = p.grad.clone()
            torch.nn.utils.clip_grad_norm_(twins, 0.5)
            optimizer.step()
            other.step()
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_refused(device):
    """Sparse and complex: a sentence, and nothing is written."""
    for kind in KINDS:
        params = parameters((4, 3), device=device)
        params.append(nn.Parameter(torch.randn(3, device=device, dtype=torch.complex64)))
        with_gradients(params)
        before = values(params)
        with pytest.raises(RuntimeError, match="does not support complex parameters"):
            kind(params).step()
        assert_unchanged(params, before)

        params = with_gradients(parameters((4, 3), (6, 2), device=device))
        params[1].grad = torch.randn(6, 2, device=device).to_sparse()
        before = values(params)
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            kind(params).step()
        assert_unchanged(params, before)
    for arguments, sentence in (
        ({"lr": 1e-3}, "Cannot combine manual `lr` and `relative_step=True` options"),
        ({"lr": 1.0, "relative_step": False, "warmup_init": True}, "`warmup_init=True` requires `relative_step=True`"),
        ({"relative_step": False}, "lr must be given where relative_step is off, got None"),
        ({"rounding": "random"}, "rounding must be"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be above 0 or None, got -1.0"),
        ({"accumulation_steps": 0}, "accumulation_steps must be at least 1, got 0"),
        ({"beta1": 2.0}, "beta1 must be in"),
    ):
        with pytest.raises(ValueError, match=sentence):
            fastnlp_ops.Adafactor(parameters((3,)), **arguments)


def test_gradient_of_another_dtype(device):
    """p.grad in bfloat16 beside a float32 parameter (torch lets it be set where the grad's dtype is freed)."""
    p = nn.Parameter(torch.randn(4, 3, device=device))
    p.grad_dtype = torch.bfloat16
    p.grad = torch.randn(4, 3, device=device).bfloat16()
    q = nn.Parameter(p.detach().clone())
    q.grad = p.grad.float()
    fastnlp_ops.Adafactor([p]).step()
    fastnlp_ops.Adafactor([q]).step()
    assert_same(p.detach(), q.detach())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU beside the CPU")
def test_mixed_devices():
    a = parameters((4, 3), (5,)) + parameters((4, 3), device="cuda")
    optimizer = fastnlp_ops.Adafactor(a, max_grad_norm=1.0, skip_nonfinite=True)
    before = values(a)
    with_gradients(a)
    optimizer.step()
    assert all((p != old).any() for p, old in zip(a, before, strict=True))
    with_gradients(a)
    a[0].grad[0, 0] = math.nan
    before = values(a)
    optimizer.step()
    assert_unchanged(a, before)
