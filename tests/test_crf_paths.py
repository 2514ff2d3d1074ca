"""Paths and probabilities: decoding, sampling, and every function against the enumeration of all paths."""

import functools
import itertools
import math

import pytest
import torch
from crf_problems import (
    FUNCTIONS,
    check_paths,
    check_samples,
    entropy,
    enumerate_paths,
    log_likelihood,
    log_partition,
    make_problem,
    marginals,
    partial_log_likelihood,
    viterbi_score,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tools import assert_same

import fastnlp_ops
from fastnlp_ops import reference

CASES = {
    "ragged": {"B": 5, "T": 23, "N": 9, "mask": "prefix"},
    "left": {"B": 4, "T": 12, "N": 8, "mask": "left"},
    "holes": {"B": 7, "T": 13, "N": 17, "mask": "holes"},
    "packed": {"B": 6, "T": 11, "N": 5, "mask": "holes", "packed": True},
    "one": {"B": 1, "T": 1, "N": 1},
    "one_step": {"B": 3, "T": 1, "N": 6},
    "one_tag": {"B": 3, "T": 6, "N": 1, "mask": "holes"},
    "no_sequence": {"B": 0, "T": 4, "N": 3},
    "no_step": {"B": 3, "T": 0, "N": 4},
    "nothing_packed": {"B": 3, "T": 0, "N": 4, "packed": True},
    "two_steps": {"B": 3, "T": 2, "N": 4, "per_position": True},
    "position": {"B": 4, "T": 9, "N": 6, "mask": "holes", "per_position": True},
    "no_bounds": {"B": 3, "T": 7, "N": 5, "bounds": False},
    "banned": {"B": 6, "T": 15, "N": 7, "mask": "holes", "ban": 0.3},
    "peaked": {"B": 4, "T": 40, "N": 10, "std": 30.0, "ban": 0.3},
    "wide": {"B": 2, "T": 5, "N": 130, "mask": "prefix"},
    "long": {"B": 2, "T": 301, "N": 6, "mask": "holes"},
}
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
each_case = pytest.mark.parametrize("case", CASES)


@pytest.mark.parametrize("n_best", [1, 2, 5])
@each_case
def test_paths(case, n_best, device):
    check_paths(make_problem(device=device, **CASES[case]), n_best)


@pytest.mark.parametrize(
    "case", ["one", "one_step", "one_tag", "two_steps", "position", "no_bounds", "banned", "packed"]
)
def test_more_paths_than_exist(case, device):
    check_paths(make_problem(device=device, **CASES[case]), n_best=40)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    B=st.integers(0, 5),
    T=st.integers(0, 9),
    N=st.integers(1, 40),
    mask=st.sampled_from([None, "prefix", "left", "holes"]),
    form=st.sampled_from(["shared", "packed", "per_position"]),
    std=st.sampled_from([0.0, 1.0, 100.0]),
    ban=st.sampled_from([0.0, 0.2, 0.9]),
    n_best=st.integers(1, 6),
    seed=st.integers(0, 2**32),
)
def test_fuzz_paths(device, B, T, N, mask, form, std, ban, n_best, seed):
    torch.manual_seed(seed)
    forms = {"packed": form == "packed", "per_position": form == "per_position"}
    problem = make_problem(B, T, N, device, mask=mask, std=std, ban=ban, **forms)
    check_paths(problem, n_best)
    check_samples(problem)


@pytest.mark.parametrize("case", [case for case in CASES if case != "peaked"])
def test_sample_inverts_distribution(case, device):
    """Given its successor, the drawn tag is the one whose stretch of the cumulative distribution holds the number."""
    problem = make_problem(device=device, **CASES[case])
    uniforms = torch.rand(3, *problem.emissions.shape[:-1], device=device)
    emissions, transitions, start, end = problem.scores
    arguments = (emissions, transitions, start, end, problem.mask, problem.cu_seqlens, uniforms)
    samples = torch.ops.fastnlp_ops.crf_sample(*arguments)
    for b in range(problem.batch):
        emissions, _, transitions, _ = problem.to(torch.float64).single(b)
        N = emissions.shape[-1]
        bounds = [torch.zeros(N, device=device) if bound is None else bound for bound in (problem.start, problem.end)]
        message = bounds[0].double() + emissions[:1]
        messages = [message]
        for k in range(1, len(emissions)):
            matrix = transitions if transitions.dim() == 2 else transitions[k - 1]
            messages.append(reference.crf.logsumexp(messages[-1][..., None] + matrix, 1) + emissions[k])
        for sample, numbers in zip(samples, uniforms, strict=True):
            path, number = sample[problem.rows(b)], numbers[problem.rows(b)].double()
            for k, message in enumerate(messages[: len(path)]):
                if k + 1 == len(path):
                    onward = bounds[1].double()
                else:
                    onward = (transitions if transitions.dim() == 2 else transitions[k])[:, path[k + 1]]
                probability = torch.softmax(message[0] + onward, 0)
                if probability.isnan().any():  # nothing is possible in this sequence
                    continue
                upper = probability.cumsum(0)[path[k]].item()
                lower = upper - probability[path[k]].item()
                # float32 messages: their rounding moves the borders by about 1e-5 at these lengths.
                assert lower - 1e-4 <= number[k].item() <= upper + 1e-4
                assert probability[path[k]] > 0


def test_sample_frequencies(device):
    """20,000 draws of a chain of three steps (one masked out between) against the enumerated distribution."""
    problem = make_problem(1, 4, 3, device, poison=False)
    problem.mask = torch.tensor([[True, False, True, True]], device=device)
    emissions, _, transitions, positions = problem.single(0)
    _, score = enumerate_paths(emissions, transitions, problem.start, problem.end)
    draws = 20000
    samples = fastnlp_ops.crf_sample(*problem.scores, mask=problem.mask, num_samples=draws)[:, 0, positions]
    index = (samples * torch.tensor([9, 3, 1], device=device)).sum(1)
    share = torch.bincount(index, minlength=27).double() / draws
    p = score.softmax(0)
    # Five standard deviations of a binomial share: one false alarm in about 60,000 runs over 27 paths.
    assert ((share - p).abs() <= 5 * (p * (1 - p) / draws).sqrt() + 1 / draws).all()


def test_sample_generator(device):
    problem = make_problem(4, 9, 6, device)

    def draw(seed):
        generator = torch.Generator(device).manual_seed(seed)
        return fastnlp_ops.crf_sample(*problem.scores, num_samples=5, generator=generator)

    assert_same(draw(1), draw(1))
    assert (draw(1) != draw(2)).any()
    assert (draw(1)[0] != draw(1)[1]).any()


BRUTE = ["left", "holes", "packed", "one", "one_tag", "no_step", "two_steps", "position", "no_bounds", "banned"]


@pytest.mark.parametrize("case", BRUTE)
def test_brute_force(case, device):
    """All functions against sums over all paths, in float64."""
    options = {**CASES[case], "N": min(4, CASES[case]["N"]), "T": min(6, CASES[case]["T"])}
    problem = make_problem(device=device, dtype=torch.float64, **options)
    results = {function: function(fastnlp_ops, problem) for function in FUNCTIONS}
    paths, path_scores = fastnlp_ops.crf_viterbi(*problem.scores, **problem.layout)
    n_paths, n_scores = fastnlp_ops.crf_viterbi(*problem.scores, **problem.layout, n_best=4)
    close = functools.partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)  # sums of up to 4096 float64 terms
    for b in range(problem.batch):
        emissions, tags, transitions, _ = problem.single(b)
        all_paths, score = enumerate_paths(emissions, transitions, problem.start, problem.end)
        rows = problem.rows(b)
        total = torch.logsumexp(score, 0)
        close(results[log_partition][b], total)
        if total == -math.inf:
            continue
        p = (score - total).exp()
        gold = score[(all_paths == tags).all(1)].squeeze(0)
        close(results[log_likelihood][b], gold - total)
        allowed = torch.ones(len(all_paths), dtype=torch.bool, device=device)
        for k, allowed_tags in enumerate(problem.allowed[rows]):
            allowed &= allowed_tags[all_paths[:, k]]
        close(results[partial_log_likelihood][b], torch.logsumexp(score[allowed], 0) - total)
        expected = torch.nn.functional.one_hot(all_paths, emissions.shape[-1]).double()  # [paths, L, N]
        close(results[marginals][rows], torch.einsum("p,pln->ln", p, expected))
        close(results[entropy][b], -torch.special.xlogy(p, p).sum())
        best = score.argsort(descending=True, stable=True)
        close(path_scores[b], score[best[0]])
        close(results[viterbi_score][b], score[best[0]])
        assert_same(paths[rows], all_paths[best[0]], "best path")
        for rank in range(4):
            own = n_paths[rank][rows] if problem.cu_seqlens is not None else n_paths[b, rank, rows[1]]
            if rank < len(score) and score[best[rank]] > -math.inf:
                close(n_scores[b, rank], score[best[rank]])
                assert_same(own, all_paths[best[rank]], f"path of rank {rank}")
            else:
                assert n_scores[b, rank] == -math.inf
                assert (own == -1).all()


@pytest.mark.parametrize("N", [1, 2, 3, 5])
@pytest.mark.parametrize("T", [1, 2, 4])
@pytest.mark.parametrize("per_position", [False, True])
def test_probabilities_sum_to_one(N, T, per_position, device):
    """The batch of all paths of one sequence. A normaliser that reads transitions as [to, from] fails this."""
    problem = make_problem(1, T, N, device, per_position=per_position)
    paths = torch.tensor(list(itertools.product(range(N), repeat=T)), device=device)
    emissions = problem.emissions.expand(len(paths), -1, -1)
    transitions = problem.transitions
    if per_position:
        transitions = transitions.expand(len(paths), -1, -1, -1)
    log_p = fastnlp_ops.crf_log_likelihood(emissions, paths, transitions, problem.start, problem.end)
    assert abs(log_p.double().exp().sum().item() - 1) < 1e-5  # 625 float32 terms


@each_function
def test_masked_equals_compacted(function, device):
    """A sequence with holes is, to the bit, the sequence without them: in whatever batch, padded or packed."""
    problem = make_problem(5, 14, 6, device, mask="holes")
    together = function(fastnlp_ops, problem)
    for b in range(problem.batch):
        emissions, tags, _, _ = problem.single(b)
        alone = problem.with_scores(emissions.expand(4, -1, -1), *problem.scores[1:])
        alone.mask, alone.tags = None, tags.expand(4, -1)
        alone.allowed = problem.allowed[problem.rows(b)].expand(4, -1, -1)
        whole = together[problem.rows(b)] if function is marginals else together[b]
        assert_same(whole, function(fastnlp_ops, alone)[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize(("T", "N"), [(1, 1), (3, 2), (17, 24), (40, 9)])
def test_op_of_one_best_path(T, N, dtype, device):
    """The public function calls Viterbi then; the op itself takes 1 as well, in memory of its own size."""
    problem = make_problem(13, T, N, device, dtype, mask="holes")
    arguments = (*problem.scores, problem.mask, None)
    paths, scores = torch.ops.fastnlp_ops.crf_viterbi_n_best(*arguments, 1)
    expected, best = torch.ops.fastnlp_ops.crf_viterbi(*arguments)
    assert_same(paths[:, 0], expected)
    assert_same(scores[:, 0], best)
