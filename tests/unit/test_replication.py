"""Hop 2 over members who come and go: what a step that is given up leaves behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from replicas_on_threads import CPU, SHARDS, UNIT, Deferring

from mics_ds.zero.grad_sync import Given, GradSync
from mics_ds.zero.replica_reducers import AllReduceMean
from mics_ds.zero.replication import Replication
from mics_ds.zero.units import GradientShards, UnitPlan


class Breaking(Replication):
    """Members of whom one may be gone: collectives leave anything then, and raise nothing."""

    votes = True

    def __init__(self) -> None:
        self.units: float = math.inf
        """Units of hop 2 that still work."""

    def start_average_(self, tensor: torch.Tensor) -> Any:
        done = self._done(tensor, 99.0)
        self.units -= 1
        return done

    def start_max_(self, tensor: torch.Tensor, what: str) -> Any:
        return self._done(tensor, Given.WRITTEN)

    def _done(self, tensor: torch.Tensor, garbage: float) -> Any:
        if self.units <= 0:
            tensor.fill_(garbage)
        return SimpleNamespace(wait=lambda: tensor)

    def commit(self) -> bool:
        return self.units > 0

    def close(self) -> None:
        pass


@pytest.mark.parametrize("units", [0, 1])
def test_a_step_that_is_given_up_leaves_nothing_behind(units):
    """Neither garbage in shards, which would be old means, nor what flags seemed to say of the units. A replica may die
    before the first unit of hop 2 or between two."""
    members, buffer, executor = Breaking(), torch.zeros(11), Deferring(0)
    reducer = AllReduceMean(GradientShards(lambda: buffer, list(SHARDS.values()), CPU, 4), members)
    sync = GradSync(SHARDS, members, executor, executor, reducer, unit_numel=UNIT)

    def step(key: int, value: float) -> None:
        def hop1(before_storing: Callable[[], None]) -> None:
            before_storing()
            buffer[slice(*SHARDS[key])] = value

        sync.reduce([key], hop1, overwriting=True, last=True)
        sync.end_pass(last=True)

    step(10, 1.0)
    sync.next_boundary()
    assert sync.used == [0]
    members.units = units
    step(12, 2.0)
    assert buffer.tolist() != [1.0] * 3 + [0.0] * 8
    sync.restart()
    assert buffer.tolist() == [0.0] * 11
    assert sync.used == [0], "that of the last step that counted"
    assert sync.is_mean
    assert sync.flags is None
    members.units = math.inf
    step(12, 3.0)
    sync.next_boundary()
    assert buffer.tolist() == [0.0] * 4 + [3.0] * 5 + [0.0] * 2
    assert sync.used == [0, 2]
    sync.restart([1])
    assert sync.used == [1], "as another replica has learnt"


def test_units_are_cut_as_another_replica_does_or_as_they_were():
    def shape(plan: UnitPlan) -> tuple[list[range], list[range]]:
        return plan.early, plan.late

    bounds = [*SHARDS.values()]
    made, other = UnitPlan(bounds, 9), UnitPlan(bounds, 9)
    other.learn([0, 2])
    assert other.used == {0, 2}
    made.reset(other.used)
    assert shape(made) == shape(other) == ([range(1), range(2, 3)], [range(1, 2), range(3, 4)])
    made.reset([])
    assert shape(made) == shape(UnitPlan(bounds, 9))
