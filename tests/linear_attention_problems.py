"""Random linear attention problems in every layout, and what is checked of each."""

import dataclasses
import itertools
import math

import torch
from crf_problems import make_mask
from tools import assert_same, assert_within_budget, rounding_level, sum_of

import fastnlp_ops
from fastnlp_ops import reference
from fastnlp_ops._linear_attention_inputs import kernel_inputs
from fastnlp_ops.linear_attention_state import LinearAttentionState
from fastnlp_ops.reference.linear_attention import EXPONENTIAL, FEATURE_MAPS, absorb, empty_state, features

LAYOUTS = {
    "aligned": {"B": 2, "T": 128, "H": 2, "Dk": 64, "Dv": 64, "causal": True},
    "aligned_both": {"B": 2, "T": 128, "H": 2, "Dk": 64, "Dv": 64},
    "odd": {"B": 2, "T": 67, "H": 3, "Dk": 13, "Dv": 7, "causal": True},
    "odd_both": {"B": 2, "T": 67, "H": 3, "Dk": 13, "Dv": 7},
    "prefix": {"B": 4, "T": 33, "H": 2, "Dk": 8, "Dv": 12, "causal": True, "mask": "prefix"},
    "left": {"B": 3, "T": 65, "H": 2, "Dk": 8, "Dv": 5, "causal": True, "mask": "left"},
    "holes": {"B": 3, "T": 70, "H": 2, "Dk": 6, "Dv": 9, "causal": True, "mask": "holes"},
    "holes_both": {"B": 4, "T": 71, "H": 2, "Dk": 17, "Dv": 16, "mask": "holes"},
    "cross": {"B": 3, "T": 19, "keys": 45, "H": 4, "Dk": 16, "Dv": 24, "mask": "prefix"},
    "cross_few": {"B": 2, "T": 70, "keys": 3, "H": 2, "Dk": 24, "Dv": 8},
    "grouped": {"B": 2, "T": 40, "H": 6, "groups": 2, "Dk": 8, "Dv": 10, "causal": True, "mask": "left"},
    "grouped_both": {"B": 2, "T": 30, "H": 8, "groups": 1, "Dk": 8, "Dv": 8, "mask": "holes"},
    "sums": {"B": 2, "T": 66, "H": 2, "Dk": 16, "Dv": 8, "causal": True, "normalize": False},
    "sums_both": {"B": 2, "T": 66, "H": 2, "Dk": 16, "Dv": 8, "normalize": False, "scale": -0.3, "mask": "holes"},
    "packed": {"lengths": [5, 0, 70, 1, 64], "H": 2, "Dk": 9, "Dv": 8, "causal": True},
    "packed_both": {"lengths": [0, 33, 2, 0], "H": 4, "groups": 2, "Dk": 8, "Dv": 8},
    "packed_cross": {"lengths": [3, 0, 40, 9], "key_lengths": [50, 7, 0, 1], "H": 2, "Dk": 8, "Dv": 20},
    "packed_state": {"lengths": [4, 0, 37], "H": 4, "groups": 2, "Dk": 8, "Dv": 8, "causal": True, "state": True},
    "decay": {"B": 2, "T": 130, "H": 4, "groups": 2, "Dk": 16, "Dv": 8, "causal": True, "decay": "head"},
    "gate": {"B": 3, "T": 70, "H": 2, "Dk": 8, "Dv": 8, "causal": True, "decay": "token", "mask": "holes"},
    "gate_state": {"B": 2, "T": 50, "H": 3, "Dk": 8, "Dv": 4, "causal": True, "decay": "token", "state": True},
    "gate_sums": {"B": 2, "T": 40, "H": 2, "Dk": 8, "Dv": 8, "causal": True, "decay": "token", "normalize": False},
    "gate_packed": {"lengths": [9, 0, 66], "H": 2, "Dk": 8, "Dv": 8, "causal": True, "decay": "token", "state": True},
    "state": {"B": 3, "T": 45, "H": 2, "Dk": 12, "Dv": 8, "causal": True, "state": True, "mask": "holes"},
    "state_both": {"B": 3, "T": 45, "keys": 20, "H": 4, "groups": 2, "Dk": 8, "Dv": 8, "state": True},
    "state_sums": {"B": 2, "T": 30, "H": 2, "Dk": 8, "Dv": 8, "causal": True, "state": True, "normalize": False},
    "one": {"B": 1, "T": 1, "H": 1, "Dk": 1, "Dv": 1, "causal": True},
    "one_channel": {"B": 2, "T": 37, "H": 3, "Dk": 1, "Dv": 3, "causal": True},
    "one_value": {"B": 2, "T": 37, "H": 3, "Dk": 5, "Dv": 1},
    "wide": {"B": 1, "T": 34, "H": 2, "Dk": 256, "Dv": 128, "causal": True},
    "wide_both": {"B": 1, "T": 34, "H": 2, "Dk": 128, "Dv": 256, "mask": "left"},
    "no_sequence": {"B": 0, "T": 6, "H": 3, "Dk": 4, "Dv": 5, "causal": True, "state": True},
    "no_token": {"B": 2, "T": 0, "H": 3, "Dk": 4, "Dv": 5, "causal": True, "state": True},
    "no_key": {"B": 2, "T": 7, "keys": 0, "H": 2, "Dk": 4, "Dv": 5},
    "no_query": {"B": 2, "T": 0, "keys": 9, "H": 2, "Dk": 4, "Dv": 5},
    "no_packed": {"lengths": [], "H": 2, "Dk": 4, "Dv": 5, "causal": True},
    "peaked": {"B": 2, "T": 68, "H": 2, "Dk": 16, "Dv": 8, "causal": True, "std": 4.0},
    "many_heads": {"B": 3, "T": 9, "H": 40, "groups": 20, "Dk": 8, "Dv": 8, "causal": True},
    "long": {"B": 1, "T": 301, "H": 2, "Dk": 20, "Dv": 12, "causal": True, "mask": "holes"},
    "long_both": {"B": 1, "T": 1030, "H": 2, "Dk": 20, "Dv": 12},
}
# Some layouts go with every map. Causal, "softmax" is "exp", but for what the public function makes of it.
THOROUGH = ["odd", "odd_both", "holes", "holes_both", "sums", "sums_both", "packed_state", "gate_state", "state"]


def maps_of(layout):
    options = LAYOUTS[layout]
    usual = ("elu+1", "relu^2", "exp", "cosine+1") if options.get("causal") else ("elu+1", "exp", "softmax", "cosine+1")
    names = FEATURE_MAPS if layout in THOROUGH else usual
    return [name for name in names if not ("decay" in options and name in EXPONENTIAL)]


CASES = {
    f"{layout}-{name}": {"feature_map": name, **options}
    for layout, options in LAYOUTS.items()
    for name in maps_of(layout)
}


def cases(layouts, names=FEATURE_MAPS):
    """Those of the layouts with these maps that there are."""
    return [f"{layout}-{name}" for layout in layouts for name in names if f"{layout}-{name}" in CASES]


INPUTS = ["q", "k", "v", "log_decay", "initial kv", "initial key_sum"]
OUTPUTS = ["out", "kv", "key_sum"]


@dataclasses.dataclass
class Problem:
    """Arguments of one call."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    log_decay: torch.Tensor | None = None
    kv: torch.Tensor | None = None  # the initial state
    key_sum: torch.Tensor | None = None
    key_max: torch.Tensor | None = None
    key_padding_mask: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    feature_map: str | None = "elu+1"
    causal: bool = False
    normalize: bool = True
    scale: float | None = None
    eps: float = 1e-6

    @property
    def inputs(self):
        """What is differentiable, None where it is not there: INPUTS."""
        return self.q, self.k, self.v, self.log_decay, self.kv, self.key_sum

    @property
    def state(self):
        return None if self.kv is None else LinearAttentionState(self.kv, self.key_sum, self.key_max)

    @property
    def options(self):
        """Everything behind q, k and v."""
        names = ("feature_map", "causal", "normalize", "scale", "eps", "key_padding_mask", "log_decay")
        options = {name: getattr(self, name) for name in (*names, "cu_seqlens_q", "cu_seqlens_k")}
        return options | {"initial_state": self.state}

    @property
    def kernel_map(self):
        """The map that the kernel computes."""
        return "exp" if self.causal and self.feature_map == "softmax" else self.feature_map or "identity"

    def with_inputs(self, *inputs):
        names = ("q", "k", "v", "log_decay", "kv", "key_sum")
        return dataclasses.replace(self, **dict(zip(names, inputs, strict=True)))

    def to(self, dtype):
        """The same values in another dtype, the state in its compute type."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        types = [dtype, dtype, dtype, wide, wide, wide]
        pairs = zip(self.inputs, types, strict=True)
        copy = self.with_inputs(*(None if x is None else x.detach().to(t) for x, t in pairs))
        return dataclasses.replace(copy, key_max=None if self.key_max is None else self.key_max.to(wide))

    def leaves(self, dtype=None):
        """A copy whose inputs ask for gradients, and those inputs."""
        copy = self if dtype is None else self.to(dtype)
        copy = copy.with_inputs(*(None if x is None else x.detach().clone() for x in copy.inputs))
        leaves = [x.requires_grad_() for x in copy.inputs if x is not None]
        return copy, leaves


def offsets(lengths, device):
    return torch.tensor([0, *lengths]).cumsum(0).to(device)


def make_problem(
    B=1,
    T=0,
    H=1,
    Dk=1,
    Dv=1,
    device="cpu",
    dtype=torch.float32,
    *,
    keys=None,
    groups=None,
    lengths=None,
    key_lengths=None,
    mask=None,
    decay=None,
    state=False,
    std=1.0,
    poison=True,
    feature_map="elu+1",
    **options,
):
    """Random tensors; `lengths`: packed sequences; `groups`: heads of the keys. What masked keys hold is NaN."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    groups = H if groups is None else groups
    if lengths is not None:
        B, T, keys = 1, sum(lengths), sum(lengths if key_lengths is None else key_lengths)
    keys = T if keys is None else keys

    def draw(*shape):
        x = std * torch.randn(shape, dtype=torch.float64)
        if feature_map in ("identity", None):
            x = x.abs()
        elif feature_map not in ("elu+1", "exp", "softmax"):
            x[..., 0] = x[..., 0].abs() + 0.5
        # Similarities near zero make quotients as inexact as their sum is: such have tests of their own.
        return x.abs() if feature_map == "cosine+1" and Dk < 16 else x

    q, k, v = draw(B, T, H, Dk), draw(B, keys, groups, Dk), torch.randn(B, keys, groups, Dv, dtype=torch.float64)
    log_decay = None
    if decay == "head":
        log_decay = -torch.rand(groups, dtype=torch.float64)
    elif decay == "token":  # mostly small, some that forget nearly everything
        log_decay = -5 * torch.rand(B, keys, groups, dtype=torch.float64) ** 8
    on = None if mask is None else make_mask(mask, B, keys)
    if on is not None and poison:
        k[~on] = v[~on] = math.nan
        if decay == "token":
            log_decay[~on] = math.nan
    problem = Problem(q, k, v, log_decay, key_padding_mask=on, feature_map=feature_map, **options)
    if state:
        problem.kv, problem.key_sum, problem.key_max = make_state(problem, lengths, draw)
    problem = problem.to(dtype)
    if lengths is not None:
        problem.cu_seqlens_q = offsets(lengths, device)
        problem.cu_seqlens_k = None if key_lengths is None else offsets(key_lengths, device)
    for name in ("q", "k", "v", "log_decay", "kv", "key_sum", "key_max", "key_padding_mask"):
        if (x := getattr(problem, name)) is not None:
            setattr(problem, name, x.to(device))
    assert problem.kv is None or problem.kv.dtype == wide
    return problem


def small_problem(case, device):
    """For finite differences: no NaN, and sums of similarities that are far from zero."""
    limits = {"B": 2, "T": 4, "H": 2, "groups": 1, "Dk": 3, "Dv": 2, "keys": 3}
    options = {**CASES[case], "poison": False, "lengths": [2, 0, 3], "key_lengths": [1, 2, 0]}
    options |= {name: limit for name, limit in limits.items() if name in CASES[case]}
    for name in ("lengths", "key_lengths"):
        if name not in CASES[case]:
            del options[name]
    problem = make_problem(device=device, dtype=torch.float64, **options)
    if problem.kv is not None:
        problem.kv.add_(0.3)
        problem.key_sum.add_(0.3)
    if problem.key_max is not None:
        problem.key_max.clamp_(min=-1)
    return problem


def make_state(problem, lengths, draw):
    """The state behind a few keys; the first sequence has seen none."""
    sequences = len(problem.q) if lengths is None else len(lengths)
    groups, Dk = problem.k.shape[2:]
    before = empty_state(sequences, problem.k, problem.v, problem.kernel_map)
    k, v = draw(sequences, groups, 5, Dk), torch.randn(sequences, groups, 5, problem.v.shape[3], dtype=torch.float64)
    mask = torch.ones(sequences, 5, dtype=torch.bool)
    mask[:1] = False
    return absorb(before, k, v, mask, None, problem.kernel_map)


def attention(module, problem):
    """out, kv, key_sum and key_max."""
    out, state = module.linear_attention(problem.q, problem.k, problem.v, **problem.options, return_state=True)
    return out, *state


def recurrence(problem):
    """The same from the recurrent form of the reference; causal."""
    options = problem.options
    del options["causal"]
    q, k, v = problem.q, problem.k, problem.v
    out, state = reference.linear_attention_recurrent(q, k, v, **options, return_state=True)
    return out, *state


def ours(problem):
    return attention(fastnlp_ops, problem)


def plain(problem):
    return attention(reference, problem)


def gradients(call, problem, weights, dtype=None):
    """Gradients of all inputs for the upstream gradients `weights` of out, kv and key_sum, None where there is none."""
    problem, leaves = problem.leaves(dtype)
    pairs = zip(call(problem), weights, strict=False)
    # A token at a time, nothing may be computed of nothing: the sum is of something.
    total = sum(((y * w.to(y.dtype)).sum().double() for y, w in pairs if w is not None), leaves[0].sum().double() * 0)
    return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)


def upstream(problem):
    """Random upstream gradients of out, kv and key_sum; none for a channel of which no key was seen."""
    with torch.no_grad():
        *sums, key_max = plain(problem.to(torch.float64))
    weights = [torch.randn_like(x) for x in sums]
    if key_max is not None:
        for w in weights[1:]:
            w[key_max == -math.inf] = 0
    return weights


def check_forward(problem, floor=0.0):
    """`floor`: of the rounding level."""
    found = ours(problem)
    narrow, exact = plain(problem.to(torch.float32)), plain(problem.to(torch.float64))
    wide = torch.float64 if problem.q.dtype == torch.float64 else torch.float32
    assert found[0].dtype == problem.q.dtype and found[0].is_contiguous()
    assert found[1].dtype == found[2].dtype == wide
    level = max(floor, *(rounding_level(*pair) for pair in zip(narrow[:3], exact[:3], strict=True)))
    for name, *results in zip(OUTPUTS, found, narrow, exact, strict=False):
        assert_within_budget(*results, name, level)
    if problem.kernel_map in EXPONENTIAL:
        assert_same(found[3], (exact if wide == torch.float64 else narrow)[3], "key_max")
    else:
        assert found[3] is None


def decay_gradient(problem, weights, dtype):
    """dlog_decay as its formula takes it, a sum over all later tokens of phi(q).dphi(q) - phi(k).dphi(k)."""
    problem = problem.to(dtype)
    on = torch.ones_like(problem.k[..., 0]) if problem.key_padding_mask is None else problem.key_padding_mask[..., None]
    q, k = features(problem.q, problem.kernel_map), features(problem.k, problem.kernel_map)
    scale = problem.q.shape[3] ** -0.5 if problem.scale is None else problem.scale
    mapped = dataclasses.replace(problem, q=q, k=k, feature_map=None, scale=scale)
    with torch.no_grad():
        ends = plain(mapped)[1:3]
    dq, dk = gradients(plain, mapped, weights)[:2]
    terms = (q * dq).sum(-1).unflatten(2, (k.shape[2], -1)).sum(-1) - torch.where(on != 0, (k * dk).sum(-1), 0)
    pairs = [(w * x).flatten(2).sum(2) for w, x in zip(weights[1:], ends, strict=True) if w is not None]  # [N, Hkv]
    total = torch.zeros_like(terms)
    bounds = [(b, 0, k.shape[1]) for b in range(len(k))]
    if problem.cu_seqlens_q is not None:
        cu_seqlens = problem.cu_seqlens_q.tolist()
        bounds = [(0, *pair) for pair in itertools.pairwise(cu_seqlens)]
    for n, (b, first, last) in enumerate(bounds):
        total[b, first:last] = terms[b, first:last].double().flip(0).cumsum(0).flip(0).to(dtype)
        total[b, first:last] += sum(pair[n] for pair in pairs)
    total = torch.where(on != 0, total, 0)
    return total.sum((0, 1)) if problem.log_decay.dim() == 1 else total


def half_gradients(problem, weights):
    """Gradients by the formula dz = -(dout . out) / z with an output that has been rounded to half precision."""
    found, wide = gradients(plain, problem, weights, torch.float32), problem.to(torch.float32)
    if not wide.normalize or wide.kernel_map == "softmax" or weights[0] is None:
        return found
    out = plain(wide)[0]
    ones = torch.ones_like(wide.v[..., :1])
    kv = None if wide.kv is None else wide.key_sum[..., None]
    sums = dataclasses.replace(wide, v=ones, kv=kv, normalize=False, scale=1.0)  # its output is z
    z = plain(sums)[0]
    change = (weights[0] * (out - out.to(problem.q.dtype))).sum(-1, keepdim=True) / z
    more = gradients(plain, sums, [torch.where(z.abs() < wide.eps, 0, change)])
    names = [name for name, x in zip(INPUTS, problem.inputs, strict=True) if x is not None]
    same = {"v", "initial kv"}
    more = dict(zip(names, more, strict=True))
    if kv is not None:
        more["initial key_sum"] = more["initial kv"][..., 0]
    return [x if name in same else x + more[name] for name, x in zip(names, found, strict=True)]


def check_backward(problem, outputs=OUTPUTS, floor=0.0):
    """Gradients of some of the outputs; every number has its own upstream gradient. `floor`: of the rounding level."""
    types = (problem.q.dtype, torch.float32, torch.float32)  # what flows back into a result has its dtype
    weights = [w.to(t).float() for w, t in zip(upstream(problem), types, strict=True)]
    weights = [w if name in outputs else None for name, w in zip(OUTPUTS, weights, strict=True)]
    own = gradients(ours, problem, weights)
    exact = gradients(plain, problem, weights, torch.float64)
    half = problem.q.dtype in (torch.float16, torch.bfloat16)
    narrow = half_gradients(problem, weights) if half else gradients(plain, problem, weights, torch.float32)
    names = [name for name, x in zip(INPUTS, problem.inputs, strict=True) if x is not None]
    level = max(floor, *(rounding_level(*pair) for pair in zip(narrow, exact, strict=True)))
    for name, *results in zip(names, own, narrow, exact, strict=True):
        # The kernels take dlog_decay by a formula whose sums over tokens round more than autograd's.
        of_decay = name == "log_decay"
        formula = decay_gradient(problem, weights, torch.float32) if of_decay else results[1]
        terms = sum_of(problem.k.shape[1], results[2:]) if of_decay and floor else 0.0
        assert_within_budget(*results, f"d{name}", max(level, rounding_level(formula, results[2])), terms)
    for x, found in zip((x for x in problem.inputs if x is not None), own, strict=True):
        assert found.dtype == x.dtype
        assert not found[x.isnan()].any(), "masked tokens have gradients of exactly 0"


def kernel_arguments(problem):
    """Arguments of the op, and the factor of its result."""
    layout = (problem.key_padding_mask, problem.cu_seqlens_q, problem.cu_seqlens_k, problem.log_decay, problem.state)
    options = (problem.feature_map, problem.causal, problem.normalize, problem.scale, problem.eps)
    return kernel_inputs(problem.q, problem.k, problem.v, *options, *layout)


def outputs(problem, leaves=None):
    """All that the family computes of a problem: out, state, and gradients by its inputs or by `leaves`."""
    if leaves is None:
        problem, leaves = problem.leaves()
    results = [x for x in ours(problem) if x is not None]
    total = sum(x.double().sin().sum() for x in results[:3])
    found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [*(x.detach() for x in results), *found]


def assert_all_same(found, expected, what="result"):
    for index, (own, other) in enumerate(zip(found, expected, strict=True)):
        assert_same(own, other, f"{what} {index}")


def third_derivative(call, problem):
    problem, leaves = problem.leaves()
    value = sum(x.sin().sum() for x in call(problem)[:3])
    for _ in range(3):
        slopes = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
        value = sum(slope.sin().sum() for slope in slopes)
    return slopes
