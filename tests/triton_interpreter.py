"""pytest plugin (TRITON_INTERPRET=1 pytest -p triton_interpreter): the Triton kernels, run by Triton's interpreter on
CPU tensors, take the place of the C++ kernels. Tests of a family then test its Triton kernels."""

import importlib

import torch

from fastnlp_ops import _triton


def pytest_configure():
    from fastnlp_ops._triton import global_pointer_spans

    # Tiles of 16, so that the short texts of the tests have several, and ragged ones.
    global_pointer_spans._tile = lambda *_: (16, 1)
    for op, module in _triton.LAUNCHERS.items():
        launcher = getattr(importlib.import_module(f"fastnlp_ops._triton.{module}"), op)
        torch.library.impl(f"fastnlp_ops::{op}", "CPU")(launcher)
