"""Triton kernels on a machine without a GPU: what their launchers would launch, compiled for any architecture.

    with offline(90) as compiled:
        launcher(tensors on the CPU)
    for kernel in compiled: kernel.name, kernel.ptx, kernel.registers, kernel.stack, kernel.shared

The launcher is the real one, so dtypes, constants, alignment of pointers and warps are what a GPU would get.
"""

import contextlib
import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# Bytes of shared memory that a block may have.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
MATRIX_INSTRUCTIONS = r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b"


@dataclasses.dataclass
class Compiled:
    name: str
    ptx: str
    ttgir: str
    registers: int
    stack: int  # bytes that a thread keeps in memory: arrays, and registers that were spilled
    shared: int

    @property
    def matrix_instructions(self) -> set[str]:
        return set(re.findall(MATRIX_INSTRUCTIONS, self.ptx))


class _NoDriver:
    """Stands for the driver of a GPU that is not there. Every architecture is a device of its own."""

    def __init__(self, architecture):
        self.architecture = architecture

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return self.architecture

    def get_current_stream(self, _):
        return 0


def resources(cubin):
    """What ptxas says of a cubin: registers and stack of a thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    return int(found[1]), int(found[2]) + int(found[3])


@contextlib.contextmanager
def offline(architecture):
    """Inside, a launch compiles for the architecture and runs nothing; the list that it gives holds what came out."""
    compiled: list[Compiled] = []
    run, active = JITFunction.run, driver._active

    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        registers, stack = resources(kernel.asm["cubin"])
        compiled.append(
            Compiled(kernel.name, kernel.asm["ptx"], kernel.asm["ttgir"], registers, stack, kernel.metadata.shared)
        )

    driver.set_active(_NoDriver(architecture))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = active
