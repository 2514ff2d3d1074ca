"""The one check that every family makes of every tensor: ops read strides, which sparse and nested tensors lack."""

import torch
from torch import Tensor


def check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{name} must be a dense tensor, got {kind}")
