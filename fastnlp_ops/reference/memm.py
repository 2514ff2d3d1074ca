r"""Maximum-entropy Markov models in plain PyTorch: the mathematics that the compiled kernels must reproduce.

A sequence of L emissions e_k [N] is tagged one step after the other, every step by a softmax of its own (McCallum,
Freitag, Pereira 2000). The score of a step is the mean of its emission and of the row of its predecessor in
T [from, to], as in bert4keras (Su 2020):

    forward    p(y_0) = softmax(e_0)              p(y_k | y_{k-1}) = softmax_j((e_k(j) + T[y_{k-1}, j]) / 2)
    reversed   p(y_{L-1}) = softmax(e_{L-1})      p(y_k | y_{k+1}) = softmax_i((e_k(i) + T[i, y_{k+1}]) / 2)

The log-likelihood is log p of the forward model or, bidirectional, the mean of the log p of both. No step needs the
normaliser of another: all steps are computed at once.

Decoding is Viterbi on a linear chain. With Z_k(i) = log sum_j exp((e_k(j) + T_ij) / 2) a forward edge scores
e_k(y_k) / 2 + T[y_{k-1}, y_k] / 2 - Z_k(y_{k-1}): the last term belongs to step k-1 alone. With the mirrored normaliser
W_k(j) = log sum_i exp((e_k(i) + T_ij) / 2) a reversed edge (k, k+1) scores
e_k(y_k) / 2 + T[y_k, y_{k+1}] / 2 - W_k(y_{k+1}): the last term belongs to step k+1. So log p(y) is the score of a
chain with transitions T / 2 and emissions

    forward    f_k = (k = 0 ? e_0 - lse(e_0) : e_k / 2)              - (k < L-1 ? Z_{k+1} : 0)
    reversed   r_k = (k = L-1 ? e_{L-1} - lse(e_{L-1}) : e_k / 2)    - (k > 0 ? W_{k-1} : 0)

bidirectional (f_k + r_k) / 2. A step whose normaliser is -inf has no distribution: its log-likelihood is -inf, and in
the chain the tag that leads there is forbidden.

The mask may be any pattern: k counts the valid steps, the neighbour of a step is the next valid one. Masked values are
never read, whatever they are. Any device; half precision is computed in float32; differentiable to any order.

References:
    McCallum, Freitag, Pereira: Maximum Entropy Markov Models for Information Extraction and Segmentation. ICML 2000.
    Su: an alternative to the CRF layer, the (bidirectional) MEMM, https://kexue.fm/archives/7213, 2020.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastnlp_ops.reference.crf import crf_viterbi, finite, logsumexp


def neighbours(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the valid step before and after every step, [B, T]: -1 and T where there is none."""
    T = mask.shape[1]
    steps = torch.arange(T, device=mask.device).expand(mask.shape)
    before = torch.where(mask, steps, -1).cummax(1).values
    after = torch.where(mask, steps, T).flip(1).cummin(1).values.flip(1)
    edge = steps.new_full((len(mask), 1), -1)
    return torch.cat([edge, before], 1)[:, :T], torch.cat([after, edge + T + 1], 1)[:, 1:]


def inputs(emissions: Tensor, transitions: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Emissions (0 where masked) and transitions in the compute type, mask [B, T] as bool."""
    double = torch.float64 in (emissions.dtype, transitions.dtype)
    dtype = torch.float64 if double else torch.float32
    valid = torch.ones(emissions.shape[:2], dtype=torch.bool, device=emissions.device) if mask is None else mask != 0
    return torch.where(valid[:, :, None], emissions, 0).to(dtype), transitions.to(dtype), valid


def memm_log_likelihood(
    emissions: Tensor,
    tags: Tensor,
    transitions: Tensor,
    *,
    mask: Tensor | None = None,
    bidirectional: bool = True,
) -> Tensor:
    """Log p(tags) of every sequence, [B]. NaN, gradients included, where a valid step has a tag outside [0, N)."""
    N, T = emissions.shape[-1], emissions.shape[1]
    e, matrix, valid = inputs(emissions, transitions, mask)
    outside = valid & ((tags < 0) | (tags >= N))
    y = torch.where(valid & ~outside, tags, 0).long()  # [B, T]
    before, after = neighbours(valid)

    def direction(rows: Tensor, neighbour: Tensor) -> Tensor:
        """sum_k log p(y_k | tag of the neighbour); rows [N, N] are indexed by that tag."""
        exists = (neighbour >= 0) & (neighbour < T)  # [B, T]
        tag = y.gather(1, torch.where(exists, neighbour, 0))  # [B, T]
        logits = torch.where(exists[:, :, None], (e + rows[tag]) / 2, e)  # [B, T, N]
        gold = logits.gather(2, y[:, :, None])[:, :, 0]
        normaliser = logsumexp(logits, dim=2)
        log_p = torch.where(normaliser == -math.inf, -math.inf, gold - finite(normaliser))
        return torch.where(valid, log_p, 0).sum(1)

    result = direction(matrix, before)
    if bidirectional:
        result = (result + direction(matrix.t(), after)) / 2
    return result * torch.where(outside.any(1), math.nan, 1.0).to(result.dtype)


def memm_chain(
    emissions: Tensor, transitions: Tensor, *, mask: Tensor | None = None, bidirectional: bool = True
) -> tuple[Tensor, Tensor]:
    """Emissions [B, T, N] and transitions [N, N] of the linear chain whose path scores are log p."""
    e, matrix, valid = inputs(emissions, transitions, mask)
    N, T = e.shape[-1], e.shape[1]

    def direction(rows: Tensor, neighbour: Tensor, follower: Tensor) -> Tensor:
        """f_k of the header; rows [i, j] of the tag i that a step is given, neighbour the step that gives it."""
        first = (neighbour < 0) | (neighbour >= T)
        alone = e - finite(logsumexp(e, dim=2))[:, :, None]
        normaliser = logsumexp((e[:, :, None, :] + rows) / 2, dim=3)  # [B, T, N]: of the step, by the tag it is given
        last = ((follower < 0) | (follower >= T))[:, :, None]  # [B, T, 1]
        paid = normaliser.gather(1, torch.where(last, 0, follower[:, :, None]).expand(-1, -1, N))
        score = torch.where(first[:, :, None], alone, e / 2) - torch.where(last, 0, finite(paid))
        return torch.where(~last & (paid == -math.inf), -math.inf, score)

    before, after = neighbours(valid)
    chain = direction(matrix, before, after)
    if bidirectional:
        chain = (chain + direction(matrix.t(), after, before)) / 2
    return chain, matrix / 2


def memm_viterbi(
    emissions: Tensor,
    transitions: Tensor,
    *,
    mask: Tensor | None = None,
    bidirectional: bool = True,
    n_best: int = 1,
) -> tuple[Tensor, Tensor]:
    """The n best paths by log p and their log p; shapes and padding as crf_viterbi's."""
    chain, matrix = memm_chain(emissions, transitions, mask=mask, bidirectional=bidirectional)
    return crf_viterbi(chain, matrix, mask=mask, n_best=n_best)
