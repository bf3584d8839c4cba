"""What communication holds and copies, in bytes, on the virtual accelerator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import build, destroy_engines, ds_config, environment
from torch import nn
from virtual_device.accelerator import DEVICE

from mics_ds.comm import groups
from mics_ds.comm.sizes import Sizes
from mics_ds.planner import memory as planned
from mics_ds.planner.model import Block, Model, Unit
from mics_ds.planner.presets import PRESETS
from mics_ds.planner.timeline import Scheme, step_time
from mics_ds.planner.workload import Workload, ZeroSettings

WIDTH, LAYERS, ITEM = 64, 6, 4
LAYER = WIDTH * WIDTH
SIZES = Sizes(*[LAYER * ITEM] * 3)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.pow(2).mean()


def engine_of(p: int | None, per_node: int = 4, **zero: Any) -> Any:
    with environment(MICS_DS_RANKS_PER_NODE=str(per_node)), mock.patch.object(groups, "sizes_of", return_value=SIZES):
        return build(ds_config(p, zero={"reduce_bucket_size": LAYER, **zero}), Stack)


@pytest.mark.ranks(4, virtual=True)
@pytest.mark.parametrize(("p", "per_node", "states"), [(2, 4, "partition"), (2, 4, "world"), (4, 2, "partition")])
def test_two_tasks_of_each_hop_hold_memory(p, per_node, states):
    """However far the host is ahead of the device: here it waits for it once in a step. The planner knows."""
    engine = engine_of(p, per_node, mics_reduce_scatter="native", mics_optimizer_states=states)
    groups = engine.optimizer.mics_groups
    with DEVICE.watching() as device:
        engine.backward(engine(torch.ones(2, WIDTH)))
        engine.step()
    hop1 = device.memory.peak[engine.optimizer.reduce_and_partition_stream.name]
    hop2 = sum(device.memory.peak[stream.name] for stream in (groups.replica_executor._issue,) if stream)
    staged = groups.scatter_hierarchy is not None
    assert hop1 == SIZES.ahead * (LAYER + LAYER // p + (LAYER // per_node if staged else 0)) * ITEM
    # A unit is a shard here: more than an eighth of all.
    assert hop2 == (SIZES.ahead * LAYER // p * ITEM if states == "world" else 0)
    block = Block((Unit((LAYER,), 1.0),), repeat=LAYERS)
    zero = ZeroSettings(reduce_bucket_size=LAYER, param_persistence_threshold=0)
    job = Workload(Model("stack", (block,), 1), precision="fp32", zero=zero)
    system = Scheme(p, staged, staged, world_states=states == "world")
    with mock.patch.object(planned, "sizes_of", return_value=SIZES):
        played = step_time(replace(PRESETS["p4d.24xlarge"], gpus_per_node=per_node), job, system, 4)
        assert planned.memory(job, system, 4, played).bucket == LAYER * ITEM + hop1 + hop2


@pytest.mark.ranks(4, virtual=True)
@pytest.mark.parametrize("count", [1, 2])
def test_a_flat_gather_copies_no_more_than_stock(count):
    """The shards of several parameters into one buffer, and the parameters out of it; a single one is sent as it is."""
    for p in (None, 2):
        engine = engine_of(p)
        params = [layer.weight for layer in engine.module.layers[:count]]
        with DEVICE.watching() as device:
            params[0].all_gather_coalesced(params).wait()
        shard = LAYER // (p or 4)
        assert device.watch.copied == (0 if count == 1 else count * (shard + LAYER) * ITEM)
        for param in params:
            param.partition()
        destroy_engines()


@pytest.mark.ranks(4, virtual=True)
def test_a_gather_of_one_parameter_in_two_stages_makes_it_once():
    """Beside it there are a copy of the shard, and what has come from the other node: the shards of two ranks."""
    engine = engine_of(4, per_node=2)
    param = engine.module.layers[0].weight
    with DEVICE.watching() as device:
        param.all_gather_coalesced([param]).wait()
    assert device.memory.peak.total() == (LAYER + LAYER // 4 + LAYER // 2) * ITEM
    assert device.watch.copied == LAYER // 4 * ITEM
    param.partition()
