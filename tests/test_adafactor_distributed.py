"""Adafactor over several processes (gloo, on the CPU) against one: DDP, FSDP2, DTensor, checkpoints, a death."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

PROCESSES = Path(__file__).with_name("adafactor_processes.py")
SCENARIOS = [
    name
    for module in ("adafactor_tensors.py", "adafactor_models.py")
    for name in re.findall(r"^def (test_\w+)", PROCESSES.with_name(module).read_text(), re.MULTILINE)
]


def launch(world, folder, *scenario, timeout=600):
    """Exit codes and output of so many processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    running = [
        subprocess.Popen(
            [sys.executable, PROCESSES, str(rank), str(world), str(folder), *scenario],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    deadline = time.monotonic() + timeout
    try:
        outputs = [process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], outputs


@pytest.fixture(scope="module", params=[2, 4])
def results(request, tmp_path_factory):
    """What every process says of every scenario."""
    world, folder = request.param, tmp_path_factory.mktemp("processes")
    codes, outputs = launch(world, folder)
    assert codes == [0] * world, "\n".join(outputs)
    found = {}
    for rank in range(world):
        for entry in (folder / f"results-{world}-{rank}-None").read_text().split("\1")[:-1]:
            name, result = entry.split("\0")
            found.setdefault(name, {})[rank] = result
    return world, found


@pytest.mark.long
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_as_one_process(scenario, results):
    world, found = results
    assert len(found[scenario]) == world
    for rank, result in found[scenario].items():
        assert result == "passed", f"process {rank} of {world}:\n{result}"


@pytest.mark.long
def test_death(tmp_path):
    """A process that dies within a step is an error in the others, not a hang."""
    begin = time.monotonic()
    codes, outputs = launch(3, tmp_path, "die", timeout=120)
    assert codes[2] == 3
    for rank in (0, 1):
        result = (tmp_path / f"results-3-{rank}-die").read_text()
        assert result.startswith("error: "), outputs[rank]
    assert time.monotonic() - begin < 100
