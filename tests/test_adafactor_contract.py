"""torch's contract for optimizers, with the inputs and the wrong inputs that its test suite keeps for Adafactor.

test/test_optim.py itself is not in the wheel: its tests are rewritten here.
"""

import copy

import pytest
import torch
from tools import assert_same
from torch import nn

import fastnlp_ops

each_kind = pytest.mark.parametrize("kind", [fastnlp_ops.Adafactor, fastnlp_ops.TorchAdafactor])


def parameter(*shape):
    p = nn.Parameter(torch.randn(shape))
    p.grad = torch.randn(shape)
    return p


def clone(p):
    return nn.Parameter(p.detach().clone())


def torch_inputs():
    common = pytest.importorskip("torch.testing._internal.common_optimizers", reason="needs expecttest")
    return [x.kwargs for x in common.optim_inputs_func_adafactor("cpu")]


def torch_error_inputs():
    common = pytest.importorskip("torch.testing._internal.common_optimizers", reason="needs expecttest")
    return common.optim_error_inputs_func_adafactor("cpu", torch.float32)


def test_errors():
    for case in torch_error_inputs():
        given = case.optimizer_error_input
        if case.error_type is UserWarning:
            with pytest.warns(case.error_type, match=case.error_regex):
                fastnlp_ops.TorchAdafactor(given.params, **given.kwargs)
        elif "CONSTRUCTION" in str(case.error_on):
            params = [parameter(2, 3)] if given.params is None else given.params
            if "without names" in case.error_regex and "cannot add" in case.error_regex:
                params = given.params
            with pytest.raises(case.error_type, match=case.error_regex):
                fastnlp_ops.TorchAdafactor(params, **given.kwargs)
        else:
            optimizer = fastnlp_ops.TorchAdafactor(given.params, **given.kwargs)
            with pytest.raises(case.error_type, match=case.error_regex):
                optimizer.step()


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("with_lrsched", [True, False])
def test_finds_the_way_down(contiguous, with_lrsched):
    """A line is fitted better after some steps, whatever the options and the layout, under schedulers too."""
    for options in torch_inputs():
        if contiguous:
            weight, bias = nn.Parameter(torch.randn(10, 5)), nn.Parameter(torch.randn(10))
        else:
            weight, bias = nn.Parameter(torch.randn(10, 5, 2)[..., 0]), nn.Parameter(torch.randn(10, 2)[..., 0])
        x = torch.randn(5)
        optimizer = fastnlp_ops.TorchAdafactor([weight, bias], **options)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer) if with_lrsched else None

        def closure(weight=weight, bias=bias, optimizer=optimizer, x=x):
            optimizer.zero_grad()
            loss = (weight.mv(x) + bias).pow(2).sum()
            loss.backward()
            return loss

        first = closure().item()
        for _ in range(20):
            loss = optimizer.step(closure)
            if schedule:
                schedule.step(loss.detach())
        last = closure().item()
        assert last > first if options.get("maximize") else last < first


def test_state_dict():
    """Deterministic after loading, with keys missing or the step a float, for every set of options."""
    for options in torch_inputs():
        weight, bias, x = (
            nn.Parameter(torch.randn(2, 3)),
            nn.Parameter(torch.randn(2)),
            torch.randn(3, requires_grad=True),
        )

        def train(w, b, optimizer, steps, x=x):
            for _ in range(steps):
                optimizer.zero_grad()
                (w.mv(x) + b).pow(2).sum().backward()
                optimizer.step()

        optimizer = fastnlp_ops.TorchAdafactor([weight, bias], **options)
        train(weight, bias, optimizer, 3)
        w, b = clone(weight), clone(bias)
        other = fastnlp_ops.TorchAdafactor([w, b], **options)
        saved = copy.deepcopy(optimizer.state_dict())
        for group in saved["param_groups"]:
            group.pop("foreach")
            group.pop("maximize")
        for state in saved["state"].values():
            state["step"] = state["step"].item()
        other.load_state_dict(saved)
        train(weight, bias, optimizer, 3)
        train(w, b, other, 3)
        assert_same(w.detach(), weight.detach())
        assert_same(b.detach(), bias.detach())


@each_kind
def test_hooks(kind):
    """Hooks run around the step, in order, and see it happen."""
    p = parameter(2, 3)
    optimizer, seen = kind([p]), []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(("before", len(o.state))))
    optimizer.register_step_post_hook(lambda o, *_: seen.append(("after", len(o.state))))
    optimizer.step()
    assert seen == [("before", 0), ("after", 1)]
    optimizer.register_state_dict_post_hook(lambda _, saved: seen.append(sorted(saved)))
    optimizer.state_dict()
    assert seen[-1] == ["param_groups", "state"]


@each_kind
def test_no_gradient(kind):
    """Nothing happens without gradients, and nothing breaks."""
    p = nn.Parameter(torch.randn(2, 3))
    before = p.detach().clone()
    optimizer = kind([p])
    for _ in range(3):
        optimizer.step()
    assert_same(p.detach(), before)


@each_kind
def test_names(kind):
    """Parameters with names, as named_parameters() gives them, keep them in the checkpoint."""
    model = nn.Linear(3, 2)
    optimizer = kind(model.named_parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


@each_kind
def test_copies_keep_options(kind):
    """deepcopy keeps every public attribute."""
    options = {"max_grad_norm": 2.0, "accumulation_steps": 3, "skip_nonfinite": True}
    optimizer = kind([parameter(2, 3)], **(options if kind is fastnlp_ops.Adafactor else {}))
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    other = copy.deepcopy(optimizer)
    assert public <= vars(other).keys()
    for name in public - {"param_groups", "state", "defaults"}:
        assert getattr(other, name) == getattr(optimizer, name)


def test_fits_a_target():
    """transformers' own test of the optimizer: a vector is fitted to a target."""
    p = nn.Parameter(torch.tensor([0.1, -0.2, -0.1]))
    target = torch.tensor([0.4, 0.2, -0.5])
    optimizer = fastnlp_ops.Adafactor(
        [p],
        lr=1e-2,
        eps=(1e-30, 1e-3),
        clip_threshold=1.0,
        decay_rate=-0.8,
        beta1=None,
        weight_decay=0.0,
        relative_step=False,
        scale_parameter=False,
        warmup_init=False,
    )
    for _ in range(1000):
        loss = (p - target).square().mean()
        loss.backward()
        optimizer.step()
        p.grad.zero_()
    torch.testing.assert_close(p.detach(), target, atol=1e-2, rtol=0)
