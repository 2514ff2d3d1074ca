"""Measure: times of interleaved calls, memory, and the ceilings of the machine."""

import ctypes
import gc
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TURN_S = 0.004  # a provider's turn lasts at least this long, or MOST_CALLS calls
MOST_CALLS = 30


def call_cpu(run: Callable[[], Any], calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def call_cuda(run: Callable[[], Any], calls: int) -> list[float]:
    """Milliseconds between two events around each call. The L2 is overwritten before each, and the device is idle when
    the call starts, so that launch gaps and the host's share show; a graph replay shows the device's share alone."""
    flush = torch.empty(4 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(calls):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.fill_(1)
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return times


def interleave(runs: dict[str, Callable[[], Any]], device: str, budget_s: float) -> dict[str, list[list[float]]]:
    """Rounds of A B C ... until the budget is spent; at least 3, at most 60. Every run has been called before."""
    call = call_cuda if device == "cuda" else call_cpu
    estimates = {}
    for name, run in runs.items():
        first = call(run, 1)
        estimates[name] = min(first if first[0] > 100 else first + call(run, 2)) / 1e3
    calls = {name: max(1, min(MOST_CALLS, math.ceil(TURN_S / max(estimates[name], 1e-9)))) for name in runs}
    round_s = sum(calls[name] * estimates[name] for name in runs)
    rounds = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for _ in range(max(3, min(60, int(budget_s / round_s)))):
            for name, run in runs.items():
                rounds[name].append(call(run, calls[name]))
    finally:
        gc.enable()
    return rounds


def capture(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as a CUDA graph's replay; raises where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# Memory


def peak_bytes(run: Callable[[], Any], device: str) -> float:
    """The most bytes alive at once during run(), beyond those alive before it: as torch's allocator saw them, or, on a
    CPU where that is more, by how much the process grew, which is what kernels allocate beside torch and in pages."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with (
        silent(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return max(most, grown_bytes(run))


def grown_bytes(run: Callable[[], Any]) -> float:
    """How much the process was larger at its largest during run() than before, less what a call of nothing measures; 0
    where the kernel does not tell."""
    try:
        trim = ctypes.CDLL("libc.so.6").malloc_trim
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM is VmRSS from here on
    except (OSError, AttributeError):
        return 0.0

    def growth(call: Callable[[], Any]) -> float:
        gc.collect()
        trim(0)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        call()
        return resident("VmHWM") - before

    return max(0.0, growth(run) - growth(lambda: None))


def resident(name: str) -> float:
    """Bytes of a line of /proc/self/status."""
    line = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024.0 * int(line[1])


@contextmanager
def silent() -> Iterator[None]:
    """Without the standard error of C++: torch's profiler announces each start and stop there."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def saved_bytes(run: Callable[[], Any], inputs: Sequence[Tensor]) -> int:
    """Bytes of the storages that autograd keeps for the backward pass, each once, inputs left out."""
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # holding it keeps its address from being given out again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    for tensor in inputs:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


# Floors


class Ceilings:
    """What this machine can do at most, measured here and now with torch's own copy and matrix product."""

    def __init__(self, device: str, threads: int) -> None:
        self.device, self.threads, self.found = device, threads, {}

    def _best(self, key: tuple, run: Callable[[], Any]) -> float:
        if key not in self.found:
            threads = torch.get_num_threads()
            torch.set_num_threads(self.threads)
            call = call_cuda if self.device == "cuda" else call_cpu
            self.found[key] = min(call(run, 10)) / 1e3
            torch.set_num_threads(threads)
        return self.found[key]

    def copy_s(self, nbytes: float) -> float:
        """Seconds to move nbytes (read plus written). On a CPU a copy of about that size is timed, because a small one
        stays in the caches; on CUDA one of 512 MiB."""
        size = 2**28 if self.device == "cuda" else 2 ** min(26, max(14, math.ceil(math.log2(nbytes / 2))))
        source = torch.empty(size, dtype=torch.uint8, device=self.device).fill_(1)
        target = torch.zeros_like(source)
        return nbytes * self._best(("copy", size), lambda: target.copy_(source)) / (2 * size)

    def update_s(self, nbytes: float) -> float:
        """Seconds to read and write nbytes in place (half each way): no line is fetched only to be overwritten, so this
        is faster than a copy."""
        memory = torch.zeros(2**28 if self.device == "cuda" else 2**26, device=self.device)
        return nbytes * self._best(("update", memory.numel()), lambda: memory.neg_()) / (8 * memory.numel())

    def fma_s(self, count: float, dtype: str = "float32") -> float:
        """Seconds for `count` fused multiply-adds, by the rate of a matrix product of that dtype."""
        n = 4096 if self.device == "cuda" else 768
        a = torch.randn(n, n, device=self.device).to(getattr(torch, dtype))
        return count * self._best(("fma", n, dtype), lambda: a @ a) / n**3
