"""A persistent pool of ranks: real processes, real gloo, paid for once per test run.

Ranks are forked from a forkserver that has torch and DeepSpeed imported. A task is the name of a top-level function and
its keyword arguments. When a rank fails, the pool is thrown away, and the next task gets a new one.
"""

from __future__ import annotations

import functools
import gc
import importlib
import inspect
import multiprocessing
import os
import random
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from local_ranks import LocalRanks, RankError, serve_tasks

__all__ = ["Pools", "RankError", "RankPool"]

PRELOAD = [
    "settling",
    "torch",
    "torch.distributed",
    "torch.distributed.tensor",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "deepspeed",
    "mics_ds.plugin.construct",
    "mics_ds.deepspeed_compat.optimizer",
    "mics_ds.checkpoint.memory",
    "mics_ds.guard.watch",
    "mics_ds.planner.auto",
    "deepspeed.module_inject.auto_ep_layer",
    "pytest",
    "helpers",
    "forks",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "peft",
    "lightning.pytorch",
    "lightning.fabric",
    "settled",
]
GLOO_TIMEOUT_S = 30


class RankPool:
    """``world_size`` live ranks with an initialised process group.

    Args:
        virtual: give DeepSpeed the virtual accelerator (:mod:`virtual_device`) and not the CPU.
        fresh: whether this pool is for one task, which may leave anything behind.
    """

    def __init__(self, world_size: int, virtual: bool = False, fresh: bool = False) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._ranks = LocalRanks(world_size, functools.partial(_serve, world_size, virtual, fresh), context)
        self.close = self._ranks.close

    def run(self, module: str, function: str, kwargs: dict[str, Any], timeout: float) -> list[Any]:
        """Call ``module.function(**kwargs)`` on all ranks and return their results in rank order.

        Raises:
            RankError: at least one rank did not return. The pool is closed then.
        """
        self._ranks.send((module, function, kwargs))
        try:
            return self._ranks.collect(timeout, what=f"{module}.{function}")
        except RankError:
            self.close()
            raise


def _serve(world_size: int, virtual: bool, fresh: bool, rank: int, folder: Path, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
    )
    from datetime import timedelta

    import deepspeed
    import forks
    import helpers
    import torch
    import torch.distributed as dist

    from mics_ds.check.oracle import make_stock_gathers_wait

    torch.set_num_threads(1)
    # A rank that wakes another one goes on until it waits itself: the fewer switches between them, the less they cost.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    if virtual:
        from virtual_device.accelerator import DEVICE

        DEVICE.install()
    # Compiling DeepSpeed's shared-memory extension takes a minute, and plain gloo is what we test.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed refuses fp16 on processors without fp16 arithmetic; torch computes it all the same.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(os.path.join(folder, "store"), world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=GLOO_TIMEOUT_S),
    )
    deepspeed.init_distributed("gloo", dist_init_required=False)
    make_stock_gathers_wait()
    _make_no_messages()
    subprocess.Popen = forks.ForkingPopen  # of writers, above all
    initialize = deepspeed.initialize

    def recording(*args: Any, **kwargs: Any) -> Any:
        made = initialize(*args, **kwargs)
        helpers.engines.append(made[0])
        return made

    deepspeed.initialize = recording
    _freeze()
    before = _settings()

    def call(task: tuple[str, str, dict[str, Any]]) -> Any:
        nonlocal before
        module, function, kwargs = task
        body = getattr(importlib.import_module(module), function)
        random.seed(0)
        torch.manual_seed(0)
        if "monkeypatch" in inspect.signature(body).parameters:
            kwargs["monkeypatch"] = helpers.patched
        result = body(**kwargs)
        helpers.patched.undo()
        helpers.destroy_engines()  # engines that pile up would keep hooks, threads and memory
        deepspeed.comm.comm.comms_logger.enabled = False
        _freeze()
        now = _settings()
        left = {name: (value, now.get(name)) for name, value in before.items() if now.get(name) != value}
        before = now
        if left and not fresh:
            raise AssertionError(f"the test has changed what later tests of this pool would meet: {left}")
        dist.barrier()
        return result

    serve_tasks(pipe, call)


def _make_no_messages() -> None:
    """Leave out messages that DeepSpeed builds and does not print on a CPU. They take a tenth of an engine's time."""
    import torch
    from deepspeed.runtime.zero import partition_parameters, stage3
    from deepspeed.utils import nvtx

    nvtx.enable_nvtx = False
    torch.nn.Parameter.__repr__ = object.__repr__
    for module in (partition_parameters, stage3):
        module.print_rank_0 = lambda *args, **kwargs: None


def _settings() -> dict[str, Any]:
    """Return what a test body may change and must put back: our environment variables and the package's constants."""
    found: dict[str, Any] = {name: value for name, value in os.environ.items() if name.startswith("MICS_DS_")}
    for module in [module for name, module in sys.modules.items() if name.startswith("mics_ds.")]:
        found |= {
            f"{module.__name__}.{name}": value
            for name, value in vars(module).items()
            if name.isupper() and isinstance(value, bool | int | float | str | tuple)
        }
    return found


def _freeze() -> None:
    """DeepSpeed collects garbage in every engine it builds. Looking through all imported modules each time took three
    quarters of the time to build one, and through what DeepSpeed keeps of every engine that was destroyed (2,000
    objects) as much again after some hundred tests. What is there now will never be garbage."""
    gc.collect()
    gc.freeze()


class Pools:
    """Pools by world size and device, created on first use."""

    def __init__(self) -> None:
        self._pools: dict[tuple[int, bool], RankPool] = {}

    def run(
        self,
        world_size: int,
        module: str,
        function: str,
        kwargs: dict[str, Any],
        timeout: float,
        *,
        fresh: bool = False,
        virtual: bool = False,
    ) -> list[Any]:
        if fresh:
            pool = RankPool(world_size, virtual, fresh=True)
            try:
                return pool.run(module, function, kwargs, timeout)
            finally:
                pool.close()
        key = world_size, virtual
        if key not in self._pools:
            self._pools[key] = RankPool(*key)
        try:
            return self._pools[key].run(module, function, kwargs, timeout)
        except BaseException:
            self._pools.pop(key).close()
            raise

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
