"""Scenarios of adafactor_processes.py in which parameters are DTensors, compared with the same steps in one process."""

import math
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fastnlp_ops

SHAPES = [(9, 7), (3, 5), (16, 8), (7,), (2,), (4, 3, 5), (6, 2, 3, 3), (1, 6), (8, 1)]
OURS = fastnlp_ops.Adafactor
OPTIONS = {
    "default": (OURS, {}),
    "momentum": (OURS, {"beta1": 0.9, "weight_decay": 0.1, "clip_threshold": 0.3, "ema_decay": 0.9}),
    "layers": (OURS, {"layer_adaptation": True, "weight_decay": 0.3, "lr": 0.1, "relative_step": False}),
    "lazy": (OURS, {"lazy": True, "weight_decay": 0.2}),
    "norm": (OURS, {"max_grad_norm": 0.5, "layer_adaptation": True}),
    "careful": (OURS, {"max_grad_norm": 3.0, "skip_nonfinite": True}),
    "torch": (fastnlp_ops.TorchAdafactor, {"weight_decay": 0.1}),
    "torch_clamp": (fastnlp_ops.TorchAdafactor, {"eps": (0.3, 1e-3)}),
}


def draw(seed, dtype=torch.float32):
    """The same numbers in every process; some rows without a gradient."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    for x in tensors:
        if x.dim() > 1:
            x *= torch.rand(x.shape[:-1], generator=generator)[..., None] > 0.2
    return [x.to(dtype) for x in tensors]


def spread(x, mesh, placements):
    places = [Shard(p.dim % x.dim()) if isinstance(p, Shard) and x.dim() > p.dim else Replicate() for p in placements]
    return distribute_tensor(x, mesh, places, src_data_rank=None)


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def assert_near(a, b, what="", atol=1e-6):
    a, b = whole(a.detach()), whole(b.detach())
    assert a.dtype == b.dtype, (what, a.dtype, b.dtype)
    error = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
    size = max(1.0, b.double().abs().max().item() if b.numel() else 0.0)
    assert error <= atol * size, f"{what}: off by {error}"


def assert_states_near(ours, theirs, params, plain):
    for k, (p, q) in enumerate(zip(params, plain, strict=True)):
        assert ours.state[p].keys() == theirs.state[q].keys()
        for name, value in theirs.state[q].items():
            assert_near(ours.state[p][name], value, f"{name} of {k}")


@contextmanager
def counted():
    """Numbers of collective calls of torch.distributed."""
    calls, true = [], dist.all_reduce

    def all_reduce(tensor, *arguments, **options):
        calls.append(tensor.numel())
        return true(tensor, *arguments, **options)

    dist.all_reduce = all_reduce
    try:
        yield calls
    finally:
        dist.all_reduce = true


def compare(mesh, placements, kind, options, exchanges=None, dtype=torch.float32, atol=1e-6):
    values = draw(0, dtype)
    params = [nn.Parameter(spread(x, mesh, placements)) for x in values]
    plain = [nn.Parameter(x.clone()) for x in values]
    ours, theirs = kind(params, **options), kind(plain, **options)
    for seed in range(1, 4):
        for p, q, g in zip(params, plain, draw(seed, dtype), strict=True):
            p.grad, q.grad = spread(g, mesh, placements), g
        with counted() as calls:
            ours.step()
        if exchanges is not None:
            assert len(calls) == exchanges, f"{len(calls)} exchanges, expected {exchanges}"
        theirs.step()
    for k, (p, q) in enumerate(zip(params, plain, strict=True)):
        assert_near(p, q, f"parameter {k}", atol)
    if atol == 1e-6:
        assert_states_near(ours, theirs, params, plain)


def line(world):
    return init_device_mesh("cpu", (world,))


def every_option(world, dim, exchanges):
    for name, (kind, options) in OPTIONS.items():
        more = (kind is not OURS and dim == 0) + ("max_grad_norm" in options and dim == 0)
        try:
            compare(line(world), [Shard(dim)], kind, options, exchanges + more)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def test_shard_0(world):
    """One exchange; one more in torch mode and for max_grad_norm."""
    every_option(world, 0, 1)


def test_shard_1(world):
    """Two exchanges."""
    every_option(world, 1, 2)


def test_shard_last(world):
    compare(line(world), [Shard(2)], OURS, {"beta1": 0.5})


def test_replicate(world):
    """No exchange at all."""
    for kind, options in OPTIONS.values():
        compare(line(world), [Replicate()], kind, options, 0)


def test_mixed(world):
    """Each parameter in its own way, and one that is no DTensor; as few exchanges as the one that needs most."""
    mesh, values = line(world), draw(0)
    ways = [Shard(0), Shard(1), Replicate(), Shard(0), None, Shard(1), Shard(3), Shard(0), None]
    for name, (kind, options) in OPTIONS.items():
        params = [
            nn.Parameter(x.clone() if w is None else spread(x, mesh, [w])) for x, w in zip(values, ways, strict=True)
        ]
        plain = [nn.Parameter(x.clone()) for x in values]
        ours, theirs = kind(params, **options), kind(plain, **options)
        for seed in range(1, 4):
            for p, q, g, w in zip(params, plain, draw(seed), ways, strict=True):
                p.grad, q.grad = g.clone() if w is None else spread(g, mesh, [w]), g
            with counted() as calls:
                ours.step()
            assert len(calls) == 2, calls
            theirs.step()
        for k, (p, q) in enumerate(zip(params, plain, strict=True)):
            assert_near(p, q, f"{name}: {k}")


def test_two_dimensional_mesh(world):
    """Rows and columns both split; hybrid sharding; batches and rows."""
    if world < 4:
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    for placements in ([Shard(0), Shard(1)], [Replicate(), Shard(0)], [Shard(1), Replicate()], [Shard(1), Shard(0)]):
        for name, (kind, options) in OPTIONS.items():
            try:
                compare(mesh, placements, kind, options)
            except AssertionError as error:
                raise AssertionError(f"{placements} {name}: {error}") from None


def test_half_precision(world):
    """bfloat16 with stochastic rounding: the same random bits for the same elements, whoever has them."""
    options = {"rounding": "stochastic", "lr": 0.1, "relative_step": False, "scale_parameter": False}
    for dim in (0, 1):
        values = [x for x in draw(0, torch.bfloat16) if x.dim() < 4 or dim == 0]
        params = [nn.Parameter(spread(x, line(world), [Shard(dim)])) for x in values]
        plain = [nn.Parameter(x.clone()) for x in values]
        ours, theirs = OURS(params, **options), OURS(plain, **options)
        for p, q in zip(params, plain, strict=True):
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(q.numel())).bfloat16()
            p.grad = spread(q.grad, line(world), [Shard(dim)])
        ours.step()
        theirs.step()
        same = torch.cat([(whole(p.detach()) == q.detach()).flatten() for p, q in zip(params, plain, strict=True)])
        assert same.float().mean() > 0.99, "sums in another order change few roundings"


def test_float64(world):
    compare(line(world), [Shard(0)], OURS, {}, 1, torch.float64, 1e-12)
    compare(line(world), [Shard(1)], OURS, {"beta1": 0.9}, 2, torch.float64, 1e-12)


def test_state_is_spread(world):
    """Row factors are split as rows are, column factors as columns are; the other one is everywhere."""
    mesh, (x, *_) = line(world), draw(0)
    for kind, row, col in (
        (OURS, "exp_avg_sq_row", "exp_avg_sq_col"),
        (fastnlp_ops.TorchAdafactor, "row_var", "col_var"),
    ):
        for dim, names in ((0, (row, col)), (1, (col, row))):
            p = nn.Parameter(spread(x, mesh, [Shard(dim)]))
            p.grad = spread(x, mesh, [Shard(dim)])
            optimizer = kind([p])
            optimizer.step()
            assert optimizer.state[p][names[0]].placements[0].is_shard()
            assert optimizer.state[p][names[1]].placements == (Replicate(),)
            assert optimizer.state[p][row].shape[0] == 9
            assert optimizer.state[p][row].to_local().numel() < 9 or dim == 1


def test_skip_on_all(world):
    """What is not finite in one process's part, or was found to be, stops the step in all."""
    mesh, (first, *others) = line(world), draw(0)
    for reason in ("gradient", "plain gradient", "found_inf"):
        params = [nn.Parameter(first.clone()), *(nn.Parameter(spread(x, mesh, [Shard(0)])) for x in others)]
        optimizer = OURS(params, skip_nonfinite=reason != "found_inf", beta1=0.9)
        for p, g in zip(params, draw(1), strict=True):
            p.grad = spread(g, mesh, [Shard(0)]) if isinstance(p, DTensor) else g
        optimizer.step()
        before = [whole(p.detach()).clone() for p in params]
        if dist.get_rank() == 1 and reason == "gradient":
            params[2].grad.to_local()[0, 0] = math.nan
        if reason == "plain gradient":
            params[0].grad[0, 0] = math.inf
        if reason == "found_inf":
            optimizer.found_inf = torch.tensor(float(dist.get_rank() == 1))
        optimizer.step()
        for k, (p, old) in enumerate(zip(params, before, strict=True)):
            assert torch.equal(whole(p.detach()), old), (reason, k)
            assert optimizer.state[p]["step"].item() == 1


def test_gradient_in_another_place(world):
    """A gradient whose parts lie elsewhere is brought to the parameter's."""
    mesh, (x, *_), (g, *_) = line(world), draw(0), draw(1)
    p, q = nn.Parameter(spread(x, mesh, [Shard(0)])), nn.Parameter(spread(x, mesh, [Shard(0)]))
    p.grad, q.grad = spread(g, mesh, [Shard(1)]), spread(g, mesh, [Shard(0)])
    OURS([p]).step()
    OURS([q]).step()
    assert torch.equal(whole(p.detach()), whole(q.detach()))
