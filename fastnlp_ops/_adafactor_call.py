"""Arguments of the Adafactor op: options, learning rates, the lists of one call, and what is kept between calls."""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnlp_ops._ops._autograd import is_dual

CHECK_ONLY = 0  # phases of the op: none, and all
ALL_PHASES = 15
OPTIONS = 15  # numbers of a group

DTYPES = {  # of parameters and gradients, and of the maths
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
}


def check_dtype(x: Tensor, name: str) -> None:
    """TypeError for a tensor that is not of a dtype that the op reads."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {x.dtype}")


def compute_dtype(p: Tensor) -> torch.dtype:
    """The dtype of the maths and of the state."""
    if p.is_complex():
        raise RuntimeError("Adafactor does not support complex parameters")
    check_dtype(p, "params")
    return DTYPES[p.dtype]


def _number(x: Any) -> bool:
    return hasattr(x, "__float__")


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (lambda x: x is None or (_number(x) and (not isinstance(x, Tensor) or x.numel() == 1)), "a number or None"),
    "eps": (
        lambda x: isinstance(x, tuple | list) and len(x) == 2 and all(_number(y) and y >= 0 for y in x),
        "two numbers of at least 0",
    ),
    "clip_threshold": (lambda x: x is None or (_number(x) and x > 0), "above 0 or None"),
    "decay_rate": (lambda x: _number(x) and x <= 0, "at most 0"),
    "beta1": (lambda x: x is None or (_number(x) and 0 <= x < 1), "in [0, 1) or None"),
    "weight_decay": (lambda x: _number(x) and x >= 0, "at least 0"),
    "lr_scale": (lambda x: _number(x) and x >= 0, "at least 0"),
    "ema_decay": (lambda x: x is None or (_number(x) and 0 <= x <= 1), "in [0, 1] or None"),
    "rounding": (lambda x: x in ("nearest", "stochastic"), '"nearest" or "stochastic"'),
    "max_grad_norm": (lambda x: x is None or (_number(x) and x > 0), "above 0 or None"),
    "accumulation_steps": (lambda x: _number(x) and x >= 1, "at least 1"),
}


def check_options(options: dict[str, Any]) -> None:
    """ValueError for an option that is no number or out of its range."""
    for name, (holds, wanted) in _RANGES.items():
        if name in options and not holds(options[name]):
            raise ValueError(f"{name} must be {wanted}, got {options[name]!r}")


def op_options(
    *,
    eps: tuple[float, float],
    clip_threshold: float | None,
    decay_rate: float,
    weight_decay: float,
    beta1: float | None = None,
    scale_parameter: bool = True,
    relative_step: bool = True,
    warmup_init: bool = False,
    variant: str = "transformers",
    lr_scale: float = 1.0,
    ema_decay: float | None = None,
    layer_adaptation: bool = False,
    lazy: bool = False,
    maximize: bool = False,
    rounding: str = "nearest",
) -> list[float]:
    """The numbers by which the op knows a group."""
    return [
        float(variant == "torch"),
        eps[0],
        eps[1],
        math.inf if clip_threshold is None else clip_threshold,
        decay_rate,
        -1.0 if beta1 is None else beta1,
        weight_decay,
        float(scale_parameter),
        float(relative_step + (relative_step and warmup_init)),
        float(maximize),
        float(layer_adaptation),
        float(lazy),
        -1.0 if ema_decay is None else ema_decay,
        float(rounding == "stochastic"),
        lr_scale,
    ]


def op_lr(values: Sequence[float | Tensor | None]) -> Tensor:
    """Learning rates as float64, [groups], on a device only where one of them is there."""
    if not any(isinstance(x, Tensor) for x in values):
        return torch.tensor([0.0 if x is None else x for x in values], dtype=torch.float64)
    device = next((x.device for x in values if isinstance(x, Tensor) and x.device.type != "cpu"), torch.device("cpu"))
    tensors = [x if isinstance(x, Tensor) else torch.full((), x or 0.0) for x in values]
    return torch.stack([x.to(device, torch.float64, non_blocking=True).reshape(()) for x in tensors])


class Split(NamedTuple):
    """The process groups over which a parameter's rows, columns and leading dimensions are split; a vector leads."""

    rows: tuple[Any, ...]
    cols: tuple[Any, ...]
    lead: tuple[Any, ...]

    @property
    def all(self) -> tuple[Any, ...]:
        """Every group that has a part in the parameter."""
        return self.rows + self.cols + self.lead


@dataclass
class Call:
    """One call of the op: parameters of one device, compute dtype and way of being split, as far as they are here."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    cols: list[Tensor] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)
    moments: list[Tensor] = field(default_factory=list)
    averages: list[Tensor] = field(default_factory=list)
    group_of: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    shards: list[int] = field(default_factory=list)
    owners: list[Tensor] = field(default_factory=list)  # the parameters as the optimizer has them
    states: list[dict[str, Any]] = field(default_factory=list)
    split: Split | None = None
    spread: bool = False  # whether DTensors are among the owners

    steps: Tensor | None = None
    rms: Tensor | None = None
    lr: Tensor | None = None
    options: list[float] = field(default_factory=list)
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    seed: int = 0
    sums: Tensor | None = None

    def option(self, group: int, name: str) -> float:
        """One of the numbers of a group."""
        return self.options[OPTIONS * group + {"torch_mode": 0, "layer_adaptation": 10}[name]]

    def run(self, phases: int = ALL_PHASES) -> None:
        """The step, or some phases of it; with CHECK_ONLY an error where an argument is wrong, and nothing else."""
        if is_dual(self.grads):
            raise NotImplementedError("adafactor has no forward-mode derivative: step outside of dual_level and jvp")
        torch.ops.fastnlp_ops.adafactor_step_(
            self.params,
            self.grads,
            self.rows,
            self.cols,
            self.vectors,
            self.moments,
            self.averages,
            self.steps,
            self.rms,
            self.lr,
            self.group_of,
            self.options,
            self.grad_scale,
            self.found_inf,
            self.max_grad_norm or 0.0,
            self.skip_nonfinite,
            self.seed,
            self.ids,
            self.sums,
            self.shards,
            phases,
        )
        if (
            phases != CHECK_ONLY and not torch.compiler.is_compiling()
        ):  # kernels of the stable ABI leave alone what autograd sees changes by
            written = [self.params, self.rows, self.cols, self.vectors, self.moments, self.averages]
            torch.autograd.graph.increment_version([tensor for tensors in written for tensor in tensors])


@dataclass
class Progress:
    """What a call of step() leaves to the next one; an object, because torch.compile drops attributes of optimizers."""

    accumulated: int = 0  # calls since the last update
    grad_sums: dict[Tensor, Tensor] = field(default_factory=dict)  # of their gradients
    updated: bool | Tensor = False  # whether the last call updated parameters; for Lookahead


class Plan(NamedTuple):
    """Calls of the op, and what they were made from: as long as all of it is as it was, so are they."""

    calls: list[Call]
    params: list[Tensor]
    missing: list[bool]  # which of the parameters have no gradient
    owners: list[Tensor]  # those that have one
    values: list[dict[str, Any]]  # what the calls take from their states
    watched: list[Any]  # the same in one list
    extras: list[Any]

    def holds(self, optimizer: Any, params: list[Tensor], grads: Sequence[Tensor | None]) -> bool:
        """Whether the calls are those of the optimizer still."""
        if self.missing != [grad is None for grad in grads] or self.extras != optimizer._extras():
            return False
        states: list[dict[str, Any]] = [optimizer.state.get(p, {}) for p in self.owners]
        if not _same(self.params, params):
            return False
        pairs = zip(states, self.values, strict=True)
        return _same(self.watched, [value for state, own in pairs for value in map(state.get, own)])


def _same(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    return len(ours) == len(theirs) and all(map(operator.is_, ours, theirs))
