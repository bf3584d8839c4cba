"""A model that DeepSpeed's AutoTP cuts, and the settings that make it do so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.module_inject.layers import set_autotp_mode
from deepspeed.utils import groups
from helpers import (
    WIDTH,
)
from torch import nn


class Blocks(nn.Module):
    """Two blocks of a transformer without attention: cut by columns, then by rows, with odd sizes left of each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, 12)
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(12, 28) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(28, 12) for _ in range(2))
        self.head = nn.Linear(12, WIDTH)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for norm, up, down in zip(self.norms, self.up, self.down):
            x = x + down(torch.tanh(up(norm(x))))
        return (self.head(x) - y).float().pow(2).mean()


def tensor_parallel(size: int) -> dict[str, Any]:
    specs = [
        {"patterns": [r".*up\.\d\.weight$"], "partition_type": "column"},
        {"patterns": [r".*down\.\d\.weight$"], "partition_type": "row"},
    ]
    return {"autotp_size": size, "partition_config": {"use_default_specs": False, "layer_specs": specs}}


@contextmanager
def autotp() -> Iterator[None]:
    """DeepSpeed keeps its groups and modes in globals; leave none behind."""
    try:
        yield
    finally:
        set_autotp_mode(training=False)
        groups.mpu = None
        groups._DATA_PARALLEL_GROUP = groups._MODEL_PARALLEL_GROUP = groups._TENSOR_MODEL_PARALLEL_GROUP = None
