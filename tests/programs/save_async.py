"""Saves in the background and ends while that is under way, in the way that is asked for."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    "zero_optimization": {"stage": 3, "mics_shard_size": 1, "mics_checkpoint": {"async": True}},
}


def main(folder: Path, how: str) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    from mics_ds.checkpoint.background import Background
    from mics_ds.checkpoint.in_background import wait_for_saves

    torch.manual_seed(0)
    engine, *_ = deepspeed.initialize(model=torch.nn.Linear(4, 4), config=CONFIG)
    engine.save_checkpoint(str(folder), tag="first")
    wait_for_saves()
    dist.barrier()
    assert Background.current is not None
    writer = Background.current._process.pid
    os.kill(writer, signal.SIGSTOP)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag="second")
    print(f"WRITER {writer}", flush=True)
    if how == "fails":
        shutil.rmtree(folder / ".second.partial")
    if how != "killed":
        subprocess.Popen(f"sleep 1; kill -CONT {writer}", shell=True)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "terminated":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
