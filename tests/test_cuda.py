"""The CUDA kernels without a GPU: their own source, compiled by g++ and run on the CPU (cuda/emulation.h) against the
float64 reference, under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer. What nvcc makes of them:
test_wheel.py."""

from __future__ import annotations

import math
import pathlib
import shutil
import sys

import pytest
import torch
from torch import Tensor

from fastnlp_ops.reference import crf as reference

sys.path.insert(0, str(pathlib.Path(__file__).parent / "cuda"))
import harness
from harness import Case

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the emulated kernels")

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
INF = math.inf
generator = torch.Generator()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=F64)


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=generator)


def train(name: str, B: int, T: int, N: int, dtype=F32, std: float = 1, **rest) -> Case:
    compute = F64 if dtype == F64 else F32
    values = {
        "emissions": (randn(B, T, N) * std).to(dtype),
        "transitions": randn(N, N).to(compute),
        "start": randn(N).to(compute),
        "end": randn(N).to(compute),
        "tags": integers(N, B, T),
        "grad": randn(B).to(compute),
    }
    return Case("train", name=name, **{**values, **rest})


def pack(case: Case, lengths: list[int]) -> Case:
    """The same kind of case with all rows in one sequence of rows."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    total = int(ends[-1])
    case.emissions = case.emissions[0, :total]
    case.tags = None if case.tags is None else case.tags[0, :total]
    case.grad = randn(len(lengths)).to(case.compute)
    case.cu_seqlens = ends
    case.name += " packed"
    return case


def mask_of(B: int, T: int) -> Tensor:
    """Holes, left padding, right padding, an empty and a full row, a single step."""
    mask = torch.rand(B, T, generator=generator) > 0.4
    patterns = [lambda m: m, lambda m: m[: T // 2].zero_(), lambda m: m[T // 2 :].zero_(), lambda m: m.zero_()]
    patterns += [lambda m: m.fill_(True), lambda m: m.zero_()[T // 3].fill_(True)]
    for b in range(B):
        patterns[b % len(patterns)](mask[b])
    return mask


def odd_bytes(mask: Tensor) -> Tensor:
    """The same mask in bytes that a C++ bool must not have."""
    return torch.where(mask, 2 + integers(254, *mask.shape), 0).to(torch.uint8).view(torch.bool)


def bio(N: int) -> tuple[Tensor, Tensor]:
    """Transitions and starts with -inf where BIO forbids: tags O, B-0, I-0, B-1, I-1, ..."""
    transitions, start = randn(N, N), randn(N)
    for j in range(2, N, 2):
        keep = transitions[[j - 1, j], j].clone()
        transitions[:, j] = -INF
        transitions[[j - 1, j], j] = keep
        start[j] = -INF
    return transitions.float(), start.float()


def poison(case: Case) -> Case:
    """Masked emissions and tags hold what must never be read."""
    case.emissions[~case.mask] = math.nan
    case.tags[~case.mask] = -100
    return case


def small_cases() -> list[Case]:
    """A case for every branch of the kernels, small enough for the sanitizers."""
    generator.manual_seed(1)
    cases = [train(f"N={N} T={T}", 2, T, N) for N in (1, 2, 9, 32, 33, 64) for T in (1, 2, 7)]
    cases += [train(f"f64 N={N}", 2, 5, N, F64) for N in (9, 32, 33)]
    cases += [train(f"{dtype} N={N}", 2, 6, N, dtype) for dtype in (F16, BF16) for N in (7, 33)]
    cases += [train("large N=65", 3, 5, 65), train("large N=300", 2, 4, 300)]
    for N in (5, 40, 70):
        cases.append(poison(train(f"mask N={N}", 6, 9, N, mask=mask_of(6, 9))))
        cases.append(train(f"bytes of a mask N={N}", 6, 9, N, mask=odd_bytes(mask_of(6, 9))))
        cases.append(pack(train(f"N={N}", 1, 14, N), [3, 0, 1, 8, 2]))
        cases.append(train(f"partition N={N}", 2, 6, N, tags=None, transition_grad=N == 5))
        cases.append(train(f"per position N={N}", 2, 4, N, transitions=randn(2, 3, N, N).float()))
        transitions, start = bio(N)
        cases.append(train(f"BIO std 100 N={N}", 2, 12, N, std=100, transitions=transitions, start=start))
        cases.append(train(f"transposed N={N}", 2, 5, N, transitions=randn(N, N).float().t()))
        cases.append(train(f"no start, no end N={N}", 2, 3, N, start=None, end=None))
        for op in ("viterbi", "n_best", "sample", "entropy"):
            rest = {"tags": None, "grad": None, "mask": mask_of(3, 8)}
            case = train(f"{op} N={N}", 3, 8, N, **rest)
            case.op = op
            case.n = 3
            case.uniforms = torch.rand(2, 3, 8, generator=generator) if op == "sample" else None
            cases.append(case)
    cases.append(train("chunks N=3", 1, 530, 3, chunked=True))
    return cases


def all_cases() -> list[Case]:
    cases = small_cases()
    generator.manual_seed(2)
    cases += [train(f"N={N} T={T}", 3, T, N) for N in (1, 2, 9, 31, 32, 33, 50, 64) for T in (1, 2, 3, 40)]
    cases += [train(f"large N={N}", 5, T, N) for N, T in ((65, 40), (128, 7), (129, 7), (257, 4), (1024, 3))]
    cases += [train(f"f64 N={N} T={T}", 3, T, N, F64) for N, T in ((9, 40), (32, 40), (50, 9), (129, 5))]
    cases += [train(f"long N={N}", 1, 300, N) for N in (9, 50)]
    cases.append(train("renormalised, large", 1, 150, 70))
    # Chunks, forced on short inputs: two, three, an exact multiple, holes, packed, bans, float64.
    cases += [train(f"chunks T={T} N={N}", 2, T, N, chunked=True) for T, N in ((300, 9), (512, 32), (600, 2))]
    cases.append(train("chunks f64", 1, 700, 9, F64, chunked=True))
    cases.append(poison(train("chunks, mask", 6, 900, 5, mask=mask_of(6, 900), chunked=True)))
    cases.append(pack(train("chunks", 1, 1100, 5, chunked=True), [257, 0, 300, 1, 542]))
    transitions, start = bio(9)
    cases.append(train("chunks, BIO std 30", 1, 520, 9, std=30, transitions=transitions, start=start, chunked=True))
    cases.append(train("chunks, partition", 1, 513, 4, tags=None, chunked=True))
    # Values.
    for N in (9, 33, 70):
        transitions, start = bio(N)
        for std in (5, 30, 100):
            cases.append(train(f"BIO std {std} N={N}", 2, 40, N, std=std, transitions=transitions, start=start))
            cases.append(train(f"std {std} N={N}", 2, 40, N, std=std))
        for std in (1000, 10_000):
            rest = {"transitions": transitions, "start": start, "mask": mask_of(6, 40)}
            cases.append(poison(train(f"BIO, mask, std {std} N={N}", 6, 40, N, std=std, **rest)))
        cases.append(train(f"-1e4 everywhere N={N}", 2, 9, N, transitions=torch.full((N, N), -1e4)))
        cases.append(
            train(
                f"one column -inf N={N}",
                2,
                9,
                N,
                transitions=randn(N, N).float().index_fill(1, torch.tensor([1]), -INF),
            )
        )
        cases.append(
            train(
                f"one row -inf N={N}", 2, 9, N, transitions=randn(N, N).float().index_fill(0, torch.tensor([1]), -INF)
            )
        )
        cases.append(train(f"partial labels N={N}", 2, 20, N))
        cases[-1].emissions[torch.rand(2, 20, N, generator=generator) > 0.5] = -INF
        cases.append(train(f"a dominating tag is killed N={N}", 2, 12, N))
        cases[-1].emissions[:, 3:8, 0] += 200
        cases[-1].transitions[0, :] = -INF
        cases[-1].transitions[0, 0] = 0.5
        cases[-1].emissions[:, 8:, 0] = -INF
        cases.append(train(f"no path N={N}", 3, 7, N))
        cases[-1].emissions[1, 3] = -INF
        cases.append(train(f"forbidden gold N={N}", 2, 7, N))
        cases[-1].transitions[2, 3] = -INF
        cases[-1].tags[0, 3:5] = torch.tensor([2, 3])
        cases.append(train(f"bad tag N={N}", 3, 7, N))
        cases[-1].tags[1, 3] = N
        cases.append(train(f"NaN N={N}", 3, 7, N))
        cases[-1].emissions[1, 4, 2] = math.nan
        cases.append(
            train(f"per position, mask N={N}", 6, 9, N, transitions=randn(6, 8, N, N).float(), mask=mask_of(6, 9))
        )
        cases.append(poison(cases[-1]))
    cases.append(train("chunks, bad tag", 2, 600, 3, chunked=True))
    cases[-1].tags[1, 300] = -1
    cases.append(train("chunks, no path", 2, 600, 3, chunked=True))
    cases[-1].emissions[1, 300] = -INF
    # Decoding: integer scores make ties at every step.
    for N in (1, 2, 9, 32, 33, 64, 65, 300):
        for T in (1, 9, 70):
            case = train(f"ties N={N} T={T}", 2, T, N, emissions=integers(3, 2, T, N).float())
            case.transitions, case.start, case.end = (integers(3, *s).float() for s in ((N, N), (N,), (N,)))
            case.op = "viterbi"
            cases.append(case)
    for op, n in (("viterbi", 1), ("n_best", 4), ("n_best", 20), ("sample", 1), ("entropy", 1)):
        for N, dtype in ((1, F32), (3, F64), (40, F64), (65, F32), (9, BF16)):
            rest = {"tags": None, "grad": None, "n": n, "op": op}
            for extra in (
                {},
                {"mask": mask_of(6, 11)},
                {"transitions": randn(6, 10, N, N).to(F64 if dtype == F64 else F32)},
            ):
                case = train(f"{op} {n} N={N}", 6, 11, N, dtype)
                for key, value in {**rest, **extra}.items():
                    setattr(case, key, value)
                case.uniforms = torch.rand(3, 6, 11, generator=generator) if op == "sample" else None
                cases.append(case)
            case = pack(train(f"{op} {n} N={N}", 1, 14, N, dtype), [3, 0, 1, 8, 2])
            case.op, case.n, case.tags, case.grad = op, n, None, None
            case.uniforms = torch.rand(2, 14, generator=generator) if op == "sample" else None
            cases.append(case)
        case = train(f"{op}, no path", 2, 5, 9)
        case.op, case.n, case.tags, case.grad = op, n, None, None
        case.emissions[0, 2] = -INF
        case.uniforms = torch.rand(2, 2, 5, generator=generator) if op == "sample" else None
        cases.append(case)
    # Nothing to do.
    cases += [train("B=0", 0, 4, 5), train("T=0", 3, 0, 5), train("B=0 large", 0, 4, 70), train("T=0 large", 3, 0, 70)]
    return cases


def expected(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the reference returns, computed in `dtype`."""
    scores = [
        None if x is None else x.to(dtype).requires_grad_()
        for x in (case.emissions, case.transitions, case.start, case.end)
    ]
    layout = {"mask": case.mask, "cu_seqlens": case.cu_seqlens}
    if case.op == "train":
        if case.tags is None:
            value = reference.crf_log_partition(*scores, **layout)
        else:
            tags = case.tags if case.mask is None else case.tags.masked_fill(~case.mask, 0)
            value = reference.crf_log_likelihood(scores[0], tags, *scores[1:], **layout)
        wanted = [x for x in scores if x is not None]
        grads = list(torch.autograd.grad(value, wanted, case.grad.to(dtype), allow_unused=True))
        result = {"value_alone": value.detach(), "value": value.detach()}
        for name, x in zip(("demissions", "dtransitions", "dstart", "dend"), scores, strict=True):
            if x is not None:
                grad = grads.pop(0)
                result[name] = torch.zeros_like(x) if grad is None else grad
        if not case.transition_grad:
            del result["dtransitions"]
        return result
    if case.op in ("viterbi", "n_best"):
        paths, values = reference.crf_viterbi(*scores, n_best=case.n if case.op == "n_best" else 1, **layout)
        return {"paths": paths, "scores": values.detach()}
    if case.op == "sample":
        return {"paths": reference.crf_sample_from_uniforms(*scores, case.uniforms, **layout)}
    return {"entropy": reference.crf_entropy(*scores, **layout).detach()}


def compare(case: Case, result: dict[str, Tensor]) -> list[str]:
    exact, same = expected(case, F64), {}
    faults = []

    def theirs(name: str) -> Tensor:
        """What the reference makes of it in the compute type."""
        if not same:
            same.update(exact if case.compute == F64 else expected(case, case.compute))
        return same[name]

    for name, truth in exact.items():
        got = result[name]
        if got.dtype == torch.int64:
            # A step is decided in the compute type, so the reference in that type is the one to equal.
            if not torch.equal(got.reshape(-1), theirs(name).reshape(-1)):
                faults.append(f"{case.name}: {name} differ\n{got}\n{theirs(name)}")
            continue
        got = got.double()
        odd = ~truth.isfinite()
        if not torch.equal(got[odd].nan_to_num(7.0), truth[odd].nan_to_num(7.0)) or not got[~odd].isfinite().all():
            faults.append(f"{case.name}: {name} has other infinities or NaN\n{got}\n{truth}")
            continue
        error = (got - truth)[~odd].abs()
        if error.numel() == 0:
            continue
        # The rounding of the inputs and of the result, and twice what the reference makes of it in the same type.
        eps = torch.finfo(case.compute).eps
        inputs = torch.cat([case.emissions.double().reshape(-1), torch.ones(1)])
        limit = 16 * eps * inputs[inputs.isfinite()].abs().max() + 8 * eps * truth[~odd].abs().max()
        if case.compute == F64:
            limit *= 100  # here the truth is no more exact than we are
        if name == "demissions":
            limit += torch.finfo(case.emissions.dtype).eps * truth[~odd].abs().max()
        if error.max() > limit:
            limit += 2 * (theirs(name).double() - truth)[~odd].abs().nan_to_num(0.0, 0.0).max()
        if error.max() > limit:
            faults.append(f"{case.name}: {name} is off by {error.max():.2e} > {limit:.2e}")
    return faults


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(scope="session")
def programs(folder):
    """sanitizer -> the emulated driver, built at first use."""

    def get(sanitizer: str) -> tuple[pathlib.Path, pathlib.Path]:
        place = folder / sanitizer
        if not place.exists():
            place.mkdir()
            harness.build(place, sanitizer)
        return place / f"crf_{sanitizer}", place

    return get


def test_against_reference(programs):
    cases = all_cases()
    program, place = programs("plain")
    results = harness.run(program, cases, place)
    faults = [fault for case, result in zip(cases, results, strict=True) for fault in compare(case, result)]
    assert not faults, "\n".join([f"{len(faults)} faults", *faults])
    # Bitwise the same on another day, with other garbage in the workspace.
    again = harness.run(program, cases, place)
    for case, first, second in zip(cases, results, again, strict=True):
        for name in first:
            assert torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)), (case.name, name)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizer(programs, sanitizer):
    program, place = programs(sanitizer)
    cases = small_cases()
    results = harness.run(program, cases, place)
    assert not [fault for case, result in zip(cases, results, strict=True) for fault in compare(case, result)]


# One barrier each: between a step's scores and their readers, and before messages are read in the log domain.
BARRIERS = {
    "crf_viterbi.cu": "      scores[k & 1][own] = score;\n      __syncthreads();\n",
    "crf_smooth.cu": "          shared.logs[own] = here.log;\n          sync_or(false);\n",
}


@pytest.mark.parametrize("source", BARRIERS)
def test_sanitizer_sees_a_missing_barrier(programs, tmp_path, source):
    _, place = programs("thread")
    text = (harness.CSRC / "cuda" / source).read_text()
    assert text.count(BARRIERS[source]) == 1
    line = BARRIERS[source].splitlines(keepends=True)[0]
    (tmp_path / source).write_text(text.replace(BARRIERS[source], line))
    program = harness.build(place, "thread", instead=tmp_path / source)
    generator.manual_seed(3)
    transitions, start = bio(9)
    cases = [train("killed", 1, 12, 9, std=100, transitions=transitions, start=start)]
    cases[0].op = "viterbi" if source == "crf_viterbi.cu" else "train"
    cases[0].tags = None if cases[0].op == "viterbi" else cases[0].tags
    process = harness.start(program, cases, tmp_path)
    assert process.returncode
    assert "ThreadSanitizer: data race" in process.stderr
