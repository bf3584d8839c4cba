"""Engines on the virtual accelerator, and what a rank sees while they train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch.distributed as dist
from helpers import build, ds_config, environment, train
from virtual_device import order
from virtual_device.accelerator import DEVICE
from virtual_device.comm import Issued

from mics_ds.comm import groups
from mics_ds.comm.sizes import Sizes

WARM_UP, STEPS = 4, 2  # DeepSpeed records its trace in the first two steps


SMALL = Sizes(unit=512, bucket=4096, whole=256)
"""So that the small model has several units of hop 2, and gathers of one parameter without a copy."""


SYSTEMS: dict[str, tuple[int | None, int]] = {  # p, ranks per node
    "zero3": (None, 4),
    "p=1": (1, 4),
    "p=2": (2, 4),
    "p=4 flat": (4, 4),
    "p=4 hierarchical": (4, 2),
}


WORLD: dict[str, tuple[int | None, int]] = {"p=1 world": (1, 4), "p=2 world": (2, 4)}
"""Configuration with world-sharded optimizer states."""


WIRED: dict[str, tuple[int | None, int]] = {
    "p=1 int8": (1, 4),
    "p=2 int4": (2, 4),
    "p=2 bf16": (2, 4),
    "p=1 world int4": (1, 4),
    "p=2 world int8": (2, 4),
}
"""Configuration with hop 2 in fewer bytes."""


@dataclass
class Seen:
    """Observations of one rank in some steps."""

    races: list[str]
    disorder: list[str]
    waits: list[str]
    """Places where the host waited for the device."""
    issued: list[Issued]
    losses: list[float]
    growth: dict[str, tuple[int, int]]
    """Amounts that differ between the ends of the last two steps: (before, after), by name."""


def engine_of(
    system: str, method: str = "native", inside_init: bool = False, synchronized: bool = False, **config: Any
) -> Any:
    """
    Args:
        synchronized: whether DeepSpeed's throughput timer waits for the device. Then nothing that is too early between
            two steps can be seen.
    """
    p, per_node = {**SYSTEMS, **WORLD, **WIRED}[system]
    zero = dict(config.pop("zero", {}))
    if p is not None:
        zero["mics_reduce_scatter"] = method
        zero["mics_optimizer_states"] = "world" if "world" in system else "partition"
        zero["mics_replica_wire"] = system.split()[-1] if system in WIRED else "full"
    if synchronized:
        config["timers"] = {"throughput": {"synchronized": True}}
    with (
        environment(MICS_DS_RANKS_PER_NODE=str(per_node)),
        mock.patch.object(groups, "sizes_of", return_value=SMALL),
    ):
        return build(ds_config(p, zero=zero, **config), inside_init=inside_init)


def watch(engine: Any, work: Callable[[Any], Any] | None = None) -> Seen:
    """Watch some steps, or other work."""
    losses: Any = []
    held = []
    with DEVICE.watching() as device:
        if work is not None:
            losses = work(engine)
        for _ in range(STEPS if work is None else 0):
            losses += train(engine, 1)
            held.append(device.held())
    issued = list(device.communication.issued)
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, issued)
    before, after = held[-2:] or ({}, {})
    return Seen(
        device.races,
        order.differences(dict(enumerate(everybody))),
        list(device.machine.synchronisations),
        issued,
        losses,
        {name: (before[name], count) for name, count in after.items() if count > before[name]},
    )
