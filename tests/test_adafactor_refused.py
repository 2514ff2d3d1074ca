"""Refused calls leave optimizer and parameters as they were, and the next step works."""

import copy
import math

import pytest
import torch
from tools import assert_same
from torch import nn

import fastnlp_ops

KINDS = {"Adafactor": fastnlp_ops.Adafactor, "TorchAdafactor": fastnlp_ops.TorchAdafactor}


def parameters():
    return [nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5,), ())] + [
        nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    ]


def set_gradients(params, seed=0):
    for k, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * seed + k)
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def snapshot(optimizer):
    """All that a later step depends on."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy(
        {
            "params": [p.detach() for p in params],
            "grads": [None if p.grad is None else p.grad.to_dense() for p in params],
            "state": [dict(optimizer.state.get(p, {})) for p in params],
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
            "waiting": [optimizer._progress.accumulated, [optimizer._progress.grad_sums.get(p) for p in params]],
        }
    )


def assert_equal(ours, theirs, what=""):
    assert type(ours) is type(theirs), what
    if isinstance(ours, torch.Tensor):
        assert_same(ours, theirs, what)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), what
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{what}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), what
        for k, (x, y) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(x, y, f"{what}[{k}]")
    else:
        assert ours == theirs, what


def edited(change):
    """load_state_dict with an edited copy of the optimizer's own checkpoint."""

    def load(optimizer):
        saved = copy.deepcopy(optimizer.state_dict())
        change(saved)
        optimizer.load_state_dict(saved)

    return load


def of(kind, *shapes):
    """load_state_dict with the checkpoint of another optimizer."""

    def load(optimizer):
        params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        set_gradients(params)
        other = kind(params)
        other.step()
        optimizer.load_state_dict(other.state_dict())

    return load


def with_gradient(index, grad):
    """A step in which one gradient is wrong."""

    def step(optimizer):
        p = [p for group in optimizer.param_groups for p in group["params"]][index]
        kept = p.grad
        try:
            if grad.shape != p.shape or grad.dtype != p.dtype:
                p.grad = torch.zeros_like(p)
                p.grad.data = grad
            else:
                p.grad = grad
            optimizer.step()
        finally:
            p.grad = kept

    return step


def with_option(name, value):
    """A step in which an option of a group is wrong."""

    def step(optimizer):
        group = optimizer.param_groups[0]
        kept = group[name]
        group[name] = value
        try:
            optimizer.step()
        finally:
            group[name] = kept

    return step


def with_state(name, value):
    """A step in which somebody has written nonsense into the state."""

    def step(optimizer):
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        kept = dict(state)
        state[name] = value
        try:
            optimizer.step()
        finally:
            state.clear()
            state.update(kept)

    return step


def first(saved):
    return saved["state"][0]


FACTORS = {"Adafactor": ("exp_avg_sq_row", "exp_avg_sq"), "TorchAdafactor": ("row_var", "variance")}


def refused(name):
    row, vector = FACTORS[name]
    lr = {"lr": "much"} if name == "Adafactor" else {"lr": -1.0}
    group = {"params": [nn.Parameter(torch.ones(2))]}
    yield "other shapes", of(KINDS[name], (3, 4), (5,), (), (3, 2)), ValueError
    yield "another length", of(KINDS[name], (4, 3)), ValueError
    yield "AdamW's", of(torch.optim.AdamW, (4, 3), (5,), (), (3, 2)), ValueError
    yield "SGD's", of(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), (4, 3), (5,), ()), ValueError
    yield "the last is wrong", edited(lambda s: s["state"][3].update({row: torch.zeros(7)})), ValueError
    yield "a vector is wrong", edited(lambda s: s["state"][1].update({vector: torch.zeros(2)})), ValueError
    yield "sparse", edited(lambda s: s["state"][1].update({vector: torch.zeros(5).to_sparse()})), ValueError
    yield "complex", edited(lambda s: s["state"][1].update({vector: torch.zeros(5) * 1j})), ValueError
    yield "None", edited(lambda s: first(s).update({row: None})), (ValueError, TypeError)
    yield "a list", edited(lambda s: first(s).update({row: [0.0] * 4})), ValueError
    yield "a factor is missing", edited(lambda s: first(s).pop(row)), ValueError
    yield "two steps", edited(lambda s: first(s).update({"step": torch.zeros(2)})), ValueError
    yield "step None", edited(lambda s: first(s).update({"step": None})), ValueError
    yield "step NaN", edited(lambda s: first(s).update({"step": math.nan})), ValueError
    yield "step -1", edited(lambda s: first(s).update({"step": -1})), ValueError
    yield "step as words", edited(lambda s: first(s).update({"step": "three"})), ValueError
    yield "no dict", edited(lambda s: s["state"].update({0: torch.zeros(3)})), ValueError
    yield "no state", edited(lambda s: s.pop("state")), KeyError
    yield "no groups", edited(lambda s: s.pop("param_groups")), KeyError
    yield "eps", edited(lambda s: s["param_groups"][0].update({"eps": 1e-8})), ValueError
    yield "weight_decay", edited(lambda s: s["param_groups"][0].update({"weight_decay": -1.0})), ValueError
    yield "a group more", edited(lambda s: s["param_groups"].append(s["param_groups"][0])), ValueError
    yield (
        "sums",
        edited(lambda s: s.update({"accumulation": {"steps": 1, "grad_sums": {0: torch.ones(9)}}})),
        ValueError,
    )
    yield "gradient of another shape", with_gradient(0, torch.ones(3, 4)), ValueError
    yield "float64's of another shape", with_gradient(3, torch.ones(2, 2, dtype=torch.float64)), ValueError
    yield "an integer gradient", with_gradient(3, torch.ones(3, 2, dtype=torch.int64)), TypeError
    yield "a sparse gradient", with_gradient(3, torch.ones(3, 2, dtype=torch.float64).to_sparse()), RuntimeError
    yield "lr in a step", with_option(*next(iter(lr.items()))), (ValueError, TypeError)
    yield "lr of two", with_option("lr", torch.ones(2)), ValueError
    yield "eps in a step", with_option("eps", 1e-8), ValueError
    yield "decay in a step", with_option("weight_decay", -1.0), ValueError
    yield "a state's shape", with_state(row, torch.zeros(9)), ValueError
    yield "a state's step", with_state("step", "three"), ValueError
    yield "add a group: eps", lambda o: o.add_param_group(group | {"eps": 0.1}), ValueError
    yield "add a group: lr", lambda o: o.add_param_group(group | lr), (ValueError, TypeError)
    yield (
        "add a group: twice the same",
        lambda o: o.add_param_group({"params": o.param_groups[0]["params"]}),
        ValueError,
    )
    yield "add a group: no dict", lambda o: o.add_param_group([nn.Parameter(torch.ones(2))]), TypeError
    yield "a closure", lambda o: o.step(lambda: [][0]), IndexError
    if name == "Adafactor":
        yield "add a group: max_grad_norm", lambda o: o.add_param_group(group | {"max_grad_norm": 1.0}), ValueError
        yield "rounding in a step", with_option("rounding", "stochastik"), ValueError
        yield "rounding in a checkpoint", edited(lambda s: s["param_groups"][0].update({"rounding": 1})), ValueError
        yield "RMS", edited(lambda s: first(s).update({"RMS": torch.ones(3)})), ValueError
    else:
        yield "d", with_option("d", 0.0), ValueError
        yield "add a group: d", lambda o: o.add_param_group(group | {"d": 0.5}), ValueError


TABLE = [pytest.param(name, *case[1:], id=f"{name}: {case[0]}") for name in KINDS for case in refused(name)]


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(("name", "call", "error"), TABLE)
def test_refused(name, call, error, steps):
    """Before the first step and later: it raises, and the next steps are those of an optimizer that was not asked."""
    lists = parameters(), parameters()
    for p, q in zip(*lists, strict=True):
        q.data.copy_(p.data)
    optimizer, twin = (KINDS[name](params) for params in lists)
    for seed in range(steps):
        for params, o in zip(lists, (optimizer, twin), strict=True):
            set_gradients(params, seed)
            o.step()
    for params in lists:
        set_gradients(params, 7)
    before = snapshot(optimizer)
    try:
        call(optimizer)
    except error:
        pass
    except KeyError:  # the edit asks for a state that is not there yet
        assert steps == 0
    else:
        pytest.fail("not refused")
    assert_equal(snapshot(optimizer), before)
    for seed in range(7, 10):
        for params, o in zip(lists, (optimizer, twin), strict=True):
            set_gradients(params, seed)
            o.step()
    assert_equal(snapshot(optimizer), snapshot(twin))


def test_refused_while_accumulating():
    """A call that fails neither counts nor takes gradients, be it the first, one in between or the one that updates."""
    for place in range(3):
        lists = parameters(), parameters()
        for p, q in zip(*lists, strict=True):
            q.data.copy_(p.data)
        optimizer, twin = (fastnlp_ops.Adafactor(params, accumulation_steps=3) for params in lists)
        for seed in range(6):
            for params in lists:
                set_gradients(params, seed)
            if seed % 3 == place:
                for call in (
                    with_gradient(3, torch.ones(2, 2, dtype=torch.float64)),
                    with_gradient(1, torch.ones(5).to_sparse()),
                    edited(lambda s: s.update({"accumulation": {"steps": 1, "grad_sums": {9: torch.ones(9)}}})),
                    edited(lambda s: s["param_groups"][0].update({"eps": 1e-8})),
                ):
                    before = snapshot(optimizer)
                    with pytest.raises((ValueError, RuntimeError)):
                        call(optimizer)
                    assert_equal(snapshot(optimizer), before)
            optimizer.step()
            twin.step()
        assert_equal(snapshot(optimizer), snapshot(twin))
        assert optimizer.state[lists[0][0]]["step"].item() == 2


@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}, {"max_grad_norm": 1.0}])
def test_one_step_of_two_dtypes(options):
    """Parameters of float32 and float64 are two calls: both or none."""
    params = parameters()
    optimizer = fastnlp_ops.Adafactor(params, **options)
    for _ in range(2):
        set_gradients(params)
        for index in (0, 3):
            before = snapshot(optimizer)
            with pytest.raises(ValueError, match="grads must have the shape and the device of params"):
                with_gradient(index, torch.ones(7, 7, dtype=params[index].dtype))(optimizer)
            assert_equal(snapshot(optimizer), before)
        optimizer.step()


def test_a_failed_step_keeps_no_scale():
    """GradScaler writes its scale to the optimizer and takes it away after a step that returns."""
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer, twin = fastnlp_ops.Adafactor([p], capturable=True), fastnlp_ops.Adafactor([q])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(p.sum()).backward()
    optimizer.param_groups[0]["eps"] = 1.0
    with pytest.raises(ValueError, match="eps must be two numbers"):
        scaler.step(optimizer)
    optimizer.param_groups[0]["eps"] = (1e-30, 1e-3)
    scaler.step(optimizer)
    scaler.update()
    for k in range(2):
        q.grad = torch.ones(3)
        twin.step()
        if k == 0:
            p.grad = torch.ones(3)
            optimizer.step()
    assert_same(p.detach(), q.detach())


@pytest.mark.parametrize(
    "options",
    [
        {"lr": "much"},
        {"eps": 1e-8},
        {"eps": (1e-30,)},
        {"decay_rate": 0.8},
        {"beta1": 1.0},
        {"weight_decay": None},
        {"clip_threshold": 0.0},
        {"ema_decay": 2.0},
        {"rounding": "up"},
        {"max_grad_norm": 0.0},
        {"accumulation_steps": 0},
        {"accumulation_steps": None},
        {"lr": 1e-3},
        {"lr": 1.0, "relative_step": False, "warmup_init": True},
        {"relative_step": False},
    ],
)
def test_refused_options(options):
    with pytest.raises(ValueError, match=r"must be|Cannot combine|requires"):
        fastnlp_ops.Adafactor([nn.Parameter(torch.ones(2))], **options)
