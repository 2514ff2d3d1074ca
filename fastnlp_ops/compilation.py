"""Compilation of the Triton kernels, which otherwise happens when an op first runs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnlp_ops.global_pointer import (
    global_pointer_decode,
    global_pointer_divergence,
    global_pointer_loss,
    global_pointer_scores,
)
from fastnlp_ops.linear_attention import linear_attention, linear_attention_step
from fastnlp_ops.multilabel import (
    multilabel_categorical_crossentropy,
    sparse_multilabel_categorical_crossentropy,
)


def warmup(*, head_size: int = 64, dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)) -> None:
    """Compiles the Triton kernels for the current GPU, so that the first training step does not wait for them.

    Every kernel takes Triton a second or so, once: what is compiled stays in Triton's cache on disk. Covered are the
    ops with their default options and a mask, for GlobalPointer and for Efficient GlobalPointer, on texts of more than
    32 tokens, and linear attention bidirectional, causal and of one token; what differs compiles when it is first used.

    Args:
        head_size (int): channels of q and k in each head.
        dtypes (sequence of torch.dtype): of q and k.

    Returns:
        None

    Raises:
        RuntimeError: without a GPU that torch can use.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("warmup compiles for the current GPU, and torch sees none")
    for dtype in dtypes:
        _run_global_pointer(head_size, dtype, shared=False)
        _run_global_pointer(head_size, dtype, shared=True)
        _run_multilabel(dtype)
        _run_linear_attention(head_size, dtype)
    torch.cuda.synchronize()


def _run_global_pointer(head_size: int, dtype: torch.dtype, shared: bool) -> None:
    B, n, H = 1, 128, 2
    mask = torch.ones(B, n, dtype=torch.bool, device="cuda")
    labels = torch.zeros(1, 4, dtype=torch.int64, device="cuda")

    def draw(*shape: int) -> list[Tensor]:
        return [torch.randn(shape, device="cuda").to(dtype).requires_grad_() for _ in range(4)]

    q1, k1, q2, k2 = draw(B, n, 1 if shared else H, head_size)
    start1, end1, start2, end2 = draw(B, n, H) if shared else [None] * 4
    global_pointer_scores(q1, k1, start_bias=start1, end_bias=end1, mask=mask).sum().backward()
    global_pointer_loss(q1, k1, labels, start_bias=start1, end_bias=end1, mask=mask).backward()
    global_pointer_divergence(
        q1, k1, q2, k2, start_bias1=start1, end_bias1=end1, start_bias2=start2, end_bias2=end2, mask=mask
    ).backward()
    global_pointer_decode(q1, k1, start_bias=start1, end_bias=end1, mask=mask, threshold=-torch.inf, nested=False)


def _run_multilabel(dtype: torch.dtype) -> None:
    scores = torch.randn(2, 8192, device="cuda").to(dtype).requires_grad_()
    for labels in (scores.detach() > 1, torch.rand_like(scores)):
        multilabel_categorical_crossentropy(scores, labels).backward()
    indices = torch.zeros(2, 1, dtype=torch.int64, device="cuda")
    sparse_multilabel_categorical_crossentropy(scores, indices).backward()


def _run_linear_attention(head_size: int, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 128, 2, head_size, device="cuda").to(dtype).requires_grad_() for _ in range(3))
    mask = torch.ones(1, 128, dtype=torch.bool, device="cuda")
    for causal in (False, True):
        out, state = linear_attention(q, k, v, causal=causal, key_padding_mask=mask, return_state=True)
        out.sum().backward()
    with torch.no_grad():
        linear_attention_step(q[:, 0], k[:, 0], v[:, 0], state)
