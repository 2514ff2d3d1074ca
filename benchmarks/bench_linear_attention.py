"""Linear attention with elu+1 and its normaliser, against what people use for it, and against softmax attention.

All providers get the same leaves q, k, v [B, T, H, D] as projections leave them, before any feature map, and a gradient
of the output; some then transpose to [B, H, T, D], which is theirs to pay. "chunked" is causal attention as it is
written by hand with bmm, "einsum" the bidirectional form of Katharopoulos et al.; "torch.compile" compiles the same
two. fla's "kernel alone" takes q and k as if they were mapped and divides nothing: a bound, not the same work, and so
is scaled_dot_product_attention, which is another attention. Each is checked against float64 of its own formula.

Decoding is one step from the state of some hundred tokens, B sequences at a time.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import fastnlp_ops
from benchmarks.harness import OURS, Case, Goal, Results, Work, optional
from benchmarks.measure import Ceilings
from benchmarks.proof_linear_attention import (
    BOTH,
    BOTH_TRAIN,
    CAUSAL,
    CAUSAL_TRAIN,
    DECODE,
    EPS,
    ROWS,
    Inputs,
    accuracy,
    chunked,
    decoded,
    einsum,
    elu_plus_one,
    exercise,
    relative,
    softmax_rows,
)
from benchmarks.proof_linear_attention import truth as exact_results
from fastnlp_ops import reference

__all__ = ["GOALS", "PROVIDERS", "accuracy", "cases", "exercise", "floor", "make_inputs", "truth"]

CHUNKED, EINSUM, COMPILED, SOFTMAX = "chunked bmm", "einsum", "torch.compile", "scaled_dot_product_attention"
FAST, FLA, BARE, EAGER = "fast-transformers", "fla", "fla, kernel alone", "eager step"
EXPONENTIAL = 10  # multiply-adds of an exponential that is right to 1 ulp: 6 of a polynomial, 3 to reduce, 1 to scale

fast_transformers = optional("fast_transformers")
has_fla = optional("fla") is not None and torch.cuda.is_available()


def make_inputs(shape: tuple[int, int, int, int], dtype: str, device: str, ragged: bool = False) -> Inputs:
    return Inputs(shape, dtype, device, ragged)


# Providers


def attention_work(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], case: Case, inputs: Inputs, bare: bool = False
) -> Work:
    """The output, and the gradients of the leaves where the pass has them, as distances from float64."""

    def distances(found: dict[str, Tensor]) -> dict[str, Tensor]:
        exact = exact_results(inputs, case.pass_name, bare)
        return {name: relative(tensor, exact[name]) for name, tensor in found.items()}

    if case.pass_name in (CAUSAL, BOTH):
        run = torch.no_grad()(partial(function, *inputs.leaves))
        return Work(run, lambda out: distances({"out": out}), (), graph=True)

    def train() -> Tensor:
        for leaf in inputs.leaves:
            leaf.grad = None
        out = function(*inputs.leaves)
        out.backward(inputs.dout)
        return out

    def outputs(out: Tensor) -> dict[str, Tensor]:
        gradients = {f"d{name}": leaf.grad for name, leaf in zip("qkv", inputs.leaves, strict=True)}
        return distances({"out": out, **gradients})

    mask = () if inputs.mask is None else (inputs.mask,)
    return Work(train, outputs, [*inputs.leaves, inputs.dout, *mask], graph=True)


def is_causal(case: Case) -> bool:
    return case.pass_name in (CAUSAL, CAUSAL_TRAIN)


def step_work(step: Callable[..., Tensor], inputs: Inputs) -> Work:
    state = inputs.state()
    q, k, v = (x.detach()[:, 0] for x in inputs.leaves)
    run = torch.no_grad()(partial(step, q, k, v, state))
    return Work(run, lambda out: {"out": relative(out, decoded(inputs))}, (), graph=True)


def provider(functions: ModuleType) -> Callable[[Case, Inputs], Work]:
    """Ours and our reference, which share names."""

    def make(case: Case, inputs: Inputs) -> Work:
        if case.pass_name == DECODE:
            return step_work(functions.linear_attention_step, inputs)
        options = {"causal": is_causal(case), "key_padding_mask": inputs.mask, "eps": EPS}
        return attention_work(partial(functions.linear_attention, **options), case, inputs)

    return make


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    return (chunked if causal else einsum)(elu_plus_one(q), elu_plus_one(k), v, mask)


def by_hand(case: Case, inputs: Inputs) -> Work:
    return attention_work(partial(plain, mask=inputs.mask, causal=is_causal(case)), case, inputs)


def compiled(case: Case, inputs: Inputs) -> Work:
    torch._dynamo.reset()
    function = torch.compile(plain, fullgraph=True, dynamic=False)
    return attention_work(partial(function, mask=inputs.mask, causal=is_causal(case)), case, inputs)


def softmax(case: Case, inputs: Inputs) -> Work:
    """Another attention: only its first rows are computed in float64, and nothing of its gradients."""
    causal = is_causal(case)
    mask = None if inputs.mask is None else inputs.mask[:, None, None]
    if causal and mask is not None:
        mask, causal = mask & torch.ones(2 * [inputs.shape[1]], dtype=torch.bool, device=mask.device).tril(), False

    def run() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in inputs.leaves)
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)

    def outputs(out: Tensor) -> dict[str, Tensor]:
        return {"out": relative(out[:, :ROWS], softmax_rows(inputs, is_causal(case)))}

    return Work(torch.no_grad()(run), outputs, (), graph=True)


def fast(case: Case, inputs: Inputs) -> Work:
    """The attention modules of fast-transformers, whose causal product is a kernel of C++ or CUDA."""
    from fast_transformers import attention, masking

    B, T, _, D = inputs.shape
    form = attention.CausalLinearAttention if is_causal(case) else attention.LinearAttention
    module = form(D, eps=EPS)
    square = masking.TriangularCausalMask(T) if is_causal(case) else masking.FullMask(T, T)
    lengths = torch.full((B,), T) if inputs.mask is None else inputs.mask.sum(1)
    every, some = masking.LengthMask(torch.full((B,), T), T), masking.LengthMask(lengths, T)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return module(q, k, v, square, every, some)

    return attention_work(run, case, inputs)


def fla(case: Case, inputs: Inputs, bare: bool = False) -> Work:
    from fla.ops.linear_attn import chunk_linear_attn, fused_recurrent_linear_attn

    if case.pass_name == DECODE:

        def step(q: Tensor, k: Tensor, v: Tensor, state: Any) -> Tensor:
            q, k, v = (x[:, None] for x in (elu_plus_one(q), elu_plus_one(k), v))
            initial = (state.kv, state.key_sum[:, None])
            return fused_recurrent_linear_attn(
                q, k, v, scale=1.0, initial_state=initial, output_final_state=True, normalize=True
            )[0][:, 0]

        return step_work(step, inputs)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not bare:
            q, k = elu_plus_one(q), elu_plus_one(k)
        return chunk_linear_attn(q, k, v, scale=1.0, normalize=not bare)[0]

    return attention_work(run, case, inputs, bare)


def eager_step(_: Case, inputs: Inputs) -> Work:
    def step(q: Tensor, k: Tensor, v: Tensor, state: Any) -> Tensor:
        q, k = elu_plus_one(q).float(), elu_plus_one(k).float()
        state.kv.addcmul_(k[..., None], v[:, :, None].float())
        state.key_sum.add_(k)
        z = (q * state.key_sum).sum(-1, keepdim=True)
        return ((q[:, :, None] @ state.kv)[:, :, 0] / z).to(v.dtype)

    return step_work(step, inputs)


PROVIDERS = {
    OURS: provider(fastnlp_ops),
    "reference": provider(reference),
    CHUNKED: by_hand,
    EINSUM: by_hand,
    COMPILED: compiled,
    SOFTMAX: softmax,
    FAST: fast if fast_transformers else None,
    FLA: fla if has_fla else None,
    BARE: partial(fla, bare=True) if has_fla else None,
    EAGER: eager_step,
}


def cases(device: str, quick: bool) -> list[Case]:
    cuda = device == "cuda"
    found = []

    def add(pass_name: str, shape: tuple[int, int, int, int], providers: tuple[str, ...], **more: Any) -> None:
        op = "linear_attention_step" if pass_name == DECODE else "linear_attention"
        found.append(Case(op, pass_name, shape, (OURS, *providers), dtype="bfloat16" if cuda else "float32", **more))

    peers = (FLA, BARE) if cuda else (FAST,)
    if quick:
        add(CAUSAL, (2, 128, 2, 16), ("reference", CHUNKED, SOFTMAX, *peers))
        add(CAUSAL_TRAIN, (2, 128, 2, 16), ("reference", CHUNKED, *peers))
        add(BOTH, (2, 128, 2, 16), ("reference", EINSUM, SOFTMAX), ragged=True)
        add(BOTH_TRAIN, (2, 128, 2, 16), ("reference", EINSUM), ragged=True)
        add(DECODE, (2, 1, 2, 16), ("reference", EAGER))
        return found
    quadratic = "the reference is quadratic here"
    short = (2, 1024, 8, 64)
    for pass_name, more in ((CAUSAL, (SOFTMAX,)), (CAUSAL_TRAIN, ())):
        add(pass_name, short, ("reference", CHUNKED, COMPILED, *peers, *more))
        for shape in ((8, 128, 12, 64), (4, 512, 12, 64), (2, 1024, 8, 128), (1, 4096, 8, 64)):
            add(pass_name, shape, (CHUNKED, *peers, *more), note=quadratic)
    for T in (16384, 65536):
        add(CAUSAL, (1, T, 8, 64), (CHUNKED, *peers), note="softmax attention takes minutes")
    for pass_name, more in ((BOTH, (SOFTMAX,)), (BOTH_TRAIN, ())):
        add(pass_name, short, ("reference", EINSUM, COMPILED, *(() if cuda else (FAST,)), *more))
        for shape in ((8, 128, 12, 64), (4, 512, 12, 64), (1, 4096, 8, 64)):
            add(pass_name, shape, ("reference", EINSUM, *more))
        add(pass_name, (8, 512, 12, 64), ("reference", EINSUM, *more), ragged=True)
    add(BOTH, (1, 65536, 8, 64), ("reference", EINSUM))
    for batch in (1, 64):
        add(DECODE, (batch, 1, 16, 128), ("reference", EAGER, *((FLA,) if cuda else ())))
    if cuda:
        for pass_name in (CAUSAL, CAUSAL_TRAIN):
            add(pass_name, (4, 4096, 64, 128), (CHUNKED, *peers), note=quadratic)
            add(pass_name, (1, 65536, 8, 128), peers, note=quadratic)
        for pass_name in (BOTH, BOTH_TRAIN):
            add(pass_name, (8, 4096, 16, 64), ("reference", EINSUM), ragged=True)
    return found


# Truth and floor


def truth(case: Case, inputs: Inputs) -> dict[str, tuple[Tensor, float]]:
    """Providers are judged by their distance from float64 of what each computes, relative to the largest number.

    fla and code by hand round features, and some of them sums, to the dtype of the inputs.
    """
    slack = 2e-5 if case.dtype == "float32" else 4 * torch.finfo(inputs.dtype).eps
    names = ("out", "dq", "dk", "dv") if case.pass_name in (CAUSAL_TRAIN, BOTH_TRAIN) else ("out",)
    return {name: (torch.zeros(1, dtype=torch.float64, device=inputs.device), slack) for name in names}


def floor(case: Case, inputs: Inputs, ceilings: Ceilings) -> float:
    """Seconds that the larger of these needs, at the rates measured in the same run:

    bytes: q, k, v read and the output written; training reads them, the output and its gradient again and writes three
      gradients. Decoding: the state read and written;
    arithmetic, for each token and head: D^2 multiply-adds to enter the state and D^2 to read it (training: four more,
      two on either side), and the exponentials of q and k, EXPONENTIAL multiply-adds each (training: twice).
    """
    B, T, H, D = inputs.shape
    if case.pass_name == DECODE:
        return max(ceilings.copy_s(2 * 4 * B * H * D * (D + 1)), ceilings.fma_s(2 * B * H * D * D))
    train = case.pass_name in (CAUSAL_TRAIN, BOTH_TRAIN)
    queries, keys = B * T * H, inputs.keys * H
    size = inputs.q.element_size() * D
    nbytes = size * (2 * queries + 2 * keys + (3 * queries + 2 * keys + queries + 2 * keys if train else 0))
    products = (queries + keys) * D * D * (3 if train else 1)
    exponentials = (queries + keys) * D * (2 if train else 1)
    arithmetic = ceilings.fma_s(products, case.dtype) + ceilings.fma_s(EXPONENTIAL * exponentials)
    return max(ceilings.copy_s(nbytes), arithmetic)


# Goals


def milliseconds(pass_name: str, label: str) -> Callable[[Results], float]:
    def measure(results: Results) -> float:
        outcome = results.find(pass_name, label)
        return outcome.median(OURS) if outcome and OURS in outcome.rounds else float("nan")

    return measure


def memory(pass_name: str, label: str, peer: str) -> Callable[[Results], float]:
    def measure(results: Results) -> float:
        outcome = results.find(pass_name, label)
        return (
            outcome.peak[OURS] / outcome.peak[peer] if outcome and {OURS, peer} <= outcome.peak.keys() else float("nan")
        )

    return measure


def ratios(device: str, threads: int | None, wanted: list[tuple[str, str, str, float]]) -> list[Goal]:
    return [
        Goal(
            f"{pass_name}, {label}, against {who}",
            device,
            lambda results, key=(pass_name, label, who): results.ratio(*key, threads),
            at_least=times,
        )
        for pass_name, label, who, times in wanted
    ]


MAIN, LONG, CUDA_MAIN, CUDA_LONG = "2x1024x8x64", "1x4096x8x64", "4x4096x64x128", "1x65536x8x128"
GOALS = [
    *ratios(
        "cpu",
        2,
        [
            (CAUSAL, MAIN, FAST, 8),
            (CAUSAL, MAIN, CHUNKED, 4),
            (CAUSAL, MAIN, COMPILED, 2),
            (CAUSAL_TRAIN, MAIN, CHUNKED, 3),
            (BOTH, MAIN, EINSUM, 3),
            (BOTH_TRAIN, MAIN, EINSUM, 3),
            (BOTH, LONG, SOFTMAX, 30),
        ],
    ),
    Goal(f"ms of {CAUSAL}, {CUDA_MAIN}", "cuda", milliseconds(CAUSAL, CUDA_MAIN), at_most=0.38),
    Goal(f"ms of {CAUSAL_TRAIN}, {CUDA_MAIN}", "cuda", milliseconds(CAUSAL_TRAIN, CUDA_MAIN), at_most=1.5),
    Goal(f"peak memory of {CAUSAL_TRAIN} over fla's", "cuda", memory(CAUSAL_TRAIN, CUDA_MAIN, FLA), at_most=0.5),
    *ratios(
        "cuda",
        None,
        [
            (CAUSAL, CUDA_MAIN, FLA, 4),
            (CAUSAL, CUDA_MAIN, BARE, 1.5),
            (CAUSAL_TRAIN, CUDA_MAIN, BARE, 1.8),
            (CAUSAL, CUDA_LONG, FLA, 2),
        ],
    ),
    *(Goal("worst error over what is allowed", device, Results.worst_error, at_most=1.0) for device in ("cpu", "cuda")),
]
