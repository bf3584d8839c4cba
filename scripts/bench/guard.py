"""Measure what a check of the replica guard costs, against one copy of the same bytes, and its share of a planned step.

    python scripts/bench/guard.py [--mb 256]

Bytes are counted at torch's operators: what each reads and writes of tensors larger than 1/256 of the data. Times are
the best of several in this process, digest and copy in turn. The share is that ratio times the time in which a device
copies the states of one rank of `mics-ds plan`'s 13 B example, once in 100 steps.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import torch  # noqa: E402
from ab_gpt import table  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from mics_ds.guard.digest import digests  # noqa: E402
from mics_ds.planner.job import build_job  # noqa: E402
from mics_ds.planner.plan import choose, make_plan  # noqa: E402
from mics_ds.planner.presets import PRESETS  # noqa: E402

BLOCK = 4 << 20
REPEATS = 9
EVERY = 100
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write. Views count nothing."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.bytes = least, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            seen = [*args, result] if not func.__name__.split(".")[0].endswith("_") else list(args)
            tensors = {item.data_ptr(): item.nbytes for item in seen if isinstance(item, torch.Tensor)}
            self.bytes += sum(size for size in tensors.values() if size >= self.least)
        return result


def best_of(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Run functions in turns and return the least seconds of each."""
    best = dict.fromkeys(works, float("inf"))
    for _ in range(REPEATS):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def measure(nbytes: int, dtype: torch.dtype) -> tuple[float, float]:
    """Return bytes and time of a digest, each divided by those of a copy."""
    data = torch.randint(256, (nbytes,), dtype=torch.uint8).view(dtype)
    other = torch.empty_like(data)
    works: dict[str, Callable[[], object]]
    works = {"digest": lambda: digests(data, BLOCK), "copy": lambda: other.copy_(data)}
    moved = {}
    for name, work in works.items():
        with Traffic(nbytes // 256) as traffic:
            work()
        moved[name] = traffic.bytes
    seconds = best_of(works)
    return moved["digest"] / moved["copy"], seconds["digest"] / seconds["copy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=256, help="megabytes of data")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device-gb-s", type=float, default=1555.0, help="memory of the planned device (A100)")
    parser.add_argument("--step-s", type=float, help="planned step; by default by mics-ds plan for the 13 B example")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = [["dtype", "bytes, digest : copy", "time, digest : copy"]]
    worst = 0.0
    for dtype in DTYPES:
        moved, seconds = measure(given.mb << 20, dtype)
        worst = max(worst, seconds)
        rows.append([str(dtype).removeprefix("torch."), f"{moved:.2f}", f"{seconds:.2f}"])
    print(table(rows))
    states, step = example()
    step = given.step_s or step
    check = worst * 2 * states / (given.device_gb_s * 1e9)
    print(
        f"13 B example: {states / 1e9:.1f} GB of states per GPU, step {step:.2f} s; a check of {1e3 * check:.1f} ms, "
        f"every {EVERY} steps: {100 * check / EVERY / step:.4f}% of the step"
    )


def example() -> tuple[float, float]:
    """Return bytes of states on a GPU and seconds of a step, for docs/planner.md's example at its recommended size."""
    machine, job = PRESETS["p4d.24xlarge"], build_job("llama-13b", 64, micro_steps=4, checkpointing=True)
    chosen = choose(make_plan(machine, job, 64))
    assert chosen is not None, "the example fits"
    return job.model.numel * (job.itemsize + 12) / chosen.p, chosen.time.total


if __name__ == "__main__":
    main()
