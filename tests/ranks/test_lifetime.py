"""Engines that end, and others that go on."""

from __future__ import annotations

import threading

import deepspeed
import pytest
import torch
import torch.distributed as dist
from helpers import OddNet, batch, build, ds_config, environment, full_params, same_on_all_ranks, train

from mics_ds.comm.groups import build_groups
from mics_ds.config import MicsConfig


class Threads:
    """Threads that executors have started since this object was made, which earlier tests have no part in."""

    def __init__(self) -> None:
        self._before = set(threading.enumerate())

    def names(self) -> set[str]:
        now = set(threading.enumerate()) - self._before
        return {thread.name for thread in now if thread.name.startswith("mics ")}


@pytest.mark.ranks(4)
def test_a_destroyed_engine_leaves_no_thread():
    threads = Threads()
    with environment(MICS_DS_RANKS_PER_NODE="2"):
        engine = build(ds_config(4))
    train(engine, 2)
    assert threads.names() == {"mics all-gather", "mics reduction"}
    engine.destroy()
    assert threads.names() == set()


@pytest.mark.ranks(4)
def test_a_destroyed_engine_without_an_optimizer_leaves_no_thread():
    threads = Threads()
    config = ds_config(4)
    with environment(MICS_DS_RANKS_PER_NODE="2"):
        engine, *_ = deepspeed.initialize(model=OddNet(), config=config)
    engine.eval()
    with torch.no_grad():
        engine(*batch(0, 0, dist.get_rank()))
    assert threads.names() == {"mics all-gather"}
    engine.destroy()
    assert threads.names() == set()


@pytest.mark.ranks(4)
def test_another_engine_goes_on_over_the_same_groups():
    """Process groups are kept for as long as the world is: whoever asks for the same ones gets them."""
    threads = Threads()
    first, second = build(ds_config(2)), build(ds_config(2))
    groups = first.optimizer.mics_groups
    assert groups.partition.group is second.optimizer.mics_groups.partition.group
    train(first, 1)
    train(second, 2)
    first.destroy()
    train(second, 2)
    same_on_all_ranks(full_params(second))
    second.destroy()
    assert build_groups(MicsConfig(2), dist.group.WORLD).partition.group is groups.partition.group
    assert threads.names() == set()


@pytest.mark.ranks(4)
def test_an_engine_destroyed_before_its_step():
    """Hop 2 may be under way then."""
    threads = Threads()
    for _ in range(2):
        engine = build(ds_config(2))
        train(engine, 2)
        engine.backward(engine(*batch(2, 0, dist.get_rank())))
        engine.destroy()
        assert threads.names() == set()
    again = build(ds_config(2))
    train(again, 2)
    same_on_all_ranks(full_params(again))
