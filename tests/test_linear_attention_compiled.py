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
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
ELU, EXP = 1, 4


def launch(dtype, size, feature_map=ELU, causal=True, decay=False, heads=400, tokens=64):
    """Forward and backward as a step of training calls them: one kernel for 400 heads, segments for few."""
    q, k, v = (torch.zeros(1, tokens, heads, size, dtype=dtype) for _ in range(3))
    log_decay = torch.zeros(heads) if decay else None
    mask = torch.ones(1, tokens, dtype=torch.bool)
    options = (mask, None, None, log_decay, None, None, None, feature_map, causal, True, 0.125, 1e-6)
    results = linear_attention.linear_attention(q, k, v, *options)
    linear_attention.linear_attention_backward(v, None, None, q, k, v, *results, *options)


def compile_for(architecture, monkeypatch, function, *arguments, **options):
    # What no kernel has written is read nevertheless, by the code between two launches: let it be ones.
    monkeypatch.setattr(torch, "empty", torch.ones)
    monkeypatch.setattr(linear_attention_call, "_architecture", lambda _: architecture // 10)
    with offline(architecture) as compiled:
        function(*arguments, **options)
    for kernel in compiled:
        assert kernel.stack == 0, f"{kernel.name}: {kernel.stack} bytes of a thread's registers are spilled"
        assert kernel.shared <= SHARED_MEMORY[architecture], f"{kernel.name}: {kernel.shared} bytes of shared memory"
        assert kernel.name not in PRODUCTS or kernel.matrix_instructions, f"{kernel.name} multiplies without them"
    return [kernel.name for kernel in compiled]


@pytest.mark.long
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_compiled(architecture, size, monkeypatch):
    names = compile_for(architecture, monkeypatch, launch, torch.bfloat16, size)
    kernels = [name for name in names if name in PRODUCTS]
    assert kernels == ["linear_attention_queries_kernel"] * 2 + ["linear_attention_keys_kernel"] * 2


@pytest.mark.long
@pytest.mark.parametrize("options", [{"feature_map": EXP}, {"decay": True}, {"heads": 2, "tokens": 600}], ids=str)
def test_compiled_options(options, monkeypatch):
    names = compile_for(90, monkeypatch, launch, torch.bfloat16, 64, **options)
    assert ("linear_attention_sums_kernel" in names) == ("heads" in options), "texts of few heads are split"


@pytest.mark.long
def test_compiled_float32(monkeypatch):
    compile_for(90, monkeypatch, launch, torch.float32, 64)


@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_compiled_step(architecture, monkeypatch):
    q = torch.zeros(2, 4, 64, dtype=torch.bfloat16)
    kv, key_sum = torch.zeros(2, 4, 64, 64), torch.zeros(2, 4, 64)
    step = linear_attention_step.linear_attention_step
    names = compile_for(architecture, monkeypatch, step, q, q, q, kv, key_sum, None, None, ELU, True, 0.125, 1e-6)
    assert names == ["linear_attention_step_kernel"], "one launch"
