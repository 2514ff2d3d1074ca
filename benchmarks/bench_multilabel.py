"""Multilabel cross entropy over dense scores [R, C]: training step and forward, against bert4torch's two losses.

Labels come to each loss in the form that it takes, made before the clock starts: bool for ours and for torch.compile,
int64 [R, C] for bert4torch's dense loss as its examples make them, int64 indices [R, P] for the sparse losses.
"""

import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

import fastnlp_ops
from benchmarks import bert4torch_heads
from benchmarks.harness import OURS, Accuracy, Case, Goal, Work
from benchmarks.measure import Ceilings
from fastnlp_ops.reference import multilabel as reference

__all__ = ["GOALS", "PROVIDERS", "accuracy", "cases", "exercise", "floor", "make_inputs", "truth"]

FORWARD, TRAIN = "forward", "forward+backward"
SOFT, SPARSE_FORWARD, SPARSE = "soft forward+backward", "sparse forward", "sparse forward+backward"
PEER, COMPILED = "bert4torch", "torch.compile"
DENSE_OP, SPARSE_OP = "multilabel_categorical_crossentropy", "sparse_multilabel_categorical_crossentropy"
LABELS = 4  # of a row
EXPONENTIAL = 10  # multiply-adds of an exponential that is right to 1 ulp: 6 of a polynomial, 3 to reduce, 1 to scale

bert4torch = bert4torch_heads.load()


class Inputs:
    def __init__(self, shape: tuple[int, int], dtype: str, device: str) -> None:
        self.scores = torch.randn(shape, device=device).to(getattr(torch, dtype)).requires_grad_()
        # Distinct: bert4torch's sparse loss counts twice what is listed twice.
        self.indices = torch.rand(shape, device=device).topk(LABELS).indices  # [R, P]

    @cached_property
    def dense(self) -> Tensor:
        """int64 [R, C]."""
        return torch.zeros(self.scores.shape, dtype=torch.long, device=self.scores.device).scatter(1, self.indices, 1)

    @cached_property
    def hard(self) -> Tensor:
        return self.dense.bool()

    @cached_property
    def soft(self) -> Tensor:
        return torch.where(self.hard, 0.9, 1e-3)


def make_inputs(shape: tuple[int, int], dtype: str, device: str, ragged: bool = False) -> Inputs:  # noqa: ARG001
    return Inputs(shape, dtype, device)


def work(loss: Callable[[], Tensor], case: Case, inputs: Inputs) -> Work:
    """The mean over rows, and the gradient of the scores where the pass has one."""
    scores = inputs.scores
    if case.pass_name in (FORWARD, SPARSE_FORWARD):
        return Work(torch.no_grad()(loss), lambda value: {"loss": value.double()}, (), graph=True)

    def run() -> Tensor:
        scores.grad = None
        value = loss()
        value.backward()
        return value

    known = [scores, inputs.indices, *(x for x in vars(inputs).values() if isinstance(x, Tensor))]
    return Work(run, lambda value: {"loss": value.double(), "dscores": scores.grad.double()}, known, graph=True)


def labels_of(case: Case, inputs: Inputs) -> Tensor:
    return inputs.soft if case.pass_name == SOFT else inputs.hard


def provider(functions: Any) -> Callable[[Case, Inputs], Work]:
    """Ours and our reference, which share names."""

    def make(case: Case, inputs: Inputs) -> Work:
        function = getattr(functions, case.op)
        labels = inputs.indices if case.op == SPARSE_OP else labels_of(case, inputs)
        return work(partial(function, inputs.scores, labels), case, inputs)

    return make


def peer(case: Case, inputs: Inputs) -> Work:
    if case.op == SPARSE_OP:
        sparse = bert4torch.SparseLoss()
        return work(lambda: sparse(inputs.scores, inputs.indices).mean(), case, inputs)
    dense, labels = bert4torch.DenseLoss(), inputs.dense
    return work(lambda: dense(inputs.scores, labels), case, inputs)


def plain(scores: Tensor, labels: Tensor) -> Tensor:
    """As a user would write it for torch.compile; bool labels."""
    scores = scores.float()
    zero = torch.zeros_like(scores[:, :1])
    negative = torch.where(labels, -math.inf, scores)
    positive = torch.where(labels, -scores, -math.inf)
    rows = [torch.logsumexp(torch.cat([x, zero], 1), 1) for x in (negative, positive)]
    return (rows[0] + rows[1]).mean()


def compiled(case: Case, inputs: Inputs) -> Work:
    torch._dynamo.reset()
    function, labels = torch.compile(plain, fullgraph=True, dynamic=False), inputs.hard
    return work(lambda: function(inputs.scores, labels), case, inputs)


PROVIDERS = {
    OURS: provider(fastnlp_ops),
    "reference": provider(reference),
    PEER: peer if bert4torch else None,
    COMPILED: compiled,
}


def cases(device: str, quick: bool) -> list[Case]:  # noqa: ARG001
    spans, texts = (40, 512 * 512), (1024, 1000)  # the cells of B4 H10 n512; a classifier
    everyone, peers = tuple(PROVIDERS), (OURS, "reference", PEER)
    if quick:
        found = [(DENSE_OP, TRAIN, peers), (DENSE_OP, SOFT, peers[:2]), (SPARSE_OP, SPARSE, peers)]
        return [Case(op, name, (8, 5000), providers) for op, name, providers in found]
    found = []
    for shape in (spans, texts):
        found += [Case(DENSE_OP, name, shape, everyone) for name in (FORWARD, TRAIN)]
        found.append(Case(DENSE_OP, SOFT, shape, peers[:2], note="bert4torch's loss is wrong for soft labels"))
        found += [Case(SPARSE_OP, name, shape, peers) for name in (SPARSE_FORWARD, SPARSE)]
    return found


def truth(case: Case, inputs: Inputs) -> dict[str, tuple[Tensor, float]]:
    """The reference in float64. bert4torch computes in the dtype of the scores."""
    scores = inputs.scores.detach().double().requires_grad_(case.pass_name not in (FORWARD, SPARSE_FORWARD))
    if case.op == SPARSE_OP:
        loss = reference.sparse_multilabel_categorical_crossentropy(scores, inputs.indices)
    else:
        loss = reference.multilabel_categorical_crossentropy(scores, labels_of(case, inputs))
    eps = torch.finfo(inputs.scores.dtype).eps
    if not scores.requires_grad:
        return {"loss": (loss, 64 * eps)}
    (dscores,) = torch.autograd.grad(loss, scores)
    # Scaled up, because the gate takes what is below 1 for 1: a row's gradients are at most 1 / R.
    return {"loss": (loss.detach(), 64 * eps), "dscores": (dscores, 64 * eps / len(scores))}


def floor(case: Case, inputs: Inputs, ceilings: Ceilings) -> float:
    """Seconds that the larger of these needs, at the rates measured in the same run:

    bytes: scores and labels (bool, float32 where soft, or none) read once, and for training once more, and gradients
      written once;
    multiply-adds: an exponential per class and pass, two where labels are soft.
    """
    cells, element = math.prod(case.shape), inputs.scores.element_size()
    label = {DENSE_OP: 4 if case.pass_name == SOFT else 1, SPARSE_OP: 0}[case.op]
    passes = 1 if case.pass_name in (FORWARD, SPARSE_FORWARD) else 2
    nbytes = cells * (passes * (element + label) + (passes - 1) * element)
    exponentials = cells * passes * (2 if case.pass_name == SOFT else 1)
    return max(ceilings.copy_s(nbytes), ceilings.fma_s(EXPONENTIAL * exponentials))


SPANS = "40x262144"
GOALS = [
    Goal(f"{name}, {SPANS}, against {who}", device, lambda r, n=name, w=who: r.ratio(n, SPANS, w), at_least=times)
    for device, name, who, times in (
        ("cpu", TRAIN, PEER, 6),
        ("cpu", SPARSE, PEER, 4),
        ("cuda", TRAIN, PEER, 6),
    )
] + [
    Goal("worst |L - float64| over 1e-6 max(1, L)", device, lambda r: r.worst_error(), at_most=1.0)
    for device in ("cpu", "cuda")
]


def accuracy(device: str) -> list[Accuracy]:
    """|L - float64| of one label among 4,095 others at -20, and its allowance: where sums that cancel show."""
    found = []
    for score in (5.0, 12.0, 16.0, 30.0, 100.0):
        scores = torch.full((1, 4096), -20.0, device=device)
        scores[0, 7] = score
        indices = torch.tensor([[7]], device=device)
        exact = reference.sparse_multilabel_categorical_crossentropy(scores.double(), indices)
        losses = {OURS: fastnlp_ops.sparse_multilabel_categorical_crossentropy(scores, indices)}
        if bert4torch:
            losses["bert4torch sparse"] = bert4torch.SparseLoss()(scores, indices).mean()
        for name, loss in losses.items():
            found.append(Accuracy(f"label at {score:g}", name, (loss.double() - exact).abs().item(), 1e-6))
    return found


def exercise(device: str) -> None:
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        for shape in ((3, 5), (2, 70_000), (300, 40)):
            inputs = make_inputs(shape, dtype, device)
            for labels in (inputs.hard, inputs.soft):
                fastnlp_ops.multilabel_categorical_crossentropy(inputs.scores, labels).backward()
            fastnlp_ops.sparse_multilabel_categorical_crossentropy(inputs.scores, inputs.indices).backward()
