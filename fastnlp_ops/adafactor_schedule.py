"""What goes around an optimizer: learning rates by the name of the parameter and by the step, and slow weights."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def learning_rate_groups(
    model: nn.Module, multipliers: Mapping[str, float], lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer, with the learning rate times what the parameter's name asks for.

    The multiplier is the product of those whose pattern occurs in the name, 1 where none does. Schedulers multiply the
    rates of all groups alike.

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(3, 2), "crf": fastnlp_ops.CRF(2, batch_first=True)})
        >>> groups = fastnlp_ops.learning_rate_groups(model, {"crf": 100.0, "bias": 2.0}, lr=1e-3)
        >>> [(group["lr"], len(group["params"])) for group in groups]
        [(0.001, 1), (0.002, 1), (0.1, 3)]
        >>> optimizer = torch.optim.AdamW(groups)  # or fastnlp_ops.Adafactor(groups), or any other

    Args:
        model (Module): parameters that require no gradient are left out.
        multipliers (dict): regular expression, searched in the names of model.named_parameters(), to multiplier.
        lr (float): learning rate of multiplier 1. None: :class:`Adafactor` takes its relative steps times the
            multiplier, and other optimizers, which have no such steps, raise an error.

    Returns:
        list of dict: groups with params and lr, and with relative_step=False for :class:`Adafactor`; without a learning
        rate with lr_scale, too, which multiplies relative steps.

    Raises:
        ValueError: for a pattern that occurs in no name, for a multiplier and for a learning rate below 0.

    References:
        Su, bert4keras (2020), extend_with_parameter_wise_lr.
    """
    if lr is not None and not lr >= 0:
        raise ValueError(f"lr must be at least 0 or None, got {lr}")
    for pattern, multiplier in multipliers.items():
        if not multiplier >= 0:
            raise ValueError(f'multiplier of "{pattern}" must be at least 0, got {multiplier}')
        if not any(re.search(pattern, name) for name, _ in model.named_parameters()):
            raise ValueError(f'pattern must occur in the name of a parameter, got "{pattern}"')
    groups: dict[float, list[nn.Parameter]] = defaultdict(list)
    for name, p in model.named_parameters():
        if p.requires_grad:
            found = (multiplier for pattern, multiplier in multipliers.items() if re.search(pattern, name))
            groups[math.prod(found, start=1.0)].append(p)
    if lr is None:
        return [{"params": params, "lr": None, "lr_scale": multiplier} for multiplier, params in groups.items()]
    return [{"params": params, "lr": lr * multiplier, "relative_step": False} for multiplier, params in groups.items()]


class PiecewiseLinearLR(LambdaLR):
    """Learning rate times a factor that runs in straight lines between given steps.

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> schedule = fastnlp_ops.PiecewiseLinearLR(optimizer, {1000: 1.0, 2000: 0.1})  # warm-up, then down to a tenth
        >>> [round(schedule.factor(step), 3) for step in (0, 500, 1000, 1500, 5000)]
        [0.0, 0.5, 1.0, 0.55, 0.1]

    Args:
        optimizer (Optimizer): any of torch's kind with a learning rate.
        points (dict): step to factor. Before the first point it rises from 0 at step 0; after the last one it is
            constant.
        last_epoch (int): as torch's schedulers.

    Raises:
        ValueError: without points, for a step below 0, and for an optimizer that has no learning rate to multiply.

    References:
        Su, bert4keras (2020), extend_with_piecewise_linear_lr.
    """

    def __init__(self, optimizer: Optimizer, points: Mapping[int, float], last_epoch: int = -1) -> None:
        if not points or min(points) < 0:
            raise ValueError(f"points must be steps of at least 0 with their factors, got {dict(points)}")
        if any(group["lr"] is None or group.get("relative_step") for group in optimizer.param_groups):
            raise ValueError("lr must be given for PiecewiseLinearLR (relative_step=False takes one)")
        self.points = sorted(({0: 0.0} | dict(points)).items())
        super().__init__(optimizer, self.factor, last_epoch)

    def factor(self, step: int) -> float:
        """What multiplies the learning rate at a step."""
        for (begin, first), (end, last) in zip(self.points, self.points[1:], strict=False):
            if step < end:
                return first + (last - first) * (step - begin) / (end - begin)
        return self.points[-1][1]


class Lookahead:
    r"""Slow weights behind any optimizer: after every k updates they go a part of the way, and the parameters back.

    .. math::
        s \leftarrow s + \alpha (p - s), \qquad p \leftarrow s

    The optimizer stays what it is: its step() does this, too, and the slow weights, which begin at the parameters, are
    in its state and in its checkpoints. Calls of step() that update nothing do not count: those that accumulate, that
    have no gradient, and that are skipped for a gradient that is not finite. (Where only the device knows whether they
    were, Lookahead waits for it: under skip_nonfinite, and under a GradScaler that leaves its scale to the step.)

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> p.grad = torch.ones(2)
        >>> optimizer = torch.optim.SGD([p], lr=0.1)
        >>> lookahead = fastnlp_ops.Lookahead(optimizer, k=2, alpha=0.5)
        >>> for _ in range(2): optimizer.step()
        >>> p.detach()
        tensor([0.9000, 0.9000])

    Args:
        optimizer (Optimizer): any of torch's kind, with one Lookahead. A copy of an optimizer has none; a copy of the
            Lookahead brings its own copy of the optimizer.
        k (int): updates between two of the slow weights.
        alpha (float): the part of the way.

    Raises:
        ValueError: for k below 1, alpha outside of [0, 1], and an optimizer that has a Lookahead; in load_state_dict
            for slow weights of another shape.

    References:
        Zhang, Lucas, Hinton and Ba, "Lookahead Optimizer: k steps forward, 1 step back" (NeurIPS 2019,
        arXiv 1907.08610).
    """

    def __init__(self, optimizer: Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}")
        hooks = optimizer._optimizer_step_pre_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), Lookahead) for hook in hooks):
            raise ValueError("optimizer must have one Lookahead at most; remove() takes one off")
        self.optimizer, self.k, self.alpha = optimizer, k, alpha
        # Slow weights of parameters without a state (yet): to torch's optimizers a state is either empty or whole.
        self._apart: dict[Tensor, dict[str, Any]] = {}
        self._attach()

    def _attach(self) -> None:
        self._hooks = (
            self.optimizer.register_step_pre_hook(self._begin),
            self.optimizer.register_step_post_hook(self._follow),
            self.optimizer.register_load_state_dict_pre_hook(self._check),
            self.optimizer.register_load_state_dict_post_hook(self._forget),
        )
        self._fresh: dict[Tensor, dict[str, Any]] = {}  # slow weights that begin with the step that runs
        self._has_gradients = False
        if getattr(self.optimizer, "_in_backward", None) is not None:  # the first update comes before the first step()
            self._begin(self.optimizer)
            self._apart |= self._fresh

    def remove(self) -> None:
        """From now on the optimizer steps without slow weights, and its state holds none."""
        for hook in self._hooks:
            hook.remove()
        for state in self.optimizer.state.values():
            for name in ("slow", "slow_age"):
                state.pop(name, None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("optimizer", "k", "alpha", "_apart")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._attach()

    def _begin(self, optimizer: Optimizer, *_: Any) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self._has_gradients = any(p.grad is not None for p in params)
        known = [own for own in (*map(optimizer.state.get, params), *self._apart.values()) if own and "slow" in own]
        age = known[0]["slow_age"] if known else 0  # one count for all, also for those that join later
        self._fresh = {
            p: {"slow": p.detach().clone(), "slow_age": age}
            for p in params
            if p not in self._apart and "slow" not in optimizer.state.get(p, ())
        }

    @torch.no_grad()
    def _follow(self, optimizer: Optimizer, *_: Any) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        progress = getattr(optimizer, "_progress", None)  # ours know; of others a GradScaler may
        updated = progress and progress.updated
        if progress is None:
            found_inf = getattr(optimizer, "found_inf", None)
            updated = self._has_gradients or any(p.grad is not None for p in params)
            updated = updated and (found_inf is None or found_inf == 0)
        if not updated:
            return
        self._apart |= self._fresh
        for p in params:
            if p in self._apart and (optimizer.state.get(p) or p.grad is not None):
                optimizer.state[p].update(self._apart.pop(p))
            own = self._apart[p] if p in self._apart else optimizer.state[p]
            own["slow_age"] += 1
            if own["slow_age"] >= self.k:
                own["slow"] = own["slow"].to(p.device, p.dtype).lerp(p, self.alpha)
                own["slow_age"] = 0
                p.copy_(own["slow"])

    def _check(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        for p, key in zip(params, saved, strict=False):  # torch counts them
            state = state_dict["state"].get(key)
            slow = state.get("slow", p) if isinstance(state, dict) else p
            if slow.shape != p.shape:
                raise ValueError(f"slow weights must have shape {tuple(p.shape)}, got {tuple(slow.shape)}")

    def _forget(self, _: Optimizer) -> None:
        self._apart = {}
