"""The CUDA source of Adafactor on the CPU: builds its driver, and calls it as fastnlp_ops.adafactor_step_ is called."""

from __future__ import annotations

import pathlib
import shutil
import struct
import subprocess

import torch
from torch import Tensor

from fastnlp_ops._adafactor_call import op_lr, op_options

ROOT = pathlib.Path(__file__).resolve().parents[2]
SANITIZERS = {
    "plain": ["-O2"],
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DEFAULTS = {"eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "weight_decay": 0.0}


def build(folder: pathlib.Path, sanitizer: str, instead: pathlib.Path | None = None) -> pathlib.Path:
    """The driver over the kernels, compiled by g++ with one sanitizer. `instead`: a source in place of its namesake."""
    path = folder / sanitizer
    tests, cuda = ROOT / "tests" / "cuda", ROOT / "csrc" / "cuda"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{cuda}", "-include", str(tests / "emulation.h")]
    objects, running = [], []
    for source in [*sorted(cuda.glob("adafactor*.cu")), tests / "adafactor_driver.cpp"]:
        objects.append(str(folder / f"{source.stem}.{sanitizer}.o"))
        if instead is not None:
            if source.name != instead.name:
                continue
            source, objects[-1] = instead, str(instead.with_suffix(".o"))
        flags = ["-std=c++20", "-w", "-ffp-contract=fast", *includes, *SANITIZERS[sanitizer]]
        command = ["g++", "-x", "c++", *flags, "-c", str(source), "-o", objects[-1]]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        if len(running) == 2:
            finish(running.pop(0))
    for process in running:
        finish(process)
    path = path if instead is None else instead.with_suffix("")
    subprocess.run(["g++", *SANITIZERS[sanitizer], *objects, "-o", str(path)], check=True)
    return path


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors


class Writer:
    """The file of one call, and the tensors that the answer fills in its order."""

    def __init__(self) -> None:
        self.data = b""
        self.results: list[Tensor] = []

    def numbers(self, *values: int) -> None:
        self.data += struct.pack(f"{len(values)}q", *(v - 2**64 if v >= 2**63 else int(v) for v in values))

    def floats(self, *values: float) -> None:
        self.data += struct.pack(f"{len(values)}d", *values)

    def array(self, tensor: Tensor | None, written: bool) -> None:
        if tensor is None:
            return self.numbers(-1)
        memory = span(tensor)
        bytes_ = memory.view(torch.uint8).numpy().tobytes() if memory.numel() else b""
        self.numbers(len(bytes_))
        self.data += bytes_
        if written:
            self.results.append(memory)
        return None

    def view(self, tensor: Tensor | None, written: bool, transposed: bool) -> None:
        self.array(tensor, written)
        if tensor is None:
            return self.numbers(0, 0, 0)
        col = tensor.stride(-1) if tensor.dim() and tensor.shape[-1] > 1 else 1
        row = tensor.stride(-2) if tensor.dim() > 1 else 0
        matrices = [d for d in range(tensor.dim() - 2) if tensor.shape[d] > 1]
        assert tensor.dim() < 4 or tensor.is_contiguous(), "the driver knows one batch stride"
        batch = tensor.stride(matrices[-1]) if matrices else 0
        return self.numbers(batch, *((col, row) if transposed else (row, col)))

    def read(self, data: bytes) -> None:
        at = 0
        for memory in self.results:
            size = memory.numel() * memory.element_size()
            if size:
                memory.copy_(torch.frombuffer(bytearray(data[at : at + size]), dtype=memory.dtype))
            at += size
        (launches,) = struct.unpack("q", data[at:])
        assert launches <= 8


def span(tensor: Tensor) -> Tensor:
    """The memory from a tensor's first element to its last."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((extent if tensor.numel() else 0,), (1,))


def is_transposed(p: Tensor, lazy: bool, sums: Tensor | None) -> bool:
    """As csrc/adafactor_call.h decides it."""
    if p.dim() < 2 or lazy or sums is not None or p.shape[-2] == 1 or p.shape[:-2].numel() != 1:
        return False
    return p.stride(-2) == 1 and (p.shape[-1] == 1 or p.stride(-1) != 1)


def step(
    program: pathlib.Path,
    params: list[Tensor],
    grads: list[Tensor],
    rows: list[Tensor],
    cols: list[Tensor],
    vectors: list[Tensor],
    steps: Tensor,
    *,
    moments: list[Tensor] = (),
    averages: list[Tensor] = (),
    rms: Tensor | None = None,
    lr: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    max_grad_norm: float | None = None,
    skip_nonfinite: bool = False,
    seed: int = 0,
    ids: list[int] | None = None,
    sums: Tensor | None = None,
    shards: list[int] = (),
    phases: int = 15,
    lr_on_device: bool = False,
    **options,
) -> None:
    out = Writer()
    wide = bool(params) and params[0].dtype == torch.float64
    out.numbers(len(params), 1, wide)
    out.floats(*op_options(**(DEFAULTS | options)))
    out.numbers(lr_on_device)
    out.array(op_lr([lr]), False)
    out.array(steps, True)
    out.array(rms, True)
    out.array(grad_scale, False)
    out.array(found_inf, False)
    out.floats(max_grad_norm or 0.0)
    out.numbers(skip_nonfinite, bool(shards), seed, phases)
    out.array(sums, True)
    factored, plain = iter(zip(rows, cols, strict=True)), iter(vectors)
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        turned = is_transposed(p, options.get("lazy", False), sums)
        sizes = [p.shape[:-2].numel(), p.shape[-2] if p.dim() > 1 else 1, p.shape[-1] if p.dim() else 1]
        whole, origin = [p.numel(), *sizes[1:]], [0, 0, 0]
        if shards:
            whole, origin = shards[6 * i : 6 * i + 3], shards[6 * i + 3 : 6 * i + 6]
        per = [whole[1] * whole[2], whole[2], 1]
        first = sum(a * b for a, b in zip(origin, per, strict=True))
        if turned:
            sizes, whole = [sizes[0], sizes[2], sizes[1]], [whole[0], whole[2], whole[1]]
            per = [per[0], per[2], per[1]]
        out.numbers(p.dim() > 1, turned, DTYPES.index(p.dtype), DTYPES.index(g.dtype), 0, ids[i] if ids else i)
        out.numbers(*sizes, *whole, first, *per)
        out.view(p, True, turned)
        out.view(g, False, turned)
        out.view(moments[i] if moments else None, True, turned)
        out.view(averages[i] if averages else None, True, turned)
        row, col = next(factored) if p.dim() > 1 else (next(plain), None)
        for state in (col, row) if turned else (row, col):
            out.array(state, True)
    call, answer = program.parent / "call", program.parent / "answer"
    call.write_bytes(out.data)
    # A fixed address layout: ThreadSanitizer of gcc 12 gives up on the layouts of newer kernels.
    layout = ["setarch", "-R"] if shutil.which("setarch") else []
    done = subprocess.run([*layout, program, call, answer], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:8000]
    out.read(answer.read_bytes())
