"""Linear-chain CRF: training step, decoding and marginals against the packages people use today.

All providers get the same emissions [B, T, N], tags, parameters and lengths, batch first, through their public module.
Ragged cases have right padding, which every peer understands; ours gets the int64 mask that tokenizers give, the peers
a bool one.
"""

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastnlp_ops
from benchmarks.harness import OURS, Case, Goal, Results, Work, optional
from benchmarks.measure import Ceilings
from benchmarks.proof_crf import accuracy, closed_form, exercise
from fastnlp_ops.reference import crf as reference

__all__ = ["GOALS", "PROVIDERS", "accuracy", "cases", "exercise", "floor", "make_inputs", "truth"]

TRAIN, LISTS, TENSORS, MARGINALS = "forward+backward", "decode to lists", "decode to tensors", "marginals"
OPS = {TRAIN: "crf_log_likelihood", LISTS: "crf_viterbi", TENSORS: "crf_viterbi", MARGINALS: "crf_marginals"}
PEER, LINEAR, STRUCT = "pytorch-crf", "linear-crf-torch", "torch-struct"


class Inputs(NamedTuple):
    emissions: Tensor  # [B, T, N], a leaf that wants a gradient
    tags: Tensor  # [B, T]
    mask: Tensor | None  # bool [B, T]
    int_mask: Tensor | None  # the same as int64
    lengths: Tensor  # [B]
    transitions: Tensor  # [N, N], the parameters' values
    start: Tensor  # [N]
    end: Tensor  # [N]


def make_inputs(shape: tuple[int, int, int], dtype: str, device: str, ragged: bool = False) -> Inputs:
    batch, steps, tags = shape
    emissions = torch.randn(shape, device=device).to(getattr(torch, dtype)).requires_grad_()
    lengths = torch.full((batch,), steps, device=device)
    if ragged:
        lengths[1:] = torch.randint(max(2, steps // 4), steps + 1, (batch - 1,), device=device)
    mask = torch.arange(steps, device=device) < lengths[:, None] if ragged else None
    transitions, start, end = (torch.empty(s, device=device).uniform_(-0.1, 0.1) for s in ((tags, tags), tags, tags))
    labels = torch.randint(tags, (batch, steps), device=device)
    return Inputs(emissions, labels, mask, mask.long() if ragged else None, lengths, transitions, start, end)


# Providers


def training(loss: Callable[[], Tensor], inputs: Inputs, parameters: dict[str, Tensor], scale: float = 1.0) -> Work:
    """One step: gradients set to None, the loss, backward. `scale` times the loss is the summed log-likelihood."""
    leaves = {"demissions": inputs.emissions, **parameters}

    def run() -> Tensor:
        for leaf in leaves.values():
            leaf.grad = None
        value = loss()
        value.backward()
        return value

    def outputs(value: Tensor) -> dict[str, Tensor]:
        found = {"log_likelihood": value, **{name: leaf.grad for name, leaf in leaves.items()}}
        return {name: tensor.double() * scale for name, tensor in found.items()}

    known = [tensor for tensor in (*inputs, *parameters.values()) if tensor is not None]
    return Work(run, outputs, known, graph=True)


def inference(
    call: Callable[..., Any], *arguments: Any, outputs: Callable[[Any], dict[str, Tensor]], graph: bool
) -> Work:
    def run() -> Any:
        with torch.no_grad():
            return call(*arguments)

    return Work(run, outputs, (), graph)


def path_outputs(inputs: Inputs, paths: Tensor | list[list[int]]) -> dict[str, Tensor]:
    """The float64 score of each path [B, T]; paths may differ on near-ties of float32, their scores may not."""
    if isinstance(paths, list):
        padded = torch.full(inputs.tags.shape, -1)
        for row, path in zip(padded, paths, strict=True):
            row[: len(path)] = torch.tensor(path)
        paths = padded.to(inputs.tags.device)
    on = torch.arange(paths.shape[1], device=paths.device) < inputs.lengths[:, None]
    if not torch.equal(paths >= 0, on):
        raise ValueError("a path's length is not its sequence's")
    wide = [t.detach().double() for t in (inputs.emissions, inputs.transitions, inputs.start, inputs.end)]
    emissions, transitions, start, end = wide
    tags = paths.clamp(min=0)
    scores = (emissions.gather(2, tags[..., None])[..., 0] * on).sum(1) + start[tags[:, 0]]
    scores += (transitions[tags[:, :-1], tags[:, 1:]] * on[:, 1:]).sum(1)
    return {"path score": scores + end[tags.gather(1, inputs.lengths[:, None] - 1)[:, 0]]}


def module_work(
    case: Case, inputs: Inputs, crf: torch.nn.Module, names: tuple[str, str, str], mask: Any, scale: float = 1.0
) -> Work:
    """Training or decoding through a module that takes (emissions, tags, mask) and has `decode`."""
    parameters = dict(zip(("dtransitions", "dstart", "dend"), (getattr(crf, name) for name in names), strict=True))
    with torch.no_grad():
        for parameter, value in zip(parameters.values(), inputs[-3:], strict=True):
            parameter.copy_(value)
    if case.pass_name == TRAIN:
        return training(lambda: crf(inputs.emissions, inputs.tags, mask), inputs, parameters, scale)
    return inference(crf.decode, inputs.emissions, mask, outputs=partial(path_outputs, inputs), graph=False)


def ours(case: Case, inputs: Inputs) -> Work:
    def decoded(found: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return path_outputs(inputs, found[0])

    crf, mask = fastnlp_ops.CRF(case.shape[-1], batch_first=True).to(inputs.emissions.device), inputs.int_mask
    work = module_work(case, inputs, crf, ("transitions", "start_transitions", "end_transitions"), mask)
    if case.pass_name == TENSORS:
        return inference(crf.viterbi, inputs.emissions, mask, outputs=decoded, graph=True)
    if case.pass_name == MARGINALS:
        return inference(crf.marginals, inputs.emissions, mask, outputs=lambda p: {"marginals": p}, graph=True)
    return work


def pytorch_crf(case: Case, inputs: Inputs) -> Work:
    crf = optional("torchcrf").CRF(case.shape[-1], batch_first=True).to(inputs.emissions.device)
    return module_work(case, inputs, crf, ("transitions", "start_transitions", "end_transitions"), inputs.mask)


def linear_crf_torch(case: Case, inputs: Inputs) -> Work:
    crf = optional("linear_crf").LinearCRF(case.shape[-1], batch_first=True).to(inputs.emissions.device)
    tokens = float(inputs.lengths.sum())  # its loss is the mean over tokens of minus the log-likelihood
    return module_work(case, inputs, crf, ("transitions", "starts", "ends"), inputs.mask, -tokens)


def our_reference(case: Case, inputs: Inputs) -> Work:
    leaves = {"dtransitions": inputs.transitions, "dstart": inputs.start, "dend": inputs.end}
    leaves = {name: value.clone().requires_grad_(case.pass_name == TRAIN) for name, value in leaves.items()}
    chain, mask = tuple(leaves.values()), inputs.mask

    def loss() -> Tensor:
        return reference.crf_log_likelihood(inputs.emissions, inputs.tags, *chain, mask=mask).sum()

    if case.pass_name == TRAIN:
        return training(loss, inputs, leaves)
    if case.pass_name == MARGINALS:
        call, outputs = reference.crf_marginals, lambda p: {"marginals": p}
    else:
        call, outputs = reference.crf_viterbi, lambda found: path_outputs(inputs, found[0])
    return inference(partial(call, mask=mask), inputs.emissions, *chain, outputs=outputs, graph=False)


def torch_struct(case: Case, inputs: Inputs) -> Work:
    """Its potentials are [B, T-1, to, from], so a step builds them first; the gold score is gathered, which is quicker
    than its own one-hot log_prob."""
    library, on = optional("torch_struct"), inputs.mask
    batch, steps, tags = case.shape
    chain = [value.clone().requires_grad_(case.pass_name == TRAIN) for value in inputs[-3:]]
    rows = torch.arange(batch, device=inputs.tags.device)
    last = inputs.lengths - 1

    def distribution() -> Any:
        transitions, start, end = chain
        edges = transitions.t() + inputs.emissions[:, 1:, :, None]  # [B, T-1, to, from]
        ends = torch.zeros(batch, steps - 1, tags, device=edges.device).index_put(
            (rows, last - 1), end.expand(batch, -1)
        )
        first = torch.nn.functional.pad((start + inputs.emissions[:, 0])[:, None], (0, 0, 0, steps - 2))
        return library.LinearChainCRF(edges + ends[..., None] + first[:, :, None], lengths=inputs.lengths)

    def loss() -> Tensor:
        transitions, start, end = chain
        tokens = inputs.emissions.gather(2, inputs.tags[..., None])[..., 0]
        moves = transitions[inputs.tags[:, :-1], inputs.tags[:, 1:]]
        if on is not None:
            tokens, moves = tokens * on, moves * on[:, 1:]
        gold = tokens.sum() + moves.sum() + start[inputs.tags[:, 0]].sum() + end[inputs.tags[rows, last]].sum()
        return gold - distribution().partition.sum()

    if case.pass_name == TRAIN:
        return training(loss, inputs, dict(zip(("dtransitions", "dstart", "dend"), chain, strict=True)))

    def paths() -> list[list[int]]:
        edges = distribution().argmax
        tags = torch.cat([edges[:, :1].sum(2), edges.sum(3)], 1).argmax(2)
        return [path[:length] for path, length in zip(tags.tolist(), inputs.lengths.tolist(), strict=True)]

    def marginals() -> Tensor:
        edges = distribution().marginals
        return torch.cat([edges[:, :1].sum(2), edges.sum(3)], 1)

    if case.pass_name == MARGINALS:
        return Work(marginals, lambda p: {"marginals": p})
    return Work(paths, partial(path_outputs, inputs))


PROVIDERS = {
    OURS: ours,
    "reference": our_reference,
    PEER: pytorch_crf if optional("torchcrf") else None,
    LINEAR: linear_crf_torch if optional("linear_crf") else None,
    STRUCT: torch_struct if optional("torch_struct") else None,
}


def cases(device: str, quick: bool) -> list[Case]:
    modules = (OURS, "reference", PEER, LINEAR)  # those with parameters and a decoder, as a tagger uses them
    everyone = (*modules, STRUCT)
    found = []

    def add(pass_name: str, shape: tuple[int, int, int], providers: tuple[str, ...], **more: Any) -> None:
        found.append(Case(OPS[pass_name], pass_name, shape, providers, **more))

    small, wide = (32, 128, 9), (4, 32, 32) if quick else (32, 128, 32)
    traces = "linear-crf-torch left out: it traces back through the padding, and one path in some hundreds is wrong"
    dense = "torch-struct left out: it keeps several tensors of [B, T, N, N]"
    add(TRAIN, small, everyone)
    add(TRAIN, wide, modules, note=dense)
    if not quick:
        add(TRAIN, (32, 128, 50), modules, note=dense)
        add(TRAIN, (1, 128, 9), everyone)
    for shape in (small, wide):
        add(TRAIN, shape, modules, ragged=True)
    for shape in (small, wide) if quick else (small, wide, (1, 128, 9)):
        add(LISTS, shape, modules)
        add(TENSORS, shape, modules, note="peers return lists")
    for shape in (small, wide):
        add(LISTS, shape, (OURS, "reference", PEER), ragged=True, note=traces)
    add(MARGINALS, small, (OURS, "reference", STRUCT), note="the modules have no marginals")
    if quick:
        return found
    add(MARGINALS, wide, (OURS, "reference"), note=dense)
    # On a CPU the peers take many seconds per step from here on.
    peer = (PEER,) if device == "cuda" else ()
    left_out = "linear-crf-torch, torch-struct" + ("" if peer else ", pytorch-crf") + " left out: too heavy"
    add(TRAIN, (256, 512, 32), (OURS, "reference", *peer), note=left_out)
    add(TENSORS, (256, 512, 32), (OURS, "reference", *peer), note=left_out + "; peers return lists")
    add(TRAIN, (8, 128, 500), (OURS, PEER), note="others left out: seconds and gigabytes per step")
    add(TRAIN, (1, 1024, 16), everyone)
    add(TRAIN, (1, 65536, 16), (OURS,), note="ours alone; 1x1024x16 has peers")
    if device == "cuda":
        add(TRAIN, (256, 512, 32), (OURS,), dtype="bfloat16", note="pytorch-crf is off by hundreds of nats in bfloat16")
        add(TRAIN, (256, 512, 16), (OURS,), note="the scale for 1x65536x16")
        add(TRAIN, (256, 512, 500), (OURS,), note="pytorch-crf would need 131 GB")
    return found


# Truth and floor


def truth(case: Case, inputs: Inputs) -> dict[str, tuple[Tensor, float]]:
    """The reference in float64; gradients of large shapes in closed form, because autograd keeps [B, T, N, N] of it.

    Log-likelihoods may differ by 1e-5 of their size. A float32 recursion over log-probabilities rounds by eps * log Z,
    and the gradients inherit that as a relative error: 4 of those are allowed.
    """
    batch, steps, tags = case.shape
    emissions, *chain = (value.detach().double() for value in (inputs.emissions, *inputs[-3:]))
    if case.pass_name == MARGINALS:
        return {"marginals": (reference.crf_marginals(emissions, *chain, mask=inputs.mask), 1e-4)}
    if case.pass_name != TRAIN:
        return {"path score": (reference.crf_viterbi(emissions, *chain, mask=inputs.mask)[1], 1e-5)}
    if batch * steps * tags**2 < 2**24:
        leaves = [value.requires_grad_() for value in (emissions, *chain)]
        value = reference.crf_log_likelihood(leaves[0], inputs.tags, *leaves[1:], mask=inputs.mask).sum()
        found = (value.detach(), *torch.autograd.grad(value, leaves))
    else:
        on = torch.arange(steps, device=emissions.device) < inputs.lengths[:, None]
        found = closed_form(emissions, inputs.tags, *chain, on)
    eps = torch.finfo(torch.float32).eps
    gradient = min(1e-2, max(2e-5, 4 * eps * found[0].abs().item() / batch))
    rounded = 0.0 if case.dtype == "float32" else torch.finfo(getattr(torch, case.dtype)).eps  # as they come back
    tolerances = (1e-5, gradient + rounded, gradient, gradient, gradient)
    names = ("log_likelihood", "demissions", "dtransitions", "dstart", "dend")
    return {name: pair for name, *pair in zip(names, found, tolerances, strict=True)}


STEP_S = 70e-9  # one dependent step on a GPU: about 130 cycles for exp2, an exchange, multiply-adds and log2


def floor(case: Case, inputs: Inputs, ceilings: Ceilings) -> float:
    """Seconds that the larger of these needs, at the rates measured in the same run:

    bytes: emissions read once; int64 tags read and gradients written (training), marginals or int64 paths written;
    multiply-adds: N^2 per step and pass over the chain; training has 3 passes (forward, backward, transition
      gradients), marginals 2, decoding 1 (an add and a compare);
    on CUDA also the chain: T dependent steps of STEP_S (both halves at once, forward and backward), or 3 sqrt(T) where
      a scan over chunks is worth its N-fold work. STEP_S is counted from instruction latencies, not measured.
    """
    batch, steps, tags = case.shape
    tokens = int(inputs.lengths.sum())
    element = inputs.emissions.element_size()
    passes = {TRAIN: 3, MARGINALS: 2}.get(case.pass_name, 1)
    written = {TRAIN: tags * element + 8, MARGINALS: 4 * tags}.get(case.pass_name, 8)
    bounds = [
        ceilings.copy_s(tokens * (tags * element + written)),
        ceilings.fma_s(passes * (tokens - batch) * tags**2),
    ]
    if ceilings.device == "cuda":
        bounds.append(STEP_S * (steps if steps < 16 * tags * 4 else 3 * math.sqrt(steps)))
    return max(bounds)


# Goals


def ratio(pass_name: str, label: str, peer: str = PEER, threads: int | None = 1) -> Callable[[Results], float]:
    return lambda results: results.ratio(pass_name, label, peer, threads)


def worst_saved(results: Results) -> float:
    """The worst over all cases of ours: bytes saved for backward over bytes of emissions."""
    sizes = {
        o.case: 4.0 * math.prod(o.case.shape) for o in results.outcomes if OURS in o.saved and o.case.dtype == "float32"
    }
    return max((o.saved[OURS] / sizes[o.case] for o in results.outcomes if o.case in sizes), default=math.nan)


def to_floor(results: Results) -> float:
    """The largest distance to the floor of a kernel replayed from a graph, over the shapes of the latency table."""
    found = [results.find(TRAIN, label) for label in ("32x128x9", "32x128x32", "32x128x50", "1x128x9", "256x512x32")]
    return max((statistics.median(o.graph) / o.floor_ms for o in found if o and o.graph), default=math.nan)


def scan_gain(results: Results) -> float:
    """1x65536x16 against 128 times 256x512x16: one warp per sequence takes the same time per step in both."""
    long, short = results.find(TRAIN, "1x65536x16"), results.find(TRAIN, "256x512x16")
    if not (long and short and long.graph and short.graph):
        return math.nan
    return 128 * statistics.median(short.graph) / statistics.median(long.graph)


def large_mib(results: Results) -> float:
    outcome = results.find(TRAIN, "256x512x500")
    return outcome.peak[OURS] / 2**20 if outcome and OURS in outcome.peak else math.nan


def goal_ratios(device: str, wanted: list[tuple[str, str, str, int]], threads: int | None) -> list[Goal]:
    return [
        Goal(f"{pass_name}, {label}, against {peer}", device, ratio(pass_name, label, peer, threads), at_least=times)
        for pass_name, label, peer, times in wanted
    ]


ON_CPU = [
    (TRAIN, "32x128x9", PEER, 80),
    (TRAIN, "32x128x32", PEER, 80),
    (TRAIN, "1x128x9", PEER, 200),
    (LISTS, "32x128x9", PEER, 150),
    (LISTS, "32x128x32", PEER, 90),
    (TRAIN, "32x128x9", LINEAR, 40),
    (TRAIN, "32x128x32", LINEAR, 40),
    (LISTS, "32x128x9", LINEAR, 40),
    (LISTS, "32x128x32", LINEAR, 40),
]
ON_CUDA = [(TRAIN, "32x128x9", PEER, 50), (TRAIN, "256x512x32", PEER, 150), (TENSORS, "256x512x32", PEER, 300)]
SAVED = "saved for backward over emissions, worst shape"
ERROR = "worst |log Z - float64| over what is allowed (1e-6 relative + 1e-4)"
GOALS = [
    *goal_ratios("cpu", ON_CPU, threads=1),
    *goal_ratios("cuda", ON_CUDA, threads=None),
    Goal("graph replay over the latency floor, worst shape", "cuda", to_floor, at_most=2.5),
    Goal("1x65536x16 over one warp per sequence (estimated from 256x512x16)", "cuda", scan_gain, at_least=10),
    Goal("MiB beyond inputs to train 256x512x500", "cuda", large_mib, at_most=2000),
    *(Goal(SAVED, device, worst_saved, at_most=1.1) for device in ("cpu", "cuda")),
    *(Goal(ERROR, device, Results.worst_error, at_most=1.0) for device in ("cpu", "cuda")),
]
