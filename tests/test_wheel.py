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


@pytest.mark.long
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_cuda_kernels_keep_to_registers(wheel, tmp_path):
    """Every kernel of every architecture, as nvcc has compiled it for the wheel: no stack frame, so no spills."""
    import triton

    library = zipfile.ZipFile(wheel).extract("fastnlp_ops/libfastnlp_cuda.so", tmp_path)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = run(cuobjdump, "--dump-resource-usage", library)
    assert set(re.findall(r"elf code:\n=+\narch = (\w+)", report)) == {"sm_80", "sm_90a", "sm_100a", "sm_120a"}
    stacks = re.findall(r"Function (\w+):\n.*?STACK:(\d+)", report)
    assert len(stacks) > 100
    assert [f"{name}: {stack} bytes" for name, stack in stacks if int(stack) > stack_allowed(name)] == []


def stack_allowed(kernel):
    # The backward pass of 33 to 64 tags needs 192 registers for its matrices alone, of 255.
    return 64 if "crf_smooth_kernelIfLi64E" in kernel else 0
