"""Texts packed in a row, as transformers' flattening collator makes them, do not see each other."""

import pytest
import torch
from tools import assert_same

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    DataCollatorWithFlattening,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
)

from fastnlp_ops.integrations.transformers import LinearAttentionCache, register  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
VOCABULARY = 40
LENGTHS = (5, 1, 7, 2)
register()
register("linear exp", feature_map="exp")


def make(kind, device, name="fastnlp_linear", layers=2):
    sizes = {"vocab_size": VOCABULARY, "initializer_range": 0.3, "attn_implementation": name}
    if kind == "llama":
        sizes |= {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4}
        config = LlamaConfig(**sizes, num_key_value_heads=2, eos_token_id=None)
    elif kind == "gpt2":
        config = GPT2Config(**sizes, n_embd=24, n_layer=2, n_head=4, attn_pdrop=0, bos_token_id=1, eos_token_id=2)
    else:
        sizes |= {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4}
        config = BertConfig(**sizes, attention_probs_dropout_prob=0)
        return AutoModelForMaskedLM.from_config(config).to(device).eval()
    return AutoModelForCausalLM.from_config(config).to(device).eval()


def make_texts(lengths=LENGTHS):
    return [torch.randint(3, VOCABULARY, (n,)).tolist() for n in lengths]


def batch(texts, device, **options):
    features = [{"input_ids": text} for text in texts]
    collated = DataCollatorWithFlattening(return_tensors="pt", **options)(features)
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in collated.items()}


def near(actual, expected, limit=2e-5):
    torch.testing.assert_close(actual, expected, rtol=limit, atol=limit)


FLASH = {"return_flash_attn_kwargs": True}
WAYS = {
    "offsets": (FLASH, {}),
    "offsets alone": (FLASH | {"return_position_ids": False}, {}),
    "positions": ({}, {"use_cache": False}),
    "positions with a cache": ({}, {"use_cache": True}),
    "offsets with a cache": (FLASH, {"use_cache": True}),
}


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_decoders(kind, way, mode, device):
    """Logits of the collator's batch are those of its texts alone, whether the model keeps a cache or not."""
    model, texts = make(kind, device), make_texts()
    if mode == "train" and kind == "llama":  # without dropout
        model.train()
    collator, options = WAYS[way]
    inputs = batch(texts, device, **collator)
    del inputs["labels"]
    if "position_ids" not in inputs:  # positions are the model's own business
        inputs["position_ids"] = batch(texts, device)["position_ids"]
    out = model(**inputs, **options).logits
    for found, text in zip(out.split([len(text) for text in texts], 1), texts, strict=True):
        near(found[0], model(torch.tensor([text], device=device), use_cache=False).logits[0])


def test_encoder(device):
    model, texts = make("bert", device), make_texts()
    inputs = batch(texts, device, **FLASH)
    del inputs["labels"]
    out = model(**inputs).logits
    for found, text in zip(out.split([len(text) for text in texts], 1), texts, strict=True):
        near(found[0], model(torch.tensor([text], device=device)).logits[0])


@pytest.mark.parametrize("name", ["fastnlp_linear", "linear exp"])
@pytest.mark.parametrize("way", WAYS)
def test_training(way, name, device):
    """Loss and gradients of a packed batch are those of its texts in one sum."""
    model, texts = make("llama", device, name).train(), make_texts((5, 3, 7))
    collator, options = WAYS[way]
    if not collator.get("return_position_ids", True):
        collator = {**collator, "return_position_ids": True}
    loss = model(**batch(texts, device, **collator), **options).loss
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss, parameters)
    alone = [torch.tensor([text], device=device) for text in texts]
    losses = [model(text, labels=text, use_cache=False).loss * (text.shape[1] - 1) for text in alone]
    expected = sum(losses) / sum(text.shape[1] - 1 for text in alone)
    near(loss, expected)
    for found, right in zip(grads, torch.autograd.grad(expected, parameters), strict=True):
        near(found, right, 1e-4)


def test_rows_of_several_texts(device):
    """Two rows, cut at places of their own."""
    model, tokens = make("llama", device), torch.randint(3, VOCABULARY, (2, 8), device=device)
    cuts = [(3, 5), (6, 1, 1)]
    positions = torch.stack([torch.cat([torch.arange(n, device=device) for n in row]) for row in cuts])
    for options in ({"use_cache": False}, {"use_cache": True}):
        out = model(tokens, position_ids=positions, **options).logits
        for b, row in enumerate(cuts):
            for found, text in zip(out[b].split(row), tokens[b].split(row), strict=True):
                near(found, model(text[None], use_cache=False).logits[0])


def test_positions_that_change_in_place(device):
    """The look at positions is kept for the layers of a call, not for what is written into them later."""
    model, tokens = make("llama", device), torch.randint(3, VOCABULARY, (1, 6), device=device)
    positions = torch.arange(6, device=device)[None].clone()
    whole = model(tokens, position_ids=positions, past_key_values=DynamicCache()).logits
    near(whole, model(tokens, use_cache=False).logits)
    positions[0, 3:] -= 3
    out = model(tokens, position_ids=positions, past_key_values=DynamicCache()).logits
    near(out[:, 3:], model(tokens[:, 3:], use_cache=False).logits)
    with torch.inference_mode():
        assert_same(model(tokens, position_ids=positions.clone(), past_key_values=DynamicCache()).logits, out.detach())


def test_one_text(device):
    """One text is no packing: bitwise what it is without the collator."""
    model, texts = make("llama", device), make_texts((6,))
    inputs = batch(texts, device)
    del inputs["labels"]
    for options in ({"use_cache": False}, {"past_key_values": LinearAttentionCache()}):
        out = model(**inputs, **options).logits
        assert_same(out, model(torch.tensor(texts, device=device), use_cache=False).logits)


def test_compiled(device):
    """Offsets are taken; positions that start anew are an error, for a graph cannot depend on them."""
    torch._dynamo.reset()
    model, texts = make("llama", device, layers=1), make_texts()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = batch(texts, device, **FLASH)
    del inputs["labels"], inputs["position_ids"]
    near(compiled(**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits)
    if device.type != "cpu":
        return  # an assertion on a GPU ends its context
    tokens, whole = inputs["input_ids"], torch.arange(sum(LENGTHS), device=device)[None]
    packed = batch(texts, device)["position_ids"]
    with torch.no_grad():
        for options in ({"use_cache": False}, {"use_cache": True}):
            near(compiled(tokens, position_ids=whole, **options).logits, model(tokens, use_cache=False).logits)
            with pytest.raises(RuntimeError, match="texts packed in a row need cu_seq_lens_q in a compiled model"):
                compiled(tokens, position_ids=packed, **options)


def test_errors(device):
    model, texts = make("llama", device), make_texts()
    inputs = batch(texts, device, **FLASH)
    del inputs["labels"]
    bart = BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            attn_implementation="fastnlp_linear",
        )
    ).to(device)
    tokens = inputs["input_ids"]
    offsets = inputs["cu_seq_lens_q"]
    encoded = bart.model.encoder(tokens[:, :4])
    padded = torch.ones_like(tokens)
    padded[0, 0] = 0
    for options in ({}, {"position_ids": inputs["position_ids"]}):
        cache = LinearAttentionCache()
        flash = {} if options else {"cu_seq_lens_q": offsets}
        with pytest.raises(
            ValueError, match=r"^texts packed in a row have no cache to be continued from: pass use_cach"
        ):
            model(tokens, past_key_values=cache, **flash, **options)
        assert cache.get_seq_length() == 0
        near(model(tokens, past_key_values=cache).logits, model(tokens).logits)  # as if it had not been called
    for call, sentence in (
        (
            lambda: model(tokens, attention_mask=padded, cu_seq_lens_q=offsets),
            "attention_mask must be None or 1 everywhere where texts are packed in a row",
        ),
        (
            lambda: bart(encoder_outputs=encoded, decoder_input_ids=tokens, cu_seq_lens_q=offsets, use_cache=False),
            "texts packed in a row are for self-attention, and not for attention to an encoder's states",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == sentence
