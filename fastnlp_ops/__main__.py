"""`python -m fastnlp_ops`: the kernel that each op runs on each device, and the versions that a bug report needs."""

import importlib.util
import os
import platform
import re
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastnlp_ops
from fastnlp_ops import _host

DEVICES = {"cpu": "CPU", "cuda": "CUDA"}  # name -> dispatch key
CUDA_LIBRARY = Path(__file__).with_name("libfastnlp_cuda.so")


def ops() -> list[str]:
    """The names of the package's ops, as the dispatcher knows them."""
    return sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastnlp_ops::"))


def kernel(op: str, device: str) -> str:
    """What runs `op` on `device`, asked of the dispatcher; "-" where nothing does."""
    key = DEVICES[device]
    if torch._C._dispatch_has_kernel_for_dispatch_key(op, "CompositeExplicitAutograd"):
        return "Python (reference)"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(op, key):
        return "-"
    found = re.search(rf"^{key}: registered at (\S+):\d+", torch._C._dispatch_dump(op), re.MULTILINE)
    if found is None or found[1].endswith(".py"):
        return "Triton" if device == "cuda" else "Python"
    return f"C++ {_host.cpu_features()}" if device == "cpu" else "CUDA C++"


def triton_kernels() -> str:
    """What stands in the way of the ops that run on Triton."""
    if importlib.util.find_spec("triton") is None:
        return "none: triton is not installed"
    if "CC" not in os.environ and not any(map(shutil.which, ("gcc", "clang"))):
        return "none: triton needs a C compiler at first use, gcc or clang"
    return "compiled at first use, or by fastnlp_ops.warmup()"


def versions() -> list[tuple[str, str]]:
    """Name and version of everything that decides what runs."""
    rows = [("fastnlp_ops", fastnlp_ops.__version__), ("python", platform.python_version())]
    for name in ("torch", "triton", "numpy"):
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            rows.append((name, "not installed"))
    rows.append(("CUDA of torch", str(torch.version.cuda).replace("None", "none")))
    if not CUDA_LIBRARY.exists():
        rows.append(("CUDA kernels", "not built: no nvcc was found"))
    else:
        rows.append(("CUDA kernels", "loaded" if torch.version.cuda else "built, not loaded: this torch has no CUDA"))
    rows.append(("Triton kernels", triton_kernels()))
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # absent without CUDA
        name = f"{properties.name}, sm_{properties.major}{properties.minor}"
        rows.append((f"GPU {index}", f"{name}, driver for CUDA {driver // 1000}.{driver % 1000 // 10}"))
    rows.append(("CPU", f"{platform.machine()}, {_host.cpu_features()} kernels, {torch.get_num_threads()} threads"))
    return rows


def main() -> None:
    """Print both tables."""
    table = [("op", *DEVICES)]
    table += [(op.split("::")[1], *(kernel(op, device) for device in DEVICES)) for op in ops()]
    for rows in (table, versions()):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        print()


if __name__ == "__main__":
    main()
