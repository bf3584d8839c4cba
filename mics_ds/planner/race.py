"""Races between ways of collectives: times of contestants, by turns, in a time that is given.

Contestants are functions; nothing here knows what they do. :mod:`mics_ds.planner.measure` has those of MiCS.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..comm import collectives
from ..comm.rank_group import RankGroup
from ..deepspeed_compat.engine import communication_device, wait_for_device

FEWEST, MOST = 2, 15
"""Rounds that a size needs to count, and at most gets. The first one does not count where there are others."""
ENOUGH = 3
"""Rounds that a size gets before others have their turn."""
HOPELESS = (2.0, 1.3)
"""A way that takes longer than the fastest by these factors is not measured again, after one round and after more."""
SMALLEST, LARGEST = 1 << 12, 1 << 28
"""Bytes of the full buffer that are timed first and at most. Above, links are busy all the time."""
GROWTH = 8
"""Largest ratio of two sizes that are timed one after the other: each foretells the next."""
STEEPER = 2.0
"""How much faster than before time may grow with bytes: links let some bytes through before they slow down."""
OTHERS = 1.5
"""How much longer than the rule's way another one is expected to take, once that of the rule is known."""


class Shape(NamedTuple):
    """Collectives of about one size."""

    nbytes: int
    """Bytes of the full buffer."""
    times: int
    """How many of them one pass over the model takes."""


class Clock:
    """Times work on all ranks of a group at once. Every rank gets the numbers of the slowest one."""

    def __init__(self, group: RankGroup) -> None:
        self._group = group
        self._began = time.perf_counter()
        self.elapsed = 0.0
        """Seconds since the clock was made, by the end of the last work."""
        self.time(lambda: None)

    def time(self, work: Callable[[], object]) -> float:
        """Return the seconds that ``work`` takes."""
        start = time.perf_counter()
        work()
        wait_for_device()
        end = time.perf_counter()
        taken = torch.tensor([end - start, end - self._began], dtype=torch.float64, device=communication_device())
        collectives.max_over_(taken, self._group, "time of collectives")
        seconds, self.elapsed = taken.tolist()
        return float(seconds)


Prepare = Callable[[int], Callable[[], object]]
"""Bytes of the full buffer -> work of that size."""


def hold(races: Sequence[Race], until_s: float) -> None:
    """Time contestants of all races, as far as that fits the time.

    The first size of each race has the first turn, the race that takes the least time before the others. Then come the
    other sizes. What is left of the time goes to more rounds of what was timed.

    Args:
        until_s: reading of the clock at which to end.
    """
    if not races:
        return
    for race in races:
        race.probe(until_s)
    turns: list[tuple[Race, int]] = []
    for depth in range(max(len(race.sizes) for race in races)):
        of_this_depth = [(race, race.sizes[depth]) for race in races if depth < len(race.sizes)]
        turns += sorted(of_this_depth, key=lambda turn: turn[0].foretold(turn[1]))
    for race, size in turns:
        while race.rounds(size) < ENOUGH and race.run(size, until_s):
            pass
    going = turns
    while going:
        going = [(race, size) for race, size in going if 0 < race.rounds(size) < MOST and race.run(size, until_s)]


class Race:
    """The ways of one kind of collectives, timed in turns. The first contestant is the rule.

    Only sizes of the model count. The rule's way is timed with smaller ones, which foretell how long those of the model
    take, but not which way is faster there: latency decides about them, and links that were idle let some bytes through
    faster than those that follow.

    Attributes:
        sizes: bytes of the full buffer, in the order of turns: the middle one, then from large to small.
    """

    def __init__(self, contestants: Sequence[Prepare], shapes: Sequence[Shape], clock: Any) -> None:
        self._contestants = contestants
        self._shapes = shapes
        self._clock = clock
        self._rule: dict[int, float] = {}  # seconds of the rule's way, last time
        self._times: dict[int, list[list[float]]] = {}
        sizes = sorted({_bounded(shape) for shape in shapes})
        middle = sizes.pop(len(sizes) // 2)
        self.sizes = (middle, *reversed(sizes))

    def probe(self, until_s: float) -> None:
        """Time the rule's way with smaller sizes than the first one that counts, as far as that fits the time."""
        for size in smaller(self.sizes[0]):
            if self._clock.elapsed + self.foretold(size) > until_s:
                return
            self._rule[size] = self._clock.time(self._contestants[0](size))

    def foretold(self, size: int) -> float:
        """Return the seconds that the rule's way is expected to take at most: a line through the largest two sizes."""
        known = sorted(self._rule)
        if not known:
            return 0.0
        if size <= known[-1]:
            return self._rule[min(known, key=lambda other: abs(other - size))]
        largest_s = self._rule[known[-1]]
        if len(known) == 1:  # of a few bytes, which take as long as no bytes at all
            return STEEPER * largest_s
        slope = max(0.0, largest_s - self._rule[known[-2]]) / (known[-1] - known[-2])
        return largest_s + STEEPER * slope * (size - known[-1])

    def rounds(self, size: int) -> int:
        """Return how many rounds a size had."""
        return max(map(len, self._times[size])) if size in self._times else 0

    def run(self, size: int, until_s: float) -> bool:
        """Time each contestant that may still win once. Return ``False`` if there was no time for that."""
        if size > GROWTH * max(self._rule, default=size):
            return False
        times = self._times.get(size, [[] for _ in self._contestants])
        best = min((min(taken) for taken in times if taken), default=math.inf)
        racing = [
            number
            for number, taken in enumerate(times)
            if not taken or min(taken) <= best * HOPELESS[min(len(taken), len(HOPELESS)) - 1]
        ]
        if len(racing) == 1 and self.rounds(size) >= FEWEST:
            return False
        self._times[size] = times
        for position, number in enumerate(racing):
            # The rule has the first turn, and shows how long this size takes: the first round may end there.
            expected = sum(self._expected(other, size) for other in racing[position:])
            if self._clock.elapsed + expected > until_s:
                return False
            taken_s = self._clock.time(self._contestants[number](size))
            times[number].append(taken_s)
            if number == 0:
                self._rule[size] = taken_s
        return True

    def _expected(self, number: int, size: int) -> float:
        taken = self._times[size][number]
        if taken:
            return taken[-1]
        return self.foretold(size) * (OTHERS if size in self._rule else 1.0)

    def seconds(self) -> list[float]:
        """Return seconds of one pass over the model, for each contestant.

        Times of sizes that were not measured are those of the nearest one, in proportion to bytes. Nothing is returned
        if no size had :data:`FEWEST` rounds: then bytes decide, and the rule has the way with the fewest.
        """
        found = {
            size: [_typical(taken) for taken in times]
            for size, times in self._times.items()
            if self.rounds(size) >= FEWEST and all(times)
        }
        if not found:
            return []

        def seconds(size: int, number: int) -> float:
            nearest = min(found, key=lambda other: abs(other - size))
            return found[nearest][number] * size / nearest

        numbers = range(len(self._contestants))
        return [sum(shape.times * seconds(shape.nbytes, number) for shape in self._shapes) for number in numbers]


def smaller(size: int) -> list[int]:
    """Return smaller sizes than this one, in steps of :data:`GROWTH`, the smallest first: two, or more above the least.

    Two are needed to tell latency from bytes.
    """
    sizes: list[int] = []
    while size // GROWTH >= SMALLEST or (len(sizes) < 2 and size // GROWTH >= 64):
        size //= GROWTH
        sizes.append(size)
    return sizes[::-1]


def _bounded(shape: Shape) -> int:
    return min(shape.nbytes, LARGEST)


def _typical(times: Sequence[float]) -> float:
    """Return the lower quartile: whatever else a machine does makes times longer.

    The first one does not count. Links let through the first bytes after a pause faster than those that follow.
    """
    rest = sorted(times[1:] or times)
    return rest[len(rest) // 4]
