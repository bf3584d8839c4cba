"""Races between ways of collectives, on a clock that only work moves: turns, the time that is given, what decides."""

from __future__ import annotations

import pytest

from mics_ds.planner import race
from mics_ds.planner.race import Race, Shape, hold, smaller


class Clock:
    """A clock on which work takes what it says."""

    def __init__(self) -> None:
        self.elapsed = 0.0
        self.sizes: list[int] = []

    def time(self, work) -> float:
        size, seconds = work()
        self.elapsed += seconds
        self.sizes.append(size)
        return seconds


def link(latency: float, rate: float):
    return lambda size: lambda: (size, latency + size / rate)


def bucket(latency: float, rate: float, burst: int):
    """Let some bytes of each collective through at once, as a shaped link does that was idle."""
    return lambda size: lambda: (size, latency + max(0, size - burst) / rate)


def times(contestants, shapes, clock, until_s: float) -> list[float]:
    contest = Race(contestants, shapes, clock)
    hold([contest], until_s)
    return contest.seconds()


def test_smaller_sizes_lead_up_to_one():
    assert smaller(1 << 20) == [1 << 14, 1 << 17]
    assert smaller(20_000) == [312, 2500]
    assert smaller(512) == [64]
    assert smaller(500) == []
    assert smaller(1 << 28)[0] >= race.SMALLEST


def test_all_sizes_are_timed_and_added_up_where_there_is_time():
    shapes = (Shape(1 << 18, 10), Shape(1 << 20, 2), Shape(1 << 21, 1))
    clock = Clock()
    staged, flat = times([link(2e-3, 200e6), link(1e-3, 100e6)], shapes, clock, until_s=2.0)
    nbytes = 10 * 2**18 + 2 * 2**20 + 2**21
    assert staged == pytest.approx(13 * 2e-3 + nbytes / 200e6)
    assert flat == pytest.approx(13 * 1e-3 + nbytes / 100e6)
    assert clock.sizes[:3] == [1 << 14, 1 << 17, 1 << 20], "the rule leads up to the middle size"
    assert clock.elapsed <= 2.0


@pytest.mark.parametrize("rate", [1e5, 1e6, 1e7, 1e8, 1e9, 1e11])
@pytest.mark.parametrize("until_s", [0.5, 1.0])
def test_the_time_holds_on_any_link(rate, until_s):
    clock = Clock()
    found = times([link(1e-4, rate), link(1e-4, 2 * rate)], (Shape(1 << 24, 3),), clock, until_s)
    # The first, smallest size is timed once, whatever it takes.
    assert clock.elapsed <= max(until_s, 1.001 * (2 * race.SMALLEST * race.GROWTH / rate + 1e-4))
    if rate <= 1e7:
        assert found == [], "there is no time for the size of the model"
    if rate >= 1e9:
        assert found[0] > found[1]
        assert clock.sizes.count(1 << 24) == 2 * race.FEWEST, "that decides, so there is no need for more"


def test_ways_that_are_about_as_fast_use_the_time():
    clock = Clock()
    times([link(1e-3, 1e9), link(1.1e-3, 1e9), link(1.5e-3, 1e9)], (Shape(1 << 12, 1),), clock, until_s=1.0)
    assert clock.sizes.count(1 << 12) == 2 * race.MOST + 2, "the slowest one twice"


@pytest.mark.parametrize("rate", [2e6, 3e6, 12.5e6, 100e6])
def test_links_that_let_some_bytes_through_are_not_held_for_fast(rate):
    """A shaped link of the emulated cluster: 128 KiB pass at once."""
    clock = Clock()
    ways = [bucket(5e-3, rate, 1 << 17), *[bucket(5e-3, rate / 2, 1 << 17)] * 3]
    times(ways, (Shape(2_400_000, 1),), clock, until_s=1.7)
    assert clock.elapsed <= 1.7
    assert (2_400_000 in clock.sizes) == (rate > 12e6)


def test_a_size_that_all_contestants_cannot_finish_does_not_count():
    """The rule shows that the others would not fit. They are not started."""
    clock = Clock()
    others = [link(1e-3, 1e6)] * 3
    assert times([bucket(1e-3, 2e6, 300_000), *others], (Shape(1_000_000, 1),), clock, until_s=1.0) == []
    assert clock.sizes.count(1_000_000) <= 1
    assert clock.elapsed <= 1.0


def test_small_sizes_do_not_decide_about_large_ones():
    """One way has less latency, the other more bandwidth. There is no time for the size at which that counts."""
    ways = [link(50e-3, 2e6), link(1e-3, 1e6)]
    assert times(ways, (Shape(1 << 22, 1),), Clock(), until_s=2.0) == []
    staged, flat = times(ways, (Shape(1 << 17, 2), Shape(1 << 22, 1)), Clock(), until_s=2.0)
    assert (staged, flat) == pytest.approx((34 * (50e-3 + 2**17 / 2e6), 34 * (1e-3 + 2**17 / 1e6)))


def test_each_race_gets_a_turn_before_any_gets_more():
    """The race that takes longer has the rounds that it needs to count. The other one could use all the time."""
    clock = Clock()
    slow = Race([link(0.12, 1e12), link(0.1, 1e12)], (Shape(1 << 13, 1),), clock)
    quick = Race([link(0.010, 1e12), link(0.009, 1e12)], tuple(Shape(1 << bits, 1) for bits in (12, 13, 14)), clock)
    hold([slow, quick], until_s=1.2)
    assert slow.seconds() == pytest.approx([0.12, 0.1])
    assert quick.seconds() == pytest.approx([0.03, 0.027], rel=1e-5)
    assert clock.elapsed <= 1.2


def test_nothing_to_race_takes_no_time():
    hold([], until_s=1.0)


def test_the_largest_size_is_bounded():
    assert Race([link(0, 1)], (Shape(1 << 35, 1),), Clock()).sizes == (race.LARGEST,)


def test_a_stall_does_not_decide():
    """One of many times is longer by whatever else the machine does; the first one is shorter, from a full bucket."""
    assert race._typical([0.001, 0.010, 0.011, 0.500, 0.010, 0.012, 0.010]) == 0.010
    stalls = iter(range(1000))

    def stalling(size):
        return lambda: (size, 0.02 + 0.5 * (next(stalls) == 4))

    slow, fast = times([stalling, link(0.01, 1e12)], (Shape(1 << 12, 1),), Clock(), until_s=2.0)
    assert (slow, fast) == pytest.approx((0.02, 0.01), rel=1e-3)
