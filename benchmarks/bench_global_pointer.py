"""GlobalPointer heads: loss, training step and decoding from the projections of q and k, against bert4torch's head.

All providers get the same leaf, the projection [B, n, H, 2, d] as a layer's Linear leaves it (bert4torch's head has its
Linear replaced by the identity), for Efficient GlobalPointer the shared projection [B, n, 1, 2, d] and the biases
[B, n, H, 2] before they are halved; and the int64 mask [B, n] that tokenizers give. Labels come to each loss in the
form that it takes, made before the clock starts: index pairs [B, H, P, 2] for ours, flat indices [B, H, P] for
bert4torch's sparse loss, int64 [B, H, n, n] for its dense loss as its examples make them, bool [B, H, n, n] for the
compiled head. Converting index pairs to what the kernel wants is ours to do, inside the timing.

Losses are means over sequences and heads. Decoding ends with (b, h, start, end) on the host, of a head that
finds few spans, as a trained one does, or a quarter of all; bert4torch's examples take `np.where` of the scores.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastnlp_ops
from benchmarks import bert4torch_heads
from benchmarks.harness import OURS, Case, Goal, Results, Work
from benchmarks.measure import Ceilings
from benchmarks.proof_global_pointer import (
    DECODE,
    EFFICIENT,
    EFFICIENT_TRAIN,
    FORWARD,
    QUARTER,
    TRAIN,
    Inputs,
    accuracy,
    closed_form,
    exercise,
    span_errors,
)
from fastnlp_ops import reference

__all__ = ["GOALS", "PEER_SLACK", "PROVIDERS", "accuracy", "cases", "exercise", "floor", "make_inputs", "truth"]

OPS = dict.fromkeys((FORWARD, TRAIN, EFFICIENT, EFFICIENT_TRAIN), "global_pointer_loss")
OPS |= dict.fromkeys((DECODE, QUARTER), "global_pointer_decode")
DENSE, SPARSE, WHERE, COMPILED = "bert4torch dense", "bert4torch sparse", "bert4torch np.where", "torch.compile"
EXPONENTIAL = 10  # multiply-adds of an exponential that is right to 1 ulp: 6 of a polynomial, 3 to reduce, 1 to scale

bert4torch = bert4torch_heads.load()


def make_inputs(shape: tuple[int, int, int, int], dtype: str, device: str, ragged: bool = False) -> Inputs:
    return Inputs(shape, dtype, device, ragged)


# Providers


def loss_work(loss: Callable[[], Tensor], case: Case, inputs: Inputs) -> Work:
    """The mean loss, and the gradients of the leaves where the pass has them."""
    if case.pass_name in (FORWARD, EFFICIENT):
        return Work(torch.no_grad()(loss), lambda value: {"loss": value.double()}, (), graph=True)
    leaves = inputs.leaves(case.pass_name)

    def run() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        value = loss()
        value.backward()
        return value

    def outputs(value: Tensor) -> dict[str, Tensor]:
        found = {"loss": value, **{f"d{name}": leaf.grad for name, leaf in zip(("projection", "bias"), leaves)}}  # noqa: B905
        return {name: tensor.double() for name, tensor in found.items()}

    return Work(run, outputs, [*leaves, *inputs.tensors()], graph=True)


def arguments(inputs: Inputs, pass_name: str) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """q, k and the biases as our functions take them: views of the leaves."""
    projection, *bias = inputs.leaves(pass_name)
    options = {"mask": inputs.mask}
    if bias:
        start, end = (bias[0] / 2).unbind(3)
        options |= {"start_bias": start, "end_bias": end}
    return projection.unbind(3), options


def provider(functions: Any) -> Callable[[Case, Inputs], Work]:
    """Ours and our reference, which share names."""

    def make(case: Case, inputs: Inputs) -> Work:
        if case.op == "global_pointer_decode":
            decode = partial(functions.global_pointer_decode, *inputs.decodable(case.pass_name), mask=inputs.mask)

            def spans() -> Tensor:
                return decode()[0].cpu()

            return Work(torch.no_grad()(spans), partial(span_errors, inputs, case.pass_name))

        def loss() -> Tensor:
            (q, k), options = arguments(inputs, case.pass_name)
            return functions.global_pointer_loss(q, k, inputs.spans, **options)

        return loss_work(loss, case, inputs)

    return make


class Given(nn.Module):
    """In place of a Linear: what it would have returned."""

    def __init__(self, value: Tensor | None = None) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return x if self.value is None else self.value


def peer_scores(inputs: Inputs, pass_name: str) -> Callable[[], Tensor]:
    """bert4torch's head from its projection on: [B, H, n, n]."""
    *_, heads, size = inputs.shape
    projection, *bias = inputs.leaves(pass_name)
    if bias:
        head = bert4torch.EfficientGlobalPointer(1, heads, size)
        head.p_dense, head.q_dense = Given(), Given(bias[0].flatten(2))
    else:
        head = bert4torch.GlobalPointer(1, heads, size)
        head.dense = Given()
    head = head.to(projection.device)
    return lambda: head(projection.flatten(2), inputs.mask)


def peer(labels_of: Callable[[Inputs], Tensor], loss_of: Callable[[], nn.Module]) -> Callable[[Case, Inputs], Work]:
    def make(case: Case, inputs: Inputs) -> Work:
        scores, labels, loss = peer_scores(inputs, case.pass_name), labels_of(inputs), loss_of()
        return loss_work(lambda: loss(scores().flatten(2), labels).mean(), case, inputs)

    return make


def peer_where(case: Case, inputs: Inputs) -> Work:
    scores = peer_scores(inputs, case.pass_name)

    def run() -> list[np.ndarray]:
        with torch.no_grad():
            return np.where(scores().cpu() > 0)

    return Work(run, lambda found: span_errors(inputs, case.pass_name, torch.from_numpy(np.stack(found, 1))))


def plain_loss(projection: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """GlobalPointer as a user would write it for torch.compile: bool labels [B, H, n, n], one select for the mask."""
    B, n, _, _, d = projection.shape
    angle = torch.arange(n, device=mask.device)[:, None] * 10000.0 ** (-torch.arange(0, d, 2, device=mask.device) / d)
    cos, sin = (x.repeat_interleave(2, -1)[:, None, None] for x in (angle.cos(), angle.sin()))
    swapped = torch.stack([-projection[..., 1::2], projection[..., ::2]], -1).flatten(-2)
    q, k = (projection * cos + swapped * sin).to(projection.dtype).unbind(3)
    scores = torch.einsum("bmhd,bnhd->bhmn", q * d**-0.5, k).float()
    on = mask.bool()
    valid = (on[:, :, None] & on[:, None, :]).triu()[:, None]
    zero = scores.new_zeros(B, scores.shape[1], 1)
    sums = []
    for exponents, chosen in ((scores, valid & ~labels), (-scores, valid & labels)):
        exponents = torch.where(chosen, exponents, -torch.inf).flatten(2)
        sums.append(torch.logsumexp(torch.cat([exponents, zero], -1), -1))
    return (sums[0] + sums[1]).mean()


def compiled(case: Case, inputs: Inputs) -> Work:
    torch._dynamo.reset()
    function, labels = torch.compile(plain_loss, fullgraph=True, dynamic=False), inputs.dense.bool()
    (projection,) = inputs.leaves(case.pass_name)
    return loss_work(lambda: function(projection, inputs.mask, labels), case, inputs)


PROVIDERS = {
    OURS: provider(fastnlp_ops),
    "reference": provider(reference),
    DENSE: peer(lambda inputs: inputs.dense.flatten(2), lambda: bert4torch.DenseLoss()) if bert4torch else None,
    SPARSE: peer(lambda inputs: inputs.flat, lambda: bert4torch.SparseLoss()) if bert4torch else None,
    WHERE: peer_where if bert4torch else None,
    COMPILED: compiled,
}


def cases(device: str, quick: bool) -> list[Case]:
    everyone = (OURS, "reference", DENSE, SPARSE, COMPILED)
    found = []

    def add(pass_name: str, shape: tuple[int, int, int, int], providers: tuple[str, ...], **more: Any) -> None:
        found.append(Case(OPS[pass_name], pass_name, shape, providers, **more))

    if quick:
        for pass_name in (FORWARD, TRAIN, EFFICIENT_TRAIN):
            add(pass_name, (2, 64, 3, 16), everyone[:-1], ragged=pass_name == TRAIN)
        add(DECODE, (2, 64, 3, 16), (OURS, "reference", WHERE))
        return found
    main = (16 if device == "cuda" else 4, 512, 10, 64)
    add(FORWARD, main, everyone)
    add(TRAIN, main, everyone)
    for n, batch in ((64, 16), (128, 16), (256, 8)):
        add(TRAIN, (batch, n, 10, 64), everyone)
    add(TRAIN, (16, 128, 10, 64), everyone, ragged=True)
    large = "dense tensors of many gigabytes left out"
    add(TRAIN, (1, 1024, 10, 64), (OURS, DENSE, SPARSE), note="reference and torch.compile left out")
    add(TRAIN, (1, 2048, 10, 64), (OURS, SPARSE), note=large)
    add(TRAIN, (1, 4096, 10, 64), (OURS, SPARSE), note=large)
    add(TRAIN, (4, 512, 1, 64), (OURS, "reference", DENSE, SPARSE), note="torch.compile left out")
    add(TRAIN, (4, 512, 40, 64), (OURS, SPARSE), note=large)
    for shape in (main, (4, 512, 40, 64)):
        add(EFFICIENT_TRAIN, shape, (OURS, SPARSE), note="Efficient: sparse labels alone")
    add(DECODE, (16, 512, 10, 64), (OURS, WHERE), note="the reference is for correctness")
    add(DECODE, (16, 128, 10, 64), (OURS, "reference", WHERE), ragged=True)
    add(QUARTER, (4, 512, 10, 64), (OURS, WHERE))
    if device == "cuda":
        for shape in (main, (16, 2048, 40, 64)):
            peers = everyone if shape == main else (OURS,)
            add(TRAIN, shape, peers, dtype="bfloat16", note="" if shape == main else "peers need 58 to 111 GB")
        add(DECODE, main, (OURS, WHERE), dtype="bfloat16")
    return found


# Truth and floor

# Gradients are exponentials of scores, whose rounding a peer that keeps them in float32 cannot help: 1e-5 for scores
# of 30.
PEER_SLACK = 10


def truth(case: Case, inputs: Inputs) -> dict[str, tuple[Tensor, float]]:
    """In float64 from the inputs as they are; a decoder may differ from it where a score is at the threshold.

    bert4torch and the compiled head multiply in the dtype of the projection and keep scores in it.
    """
    if case.op == "global_pointer_decode":
        slack = 1e-4 if case.dtype == "float32" else 0.2
        zeros = torch.zeros(2, dtype=torch.float64, device=inputs.mask.device)
        return {"spans": (zeros, slack)}
    loss, *gradients = closed_form(inputs, case.pass_name)
    names = ("loss",) if case.pass_name in (FORWARD, EFFICIENT) else ("loss", "dprojection", "dbias")
    eps = torch.finfo(inputs.dtype).eps
    found = {}
    for name, value in zip(names, (loss, *gradients)):  # noqa: B905
        # The gate takes what is below 1 for 1, and gradients of a mean over rows are far below.
        largest = 1.0 if name == "loss" else value.abs().max().item()
        found[name] = (value, (1e-5 if case.dtype == "float32" else 8 * eps) * largest)
    return found


def floor(case: Case, inputs: Inputs, ceilings: Ceilings) -> float:
    """Seconds that the larger of these needs, at the rates measured in the same run:

    bytes: q and k read, and for training once more and their gradients written;
    arithmetic: d multiply-adds for each valid cell and head (training: three times, as dq and dk are a product each)
      and an exponential of EXPONENTIAL multiply-adds. Efficient: those for each cell alone, and a multiply-add for each
      cell and head (training: three), as e^(s + a + c) = e^s e^a e^c.
    """
    cells = (inputs.lengths * (inputs.lengths + 1) / 2).sum().item()
    *_, heads, size = inputs.shape
    projection, *bias = inputs.leaves(case.pass_name)
    nbytes = 2 * inputs.lengths.sum().item() * projection.shape[2] * size * projection.element_size()
    nbytes += sum(leaf.nbytes for leaf in bias)
    train = case.pass_name in (TRAIN, EFFICIENT_TRAIN)
    dots = cells * projection.shape[2]
    products = (dots * size + (cells * heads if bias else 0)) * (3 if train else 1)
    exponentials = 0 if case.op == "global_pointer_decode" else dots
    arithmetic = ceilings.fma_s(products, case.dtype) + ceilings.fma_s(EXPONENTIAL * exponentials)
    return max(ceilings.copy_s(nbytes * (3 if train else 1)), arithmetic)


# Goals


def growth(results: Results) -> float:
    """Bytes at the peak of a training step over those of q and k."""
    outcome = results.find(TRAIN, MAIN)
    return outcome.peak[OURS] / (4 * 512 * 10 * 2 * 64 * 4) if outcome and OURS in outcome.peak else float("nan")


def peak_mib(label: str) -> Callable[[Results], float]:
    def measure(results: Results) -> float:
        outcome = results.find(TRAIN, label)
        return outcome.peak[OURS] / 2**20 if outcome and OURS in outcome.peak else float("nan")

    return measure


def ratios(device: str, threads: int | None, wanted: list[tuple[str, str, str, float]]) -> list[Goal]:
    return [
        Goal(
            f"{pass_name}, {label}, against {who}",
            device,
            lambda results, key=(pass_name, label, who): results.ratio(*key, threads),
            at_least=times,
        )
        for pass_name, label, who, times in wanted
    ]


MAIN, CUDA_MAIN = "4x512x10x64", "16x512x10x64"
GOALS = [
    *ratios(
        "cpu",
        2,
        [
            (TRAIN, MAIN, DENSE, 20),
            (TRAIN, MAIN, SPARSE, 10),
            (TRAIN, MAIN, COMPILED, 4),
            (DECODE, "16x512x10x64", WHERE, 20),
        ],
    ),
    Goal("bytes at the peak of a training step over q and k", "cpu", growth, at_most=3),
    *ratios(
        "cuda", None, [(TRAIN, CUDA_MAIN, DENSE, 20), (TRAIN, CUDA_MAIN, SPARSE, 15), (TRAIN, CUDA_MAIN, COMPILED, 3)]
    ),
    Goal("MiB beyond inputs to train 16x2048x40x64 in bfloat16", "cuda", peak_mib("16x2048x40x64"), at_most=1300),
    *(Goal("worst error over what is allowed", device, Results.worst_error, at_most=1.0) for device in ("cpu", "cuda")),
]
