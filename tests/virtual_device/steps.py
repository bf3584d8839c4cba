"""Steps in virtual time, on 32 imagined accelerators of 8 to a node.

[Note: the lower bound]

With T the time of the same step if communication took none, no schedule of these collectives can be faster than

- T + the first gather, which nothing can hide (DeepSpeed asks for as many layers as it gathers ahead) + both hops of
  the last bucket, whose gradients are there when the backward pass is over; nor than
- for each kind of link: the moment at which it could first be used, if communication took no time until then, + all
  the time for which it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from helpers import build, destroy_engines, ds_config
from torch import nn

from mics_ds.comm import collectives
from mics_ds.planner.machine import Link, Machine
from mics_ds.planner.model import Block, Model, Unit
from mics_ds.planner.timeline import Scheme, step_time
from mics_ds.planner.workload import Workload, ZeroSettings
from virtual_device.accelerator import DEVICE
from virtual_device.costs import Costs
from virtual_device.fleet import imagined_ranks
from virtual_device.streams import Span

RANKS, PER_NODE = 32, 8
HIDDEN, LAYERS, SAMPLES = 64, 12, 2
SCALE = 12_000  # 4096 weights in a layer stand for 49 million, 197 MB
LAYER = HIDDEN * HIDDEN
BUCKET = AHEAD = 2  # layers that are reduced, and gathered ahead, together
FORWARD_S = {"compute-bound": 20e-3, "balanced": 4e-3, "network-bound": 1e-3}  # of one layer
SYSTEMS: dict[str, tuple[int | None, bool]] = {
    "ZeRO-3": (None, False),
    "p=8": (8, True),
    "p=16": (16, True),
    "p=16 flat": (16, False),
}


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.pow(2).mean()


def machine(forward_s: float) -> Machine:
    """NVLink of 250 GB/s, 400 Gbit/s to a node, and matrix products as fast as asked for."""
    flops = SCALE * 2 * SAMPLES * LAYER / forward_s
    return Machine(
        "virtual", PER_NODE, 80e9, {"fp32": flops}, 1.0, Link(250e9, 5e-6), Link(50e9, 2e-5), memory_bandwidth=2e12
    )


def step(engine: Any) -> float:
    x = torch.ones(SAMPLES, HIDDEN, requires_grad=True)  # so that the first layer's backward costs what others' do
    loss = engine(x)
    engine.backward(loss)
    engine.step()
    return loss.item()


@dataclass
class Step:
    seconds: float
    compute: float
    """Seconds if communication took none."""
    bound: float
    """See [Note: the lower bound]."""
    spans: list[Span]
    waits: int
    """How often the host waited for the device."""

    @property
    def exposed(self) -> float:
        return self.seconds - self.compute

    @property
    def backward_ends(self) -> float:
        return max(span.end for span in self.spans if span.name == "aten::mm")

    def hop2_after(self, moment: float) -> int:
        """Bytes (as they are here) of hop 2 that is not over by then."""
        late = [span for span in self.spans if span.name.startswith("all_reduce") and span.end > moment]
        return sum(int(span.name.split()[2]) for span in late)


def engine_of(system: str) -> Any:
    p, staged = SYSTEMS[system]
    zero: dict[str, Any] = {
        "overlap_comm": True,
        "reduce_bucket_size": BUCKET * LAYER,
        "stage3_prefetch_bucket_size": AHEAD * LAYER,
        "stage3_max_live_parameters": 4 * LAYER,
        "stage3_max_reuse_distance": 0,
    }
    if p is not None:
        zero |= {"mics_hierarchical_params_gather": staged, "mics_hierarchical_grad_scatter": staged}
        zero["mics_reduce_scatter"] = "native"
    engine = build(ds_config(p, zero=zero), Stack)
    losses = [step(engine) for _ in range(5)]
    assert losses == sorted(losses, reverse=True), "imagined ranks have the same data, so the loss falls as for one"
    return engine


def measure(engine: Any, system: str, setting: str) -> Step:
    on = machine(FORWARD_S[setting])
    seen: list[Any] = []
    for communication in (False, True):
        costs = Costs(on, SCALE, communication=communication)
        with DEVICE.watching(costs.operation, costs.collective, launch_cost=3e-6, meet=False) as device:
            step(engine)
            device.machine.synchronize()
        assert not device.races, device.races[:3]
        firsts = {link: min(begin for begin, _ in use.uses) for link, use in device.communication.links.items()}
        busy = {link: sum(end - begin for begin, end in use.busy) for link, use in device.communication.links.items()}
        seen.append((device.machine.host_time, firsts, busy))
    (compute, firsts, _), (seconds, _, busy) = seen
    bound = max(compute + unavoidable(on, system), *(firsts[link] + busy[link] for link in busy))
    return Step(seconds, compute, bound, list(device.machine.spans), len(device.machine.synchronisations))


def unavoidable(on: Machine, system: str) -> float:
    """Seconds of the first gather, and of both hops of the last bucket."""
    p, staged = SYSTEMS[system]
    size = p or RANKS
    partition, layer = on.partition_form(RANKS, size), 4 * LAYER * SCALE
    staged = staged and on.can_stage(RANKS, size)
    seconds = on.formula("all_gather", AHEAD * layer, partition, staged)
    seconds += on.formula("reduce_scatter", BUCKET * layer, partition, staged)
    if p is not None:
        seconds += on.formula("all_reduce", BUCKET * layer / p, on.replication_form(RANKS, p))
    return seconds


def planned(system: str, setting: str) -> float:
    p, staged = SYSTEMS[system]
    on = machine(FORWARD_S[setting])
    numel = LAYER * SCALE
    block = Block((Unit((numel,), 2.0 * numel),), repeat=LAYERS)
    zero = ZeroSettings(
        prefetch_bucket_size=AHEAD * numel,
        max_live_parameters=4 * numel,
        max_reuse_distance=0,
        param_persistence_threshold=0,
        reduce_bucket_size=BUCKET * numel,
    )
    workload = Workload(
        Model("stack", (block,), 1), SAMPLES, 1, "fp32", optimizer="sgd_momentum", zero=zero, accumulation_itemsize=4
    )
    staged = staged and p is not None and on.can_stage(RANKS, p)
    return step_time(on, workload, Scheme(p, staged, staged), RANKS).total


@contextmanager
def cluster() -> Iterator[None]:
    """The 32 ranks. Buffers are cut into pieces as those that they stand for would be."""
    with mock.patch.object(collectives, "LEAST_STAGED_PIECE_BYTES", 1), imagined_ranks(RANKS, PER_NODE):
        yield


def measure_all() -> dict[tuple[str, str], Step]:
    """By system and setting."""
    steps: dict[tuple[str, str], Step] = {}
    with cluster():
        for system in SYSTEMS:
            engine = engine_of(system)
            for setting in FORWARD_S:
                steps[system, setting] = measure(engine, system, setting)
            destroy_engines()
    return steps


def row(system: str, setting: str, step: Step) -> str:
    """Milliseconds, for people."""
    return (
        f"{system:10} {setting:14} step {1e3 * step.seconds:6.1f} planned {1e3 * planned(system, setting):6.1f} "
        f"compute {1e3 * step.compute:6.1f} exposed {1e3 * step.exposed:6.2f} "
        f"bound {1e3 * (step.bound - step.compute):6.2f}"
    )
