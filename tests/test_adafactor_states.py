"""What others write into groups, states and parameters between steps is taken as transformers' class takes it."""

import copy
import itertools

import pytest
import torch
from test_adafactor_refused import KINDS, assert_equal, parameters, set_gradients, snapshot
from tools import assert_same
from torch import nn

import fastnlp_ops

CHOICES = {"lr": (None, 1e-2), "relative_step": (True, False), "warmup_init": (True, False)}


def mixes():
    """Every subset of the options with every value, for the constructor and for the group."""
    some = [
        dict(zip(names, values, strict=True))
        for count in range(len(CHOICES) + 1)
        for names in itertools.combinations(CHOICES, count)
        for values in itertools.product(*(CHOICES[name] for name in names))
    ]
    return itertools.product(some, some)


def test_mixes_of_constructor_and_group():
    """What transformers' class makes of each, for three steps; what it refuses, at once or in a step, is refused."""
    theirs = pytest.importorskip("transformers.optimization", reason="transformers is not installed").Adafactor
    ran = 0
    for constructor, group in mixes():
        results = []
        for kind in (fastnlp_ops.Adafactor, theirs):
            params = [nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3)), nn.Parameter(torch.ones(2))]
            try:
                optimizer = kind([{"params": params[:1], **group}, {"params": params[1:]}], **constructor)
                for seed in range(3):
                    set_gradients(params, seed)
                    optimizer.step()
                results.append(params)
            except (ValueError, TypeError):
                results.append(None)
        assert (results[0] is None) == (results[1] is None), (constructor, group)
        if results[0] is not None:
            ran += 1
            for p, q in zip(*results, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=f"{constructor} {group}")
    assert ran > 200


WRITTEN = {
    "int": lambda x, number: int(x) if number else x,
    "float": lambda x, number: float(x) if number else x,
    "float64": lambda x, _: x.double(),
    "int64 numbers": lambda x, number: x.round().long() if number else x,
    "float16 numbers": lambda x, number: x.half() if number else x,
    "one-element tensors": lambda x, number: x.reshape(1) if number else x,
    "clones": lambda x, _: x.clone(),
    "strided": lambda x, _: torch.stack([x, x], -1)[..., 0],
    "parameters": lambda x, _: nn.Parameter(x.clone()),
}


@pytest.mark.parametrize("how", ["written", "loaded"])
@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize("name", KINDS)
def test_states_that_others_write(name, form, how):
    """Numbers and tensors as transformers, torch.optim and wrappers of optimizers write them."""
    lists = parameters(), parameters()
    for p, q in zip(*lists, strict=True):
        q.data.copy_(p.data)
    options = {"beta1": 0.9, "scale_parameter": False} if name == "Adafactor" else {}
    optimizer, twin = (KINDS[name](params, **options) for params in lists)
    for seed in range(6):
        if seed == 3:
            if how == "written":
                for state in optimizer.state.values():
                    for key in state:
                        state[key] = WRITTEN[form](state[key], key in ("step", "RMS"))
            else:
                saved = copy.deepcopy(optimizer.state_dict())
                for state in saved["state"].values():
                    for key in state:
                        state[key] = WRITTEN[form](
                            torch.as_tensor(float(state[key])) if key in ("step", "RMS") else state[key],
                            key in ("step", "RMS"),
                        )
                optimizer.load_state_dict(saved)
        for params, o in zip(lists, (optimizer, twin), strict=True):
            set_gradients(params, seed)
            o.step()
    assert_equal(snapshot(optimizer), snapshot(twin))
    assert_equal(optimizer.state_dict(), twin.state_dict())


@pytest.mark.parametrize("name", KINDS)
def test_begin_anew(name):
    """state[p]["step"] = 0, as after a pruning; and the whole state away."""
    for reset in (lambda o, p: o.state[p].update(step=0), lambda o, p: o.state.pop(p)):
        params = parameters()
        optimizer = KINDS[name](params)
        set_gradients(params)
        optimizer.step()
        for p in params:
            reset(optimizer, p)
        for seed in range(2):
            set_gradients(params, seed)
            optimizer.step()
        assert all(optimizer.state[p]["step"].item() == 2 for p in params)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("dtypes", [("double",), ("half",), ("bfloat16",), ("bfloat16", "float", "double", "half")])
def test_a_model_in_another_precision(dtypes, accumulation):
    """model.double(), half() and bfloat16() between steps, as with transformers' class."""
    theirs = pytest.importorskip("transformers.optimization", reason="transformers is not installed").Adafactor
    model = nn.Linear(4, 3)
    twin = copy.deepcopy(model)
    options = {"beta1": 0.9, "lr": 0.01, "relative_step": False}
    optimizer = fastnlp_ops.Adafactor(model.parameters(), accumulation_steps=accumulation, **options)
    other = theirs(twin.parameters(), **options)
    seed = 0
    for dtype in ("float", *dtypes):
        for m in (model, twin):
            getattr(m, dtype)()
        for _ in range(3):
            for _ in range(accumulation):
                set_gradients(list(model.parameters()), seed)
                optimizer.step()
            set_gradients(list(twin.parameters()), seed)
            other.step()
            seed += 1
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert p.dtype == q.dtype
            unit = torch.finfo(p.dtype).eps
            torch.testing.assert_close(p, q, rtol=max(2 * unit, 1e-5), atol=max(unit, 1e-6))
    full = torch.float64 if dtypes[-1] == "double" else torch.float32
    assert all(state["exp_avg"].dtype == full for state in optimizer.state.values())


def test_options_of_a_running_optimizer():
    """beta1 and ema_decay set between steps begin with zeros and with the parameter; options are read at each step."""
    p, q = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    options = {"lr": 0.01, "relative_step": False, "scale_parameter": False}
    optimizer, twin = fastnlp_ops.Adafactor([p], **options), fastnlp_ops.Adafactor([q], beta1=0.9, **options)
    for seed in range(4):
        if seed == 1:
            optimizer.param_groups[0]["beta1"] = 0.9
            optimizer.param_groups[0]["ema_decay"] = 0.5
            start = p.detach().clone()
            q.data.copy_(p.data)
            twin.state[q]["exp_avg"].zero_()
        set_gradients([p], seed)
        set_gradients([q], seed)
        optimizer.step()
        twin.step()
        if seed == 1:
            assert_same(optimizer.state[p]["average"], 0.5 * start + 0.5 * p.detach())
    assert_same(p.detach(), q.detach())
    optimizer.param_groups[0]["beta1"] = None
    optimizer.step()
    assert optimizer.state[p]["step"].item() == 5


def test_averages_of_a_model_in_another_precision():
    p = nn.Parameter(torch.ones(4))
    optimizer = fastnlp_ops.Adafactor([p], ema_decay=0.5, accumulation_steps=2)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        p.data = p.data.to(dtype)
        for k in range(2):
            before = copy.deepcopy(optimizer.state.get(p, {}).get("average"))
            p.grad = torch.ones_like(p)
            optimizer.step()
            if k == 0 and before is not None:  # an average follows updates
                assert_same(optimizer.state[p]["average"], before)
    assert optimizer.state[p]["average"].dtype == torch.float64
