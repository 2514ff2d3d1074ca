"""Fake kernel of the Adafactor op, and the version counters of what it writes. Schema: csrc/ops.cpp."""

import torch
from torch import Tensor

if not hasattr(torch.ops.fastnlp_ops, "adafactor_step_"):  # a build without the kernel
    _library = torch.library.Library("fastnlp_ops", "FRAGMENT")
    _library.define(
        "adafactor_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] rows, Tensor(c!)[] cols, "
        "Tensor(d!)[] vectors, Tensor(e!)[] moments, Tensor(f!)[] averages, Tensor(g!) steps, Tensor(h!)? rms, "
        "Tensor lr, int[] group_of, float[] options, Tensor? grad_scale, Tensor? found_inf, float max_grad_norm, "
        "bool skip_nonfinite, int seed, int[] ids, Tensor(i!)? sums, int[] shards, int phases) -> ()"
    )

    @torch.library.impl("fastnlp_ops::adafactor_step_", "CompositeExplicitAutograd", lib=_library)
    def _(
        params,
        grads,
        rows,
        cols,
        vectors,
        moments,
        averages,
        steps,
        rms,
        lr,
        group_of,
        options,
        grad_scale,
        found_inf,
        max_grad_norm,
        skip_nonfinite,
        seed,
        ids,
        sums,
        shards,
        phases,
    ):
        from fastnlp_ops.reference.adafactor import adafactor_step_

        options = [options[k : k + 15] for k in range(0, len(options), 15)]
        matrix, vector, moment, average = (
            iter(zip(rows, cols, strict=True)),
            iter(vectors),
            iter(moments),
            iter(averages),
        )
        items = []
        for k, (p, g, which) in enumerate(zip(params, grads, group_of, strict=True)):
            o = options[which]
            factor = next(matrix) if p.dim() > 1 else (next(vector),)
            items.append((k, p, g, factor, [next(moment)] if o[5] >= 0 else [], [next(average)] if o[12] >= 0 else []))
        scale = torch.ones(()) if grad_scale is None else grad_scale
        squares = sum((g.to(f[0].dtype) / scale).double().square().sum().item() for _, _, g, f, _, _ in items)
        if skip_nonfinite and not all(
            (g.to(f[0].dtype) / scale).square().isfinite().all() for _, _, g, f, _, _ in items
        ):
            return
        if max_grad_norm > 0:
            scale = scale / min(1.0, max_grad_norm / (squares**0.5 + 1e-6))
        for k, p, g, factor, m, a in items:
            o = options[group_of[k]]
            adafactor_step_(
                [p], [g], [factor[0]] if p.dim() > 1 else [], [factor[1]] if p.dim() > 1 else [],
                [] if p.dim() > 1 else [factor[0]], steps[k : k + 1], moments=m, averages=a,
                rms=None if rms is None else rms[k : k + 1], lr=lr[group_of[k]].item(), eps=(o[1], o[2]),
                clip_threshold=o[3], decay_rate=o[4], beta1=o[5] if o[5] >= 0 else None, weight_decay=o[6],
                scale_parameter=bool(o[7]), relative_step=o[8] > 0, warmup_init=o[8] == 2,
                variant="torch" if o[0] else "transformers", maximize=bool(o[9]), layer_adaptation=bool(o[10]),
                lazy=bool(o[11]), ema_decay=o[12] if o[12] >= 0 else None,
                rounding="stochastic" if o[13] else "nearest", lr_scale=o[14], seed=seed, ids=[ids[k] if ids else k],
                grad_scale=scale, found_inf=found_inf,
            )  # fmt: skip


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
