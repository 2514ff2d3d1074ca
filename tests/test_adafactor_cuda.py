"""The CUDA source of Adafactor, run on the CPU (tests/cuda/emulation.h) plainly and under two sanitizers."""

import functools
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from adafactor_problems import CASES, OPTIONS, Run, assert_runs_agree, draw
from tools import assert_same

from fastnlp_ops import adafactor_step_, reference

sys.path.insert(0, str(Path(__file__).parent / "cuda"))
import adafactor_emulated as emulated

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the emulated kernels")

# What the blocks and teams of the GPU make of shapes, beside the cases that all devices share.
SHARED_OUT = {
    "teams": [(70, 520), (66, 1030), (65, 2050), (3, 513)],
    "wide": [(70, 4100)],
    "strips": [(400, 260), (200, 2), (600, 1)],
    "packed": [(20, 3, 3), (9, 5, 600), (17, 2, 40), (8, 64, 3)],
    "vectors": [(5000,), (4097,), (3,)],
}
ROUNDED = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adafactor")


@pytest.fixture(
    scope="module",
    params=[name if name == "plain" else pytest.param(name, marks=pytest.mark.long) for name in emulated.SANITIZERS],
)
def step(request, folder):
    return functools.partial(emulated.step, emulated.build(folder, request.param))


@pytest.fixture(scope="module")
def plain(folder):
    return functools.partial(emulated.step, emulated.build(folder, "plain"))


def runs(step, shapes, options, grads_of, dtype=torch.float32, steps=2):
    """Emulated, reference in float32 and in float64; the parameters start alike, `grads_of` draws gradients."""
    params = [0.5 * torch.randn(shape) for shape in shapes]
    ours = Run([p.to(dtype) for p in params], options, torch.float64 if dtype == torch.float64 else torch.float32)
    plain = Run([p.clone() for p in params], options)
    exact = Run([p.double() for p in params], options, torch.float64)
    for _ in range(steps):
        grads = grads_of(shapes)
        ours.step(step, [g.to(dtype) for g in grads])
        plain.step(reference.adafactor_step_, grads)
        exact.step(reference.adafactor_step_, [g.double() for g in grads])
        exact.see()
    return ours, plain, exact


def gradients(shapes):
    return draw(shapes, "cpu")


@pytest.mark.parametrize("option", OPTIONS)
def test_emulated_kernels(step, option):
    """All small cases in one call."""
    shapes = [shape for name, shapes in CASES.items() if name != "long" for shape in shapes]
    assert_runs_agree(*runs(step, shapes, OPTIONS[option], gradients))


@pytest.mark.parametrize("case", SHARED_OUT)
def test_shares_of_work(step, case, request):
    options = list(OPTIONS) if "plain" in request.node.callspec.id.split("-") else ["layers", "torch_clamp"]
    for option in options:
        assert_runs_agree(*runs(step, SHARED_OUT[case], OPTIONS[option], gradients, steps=1))


def test_float64(plain):
    shapes = CASES["ragged"] + SHARED_OUT["packed"][:2] + SHARED_OUT["strips"][:1]
    for option in OPTIONS:
        assert_runs_agree(*runs(plain, shapes, OPTIONS[option], gradients, torch.float64))


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float64, *ROUNDED])
@pytest.mark.parametrize("dtype", [torch.float32, *ROUNDED])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_dtypes(plain, dtype, grad_dtype, rounding):
    """Equal to the CPU's op, except where the two stand on different sides of a rounding."""
    shapes = [(33, 7), (70, 520), (5,), (9, 3, 3), ()]
    options = {"rounding": rounding, "beta1": 0.5, "ema_decay": 0.9, "lr": 1e-2, "relative_step": False}
    params = [(0.3 * torch.randn(shape)).to(dtype) for shape in shapes]
    if dtype == torch.float16:
        params[2] = torch.tensor([1e-7, -3e-6, 6e4, 3e-5, -1e-3], dtype=dtype)
    ours, theirs = (Run([p.clone() for p in params], options) for _ in range(2))
    grads = [g.to(grad_dtype) for g in gradients(shapes)]
    for run, function in ((ours, plain), (theirs, adafactor_step_)):
        run.step(function, grads, seed=2**40 + 3, ids=[7, 1, 2**33, 0, 5])
    for (name, a), b in zip(ours.tensors().items(), theirs.tensors().values(), strict=True):
        if a.dtype == dtype and dtype != torch.float32:
            assert (a != b).float().mean() <= 0.01, name
            torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=2**-23)
        else:
            torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-7 if dtype == torch.float32 else 1e-3)


def strided(x):
    """Every second element of every dimension of a larger tensor."""
    wide = torch.full([2 * size for size in x.shape], 7.0)
    part = wide[tuple(slice(1, None, 2) for _ in x.shape)]
    return part.copy_(x)


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "strided": strided,
    "misaligned": lambda x: torch.cat([torch.zeros(1), x.flatten()])[1:].view_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(step, layout):
    shapes = [(40, 36), (6,), (5, 7, 3), (530, 3), (9, 1)]
    params = [torch.randn(shape) for shape in shapes]
    grads = gradients(shapes)
    for option in ("momentum", "average", "lazy", "torch", "torch_clamp", "layers"):
        options = OPTIONS[option]
        ours = Run([LAYOUTS[layout](p) for p in params], options)
        theirs = Run([p.clone() for p in params], options)
        exact = Run([p.double() for p in params], options, torch.float64)
        ours.step(step, [LAYOUTS[layout](g) for g in grads])
        theirs.step(reference.adafactor_step_, grads)
        exact.step(reference.adafactor_step_, [g.double() for g in grads])
        assert_runs_agree(ours, theirs, exact)


def test_nothing_beside_a_strided_parameter_is_written(plain):
    p = strided(torch.randn(6, 10))
    Run([p], {}).step(plain, [torch.randn(6, 10)])
    around = torch.ones(12, 20, dtype=torch.bool)
    around[1::2, 1::2] = False
    assert (p._base[around] == 7).all()


def test_global_norm_and_skipping(step):
    shapes = [(33, 7), (5,), (9, 3, 3), (70, 520)]
    params, grads = [torch.randn(shape) for shape in shapes], gradients(shapes)
    norm = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    free = Run([p.clone() for p in params], {}).step(step, grads)
    loose = Run([p.clone() for p in params], {}).step(step, grads, max_grad_norm=2 * norm)
    scaled = Run([p.clone() for p in params], {}).step(
        step, [1024 * g for g in grads], grad_scale=torch.tensor([1024.0]), found_inf=torch.zeros(1)
    )
    for other in (loose, scaled):
        for (name, a), b in zip(free.tensors().items(), other.tensors().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7, msg=name)
    start = Run([p.clone() for p in params], {})
    for bad in (math.nan, math.inf, 1e25):
        broken = [g.clone() for g in grads]
        broken[1][2] = bad
        after = start.copy().step(step, broken, skip_nonfinite=True)
        for (name, a), b in zip(start.tensors().items(), after.tensors().values(), strict=True):
            assert_same(a, b, name)
        if bad != 1e25:  # of which the square is inf, and the step 0
            assert not start.copy().step(step, broken).params[1].isfinite().any()
    after = start.copy().step(step, grads, found_inf=torch.ones(1))
    for (name, a), b in zip(start.tensors().items(), after.tensors().values(), strict=True):
        assert_same(a, b, name)


@pytest.mark.parametrize("option", ["default", "layers", "torch_clamp", "lazy"])
def test_phases(plain, option):
    """A rank that has everything: the phases one by one leave what one call does."""
    shapes = [(33, 7), (5,), (9, 3, 3), (70, 520)]
    params, grads, options = [torch.randn(shape) for shape in shapes], gradients(shapes), OPTIONS[option]
    whole = Run([p.clone() for p in params], options).step(plain, grads)
    per_column = 3 if options.get("layer_adaptation") else 2
    size = 1 + 3 * len(shapes)
    for *batch, rows, cols in (shape for shape in shapes if len(shape) > 1):
        size += math.prod(batch) * (per_column * cols + 2 + rows)
    shards = []
    for shape in shapes:
        shards += [math.prod(shape), shape[-2] if len(shape) > 1 else 1, shape[-1], 0, 0, 0]
    for calls in ((15,), (3, 12), (1, 2, 4, 8), (1, 6, 8), (7, 8)):
        for among in ([], shards):
            parts, sums = Run([p.clone() for p in params], options), torch.full((size,), math.nan)
            for phases in calls:
                parts.step(plain, grads, phases=phases, sums=sums, shards=among)
            for (name, a), b in zip(whole.tensors().items(), parts.tensors().values(), strict=True):
                torch.testing.assert_close(a, b, rtol=5e-6, atol=1e-6, msg=f"{name} of phases {calls}")


def test_learning_rate_on_the_device(plain):
    options = {"lr": 0.3, "relative_step": False}
    params, grads = [torch.randn(5, 4), torch.randn(3)], gradients([(5, 4), (3,)])
    host, device = (Run([p.clone() for p in params], options) for _ in range(2))
    host.step(plain, grads)
    device.step(plain, grads, lr_on_device=True)
    for a, b in zip(host.params, device.params, strict=True):
        assert_same(a, b)


def test_repeatable(plain):
    shapes = [(400, 260), (9, 3, 3), (5000,)]
    params, grads = [torch.randn(shape) for shape in shapes], gradients(shapes)
    first, again = (Run([p.clone() for p in params], OPTIONS["norm"]).step(plain, grads) for _ in range(2))
    for (name, a), b in zip(first.tensors().items(), again.tensors().values(), strict=True):
        assert_same(a, b, name)


# One barrier each: between the rows' sums and their readers, and between a block's rows and its columns.
BARRIERS = {
    "adafactor_sums.cu": "    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;\n",
    "adafactor_apply.cu": ": begin_vector(t, begin, rows);\n",
}


@pytest.mark.long
@pytest.mark.parametrize("source", BARRIERS)
def test_sanitizer_sees_a_missing_barrier(folder, tmp_path, source):
    emulated.build(folder, "thread")
    text = (Path(emulated.ROOT) / "csrc/cuda" / source).read_text()
    without, found = re.subn(rf"({re.escape(BARRIERS[source])}) *__syncthreads\(\);\n", r"\1", text)
    assert found == 1
    changed = tmp_path / source
    changed.write_text(without)
    program = emulated.build(folder, "thread", instead=changed)
    with pytest.raises(AssertionError, match="data race"):
        Run([torch.randn(70, 520)], {}).step(functools.partial(emulated.step, program), [torch.randn(70, 520)])
