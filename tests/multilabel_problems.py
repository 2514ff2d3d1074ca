"""Random scores with labels of each kind, and the loss over them."""

import math

import torch
from tools import assert_within_budget, rounding_level

import fastnlp_ops
from fastnlp_ops import reference

INF = math.inf
KINDS = ["bool", "soft", "sparse"]


def make_problem(kind, R, C, device="cpu", dtype=torch.float32, *, masked=0.0, share=0.2, std=1.0):
    """Scores [R, C], and labels of a kind: those of hard labels are bool or the same as shuffled, padded indices."""
    scores = (std * torch.randn(R, C, dtype=torch.float64)).masked_fill(torch.rand(R, C) < masked, -INF)
    hard = torch.rand(R, C) < share
    if kind == "soft":
        labels = torch.where(torch.rand(R, C) < 0.5, torch.rand(R, C), hard.float()).to(device, dtype)
    elif kind == "sparse":
        indices = torch.where(hard, torch.arange(C), -1)
        indices = torch.cat([indices, indices[:, : C // 2]], 1)  # some of them twice
        labels = indices[:, torch.randperm(indices.shape[1])].to(device)
    else:
        labels = hard.to(device)
    return scores.to(device, dtype), labels


def loss(module, scores, labels, reduction="none", **options):
    if labels.shape != scores.shape or labels.dtype == torch.int64:
        return module.sparse_multilabel_categorical_crossentropy(scores, labels, reduction=reduction, **options)
    return module.multilabel_categorical_crossentropy(scores, labels, reduction=reduction)


def gradient(module, scores, labels, weights, **options):
    scores = scores.detach().clone().requires_grad_()
    value = loss(module, scores, labels, **options)
    return torch.autograd.grad(value, scores, weights.to(value.dtype))[0]


def check(scores, labels, floor=0.0, **options):
    """Value and gradient against float64. `floor`: of the rounding level."""
    wide, exact = scores.float(), scores.double()
    value = loss(fastnlp_ops, scores, labels, **options)
    assert value.dtype == (torch.float64 if scores.dtype == torch.float64 else torch.float32)
    expected = loss(reference, exact, labels, **options)
    assert_within_budget(value, loss(reference, wide, labels, **options), expected, "loss", floor)
    assert (value >= 0).all()
    weights = torch.randn(value.shape, device=value.device)
    weights[:1] = 0
    plain, truth = (gradient(reference, x, labels, weights, **options) for x in (wide, exact))
    own = gradient(fastnlp_ops, scores, labels, weights, **options)
    assert own.dtype == scores.dtype
    assert_within_budget(own, plain, truth, "dscores", max(floor, rounding_level(plain, truth)))
    assert not own[scores == -INF].any()
