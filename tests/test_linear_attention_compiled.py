"""The Triton kernels of linear attention, compiled ahead of time: what a GPU would be given to run.

Matrix products use the matrix units, nothing spills out of registers, and shared memory is within the card's. Launchers
run as they are, on tensors of the CPU; only the launch is replaced (tests/triton_tools.py).
"""

import pytest
import torch

pytest.importorskip("triton")

from triton_tools import SHARED_MEMORY, offline

from fastnlp_ops._triton import linear_attention, linear_attention_call, linear_attention_step

PRODUCTS = {f"linear_attention_{name}_kernel" for name in ("queries", "keys", "sums")}
ELU, RELU, EXP, SOFTMAX, COSINE = 1, 2, 4, 5, 6
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
FEW = {"heads": 2, "tokens": 600}
# Beside bfloat16 of 64 and 128 channels, which all architectures compile: each with the architecture that has least to
# spare for it. Causal float32 of 128 channels is not among them: a tile of it that needs no stack was not found.
CASES = [
    (90, BF16, 64, {"feature_map": EXP}),
    (90, BF16, 64, {"decay": True}),
    (90, BF16, 64, FEW),
    (90, F32, 64, {}),
    (90, BF16, 32, {"decay": True}),
    (80, BF16, 96, {}),
    (90, BF16, 128, {"decay": True}),
    (90, BF16, 128, {"decay": True, **FEW}),
    (90, BF16, 128, {"feature_map": RELU}),
    (90, BF16, 128, {"feature_map": COSINE}),
    (90, BF16, 128, {"feature_map": EXP, "causal": False}),
    (90, BF16, 128, {"feature_map": SOFTMAX, "causal": False}),
    (90, BF16, 128, {"group": 4}),
    (90, BF16, 256, {}),
    (80, F16, 128, {}),
    (90, F16, 128, {"decay": True}),
    (90, F32, 128, {"causal": False}),
    (90, F64, 64, {}),
]


def launch(dtype, size, feature_map=ELU, causal=True, decay=False, heads=400, tokens=64, group=1):
    """Forward and backward as a step of training calls them: one kernel for 400 heads, segments for few."""
    q, k, v = (torch.zeros(1, tokens, n, size, dtype=dtype) for n in (heads * group, heads, heads))
    log_decay = torch.zeros(heads) if decay else None
    mask = torch.ones(1, tokens, dtype=torch.bool)
    options = (mask, None, None, log_decay, None, None, None, feature_map, causal, True, 0.125, 1e-6)
    results = linear_attention.linear_attention(q, k, v, *options)
    linear_attention.linear_attention_backward(results[0], None, None, q, k, v, *results, *options)


def compile_for(architecture, monkeypatch, function, *arguments, **options):
    # What no kernel has written is read nevertheless, by the code between two launches: let it be ones.
    monkeypatch.setattr(torch, "empty", torch.ones)
    monkeypatch.setattr(linear_attention_call, "_architecture", lambda _: architecture // 10)
    with offline(architecture) as compiled:
        function(*arguments, **options)
    for kernel in compiled:
        assert kernel.stack == 0, f"{kernel.name}: {kernel.stack} bytes of a thread's registers are spilled"
        assert kernel.shared <= SHARED_MEMORY[architecture], f"{kernel.name}: {kernel.shared} bytes of shared memory"
        if kernel.name in PRODUCTS and arguments[0] is not F64:
            assert kernel.matrix_instructions, f"{kernel.name} multiplies without them"
    return [kernel.name for kernel in compiled]


@pytest.mark.long
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_compiled(architecture, size, monkeypatch):
    names = compile_for(architecture, monkeypatch, launch, torch.bfloat16, size)
    kernels = [name for name in names if name in PRODUCTS]
    assert kernels == ["linear_attention_queries_kernel"] * 2 + ["linear_attention_keys_kernel"] * 2


@pytest.mark.long
@pytest.mark.parametrize(("architecture", "dtype", "size", "options"), CASES, ids=str)
def test_compiled_cases(architecture, dtype, size, options, monkeypatch):
    names = compile_for(architecture, monkeypatch, launch, dtype, size, **options)
    split = "heads" in options or not options.get("causal", True)
    assert ("linear_attention_sums_kernel" in names) == split, "texts of few heads are split"


@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_compiled_step(architecture, monkeypatch):
    q = torch.zeros(2, 4, 64, dtype=torch.bfloat16)
    kv, key_sum = torch.zeros(2, 4, 64, 64), torch.zeros(2, 4, 64)
    step = linear_attention_step.linear_attention_step
    names = compile_for(architecture, monkeypatch, step, q, q, q, kv, key_sum, None, None, ELU, True, 0.125, 1e-6)
    assert names == ["linear_attention_step_kernel"], "one launch"
