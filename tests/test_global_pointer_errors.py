"""Bad calls of the GlobalPointer functions, and the exact sentences that they get."""

import pytest
import torch

import fastnlp_ops

B, n, H, d = 2, 5, 3, 4
NAMES = ["global_pointer_scores", "global_pointer_loss", "global_pointer_decode"]


def good_arguments(device):
    return {
        "q": torch.randn(B, n, H, d, device=device),
        "k": torch.randn(B, n, H, d, device=device),
        "labels": torch.zeros(B, H, 2, 2, dtype=torch.int64, device=device),
    }


def call(name, arguments):
    arguments = dict(arguments)
    tensors = [arguments.pop("q"), arguments.pop("k")]
    labels = arguments.pop("labels")
    if name == "global_pointer_loss":
        tensors.append(labels)
    return getattr(fastnlp_ops, name)(*tensors, **arguments)


def assert_raises(error, sentence, name, arguments):
    with pytest.raises(error) as caught:
        call(name, arguments)
    assert str(caught.value) == sentence


def q_and_k(*shape, dtype=torch.float32):
    return {"q": torch.ones(shape, dtype=dtype), "k": torch.ones(shape, dtype=dtype)}


def biases(*shape, dtype=torch.float32):
    return {"start_bias": torch.zeros(B, n, H), "end_bias": torch.zeros(shape, dtype=dtype)}


BAD = [
    (ValueError, q_and_k(2, 5, 12), "q must be [B, n, H, d], got shape (2, 5, 12)"),
    (ValueError, q_and_k(2, 5, 0, 4), "q must have at least one head and one channel, got shape (2, 5, 0, 4)"),
    (
        ValueError,
        q_and_k(2, 5, 3, 0) | {"rope": False},
        "q must have at least one head and one channel, got shape (2, 5, 3, 0)",
    ),
    (ValueError, q_and_k(2, 5, 3, 7), "q must have an even head size where rope is on, got shape (2, 5, 3, 7)"),
    (
        TypeError,
        q_and_k(2, 5, 3, 4, dtype=torch.int64),
        "q must be float32, float64, float16 or bfloat16, got torch.int64",
    ),
    (
        TypeError,
        {"k": torch.ones(2, 5, 3, 4, dtype=torch.complex64)},
        "k must be float32, float64, float16 or bfloat16, got torch.complex64",
    ),
    (ValueError, {"k": torch.ones(2, 6, 3, 4)}, "k must be [B, n, H, d] = (2, 5, 3, 4), got shape (2, 6, 3, 4)"),
    (ValueError, {"start_bias": torch.ones(2, 5, 3)}, "start_bias and end_bias must be given together"),
    (ValueError, {"end_bias": torch.ones(2, 5, 3)}, "start_bias and end_bias must be given together"),
    (ValueError, biases(2, 5, 4), "end_bias must be [B, n, H] = (2, 5, 3), got shape (2, 5, 4)"),
    (ValueError, biases(2, 3, 5), "end_bias must be [B, n, H] = (2, 5, 3), got shape (2, 3, 5)"),
    (
        TypeError,
        biases(2, 5, 3, dtype=torch.int32),
        "end_bias must be float32, float64, float16 or bfloat16, got torch.int32",
    ),
    (
        ValueError,
        q_and_k(2, 5, 2, 4) | biases(2, 5, 3),
        "start_bias must be [B, n, H] = (2, 5, 2), got shape (2, 5, 3)",
    ),
    (
        ValueError,
        q_and_k(2, 5, 1, 4) | {"start_bias": torch.ones(2, 5), "end_bias": torch.ones(2, 5)},
        "start_bias must be [B, n, H] = (2, 5, 1), got shape (2, 5)",
    ),
    (
        ValueError,
        q_and_k(2, 5, 1, 4) | {"start_bias": torch.ones(2, 5, 0), "end_bias": torch.ones(2, 5, 0)},
        "start_bias must be [B, n, H] = (2, 5, 1), got shape (2, 5, 0)",
    ),
    (ValueError, {"mask": torch.ones(5, 2)}, "mask must be [B, n] = (2, 5), got shape (5, 2)"),
    (
        TypeError,
        {"mask": torch.ones(2, 5, dtype=torch.complex64)},
        "mask must be bool, integer or floating point, got torch.complex64",
    ),
    (ValueError, {"position_ids": torch.arange(5)}, "position_ids must be [B, n] = (2, 5), got shape (5,)"),
    (TypeError, {"position_ids": torch.ones(2, 5)}, "position_ids must be integers, got torch.float32"),
    (ValueError, {"max_span_length": 0}, "max_span_length must be at least 1, got 0"),
    (ValueError, {"max_span_length": -3}, "max_span_length must be at least 1, got -3"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", range(len(BAD)))
def test_errors(name, number, device):
    error, bad, sentence = BAD[number]
    bad = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in bad.items()}
    assert_raises(error, sentence, name, good_arguments(device) | bad)


@pytest.mark.parametrize("name", ["k", "start_bias", "end_bias", "mask", "position_ids"])
def test_errors_of_devices(name, device):
    arguments = good_arguments(device)
    arguments |= {"start_bias": torch.ones(B, n, H, device=device), "end_bias": torch.ones(B, n, H, device=device)}
    arguments |= {"mask": torch.ones(B, n, device=device), "position_ids": torch.zeros(B, n, dtype=torch.int64)}
    arguments["position_ids"] = arguments["position_ids"].to(device)
    sentence = f"{name} must be on the device of q, {arguments['q'].device}, got meta"
    assert_raises(ValueError, sentence, "global_pointer_scores", arguments | {name: arguments[name].to("meta")})


def labels_of(*cells, device="cpu"):
    return torch.tensor(cells, device=device).reshape(-1, 4)


def padded(b, h, start, end):
    """Labels [B, H, 2, 2] without labels but for one."""
    labels = torch.full((B, H, 2, 2), -1)
    labels[b, h, 1] = torch.tensor([start, end])
    return labels


LABELS = [
    (
        ValueError,
        torch.zeros(2, 3, 2, dtype=torch.int64),
        "labels must be [B, H, P, 2] = (2, 3, P, 2) or [M, 4], got shape (2, 3, 2)",
    ),
    (
        ValueError,
        torch.zeros(3, 2, 1, 2, dtype=torch.int64),
        "labels must be [B, H, P, 2] = (2, 3, P, 2) or [M, 4], got shape (3, 2, 1, 2)",
    ),
    (
        ValueError,
        torch.zeros(7, 3, dtype=torch.int64),
        "labels must be [B, H, P, 2] = (2, 3, P, 2) or [M, 4], got shape (7, 3)",
    ),
    (TypeError, torch.zeros(7, 4), "labels must be integers, got torch.float32"),
    (TypeError, torch.zeros(2, 3, 5, 2, dtype=torch.bool), "labels must be integers, got torch.bool"),
    (
        ValueError,
        torch.zeros(7, 4, dtype=torch.int64, device="meta"),
        "labels must be on the device of q, cpu, got meta",
    ),
]


@pytest.mark.parametrize("number", range(len(LABELS)))
def test_errors_of_labels(number, device):
    error, labels, sentence = LABELS[number]
    labels = labels if labels.device.type == "meta" else labels.to(device)
    arguments = good_arguments(device)
    sentence = sentence.replace("cpu", str(arguments["q"].device))
    assert_raises(error, sentence, "global_pointer_loss", arguments | {"labels": labels})


WRONG = [
    (padded(1, 2, 0, 5), (1, 2, 0, 5)),
    (padded(0, 1, 5, 4), (0, 1, 5, 4)),
    (padded(1, 0, 0, 25), (1, 0, 0, 25)),  # n * n, which is one past the last flat index
    (padded(1, 0, 2, -2), (1, 0, 2, -2)),
    (padded(0, 0, 2**40, 0), (0, 0, 2**40, 0)),
    (labels_of((0, 0, 0, 0), (2, 0, 0, 0)), (2, 0, 0, 0)),
    (labels_of((0, 3, 0, 0)), (0, 3, 0, 0)),
    (labels_of((0, 0, 0, 7), (1, 1, 1, 9)), (0, 0, 0, 7)),
    (labels_of((-2, 0, 0, 0)), (-2, 0, 0, 0)),
]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("number", range(len(WRONG)))
def test_errors_of_label_values(number, compiled, device):
    """Out of range: an error on the CPU, compiled too; dropped on a GPU, where nothing reads values."""
    labels, found = WRONG[number]
    arguments = good_arguments(device) | {"labels": labels.to(device)}
    function = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    if device.type == "cpu":
        with pytest.raises(ValueError) as caught:
            function("global_pointer_loss", arguments)
        wanted = "labels must be (b, h, start, end) below (2, 3, 5, 5), or -1 or -100 for none"
        assert str(caught.value) == f"{wanted}, got {found}"
    else:
        sizes = torch.tensor([B, H, n, n])[-labels.shape[-1] :]
        fits = ((labels >= -1) & (labels < sizes)).all(-1, keepdim=True)
        arguments["labels"] = torch.where(fits, labels, -1).to(device)
        expected = call("global_pointer_loss", arguments)
        assert torch.equal(function("global_pointer_loss", arguments | {"labels": labels.to(device)}), expected)


@pytest.mark.parametrize("labels", [padded(0, 0, -1, 99), padded(0, 0, 99, -1), labels_of((-1, 9, 9, 9))], ids=str)
def test_padding_is_not_read(labels, device):
    """One -1 makes a label padding, whatever else stands in it."""
    arguments = good_arguments(device)
    none = torch.full((0, 4), -1, device=device)
    expected = call("global_pointer_loss", arguments | {"labels": none})
    assert torch.equal(call("global_pointer_loss", arguments | {"labels": labels.to(device)}), expected)


def test_errors_of_options(device):
    arguments = good_arguments(device)
    sentence = "reduction must be none, mean, sum or batchmean, got max"
    assert_raises(ValueError, sentence, "global_pointer_loss", arguments | {"reduction": "max"})
    assert_raises(ValueError, "top_k must be at least 1, got 0", "global_pointer_decode", arguments | {"top_k": 0})
    nan = arguments | {"threshold": float("nan")}
    assert_raises(ValueError, "threshold must be a number, got nan", "global_pointer_decode", nan)


def divergence_error(**changes):
    x = torch.randn(B, n, 1, d)
    arguments = {"q1": x, "k1": x, "q2": x, "k2": x} | changes
    tensors = [arguments.pop(name) for name in ("q1", "k1", "q2", "k2")]
    with pytest.raises((ValueError, TypeError)) as caught:
        fastnlp_ops.global_pointer_divergence(*tensors, **arguments)
    return type(caught.value), str(caught.value)


def test_errors_of_divergence():
    other, bias = torch.randn(B, n, 2, d), torch.zeros(B, n, 3)
    like = "[B, n, H, d] = (2, 5, 1, 4)"
    assert divergence_error(k1=other) == (ValueError, f"k1 must be {like}, got shape (2, 5, 2, 4)")
    assert divergence_error(k2=other) == (ValueError, f"k2 must be {like}, got shape (2, 5, 2, 4)")
    assert divergence_error(q2=other, k2=other) == (ValueError, f"q2 must be {like} as q1, got shape (2, 5, 2, 4)")
    assert divergence_error(q2=other.long(), k2=other) == (
        TypeError,
        "q2 must be float32, float64, float16 or bfloat16, got torch.int64",
    )
    meta = torch.randn(B, n, 1, d, device="meta")
    assert divergence_error(q2=meta, k2=meta) == (ValueError, "q2 must be on the device of q1, cpu, got meta")
    assert divergence_error(end_bias2=bias) == (ValueError, "start_bias2 and end_bias2 must be given together")
    same = (ValueError, "start_bias1 and start_bias2 must have the same shape, or both be None")
    assert divergence_error(start_bias1=bias, end_bias1=bias) == same
    single = bias[..., :1]
    assert divergence_error(start_bias1=single, end_bias1=single) == same
    assert divergence_error(start_bias1=single, end_bias1=single, start_bias2=bias, end_bias2=bias) == same
    assert divergence_error(mask=torch.ones(5)) == (ValueError, "mask must be [B, n] = (2, 5), got shape (5,)")
    assert divergence_error(reduction=None) == (ValueError, "reduction must be none, mean, sum or batchmean, got None")


OP_BAD = {
    "k must be [B, n, H, d] = (2, 5, 3, 4), got shape (2, 4, 3, 4)": {1: torch.ones(B, n - 1, H, d)},
    "k must be Float like q, got Double": {1: torch.ones(B, n, H, d, dtype=torch.float64)},
    "q must have adjacent channels (stride 1)": {0: torch.ones(B, n, H, 2 * d)[..., ::2]},
    "start_bias and end_bias must be given together": {3: torch.ones(B, n, H)},
    "start_bias must be [B, n, H] = (2, 5, 3), got shape (2, 5, 4)": {3: torch.ones(B, n, 4), 4: torch.ones(B, n, 4)},
    "mask must be Bool, got Float": {5: torch.ones(B, n)},
    "mask must have shape (2, 5), got shape (5, 2)": {5: torch.ones(n, B, dtype=torch.bool)},
    "position_ids must be Long, got Int": {6: torch.ones(B, n, dtype=torch.int32)},
    "cells must be Long, got Float": {2: torch.ones(3)},
    "cells must be [M], got shape (3, 1)": {2: torch.zeros(3, 1, dtype=torch.int64)},
    "max_span_length must be at least 1, got 0": {9: 0},
}


@pytest.mark.parametrize("sentence", OP_BAD)
def test_errors_of_ops(sentence):
    """An op that is called without the public function says what is wrong and reads nothing that is not there."""
    arguments = [*q_and_k(B, n, H, d).values(), torch.zeros(2, dtype=torch.int64), None, None, None, None]
    arguments += [True, True, -1, 0.5, True]
    torch.ops.fastnlp_ops.global_pointer_loss(*arguments)
    for index, value in OP_BAD[sentence].items():
        arguments[index] = value
    with pytest.raises(ValueError) as caught:
        torch.ops.fastnlp_ops.global_pointer_loss(*arguments)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    "cells",
    [
        [10**15],
        [-(10**15), 3],
        [150, 151],
        [7, 3, 3, 1],
        [0, 2**63 - 1, 1, 2, 3],
        [2**63 - 1, -(2**63), 2**63 - 1, 5],
        [3, -1, -(2**63), 2**63 - 1, -4, 8],
    ],
    ids=str,
)
def test_cells_out_of_range_are_not_followed(cells):
    """Keys that name no cell, or stand out of order, cost the op its meaning and not the process its memory."""
    q, k = q_and_k(B, n, H, d).values()
    sums = torch.ops.fastnlp_ops.global_pointer_loss(
        q, k, torch.tensor(cells), None, None, None, None, True, True, -1, 0.5, True
    )
    assert all(x.isfinite().all() for x in sums) and [x.numel() for x in sums] == [B * H, B * H, 2 * q.numel()]


@pytest.mark.parametrize(("sequences", "length"), [(2**31, 5), (5, 2**31), (2**31, 2**31)])
def test_errors_of_flat_spans(sequences, length):
    """Sizes of an expanded q may be larger than any memory: they are refused before anything is counted with them."""
    q = torch.zeros(1, 1, 1, 1).expand(sequences, length, 1, 1)
    with pytest.raises(ValueError, match=r"sequences and length must be below 2\^31"):
        torch.ops.fastnlp_ops.flat_spans(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1), q)
