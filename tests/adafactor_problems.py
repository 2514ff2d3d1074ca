"""Problems of the Adafactor tests: shapes, options, and a run of several steps by the op or by its reference."""

import copy
from dataclasses import dataclass, field

import torch
from tools import assert_within_budget

from fastnlp_ops import reference

CASES = {
    "aligned": [(64, 32), (32,), (16, 16)],
    "ragged": [(33, 7), (5,), (3, 4, 5), (9, 40)],
    "prime": [(127, 61), (31,)],
    "one": [(1, 1), (1,), ()],
    "thin": [(1, 37), (37, 1), (37,)],
    "tails": [(5, n) for n in range(1, 10)] + [(n, 5) for n in range(1, 10)],
    "conv": [(6, 5, 3, 3), (2, 3, 7, 1), (4, 1, 1, 9)],
    "empty": [(0,), (0, 5), (5, 0), (2, 0, 3), (3, 4)],
    "long": [(700, 1031), (5000,)],
}
OPTIONS = {
    "default": {},
    "given_lr": {"lr": 1e-2, "relative_step": False, "scale_parameter": False},
    "scaled_lr": {"lr": 3e-2, "relative_step": False, "clip_threshold": None},
    "warmup": {"warmup_init": True, "scale_parameter": False},
    "momentum": {"beta1": 0.9, "weight_decay": 0.1, "clip_threshold": 0.3},
    "average": {"ema_decay": 0.7, "beta1": 0.5, "maximize": True},
    "layers": {"layer_adaptation": True, "weight_decay": 0.3, "lr": 0.1, "relative_step": False},
    "lazy": {"lazy": True, "weight_decay": 0.2, "lr_scale": 3.0, "decay_rate": -0.5},
    "norm": {"max_grad_norm": 0.5, "layer_adaptation": True, "beta1": 0.9},
    "torch": {"variant": "torch", "lr": 1e-2, "eps": (2.0**-23, 1e-3)},
    "torch_decay": {"variant": "torch", "lr": 0.3, "eps": (2.0**-23, 1e-3), "weight_decay": 0.1, "lr_scale": 0.5},
    "torch_clamp": {"variant": "torch", "lr": 1e-2, "eps": (0.3, 1e-3), "maximize": True},
    "torch_exact": {"variant": "torch", "lr": 1e-2, "eps": (0.0, 1e-3)},
}


@dataclass
class Run:
    """Parameters with the state of a number of steps."""

    params: list
    options: dict
    state_dtype: torch.dtype = torch.float32
    rows: list = field(default_factory=list)
    cols: list = field(default_factory=list)
    vectors: list = field(default_factory=list)

    def __post_init__(self):
        zeros = {"dtype": self.state_dtype, "device": self.params[0].device}
        for p in self.params:
            if p.dim() > 1:
                self.rows.append(torch.zeros(p.shape[:-1], **zeros))
                self.cols.append(torch.zeros(p.shape[:-2] + p.shape[-1:], **zeros))
            else:
                self.vectors.append(torch.zeros(p.shape, **zeros))
        self.moments = [torch.zeros(p.shape, **zeros) for p in self.params] if "beta1" in self.options else []
        self.averages = [p.to(self.state_dtype, copy=True) for p in self.params] if "ema_decay" in self.options else []
        self.steps, self.rms = (torch.zeros(len(self.params), device=self.params[0].device) for _ in range(2))
        self.largest = {}  # that each tensor held when it was seen: what that was rounded to stays in what follows

    def see(self):
        for name, x in self.tensors().items():
            size = x.abs().max().item() if x.numel() else 0.0
            self.largest[name] = max(size, self.largest.get(name, 0.0))

    def step(self, function, grads, **more):
        function(
            self.params,
            grads,
            self.rows,
            self.cols,
            self.vectors,
            self.steps,
            moments=self.moments,
            averages=self.averages,
            rms=self.rms,
            **(self.options | more),
        )
        return self

    def tensors(self):
        named = {"params": self.params, "rows": self.rows, "cols": self.cols, "vectors": self.vectors}
        named |= {"moments": self.moments, "averages": self.averages, "steps": [self.steps], "rms": [self.rms]}
        return {f"{name}[{k}]": x for name, values in named.items() for k, x in enumerate(values)}

    def copy(self):
        return copy.deepcopy(self)


def draw(shapes, device, dtype=torch.float32, scale=1.0):
    """Normal numbers; a tenth of the rows of matrices are zeros, as of words that do not occur."""
    tensors = [scale * torch.randn(shape, device=device) for shape in shapes]
    for x in tensors:
        if x.dim() > 1:
            x *= torch.rand(x.shape[:-1], device=device)[..., None] > 0.1
    return [x.to(dtype) for x in tensors]


def three_runs(shapes, options, device, steps=3, scale=1.0):
    """The op, the reference in float32 and the reference in float64 after the same gradients."""
    import fastnlp_ops

    params = [0.5 * torch.randn(shape, device=device) for shape in shapes]
    ours, plain = (Run([p.clone() for p in params], options) for _ in range(2))
    exact = Run([p.double() for p in params], options, torch.float64)
    exact.see()
    for _ in range(steps):
        grads = draw(shapes, device, scale=scale)
        ours.step(fastnlp_ops.adafactor_step_, grads)
        plain.step(reference.adafactor_step_, grads)
        exact.step(reference.adafactor_step_, [g.double() for g in grads])
        exact.see()
    return ours, plain, exact


def assert_runs_agree(ours, plain, exact, level=0.0, held=("moments",)):
    """Every tensor within the budget, in units of its own largest value; of the largest that it has held where its name
    starts with one of `held`: an average in which steps nearly cancel keeps the rounding of what they were."""
    for (name, a), b, c in zip(ours.tensors().items(), plain.tensors().values(), exact.tensors().values(), strict=True):
        size = c.double().abs().max().item() if c.numel() else 0.0
        if name.startswith(held):
            size = max(size, exact.largest.get(name, 0.0))
        size = size if 0 < size < float("inf") else 1.0
        assert_within_budget(
            a.double().div(size).to(a.dtype), (b.double() / size).float(), c.double() / size, name, level
        )
