"""What is built around the op: learning rates by name and by step, slow weights, averages, accumulation, backward."""

import copy
import math

import pytest
import torch
from tools import assert_same
from torch import nn

import fastnlp_ops


def network(device="cpu", dtype=torch.float32):
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4), nn.LayerNorm(4)).to(device, dtype)


def backward(model, seed, *others):
    for m in (model, *others):
        generator = torch.Generator().manual_seed(seed)
        p = next(m.parameters())
        x = torch.randn(5, 6, generator=generator).to(p)
        (m(x) * torch.arange(4.0).to(p)).square().mean().backward()


def assert_same_weights(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert_same(p.detach(), q.detach())


def assert_close_weights(a, b, **tolerance):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta1": 0.9, "weight_decay": 0.1, "ema_decay": 0.9},
        {"lr": 1e-2, "relative_step": False, "rounding": "stochastic", "layer_adaptation": True},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_backward(dtype, options, device):
    """To the bit what backward and then step give, stochastic rounding included; no gradient is left."""
    model = network(device, dtype)
    twin = copy.deepcopy(model)
    inside = fastnlp_ops.adafactor_in_backward(model, **options)
    after = fastnlp_ops.Adafactor(twin.parameters(), **options)
    for seed in range(4):
        backward(model, seed, twin)
        after.step()
        after.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        inside.step()
    assert_same_weights(model, twin)
    again = fastnlp_ops.Adafactor(twin.parameters(), **options)
    again.load_state_dict(inside.state_dict())
    assert [x["step"].item() for x in again.state.values()] == [4.0] * 6


def test_in_backward_frees_gradients(device):
    """While a gradient comes in, those behind it in the network are gone."""
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False, device=device) for _ in range(6)))
    alive = []
    for layer in model:
        layer.weight.register_hook(lambda _: alive.append(sum(p.grad is not None for p in model.parameters())))
    fastnlp_ops.adafactor_in_backward(model)
    model(torch.randn(2, 8, device=device)).sum().backward()
    assert max(alive) <= 1
    assert len(alive) == 6


def test_in_backward_with_a_schedule():
    model = network()
    twin = copy.deepcopy(model)
    optimizers = [
        fastnlp_ops.adafactor_in_backward(model, lr=0.1, relative_step=False),
        fastnlp_ops.Adafactor(twin.parameters(), lr=0.1, relative_step=False),
    ]
    schedules = [fastnlp_ops.PiecewiseLinearLR(optimizer, {2: 1.0, 4: 0.5}) for optimizer in optimizers]
    for seed in range(5):
        backward(model, seed, twin)
        for x in (*optimizers, *schedules):
            x.step()
        optimizers[1].zero_grad()
    assert_same_weights(model, twin)


@pytest.mark.parametrize("name", ["max_grad_norm", "skip_nonfinite", "accumulation_steps"])
def test_in_backward_refuses(name):
    with pytest.raises(ValueError, match=f"{name} must be left out, it needs all gradients at once, got 2"):
        fastnlp_ops.adafactor_in_backward(network(), **{name: 2})


def test_accumulation(device):
    """The mean of the gradients of so many backward passes, in one step; nothing happens before the last of them."""
    model = network(device)
    twin = copy.deepcopy(model)
    options = {"lr": 1e-2, "relative_step": False, "beta1": 0.9}
    optimizer = fastnlp_ops.Adafactor(model.parameters(), accumulation_steps=3, **options)
    other = fastnlp_ops.Adafactor(twin.parameters(), **options)
    for step in range(2):
        for k in range(3):
            before = copy.deepcopy(model)
            backward(model, 3 * step + k)
            optimizer.step()
            if k < 2:
                assert_same_weights(model, before)
            optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        backward(twin, 3 * step)
        for k in (1, 2):
            backward(twin, 3 * step + k)
        for p in twin.parameters():
            p.grad /= 3
        other.step()
        other.zero_grad()
    assert_close_weights(model, twin, rtol=1e-6, atol=1e-7)
    assert optimizer.state[model[0].weight]["step"].item() == 2


def test_accumulation_with_a_scaler(device):
    """Under a GradScaler the scale of the loss and the mean go together."""
    model = network(device)
    twin = copy.deepcopy(model)
    scaler = torch.amp.GradScaler(device.type, init_scale=256.0)
    optimizer = fastnlp_ops.Adafactor(model.parameters(), accumulation_steps=2)
    other = fastnlp_ops.Adafactor(twin.parameters(), accumulation_steps=2)
    x = torch.randn(5, 6, device=device)
    for _ in range(4):
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        twin(x).square().mean().backward()
        other.step()
        other.zero_grad()
    assert_close_weights(model, twin, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average(dtype, device):
    """The average is that of the values the parameters took, begins at them, and takes their place for a while."""
    model = network(device, dtype)
    optimizer = fastnlp_ops.Adafactor(model.parameters(), lr=0.1, relative_step=False, ema_decay=0.8)
    expected = [p.detach().float().clone() for p in model.parameters()]
    for seed in range(5):
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()
        expected = [0.8 * e + 0.2 * p.detach().float() for e, p in zip(expected, model.parameters(), strict=True)]
    for e, p in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(optimizer.state[p]["average"], e)
    before = copy.deepcopy(model)
    with optimizer.averaged_weights():
        for e, p in zip(expected, model.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), e.to(dtype))
    assert_same_weights(model, before)
    with pytest.raises(KeyError), optimizer.averaged_weights():
        raise KeyError
    assert_same_weights(model, before)


def test_average_follows_small_steps():
    """In float32 also behind a bfloat16 parameter, where a thousandth of a way is below half a unit."""
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = fastnlp_ops.Adafactor([p], lr=0.5, relative_step=False, scale_parameter=False, ema_decay=0.999)
    p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["average"], torch.full((4,), 0.9995))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, fastnlp_ops.Adafactor, torch.optim.Adafactor])
def test_lookahead(kind, device):
    """Slow weights begin at the parameters; after k steps both meet; it holds for any optimizer."""
    model = network(device)
    twin = copy.deepcopy(model)
    options = {} if kind is fastnlp_ops.Adafactor else {"lr": 0.01}
    optimizer, other = kind(model.parameters(), **options), kind(twin.parameters(), **options)
    fastnlp_ops.Lookahead(optimizer, k=3, alpha=0.25)
    slow = [p.detach().clone() for p in twin.parameters()]
    for step in range(1, 8):
        for m, o in ((model, optimizer), (twin, other)):
            o.zero_grad()
            backward(m, step)
            o.step()
        if step % 3 == 0:
            with torch.no_grad():
                for s, q in zip(slow, twin.parameters(), strict=True):
                    s += 0.25 * (q - s)
                    q.copy_(s)
        assert_close_weights(model, twin, rtol=1e-6, atol=1e-6)
    first = next(model.parameters())
    assert (first - slow[0]).norm() < first.norm()


def test_lookahead_resumes(device):
    """Slow weights and their age travel in the optimizer's checkpoint; remove() takes them off."""
    model = network(device)
    optimizer = fastnlp_ops.Adafactor(model.parameters())
    lookahead = fastnlp_ops.Lookahead(optimizer, k=4)
    for seed in range(6):
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()
    twin = copy.deepcopy(model)
    other = fastnlp_ops.Adafactor(twin.parameters())
    fastnlp_ops.Lookahead(other, k=4)
    other.load_state_dict(optimizer.state_dict())
    for seed in range(6, 12):
        backward(model, seed, twin)
        for x in (optimizer, other):
            x.step()
            x.zero_grad()
    assert_same_weights(model, twin)
    assert {state["slow_age"] for state in optimizer.state.values()} == {0}
    lookahead.remove()
    backward(model, 12)
    optimizer.step()
    assert all("slow" not in state and "slow_age" not in state for state in optimizer.state.values())


def test_lookahead_errors():
    optimizer = fastnlp_ops.Adafactor(network().parameters())
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        fastnlp_ops.Lookahead(optimizer, k=0)
    with pytest.raises(ValueError, match="alpha must be in"):
        fastnlp_ops.Lookahead(optimizer, alpha=2.0)


def test_piecewise_linear():
    """bert4keras' schedule: from 0 at step 0 if nothing else is said, straight lines, constant after the last point."""
    p = nn.Parameter(torch.zeros(1))
    cases = [
        ({4: 1.0, 8: 0.5}, [0, 0.25, 0.5, 0.75, 1, 0.875, 0.75, 0.625, 0.5, 0.5]),
        ({0: 1.0, 2: 0.0}, [1, 0.5, 0, 0]),
        ({0: 0.3}, [0.3, 0.3]),
        ({5: 1.0, 1: 0.5}, [0, 0.5, 0.625]),
    ]
    for points, expected in cases:
        optimizer = torch.optim.SGD([p], lr=2.0)
        schedule = fastnlp_ops.PiecewiseLinearLR(optimizer, points)
        rates = []
        for _ in expected:
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rates == pytest.approx([2 * x for x in expected])
    again = fastnlp_ops.PiecewiseLinearLR(optimizer, {5: 1.0, 1: 0.5})
    again.load_state_dict(schedule.state_dict())
    assert again.last_epoch == schedule.last_epoch == 3
    for points in ({}, {-1: 1.0}):
        with pytest.raises(ValueError, match="points must be steps of at least 0 with their factors, got"):
            fastnlp_ops.PiecewiseLinearLR(optimizer, points)
    with pytest.raises(ValueError, match="lr must be given for PiecewiseLinearLR"):
        fastnlp_ops.PiecewiseLinearLR(fastnlp_ops.Adafactor([p]), {1: 1.0})
    relative = fastnlp_ops.Adafactor([{"params": [p], "lr": 0.1}])  # which makes no use of it
    with pytest.raises(ValueError, match=r"lr must be given for PiecewiseLinearLR \(relative_step=False takes one\)"):
        fastnlp_ops.PiecewiseLinearLR(relative, {1: 1.0})


@pytest.mark.parametrize(
    ("kind", "lr"),
    [
        (fastnlp_ops.Adafactor, None),
        (fastnlp_ops.Adafactor, 1e-2),
        (fastnlp_ops.TorchAdafactor, 1e-4),
        (torch.optim.Adafactor, 1e-4),
        (torch.optim.AdamW, 1e-2),
        (torch.optim.SGD, 1e-2),
    ],
)
def test_multipliers(kind, lr, device):
    """Each parameter goes its multiple of the way, whichever optimizer takes the groups, by relative steps too."""
    model = nn.ModuleDict({"encoder": nn.Linear(3, 4), "crf": nn.Linear(4, 2)}).to(device)
    twin = copy.deepcopy(model)
    groups = fastnlp_ops.learning_rate_groups(model, {"^crf": 100.0, "bias": 0.5}, lr)
    if lr is None:
        assert sorted(group["lr_scale"] for group in groups) == [0.5, 1.0, 50.0, 100.0]
    else:
        assert sorted(group["lr"] / lr for group in groups) == pytest.approx([0.5, 1.0, 50.0, 100.0])
    options = {} if lr is None else {"lr": lr}
    if kind is fastnlp_ops.Adafactor and lr is not None:
        options["relative_step"] = False
    optimizer, other = kind(groups), kind(twin.parameters(), **options)
    before = copy.deepcopy(model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    optimizer.step()
    other.step()
    for (name, new), old, single in zip(model.named_parameters(), before.parameters(), twin.parameters(), strict=True):
        multiplier = (100.0 if "crf" in name else 1.0) * (0.5 if "bias" in name else 1.0)
        torch.testing.assert_close(new - old, multiplier * (single - old), rtol=0.02, atol=1e-5)


def test_multipliers_without_a_learning_rate():
    """Relative steps are Adafactor's: no other optimizer takes their groups in silence."""
    model = network()
    backward(model, 0)
    for kind, error, sentence in (
        (torch.optim.AdamW, TypeError, "."),
        (torch.optim.SGD, TypeError, "."),
        (fastnlp_ops.TorchAdafactor, ValueError, "Learning rate should be >= 0 but is: None"),
        (lambda groups: fastnlp_ops.Adafactor(groups, 1e-3, relative_step=False), ValueError, "lr must be given where"),
    ):
        with pytest.raises(error, match=sentence):
            kind(fastnlp_ops.learning_rate_groups(model, {"0": 2.0})).step()
    with pytest.raises(ValueError, match=r"lr must be at least 0 or None, got -1.0"):
        fastnlp_ops.learning_rate_groups(model, {}, lr=-1.0)


def test_multipliers_errors():
    model = network()
    with pytest.raises(ValueError, match='pattern must occur in the name of a parameter, got "crf"'):
        fastnlp_ops.learning_rate_groups(model, {"crf": 100.0})
    with pytest.raises(ValueError, match=r'multiplier of "0" must be at least 0, got -1.0'):
        fastnlp_ops.learning_rate_groups(model, {"0": -1.0})
    model[0].weight.requires_grad_(False)
    groups = fastnlp_ops.learning_rate_groups(model, {})
    assert [(group["lr_scale"], len(group["params"])) for group in groups] == [(1.0, 5)]


@pytest.mark.parametrize("kind", [fastnlp_ops.Adafactor, fastnlp_ops.TorchAdafactor])
def test_compile(kind, device):
    """The step is one node beside the learning rate's, compiled once for the first step and once for all others."""
    model = network(device)
    twin = copy.deepcopy(model)
    optimizer, other = kind(model.parameters()), kind(twin.parameters())
    graphs = []

    def backend(graph, inputs):
        nodes = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        graphs.append([node for node in nodes if "set_grad" not in str(node)])
        return graph.forward

    step = torch.compile(optimizer.step, backend=backend, fullgraph=True)
    for seed in range(12):
        backward(model, seed, twin)
        step()
        other.step()
        optimizer.zero_grad()
        other.zero_grad()
    assert_same_weights(model, twin)
    assert graphs[1] == [torch.tensor, torch.ops.fastnlp_ops.adafactor_step_]
    assert len(graphs) == 2
    assert [x["step"].item() for x in optimizer.state.values()] == [12.0] * 6
    optimizer.step()  # and uncompiled it goes on
    assert math.isfinite(sum(p.sum().item() for p in model.parameters()))


@pytest.mark.parametrize("kind", [fastnlp_ops.Adafactor, fastnlp_ops.TorchAdafactor])
def test_compile_functionalized(kind, device):
    """Through AOTAutograd, which takes mutation out of graphs and puts it back."""
    model = network(device)
    twin = copy.deepcopy(model)
    optimizer, other = kind(model.parameters()), kind(twin.parameters())
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    for seed in range(4):
        backward(model, seed, twin)
        step()
        other.step()
        optimizer.zero_grad()
        other.zero_grad()
    assert_same_weights(model, twin)
    assert [x["step"].item() for x in optimizer.state.values()] == [4.0] * 6
