"""The shape of the house: the grid of files, public names and docstrings, what import costs, what the build does."""

import doctest
import importlib
import inspect
import os
import re
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import pytest
import torch

import fastnlp_ops
from fastnlp_ops import __main__ as report
from fastnlp_ops import reference

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastnlp_ops"
FAMILIES = sorted(path.stem for path in PACKAGE.glob("_ops/[!_]*.py"))
MODULES = sorted(path.stem for path in PACKAGE.glob("[!_]*.py"))
PUBLIC = [name for name in fastnlp_ops.__all__ if callable(getattr(fastnlp_ops, name))]
OPS = report.ops()

GRID = {
    "public": ["fastnlp_ops/{}.py"],
    "reference": ["fastnlp_ops/reference/{}.py"],
    "glue": ["fastnlp_ops/_ops/{}.py"],
    "CPU kernel": ["csrc/cpu/{}.cpp"],
    "GPU kernel": ["csrc/cuda/{}*.cu", "fastnlp_ops/_triton/{}*.py"],
    "test": ["tests/test_{}.py"],
    "benchmark": ["benchmarks/bench_{}.py"],
}
# The order of a docstring's parts. "Equivalent to", "Args" and the like stand on lines of their own.
SECTIONS = ["Equivalent to", "Args", "Returns", "Raises", "Preconditions", "Precision", "References"]

# Files that may pass 400 lines, with the one thing that each holds.
LONG_FILES = {
    "fastnlp_ops/reference/crf.py": "one derivation, read from top to bottom",
    "tests/test_adafactor_adversarial.py": "every hostile input of the family, one after the other",
    "tests/test_crf_adversarial.py": "every hostile input of the family, one after the other",
    "tests/test_global_pointer_adversarial.py": "every hostile input of the family, one after the other",
}


# Ops whose results are integers or bool, or that have none.
NO_GRADIENT = {
    "fastnlp_ops::adafactor_step_",
    "fastnlp_ops::crf_sample",
    "fastnlp_ops::flat_spans",
    "fastnlp_ops::global_pointer_cells",
}


def run(*command, **options):
    return subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True, **options)


def tools():
    """An environment in which the build tools of this interpreter's environment come first."""
    return os.environ | {"PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])}


def tracked_files():
    listing = run("git", "ls-files", "-z", cwd=ROOT)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def text(path):
    try:
        return path.read_text()
    except UnicodeDecodeError:
        return ""


@pytest.mark.parametrize("role", GRID)
@pytest.mark.parametrize("family", FAMILIES)
def test_grid(family, role):
    wanted = [pattern.format(family) for pattern in GRID[role]]
    assert any(list(ROOT.glob(pattern)) for pattern in wanted), f"{family} lacks {' or '.join(wanted)}"


def test_public_names():
    defined = set()
    for stem in MODULES:
        module = importlib.import_module(f"fastnlp_ops.{stem}")
        defined |= {
            name
            for name, value in vars(module).items()
            if callable(value) and not name.startswith("_") and value.__module__ == module.__name__
        }
    assert defined == set(PUBLIC), "what a public module defines is in fastnlp_ops.__all__, and nothing else"
    assert all(hasattr(fastnlp_ops, name) for name in fastnlp_ops.__all__)


@pytest.mark.parametrize("name", [name for name in PUBLIC if hasattr(reference, name)])
def test_reference_signature(name):
    ours, theirs = (
        {key: (p.kind, p.default) for key, p in inspect.signature(getattr(module, name)).parameters.items()}
        for module in (fastnlp_ops, reference)
    )
    assert ours == theirs


def sections(doc):
    """Headings of a docstring in their order, each with its text."""
    parts = re.split(rf"^({'|'.join(SECTIONS)})\b[^\n]*:[^\S\n]*$", doc, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def documented(name):
    """Parameters that the docstring of `name` describes, itself or as in "mask: as in :func:`crf_viterbi`."."""
    args = sections(inspect.getdoc(getattr(fastnlp_ops, name))).get("Args", "")
    found = set()
    for names, kind, meaning in re.findall(r"^ {4}(\w[\w, ]*?)( \(.+?\))?: (.+)$", args, re.MULTILINE):
        entry = set(names.split(", "))
        if not kind:
            entry &= set().union(*(documented(other) for other in re.findall(r":func:`(\w+)`", meaning)))
        found |= entry
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring(name):
    value = getattr(fastnlp_ops, name)
    doc = inspect.getdoc(value) or ""
    found = sections(doc)
    assert re.match(r"\S[^\n]+(\n|$)", doc), "a docstring begins with one line that says what it is"
    assert list(found) == [section for section in SECTIONS if section in found], f"parts in the order {SECTIONS}"
    missing = [key for key in inspect.signature(value).parameters if key not in documented(name)]
    assert not missing, f'Args lacks "name (type): meaning" for {missing}'
    if inspect.isfunction(value):
        assert "Returns" in found


@pytest.mark.parametrize("stem", MODULES)
def test_doctests(stem):
    module = importlib.import_module(f"fastnlp_ops.{stem}")
    torch.manual_seed(0)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failed, _ = doctest.testmod(module, optionflags=flags)
    assert failed == 0, "the report is on standard output"


@pytest.mark.parametrize("family", FAMILIES)
def test_doctests_exist(family):
    tests = doctest.DocTestFinder().find(importlib.import_module(f"fastnlp_ops.{family}"))
    assert sum(len(test.examples) for test in tests) > 0


def test_readme():
    snippets = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert snippets
    names = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)


def test_version():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert fastnlp_ops.__version__ == declared == metadata.version("fastnlp_ops")
    pattern = re.compile(rf"(?<![\w.]){re.escape(declared)}(?![\w.])")
    names = {str(path.relative_to(ROOT)) for path in tracked_files() if pattern.search(text(path))}
    names = {name for name in names if not name.startswith("benchmarks/results/")}
    assert names <= {"pyproject.toml", "CHANGELOG.md"}, "pyproject.toml holds the only version string"


def test_import_is_lean():
    code = """
import sys, torch
before = set(sys.modules)
import fastnlp_ops
heavy = {"triton", "numpy", "matplotlib", "rich", "transformers"}
print(sorted({name.split(".")[0] for name in set(sys.modules) - before} & heavy), torch.cuda.is_initialized())
"""
    result = run(sys.executable, "-c", code)
    assert result.stdout.strip() == "[] False", result.stderr


@pytest.mark.parametrize("op", OPS)
def test_op_is_whole(op):
    """Every op has a CPU kernel, a fake, and an autograd formula or a clear error."""
    registrations = torch._C._dispatch_dump(op)
    assert report.kernel(op, "cpu").startswith(("C++", "Python"))
    fake = torch._library.simple_registry.singleton.find(op).fake_impl.kernel
    assert fake or re.search(r"^Meta: ", registrations, re.MULTILINE), "no fake: torch.compile cannot trace it"
    formula = re.search(r"^Autograd", registrations, re.MULTILINE)
    assert formula or op in NO_GRADIENT, "no autograd: gradients would be None with only a warning"


def test_warmup(device):
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match=r"^warmup compiles for the current GPU, and torch sees none$"):
            fastnlp_ops.warmup()
    else:
        assert fastnlp_ops.warmup(dtypes=[torch.bfloat16]) is None


def test_report():
    result = run(sys.executable, "-m", "fastnlp_ops")
    assert result.returncode == 0, result.stderr
    rows = {row.split()[0]: row for row in result.stdout.splitlines() if row}
    assert {op.split("::")[1] for op in OPS} <= rows.keys()
    assert torch.__version__ in rows["torch"]
    assert fastnlp_ops.__version__ in rows["fastnlp_ops"]


def test_libraries_hold_no_python():
    for library in PACKAGE.glob("libfastnlp_*.so"):
        assert b"PyObject" not in library.read_bytes(), library.name


def test_every_source_is_built():
    listed = set(re.findall(r"csrc/[\w/]+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text()))
    assert listed == {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.suffix in {".cpp", ".cu"}}


def test_file_lengths():
    suffixes = {".py", ".cpp", ".h", ".cu", ".cuh"}
    lengths = {str(p.relative_to(ROOT)): text(p).count("\n") for p in tracked_files() if p.suffix in suffixes}
    long = {name for name, length in lengths.items() if length > 400}
    assert long == LONG_FILES.keys(), "split by meaning, or say in LONG_FILES what the one thing is"


def test_no_machine_paths():
    # A home or a checkout of one machine: an absolute path under a folder that differs between machines.
    pattern = re.compile(r"(?<![\w.}/~-])/(root|home|work|mnt|Users)/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked_files()
        for number, line in enumerate(text(path).splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found


def test_cpu_build_removes_old_cuda_library(tmp_path):
    build, target = tmp_path / "build", tmp_path / "target"
    target.mkdir()
    (target / "libfastnlp_cuda.so").touch()
    configured = run("cmake", "-S", ROOT, "-B", build, "-DFASTNLP_CUDA=OFF", env=tools())
    assert configured.returncode == 0, configured.stderr
    (build / "libfastnlp_cpu.so").touch()  # stands for a build
    installed = run("cmake", "--install", build, "--prefix", target, env=tools())
    assert installed.returncode == 0, installed.stderr
    assert [path.name for path in target.iterdir()] == ["libfastnlp_cpu.so"]


def test_build_without_torch(tmp_path):
    venv.create(tmp_path / "venv")
    modules = tmp_path / "modules"  # setuptools, and none of its neighbours
    modules.mkdir()
    import setuptools

    for name in ("setuptools", "_distutils_hack"):
        (modules / name).symlink_to(Path(setuptools.__file__).parent.parent / name)
    python, environment = tmp_path / "venv/bin/python", {"PYTHONPATH": str(modules)}
    result = run(python, "setup.py", "dist_info", "-o", tmp_path, cwd=ROOT, env=environment)
    assert result.returncode == 1
    assert re.fullmatch(r"fastnlp_ops compiles against .* install torch first\.", result.stderr.strip())
