"""LinearAttentionCache in every use that transformers has for a cache: right, or one sentence and nothing changed."""

import copy
import pickle

import pytest
import torch
from tools import assert_same

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, LlamaForCausalLM, StaticCache  # noqa: E402

from fastnlp_ops.integrations.transformers import LinearAttentionCache, register  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
VOCABULARY, B, T = 40, 3, 8
register()
register("linear exp", feature_map="exp")


def make(device, name="fastnlp_linear", seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        attn_implementation=name,
    )
    return LlamaForCausalLM(config).to(device).eval()


def make_bart(device):
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        init_std=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
        attn_implementation="fastnlp_linear",
    )
    return transformers.BartForConditionalGeneration(config).to(device).eval()


def make_tokens(device, batch=B, length=T):
    return torch.randint(3, VOCABULARY, (batch, length), device=device)


def near(actual, expected, limit=1e-4):
    torch.testing.assert_close(actual, expected, rtol=limit, atol=limit)


def held(cache):
    return [(layer.length, [None if x is None else x.clone() for x in layer.state or ()]) for layer in cache.layers]


def assert_held(cache, before):
    for (length, state), (old_length, old_state) in zip(held(cache), before, strict=True):
        assert length == old_length
        for x, old in zip(state, old_state, strict=True):
            assert (x is None) == (old is None)
            if x is not None:
                assert_same(x, old)


@torch.no_grad()
@pytest.mark.parametrize("name", ["fastnlp_linear", "linear exp"])
@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_go_their_own_way(make_copy, name, device):
    """One prompt, read once, continued twice."""
    model, tokens = make(device, name), make_tokens(device)
    cache = LinearAttentionCache()
    model(tokens[:, :5], past_key_values=cache)
    before, other = held(cache), make_copy(cache)
    out = model(tokens[:, 5:], past_key_values=other).logits
    near(out, model(tokens).logits[:, 5:])
    assert_held(cache, before)
    near(
        model(tokens[:, :2], past_key_values=cache).logits,
        model(torch.cat([tokens[:, :5], tokens[:, :2]], 1)).logits[:, 5:],
    )


BATCH = "LinearAttentionCache holds 3 texts, got a batch of {}: reset() it in between"
WAY_BACK = (
    "LinearAttentionCache cannot go back, for a sum does not tell its terms: take DynamicCache for assisted decoding"
)
REFUSED = {
    "fewer texts": (lambda model, cache, x: model(x[:1], past_key_values=cache), ValueError, BATCH.format(1)),
    "more texts": (lambda model, cache, x: model(x.repeat(2, 1), past_key_values=cache), ValueError, BATCH.format(6)),
    "one token of fewer": (
        lambda model, cache, x: model(x[:2, :1], past_key_values=cache),
        ValueError,
        BATCH.format(2),
    ),
    "soft cap": (
        lambda model, cache, x: model(x, past_key_values=cache, softcap=30.0),
        ValueError,
        "softcap has no form in linear attention: set config.attn_logit_softcapping = None, or take another "
        "attn_implementation",
    ),
    "weights": (
        lambda model, cache, x: model(x, past_key_values=cache, output_attentions=True),
        ValueError,
        "output_attentions has no form in linear attention: take another attn_implementation",
    ),
    "packed": (
        lambda model, cache, x: model(
            x[:1].repeat(3, 1), past_key_values=cache, cu_seq_lens_q=torch.tensor([0, 24], device=x.device)
        ),
        ValueError,
        "texts packed in a row have no cache to be continued from: pass use_cache=False",
    ),
    "way back": (lambda _, cache, __: cache.crop(-1), NotImplementedError, WAY_BACK),
    "past recording": (lambda _, cache, __: cache.activate_past_recording(), NotImplementedError, WAY_BACK),
    "Mamba's states": (
        lambda _, cache, x: cache.update_conv_state(x, 0),
        ValueError,
        "LinearAttentionCache is for models of attention layers alone: take DynamicCache(config=model.config)",
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("case", REFUSED)
def test_refused_calls_change_nothing(case, device):
    """The cache goes on as if the call had not been made."""
    model, tokens = make(device), make_tokens(device)
    call, error, sentence = REFUSED[case]
    cache = LinearAttentionCache()
    model(tokens[:, :5], past_key_values=cache)
    before = held(cache)
    with pytest.raises(error) as caught:
        call(model, cache, tokens)
    assert str(caught.value) == sentence
    assert_held(cache, before)
    near(model(tokens[:, 5:], past_key_values=cache).logits, model(tokens).logits[:, 5:])


@torch.no_grad()
def test_reset_between_batches(device):
    model, cache = make(device), LinearAttentionCache()
    for batch in (3, 1, 5):
        tokens = make_tokens(device, batch)
        near(model(tokens, past_key_values=cache).logits, model(tokens, use_cache=False).logits)
        cache.reset()
        assert cache.get_seq_length() == 0


@torch.no_grad()
def test_assisted_decoding(device):
    """Refused before its first token; with transformers' cache it is greedy search."""
    model, assistant, tokens = make(device), make(device, seed=5), make_tokens(device, 1)
    options = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    expected = model.generate(tokens, **options)
    for way in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 2}):
        assert_same(model.generate(tokens, **options, **way), expected)
        cache = LinearAttentionCache()
        with pytest.raises(NotImplementedError, match=r"^LinearAttentionCache cannot go back"):
            model.generate(tokens, past_key_values=cache, **options, **way)
        assert cache.get_seq_length() == 0


@torch.no_grad()
def test_caches_of_a_fixed_length(device):
    model, tokens = make(device), make_tokens(device)
    for call in (
        lambda: model(tokens, past_key_values=StaticCache(config=model.config, max_cache_len=20)),
        lambda: model.generate(tokens, max_new_tokens=12, cache_implementation="static"),
    ):
        with pytest.raises(ValueError, match=r"caches of a fixed length are not for linear attention, take LinearAtt"):
            call()


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_encoder_decoder(beams, device):
    """The state for the decoder's own tokens, transformers' cache for the encoder's."""
    model, tokens = make_bart(device), make_tokens(device)
    mask = (torch.arange(T, device=device) < torch.tensor([[8], [5], [2]], device=device)).long()
    options = {"attention_mask": mask, "max_new_tokens": 7, "do_sample": False, "num_beams": beams}
    cache = EncoderDecoderCache(LinearAttentionCache(), DynamicCache())
    found = model.generate(tokens * mask, past_key_values=cache, **options)
    assert_same(found, model.generate(tokens * mask, use_cache=False, **options))
    assert cache.self_attention_cache.layers[0].keys is None
    cache.reset()
    assert_same(model.generate(tokens * mask, past_key_values=cache, **options), found)


@torch.no_grad()
def test_errors_of_encoder_decoders(device):
    model, tokens = make_bart(device), make_tokens(device)
    sentence = (
        "LinearAttentionCache is for causal attention alone: give an encoder-decoder model "
        "EncoderDecoderCache(LinearAttentionCache(), DynamicCache())"
    )
    for cache in (LinearAttentionCache(), EncoderDecoderCache(LinearAttentionCache(), LinearAttentionCache())):
        with pytest.raises(ValueError) as caught:
            model.generate(tokens, past_key_values=cache, max_new_tokens=3)
        assert str(caught.value) == sentence


@torch.no_grad()
def test_hybrid_models(device):
    """Attention between Mamba's layers: transformers' cache holds both."""
    config = transformers.JambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_offset=1,
        attn_layer_period=2,
        num_experts=2,
        use_mamba_kernels=False,
        attn_implementation="fastnlp_linear",
    )
    model, tokens = transformers.JambaForCausalLM(config).to(device).eval(), make_tokens(device)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert_same(model.generate(tokens, **options), model.generate(tokens, use_cache=False, **options))
    with pytest.raises(ValueError, match=r"^LinearAttentionCache is for models of attention layers alone: take Dyn"):
        model(tokens, past_key_values=LinearAttentionCache())


@torch.no_grad()
def test_models_that_attend_twice_to_their_keys(device):
    """DiffLlama's halves of the values: a state would count each key twice."""
    config = transformers.DiffLlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="fastnlp_linear",
    )
    model = transformers.DiffLlamaForCausalLM(config).to(device).eval()
    with pytest.raises(RuntimeError, match=r"^LinearAttentionCache needs a model that attends once to the keys of a"):
        model(make_tokens(device), past_key_values=LinearAttentionCache())
