"""Asynchronous saves and copies in memory, on the virtual accelerator: what is copied is finished, and is not changed
before it is. The host waits for none of it."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import deepspeed
import pytest
import torch
import torch.distributed as dist
from cases import every
from checkpoint_engines import records
from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param
from helpers import build, destroy_engines, ds_config, train
from torch import nn
from virtual_engines import WARM_UP, engine_of, watch

from mics_ds.checkpoint.background import Background, wait_for_saves
from mics_ds.shared_memory import Copying


@contextmanager
def no_help_from_threads():
    """The one that waits for copies would order everything behind them: there is one host in the virtual machine."""
    over = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Copying, "wait", lambda self: over.wait())
        try:
            yield
        finally:
            over.set()


def saved_once(tmp_path, system):
    engine = engine_of(system, dtype="bf16", zero={"mics_checkpoint": {"async": True}})
    train(engine, WARM_UP)
    engine.save_checkpoint(str(tmp_path), tag="first")  # starts the processes
    wait_for_saves()
    return engine


def step(engine):
    return train(engine, 1)


def edit_a_master(engine):
    weight = engine.module.head.weight
    safe_set_local_fp32_param(weight, torch.ones_like(safe_get_local_fp32_param(weight)))


def edit_while_gathered(engine):
    with deepspeed.zero.GatheredParameters([engine.module.gain], modifier_rank=0):
        if dist.get_rank() == 0:
            engine.module.gain.data.mul_(2.0)


CHANGES = [step, edit_a_master, edit_while_gathered]


@pytest.mark.ranks(4, virtual=True)
@pytest.mark.parametrize(
    ("change", "system"),
    every(CHANGES, ("p=2", "p=2 world"), default=list(zip(CHANGES, ("p=2 world", "p=2", "p=2")))),
)
def test_the_host_waits_for_no_copy_and_the_device_does(tmp_path, system, change):
    engine = saved_once(tmp_path, system)

    def save_and_change(engine):
        engine.save_checkpoint(str(tmp_path), tag="second")
        return change(engine)

    with no_help_from_threads():
        alone = watch(engine, change)
        both = watch(engine, save_and_change)
    wait_for_saves()
    assert not alone.races + both.races, "\n".join((alone.races + both.races)[:5])
    assert not both.disorder
    assert len(both.waits) - len(alone.waits) == 1, f"for what all ranks say: {both.waits}"
    destroy_engines()


@pytest.mark.ranks(4, virtual=True)
@pytest.mark.parametrize("change", [step, edit_a_master])
def test_a_change_that_does_not_wait_is_seen(tmp_path, change):
    engine = saved_once(tmp_path, "p=2 world")

    def save_and_change(engine):
        engine.save_checkpoint(str(tmp_path), tag="second")
        return change(engine)

    with no_help_from_threads(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Background, "before_states_change", lambda self: None)
        seen = watch(engine, save_and_change)
    wait_for_saves()
    assert any("copy_in" in race for race in seen.races), seen.races
    destroy_engines()


@pytest.mark.ranks(4, virtual=True)
@pytest.mark.parametrize("system", ["p=2", "p=2 world"])
def test_a_copy_in_memory_is_of_finished_states(tmp_path, system):
    zero = {"mics_checkpoint": {"memory_every": 2, "memory_folder": str(tmp_path)}}
    engine = engine_of(system, dtype="bf16", zero=zero)
    engine.load_checkpoint(str(tmp_path / "disk"))
    train(engine, WARM_UP)
    Background.current.wait_for_seals()
    dist.barrier()
    with no_help_from_threads():
        step(engine)
        both = watch(engine, lambda engine: [*step(engine), *step(engine)])
        assert not both.races, "\n".join(both.races[:5])
        assert not both.disorder
        ours = [wait for wait in both.waits if "memory.py" in wait or "copies.py" in wait]
        assert len(ours) == 1, f"for what all ranks say: {ours}"
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
    with no_help_from_threads():
        seen = watch(engine, lambda engine: engine.save_checkpoint(str(tmp_path), tag="background"))
    wait_for_saves()
    dist.barrier()
    assert not seen.races, "\n".join(seen.races[:5])
    assert len(seen.waits) == 1, seen.waits
    assert records(tmp_path, "waited") == records(tmp_path, "background")
    states = torch.load(tmp_path / "background" / "zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=False)
    shard = engine.module.base.weight.ds_tensor
    assert states["frozen_param_fragments"]["base.weight"].shape == shard.shape
    assert states["frozen_param_fragments"]["base.weight"].abs().sum() > 0
    destroy_engines()
