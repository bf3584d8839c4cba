"""Saves in the background and copies in memory, on the virtual accelerator: what is copied is finished, and training
waits for the copy alone."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers import build, destroy_engines, ds_config, train
from test_async_checkpoints import records
from test_virtual_races import WARM_UP, engine_of, watch
from torch import nn

from mics_ds.checkpoint.background import Background
from mics_ds.checkpoint.in_background import wait_for_saves


@pytest.mark.ranks(4, virtual=True)
@pytest.mark.parametrize("system", ["p=2", "p=2 world"])
def test_a_save_between_two_steps_waits_for_the_copy_alone(tmp_path, system):
    engine = engine_of(system, dtype="bf16", zero={"mics_checkpoint": {"async": True}})
    train(engine, WARM_UP)
    engine.save_checkpoint(str(tmp_path), tag="first")  # starts the processes
    wait_for_saves()

    seen = watch(engine, lambda engine: engine.save_checkpoint(str(tmp_path), tag="second"))
    after = watch(engine, lambda engine: train(engine, 1))
    wait_for_saves()
    assert not seen.races + after.races, "\n".join((seen.races + after.races)[:5])
    assert not seen.disorder
    assert any("wait_for_device" in place for place in seen.waits), seen.waits
    assert len(seen.waits) == 2, f"the copy, and what all ranks say after it: {seen.waits}"
    destroy_engines()


@pytest.mark.ranks(4, virtual=True)
@pytest.mark.parametrize("system", ["p=2", "p=2 world"])
def test_a_copy_in_memory_is_of_finished_states(tmp_path, system):
    zero = {"mics_checkpoint": {"memory_every": 1, "memory_folder": str(tmp_path)}}
    engine = engine_of(system, dtype="bf16", zero=zero)
    engine.load_checkpoint(str(tmp_path / "disk"))
    train(engine, WARM_UP)
    Background.current.wait_for_seals()
    dist.barrier()
    seen = watch(engine)
    assert not seen.races, "\n".join(seen.races[:5])
    assert not seen.disorder
    copies = system == "p=2 world" or dist.get_rank() < 2  # on one node, one rank copies for all that have its shard
    assert any("wait_for_device" in place for place in seen.waits) == copies, seen.waits
    engine.mics_memory.end()
    destroy_engines()


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.added = nn.Linear(7, 5), nn.Linear(5, 7)
        self.base.requires_grad_(False)

    def forward(self, x, y):
        return (self.added(self.base(x)) - y).pow(2).mean()


@pytest.mark.ranks(4, virtual=True)
def test_frozen_parameters_come_with_the_copy(tmp_path):
    """DeepSpeed brings them to the host one by one; the files are the same."""
    engine = build(ds_config(2, zero={"mics_checkpoint": {"async": True}}), Frozen)
    train(engine, 1)
    engine.save_checkpoint(str(tmp_path), tag="first")  # starts the processes
    engine.save_checkpoint(str(tmp_path), tag="waited", async_save=False)
    seen = watch(engine, lambda engine: engine.save_checkpoint(str(tmp_path), tag="background"))
    wait_for_saves()
    dist.barrier()
    assert not seen.races, "\n".join(seen.races[:5])
    assert len(seen.waits) == 2, seen.waits
    assert records(tmp_path, "waited") == records(tmp_path, "background")
    states = torch.load(tmp_path / "background" / "zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=False)
    shard = engine.module.base.weight.ds_tensor
    assert states["frozen_param_fragments"]["base.weight"].shape == shard.shape
    assert states["frozen_param_fragments"]["base.weight"].abs().sum() > 0
    destroy_engines()
