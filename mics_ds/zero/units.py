"""Gradient shards in their buffer, and units of them that hop 2 averages together, the same on all replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..comm.sizes import runs


@dataclass(frozen=True)
class GradientShards:
    """Shards of gradients in one buffer, counted in its order: their *places*."""

    buffer: Callable[[], torch.Tensor]
    """Returns the buffer, 1-D."""
    bounds: Sequence[tuple[int, int]]
    """Elements [start, end) of each shard in it."""
    device: torch.device
    """Where collectives work."""
    part: int
    """Elements that are copied at a time from a buffer elsewhere, or one shard."""

    def at(self, places: range) -> torch.Tensor:
        """Return shards that follow each other: 1-D and live."""
        return self.buffer()[self.bounds[places.start][0] : self.bounds[places.stop - 1][1]]

    @property
    def is_here(self) -> bool:
        """Return whether collectives can work on the buffer as it is."""
        return self.buffer().device == self.device

    def parts(self, places: range) -> Iterator[range]:
        """Divide shards that follow each other into those that are worked on at a time."""
        if self.is_here:
            yield places
            return
        for run in runs(places, [end - start for start, end in self.bounds], self.part):
            yield range(run[0], run[-1] + 1)


class UnitPlan:
    """Stretches of the buffer of a fixed size: *early* ones of parameters that replicas use, and *late* ones.

    A unit is a range of places. Before anything is known of what replicas use, all units are late.

    Args:
        bounds: elements [start, end) of each shard, in ascending order.
        numel: least elements of a unit.
    """

    def __init__(self, bounds: Sequence[tuple[int, int]], numel: int) -> None:
        self._bounds, self._numel = bounds, numel
        self.reset(())

    def learn(self, used: Iterable[int]) -> None:
        """Note places of parameters that some replica has used. Called by all replicas with the same ones."""
        if not self.used.issuperset(used):
            self.reset(self.used.union(used))

    def reset(self, used: Iterable[int]) -> None:
        """Cut units as another replica does, or as they were. Called by all replicas with the same :attr:`used`."""
        self.used = frozenset(used)
        """Places of the parameters that some replica has used."""
        places = range(len(self._bounds))
        self.early = list(self._cut(place for place in places if place in self.used))
        self.late = list(self._cut(place for place in places if place not in self.used))

    def _cut(self, places: Iterable[int]) -> Iterator[range]:
        unit = range(0)
        for place in places:
            enough = unit and self._bounds[unit[-1]][1] - self._bounds[unit[0]][0] >= self._numel
            if unit and (enough or place != unit.stop):
                yield unit
                unit = range(0)
            unit = range(unit.start if unit else place, place + 1)
        if unit:
            yield unit
