"""A plugin of pytest: with `-p through_triton` every op that has a Triton kernel runs it, in Triton's interpreter, on
tensors of the CPU. The interpreter must be chosen before Triton is imported, hence a process of its own."""

import importlib
import os
import warnings

os.environ["TRITON_INTERPRET"] = "1"

import torch

import fastnlp_ops  # noqa: F401  (registers the ops)
from fastnlp_ops import _triton

_library = torch.library.Library("fastnlp_ops", "IMPL", "CPU")
for _op, _module in _triton.LAUNCHERS.items():
    _launcher = getattr(importlib.import_module(f"fastnlp_ops._triton.{_module}"), _op)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is overridden, which is the purpose
        _library.impl(_op, _launcher, allow_override=True)
