"""examples/decode_stream.py: its model in three ways, its inputs, and a whole run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import decode_stream  # noqa: E402  (the examples are scripts, found next to each other)
from stream_model import SoftmaxAttention, StreamModel, memory_size  # noqa: E402

from fastnlp_ops import LinearAttention  # noqa: E402


@pytest.mark.parametrize("attention", [LinearAttention, SoftmaxAttention])
def test_steps_are_the_pass(attention):
    model = StreamModel(attention)
    for block in model.blocks:
        block.attention.room = 40
    tokens = torch.randint(256, (2, 40))
    scores = model(tokens)
    with torch.no_grad():
        _, remembered = model.prefill(tokens[:, :5])
        sizes = [sum(map(memory_size, remembered[1:]))]
        for t in range(5, 40):
            step = model.step(tokens[:, t], remembered)
            torch.testing.assert_close(step, scores[:, t], rtol=1e-4, atol=1e-4)
            sizes.append(sum(map(memory_size, remembered[1:])))
    if attention is LinearAttention:
        assert set(sizes) == {2 * 2 * 4 * (32 * 32 + 32) * 4}  # layers, batch, heads, state, bytes
    else:
        assert sizes == [2 * 2 * 2 * t * 128 * 4 for t in range(5, 41)]


def test_no_byte_sees_a_later_one():
    model, tokens = StreamModel(), torch.randint(256, (1, 20))
    torch.testing.assert_close(model(tokens)[:, :12], model(tokens[:, :12]), rtol=1e-4, atol=1e-5)


def test_library():
    train, test = decode_stream.read_library(seed=0, files=30)
    assert len(train) > 3 * len(test) > 3 * decode_stream.LENGTH
    assert b"import" in bytes(train.tolist())
    assert torch.equal(train, decode_stream.read_library(seed=0, files=30)[0])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--seconds", "0"], "--seconds must be above 0 and --tokens at least 2, got 0.0 and 8192"),
        (["--tokens", "1"], "--seconds must be above 0 and --tokens at least 2, got 60 and 1"),
        (["--prompt", ""], "--prompt must have at least one character"),
    ],
)
def test_bad_arguments(arguments, sentence, tmp_path, capsys):
    assert decode_stream.main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"decode_stream: {sentence}\n"
    assert not (tmp_path / "out").exists()


def test_run(tmp_path):
    """As a user runs it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, EXAMPLES / "decode_stream.py", "--quick", "--output", tmp_path, "--tokens", "200"]
    result = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    for part in ("held-out text", "def ", "linear attention: ", "softmax attention: ", "differ by at most"):
        assert part in result.stdout
    assert (tmp_path / "decode_stream.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_decoding_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decode_stream, "TOLERANCE", -1.0)
    arguments = ["--seconds", "0.1", "--tokens", "2", "--quick", "--output", str(tmp_path)]
    assert decode_stream.main(arguments) == 1
    assert "says something else than in one pass" in capsys.readouterr().err
