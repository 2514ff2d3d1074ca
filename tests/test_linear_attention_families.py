"""Linear attention in transformers' families of models: each works, or says why not, as docs/transformers.md has it."""

import ast
import inspect
import re
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")

import transformers_families as families  # noqa: E402

from fastnlp_ops.integrations import transformers as integration  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    # of generate, which finds a padding token or a beginning in random texts
    pytest.mark.filterwarnings("ignore:.*:UserWarning:transformers"),
]
ALL = [(kind, family) for kind, names in families.FAMILIES.items() for family in names.split()]


@pytest.mark.parametrize(("kind", "family"), ALL)
def test_family(kind, family):
    """Every result right, or one sentence."""
    row = families.row(kind, family)
    for sentence in (row.sentence, row.cache):
        assert "\n" not in sentence
    if row.sentence:
        assert "take" in row.sentence or "has no attention" in row.sentence


def test_page():
    """python tests/transformers_families.py"""
    written = families.PAGE.read_text()
    if f"transformers {transformers.__version__};" not in written:
        pytest.skip("written by another version of transformers")
    assert written == families.page()


@pytest.mark.long
@pytest.mark.parametrize(("kind", "least"), [("causal", 110), ("masked", 40), ("seq2seq", 20)])
def test_every_family(kind, least):
    """All of transformers' families: no result is wrong, of those that a tiny model can be made of."""
    rows = [families.walk(kind, family) for family in families.every(kind)]
    assert sum(isinstance(row, families.Row) for row in rows) >= least


def test_some_work_and_some_do_not():
    refused = {family for kind, family in ALL if families.row(kind, family).sentence}
    assert {"bloom", "roformer", "xlnet", "deberta-v2", "falcon", "mpt", "longformer", "t5", "gemma2"} <= refused
    assert not {"llama", "gpt2", "qwen3", "bert", "roberta", "bart", "deepseek_v3"} & refused


# Arguments of transformers' attention functions that change nothing here, or are honoured.
HARMLESS = {
    "scaling": "cancels in the normalised result",
    "dropout": "checked",
    "is_causal": "honoured",
    "attention_mask": "honoured",
    "query": "",
    "key": "",
    "value": "",
    "position_ids": "tell packed texts",
    "cu_seq_lens_q": "honoured",
    "cu_seq_lens_k": "honoured",
    "max_length_q": "the offsets say it",
    "max_length_k": "the offsets say it",
    "deterministic": "the op is",
    None: "keywords of the caller, handed on",
}


def test_every_attention_argument_is_known():
    """transformers' models hand nothing to their attention that this package has not decided about."""
    known = HARMLESS.keys() | integration._FOREIGN.keys()
    unknown = {}
    for path in Path(inspect.getfile(transformers)).parent.glob("models/*/modeling_*.py"):
        for call in re.findall(r"= attention_interface\((.*?)\n\s*\)\n", path.read_text(), re.DOTALL):
            for keyword in ast.parse(f"f({call})", mode="eval").body.keywords:
                if keyword.arg not in known:
                    unknown.setdefault(keyword.arg, []).append(path.stem)
    assert unknown == {}
