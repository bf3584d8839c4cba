"""Saves asynchronously and ends, or is ended, while that is under way, in the way that is asked for."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

SECTION = {"async": True}


def config(folder: Path, how: str) -> dict:
    memory = {"memory_every": 1, "memory_folder": str(folder)} if how == "stuck" else {}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "zero_optimization": {"stage": 3, "mics_shard_size": 1, "mics_checkpoint": {**SECTION, **memory}},
    }


def fork_a_sleeper() -> int:
    """As a DataLoader's worker: it has all descriptors that this process has."""
    child = os.fork()
    if not child:
        time.sleep(100)
        os._exit(0)
    return child


def be_asked_to_end_in_a_log() -> None:
    """SIGTERM comes while the main thread holds the lock of a log's handler."""
    from mics_ds.log import logger

    [handler] = logger.handlers
    before = handler.formatter

    class Asking(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            handler.setFormatter(before)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
            return "asked to end in this line"

    handler.setFormatter(Asking())
    logger.info("")


def stay(begun: Barrier) -> None:
    begun.wait()
    time.sleep(100)


def terminate_workers() -> None:
    """End children by SIGTERM in the middle of their work, as a pool does."""
    context = multiprocessing.get_context("fork")
    begun = context.Barrier(3)
    workers = [context.Process(target=stay, args=(begun,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    begun.wait()
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(10)
    print(f"WORKERS {[worker.exitcode for worker in workers]}", flush=True)
    for worker in workers:
        worker.kill()


def main(folder: Path, how: str) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    from mics_ds.checkpoint.background import Background, wait_for_saves

    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    engine, *_ = deepspeed.initialize(model=torch.nn.Linear(4, 4), config=config(folder, how))
    engine.save_checkpoint(str(folder), tag="first")
    wait_for_saves()
    dist.barrier()
    assert Background.current is not None
    writer = Background.current._process.pid
    if how == "stuck":
        print(f"WRITER {writer}", flush=True)
        if dist.get_rank() == 0:
            dist.barrier()  # for which nobody comes, in C++
        os.kill(os.getppid(), signal.SIGUSR1)  # the test's
        time.sleep(60)
    os.kill(writer, signal.SIGSTOP)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag="second")
    print(f"WRITER {writer}", flush=True)
    if how == "fails":
        shutil.rmtree(next(folder.glob(".second.*.partial")))
    if how == "forked":
        print(f"CHILD {fork_a_sleeper()}", flush=True)
    if how == "workers":
        terminate_workers()
    if how != "killed":
        subprocess.Popen(f"sleep 0.3; kill -CONT {writer}", shell=True)
    if how in ("killed", "forked"):
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "terminated":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    if how == "logging":
        be_asked_to_end_in_a_log()
        time.sleep(60)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
