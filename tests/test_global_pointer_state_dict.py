"""Peers' layers, restated here in plain PyTorch, and ours with their parameters: equal scores at valid cells."""

import math

import numpy as np
import pytest
import torch

import fastnlp_ops
from fastnlp_ops import EfficientGlobalPointer, GlobalPointer, convert_global_pointer_state_dict

D, H, d, B, n = 10, 3, 4, 2, 7
LAYOUTS = ["bert4keras", "bert4torch", "gaohongkui", "xhw205", "JunnYu", "PaddleNLP", "ark-nlp"]
STANDARD = [layout for layout in LAYOUTS if layout != "PaddleNLP"]
EFFICIENT = [layout for layout in LAYOUTS if layout != "gaohongkui"]
NAMES = {
    "bert4keras": ("dense", "p_dense", "q_dense"),
    "bert4torch": ("dense", "p_dense", "q_dense"),
    "gaohongkui": ("dense", None, None),
    "xhw205": ("dense", "dense_1", "dense_2"),
    "JunnYu": ("dense", "dense1", "dense2"),
    "PaddleNLP": (None, "dense1", "dense2"),
    "ark-nlp": ("dense", "dense_1", "dense_2"),
}


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def rotate(x):
    """RoPE as all peers have it: pairs (2m, 2m+1), sines and cosines repeated as (c0, c0, c1, c1, ..)."""
    position = torch.arange(x.shape[1], dtype=torch.float64)
    angle = position[:, None] * torch.pow(10000.0, -2 * torch.arange(d // 2, dtype=torch.float64) / d)
    cos, sin = (f(angle).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))  # [n, d]
    cos, sin = (t.reshape(n, *[1] * (x.dim() - 3), d) for t in (cos, sin))
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape) * sin


def affine(state, name, x, in_out=False):
    weight = state[f"{name}.kernel" if f"{name}.kernel" in state else f"{name}.weight"]
    y = x @ (weight if in_out else weight.T)
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def standard_scores(layout, state, x, rope):
    """[B, H, n, n]. gaohongkui, xhw205: split(2 d) and stack; bert4torch: chunk; JunnYu: reshape. One meaning."""
    y = affine(state, "dense", x, in_out=layout == "bert4keras")
    y = torch.stack(torch.split(y, 2 * d, -1), -2)  # [B, n, H, 2 d]
    q, k = y[..., :d], y[..., d:]
    if rope:
        q, k = rotate(q), rotate(k)
    return torch.einsum("bmhd,bnhd->bhmn", q, k) / d**0.5


def efficient_scores(layout, state, x, rope):
    _, projection, biases = NAMES[layout]
    in_out = layout in ("bert4keras", "PaddleNLP")
    y = affine(state, projection, x, in_out)
    if layout in ("bert4torch", "ark-nlp"):
        q, k = y[..., :d], y[..., d:]
    else:
        q, k = y[..., ::2], y[..., 1::2]
    if rope:
        q, k = rotate(q), rotate(k)
    scores = torch.einsum("bmd,bnd->bmn", q, k)[:, None] / d**0.5
    bias = affine(state, biases, x if layout == "xhw205" else y, in_out) / 2  # [B, n, 2 H]
    if layout == "bert4torch":
        bias = torch.stack(torch.chunk(bias, H, -1), -2).transpose(1, 2)  # [B, H, n, 2]
        return scores + bias[..., :1] + bias[..., 1:].transpose(2, 3)
    bias = bias.transpose(1, 2)  # [B, 2 H, n]
    if layout == "ark-nlp":
        return scores + bias[:, :H, None] + bias[:, H:, :, None]
    return scores + bias[:, ::2, None] + bias[:, 1::2, :, None]


def linear(layout, name, inputs, outputs, use_bias):
    in_out = layout in ("bert4keras", "PaddleNLP")
    weight = random(inputs, outputs) if in_out else random(outputs, inputs)
    state = {f"{name}.kernel" if layout == "bert4keras" else f"{name}.weight": weight}
    return state | ({f"{name}.bias": random(outputs)} if use_bias else {})


def peer_state(layout, efficient, use_bias=True):
    dense, projection, biases = NAMES[layout]
    if not efficient:
        return linear(layout, dense, D, 2 * H * d, use_bias)
    inputs = D if layout == "xhw205" else 2 * d
    return linear(layout, projection, D, 2 * d, use_bias) | linear(layout, biases, inputs, 2 * H, use_bias)


def our_layer(layout, efficient, **options):
    if efficient:
        return EfficientGlobalPointer(D, H, d, bias_from_hidden=layout == "xhw205", **options).double()
    return GlobalPointer(D, H, d, **options).double()


def assert_same_scores(layer, peer_scores, x):
    """Equal where a span is valid; how a peer marks those that are not is its own affair."""
    ours = layer(x)
    valid = torch.ones(n, n, dtype=torch.bool).triu() if layer.tril_mask else torch.ones(n, n, dtype=torch.bool)
    assert (ours[..., ~valid] == -math.inf).all()
    torch.testing.assert_close(ours[..., valid], peer_scores[..., valid])


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize(
    ("layout", "efficient"),
    [(layout, False) for layout in STANDARD] + [(layout, True) for layout in EFFICIENT],
)
def test_layouts(layout, efficient, rope, use_bias):
    state, x = peer_state(layout, efficient, use_bias), random(B, n, D)
    peer_scores = (efficient_scores if efficient else standard_scores)(layout, state, x, rope)
    for tril_mask in (True, False):
        layer = our_layer(layout, efficient, rope=rope, use_bias=use_bias, tril_mask=tril_mask)
        layer.load_peer_state_dict(state, layout)
        assert_same_scores(layer, peer_scores, x)


@pytest.mark.parametrize("theirs", EFFICIENT)
@pytest.mark.parametrize("claimed", EFFICIENT)
def test_a_layout_is_not_another(claimed, theirs):
    """Equal shapes, another meaning: under another peer's name the scores are wrong, or loading is refused."""
    same = [{"JunnYu"}, {"bert4keras", "PaddleNLP"}]  # [in, out] aside, all mean what bert4keras means
    state, x = peer_state(theirs, True), random(B, n, D)
    scores = efficient_scores(theirs, state, x, True)
    renamed = {}
    for key, value in state.items():
        name, kind = key.split(".")
        name = NAMES[claimed][NAMES[theirs].index(name)]
        kind = "bias" if kind == "bias" else "kernel" if claimed == "bert4keras" else "weight"
        renamed[f"{name}.{kind}"] = value
    layer = our_layer(claimed, True)
    try:
        layer.load_peer_state_dict(renamed, claimed)
    except ValueError:
        assert claimed != theirs
        return
    ours = layer(x)
    valid = torch.ones(n, n, dtype=torch.bool).triu()
    equal = torch.allclose(ours[..., valid], scores[..., valid])
    assert equal == (claimed == theirs or any({claimed, theirs} <= group for group in same))


@pytest.mark.parametrize("layout", EFFICIENT)
def test_plain_loading_is_refused(layout):
    """load_state_dict of a peer's efficient layer: another meaning in equal shapes must not load in silence."""
    layer = our_layer(layout, True)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"dense.weight\""):
        layer.load_state_dict(peer_state(layout, True))


@pytest.mark.parametrize("layout", ["bert4torch", "xhw205", "gaohongkui", "JunnYu", "ark-nlp"])
def test_plain_loading_of_the_standard_form(layout):
    state, x = peer_state(layout, False), random(B, n, D)
    layer = our_layer(layout, False)
    layer.load_state_dict(state)
    assert_same_scores(layer, standard_scores(layout, state, x, True), x)


def test_prefix():
    """A GPLinker model has three layers of one kind, and an encoder full of layers called dense."""
    heads = {name: peer_state("JunnYu", True) for name in ("entity_output", "head_output", "tail_output")}
    model = {f"{head}.{key}": value for head, state in heads.items() for key, value in state.items()}
    model["encoder.layer.0.dense1.weight"] = random(5, 5)
    x = random(B, n, D)
    for head, state in heads.items():
        layer = our_layer("JunnYu", True)
        layer.load_peer_state_dict(model, "JunnYu", prefix=f"{head}.")
        assert_same_scores(layer, efficient_scores("JunnYu", state, x, True), x)
    with pytest.raises(ValueError) as caught:
        our_layer("JunnYu", True).load_peer_state_dict(model, "JunnYu")
    assert str(caught.value) == (
        "state_dict of layout JunnYu must have one key 'dense1.weight', got entity_output.dense1.weight, "
        "head_output.dense1.weight, tail_output.dense1.weight, encoder.layer.0.dense1.weight"
    )


def test_model_that_is_the_layer():
    """gaohongkui and xhw205: the model has the layer's `dense` beside an encoder's."""
    state = peer_state("gaohongkui", False)
    model = {f"encoder.encoder.layer.{i}.output.dense.weight": random(5, 5) for i in range(3)} | state
    converted = convert_global_pointer_state_dict(model, "gaohongkui")
    assert list(converted) == ["dense.weight", "dense.bias"]
    assert torch.equal(converted["dense.weight"], state["dense.weight"])


@pytest.mark.parametrize("prefix", ["", "efficient_global_pointer_1/"])
def test_keras_names_and_arrays(prefix):
    state, x = peer_state("bert4keras", True), random(B, n, D)
    arrays = {f"efficient_global_pointer_1/{key.replace('.', '/')}:0": value.numpy() for key, value in state.items()}
    layer = our_layer("bert4keras", True)
    layer.load_peer_state_dict(arrays, "bert4keras", prefix=prefix)
    assert_same_scores(layer, efficient_scores("bert4keras", state, x, True), x)


@pytest.mark.parametrize("layout", EFFICIENT)
def test_result_is_new_tensors(layout):
    """Contiguous, in the peer's dtype, no graph, nothing shared: training ours does not train the peer."""
    state = {key: value.float().requires_grad_() for key, value in peer_state(layout, True).items()}
    converted = convert_global_pointer_state_dict(state, layout, efficient=True)
    assert list(converted) == ["dense.weight", "dense.bias", "bias_dense.weight", "bias_dense.bias"]
    taken = {value.untyped_storage().data_ptr() for value in state.values()}
    for tensor in converted.values():
        assert tensor.untyped_storage().data_ptr() not in taken
        assert tensor.is_contiguous()
        assert tensor.dtype == torch.float32
        assert not tensor.requires_grad


def test_xhw205_biases_are_another_function():
    """W2 x of any x is V (W1 x + b) of no V where W2 has rows outside W1's span: it cannot be converted."""
    state = peer_state("xhw205", True)
    first, second = state["dense_1.weight"], state["dense_2.weight"]
    best = torch.linalg.lstsq(first.T, second.T).solution.T
    assert (best @ first - second).abs().max() > 0.1
    with pytest.raises(ValueError) as caught:
        EfficientGlobalPointer(D, H, d).load_peer_state_dict(state, "xhw205")
    assert str(caught.value) == (
        "layout xhw205 makes biases from the hidden states: the layer needs bias_from_hidden=True"
    )
    with pytest.raises(ValueError) as caught:
        EfficientGlobalPointer(D, H, d, bias_from_hidden=True).load_peer_state_dict(state, "JunnYu")
    assert str(caught.value) == "bias_from_hidden=True is the form of layout xhw205 alone, got 'JunnYu'"


@pytest.mark.parametrize(
    ("shapes", "options", "sentence"),
    [
        (
            {},
            {"layout": "powerycy"},
            (
                "layout must be one of bert4keras, bert4torch, gaohongkui, xhw205, JunnYu, PaddleNLP, ark-nlp, "
                "got 'powerycy'"
            ),
        ),
        (
            {"dense1.weight": (6, 8)},
            {"layout": "PaddleNLP"},
            "layout PaddleNLP has no standard form: its GlobalPointer is the efficient one",
        ),
        ({}, {"layout": "gaohongkui", "efficient": True}, "layout gaohongkui has no efficient form"),
        (
            {"p_dense.weight": (8, 6)},
            {"layout": "bert4torch"},
            "state_dict of layout bert4torch must have one key 'dense.weight', got p_dense.weight",
        ),
        (
            {f"encoder.layer.{i}.weight": (1, 1) for i in range(12)},
            {"layout": "JunnYu", "prefix": "head."},
            (
                "state_dict of layout JunnYu must have one key 'dense.weight' behind 'head.', got "
                + ", ".join(f"encoder.layer.{i}.weight" for i in range(8))
                + " and 4 more"
            ),
        ),
        ({"dense.weight": (8,)}, {"layout": "JunnYu"}, "dense.weight must be a matrix, got shape (8,)"),
        ({"dense.kernel": (6, 8, 1)}, {"layout": "bert4keras"}, "dense.kernel must be a matrix, got shape (6, 8, 1)"),
        (
            {"dense.weight": (8, 6)},
            {"layout": "JunnYu"},
            "state_dict of layout JunnYu must have one key 'dense.bias', got dense.weight",
        ),
        (
            {"dense.weight": (8, 6), "dense.bias": (8,)},
            {"layout": "JunnYu", "use_bias": False},
            "state_dict must have no key dense.bias where use_bias is false, got dense.bias",
        ),
        (
            {"dense.kernel": (6, 8), "dense.bias": (6,)},
            {"layout": "bert4keras"},
            "dense.bias must be [8], got shape (6,)",
        ),
        (
            {"dense1.weight": (7, 6), "dense1.bias": (7,)},
            {"layout": "JunnYu", "efficient": True},
            "dense1 must have an even number of outputs, got 7",
        ),
        (
            {"dense1.weight": (8, 6), "dense1.bias": (8,), "dense2.weight": (5, 8), "dense2.bias": (5,)},
            {"layout": "JunnYu", "efficient": True},
            "dense2 must have an even number of outputs, got 5",
        ),
        (
            {"dense1.weight": (8, 6), "dense1.bias": (8,), "dense2.weight": (4, 6), "dense2.bias": (4,)},
            {"layout": "JunnYu", "efficient": True},
            "dense2 must have 8 inputs, got 6",
        ),
        (
            {"dense_1.weight": (8, 6), "dense_1.bias": (8,), "dense_2.weight": (4, 8), "dense_2.bias": (4,)},
            {"layout": "xhw205", "efficient": True},
            "dense_2 must have 6 inputs, got 8",
        ),
    ],
)
def test_errors(shapes, options, sentence):
    with pytest.raises(ValueError) as caught:
        convert_global_pointer_state_dict({name: torch.zeros(shape) for name, shape in shapes.items()}, **options)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("layout", ["JunnYu", "PaddleNLP"])
def test_shapes_of_another_layer(layout):
    """A head more, another head size, a state dict of [in, out] read as [out, in]."""
    state = peer_state(layout, True)
    for sizes, name, shapes in (
        ((D, H + 1, d), "bias_dense.weight", ((8, 8), (6, 8))),
        ((D, H, d + 2), "dense.weight", ((12, 10), (8, 10))),
        ((D + 1, H, d), "dense.weight", ((8, 11), (8, 10))),
    ):
        layer = EfficientGlobalPointer(*sizes)
        before = {key: value.clone() for key, value in layer.state_dict().items()}
        with pytest.raises(ValueError) as caught:
            layer.load_peer_state_dict(state, layout)
        assert (
            str(caught.value) == f"{name} must be {list(shapes[0])} for this layer, got shape {shapes[1]} from {layout}"
        )
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    turned = {key: value.t().contiguous() for key, value in state.items()}
    with pytest.raises(ValueError, match=r"must (be|have)"):
        EfficientGlobalPointer(D, H, d).load_peer_state_dict(turned, layout)


def test_load_keeps_dtype_and_training_state():
    layer = our_layer("PaddleNLP", True).float()
    arrays = {key: value.numpy().astype(np.float32) for key, value in peer_state("PaddleNLP", True).items()}
    layer.load_peer_state_dict(arrays, "PaddleNLP")
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in layer.parameters())
    assert torch.equal(layer.dense.weight, torch.as_tensor(arrays["dense1.weight"]).T)
    assert fastnlp_ops.GlobalPointer(D, H, d).load_peer_state_dict(peer_state("JunnYu", False), "JunnYu") is None
