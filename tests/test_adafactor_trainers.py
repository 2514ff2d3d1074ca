"""The optimizers inside of what trains with them: transformers' Trainer, Lightning, accelerate, wrappers of torch."""

import warnings

import pytest
import torch
from test_adafactor_interchange import Line, Words
from tools import assert_same
from torch import nn

import fastnlp_ops

GIVEN = {"lr": 0.05, "relative_step": False, "scale_parameter": False}


def assert_near(a, b, **tolerance):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerance)


def arguments(folder, **more):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed")
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return transformers.TrainingArguments(**(options | more))


def line():
    torch.manual_seed(5)
    return Line()


def train(folder, optimizer_of=None, resume=None, **more):
    """A trained model, and its optimizer; the batches are the same in each run."""
    from transformers import Trainer

    chosen = more.pop("optimizer_cls_and_kwargs", None)
    model = line()
    pair = (None, None) if optimizer_of is None else optimizer_of(model)
    trainer = Trainer(
        model,
        arguments(folder, **more),
        train_dataset=Words(),
        optimizers=pair,
        optimizer_cls_and_kwargs=chosen,
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer.model, trainer.optimizer


def constant(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_trainer_with_accumulation_of_the_optimizer(clip, tmp_path):
    """Trainer calls model.zero_grad() after each step(): no gradient is lost, k calls are one update by their mean."""

    def ours(model):
        optimizer = fastnlp_ops.Adafactor(model.parameters(), accumulation_steps=4, **GIVEN)
        return optimizer, constant(optimizer)

    model, optimizer = train(tmp_path, ours, max_grad_norm=clip)
    seen = []

    class Recording(torch.optim.SGD):
        def step(self, closure=None):  # noqa: ARG002
            seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
            with torch.no_grad():
                if len(seen) % 4 == 0:
                    for k, p in enumerate(twin.parameters()):
                        p.grad = sum(grads[k] for grads in seen[-4:]) / 4
                    other.step()

    twin = line()
    other = fastnlp_ops.Adafactor(twin.parameters(), **GIVEN)

    def theirs(model):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.data = p.data  # one memory: the twin's updates are the model's
        recording = Recording(model.parameters(), lr=0.0)
        return recording, constant(recording)

    expected, _ = train(tmp_path, theirs, max_grad_norm=clip)
    assert len(seen) == 8
    assert optimizer.optimizer.state[model.layer.weight]["step"].item() == 2
    assert_near(model, expected, rtol=1e-5, atol=1e-6)


def test_trainer_resumes_within_an_accumulation(tmp_path):
    """A checkpoint after nine of twelve calls, of which one waits: gradients and slow weights are in it."""

    def ours(model):
        optimizer = fastnlp_ops.Adafactor(model.parameters(), accumulation_steps=4, beta1=0.9, **GIVEN)
        fastnlp_ops.Lookahead(optimizer, k=2)
        return optimizer, constant(optimizer)

    more = {"save_strategy": "steps", "save_steps": 9, "num_train_epochs": 4}
    model, _ = train(tmp_path / "whole", ours, **more)
    again, _ = train(tmp_path / "again", ours, resume=tmp_path / "whole" / "checkpoint-9", **more)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert_same(q.detach(), p.detach())


def test_trainer_takes_the_class(tmp_path):
    """optimizer_cls_and_kwargs trains as transformers' own adafactor, and goes on from its checkpoint."""
    more = {"save_strategy": "epoch", "learning_rate": 0.01, "weight_decay": 0.1, "num_train_epochs": 3}
    theirs, _ = train(tmp_path / "theirs", optim="adafactor", **more)
    ours = (fastnlp_ops.Adafactor, {"lr": 0.01, "scale_parameter": False, "relative_step": False})
    model, optimizer = train(tmp_path / "ours", optimizer_cls_and_kwargs=ours, **more)
    assert isinstance(optimizer.optimizer, fastnlp_ops.Adafactor)
    assert_near(model, theirs, rtol=1e-5, atol=1e-6)
    resumed, _ = train(
        tmp_path / "resumed", optimizer_cls_and_kwargs=ours, resume=tmp_path / "theirs" / "checkpoint-8", **more
    )
    assert_near(resumed, theirs, rtol=1e-5, atol=1e-6)
    back, _ = train(tmp_path / "back", optim="adafactor", resume=tmp_path / "ours" / "checkpoint-4", **more)
    assert_near(back, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.AdamW, {}), (torch.optim.SGD, {}), (fastnlp_ops.Adafactor, {}), (fastnlp_ops.TorchAdafactor, {})],
)
def test_trainer_with_learning_rate_groups(kind, options, tmp_path):
    """Trainer's schedule multiplies the rates of all groups: the one of multiplier 0 never moves."""
    rates = []

    class Seen(kind):
        def step(self, closure=None):
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    def optimizer_of(model):
        groups = fastnlp_ops.learning_rate_groups(model, {"bias": 0.0, "weight": 10.0}, lr=1e-3)
        return Seen(groups, **options), None

    before = line()
    model, _ = train(tmp_path, optimizer_of, num_train_epochs=1, lr_scheduler_type="linear")
    assert rates == [pytest.approx([1e-2 * (4 - k) / 4, 0.0]) for k in range(4)]
    assert_same(model.layer.bias.detach(), before.layer.bias.detach())
    assert (model.layer.weight != before.layer.weight).all()


@pytest.mark.parametrize("kind", [fastnlp_ops.Adafactor, fastnlp_ops.TorchAdafactor])
def test_accelerate(kind, tmp_path):
    """prepare, accumulate, clipping, and save_state: as without accelerate, and resumed to the bit."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

    def run(batches, folder=None, model=None):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = line()
        optimizer = kind(model.parameters())
        fastnlp_ops.Lookahead(optimizer, k=2)
        model, optimizer = accelerator.prepare(model, optimizer)
        if folder is not None:
            accelerator.load_state(folder)
        for k in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch(k))["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
        if folder is None and len(batches) == 6:
            accelerator.save_state(tmp_path / "state")
        return model

    def batch(k):
        generator = torch.Generator().manual_seed(k)
        x = torch.randn(4, 2, generator=generator)
        return {"x": x, "labels": x[:, :1]}

    twin = line()
    other = kind(twin.parameters())
    fastnlp_ops.Lookahead(other, k=2)
    for k in range(0, 12, 2):
        for j in (k, k + 1):
            (twin(**batch(j))["loss"] / 2).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        other.step()
        other.zero_grad()
    model = run(range(12))
    assert_near(model, twin, rtol=1e-6, atol=1e-7)
    run(range(6))
    again = run(range(6, 12), tmp_path / "state")
    for p, q in zip(again.parameters(), model.parameters(), strict=True):
        assert_same(p.detach(), q.detach())


def fit(optimizer_of, precision, **more):
    """A model that Lightning has trained, with its gradients clipped."""
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    from lightning.pytorch.plugins import MixedPrecision

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.line = line()

        def training_step(self, batch, _):
            return self.line(**batch)["loss"]

        def configure_optimizers(self):
            return optimizer_of(self.parameters())

    chosen = {"precision": precision}
    if precision == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        chosen = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **chosen,
        **more,
    )
    module = Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and logging
        trainer.fit(module, torch.utils.data.DataLoader(Words(), batch_size=8))
    return module


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("kind", ["Adafactor", "TorchAdafactor"])
def test_lightning_clips(kind, precision, accumulation):
    """gradient_clip_val works in every precision, as it does with the classes of transformers and of torch."""
    more = {"gradient_clip_val": 0.01, "accumulate_grad_batches": accumulation}
    if kind == "Adafactor":
        theirs = pytest.importorskip("transformers.optimization", reason="transformers is not installed").Adafactor
        kinds, options = (fastnlp_ops.Adafactor, theirs), {}
    else:
        kinds, options = (fastnlp_ops.TorchAdafactor, torch.optim.Adafactor), {}
    ours, theirs = (fit(lambda params, kind=kind: kind(params, **options), precision, **more) for kind in kinds)
    assert_near(ours, theirs, rtol=1e-4, atol=1e-5)


def test_lightning_refuses_to_clip_for_a_capturable_step():
    """There GradScaler leaves its scale to the step; Lightning says so, as of torch's fused optimizers."""
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(lambda params: fastnlp_ops.Adafactor(params, capturable=True), "16-mixed", gradient_clip_val=0.5)


@pytest.mark.parametrize("options", [{}, {"capturable": True}])
def test_scaler_and_float16_parameters(options):
    """float16 gradients, which GradScaler refuses to unscale, and any others: the step takes the scale off."""
    p, q = nn.Parameter(torch.ones(3, dtype=torch.float16)), nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer, twin = fastnlp_ops.Adafactor([p], beta1=0.9, **options), fastnlp_ops.Adafactor([q], beta1=0.9)
    assert optimizer._step_supports_amp_scaling == bool(options)  # no gradients yet
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for _ in range(3):
        scaler.scale((p * p).sum().float()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        (q * q).sum().float().backward()
        twin.step()
        twin.zero_grad()
    assert_same(p.detach(), q.detach())


@pytest.fixture
def process_group():
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", [fastnlp_ops.Adafactor, fastnlp_ops.TorchAdafactor])
def test_zero_redundancy_optimizer(kind, process_group):
    """It writes states by itself, without load_state_dict of the optimizer."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, twin = line(), line()
    optimizer, other = ZeroRedundancyOptimizer(model.parameters(), kind), kind(twin.parameters())
    for k in range(4):
        if k == 2:
            optimizer.consolidate_state_dict()
            optimizer.load_state_dict(optimizer.state_dict())
        for m, o in ((model, optimizer), (twin, other)):
            for seed, p in enumerate(m.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * k + seed))
            o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same(p.detach(), q.detach())
