"""Measure how long ranks take to agree and to make their groups: real processes, gloo on this machine, no training.

    PYTHONPATH=.:scripts OMP_NUM_THREADS=1 python -m bench.start [RANKS] [PARTITION_SIZE]

Prints the slowest rank's seconds and calls that create groups, and what ranks read from the store for the agreement.
Nodes of eight ranks are simulated.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import sys
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.distributed as dist
from local_ranks import LocalRanks
from torch.distributed import distributed_c10d as c10d

from mics_ds.comm.groups import build_groups
from mics_ds.config import MicsConfig


class CountingStore:
    """A store that counts what is read through it."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.read = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get(self, key: str) -> bytes:
        value = self._store.get(key)
        self.read += len(value)
        return value

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        found = self._store.compare_set(key, expected, value)
        self.read += len(found)
        return found


def start(n: int, p: int, port: int, rank: int, folder: Path, pipe: Connection) -> None:
    del folder
    os.environ["MICS_DS_RANKS_PER_NODE"] = "8"
    store = dist.TCPStore("127.0.0.1", port, n, rank == 0, timeout=timedelta(minutes=9))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n, timeout=timedelta(minutes=9))
    counting = CountingStore(c10d._get_default_store())
    c10d._get_default_store = lambda: counting
    calls, new_group = [0], dist.new_group

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return new_group(*args, **kwargs)

    dist.new_group = counted
    dist.barrier()
    began = time.perf_counter()
    build_groups(MicsConfig(p), dist.group.WORLD)
    seconds = time.perf_counter() - began
    dist.barrier()
    pipe.send(("result", {"seconds": seconds, "calls": calls[0], "read": counting.read}))
    time.sleep(1)  # rank 0 serves the store until the others are done


def measure(n: int, p: int) -> dict[str, Any]:
    port = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port  # free again at once
    with LocalRanks(n, functools.partial(start, n, p, port), multiprocessing.get_context("fork")) as ranks:
        found = ranks.collect(540, what="start")
    return {
        "ranks": n,
        "p": p,
        "seconds": round(max(item["seconds"] for item in found), 2),
        "calls of a rank": max(item["calls"] for item in found),
        "bytes read by the busiest rank": max(item["read"] for item in found),
        "bytes read by all": sum(item["read"] for item in found),
    }


if __name__ == "__main__":
    arguments = [int(word) for word in sys.argv[1:]]
    print(json.dumps(measure(*(arguments or [64, 8]))))
