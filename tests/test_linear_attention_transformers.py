"""Hugging Face models with linear attention: what they compute, padding, decoding, training, compilation, refusals."""

import pytest
import torch
from tools import assert_same

from fastnlp_ops import reference

transformers = pytest.importorskip("transformers")

from transformers import BertConfig, BertForMaskedLM, BertModel, DynamicCache, LlamaConfig, LlamaForCausalLM  # noqa: E402

from fastnlp_ops.integrations.transformers import LinearAttentionCache, register  # noqa: E402

MAPS = ["elu+1", "exp", "softmax", "cosine+1", "relu^2"]
VOCABULARY = 40
B, T = 3, 11
for map_ in MAPS:
    register(f"linear {map_}", feature_map=map_)
register()

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def make_llama(device, name="fastnlp_linear", **options):
    options = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2} | options
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=32,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        attn_implementation=name,
        **options,
    )
    return LlamaForCausalLM(config).to(device).eval()


def make_bert(device, kind=BertModel, name="fastnlp_linear", **options):
    options = {"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3} | options
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=32, attn_implementation=name, **options
    )
    return kind(config).to(device).eval()


def make_tokens(device):
    return torch.randint(2, VOCABULARY, (B, T), device=device)


def right_padded(device):
    return (torch.arange(T, device=device) < torch.tensor([[11], [6], [1]], device=device)).long()


def near(actual, expected, limit=2e-5):
    torch.testing.assert_close(actual, expected, rtol=limit, atol=limit)


@pytest.mark.parametrize("map_", MAPS)
def test_attention_of_bert(map_, device):
    """A layer's attention is the reference over its projections; all keys but padding, in both directions."""
    model = make_bert(device, name=f"linear {map_}")
    attention = model.encoder.layer[0].attention.self
    hidden, mask = torch.randn(B, T, 24, device=device), right_padded(device)
    q, k, v = (f(hidden).unflatten(-1, (2, 12)) for f in (attention.query, attention.key, attention.value))
    expected = reference.linear_attention(q, k, v, feature_map=map_, key_padding_mask=mask.bool())
    near(attention(hidden, attention_mask=mask.bool())[0], expected.flatten(2))


def test_bert(device):
    """Padded texts are those without padding; both directions are read."""
    model, tokens, mask = make_bert(device), make_tokens(device), right_padded(device)
    out = model(tokens, attention_mask=mask).last_hidden_state
    for b, length in enumerate(mask.sum(1).tolist()):
        near(out[b, :length], model(tokens[b : b + 1, :length]).last_hidden_state[0])
    changed = tokens.clone()
    changed[0, -1] = 1
    assert (model(changed).last_hidden_state[0, 0] - model(tokens).last_hidden_state[0, 0]).abs().max() > 1e-4
    softmax = make_bert(device, name="sdpa")
    softmax.load_state_dict(model.state_dict())
    assert (softmax(tokens).last_hidden_state - model(tokens).last_hidden_state).abs().max() > 1e-2


def test_cross_attention(device):
    """A decoder with memory of another length, padded."""
    model = make_bert(device, is_decoder=True, add_cross_attention=True)
    tokens, memory = make_tokens(device), torch.randn(B, 5, 24, device=device)
    memory_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0]], device=device)
    options = {"use_cache": False}
    out = model(tokens, encoder_hidden_states=memory, encoder_attention_mask=memory_mask, **options).last_hidden_state
    for b in range(B):
        alone = memory[b : b + 1, memory_mask[b].bool()]
        near(out[b], model(tokens[b : b + 1], encoder_hidden_states=alone, **options).last_hidden_state[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("map_", MAPS)
def test_llama(map_, side, device):
    """Causal, with grouped key heads; padded texts on either side are those without padding."""
    model, tokens, mask = make_llama(device, f"linear {map_}"), make_tokens(device), right_padded(device)
    full = model(tokens).logits
    near(model(tokens[:, :5]).logits, full[:, :5])
    mask = mask if side == "right" else mask.flip(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(tokens, attention_mask=mask, position_ids=positions).logits
    assert out.isfinite().all()
    for b in range(B):
        on = mask[b].bool()
        near(out[b, on], model(tokens[b : b + 1, on]).logits[0], 1e-4)


@pytest.mark.parametrize("map_", MAPS)
def test_cache(map_, device):
    """A text in parts of any length, with our cache and with transformers', is the text in one pass."""
    model, tokens = make_llama(device, f"linear {map_}"), make_tokens(device)
    full = model(tokens).logits
    for make_cache in (LinearAttentionCache, DynamicCache):
        for parts in ((5, 1, 1, 4), (1,) * T):
            cache = make_cache()
            with torch.no_grad():
                outs = [model(x, past_key_values=cache).logits for x in tokens.split(parts, 1)]
            near(torch.cat(outs, 1), full, 1e-4)
            assert cache.get_seq_length() == T


def greedy(model, tokens, steps):
    """Each token by a pass over all before it."""
    with torch.no_grad():
        for _ in range(steps):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tokens


@pytest.mark.parametrize("map_", MAPS)
def test_generate(map_, device):
    """The same tokens as full passes; the state does not grow, and keys are not kept."""
    model, tokens = make_llama(device, f"linear {map_}"), make_tokens(device)
    cache = LinearAttentionCache()
    sizes = []
    forward = model.forward
    model.forward = lambda *a, **k: (
        sizes.append([x.numel() for layer in cache.layers for x in layer.state or () if x is not None]),
        forward(*a, **k),
    )[1]
    options = {"max_new_tokens": 12, "do_sample": False}
    found = model.generate(tokens, past_key_values=cache, **options)
    model.forward = forward
    expected = greedy(model, tokens, 12)
    assert_same(found, expected)
    assert_same(model.generate(tokens, **options), expected)  # with transformers' cache of all keys
    assert len(sizes) == 12
    assert all(size == sizes[1] for size in sizes[1:])
    for layer in cache.layers:
        assert layer.keys is None
        assert layer.state.kv.dtype == torch.float32
    # And on from there: the cache of the first part goes into the second call.
    more = torch.cat([found, tokens[:, :2]], 1)
    mask = torch.ones_like(more)  # without one, transformers takes generated tokens that are the padding's for padding
    again = model.generate(more, attention_mask=mask, past_key_values=cache, **options)
    assert_same(again, greedy(model, more, 12))


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3, "eos_token_id": None}
OTHERS = {
    "GPT2": {"n_embd": 24, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": None},
    "GPTNeoX": SMALL | {"hidden_size": 32, "intermediate_size": 32, "bos_token_id": 1},
    "Qwen3": SMALL | {"hidden_size": 24, "intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 10},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_decoders(name, device):
    """Of other code than LLaMA's: positions that are learned or turn a part of each head, heads of another width."""
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, **OTHERS[name])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="fastnlp_linear")
    model, tokens = model.to(device).eval(), make_tokens(device)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(tokens, past_key_values=LinearAttentionCache(), **options)
    assert_same(found, greedy(model, tokens, 6))


def test_generate_from_padded_texts(device):
    model, tokens, mask = make_llama(device), make_tokens(device), right_padded(device).flip(1)
    options = {"max_new_tokens": 8, "do_sample": False}
    tokens = tokens * mask
    found = model.generate(tokens, attention_mask=mask, past_key_values=LinearAttentionCache(), **options)
    for b in range(B):
        alone = tokens[b : b + 1, mask[b].bool()]
        assert_same(found[b, T:], greedy(model, alone, 8)[0, alone.shape[1] :])


def test_beam_search(device):
    """Beams take their states with them."""
    model, tokens = make_llama(device), make_tokens(device)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    found = model.generate(tokens, past_key_values=LinearAttentionCache(), **options)
    assert_same(found, model.generate(tokens, use_cache=False, **options))


def test_cache_operations(device):
    model, tokens = make_llama(device), make_tokens(device)
    cache = LinearAttentionCache()
    with torch.no_grad():
        model(tokens[:, :4], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([5, 0], device=device))
        out = model(tokens[[2, 0], 4:], past_key_values=cache).logits
        near(out, model(tokens[[2, 0]]).logits[:, 4:])
        cache.crop(0)
        with pytest.raises(NotImplementedError, match=r"^LinearAttentionCache cannot go back"):
            cache.crop(1)
        cache.reset()
        assert cache.get_seq_length() == 0
        near(model(tokens, past_key_values=cache).logits, model(tokens).logits)


def test_gradients_through_the_cache(device):
    """Training on texts in parts: the second part reaches the first one's tokens."""
    model, tokens = make_llama(device), make_tokens(device)
    parameter = model.model.embed_tokens.weight
    expected = torch.autograd.grad(model(tokens).logits[:, -1].square().sum(), parameter)[0]
    for parts in ((8, 3), (10, 1)):
        cache = LinearAttentionCache()
        outs = [model(x, past_key_values=cache).logits for x in tokens.split(parts, 1)]
        near(torch.autograd.grad(outs[-1][:, -1].square().sum(), parameter)[0], expected, 1e-3)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_training(kind, device):
    """Models learn a text by heart, with the dropout of hidden states that their configs have."""
    tokens = make_tokens(device)
    options = {"initializer_range": 0.05, "attention_probs_dropout_prob": 0.0} if kind == "bert" else {}
    model = make_bert(device, BertForMaskedLM, **options) if kind == "bert" else make_llama(device)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    mask = right_padded(device)
    labels = tokens.masked_fill(mask == 0, -100)
    losses = []
    for _ in range(40):
        loss = model(tokens, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]
    for name, parameter in model.named_parameters():
        if "value" in name or "v_proj" in name:
            assert parameter.grad.abs().max() > 0, name


def test_half_precision(device):
    model, tokens = make_llama(device), make_tokens(device)
    expected = model(tokens).logits
    model.bfloat16()
    cache = LinearAttentionCache()
    with torch.no_grad():
        outs = [model(x, past_key_values=cache).logits for x in tokens.split((8, 1, 1, 1), 1)]
    assert cache.layers[0].state.kv.dtype == torch.float32
    assert (torch.cat(outs, 1).float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_compile(kind, device):
    """One graph, padded and not, gradients included."""
    torch._dynamo.reset()
    model = make_bert(device) if kind == "bert" else make_llama(device)
    options = {} if kind == "bert" else {"use_cache": False}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens, parameters = make_tokens(device), [p for p in model.parameters() if p.requires_grad]
    for mask in (None, right_padded(device)):
        results = []
        for function in (compiled, model):
            out = function(tokens, attention_mask=mask, **options)[0]
            grads = torch.autograd.grad(out.square().sum(), parameters, materialize_grads=True, allow_unused=True)
            results.append([out.detach(), *grads])
        for ours, expected in zip(*results, strict=True):
            near(ours, expected, 1e-4)


def test_compiled_decoding(device):
    torch._dynamo.reset()
    model, tokens = make_llama(device), make_tokens(device)
    compiled, cache = torch.compile(model, backend="aot_eager"), LinearAttentionCache()
    with torch.no_grad():
        outs = [compiled(x, past_key_values=cache).logits for x in tokens.split((8, 1, 1, 1), 1)]
        near(torch.cat(outs, 1), model(tokens).logits, 1e-4)


def test_bidirectional_llama(device):
    """transformers' switch for decoders that read in both directions."""
    model, tokens = make_llama(device), make_tokens(device)
    causal = model(tokens, use_cache=False).logits
    model.config.is_causal = False
    both = model(tokens, use_cache=False).logits
    assert (both[:, 0] - causal[:, 0]).abs().max() > 1e-3
    changed = tokens.clone()
    changed[:, -1] = 1
    assert (both[:, 0] - model(changed, use_cache=False).logits[:, 0]).abs().max() > 1e-4


def test_errors(device):
    model, tokens = make_llama(device), make_tokens(device)
    bert = make_bert(device)
    lost = make_llama(device, "sdpa")
    square = torch.zeros(B, 1, T, T, device=device)
    mistral = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=4,
            attn_implementation="fastnlp_linear",
        )
    ).to(device)
    window = "sliding windows and chunks have no form in linear attention: set config.sliding_window = None"
    dropping = make_bert(device).train()

    def with_foreign_attention():
        cache = LinearAttentionCache()
        for token in tokens[:, :2].split(1, 1):
            lost(token, past_key_values=cache)

    for call, error, sentence in (
        (lambda: register(feature_map="gelu"), ValueError, "feature_map must be identity, elu+1, relu, relu^2, exp"),
        (lambda: mistral(tokens), ValueError, window),
        (
            lambda: dropping(tokens),
            ValueError,
            "attention dropout must be 0 in training, got 0.1, for linear attention has no weights to drop: "
            "load the model with attention_probs_dropout_prob=0.0",
        ),
        (
            lambda: bert(tokens, attention_mask=square),
            ValueError,
            "attention_mask must be [B, Tk] of bool or integers for linear attention, got torch.float32 of shape "
            "(3, 1, 11, 11): masks of [query, key] have no form in it, take another attn_implementation",
        ),
        (
            lambda: model(tokens, softcap=30.0),
            ValueError,
            "softcap has no form in linear attention: set config.attn_logit_softcapping = None, or take another",
        ),
        (
            lambda: model.generate(tokens, max_new_tokens=2, cache_implementation="static"),
            ValueError,
            "attention_mask and cache must be of the keys seen so far, got 12: caches of a fixed length are not for "
            "linear attention, take LinearAttentionCache",
        ),
        (
            with_foreign_attention,
            RuntimeError,
            "LinearAttentionCache lost the keys of the last tokens: it needs a model whose attn_implementation",
        ),
    ):
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value).startswith(sentence)
