"""Two-hop gradient synchronisation on threads, without DeepSpeed: every order of buckets, repeats, late parameters,
reads, and replicas that do different things.

Ranks are threads of this process with torch's threaded process group. Hop 1 is a plain addition here (p = 1), because
what is tested is which shard is averaged when. Gradients are integers, so every comparison is exact.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import every, pairs
from fake_streams import FakeStreams
from replicas_on_threads import (
    BUCKETS,
    CPU,
    EXECUTORS,
    REDUCERS,
    REPLICAS,
    SHARDS,
    UNIT,
    UNITS,
    Counting,
    Deferring,
    Replica,
    each_executor,
    each_reducer,
    on_replicas,
)

from mics_ds.comm.async_exec import StreamExecutor
from mics_ds.errors import MicsUsageError
from mics_ds.zero.grad_sync import GradSync
from mics_ds.zero.replica_reducers import ReplicaReducer
from mics_ds.zero.units import GradientShards, UnitPlan


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    return Counting(monkeypatch)


# --------------------------------------------------------------------------------------------------
# Units


BOUNDS = [*SHARDS.values()]


def places_of(made: UnitPlan) -> tuple[list[list[int]], list[list[int]]]:
    return tuple([list(unit) for unit in units] for units in (made.early, made.late))


@pytest.mark.parametrize(
    ("numel", "expected"),
    [
        (1, [[0], [1], [2], [3]]),
        (4, [[0, 1], [2], [3]]),
        (5, [[0, 1, 2], [3]]),
        (9, [[0, 1, 2], [3]]),
        (10, [[0, 1, 2, 3]]),
        (0, [[0], [1], [2], [3]]),
    ],
)
def test_units_are_neighbours_in_the_buffer_of_so_many_elements_at_least(numel, expected):
    made = UnitPlan(BOUNDS, numel)
    made.learn(range(4))
    assert places_of(made) == (expected, [])


def test_there_are_no_more_units_than_bytes_say_and_one():
    draws = random.Random(0)
    for _ in range(50):
        bounds = list(itertools.accumulate([0, *(draws.choice([1, 3, 40, 64, 1000]) for _ in range(60))]))
        made = UnitPlan(list(itertools.pairwise(bounds)), 500)
        made.learn(range(60))
        assert len(made.early) <= bounds[-1] // 500 + 1
        assert [place for unit in made.early for place in unit] == list(range(60))


def test_what_no_replica_has_used_is_late_and_cuts_units():
    made = UnitPlan(BOUNDS, 9)
    assert places_of(made) == ([], [[0, 1, 2], [3]]), "nothing is known yet"
    made.learn([0, 2])
    assert places_of(made) == ([[0], [2]], [[1], [3]])
    made.learn([0])
    assert places_of(made) == ([[0], [2]], [[1], [3]]), "what was used once counts from then on"
    made.learn([1, 2])
    assert places_of(made) == ([[0, 1, 2]], [[3]])


# --------------------------------------------------------------------------------------------------
# Replicas that do the same


@pytest.mark.parametrize(("kind", "executor", "repeated"), pairs(REDUCERS, [*EXECUTORS], [None, *BUCKETS]))
def test_every_order_of_buckets_with_early_hop2(kind, executor, repeated):
    """Three optimizer steps of two micro-steps, each bucket order against each other one, and a repeated bucket."""

    def body() -> None:
        for first, second in itertools.product(itertools.permutations(BUCKETS), repeat=2):
            replica = Replica(executor, kind=kind)
            again = () if repeated is None else (repeated,)
            for _ in range(3):
                assert not replica.backward((*first, *again), last=False)
                assert not replica.sync.is_mean
                assert replica.backward((*second, *again), last=True)
                replica.boundary()

    on_replicas(REPLICAS, body)


@each_reducer
@each_executor
def test_parameters_without_a_gradient_in_the_last_micro_step_are_swept_up(kind, executor):
    def body() -> None:
        for late in [subset for n in (1, 2) for subset in itertools.combinations(BUCKETS, n)]:
            replica = Replica(executor, kind=kind)
            some = [bucket for bucket in BUCKETS if bucket not in late]
            for _ in range(3):
                replica.step(BUCKETS, some)

    on_replicas(REPLICAS, body)


@pytest.mark.parametrize(("kind", "executor", "early"), pairs(REDUCERS, [*EXECUTORS], [True, False]))
def test_a_read_between_micro_steps_changes_nothing(kind, executor, early):
    def body() -> None:
        for reads in itertools.product([False, True], repeat=3):
            replica = Replica(executor, early, kind)
            for _ in range(3):
                for number, read in enumerate(reads):
                    last = number == len(reads) - 1
                    replica.backward(BUCKETS if number % 2 else BUCKETS[::-1], last)
                    assert replica.sync.is_mean == last
                    if read:
                        assert replica.sync.average() == (not last)
                        replica.expect_mean()
                replica.boundary()

    on_replicas(REPLICAS, body)


@each_reducer
def test_a_boundary_that_only_the_step_knows(kind):
    """Unmanaged accumulation: no backward pass is the last one, and a script reads before the step."""

    def body() -> None:
        replica = Replica(kind=kind)
        for _ in range(3):
            for _ in range(3):
                replica.backward(BUCKETS, last=False)
            replica.sync.average()
            replica.boundary()

    on_replicas(REPLICAS, body)


# --------------------------------------------------------------------------------------------------
# Replicas that do different things


@pytest.mark.parametrize(
    ("kind", "executor", "early", "replicas"), pairs(REDUCERS, [*EXECUTORS], [True, False], [2, 3])
)
def test_replicas_that_use_any_subset_in_any_order(kind, executor, early, replicas):
    """Also a parameter that nobody uses in a step, one that a replica uses first in a later micro-step, and reads."""

    def body() -> None:
        replica = Replica(executor, early, kind)
        common, mine = random.Random(7), random.Random(1000 + replica.rank)
        for _ in range(30):
            micro_steps = common.choice([1, 1, 2, 3])
            nobody = common.choice([None, None, *BUCKETS])
            for index in range(micro_steps):
                used = [bucket for bucket in BUCKETS if bucket != nobody and mine.random() < 0.6]
                mine.shuffle(used)
                replica.backward(used, last=index == micro_steps - 1)
                if common.random() < 0.2:
                    replica.sync.average()
                    replica.expect_mean()
            replica.boundary(look=common.random() < 0.5)

    on_replicas(replicas, body)


@pytest.mark.parametrize(("kind", "early"), every(REDUCERS, [True, False], default=zip(REDUCERS, [True, False] * 2)))
def test_a_gradient_of_one_replica_is_not_mixed_with_what_the_other_got_before(kind, early):
    """The smallest case: step 2 is a text-only batch on replica 1."""

    def body() -> None:
        replica = Replica(early=early, kind=kind)
        replica.step(BUCKETS)
        replica.step(BUCKETS if replica.rank == 0 else BUCKETS[:2])

    on_replicas(REPLICAS, body)


@each_reducer
@pytest.mark.parametrize("first", [0, 1])
def test_accumulation_that_replicas_begin_at_different_micro_steps(kind, first):
    """One replica writes over the old mean in micro-step 0, the other one adds in micro-step 1 to nothing."""

    def body() -> None:
        replica = Replica(kind=kind)
        replica.step(BUCKETS, BUCKETS)
        without = BUCKETS[1:]
        replica.step(*((BUCKETS, without) if replica.rank == first else (without, BUCKETS)))
        replica.step(without, BUCKETS)  # and where no replica writes over it, it stays
        replica.step(*((without, BUCKETS) if replica.rank == first else (without, without)))

    on_replicas(REPLICAS, body)


def test_all_replicas_learn_which_parameters_some_replica_has_used():
    def body() -> None:
        replica = Replica()
        replica.backward([BUCKETS[replica.rank]], last=True)
        assert replica.sync.look(replica.sync.flags.tolist()) == {10, 11, 12}
        assert replica.sync.flags is None
        replica.boundary(look=False)

    on_replicas(REPLICAS, body)


def test_a_unit_that_did_not_come_holds_up_only_the_units_after_it(counting):
    def body() -> None:
        replica = Replica()
        replica.step(BUCKETS)
        early = []
        for missing in [None, *BUCKETS]:
            counting.take()
            for bucket in BUCKETS:
                if bucket != missing:
                    replica.bucket(bucket, last=True)
            early.append(counting.take())
            replica.backward((), last=True)
            replica.boundary()
        assert replica.rank or early == [UNITS, [], UNITS[:1], UNITS[:2]]

    on_replicas(REPLICAS, body)


def test_replicas_average_the_same_units_in_the_same_order_however_their_buckets_come(counting):
    """Units are stretches of the buffer, not buckets, and every element is averaged once."""

    def body() -> None:
        replica = Replica()
        for _ in range(4):
            replica.step(((10, 13), (12, 11)) if replica.rank else ((13,), (12, 11, 10)))
            assert replica.rank or counting.take() == UNITS
            dist.barrier()

    on_replicas(REPLICAS, body)


def test_the_first_step_averages_the_units_of_later_ones(counting):
    """A parameter that nothing uses cuts them, in the step before which nobody knows that too."""

    def body() -> None:
        replica, found = Replica(), []
        for _ in range(2):
            replica.step(((10,), *BUCKETS[1:]))
            found.append(sorted(counting.take()))
            dist.barrier()
        assert replica.rank or found[0] == found[1] == [(0, 3), (3, 1), (4, 5), (9, 2)], found

    on_replicas(REPLICAS, body)


def test_units_follow_what_is_used_later(counting):
    def body() -> None:
        replica = Replica()
        for step in range(6):
            used = BUCKETS[:2] if step < 3 else BUCKETS[1:]
            for bucket in used:
                replica.bucket(bucket, last=True)
            early = counting.take()
            replica.backward((), last=True)
            replica.boundary()
            late = counting.take()
            dist.barrier()
            assert replica.rank or sorted([*early, *late]) == UNITS, "everything, once"
            # Nothing is early before anything is known, and nothing behind a unit that does not come any more.
            assert replica.rank or early == (UNITS[:2] if step in (1, 2) else []), step

    on_replicas(REPLICAS, body)


# --------------------------------------------------------------------------------------------------
# Two gradients of one parameter in a pass


def test_a_parameter_that_comes_twice_is_not_averaged_before_the_pass_ends(counting):
    """The second gradient would come too late. Units before it need not wait."""

    def body() -> None:
        replica = Replica()
        replica.backward((*BUCKETS, BUCKETS[1]), last=True)
        replica.boundary()
        for _ in range(3):
            counting.take()
            for bucket in (*BUCKETS, BUCKETS[1]):
                replica.bucket(bucket, last=True)
            early = counting.take()
            replica.backward((), last=True)
            replica.boundary()
            assert replica.rank or (early, counting.take()) == (UNITS[:1], UNITS[1:])

    on_replicas(REPLICAS, body)


@each_reducer
@pytest.mark.parametrize("looks", [True, False], ids=["for the norm", "after an overflow"])
def test_a_second_gradient_after_hop2_has_started_is_refused_on_every_replica(kind, looks):
    """Where a step is skipped, nobody has looked before it ends: what is left would differ between replicas."""

    def body() -> None:
        replica = Replica(kind=kind)
        replica.step(BUCKETS)
        again = (BUCKETS[0],) if replica.rank == 1 else ()
        replica.backward((*BUCKETS, *again), last=True)
        given = replica.sync.flags.tolist()
        ends = (lambda: replica.sync.look(given)) if looks else replica.sync.next_boundary
        with pytest.raises(MicsUsageError, match=r"on some rank a parameter got a second one.*had been averaged"):
            ends()

    on_replicas(REPLICAS, body)


def test_a_rank_that_reads_alone_is_told_of_a_second_gradient():
    def body() -> None:
        replica = Replica()
        replica.step(BUCKETS)
        replica.backward((*BUCKETS, *((BUCKETS[0],) if replica.rank else ())), last=True)
        with pytest.raises(MicsUsageError, match="second one"):
            replica.sync.refuse_unusable(replica.sync.flags.tolist())

    on_replicas(REPLICAS, body)


# --------------------------------------------------------------------------------------------------
# Several backward passes


@pytest.mark.parametrize("early", [True, False])
def test_several_passes_before_one_step_average_every_element_once(early, counting):
    """PPO's policy and value losses: each might be the last. In the first step hop 2 runs after each, later it waits
    for the pass that was the last one in the step before."""

    def body() -> None:
        replica = Replica(early=early)
        for step in range(5):
            for losses in range(2):
                assert replica.backward(BUCKETS, last=True) == (losses == 1 or step == 0)
            replica.boundary()
            assert replica.rank or counting.take() == UNITS * (1 if step else 2), step
            dist.barrier()

    on_replicas(REPLICAS, body)


def test_steps_of_one_and_two_passes_by_turns(counting):
    """The step before tells how many passes there are: one too few costs a hop 2, one too many makes it late."""

    def body() -> None:
        replica = Replica()
        covered = []
        for step in range(8):
            for _ in range(1 + step % 2):
                replica.backward(BUCKETS, last=True)
            replica.boundary()
            covered.append(sum(size for _, size in counting.take()))
            dist.barrier()
        assert replica.rank or covered == [11, 22] * 4

    on_replicas(REPLICAS, body)


@pytest.mark.parametrize(("kind", "executor", "replicas"), pairs(REDUCERS, [*EXECUTORS], [2, 3]))
def test_any_number_of_passes_with_any_subset(kind, executor, replicas):
    def body() -> None:
        replica = Replica(executor, kind=kind)
        common, mine = random.Random(3), random.Random(2000 + replica.rank)
        for _ in range(30):
            for _ in range(common.choice([1, 1, 2, 3])):
                used = [bucket for bucket in BUCKETS if mine.random() < 0.6]
                replica.backward(used, last=True)
                if common.random() < 0.2:
                    replica.sync.average()
                    replica.expect_mean()
            replica.boundary()

    on_replicas(replicas, body)


# --------------------------------------------------------------------------------------------------
# Reducers


def test_by_way_of_another_device_in_parts_of_the_size_asked_for(counting, monkeypatch):
    """Gradients of an offloaded optimizer."""
    monkeypatch.setattr(GradientShards, "is_here", False)

    def body() -> None:
        replica = Replica(early=False)
        mine = random.Random(replica.rank)
        for _ in range(4):
            replica.step([bucket for bucket in BUCKETS if mine.random() < 0.6], BUCKETS[:1])
            assert replica.rank or sorted(size for _, size in counting.take()) == [2, 4, 5], "a shard at least"
            dist.barrier()

    on_replicas(REPLICAS, body)


def test_slices_by_way_of_another_device(monkeypatch):
    monkeypatch.setattr(GradientShards, "is_here", False)

    def body() -> None:
        replica = Replica(early=False, kind="slices")
        mine = random.Random(replica.rank)
        for _ in range(6):
            replica.step([bucket for bucket in BUCKETS if mine.random() < 0.6], BUCKETS[:1])

    on_replicas(3, body)


def test_a_value_that_all_replicas_set_is_what_further_gradients_are_added_to():
    def body() -> None:
        replica = Replica(kind="slices")
        replica.step(BUCKETS)
        replica.backward(BUCKETS, last=False)
        replica.sync.average()
        span = slice(*SHARDS[12])
        replica.buffer[span] = 6.0
        replica.sync.mean(12).fill_(6.0)
        replica.sync.replaced(12)
        replica.own[span] = 6.0
        replica.backward(BUCKETS, last=True)
        replica.boundary()

    on_replicas(REPLICAS, body)


# --------------------------------------------------------------------------------------------------
# One replica, errors


def one_replica() -> ReplicaReducer:
    return ReplicaReducer(GradientShards(lambda: torch.zeros(11), BOUNDS, CPU, 4))


def test_one_replica_has_no_hop2():
    executor = Deferring(0)
    sync = GradSync(SHARDS, None, executor, executor, one_replica(), unit_numel=UNIT)
    stored = []

    def hop1(before_storing: Callable[[], None]) -> Any:
        before_storing()
        stored.append(10)

    sync.reduce([10], hop1, overwriting=False, last=True)
    assert not sync.end_pass(last=True)
    assert sync.is_mean
    assert not sync.average()
    assert sync.flags is None
    sync.next_boundary()
    assert stored == [10]


def test_a_failing_hop1_reaches_the_end_of_the_pass():
    executor = StreamExecutor(FakeStreams())
    sync = GradSync(SHARDS, None, executor, executor, one_replica(), unit_numel=UNIT)

    def drain() -> None:
        raise ValueError("hop 1 broke")

    executor.drain = drain
    sync.reduce([10], lambda _: None, overwriting=True, last=False)
    with pytest.raises(ValueError, match="hop 1 broke"):
        sync.end_pass(last=False)
