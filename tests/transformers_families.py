"""Tiny models of transformers' families, and what linear attention is in each: the rows of docs/transformers.md.

`python tests/transformers_families.py` writes that file anew; with a kind, as `causal`, it prints a row for each family
of transformers that a tiny model can be made of.
"""

import contextlib
import functools
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch.nn import functional
from transformers import DynamicCache, EncoderDecoderCache

from fastnlp_ops.integrations import _transformers_cache as cache_module
from fastnlp_ops.integrations import transformers as integration
from fastnlp_ops.integrations.transformers import LinearAttentionCache, register, use_linear_attention

PAGE = Path(__file__).parents[1] / "docs" / "transformers.md"
VOCABULARY, B, T = 40, 3, 8
LENGTHS = (8, 5, 2)
AUTO = {
    "causal": (transformers.AutoModelForCausalLM, "MODEL_FOR_CAUSAL_LM_MAPPING"),
    "masked": (transformers.AutoModelForMaskedLM, "MODEL_FOR_MASKED_LM_MAPPING"),
    "seq2seq": (transformers.AutoModelForSeq2SeqLM, "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
}
TITLES = {"causal": "Decoders", "masked": "Encoders", "seq2seq": "Encoder-decoders"}
# Families of the page, with what their configs want beyond small sizes.
FAMILIES = {
    "causal": "llama gpt2 gpt_neox opt qwen2 qwen3 qwen3_moe gemma phi phi3 stablelm olmo2 cohere granite mixtral "
    "mistral gpt_bigcode ctrl biogpt smollm3 starcoder2 bert deepseek_v3 diffllama gemma2 gpt_oss doge falcon mpt "
    "bloom gptj codegen xlnet mamba",
    "masked": "bert roberta xlm-roberta distilbert electra albert modernbert layoutlm deberta deberta-v2 roformer "
    "longformer big_bird mpnet funnel nystromformer fnet",
    "seq2seq": "bart mbart pegasus marian m2m_100 t5 longt5 led pegasus_x",
}
# What configs want beyond small sizes.
OPTIONS = {"mistral": {"sliding_window": None}}
# Their positions begin behind the padding's number.
POSITIONS_FROM_ONE = "roberta xlm-roberta camembert data2vec-text roberta-prelayernorm xlm-roberta-xl"
# Their positions are counted along the row, whatever is packed in it.
POSITIONS_ALONG_THE_ROW = "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mobilebert pegasus plbart"
_SIZES = {
    2: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers "
    "num_key_value_heads",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads "
    "decoder_attention_heads "
    "num_experts num_local_experts n_routed_experts",
    8: "head_dim d_kv qk_nope_head_dim qk_rope_head_dim",
    12: "v_head_dim",
    16: "q_lora_rank kv_lora_rank",
    32: "hidden_size d_model n_embd dim embedding_size",
    48: "intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner hidden_dim moe_intermediate_size "
    "d_inner dff",
    64: "max_position_embeddings n_positions",
    1: "n_group topk_group first_k_dense_replace",
    VOCABULARY: "vocab_size",
}
_VALUES = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "init_std": 0.2,
}


class Row(NamedTuple):
    """What the page says of one family."""

    family: str
    sentence: str = ""  # of the refusal; else linear attention works
    cache: str = ""  # the same of LinearAttentionCache
    packed: str = ""  # how texts packed in a row are told


class RefusedError(Exception):
    """One of our sentences."""


@contextlib.contextmanager
def sentences():
    """Our errors as RefusedError; others pass."""
    try:
        yield
    except (ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        text = str(error)
        if "linear attention" not in text and "LinearAttentionCache" not in text:
            raise
        raise RefusedError(text) from error


@contextlib.contextmanager
def counted():
    """Calls of linear attention's op, and of softmax over four axes or torch's own attention."""
    calls = {"linear": 0, "softmax": 0}
    saved = []

    def count(holder, name, kind, counts=lambda *_: True):
        function = getattr(holder, name)

        @functools.wraps(function)
        def wrapper(*args, **options):
            calls[kind] += bool(counts(*args))
            return function(*args, **options)

        saved.append((holder, name, function))
        setattr(holder, name, wrapper)

    def four(x, *_):
        return x.dim() == 4

    for holder in (integration, cache_module):
        count(holder, "linear_attention", "linear")
    count(cache_module, "linear_attention_step", "linear")
    count(functional, "scaled_dot_product_attention", "softmax")
    for holder in (functional, torch):
        count(holder, "softmax", "softmax", four)
    try:
        yield calls
    finally:
        for holder, name, function in reversed(saved):
            setattr(holder, name, function)


def tiny_config(kind, family, **options):
    kinds = getattr(transformers, AUTO[kind][1])
    config_class = next(config_class for config_class in kinds if config_class.model_type == family)
    default = config_class()
    known = set(default.to_dict()) | set(config_class.attribute_map)
    sizes = {name: size for size, names in _SIZES.items() for name in names.split()}
    small = {name: size for name, size in sizes.items() if name in known and getattr(default, name) is not None}
    small |= {name: value for name, value in _VALUES.items() if name in known}
    if kind == "causal" and "is_decoder" in known:
        small["is_decoder"] = True  # what an encoder's code wants to be causal
    for alias, name in config_class.attribute_map.items():
        if alias in small:
            small.setdefault(name, small[alias])
            del small[alias]
    if "layer_types" in known and default.layer_types is not None:
        small["layer_types"] = default.layer_types[:2]
    return config_class(**(small | options))


def tiny_model(kind, family, name=None, **options):
    torch.manual_seed(0)
    options = {} if name is None else options | {"attn_implementation": name}
    return AUTO[kind][0].from_config(tiny_config(kind, family, **OPTIONS.get(family, {})), **options).eval()


class Family:
    """A tiny model with one way to call it: `tokens` are what its attention is causal in."""

    def __init__(self, kind, family, model):
        self.kind, self.family, self.model = kind, family, model
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(3, VOCABULARY, (B, T), generator=generator)
        self.source = torch.randint(3, VOCABULARY, (B, T), generator=generator)

    def __call__(self, tokens, rows=slice(None), source=None, **options):
        if self.kind == "seq2seq":
            source = self.source[rows] if source is None else source
            return self.model(source, decoder_input_ids=tokens, **options).logits
        return self.model(tokens, **options).logits

    def whole(self, tokens, **options):
        return self(tokens, **options) if self.kind == "masked" else self(tokens, use_cache=False, **options)

    def check_causal(self):
        changed = self.tokens.clone()
        changed[:, -1] = (changed[:, -1] - 2) % (VOCABULARY - 3) + 3
        moved = (self.whole(changed) - self.whole(self.tokens))[:, :-1].abs().max()
        assert moved > 1e-3 if self.kind == "masked" else moved < 1e-5, f"a changed token moves others by {moved}"

    def check_padding(self):
        mask = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long()
        if self.kind == "seq2seq":
            out = self.whole(self.tokens, source=self.source * mask, attention_mask=mask)
        else:
            out = self.whole(self.tokens * mask, attention_mask=mask)
        for b, length in enumerate(LENGTHS):
            if self.kind == "seq2seq":
                near(out[b], self.whole(self.tokens[b : b + 1], source=self.source[b : b + 1, :length])[0])
            else:
                near(out[b, :length], self.whole(self.tokens[b : b + 1, :length])[0])

    def check_cache(self, make_cache):
        """In parts of several tokens and of one, and by generate."""
        cache, outs = make_cache(), []
        for part in self.tokens.split((4, 1, 1, 2), 1):
            with sentences():
                outs.append(self(part, past_key_values=cache, use_cache=True))
        near(torch.cat(outs, 1), self.whole(self.tokens))
        inputs = self.source if self.kind == "seq2seq" else self.tokens
        options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(inputs)}
        found = self.model.generate(inputs, past_key_values=make_cache(), **options)
        assert found.equal(self.model.generate(inputs, use_cache=False, **options))

    def check_packed(self, **options):
        """Texts in a row are those alone."""
        start = 1 if self.family in POSITIONS_FROM_ONE.split() else 0
        row = torch.cat([self.tokens[b, :n] for b, n in enumerate(LENGTHS)])[None]
        positions = torch.cat([torch.arange(start, start + n) for n in LENGTHS])[None]
        out = self(row, position_ids=positions, **options)
        for b, part in enumerate(out.split(LENGTHS, 1)):
            near(part[0], self.whole(self.tokens[b : b + 1, : LENGTHS[b]])[0])


def near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


def packed_ways(family):
    """The ways to tell packed texts that are right: all of them must be, but where transformers does not look."""
    if family.family in POSITIONS_ALONG_THE_ROW.split():
        return "nothing: its positions are counted along the row"
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    flash = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 8, "max_length_k": 8}
    family.check_packed(**flash)
    if family.kind == "masked":
        return "cu_seq_lens_q"
    family.check_packed(use_cache=False)
    try:
        family.check_packed(use_cache=True)
    except AssertionError:
        return "cu_seq_lens_q, position_ids with use_cache=False"
    return "cu_seq_lens_q, position_ids"


@functools.cache
@torch.no_grad()
def row(kind, family):
    """Every check on one family; AssertionError where a result is wrong."""
    register()
    try:
        with sentences():
            model = tiny_model(kind, family)
            before = model.config._attn_implementation
            use_linear_attention(model)
            run = Family(kind, family, model)
            with counted() as calls:
                run.whole(run.tokens)
    except RefusedError as refusal:
        check_refusal(kind, family, model, before)
        return Row(family, str(refusal))
    assert calls["linear"] > 0, "linear attention is not called"
    assert calls["softmax"] == 0, "softmax attention is called"
    near(Family(kind, family, tiny_model(kind, family, "fastnlp_linear")).whole(run.tokens), run.whole(run.tokens))
    run.check_causal()
    run.check_padding()
    if kind == "masked":
        return Row(family, packed=packed_ways(run))
    if kind == "causal":
        run.check_cache(DynamicCache)
        make_cache = LinearAttentionCache
    else:
        run.check_cache(lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()))

        def make_cache():
            return EncoderDecoderCache(LinearAttentionCache(), DynamicCache())

    try:
        run.check_cache(make_cache)
        refused = ""
    except RefusedError as refusal:
        refused = str(refusal)
    return Row(family, cache=refused, packed=packed_ways(run) if kind == "causal" else "")


def check_refusal(kind, family, model, before):
    """The name given directly is refused too, or asked for nothing: it never ends in another softmax attention."""
    if model.config._attn_implementation == before:  # refused before a call
        assert getattr(model.config, "attn_implementation", None) is None
    expected = Family(kind, family, tiny_model(kind, family, "eager"))
    try:
        with sentences(), counted() as calls:
            direct = Family(kind, family, tiny_model(kind, family, "fastnlp_linear"))
            out = direct.whole(direct.tokens)
    except RefusedError:
        return
    assert calls == {"linear": 0, "softmax": 0}, "the name is ignored"
    near(out, expected.whole(direct.tokens))


def page():
    """The text of docs/transformers.md."""
    lines = [HEAD]
    for kind, families in FAMILIES.items():
        kind_rows = [row(kind, family) for family in families.split()]
        lines += [f"## {TITLES[kind]}", ""]
        columns = ["family", *(["LinearAttentionCache"] if kind != "masked" else []), "packed texts told by"]
        columns = columns[:-1] if kind == "seq2seq" else columns
        lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for one in kind_rows:
            if not one.sentence:
                cells = [one.family, *([one.cache or "yes"] if kind != "masked" else []), one.packed]
                lines.append("| " + " | ".join(cells[: len(columns)]) + " |")
        lines += ["", "Refused, with the sentence:", ""]
        lines += [f"- {one.family}: {one.sentence}" for one in kind_rows if one.sentence]
        lines.append("")
    return "\n".join(lines)


HEAD = f"""# Linear attention in transformers' families

Written by `python tests/transformers_families.py` from tiny models of each family with random weights, by
transformers {transformers.__version__}; a test holds that it is up to date. A family in a table was checked:

- its attention is the op's, and no softmax is left;
- in a decoder a later token never moves an earlier output;
- padded texts are those alone;
- decoding with transformers' caches is one pass over the text, and so is decoding with `LinearAttentionCache` (of
  encoder-decoders: `EncoderDecoderCache(LinearAttentionCache(), DynamicCache())`), unless the table has its error;
- texts packed in a row are those alone where they are told in the way of the last column.

Other families raise what is quoted, where the model is built, given the name, or called.
"""


def every(kind):
    """The names of all families that transformers has a model of this kind for."""
    return [config_class.model_type for config_class in getattr(transformers, AUTO[kind][1])]


def walk(kind, family):
    """The row of any family, or why there is none: configs of other models want more than small numbers."""
    try:
        with torch.device("meta"):
            model = AUTO[kind][0].from_config(tiny_config(kind, family, **OPTIONS.get(family, {})))
        if sum(parameter.numel() for parameter in model.parameters()) > 5e6:
            return "a model that small options do not make small"
        return row(kind, family)
    except AssertionError as error:
        if "is_decoder" in str(error):  # Reformer's own
            return str(error)
        raise
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip() or ' ').splitlines()[0]}"


def main():
    if len(sys.argv) < 2:
        PAGE.write_text(page())
        return
    for family in every(sys.argv[1]):
        print(family, walk(sys.argv[1], family), flush=True)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
