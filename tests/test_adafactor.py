"""The Adafactor op against its reference in float64, and the identity that it rests on."""

import itertools
import math

import pytest
import torch
from adafactor_problems import CASES, OPTIONS, Run, assert_runs_agree, draw, three_runs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tools import assert_same

import fastnlp_ops
from fastnlp_ops import reference
from fastnlp_ops.reference.adafactor import random_bits, rounded


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_forward(case, options, device):
    assert_runs_agree(*three_runs(CASES[case], OPTIONS[options], device), level=2e-7)


@pytest.mark.parametrize("scale", [1e-12, 1e-8, 1e-4, 1e3, 1e9])
@pytest.mark.parametrize("options", ["default", "layers", "torch", "torch_clamp"])
def test_scales(options, scale, device):
    """Gradients of any size: eps1 rules where they are small, in its own way in each variant."""
    assert_runs_agree(*three_runs(CASES["ragged"], OPTIONS[options], device, scale=scale), level=2e-7)


@pytest.mark.parametrize("options", OPTIONS)
def test_float64(options, device):
    shapes = CASES["ragged"]
    params = [torch.randn(shape, device=device, dtype=torch.float64) for shape in shapes]
    ours, plain = (Run([p.clone() for p in params], OPTIONS[options], torch.float64) for _ in range(2))
    for _ in range(3):
        grads = draw(shapes, device, torch.float64)
        ours.step(fastnlp_ops.adafactor_step_, grads)
        plain.step(reference.adafactor_step_, grads)
    for (name, a), b in zip(ours.tensors().items(), plain.tensors().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12 if a.dtype == torch.float64 else 1e-6, atol=1e-14, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_half(rounding, dtype, device):
    """Half parameters: float32 maths, one rounding at the end, the same in op and reference but for ties."""
    shapes = CASES["ragged"]
    params = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    options = OPTIONS["momentum"] | {"ema_decay": 0.9, "rounding": rounding, "seed": 5}
    ours, plain = (Run([p.clone() for p in params], options) for _ in range(2))
    grads = draw(shapes, device, dtype)
    ours.step(fastnlp_ops.adafactor_step_, grads)
    plain.step(reference.adafactor_step_, grads)
    for a, b, p in zip(ours.params, plain.params, params, strict=True):
        assert a.dtype == dtype
        assert (a != p).any()
        assert (a != b).float().mean() < 0.01
        neighbour = torch.maximum(a.abs(), b.abs()).float() * torch.finfo(dtype).eps
        assert ((a.float() - b.float()).abs() <= neighbour).all()
    for name in ("rows", "cols", "vectors", "moments"):
        for a, b in zip(getattr(ours, name), getattr(plain, name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("param", "grad"), list(itertools.permutations((torch.float32, torch.bfloat16, torch.float16), 2))
)
def test_mixed_dtypes(param, grad, device):
    """A gradient of another dtype counts as what it is in float32."""
    shapes = CASES["ragged"]
    params, grads = [torch.randn(s, device=device).to(param) for s in shapes], draw(shapes, device, grad)
    a, b = (Run([p.clone() for p in params], OPTIONS["given_lr"]) for _ in range(2))
    a.step(fastnlp_ops.adafactor_step_, grads)
    b.step(fastnlp_ops.adafactor_step_, [g.float() for g in grads])
    for ours, theirs in zip(a.params, b.params, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("options", ["default", "everything"])
def test_opcheck(options, device):
    shapes = [(4, 3), (5,), (2, 3, 4)]
    params = [torch.randn(shape, device=device) for shape in shapes]
    run = Run(params, {"beta1": 0.9, "ema_decay": 0.9} if options == "everything" else {})
    some = run.moments if options == "everything" else []
    numbers = [0, 1e-30, 1e-3, 1.0, -0.8, 0.9 if some else -1, 0.1, 1, 1, 0, 0, 0, 0.9 if some else -1, 0, 1.0]
    lr = torch.zeros(1, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.fastnlp_ops.adafactor_step_,
        (
            *(params, draw(shapes, device), run.rows, run.cols, run.vectors, run.moments, run.averages, run.steps),
            *(run.rms, lr, [0, 0, 0], numbers, None, None, 0.0, False, 0, [], None, [], 15),
        ),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_compile(device):
    def step(params, grads, run):
        fastnlp_ops.adafactor_step_(params, grads, run.rows, run.cols, run.vectors, run.steps, rms=run.rms)
        return params[0].sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for shapes in (CASES["aligned"], CASES["ragged"]):
        eager, graph = (Run([torch.ones(shape, device=device) for shape in shapes], {}) for _ in range(2))
        for _ in range(2):
            grads = draw(shapes, device)
            assert_same(compiled(graph.params, grads, graph), step(eager.params, grads, eager))
        for a, b in zip(graph.tensors().values(), eager.tensors().values(), strict=True):
            assert_same(a, b)


def laid_out(x, layout):
    """The numbers of x in another layout, inside memory that holds NaN."""
    if layout == "transposed":
        return x.mT.contiguous().mT if x.dim() > 1 else x.clone()
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x.clone()
    if layout == "offset":
        return x.new_full((x.numel() + 3,), math.nan)[3:].view(x.shape).copy_(x)
    if layout == "strided":
        room = x.new_full([2 * n for n in x.shape], math.nan)
        return room[tuple(slice(0, 2 * n, 2) for n in x.shape)].copy_(x)
    if layout == "rows_apart":
        room = x.new_full((*x.shape[:-1], x.shape[-1] + 3) if x.dim() else (), math.nan)
        return (room[..., : x.shape[-1]] if x.dim() else room).copy_(x)
    return x.movedim(0, -1).contiguous().movedim(-1, 0)  # the first dimension runs fastest


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "offset", "strided", "rows_apart", "first_fastest"])
@pytest.mark.parametrize("options", ["default", "momentum", "layers", "lazy", "torch_clamp"])
def test_layouts(options, layout, device):
    """Parameters and gradients of any strides, each of its own; the padding stays NaN."""
    shapes = [(6, 5, 3, 3), (33, 7), (7, 33), (8,), (3, 4, 5)]
    values, grads = [torch.randn(shape, device=device) for shape in shapes], draw(shapes, device)
    dense = Run([x.clone() for x in values], OPTIONS[options])
    other = Run([laid_out(x, layout) for x in values], OPTIONS[options])
    third = Run([x.clone() for x in values], OPTIONS[options])
    paddings = [p.untyped_storage().nbytes() // 4 - p.numel() for p in other.params]
    dense.step(fastnlp_ops.adafactor_step_, grads)
    other.step(fastnlp_ops.adafactor_step_, grads)
    third.step(fastnlp_ops.adafactor_step_, [laid_out(g, layout) for g in grads])
    for (name, a), b, c in zip(
        dense.tensors().items(), other.tensors().values(), third.tensors().values(), strict=True
    ):
        torch.testing.assert_close(b, a, rtol=2e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(c, a, rtol=2e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    for p, padding in zip(other.params, paddings, strict=True):
        room = torch.empty(0, device=device).set_(p.untyped_storage(), 0, (p.numel() + padding,))
        assert room.isnan().sum() == padding


def test_expanded_gradients(device):
    values = [torch.randn(4, 6, device=device), torch.randn(5, device=device)]
    grads = [torch.randn(1, 6, device=device).expand(4, 6), torch.randn(1, device=device).expand(5)]
    a, b = (Run([x.clone() for x in values], {}) for _ in range(2))
    a.step(fastnlp_ops.adafactor_step_, grads)
    b.step(fastnlp_ops.adafactor_step_, [g.contiguous() for g in grads])
    for ours, theirs in zip(a.params, b.params, strict=True):
        assert_same(ours, theirs)


def test_errors(device):
    p, g, row, col, step = (torch.ones(shape, device=device) for shape in ((4, 3), (4, 3), (4,), (3,), (1,)))

    def call(params=(p,), grads=(g,), rows=(row,), cols=(col,), vectors=(), steps=step, **options):
        fastnlp_ops.adafactor_step_(list(params), list(grads), list(rows), list(cols), list(vectors), steps, **options)

    cases = [
        ({"grads": []}, ValueError, "grads must have one entry for each of the 1 params, got 0"),
        ({"grads": [g[:3]]}, ValueError, None),
        ({"rows": []}, ValueError, None),
        ({"rows": [row[:3]]}, ValueError, None),
        ({"rows": [row.double()]}, (ValueError, TypeError), None),
        ({"cols": [row]}, ValueError, None),
        ({"vectors": [row]}, ValueError, None),
        ({"steps": step[:0]}, ValueError, None),
        ({"params": [p.long()]}, (ValueError, TypeError), None),
        ({"params": [p[:1].expand(4, 3)]}, ValueError, None),
        ({"beta1": 0.9}, ValueError, None),
        ({"ema_decay": 0.9}, ValueError, None),
        ({"beta1": 1.0}, ValueError, "beta1 must be in [0, 1) or None, got 1.0"),
        ({"ema_decay": -0.1}, ValueError, "ema_decay must be in [0, 1] or None, got -0.1"),
        ({"decay_rate": 0.8}, ValueError, "decay_rate must be at most 0, got 0.8"),
        ({"clip_threshold": 0.0}, ValueError, "clip_threshold must be above 0 or None, got 0.0"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be above 0 or None, got 0.0"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be at least 0, got -1.0"),
        ({"eps": (-1.0, 1.0)}, ValueError, "eps must be two numbers of at least 0, got (-1.0, 1.0)"),
        ({"rounding": "up"}, ValueError, 'rounding must be "nearest" or "stochastic", got \'up\''),
        ({"variant": "jax"}, ValueError, 'variant must be "transformers" or "torch", got "jax"'),
        ({"relative_step": False}, ValueError, "lr must be given where relative_step is off, got None"),
        ({"variant": "torch"}, ValueError, "lr must be given where relative_step is off, got None"),
    ]
    for arguments, kind, sentence in cases:
        before = p.clone()
        with pytest.raises(kind) as error:
            call(**arguments)
        if sentence is not None:
            assert str(error.value) == sentence
        assert_same(p, before)
        assert step.item() == 1


def test_repeatable(device, threads):
    """To the bit the same with any number of threads, and whatever tensors stand beside it in the call."""
    shapes = [(700, 1031), (5, 3), (40_000,), (64, 3, 7, 9), (3, 5)]
    params = [torch.randn(shape, device=device) for shape in shapes]
    grads = [draw(shapes, device) for _ in range(2)]
    runs = []
    for count in (1, 2, 3, 1):
        threads(count)
        run = Run([p.clone() for p in params], OPTIONS["norm"])
        for some in grads:
            run.step(fastnlp_ops.adafactor_step_, some)
        runs.append(run)
    for run in runs[1:]:
        for (name, a), b in zip(run.tensors().items(), runs[0].tensors().values(), strict=True):
            assert_same(a, b, name)
    together = Run([p.clone() for p in params], {}).step(fastnlp_ops.adafactor_step_, grads[0])
    for k in range(len(shapes)):
        alone = Run([params[k].clone()], {}).step(fastnlp_ops.adafactor_step_, [grads[0][k]])
        assert_same(alone.params[0], together.params[k])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.integers(0, 20), max_size=4), min_size=1, max_size=4),
    st.sampled_from(sorted(OPTIONS)),
    st.sampled_from([1e-6, 1.0, 1e4]),
    st.integers(1, 4),
    st.integers(0, 2**31),
)
def test_fuzz(device, shapes, options, scale, steps, seed):
    torch.manual_seed(seed)
    assert_runs_agree(*three_runs(shapes, OPTIONS[options], device, steps, scale), level=4e-7, held=("",))


@pytest.mark.parametrize("shape", [(5, 3), (1, 9), (9, 1), (40, 70), (2, 6, 5)])
def test_two_reads_are_enough(shape):
    """The identity of the reference's docstring, in float64: norms of the update without the update."""
    for beta2, tails in itertools.product((0.0, 0.9, 0.9999), (1, 4)):
        g, x = torch.randn(shape, dtype=torch.float64) ** tails, torch.randn(shape, dtype=torch.float64)
        R = beta2 * torch.rand(shape[:-1], dtype=torch.float64) + (1 - beta2) * (g * g).mean(-1)
        C = beta2 * torch.rand(shape[:-2] + shape[-1:], dtype=torch.float64) + (1 - beta2) * (g * g).mean(-2)
        mean = R.mean(-1, keepdim=True)
        u = g / (R[..., :, None] * C[..., None, :] / mean[..., None]).sqrt()
        W = (g * g / R[..., :, None]).sum(-2)
        Y = (g * x / R[..., :, None].sqrt()).sum(-2)
        torch.testing.assert_close((mean * W / C).sum(), (u * u).sum(), rtol=1e-12, atol=0)
        torch.testing.assert_close((mean.sqrt() * Y / C.sqrt()).sum(), (u * x).sum(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "lazy"])
def test_transpose(options, device):
    """Rows and columns play the same part, but for lazy rows."""
    p, g = torch.randn(23, 9, device=device), torch.randn(23, 9, device=device)
    a = Run([p.clone()], OPTIONS[options]).step(fastnlp_ops.adafactor_step_, [g])
    b = Run([p.t().contiguous()], OPTIONS[options]).step(fastnlp_ops.adafactor_step_, [g.t().contiguous()])
    torch.testing.assert_close(a.params[0], b.params[0].t())


def test_a_single_row_is_a_vector(device):
    """What cannot be factored loses nothing: 1 x N and N x 1 step as N do."""
    p, g = torch.randn(37, device=device), torch.randn(37, device=device)
    runs = [Run([p.reshape(shape).clone()], {}) for shape in ((37,), (1, 37), (37, 1))]
    for _ in range(3):
        for run in runs:
            run.step(fastnlp_ops.adafactor_step_, [g.view(run.params[0].shape)])
    for run in runs[1:]:
        torch.testing.assert_close(run.params[0].flatten(), runs[0].params[0], rtol=1e-6, atol=1e-7)


def test_leading_dimensions_are_a_batch(device):
    """Factors of each matrix for itself; norms of the tensor as a whole."""
    p, g = torch.randn(3, 8, 5, device=device), torch.randn(3, 8, 5, device=device)
    options = {"clip_threshold": None, "scale_parameter": False}
    together = Run([p.clone()], options).step(fastnlp_ops.adafactor_step_, [g])
    apart = Run([x.clone() for x in p], options).step(fastnlp_ops.adafactor_step_, list(g))
    torch.testing.assert_close(together.params[0], torch.stack(apart.params))


def test_lazy_rows_stay(device):
    p, g = torch.randn(6, 4, device=device), torch.randn(6, 4, device=device)
    g[[1, 4]] = 0
    run = Run([p.clone()], {"lazy": True, "weight_decay": 0.5, "beta1": 0.9, "ema_decay": 0.5})
    run.step(fastnlp_ops.adafactor_step_, [torch.randn(6, 4, device=device)])
    before, moment = run.params[0].clone(), run.moments[0].clone()
    run.step(fastnlp_ops.adafactor_step_, [g])
    assert_same(run.params[0][[1, 4]], before[[1, 4]])
    assert (run.params[0][[0, 2, 3, 5]] != before[[0, 2, 3, 5]]).all()
    assert (run.moments[0][[1, 4]].abs() < moment[[1, 4]].abs()).all()


def test_layer_adaptation_is_the_length(device):
    """The step is as long as learning rate times parameter, with decay inside."""
    params = [torch.randn(30, 20, device=device), 5 * torch.randn(40, device=device), torch.zeros(3, 3, device=device)]
    run = Run([p.clone() for p in params], {"layer_adaptation": True, "weight_decay": 0.1, "lr": 0.01})
    run.options["relative_step"] = False
    run.step(fastnlp_ops.adafactor_step_, [torch.randn_like(p) for p in params])
    for new, old in zip(run.params[:2], params[:2], strict=True):
        assert ((new - old).norm() / old.norm()).item() == pytest.approx(0.01, rel=1e-4)
    assert run.params[2].abs().max() > 0  # a parameter of zeros leaves them, by the step without adaptation


def test_stochastic_rounding_is_unbiased():
    for dtype, values in ((torch.bfloat16, (1.001, -3.3e-39, 1e30)), (torch.float16, (1.0001, -2.03e-6, 3e-8, 300.01))):
        for value in values:
            x = torch.full((200_000,), value)
            low, high = torch.finfo(dtype).tiny, torch.finfo(dtype).eps * abs(value)
            mean = rounded(x, dtype, "stochastic", 1, 2, 3).double().mean().item()
            unit = max(high, low * torch.finfo(dtype).eps)
            assert abs(mean - x[0].double().item()) < 4 * 0.5 * unit / math.sqrt(len(x))


def test_random_bits_are_random():
    bits = random_bits(0, 1 << 16, 1, 1, 0, "cpu")
    assert bits.unique().numel() > 65_400  # of 65,536 draws from 2^32 few meet
    counts = torch.stack([(bits >> k & 1).double().mean() for k in range(32)])
    assert (counts - 0.5).abs().max() < 5 * 0.5 / 256
    for other in ((2, 1, 0), (1, 2, 0), (1, 1, 1)):
        assert (random_bits(0, 1 << 16, *other, "cpu") == bits).sum() < 3
    high = (1 << 32) - 5
    both = random_bits(high, high + 10, 1, 1, 0, "cpu")
    assert_same(
        torch.cat([random_bits(high, high + 5, 1, 1, 0, "cpu"), random_bits(high + 5, high + 10, 1, 1, 0, "cpu")]), both
    )
    assert both[5:].ne(bits[:5]).all()


def test_versions_are_bumped(device):
    """Autograd sees that a tensor it saved has changed."""
    w = torch.randn(3, 3, device=device, requires_grad=True)
    loss = (w * w).sum()
    Run([w], {}).step(fastnlp_ops.adafactor_step_, [torch.ones(3, 3, device=device)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
