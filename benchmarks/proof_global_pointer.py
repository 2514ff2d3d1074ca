"""What bench_global_pointer needs beside times: inputs, float64 truth for any shape, hostile inputs, every op once."""

import itertools
import math
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

import fastnlp_ops
from benchmarks.harness import OURS, Accuracy
from fastnlp_ops import reference

FORWARD, TRAIN = "forward", "forward+backward"
EFFICIENT, EFFICIENT_TRAIN = "Efficient forward", "Efficient forward+backward"
DECODE, QUARTER = "decode", "decode a quarter"
LABELS = 4  # of a sequence and head
SHIFTS = {DECODE: 4.0, QUARTER: 0.6745}  # standard deviations of the scores below 0: some spans in 100,000, a quarter


class Inputs:
    """What the providers of a case share; what a pass does not need is not made."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: str, device: str, ragged: bool) -> None:
        B, n, H, _ = self.shape = shape
        self.dtype, self.device = getattr(torch, dtype), device
        self.lengths = torch.full((B,), n, device=device)
        if ragged:  # the mean is 54 of 128
            self.lengths = torch.randint(max(LABELS, n // 32), 13 * n // 16 + 1, (B,), device=device)
        self.mask = (torch.arange(n, device=device) < self.lengths[:, None]).long()
        # Distinct spans of at most 8 tokens: bert4torch's sparse loss counts twice what is listed twice.
        keys = torch.rand(B, H, n, 8, device=device)
        last = torch.arange(n, device=device)[:, None] + torch.arange(8, device=device)
        keys.masked_fill_(last >= self.lengths[:, None, None, None], -1)
        chosen = keys.flatten(2).topk(LABELS).indices
        starts = chosen // 8
        self.spans = torch.stack([starts, starts + chosen % 8], -1)  # [B, H, P, 2]
        self.flat = self.spans[..., 0] * n + self.spans[..., 1]  # [B, H, P]

    @cached_property
    def dense(self) -> Tensor:
        """int64 [B, H, n, n]."""
        B, n, H, _ = self.shape
        return (
            torch.zeros(B, H, n * n, dtype=torch.long, device=self.device).scatter(2, self.flat, 1).unflatten(2, (n, n))
        )

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    @cached_property
    def standard(self) -> tuple[Tensor, ...]:
        B, n, H, d = self.shape
        return (self.draw(B, n, H, 2, d).requires_grad_(),)

    @cached_property
    def efficient(self) -> tuple[Tensor, ...]:
        B, n, H, d = self.shape
        return self.draw(B, n, 1, 2, d).requires_grad_(), self.draw(B, n, H, 2).requires_grad_()

    @cached_property
    def shifted(self) -> dict[str, Tensor]:
        """Projections whose scores lie below 0: the channels that RoPE hardly turns are opposite in q and k."""
        found = {}
        for name, shift in SHIFTS.items():
            projection = self.standard[0].detach().clone()
            far = math.sqrt(shift * math.sqrt(self.shape[-1]))
            projection[..., -2:] = torch.tensor([[far, 0.0], [-far, 0.0]], device=self.device)
            found[name] = projection
        return found

    def leaves(self, pass_name: str) -> tuple[Tensor, ...]:
        """The projection [B, n, H or 1, 2, d] and, of Efficient GlobalPointer, the biases [B, n, H, 2]."""
        if pass_name in SHIFTS:
            return (self.shifted[pass_name],)
        return self.efficient if pass_name in (EFFICIENT, EFFICIENT_TRAIN) else self.standard

    def decodable(self, pass_name: str) -> tuple[Tensor, Tensor]:
        return self.shifted[pass_name].unbind(3)

    def tensors(self) -> Iterator[Tensor]:
        return (x for x in vars(self).values() if isinstance(x, Tensor))


def turned(x: Tensor, back: bool = False) -> Tensor:
    """RoPE of [n, d] in float64."""
    n, d = x.shape
    theta = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64, device=x.device) / d)
    turn = torch.polar(torch.ones_like(theta), torch.arange(n, device=x.device)[:, None] * theta)
    pairs = torch.view_as_complex(x.double().reshape(n, d // 2, 2).contiguous())
    return torch.view_as_real(pairs * (turn.conj() if back else turn)).flatten(1)


def rows(inputs: Inputs, pass_name: str) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
    """(b, h, q, k, scores) of every row in float64: turned q and k [length, d] and scores [length, length], -inf below
    the diagonal. One row at a time: all of them would not fit for large shapes."""
    projection, *bias = (leaf.detach().double() for leaf in inputs.leaves(pass_name))
    for b, h in itertools.product(range(inputs.shape[0]), range(inputs.shape[2])):
        n = int(inputs.lengths[b])
        q, k = (turned(x) for x in projection[b, :n, h if projection.shape[2] > 1 else 0].unbind(1))
        scores = q @ k.t() / math.sqrt(inputs.shape[-1])
        if bias:
            scores += bias[0][b, :n, h, :1] / 2 + bias[0][b, :n, h, 1] / 2
        scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).tril_(-1), -math.inf)
        yield b, h, q, k, scores


def closed_form(inputs: Inputs, pass_name: str) -> tuple[Tensor, ...]:
    """The mean loss and its gradients by the leaves, in float64; tests/test_benchmarks.py compares it with autograd."""
    leaves = [leaf.detach().double() for leaf in inputs.leaves(pass_name)]
    gradients = [torch.zeros_like(leaf) for leaf in leaves]
    scale, count = inputs.shape[-1] ** -0.5, inputs.shape[0] * inputs.shape[2]
    total = torch.zeros((), dtype=torch.float64, device=leaves[0].device)
    zero = torch.zeros_like(total[None])
    for b, h, q, k, scores in rows(inputs, pass_name):
        n = len(scores)
        at = inputs.spans[b, h].unbind(1)
        labelled = scores[at]
        scores[at] = -math.inf
        log_negative = torch.logsumexp(torch.cat([scores.flatten(), zero]), 0)
        log_positive = torch.logsumexp(torch.cat([-labelled, zero]), 0)
        total += (log_negative + log_positive) / count
        dscores = scores.sub_(log_negative).exp_()
        dscores[at] = -(-labelled - log_positive).exp()
        dscores /= count
        own = gradients[0][b, :n, h if leaves[0].shape[2] > 1 else 0]  # [length, 2, d]
        own[:, 0] += scale * turned(dscores @ k, back=True)
        own[:, 1] += scale * turned(dscores.t() @ q, back=True)
        if len(leaves) > 1:
            gradients[1][b, :n, h] = torch.stack([dscores.sum(1), dscores.sum(0)], 1) / 2
    return (total, *gradients)


def span_errors(inputs: Inputs, pass_name: str, spans: Tensor) -> dict[str, Tensor]:
    """By how much a span that was not found is above the threshold, and one that was found below it; inf where spans
    are not sorted or listed twice."""
    spans = spans.to(inputs.device)
    n, H = inputs.shape[1:3]
    keys = ((spans[:, 0] * H + spans[:, 1]) * n + spans[:, 2]) * n + spans[:, 3]
    worst = torch.zeros(2, dtype=torch.float64, device=inputs.device)
    if not (keys.diff() > 0).all():
        worst.fill_(math.inf)
    cuts = torch.arange(inputs.shape[0] * H + 1, device=inputs.device) * n * n
    bounds = torch.searchsorted(keys, cuts).tolist()
    for b, h, _, _, scores in rows(inputs, pass_name):
        row = b * H + h
        start, end = spans[bounds[row] : bounds[row + 1], 2:].unbind(1)
        found = torch.zeros_like(scores, dtype=torch.bool)
        found[start, end] = True
        missed = torch.where(found, -math.inf, scores).max()
        wrong = torch.where(found, -scores, -math.inf).max()
        worst = torch.maximum(worst, torch.stack([missed, wrong]))
    return {"spans": worst}


def hostile(device: str) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, q, k [1, n, 1, d], labels [1, 1, P, 2]): where sums that cancel, and products that overflow, show."""
    n, d = 64, 16
    for score in (5.0, 12.0, 16.0, 30.0, 100.0):
        q = torch.full((1, n, 1, d), 0.25, device=device)
        k = torch.full((1, n, 1, d), -20.0, device=device)  # every score -20, without RoPE
        k[:, 40] = score
        yield f"label at {score:g}, others at -20", q, k, torch.tensor([[[[i, 40] for i in range(41)]]], device=device)
    q, k = (30 * torch.randn(2, 1, n, 1, d, device=device)).unbind(0)
    yield "scores of hundreds", q, k, torch.tensor([[[[3, 9], [0, 63], [5, 5]]]], device=device)


def accuracy(device: str) -> list[Accuracy]:
    """|L - float64| and its allowance, 1e-6 max(1, L); the worst gradient, and its, 1e-5 of the largest."""
    found = []
    for name, q, k, labels in hostile(device):
        exact = None
        for provider, functions, dtype in (("", reference, torch.float64), (OURS, fastnlp_ops, torch.float32)):
            leaves = [x.to(dtype).requires_grad_() for x in (q, k)]
            loss = functions.global_pointer_loss(*leaves, labels, rope=False)
            gradients = torch.stack(torch.autograd.grad(loss, leaves)).double()
            if exact is None:
                exact = loss.detach(), gradients
                continue
            error = (loss.double() - exact[0]).abs().item()
            found.append(Accuracy(f"{name}: loss", provider, error, 1e-6 * max(1.0, exact[0].item())))
            error = (gradients - exact[1]).abs().max().item()
            found.append(Accuracy(f"{name}: gradients", provider, error, 1e-5 * exact[1].abs().max().item()))
    return found


def exercise(device: str) -> None:
    """Every op once, forward and backward, over both forms and all options; small, because the sanitizers are slow."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for n, d in ((1, 2), (33, 64), (150, 16)):
            exercise_one(n, d, dtype, device)
    if device == "cuda":
        torch.cuda.synchronize()


def exercise_one(n: int, d: int, dtype: torch.dtype, device: str) -> None:
    B, H = 2, 3
    mask = torch.rand(B, n, device=device) < 0.8  # holes, left padding, perhaps an empty sequence
    labels = torch.randint(-1, n, (B, H, 5, 2), device=device)
    positions = torch.randint(0, 2 * n, (B, n), device=device)
    for shared in (False, True):

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(dtype).requires_grad_()

        q, k, other_q, other_k = (draw(B, n, 1 if shared else H, d) for _ in range(4))
        biases = [draw(B, n, H) for _ in range(4)] if shared else [None] * 4
        own = {"start_bias": biases[0], "end_bias": biases[1]}
        both = {f"{name}_bias{i + 1}": biases[2 * i + j] for i in (0, 1) for j, name in enumerate(("start", "end"))}
        for options in (
            {},
            {"mask": mask, "tril_mask": False, "position_ids": positions},
            {"mask": mask, "max_span_length": 7, "rope": False},
        ):
            fastnlp_ops.global_pointer_scores(q, k, **own, **options).nan_to_num(neginf=0).sum().backward()
            fastnlp_ops.global_pointer_loss(q, k, labels, **own, **options).backward()
            fastnlp_ops.global_pointer_loss(q, k, labels.clamp(min=0), **own, **options, mask_zero=True).backward()
            fastnlp_ops.global_pointer_divergence(q, k, other_q, other_k, **both, **options).backward()
            for more in ({}, {"nested": False}, {"top_k": 4}):
                fastnlp_ops.global_pointer_decode(q.detach(), k.detach(), **own, **options, **more)
