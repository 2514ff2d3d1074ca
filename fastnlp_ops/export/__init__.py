"""The ops in terms of torch's own, for programs that run where ours do not exist: ONNX, and other backends."""

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

from fastnlp_ops.export import aten as _aten
from fastnlp_ops.export import crf as _crf
from fastnlp_ops.export import global_pointer as _global_pointer
from fastnlp_ops.export import linear_attention as _linear_attention
from fastnlp_ops.export import multilabel as _multilabel

__all__ = ["decompositions"]

_FORMS = (
    _crf.crf_entropy,
    _crf.crf_log_likelihood,
    _crf.crf_log_partition,
    _crf.crf_log_partition_backward,
    _crf.crf_sample,
    _crf.crf_viterbi,
    _crf.crf_viterbi_n_best,
    _crf.memm_log_likelihood,
    _global_pointer.flat_spans,
    _global_pointer.global_pointer_cells,
    _global_pointer.global_pointer_decode,
    _global_pointer.global_pointer_divergence,
    _global_pointer.global_pointer_loss,
    _global_pointer.global_pointer_scores,
    _linear_attention.linear_attention,
    _multilabel.multilabel_categorical_crossentropy,
    _multilabel.sparse_multilabel_categorical_crossentropy,
)


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """A table for ``ExportedProgram.run_decompositions``: what it leaves are ops of torch, and scans over time.

    The program keeps its symbolic sizes, and ``torch.onnx.export`` takes it as it is. Loops (Viterbi, marginals, causal
    linear attention, flat spans) become ``torch.ops.higher_order.scan``, ONNX's Scan, which needs no gradients: export
    under ``torch.no_grad()``.

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> class Scores(torch.nn.Module):
        ...     def forward(self, q, k):
        ...         return fastnlp_ops.global_pointer_scores(q, k)
        >>> q, k = torch.randn(2, 2, 5, 3, 4)
        >>> n = torch.export.Dim("n")
        >>> with torch.no_grad():
        ...     program = torch.export.export(Scores(), (q, k), dynamic_shapes=({1: n}, {1: n}))
        ...     program = program.run_decompositions(fastnlp_ops.export.decompositions())
        ...     # torch.onnx.export(program, dynamo=True).save("scores.onnx")
        >>> {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")}
        {'aten'}
        >>> torch.allclose(program.module()(q[:, :3], k[:, :3]), fastnlp_ops.global_pointer_scores(q[:, :3], k[:, :3]))
        True

    Returns:
        dict[OpOverload, Callable]: forms of every op of the package that infers, and of four of torch's that the ONNX
        exporter lacks (``sort.stable``, ``searchsorted``, ``cummax``, ``cummin``). It may be joined with another table.

    Raises:
        NotImplementedError: while a program is decomposed, for packed sequences (``cu_seqlens``).

    Preconditions:
        The program is one of inference: there are no forms of backward passes, and none of Adafactor. ``CRF.decode``,
        ``MEMM.decode`` and ``gplinker_decode`` give Python lists or search: export ``viterbi`` and ``decode``.

    Precision:
        That of fastnlp_ops.reference in the compute type. Values are not checked: tags out of range give NaN, other
        labels out of range are dropped.
    """
    ops, torchs = torch.ops.fastnlp_ops, torch.ops.aten
    table = {getattr(ops, form.__name__).default: form for form in _FORMS}
    return table | {
        torchs.cummax.default: _aten.cummax,
        torchs.cummin.default: _aten.cummin,
        torchs.searchsorted.Tensor: _aten.searchsorted,
        torchs.sort.stable: _aten.sort,
    }
