"""What callers of nn.MultiheadAttention rely on holds for LinearAttention: attributes, resets, fast paths, LoRA."""

import copy
import pickle

import pytest
import torch
from tools import assert_same
from torch import nn
from torch.func import functional_call

from fastnlp_ops import LinearAttention

B, T, E, H = 3, 9, 12, 4
FORMS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "without bias": {"bias": False},
    "keys of another width": {"kdim": 5},
    "values of another width": {"vdim": 7, "batch_first": True},
    "float64": {"dtype": torch.float64},
}

nested_warning = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


def padding(device):
    """[B, T], True is padding, as torch has it."""
    return torch.arange(T, device=device) >= torch.tensor([[9], [5], [2]], device=device)


def drawn(kind, seed, **options):
    torch.manual_seed(seed)
    return kind(E, H, **options)


@pytest.mark.parametrize("form", FORMS)
def test_attributes(form):
    """Every attribute and parameter of torch's layer, of the same value or shape; nothing else but the feature map."""
    theirs, ours = (drawn(kind, 1, **FORMS[form]) for kind in (nn.MultiheadAttention, LinearAttention))
    found = {name: x for name, x in vars(ours).items() if "hook" not in name}
    expected = {name: x for name, x in vars(theirs).items() if "hook" not in name}
    assert found.pop("feature_map") == "elu+1"
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name not in ("_parameters", "_modules"):
            assert found[name] == value, name
    for part in ("_parameters", "_modules"):
        assert getattr(ours, part).keys() == getattr(theirs, part).keys()
    for name, value in theirs._parameters.items():
        parameter = getattr(ours, name)
        assert (parameter is None) == (value is None), name
        if value is not None:
            assert_same(parameter, value)
    assert type(ours.out_proj) is type(theirs.out_proj)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("start", ["reset", "meta"])
def test_reset_parameters(start, form):
    """Draws what torch's layer draws, over weights of any origin."""
    options = FORMS[form]
    theirs = drawn(nn.MultiheadAttention, 5, **options)
    if start == "meta":
        with torch.device("meta"):
            ours = LinearAttention(E, H, **options)
        ours.to_empty(device="cpu")
    else:
        ours = LinearAttention(E, H, **options)
    for parameter in ours.parameters():
        nn.init.constant_(parameter, float("nan"))
    nn.init.constant_(theirs.out_proj.weight, 0.25)  # neither reset touches it
    nn.init.constant_(ours.out_proj.weight, 0.25)
    torch.manual_seed(9)
    theirs._reset_parameters()
    torch.manual_seed(9)
    ours._reset_parameters()
    for name, parameter in theirs.named_parameters():
        assert_same(ours.get_parameter(name), parameter, name)


def encoder_layer(device, attention, **options):
    layer = nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True, **options).to(device)
    layer.self_attn = attention
    return layer


def copies(layer):
    return {"itself": layer, "deepcopy": copy.deepcopy(layer), "pickle": pickle.loads(pickle.dumps(layer))}


@pytest.mark.parametrize("kind", ["itself", "deepcopy", "pickle"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_fast_path_is_not_taken(norm_first, kind, device):
    """It computes softmax attention from the weights: eval mode without gradients must give what training gives."""
    attention = copies(LinearAttention(E, H, batch_first=True, device=device))[kind]
    layer, x = encoder_layer(device, attention, norm_first=norm_first), torch.randn(B, T, E, device=device)
    softmax = encoder_layer(device, nn.MultiheadAttention(E, H, batch_first=True, device=device)).eval()
    softmax.load_state_dict(layer.state_dict())
    for mask in (None, padding(device)):
        expected = layer.train()(x, src_key_padding_mask=mask)
        with torch.no_grad(), torch.inference_mode():
            assert_same(layer.eval()(x, src_key_padding_mask=mask), expected.detach())
            assert (softmax(x, src_key_padding_mask=mask) - expected).abs().max() > 1e-2


@nested_warning
@pytest.mark.parametrize("replaced", ["before", "after"])
def test_encoder_makes_nested_tensors(replaced, device):
    """nn.TransformerEncoder takes padding out in eval mode, whether its layers got the attention before or after."""
    layer = nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True).to(device)
    attentions = [LinearAttention(E, H, batch_first=True, device=device) for _ in range(2)]
    if replaced == "before":
        layer.self_attn = attentions[0]
    encoder = nn.TransformerEncoder(layer, 2).to(device)
    if replaced == "after":
        for one, attention in zip(encoder.layers, attentions, strict=True):
            one.self_attn = attention
    seen = []
    for one in encoder.layers:
        one.self_attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_nested))
    x, padded = torch.randn(B, T, E, device=device), padding(device)
    expected = encoder.train()(x, src_key_padding_mask=padded)
    with torch.no_grad():
        out = encoder.eval()(x, src_key_padding_mask=padded)
    assert seen == [False, False, True, True]
    torch.testing.assert_close(out[~padded], expected[~padded], rtol=1e-5, atol=1e-6)
    assert (out[padded] == 0).all()  # as torch's


@nested_warning
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout, causal, device):
    layer = LinearAttention(E, H, batch_first=True, device=device)
    texts = [torch.randn(n, E, device=device) for n in (4, 1, 7)]
    nested = torch.nested.nested_tensor(texts, layout=layout)
    out = layer(nested, nested, nested, is_causal=causal)[0]
    assert (out + nested).is_nested
    for found, text in zip(out.unbind(), texts, strict=True):
        torch.testing.assert_close(found, layer(text, text, text, is_causal=causal)[0], rtol=1e-5, atol=1e-6)


@nested_warning
def test_errors_of_nested_tensors():
    layer, other = LinearAttention(E, H, batch_first=True), LinearAttention(E, H)
    nested = torch.nested.nested_tensor([torch.randn(n, E) for n in (4, 2)])
    narrow = torch.nested.nested_tensor([torch.randn(n, 5) for n in (4, 2)])
    plain = torch.randn(2, 4, E)
    whole = "a nested tensor must be query, key and value in one, batch_first and without a mask"
    for call, sentence in (
        (lambda: layer(nested, plain, plain), whole),
        (lambda: layer(plain, nested, nested), whole),
        (lambda: layer(nested, nested, nested, torch.zeros(2, 4, dtype=torch.bool)), whole),
        (lambda: other(nested, nested, nested), whole),
        (lambda: layer(narrow, narrow, narrow), "x must be [B, T, 12], got shape (1, 6, 5)"),
        (lambda: layer.prefill(nested), "x must not be nested: prefill and step take padded texts"),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == sentence


def test_in_a_pretrained_model(tmp_path):
    """transformers resets every nn.MultiheadAttention of a model, and again those that a checkpoint lacks."""
    transformers = pytest.importorskip("transformers")

    class Model(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config, bias=True):
            super().__init__(config)
            self.attention = LinearAttention(E, H, batch_first=True)
            self.second = LinearAttention(E, H) if bias else None
            self.post_init()

    model = Model(transformers.PretrainedConfig(), bias=False)
    assert model.attention.in_proj_weight.abs().max() > 0
    nn.init.constant_(model.attention.in_proj_bias, 0.5)
    model.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        assert_same(loaded.get_parameter(name).detach(), parameter.detach(), name)
    for name, parameter in loaded.second.named_parameters():
        assert parameter.isfinite().all(), name
    assert (loaded.second.in_proj_bias == 0).all()
    assert 0 < loaded.second.in_proj_weight.abs().max() <= (6 / (4 * E)) ** 0.5  # Xavier's


class Classifier(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.head = nn.Linear(E, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def lora(model, **options):
    peft = pytest.importorskip("peft")
    options = {"r": 2, "target_modules": ["attention", "self_attn"], "init_lora_weights": False} | options
    return peft.get_peft_model(model, peft.LoraConfig(**options))


def by_definition(base, wrapped, x):
    """The model with the weights that peft merges for a call, of which they are differentiable functions."""
    layer, weights = wrapped.base_model.model.attention.base_layer, dict(base.named_parameters())

    def take(_, __):
        weights["attention.in_proj_weight"] = layer.in_proj_weight
        weights["attention.out_proj.weight"] = layer.out_proj.weight

    hook = layer.register_forward_pre_hook(take)
    wrapped(x)
    hook.remove()
    return functional_call(base, weights, (x,))


def test_lora(device):
    """Output and gradients are those of the merged weights; training moves the adapters, and nothing else."""
    base = Classifier(LinearAttention(E, H, batch_first=True)).to(device)
    wrapped, x = lora(copy.deepcopy(base)), torch.randn(B, T, E, device=device)
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(trained) == 4  # A and B of the input and of the output projections
    assert all("lora_" in name for name in trained)
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters()}
    out, expected = wrapped(x), by_definition(base, wrapped, x)
    torch.testing.assert_close(out, expected)
    assert (out - base(x)).abs().max() > 1e-3
    grads = torch.autograd.grad(out.square().sum(), list(trained.values()))
    wanted = torch.autograd.grad(expected.square().sum(), list(trained.values()))
    for name, found, right in zip(trained, grads, wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5, msg=name)
    optimizer = torch.optim.SGD(trained.values(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(x).square().sum().backward()
        optimizer.step()
    for name, parameter in wrapped.named_parameters():
        moved = (parameter - before[name]).abs().max()
        assert moved > 1e-4 if name in trained else moved < 1e-5, name  # rounding: peft adds and subtracts


def test_lora_merge(device):
    base, x = Classifier(LinearAttention(E, H, batch_first=True)).to(device), torch.randn(B, T, E, device=device)
    wrapped = lora(copy.deepcopy(base))
    out = wrapped(x)
    with wrapped.disable_adapter():
        torch.testing.assert_close(wrapped(x), base(x))
    merged = wrapped.merge_and_unload()
    assert type(merged.attention) is LinearAttention
    assert merged.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(merged(x), out)
    with torch.no_grad():
        _, state = merged.attention.prefill(x[:, :4])
        token = merged.attention.step(x[:, 4], state)
    part = x[:, :5]
    torch.testing.assert_close(token, merged.attention(part, part, part, is_causal=True)[0][:, 4], rtol=1e-5, atol=1e-6)


def test_lora_in_an_encoder_layer(device):
    """Eval mode without gradients sees the adapters."""
    layer = nn.Sequential(encoder_layer(device, LinearAttention(E, H, batch_first=True, device=device)))
    wrapped, x = lora(layer), torch.randn(B, T, E, device=device)
    expected = wrapped.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(wrapped.eval()(x), expected)
