"""examples/cpp as a user runs it: a package of AOTInductor and TorchScript, in another Python and without Python."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastnlp_ops

EXAMPLE = Path(__file__).parent.parent / "examples/cpp"
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(EXAMPLE.parent.parent), *sys.path])}
RELOAD = """
import sys, torch, fastnlp_ops
model = torch._inductor.aoti_load_package("tagger.pt2")
print(model(*torch.load("inputs.pt")).tolist())
"""


def run(*command, folder):
    result = subprocess.run(
        list(map(str, command)), cwd=folder, env=ENVIRONMENT, check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the script writes, and the tags that it prints."""
    if shutil.which("g++") is None:
        pytest.skip("AOTInductor and the example need g++")
    folder = tmp_path_factory.mktemp("tagger")
    (folder / "tags").write_text(run(sys.executable, EXAMPLE / "export_tagger.py", ".", folder=folder))
    return folder


@pytest.mark.long
def test_package_in_another_python(folder):
    tags = ast.literal_eval((folder / "tags").read_text())
    assert tags[1][6:] == [-1] * 5 and -1 not in tags[0]
    assert ast.literal_eval(run(sys.executable, "-c", RELOAD, folder=folder)) == tags


@pytest.mark.long
def test_without_python(folder):
    source = (EXAMPLE / "main.cpp").read_text()
    assert source.count("\n") <= 40
    text = re.search(r"^//   (g\+\+ .*?-o tagger)$", source, re.MULTILINE | re.DOTALL)[1]  # the command of the comment
    command = re.sub(r" \\\n// +", " ", text).replace("$P", torch.__path__[0])
    run(*command.replace("main.cpp", str(EXAMPLE / "main.cpp")).split(), folder=folder)
    assert b"libpython" not in (folder / "tagger").read_bytes()
    tags = ast.literal_eval((folder / "tags").read_text())
    for model in ("tagger.pt2", "tagger.pt"):
        printed = run("./tagger", fastnlp_ops.library_path(), model, "inputs.pt", folder=folder)
        found = [list(map(int, row.split())) for row in printed.splitlines() if re.fullmatch(r"[-\d ]+", row)]
        assert found == tags, printed


def test_library_path(monkeypatch):
    assert fastnlp_ops.library_path().name == "libfastnlp_cpu.so"
    with pytest.raises(ValueError, match=r"^device must be cpu or cuda, got mps$"):
        fastnlp_ops.library_path("mps")
    monkeypatch.setattr("fastnlp_ops.libraries.__file__", "elsewhere/libraries.py")
    with pytest.raises(FileNotFoundError, match=r"^fastnlp_ops was built without libfastnlp_cuda\.so"):
        fastnlp_ops.library_path("cuda")
