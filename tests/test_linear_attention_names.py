"""Who may be given the name of linear attention in transformers: refusals, saved configs, models of one's own."""

import importlib.util
import json
import sys

import pytest
import torch
from tools import assert_same
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel  # noqa: E402
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask  # noqa: E402

from fastnlp_ops.integrations import transformers as integration  # noqa: E402
from fastnlp_ops.integrations.transformers import register, use_linear_attention  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
NAME = "fastnlp_linear"
VOCABULARY, B, T = 40, 2, 6
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
register()


def make_tokens():
    return torch.randint(3, VOCABULARY, (B, T))


def llama(**options):
    return transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **options)


OWN = {  # models that compute their own attention, and the layer that does it
    "bloom": (lambda: transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=VOCABULARY), "BloomAtt"),
    "roformer": (lambda: transformers.RoFormerConfig(**SIZES), "RoFormerSelfAttention"),
    "deberta-v2": (lambda: transformers.DebertaV2Config(**SIZES), "DisentangledSelfAttention"),
    "xlnet": (lambda: transformers.XLNetConfig(vocab_size=30, d_model=16, n_layer=1, n_head=2), "XLNetRelativeAtt"),
    "mpt": (lambda: transformers.MptConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=30), "MptAttention"),
    "gptj": (lambda: transformers.GPTJConfig(n_embd=16, n_head=2, n_layer=1, rotary_dim=4, vocab_size=30), "GPTJAtt"),
    # files that hold both kinds of attention
    "pegasus_x": (
        lambda: transformers.PegasusXConfig(
            vocab_size=30,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
        ),
        "PegasusXGlobalLocalAttention",
    ),
}


@pytest.mark.parametrize("family", OWN)
def test_own_attention(family, tmp_path):
    """Refused by name in each of the ways to give it; the model stays what it was."""
    make_config, _ = OWN[family]
    torch.manual_seed(0)
    model = AutoModel.from_config(make_config()).eval()
    kind, before = type(model), model.config._attn_implementation
    model.save_pretrained(tmp_path)

    def in_its_config():
        config = make_config()
        config._attn_implementation = NAME
        return kind(config)

    for give in (
        lambda: AutoModel.from_config(make_config(), attn_implementation=NAME),
        lambda: AutoModel.from_pretrained(tmp_path, attn_implementation=NAME),
        lambda: (
            AutoModelForCausalLM.from_config(make_config(), attn_implementation=NAME)
            if family == "bloom"
            else in_its_config()
        ),
        in_its_config,
        lambda: model.set_attn_implementation(NAME),
        lambda: use_linear_attention(model),
    ):
        with pytest.raises(ValueError, match=r"cannot use linear attention, for \w*Attention\w* computes softmax"):
            give()
    assert model.config._attn_implementation == before
    assert NAME not in json.dumps(model.config.to_dict())


def test_the_sentence():
    with pytest.raises(ValueError) as caught:
        AutoModel.from_config(OWN["bloom"][0](), attn_implementation=NAME)
    assert str(caught.value) == (
        "BloomModel cannot use linear attention, for BloomAttention computes softmax attention by itself: "
        'take attn_implementation="sdpa" or "eager" for it'
    )


def test_use_linear_attention():
    model, tokens = AutoModelForCausalLM.from_config(llama(), attn_implementation="eager").eval(), make_tokens()
    other = AutoModelForCausalLM.from_config(llama(), attn_implementation=NAME).eval()
    other.load_state_dict(model.state_dict())
    softmax = model(tokens).logits
    use_linear_attention(model)
    assert_same(model(tokens).logits, other(tokens).logits)
    assert (model(tokens).logits - softmax).abs().max() > 1e-2
    with pytest.raises(ValueError) as caught:
        use_linear_attention(model, "linear gelu")
    assert str(caught.value) == "linear gelu is not a name of linear attention: call register('linear gelu') before"
    mamba = AutoModel.from_config(
        transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(ValueError) as caught:
        use_linear_attention(mamba)
    assert str(caught.value) == "MambaModel has no attention that could become linear attention"


class OwnConfig(PretrainedConfig):
    model_type = "own"
    hidden_size = 16


class OwnModel(PreTrainedModel):
    """A model outside transformers that computes softmax attention; `read` is how it reads its mask."""

    config_class = OwnConfig

    def __init__(self, config, read, causal=True):
        super().__init__(config)
        self.projection = nn.Linear(16, 48)
        self.read, self.causal = read, causal
        self.post_init()

    def forward(self, x, attention_mask=None):
        create = create_causal_mask if self.causal else create_bidirectional_mask
        mask = create(config=self.config, inputs_embeds=x, attention_mask=attention_mask, past_key_values=None)
        q, k, v = self.projection(x)[:, None].chunk(3, -1)
        return self.read(q @ k.mT, mask).softmax(-1) @ v


READS = {
    "+": lambda scores, mask: scores + mask,
    "+ reversed": lambda scores, mask: mask + scores,
    "+=": lambda scores, mask: scores.add_(mask),
    "-": lambda scores, mask: scores - mask,
    "*": lambda scores, mask: scores * mask,
    "1 - mask": lambda scores, mask: scores - (1 - mask) * 1e9,
    "part of it": lambda scores, mask: scores + mask[:, :, :, : scores.shape[-1]],
    "masked_fill": lambda scores, mask: scores.masked_fill(mask, -1e9),
    "== 0": lambda scores, mask: scores.masked_fill(mask == 0, -1e9),
    "not": lambda scores, mask: scores.masked_fill(~mask, -1e9),
    "&": lambda scores, mask: scores.masked_fill((mask & (scores > 0)), -1e9),
    "& reversed": lambda scores, mask: scores.masked_fill(((scores > 0) & mask), -1e9),
    "where": lambda scores, mask: torch.where(mask, scores, -1e9),
    "to": lambda scores, mask: scores + mask.to(scores.dtype),
    "dtype": lambda scores, mask: scores + mask if mask.dtype.is_floating_point else scores,
    "if given": lambda scores, mask: scores if mask is None else scores + mask,
    "torch": lambda scores, mask: nn.functional.scaled_dot_product_attention(scores, scores, scores, attn_mask=mask),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("padded", [True, False])
def test_own_models_that_read_masks(padded, batch, causal, read):
    """No such model loses its causal mask, or adds bools to its scores: reading the mask is an error."""
    x, mask = torch.randn(batch, 4, 16), torch.tensor([[1, 1, 1, 0]]).expand(batch, 4) if padded else None
    model = OwnModel._from_config(OwnConfig(attn_implementation=NAME), read=READS[read], causal=causal)
    with pytest.raises((ValueError, AttributeError), match="this model computes softmax attention by itself"):
        model(x, mask)


class AttentionPool(nn.Module):
    def forward(self, x):
        return (x * x.mean(-1, keepdim=True).softmax(1)).sum(1)


class Tagger(PreTrainedModel):
    """A model of one's own over one of transformers', with attention of its own beside it."""

    config_class = transformers.LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.encoder = AutoModel.from_config(config)
        self.pool = AttentionPool()
        self.post_init()

    def forward(self, tokens):
        return self.encoder(tokens).last_hidden_state


def test_own_model_around_one_of_transformers():
    """Its own attention is its own business."""
    tokens = make_tokens()
    model = Tagger(llama(attn_implementation=NAME)).eval()
    plain = Tagger(llama(attn_implementation="eager")).eval()
    plain.load_state_dict(model.state_dict())
    out, softmax = model(tokens), plain(tokens)
    assert (out - softmax).abs().max() > 1e-2
    use_linear_attention(plain)
    torch.testing.assert_close(plain(tokens), out)


def test_models_of_several_parts():
    """A dictionary gives it to the parts that can; to all of them it is refused by the one that cannot."""
    vision = {
        "hidden_size": 16,
        "output_channels": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "mlp_dim": 16,
        "global_attn_indexes": [0],
    }
    text = SIZES | {"num_key_value_heads": 2}

    def make(name):
        config = transformers.GotOcr2Config(vision_config=vision, text_config=text | {"model_type": "qwen2"})
        return transformers.AutoModelForImageTextToText.from_config(config, attn_implementation=name)

    with pytest.raises(ValueError, match=r"GotOcr2\w* cannot use linear attention, for GotOcr2VisionAttention"):
        make(NAME)
    model = make({"text_config": NAME})
    assert model.config.text_config._attn_implementation == NAME
    assert model.config.vision_config._attn_implementation != NAME
    other = make("eager")
    with pytest.raises(ValueError, match=r"GotOcr2\w* cannot use linear attention"):
        other.set_attn_implementation({"vision_config": NAME})
    other.set_attn_implementation({"text_config": NAME})
    assert other.config.text_config._attn_implementation == NAME


@pytest.mark.parametrize("way", ["built", "set"])
def test_saved_models_keep_the_name(way, tmp_path):
    """What was trained with linear attention is loaded with it, and saved with it again, until another is asked for."""
    tokens = make_tokens()
    model = AutoModelForCausalLM.from_config(llama(), attn_implementation=NAME if way == "built" else "sdpa").eval()
    use_linear_attention(model)
    expected = model(tokens).logits
    for turn in ("first", "second"):
        model.save_pretrained(tmp_path / turn)
        assert json.loads((tmp_path / turn / "config.json").read_text())["attn_implementation"] == NAME
        model = AutoModelForCausalLM.from_pretrained(tmp_path / turn).eval()
        assert_same(model(tokens).logits, expected)
    for give in (
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "first", attn_implementation="sdpa").eval(),
        lambda: (model.set_attn_implementation("sdpa"), model)[1],
    ):
        softmax = give()
        assert softmax.config._attn_implementation == "sdpa"
        assert (softmax(tokens).logits - expected).abs().max() > 1e-2
        softmax.save_pretrained(tmp_path / "softmax")
        assert "attn_implementation" not in json.loads((tmp_path / "softmax" / "config.json").read_text())
    again = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
    assert not hasattr(again.config, "attn_implementation")


def test_saved_models_without_register(tmp_path, monkeypatch):
    """An error that has the name, and no softmax."""
    AutoModelForCausalLM.from_config(llama(), attn_implementation=NAME).save_pretrained(tmp_path)
    monkeypatch.delitem(transformers.AttentionInterface._global_mapping, NAME)
    with pytest.raises(ValueError, match=f'^Specified `attn_implementation="{NAME}"` is not supported'):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("version", ["4.57.1", "4.56.0.dev0"])
def test_transformers_4(version, monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    spec = importlib.util.spec_from_file_location("again", integration.__file__)
    with pytest.raises(ImportError) as caught:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert str(caught.value) == f"fastnlp_ops.integrations.transformers needs transformers 5, found {version}"
