"""Measure the host's work for each tensor that enters the buffer of hop 1 or leaves that of a gather.

    python scripts/bench/packing.py

Operations (views included) and microseconds per tensor, for stock ZeRO-3's own code and for MiCS in one and in two
stages. No ranks and no network: collectives are left out.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import torch  # noqa: E402
from ab_gpt import table  # noqa: E402
from deepspeed.runtime.comm import coalesced_collectives  # noqa: E402
from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, ZeroParamStatus  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from mics_ds.comm.packing import ChunkLayout  # noqa: E402

TENSORS = 40
NUMEL = 64
"""So small that copying takes no time, and what is measured is the host's work for each operation."""
REPEATS = 20
SIZES = (2, 4, 8, 64)

Work = Callable[[], object]


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += len(args[0]) if "foreach" in func.__name__ else 1
        return func(*args, **(kwargs or {}))


def cost(work: Work) -> str:
    """Return operations and microseconds per tensor."""
    with _Count() as counted:
        work()
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return f"{counted.count / TENSORS:.1f} / {best / TENSORS * 1e6:.1f}"


def stock_scatter(gradients: list[torch.Tensor], p: int) -> Work:
    def run() -> None:
        coalesced_collectives._torch_reduce_scatter_fn = lambda *args, **kwargs: None
        coalesced_collectives.dist = SimpleNamespace(get_rank=lambda group: 0, get_world_size=lambda group: p)
        coalesced_collectives.reduce_scatter_coalesced(gradients)

    return run


def stock_gather(p: int, numel: int) -> Work:
    width = -(-numel // p)
    partitions = list(torch.zeros(p, width * TENSORS).unbind())
    params = [torch.nn.Parameter(torch.empty(0)) for _ in range(TENSORS)]
    for param in params:
        param.ds_tensor = SimpleNamespace(ds_numel=width, dtype=torch.float32)
        param.ds_numel, param.ds_shape = numel, (numel,)

    def run() -> None:
        for param in params:
            param.ds_status = ZeroParamStatus.INFLIGHT
        AllGatherCoalescedHandle(SimpleNamespace(wait=lambda: None), params, partitions, p).wait()

    return run


def our_scatter(gradients: list[torch.Tensor], p: int, nodes: int = 1) -> Work:
    layout = ChunkLayout([gradient.numel() for gradient in gradients], p, nodes)
    return lambda: layout.pack(gradients)


def our_gather(numel: int, p: int, nodes: int) -> Work:
    layout = ChunkLayout((numel,) * TENSORS, p, nodes)
    gathered = torch.zeros(layout.size, layout.width)

    def run() -> None:
        fulls = [torch.empty(numel) for _ in range(TENSORS)]
        layout.copy_out(gathered, fulls)
        for full in fulls:
            full.view(numel)

    return run


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    rows: list[tuple[str, ...]] = [("operations / us per tensor", *(f"p = {p}" for p in SIZES))]
    for numel, kind in ((NUMEL, "p divides it"), (NUMEL - 1, "padded")):
        gradients = [torch.zeros(numel) for _ in range(TENSORS)]
        works: dict[str, list[Work]] = {
            "gradient, stock": [stock_scatter(gradients, p) for p in SIZES],
            "gradient, MiCS": [our_scatter(gradients, p) for p in SIZES],
            "gradient, MiCS in two stages": [our_scatter(gradients, p, p // 2) for p in SIZES],
            "parameter, stock": [stock_gather(p, numel) for p in SIZES],
            "parameter, MiCS in two stages": [our_gather(numel, p, p // 2) for p in SIZES],
        }
        rows += [(f"{name}, {kind}", *map(cost, each)) for name, each in works.items()]
    print(table(rows))


if __name__ == "__main__":
    main()
