"""Derivatives of the first three orders in reverse mode, as such and under what changes how a graph is kept."""

import contextlib

import pytest
import torch
import torch.autograd.forward_ad as fw
from differentiable import CASES, draw
from tools import assert_same
from torch.utils.checkpoint import checkpoint

import fastnlp_ops
from fastnlp_ops import reference

each_case = pytest.mark.parametrize("name", CASES)


def derivatives(call, leaves, orders, create_graph=False):
    """Of sums of sines, so that none of them is 0: those of all orders; `create_graph`: also for the last of them."""
    value, found = call(*leaves).sin().sum(), []
    for order in range(1, orders + 1):
        keep = create_graph or order < orders
        slopes = torch.autograd.grad(value, leaves, create_graph=keep, allow_unused=True, materialize_grads=True)
        found.append([x.detach() for x in slopes])
        value = sum((x * (1 + i)).sin().sum() for i, x in enumerate(slopes))
    return found


def assert_close(found, expected):
    for order, (own, plain) in enumerate(zip(found, expected, strict=True), 1):
        for i, (x, y) in enumerate(zip(own, plain, strict=True)):
            assert torch.allclose(x, y, rtol=1e-7, atol=1e-9), f"order {order}, leaf {i}: {(x - y).abs().max()}"


@each_case
def test_orders(name, device):
    """The last derivative too, whether or not a graph is made of it."""
    case = CASES[name]
    leaves = draw(case, device)
    expected = derivatives(lambda *x: case.call(reference, *x), leaves, 3, create_graph=True)
    for orders in (1, 2, 3):
        for create_graph in (False, True):
            found = derivatives(lambda *x: case.call(fastnlp_ops, *x), leaves, orders, create_graph)
            assert_close(found, expected[:orders])


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("global_pointer")])
def test_sequences_in_turn(name, device, monkeypatch):
    """Second derivatives of GlobalPointer, one sequence after the other."""
    case = CASES[name]
    leaves = draw(case, device)
    expected = derivatives(lambda *x: case.call(fastnlp_ops, *x), leaves, 2)
    monkeypatch.setattr("fastnlp_ops._ops.global_pointer._CELLS", 1)
    assert_close(derivatives(lambda *x: case.call(fastnlp_ops, *x), leaves, 2), expected)


@each_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_half(name, dtype, device):
    """Derivatives of every kind in the dtype of what they are taken by."""
    case = CASES[name]
    leaves = [x.detach().to(dtype).requires_grad_() for x in draw(case, device)]

    def call(*leaves):
        if not name.startswith("linear_attention"):
            return case.call(fastnlp_ops, *leaves)
        q, k, v, *others = leaves  # states and decays are float32 there
        return case.call(fastnlp_ops, q, k, v, *(x.float() for x in others))

    value = call(*leaves)
    first, second = derivatives(call, leaves, 2)  # those of second order may be beyond float16
    assert all(x.dtype == dtype for x in first + second) and all(x.isfinite().all() for x in first)
    with fw.dual_level():
        duals = [fw.make_dual(x.detach(), torch.ones_like(x)) for x in leaves]
        found, tangent = fw.unpack_dual(call(*duals))
        assert found.dtype == tangent.dtype == value.dtype
        assert torch.allclose(found, value, rtol=2e-2, atol=2e-2)


@contextlib.contextmanager
def packed(change):
    """Hooks that keep something else than the tensor: `change` of it, and what stood there when it was kept."""
    kept = []

    def pack(x):
        kept.append((change(x), x.clone()))
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: kept[i][0]):
        yield
    for now, then in kept:
        assert_same(now.to(then.device), then, "what a hook keeps")


def under(context):
    def wrap(call):
        def wrapped(*leaves):
            with context():
                return call(*leaves)

        return wrapped

    return wrap


def checkpointed(**options):
    return lambda call: lambda *leaves: checkpoint(call, *leaves, **options)


GRAPHS = {
    "checkpoint": checkpointed(use_reentrant=False),
    "checkpoint_of_checkpoint": lambda call: GRAPHS["checkpoint"](GRAPHS["checkpoint"](call)),
    "save_on_cpu": under(torch.autograd.graph.save_on_cpu),
    "copies": under(lambda: packed(torch.clone)),
    "same": under(lambda: packed(lambda x: x)),
}


@each_case
@pytest.mark.parametrize("graph", GRAPHS)
def test_graphs(name, graph, device):
    """First and second derivatives to the bit, the second also where hooks see it being recorded."""
    case = CASES[name]
    leaves = draw(case, device)

    def call(*leaves):
        return case.call(fastnlp_ops, *leaves)

    def slopes(*leaves):
        found = torch.autograd.grad(call(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.cat([x.flatten() for x in found])

    wrap = GRAPHS[graph]
    found, expected = derivatives(wrap(call), leaves, 2), derivatives(call, leaves, 2)
    found += derivatives(wrap(slopes), leaves, 1)
    expected += derivatives(slopes, leaves, 1)
    for own, plain in zip(found, expected, strict=True):
        for x, y in zip(own, plain, strict=True):
            assert_same(x, y)


@each_case
def test_reentrant_checkpoint(name, device):
    case = CASES[name]
    leaves = draw(case, device)
    found = []
    for wrap in (checkpointed(use_reentrant=True), lambda call: call):
        for x in leaves:
            x.grad = None
        wrap(lambda *x: case.call(fastnlp_ops, *x))(*leaves).sin().sum().backward()
        found.append([x.grad for x in leaves])
    for own, plain in zip(*found, strict=True):
        assert_same(own, plain)


@each_case
def test_batched_gradients(name, device):
    """First and second derivatives by several cotangents at once."""
    case = CASES[name]
    leaves = draw(case, device)
    value = case.call(fastnlp_ops, *leaves)
    slopes = torch.autograd.grad(value.sin().sum(), leaves, create_graph=True)
    for outputs in ([value], slopes):
        above = [torch.randn(3, *x.shape, dtype=x.dtype, device=device) for x in outputs]
        options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
        found = torch.autograd.grad(outputs, leaves, above, is_grads_batched=True, **options)
        each = [torch.autograd.grad(outputs, leaves, one, **options) for one in zip(*above, strict=True)]
        assert_close([found], [[torch.stack(parts) for parts in zip(*each, strict=True)]])
