"""Compiled kernels for PyTorch NLP models. Every public function and class is importable from here."""

import contextlib as _contextlib
from importlib import metadata as _metadata

import torch as _torch

from fastnlp_ops.libraries import library_path

_torch.ops.load_library(library_path())
if _torch.version.cuda is not None:
    with _contextlib.suppress(FileNotFoundError):  # built for the CPU alone
        _torch.ops.load_library(library_path("cuda"))

from fastnlp_ops import _triton, export, reference  # noqa: E402, F401  (what follows needs the ops)
from fastnlp_ops._ops import adafactor as _adafactor  # noqa: E402, F401
from fastnlp_ops._ops import crf as _crf  # noqa: E402, F401
from fastnlp_ops._ops import global_pointer as _global_pointer  # noqa: E402, F401
from fastnlp_ops._ops import linear_attention as _linear_attention  # noqa: E402, F401
from fastnlp_ops._ops import memm as _memm  # noqa: E402, F401
from fastnlp_ops._ops import multilabel as _multilabel  # noqa: E402, F401
from fastnlp_ops.adafactor import Adafactor, adafactor_in_backward, adafactor_step_  # noqa: E402
from fastnlp_ops.adafactor_schedule import Lookahead, PiecewiseLinearLR, learning_rate_groups  # noqa: E402
from fastnlp_ops.compilation import warmup  # noqa: E402
from fastnlp_ops.crf import (  # noqa: E402
    crf_entropy,
    crf_log_likelihood,
    crf_log_partition,
    crf_marginals,
    crf_partial_log_likelihood,
    crf_sample,
    crf_viterbi,
)
from fastnlp_ops.crf_module import CRF  # noqa: E402
from fastnlp_ops.crf_state_dict import convert_crf_state_dict  # noqa: E402
from fastnlp_ops.global_pointer import (  # noqa: E402
    global_pointer_decode,
    global_pointer_divergence,
    global_pointer_loss,
    global_pointer_scores,
)
from fastnlp_ops.global_pointer_module import EfficientGlobalPointer, GlobalPointer  # noqa: E402
from fastnlp_ops.global_pointer_state_dict import convert_global_pointer_state_dict  # noqa: E402
from fastnlp_ops.gplinker import gplinker_decode  # noqa: E402
from fastnlp_ops.linear_attention import linear_attention, linear_attention_step  # noqa: E402
from fastnlp_ops.linear_attention_module import LinearAttention  # noqa: E402
from fastnlp_ops.linear_attention_parallel import linear_attention_context_parallel  # noqa: E402
from fastnlp_ops.linear_attention_state import LinearAttentionState  # noqa: E402
from fastnlp_ops.memm import MEMM, memm_log_likelihood, memm_viterbi  # noqa: E402
from fastnlp_ops.multilabel import (  # noqa: E402
    multilabel_categorical_crossentropy,
    sparse_multilabel_categorical_crossentropy,
)
from fastnlp_ops.tag_schemes import spans_to_tags, tags_to_spans, transition_mask  # noqa: E402
from fastnlp_ops.torch_adafactor import TorchAdafactor  # noqa: E402

try:
    __version__ = _metadata.version("fastnlp_ops")  # pyproject.toml holds the only version string
except _metadata.PackageNotFoundError:  # a source tree on PYTHONPATH
    __version__ = "0+source"
__all__ = [
    "Adafactor",
    "CRF",
    "Lookahead",
    "MEMM",
    "EfficientGlobalPointer",
    "GlobalPointer",
    "PiecewiseLinearLR",
    "TorchAdafactor",
    "LinearAttention",
    "LinearAttentionState",
    "__version__",
    "adafactor_in_backward",
    "adafactor_step_",
    "convert_crf_state_dict",
    "convert_global_pointer_state_dict",
    "crf_entropy",
    "crf_log_likelihood",
    "crf_log_partition",
    "crf_marginals",
    "crf_partial_log_likelihood",
    "crf_sample",
    "crf_viterbi",
    "export",
    "global_pointer_decode",
    "global_pointer_divergence",
    "global_pointer_loss",
    "global_pointer_scores",
    "gplinker_decode",
    "learning_rate_groups",
    "library_path",
    "linear_attention",
    "linear_attention_context_parallel",
    "linear_attention_step",
    "memm_log_likelihood",
    "memm_viterbi",
    "multilabel_categorical_crossentropy",
    "reference",
    "spans_to_tags",
    "sparse_multilabel_categorical_crossentropy",
    "tags_to_spans",
    "transition_mask",
    "warmup",
]
