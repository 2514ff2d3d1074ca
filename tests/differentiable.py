"""Every differentiable function of the package as a function of its leaves alone, for the tests of derivatives."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastnlp_ops import LinearAttentionState

B, T, N = 2, 4, 3
MASK = torch.tensor([[True, True, False, True], [True, True, True, False]])
TAGS = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1]])
ALLOWED = torch.tensor([[[1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 1, 1]], [[0, 0, 1], [1, 1, 1], [1, 1, 0], [0, 1, 0]]])
CU_SEQLENS = torch.tensor([0, 3, 3, 8])
LABELS = torch.tensor([[[[0, 1], [3, 3]], [[1, 1], [-1, -1]]], [[[0, 0], [0, 2]], [[1, 2], [2, 1]]]])
POSITIONS = torch.tensor([[3, 5, 6, 9], [0, 1, 2, 3]])
CRF_SIZES = ((B, T, N), (N, N), (N,), (N,))
SPAN_SIZES = ((B, T, 2, 4),) * 2
BIASED_SIZES = ((B, T, 1, 4),) * 2 + ((B, T, 2),) * 2
ATTENTION_SIZES = ((B, T, 2, 3), (B, T, 1, 3), (B, T, 1, 2))


class Case(NamedTuple):
    """`call(module, *leaves)`, module fastnlp_ops or fastnlp_ops.reference, is a finite tensor."""

    sizes: tuple
    call: Callable


def _on(device, *values):
    """Tensors among the values on the device."""
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in values]


def _options_on(device, options):
    return dict(zip(options, _on(device, *options.values()), strict=True))


def _crf(name, pick=None, sizes=CRF_SIZES, before=(), **options):
    def call(module, emissions, *scores):
        device = emissions.device
        found = getattr(module, name)(emissions, *_on(device, *before), *scores, **_options_on(device, options))
        return found if pick is None else found[pick]

    return Case(sizes, call)


def _memm(bidirectional):
    def call(module, emissions, transitions):
        tags, mask = _on(emissions.device, TAGS, MASK)
        return module.memm_log_likelihood(emissions, tags, transitions, mask=mask, bidirectional=bidirectional)

    return Case(CRF_SIZES[:2], call)


def _spans(name, sizes, before=(), **options):
    def call(module, q, k, start=None, end=None):
        given = _options_on(q.device, options)
        found = getattr(module, name)(q, k, *_on(q.device, *before), start_bias=start, end_bias=end, **given)
        return torch.where(found == -math.inf, 0, found)

    return Case(sizes, call)


def _divergence(sizes):
    def call(module, *leaves):
        one, two = leaves[: len(leaves) // 2], leaves[len(leaves) // 2 :]
        biases = dict(zip(("start_bias1", "end_bias1", "start_bias2", "end_bias2"), one[2:] + two[2:], strict=False))
        return module.global_pointer_divergence(
            *one[:2], *two[:2], **biases, mask=MASK.to(one[0].device), reduction="none"
        )

    return Case(sizes * 2, call)


def _multilabel(labels, sparse=False, **options):
    name = f"{'sparse_' if sparse else ''}multilabel_categorical_crossentropy"

    def call(module, scores):
        return getattr(module, name)(scores, labels.to(scores.device), reduction="none", **options)

    return Case(((2, 5),), call)


def _attention(sizes=ATTENTION_SIZES, state=False, decay=False, part=None, **options):
    def call(module, q, k, v, *rest):
        rest = list(rest)
        given = _options_on(q.device, options)
        if decay:
            given["log_decay"] = -rest.pop().square()
        if state:
            exponential = options["feature_map"] in ("exp", "softmax")
            kv, key_sum = rest
            maximum = torch.ones(key_sum.shape, dtype=key_sum.dtype, device=q.device) if exponential else None
            given["initial_state"] = LinearAttentionState(kv, key_sum.square() + 1, maximum)  # a sum of similarities
        found = module.linear_attention(q, k, v, **given, return_state=part is not None)
        return found if part is None else found[1][part]

    return Case(sizes, call)


def _attention_cases():
    for name in ("identity", "elu+1", "relu", "relu^2", "exp", "softmax", "cosine+1"):
        for causal in (False, True):
            rows = 4 if name == "cosine+1" else 3
            sizes = (*ATTENTION_SIZES, (B, 1, rows, 2), (B, 1, rows)) if causal else ATTENTION_SIZES
            options = {"feature_map": name, "causal": causal, "state": causal, "key_padding_mask": MASK}
            if name == "identity":
                options["normalize"] = False  # whose sums come near to zero
            yield f"linear_attention-{name}-{'causal' if causal else 'both'}", _attention(sizes, **options)
    gate = {"feature_map": "elu+1", "causal": True, "decay": True}
    yield "linear_attention-decay", _attention((*ATTENTION_SIZES, (B, T, 1)), **gate)
    packed = ((1, 8, 2, 3), (1, 8, 1, 3), (1, 8, 1, 2))
    yield "linear_attention-packed", _attention(packed, feature_map="elu+1", cu_seqlens_q=CU_SEQLENS)
    for part, name in enumerate(("kv", "key_sum")):
        yield f"linear_attention-{name}", _attention(feature_map="relu^2", part=part, causal=True)


CASES = {
    "crf_log_partition": _crf("crf_log_partition", mask=MASK),
    "crf_log_partition-packed": _crf("crf_log_partition", None, ((8, N), *CRF_SIZES[1:]), cu_seqlens=CU_SEQLENS),
    "crf_log_partition-position": _crf("crf_log_partition", None, ((B, T, N), (B, T - 1, N, N)), mask=MASK),
    "crf_log_likelihood": _crf("crf_log_likelihood", before=(TAGS,), mask=MASK),
    "crf_log_likelihood-unbounded": _crf("crf_log_likelihood", None, CRF_SIZES[:2], (TAGS,)),
    "crf_partial_log_likelihood": _crf("crf_partial_log_likelihood", before=(ALLOWED,), mask=MASK),
    "crf_marginals": _crf("crf_marginals", mask=MASK),
    "crf_entropy": _crf("crf_entropy", mask=MASK),
    "crf_viterbi": _crf("crf_viterbi", 1, mask=MASK),
    "crf_viterbi-n_best": _crf("crf_viterbi", 1, mask=MASK, n_best=3),
    "memm_log_likelihood": _memm(False),
    "memm_log_likelihood-bidirectional": _memm(True),
    "global_pointer_scores": _spans("global_pointer_scores", SPAN_SIZES, mask=MASK, max_span_length=3),
    "global_pointer_scores-biased": _spans("global_pointer_scores", BIASED_SIZES, position_ids=POSITIONS),
    "global_pointer_loss": _spans("global_pointer_loss", SPAN_SIZES, (LABELS,), mask=MASK, reduction="none"),
    "global_pointer_loss-biased": _spans(
        "global_pointer_loss", BIASED_SIZES, (LABELS,), tril_mask=False, reduction="none", mask_zero=True
    ),
    "global_pointer_divergence": _divergence(SPAN_SIZES),
    "global_pointer_divergence-biased": _divergence(BIASED_SIZES),
    "multilabel": _multilabel(torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0]])),
    "multilabel-soft": _multilabel(torch.tensor([[0.1, 0.9, 0.0, 1.0, 0.5], [0.2, 0.3, 0.4, 0.6, 0.7]])),
    "multilabel-sparse": _multilabel(torch.tensor([[1, 3], [-1, 4]]), sparse=True),
    "multilabel-sparse-mask_zero": _multilabel(torch.tensor([[1, 3], [0, 4]]), sparse=True, mask_zero=True),
    **dict(_attention_cases()),
}


def draw(case, device, requires_grad=True):
    """The leaves of a case, float64."""
    return [torch.randn(size, dtype=torch.float64, device=device).requires_grad_(requires_grad) for size in case.sizes]
