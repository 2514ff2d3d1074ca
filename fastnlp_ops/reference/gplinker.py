r"""GPLinker's decoding in plain PyTorch: every subject, every object, every relation, one after the other.

An entity layer finds spans that may be subjects and spans that may be objects. Two relation layers score pairs of
tokens: `head` the first token of a subject and the first of an object, `tail` the last ones. They have neither RoPE nor
an order of the two tokens. The triple (subject, relation r, object) is found where both scores are above the threshold,

    head[r, subject start, object start] > threshold   and   tail[r, subject end, object end] > threshold

References:
    Su: GPLinker, https://kexue.fm/archives/8888, 2022.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastnlp_ops.reference.global_pointer import plain_scores, valid_cells


def gplinker_decode(
    spans: Tensor,
    head_q: Tensor,
    head_k: Tensor,
    tail_q: Tensor,
    tail_k: Tensor,
    *,
    head_start_bias: Tensor | None = None,
    head_end_bias: Tensor | None = None,
    tail_start_bias: Tensor | None = None,
    tail_end_bias: Tensor | None = None,
    mask: Tensor | None = None,
    threshold: float = 0.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Triples int64 [K, 6] (b, subject start, subject end, relation, object start, object end), and scores [K]."""
    valid = valid_cells(head_q, mask, tril_mask=False, max_span_length=None)
    head, tail = (
        torch.where(valid, plain_scores(*layer, False, None, mask, scale).detach(), -math.inf)  # [B, R, n, n]
        for layer in (
            (head_q, head_k, head_start_bias, head_end_bias),
            (tail_q, tail_k, tail_start_bias, tail_end_bias),
        )
    )
    subjects = sorted({(b, start, end) for b, role, start, end in spans.tolist() if role == 0})
    objects = sorted({(b, start, end) for b, role, start, end in spans.tolist() if role == 1})
    triples, scores = [], []
    for b, subject_start, subject_end in subjects:
        for relation in range(head.shape[1]):
            for other, object_start, object_end in objects:
                if other != b:
                    continue
                head_score = head[b, relation, subject_start, object_start]
                tail_score = tail[b, relation, subject_end, object_end]
                if head_score > threshold and tail_score > threshold:
                    triples.append((b, subject_start, subject_end, relation, object_start, object_end))
                    scores.append(torch.minimum(head_score, tail_score))
    found = torch.tensor(triples, dtype=torch.int64, device=spans.device).reshape(-1, 6)
    return found, torch.stack(scores) if scores else head.new_empty(0, dtype=torch.result_type(head, tail))
