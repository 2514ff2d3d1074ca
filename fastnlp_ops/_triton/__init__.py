"""The ops whose CUDA kernels are written in Triton, which is imported when the first of them runs."""

import importlib
from typing import Any

import torch

# op -> the module that holds its launcher, a function of the op's name
LAUNCHERS = {
    "global_pointer_scores": "global_pointer_scores",
    "global_pointer_scores_backward": "global_pointer_scores",
    "global_pointer_loss": "global_pointer_loss",
    "global_pointer_loss_backward": "global_pointer_loss",
    "global_pointer_divergence": "global_pointer_divergence",
    "global_pointer_divergence_backward": "global_pointer_divergence",
    "global_pointer_decode": "global_pointer_decode",
    "flat_spans": "global_pointer_decode",
    "linear_attention": "linear_attention",
    "linear_attention_backward": "linear_attention",
    "linear_attention_step": "linear_attention_step",
    "multilabel_categorical_crossentropy": "multilabel",
    "multilabel_categorical_crossentropy_backward": "multilabel",
    "sparse_multilabel_categorical_crossentropy": "multilabel",
    "sparse_multilabel_categorical_crossentropy_backward": "multilabel",
}


def _register(op: str, module: str) -> None:
    def launch(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"{__name__}.{module}"), op)(*arguments)

    torch.library.impl(f"fastnlp_ops::{op}", "CUDA")(launch)


for _op, _module in LAUNCHERS.items():
    _register(_op, _module)
