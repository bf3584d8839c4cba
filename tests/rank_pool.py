"""A persistent pool of ranks: real processes, real gloo, paid for once per test run.

Ranks are forked from a forkserver that has torch and DeepSpeed imported. Each has a pipe of its own,
so rank i is always process i. A task is the name of a top-level function and its keyword arguments.
When a rank fails, the others get a moment to fail too, the rest are asked for their stacks, the pool
is thrown away, and one exception carries everything that is known. The next task gets a new pool.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOAD = [
    "torch",
    "torch.distributed",
    "torch.distributed.tensor",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "deepspeed",
    "mics_ds",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "peft",
    "lightning.pytorch",
    "lightning.fabric",
]
GLOO_TIMEOUT_S = 30
GRACE_S = 2.0  # between the first failure and asking the others where they are
LOG_TAIL = 4000


class RankError(AssertionError):
    """Some rank raised, died or did not finish. The message has every rank's traceback or stack."""


class RankPool:
    """``world_size`` live ranks with an initialised process group."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.folder = Path(tempfile.mkdtemp(prefix="mics_ranks_"))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank_main, args=(rank, world_size, str(self.folder), theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, module: str, function: str, kwargs: dict[str, Any], timeout: float) -> list[Any]:
        """Call ``module.function(**kwargs)`` on all ranks and return their results in rank order.

        Raises:
            RankError: at least one rank did not return.
        """
        for pipe in self.pipes:
            pipe.send((module, function, kwargs))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < self.world_size:
            pending = {
                self.pipes[rank]: rank
                for rank in range(self.world_size)
                if rank not in results and rank not in failures
            }
            left = deadline - time.monotonic()
            ready = wait(list(pending), timeout=max(left, 0))
            if not ready:
                for rank in pending.values():
                    failures[rank] = self._stack(rank)
                break
            for pipe in ready:
                rank = pending[pipe]
                try:
                    succeeded, value = pipe.recv()
                except EOFError:
                    self.processes[rank].join(5)
                    succeeded, value = False, f"died with exit code {self.processes[rank].exitcode}"
                if succeeded:
                    results[rank] = value
                else:
                    failures[rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures:
            report = "\n".join(
                f"──── rank {rank} of {self.world_size} ────\n{failures.get(rank, 'returned normally')}"
                for rank in range(self.world_size)
            )
            logs = "\n".join(f"──── end of rank {rank}'s output ────\n{self._log(rank)}" for rank in failures)
            self.close()
            raise RankError(f"{module}.{function} failed on ranks {sorted(failures)}\n{report}\n{logs}")
        return [results[rank] for rank in range(self.world_size)]

    def _stack(self, rank: int) -> str:
        path = self.folder / f"stack{rank}"
        if self.processes[rank].is_alive():
            os.kill(self.processes[rank].pid, signal.SIGUSR1)
            time.sleep(0.3)
        return "still running when the others had failed or time was up; it was here:\n" + path.read_text()

    def _log(self, rank: int) -> str:
        path = self.folder / f"log{rank}"
        return path.read_text(errors="replace")[-LOG_TAIL:] if path.exists() else "(none)"

    def close(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
        for process in self.processes:
            process.join(10)
        shutil.rmtree(self.folder, ignore_errors=True)


def _rank_main(rank: int, world_size: int, folder: str, pipe: Connection) -> None:
    log = os.open(os.path.join(folder, f"log{rank}"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    stack = open(os.path.join(folder, f"stack{rank}"), "w")
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
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
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
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
    _make_stock_gathers_wait()
    # DeepSpeed collects garbage in every engine it builds. Looking through all imported modules each time took three
    # quarters of the time to build one; what is there now will never be garbage.
    gc.collect()
    gc.freeze()
    while True:
        try:
            module, function, kwargs = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            random.seed(0)
            torch.manual_seed(0)
            result = getattr(importlib.import_module(module), function)(**kwargs)
            _clean_up()
            dist.barrier()
            pipe.send((True, result))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _make_stock_gathers_wait() -> None:
    """An oracle must not race: under gloo, DeepSpeed up to 0.19.7 waits for the last of several gathers only."""
    from deepspeed.runtime.zero import partition_parameters as pp

    from mics_ds.seams import support

    if not support.gathers_race():
        return
    gather = pp.Init._allgather_params_coalesced

    def one_by_one(self: Any, params: list, *args: Any, **kwargs: Any) -> None:
        for param in params:
            gather(self, [param], *args, **kwargs)

    pp.Init._allgather_params_coalesced = one_by_one


def _clean_up() -> None:
    """Release what the last task built, so that repeated engines do not pile up hooks and memory."""
    helpers = sys.modules.get("helpers")
    if helpers is not None:
        helpers.destroy_engines()


class Pools:
    """Pools by world size, created on first use."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}

    def run(
        self, world_size: int, module: str, function: str, kwargs: dict[str, Any], timeout: float, fresh: bool = False
    ) -> list[Any]:
        if fresh:
            pool = RankPool(world_size)
            try:
                return pool.run(module, function, kwargs, timeout)
            finally:
                pool.close()
        if world_size not in self._pools:
            self._pools[world_size] = RankPool(world_size)
        try:
            return self._pools[world_size].run(module, function, kwargs, timeout)
        except BaseException:
            self._pools.pop(world_size).close()
            raise

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
