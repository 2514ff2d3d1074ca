"""Tags of -100 as the mask of the CRF and MEMM layers: what is left is the sequence, whatever was left out."""

import math

import pytest
import torch
from tools import assert_same

import fastnlp_ops
from fastnlp_ops import CRF, MEMM

N = 4
X = -100
# Rows of tags, and a mask of the caller's. Sub-words and special tokens are ignored, padding is masked or ignored.
PATTERNS = {
    "special tokens": [[X, 1, 2, 3, X], [X, 0, X, X, X]],
    "sub-words": [[1, X, 2, X, 3], [0, X, X, 1, X]],
    "padding": [[1, 2, 3, 0, 1], [0, 1, X, X, X]],
    "none": [[1, 2, 3, 0, 1], [0, 1, 1, 0, 2]],
    "one step each": [[X, X, 1, X, X], [X, X, X, X, 2]],
    "an empty sequence": [[X, X, X, X, X], [0, X, 1, X, 2]],
    "nothing": [[X, X, X, X, X], [X, X, X, X, X]],
}
MASKS = {
    "no mask": None,
    "mask": [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]],
    "first step off": [[0, 1, 1, 1, 1], [0, 0, 1, 1, 1]],
    "all off": [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
}
LAYERS = {
    "CRF": lambda **options: CRF(N, **options),
    "labels": lambda **options: CRF(N, labels=["O", "B-X", "I-X", "B-Y"], constrain="decode", **options),
    "MEMM": lambda **options: MEMM(N, **options),
}


def problem(pattern, mask, device, batch_first, dtype=torch.bool):
    tags = torch.tensor(PATTERNS[pattern], device=device)
    given = None if MASKS[mask] is None else torch.tensor(MASKS[mask], device=device)
    on = tags != X if given is None else (tags != X) & (given != 0)
    emissions = torch.randn(2, 5, N, device=device)
    emissions[~on] = math.nan  # never read
    given = None if given is None else given.to(dtype)
    if batch_first:
        return emissions, tags, given, on
    return emissions.transpose(0, 1), tags.t(), None if given is None else given.t(), on


def alone(layer, emissions, tags, on, batch_first):
    """Log-likelihood of each sequence by itself, cut to the steps that are left; 0 where there are none."""
    if not batch_first:
        emissions, tags = emissions.transpose(0, 1), tags.t()
    result = []
    for e, y, o in zip(emissions, tags, on, strict=True):
        e, y = (e[o][None], y[o][None]) if batch_first else (e[o][:, None], y[o][:, None])
        result.append(layer(e, y, reduction="none")[0] if o.any() else torch.zeros((), device=e.device))
    return torch.stack(result)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", LAYERS)
def test_loss(kind, pattern, mask, batch_first, device):
    """Values and gradients are those of the cut sequences; no step at all is 0 with gradient 0, in every reduction."""
    layer = LAYERS[kind](batch_first=batch_first, ignore_index=X).to(device)
    emissions, tags, given, on = problem(pattern, mask, device, batch_first)
    emissions.requires_grad_()
    rows = alone(layer, emissions, tags, on, batch_first)
    tokens = max(int(on.sum()), 1)
    expected = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / 2, "token_mean": rows.sum() / tokens}
    leaves = [emissions, *layer.parameters()]
    for reduction, value in expected.items():
        ours = layer(emissions, tags, given, reduction=reduction)
        torch.testing.assert_close(ours, value, rtol=1e-5, atol=1e-5)
        gradients = torch.autograd.grad(ours.sum(), leaves)
        if not on.any():
            assert all((g == 0).all() for g in gradients)
            assert (ours == 0).all()
            continue
        wanted = torch.autograd.grad(value.sum(), leaves, retain_graph=True, materialize_grads=True)
        for g, w in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
@pytest.mark.parametrize("kind", LAYERS)
def test_mask_of_any_dtype(kind, dtype, device):
    """The two together are the functions' mask."""
    layer = LAYERS[kind](batch_first=True, ignore_index=X).to(device)
    emissions, tags, mask, on = problem("sub-words", "mask", device, True, dtype)
    if kind == "MEMM":
        expected = fastnlp_ops.memm_log_likelihood(emissions, tags, layer.transitions, mask=on)
    else:
        scores = layer.transitions, layer.start_transitions, layer.end_transitions
        expected = fastnlp_ops.crf_log_likelihood(emissions, tags, *scores, mask=on)
    assert_same(layer(emissions, tags, mask, reduction="none"), expected)
    assert_same(layer(emissions, tags, mask, reduction="token_mean"), expected.sum() / on.sum())


@pytest.mark.parametrize("index", [X, -1, 0, 3, 7])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_index_and_dtype_of_tags(index, dtype, device):
    """Also that of a tag, which is then never gold."""
    layer = CRF(N, batch_first=True, ignore_index=index).to(device)
    tags = torch.tensor([[1, 2, index, 2], [index, 1, index, index]], dtype=dtype, device=device)
    emissions = torch.randn(2, 4, N, device=device)
    expected = fastnlp_ops.crf_log_likelihood(
        emissions, tags, layer.transitions, layer.start_transitions, layer.end_transitions, mask=tags != index
    )
    assert_same(layer(emissions, tags, reduction="none"), expected)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["mask", "first step off", "all off"])
@pytest.mark.parametrize("kind", LAYERS)
def test_decoding(kind, mask, batch_first, device):
    """Any mask; the paths of the sequences cut to it. Tensors are padded with what the caller compares with."""
    layer = LAYERS[kind](batch_first=batch_first, ignore_index=X).to(device)
    emissions, _tags, given, on = problem("none", mask, device, batch_first)
    rows = emissions if batch_first else emissions.transpose(0, 1)
    expected = [layer.decode(e[o][None] if batch_first else e[o][:, None])[0] for e, o in zip(rows, on, strict=True)]
    assert layer.decode(emissions, given) == expected
    paths, scores = layer.viterbi(emissions, given)
    assert [path[o].tolist() for path, o in zip(paths, on, strict=True)] == expected
    assert (paths[~on] == -1).all()
    for value in (X, 0):
        padded, same = layer.viterbi(emissions, given, padding_value=value)
        assert_same(padded, paths.masked_fill(~on, value))
        assert_same(same, scores)
    best, _scores = layer.viterbi(emissions, given, 3, padding_value=X)
    assert_same(best[:, 0], paths.masked_fill(~on, X))
    if kind != "MEMM":
        marginals = layer.marginals(emissions, given)
        sums = (marginals if batch_first else marginals.transpose(0, 1)).sum(-1)
        torch.testing.assert_close(sums, on.to(sums.dtype), rtol=0, atol=1e-5)


def test_runners_up_that_do_not_exist(device):
    """One step has N paths: the others are padding."""
    layer = CRF(N, batch_first=True).to(device)
    paths, scores = layer.viterbi(torch.randn(1, 1, N, device=device), n_best=N + 2, padding_value=X)
    assert (paths[0, N:] == X).all()
    assert (scores[0, N:] == -math.inf).all()


def test_strict_is_the_default(device):
    """-100 is a tag out of range, and a masked first step an error, as in torchcrf; on a GPU nothing reads them."""
    if device.type != "cpu":
        pytest.skip("values on a GPU are not read")
    crf = CRF(N, batch_first=True)
    emissions, tags, *_others = problem("special tokens", "no mask", device, True)
    emissions = emissions.nan_to_num()
    with pytest.raises(ValueError, match=r"^tags must be in \[0, 4\), got tag -100 at sequence 0, step 0$"):
        crf(emissions, tags)
    for call in (crf.decode, crf.viterbi, crf.marginals, lambda e, mask: crf(e, tags, mask)):
        with pytest.raises(ValueError, match=r"^mask of the first timestep must all be on$"):
            call(emissions, tags != X)


ERRORS = {
    "tags": ({"tags": torch.zeros(2, 5)}, TypeError, "tags must be integers, got torch.float32"),
    "shape": (
        {"tags": torch.zeros(2, 4, dtype=torch.int64)},
        ValueError,
        "the first two dimensions of emissions and tags must match, got (2, 5) and (2, 4)",
    ),
    "mask": (
        {"mask": torch.ones(2, 4)},
        ValueError,
        "the first two dimensions of emissions and mask must match, got (2, 5) and (2, 4)",
    ),
    "complex mask": (
        {"mask": torch.ones(2, 5, dtype=torch.complex64)},
        TypeError,
        "mask must be bool, integer or floating point, got torch.complex64",
    ),
    "device": (
        {"mask": torch.ones(2, 5, device="meta")},
        ValueError,
        "mask must be on the device of emissions, cpu, got meta",
    ),
    "another tag": (
        {"tags": torch.tensor([[X, 0, -1, 0, 0]] * 2)},
        ValueError,
        "tags must be in [0, 4), got tag -1 at sequence 0, step 2",
    ),
    "reduction": ({"reduction": "no"}, ValueError, "invalid reduction: no"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    bad, error, sentence = ERRORS[case]
    arguments = {"emissions": torch.randn(2, 5, N), "tags": torch.tensor(PATTERNS["padding"]), "mask": None} | bad
    with pytest.raises(error) as caught:
        CRF(N, batch_first=True, ignore_index=X)(**arguments)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("kind", LAYERS)
def test_script(kind, device):
    layer = LAYERS[kind](batch_first=True, ignore_index=X).to(device)
    scripted = torch.jit.script(layer)
    for mask in ("no mask", "first step off"):
        emissions, tags, given, _on = problem("sub-words", mask, device, True)
        for reduction in ("none", "token_mean"):
            assert_same(scripted(emissions, tags, given, reduction), layer(emissions, tags, given, reduction))
        assert scripted.decode(emissions, given) == layer.decode(emissions, given)


@pytest.mark.parametrize("kind", LAYERS)
def test_empty(kind, device):
    """No sequences and no steps: 0 in every reduction, with a mask and without."""
    for options in ({}, {"ignore_index": X}):
        layer = LAYERS[kind](batch_first=True, **options).to(device)
        for shape in ((0, 3), (2, 0)):
            emissions = torch.randn(*shape, N, device=device, requires_grad=True)
            tags = torch.zeros(shape, dtype=torch.int64, device=device)
            for mask in (None, torch.ones(shape, dtype=torch.bool, device=device)):
                for reduction in ("none", "sum", "mean", "token_mean"):
                    value = layer(emissions, tags, mask, reduction=reduction)
                    assert_same(value.detach(), torch.zeros(shape[:1] if reduction == "none" else (), device=device))
                    value.sum().backward()
                assert all((p.grad == 0).all() for p in layer.parameters())
                assert layer.decode(emissions, mask) == [[]] * shape[0]
                assert layer.viterbi(emissions, mask)[0].shape == shape
