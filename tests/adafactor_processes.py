"""What test_adafactor_distributed.py runs in each process: python adafactor_processes.py RANK WORLD FOLDER.

Every scenario of the two modules in turn, with a result for each; with a fourth argument the death of a process.
"""

import datetime
import os
import sys
import traceback
from pathlib import Path

import adafactor_models
import adafactor_tensors
import torch
import torch.distributed as dist


def main(rank, world, folder, scenario=None):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    store = dist.FileStore(str(folder / f"store-{world}-{scenario}"), world)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    out = folder / f"results-{world}-{rank}-{scenario}"
    if scenario == "die":
        out.write_text(adafactor_models.die_in_a_step(rank, world))
        os._exit(0)
    for name, function in (vars(adafactor_tensors) | vars(adafactor_models)).items():
        if name.startswith("test_"):
            try:
                function(world, folder) if name == "test_checkpoint" else function(world)
                result = "passed"
            except Exception:  # every scenario is to be heard
                result = traceback.format_exc()
            with out.open("a") as file:
                file.write(f"{name}\0{result}\1")
            dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
