"""The engine of both optimizers: from parameter groups and their state to one call of the op for each device."""

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

_COMPUTE = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
}


def compute_dtype(p: Tensor) -> torch.dtype:
    """The dtype of the maths and of the state."""
    if p.is_complex():
        raise RuntimeError("Adafactor does not support complex parameters")
    if p.dtype not in _COMPUTE:
        raise TypeError(f"params must be float32, float64, float16 or bfloat16, got {p.dtype}")
    return _COMPUTE[p.dtype]


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "eps": (lambda x: len(x) == 2 and x[0] >= 0 and x[1] >= 0, "two numbers of at least 0"),
    "clip_threshold": (lambda x: x is None or x > 0, "above 0 or None"),
    "decay_rate": (lambda x: x <= 0, "at most 0"),
    "beta1": (lambda x: x is None or 0 <= x < 1, "in [0, 1) or None"),
    "weight_decay": (lambda x: x >= 0, "at least 0"),
    "ema_decay": (lambda x: x is None or 0 <= x <= 1, "in [0, 1] or None"),
    "rounding": (lambda x: x in ("nearest", "stochastic"), '"nearest" or "stochastic"'),
    "max_grad_norm": (lambda x: x is None or x > 0, "above 0 or None"),
    "accumulation_steps": (lambda x: x >= 1, "at least 1"),
}


def check_options(options: dict[str, Any]) -> None:
    """ValueError for an option out of its range."""
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
    """The 15 numbers by which the op knows a group."""
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


class Call:
    """Arguments of the op for the parameters of one device and compute dtype."""

    def __init__(self) -> None:
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.cols: list[Tensor] = []
        self.vectors: list[Tensor] = []
        self.moments: list[Tensor] = []
        self.averages: list[Tensor] = []
        self.states: list[dict[str, Any]] = []
        self.group_of: list[int] = []
        self.ids: list[int] = []


class FactoredOptimizer(Optimizer):
    """State, checkpoints, gradient scaling and the call of the op; a subclass names its state and its options."""

    # Names in the state: row factor, column factor, full second moment, and RMS of the parameter where it is kept.
    row_key: ClassVar[str]
    col_key: ClassVar[str]
    vector_key: ClassVar[str]
    rms_key: ClassVar[str | None] = None

    _step_supports_amp_scaling = True
    grad_scale: Tensor | None
    found_inf: Tensor | None

    # What is of the optimizer as a whole, not of a group.
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    accumulation_steps: int = 1

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._packs: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], Tensor, list[Tensor], Tensor]] = {}
        self._gathered = 0  # backward passes since the last update
        super().__init__(params, defaults)

    def group_options(self, group: dict[str, Any], dtype: torch.dtype) -> list[float]:
        """The group as the op knows it."""
        raise NotImplementedError

    def factor_shapes(self, shape: torch.Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the row and of the column factor of a parameter of two or more dimensions."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what closure, called with gradients on, returns."""
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._gathered += 1
        if self._gathered >= self.accumulation_steps:
            self._gathered = 0
            groups = [group["params"] for group in self.param_groups]
            index = itertools.count()
            self._update((k, next(index), p) for k, group in enumerate(groups) for p in group)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; between the backward passes that one update gathers gradients stay."""
        if self._gathered == 0:
            super().zero_grad(set_to_none)

    def _update(self, parameters: Iterable[tuple[int, int, Tensor]]) -> None:
        """One step of (group, id, parameter); nothing has been written when an argument is wrong."""
        calls: dict[tuple[torch.device, torch.dtype], Call] = {}
        for group, tensor_id, p in parameters:
            if p.grad is not None:
                dtype = compute_dtype(p)
                key = (p.device, dtype)
                if key not in calls:
                    calls[key] = Call()
                self._add(calls[key], group, tensor_id, p, p.grad)
        lr = op_lr([group["lr"] for group in self.param_groups])
        scale, found = self._scaling(list(calls.values()))
        for (device, dtype), call in calls.items():
            options = [x for group in self.param_groups for x in self.group_options(group, dtype)]
            steps, rms = self._pack((device, dtype), call.states)
            torch.ops.fastnlp_ops.adafactor_step_(
                call.params,
                call.grads,
                call.rows,
                call.cols,
                call.vectors,
                call.moments,
                call.averages,
                steps,
                rms,
                lr if lr.device == device else lr.to("cpu"),
                call.group_of,
                options,
                None if scale is None else scale.to(device, torch.float32),
                None if found is None else found.to(device, torch.float32),
                (self.max_grad_norm or 0.0) if len(calls) == 1 else 0.0,
                self.skip_nonfinite,
                0,
                call.ids,
                None,
                [],
                15,
            )

    def _add(self, call: Call, group: int, tensor_id: int, p: Tensor, grad: Tensor) -> None:
        if grad.layout != torch.strided:
            raise RuntimeError("Adafactor does not support sparse gradients")
        state, options = self.state[p], self.param_groups[group]
        if "step" not in state:
            self._complete(state, p, options)
        call.params.append(p)
        call.grads.append(grad)
        if p.dim() > 1:
            call.rows.append(state[self.row_key])
            call.cols.append(state[self.col_key])
        else:
            call.vectors.append(state[self.vector_key])
        if options.get("beta1") is not None:
            call.moments.append(state["exp_avg"])
        if options.get("ema_decay") is not None:
            call.averages.append(state["average"])
        call.states.append(state)
        call.group_of.append(group)
        call.ids.append(tensor_id)

    def _complete(self, state: dict[str, Any], p: Tensor, group: dict[str, Any]) -> None:
        """What the state lacks: zeros in the compute dtype, an average that starts at the parameter."""
        dtype = compute_dtype(p)
        shapes: dict[str, tuple[int, ...]] = {self.vector_key: tuple(p.shape)}
        if p.dim() > 1:
            shapes = dict(zip((self.row_key, self.col_key), self.factor_shapes(p.shape), strict=True))
        if group.get("beta1") is not None:
            shapes["exp_avg"] = tuple(p.shape)
        for name, shape in shapes.items():
            if name not in state:
                state[name] = torch.zeros(shape, dtype=dtype, device=p.device)
        for number in ("step", self.rms_key):
            if number is not None and number not in state:
                state[number] = torch.zeros((), dtype=torch.float32, device=p.device)
        if group.get("ema_decay") is not None and "average" not in state:
            state["average"] = p.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)

    def _pack(
        self, key: tuple[torch.device, torch.dtype], states: list[dict[str, Any]]
    ) -> tuple[Tensor, Tensor | None]:
        """Step counts and RMS as the op wants them, [n] each; those in the state are views of these."""
        rms_key = self.rms_key
        if len(states) == 1:
            return states[0]["step"].view(1), None if rms_key is None else states[0][rms_key].view(1)
        own_steps = [state["step"] for state in states]
        own_rms = [] if rms_key is None else [state[rms_key] for state in states]
        pack = self._packs.get(key)
        if pack is None or not (_same(pack[0], own_steps) and _same(pack[2], own_rms)):
            steps, rms = (torch.stack(x) if x else torch.empty(0) for x in (own_steps, own_rms))
            pack = list(steps.unbind()), steps, list(rms.unbind()), rms
            for k, state in enumerate(states):
                state["step"] = pack[0][k]
                if rms_key is not None:
                    state[rms_key] = pack[2][k]
            self._packs[key] = pack
        return pack[1], None if rms_key is None else pack[3]

    def _scaling(self, calls: list[Call]) -> tuple[Tensor | None, Tensor | None]:
        """What gradients are divided by, and whether the step is off (GradScaler sets both as attributes)."""
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self.accumulation_steps > 1:
            scale = torch.full((), float(self.accumulation_steps)) if scale is None else scale * self.accumulation_steps
        if len(calls) > 1 and (self.max_grad_norm is not None or self.skip_nonfinite):
            # The op sees the gradients of one device and dtype; what holds for all of them is settled here.
            home = calls[0].params[0].device
            squares = [g.detach().double().square().sum().to(home) for call in calls for g in call.grads]
            norm = torch.stack(squares).sum().sqrt()
            divisor = torch.ones((), device=home) if scale is None else scale.to(home)
            if self.skip_nonfinite:
                limit = torch.finfo(torch.float32).max ** 0.5
                off = ~(norm / divisor < limit)
                found = off.float() if found is None else found.to(home) + off
            if self.max_grad_norm is not None:
                factor = (self.max_grad_norm / (norm / divisor + 1e-6)).clamp(max=1.0)
                scale = divisor / factor
        return scale, found

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within the block the parameters are their moving averages (ema_decay); afterwards they are themselves."""
        pairs = [(p, s["average"]) for p, s in self.state.items() if isinstance(p, Tensor) and "average" in s]
        kept = [p.detach().clone() for p, _ in pairs]
        with torch.no_grad():
            for p, average in pairs:
                p.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for (p, _), value in zip(pairs, kept, strict=True):
                    p.copy_(value)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("max_grad_norm", "skip_nonfinite", "accumulation_steps", "_gathered")
        return super().__getstate__() | {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._packs = {}
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":  # the base class leaves that in defaults
                    group.setdefault(name, value)
            for p in group["params"]:
                if values := self.state.get(p):
                    self._restore(p, values, group)

    def _restore(self, p: Tensor, values: dict[str, Any], group: dict[str, Any]) -> None:
        factors = {self.row_key, self.col_key} if p.dim() > 1 else {self.vector_key}
        if "step" in values and not factors <= values.keys():
            raise ValueError(f"the state of a parameter must hold {sorted(factors)}, got {sorted(values)}")
        self.state[p] = {name: self._restored(p, name, value) for name, value in values.items()}
        if "step" in values:
            self._complete(self.state[p], p, group)

    def _restored(self, p: Tensor, name: str, value: Any) -> Any:
        """A value of a loaded state where and as it is kept: in full precision whatever the parameter's dtype."""
        value = value.tensor if isinstance(value, _Untouched) else value
        if name in ("step", self.rms_key):
            number = value.detach().float() if isinstance(value, Tensor) else torch.tensor(float(value))
            return number.reshape(()).to(p.device)
        if isinstance(value, Tensor) and value.is_floating_point() and name in self.state_keys():
            return value.to(p.device, compute_dtype(p), memory_format=torch.contiguous_format)
        return value.to(p.device) if isinstance(value, Tensor) else value

    def state_keys(self) -> set[str]:
        """Names of the tensors of the state that are in the compute dtype."""
        return {self.row_key, self.col_key, self.vector_key, "exp_avg", "average"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, without its cast of the state to the dtype of the parameters."""

        def wrap(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            state = {
                key: {n: _Untouched(v) if isinstance(v, Tensor) else v for n, v in values.items()}
                if isinstance(values, dict)
                else values
                for key, values in loaded["state"].items()
            }
            return loaded | {"state": state}

        last = self.register_load_state_dict_pre_hook(wrap)  # after the hooks of others
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()


class _Untouched:
    """A tensor that Optimizer.load_state_dict passes on as it is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach().clone()


def _same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(operator.is_, ours, theirs))
