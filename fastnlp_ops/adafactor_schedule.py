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


def learning_rate_groups(model: nn.Module, multipliers: Mapping[str, float]) -> list[dict[str, Any]]:
    """Parameter groups in which the learning rate is multiplied by what the parameter's name asks for.

    The multiplier is the product of those whose pattern occurs in the name, 1 where none does. It multiplies whole
    steps, whether the learning rate is given, scheduled, or relative.

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(3, 2), "crf": fastnlp_ops.CRF(2, batch_first=True)})
        >>> groups = fastnlp_ops.learning_rate_groups(model, {"crf": 100.0, "bias": 2.0})
        >>> [(group["lr_scale"], len(group["params"])) for group in groups]
        [(1.0, 1), (2.0, 1), (100.0, 3)]
        >>> optimizer = fastnlp_ops.Adafactor(groups, lr=1e-3, relative_step=False)

    Args:
        model (Module): parameters that require no gradient are left out.
        multipliers (dict): regular expression, searched in the names of model.named_parameters(), to multiplier.

    Returns:
        list of dict: groups for :class:`Adafactor` and :class:`TorchAdafactor`, with the key lr_scale.

    Raises:
        ValueError: for a pattern that occurs in no name, and for a multiplier below 0.

    References:
        Su, bert4keras (2020), extend_with_parameter_wise_lr.
    """
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
    return [{"params": params, "lr_scale": lr_scale} for lr_scale, params in groups.items()]


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
        if any(group["lr"] is None for group in optimizer.param_groups):
            raise ValueError("lr must be given for PiecewiseLinearLR, got None (relative_step=False takes one)")
        self.points = sorted(({0: 0.0} | dict(points)).items())
        super().__init__(optimizer, self.factor, last_epoch)

    def factor(self, step: int) -> float:
        """What multiplies the learning rate at a step."""
        for (begin, first), (end, last) in zip(self.points, self.points[1:], strict=False):
            if step < end:
                return first + (last - first) * (step - begin) / (end - begin)
        return self.points[-1][1]


class Lookahead:
    r"""Slow weights behind any optimizer: after every k steps they go a part of the way, and the parameters back.

    .. math::
        s \leftarrow s + \alpha (p - s), \qquad p \leftarrow s

    The optimizer stays what it is: its step() does this, too, and the slow weights, which begin at the parameters, are
    in its state and in its checkpoints.

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
        optimizer (Optimizer): any of torch's kind.
        k (int): steps between two of the slow weights.
        alpha (float): the part of the way.

    Raises:
        ValueError: for k below 1 and alpha outside of [0, 1].

    References:
        Zhang, Lucas, Hinton and Ba, "Lookahead Optimizer: k steps forward, 1 step back" (NeurIPS 2019,
        arXiv 1907.08610).
    """

    def __init__(self, optimizer: Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}")
        self.k, self.alpha = k, alpha
        # Of parameters without a state (yet): to torch's optimizers a state is either empty or whole.
        self._apart: dict[Tensor, dict[str, Any]] = {}
        self._hooks = (
            optimizer.register_step_pre_hook(self._begin),
            optimizer.register_step_post_hook(self._follow),
        )

    def remove(self) -> None:
        """From now on the optimizer steps without slow weights."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p not in self._apart and "slow" not in optimizer.state.get(p, ()):
                    self._apart[p] = {"slow": p.detach().clone(), "slow_age": 0}

    @torch.no_grad()
    def _follow(self, optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = optimizer.state.get(p)
                if state and p in self._apart:
                    state.update(self._apart.pop(p))
                own = state or self._apart[p]
                own["slow_age"] += 1
                if own["slow_age"] == self.k:
                    own["slow_age"] = 0
                    p.copy_(own["slow"].lerp_(p, self.alpha))
