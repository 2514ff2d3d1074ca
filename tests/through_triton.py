"""A plugin of pytest: with `-p through_triton` every op that has a Triton kernel runs it, in Triton's interpreter, on
tensors of the CPU. The interpreter must be chosen before Triton is imported, hence a process of its own."""

import importlib
import os
import warnings

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from triton.runtime import interpreter

import fastnlp_ops  # noqa: F401  (registers the ops)
from fastnlp_ops import _triton
from fastnlp_ops._triton import linear_attention_call

_library = torch.library.Library("fastnlp_ops", "IMPL", "CPU")
for _op, _module in _triton.LAUNCHERS.items():
    _launcher = getattr(importlib.import_module(f"fastnlp_ops._triton.{_module}"), _op)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is overridden, which is the purpose
        _library.impl(_op, _launcher, allow_override=True)

_create_dot = interpreter.InterpreterBuilder.create_dot


def _dot_of_bfloat16(builder, a, b, *others):
    """The interpreter keeps bfloat16 as its bits, which it would multiply as integers."""
    a, b = (
        interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)
        if x.dtype.scalar == interpreter.tl.bfloat16
        else x
        for x in (a, b)
    )
    return _create_dot(builder, a, b, *others)


interpreter.InterpreterBuilder.create_dot = _dot_of_bfloat16
linear_attention_call._LEAST_SEGMENT = 64  # so that texts of tests have several
