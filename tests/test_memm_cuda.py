"""The CUDA source of the memm kernels, run on the CPU (tests/cuda/emulation.h) plainly and under two sanitizers."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from crf_problems import make_problem
from tools import assert_same, assert_within_budget

from fastnlp_ops import reference

ROOT = Path(__file__).resolve().parent.parent
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SANITIZERS = {
    "plain": ["-O2"],
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}
CASES = {
    "ragged": {"B": 5, "T": 23, "N": 9, "mask": "prefix"},
    "holes": {"B": 3, "T": 30, "N": 5, "mask": "holes"},
    "left": {"B": 3, "T": 70, "N": 6, "mask": "left"},  # gaps longer than the 32 steps that a warp looks at
    "lanes": {"B": 2, "T": 5, "N": 33},  # one lane has two tags
    "wide": {"B": 1, "T": 2, "N": 65},
    "one": {"B": 1, "T": 1, "N": 1},
    "no_sequence": {"B": 0, "T": 4, "N": 3},
    "no_step": {"B": 3, "T": 0, "N": 4},
    "banned": {"B": 6, "T": 15, "N": 7, "mask": "holes", "ban": 0.4, "std": 100.0},
}


@pytest.fixture(
    scope="module",
    params=[name if name == "plain" else pytest.param(name, marks=pytest.mark.long) for name in SANITIZERS],
)
def program(request, tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    path = tmp_path_factory.mktemp("memm") / request.param
    cuda, tests = ROOT / "csrc" / "cuda" / "memm.cu", ROOT / "tests" / "cuda"
    flags = ["-std=c++20", "-w", "-ffp-contract=fast", f"-I{ROOT / 'csrc'}", *SANITIZERS[request.param]]
    sources = ["-include", tests / "emulation.h", "-x", "c++", cuda, tests / "memm_driver.cpp"]
    built = subprocess.run(["g++", *flags, *sources, "-o", path], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return path


def run(program, problem, grad, bidirectional=True, transition_grad=True, transposed=False):
    """Log-likelihood, demissions and dtransitions of one problem, computed by the emulated launchers."""
    dtype = problem.emissions.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    B, T, N = problem.emissions.shape
    options = [problem.mask is not None, bidirectional, transition_grad, transposed]
    data = struct.pack("8q", DTYPES.index(dtype), B, T, N, *map(int, options))
    matrix = problem.transitions.to(compute)
    tensors = [problem.emissions, matrix.t() if transposed else matrix, problem.tags, problem.mask, grad.to(compute)]
    for tensor in tensors:
        if tensor is not None:
            data += tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    cases, results = program.parent / "cases", program.parent / "results"
    cases.write_bytes(data)
    # A fixed address layout: ThreadSanitizer of gcc 12 gives up on the layouts of newer kernels.
    layout = ["setarch", "-R"] if shutil.which("setarch") else []
    done = subprocess.run([*layout, program, cases, results], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:8000]
    left, out = bytearray(results.read_bytes()), []
    for shape, kind in (((B,), compute), ((B, T, N), dtype), ((N, N), compute)):
        size = torch.Size(shape).numel() * kind.itemsize
        out.append(torch.frombuffer(left[:size], dtype=kind).reshape(shape) if size else torch.empty(shape, dtype=kind))
        left = left[size:]
    assert not left
    return out


def expected(problem, grad, bidirectional, dtype):
    problem, leaves = problem.leaves(dtype)
    scores = problem.emissions, problem.tags, problem.transitions
    value = reference.memm_log_likelihood(*scores, mask=problem.mask, bidirectional=bidirectional)
    return value, *torch.autograd.grad(value, leaves, grad.to(dtype), materialize_grads=True)


@pytest.mark.parametrize("case", CASES)
def test_emulated_kernels(program, case):
    if case == "wide" and program.name != "plain":
        pytest.skip("a warp for each of 65 * 65 transitions takes a sanitizer ten seconds, and looks like any other")
    for dtype in DTYPES if program.name == "plain" and case != "wide" else DTYPES[:1]:
        for bidirectional in (True, False):
            problem = make_problem(bounds=False, dtype=dtype, **CASES[case])
            grad = torch.randn(problem.batch)
            ours = run(program, problem, grad, bidirectional, transposed=not bidirectional)
            plain, exact = (expected(problem, grad, bidirectional, wide) for wide in (torch.float32, torch.float64))
            for name, a, b, c in zip(["log-likelihood", "demissions", "dtransitions"], ours, plain, exact, strict=True):
                if a.dtype.itemsize > 2:
                    assert_within_budget(a, b, c, name)
                else:
                    torch.testing.assert_close(a, b.to(a.dtype), rtol=0.02, atol=1e-4)  # the rounding of the output
            again = run(program, problem, grad, bidirectional, transposed=not bidirectional)
            for a, b in zip(again, ours, strict=True):
                assert_same(a, b)


def test_without_transition_grad(program):
    problem = make_problem(bounds=False, **CASES["holes"])
    grad = torch.randn(problem.batch)
    value, demissions, untouched = run(program, problem, grad, transition_grad=False)
    assert untouched.isnan().all()
    both = run(program, problem, grad)
    assert_same(value, both[0])
    assert_same(demissions, both[1])


def test_bytes_of_a_mask(program):
    """Any byte but 0 is true."""
    problem = make_problem(bounds=False, **CASES["left"])
    grad = torch.ones(problem.batch)
    expected = run(program, problem, grad)
    problem.mask = torch.where(problem.mask, torch.randint(2, 256, problem.mask.shape), 0).byte().view(torch.bool)
    for own, plain in zip(run(program, problem, grad), expected, strict=True):
        assert_same(own, plain)


def test_tags_out_of_range(program):
    """Result and gradients of that sequence are NaN, the others are as without it."""
    problem = make_problem(bounds=False, poison=False, **CASES["left"])
    grad = torch.ones(problem.batch)
    good = run(program, problem, grad)
    for tag in (-1, 6, 2**40):
        problem.tags[1, -1] = tag
        value, demissions, dtransitions = run(program, problem, grad)
        assert value.isnan().tolist() == [False, True, False]
        assert demissions[1][problem.mask[1]].isnan().all()
        assert dtransitions.isnan().any()
        for b in (0, 2):
            assert value[b] == good[0][b]
            assert_same(demissions[b], good[1][b])
