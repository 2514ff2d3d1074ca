"""Adafactor between the calls of step() that accumulate, and inside of backward passes."""

import copy

import pytest
import torch
from test_adafactor_trainers import GIVEN, assert_near, line
from tools import assert_same
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastnlp_ops


@pytest.mark.parametrize("how", ["none", "zeros", "optimizer", "never", "closure"])
def test_nothing_clears_what_waits(how):
    """Gradients that are cleared between the calls, by anybody and in any way, count."""
    model, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    optimizer = fastnlp_ops.Adafactor(model.parameters(), accumulation_steps=3, beta1=0.9)
    other = fastnlp_ops.Adafactor(twin.parameters(), beta1=0.9)
    for step in range(6):
        x = torch.randn(4, 3)

        def closure(x=x):
            loss = model(x).square().mean()
            loss.backward()
            return loss

        if how == "closure":
            optimizer.zero_grad()
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        if how in ("none", "zeros"):
            model.zero_grad(set_to_none=how == "none")
        elif how == "optimizer":
            optimizer.zero_grad(set_to_none=False)
        (twin(x).square().mean() / 3).backward()
        if step % 3 == 2:
            other.step()
            other.zero_grad()
        assert_near(model, twin, rtol=1e-5, atol=1e-6)


def test_parameters_that_have_gradients_at_times():
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = fastnlp_ops.Adafactor([p, q], accumulation_steps=2, **GIVEN)
    q.grad = torch.ones(3)
    optimizer.step()
    p.grad = torch.ones(3)
    optimizer.step()
    assert [optimizer.state[x]["step"].item() for x in (p, q)] == [1, 1]
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.95))
    assert_same(p.detach(), q.detach())
    optimizer.accumulation_steps = 1
    p.grad = torch.ones(3)
    optimizer.step()
    assert [optimizer.state[x]["step"].item() for x in (p, q)] == [2, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("capturable", [False, True])
def test_accumulation_while_the_scale_changes(capturable, dtype):
    """Each call takes off its own scale; an overflow is left out with the update that it belongs to, or by itself."""
    p, q = nn.Parameter(torch.ones(3, dtype=dtype)), nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = fastnlp_ops.Adafactor([p], beta1=0.9, accumulation_steps=2, capturable=capturable)
    twin = fastnlp_ops.Adafactor([q], beta1=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1)
    for factor in (1.0, 3.0):
        scaler.scale((factor * p * p).sum().float()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 64.0
    q.grad = torch.full((3,), 4.0, dtype=dtype)
    twin.step()
    torch.testing.assert_close(p, q)
    before = p.detach().clone()
    (p * float("inf")).sum().float().backward()
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    scaler.scale((p * p).sum().float()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert p.isfinite().all()
    assert_same(p.detach(), before)


def test_copies_of_model_and_optimizer():
    """A copy of a pair goes on by itself, also between the calls that accumulate."""
    model = line()
    optimizer = fastnlp_ops.Adafactor(model.parameters(), accumulation_steps=2, **GIVEN)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    pair = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), pair):
        for p in m.parameters():
            p.grad = -3 * torch.ones_like(p)
        o.step()
    assert_near(model, pair[0], rtol=0, atol=0)
    assert optimizer.state[model.layer.weight]["step"].item() == 1


@pytest.fixture
def compiler():
    """torch.compile without what other tests have compiled, of which it counts the graphs, nor for others to count."""
    torch._dynamo.reset()
    yield torch.compile
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_accumulation(backend, compiler):
    """Attributes of an optimizer that a compiled step writes are lost; what waits is not."""
    model, twin = line(), line()
    options = {"accumulation_steps": 2, "skip_nonfinite": True, "beta1": 0.9}
    optimizer, other = (fastnlp_ops.Adafactor(m.parameters(), **options) for m in (model, twin))
    fastnlp_ops.Lookahead(optimizer, k=2)
    fastnlp_ops.Lookahead(other, k=2)
    step = compiler(optimizer.step, backend=backend)
    for k in range(9):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
            q.grad = p.grad.clone()
        step()
        other.step()
        assert_near(model, twin, rtol=0, atol=0)
    assert optimizer.state[model.layer.weight]["step"].item() == 4


class Shared(nn.Module):
    """Uses of one layer, each in a checkpoint of its own or in none."""

    def __init__(self, uses, reentrant):
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.layer.weight  # tied
        self.uses, self.reentrant = uses, reentrant

    def forward(self, x):
        for use in self.uses:
            layer = self.other if use.endswith("tied") else self.layer
            x = layer(x) if use.startswith("plain") else checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


USES = [
    ("checkpoint",),
    ("checkpoint", "checkpoint"),
    ("plain", "checkpoint"),
    ("checkpoint", "plain"),
    ("checkpoint", "checkpoint tied"),
    ("plain", "plain tied"),
]


@pytest.mark.parametrize("uses", USES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_in_backward_and_checkpoints(reentrant, uses):
    """One update of each parameter by its whole gradient; where a reentrant checkpoint gives a part, a sentence."""
    model, twin = Shared(uses, reentrant), Shared(uses, False)
    optimizer = fastnlp_ops.adafactor_in_backward(model, **GIVEN)
    other = fastnlp_ops.Adafactor(twin.parameters(), **GIVEN)
    parts = reentrant and sum(True for _ in uses) > 1 and any(use.startswith("checkpoint") for use in uses)
    for seed in range(3):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        loss = model(x.clone().requires_grad_()).square().sum()
        if parts:
            with pytest.raises(
                RuntimeError, match=r"gets a second gradient within one backward pass|modified by an inplace operation"
            ):
                loss.backward()
            return
        loss.backward()
        optimizer.step()
        twin(x).square().sum().backward()
        other.step()
        other.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        assert_near(model, twin, rtol=0, atol=0)
    assert optimizer.state[model.layer.weight]["step"].item() == 3


def test_in_backward_twice_before_a_step():
    """Two passes are two updates where nothing is reentrant; otherwise step() has to tell them apart."""
    for reentrant, passes in ((False, 2), (True, 1)):
        model = Shared(("checkpoint",), reentrant)
        optimizer = fastnlp_ops.adafactor_in_backward(model)
        for _ in range(passes):
            model(torch.ones(3, 4, requires_grad=True)).sum().backward()
        assert optimizer.state[model.layer.weight]["step"].item() == passes
    with pytest.raises(RuntimeError, match="step\\(\\) has not been called since the last pass"):
        model(torch.ones(3, 4, requires_grad=True)).sum().backward()
