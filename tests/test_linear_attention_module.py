"""The layer LinearAttention: in the place of nn.MultiheadAttention, in torch's transformer layers, and decoding."""

import copy
import math
import pickle

import pytest
import torch
from tools import assert_same
from torch import nn

from fastnlp_ops import LinearAttention, linear_attention, reference

B, T, E, H = 3, 9, 12, 3
FORMS = {
    "plain": {},
    "without bias": {"bias": False},
    "softmax": {"feature_map": "softmax"},
    "other channels": {"kdim": 5, "vdim": 7},
    "time first": {"batch_first": False},
}


def make_layer(device, **options):
    options = {"batch_first": True} | options
    layer = LinearAttention(E, H, **options, device=device)
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)  # torch begins with zeros
    return layer


def make_inputs(layer, device, length=T):
    x = torch.randn(B, T, E, device=device)
    if layer.in_proj_weight is not None:
        return x, x, x
    return x, torch.randn(B, length, layer.kdim, device=device), torch.randn(B, length, layer.vdim, device=device)


def padding(device):
    """[B, T] as torch means it: True is padding."""
    return torch.arange(T, device=device) >= torch.tensor([[9], [5], [2]], device=device)


def manual(layer, query, key, value, kept=None, causal=False):
    """The layer from its weights, over the reference; tensors are [B, T, E]."""
    if layer.in_proj_weight is None:
        weights = layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight
    else:
        weights = layer.in_proj_weight.chunk(3)
    biases = (0, 0, 0) if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    projected = [x @ w.T + b for x, w, b in zip((query, key, value), weights, biases, strict=True)]
    q, k, v = (x.unflatten(-1, (H, -1)) for x in projected)
    options = {"feature_map": layer.feature_map, "causal": causal, "key_padding_mask": kept}
    out = reference.linear_attention(q, k, v, **options).flatten(2) @ layer.out_proj.weight.T
    return out if layer.out_proj.bias is None else out + layer.out_proj.bias


def near(actual, expected, limit=2e-6):
    torch.testing.assert_close(actual, expected, rtol=limit, atol=limit)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forward(form, causal, device):
    """Torch's masks, bool and float; unbatched; either layout."""
    layer = make_layer(device, **FORMS[form])
    inputs, padded = make_inputs(layer, device), padding(device)
    expected = manual(layer, *inputs, ~padded, causal)
    given = inputs
    if not layer.batch_first:
        swapped = inputs[0].transpose(0, 1)
        given = (swapped, swapped, swapped)

    def call(mask, *tensors):
        out, weights = layer(*tensors, key_padding_mask=mask, is_causal=causal)
        assert weights is None
        return out if layer.batch_first or tensors[0].dim() == 2 else out.transpose(0, 1)

    near(call(padded, *given), expected)
    additive = torch.zeros(B, T, device=device).masked_fill(padded, -math.inf)
    assert_same(call(additive, *given), call(padded, *given))
    assert_same(call(additive.clamp(min=-1e9), *given), call(padded, *given))
    near(call(None, *given), manual(layer, *inputs, None, causal))
    near(call(padded[1], *(x[1] for x in inputs)), expected[1])


def test_cross_attention(device):
    layer = make_layer(device, kdim=5, vdim=7)
    inputs = make_inputs(layer, device, length=4)
    near(layer(*inputs)[0], manual(layer, *inputs))


def test_keys_that_are_not_the_queries(device):
    layer = make_layer(device)
    x, y = torch.randn(2, B, T, E, device=device)
    near(layer(x, y, y)[0], manual(layer, x, y, y))


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 5}, {"vdim": 7, "batch_first": True}])
def test_state_dict(options, device):
    """Both ways between the two, strictly."""
    theirs = nn.MultiheadAttention(E, H, dropout=0.1, **options).to(device)
    ours = LinearAttention(E, H, **options, device=device)
    ours.load_state_dict(theirs.state_dict())
    for name, parameter in theirs.named_parameters():
        assert_same(ours.get_parameter(name), parameter)
    theirs.load_state_dict(ours.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_initial_weights(device):
    """Those that torch's layer draws from the same seed."""
    drawn = []
    for kind in (nn.MultiheadAttention, LinearAttention):
        torch.manual_seed(3)
        drawn.append(kind(E, H).state_dict())
    for name, parameter in drawn[0].items():
        assert_same(drawn[1][name], parameter)


def encoder_layer(device, attention, **options):
    layer = nn.TransformerEncoderLayer(E, H + 1, 16, dropout=0.0, batch_first=True, **options).to(device)
    layer.self_attn = attention
    return layer


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer(norm_first, grad, device):
    """In eval mode too, where torch's fused path would compute softmax attention from the layer's weights."""
    attention = LinearAttention(E, 4, batch_first=True, device=device)  # even heads, as the fused path wants
    layer = encoder_layer(device, attention, norm_first=norm_first)
    x, padded = torch.randn(B, T, E, device=device), padding(device)
    with torch.set_grad_enabled(grad):
        for mask in (None, padded):
            trained, evaluated = layer.train()(x, src_key_padding_mask=mask), layer.eval()(x, src_key_padding_mask=mask)
            assert_same(evaluated, trained)
        inner = layer.norm1(x) if norm_first else x
        mixed = x + attention(inner, inner, inner, key_padding_mask=padded)[0]
        if norm_first:
            expected = mixed + layer._ff_block(layer.norm2(mixed))
        else:
            mixed = layer.norm1(mixed)
            expected = layer.norm2(mixed + layer._ff_block(mixed))
        near(evaluated, expected)


def test_encoder(device):
    """A stack of them, with torch's way to say causal; padding of one text changes no other."""
    attention = LinearAttention(E, 4, batch_first=True, device=device)
    encoder = nn.TransformerEncoder(encoder_layer(device, attention), 2, enable_nested_tensor=False).to(device).eval()
    x, padded = torch.randn(B, T, E, device=device), padding(device)
    with torch.no_grad():
        out = encoder(x, src_key_padding_mask=padded)
        for b, length in enumerate((~padded).sum(1).tolist()):
            near(out[b, :length], encoder(x[b : b + 1, :length])[0])
        causal = encoder(x, mask=nn.Transformer.generate_square_subsequent_mask(T, device=device))
        near(causal[:, :4], encoder(x[:, :4], is_causal=True))
        assert (causal - encoder(x)).abs().max() > 1e-3


def test_decoder_layer(device):
    layer = nn.TransformerDecoderLayer(E, 4, 16, dropout=0.0, batch_first=True).to(device).eval()
    layer.self_attn, layer.multihead_attn = (LinearAttention(E, 4, batch_first=True, device=device) for _ in range(2))
    x, memory = torch.randn(B, T, E, device=device), torch.randn(B, 5, E, device=device)
    mask = nn.Transformer.generate_square_subsequent_mask(T, device=device)
    out = layer(x, memory, tgt_mask=mask, tgt_is_causal=True)
    mixed = layer.norm1(x + layer.self_attn(x, x, x, is_causal=True)[0])
    mixed = layer.norm2(mixed + layer.multihead_attn(mixed, memory, memory)[0])
    near(out, layer.norm3(mixed + layer._ff_block(mixed)))


@pytest.mark.parametrize("feature_map", ["elu+1", "exp", "softmax", "cosine+1", "relu^2"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_decoding(batch_first, feature_map, device):
    """Text in parts and token by token is the text in one pass; the state stays as large as it was."""
    layer = make_layer(device, batch_first=batch_first, feature_map=feature_map)
    x = torch.randn(B, T, E, device=device)
    expected = layer(*[x if batch_first else x.transpose(0, 1)] * 3, is_causal=True)[0]
    expected = expected if batch_first else expected.transpose(0, 1)

    def prefill(part, state=None):
        out, state = layer.prefill(part if batch_first else part.transpose(0, 1), state)
        return out if batch_first else out.transpose(0, 1), state

    with torch.no_grad():
        first, state = prefill(x[:, :0])
        assert first.shape == (B, 0, E)
        outs = [layer.step(x[:, t], state) for t in range(2)]
        middle, state = prefill(x[:, 2:6], state)
        outs += [*middle.unbind(1)]
        size = sum(y.numel() for y in state if y is not None)
        outs += [layer.step(x[:, t], state) for t in range(6, T)]
        assert sum(y.numel() for y in state if y is not None) == size
    near(torch.stack(outs, 1), expected, 1e-5)


def test_decoding_of_padded_texts(device):
    """Padding on the left, as for generation, is not in the state."""
    layer, x = make_layer(device), torch.randn(B, T, E, device=device)
    padded = padding(device).flip(1)
    with torch.no_grad():
        _, state = layer.prefill(x.masked_fill(padded[..., None], math.nan), key_padding_mask=padded)
        token = torch.randn(B, E, device=device)
        out = layer.step(token, state)
        for b, length in enumerate((~padded).sum(1).tolist()):
            _, alone = layer.prefill(x[b : b + 1, T - length :])
            near(layer.step(token[b : b + 1], alone)[0], out[b])


def test_gradients(device):
    """By every parameter, those of the layer from the reference; through the state of an earlier part too."""
    layer, x = make_layer(device), torch.randn(B, T, E, device=device)
    weights = torch.randn(B, T, E, device=device)
    parameters = list(layer.parameters())
    expected = torch.autograd.grad((manual(layer, x, x, x, causal=True) * weights).sum(), parameters)
    early, state = layer.prefill(x[:, :4])
    late, _ = layer.prefill(x[:, 4:], state)
    for out in (layer(x, x, x, is_causal=True)[0], torch.cat([early, late], 1)):
        for ours, theirs in zip(torch.autograd.grad((out * weights).sum(), parameters), expected, strict=True):
            near(ours, theirs, 2e-5)


def test_step_under_grad_mode(device):
    layer = make_layer(device)
    _, state = layer.prefill(torch.randn(B, 0, E, device=device))
    with pytest.raises(NotImplementedError, match="linear_attention_step has no gradient"):
        layer.step(torch.randn(B, E, device=device), state)


def test_padding_that_is_nan(device):
    layer, x, padded = make_layer(device), torch.randn(B, T, E, device=device), padding(device)
    out = layer(x, x, x, key_padding_mask=padded)[0]
    spoilt = x.masked_fill(padded[..., None], math.nan)
    assert_same(layer(spoilt, spoilt, spoilt, key_padding_mask=padded)[0][~padded], out[~padded])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype, device):
    layer = make_layer(device).to(dtype)
    x = torch.randn(B, T, E, device=device).to(dtype)
    out = layer(x, x, x)[0]
    assert out.dtype == dtype
    exact = copy.deepcopy(layer).double()
    error = (out.double() - manual(exact, *[x.double()] * 3)).abs().max().item()
    assert error <= 20 * torch.finfo(dtype).eps
    out.sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in layer.parameters())


def test_autocast(device):
    """Projections in bfloat16, the state in float32."""
    layer, x = make_layer(device), torch.randn(B, T, E, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        out, state = layer.prefill(x)
        assert out.dtype == torch.bfloat16
        with torch.no_grad():
            _, state = layer.prefill(x)
            assert layer.step(x[:, 0], state).dtype == torch.bfloat16
    assert state.kv.dtype == torch.float32
    near(out.float(), layer(x, x, x, is_causal=True)[0], 0.05)
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_compile(device):
    torch._dynamo.reset()
    layer = make_layer(device)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (T, T - 3):
        x, padded = torch.randn(B, length, E, device=device), padding(device)[:, :length]
        results = []
        for function in (compiled, layer):
            out = function(x, x, x, key_padding_mask=padded, is_causal=True)[0]
            results.append([out.detach(), *torch.autograd.grad(out.square().sum(), list(layer.parameters()))])
        for ours, expected in zip(*results, strict=True):
            near(ours, expected, 1e-6)


def test_copies(device):
    layer, x = make_layer(device, feature_map="relu"), torch.randn(B, T, E, device=device)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same(copied(x, x, x)[0], layer(x, x, x)[0])
        with torch.no_grad():
            inside = encoder_layer(device, copied)
            assert_same(inside.eval()(x), inside.train()(x))  # torch's fused softmax attention is not taken
    assert repr(layer).startswith("LinearAttention(\n  12, 3, batch_first=True, feature_map='relu'\n")


def test_same_as_the_function(device):
    """To the bit: the layer adds nothing but its projections."""
    layer, x = make_layer(device, bias=False), torch.randn(B, T, E, device=device)
    for parameter in (*layer.in_proj_weight.data.chunk(3), layer.out_proj.weight.data):
        parameter.copy_(torch.eye(E))
    split = x.unflatten(-1, (H, E // H))
    assert_same(layer(x, x, x)[0], linear_attention(split, split, split).flatten(2))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_heads": 5}, "embed_dim must be a multiple of num_heads, got 12 and 5"),
        ({"num_heads": 0}, "embed_dim must be a multiple of num_heads, got 12 and 0"),
        ({"dropout": 0.1}, "dropout must be 0, for linear attention has no weights to drop, got 0.1"),
        ({"add_bias_kv": True}, "add_bias_kv and add_zero_attn must be False: linear attention adds no keys"),
        ({"add_zero_attn": True}, "add_bias_kv and add_zero_attn must be False: linear attention adds no keys"),
    ],
)
def test_errors_of_the_constructor(options, sentence):
    with pytest.raises(ValueError) as caught:
        LinearAttention(**({"embed_dim": E, "num_heads": H} | options))
    assert str(caught.value) == sentence


def test_errors():
    layer, x = make_layer("cpu"), torch.randn(B, T, E)
    square = torch.zeros(T, T)
    for call, sentence in (
        (lambda: layer(x, x, x, need_weights=True), "need_weights must be False: linear attention computes no weights"),
        (
            lambda: layer(x, x, x, attn_mask=square),
            "attn_mask must be None, or the causal one with is_causal=True: no other is linear",
        ),
        (lambda: layer(x[..., :4], x, x), "query must be [B, T, 12] or [T, 12], got shape (3, 9, 4)"),
        (lambda: layer(x, x[0, 0], x), "key must be [B, T, 12] or [T, 12], got shape (12,)"),
        (lambda: layer(x, x[0], x[0]), "query, key and value must be batched or not alike, got 3, 2 and 2 dimensions"),
        (lambda: layer(x, x, x, x[0, :, 0]), "key_padding_mask must be [B, Tk] = (3, 9), got shape (9,)"),
        (lambda: layer.prefill(x[0]), "x must be [B, T, 12], got shape (9, 12)"),
        (lambda: layer.step(x, None), "x must be [B, 12], got shape (3, 9, 12)"),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == sentence
    with pytest.raises(TypeError, match=r"^key_padding_mask must be bool or floating point, got torch\.int64$"):
        layer(x, x, x, torch.ones(B, T, dtype=torch.int64))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        for one in self.encoder.layers:
            one.self_attn = LinearAttention(32, 4, batch_first=True)
        self.output = nn.Linear(32, 16)

    def forward(self, tokens):
        return self.output(self.encoder(self.embedding(tokens)))


def test_training(device):
    """Each position says which token is the most frequent of the text: nothing but attention can know."""
    model = Model().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(120):
        answer = torch.randint(16, (32, 1), device=device)
        tokens = torch.randint(16, (32, 12), device=device)
        tokens = torch.where(torch.rand(32, 12, device=device) < 0.5, answer, tokens)
        scores = model(tokens)
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), answer.expand(-1, 12).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.8  # of log(16) = 2.8; a model that sees one token at a time reaches 1.9
    assert model.encoder.layers[0].self_attn.in_proj_weight.grad.abs().max() > 0
