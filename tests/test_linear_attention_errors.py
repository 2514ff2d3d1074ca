"""Bad calls of the linear attention functions, and the exact sentences that they get."""

import pytest
import torch

import fastnlp_ops
from fastnlp_ops import LinearAttentionState

B, T, H, G, Dk, Dv = 2, 5, 6, 3, 4, 7
MAPS = "identity, elu+1, relu, relu^2, exp, softmax, cosine+1"


def good_arguments():
    return {"q": torch.ones(B, T, H, Dk), "k": torch.ones(B, T, G, Dk), "v": torch.ones(B, T, G, Dv)}


def state_of(rows=Dk, sequences=B, key_max=None, dtype=torch.float32):
    kv, key_sum = torch.zeros(sequences, G, rows, Dv, dtype=dtype), torch.zeros(sequences, G, rows, dtype=dtype)
    return LinearAttentionState(kv, key_sum, key_max)


def packed(offsets_q=(0, 3, 5), offsets_k=None, length=T):
    arguments = {"q": torch.ones(1, T, H, Dk), "k": torch.ones(1, length, G, Dk), "v": torch.ones(1, length, G, Dv)}
    for name, offsets in (("cu_seqlens_q", offsets_q), ("cu_seqlens_k", offsets_k)):
        if offsets is not None:
            arguments[name] = offsets if isinstance(offsets, torch.Tensor) else torch.tensor(offsets)
    return arguments


def assert_raises(error, sentence, arguments, function="linear_attention"):
    arguments = dict(arguments)
    tensors = [arguments.pop(name) for name in ("q", "k", "v")]
    with pytest.raises(error) as caught:
        getattr(fastnlp_ops, function)(*tensors, **arguments)
    assert str(caught.value) == sentence


BAD = [
    (ValueError, {"q": torch.ones(2, 5, 24)}, "q must be [B, Tq, H, Dk], got shape (2, 5, 24)"),
    (ValueError, {"k": torch.ones(2, 5, 12)}, "k must be [B, Tk, Hkv, Dk] = (2, Tk, Hkv, 4), got shape (2, 5, 12)"),
    (
        ValueError,
        {"k": torch.ones(3, 5, 3, 4)},
        "k must be [B, Tk, Hkv, Dk] = (2, Tk, Hkv, 4), got shape (3, 5, 3, 4)",
    ),
    (
        ValueError,
        {"k": torch.ones(2, 5, 3, 5)},
        "k must be [B, Tk, Hkv, Dk] = (2, Tk, Hkv, 4), got shape (2, 5, 3, 5)",
    ),
    (ValueError, {"v": torch.ones(2, 6, 3, 7)}, "v must be [B, Tk, Hkv, Dv] = (2, 5, 3, Dv), got shape (2, 6, 3, 7)"),
    (ValueError, {"v": torch.ones(2, 5, 6, 7)}, "v must be [B, Tk, Hkv, Dv] = (2, 5, 3, Dv), got shape (2, 5, 6, 7)"),
    (
        ValueError,
        {"q": torch.ones(2, 5, 0, 4)},
        "q must have at least one head and one channel, got shape (2, 5, 0, 4)",
    ),
    (
        ValueError,
        {"v": torch.ones(2, 5, 3, 0)},
        "v must have at least one head and one channel, got shape (2, 5, 3, 0)",
    ),
    (ValueError, {"q": torch.ones(2, 5, 4, 4)}, "q must have a multiple of the heads of k, 3, got 4"),
    (ValueError, {"q": torch.ones(2, 5, 1, 4)}, "q must have a multiple of the heads of k, 3, got 1"),
    (
        TypeError,
        {"q": torch.ones(2, 5, 6, 4, dtype=torch.int64)},
        "q must be float32, float64, float16 or bfloat16, got torch.int64",
    ),
    (
        TypeError,
        {"k": torch.ones(2, 5, 3, 4, dtype=torch.float16)},
        "k must be torch.float32 where q is torch.float32, got torch.float16",
    ),
    (
        TypeError,
        {"v": torch.ones(2, 5, 3, 7, dtype=torch.float64)},
        "v must be torch.float32 where q is torch.float32, got torch.float64",
    ),
    (ValueError, {"feature_map": "tanh"}, f"feature_map must be {MAPS} or None, got tanh"),
    (ValueError, {"eps": 0.0}, "eps must be above 0, got 0.0"),
    (ValueError, {"eps": float("nan")}, "eps must be above 0, got nan"),
    (
        ValueError,
        {"causal": True, "q": torch.ones(2, 4, 6, 4)},
        "q and k must be of one length where causal is on, got 4 and 5",
    ),
    (
        ValueError,
        {"causal": True, "q": torch.ones(2, 0, 6, 4)},
        "q and k must be of one length where causal is on, got 0 and 5",
    ),
    (
        ValueError,
        {"key_padding_mask": torch.ones(5, 2, dtype=torch.bool)},
        "key_padding_mask must be [B, Tk] = (2, 5), got shape (5, 2)",
    ),
    (
        TypeError,
        {"key_padding_mask": torch.ones(2, 5)},
        "key_padding_mask must be torch.bool where q is torch.float32, got torch.float32",
    ),
    (
        ValueError,
        {"cu_seqlens_q": torch.tensor([0, 5])},
        "q must be [1, Tq, H, Dk] where cu_seqlens are given, got shape (2, 5, 6, 4)",
    ),
    (
        ValueError,
        packed() | {"key_padding_mask": torch.ones(1, 5, dtype=torch.bool)},
        "key_padding_mask must be None where cu_seqlens are given",
    ),
    (ValueError, packed([[0, 5]]), "cu_seqlens_q must be [N + 1], got shape (1, 2)"),
    (ValueError, packed(None, torch.zeros(0, dtype=torch.int64)), "cu_seqlens_k must be [N + 1], got shape (0,)"),
    (TypeError, packed((0.0, 5.0)), "cu_seqlens_q must be int32 or int64, got torch.float32"),
    (ValueError, packed((0, 5), (0, 2, 5)), "cu_seqlens_k must be [N + 1] = (2), got shape (3,)"),
    (
        ValueError,
        packed((0, 5), None, 8),
        "cu_seqlens_k must be given where q and k differ in length, got 5 and 8",
    ),
    (
        ValueError,
        packed(None, (0, 8), 8),
        "cu_seqlens_q must be given where q and k differ in length, got 5 and 8",
    ),
    (ValueError, {"log_decay": torch.zeros(3)}, "log_decay must be None where causal is off"),
    (
        ValueError,
        {"log_decay": torch.zeros(3), "causal": True, "feature_map": "exp"},
        "log_decay must be None where feature_map is exp",
    ),
    (
        ValueError,
        {"log_decay": torch.zeros(3), "causal": True, "feature_map": "softmax"},
        "log_decay must be None where feature_map is softmax",
    ),
    (
        ValueError,
        {"log_decay": torch.zeros(6), "causal": True},
        "log_decay must be [Hkv] = (3,) or [B, T, Hkv] = (2, 5, 3), got shape (6,)",
    ),
    (
        TypeError,
        {"log_decay": torch.zeros(3, dtype=torch.bfloat16), "causal": True},
        "log_decay must be torch.float32 where q is torch.float32, got torch.bfloat16",
    ),
    (TypeError, {"initial_state": torch.zeros(3)}, "initial_state must be a LinearAttentionState, got Tensor"),
    (
        ValueError,
        {"initial_state": state_of(Dk + 1)},
        "initial_state.kv must be [N, Hkv, F, Dv] = (2, 3, 4, 7), got shape (2, 3, 5, 7)",
    ),
    (
        ValueError,
        {"initial_state": state_of(), "feature_map": "cosine+1"},
        "initial_state.kv must be [N, Hkv, F, Dv] = (2, 3, 5, 7), got shape (2, 3, 4, 7)",
    ),
    (
        ValueError,
        packed((0, 1, 3, 5)) | {"initial_state": state_of(sequences=2)},
        "initial_state.kv must be [N, Hkv, F, Dv] = (3, 3, 4, 7), got shape (2, 3, 4, 7)",
    ),
    (
        ValueError,
        {"initial_state": state_of()._replace(key_sum=torch.zeros(2, 3))},
        "initial_state.key_sum must be [N, Hkv, F] = (2, 3, 4), got shape (2, 3)",
    ),
    (
        ValueError,
        {"initial_state": state_of(key_max=torch.zeros(2, 3, 4))},
        "initial_state.key_max must be None where feature_map is elu+1",
    ),
    (
        ValueError,
        {"initial_state": state_of(), "feature_map": "softmax"},
        "initial_state.key_max must be given where feature_map is softmax",
    ),
    (
        ValueError,
        {"initial_state": state_of(key_max=torch.zeros(2, 4)), "feature_map": "exp", "causal": True},
        "initial_state.key_max must be [N, Hkv, Dk] = (2, 3, 4), got shape (2, 4)",
    ),
    (
        TypeError,
        {"initial_state": state_of(dtype=torch.float64)},
        "initial_state.kv must be torch.float32 where q is torch.float32, got torch.float64",
    ),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_errors(number):
    error, bad, sentence = BAD[number]
    assert_raises(error, sentence, good_arguments() | bad)


@pytest.mark.parametrize("name", ["k", "v", "key_padding_mask", "log_decay", "kv", "key_sum", "cu_seqlens_q"])
def test_errors_of_devices(name, device):
    arguments = {key: x.to(device) for key, x in good_arguments().items()} | {"causal": True}
    meta = torch.device("meta")
    if name in ("kv", "key_sum"):
        state = LinearAttentionState(*(x.to(device) for x in state_of()[:2]))
        arguments["initial_state"] = state._replace(**{name: getattr(state, name).to(meta)})
        name = f"initial_state.{name}"
    elif name == "cu_seqlens_q":
        arguments |= {key: x.to(device) for key, x in packed().items()} | {name: torch.tensor([0, 5], device=meta)}
    elif name == "key_padding_mask":
        arguments[name] = torch.ones(B, T, dtype=torch.bool, device=meta)
    elif name == "log_decay":
        arguments[name] = torch.zeros(G, device=meta)
    else:
        arguments[name] = arguments[name].to(meta)
    assert_raises(ValueError, f"{name} must be on the device of q, {arguments['q'].device}, got meta", arguments)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("offsets", [(0, 3), (1, 5), (0, 4, 3, 5), (0, 3, 6), (0, -1, 5), (0, 9, 5)], ids=str)
def test_errors_of_offsets(offsets, compiled, device):
    """Offsets that do not rise from 0 to the number of tokens: an error on the CPU, compiled too."""
    if device.type != "cpu":
        pytest.skip("values are not read on a GPU")
    function = fastnlp_ops.linear_attention
    function = torch.compile(function, backend="aot_eager", fullgraph=True) if compiled else function
    for name, causal in (("q", True), ("k", False)):
        arguments = packed((0, 3, 5), (0, 3, 5)) | {f"cu_seqlens_{name}": torch.tensor(offsets)}
        other = "k" if name == "q" else "q"
        arguments[f"cu_seqlens_{other}"] = torch.linspace(0, T, len(offsets)).long()
        q, k, v = (arguments.pop(tensor) for tensor in "qkv")
        with pytest.raises(ValueError) as caught:
            function(q, k, v, causal=causal, **arguments)
        assert str(caught.value) == f"cu_seqlens_{name} must rise from 0 to the number of tokens, {T}"


def test_errors_of_causal_offsets(device):
    """Queries and keys of a causal sequence are the same tokens."""
    if device.type != "cpu":
        pytest.skip("values are not read on a GPU")
    arguments = packed((0, 3, 5), (0, 2, 5)) | {"causal": True}
    assert_raises(ValueError, "cu_seqlens_q and cu_seqlens_k must have the same values where causal", arguments)


STEP_BAD = [
    (ValueError, {"q": torch.ones(2, 1, 6, 4)}, "q must be [B, H, Dk], got shape (2, 1, 6, 4)"),
    (ValueError, {"k": torch.ones(2, 3, 5)}, "k must be [B, Hkv, Dk] = (2, Hkv, 4), got shape (2, 3, 5)"),
    (ValueError, {"v": torch.ones(2, 6, 7)}, "v must be [B, Hkv, Dv] = (2, 3, Dv), got shape (2, 6, 7)"),
    (ValueError, {"q": torch.ones(2, 4, 4)}, "q must have a multiple of the heads of k, 3, got 4"),
    (
        TypeError,
        {"v": torch.ones(2, 3, 7, dtype=torch.float64)},
        "v must be torch.float32 where q is torch.float32, got torch.float64",
    ),
    (ValueError, {"feature_map": "elu"}, f"feature_map must be {MAPS} or None, got elu"),
    (ValueError, {"eps": -1}, "eps must be above 0, got -1"),
    (TypeError, {"state": None}, "state must be a LinearAttentionState, got NoneType"),
    (
        ValueError,
        {"state": state_of(sequences=3)},
        "state.kv must be [N, Hkv, F, Dv] = (2, 3, 4, 7), got shape (3, 3, 4, 7)",
    ),
    (ValueError, {"feature_map": "exp"}, "state.key_max must be given where feature_map is exp"),
    (
        ValueError,
        {"state": state_of()._replace(kv=torch.zeros(2, 3, 7, 4).transpose(2, 3))},
        "state.kv must be contiguous: it is updated in place",
    ),
    (
        ValueError,
        {"log_decay": torch.zeros(2, 1, 3)},
        "log_decay must be [Hkv] = (3,) or [B, Hkv] = (2, 3), got shape (2, 1, 3)",
    ),
]


@pytest.mark.parametrize("number", range(len(STEP_BAD)))
def test_errors_of_step(number):
    error, bad, sentence = STEP_BAD[number]
    arguments = {name: x[:, 0] for name, x in good_arguments().items()} | {"state": state_of()} | bad
    assert_raises(error, sentence, arguments, "linear_attention_step")


@pytest.mark.parametrize("name", ["q", "k", "v", "state"])
def test_errors_of_gradients_in_step(name):
    arguments = {key: x[:, 0] for key, x in good_arguments().items()} | {"state": state_of()}
    (arguments["state"].kv if name == "state" else arguments[name]).requires_grad_()
    sentence = "linear_attention_step has no gradient: call it under torch.no_grad(), or train on linear_attention"
    assert_raises(NotImplementedError, sentence, arguments, "linear_attention_step")
    with torch.no_grad():
        fastnlp_ops.linear_attention_step(**arguments)
