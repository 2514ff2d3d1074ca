"""torch.func, forward mode and their compositions, for every differentiable function and every layer."""

import functools

import pytest
import torch
import torch.autograd.forward_ad as fw
from differentiable import CASES, MASK, TAGS, B, T, draw
from tools import assert_same
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import fastnlp_ops
from fastnlp_ops import reference

UNUSED = {"allow_unused": True, "materialize_grads": True}

each_case = pytest.mark.parametrize("name", CASES)


def flat(found):
    return torch.utils._pytree.tree_leaves(found)


def assert_close(found, expected):
    for i, (x, y) in enumerate(zip(flat(found), flat(expected), strict=True)):
        assert torch.allclose(x, y, rtol=1e-7, atol=1e-9), f"result {i}: {(x - y).abs().max()}"


def summed(call):
    return lambda *leaves: call(*leaves).sin().sum()


def everything(transform):
    """By all leaves; of a sum where the transform is of gradients."""
    return lambda call, leaves: transform(summed(call), argnums=tuple(range(len(leaves))))(*leaves)


def tangents(leaves):
    return tuple((x * 0.7 + 0.3).cos() for x in leaves)


def vjp_of(call, leaves):
    value, pull = vjp(call, *leaves)
    return value, pull(value.cos())


def jvp_of_grad(call, leaves):
    return jvp(grad(summed(call), argnums=tuple(range(len(leaves)))), tuple(leaves), tangents(leaves))


def grad_of_jvp(call, leaves):
    def slope(*leaves):
        return jvp(call, leaves, tangents(leaves))[1].sin().sum()

    return grad(slope, argnums=tuple(range(len(leaves))))(*leaves)


def dual_numbers(call, leaves):
    with fw.dual_level():
        duals = [fw.make_dual(x, d) for x, d in zip(leaves, tangents(leaves), strict=True)]
        return tuple(fw.unpack_dual(call(*duals)))


def unpacked(duals):
    """Values and tangents; 0 for none."""
    parts = [fw.unpack_dual(x) for x in duals]
    return [(x.detach(), torch.zeros_like(x) if d is None else d.detach()) for x, d in parts]


def dual_numbers_in_backward(call, leaves):
    """The forward pass saw no dual numbers, the backward pass does."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    value = call(*leaves)
    with fw.dual_level():
        above = fw.make_dual(value.detach().cos(), value.detach().sin())
        slopes = torch.autograd.grad(value, leaves, above, **UNUSED)
        return unpacked(slopes)


def forward_over_reverse(call, leaves):
    """Dual numbers that also require gradients."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    with fw.dual_level():
        duals = [fw.make_dual(x, d.detach()) for x, d in zip(leaves, tangents(leaves), strict=True)]
        slopes = torch.autograd.grad(call(*duals).sin().sum(), leaves, create_graph=True, **UNUSED)
        return unpacked(slopes)


def grad_under_autograd(call, leaves):
    """torch.func inside of a recorded graph."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    inner = grad(summed(call), argnums=tuple(range(len(leaves))))(*leaves)
    return torch.autograd.grad(sum((x * (1 + i)).sin().sum() for i, x in enumerate(inner)), leaves, **UNUSED)


def hessian_of_autograd(call, leaves):
    """That of torch.autograd.functional, forward over reverse, by the first leaf."""
    first, *others = leaves
    options = {"outer_jacobian_strategy": "forward-mode", "vectorize": True}
    return torch.autograd.functional.hessian(lambda x: call(x, *others).sin().sum(), first, **options)


TRANSFORMS = {
    "grad": everything(grad),
    "vjp": vjp_of,
    "jvp": lambda call, leaves: jvp(call, tuple(leaves), tangents(leaves)),
    "jacrev": lambda call, leaves: jacrev(call, argnums=tuple(range(len(leaves))))(*leaves),
    "jacfwd": lambda call, leaves: jacfwd(call, argnums=tuple(range(len(leaves))))(*leaves),
    "hessian": lambda call, leaves: hessian(summed(call))(*leaves),
    "reverse_over_reverse": lambda call, leaves: jacrev(grad(summed(call)))(*leaves),
    "jvp_of_grad": jvp_of_grad,
    "grad_of_jvp": grad_of_jvp,
    "grad_under_autograd": grad_under_autograd,
    "dual_numbers": dual_numbers,
    "dual_numbers_in_backward": dual_numbers_in_backward,
    "forward_over_reverse": forward_over_reverse,
    "hessian_of_autograd": hessian_of_autograd,
}


@each_case
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(name, transform, device):
    case = CASES[name]
    leaves = draw(case, device, requires_grad=False)
    found, expected = (
        TRANSFORMS[transform](functools.partial(case.call, module), leaves) for module in (fastnlp_ops, reference)
    )
    assert_close(found, expected)


def stacked(leaves, found):
    """Results of a call for each entry of a list of leaves, as vmap returns them."""
    return [torch.stack(parts) for parts in zip(*(flat(found(one)) for one in leaves), strict=True)]


@each_case
def test_vmap(name, device):
    """Slices along any dimension, of all leaves or the first; gradients inside and outside of vmap."""
    case = CASES[name]
    each = [draw(case, device, requires_grad=False) for _ in range(3)]
    by = tuple(range(len(case.sizes)))
    call = functools.partial(case.call, fastnlp_ops)
    plain = functools.partial(case.call, reference)
    for dim in (0, -1):
        together = [torch.stack(parts, dim) for parts in zip(*each, strict=True)]
        assert_close(vmap(call, in_dims=dim)(*together), stacked(each, lambda x: plain(*x)))
        slopes = vmap(grad(summed(call), by), in_dims=dim)(*together)
        expected = stacked(each, lambda x: grad(summed(plain), by)(*x))
        assert_close(slopes, expected)
        outside = grad(lambda *x: vmap(summed(call), in_dims=dim)(*x).sum(), by)(*together)  # noqa: B023
        assert_close([x.movedim(dim, 0) for x in outside], expected)
    first = [[one[0], *each[0][1:]] for one in each]
    in_dims = (0, *[None] * (len(by) - 1))
    arguments = (torch.stack([one[0] for one in each]), *each[0][1:])
    assert_close(vmap(call, in_dims)(*arguments), stacked(first, lambda x: plain(*x)))
    slopes = vmap(grad(summed(call), by), in_dims)(*arguments)
    assert_close(slopes, stacked(first, lambda x: grad(summed(plain), by)(*x)))
    curvature = vmap(jvp_with(call), in_dims=0)(*(torch.stack(x) for x in zip(*each, strict=True)))
    assert_close(curvature, stacked(each, lambda x: jvp_with(plain)(*x)))


MASKED = {
    "crf_log_partition": lambda module, mask, e, t: module.crf_log_partition(e, t, mask=mask),
    "crf_log_likelihood": lambda module, mask, e, t: module.crf_log_likelihood(e, TAGS.to(e.device), t, mask=mask),
    "crf_marginals": lambda module, mask, e, t: module.crf_marginals(e, t, mask=mask),
    "crf_entropy": lambda module, mask, e, t: module.crf_entropy(e, t, mask=mask),
    "crf_viterbi": lambda module, mask, e, t: module.crf_viterbi(e, t, mask=mask)[1],
    "memm_log_likelihood": lambda module, mask, e, t: module.memm_log_likelihood(e, TAGS.to(e.device), t, mask=mask),
    "global_pointer_divergence": lambda module, mask, e, t: module.global_pointer_divergence(
        *(x[:, :, None] for x in (e, e.sin(), e @ t, e.cos())), rope=False, mask=mask
    ),
    "linear_attention": lambda module, mask, e, t: module.linear_attention(
        *(x[:, :, None] for x in (e, e.sin(), e @ t)), causal=True, key_padding_mask=mask
    ),
}


@pytest.mark.parametrize("name", MASKED)
def test_vmap_over_masks(name, device):
    masks = torch.stack([MASK, MASK.flip(0), MASK.flip(1)]).to(device)
    emissions = torch.randn(3, B, T, 3, dtype=torch.float64, device=device)
    transitions = torch.randn(3, 3, dtype=torch.float64, device=device)

    def both(module):
        call = functools.partial(MASKED[name], module)

        def slopes(mask, e):
            own = functools.partial(call, mask)
            return grad(summed(own), (0, 1))(e, transitions), jvp_with(own)(e, transitions)

        return slopes

    found = vmap(both(fastnlp_ops))(masks, emissions)
    assert_close(found, stacked(list(zip(masks, emissions, strict=True)), lambda x: both(reference)(*x)))


def jvp_with(call):
    return lambda *leaves: jvp(call, leaves, tangents(leaves))


@each_case
def test_forward_gradcheck(name, device):
    """Against finite differences."""
    case = CASES[name]
    leaves = draw(case, device)
    options = {"check_forward_ad": True, "check_backward_ad": False, "check_undefined_grad": False, "fast_mode": True}
    assert torch.autograd.gradcheck(functools.partial(case.call, fastnlp_ops), leaves, **options)


class Calls(torch.nn.Module):
    """A module whose forward is a method of another: functional_call replaces what it finds in it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, loss, *inputs):
        return loss(self.layer, *inputs)


def spans(layer, x, tags, mask):
    labels = torch.stack([tags[:, :2], tags[:, :2] + 1], -1)[:, None].expand(-1, 2, -1, -1)
    return layer.loss(x, labels, mask) + layer(x, mask).clamp(min=-9).sin().sum()


LAYERS = {
    "CRF": (lambda: fastnlp_ops.CRF(3, batch_first=True), 3, lambda layer, x, tags, mask: layer(x, tags, mask)),
    "CRF-labels": (
        lambda: fastnlp_ops.CRF(3, batch_first=True, labels=["O", "B-X", "I-X"]),
        3,
        lambda layer, x, tags, mask: layer(x, tags.clamp(max=1), mask, reduction="token_mean"),
    ),
    "CRF-time_first": (
        lambda: fastnlp_ops.CRF(3),
        3,
        lambda layer, x, tags, mask: layer(x.transpose(0, 1), tags.t(), mask.t()),
    ),
    "MEMM": (
        lambda: fastnlp_ops.MEMM(3, hidden_dim=2, batch_first=True),
        3,
        lambda layer, x, tags, mask: layer(x, tags, mask),
    ),
    "GlobalPointer": (lambda: fastnlp_ops.GlobalPointer(6, 2, 4), 6, spans),
    "EfficientGlobalPointer": (lambda: fastnlp_ops.EfficientGlobalPointer(6, 2, 4), 6, spans),
    "LinearAttention": (
        lambda: fastnlp_ops.LinearAttention(4, 2, batch_first=True),
        4,
        lambda layer, x, _, mask: layer(x, x, x, key_padding_mask=~mask)[0].sin().sum(),
    ),
    "LinearAttention-causal": (
        lambda: fastnlp_ops.LinearAttention(4, 2, batch_first=True, feature_map="exp"),
        4,
        lambda layer, x, _, mask: layer(x, x, x, key_padding_mask=~mask, is_causal=True)[0].sin().sum(),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_layers_checkpointed(name, use_reentrant, device):
    make, width, loss = LAYERS[name]
    layer = make().double().to(device)
    inputs = (torch.randn(B, T, width, dtype=torch.float64, device=device), TAGS.to(device), MASK.to(device))
    found = []
    for wrap in (lambda call, *x: call(*x), functools.partial(checkpoint, use_reentrant=use_reentrant)):
        layer.zero_grad()
        x = inputs[0].clone().requires_grad_()
        wrap(functools.partial(loss, layer), x, *inputs[1:]).backward()
        found.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
    for own, plain in zip(*found, strict=True):
        assert_same(own, plain)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, device):
    """Gradients of each sample, as for differential privacy; a step of MAML; a Hessian-vector product both ways."""
    make, width, loss = LAYERS[name]
    layer = Calls(make().double().to(device))
    parameters = {key: x.detach() for key, x in layer.named_parameters()}
    inputs = (torch.randn(B, T, width, dtype=torch.float64, device=device), TAGS.to(device), MASK.to(device))

    def value(parameters, *inputs):
        return functional_call(layer, parameters, (loss, *inputs))

    def slopes(*inputs, parameters=layer.named_parameters, create_graph=False):
        given = dict(parameters())
        found = torch.autograd.grad(value(given, *inputs), list(given.values()), create_graph=create_graph)
        return dict(zip(given, found, strict=True))

    expected = slopes(*inputs)
    assert_close(grad(value)(parameters, *inputs), expected)

    def one(parameters, *sample):
        return value(parameters, *(x[None] for x in sample))

    samples = [slopes(*(x[i : i + 1] for x in inputs)) for i in range(B)]
    found = vmap(grad(one), in_dims=(None, 0, 0, 0))(parameters, *inputs)
    assert_close(found, [torch.stack(parts) for parts in zip(*(x.values() for x in samples), strict=True)])

    def adapted(parameters):
        step = grad(value)(parameters, *inputs)
        return value({key: x - 0.1 * step[key] for key, x in parameters.items()}, *inputs)

    given = dict(layer.named_parameters())
    step = slopes(*inputs, create_graph=True)
    after = value({key: x - 0.1 * step[key] for key, x in given.items()}, *inputs)
    outer = torch.autograd.grad(after, list(given.values()))
    assert_close(grad(adapted)(parameters), list(outer))

    direction = {key: torch.randn_like(x) for key, x in parameters.items()}
    forward = jvp(lambda p: grad(value)(p, *inputs), (parameters,), (direction,))[1]
    total = sum((direction[key] * x).sum() for key, x in slopes(*inputs, create_graph=True).items())
    backward = torch.autograd.grad(total, list(given.values()), **UNUSED)
    assert_close(forward, list(backward))
