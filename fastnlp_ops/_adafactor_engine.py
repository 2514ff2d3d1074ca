"""The engine of both optimizers: from parameter groups and their state to one call of the op for each device."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastnlp_ops._adafactor_call import CHECK_ONLY, DTYPES, Call, Plan, Progress, check_dtype, compute_dtype, op_lr
from fastnlp_ops._adafactor_shards import (
    Split,
    geometry,
    local,
    local_grad,
    number_on,
    placed_like_part,
    run_in_phases,
    split_of,
    zeros_like_part,
)


class FactoredOptimizer(Optimizer):
    """State, checkpoints, gradient scaling and the call of the op; a subclass names its state and its options."""

    # Names in the state: row factor, column factor, full second moment, and RMS of the parameter where it is kept.
    row_key: ClassVar[str]
    col_key: ClassVar[str]
    vector_key: ClassVar[str]
    rms_key: ClassVar[str | None] = None

    grad_scale: Tensor | None
    found_inf: Tensor | None

    # What is of the optimizer as a whole, not of a group.
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    accumulation_steps: int = 1

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._plans: list[Plan] = []  # one or none; a list, because torch.compile keeps what is written into it
        self._progress = Progress()
        self._in_backward: dict[int, bool] | None = None  # updates since the last step(), see adafactor_in_backward
        super().__init__(params, defaults)

    def group_options(self, group: dict[str, Any], dtype: torch.dtype) -> list[float]:
        """The group as the op knows it."""
        raise NotImplementedError

    def check_group(self, group: dict[str, Any]) -> None:
        """ValueError for an option of a group that is out of its range."""
        raise NotImplementedError

    def factor_shapes(self, shape: torch.Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the row and of the column factor of a parameter of two or more dimensions."""
        raise NotImplementedError

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler leaves its scale to step(): where nothing may wait for the device, or it would refuse."""
        if any(group.get("capturable") for group in self.param_groups):
            return True
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        return any(grad is not None and grad.dtype == torch.float16 for grad in grads)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, after a look at the group's options."""
        if isinstance(param_group, dict):
            self.check_group(self.defaults | param_group)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what closure, called with gradients on, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._progress.updated = self._advance()
        except Exception:
            # GradScaler takes both away after a step that returns; a scale that stays would multiply the next one.
            if "found_inf" in self.__dict__:
                del self.grad_scale, self.found_inf
            raise
        return loss

    def _advance(self) -> bool | Tensor:
        """One call of step(). Where an argument is wrong it raises before anything has changed."""
        params = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        if self._progress.grad_sums:
            grads = [
                self._progress.grad_sums.get(p) if grad is None else grad for p, grad in zip(params, grads, strict=True)
            ]
        holds = self._plans and self._plans[0].holds(self, params, grads)
        plan = self._plans[0] if holds else self._make_plan(params, grads)
        self._prepare(plan.calls)
        accumulates = self.accumulation_steps > 1 or bool(self._progress.grad_sums)
        if accumulates or len(plan.calls) > 1:
            for call in plan.calls:
                call.run(CHECK_ONLY)
        if accumulates:
            self._accumulate(plan.calls)
            if self._progress.accumulated < self.accumulation_steps:
                return False
        updated = self._launch(plan.calls)
        if not holds:
            self._keep(plan)
        self._progress.accumulated, self._progress.grad_sums = 0, {}
        return updated

    def _make_plan(self, params: list[Tensor], grads: Sequence[Tensor | None]) -> Plan:
        """Calls for the parameters that have a gradient, with all but what changes at every step."""
        calls: dict[tuple[torch.device, torch.dtype, Split | None], Call] = {}
        owners, values = [], []
        groups = (k for k, group in enumerate(self.param_groups) for _ in group["params"])
        for index, (p, grad, group) in enumerate(zip(params, grads, groups, strict=True)):
            if grad is not None:
                split = split_of(p) if hasattr(p, "placements") else None
                key = (p.device, compute_dtype(p), split)
                if key not in calls:
                    calls[key] = Call(split=split)
                owners.append(p)
                values.append(self._add(calls[key], group, index, p))
        for call in calls.values():
            self._pack(call)
        watched = [value for own in values for value in own.values()]
        missing = [grad is None for grad in grads]
        return Plan(list(calls.values()), params, missing, owners, values, watched, self._extras())

    def _keep(self, plan: Plan) -> None:
        """After its step: the plan, and what it has added to the states."""
        self._plans[:] = [plan]
        for p, values in zip(plan.owners, plan.values, strict=True):
            self.state[p].update(values)

    def _extras(self) -> list[Any]:
        """What calls depend on: sizes of groups, lists that their options ask for, kinds of parameters."""
        groups = self.param_groups
        sizes = [len(group["params"]) for group in groups]
        lists = [group.get(name) is None for group in groups for name in ("beta1", "ema_decay")]
        return [*sizes, *lists, *[(p.dtype, p.device) for group in groups for p in group["params"]]]

    def _update_in_backward(self, index: int, p: Tensor) -> None:
        """A step of one parameter, of the first group."""
        call = Call(split=split_of(p) if hasattr(p, "placements") else None)
        values = self._add(call, 0, index, p)
        self._pack(call)
        self._prepare([call])
        self._launch([call])
        self.state[p].update(values)

    def _add(self, call: Call, group: int, index: int, p: Tensor) -> dict[str, Any]:
        """Enters a parameter, the index-th of all, into a call; returns what the call takes from its state."""
        options = self.param_groups[group]
        values = self._completed(p, self.state.get(p) or {}, options)
        if p.dim() > 1:
            call.rows.append(local(values[self.row_key]))
            call.cols.append(local(values[self.col_key]))
        else:
            call.vectors.append(local(values[self.vector_key]))
        if options.get("beta1") is not None:
            call.moments.append(local(values["exp_avg"]))
        if options.get("ema_decay") is not None:
            call.averages.append(local(values["average"]))
        call.spread = call.spread or hasattr(p, "placements")
        call.params.append(local(p))
        call.owners.append(p)
        call.states.append(values)
        call.group_of.append(group)
        call.ids.append(index)
        if call.split is not None:
            call.shards += geometry(p)
        return values

    def _prepare(self, calls: list[Call]) -> None:
        """What changes at every step: gradients, learning rates, options and scale."""
        for group in self.param_groups:
            self.check_group(group)
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)  # GradScaler sets both
        lr = op_lr([group["lr"] for group in self.param_groups])
        for call in calls:
            call.grads = [local_grad(p, self._progress.grad_sums[p] if p.grad is None else p.grad) for p in call.owners]
            if call.spread:  # FSDP2 may have given a parameter new memory
                call.params = [local(p) for p in call.owners]
            for grad in [grad for grad in call.grads if grad.layout != torch.strided or grad.dtype not in DTYPES]:
                if grad.layout != torch.strided:
                    raise RuntimeError("Adafactor does not support sparse gradients")
                check_dtype(grad, "grads")
            device, dtype = call.params[0].device, compute_dtype(call.params[0])
            call.lr = lr if lr.device == device else lr.to("cpu")
            call.options = [x for group in self.param_groups for x in self.group_options(group, dtype)]
            call.grad_scale = None if scale is None else scale.to(device, torch.float32)
            call.found_inf = None if found is None else found.to(device, torch.float32)
            call.max_grad_norm, call.skip_nonfinite = self.max_grad_norm, self.skip_nonfinite

    def _accumulate(self, calls: list[Call]) -> None:
        """Takes the gradients, so that no zero_grad() can lose them, and puts their sums into the calls."""
        self._progress.accumulated += 1
        for call in calls:
            for p in call.owners:
                if p.grad is not None:
                    grad, before = p.grad.detach(), self._progress.grad_sums.get(p)
                    if call.grad_scale is not None:
                        grad = grad.to(compute_dtype(p)) / call.grad_scale
                    if before is None:
                        self._progress.grad_sums[p] = grad.clone()
                    else:
                        before += grad
                    p.grad = None
            call.grads = [local_grad(p, self._progress.grad_sums[p]) for p in call.owners]
            call.grad_scale = torch.full((), float(self._progress.accumulated), device=call.params[0].device)
            # An infinity of an earlier call is in the sum; GradScaler has forgotten it.
            call.skip_nonfinite = call.skip_nonfinite or call.found_inf is not None

    def _launch(self, calls: list[Call]) -> bool | Tensor:
        """The step of the op; returns whether it updated, as a tensor where that is known on the device alone."""
        if not calls:
            updated = bool(self._in_backward)
            (self._in_backward or {}).clear()
            return updated
        steps = calls[0].steps
        open_end = calls[0].found_inf is not None or calls[0].skip_nonfinite
        before = steps.clone() if steps is not None and open_end else None
        one_norm = len(calls) > 1 and (self.max_grad_norm is not None or calls[0].skip_nonfinite)
        if one_norm or any(call.split for call in calls):
            run_in_phases(calls)
        else:
            for call in calls:
                call.run()
        return True if before is None or steps is None else steps.ne(before).any()

    def _state_part(self, p: Tensor, name: str) -> tuple[tuple[int, ...], dict[int, int]]:
        """The whole shape of a state tensor of p, and which of its dimensions those of p become."""
        if name not in (self.row_key, self.col_key):
            return tuple(p.shape), dict(enumerate(range(p.dim())))
        row, col = self.factor_shapes(p.shape)
        last = p.dim() - 1
        # Rows have lost the last dimension, columns the one before it.
        if name == self.row_key:
            return row, dict(enumerate(range(last)))
        return col, dict(enumerate(range(last - 1))) | {last: len(col) - 1}

    def _completed(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
        """What a step takes from the state of p: as the op wants it, whoever wrote it, and zeros where nothing is."""
        factors = [self.row_key, self.col_key] if p.dim() > 1 else [self.vector_key]
        if "step" in state and any(state.get(name) is None for name in factors):
            raise ValueError(f"the state of a parameter must hold {sorted(factors)}, got {sorted(state)}")
        names = [*factors, *(["exp_avg"] if group.get("beta1") is not None else [])]
        values: dict[str, Any] = {}
        for name in names:  # in the same order in every process
            if state.get(name) is not None:
                values[name] = self._fitted(p, name, state[name])
            else:
                values[name] = zeros_like_part(p, *self._state_part(p, name), compute_dtype(p))
        for name in ("step",) if self.rms_key is None else ("step", self.rms_key):
            values[name] = self._fitted(p, name, state.get(name, 0))
        if group.get("ema_decay") is not None:
            if state.get("average") is not None:
                values["average"] = self._fitted(p, "average", state["average"])
            else:
                values["average"] = p.detach().to(compute_dtype(p), copy=True).contiguous()
        return values

    def _fitted(self, p: Tensor, name: str, value: Any) -> Any:
        """A value of the state where and as it is kept, in full precision whatever the parameter's dtype."""
        if name in ("step", self.rms_key):
            return number_on(p.device, value, name)
        if name in (self.row_key, self.col_key, self.vector_key, "exp_avg", "average"):
            return placed_like_part(p, *self._state_part(p, name), compute_dtype(p), value, name)
        return value.to(p.device) if isinstance(value, Tensor) else value

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
        kept = ("max_grad_norm", "skip_nonfinite", "accumulation_steps", "_progress")
        return super().__getstate__() | {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        defaults = state.get("defaults") or self.defaults
        states = defaultdict(dict, state["state"])
        for group in state["param_groups"]:
            for name, value in defaults.items():
                if name != "differentiable":  # the base class leaves that in defaults
                    group.setdefault(name, value)
            for p in group["params"]:
                if p in states:
                    states[p] = self._restored(p, states[p], group)
            self.check_group(group)
        self._plans, self._in_backward = [], self.__dict__.get("_in_backward")
        super().__setstate__({"_progress": Progress()} | state | {"state": states})

    def _restored(self, p: Tensor, values: Any, group: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(values, dict):
            raise ValueError(f"the state of a parameter must be a dict, got {values!r}")
        values = {name: value.tensor if isinstance(value, _Untouched) else value for name, value in values.items()}
        completed = self._completed(p, values, group) if "step" in values else {}
        others = {name: self._fitted(p, name, value) for name, value in values.items() if name not in completed}
        return completed | others

    def state_dict(self) -> dict[str, Any]:
        """As torch's; gradients that wait for an update are in it, too."""
        result = super().state_dict()
        if self._progress.accumulated:
            params = [p for group in self.param_groups for p in group["params"]]
            sums = {
                index: self._progress.grad_sums[p] for index, p in enumerate(params) if p in self._progress.grad_sums
            }
            result["accumulation"] = {"steps": self._progress.accumulated, "grad_sums": sums}
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, without its cast of the state to the dtype of the parameters."""
        waiting = state_dict.get("accumulation", {"steps": 0, "grad_sums": {}})
        params = [p for group in self.param_groups for p in group["params"]]
        sums = {}
        for index, value in waiting["grad_sums"].items():
            if not 0 <= index < len(params) or value.shape != params[index].shape:
                raise ValueError(f"grad_sums must have the shapes of the parameters, got {tuple(value.shape)}")
            sums[params[index]] = value.detach().clone().to(params[index].device)

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
        self._progress = Progress(waiting["steps"], sums)


class _Untouched:
    """A tensor that Optimizer.load_state_dict passes on as it is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach().clone()
