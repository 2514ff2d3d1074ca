"""Every op in plain PyTorch: any device and dtype, differentiable to any order, written to be read. Slow on purpose."""

from fastnlp_ops.reference.adafactor import adafactor_step_
from fastnlp_ops.reference.crf import (
    crf_entropy,
    crf_log_likelihood,
    crf_log_partition,
    crf_marginals,
    crf_partial_log_likelihood,
    crf_sample,
    crf_sample_from_uniforms,
    crf_score,
    crf_viterbi,
)
from fastnlp_ops.reference.global_pointer import (
    global_pointer_decode,
    global_pointer_divergence,
    global_pointer_loss,
    global_pointer_scores,
)
from fastnlp_ops.reference.gplinker import gplinker_decode
from fastnlp_ops.reference.linear_attention import (
    linear_attention,
    linear_attention_recurrent,
    linear_attention_step,
)
from fastnlp_ops.reference.memm import memm_log_likelihood, memm_viterbi
from fastnlp_ops.reference.multilabel import (
    multilabel_categorical_crossentropy,
    sparse_multilabel_categorical_crossentropy,
)

__all__ = [
    "adafactor_step_",
    "crf_entropy",
    "crf_log_likelihood",
    "crf_log_partition",
    "crf_marginals",
    "crf_partial_log_likelihood",
    "crf_sample",
    "crf_sample_from_uniforms",
    "crf_score",
    "crf_viterbi",
    "global_pointer_decode",
    "global_pointer_divergence",
    "global_pointer_loss",
    "global_pointer_scores",
    "gplinker_decode",
    "linear_attention",
    "linear_attention_recurrent",
    "linear_attention_step",
    "memm_log_likelihood",
    "memm_viterbi",
    "multilabel_categorical_crossentropy",
    "sparse_multilabel_categorical_crossentropy",
]
