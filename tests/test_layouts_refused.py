"""Tensors without strides, sparse and nested, get one sentence from every function, for every argument.

The functions of the CRF are in test_crf_edges.py.
"""

import pytest
import torch

import fastnlp_ops

Q, BIAS = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2)
LABELS, MASK = torch.tensor([[0, 0, 0, 1]]), torch.ones(2, 3, dtype=torch.bool)
ROWS, CLASSES = torch.randn(2, 5), torch.ones(2, 5)
SPANS = {"q": Q, "k": Q, "start_bias": BIAS, "end_bias": BIAS, "mask": MASK, "position_ids": MASK.long()}
ATTENTION = {"q": Q, "k": Q, "v": Q, "key_padding_mask": ~MASK, "log_decay": -BIAS.abs(), "causal": True}
TEXTS = torch.tensor([0, 3])
PACKED = {"q": Q[:1], "k": Q[:1], "v": Q[:1], "cu_seqlens_q": TEXTS, "cu_seqlens_k": TEXTS}

CASES = {
    "global_pointer_scores": SPANS,
    "global_pointer_loss": SPANS | {"labels": LABELS},
    "global_pointer_decode": SPANS,
    "linear_attention": ATTENTION,
    "packed linear_attention": PACKED,
    "multilabel_categorical_crossentropy": {"scores": ROWS, "labels": CLASSES},
    "sparse_multilabel_categorical_crossentropy": {"scores": ROWS, "indices": CLASSES.long()},
}


def nested(x):
    return torch.nested.as_nested_tensor(list(x), layout=torch.jagged)


@pytest.mark.parametrize(
    ("function", "name"),
    [(function, name) for function, arguments in CASES.items() for name in arguments if name != "causal"],
)
def test_sentence(function, name):
    call, arguments = getattr(fastnlp_ops, function.split()[-1]), CASES[function]
    call(**arguments)
    with pytest.raises(TypeError, match=f"^{name} must be a dense tensor, got torch.sparse_coo$"):
        call(**arguments | {name: arguments[name].to_sparse()})
    if arguments[name].dim() > 1:
        with pytest.raises(TypeError, match=f"^{name} must be a dense tensor, got nested$"):
            call(**arguments | {name: nested(arguments[name])})
