"""Arguments at the edge, for every CRF and MEMM function: nothing to do, one tag, any strides, dtypes, layouts."""

import itertools

import pytest
import torch
from tools import assert_same, reversed_strides, strided

import fastnlp_ops
from fastnlp_ops import CRF, MEMM, reference

# What each function takes after the emissions, and its other options.
FUNCTIONS = {
    "crf_log_partition": ((), {}),
    "crf_log_likelihood": (("tags",), {}),
    "crf_partial_log_likelihood": (("allowed",), {}),
    "crf_marginals": ((), {}),
    "crf_viterbi": ((), {}),
    "crf_viterbi, n_best=3": ((), {"n_best": 3}),
    "crf_sample": ((), {"num_samples": 2}),
    "crf_entropy": ((), {}),
    "memm_log_likelihood": (("tags",), {}),
    "memm_viterbi": ((), {}),
    "memm_viterbi, n_best=3": ((), {"n_best": 3}),
}
FLOATING = ("emissions", "transitions", "start_transitions", "end_transitions")
SCORES = {case: FLOATING[:2] if case.startswith("memm") else FLOATING for case in FUNCTIONS}
DIFFERENTIABLE = [name for name in FUNCTIONS if "viterbi" not in name and "sample" not in name]
SIZES = {
    "B=0": (0, 5, 3),
    "T=0": (2, 0, 3),
    "B=T=0": (0, 0, 3),
    "T=1": (2, 1, 3),
    "N=1": (2, 5, 1),
    "B=0, N=1": (0, 5, 1),
    "T=0, N=1": (2, 0, 1),
    "B=T=N=1": (1, 1, 1),
    "ragged": (5, 4, 3),
}
LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "strided": strided,
    "reversed": reversed_strides,
    "expanded": lambda x: x[:1].expand(x.shape) if len(x) else x,
    "negative": lambda x: x.flip(-1).contiguous().flip(-1),
}


def problem(size, device, masked=False, dtype=torch.float32):
    B, T, N = size
    given = {
        "emissions": torch.randn(size, device=device, dtype=dtype),
        "tags": torch.randint(N, (B, T), device=device),
        "allowed": torch.rand(size, device=device) < 0.7,
        "transitions": torch.randn(N, N, device=device, dtype=dtype),
        "start_transitions": torch.randn(N, device=device, dtype=dtype),
        "end_transitions": torch.randn(N, device=device, dtype=dtype),
    }
    given["allowed"][..., 0] = True
    return given | {"mask": torch.rand(B, T, device=device) < 0.6 if masked else None}


def call(case, given, module=fastnlp_ops):
    """Results as a tuple."""
    name = case.split(",")[0]
    tensors, options = FUNCTIONS[case]
    if name == "crf_sample":
        options = options | {"generator": torch.Generator(given["emissions"].device).manual_seed(0)}
    arguments = [given[key] for key in ("emissions", *tensors, *SCORES[case][1:])]
    result = getattr(module, name)(*arguments, mask=given["mask"], **options)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", FUNCTIONS)
def test_sizes(case, size, masked, device):
    """As the reference, whose shapes are their own proof; gradients exist and are finite."""
    given = problem(SIZES[size], device, masked, torch.float64)
    for ours, expected in zip(call(case, given), call(case, given, reference), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    if case in DIFFERENTIABLE:
        leaves = [given[key].requires_grad_() for key in ("emissions", "transitions")]
        gradients = torch.autograd.grad(call(case, given)[0].sum(), leaves, materialize_grads=True)
        assert all(g.isfinite().all() and g.shape == x.shape for g, x in zip(gradients, leaves, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", FUNCTIONS)
def test_strides(case, size, layout, device):
    """Every argument in every layout gives the bits of contiguous ones, gradients too, also where there is nothing."""
    given = problem(SIZES[size], device, True)
    laid_out = {key: LAYOUTS[layout](x) for key, x in given.items()}
    dense = {key: x.clone(memory_format=torch.contiguous_format) for key, x in laid_out.items()}
    for ours, expected in zip(call(case, laid_out), call(case, dense), strict=True):
        assert_same(ours, expected)
    if case in DIFFERENTIABLE:
        results = []
        for arguments in (laid_out, dense):
            leaves = [arguments[key].detach().requires_grad_() for key in ("emissions", "transitions")]
            value = call(case, arguments | {"emissions": leaves[0], "transitions": leaves[1]})[0]
            results.append(torch.autograd.grad(value.sum(), leaves, materialize_grads=True))
        for ours, expected in zip(*results, strict=True):
            assert_same(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("case", "doubles"),
    [(case, c) for case in FUNCTIONS for n in range(3) for c in itertools.combinations(SCORES[case], n)],
    ids=str,
)
def test_dtype_of_results(case, doubles, dtype, device):
    """float64 where any floating input is, else float32; the reference promises the same, and has the same values."""
    given = problem((2, 4, 3), device, True)
    for key in FLOATING:
        given[key] = given[key].to(torch.float64 if key in doubles else dtype)
    wide = torch.float64 if doubles else torch.float32
    for ours, expected in zip(call(case, given), call(case, given, reference), strict=True):
        assert ours.dtype == expected.dtype == (wide if ours.is_floating_point() else torch.int64)
        tolerance = 1e-9 if doubles else 1e-4
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    if case in DIFFERENTIABLE:
        leaves = [given[key].requires_grad_() for key in ("emissions", "transitions")]
        for leaf, gradient in zip(leaves, torch.autograd.grad(call(case, given)[0].sum(), leaves), strict=True):
            assert gradient.dtype == leaf.dtype


@pytest.mark.parametrize("name", [*FLOATING[1:], "emissions"])
def test_dtype_of_layers(name, device):
    """The same of the CRF layer, whose parameters may have dtypes of their own."""
    crf = CRF(3, batch_first=True, labels=["O", "B-X", "I-X"]).to(device)
    emissions, tags = torch.randn(2, 4, 3, device=device), torch.zeros(2, 4, dtype=torch.int64, device=device)
    if name == "emissions":
        emissions = emissions.double()
    else:
        setattr(crf, name, torch.nn.Parameter(getattr(crf, name).double()))
    value = crf(emissions, tags)
    assert value.dtype == torch.float64
    assert crf.viterbi(emissions)[1].dtype == crf.marginals(emissions).dtype == torch.float64
    value.backward()
    assert getattr(crf, name).grad.dtype == torch.float64 if name != "emissions" else crf.transitions.grad is not None


def nested(x):
    return torch.nested.as_nested_tensor(list(x.reshape(2, -1)), layout=torch.jagged)


NOT_DENSE = {
    "COO": (torch.Tensor.to_sparse, "torch.sparse_coo"),
    "CSR": (lambda x: x.reshape(len(x), -1).to_sparse_csr(), "torch.sparse_csr"),
    "nested": (nested, "nested"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
@pytest.mark.parametrize("kind", NOT_DENSE)
@pytest.mark.parametrize(
    ("case", "name"), [(case, name) for case in FUNCTIONS for name in (*SCORES[case], *FUNCTIONS[case][0], "mask")]
)
def test_not_dense(case, name, kind, device):
    """One sentence for every argument that has no strides."""
    given = problem((2, 4, 2), device, True)
    make, word = NOT_DENSE[kind]
    given[name] = make(given[name].float() if given[name].dtype == torch.bool else given[name])
    name = {"allowed": "allowed_tags"}.get(name, name)
    with pytest.raises(TypeError) as caught:
        call(case, given)
    assert str(caught.value) == f"{name} must be a dense tensor, got {word}"


@pytest.mark.parametrize("dims", [0, 1, 2, 4])
@pytest.mark.parametrize("case", FUNCTIONS)
def test_dimensions_of_emissions(case, dims, device):
    given = problem((2, 4, 3), device, True)
    given["emissions"] = torch.randn((3,) * dims, device=device)
    given["allowed"] = torch.ones((3,) * dims, dtype=torch.bool, device=device)
    with pytest.raises(ValueError) as caught:
        call(case, given)
    assert str(caught.value) == f"emissions must be [B, T, N], got shape {(3,) * dims}"


@pytest.mark.parametrize("dims", [0, 1, 2, 4])
@pytest.mark.parametrize("batch_first", [False, True])
def test_dimensions_in_layers(batch_first, dims, device):
    emissions, tags = torch.randn((3,) * dims, device=device), torch.zeros(2, 4, dtype=torch.int64, device=device)
    crf, memm = (kind(3, batch_first=batch_first).to(device) for kind in (CRF, MEMM))
    axes = "[B, T, 3]" if batch_first else "[T, B, 3]"
    shape = ", ".join(["3"] * dims)
    for layer, sentence in (
        (crf, f"emissions must have dimension of 3, got {dims}"),
        (memm, f"emissions must be {axes}, got shape ({shape})"),
    ):
        calls = [lambda: layer(emissions, tags), lambda: layer.decode(emissions), lambda: layer.viterbi(emissions)]  # noqa: B023
        for layer_call in [*calls, *([lambda: crf.marginals(emissions)] if layer is crf else [])]:
            with pytest.raises(ValueError) as caught:
                layer_call()
            assert str(caught.value) == sentence
