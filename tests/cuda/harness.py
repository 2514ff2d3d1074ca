"""Builds csrc/cuda for the CPU through emulation.h and runs cases on it, each a dict of tensors as an op takes them."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import struct
import subprocess

import torch
from torch import Tensor

ROOT = pathlib.Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SANITIZERS = {
    "plain": ["-O2"],
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}
OPS = ["train", "viterbi", "n_best", "sample", "entropy"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@dataclasses.dataclass
class Case:
    op: str
    emissions: Tensor  # [B, T, N] or [total, N]
    transitions: Tensor
    start: Tensor | None = None
    end: Tensor | None = None
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    tags: Tensor | None = None
    grad: Tensor | None = None
    uniforms: Tensor | None = None
    n: int = 1
    chunked: bool = False
    transition_grad: bool = True
    name: str = ""

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if self.emissions.dtype == torch.float64 else torch.float32

    @property
    def batch(self) -> int:
        return self.emissions.shape[0] if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    def write(self, file) -> None:
        packed = self.cu_seqlens is not None
        transposed = self.transitions.dim() == 2 and not self.transitions.is_contiguous()
        header = [
            OPS.index(self.op),
            DTYPES.index(self.emissions.dtype),
            self.batch,
            self.emissions.shape[-2],
            self.emissions.shape[-1],
            self.start is not None,
            self.end is not None,
            self.mask is not None,
            packed,
            self.transitions.dim() == 4,
            self.chunked,
            self.tags is not None,
            self.transition_grad,
            self.n if self.uniforms is None else len(self.uniforms),
            transposed,
        ]
        file.write(struct.pack("15q", *map(int, header)))
        matrix = self.transitions.t() if transposed else self.transitions
        for tensor, dtype in (
            (self.emissions, None),
            (matrix, self.compute),
            (self.start, self.compute),
            (self.end, self.compute),
            (self.mask, None),
            (self.cu_seqlens, None),
            (self.tags, None),
            (self.grad if self.op == "train" else None, self.compute),
            (self.uniforms if self.op == "sample" else None, None),
        ):
            if tensor is not None:
                tensor = tensor.detach() if dtype is None else tensor.detach().to(dtype)
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    def outputs(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shape = tuple(self.emissions.shape)
        per_sequence = ((self.batch,), self.compute)
        if self.op == "train":
            return {
                "value_alone": per_sequence,
                "value": per_sequence,
                "demissions": (shape, self.emissions.dtype),
                "dtransitions": (tuple(self.transitions.shape), self.compute),
                "dstart": (shape[-1:], self.compute),
                "dend": (shape[-1:], self.compute),
            }
        if self.op == "viterbi":
            return {"paths": (shape[:-1], torch.int64), "scores": per_sequence}
        if self.op == "n_best":
            paths = (self.n, shape[0]) if self.cu_seqlens is not None else (shape[0], self.n, shape[1])
            return {"paths": (paths, torch.int64), "scores": ((self.batch, self.n), self.compute)}
        if self.op == "sample":
            return {"paths": (tuple(self.uniforms.shape), torch.int64)}
        return {"entropy": per_sequence}


def build(folder: pathlib.Path, sanitizer: str, instead: pathlib.Path | None = None) -> pathlib.Path:
    """The driver over the kernels, compiled by g++ with one sanitizer into `folder`.

    `instead`: a source in place of the kernel file of its name; the other objects are those of the last build.
    """
    tests = ROOT / "tests" / "cuda"
    flags = [
        "-std=c++20",
        "-w",
        "-ffp-contract=fast",
        f"-I{CSRC}",
        f"-I{CSRC / 'cuda'}",
        "-include",
        str(tests / "emulation.h"),
    ]
    flags += SANITIZERS[sanitizer]
    compiler = shutil.which("g++")
    objects, running = [], []
    for source in [*sorted((CSRC / "cuda").glob("crf*.cu")), tests / "crf_driver.cpp"]:
        target = folder / f"{source.stem}.o"
        if instead is not None and source.name == instead.name:
            source, target = instead, instead.with_suffix(".o")
        objects.append(str(target))
        if instead is not None and source != instead:
            continue
        if len(running) == 2:
            finish(running.pop(0))
        command = [compiler, "-x", "c++", *flags, "-c", str(source), "-o", str(target)]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in running:
        finish(process)
    program = (folder if instead is None else instead.parent) / f"crf_{sanitizer}"
    subprocess.run([compiler, *SANITIZERS[sanitizer], *objects, "-o", str(program)], check=True)
    return program


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors)


def start(program: pathlib.Path, cases: list[Case], folder: pathlib.Path) -> subprocess.CompletedProcess:
    with (folder / "cases").open("wb") as file:
        for case in cases:
            case.write(file)
    # A fixed address layout: ThreadSanitizer of gcc 12 gives up on the layouts of newer kernels.
    layout = ["setarch", "-R"] if shutil.which("setarch") else []
    command = [*layout, str(program), str(folder / "cases"), str(folder / "results")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run(program: pathlib.Path, cases: list[Case], folder: pathlib.Path) -> list[dict[str, Tensor]]:
    process = start(program, cases, folder)
    if process.returncode:
        raise AssertionError(process.stderr[:8000])
    data = bytearray((folder / "results").read_bytes())
    results, at = [], 0
    for case in cases:
        result = {}
        for name, (shape, dtype) in case.outputs().items():
            count = torch.Size(shape).numel()
            bytes_ = count * dtype.itemsize
            values = (
                torch.frombuffer(data, dtype=dtype, count=count, offset=at) if count else torch.empty(0, dtype=dtype)
            )
            result[name] = values.reshape(shape)
            at += bytes_
        results.append(result)
    assert at == len(data), "the driver wrote more or less than the cases ask for"
    return results
