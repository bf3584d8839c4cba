"""Measure how long a checkpoint stops training: by an asynchronous save, by a blocking save, and by one memcpy.

    torchrun --nproc_per_node 4 scripts/bench/async_save.py --folder FOLDER [--gigabytes 1] [--states world]

Masters and two moments of AdamW make up the states. The three ways take turns in the same ranks, after a step of
training each, in another order each time. Times run from the first rank's start to the last rank's end and are medians
over rounds. Ratios are medians of the ratios of one round. With more ranks than cores, work of a rank beside copying
counts more.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

HIDDEN = 2048


def engine_of(gigabytes: float, p: int, states: str) -> Any:
    torch.manual_seed(0)
    layers = max(1, round(gigabytes * 1e9 / 12 / HIDDEN**2))
    model = nn.Sequential(*(nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(layers)))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "mics_shard_size": p,
            "mics_optimizer_states": states,
            "mics_checkpoint": {"async": True},
        },
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    return engine


def seconds_of_all(work: Callable[[], Any]) -> float:
    """Return the seconds from the first rank's start to the last rank's end.

    All ranks are on one machine and share its monotonic clock. A rank that gets a core only after another one is done
    cannot measure its own waiting.
    """
    dist.barrier()
    started = time.monotonic()
    work()
    times = torch.tensor([-started, time.monotonic()], dtype=torch.float64)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return times.sum().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--shard-size", type=int, default=2)
    parser.add_argument("--states", default="partition")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    from mics_ds.checkpoint.background import wait_for_saves

    engine = engine_of(arguments.gigabytes, arguments.shard_size, arguments.states)
    parameters = sum(param.ds_numel for param in engine.module.parameters())
    source = torch.ones(12 * parameters // dist.get_world_size(), dtype=torch.uint8)
    target = torch.ones_like(source)

    def step() -> None:
        engine.backward(engine(torch.randn(1, HIDDEN)).pow(2).mean())
        engine.step()

    def save(name: str, background: bool) -> None:
        engine.save_checkpoint(str(arguments.folder), tag=name, async_save=background)

    kinds: dict[str, Callable[[], Any]] = {
        "memcpy": lambda: target.copy_(source),
        "background": lambda: save("background", True),
        "waited for": lambda: save("waited", False),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for round_ in range(arguments.rounds + 1):
        for kind in list(kinds)[round_ % 3 :] + list(kinds)[: round_ % 3]:
            step()
            seconds = seconds_of_all(kinds[kind])
            wait_for_saves()
            os.sync()  # saves are further apart than here, and the kernel is done with the last one by then
            if round_:
                times[kind].append(seconds)
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    if dist.get_rank() == 0:
        print(
            f"{parameters / 1e6:.1f} M parameters, {12 * parameters / 1e9:.2f} GB of states, p = {arguments.shard_size}"
        )
        for kind, median in medians.items():
            spread = f"{min(times[kind]):.3f} to {max(times[kind]):.3f}"
            print(f"  {kind:<11} {median:.4f} s ({spread})")
        for kind in ("memcpy", "waited for"):
            ratios = [ours / other for ours, other in zip(times["background"], times[kind])]
            print(f"  background / {kind}: {statistics.median(ratios):.3f}")
        shutil.rmtree(arguments.folder)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
