"""Every public function and module method that takes tensors, as programs to be exported with symbolic sizes."""

import dataclasses
from collections.abc import Callable

import torch
from crf_problems import make_mask

import fastnlp_ops
from fastnlp_ops import LinearAttentionState

N, H, D = 4, 3, 4  # tags, heads, channels


@dataclasses.dataclass
class Program:
    """`run(*inputs)`, or `run(layer, *inputs)` of a layer; inputs are drawn for a batch of B texts of T tokens."""

    run: Callable
    inputs: Callable
    layer: Callable | None = None
    packed: bool = False  # sequences in one row, which decompositions have no form for
    random: bool = False
    error: float = 1e-5  # between two orders of float32 sums

    def module(self):
        return Module(self)

    def axes(self):
        """The sizes of the inputs that are symbolic, as torch.export takes them."""
        shapes = [[x.shape for x in self.inputs(*sizes)] for sizes in ((3, 7), (4, 7), (3, 8))]
        B, T = (torch.export.Dim(name, min=1, max=4096) for name in "BT")

        def symbols(own, more, longer):
            found = {}
            for axis, (size, b, t) in enumerate(zip(own, more, longer, strict=True)):
                if (b, t) == (size + 1, size):
                    found[axis] = B if size == 3 else B + (size - 3)
                elif (b, t) == (size, size + 1):
                    found[axis] = T if size == 7 else T - (7 - size)
                elif (b, t) != (size, size):
                    found[axis] = torch.export.Dim("total")
            return found

        return tuple(symbols(*each) for each in zip(*shapes, strict=True))


class Module(torch.nn.Module):
    def __init__(self, program):
        super().__init__()
        self.program = program
        self.layer = program.layer() if program.layer else None

    def forward(self, *inputs):
        found = self.program.run(*([self.layer] if self.layer else []), *inputs)
        return (found,) if isinstance(found, torch.Tensor) else tuple(x for x in flat(found))


def flat(found):
    for x in found:
        if isinstance(x, torch.Tensor):
            yield x
        elif x is not None:
            yield from flat(x)


def mask(B, T):
    return make_mask("holes", B, T)


def first_on(B, T):
    return mask(B, T).index_fill(1, torch.tensor([0]), True)


def chain(B, T):
    """Emissions, transitions, and scores of the ends; a transition is forbidden."""
    transitions = torch.randn(N, N)
    transitions[1, 2] = -torch.inf
    return torch.randn(B, T, N), transitions, torch.randn(N), torch.randn(N)


def own_matrices(B, T):
    return torch.randn(B, T, N), torch.randn(B, max(T - 1, 0), N, N)


def tags(B, T):
    return torch.randint(N, (B, T))


def spans(B, T):
    return torch.randn(B, T, H, D), torch.randn(B, T, H, D), mask(B, T)


def efficient(B, T):
    return torch.randn(B, T, 1, D), torch.randn(B, T, 1, D), torch.randn(B, T, H), torch.randn(B, T, H), mask(B, T)


def labels(B, T):
    found = torch.randint(T, (B, H, 3, 2)).sort(-1).values
    found[:, :, 2] = -100
    return found


def heads(B, T):
    return torch.randn(B, T, 4, D), torch.randn(B, T, 2, D), torch.randn(B, T, 2, 5)


def token(B, T):
    return torch.randn(B, 4, D), torch.randn(B, 2, D), torch.randn(B, 2, 5)


def state(B, feature_map):
    F = D + 1 if feature_map == "cosine+1" else D
    sums = torch.rand(B, 2, F, 5), torch.rand(B, 2, F) + 1
    if feature_map == "cosine+1":
        sums[1][:, :, 0] += 9  # the number of keys: more than their sum is long
    return (*sums, torch.randn(B, 2, D)) if feature_map in ("exp", "softmax") else sums


def hidden(B, T):
    return torch.randn(B, T, 8)


def masked(function, **options):
    return lambda *inputs: function(*inputs[:-1], mask=inputs[-1], **options)


def crf(function, **options):
    return Program(masked(function, **options), lambda B, T: (*chain(B, T), mask(B, T)))


def global_pointer(function, **options):
    return Program(masked(function, **options), spans)


def shared(function, **options):
    def run(q, k, start, end, mask):
        return function(q, k, start_bias=start, end_bias=end, mask=mask, **options)

    return Program(run, efficient)


def span_layer(method, *others, kind="GlobalPointer", **options):
    return Program(
        lambda layer, x, *inputs: getattr(layer, method)(x, *inputs, **options),
        lambda B, T: (hidden(B, T), *(draw(B, T) for draw in others), mask(B, T)),
        lambda: getattr(fastnlp_ops, kind)(8, H, D),
    )


def attention(**options):
    positive = options["feature_map"] == "identity"  # so that no sum is near 0

    def run(q, k, v, on):
        return fastnlp_ops.linear_attention(q, k, v, key_padding_mask=on, return_state=True, **options)

    def inputs(B, T):
        return (*(x.abs() if positive else x for x in heads(B, T)), mask(B, T))

    return Program(run, inputs)


def decayed(q, k, v, log_decay, kv, key_sum):
    before = LinearAttentionState(kv, key_sum)
    options = {"causal": True, "log_decay": log_decay, "initial_state": before, "return_state": True}
    return fastnlp_ops.linear_attention(q, k, v, **options)


def attention_step(feature_map):
    def run(q, k, v, *sums):
        after = LinearAttentionState(*(x.clone() for x in sums))
        return fastnlp_ops.linear_attention_step(q, k, v, after, feature_map=feature_map), after

    def inputs(B, T):
        return (*(x.abs() if feature_map == "identity" else x for x in token(B, T)), *state(B, feature_map))

    return Program(run, inputs)


def layer_step(layer, x, kv, key_sum):
    after = LinearAttentionState(kv.clone(), key_sum.clone())
    return layer.step(x, after), after


def packed(function):
    def run(*inputs):
        return function(*inputs[:-1], cu_seqlens=inputs[-1])

    return Program(run, lambda B, T: (torch.randn(B * T, N), *chain(B, T)[1:], torch.arange(B + 1) * T), packed=True)


BIO = ["O", "B-X", "I-X", "B-Y"]
MAPS = ("identity", "elu+1", "relu", "relu^2", "exp", "softmax", "cosine+1")
decode = fastnlp_ops.global_pointer_decode

PROGRAMS = {
    "log_partition": crf(fastnlp_ops.crf_log_partition),
    "marginals": crf(fastnlp_ops.crf_marginals),
    "viterbi": crf(fastnlp_ops.crf_viterbi),
    "n_best": crf(fastnlp_ops.crf_viterbi, n_best=3),
    # Its documented error for each of 20 steps.
    "entropy": dataclasses.replace(crf(fastnlp_ops.crf_entropy), error=20e-5),
    "sample": dataclasses.replace(crf(fastnlp_ops.crf_sample, num_samples=5), random=True),
    "log_likelihood": Program(
        masked(fastnlp_ops.crf_log_likelihood),
        lambda B, T: (torch.randn(B, T, N), tags(B, T), *chain(B, T)[1:], mask(B, T)),
    ),
    "partial": Program(
        masked(fastnlp_ops.crf_partial_log_likelihood),
        lambda B, T: (torch.randn(B, T, N), torch.rand(B, T, N) < 0.7, *chain(B, T)[1:], mask(B, T)),
    ),
    "own_matrices": Program(fastnlp_ops.crf_viterbi, own_matrices),
    "own_matrices_marginals": Program(fastnlp_ops.crf_marginals, own_matrices),
    "own_matrices_n_best": Program(lambda *x: fastnlp_ops.crf_viterbi(*x, n_best=2), own_matrices),
    "packed_log_partition": packed(fastnlp_ops.crf_log_partition),
    "packed_viterbi": packed(fastnlp_ops.crf_viterbi),
    "CRF": Program(
        lambda layer, *inputs: (layer(*inputs), layer.viterbi(inputs[0], inputs[2]), layer.marginals(inputs[0])),
        lambda B, T: (torch.randn(B, T, N), tags(B, T) % 2, first_on(B, T)),
        lambda: fastnlp_ops.CRF(N, batch_first=True, labels=BIO, scheme="BIO"),
    ),
    "memm": Program(
        masked(fastnlp_ops.memm_log_likelihood),
        lambda B, T: (torch.randn(B, T, N), tags(B, T), torch.randn(N, N), mask(B, T)),
    ),
    "memm_viterbi": Program(
        masked(fastnlp_ops.memm_viterbi), lambda B, T: (torch.randn(B, T, N), torch.randn(N, N), mask(B, T))
    ),
    "MEMM": Program(
        lambda layer, *inputs: (layer(*inputs), layer.viterbi(inputs[0], inputs[2], 2)),
        lambda B, T: (torch.randn(B, T, N), tags(B, T), mask(B, T)),
        lambda: fastnlp_ops.MEMM(N, hidden_dim=2, batch_first=True),
    ),
    "scores": global_pointer(fastnlp_ops.global_pointer_scores),
    "scores_of_pairs": global_pointer(fastnlp_ops.global_pointer_scores, rope=False, tril_mask=False, scale=0.3),
    "scores_shared": shared(fastnlp_ops.global_pointer_scores, max_span_length=3),
    "positions": Program(
        lambda q, k, on, position_ids: fastnlp_ops.global_pointer_scores(q, k, mask=on, position_ids=position_ids),
        lambda B, T: (*spans(B, T), torch.randint(50, (B, T))),
    ),
    "divergence": Program(masked(fastnlp_ops.global_pointer_divergence), lambda B, T: (*spans(B, T)[:2], *spans(B, T))),
    "decode": global_pointer(decode),
    "decode_shared": shared(decode, threshold=0.4, max_span_length=3),
    "decode_flat": global_pointer(decode, nested=False, tril_mask=False),
    "decode_top_k": shared(decode, top_k=2),
    "decode_max_spans": global_pointer(decode, max_spans=4, nested=False),
    "GlobalPointer": span_layer("forward"),
    "GlobalPointer.loss": span_layer("loss", labels, mask_zero=True),
    "GlobalPointer.decode": span_layer("decode", max_spans=3),
    "EfficientGlobalPointer.loss": span_layer("loss", labels, kind="EfficientGlobalPointer"),
    "EfficientGlobalPointer.decode": span_layer("decode", kind="EfficientGlobalPointer"),
    "multilabel": Program(
        fastnlp_ops.multilabel_categorical_crossentropy, lambda B, T: (torch.randn(B, T), torch.rand(B, T) < 0.3)
    ),
    "sparse_multilabel": Program(
        fastnlp_ops.sparse_multilabel_categorical_crossentropy,
        lambda B, T: (torch.randn(B, T), torch.tensor([0, -100, -1, 0]).expand(B, 4)),
    ),
    **{f"attention_{name}": attention(feature_map=name) for name in MAPS},
    **{f"causal_{name}": attention(feature_map=name, causal=True) for name in MAPS},
    "attention_not_normalized": attention(feature_map="relu", normalize=False, scale=0.5),
    "causal_decayed": Program(decayed, lambda B, T: (*heads(B, T), -torch.rand(B, T, 2), *state(B, "elu+1"))),
    **{f"step_{name}": attention_step(name) for name in MAPS},
    "LinearAttention": Program(
        lambda layer, x, padding: layer(x, x, x, key_padding_mask=padding)[0],
        lambda B, T: (hidden(B, T), ~mask(B, T)),
        lambda: fastnlp_ops.LinearAttention(8, 2, batch_first=True),
    ),
    "LinearAttention.prefill": Program(
        lambda layer, x: layer.prefill(x), lambda B, T: (hidden(B, T),), lambda: fastnlp_ops.LinearAttention(8, 2)
    ),
    "LinearAttention.step": Program(
        layer_step,
        lambda B, _: (torch.randn(B, 8), torch.rand(B, 2, 4, 4), torch.rand(B, 2, 4) + 1),
        lambda: fastnlp_ops.LinearAttention(8, 2),
    ),
}
