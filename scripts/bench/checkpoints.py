"""Measure time, bytes and memory of saving and loading, for stock ZeRO-3 and MiCS in turns.

torchrun --nproc_per_node 4 scripts/bench/checkpoints.py --systems zero3,mics:2,mics:1 --width 2048
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn


def build(system: str, width: int, layers: int, seed: int) -> deepspeed.DeepSpeedEngine:
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "mics_reshape_checkpoint": True}
    if system == "zero3":
        del zero["mics_reshape_checkpoint"]
    else:
        zero["mics_shard_size"] = int(system.partition(":")[2])
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "steps_per_print": 1_000_000,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    engine.backward(engine(torch.ones(1, width)).pow(2).mean())
    engine.step()
    return engine


def timed(work: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


def resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--systems", default="zero3,mics:4,mics:2,mics:1")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    given = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of compiling
    deepspeed.init_distributed("gloo")
    folder = [tempfile.mkdtemp(dir=given.folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    for system in given.systems.split(","):
        target = os.path.join(folder[0], system)
        engine = build(system, given.width, given.layers, 0)
        before = resident()
        saves = []
        for turn in range(given.rounds):
            os.sync()
            saves.append(timed(partial(engine.save_checkpoint, target, tag=str(turn))))
        extra = torch.tensor([float(resident() - before)])
        dist.all_reduce(extra, op=dist.ReduceOp.MAX)
        engine.destroy()
        del engine
        again = build(system, given.width, given.layers, 1)
        loads = [timed(partial(again.load_checkpoint, target)) for _ in range(given.rounds)]
        again.destroy()
        del again
        if dist.get_rank() == 0:
            size = sum(path.stat().st_size for path in Path(target, "0").iterdir())
            record = {
                "system": system,
                "bytes": size,
                "save_s": statistics.median(saves),
                "load_s": statistics.median(loads),
                "peak_growth_of_a_rank": int(extra.item()),
            }
            print("RESULT " + json.dumps(record), flush=True)
            shutil.rmtree(target)
        dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
