"""The layers GlobalPointer and EfficientGlobalPointer: what they compute, hold, refuse, and that they learn."""

import copy
import io
import itertools
import math
import pickle
import random

import pytest
import torch
from tools import assert_same
from torch import nn

import fastnlp_ops
from fastnlp_ops import EfficientGlobalPointer, GlobalPointer

LAYERS = {"standard": GlobalPointer, "efficient": EfficientGlobalPointer}
both_layers = pytest.mark.parametrize("kind", LAYERS)
D, H, d, B, n = 12, 3, 4, 3, 9
OPTIONS = {
    "plain": {},
    "mask": {"mask": True},
    "band": {"max_span_length": 3},
    "positions": {"position_ids": True},
    "all": {"mask": True, "position_ids": True, "max_span_length": 4},
}
FORMS = {
    "plain": {},
    "relations": {"rope": False, "tril_mask": False},
    "without rope": {"rope": False},
    "without bias": {"use_bias": False},
    "both halves": {"tril_mask": False},
}


def make_layer(kind, device, **options):
    return LAYERS[kind](D, H, d, **options).to(device)


def make_inputs(device, options=None):
    """Hidden states, labels [B, H, P, 2], and the options with tensors where they say True."""
    x = torch.randn(B, n, D, device=device)
    start = torch.randint(n, (B, H, 4, 1))
    labels = torch.cat([start, start + torch.randint(0, 3, (B, H, 4, 1))], -1).clamp(max=n - 1)
    labels[:, :, 3] = -1
    options = dict(options or {})
    if options.get("mask"):
        options["mask"] = (torch.rand(B, n, device=device) < 0.8).long()
    if options.get("position_ids"):
        options["position_ids"] = torch.randint(0, 50, (B, n), device=device)
    return x, labels.to(device), options


def manual(layer, x):
    """(q, k, start_bias, end_bias), from the weights as the docstrings describe them."""
    zero = torch.zeros(1, device=x.device, dtype=x.dtype)
    y = x @ layer.dense.weight.t() + (zero if layer.dense.bias is None else layer.dense.bias)
    if isinstance(layer, GlobalPointer):
        rows = torch.arange(2 * H * d).reshape(H, 2, d)
        return y[..., rows[:, 0]], y[..., rows[:, 1]], None, None
    source = x if layer.bias_from_hidden else y
    biases = source @ layer.bias_dense.weight.t() + (zero if layer.bias_dense.bias is None else layer.bias_dense.bias)
    even, odd = torch.arange(0, 2 * d, 2), torch.arange(1, 2 * d, 2)
    heads = 2 * torch.arange(H)
    return y[..., None, even], y[..., None, odd], biases[..., heads + 1] / 2, biases[..., heads] / 2


def function_arguments(layer, x):
    q, k, start, end = manual(layer, x)
    return (q, k), {"start_bias": start, "end_bias": end, "rope": layer.rope, "tril_mask": layer.tril_mask}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", OPTIONS)
@both_layers
def test_forward(kind, case, form, device):
    """The functions over the projection that the docstring describes."""
    layer = make_layer(kind, device, **FORMS[form]).double()
    x, labels, options = make_inputs(device, OPTIONS[case])
    x = x.double()
    (q, k), always = function_arguments(layer, x)
    scores = fastnlp_ops.global_pointer_scores(q, k, **always, **options)
    torch.testing.assert_close(layer(x, **options), scores)
    for extra in ({}, {"reduction": "none"}, {"reduction": "sum"}, {"reduction": "batchmean"}, {"mask_zero": True}):
        expected = fastnlp_ops.global_pointer_loss(q, k, labels, **always, **options, **extra)
        torch.testing.assert_close(layer.loss(x, labels, **options, **extra), expected)
    for extra in ({}, {"threshold": 0.3}, {"top_k": 2}, {"nested": False}):
        spans, found = layer.decode(x, **options, **extra)
        expected, expected_scores = fastnlp_ops.global_pointer_decode(q, k, **always, **options, **extra)
        assert_same(spans, expected)
        torch.testing.assert_close(found, expected_scores)
    assert len(layer.decode(x, **options)[0]) > 0


@both_layers
def test_options_matter(kind, device):
    """None of the options is lost on its way to the function."""
    layer = make_layer(kind, device)
    x, labels, options = make_inputs(device, OPTIONS["all"])
    plain = layer(x), layer.loss(x, labels), layer.decode(x)[1]
    for name, value in options.items():
        for method, before in zip((layer, lambda x, **o: layer.loss(x, labels, **o), layer.decode), plain, strict=True):
            after = method(x, **{name: value})
            after = after[1] if isinstance(after, tuple) else after
            assert after.shape != before.shape or not torch.equal(after, before), name
    for name, value in {"reduction": "sum", "mask_zero": True}.items():
        zero = torch.zeros(B, H, 1, 2, dtype=torch.int64, device=device)
        labelled = torch.cat([labels, zero], 2)
        assert layer.loss(x, labelled, **{name: value}) != layer.loss(x, labelled), name
    for name, value in {"threshold": 0.1, "top_k": 1, "nested": False}.items():
        assert len(layer.decode(x, **{name: value})[0]) < len(plain[2]), name


@both_layers
def test_backward(kind, device):
    """Gradients of all parameters and of the hidden states are those of the loss over dense scores."""
    layer = make_layer(kind, device).double()
    x, labels, options = make_inputs(device, OPTIONS["mask"])
    x = x.double().requires_grad_()
    inputs = [x, *layer.parameters()]
    loss = layer.loss(x, labels, **options)
    scores = layer(x, **options)
    positive = torch.zeros(scores.shape, dtype=torch.bool, device=device)
    for b, h in itertools.product(range(B), range(H)):
        for start, end in labels[b, h].tolist():
            if start >= 0 and end >= start:
                positive[b, h, start, end] = True
    dense = fastnlp_ops.multilabel_categorical_crossentropy(scores.flatten(2), positive.flatten(2), reduction="mean")
    torch.testing.assert_close(loss, dense)
    for ours, expected in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(dense, inputs), strict=True):
        torch.testing.assert_close(ours, expected)
        assert ours.abs().max() > 0


@both_layers
def test_projections_are_views(kind, device):
    """No copy of the projection: q and k lie in one storage, and so do the biases."""
    q, k, start_bias, end_bias = make_layer(kind, device).project(torch.randn(B, n, D, device=device))
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert q.shape == k.shape == (B, n, H if kind == "standard" else 1, d)
    assert q.untyped_storage().nbytes() == 4 * B * n * 2 * d * q.shape[2]
    if kind == "standard":
        assert start_bias is None
        assert end_bias is None
    else:
        assert start_bias.untyped_storage().data_ptr() == end_bias.untyped_storage().data_ptr()
        assert start_bias.shape == end_bias.shape == (B, n, H)


def test_parameters_and_names():
    """Keys and shapes are the format of checkpoints; those of the standard form are bert4torch's."""
    assert {name: tuple(p.shape) for name, p in GlobalPointer(D, H, d).state_dict().items()} == {
        "dense.weight": (2 * H * d, D),
        "dense.bias": (2 * H * d,),
    }
    assert {name: tuple(p.shape) for name, p in EfficientGlobalPointer(D, H, d).state_dict().items()} == {
        "dense.weight": (2 * d, D),
        "dense.bias": (2 * d,),
        "bias_dense.weight": (2 * H, 2 * d),
        "bias_dense.bias": (2 * H,),
    }
    assert list(EfficientGlobalPointer(D, H, d, use_bias=False).state_dict()) == ["dense.weight", "bias_dense.weight"]
    layer = EfficientGlobalPointer(D, H, d, bias_from_hidden=True)
    assert layer.bias_dense.weight.shape == (2 * H, D)


def test_repr():
    assert repr(GlobalPointer(8, 2, 4, tril_mask=False)) == (
        "GlobalPointer(\n"
        "  heads=2, head_size=4, rope=True, tril_mask=False\n"
        "  (dense): Linear(in_features=8, out_features=16, bias=True)\n"
        ")"
    )
    assert repr(EfficientGlobalPointer(8, 2, 3, False, True, False, bias_from_hidden=True)) == (
        "EfficientGlobalPointer(\n"
        "  heads=2, head_size=3, rope=False, tril_mask=True, bias_from_hidden=True\n"
        "  (dense): Linear(in_features=8, out_features=6, bias=False)\n"
        "  (bias_dense): Linear(in_features=8, out_features=4, bias=False)\n"
        ")"
    )


@pytest.mark.parametrize(
    ("sizes", "options", "sentence"),
    [
        ((0, 2, 4), {}, "hidden_size must be at least 1, got 0"),
        ((8, -1, 4), {}, "heads must be at least 1, got -1"),
        ((8, 2, 0), {}, "head_size must be at least 1, got 0"),
        ((8, 2, 5), {}, "head_size must be even where rope is on, got 5"),
    ],
)
@both_layers
def test_errors_of_sizes(kind, sizes, options, sentence):
    with pytest.raises(ValueError) as caught:
        LAYERS[kind](*sizes, **options)
    assert str(caught.value) == sentence
    LAYERS[kind](8, 1, 1, rope=False)


@both_layers
def test_errors(kind):
    """Of the layer, and those of the functions through it."""
    layer, x = make_layer(kind, "cpu"), torch.randn(B, n, D)
    labels = torch.zeros(B, H, 2, 2, dtype=torch.int64)
    for call, sentence in (
        (lambda: layer.project(x[0]), "hidden_states must be [B, n, 12], got shape (9, 12)"),
        (lambda: layer(x[0]), "hidden_states must be [B, n, 12], got shape (9, 12)"),
        (lambda: layer(x[..., :8]), "hidden_states must be [B, n, 12], got shape (3, 9, 8)"),
        (lambda: layer.decode(x[0]), "hidden_states must be [B, n, 12], got shape (9, 12)"),
        (lambda: layer.loss(x[..., :8], labels), "hidden_states must be [B, n, 12], got shape (3, 9, 8)"),
        (lambda: layer(x, torch.ones(B, n + 1)), "mask must be [B, n] = (3, 9), got shape (3, 10)"),
        (lambda: layer(x, max_span_length=0), "max_span_length must be at least 1, got 0"),
        (lambda: layer.decode(x, top_k=0), "top_k must be at least 1, got 0"),
        (
            lambda: layer.loss(x, labels, reduction="max"),
            "reduction must be none, mean, sum or batchmean, got max",
        ),
        (
            lambda: layer.loss(x, labels[:, :2]),
            "labels must be [B, H, P, 2] = (3, 3, P, 2) or [M, 4], got shape (3, 2, 2, 2)",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == sentence


@both_layers
def test_hidden_states_of_masked_tokens(kind, device):
    """NaN there reaches no score, no loss, no span and no gradient of another token."""
    layer, (x, labels, _) = make_layer(kind, device), make_inputs(device)
    mask = torch.arange(n, device=device) < torch.tensor([[9], [5], [2]], device=device)
    poisoned = x.masked_fill(~mask[:, :, None], math.nan)
    results = []
    for hidden in (x, poisoned):
        hidden = hidden.clone().requires_grad_()
        loss = layer.loss(hidden, labels, mask)
        (gradient,) = torch.autograd.grad(loss, hidden)
        results.append([loss.detach(), gradient, layer(hidden, mask).detach(), *layer.decode(hidden, mask)])
    for ours, clean in zip(*reversed(results), strict=True):
        assert_same(ours, clean)


@both_layers
def test_empty_inputs(kind, device):
    layer = make_layer(kind, device)
    for shape in ((0, n, D), (B, 0, D)):
        x = torch.randn(shape, device=device, requires_grad=True)
        assert layer(x).shape == (shape[0], H, shape[1], shape[1])
        assert len(layer.decode(x)[0]) == 0
        loss = layer.loss(x, torch.full((shape[0], H, 2, 2), -1, device=device))
        loss.backward()
        assert loss == 0
        for parameter in layer.parameters():
            assert (parameter.grad == 0).all()


@both_layers
def test_copies(kind, device):
    """Pickled, copied, saved and loaded, a layer scores the same."""
    layer, (x, _, _) = make_layer(kind, device, tril_mask=False), make_inputs(device)
    expected = layer(x)
    assert_same(pickle.loads(pickle.dumps(layer))(x), expected)
    assert_same(copy.deepcopy(layer)(x), expected)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = make_layer(kind, device, tril_mask=False)
    assert not torch.equal(loaded(x), expected)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same(loaded(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@both_layers
def test_dtypes(kind, dtype, device):
    """Scores in the layer's dtype, the loss at least in float32, gradients in the parameters' dtype."""
    layer, (x, labels, options) = make_layer(kind, device), make_inputs(device, OPTIONS["mask"])
    if dtype == torch.float16:
        layer.half()
    layer.to(dtype)
    x = x.to(dtype)
    scores = layer(x, **options)
    assert scores.dtype == dtype
    loss = layer.loss(x, labels, **options)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert layer.decode(x, **options)[1].dtype == loss.dtype
    loss.backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in layer.parameters())
    q, k, start, end = (None if y is None else y.detach().double() for y in layer.project(x))
    exact = fastnlp_ops.global_pointer_loss(q, k, labels, start_bias=start, end_bias=end, **options)
    # Of the numbers that the projection was rounded to, the loss is that of float32.
    assert abs(loss.item() - exact.item()) <= 1e-6 * max(1, exact.item())


@both_layers
def test_autocast(kind, device):
    """The projection runs in bfloat16; scores and losses of it do not."""
    layer, (x, labels, options) = make_layer(kind, device), make_inputs(device, OPTIONS["mask"])
    with torch.autocast(device.type, torch.bfloat16):
        projected = layer.project(x)
        assert all(y is None or y.dtype == torch.bfloat16 for y in projected)
        loss = layer.loss(x, labels, **options)
        assert layer.decode(x, **options)[1].dtype == torch.float32
        assert layer(x, **options).dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    q, k, start, end = (None if y is None else y.detach().double() for y in projected)
    exact = fastnlp_ops.global_pointer_loss(q, k, labels, start_bias=start, end_bias=end, **options)
    assert abs(loss.item() - exact.item()) <= 1e-6 * max(1, exact.item())
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in layer.parameters())


@both_layers
def test_compile(kind, device):
    """One graph for scores and for the loss, with dynamic shapes; the same numbers as eager."""
    torch._dynamo.reset()
    layer = make_layer(kind, device)
    scores = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    loss = torch.compile(layer.loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for cut in (n, n - 2):
        x, labels, options = make_inputs(device, OPTIONS["all"])
        x, labels = x[:, :cut], labels.clamp(max=cut - 1)
        options = {name: v[:, :cut] if isinstance(v, torch.Tensor) else v for name, v in options.items()}
        assert_same(scores(x, **options), layer(x, **options))
        results = []
        for function in (loss, layer.loss):
            value = function(x, labels, **options)
            results.append([value.detach(), *torch.autograd.grad(value, list(layer.parameters()))])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


# Learning: nested spans of three types in one sequence. Every type has brackets of its own, two pairs of them.

PAIRS = [(1, 2, 0), (3, 4, 0), (5, 6, 1), (7, 8, 1), (9, 10, 2), (11, 12, 2)]
VOCABULARY = 20  # 0 is padding, 13 to 19 mean nothing


def make_sentence(source):
    """Tokens, and the spans (type, start, end) that stand in them: nested, crossing and side by side."""
    tokens = [source.randrange(13, VOCABULARY) for _ in range(source.randint(0, 4))]
    chosen = source.sample(PAIRS, source.randint(0, 4))
    for opening, closing, _ in chosen:
        start = source.randint(0, len(tokens))
        tokens.insert(start, opening)
        tokens.insert(source.randint(start + 1, len(tokens)), closing)
    loose = source.choice([pair for pair in PAIRS if pair not in chosen])
    tokens.insert(source.randint(0, len(tokens)), source.choice(loose[:2]))  # a bracket without its other half
    spans = [(kind, tokens.index(opening), tokens.index(closing)) for opening, closing, kind in chosen]
    return tokens, spans


def make_batch(source, size, device):
    """Padded tokens, their mask, and labels as rows (b, h, start, end)."""
    sentences = [make_sentence(source) for _ in range(size)]
    length = max(len(tokens) for tokens, _ in sentences)
    tokens = torch.tensor([tokens + [0] * (length - len(tokens)) for tokens, _ in sentences], device=device)
    labels = torch.tensor([(b, *span) for b, (_, spans) in enumerate(sentences) for span in spans], device=device)
    return tokens, tokens != 0, labels


class Model(nn.Module):
    def __init__(self, kind, rope):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 24)
        self.spans = LAYERS[kind](24, 3, 16, rope=rope)


@pytest.mark.parametrize("rope", [True, False])
@both_layers
def test_training(kind, rope, device):
    """A tiny model learns nested spans to a perfect F1 on sentences that it has not seen; the loss falls."""
    source = random.Random(0)
    model = Model(kind, rope).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    losses = []
    for _ in range(150):
        tokens, mask, labels = make_batch(source, 32, device)
        loss = model.spans.loss(model.embedding(tokens), labels, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(math.isfinite(loss) and loss >= 0 for loss in losses)
    assert sum(losses[100:]) < 0.02 * sum(losses[:50])
    tokens, mask, labels = make_batch(source, 100, device)
    spans, _ = model.spans.decode(model.embedding(tokens), mask)
    expected = sorted(map(tuple, labels.tolist()))
    nested = sum(a[0] == b[0] and a[2] < b[2] and b[3] < a[3] for a, b in itertools.product(expected, expected))
    assert nested > 10
    assert list(map(tuple, spans.tolist())) == expected
