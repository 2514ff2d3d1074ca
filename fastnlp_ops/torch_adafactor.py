"""Adafactor with the interface and the formulas of torch.optim.Adafactor."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastnlp_ops._adafactor_call import check_options, op_options
from fastnlp_ops._adafactor_engine import FactoredOptimizer


class TorchAdafactor(FactoredOptimizer):
    r"""Adafactor with the interface of torch.optim.Adafactor, its formulas and its checkpoints.

    .. math::
        R \leftarrow \beta R + (1 - \beta) \overline{g^2}^{\,j}, \quad
        C \leftarrow \beta C + (1 - \beta) \overline{g^2}^{\,i}, \quad
        u = g / \sqrt{\max(R C / \max(\overline R, \epsilon_1), \epsilon_1^2)}, \quad
        p \leftarrow (1 - \gamma \lambda) p - \alpha \frac{u}{\max(1, \mathrm{RMS}(u) / d)}

    with alpha = min(lr, 1 / sqrt(t)) max(eps2, RMS(p)). The state has torch's names and shapes (step, row_var, col_var,
    variance). What differs: it is float32 for half-precision parameters, so that they train (torch's eps of bfloat16,
    0.0078, takes the place of the root of V, and sums of bfloat16 stand still), and eps = (None, ...) means the
    precision of that dtype for each parameter by itself.

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> ours, theirs = (torch.nn.Parameter(torch.arange(6.0).view(2, 3)) for _ in range(2))
        >>> ours.grad = theirs.grad = torch.randn(2, 3)
        >>> fastnlp_ops.TorchAdafactor([ours]).step()
        >>> torch.optim.Adafactor([theirs]).step()
        >>> torch.allclose(ours, theirs, atol=1e-6)
        True

    Args:
        params (iterable): parameters or groups of them.
        lr (float or Tensor): weight decay, and the most that the relative step size is.
        beta2_decay (float): the second moment forgets by beta2 = 1 - t^beta2_decay.
        eps (tuple): (eps1, eps2): least root of the second moment, None for the precision of the dtype of the maths,
            and the least RMS that scales a step.
        d (float): largest RMS of an update before the learning rate.
        weight_decay (float): in each step a parameter shrinks by lr weight_decay.
        foreach (bool): for torch's interface; all parameters are updated by one call in any case.
        maximize (bool): go up the gradient.

    Raises:
        ValueError: for an option out of its range, in torch's words.
        TypeError: for a dtype of a parameter that is not float32, float64, float16 or bfloat16.
        RuntimeError: as torch's, for a sparse gradient or a complex parameter.

    Precision:
        State and maths in float32 (float64 for float64 parameters). Bitwise repeatable, with any number of threads.

    References:
        Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost" (ICML 2018, arXiv
        1804.04235).
    """

    row_key: ClassVar[str] = "row_var"
    col_key: ClassVar[str] = "col_var"
    vector_key: ClassVar[str] = "variance"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "d": d,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        """ValueError for an option of a group that is out of its range."""
        lr, eps, d = group["lr"], group["eps"], group["d"]
        beta2_decay, weight_decay = group["beta2_decay"], group["weight_decay"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not isinstance(lr, Tensor) and not (lr is not None and lr >= 0.0):  # the value of a tensor may be on a GPU
            raise ValueError(f"Learning rate should be >= 0 but is: {lr}")
        if not beta2_decay <= 0.0:
            raise ValueError(f"beta2_decay should be <= 0 but is: {beta2_decay}")
        if not isinstance(eps, tuple | list) or len(eps) != 2:
            raise ValueError(f"eps should be two numbers but is: {eps}")
        if eps[0] is not None and not eps[0] >= 0.0:
            raise ValueError(f"epsilon1 should be >= 0 but is: {eps[0]}")
        if not eps[1] >= 0.0:
            raise ValueError(f"epsilon2 should be >= 0 but is: {eps[1]}")
        if not d >= 1.0:
            raise ValueError(f"Clipping threshold d should be >= 1 but is: {d}")
        if not weight_decay >= 0.0:
            raise ValueError(f"weight_decay should be >= 0 but is: {weight_decay}")
        check_options({"lr_scale": group.get("lr_scale", 1.0)})

    def factor_shapes(self, shape: torch.Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """As torch keeps them."""
        return (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])

    def group_options(self, group: dict[str, Any], dtype: torch.dtype) -> list[float]:
        """The group as the op knows it."""
        eps1, eps2 = group["eps"]
        return op_options(
            variant="torch",
            eps=(torch.finfo(dtype).eps if eps1 is None else eps1, eps2),
            clip_threshold=group["d"],
            decay_rate=group["beta2_decay"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            lr_scale=group.get("lr_scale", 1.0),
        )

    def state_dict(self) -> dict[str, Any]:
        """As torch's; step counts are on the CPU, as in torch's checkpoints."""
        result = super().state_dict()
        for key, values in result["state"].items():
            if isinstance(values, dict) and "step" in values:
                step = torch.as_tensor(values["step"], dtype=torch.float32).to("cpu", copy=True)
                result["state"][key] = values | {"step": step}
        return result
