"""Fake kernel of the Adafactor op, and the version counters of what it writes. Schema: csrc/ops.cpp."""

import torch
from torch import Tensor


@torch.library.register_fake("fastnlp_ops::adafactor_step_")
def _(params, *_arguments):
    return None


def _bump_versions(params, grads, rows, cols, vectors, moments, averages, steps, rms, *rest):
    """Kernels of the stable ABI leave the counters alone by which autograd sees that a saved tensor has changed."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        torch.ops.fastnlp_ops.adafactor_step_(params, grads, rows, cols, vectors, moments, averages, steps, rms, *rest)
    written: list[Tensor] = [*params, *rows, *cols, *vectors, *moments, *averages, steps]
    torch.autograd.graph.increment_version([*written, rms] if rms is not None else written)


torch.library.impl("fastnlp_ops::adafactor_step_", "ADInplaceOrView")(_bump_versions)
