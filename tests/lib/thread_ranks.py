"""Ranks as threads of this process: for schedules over collectives that need neither processes nor a network.

torch's own threaded process group, which it keeps for its tests, moves the data. Collectives have to be issued on the
rank's thread itself.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg as threaded

TIMEOUT_S = 60.0


def on_threads(world_size: int, body: Callable[[], None]) -> None:
    """Run ``body`` on ``world_size`` ranks of a process group of their own.

    Raises:
        AssertionError: a rank raised or did not finish. The message has every failed rank's traceback.
    """
    store = dist.HashStore()
    failures: dict[int, str] = {}
    threaded._install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)  # every rank registers a group of the same name

    def rank_main(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world_size, store=store)
            body()
        except BaseException as error:
            failures[rank] = traceback.format_exc()
            threaded.ProcessLocalGroup.exception_handle(error)  # releases those who wait for this rank
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(world_size)]
    try:
        for thread in threads:
            thread.start()
        for rank, thread in enumerate(threads):
            thread.join(TIMEOUT_S)
            if thread.is_alive():
                failures.setdefault(rank, "still running when time was up")
    finally:
        threaded.ProcessLocalGroup.reset()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        threaded._uninstall_threaded_pg()
    report = "\n".join(f"──── rank {rank} ────\n{failures[rank]}" for rank in sorted(failures))
    assert not failures, f"ranks {sorted(failures)} of {world_size} failed\n{report}"
