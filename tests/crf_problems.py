"""Random CRF problems in every layout, the CRF functions over them, and the enumeration of all paths."""

import dataclasses
import itertools
import math

import torch
from tools import assert_within_budget, floor_of, rounding_level, sum_of

import fastnlp_ops
from fastnlp_ops import reference


@dataclasses.dataclass
class Problem:
    """Arguments of one CRF call."""

    emissions: torch.Tensor
    tags: torch.Tensor
    transitions: torch.Tensor
    start: torch.Tensor | None
    end: torch.Tensor | None
    mask: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    allowed: torch.Tensor | None = None  # allowed tags of the partial log-likelihood

    @property
    def scores(self):
        """The differentiable arguments in the order of every function, tags aside."""
        return self.emissions, self.transitions, self.start, self.end

    @property
    def layout(self):
        return {"mask": self.mask, "cu_seqlens": self.cu_seqlens}

    @property
    def batch(self):
        return len(self.emissions) if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    def with_scores(self, *scores):
        return dataclasses.replace(self, **dict(zip(("emissions", "transitions", "start", "end"), scores, strict=True)))

    def to(self, dtype):
        """The same values in another dtype; from half precision to float32 and float64 without loss."""
        return self.with_scores(*(None if score is None else score.detach().to(dtype) for score in self.scores))

    def leaves(self, dtype=None):
        """A copy whose scores ask for gradients, and those scores."""
        copy = self.with_scores(*(None if score is None else score.detach().clone() for score in self.scores))
        copy = copy if dtype is None else copy.to(dtype)
        leaves = [score for score in copy.scores if score is not None]
        for leaf in leaves:
            leaf.requires_grad_()
        return copy, leaves

    def single(self, b):
        """Sequence b alone, without mask or padding: emissions [L, N], tags [L], transitions [N, N] or [L-1, N, N]."""
        if self.cu_seqlens is not None:
            rows = slice(*self.cu_seqlens[b : b + 2].tolist())
            return self.emissions[rows], self.tags[rows], self.transitions, self.positions(b)
        positions = self.positions(b)
        transitions = self.transitions if self.transitions.dim() == 2 else self.transitions[b, positions[1:] - 1]
        return self.emissions[b, positions], self.tags[b, positions], transitions, positions

    def positions(self, b):
        """Indices of the valid steps of sequence b in row b of padded outputs, or in packed outputs."""
        if self.cu_seqlens is not None:
            first, last = self.cu_seqlens[b : b + 2].tolist()
            return torch.arange(first, last, device=self.emissions.device)
        if self.mask is None:
            return torch.arange(self.emissions.shape[1], device=self.emissions.device)
        return self.mask[b].nonzero()[:, 0]

    def rows(self, b):
        """The index of sequence b's valid steps in any output: output[..., *rows(b)]."""
        return (self.positions(b),) if self.cu_seqlens is not None else (b, self.positions(b))


def make_mask(kind, B, T):
    """full, prefix (right padding, one empty row), left (left padding), holes (any pattern, one empty row)."""
    steps = torch.arange(T)
    lengths = torch.randint(1, T + 1, (B, 1)) if T else torch.zeros(B, 1, dtype=torch.int64)
    if kind == "full":
        return torch.ones(B, T, dtype=torch.bool)
    if kind == "prefix":
        mask = steps < lengths
    elif kind == "left":
        mask = steps >= T - lengths
    elif kind == "holes":
        mask = torch.rand(B, T) < 0.6
    else:
        raise ValueError(f"kind must be full, prefix, left or holes, got {kind!r}")
    if B > 2 and kind != "left":
        mask[1] = False
    return mask


def make_problem(
    B,
    T,
    N,
    device="cpu",
    dtype=torch.float32,
    *,
    mask=None,
    packed=False,
    per_position=False,
    bounds=True,
    std=1.0,
    ban=0.0,
    poison=True,
):
    """Random scores; `ban` is the share of -inf transitions. Masked emissions are NaN and masked tags -100."""

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64)

    on = make_mask(mask, B, T) if mask is not None else torch.ones(B, T, dtype=torch.bool)
    emissions = std * draw(B, T, N)
    tags = torch.randint(0, N, (B, T))
    transitions = draw(*((B, max(T - 1, 0)) if per_position else ()), N, N)
    transitions[torch.rand(transitions.shape) < ban] = -math.inf
    # Half of the steps allow any tag, the others a random set with the gold tag in it.
    allowed = (torch.rand(B, T, N) < 0.5) | (torch.rand(B, T, 1) < 0.5)
    allowed |= torch.nn.functional.one_hot(tags, N).bool()
    start, end = (draw(N), draw(N)) if bounds else (None, None)
    cu_seqlens = None
    if packed:
        lengths = on.sum(1)
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device)
        emissions, tags, allowed = emissions[on], tags[on], allowed[on]
    elif poison:
        emissions[~on] = math.nan
        tags[~on] = -100
    mask = None if mask is None or packed else on.to(device)
    scores = [None if score is None else score.to(device, dtype) for score in (transitions, start, end)]
    return Problem(emissions.to(device, dtype), tags.to(device), *scores, mask, cu_seqlens, allowed.to(device))


def forbid_bio(problem):
    """-inf where tags O, B-0, I-0, B-1, I-1, ... may not follow each other, and may not start."""
    tag = torch.arange(problem.emissions.shape[-1], device=problem.emissions.device)
    inside = (tag % 2 == 0) & (tag > 0)
    follows = (tag[:, None] == tag) | (tag[:, None] == tag - 1)
    problem.transitions[..., inside & ~follows] = -math.inf
    if problem.start is not None:
        problem.start[inside] = -math.inf


def enumerate_paths(emissions, transitions, start, end):
    """All N^L paths of one sequence [L, N] in lexicographic order, and their scores in float64: [N^L, L], [N^L]."""
    L, N = emissions.shape
    paths = torch.tensor(
        list(itertools.product(range(N), repeat=L)), dtype=torch.int64, device=emissions.device
    ).reshape(N**L, L)
    score = torch.zeros(N**L, dtype=torch.float64, device=emissions.device)
    for k in range(L):
        score = score + emissions[k].double()[paths[:, k]]
        if k > 0:
            matrix = transitions if transitions.dim() == 2 else transitions[k - 1]
            score = score + matrix.double()[paths[:, k - 1], paths[:, k]]
    if L > 0 and start is not None:
        score = score + start.double()[paths[:, 0]]
    if L > 0 and end is not None:
        score = score + end.double()[paths[:, -1]]
    return paths, score


def log_partition(module, problem):
    return module.crf_log_partition(*problem.scores, **problem.layout)


def log_likelihood(module, problem):
    emissions, *rest = problem.scores
    return module.crf_log_likelihood(emissions, problem.tags, *rest, **problem.layout)


def partial_log_likelihood(module, problem):
    emissions, *rest = problem.scores
    return module.crf_partial_log_likelihood(emissions, problem.allowed, *rest, **problem.layout)


def marginals(module, problem):
    return module.crf_marginals(*problem.scores, **problem.layout)


def entropy(module, problem):
    return module.crf_entropy(*problem.scores, **problem.layout)


def viterbi_score(module, problem):
    return module.crf_viterbi(*problem.scores, **problem.layout)[1]


FUNCTIONS = [log_partition, log_likelihood, partial_log_likelihood, marginals, entropy, viterbi_score]


def gradients(function, module, problem, dtype=None, weights=None):
    """Gradients of all scores of `problem` for the upstream gradient `weights`; 0 where nothing depends on a score."""
    problem, leaves = problem.leaves(dtype)
    output = function(module, problem)
    return torch.autograd.grad(output, leaves, weights.to(output.dtype), materialize_grads=True)


def compute_dtype(problem):
    return torch.float64 if problem.emissions.dtype == torch.float64 else torch.float32


def largest_term(function, problem):
    """Of the differences log Z of some paths - log Z, which cancel; entropies are made of such in the reference."""
    if function not in (log_likelihood, partial_log_likelihood, entropy):
        return 0.0
    sums = log_partition(reference, problem.to(torch.float64))
    return torch.where(sums.isfinite(), sums, 0).abs().max().item() if sums.numel() else 0.0


def check_forward(function, problem, floor=0.0):
    """`floor`: of the rounding level, for scores of any scale; what cancels and long sums are allowed for there."""
    actual = function(fastnlp_ops, problem)
    assert actual.dtype == compute_dtype(problem)
    plain = function(reference, problem.to(torch.float32))
    exact = function(reference, problem.to(torch.float64))
    terms = largest_term(function, problem) if floor else 0.0
    assert_within_budget(actual, plain, exact, function.__name__, floor, terms)


def check_backward(function, problem, floor=0.0):
    # Every sequence has its own upstream gradient, of any sign; the first has none.
    exact = function(reference, problem.to(torch.float64))
    weights = torch.randn(exact.shape, device=exact.device)
    weights[:1] = 0
    ours = gradients(function, fastnlp_ops, problem, None, weights)
    plain = gradients(function, reference, problem, torch.float32, weights)
    exact = gradients(function, reference, problem, torch.float64, weights)
    names = ["demissions", "dtransitions", "dstart_transitions", "dend_transitions"][: len(ours)]
    level = max(floor, *(rounding_level(*pair) for pair in zip(plain, exact, strict=True)))
    terms = 0.0
    if floor and function is partial_log_likelihood and weights.numel():
        # two gradients, which cancel, and with them their errors
        terms = 2 * weights.abs().max().item()
        one, other = (gradients(log_partition, reference, problem, t, weights) for t in (torch.float32, torch.float64))
        level = max(level, *(2 * rounding_level(*pair) for pair in zip(one, other, strict=True)))
    if floor and function in (viterbi_score, marginals, entropy):  # not by kernels: float32 sums over all steps
        terms = sum_of(math.prod(problem.emissions.shape[:-1]), [*exact, weights])
    for name, *results in zip(names, ours, plain, exact, strict=True):
        assert_within_budget(*results, f"{name} of {function.__name__}", level, terms)


def check_at_any_scale(function, problem):
    """Value and gradients, where scores are so large that the reference is right by luck."""
    wide = problem.to(torch.float64)

    def value(*scores):
        return [function(reference, wide.with_scores(*scores))]

    weights = torch.randn_like(value(*wide.scores)[0])

    def slopes(*scores):
        return gradients(function, reference, wide.with_scores(*scores), None, weights)

    check_forward(function, problem, floor_of(value, wide.scores))
    narrow = gradients(function, reference, problem, torch.float32, weights)
    check_backward(function, problem, floor_of(slopes, wide.scores, narrow))


def own_scores(problem, paths):
    """Float64 scores [B] of given paths, and a bound of what additions in the problem's dtype round off them."""
    emissions, *rest = problem.to(torch.float64).scores
    score = reference.crf_score(emissions, paths, *rest, **problem.layout)
    terms = [x.nan_to_num(0, 0, 0).abs().flatten() for x in (emissions, *rest) if x is not None]
    size = torch.cat([*terms, torch.ones(1, device=emissions.device)]).max().item()
    terms = 2 * problem.emissions.shape[-2] + 1  # the k-th partial sum is at most k terms, and off by eps / 2 of itself
    return score, terms * (terms + 1) / 4 * size * torch.finfo(compute_dtype(problem)).eps


def padding_of(problem):
    """The steps [B, T] ([total]) that belong to no sequence."""
    on = torch.zeros(problem.emissions.shape[:-1], dtype=torch.bool, device=problem.emissions.device)
    for b in range(problem.batch):
        on[problem.rows(b)] = True
    return ~on


def check_paths(problem, n_best):
    """Paths are legal, -1 at masked steps, best first, distinct, and have the scores that they are given."""
    paths, scores = fastnlp_ops.crf_viterbi(*problem.scores, **problem.layout, n_best=n_best)
    exact = reference.crf_viterbi(*problem.to(torch.float64).scores, **problem.layout, n_best=n_best)[1]
    plain = reference.crf_viterbi(*problem.to(torch.float32).scores, **problem.layout, n_best=n_best)[1]
    assert_within_budget(scores, plain, exact, "scores")
    assert paths.dtype == torch.int64
    if n_best == 1:
        paths, scores = paths.unsqueeze(-2), scores[:, None]
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    padding = padding_of(problem)
    packed = problem.cu_seqlens is not None
    for rank in range(n_best):
        own = paths[rank] if packed else paths[:, rank]
        assert (own[padding] == -1).all()
        missing = scores[:, rank] == -math.inf
        for b in missing.nonzero()[:, 0].tolist() if rank > 0 else []:
            assert (own[problem.rows(b)] == -1).all()
        reachable = (~missing).nonzero()[:, 0].tolist()
        for b in reachable:
            tags = own[problem.rows(b)]
            assert ((tags >= 0) & (tags < problem.emissions.shape[-1])).all()
        score, slack = own_scores(problem, own)
        assert ((score - scores[:, rank])[reachable].abs() <= slack).all()
    for b in range(problem.batch):
        own = paths[:, problem.positions(b)] if packed else paths[b][:, problem.positions(b)]
        existing = [
            tuple(path) for path, score in zip(own.tolist(), scores[b].tolist(), strict=True) if score > -math.inf
        ]
        assert len(set(existing)) == len(existing)


def check_samples(problem, num_samples=2):
    """Samples are legal paths, -1 at masked steps."""
    samples = fastnlp_ops.crf_sample(*problem.scores, **problem.layout, num_samples=num_samples)
    assert samples.dtype == torch.int64
    assert samples.shape == (num_samples, *problem.emissions.shape[:-1])
    padding = padding_of(problem)
    possible = reference.crf_log_partition(*problem.to(torch.float64).scores, **problem.layout) > -math.inf
    for sample in samples:
        assert (sample[padding] == -1).all()
        for b in possible.nonzero()[:, 0].tolist():
            tags = sample[problem.rows(b)]
            assert ((tags >= 0) & (tags < problem.emissions.shape[-1])).all()
        score, _ = own_scores(problem, sample)
        assert (score[possible] > -math.inf).all(), "a forbidden path was drawn"
