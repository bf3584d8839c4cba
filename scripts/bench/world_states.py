"""Measure the processor time of the optimizer's update, with states sharded over a partition group and over all ranks.

    torchrun --nproc_per_node 4 scripts/bench/world_states.py

Both engines take turns in the same ranks; medians over steps, mean over ranks.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

HIDDEN, LAYERS, STEPS, WARM_UP = 1024, 8, 12, 3


def engine_of(states: str) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(LAYERS)))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "mics_shard_size": 1, "mics_optimizer_states": states},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    return engine


def update_seconds(engine: Any) -> float:
    """Return this thread's processor seconds in the updates of one step."""
    update, spent = engine.optimizer._optimizer_step, []

    def timed(sub_group: int) -> None:
        start = time.thread_time()
        update(sub_group)
        spent.append(time.thread_time() - start)

    engine.optimizer._optimizer_step = timed
    try:
        engine.backward(engine(torch.randn(1, HIDDEN)).pow(2).mean())
        engine.step()
    finally:
        engine.optimizer._optimizer_step = update
    return sum(spent)


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    engines = {states: engine_of(states) for states in ("partition", "world")}
    seconds: dict[str, list[float]] = {states: [] for states in engines}
    for step in range(WARM_UP + STEPS):
        for states, engine in engines.items():
            spent = torch.tensor([update_seconds(engine)], dtype=torch.float64)
            dist.all_reduce(spent)
            if step >= WARM_UP:
                seconds[states].append(spent.item() / dist.get_world_size())
    medians = {states: statistics.median(values) for states, values in seconds.items()}
    if dist.get_rank() == 0:
        ranks = dist.get_world_size()
        print(f"{LAYERS * HIDDEN**2 / 1e6:.1f} M parameters, p = 1, r = {ranks}, AdamW: seconds per step and rank")
        for states, median in medians.items():
            print(f"  {states:<10} {median:.4f}")
        print(f"  {medians['partition'] / medians['world']:.2f} times less")


if __name__ == "__main__":
    main()
