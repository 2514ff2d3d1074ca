"""Lookahead over every optimizer of torch and ours: it counts updates, and resumes to the bit."""

import copy
import io
import math

import pytest
import torch
from tools import assert_same
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import fastnlp_ops

OPTIMIZERS = {
    name: (getattr(torch.optim, name), {"lr": 0.05})
    for name in (
        *("SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop"),
        *("Adafactor", "LBFGS", "Muon"),
    )
    if hasattr(torch.optim, name)
} | {
    "SGD with momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "SparseAdam": (torch.optim.SparseAdam, {"lr": 0.05}),
    "ours": (fastnlp_ops.Adafactor, {}),
    "ours, accumulating": (fastnlp_ops.Adafactor, {"accumulation_steps": 2}),
    "ours, torch's": (fastnlp_ops.TorchAdafactor, {}),
}


class Net(nn.Module):
    """Two matrices (Muon takes nothing else), and one that has no gradient before the fourth step."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (3, 2)))
        self.late = nn.Parameter(torch.randn(3, 2))

    def forward(self, x, late):
        return (x @ self.first).tanh() @ (self.second + self.late if late else self.second)


def build(name, model):
    kind, options = OPTIMIZERS[name]
    return kind(model.parameters(), **options)


def step(name, model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    x, target = torch.randn(5, 4, generator=generator), torch.randn(5, 2, generator=generator)

    def closure():
        optimizer.zero_grad()
        loss = (model(x, seed >= 4) - target).square().mean()
        loss.backward()
        if name == "SparseAdam":
            for p in model.parameters():
                p.grad = None if p.grad is None else p.grad.to_sparse()
        return loss

    if name == "LBFGS":
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def assert_same_weights(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert_same(p.detach(), q.detach())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_follows(name):
    """After every k updates the slow weights go their part of the way, and the parameters back to them."""
    model = Net()
    twin = copy.deepcopy(model)
    optimizer, other = build(name, model), build(name, twin)
    fastnlp_ops.Lookahead(optimizer, k=3, alpha=0.25)
    slow = [p.detach().clone() for p in twin.parameters()]
    each = OPTIMIZERS[name][1].get("accumulation_steps", 1)
    for k in range(1, 7 * each):
        step(name, model, optimizer, k)
        step(name, twin, other, k)
        if k % (3 * each) == 0:
            with torch.no_grad():
                for s, q in zip(slow, twin.parameters(), strict=True):
                    s.lerp_(q, 0.25)
                    q.copy_(s)
        assert_same_weights(model, twin)


def ways():
    """Optimizers, steps before the break, and ways over it that torch has for them."""
    for name in OPTIMIZERS:
        for begin in (2, 5):
            yield name, begin, "state_dict"
            yield name, begin, "torch.save"
            if name != "LBFGS":  # torch copies none
                yield name, begin, "copy"
        if name not in ("LBFGS", "SparseAdam"):  # it wants a state of each parameter, which it makes by dense gradients
            yield name, 6, "torch.distributed"


@pytest.mark.parametrize(("name", "begin", "way"), list(ways()))
def test_resumes(name, begin, way):
    """From any step on, to the bit; also for parameters without gradients and optimizers without state."""
    model = Net()
    optimizer = build(name, model)
    lookahead = fastnlp_ops.Lookahead(optimizer, k=3)
    for k in range(begin):
        step(name, model, optimizer, k)
    optimizer.zero_grad()
    if way == "copy":
        resumed, again = copy.deepcopy((model, lookahead))
        other = again.optimizer
    else:
        resumed = Net()
        resumed.load_state_dict(model.state_dict())
        other = build(name, resumed)
        fastnlp_ops.Lookahead(other, k=3)
        if way == "torch.distributed":
            saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
            set_optimizer_state_dict(resumed, other, saved)
        else:
            saved = optimizer.state_dict()
            if way == "torch.save":
                file = io.BytesIO()
                torch.save(saved, file)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
            else:
                saved = copy.deepcopy(saved)
            other.load_state_dict(saved)
    resumed.load_state_dict(model.state_dict())
    for k in range(begin, begin + 7):
        step(name, model, optimizer, k)
        step(name, resumed, other, k)
        assert_same_weights(model, resumed)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_loading_leaves_the_checkpoint_alone(name):
    model = Net()
    optimizer = build(name, model)
    fastnlp_ops.Lookahead(optimizer, k=2)
    step(name, model, optimizer, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    slow = saved["state"][0]["slow"].clone()
    optimizer.load_state_dict(saved)
    step(name, model, optimizer, 1)
    assert_same(saved["state"][0]["slow"], slow)


def plain_calls(p, optimizer, updates):
    """So many updates, each behind calls of step() without a gradient."""
    for _ in range(updates):
        for gradient in (None, torch.ones(2, 2)):
            p.grad = gradient
            optimizer.step()


def scaled_calls(p, optimizer, updates):
    """So many updates under a GradScaler, each behind one that overflows."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for _ in range(updates):
        for factor in (math.inf, 1.0):
            optimizer.zero_grad()
            scaler.scale(factor * p.sum()).backward()
            scaler.step(optimizer)
            scaler.update()


def spoiled_calls(p, optimizer, updates):
    for _ in range(updates):
        for factor in (math.nan, 1.0):
            p.grad = factor * torch.ones(2, 2)
            optimizer.step()


def refused_calls(p, optimizer, updates):
    """So many updates, each behind a call that raises."""
    for _ in range(updates):
        p.grad = torch.ones(2, 2).to_sparse()
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step()
        p.grad = torch.ones(2, 2)
        optimizer.step()


GIVEN = {"lr": 0.1, "relative_step": False, "scale_parameter": False}


@pytest.mark.parametrize(
    ("kind", "options", "calls"),
    [
        (torch.optim.SGD, {"lr": 0.1}, plain_calls),
        (torch.optim.SGD, {"lr": 0.1}, scaled_calls),
        (torch.optim.SGD, {"lr": 0.1, "fused": True}, scaled_calls),
        (fastnlp_ops.Adafactor, GIVEN, plain_calls),
        (fastnlp_ops.Adafactor, GIVEN, scaled_calls),
        (fastnlp_ops.Adafactor, GIVEN | {"capturable": True}, scaled_calls),
        (fastnlp_ops.Adafactor, GIVEN | {"skip_nonfinite": True}, spoiled_calls),
        (fastnlp_ops.Adafactor, GIVEN | {"accumulation_steps": 3}, lambda p, o, n: plain_calls(p, o, 3 * n)),
        (fastnlp_ops.Adafactor, GIVEN, refused_calls),
    ],
)
def test_counts_updates(kind, options, calls):
    """Calls of step() that update nothing do not count: 0.9 is one step from 1, or two steps and half the way back."""
    for updates, expected in ((1, 0.9), (2, 0.9), (3, 0.8), (4, 0.8)):
        p = nn.Parameter(torch.ones(2, 2))
        optimizer = kind([p], **options)
        fastnlp_ops.Lookahead(optimizer, k=2)
        if "accumulation_steps" in options:
            for _ in range(3 * updates):
                p.grad = torch.ones(2, 2)
                optimizer.step()
        else:
            calls(p, optimizer, updates)
        torch.testing.assert_close(p.detach(), torch.full((2, 2), expected))


def test_in_backward():
    """Updates within backward count, and the slow weights begin before the first of them."""
    p = nn.Linear(2, 2, bias=False)
    nn.init.ones_(p.weight)
    optimizer = fastnlp_ops.adafactor_in_backward(p, **GIVEN)
    fastnlp_ops.Lookahead(optimizer, k=2)
    for expected in (0.9, 0.9, 0.8, 0.8):
        p.weight.sum().backward()
        optimizer.step()
        optimizer.step()  # nothing has been updated since
        torch.testing.assert_close(p.weight.detach(), torch.full((2, 2), expected))


def test_another_k_in_between():
    """A run that goes on with a smaller k than its slow weights are old."""
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=0.1)
    fastnlp_ops.Lookahead(optimizer, k=10)
    for _ in range(5):
        p.grad = torch.ones(2)
        optimizer.step()
    resumed = torch.optim.SGD([p], lr=0.1)
    fastnlp_ops.Lookahead(resumed, k=3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.step()
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.7))


@pytest.mark.parametrize("name", ["SGD", "AdamW", "ours"])
def test_a_model_in_another_precision(name):
    model = Net()
    optimizer = build(name, model)
    fastnlp_ops.Lookahead(optimizer, k=2)
    step(name, model, optimizer, 0)
    model.double()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    if name == "AdamW":  # does not go on itself
        for state in optimizer.state.values():
            state.update({key: state[key].double() for key in ("exp_avg", "exp_avg_sq") if key in state})
    optimizer.step()
    assert all(state["slow"].dtype == torch.float64 for state in optimizer.state.values() if "slow" in state)


def test_errors():
    model = Net()
    optimizer = build("SGD", model)
    lookahead = fastnlp_ops.Lookahead(optimizer)
    with pytest.raises(ValueError, match="optimizer must have one Lookahead at most"):
        fastnlp_ops.Lookahead(optimizer)
    lookahead.remove()
    fastnlp_ops.Lookahead(optimizer)
    step("SGD", model, optimizer, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["slow"] = torch.zeros(5)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"slow weights must have shape \(3, 2\), got \(5,\)"):
        optimizer.load_state_dict(saved)
    for key, state in before["state"].items():
        assert_same(optimizer.state_dict()["state"][key]["slow"], state["slow"])
    step("SGD", model, optimizer, 1)


@pytest.fixture
def compiler():
    """torch.compile without what other tests have compiled, of which it counts the graphs, nor for others to count."""
    torch._dynamo.reset()
    yield torch.compile
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["ours", "SGD"])
def test_compile(name, compiler):
    """A compiled step follows as an eager one does."""
    model = Net()
    twin = copy.deepcopy(model)
    optimizer, other = build(name, model), build(name, twin)
    fastnlp_ops.Lookahead(optimizer, k=2)
    fastnlp_ops.Lookahead(other, k=2)
    compiled = compiler(optimizer.step, backend="eager", fullgraph=name == "ours")
    for k in range(5):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
            q.grad = p.grad.clone()
        compiled()
        other.step()
        assert_same_weights(model, twin)
