"""Eight sequences at a time (csrc/cpu/crf_lanes.h), four in Viterbi for many tags (csrc/cpu/crf_decode.h): groups and
parts of one, sequences that end early, and those that a lane cannot hold. On a GPU the same cases run through its
kernels.
"""

import pytest
import torch
from crf_problems import (
    check_at_any_scale,
    check_backward,
    check_forward,
    forbid_bio,
    gradients,
    log_likelihood,
    log_partition,
    make_problem,
)
from tools import assert_same

import fastnlp_ops

CASES = {
    "half a group": {"B": 4, "T": 17, "N": 9},
    "ragged": {"B": 33, "T": 23, "N": 3, "mask": "prefix"},
    "holes": {"B": 12, "T": 40, "N": 18, "mask": "holes"},
    "left": {"B": 9, "T": 26, "N": 12, "mask": "left"},
    "packed": {"B": 9, "T": 31, "N": 32, "mask": "prefix", "packed": True},
    "bf16": {"B": 16, "T": 12, "N": 5, "dtype": torch.bfloat16},
    "f16": {"B": 10, "T": 12, "N": 11, "dtype": torch.float16, "mask": "prefix"},
    "many tags": {"B": 130, "T": 6, "N": 40},
    "two steps": {"B": 7, "T": 2, "N": 2},
    "banned bounds": {"B": 11, "T": 19, "N": 7, "mask": "prefix"},
    "blocks": {"B": 8, "T": 131, "N": 4},
}


def problem_of(case, device):
    problem = make_problem(device=device, **CASES[case])
    if case == "banned bounds":
        problem.start[2:4] = -torch.inf
        problem.end[5] = -torch.inf
    return problem


@pytest.mark.parametrize("function", [log_partition, log_likelihood], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", CASES)
def test_groups(function, case, device):
    problem = problem_of(case, device)
    check_forward(function, problem)
    check_backward(function, problem)


# What a lane cannot hold, at one step of one sequence, or everywhere in it.
STRANGE = {
    "nan": lambda e: e[5].fill_(torch.nan),
    "infinite": lambda e: e[5, 2].fill_(torch.inf),
    "forbidden": lambda e: e[5].fill_(-torch.inf),
    "one tag possible": lambda e: e[5, 1:].fill_(-torch.inf),
    "far apart": lambda e: e.mul_(200),
}


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("function", [log_partition, log_likelihood], ids=lambda f: f.__name__)
def test_neighbours_do_not_notice(function, strange, device):
    problem = make_problem(B=12, T=14, N=6, device=device)
    clean = function(fastnlp_ops, problem)
    weights = torch.randn(12, device=device)
    clean_gradients = gradients(function, fastnlp_ops, problem, None, weights)
    STRANGE[strange](problem.emissions[4])
    others = [b for b in range(12) if b != 4]
    value = function(fastnlp_ops, problem)
    assert_same(value[others], clean[others])
    assert value[4].item() != clean[4].item()
    assert_same(gradients(function, fastnlp_ops, problem, None, weights)[0][others], clean_gradients[0][others])
    if strange not in ("nan", "infinite"):
        check_forward(function, problem)
        check_backward(function, problem)


@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize("mask", [None, "prefix", "holes"])
@pytest.mark.parametrize("N", [1, 2, 3, 9, 16, 17, 24, 33, 41, 70])
def test_viterbi_is_that_of_one_sequence(N, mask, per_position, device):
    """To the bit, ties included: scores are multiples of 1/2. Many tags take four sequences in turn, which share steps
    where they share the transitions; one of them is empty here.
    """
    problem = make_problem(B=11, T=15, N=N, device=device, mask=mask, per_position=per_position)
    if mask is not None:
        problem.mask[6] = False
    problem = problem.with_scores(*(score.nan_to_num(0).mul(2).round().div(2) for score in problem.scores))
    paths, scores = fastnlp_ops.crf_viterbi(*problem.scores, mask=problem.mask)
    if mask is not None:
        assert scores[6] == 0 and (paths[6] == -1).all()
    for b in range(11):
        emissions, _, transitions, positions = problem.single(b)
        transitions = transitions[None] if per_position else transitions
        path, score = fastnlp_ops.crf_viterbi(emissions[None], transitions, problem.start, problem.end)
        assert_same(paths[b, positions], path[0])
        assert_same(scores[b], score[0])


@pytest.mark.parametrize("mask", ["prefix", "left", "holes"])
@pytest.mark.parametrize("banned", ["nothing", "some", "BIO"])
@pytest.mark.parametrize("std", [1, 15, 25, 100, 1_000, 10_000])
def test_ended_and_failed_lanes_add_nothing(std, banned, mask, device):
    """Lanes that have ended or failed hold inf and NaN beside those that go on: large scores and forbidden transitions
    make lanes fail, ragged masks end them, and four problems give mixtures of both.
    """
    for B, N in ((8, 3), (11, 5), (8, 9), (11, 24)):
        problem = make_problem(B, 39, N, device, mask=mask, ban=0.3 if banned == "some" else 0.0, std=std)
        if banned == "BIO":
            forbid_bio(problem)
        for function in (log_partition, log_likelihood):
            check_at_any_scale(function, problem)


def test_viterbi_neighbours_of_nan(device):
    problem = make_problem(B=12, T=14, N=6, device=device)
    paths, scores = fastnlp_ops.crf_viterbi(*problem.scores)
    problem.emissions[4, 5, 1:] = torch.nan
    again, again_scores = fastnlp_ops.crf_viterbi(*problem.scores)
    others = [b for b in range(12) if b != 4]
    assert_same(again[others], paths[others])
    assert_same(again_scores[others], scores[others])
    alone, _ = fastnlp_ops.crf_viterbi(problem.emissions[4:5], *problem.scores[1:])
    assert_same(again[4], alone[0])
