"""Random problems of every op against the float64 reference, with what breaks kernels drawn together: forbidden
transitions, masks of any pattern, and scores from 1e-3 to 1e4. tests/test_fuzz.py and tests/fuzz.py run them.

A draw is a family and a seed: everything follows from the two.
"""

import ctypes
import math
import random
from pathlib import Path

import adafactor_problems
import crf_problems
import global_pointer_problems
import linear_attention_problems
import multilabel_problems
import test_memm as memm_problems
import torch
from tools import assert_within_budget, floor_of, sum_of

import fastnlp_ops
from fastnlp_ops import reference
from fastnlp_ops.reference.linear_attention import EXPONENTIAL, FEATURE_MAPS

FLOATS = [torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]


def std_of(r, low=-3.0, high=4.0):
    """A size between 1e-3 and 1e4, all magnitudes alike."""
    return 10.0 ** r.uniform(low, high)


def steps_of(r):
    return r.choice([r.randint(0, 3), r.randint(1, 20), r.randint(10, 60)])


def log_sum_level(scores):
    """Kernels keep the logarithms of sums in float32 from the forward to the backward pass; e^(s - log sum) is as far
    off as the largest of them is rounded.
    """
    finite = scores[scores.isfinite()]
    return 2 * finite.abs().max().item() * torch.finfo(torch.float32).eps if finite.numel() else 0.0


def mask_of(r, B, T):
    """Every sequence has a pattern of its own; some are empty, some full."""
    mask = torch.zeros(B, T, dtype=torch.bool)
    steps = torch.arange(T)
    for b in range(B):
        kind, length = r.choice(["empty", "full", "one", "prefix", "prefix", "left", "holes"]), r.randint(0, T)
        if kind == "full":
            mask[b] = True
        elif kind == "one" and T:
            mask[b, r.randrange(T)] = True
        elif kind == "prefix":
            mask[b] = steps < length
        elif kind == "left":
            mask[b] = steps >= length
        elif kind == "holes":
            mask[b] = torch.rand(T) < r.random()
    return mask


def draw_crf(r, bounds=True):
    """A CRF problem with -inf in transitions and bounds, masks of any pattern, and sizes of all magnitudes."""
    T, N = steps_of(r), r.randint(1, 40)
    form = r.choice(["shared", "shared", "shared", "packed", "per_position"]) if bounds else "shared"
    B = r.randint(0, 5 if form == "per_position" else 20)
    if r.random() < 0.05:
        B, T, N = r.randint(1, 9), r.randint(200, 700), r.randint(1, 12)
    packed, per_position = form == "packed", form == "per_position"
    dtype, std = r.choice(FLOATS), std_of(r)
    masked = r.random() < 0.8 or packed
    problem = crf_problems.make_problem(
        B, T, N, dtype=torch.float64, packed=False, per_position=per_position, bounds=r.random() < 0.8, std=std
    )
    problem.transitions *= std_of(r, -2, 3)
    banned = r.choice(["none", "none", "some", "most", "BIO", "BIO"])
    if banned == "BIO":
        crf_problems.forbid_bio(problem)
    elif banned != "none":
        problem.transitions[torch.rand(problem.transitions.shape) < (0.2 if banned == "some" else 0.8)] = -math.inf
    if banned != "none" and problem.end is not None and r.random() < 0.3:
        problem.end[torch.rand(N) < 0.3] = -math.inf
    if r.random() < 0.15:
        problem.emissions[torch.rand(problem.emissions.shape) < r.choice([0.05, 0.7])] = -math.inf
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    scores = [None if score is None else score.to(compute) for score in problem.scores[1:]]
    problem = problem.with_scores(problem.emissions.to(dtype), *scores)
    on = mask_of(r, B, T) if masked else torch.ones(B, T, dtype=torch.bool)
    if r.random() < 0.5:  # a path that may be had, where there is one
        best, _ = reference.crf_viterbi(*problem.to(torch.float64).scores, mask=on)
        problem.tags = torch.where(best >= 0, best, problem.tags)
        problem.allowed |= torch.nn.functional.one_hot(problem.tags, N).bool()
    if packed:
        lengths = on.sum(1)
        problem.cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        problem.emissions, problem.tags, problem.allowed = problem.emissions[on], problem.tags[on], problem.allowed[on]
    elif masked:
        problem.mask = on
        problem.emissions[~on] = r.choice([math.nan, math.inf, -math.inf])
        problem.tags[~on] = -100
    return problem


def check_crf(r):
    problem = draw_crf(r)
    kind = r.choice(["train", "train", "train", "paths"])
    if kind == "paths":
        if len(problem.emissions) and problem.emissions.shape[-2] <= 60:
            crf_problems.check_paths(problem, r.choice([1, 1, 2, 5]))
        return crf_problems.check_samples(problem)
    return crf_problems.check_at_any_scale(r.choice(crf_problems.FUNCTIONS), problem)


def check_memm(r):
    problem, bidirectional = draw_crf(r, bounds=False), r.random() < 0.7
    exact = problem.to(torch.float64)
    names = ["log-likelihood", "demissions", "dtransitions"]
    weights = torch.randn(problem.batch)

    def call(module, problem, dtype=None):
        problem = problem.with_scores(problem.emissions, problem.transitions, None, None)
        value = memm_problems.log_likelihood(module, problem if dtype is None else problem.to(dtype), bidirectional)
        return [value, *memm_problems.gradients(module, problem, bidirectional, weights, dtype)]

    results = call(fastnlp_ops, problem), call(reference, problem, torch.float32), call(reference, exact)
    wide = lambda *scores: call(reference, exact.with_scores(*scores, None, None))  # noqa: E731
    floor = floor_of(wide, exact.scores[:2], results[1])
    terms = sum_of(math.prod(problem.emissions.shape[:-1]), results[2][2:])
    for name, *three in zip(names, *results, strict=True):
        assert_within_budget(*three, name, floor, terms if name == "dtransitions" else 0.0)


def draw_spans(r):
    B, n, H, pairs = r.randint(0, 4), r.choice([r.randint(0, 9), r.randint(1, 60)]), r.randint(1, 6), r.randint(1, 20)
    if r.random() < 0.05:
        B, n, H = 1, r.randint(100, 300), 1
    rope, shared = r.random() < 0.6, r.random() < 0.4
    problem = global_pointer_problems.make_problem(
        B,
        n,
        H,
        2 * pairs if rope else r.randint(1, 40),
        dtype=r.choice(FLOATS),
        rope=rope,
        shared=shared,
        bias=r.random() < 0.5,
        mask=r.choice([None, "full", "prefix", "left", "holes"]),
        positions=r.random() < 0.3,
        labels=r.choice([0, 1, 5, 60]),
        std=math.sqrt(std_of(r)),
        tril_mask=r.random() < 0.6,
        max_span_length=r.choice([None, None, 1, 2, 7, 100]),
        scale=r.choice([None, 1.0, -0.5]),
        mask_zero=r.random() < 0.2,
    )
    if problem.mask is not None:
        problem.mask = mask_of(r, B, n)
        for x in problem.inputs:
            if x is not None:
                x[x.isnan()] = 1.0
                x[~problem.mask] = r.choice([math.nan, math.inf, -math.inf])
    return problem


def check_spans(r):
    problem, tools = draw_spans(r), global_pointer_problems
    exact = problem.to(torch.float64)
    kind = r.choice(["loss", "loss", "scores", "divergence", "decode"])
    if kind == "decode":
        tools.check_decode(problem)
        return tools.check_decode(problem, threshold=-0.5, nested=False, top_k=3)
    function = getattr(tools, kind)
    floor = floor_of(lambda *x: [function(reference, exact.with_inputs(*x))], exact.inputs)
    tools.check_forward(function, problem, floor)
    value = function(reference, exact)
    weights = torch.where(value == -math.inf, 0.0, torch.randn(value.shape)).float()
    slopes = lambda *x: tools.gradients(function, reference, exact.with_inputs(*x), None, weights)  # noqa: E731
    floor = floor_of(slopes, exact.inputs, tools.gradients(function, reference, problem, torch.float32, weights))
    if kind == "loss":
        floor = max(floor, log_sum_level(tools.scores(reference, exact)))
    return tools.check_backward(function, problem, floor)


def check_multilabel(r):
    kind, tools = r.choice(multilabel_problems.KINDS), multilabel_problems
    R, C = r.randint(0, 20), r.choice([r.randint(0, 9), r.randint(1, 700)])
    share, masked = r.choice([0.0, 0.01, 0.5, 1.0]), r.choice([0.0, 0.0, 0.3, 1.0])
    scores, labels = tools.make_problem(kind, R, C, dtype=r.choice(FLOATS), masked=masked, share=share, std=std_of(r))
    if kind == "soft":
        labels = labels.to(torch.float64 if scores.dtype == torch.float64 else torch.float32)
    weights = torch.randn(R)
    value = floor_of(lambda s: [tools.loss(reference, s, labels)], [scores.double()])
    slope = floor_of(lambda s: [tools.gradient(reference, s, labels, weights)], [scores.double()])
    tools.check(scores, labels, max(value, slope, log_sum_level(scores)))


def draw_attention(r):
    causal, name = r.random() < 0.6, r.choice([None, *FEATURE_MAPS])
    T = r.choice([r.randint(0, 9), r.randint(1, 140)])
    groups = r.randint(1, 3)
    options = {
        "B": r.randint(0, 4),
        "T": T,
        "keys": None if causal or r.random() < 0.5 else r.randint(0, 140),
        "groups": groups,
        "H": groups * r.randint(1, 3),
        "Dk": r.randint(1, 40),
        "Dv": r.randint(1, 40),
        "lengths": [r.randint(0, 70) for _ in range(r.randint(0, 5))] if r.random() < 0.3 else None,
        "mask": r.choice([None, "full", "prefix", "left", "holes"]),
        "decay": r.choice([None, "head", "token"]) if causal and name not in EXPONENTIAL else None,
        "state": r.random() < 0.4,
        "std": std_of(r, -3, 1 if name == "exp" else 2),
        "feature_map": name,
        "causal": causal,
        "normalize": r.random() < 0.7,
        "scale": r.choice([None, 1.0, -0.5]),
        "dtype": r.choice(FLOATS[:3]),
    }
    if options["lengths"] is not None:
        options["mask"] = None
    return linear_attention_problems.make_problem(**options)


def check_attention(r):
    problem, tools = draw_attention(r), linear_attention_problems
    exact = problem.to(torch.float64)
    tools.check_forward(problem, floor_of(lambda *x: tools.plain(exact.with_inputs(*x))[:3], exact.inputs))
    weights = tools.upstream(problem)
    slopes = lambda *x: tools.gradients(tools.plain, exact.with_inputs(*x), weights)  # noqa: E731
    floor = floor_of(slopes, exact.inputs, tools.gradients(tools.plain, problem, weights, torch.float32))
    if problem.kernel_map in EXPONENTIAL:  # log z is at most the largest q + k, and a little more
        floor = max(floor, log_sum_level(exact.q) + log_sum_level(exact.k))
    tools.check_backward(problem, floor=floor)


def check_adafactor(r):
    shapes = [[r.randint(0, 20) for _ in range(r.randint(0, 4))] for _ in range(r.randint(1, 20))]
    options = adafactor_problems.OPTIONS[r.choice(sorted(adafactor_problems.OPTIONS))]
    runs = adafactor_problems.three_runs(shapes, options, "cpu", r.randint(1, 4), std_of(r, -6))
    adafactor_problems.assert_runs_agree(*runs, level=4e-7, held=("",))


FAMILIES = {
    "crf": check_crf,
    "memm": check_memm,
    "global_pointer": check_spans,
    "multilabel": check_multilabel,
    "linear_attention": check_attention,
    "adafactor": check_adafactor,
}
_library = ctypes.CDLL(str(Path(fastnlp_ops.__file__).parent / "libfastnlp_cpu.so"))
_library.fastnlp_ops_use_baseline.restype = ctypes.c_bool
_library.fastnlp_ops_use_baseline.argtypes = [ctypes.c_bool]


def start(family, seed):
    """What decides a draw: its random numbers, and those of torch."""
    r = random.Random(f"{family} {seed}")
    torch.manual_seed(r.getrandbits(62))
    return r


def run(family, seed):
    """One draw; one in three by the kernels of the baseline, one in three by two threads."""
    r = start(family, seed)
    before, threads = use_baseline(r.random() < 1 / 3), torch.get_num_threads()
    torch.set_num_threads(r.choice([1, 1, 2]))
    try:
        FAMILIES[family](r)
    finally:
        use_baseline(before)
        torch.set_num_threads(threads)


def use_baseline(on):
    """The CPU kernels of calls that begin later: those of the baseline, or the best of this processor."""
    return _library.fastnlp_ops_use_baseline(on)
