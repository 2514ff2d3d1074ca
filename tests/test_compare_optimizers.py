"""examples/compare_optimizers.py: three optimizers on the tagger of the main job, and whole runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import compare_optimizers  # noqa: E402  (the examples are scripts, found next to each other)
from training import Trained  # noqa: E402

from fastnlp_ops import Adafactor  # noqa: E402


def test_equal_loss():
    fast, slow = Trained("a", None, [4.0] + [1.0] * 20), Trained("b", None, [4.0] + [3.0] * 10 + [2.0] * 10)
    assert fast.running_losses()[:3] == [4.0, 2.5, 2.0]
    assert compare_optimizers.equal_loss([fast, slow]) == 2.0
    assert (fast.steps_to(2.0), slow.steps_to(2.0)) == (3, 21)


def test_run(tmp_path):
    """As a user runs it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, EXAMPLES / "compare_optimizers.py", "--output", tmp_path, "--quick", "--steps", "4"]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    for part in ("fastnlp_ops Adafactor", "torch AdamW", "MiB", "over the first 4 steps the losses"):
        assert part in done.stdout
    assert (tmp_path / "compare_optimizers.png").read_bytes().startswith(b"\x89PNG")


def test_without_transformers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare_optimizers, "find_spec", lambda _: None)
    assert compare_optimizers.main(["--steps", "2", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "transformers is not installed: its Adafactor is left out" in printed
    assert "transformers Adafactor" not in printed


def test_another_step_is_noticed(tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")

    def longer(parameters):
        return Adafactor(parameters, **compare_optimizers.OPTIONS | {"lr": 1.01 * compare_optimizers.OPTIONS["lr"]})

    monkeypatch.setattr(compare_optimizers, "ours", longer)
    assert compare_optimizers.main(["--steps", "8", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("compare_optimizers: the two Adafactors do not train alike")


def test_bad_steps(tmp_path, capsys):
    assert compare_optimizers.main(["--steps", "0", "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "compare_optimizers: --steps must be at least 1, got 0\n"
    assert not (tmp_path / "out").exists()
