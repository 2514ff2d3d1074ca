"""What bench_crf needs beside times: float64 truth for large shapes, log Z on hostile inputs, every op once."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

import fastnlp_ops
from benchmarks.harness import OURS, Accuracy
from fastnlp_ops.reference import crf as reference

SEEDS = 6
SHAPES = ((9, 128), (33, 512))  # tags, steps


def closed_form(
    emissions: Tensor, tags: Tensor, transitions: Tensor, start: Tensor, end: Tensor, on: Tensor
) -> tuple[Tensor, ...]:
    """Summed log-likelihood of right-padded sequences and its four gradients, by forward-backward in the inputs' dtype.

    For shapes where autograd through the reference takes minutes; tests/test_benchmarks.py compares the two.
    """
    T = emissions.shape[1]
    rows, last = torch.arange(len(on), device=on.device), on.sum(1) - 1
    alpha, beta = torch.empty_like(emissions), torch.empty_like(emissions)  # [B, T, N]
    alpha[:, 0] = start + emissions[:, 0]
    for t in range(1, T):
        step = (alpha[:, t - 1, :, None] + transitions).logsumexp(1) + emissions[:, t]
        alpha[:, t] = torch.where(on[:, t, None], step, alpha[:, t - 1])
    log_z = (alpha[:, -1] + end).logsumexp(1)  # [B]
    beta[:, -1] = end
    pairs = torch.zeros_like(transitions)
    for t in range(T - 1, 0, -1):
        later = transitions + (emissions[:, t] + beta[:, t])[:, None]  # [B, from, to]
        moves = (alpha[:, t - 1, :, None] + later - log_z[:, None, None]).exp()
        pairs += (moves * on[:, t, None, None]).sum(0)
        beta[:, t - 1] = torch.where(on[:, t, None], later.logsumexp(2), beta[:, t])
    demissions = -(alpha + beta - log_z[:, None, None]).exp() * on[..., None]
    dstart, dend = demissions[:, 0].sum(0), demissions[rows, last].sum(0)
    gold = torch.zeros_like(demissions).scatter_(2, tags[..., None], on[..., None].to(demissions))
    counts = torch.einsum("bti,btj->ij", gold[:, :-1], gold[:, 1:])
    score = (gold * emissions).sum() + (counts * transitions).sum()
    score += (gold[:, 0] * start).sum() + (gold[rows, last] * end).sum()
    dstart, dend = dstart + gold[:, 0].sum(0), dend + gold[rows, last].sum(0)
    return score - log_z.sum(), demissions + gold, counts - pairs, dstart, dend


def bans(tags: int) -> Tensor:
    """[N, N], True where BIO forbids the move: tag 0 is O, then B-X, I-X in turn; I-X may follow B-X and I-X alone."""
    kind = (torch.arange(tags) + 1) // 2
    inside = (torch.arange(tags) % 2 == 0) & (torch.arange(tags) > 0)
    return inside[None, :] & (kind[:, None] != kind[None, :])


def hostile(tags: int, steps: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, emissions [B, T, N], transitions [N, N]): scores that cost careless recursions digits, or everything."""
    generator = torch.Generator().manual_seed(tags)
    forbidden = bans(tags)

    def draw(std: float) -> Tensor:
        return std * torch.randn(SEEDS, steps, tags, generator=generator)

    plain = torch.randn(tags, tags, generator=generator)
    for std in (1, 5, 30, 100):
        yield f"std {std}", draw(std), plain
        for ban in (-1e4, -math.inf):
            yield f"std {std}, BIO bans {ban:g}", draw(std), plain.masked_fill(forbidden, ban)
    emissions, chain = draw(1), plain.clone()
    emissions[:, : steps // 2, 1] += 200
    emissions[:, steps // 2 :, 1] -= 1e4
    chain[1, 2:] = -math.inf
    yield "a dominating tag that dies later", emissions, chain
    yield "every transition -1e4", draw(1), torch.full((tags, tags), -1e4)


def accuracy(device: str) -> list[Accuracy]:
    """|log Z - float64| and its allowance (1e-6 relative + 1e-4), per set where the two are closest."""
    functions = {OURS: fastnlp_ops.crf_log_partition, "reference": reference.crf_log_partition}
    worst: dict[tuple[str, str], tuple[float, float]] = {}
    for tags, steps in SHAPES:
        for name, *tensors in hostile(tags, steps):
            emissions, transitions = (tensor.to(device) for tensor in tensors)
            exact = reference.crf_log_partition(emissions.double(), transitions.double())
            for provider, function in functions.items():
                error = (function(emissions, transitions).double() - exact).abs().nan_to_num(math.inf)
                allowed = 1e-6 * exact.abs() + 1e-4
                at = (error / allowed).argmax()
                found = (error[at].item(), allowed[at].item())
                key = (name, provider)
                worst[key] = max(worst.get(key, (0.0, 1.0)), found, key=lambda pair: pair[0] / pair[1])
    return [Accuracy(*key, *found) for key, found in worst.items()]


def exercise(device: str) -> None:
    """Every op once, forward and backward, over every kernel class; small, because the sanitizers are slow."""
    shapes = [(3, 17, 9), (3, 17, 32), (2, 17, 50), (2, 9, 128), (1, 1, 2), (1, 1500, 9)]  # the last is cut into chunks
    for shape in shapes:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            exercise_one(shape, dtype, device)
            if shape[1] > 100:
                break
    if device == "cuda":
        torch.cuda.synchronize()


def exercise_one(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    batch, steps, tags = shape
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    emissions = torch.randn(shape, device=device).to(dtype).requires_grad_()
    chain = [torch.randn(s, device=device, dtype=compute).requires_grad_() for s in ((tags, tags), (tags,), (tags,))]
    labels = torch.randint(tags, (batch, steps), device=device)
    mask = torch.rand(batch, steps, device=device) < 0.8  # holes, left padding, perhaps an empty sequence
    offsets = torch.arange(batch + 1, device=device) * steps
    moves = torch.randn(batch, steps - 1, tags, tags, device=device, dtype=compute).requires_grad_()

    def differentiate(value: Tensor) -> None:
        value.sum().backward()

    for on in (None, mask):
        differentiate(fastnlp_ops.crf_log_likelihood(emissions, labels, *chain, mask=on))
        differentiate(fastnlp_ops.crf_log_partition(emissions, *chain, mask=on))
        fastnlp_ops.crf_marginals(emissions, *chain, mask=on)
        fastnlp_ops.crf_viterbi(emissions, *chain, mask=on)
        fastnlp_ops.crf_viterbi(emissions, *chain, mask=on, n_best=3)
        fastnlp_ops.crf_sample(emissions, *chain, mask=on, num_samples=2)
        fastnlp_ops.crf_entropy(emissions, *chain, mask=on)
    packed = emissions.detach().reshape(-1, tags).requires_grad_()
    differentiate(fastnlp_ops.crf_log_likelihood(packed, labels.reshape(-1), *chain, cu_seqlens=offsets))
    fastnlp_ops.crf_viterbi(packed, *chain, cu_seqlens=offsets)
    if steps > 1:
        differentiate(fastnlp_ops.crf_log_likelihood(emissions, labels, moves, *chain[1:], mask=mask))
        fastnlp_ops.crf_viterbi(emissions, moves, *chain[1:], mask=mask)
    allowed = torch.rand(shape, device=device) < 0.7
    differentiate(fastnlp_ops.crf_partial_log_likelihood(emissions, allowed, *chain, mask=mask))
