"""The wheel that users get: built by `make wheel`, installed without a compiler, called."""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

CALL = """
import torch, fastnlp_ops
assert fastnlp_ops.__file__.startswith({prefix!r}), fastnlp_ops.__file__
crf = fastnlp_ops.CRF(3, batch_first=True)
emissions = torch.randn(2, 5, 3)
loss = -crf(emissions, torch.zeros(2, 5, dtype=torch.long))
loss.backward()
print(loss.isfinite().item(), len(crf.decode(emissions)))
"""


def run(*command, **options):
    result = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel():
    run("make", "wheel", f"VENV={sys.prefix}", cwd=ROOT)
    (found,) = (ROOT / "dist").glob("*.whl")
    return found


@pytest.mark.long
def test_contents(wheel):
    assert re.fullmatch(r"fastnlp_ops-[\d.]+-py3-none-manylinux_2_\d+_x86_64\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert all(name.startswith("fastnlp_ops") for name in names), "no tests, no vendored libraries"
    assert {"fastnlp_ops/py.typed", "fastnlp_ops/_host.pyi", "fastnlp_ops/libfastnlp_cpu.so"} <= set(names)
    assert ("fastnlp_ops/libfastnlp_cuda.so" in names) == (shutil.which("nvcc") is not None)
    pythons = run("make", "--silent", "pythons", cwd=ROOT).strip().split(";")
    assert len([name for name in names if "/_host.cpython-" in name]) == len(pythons) >= 1


@pytest.mark.long
def test_installs_and_runs_without_a_compiler(wheel, tmp_path):
    target = tmp_path / "venv"
    venv.create(target)
    python = target / "bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel)
    # torch and numpy of this environment, through a .pth: nothing is downloaded. Our own editable install is not seen,
    # because the .pth files of a folder named in a .pth are not read.
    site = target / f"lib/python{sysconfig.get_python_version()}/site-packages"
    (site / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    bare = {"PATH": str(tmp_path / "nothing"), "HOME": str(tmp_path)}
    assert run(python, "-c", CALL.format(prefix=str(target)), cwd=tmp_path, env=bare).split() == ["True", "2"]
    assert "crf_viterbi" in run(python, "-m", "fastnlp_ops", cwd=tmp_path, env=bare)


@pytest.mark.long
def test_host_on_every_python(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    for python in run("make", "--silent", "pythons", cwd=ROOT).strip().split(";"):
        code = "import _host; print(_host.cpu_features())"  # without torch, which the others may lack
        assert run(python, "-c", code, cwd=tmp_path / "fastnlp_ops").strip() in {"baseline", "x86-64-v3"}
