"""Adafactor, the optimizer with factored second moments, as one call of a compiled op for all parameters."""

import inspect
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from fastnlp_ops._adafactor_call import Call, check_dtype, check_options, op_lr, op_options
from fastnlp_ops._adafactor_engine import FactoredOptimizer


def adafactor_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    rows: Sequence[Tensor],
    cols: Sequence[Tensor],
    vectors: Sequence[Tensor],
    steps: Tensor,
    *,
    moments: Sequence[Tensor] = (),
    averages: Sequence[Tensor] = (),
    rms: Tensor | None = None,
    lr: float | Tensor | None = None,
    eps: tuple[float, float] = (1e-30, 1e-3),
    clip_threshold: float | None = 1.0,
    decay_rate: float = -0.8,
    beta1: float | None = None,
    weight_decay: float = 0.0,
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
    seed: int = 0,
    ids: Sequence[int] = (),
    skip_nonfinite: bool = False,
    max_grad_norm: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    r"""One Adafactor step of many tensors, in place: the op behind :class:`Adafactor` and :class:`TorchAdafactor`.

    .. math::
        R \leftarrow \beta R + (1 - \beta) \overline{g^2 + \epsilon_1}^{\,j}, \quad
        C \leftarrow \beta C + (1 - \beta) \overline{g^2 + \epsilon_1}^{\,i}, \quad
        u = g \sqrt{\overline{R} / (R_i C_j)}, \quad
        p \leftarrow p - \alpha \lambda p - \alpha \frac{u}{\max(1, \mathrm{RMS}(u) / d)}

    with 1 - beta = t^decay_rate and alpha = rho max(eps2, RMS(p)). Two reads of the gradient do it: the derivation is
    in fastnlp_ops/reference/adafactor.py.

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> p, g, step = torch.randn(4, 3), torch.randn(4, 3), torch.zeros(1)
        >>> alpha, R, C = 1e-2 * p.square().mean().sqrt(), g.square().mean(1), g.square().mean(0)
        >>> u = g * (R.mean() / (R[:, None] * C)).sqrt()
        >>> expected = p - alpha * u / u.square().mean().sqrt().clamp(min=1)
        >>> fastnlp_ops.adafactor_step_([p], [g], [torch.zeros(4)], [torch.zeros(3)], [], step)
        >>> torch.allclose(p, expected, atol=1e-6)
        True

    Args:
        params (Tensor[...]): a list; float32, float64, float16 or bfloat16, all float64 or none; any strides that do
            not overlap. Two or more dimensions are matrices in the last two, the others a batch.
        grads (Tensor[...]): of the same shapes, of any of these dtypes; never written.
        rows, cols (Tensor[...]): factors of the params of two or more dimensions, in their order, with as many numbers
            as p.shape[:-1] and p.shape[:-2] + p.shape[-1:]; float32, or float64 for float64 params.
        vectors (Tensor[...]): second moments of the other params, in their order.
        steps (Tensor[n]): float32, steps done so far; the op adds 1.
        moments, averages (Tensor[...]): of the shapes of params, for all of them, where beta1 or ema_decay is given.
        rms (Tensor[n]): float32, takes the RMS that scaled the step.
        lr (float or Tensor): learning rate; with relative_step there is none.
        eps (tuple): (eps1, eps2), in squares of gradients and in parameters.
        clip_threshold (float): largest RMS of an update; None: any.
        decay_rate (float): 1 - beta2 = t^decay_rate.
        beta1 (float): decay of the momentum; None: no momentum.
        weight_decay (float): parameters shrink by alpha weight_decay.
        scale_parameter, relative_step, warmup_init (bool): see :class:`Adafactor`.
        variant (str): "transformers", or "torch" for the formulas of :class:`TorchAdafactor`.
        lr_scale (float): factor of the whole step.
        ema_decay (float): decay of the averages; None: no averages.
        layer_adaptation, lazy, maximize (bool): see :class:`Adafactor`.
        rounding (str): "nearest" or "stochastic".
        seed (int): of stochastic rounding.
        ids (list of int): number by which stochastic rounding knows each tensor; 0, 1, ... by default.
        skip_nonfinite (bool): with a gradient that is not finite nothing is written.
        max_grad_norm (float): longer gradients, as one vector, are scaled down to this length.
        grad_scale (Tensor): gradients are divided by it.
        found_inf (Tensor): nothing is written where it is not 0.

    Returns:
        None. params, rows, cols, vectors, moments, averages, steps and rms are written.

    Raises:
        ValueError: for a shape or a device that does not fit, or an option out of its range.
        TypeError: for a dtype that is not listed.

    Precision:
        float32 (float64 for float64 params), whatever the dtype of params and grads. Bitwise repeatable, with any
        number of threads.

    References:
        Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost" (ICML 2018, arXiv
        1804.04235), Algorithms 4 to 6.
    """
    if variant not in ("transformers", "torch"):
        raise ValueError(f'variant must be "transformers" or "torch", got "{variant}"')
    check_options(
        {
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "ema_decay": ema_decay,
            "rounding": rounding,
            "max_grad_norm": max_grad_norm,
        }
    )
    if lr is None and (variant == "torch" or not relative_step):
        raise ValueError("lr must be given where relative_step is off, got None")
    options = op_options(
        eps=eps,
        clip_threshold=clip_threshold,
        decay_rate=decay_rate,
        weight_decay=weight_decay,
        beta1=beta1,
        scale_parameter=scale_parameter,
        relative_step=relative_step,
        warmup_init=warmup_init,
        variant=variant,
        lr_scale=lr_scale,
        ema_decay=ema_decay,
        layer_adaptation=layer_adaptation,
        lazy=lazy,
        maximize=maximize,
        rounding=rounding,
    )
    call = Call(list(params), list(grads), list(rows), list(cols), list(vectors), list(moments), list(averages))
    call.group_of, call.ids = [0] * len(call.params), list(ids)
    call.steps, call.rms, call.lr, call.options = steps, rms, op_lr([lr]), options
    call.grad_scale, call.found_inf = grad_scale, found_inf
    call.max_grad_norm, call.skip_nonfinite, call.seed = max_grad_norm, skip_nonfinite, seed
    for name, tensors in (("params", params), ("grads", grads)):
        for tensor in tensors:
            check_dtype(tensor, name)
    with torch.no_grad():
        call.run()


class Adafactor(FactoredOptimizer):
    r"""Adafactor with the interface of transformers.optimization.Adafactor, its checkpoints and its AdafactorSchedule.

    Same arguments, defaults and state (step, exp_avg_sq_row, exp_avg_sq_col, exp_avg_sq, exp_avg, RMS), so checkpoints
    go both ways. The formulas: :func:`adafactor_step_`. A step of all parameters is one call; step counts live on the
    device of the parameters and nothing waits for them, so that it can be captured in a CUDA graph.

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = fastnlp_ops.Adafactor(model.parameters(), lr=1e-3, relative_step=False, scale_parameter=False)
        >>> model(torch.randn(5, 3)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["exp_avg_sq_row"].shape
        torch.Size([2])

    Args:
        params (iterable): parameters or groups of them; groups may differ in every option up to ema_decay. As in
            transformers a group with relative_step makes no use of lr, one without it none of warmup_init.
        lr (float or Tensor): learning rate; None with relative_step.
        eps (tuple): (eps1, eps2): added to squared gradients, and the least RMS that scales a step.
        clip_threshold (float): largest RMS of an update before the learning rate; None: any.
        decay_rate (float): the second moment forgets by beta2 = 1 - t^decay_rate.
        beta1 (float): decay of the momentum; None: no momentum, and no memory for it.
        weight_decay (float): in each step a parameter shrinks by weight_decay times its learning rate.
        scale_parameter (bool): the learning rate is relative to the RMS of the parameter.
        relative_step (bool): the learning rate is min(1e-2, 1 / sqrt(t)).
        warmup_init (bool): the learning rate is min(1e-6 t, 1 / sqrt(t)).
        maximize (bool): go up the gradient.
        capturable (bool): GradScaler hands its scale to the step and nothing waits for the device; trainers that clip
            unscaled gradients refuse that. A step can be captured without it, too. A learning rate that is to change
            between replays is a tensor on the device.
        rounding (str): "stochastic": bfloat16 and float16 parameters are rounded up or down at random with the right
            mean, so that steps below half a unit in the last place are not lost. The same on every device and path.
        layer_adaptation (bool): every parameter's step is as long as its learning rate times the norm of the parameter.
        lazy (bool): rows of matrices whose gradient is zero keep their value: embeddings of words that did not occur.
        ema_decay (float): keep a moving average of the weights, see :meth:`averaged_weights`; None: none.
        skip_nonfinite (bool): a step with NaN or infinity (or a square beyond float32) in any gradient is left out.
        max_grad_norm (float): gradients, as one vector, are scaled down to this length; p.grad keeps its values.
        accumulation_steps (int): only every so many calls of step() update, with the mean of their gradients. Each call
            takes the gradients (p.grad is None after it) into sums of their size, so that no zero_grad() loses them.
            state_dict() has sums that wait in it; torch.distributed.checkpoint leaves them out and is for other times.

    Raises:
        ValueError: for options that exclude each other or are out of range.
        TypeError: for a dtype of a parameter that is not float32, float64, float16 or bfloat16.
        RuntimeError: as transformers', for a sparse gradient, and for a complex parameter.

    Precision:
        State and maths in float32 (float64 for float64 parameters), for half-precision parameters and after
        load_state_dict, too. Bitwise repeatable, with any number of threads.

    References:
        Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost" (ICML 2018, arXiv
        1804.04235). You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes" (ICLR 2020,
        arXiv 1904.00962), for layer_adaptation.
    """

    row_key: ClassVar[str] = "exp_avg_sq_row"
    col_key: ClassVar[str] = "exp_avg_sq_col"
    vector_key: ClassVar[str] = "exp_avg_sq"
    rms_key: ClassVar[str | None] = "RMS"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float | None = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        rounding: str = "nearest",
        layer_adaptation: bool = False,
        lazy: bool = False,
        ema_decay: float | None = None,
        skip_nonfinite: bool = False,
        max_grad_norm: float | None = None,
        accumulation_steps: int = 1,
    ) -> None:
        if lr is not None and relative_step:
            raise ValueError("Cannot combine manual `lr` and `relative_step=True` options")
        if warmup_init and not relative_step:
            raise ValueError("`warmup_init=True` requires `relative_step=True`")
        check_options({"max_grad_norm": max_grad_norm, "accumulation_steps": accumulation_steps})
        self.skip_nonfinite, self.max_grad_norm = skip_nonfinite, max_grad_norm
        self.accumulation_steps = accumulation_steps
        defaults = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
            "maximize": maximize,
            "capturable": capturable,
            "rounding": rounding,
            "layer_adaptation": layer_adaptation,
            "lazy": lazy,
            "ema_decay": ema_decay,
        }
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        """ValueError for an option of a group that is out of its range."""
        for name in ("skip_nonfinite", "max_grad_norm", "accumulation_steps"):
            if name in group:
                raise ValueError(f"{name} must be an argument of Adafactor, it is of all groups at once")
        if group["lr"] is None and not group["relative_step"]:
            raise ValueError("lr must be given where relative_step is off, got None")
        check_options(group)

    def factor_shapes(self, shape: torch.Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """As transformers keeps them."""
        return tuple(shape[:-1]), (*shape[:-2], shape[-1])

    def group_options(self, group: dict[str, Any], dtype: torch.dtype) -> list[float]:  # noqa: ARG002
        """The group as the op knows it."""
        names = (
            *("eps", "clip_threshold", "decay_rate", "beta1", "weight_decay", "scale_parameter", "relative_step"),
            *("warmup_init", "maximize", "rounding", "layer_adaptation", "lazy", "ema_decay"),
        )
        return op_options(**{name: group[name] for name in names}, lr_scale=group.get("lr_scale", 1.0))

    def state_dict(self) -> dict[str, Any]:
        """As torch's; step counts are integers, as in transformers' checkpoints."""
        result = super().state_dict()
        for key, values in result["state"].items():
            if isinstance(values, dict) and "step" in values:
                result["state"][key] = values | {"step": int(values["step"])}
        return result

    @staticmethod
    def _get_lr(param_group: dict[str, Any], param_state: dict[str, Any]) -> float:
        """Learning rate of the last step, before the first one without the parameter's scale; for AdafactorSchedule."""
        step = max(1.0, float(param_state.get("step", 1)))
        lr = param_group["lr"]
        if param_group["relative_step"]:
            lr = min(1e-6 * step if param_group["warmup_init"] else 1e-2, 1 / math.sqrt(step))
        if param_group["scale_parameter"] and "RMS" in param_state:
            lr = lr * max(param_group["eps"][1], float(param_state["RMS"]))
        return float(lr) * param_group.get("lr_scale", 1.0)


def adafactor_in_backward(model: nn.Module, **options: Any) -> Adafactor:
    """Adafactor that updates each parameter of a model within backward, and frees its gradient at once.

    No two gradients of the model need to be in memory together. The optimizer is there for its state, its checkpoints
    and for schedules of its learning rate; its step() has nothing to do. Every parameter is updated as soon as its
    gradient is complete, to the bit as by a step after backward.

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = fastnlp_ops.adafactor_in_backward(model, lr=1e-3, relative_step=False)
        >>> model(torch.randn(5, 3)).sum().backward()  # and optimizer.step(), and optimizer.zero_grad()
        >>> model.weight.grad is None, int(optimizer.state[model.weight]["step"])
        (True, 1)

    Args:
        model (Module): all its parameters that require a gradient are optimized.
        options (dict): as :class:`Adafactor`, without those that need all gradients at once: max_grad_norm,
            skip_nonfinite and accumulation_steps.

    Returns:
        Adafactor: the optimizer.

    Raises:
        ValueError: for an option that needs all gradients at once.
        RuntimeError: in backward, for a layer that two reentrant checkpoints share: its gradient comes in two parts.
            Others (use_reentrant=False) give it whole. With reentrant ones step() has to follow each backward pass.
    """
    for name in ("max_grad_norm", "skip_nonfinite", "accumulation_steps"):
        if name in options:
            raise ValueError(f"{name} must be left out, it needs all gradients at once, got {options[name]!r}")
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = Adafactor(params, **options)
    updated = optimizer._in_backward = {}

    def update(p: Tensor, index: int) -> None:
        nested = _in_nested_backward()
        if index in updated and (nested or updated[index]):
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} gets a second gradient within one backward pass, because "
                "reentrant checkpoints share it, or step() has not been called since the last pass: use "
                "checkpoint(..., use_reentrant=False), and call step() after each backward()"
            )
        updated[index] = nested
        with torch.no_grad():
            optimizer._update_in_backward(index, p)
        p.grad = None

    for index, p in enumerate(params):
        p.register_post_accumulate_grad_hook(lambda p, index=index: update(p, index))
    return optimizer


def _in_nested_backward() -> bool:
    """Whether backward() has been called by the backward of a custom function, as reentrant checkpoints do."""
    frame, nested = inspect.currentframe(), False
    while frame := frame and frame.f_back:
        if frame.f_code is BackwardCFunction.apply.__code__ and nested:
            return True
        nested = nested or frame.f_code is torch.autograd.backward.__code__
    return False
