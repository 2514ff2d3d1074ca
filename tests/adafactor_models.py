"""Scenarios of adafactor_processes.py in which a model is trained: DDP, FSDP2, checkpoints."""

import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from adafactor_tensors import OPTIONS, OURS, assert_near, counted, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fastnlp_ops


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(30, 12),
        nn.Conv1d(5, 6, 3, padding=1),
        nn.Linear(12, 9),
        nn.LayerNorm(9),
        nn.Tanh(),
        nn.Linear(9, 3),
    )


def batch(seed):
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randint(30, (8, 5), generator=generator), torch.randn(8, 6, 3, generator=generator)


def loss_of(network, words, targets):
    return (network(words) - targets).square().mean()


def mine(x, rank, world):
    return x.chunk(world)[rank]


def train_one(optimizer_of, steps):
    """The whole batch in one process."""
    network = model()
    optimizer = optimizer_of(network)
    for seed in range(steps):
        optimizer.zero_grad()
        loss_of(network, *batch(seed)).backward()
        optimizer.step()
    return network, optimizer


def assert_models_near(ours, theirs, atol=1e-6):
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_near(p, q, name, atol)


def test_ddp(world):
    """DistributedDataParallel: every process has everything, and nothing more to say."""
    network = DistributedDataParallel(model())
    optimizer = OURS(network.parameters(), max_grad_norm=1.0)
    for seed in range(4):
        optimizer.zero_grad()
        loss_of(network, *(mine(x, dist.get_rank(), world) for x in batch(seed))).backward()
        with counted() as calls:
            optimizer.step()
        assert not calls
    single, _ = train_one(lambda m: OURS(m.parameters(), max_grad_norm=1.0), 4)
    assert_models_near(network.module, single)


def sharded_model(mesh=None):
    network = model()
    for layer in (network[2], network[5]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(network, mesh=mesh)


def train_sharded(network, optimizer, steps, world, begin=0):
    for seed in range(begin, begin + steps):
        optimizer.zero_grad()
        loss_of(network, *(mine(x, dist.get_rank(), world) for x in batch(seed))).backward()
        optimizer.step()


def test_fully_shard(world):
    """FSDP2: as one process, with one exchange a step."""
    for kind, options in OPTIONS.values():
        network = sharded_model()
        optimizer = kind(network.parameters(), **options)
        with counted() as calls:
            train_sharded(network, optimizer, 4, world)
        assert len(calls) == 4 * (1 + (kind is not OURS) + ("max_grad_norm" in options)), len(calls)
        single, _ = train_one(lambda m, kind=kind, options=options: kind(m.parameters(), **options), 4)
        assert_models_near(network, single)


def test_hybrid_sharding(world):
    if world < 4:
        return
    network = sharded_model(init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")))
    train_sharded(network, optimizer := OURS(network.parameters(), skip_nonfinite=True), 4, world)
    single, _ = train_one(lambda m: OURS(m.parameters()), 4)
    assert_models_near(network, single)
    assert optimizer.state[network[0].weight]["exp_avg_sq_col"].placements == (Replicate(), Replicate())


def test_in_backward(world):
    """A step in backward, each parameter when its gradient has been scattered."""
    network = sharded_model()
    optimizer = fastnlp_ops.adafactor_in_backward(network)
    train_sharded(network, optimizer, 3, world)
    assert all(p.grad is None for p in network.parameters())
    single, _ = train_one(lambda m: OURS(m.parameters()), 3)
    assert_models_near(network, single)


def test_checkpoint(world, folder):
    """torch.distributed.checkpoint saves and loads; training goes on as without a break, also in one process."""
    for kind, options in ((OURS, {"beta1": 0.9, "ema_decay": 0.9}), (fastnlp_ops.TorchAdafactor, {})):
        network = sharded_model()
        optimizer = kind(network.parameters(), **options)
        train_sharded(network, optimizer, 3, world)
        path = folder / f"checkpoint-{world}-{kind.__name__}"
        dcp.save(
            {"model": network.state_dict(), "optimizer": get_optimizer_state_dict(network, optimizer)},
            checkpoint_id=path,
        )

        other = sharded_model()
        another = kind(other.parameters(), **options)
        loaded = {"model": other.state_dict(), "optimizer": get_optimizer_state_dict(other, another)}
        dcp.load(loaded, checkpoint_id=path)
        other.load_state_dict(loaded["model"])
        set_optimizer_state_dict(other, another, loaded["optimizer"])
        for p, q in zip(other.parameters(), network.parameters(), strict=True):
            for name, value in optimizer.state[q].items():
                assert torch.equal(whole(another.state[p][name]), whole(value)), name
                assert getattr(another.state[p][name], "placements", None) == getattr(value, "placements", None), name
        train_sharded(network, optimizer, 2, world, 3)
        train_sharded(other, another, 2, world, 3)
        assert_models_near(other, network, 0.0)

        single = model()
        alone = kind(single.parameters(), **options)
        loaded = {"model": single.state_dict(), "optimizer": get_optimizer_state_dict(single, alone)}
        dcp.load(loaded, checkpoint_id=path)
        single.load_state_dict(loaded["model"])
        set_optimizer_state_dict(single, alone, loaded["optimizer"])
        for seed in (3, 4):
            alone.zero_grad()
            loss_of(single, *batch(seed)).backward()
            alone.step()
        assert_models_near(network, single)


def test_checkpoint_of_one_process(world):
    """A plain state dict, which every process has read, is cut into its parts."""
    single, alone = train_one(lambda m: OURS(m.parameters()), 3)
    network = sharded_model()
    optimizer = OURS(network.parameters())
    with torch.no_grad():
        for p, q in zip(network.parameters(), single.parameters(), strict=True):
            p.copy_(distribute_tensor(q.detach(), p.device_mesh, p.placements, src_data_rank=None))
    optimizer.load_state_dict(alone.state_dict())
    train_sharded(network, optimizer, 2, world, 3)
    for seed in (3, 4):
        alone.zero_grad()
        loss_of(single, *batch(seed)).backward()
        alone.step()
    assert_models_near(network, single)


def test_lookahead_and_averages(world):
    network = sharded_model()
    optimizer = OURS(network.parameters(), ema_decay=0.5)
    fastnlp_ops.Lookahead(optimizer, k=2)
    train_sharded(network, optimizer, 4, world)

    def with_lookahead(m):
        other = OURS(m.parameters(), ema_decay=0.5)
        fastnlp_ops.Lookahead(other, k=2)
        return other

    single, alone = train_one(with_lookahead, 4)
    assert_models_near(network, single)
    with optimizer.averaged_weights(), alone.averaged_weights():
        assert_models_near(network, single)
    assert_models_near(network, single)


def test_accumulation(world):
    """Each process takes its part of the gradients; states that are written as numbers and whole tensors are split."""
    network = sharded_model()
    optimizer = OURS(network.parameters(), accumulation_steps=2, beta1=0.9)
    single = model()
    alone = OURS(single.parameters(), accumulation_steps=2, beta1=0.9)
    for seed in range(6):
        if seed == 4:
            for p in network.parameters():
                state = optimizer.state[p]
                state.update({name: whole(value) for name, value in state.items()}, step=int(state["step"]))
        loss_of(network, *(mine(x, dist.get_rank(), world) for x in batch(seed))).backward()
        optimizer.step()
        network.zero_grad()
        loss_of(single, *batch(seed)).backward()
        alone.step()
    assert_models_near(network, single)
    for p in network.parameters():
        assert optimizer.state[p]["step"].item() == 3


def die_in_a_step(rank, world):
    """The last process dies; whoever waits for it says so."""
    network = sharded_model()
    optimizer = OURS(network.parameters())
    train_sharded(network, optimizer, 1, world)
    loss_of(network, *(mine(x, rank, world) for x in batch(1))).backward()
    if rank == world - 1:
        os._exit(3)
    try:
        optimizer.step()
    except RuntimeError as error:
        return f"error: {str(error).splitlines()[0]}"
    return "no error"
