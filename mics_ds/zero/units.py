"""Units of gradient shards that hop 2 averages together, the same on all replicas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """Shards that follow each other in the buffer of gradients, averaged together."""

    places: range
    """Places of the shards, counted in the order of the buffer."""
    start: int
    end: int
    """Elements [start, end) of the buffer."""


class UnitPlan:
    """Stretches of the buffer of a fixed size: *early* ones of parameters that replicas use, and *late* ones.

    Before anything is known of what replicas use, all units are late.

    Args:
        shards: elements [start, end) of each parameter's shard, by key, in ascending order.
        numel: least elements of a unit.
    """

    def __init__(self, shards: Mapping[int, tuple[int, int]], numel: int) -> None:
        self._bounds = list(shards.values())
        self._numel = max(1, numel)
        self.place = {key: place for place, key in enumerate(shards)}
        self._keys = list(shards)
        self._used: set[int] = set()
        self.early: list[Unit] = []
        self.late: list[Unit] = list(self._cut(shards))

    def learn(self, used: Iterable[int]) -> None:
        """Note parameters that some replica has used. Called by all replicas with the same keys."""
        if not self._used >= set(used):
            self._set(self._used | set(used))

    @property
    def used(self) -> list[int]:
        """Places of the parameters that some replica has used."""
        return sorted(self.place[key] for key in self._used)

    def reset(self, used: Iterable[int]) -> None:
        """Cut units as another replica does, or as they were. Called by all replicas with the same :attr:`used`."""
        self._set({self._keys[place] for place in used})

    def _set(self, used: set[int]) -> None:
        self._used = used
        self.early = list(self._cut(key for key in self._keys if key in used))
        self.late = list(self._cut(key for key in self._keys if key not in used))

    def keys(self, unit: Unit) -> set[int]:
        """Return the parameters of a unit."""
        return {self._keys[place] for place in unit.places}

    def index_of(self, key: int) -> int:
        """Return which of the early units a parameter is in, or how many there are if it is in none."""
        place = self.place[key]
        return next((index for index, unit in enumerate(self.early) if place in unit.places), len(self.early))

    def _cut(self, keys: Iterable[int]) -> Iterator[Unit]:
        first, stop = 0, 0
        for place in (self.place[key] for key in keys):
            enough = first < stop and self._bounds[stop - 1][1] - self._bounds[first][0] >= self._numel
            if place != stop or enough:
                if first < stop:
                    yield self._unit(first, stop)
                first = place
            stop = place + 1
        if first < stop:
            yield self._unit(first, stop)

    def _unit(self, first: int, stop: int) -> Unit:
        return Unit(range(first, stop), self._bounds[first][0], self._bounds[stop - 1][1])
