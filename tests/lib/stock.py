"""Training with stock ZeRO-3 and with MiCS, compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from helpers import (
    WIDTH,
    OddNet,
    assert_close,
    assert_losses_close,
    build,
    ds_config,
    full_params,
    same_on_all_ranks,
    train,
)
from torch import nn

Drive = Callable[[Any], list[float]]


def compare(
    *,
    sizes: tuple[int, ...] = (2,),
    tolerance: float = 1e-6,
    drive: Drive = lambda engine: train(engine, 3),
    model: Callable[[], nn.Module] = OddNet,
    optimizer: Any = None,
    prepare: Callable[[Any], None] = lambda engine: None,
    **config: Any,
) -> list[Any]:
    """Train with stock ZeRO-3 and with MiCS of several sizes; losses and parameters must agree. Returns the engines."""
    engines, expected = [], None
    for p in (None, *sizes):
        engine = build(ds_config(p, **config), model, optimizer=optimizer)
        assert (p is None) == (not hasattr(engine.optimizer, "mics_groups"))
        prepare(engine)
        initial = full_params(engine)
        losses, params = drive(engine), full_params(engine)
        same_on_all_ranks(params)
        if expected is None:
            expected = losses, params
            assert any(not torch.equal(params[name], initial[name]) for name in params), "the oracle must train"
        assert_losses_close(losses, expected[0], tolerance)
        assert_close(params, expected[1], tolerance, initial)
        engines.append(engine)
    return engines


class Deep(nn.Module):
    """Blocks of small layers, each fetched as one module where the granularity threshold says so."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 20), nn.Tanh(), nn.Linear(20, WIDTH)) for _ in range(3)
        )

    def forward(self, x, y):
        for block in self.blocks:
            x = x + block(x)
        return (x - y).pow(2).mean()


def averaged(loss):
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()
