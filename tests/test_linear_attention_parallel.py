"""Linear attention over 1, 2 and 4 processes: the numbers of one, gradients included, and one exchange a pass."""

import datetime
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastnlp_ops import linear_attention, linear_attention_context_parallel

B, T, H, Hkv, Dk, Dv = 2, 21, 4, 2, 5, 7
LIMIT = {torch.float64: 1e-12, torch.float32: 1e-6}
CASES = {
    "bidirectional": {},
    "causal": {"causal": True},
    "not normalised": {"causal": True, "normalize": False, "scale": 0.5},
    "mask": {"mask": True},
    "causal mask": {"causal": True, "mask": True},
    "decay of heads": {"causal": True, "log_decay": "heads"},
    "decay of tokens": {"causal": True, "log_decay": "tokens", "mask": True, "normalize": False},
    "exp": {"feature_map": "exp", "mask": True},
    "causal exp": {"feature_map": "exp", "causal": True},
    "softmax": {"feature_map": "softmax", "mask": True},
    "causal softmax": {"feature_map": "softmax", "causal": True, "normalize": False},
    "cosine+1": {"feature_map": "cosine+1", "causal": True},
    "relu": {"feature_map": "relu", "causal": True, "mask": True},
}


def cuts(world):
    """Uneven parts; of four ranks the second has no token."""
    return {1: [0, T], 2: [0, 9, T], 4: [0, 4, 4, 15, T]}[world]


def draw(case, dtype):
    """Inputs of the whole sequence, the same in every process, and the options."""
    options = dict(CASES[case])
    # Keys whose maxima are far apart from rank to rank; in float32 that alone costs some digits.
    spread = (20 if dtype == torch.float64 else 2) * torch.randn(1, T, 1, 1, dtype=dtype)
    q = torch.randn(B, T, H, Dk, dtype=dtype)
    k, v = torch.randn(B, T, Hkv, Dk, dtype=dtype), torch.randn(B, T, Hkv, Dv, dtype=dtype)
    tensors = {"q": q, "k": k + spread if options.get("feature_map") == "exp" else k, "v": v}
    if decay := options.pop("log_decay", None):
        tensors["log_decay"] = -torch.rand((Hkv,) if decay == "heads" else (B, T, Hkv), dtype=dtype)
    mask = None
    if options.pop("mask", False):
        mask = torch.rand(B, T) < 0.7
        mask[0, :12] = False  # whole ranks without a key
        tensors["k"] = k.masked_fill(~mask[:, :, None, None], math.nan)
    return tensors, mask, options


def gradients(out, weights, tensors):
    return dict(zip(tensors, torch.autograd.grad((out * weights).sum(), tensors.values()), strict=True))


def assert_near(actual, expected, what):
    limit = LIMIT[expected.dtype] * max(1.0, expected.abs().max().item()) if expected.numel() else 0
    assert actual.shape == expected.shape, what
    error = (actual - expected).abs().nan_to_num(math.inf)
    assert (error <= limit).all(), f"{what}: off by {error.max():.2e}"


def check(case, dtype, rank, world, exchanged):
    tensors, mask, options = draw(case, dtype)
    weights = torch.randn(B, T, H, Dv, dtype=dtype)
    own = slice(*cuts(world)[rank : rank + 2])
    whole = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    expected = linear_attention(**whole, key_padding_mask=mask, **options)
    expected_gradients = gradients(expected, weights, whole)

    part = {name: (x if x.dim() == 1 else x[:, own]).clone().requires_grad_() for name, x in tensors.items()}
    exchanged.clear()
    out = linear_attention_context_parallel(**part, key_padding_mask=None if mask is None else mask[:, own], **options)
    forward = exchanged.copy()
    found = gradients(out, weights[:, own], part)
    # One exchange forward and one backward, of what does not depend on the number of tokens.
    F = Dk + 1 if options.get("feature_map") == "cosine+1" else Dk
    numbers = Hkv * B * F * (Dv + 1)
    extra = numbers // (Dv + 1) if options.get("feature_map") in ("exp", "softmax") else 0
    extra += B * Hkv if "log_decay" in tensors else 0
    assert forward == [numbers + extra], case
    assert exchanged[1:] == [numbers], case

    what = f"{case}, {dtype}, rank {rank} of {world}"
    assert_near(out, expected[:, own], what)
    for name, gradient in found.items():
        theirs = expected_gradients[name]
        if theirs.dim() == 1:  # of a parameter: every rank has the part of its own tokens
            dist.all_reduce(gradient)
        else:
            theirs = theirs[:, own]
        assert_near(gradient, theirs, f"gradient by {name}, {what}")


def nothing(rank, world):
    """No sequences at all."""
    q = torch.randn(0, 3, H, Dk, requires_grad=True)
    for options in ({}, {"causal": True}, {"feature_map": "exp"}):
        out = linear_attention_context_parallel(q, q, q, **options)
        assert torch.autograd.grad(out.sum(), q)[0].shape == out.shape == (0, 3, H, Dk)


def refuses(rank, world):
    q = torch.randn(B, 3, H, Dk, dtype=torch.float64, requires_grad=True)
    out = linear_attention_context_parallel(q, q, q, causal=True)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def two_groups(rank, world):
    """Ranks 0, 2 and ranks 1, 3 are groups of their own."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    torch.manual_seed(rank % 2)
    q, k, v = torch.randn(3, B, 8, H, Dk, dtype=torch.float64)
    own = slice(0, 4) if rank < 2 else slice(4, 8)
    out = linear_attention_context_parallel(q[:, own], k[:, own], v[:, own], causal=True, group=groups[rank % 2])
    assert_near(out, linear_attention(q, k, v, causal=True)[:, own], f"group of rank {rank}")


def work(rank, world, file):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=120)  # a lost process fails the test and does not hang it
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world, timeout=timeout)
    exchanged, gather = [], dist.all_gather

    def counted(gathered, given, group=None):
        exchanged.append(given.numel())
        return gather(gathered, given, group=group)

    dist.all_gather = counted
    for case in CASES:
        for dtype in LIMIT:
            torch.manual_seed(5)
            check(case, dtype, rank, world, exchanged)
    nothing(rank, world)
    refuses(rank, world)
    if world == 4:
        two_groups(rank, world)
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes(world, tmp_path):
    mp.spawn(work, (world, tmp_path / "rendezvous"), nprocs=world)


def test_errors():
    x = torch.randn(1, 3, 2, 4)
    with pytest.raises(
        ValueError, match=r"^group must be a process group: call torch\.distributed\.init_process_group"
    ):
        linear_attention_context_parallel(x, x, x)
