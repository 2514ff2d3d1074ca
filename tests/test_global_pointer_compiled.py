"""The family's Triton kernels, compiled ahead of time for every architecture: what a GPU would be given to run.

Matrix products use the matrix units, nothing spills out of registers, and shared memory is within the card's. Launchers
run as they are, on tensors of the CPU; only the launch is replaced (tests/triton_tools.py).
"""

import pytest
import torch

pytest.importorskip("triton")

from triton_tools import SHARED_MEMORY, offline

from fastnlp_ops._triton import (
    global_pointer_decode,
    global_pointer_divergence,
    global_pointer_loss,
    global_pointer_scores,
    multilabel,
)

ARCHITECTURES = (80, 90, 100, 120)
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
# Kernels that multiply matrices, by the start of their names; the others read and add.
PRODUCTS = ("global_pointer_scores", "global_pointer_loss", "global_pointer_gradient", "global_pointer_divergence",
            "global_pointer_decode")  # fmt: skip
OPTIONS = (None, True, True, -1, 0.125)  # positions, RoPE, tril_mask, no band, scale


def launch_all(dtype, head_size, shared):
    """Every launcher of the family once, as steps of training and decoding call them."""
    B, n, H = 2, 128, 4
    q, k = (torch.zeros(B, n, 1 if shared else H, head_size, dtype=dtype) for _ in range(2))
    biases = [torch.zeros(B, n, H, dtype=dtype) if shared else None for _ in range(2)]
    options = (torch.ones(B, n, dtype=torch.bool), *OPTIONS)
    rows, cells = torch.zeros(B, H), torch.arange(8)
    one = (q, k, *biases)
    global_pointer_scores.global_pointer_scores(*one, *options)
    global_pointer_scores.global_pointer_scores_backward(torch.zeros(B, H, n, n, dtype=dtype), *one, *options)
    *_, saved = global_pointer_loss.global_pointer_loss(q, k, cells, *biases, *options, True)
    global_pointer_loss.global_pointer_loss_backward(rows, rows, rows, saved, q, k, cells, *biases, *options)
    global_pointer_divergence.global_pointer_divergence(*one, *one, *options)
    global_pointer_divergence.global_pointer_divergence_backward(rows, *one, *one, *options)
    spans, scores = global_pointer_decode.global_pointer_decode(*one, *options, 0.0)
    global_pointer_decode.flat_spans(spans, scores, q)


def launch_multilabel(dtype):
    scores, rows = torch.zeros(2, 8192, dtype=dtype), torch.zeros(2)
    for labels in (scores > 0, scores.float()):
        multilabel.multilabel_categorical_crossentropy(scores, labels)
        multilabel.multilabel_categorical_crossentropy_backward(rows, rows, rows, scores, labels)
    multilabel.sparse_multilabel_categorical_crossentropy(scores, torch.zeros(2, 3, dtype=torch.int64))


def check(kernel, architecture):
    assert kernel.stack == 0, f"{kernel.name}: {kernel.stack} bytes of a thread's registers are spilled"
    assert kernel.shared <= SHARED_MEMORY[architecture], f"{kernel.name}: {kernel.shared} bytes of shared memory"
    if kernel.name.startswith(PRODUCTS):
        assert kernel.matrix_instructions, f"{kernel.name} does not use the matrix units"


@pytest.fixture
def filled(monkeypatch):
    """What no kernel has written is read nevertheless, by the code between two launches: let it be ones."""
    monkeypatch.setattr(torch, "empty", torch.ones)


@pytest.mark.long
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize(("dtype", "head_size"), [("bf16", 64), ("f16", 128), ("f32", 64)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled(architecture, dtype, head_size, shared, filled):
    with offline(architecture) as compiled:
        launch_all(DTYPES[dtype], head_size, shared)
    for name in PRODUCTS:
        assert any(kernel.name.startswith(name) for kernel in compiled), f"{name} was not launched"
    for kernel in compiled:
        check(kernel, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_multilabel(architecture, filled):
    with offline(architecture) as compiled:
        launch_multilabel(torch.bfloat16)
    assert {kernel.name for kernel in compiled} >= {"multilabel_kernel", "multilabel_backward_kernel"}
    for kernel in compiled:
        check(kernel, architecture)
