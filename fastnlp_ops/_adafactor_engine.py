"""The engine of both optimizers: from parameter groups and their state to one call of the op for each device."""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastnlp_ops._adafactor_call import Call, compute_dtype, op_lr
from fastnlp_ops._adafactor_shards import (
    Split,
    geometry,
    local,
    local_grad,
    placed_like,
    run_in_phases,
    split_of,
    zeros_like_part,
)


class Plan(NamedTuple):
    """Calls of the op, and what they were made from: as long as all of it is as it was, so are they."""

    calls: list[Call]
    params: list[Tensor]
    missing: list[bool]  # which of the parameters have no gradient
    states: list[dict[str, Any]]  # of those that have one
    watched: list[Any]  # the values in them
    extras: list[int]

    def holds(self, optimizer: "FactoredOptimizer", params: list[Tensor], grads: Sequence[Tensor | None]) -> bool:
        """Whether the calls are those of the optimizer still."""
        if self.missing != [grad is None for grad in grads] or self.extras != optimizer._extras():
            return False
        states = [optimizer.state.get(p) for p, missing in zip(params, self.missing, strict=True) if not missing]
        values = [value for state in self.states for value in state.values()]
        return _same(self.params, params) and _same(self.states, states) and _same(self.watched, values)


def _same(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    return len(ours) == len(theirs) and all(map(operator.is_, ours, theirs))


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
        self._plans: list[Plan] = []  # one or none; a list, because torch.compile keeps what is written into it
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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._gathered += 1
        if self._gathered >= self.accumulation_steps:
            self._gathered = 0
            params = [p for group in self.param_groups for p in group["params"]]
            grads = [p.grad for p in params]
            if not (self._plans and self._plans[0].holds(self, params, grads)):
                self._plans[:] = [self._make_plan(params, grads)]
            self._run(self._plans[0].calls)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; between the backward passes that one update gathers gradients stay."""
        if self._gathered == 0:
            super().zero_grad(set_to_none)

    def _make_plan(self, params: list[Tensor], grads: Sequence[Tensor | None]) -> "Plan":
        """Calls for the parameters that have a gradient, with all but what changes at every step."""
        calls: dict[tuple[torch.device, torch.dtype, Split | None], Call] = {}
        states = []
        groups = (k for k, group in enumerate(self.param_groups) for _ in group["params"])
        for index, (p, grad, group) in enumerate(zip(params, grads, groups, strict=True)):
            if grad is not None:
                split = split_of(p) if hasattr(p, "placements") else None
                key = (p.device, compute_dtype(p), split)
                if key not in calls:
                    calls[key] = Call(split=split)
                self._add(calls[key], group, index, p)
                states.append(self.state[p])
        for call in calls.values():
            self._pack(call)
        watched = [value for state in states for value in state.values()]
        return Plan(list(calls.values()), params, [grad is None for grad in grads], states, watched, self._extras())

    def _extras(self) -> list[int]:
        """What of the groups decides how calls are made up: their sizes, and the lists that their options ask for."""
        options = ("beta1", "ema_decay")
        sizes = [len(group["params"]) for group in self.param_groups]
        return sizes + [group.get(name) is None for group in self.param_groups for name in options]

    def _update_in_backward(self, index: int, p: Tensor) -> None:
        """A step of one parameter, of the first group."""
        call = Call(split=split_of(p) if hasattr(p, "placements") else None)
        self._add(call, 0, index, p)
        self._pack(call)
        self._run([call])

    def _add(self, call: Call, group: int, index: int, p: Tensor) -> None:
        """Enters a parameter, the index-th of all, into a call."""
        state, options = self.state[p], self.param_groups[group]
        if "step" not in state:
            self._complete(state, p, options)
        if p.dim() > 1:
            call.rows.append(local(state[self.row_key]))
            call.cols.append(local(state[self.col_key]))
        else:
            call.vectors.append(local(state[self.vector_key]))
        if options.get("beta1") is not None:
            call.moments.append(local(state["exp_avg"]))
        if options.get("ema_decay") is not None:
            call.averages.append(local(state["average"]))
        call.spread = call.spread or hasattr(p, "placements")
        call.params.append(local(p))
        call.owners.append(p)
        call.states.append(state)
        call.group_of.append(group)
        call.ids.append(index)
        if call.split is not None:
            call.shards += geometry(p)

    def _run(self, calls: list[Call]) -> None:
        """One step; nothing has been written when an argument is wrong."""
        for call in calls:
            call.grads = [local_grad(p, p.grad) for p in call.owners]
            if call.spread:  # FSDP2 may have given a parameter new memory
                call.params = [local(p) for p in call.owners]
            if any(grad.layout != torch.strided for grad in call.grads):
                raise RuntimeError("Adafactor does not support sparse gradients")
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)  # GradScaler sets both
        if self.accumulation_steps > 1 and calls:
            scale = torch.ones((), device=calls[0].params[0].device) if scale is None else scale
            scale = scale * self.accumulation_steps
        lr = op_lr([group["lr"] for group in self.param_groups])
        for call in calls:
            device, dtype = call.params[0].device, compute_dtype(call.params[0])
            call.lr = lr if lr.device == device else lr.to("cpu")
            call.options = [x for group in self.param_groups for x in self.group_options(group, dtype)]
            call.grad_scale = None if scale is None else scale.to(device, torch.float32)
            call.found_inf = None if found is None else found.to(device, torch.float32)
            call.max_grad_norm, call.skip_nonfinite = self.max_grad_norm, self.skip_nonfinite
        one_norm = len(calls) > 1 and (self.max_grad_norm is not None or self.skip_nonfinite)
        if one_norm or any(call.split for call in calls):
            run_in_phases(calls)
        else:
            for call in calls:
                call.run()

    def _complete(self, state: dict[str, Any], p: Tensor, group: dict[str, Any]) -> None:
        """What the state lacks: zeros, and an average that starts at the parameter."""
        names = [self.row_key, self.col_key] if p.dim() > 1 else [self.vector_key]
        names += ["exp_avg"] if group.get("beta1") is not None else []
        for name in names:  # in the same order in every process
            if name not in state:
                state[name] = self._zeros(p, name)
        for number in ("step", self.rms_key):
            if number is not None and number not in state:
                state[number] = torch.zeros((), dtype=torch.float32, device=p.device)
        if group.get("ema_decay") is not None and "average" not in state:
            state["average"] = p.detach().to(compute_dtype(p), copy=True).contiguous()

    def _zeros(self, p: Tensor, name: str) -> Tensor:
        """A state tensor of p, in the compute dtype and spread over processes as p is."""
        if name in (self.row_key, self.col_key):
            row, col = self.factor_shapes(p.shape)
            last = p.dim() - 1
            # The dimension of the factor that dimensions of p become: rows have lost the last one, columns another.
            dims = dict(enumerate(range(last))) if name == self.row_key else dict(enumerate(range(last - 1)))
            if name == self.col_key:
                dims[last] = len(col) - 1
            return zeros_like_part(p, row if name == self.row_key else col, dims, compute_dtype(p))
        return zeros_like_part(p, tuple(p.shape), dict(enumerate(range(p.dim()))), compute_dtype(p))

    def _pack(self, call: Call) -> None:
        """Step counts and RMS as the op wants them, [n] each; those in the state become views of these."""
        for name, packed in (("step", "steps"), (self.rms_key, "rms")):
            if name is not None:
                if len(call.states) == 1:
                    setattr(call, packed, call.states[0][name].view(1))
                    continue
                values = torch.stack([state[name] for state in call.states])
                setattr(call, packed, values)
                for state, value in zip(call.states, values.unbind(), strict=True):
                    state[name] = value

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
        self._plans = []
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
        if name in (self.row_key, self.col_key, self.vector_key, "exp_avg", "average"):
            return placed_like(self._zeros(p, name), value, name)
        return value.to(p.device) if isinstance(value, Tensor) else value

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
