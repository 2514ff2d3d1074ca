"""Hands the build of the compiled libraries to CMake; everything else stands in pyproject.toml."""

import os
import shlex
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def torch_include() -> Path:
    """Find torch's headers without importing torch, also where build isolation hides it."""
    spec = find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    folders.append(Path(sysconfig.get_path("purelib")) / "torch")
    for folder in folders:
        if (folder / "include/torch/csrc/stable/library.h").exists():
            return folder / "include"
    sys.exit(f"fastnlp_ops compiles against the headers of torch >= 2.10, not in {folders[-1]}: install torch first.")


class BuildLibraries(build_ext):
    def run(self) -> None:
        import pybind11

        inplace = self.inplace or self.editable_mode
        target = (ROOT if inplace else Path(self.build_lib).resolve()) / "fastnlp_ops"
        folder = ROOT / "build" / "cmake"
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
        environment = os.environ | {"PATH": path}
        definitions = {
            "TORCH_INCLUDE": torch_include(),
            "PYBIND11_INCLUDE": pybind11.get_include(),
            "FASTNLP_PYTHONS": sys.executable,
        }
        # The compilers and options of an earlier build are not this one's.
        (folder / "CMakeCache.txt").unlink(missing_ok=True)
        configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, *(f"-D{k}={v}" for k, v in definitions.items())]
        for command in (
            configure + shlex.split(os.environ.get("CMAKE_ARGS", "")),
            ["cmake", "--build", folder],
            ["cmake", "--install", folder, "--strip", "--prefix", target],
        ):
            subprocess.run(list(map(str, command)), check=True, env=environment)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]  # the libraries hold no Python; _host names its own


if not {"sdist", "egg_info"} & set(sys.argv):
    torch_include()  # before pip downloads anything
setup(ext_modules=[Extension("fastnlp_ops._host", [])], cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel})
