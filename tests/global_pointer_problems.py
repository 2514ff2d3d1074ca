"""Random GlobalPointer problems in every layout, and the functions over them."""

import dataclasses
import math

import torch
from crf_problems import make_mask
from tools import assert_same, assert_within_budget, rounding_level

import fastnlp_ops
from fastnlp_ops import reference
from fastnlp_ops.reference import global_pointer as reference_module

CASES = {
    "aligned": {"B": 2, "n": 64, "H": 3, "d": 64},
    "ragged": {"B": 5, "n": 23, "H": 4, "d": 16, "mask": "prefix"},
    "left": {"B": 4, "n": 37, "H": 2, "d": 8, "mask": "left"},
    "prime": {"B": 3, "n": 31, "H": 5, "d": 6, "mask": "holes"},
    "efficient": {"B": 4, "n": 29, "H": 7, "d": 16, "shared": True, "mask": "holes"},
    "biased": {"B": 3, "n": 17, "H": 3, "d": 4, "bias": True, "mask": "prefix"},
    "one": {"B": 1, "n": 1, "H": 1, "d": 2},
    "one_channel": {"B": 2, "n": 9, "H": 3, "d": 1, "rope": False, "mask": "holes"},
    "odd": {"B": 2, "n": 19, "H": 2, "d": 7, "rope": False, "mask": "holes"},
    "relations": {"B": 3, "n": 21, "H": 4, "d": 10, "rope": False, "tril_mask": False, "mask": "prefix"},
    "all_pairs": {"B": 2, "n": 33, "H": 3, "d": 12, "tril_mask": False, "mask": "holes", "shared": True},
    "band": {"B": 3, "n": 70, "H": 2, "d": 8, "max_span_length": 5, "mask": "holes"},
    "band_of_one": {"B": 2, "n": 20, "H": 2, "d": 8, "max_span_length": 1},
    "band_of_pairs": {"B": 2, "n": 45, "H": 3, "d": 8, "max_span_length": 9, "tril_mask": False, "shared": True},
    "band_longer": {"B": 2, "n": 12, "H": 2, "d": 8, "max_span_length": 99},
    "positions": {"B": 3, "n": 18, "H": 3, "d": 8, "positions": True, "mask": "holes"},
    "scaled": {"B": 2, "n": 15, "H": 2, "d": 8, "scale": -0.3, "mask": "left"},
    "mask_zero": {"B": 3, "n": 14, "H": 3, "d": 8, "mask_zero": True, "mask": "prefix"},
    "no_sequence": {"B": 0, "n": 6, "H": 3, "d": 4},
    "no_token": {"B": 2, "n": 0, "H": 3, "d": 4, "shared": True},
    "no_label": {"B": 2, "n": 11, "H": 2, "d": 4, "labels": 0},
    "many_labels": {"B": 2, "n": 12, "H": 3, "d": 4, "labels": 400, "tril_mask": False},
    "peaked": {"B": 2, "n": 40, "H": 3, "d": 16, "std": 4.0, "mask": "holes"},
    "uneven": {"B": 1, "n": 250, "H": 3, "d": 8, "bias": True, "std": 5.0, "labels": 90, "mask": "holes"},
    "many_heads": {"B": 2, "n": 9, "H": 100, "d": 8, "shared": True, "mask": "prefix"},
    "wide": {"B": 2, "n": 33, "H": 2, "d": 256, "mask": "prefix"},
    "long": {"B": 1, "n": 301, "H": 2, "d": 20, "mask": "holes"},
}


@dataclasses.dataclass
class Problem:
    """Arguments of one GlobalPointer call; `second` is the other pass of a divergence."""

    q: torch.Tensor
    k: torch.Tensor
    start_bias: torch.Tensor | None
    end_bias: torch.Tensor | None
    labels: torch.Tensor
    second: tuple  # q, k and the biases of a second pass
    mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    rope: bool = True
    tril_mask: bool = True
    max_span_length: int | None = None
    scale: float | None = None
    mask_zero: bool = False

    @property
    def inputs(self):
        """The differentiable arguments: the first pass, then the second."""
        return self.q, self.k, self.start_bias, self.end_bias, *self.second

    @property
    def cells(self):
        """Which cells take part."""
        names = ("mask", "position_ids", "rope", "tril_mask", "max_span_length", "scale")
        return {name: getattr(self, name) for name in names}

    @property
    def options(self):
        """Everything behind q and k."""
        return {"start_bias": self.start_bias, "end_bias": self.end_bias, **self.cells}

    @property
    def heads(self):
        return self.q.shape[2] if self.start_bias is None else self.start_bias.shape[2]

    @property
    def valid(self):
        """Cells that take part, bool [B, H, n, n], cell by cell as the documentation says it."""
        B, n = self.q.shape[:2]
        valid = torch.zeros(B, n, n, dtype=torch.bool)
        on = torch.ones(B, n, dtype=torch.bool) if self.mask is None else (self.mask != 0).cpu()
        for b in range(B):
            for i in range(n):
                for j in range(n):
                    near = self.max_span_length is None or abs(i - j) < self.max_span_length
                    valid[b, i, j] = on[b, i] and on[b, j] and near and (j >= i or not self.tril_mask)
        return valid[:, None].expand(B, self.heads, n, n).to(self.q.device)

    def with_inputs(self, *inputs):
        names = ("q", "k", "start_bias", "end_bias")
        return dataclasses.replace(self, **dict(zip(names, inputs[:4], strict=True)), second=tuple(inputs[4:]))

    def to(self, dtype):
        """The same values in another dtype; from half precision to float32 and float64 without loss."""
        return self.with_inputs(*(None if x is None else x.detach().to(dtype) for x in self.inputs))

    def leaves(self, dtype=None):
        """A copy whose inputs ask for gradients, and those inputs."""
        copy = self.with_inputs(*(None if x is None else x.detach().clone() for x in self.inputs))
        copy = copy if dtype is None else copy.to(dtype)
        leaves = [x for x in copy.inputs if x is not None]
        for leaf in leaves:
            leaf.requires_grad_()
        return copy, leaves


def make_labels(B, H, n, count, device="cpu"):
    """Random cells [B, H, count, 2], some of them twice, about a third of them padding."""
    if n == 0:
        return torch.full((B, H, count, 2), -1, device=device)
    labels = torch.randint(0, n, (B, H, count, 2))
    if count > 2:
        labels[:, :, 1] = labels[:, :, 0]
    labels[torch.rand(B, H, count) < 0.3] = -1
    return labels.to(device)


def make_problem(
    B,
    n,
    H,
    d,
    device="cpu",
    dtype=torch.float32,
    *,
    shared=False,
    bias=False,
    mask=None,
    positions=False,
    labels=4,
    std=1.0,
    poison=True,
    **options,
):
    """Random projections; `shared`: one q and k for all heads. What masked tokens hold is NaN."""

    def draw(*shape):
        return std * torch.randn(shape, dtype=torch.float64)

    on = make_mask(mask, B, n) if mask is not None else None

    def one_pass():
        q, k = draw(B, n, 1 if shared else H, d), draw(B, n, 1 if shared else H, d)
        start, end = (draw(B, n, H), draw(B, n, H)) if shared or bias else (None, None)
        if on is not None and poison:
            for x in (q, k, start, end):
                if x is not None:
                    x[~on] = math.nan
        return [None if x is None else x.to(device, dtype) for x in (q, k, start, end)]

    return Problem(
        *one_pass(),
        make_labels(B, H, n, labels, device),
        tuple(one_pass()),
        None if on is None else on.to(device),
        torch.randint(-50, 3000, (B, n)).to(device) if positions else None,
        **options,
    )


def problem_of(scores, labels=None, **options):
    """A problem whose scores are these [B, H, n, n], to the bit: k is the identity, so dq is the gradient of scores."""
    B, H, n, _ = scores.shape
    k = torch.eye(n, dtype=scores.dtype, device=scores.device)[None, :, None].expand(B, n, H, n)
    q = scores.transpose(1, 2)
    if labels is None:
        labels = torch.full((0, 4), -1, device=scores.device)
    return Problem(q, k, None, None, labels, (q, k, None, None), rope=False, scale=1.0, **options)


def scores(module, problem):
    return module.global_pointer_scores(problem.q, problem.k, **problem.options)


def loss(module, problem, reduction="none"):
    return module.global_pointer_loss(
        problem.q,
        problem.k,
        problem.labels,
        **problem.options,
        reduction=reduction,
        mask_zero=problem.mask_zero,
    )


def divergence(module, problem, reduction="none"):
    q2, k2, start2, end2 = problem.second
    return module.global_pointer_divergence(
        problem.q,
        problem.k,
        q2,
        k2,
        start_bias1=problem.start_bias,
        end_bias1=problem.end_bias,
        start_bias2=start2,
        end_bias2=end2,
        **problem.cells,
        reduction=reduction,
    )


def decode(module, problem, **options):
    return module.global_pointer_decode(problem.q, problem.k, **problem.options, **options)


FUNCTIONS = [scores, loss, divergence]
INPUTS = ["q", "k", "start_bias", "end_bias", "q2", "k2", "start_bias2", "end_bias2"]


def used(function, problem):
    """How many of the leaves a function reads: only a divergence has a second pass."""
    passes = sum(x is not None for x in problem.inputs)
    return passes if function is divergence else passes // 2


def gradients(function, module, problem, dtype=None, weights=None):
    """Gradients of the inputs of `problem` for the upstream gradient `weights`."""
    problem, leaves = problem.leaves(dtype)
    output = function(module, problem)
    leaves = leaves[: used(function, problem)]
    return torch.autograd.grad(output, leaves, weights.to(output.dtype), materialize_grads=True)


def compute_dtype(problem):
    return torch.float64 if problem.q.dtype == torch.float64 else torch.float32


def check_forward(function, problem, floor=0.0):
    """`floor`: of the rounding level."""
    actual = function(fastnlp_ops, problem)
    assert actual.dtype == (problem.q.dtype if function is scores else compute_dtype(problem))
    plain = function(reference, problem.to(torch.float32))
    exact = function(reference, problem.to(torch.float64))
    assert_within_budget(actual, plain, exact, function.__name__, floor)
    assert (actual >= 0).all() or function is scores


def check_backward(function, problem, floor=0.0):
    # Every row has its own upstream gradient, of any sign; the first has none.
    exact = function(reference, problem.to(torch.float64))
    weights = torch.randn(exact.shape, device=exact.device)
    weights[:1] = 0
    if function is scores:  # what flows back into cells that are not valid must not be read
        weights[exact == -math.inf] = math.nan
    ours = gradients(function, fastnlp_ops, problem, None, weights)
    plain = gradients(function, reference, problem, torch.float32, weights)
    exact = gradients(function, reference, problem, torch.float64, weights)
    names = [name for name, x in zip(INPUTS, problem.inputs, strict=True) if x is not None]
    level = max(floor, *(rounding_level(*pair) for pair in zip(plain, exact, strict=True)))
    for name, *results in zip(names, ours, plain, exact, strict=False):
        assert_within_budget(*results, f"d{name} of {function.__name__}", level)
    for x, own in zip((x for x in problem.inputs if x is not None), ours, strict=False):
        assert own.dtype == x.dtype
        assert not own[x.isnan()].any(), "masked tokens have gradients of exactly 0"


def check_decode(problem, **options):
    """Found spans are those of the reference, but where float32 rounds a score to the other side of the threshold."""
    threshold = options.get("threshold", 0.0)
    spans, found = decode(fastnlp_ops, problem, threshold=threshold)
    exact = scores(reference, problem.to(torch.float64))
    finite = exact[exact.isfinite()]
    near = 1e-5 * max(1.0, finite.abs().max().item()) if finite.numel() else 0.0
    hit = torch.zeros(exact.shape, dtype=torch.bool, device=exact.device)
    hit[spans.unbind(1)] = True
    assert spans.dtype == torch.int64 and found.dtype == compute_dtype(problem)
    assert torch.equal(hit.nonzero(), spans), "sorted, and every span once"
    wrong = (hit != (exact > threshold)) & ((exact - threshold).abs() > near)
    assert not wrong.any(), f"{int(wrong.sum())} wrong spans, first {wrong.nonzero()[0].tolist()}"
    assert ((found.double() - exact[spans.unbind(1)]).abs() <= near).all()
    # flat and top_k choose among our own scores, exactly
    keep = torch.ones(len(spans), dtype=torch.bool, device=spans.device)
    if not options.get("nested", True):
        keep = reference_module.flat_spans(spans, found)
    chosen, chosen_scores = spans[keep], found[keep]
    if options.get("top_k") is not None:
        keep = reference_module.best_spans(chosen, chosen_scores, options["top_k"])
        chosen, chosen_scores = chosen[keep], chosen_scores[keep]
    ours, our_scores = decode(fastnlp_ops, problem, **options)
    assert torch.equal(ours, chosen)
    assert torch.equal(our_scores, chosen_scores)
    return spans


def outputs(problem, leaves=None):
    """Everything that the family computes of one problem: values, gradients by its inputs or by `leaves`, spans."""
    if leaves is None:
        problem, leaves = problem.leaves()
    results = []
    for function in FUNCTIONS:
        value = function(fastnlp_ops, problem)
        results.append(value.detach())
        finite = torch.where(value.isfinite(), value, 0).double()
        results += torch.autograd.grad(finite.sin().sum(), leaves, allow_unused=True, materialize_grads=True)
    for options in ({}, {"nested": False}, {"top_k": 5}):
        results += decode(fastnlp_ops, problem, **options)
    return results


def assert_all_same(ours, expected, what="result"):
    for index, (own, plain) in enumerate(zip(ours, expected, strict=True)):
        assert_same(own, plain, f"{what} {index}")
