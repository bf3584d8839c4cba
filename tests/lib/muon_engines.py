"""Engines with DeepSpeed's Muon."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from helpers import (
    DTYPES,
    WIDTH,
    build,
    ds_config,
)
from torch import nn

MUON = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "adam_lr": 0.01, "torch_adam": True}


class Net(nn.Module):
    """Matrices of several shapes, wide, tall and square, that divide by nothing; vectors and an embedding for Adam."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, 13)
        self.blocks = nn.ModuleList(nn.Linear(*sizes) for sizes in ((13, 5), (5, 13), (13, 13), (13, 9), (9, 13)))
        self.unused = nn.Linear(3, 5)
        self.frozen = nn.Linear(13, 13).requires_grad_(False)
        self.norm = nn.LayerNorm(13)
        self.lm_head = nn.Linear(13, WIDTH)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return (self.lm_head(self.norm(x + self.frozen(x))) - y).float().pow(2).mean()


def muon_engine(p: int | None, *, optimizer: Any = None, params: dict[str, Any] | None = None, **config: Any) -> Any:
    """An engine with DeepSpeed's Muon, which stock has without ``reduce_scatter`` only."""
    config["zero"] = {"reduce_scatter": False, **config.get("zero", {})}
    if optimizer is not None:
        return build(ds_config(p, **config), Net, optimizer=optimizer)
    torch.manual_seed(1234)
    model = Net().to(DTYPES[config.get("dtype", "fp32")])
    trained = [param for param in model.parameters() if param.requires_grad]
    section = {"optimizer": {"type": "Muon", "params": {**MUON, **(params or {})}}}
    engine, *_ = deepspeed.initialize(
        model=model, config={**ds_config(p, **config), **section}, model_parameters=trained
    )
    return engine


@contextmanager
def kernels(*, compute: str = "fp32") -> Iterator[None]:
    """Let Newton-Schulz compute in fp32, or in the 16 bits that it uses where there are any: in those, a difference
    in the last bit of a gradient becomes one of a thousandth. Run as it is written, because compiling it takes one rank
    longer than the others wait for it here."""
    accelerator = get_accelerator()
    before, accelerator.is_fp16_supported = accelerator.is_fp16_supported, lambda: compute == "fp16"
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        accelerator.is_fp16_supported = before
        torch.compiler.set_stance("default")
