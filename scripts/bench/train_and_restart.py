"""Train from the newest state that can be resumed. Print each loss exactly, with its time."""

from __future__ import annotations

import argparse
import time

import deepspeed
import torch
import torch.distributed as dist
from torch import nn


def say(what: str) -> None:
    if dist.get_rank() == 0:
        print(f"\nAT {time.time():.3f} {what}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--save-at", type=int, default=3)
    parser.add_argument("--memory-every", type=int, default=2)
    parser.add_argument("--shard-size", type=int, default=2)
    parser.add_argument("--states", default="partition")
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--pause", type=float, default=0.3)
    asked = parser.parse_args()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    layers = [layer for _ in range(asked.layers) for layer in (nn.Linear(asked.hidden, asked.hidden), nn.Dropout(0.2))]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "mics_shard_size": asked.shard_size,
            "mics_optimizer_states": asked.states,
            "mics_checkpoint": {"memory_every": asked.memory_every},
        },
    }
    engine, *_ = deepspeed.initialize(model=nn.Sequential(*layers), config=config)
    torch.manual_seed(100 + rank)
    say("LOADING")
    engine.load_checkpoint(asked.folder)
    say(f"LOADED {engine.global_steps}")
    while engine.global_steps < asked.steps:
        generator = torch.Generator().manual_seed(1000 * engine.global_steps + rank)
        loss = engine(torch.randn(2, asked.hidden, generator=generator)).pow(2).mean()
        engine.backward(loss)
        engine.step()
        total = loss.detach().double()
        dist.all_reduce(total)
        say(f"STEP {engine.global_steps} {total.item().hex()}")
        if engine.global_steps == asked.save_at:
            engine.save_checkpoint(asked.folder)
        time.sleep(asked.pause)


if __name__ == "__main__":
    main()
