r"""Linear-chain conditional random fields in plain PyTorch: the mathematics that the compiled kernels must reproduce.

A sequence of L emissions e_k [N] is scored, for tags y = (y_0, ..., y_{L-1}), by

    score(y) = start[y_0] + sum_k e_k[y_k] + sum_{k>0} T_k[y_{k-1}, y_k] + end[y_{L-1}]          T is [from, to]

and p(y) = exp(score(y) - log Z), log Z = log sum_y exp score(y) (Lafferty, McCallum, Pereira 2001). Everything here is
one of two recursions (Rabiner 1989, section III), taken in the (log, +) or the (max, +) semiring:

    forward    alpha_0(j) = start(j) + e_0(j)        alpha_k(j) = e_k(j) + log sum_i exp(alpha_{k-1}(i) + T_k(i, j))
    backward   beta_{L-1}(i) = end(i)                beta_{k-1}(i) = log sum_j exp(T_k(i, j) + e_k(j) + beta_k(j))

    partition  log Z = log sum_j exp(alpha_{L-1}(j) + end(j))
    marginals  p(y_k = j) = exp(alpha_k(j) + beta_k(j) - log Z)
    Viterbi    delta_k(j) = max_i ((delta_{k-1}(i) + T_k(i, j)) + e_k(j)), then the maximising i are followed backwards
               (Viterbi 1967). n-best keeps the n best of every tag instead of one. Ties go to the lowest index.
    sampling   y_{L-1} ~ exp(alpha_{L-1} + end), then y_{k-1} ~ exp(alpha_{k-1} + T_k(., y_k)) for falling k: forward
               filtering, backward sampling (Scott 2002). The uniform number of step k decides y_k: it is the lowest tag
               whose cumulative probability exceeds the number.
    entropy    with P_k(i | j) = exp(alpha_{k-1}(i) + T_k(i, j) + e_k(j) - alpha_k(j)), the entropy of the tags before k
               given y_k = j is H_k(j) = sum_i P_k(i | j) (H_{k-1}(i) - log P_k(i | j)) (Hernando, Crespi, Cybenko 2005)
    partial    labels that name a set of tags per step (Tsuboi, Kashima, Mori, Oda, Matsumoto 2008):
               log Z of the allowed paths - log Z

The mask may be any pattern: the recursions run over the *compacted* sequence of the valid steps. Step k enters original
position t, and per-position transitions [B, T-1, N, N] are read at t - 1. Masked values are never read.

-inf is a legal score and forbids what carries it. Every logarithm here is guarded so that an unreachable state is -inf
in value and exactly 0 in gradient, to any order: log Z = -inf gives log-likelihood -inf and no gradient, a forbidden
gold path gives log-likelihood -inf and the gradient indicator - marginals. An empty sequence has log Z = 0.

Any device. Computes in float64 where a floating input is, else in float32. All but the integer results can be
differentiated to any order, in both modes.

References:
    Viterbi: Error bounds for convolutional codes and an asymptotically optimum decoding algorithm. 1967.
    Rabiner: A tutorial on hidden Markov models and selected applications in speech recognition. 1989.
    Lafferty, McCallum, Pereira: Conditional random fields. ICML 2001.
    Scott: Bayesian methods for hidden Markov models: recursive computing in the 21st century. JASA 2002.
    Hernando, Crespi, Cybenko: Efficient computation of the hidden Markov model entropy. IEEE Trans. Inf. Theory 2005.
    Tsuboi, Kashima, Mori, Oda, Matsumoto: Training CRFs using incomplete annotations. COLING 2008.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Chains(NamedTuple):
    """A batch of compacted sequences: step k < lengths[b] of sequence b is the k-th valid step of that sequence."""

    emissions: Tensor  # [B, L, N], zero rows from lengths[b] on
    transitions: Tensor  # [1, 1, N, N], or [B, L-1, N, N] where every position has its own
    start: Tensor  # [N]
    end: Tensor  # [N]
    lengths: Tensor  # [B]
    rows: Tensor  # [B, L]: step k is this row of the flattened input; R, one past the last row, from lengths[b] on

    def step(self, k: int) -> Tensor:
        """Scores [B or 1, N, N] of moving from step k - 1 to step k."""
        return self.transitions[:, 0 if self.transitions.shape[1] == 1 else k - 1]

    def valid(self, k: int) -> Tensor:
        return (k < self.lengths)[:, None]  # [B, 1]

    def gather(self, values: Tensor) -> Tensor:
        """[R] values of the input rows -> [B, L], 0 from lengths[b] on."""
        return torch.cat([values, values.new_zeros(1)])[self.rows]

    def scatter(self, values: Tensor, like: Tensor, fill: float) -> Tensor:
        """[B, L, ...] values of the steps -> [*like.shape[:-1], ...], `fill` at masked positions."""
        count = math.prod(like.shape[:-1])
        # Row `count` takes the values of the steps that do not exist and is cut off.
        flat = values.new_full((count + 1, *values.shape[2:]), fill).index_put((self.rows,), values)
        return flat[:count].reshape(*like.shape[:-1], *values.shape[2:])


def rows_of(table: Tensor, index: Tensor) -> Tensor:
    """table[index]; the derivative of that in forward mode would not be known to vmap."""
    return table.index_select(0, index.flatten()).unflatten(0, index.shape)


def compact(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Chains:
    """Every accepted layout -> left-aligned chains in the compute type. Differentiable."""
    double = torch.float64 in [x.dtype for x in (emissions, transitions, start, end) if x is not None]
    dtype = torch.float64 if double else torch.float32
    N, device = emissions.shape[-1], emissions.device
    count = math.prod(emissions.shape[:-1])
    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError("mask must be None where cu_seqlens is given")
        lengths = cu_seqlens.diff()  # [B]
        longest = int(lengths.max()) if lengths.numel() else 0
        position = torch.arange(longest, device=device).expand(len(lengths), -1)
        first = cu_seqlens[:-1, None]  # row of position 0
    else:
        B, T = emissions.shape[:2]
        on = torch.ones(B, T, dtype=torch.bool, device=device) if mask is None else mask != 0
        lengths = on.sum(1)
        position = (~on).to(torch.uint8).argsort(dim=1, stable=True)  # the valid positions, in order, come first
        first = torch.arange(B, device=device)[:, None] * T
    # At least one step, so that the recursions below need no special case for empty input.
    if position.shape[1] == 0:
        position = position.new_zeros(len(lengths), 1)
    exists = torch.arange(position.shape[1], device=device) < lengths[:, None]  # [B, L]
    rows = torch.where(exists, first + position, count)
    # What does not exist reads a row of zeros behind the last one, so no masked value takes part in anything.
    flat = emissions.reshape(count, N).to(dtype)
    compacted = rows_of(torch.cat([flat, flat.new_zeros(1, N)]), rows)
    if transitions.dim() == 2:
        matrices = transitions.to(dtype)[None, None]
    else:
        B, steps = transitions.shape[:2]
        flat = transitions.reshape(B * steps, N, N).to(dtype)
        index = torch.arange(B, device=device)[:, None] * steps + position[:, 1:] - 1
        matrices = rows_of(torch.cat([flat, flat.new_zeros(1, N, N)]), torch.where(exists[:, 1:], index, B * steps))
        if matrices.shape[1] == 0:  # a single step has nothing to enter; keep the graph connected
            matrices = matrices.sum() + matrices.new_zeros(1, 1, N, N)
    zeros = flat.new_zeros(N)
    start = zeros if start is None else start.to(dtype)
    end = zeros if end is None else end.to(dtype)
    return Chains(compacted, matrices, start, end, lengths, rows)


def logsumexp(x: Tensor, dim: int) -> Tensor:
    """Log-sum-exp. All -inf gives -inf and the gradient 0, where that of torch.logsumexp is NaN."""
    top = x.detach().amax(dim, keepdim=True)
    top = torch.where(top.isinf(), 0, top)
    total = (x - top).exp().sum(dim)
    none = total == 0
    return torch.where(none, -math.inf, torch.where(none, 1, total).log()) + top.squeeze(dim)


def finite(x: Tensor) -> Tensor:
    """Zeros in place of -inf, without gradient: keeps -inf - -inf out of differences."""
    return torch.where(x == -math.inf, 0, x)


def forward_messages(chains: Chains) -> list[Tensor]:
    """alpha_k [B, N] for every k. Past the end of a sequence the last message is carried on."""
    first, *emissions = chains.emissions.unbind(1)  # at once: the backward pass of T selections would be T^2 work
    alpha = chains.start + first
    messages = [alpha]
    for k, emission in enumerate(emissions, 1):
        entered = logsumexp(alpha[:, :, None] + chains.step(k), dim=1) + emission
        alpha = torch.where(chains.valid(k), entered, alpha)
        messages.append(alpha)
    return messages


def backward_messages(chains: Chains) -> list[Tensor]:
    """beta_k [B, N] for every k. Past the end of a sequence it is `end`."""
    emissions = chains.emissions.unbind(1)
    beta = chains.end.expand_as(emissions[0])
    messages = [beta]
    for k in range(len(emissions) - 1, 0, -1):
        ahead = emissions[k] + beta
        left = logsumexp(chains.step(k) + ahead[:, None, :], dim=2)
        beta = torch.where(chains.valid(k), left, beta)
        messages.append(beta)
    return messages[::-1]


def partition_of(chains: Chains, last_message: Tensor) -> Tensor:
    return torch.where(chains.lengths > 0, logsumexp(last_message + chains.end, dim=1), 0)


def crf_log_partition(
    emissions: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None = None,
    end_transitions: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Return log Z of every sequence, [B]."""
    chains = compact(emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens)
    return partition_of(chains, forward_messages(chains)[-1])


def path_score(chains: Chains, path: Tensor) -> Tensor:
    """Return score(path) [B] of tags [B, L]. A path that begins with -1 does not exist: 0."""
    B, L, N = chains.emissions.shape
    lengths = torch.where(path[:, 0] < 0, 0, chains.lengths)
    exists = torch.arange(L, device=path.device) < lengths[:, None]  # [B, L]
    path = path.clamp(0, N - 1)
    picked = chains.emissions.gather(2, path[:, :, None])[:, :, 0]  # [B, L]
    sequence = torch.arange(B, device=path.device)[:, None] % max(chains.transitions.shape[0], 1)
    step = torch.arange(L - 1, device=path.device) % max(chains.transitions.shape[1], 1)
    moves = chains.transitions[sequence, step, path[:, :-1], path[:, 1:]]  # [B, L-1]
    last = path.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
    bounds = torch.where(lengths > 0, chains.start[path[:, 0]] + chains.end[last], 0)
    return bounds + torch.where(exists, picked, 0).sum(1) + torch.where(exists[:, 1:], moves, 0).sum(1)


def crf_score(
    emissions: Tensor,
    tags: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None = None,
    end_transitions: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Return score(y) of one path per sequence, [B].

    Masked steps are skipped, and so is a path that does not exist (-1 throughout, as n-best decoding returns it).
    A tag of a valid step must lie in [0, N); it is not checked here.
    """
    chains = compact(emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens)
    return path_score(chains, chains.gather(tags.reshape(-1).long()))


def difference(score: Tensor, log_partition: Tensor) -> Tensor:
    """Return score - log Z, where log Z = -inf gives -inf and no gradient."""
    return torch.where(log_partition == -math.inf, -math.inf, score - finite(log_partition))


def crf_log_likelihood(
    emissions: Tensor,
    tags: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None = None,
    end_transitions: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Return log p(tags) of every sequence, [B]; NaN, gradients included, where a valid step has a tag out of range."""
    chains = compact(emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens)
    path = chains.gather(tags.reshape(-1).long())  # [B, L]; steps that do not exist have tag 0
    outside = ((path < 0) | (path >= emissions.shape[-1])).any(1)
    log_partition = partition_of(chains, forward_messages(chains)[-1])
    result = difference(path_score(chains, path), log_partition)
    return result * torch.where(outside, math.nan, 1.0).to(result.dtype)


def crf_partial_log_likelihood(
    emissions: Tensor,
    allowed_tags: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None = None,
    end_transitions: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Return the log of the probability that every valid step takes one of its allowed tags, [B]."""
    if emissions.dtype != torch.float64:
        emissions = emissions.float()  # once, so that the two gradients meet before they are rounded
    allowed = torch.where(allowed_tags != 0, emissions, -math.inf)
    scores = transitions, start_transitions, end_transitions
    return difference(
        crf_log_partition(allowed, *scores, mask=mask, cu_seqlens=cu_seqlens),
        crf_log_partition(emissions, *scores, mask=mask, cu_seqlens=cu_seqlens),
    )


def crf_marginals(
    emissions: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None = None,
    end_transitions: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """p(y_t = j), [B, T, N] or [total, N]; 0 at masked steps and where log Z = -inf."""
    chains = compact(emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens)
    alpha = forward_messages(chains)
    beta = backward_messages(chains)
    log_partition = partition_of(chains, alpha[-1])
    log_p = torch.stack(alpha, 1) + torch.stack(beta, 1) - finite(log_partition)[:, None, None]  # [B, L, N]
    possible = (log_partition != -math.inf)[:, None, None]
    return chains.scatter(torch.where(possible, log_p.exp(), 0), emissions, fill=0)


def crf_entropy(
    emissions: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None = None,
    end_transitions: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """-sum_y p(y) log p(y) in nats, [B]; 0 where log Z = -inf."""
    chains = compact(emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens)

    def expected(logits: Tensor, entropy: Tensor) -> Tensor:
        """sum_i P(i) (entropy(i) - log P(i)) over dim 1, P = softmax(logits), 0 log 0 = 0."""
        log_p = logits - finite(logsumexp(logits, dim=1)).unsqueeze(1)
        possible = log_p != -math.inf
        log_p = torch.where(possible, log_p, 0)
        return torch.where(possible, log_p.exp() * (entropy - log_p), 0).sum(1)

    alpha = forward_messages(chains)
    entropy = torch.zeros_like(alpha[0])  # [B, N]
    for k in range(1, len(alpha)):
        entered = expected(alpha[k - 1][:, :, None] + chains.step(k), entropy[:, :, None])
        entropy = torch.where(chains.valid(k), entered, entropy)
    return torch.where(chains.lengths > 0, expected(alpha[-1] + chains.end, entropy), 0)


def crf_viterbi(
    emissions: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None = None,
    end_transitions: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    n_best: int = 1,
) -> tuple[Tensor, Tensor]:
    """The n best paths and their scores, best first.

    Paths are [B, T] ([total]) and scores [B] for n_best = 1, else [B, n, T] ([n, total]) and [B, n]. Masked steps are
    -1. A path after the first that does not exist or is forbidden has tags -1 and score -inf.
    """
    chains = compact(emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens)
    B, L, N = chains.emissions.shape

    def best(candidates: Tensor) -> tuple[Tensor, Tensor]:
        """The n best of dim 1 with their indices; a stable sort leaves the lowest index in front on ties."""
        values, indices = candidates.sort(dim=1, descending=True, stable=True)
        return values[:, :n_best], indices[:, :n_best]

    # delta [B, N * n]: the n best scores of every tag, tag-major. Step 0 offers one path per tag.
    delta = torch.full((B, N, n_best), -math.inf, dtype=chains.emissions.dtype, device=emissions.device)
    delta = torch.cat([(chains.start + chains.emissions[:, 0])[:, :, None], delta[:, :, 1:]], 2).flatten(1)
    unmoved = torch.arange(N * n_best, device=emissions.device).expand(B, -1)
    pointers = []
    for k in range(1, L):
        moved = delta[:, :, None] + chains.step(k).repeat_interleave(n_best, dim=1)  # [B, N * n, N]
        values, origin = best(moved + chains.emissions[:, k, None, :])  # [B, n, N]
        delta = torch.where(chains.valid(k), values.transpose(1, 2).flatten(1), delta)
        pointers.append(torch.where(chains.valid(k), origin.transpose(1, 2).flatten(1), unmoved))
    scores, slot = best(delta + chains.end.repeat_interleave(n_best))  # [B, n]
    path = [slot // n_best]
    for origin in reversed(pointers):
        slot = origin.gather(1, slot)
        path.append(slot // n_best)
    paths = torch.stack(path[::-1], 1)  # [B, L, n]
    rank = torch.arange(n_best, device=emissions.device)
    empty = (chains.lengths == 0)[:, None]
    scores = torch.where(empty, torch.where(rank == 0, 0.0, -math.inf).to(scores.dtype), scores)
    paths = torch.where(((scores == -math.inf) & (rank > 0))[:, None, :], -1, paths)
    paths = chains.scatter(paths, emissions, fill=-1)  # [B, T, n] or [total, n]
    if n_best == 1:
        return paths[..., 0], scores[:, 0]
    return paths.transpose(-1, -2).contiguous(), scores


def crf_sample_from_uniforms(
    emissions: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None,
    end_transitions: Tensor | None,
    uniforms: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Paths that the numbers `uniforms` [S, B, T] ([S, total]) in [0, 1) pick, int64; -1 at masked steps."""
    chains = compact(emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens)
    B, L, N = chains.emissions.shape
    alpha = forward_messages(chains)
    samples = []
    for numbers in uniforms.reshape(len(uniforms), math.prod(emissions.shape[:-1])).to(alpha[0].dtype):
        number = chains.gather(numbers)  # [B, L]
        tag = torch.zeros(B, dtype=torch.int64, device=emissions.device)
        path = []
        for k in range(L - 1, -1, -1):
            onward = chains.end.expand(B, N)
            if k + 1 < L:
                column = chains.step(k + 1).expand(B, N, N).gather(2, tag[:, None, None].expand(B, N, 1))[:, :, 0]
                onward = torch.where(chains.valid(k + 1), column, onward)
            logits = alpha[k] + onward
            p = (logits - finite(logits.amax(1, keepdim=True))).exp()
            cumulative = p.cumsum(1)
            tag = (cumulative <= number[:, k, None] * cumulative[:, -1:]).sum(1)
            # Rounding must not pick a tag behind the last possible one.
            possible = torch.where(p > 0, torch.arange(N, device=p.device), 0).amax(1)
            tag = torch.minimum(tag, possible)
            path.append(tag)
        samples.append(chains.scatter(torch.stack(path[::-1], 1), emissions, fill=-1))
    return torch.stack(samples)


def crf_sample(
    emissions: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None = None,
    end_transitions: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Independent draws from p(y), int64 [num_samples, B, T] ([num_samples, total]); -1 at masked steps."""
    uniforms = torch.rand(
        num_samples, *emissions.shape[:-1], generator=generator, device=emissions.device, dtype=torch.float32
    )
    scores = emissions, transitions, start_transitions, end_transitions
    return crf_sample_from_uniforms(*scores, uniforms, mask=mask, cu_seqlens=cu_seqlens)
