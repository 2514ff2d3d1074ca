"""The GlobalPointer ops from the scores of all cells."""

import math

import torch
from torch import Tensor

from fastnlp_ops import reference
from fastnlp_ops._global_pointer_inputs import label_cells
from fastnlp_ops._ops.global_pointer import dense_cells
from fastnlp_ops.export._scan import scan
from fastnlp_ops.reference.global_pointer import divergence, loss_log_sums, plain_scores, valid_cells


def _longest(max_span_length: int) -> int | None:
    return None if max_span_length < 0 else max_span_length


def global_pointer_scores(
    q: Tensor,
    k: Tensor,
    start_bias: Tensor | None,
    end_bias: Tensor | None,
    mask: Tensor | None,
    position_ids: Tensor | None,
    rope: bool,
    tril_mask: bool,
    max_span_length: int,
    scale: float,
) -> Tensor:
    return reference.global_pointer_scores(
        q,
        k,
        start_bias=start_bias,
        end_bias=end_bias,
        rope=rope,
        position_ids=position_ids,
        mask=mask,
        tril_mask=tril_mask,
        max_span_length=_longest(max_span_length),
        scale=scale,
    )


def global_pointer_decode(
    q: Tensor,
    k: Tensor,
    start_bias: Tensor | None,
    end_bias: Tensor | None,
    mask: Tensor | None,
    position_ids: Tensor | None,
    rope: bool,
    tril_mask: bool,
    max_span_length: int,
    scale: float,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    scores = plain_scores(q, k, start_bias, end_bias, rope, position_ids, mask, scale)
    scores = torch.where(valid_cells(q, mask, tril_mask, _longest(max_span_length)), scores, -math.inf)
    spans = (scores > threshold).nonzero()
    return spans, scores[spans.unbind(1)]


def flat_spans(spans: Tensor, scores: Tensor, q: Tensor) -> Tensor:
    """A scan over the spans by falling score, with the tokens of the batch that are taken."""
    sequences, length = q.shape[:2]
    order = scores.sort(descending=True, stable=True).indices
    sequence, _, start, end = spans[order].unbind(1)
    first = sequence * length + torch.minimum(start, end)
    last = sequence * length + torch.maximum(start, end)
    token = torch.arange(sequences * length, device=spans.device)

    def step(taken: Tensor, first: Tensor, last: Tensor, token: Tensor) -> tuple[Tensor, ...]:
        own = (token >= first) & (token <= last)
        free = ~(own & taken).any()
        return taken | (own & free), free

    # A span of no token in front: a scan has a step at least.
    nothing = first.new_zeros(1)
    firsts, lasts = torch.cat([nothing, first]), torch.cat([nothing - 1, last])
    _, free = scan(step, [torch.zeros_like(token, dtype=torch.bool)], [firsts, lasts], [token])
    return torch.zeros_like(free[1:]).index_put((order,), free[1:])


def global_pointer_cells(
    labels: Tensor,
    mask: Tensor | None,
    batch: int,
    heads: int,
    length: int,
    tril_mask: bool,
    max_span_length: int,
    mask_zero: bool,
) -> Tensor:
    """As on a GPU: a label that is no cell is dropped."""
    return label_cells(labels, mask, batch, heads, length, tril_mask, max_span_length, mask_zero)[0]


def global_pointer_loss(
    q: Tensor,
    k: Tensor,
    cells: Tensor,
    start_bias: Tensor | None,
    end_bias: Tensor | None,
    mask: Tensor | None,
    position_ids: Tensor | None,
    rope: bool,
    tril_mask: bool,
    max_span_length: int,
    scale: float,
    save_gradients: bool,  # noqa: ARG001  (nothing is saved)
) -> tuple[Tensor, Tensor, Tensor]:
    scores = plain_scores(q, k, start_bias, end_bias, rope, position_ids, mask, scale)
    positive, neither = dense_cells(cells, scores.shape)
    valid = valid_cells(q, mask, tril_mask, _longest(max_span_length)) & ~neither
    return *loss_log_sums(scores, positive, valid), scores.new_zeros(0)


def global_pointer_divergence(
    q1: Tensor,
    k1: Tensor,
    start_bias1: Tensor | None,
    end_bias1: Tensor | None,
    q2: Tensor,
    k2: Tensor,
    start_bias2: Tensor | None,
    end_bias2: Tensor | None,
    mask: Tensor | None,
    position_ids: Tensor | None,
    rope: bool,
    tril_mask: bool,
    max_span_length: int,
    scale: float,
) -> Tensor:
    first = plain_scores(q1, k1, start_bias1, end_bias1, rope, position_ids, mask, scale)
    second = plain_scores(q2, k2, start_bias2, end_bias2, rope, position_ids, mask, scale)
    return divergence(first, second, valid_cells(q1, mask, tril_mask, _longest(max_span_length)))
