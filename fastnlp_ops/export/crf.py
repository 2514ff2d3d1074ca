"""The CRF and MEMM ops by scans over time. A masked step hands on what it is given, so nothing is compacted."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastnlp_ops.export._scan import scan
from fastnlp_ops.reference.crf import difference, finite, logsumexp


class _Steps(NamedTuple):
    """The arguments of an op, time first, in the compute type."""

    e: Tensor  # [T, B, N]
    on: Tensor  # [T, B]
    begun: Tensor  # [T, B], whether a step before this one was on
    matrices: Tensor  # [N, N], or [T, B, N, N] where every step has its own
    start: Tensor  # [N]
    end: Tensor  # [N]

    def scan(
        self, step: Callable[..., tuple[Tensor, ...]], carry: Sequence[Tensor], *xs: Tensor, reverse: bool = False
    ) -> tuple[Tensor, ...]:
        """Of step(*carry, *x, matrix)."""
        own = self.matrices.dim() == 4
        constants = () if own else (self.matrices,)
        return scan(step, carry, (*xs, self.matrices) if own else xs, constants, reverse=reverse)

    def previous(self, values: Tensor, first: float) -> Tensor:
        """The value of the step before, for values [T, B, ...] that masked steps hand on."""
        return torch.cat([torch.full_like(values[:1], first), values[:-1]])


def _steps(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> _Steps:
    if cu_seqlens is not None:
        raise NotImplementedError("packed sequences (cu_seqlens) have no form in export: pad them, and give a mask")
    B, T, N = emissions.shape
    e = emissions.to(transitions.dtype).transpose(0, 1)
    on = e.new_ones((T, B), dtype=torch.bool) if mask is None else mask.transpose(0, 1)
    count = on.to(torch.int64)
    matrices = transitions
    if transitions.dim() == 4:  # none enters step 0
        matrices = torch.cat([e.new_zeros((1, B, N, N)), transitions.transpose(0, 1)])
    zeros = e.new_zeros(N)
    start, end = zeros if start is None else start, zeros if end is None else end
    e = torch.where(on[:, :, None], e, 0)  # what a masked step holds is not read
    return _Steps(e, on, count.cumsum(0) - count > 0, matrices, start, end)


def _forward(steps: _Steps) -> tuple[Tensor, Tensor]:
    """alpha [T, B, N], that of a masked step being that of the step before; log Z [B]."""

    def step(alpha: Tensor, e: Tensor, first: Tensor, on: Tensor, begun: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
        entered = torch.where(begun[:, None], logsumexp(alpha[:, :, None] + matrix, 1) + e, first)
        alpha = torch.where(on[:, None], entered, alpha)
        return alpha, alpha.clone()

    zeros = steps.e.new_zeros(steps.e.shape[1:])
    last, alpha = steps.scan(step, [zeros], steps.e, steps.e + steps.start, steps.on, steps.begun)
    return alpha, torch.where(steps.on.any(0), logsumexp(last + steps.end, 1), 0)


def _nothing_saved(like: Tensor, *shape: int) -> Tensor:
    """NaN in the place of what an op saves for its backward pass, which has no form here."""
    return like.new_full(shape, math.nan)


def crf_log_partition(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    save_messages: bool,
) -> tuple[Tensor, Tensor]:
    steps = _steps(emissions, transitions, start, end, mask, cu_seqlens)
    B, T, N = emissions.shape
    return _forward(steps)[1], _nothing_saved(steps.e, B * T if save_messages else 0, N)


def crf_log_partition_backward(
    grad: Tensor,
    messages: Tensor,  # noqa: ARG001  (computed anew)
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    transition_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Marginals, times `grad`."""
    steps = _steps(emissions, transitions, start, end, mask, cu_seqlens)
    alpha, log_partition = _forward(steps)

    def step(beta: Tensor, e: Tensor, on: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
        before = logsumexp(matrix + (e + beta)[:, None, :], 2)
        return torch.where(on[:, None], before, beta), beta.clone()

    last = steps.end.expand(alpha.shape[1:]).clone()
    _, beta = steps.scan(step, [last], steps.e, steps.on, reverse=True)  # [T, B, N]
    log_z = finite(log_partition)[:, None]
    possible = steps.on & (log_partition != -math.inf)
    weight = torch.where(possible, grad, 0)[:, :, None]  # [T, B, 1]
    p = weight * torch.where(possible[:, :, None], (alpha + beta - log_z).exp(), 0)  # [T, B, N]
    dstart = torch.where(steps.begun[:, :, None], 0, p).sum((0, 1))
    some = (steps.on.any(0) & (log_partition != -math.inf))[:, None]
    dend = torch.where(some, grad[:, None] * (alpha[-1] + steps.end - log_z).exp(), 0).sum(0)
    dtransitions = p.new_zeros(0)
    if transition_grad:
        entered = steps.previous(alpha, 0.0)[..., None] + steps.matrices + (steps.e + beta)[:, :, None, :]
        there = (possible & steps.begun)[:, :, None, None]
        xi = weight[..., None] * torch.where(there, (entered - log_z[..., None]).exp(), 0)  # [T, B, N, N]
        dtransitions = xi.sum((0, 1)) if transitions.dim() == 2 else xi[1:].transpose(0, 1).contiguous()
    return p.transpose(0, 1).to(emissions.dtype).contiguous(), dtransitions, dstart, dend


def _neighbour(tags: Tensor, on: Tensor, reverse: bool) -> Tensor:
    """The tag [T, B] of the step that is on before each one, or behind it where reversed; 0 where there is none."""

    def step(tag: Tensor, own: Tensor, on: Tensor) -> tuple[Tensor, ...]:
        return torch.where(on, own, tag), tag.clone()

    return scan(step, [torch.zeros_like(tags[0])], [tags, on], reverse=reverse)[1]


def _taken(tags: Tensor, on: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """Tags [B, T] time first, 0 where they are not read, and a factor [B]: NaN where one is outside [0, N)."""
    y = tags.transpose(0, 1)
    outside = on & ((y < 0) | (y >= N))
    factor = torch.where(outside.any(0), math.nan, 1.0)
    return torch.where(on & ~outside, y, 0), factor


def crf_log_likelihood(
    emissions: Tensor,
    tags: Tensor,
    transitions: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    save_messages: bool,
    check_start: bool = False,  # noqa: ARG001  (an exported program checks no values)
) -> tuple[Tensor, Tensor]:
    steps = _steps(emissions, transitions, start, end, mask, cu_seqlens)
    B, T, N = emissions.shape
    y, factor = _taken(tags, steps.on, N)
    before = _neighbour(y, steps.on, reverse=False)
    rows = torch.where(steps.begun[:, :, None], _rows(steps.matrices, before), steps.start)  # [T, B, N]
    picked = (steps.e + rows).gather(2, y[:, :, None])[:, :, 0]
    last = torch.where(steps.on[-1], y[-1], before[-1])
    score = torch.where(steps.on, picked, 0).sum(0) + torch.where(steps.on.any(0), steps.end[last], 0)
    value = difference(score, _forward(steps)[1]) * factor.to(score.dtype)
    return value, _nothing_saved(steps.e, B * T if save_messages else 0, N)


def _rows(matrices: Tensor, tags: Tensor) -> Tensor:
    """The row of each tag [T, B] in matrices [N, N] or [T, B, N, N]: [T, B, N]."""
    if matrices.dim() == 2:
        return matrices[tags]
    N = matrices.shape[-1]
    return matrices.gather(2, tags[:, :, None, None].expand(*tags.shape, 1, N))[:, :, 0]


def crf_viterbi(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    check_start: bool = False,  # noqa: ARG001  (an exported program checks no values)
) -> tuple[Tensor, Tensor]:
    steps = _steps(emissions, transitions, start, end, mask, cu_seqlens)

    def step(delta: Tensor, e: Tensor, first: Tensor, on: Tensor, begun: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
        best, origin = (delta[:, :, None] + matrix + e[:, None, :]).max(1)
        delta = torch.where(on[:, None], torch.where(begun[:, None], best, first), delta)
        return delta, torch.where(on[:, None], origin, torch.arange(e.shape[1], device=e.device))

    def back(tag: Tensor, origin: Tensor, on: Tensor) -> tuple[Tensor, ...]:
        return origin.gather(1, tag[:, None])[:, 0], torch.where(on, tag, -1)

    zeros = steps.e.new_zeros(steps.e.shape[1:])
    delta, origins = steps.scan(step, [zeros], steps.e, steps.start + steps.e, steps.on, steps.begun)
    score, tag = (delta + steps.end).max(1)
    _, paths = scan(back, [tag], [origins, steps.on], reverse=True)
    return paths.transpose(0, 1).contiguous(), torch.where(steps.on.any(0), score, 0)


def crf_viterbi_n_best(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    n_best: int,
) -> tuple[Tensor, Tensor]:
    steps = _steps(emissions, transitions, start, end, mask, cu_seqlens)
    B, N = steps.e.shape[1:]

    def best(candidates: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = candidates.sort(dim=1, descending=True, stable=True)
        return values[:, :n_best], indices[:, :n_best]

    # delta [B, N * n]: the n best scores of every tag, tag-major. The first step offers one path for each tag.
    def step(delta: Tensor, e: Tensor, first: Tensor, on: Tensor, begun: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
        moved = delta[:, :, None] + matrix.repeat_interleave(n_best, -2) + e[:, None, :]
        values, origin = best(moved)  # [B, n, N]
        only = torch.cat([first[:, :, None], first.new_full((*first.shape, n_best - 1), -math.inf)], 2)
        entered = torch.where(begun[:, None], values.transpose(1, 2).flatten(1), only.flatten(1))
        unmoved = torch.arange(N * n_best, device=e.device)
        origin = torch.where(on[:, None], origin.transpose(1, 2).flatten(1), unmoved)
        return torch.where(on[:, None], entered, delta), origin

    def back(slot: Tensor, origin: Tensor, on: Tensor) -> tuple[Tensor, ...]:
        return origin.gather(1, slot), torch.where(on[:, None], slot // n_best, -1)

    zeros = steps.e.new_zeros((B, N * n_best))
    delta, origins = steps.scan(step, [zeros], steps.e, steps.start + steps.e, steps.on, steps.begun)
    scores, slot = best(delta + steps.end.repeat_interleave(n_best))  # [B, n]
    _, paths = scan(back, [slot], [origins, steps.on], reverse=True)  # [T, B, n]
    runner_up = torch.arange(n_best, device=scores.device) > 0
    empty = torch.where(runner_up, -math.inf, 0.0).to(scores.dtype)
    scores = torch.where(steps.on.any(0)[:, None], scores, empty)
    paths = torch.where(runner_up & (scores == -math.inf), -1, paths)
    return paths.permute(1, 2, 0).contiguous(), scores


def crf_sample(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    uniforms: Tensor,
) -> Tensor:
    steps = _steps(emissions, transitions, start, end, mask, cu_seqlens)
    alpha, _ = _forward(steps)
    S, N = uniforms.shape[0], alpha.shape[2]

    def step(onward: Tensor, alpha: Tensor, on: Tensor, number: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
        logits = alpha + onward  # [S, B, N]
        p = (logits - finite(logits.amax(2, keepdim=True))).exp()
        cumulative = p.cumsum(2)
        tag = (cumulative <= number[:, :, None] * cumulative[:, :, -1:]).sum(2)
        # Rounding must not pick a tag behind the last possible one.
        tag = torch.minimum(tag, torch.where(p > 0, torch.arange(N, device=p.device), 0).amax(2))  # [S, B]
        column = matrix.expand(*p.shape, N).gather(3, tag[:, :, None, None].expand(*p.shape, 1))[..., 0]
        return torch.where(on[:, None], column, onward), torch.where(on, tag, -1)

    last = steps.end.expand(S, *alpha.shape[1:]).clone()
    numbers = uniforms.to(alpha.dtype).permute(2, 0, 1)  # [T, S, B]
    _, paths = steps.scan(step, [last], alpha, steps.on, numbers, reverse=True)
    return paths.permute(1, 2, 0).contiguous()


def crf_entropy(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    steps = _steps(emissions, transitions, start, end, mask, cu_seqlens)
    alpha, _ = _forward(steps)

    def expected(logits: Tensor, entropy: Tensor) -> Tensor:
        """sum_i P(i) (entropy(i) - log P(i)) over dim 1, P = softmax(logits), 0 log 0 = 0."""
        log_p = logits - finite(logsumexp(logits, dim=1)).unsqueeze(1)
        possible = log_p != -math.inf
        log_p = torch.where(possible, log_p, 0)
        return torch.where(possible, log_p.exp() * (entropy - log_p), 0).sum(1)

    def step(entropy: Tensor, before: Tensor, moves: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
        entered = expected(before[:, :, None] + matrix, entropy[:, :, None])
        return (torch.where(moves[:, None], entered, entropy),)

    zeros = torch.zeros_like(alpha[0])
    (entropy,) = steps.scan(step, [zeros], steps.previous(alpha, 0.0), steps.on & steps.begun)
    return torch.where(steps.on.any(0), expected(alpha[-1] + steps.end, entropy), 0)


def memm_log_likelihood(
    emissions: Tensor, tags: Tensor, transitions: Tensor, mask: Tensor | None, bidirectional: bool
) -> Tensor:
    steps = _steps(emissions, transitions, None, None, mask, None)
    y, factor = _taken(tags, steps.on, emissions.shape[-1])

    def direction(rows: Tensor, reverse: bool) -> Tensor:
        """sum_k log p(y_k | tag of its neighbour)."""
        count = steps.on.to(torch.int64)
        given = (count.sum(0) - count.cumsum(0) > 0) if reverse else steps.begun
        beside = rows[_neighbour(y, steps.on, reverse)]
        logits = torch.where(given[:, :, None], (steps.e + beside) / 2, steps.e)
        gold = logits.gather(2, y[:, :, None])[:, :, 0]
        return torch.where(steps.on, difference(gold, logsumexp(logits, 2)), 0).sum(0)

    value = direction(steps.matrices, False)
    if bidirectional:
        value = (value + direction(steps.matrices.t(), True)) / 2
    return value * factor.to(value.dtype)
