"""Settings under which DeepSpeed swaps small parameters to files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepspeed.runtime.swap_tensor import partitioned_param_swapper


def swapped_to(path: Path, max_in_cpu: int) -> dict[str, Any]:
    return {
        "offload_param": {
            "device": "nvme",
            "nvme_path": str(path),
            "buffer_size": 50_000,
            "buffer_count": 8,
            "max_in_cpu": max_in_cpu,
        },
        "offload_optimizer": {"device": "cpu"},
        # Stock 0.19.8 takes two buffers for one parameter where it prefetches from NVMe.
        "stage3_prefetch_bucket_size": 0,
    }


@contextmanager
def small_blocks() -> Iterator[None]:
    """DeepSpeed swaps nothing of less than a megabyte; here, what fills a block."""
    before, partitioned_param_swapper.MIN_AIO_BYTES = partitioned_param_swapper.MIN_AIO_BYTES, 4096
    try:
        yield
    finally:
        partitioned_param_swapper.MIN_AIO_BYTES = before


SETTINGS: dict[str, Any] = {"micro_steps": 2, "clip": 0.5, "aio": {"block_size": 4096, "queue_depth": 4}}
