"""Adafactor beside transformers' and torch's: the same numbers, and checkpoints that go both ways."""

import copy
import io
import pickle

import pytest
import torch
from tools import assert_same, assert_within_budget
from torch import nn

import fastnlp_ops

SHAPES = [(33, 17), (17,), (4, 6, 5), (1, 9), ()]
THEIRS = {
    "default": {},
    "warmup": {"warmup_init": True},
    "trainer": {"lr": 1e-2, "scale_parameter": False, "relative_step": False},
    "scaled": {"lr": 1e-2, "scale_parameter": True, "relative_step": False, "weight_decay": 0.1},
    "momentum": {"beta1": 0.9, "weight_decay": 0.01, "decay_rate": -0.5, "clip_threshold": 0.7, "eps": (1e-8, 1e-2)},
}
TORCHS = {
    "default": {},
    "decay": {"weight_decay": 0.1, "lr": 0.02},
    "maximize": {"maximize": True, "beta2_decay": -1.0, "d": 1.5},
    "eps": {"eps": (1e-4, 1e-2)},
}


@pytest.fixture(scope="module")
def optimization():
    return pytest.importorskip("transformers.optimization", reason="transformers is not installed")


def parameters(device="cpu", dtype=torch.float32):
    return [nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in SHAPES]


def clones(params, dtype=None):
    return [nn.Parameter(p.detach().clone().to(dtype or p.dtype)) for p in params]


def set_gradients(seed, *lists, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for shape, *params in zip(SHAPES, *lists, strict=True):
        grad = scale * torch.randn(shape, generator=generator)
        for p in params:
            p.grad = grad.to(p.device, p.dtype)


def train(optimizers, lists, steps, begin=0, scale=1.0):
    for seed in range(begin, begin + steps):
        set_gradients(seed, *lists, scale=scale)
        for optimizer in optimizers:
            optimizer.step()


def assert_states_same(ours, theirs):
    """Checkpoints equal to the bit, with the same names, types and shapes."""
    assert ours["state"].keys() == theirs["state"].keys()
    for key, values in theirs["state"].items():
        assert ours["state"][key].keys() == values.keys()
        for name, value in values.items():
            mine = ours["state"][key][name]
            if isinstance(value, torch.Tensor):
                assert_same(mine, value, f"{name} of {key}")
            else:
                assert mine == value
                assert type(mine) is type(value)


@pytest.mark.parametrize("options", THEIRS)
def test_transformers_parity(options, optimization, device):
    """20 steps are as near to float64 as transformers' own float32 is, for gradients of any size."""
    for scale in (1e-8, 1e-3, 1.0, 1e3):
        params = parameters(device)
        lists = params, clones(params), clones(params, torch.float64)
        kinds = fastnlp_ops.Adafactor, optimization.Adafactor, optimization.Adafactor
        optimizers = [kind(some, **THEIRS[options]) for kind, some in zip(kinds, lists, strict=True)]
        train(optimizers, lists, 20, scale=scale)
        for p, q, r in zip(*lists, strict=True):
            assert_within_budget(p, q.detach(), r.detach())
            assert ((p - r).norm() / r.norm()).item() < 2e-6
        for p, q in zip(params, lists[1], strict=True):
            ours, theirs = optimizers[0].state[p], optimizers[1].state[q]
            group = optimizers[0].param_groups[0]
            assert ours.keys() == theirs.keys()
            if group["scale_parameter"]:
                assert ours["RMS"].item() == pytest.approx(theirs["RMS"].item(), rel=1e-6)
            assert optimizers[0]._get_lr(group, ours) == pytest.approx(
                float(optimizers[1]._get_lr(group, theirs)), rel=1e-6
            )


@pytest.mark.parametrize("options", TORCHS)
def test_torch_parity(options, device):
    for scale in (1e-8, 1e-4, 1.0, 1e3):
        params = parameters(device)
        lists = params, clones(params), clones(params, torch.float64)
        given = {"eps": (torch.finfo(torch.float32).eps, 1e-3)} | TORCHS[options]
        kinds = fastnlp_ops.TorchAdafactor, torch.optim.Adafactor, torch.optim.Adafactor
        optimizers = [kind(some, **given) for kind, some in zip(kinds, lists, strict=True)]
        train(optimizers, lists, 20, scale=scale)
        for p, q, r in zip(*lists, strict=True):
            assert_within_budget(p, q.detach(), r.detach())
            assert ((p - r).norm() / r.norm()).item() < 2e-6


@pytest.mark.parametrize("options", THEIRS)
def test_transformers_checkpoints(options, optimization, device):
    """Theirs into ours and back without a changed bit; training goes on within 1e-6, either way."""
    params = parameters(device)
    lists = params, clones(params)
    theirs = optimization.Adafactor(lists[1], **THEIRS[options])
    train([theirs], lists, 5)
    checkpoint = copy.deepcopy(theirs.state_dict())
    with torch.no_grad():
        for p, q in zip(*lists, strict=True):
            p.copy_(q)
    ours = fastnlp_ops.Adafactor(params, **THEIRS[options])
    ours.load_state_dict(checkpoint)
    assert_states_same(ours.state_dict(), checkpoint)
    train([ours, theirs], lists, 10, begin=5)
    for p, q in zip(*lists, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)

    third = clones(params)
    back = optimization.Adafactor(third, **THEIRS[options])
    back.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert_states_same(back.state_dict(), ours.state_dict())
    train([ours, back], (params, third), 10, begin=15)
    for p, q in zip(params, third, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", TORCHS)
def test_torch_checkpoints(options, device):
    params = parameters(device)
    lists = params, clones(params)
    theirs = torch.optim.Adafactor(lists[1], **TORCHS[options])
    train([theirs], lists, 5)
    checkpoint = copy.deepcopy(theirs.state_dict())
    with torch.no_grad():
        for p, q in zip(*lists, strict=True):
            p.copy_(q)
    ours = fastnlp_ops.TorchAdafactor(params, **TORCHS[options])
    ours.load_state_dict(checkpoint)
    assert_states_same(ours.state_dict(), checkpoint)
    assert ours.state_dict()["param_groups"] == checkpoint["param_groups"]
    train([ours, theirs], lists, 10, begin=5)
    for p, q in zip(*lists, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)

    third = clones(params)
    back = torch.optim.Adafactor(third, **TORCHS[options])
    back.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert_states_same(back.state_dict(), ours.state_dict())
    train([ours, back], (params, third), 10, begin=15)
    for p, q in zip(params, third, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [fastnlp_ops.Adafactor, fastnlp_ops.TorchAdafactor])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_resume(kind, dtype, device):
    """A run that was saved, pickled or copied goes on to the bit; state stays in full precision in half models."""
    params = parameters(device, dtype)
    optimizer = kind(params)
    train([optimizer], [params], 3)
    full = torch.float64 if dtype == torch.float64 else torch.float32
    copies = []
    for way in ("state_dict", "torch.save", "pickle", "deepcopy"):
        if way in ("pickle", "deepcopy"):
            other = pickle.loads(pickle.dumps(optimizer)) if way == "pickle" else copy.deepcopy(optimizer)
            some = other.param_groups[0]["params"]
        else:
            some = clones(params)
            other = kind(some)
            saved = optimizer.state_dict()
            if way == "torch.save":
                file = io.BytesIO()
                torch.save(saved, file)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
            other.load_state_dict(saved)
        for values in other.state.values():
            assert {x.dtype for name, x in values.items() if name not in ("step", "RMS")} == {full}
            assert values["step"].item() == 3
        copies.append((other, some))
    train([optimizer] + [other for other, _ in copies], [params] + [some for _, some in copies], 3, begin=3)
    for _, some in copies:
        for p, q in zip(params, some, strict=True):
            assert_same(q.detach(), p.detach())
    assert all(values["step"].item() == 6 for values in optimizer.state.values())


def test_loading_leaves_the_checkpoint_alone():
    """Steps after a load do not write into what was loaded."""
    params = parameters()
    optimizer = fastnlp_ops.Adafactor(params, beta1=0.9, ema_decay=0.9)
    train([optimizer], [params], 1)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(checkpoint)
    others = clones(params)
    other = fastnlp_ops.Adafactor(others, beta1=0.9, ema_decay=0.9)
    other.load_state_dict(checkpoint)
    train([other], [others], 2, begin=1)
    assert_states_same(checkpoint, kept)


def test_old_checkpoints(optimization):
    """Step counts as floats or tensors, RMS as the integer 0, groups without our options."""
    params = parameters()
    optimizer = fastnlp_ops.Adafactor(params, rounding="stochastic")
    train([optimizer], [params], 2)
    expected = clones(params)
    reference = fastnlp_ops.Adafactor(expected, rounding="stochastic")
    reference.load_state_dict(optimizer.state_dict())
    for change in (float, lambda step: torch.tensor(float(step)), lambda step: torch.tensor([step]), int):
        old = copy.deepcopy(optimizer.state_dict())
        for values in old["state"].values():
            values["step"], values["RMS"] = change(values["step"]), 0
        keep = ("params", "lr", "eps", "clip_threshold", "decay_rate", "beta1", "weight_decay", "scale_parameter")
        keep += ("relative_step", "warmup_init")
        old["param_groups"] = [{name: group[name] for name in keep} for group in old["param_groups"]]
        some = clones(params)
        other = fastnlp_ops.Adafactor(some, rounding="stochastic")
        other.load_state_dict(old)
        assert other.param_groups[0]["rounding"] == "stochastic"
        twins = clones(params)
        twin = fastnlp_ops.Adafactor(twins, rounding="stochastic")
        twin.load_state_dict(optimizer.state_dict())
        train([other, twin], [some, twins], 2, begin=2)
        for p, q in zip(some, twins, strict=True):
            assert_same(p.detach(), q.detach())

    torchs = parameters()
    theirs = torch.optim.Adafactor(torchs)
    train([theirs], [torchs], 2)
    old = copy.deepcopy(theirs.state_dict())
    for values in old["state"].values():
        values["step"] = float(values["step"])
    ours = fastnlp_ops.TorchAdafactor(torchs)
    ours.load_state_dict(old)
    train([ours], [torchs], 1)
    assert all(values["step"].item() == 3 for values in ours.state.values())


def test_wrong_checkpoint(optimization):
    """The state of another optimizer is refused in a sentence."""
    params = parameters()
    for theirs, ours in (
        (torch.optim.Adafactor, fastnlp_ops.Adafactor),
        (torch.optim.AdamW, fastnlp_ops.Adafactor),
        (optimization.Adafactor, fastnlp_ops.TorchAdafactor),
    ):
        other = theirs(params)
        train([other], [params], 1)
        with pytest.raises(ValueError, match=r"the state of a parameter must hold .*, got .*step"):
            ours(params).load_state_dict(other.state_dict())


def test_other_hooks_see_the_state(device):
    """Hooks of load_state_dict keep their places: before it they see a checkpoint, after it the optimizer."""
    params = parameters(device, torch.bfloat16)
    optimizer = fastnlp_ops.Adafactor(params)
    train([optimizer], [params], 1)
    seen = []
    other = fastnlp_ops.Adafactor(clones(params))
    other.register_load_state_dict_pre_hook(lambda _, loaded: seen.append(loaded["state"][0]["exp_avg_sq_row"].dtype))
    other.register_load_state_dict_post_hook(
        lambda loaded: seen.extend(values["step"].item() for values in loaded.state.values())
    )
    other.load_state_dict(optimizer.state_dict())
    assert seen == [torch.float32] + [1.0] * len(SHAPES)


@pytest.mark.parametrize("options", [{}, {"warmup_init": True}, {"relative_step": False, "scale_parameter": False}])
def test_schedule(options, optimization):
    """AdafactorSchedule tells what it tells of transformers' optimizer."""
    options = options if options.get("relative_step", True) else options | {"lr": 1e-3}
    params = parameters()
    optimizer = fastnlp_ops.Adafactor(params, **options)
    schedule = optimization.AdafactorSchedule(optimizer, initial_lr=0.5)
    theirs = clones(params)
    other = optimization.Adafactor(theirs, **options)
    other_schedule = optimization.AdafactorSchedule(other, initial_lr=0.5)
    for k in range(4):
        set_gradients(k, params, theirs)
        for x in (optimizer, schedule, other, other_schedule):
            x.step()
        assert float(schedule.get_last_lr()[0]) == pytest.approx(float(other_schedule.get_last_lr()[0]), rel=1e-6)
        assert optimizer.param_groups[0]["lr"] > 0
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_schedule_at_any_time(optimization):
    """Gradients before the first step, then none for the first parameter, then none at all."""
    params = parameters()
    set_gradients(0, params)
    optimizer = fastnlp_ops.Adafactor([{"params": params[:2]}, {"params": params[2:]}])
    assert optimization.AdafactorSchedule(optimizer).get_last_lr() == [1e-2, 1e-2]
    optimizer = fastnlp_ops.Adafactor(params)
    schedule = optimization.AdafactorSchedule(optimizer, initial_lr=0.5)
    params[0].grad = None
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == [0.5]
    assert "step" not in optimizer.state[params[0]]
    set_gradients(1, params)
    schedule.step()
    assert schedule.get_last_lr() == [1e-2]
    optimizer.zero_grad()
    schedule.step()
    assert schedule.get_last_lr() == [0.5]
    assert optimizer.state[params[1]]["step"].item() == 1


class Words(torch.utils.data.Dataset):
    """A line to fit, in the form that a Trainer wants."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        x = torch.tensor([index / 32, 1.0])
        return {"x": x, "labels": 2 * x[:1] + 0.5}


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x, labels=None):
        prediction = self.layer(x)
        return {"loss": (prediction - labels).square().mean(), "logits": prediction}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer(accumulation, optimization, tmp_path):
    """Hugging Face's Trainer trains with Adafactor, saves it and resumes; its own Adafactor reads the checkpoint."""
    pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed")
    from transformers import Trainer, TrainingArguments, set_seed

    def trainer(kind, folder, epochs):
        set_seed(3)
        model = Line()
        optimizer = kind(model.parameters(), scale_parameter=True, relative_step=True, warmup_init=False, lr=None)
        arguments = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=epochs,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=accumulation,
            save_strategy="epoch",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        return Trainer(
            model, arguments, train_dataset=Words(), optimizers=(optimizer, optimization.AdafactorSchedule(optimizer))
        )

    ours = trainer(fastnlp_ops.Adafactor, tmp_path / "ours", 4)
    theirs = trainer(optimization.Adafactor, tmp_path / "theirs", 4)
    results = [run.train() for run in (ours, theirs)]
    assert results[0].training_loss == pytest.approx(results[1].training_loss, rel=1e-5)
    rates = [
        [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
        for run in (ours, theirs)
    ]
    assert rates[0] == pytest.approx(rates[1], rel=1e-4)
    checkpoints = sorted((tmp_path / "ours").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for kind in (fastnlp_ops.Adafactor, optimization.Adafactor):
        again = trainer(kind, tmp_path / "again", 4)
        again.train(resume_from_checkpoint=str(checkpoints[1]))
        for p, q in zip(again.model.parameters(), ours.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
