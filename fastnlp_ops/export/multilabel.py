"""The multilabel ops, which loop over nothing."""

from torch import Tensor

from fastnlp_ops.reference.multilabel import indices_to_labels, log_sums


def multilabel_categorical_crossentropy(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return log_sums(scores, labels)


def sparse_multilabel_categorical_crossentropy(scores: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    return log_sums(scores, indices_to_labels(scores, indices))
