"""The two-hop schedule on threads, without DeepSpeed: every order, repeats, late parameters, early reads, and replicas
that do different things.

Ranks are threads of this process with torch's threaded process group. Hop 1 is a plain addition here (p = 1), because
what is tested is which shard is averaged when. Gradients are integers, so every comparison is exact.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_streams import FakeStreams
from thread_ranks import on_threads

from mics_ds import hop2
from mics_ds.comm.groups import RankGroup
from mics_ds.comm.lanes import INLINE, StreamLane, ThreadLane
from mics_ds.comm.slices import Slices
from mics_ds.hop2 import LEGAL_TRANSITIONS, GradientShard, Phase, Sliced
from mics_ds.two_hop import TwoHop

CPU = torch.device("cpu")
REPLICAS = 2
RANGES = {10: (0, 3), 11: (3, 4), 12: (4, 9), 13: (9, 11)}
BUCKETS = ((10, 11), (12,), (13,))

Buckets = Sequence[Sequence[int]]


class Deferring(ThreadLane):
    """A lane whose work is run later: at a random moment of each rank's own, at the latest when it is drained.

    On the caller's thread, because torch's threaded groups know a rank by its thread.
    """

    def __init__(self, seed: int) -> None:
        super().__init__("deferring")
        self._random = random.Random(seed)
        self._later: list[Callable[[Any], object]] = []

    def submit(self, task, *, nbytes=0, beside=True):
        self._later.append(task)
        keep = self._random.randint(0, len(self._later)) if beside else 0
        self._run(len(self._later) - keep)

    def drain(self) -> None:
        self._run(len(self._later))

    def _run(self, count: int) -> None:
        for _ in range(count):
            self._later.pop(0)(INLINE)


def inline() -> ThreadLane:
    return ThreadLane("inline")


def on_streams() -> StreamLane:
    return StreamLane("streams", FakeStreams(), ahead=2)


def deferring(seed: int) -> Callable[[], ThreadLane]:
    return lambda: Deferring(100 * seed + dist.get_rank())  # each rank defers in its own way


LANES = {"inline": inline, "streams": on_streams, **{f"deferring {seed}": deferring(seed) for seed in range(2)}}


@pytest.fixture(autouse=True)
def _tensors_of_a_device_with_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)


each_lane = pytest.mark.parametrize("lane", LANES)
each_way = pytest.mark.parametrize("sliced", [False, True], ids=["in place", "sliced"])


@dataclass
class Replica:
    """One rank: a buffer, a schedule over it, and what the buffer should hold, by the plain words of stock ZeRO-3.

    In the first micro-step gradients are written over what is there, later they are added.
    """

    lane: str = "inline"
    early: bool = True
    on_device: bool = True
    sliced: bool = False
    """Whether hop 2 is a reduce-scatter."""

    def __post_init__(self) -> None:
        self.rank = dist.get_rank()
        self.buffer = torch.zeros(11)
        self.own = torch.zeros(11)
        """This rank's gradients since the last boundary."""
        self.written = torch.zeros(11)
        """1 where this rank has written over what was there."""
        self.old = torch.zeros(11)
        """The means of the boundary before."""
        self.micro_step = 0
        lane = LANES[self.lane]()
        self.beside = self.lane != "inline"
        group = RankGroup.of(dist.group.WORLD)
        kind = TwoHop if self.on_device else ByWayOfDevice
        self.cut = Slices(tuple(end - start for start, end in RANGES.values()), group.size, group.rank)
        self.slices = torch.full((self.cut.numel,), 0.0)
        means = None
        if self.sliced:
            ranges = RANGES.values()
            means = Sliced(
                *(lambda: self.buffer, lambda: self.slices, ranges, group, CPU, 4),
                method="all_to_all",
                used=lane.used,
            )
        self.schedule = kind(RANGES, lambda: self.buffer, group, lane, CPU, early=self.early, part=4, means=means)
        self.draws = random.Random(self.rank)

    def backward(self, buckets: Buckets, last: bool) -> None:
        overwriting = self.micro_step == 0
        for ids in buckets:
            gradients = {key: self._gradient(key, overwriting) for key in ids}

            def hop1(stages, ids=ids, gradients=gradients) -> None:
                with stages.second():
                    self.schedule.adding(list(ids), overwriting=overwriting)
                    for key in ids:
                        start, end = RANGES[key]
                        if overwriting:
                            self.buffer[start:end] = gradients[key]
                        else:
                            self.buffer[start:end] += gradients[key]
                    self.schedule.added(ids)

            self.schedule.reduce(hop1, nbytes=4, beside=self.beside, last=last)
        self.schedule.end_of_pass(last)
        self.micro_step += 1

    def _gradient(self, key: int, overwriting: bool) -> torch.Tensor:
        start, end = RANGES[key]
        n = dist.get_world_size()
        gradient = torch.tensor([n * n * self.draws.randint(-50, 50) for _ in range(end - start)]).float()
        if overwriting:
            self.own[start:end] = gradient
            self.written[start:end] = 1
        else:
            self.own[start:end] += gradient
        return gradient

    def mean(self) -> torch.Tensor:
        """All of it, on every rank."""
        if not self.sliced:
            return self.buffer
        rows = [torch.empty_like(self.slices) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, self.slices)
        mean = torch.empty_like(self.buffer)
        self.cut.put(torch.stack(rows), mean)
        return mean

    def expect_mean(self) -> None:
        """The mean over replicas of everything that was added, on top of what nobody has written over."""
        expected, written = self.own.clone(), self.written.clone()
        dist.all_reduce(expected)
        dist.all_reduce(written)
        expected = expected / dist.get_world_size() + torch.where(written > 0, 0, self.old)
        assert torch.equal(self.mean(), expected), (self.mean(), expected)
        assert {shard.phase for shard in self.schedule.shards.values()} == {Phase.MEAN}
        assert self.sliced or {shard.old for shard in self.schedule.shards.values()} == {None}
        assert not self.schedule.is_partial

    def boundary(self, look: bool = False) -> None:
        """The step, in the optimizer's words."""
        self.schedule.complete_for_step(look=look)
        self.schedule.settle(bool(self.schedule.came_again))
        self.expect_mean()
        self.schedule.next_boundary()
        assert not self.schedule.changed
        self.old = self.mean().clone()
        self.own.zero_()
        self.written.zero_()
        self.micro_step = 0

    def step(self, *passes: Buckets) -> None:
        """One optimizer step of several micro-steps."""
        for index, buckets in enumerate(passes):
            self.backward(buckets, last=index == len(passes) - 1)
        self.boundary()


class ByWayOfDevice(TwoHop):
    """As if gradients were in the memory of another device than collectives work on."""

    _on_device = False


class Counting:
    """What rank 0 averages: (offset, elements) of each collective of hop 2."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts: list[tuple[int, int]] = []
        average = hop2.collectives.ReplicaAverage

        def counting(part, replication):
            if replication.rank == 0:
                self.parts.append((part.storage_offset(), part.numel()))
            return average(part, replication)

        monkeypatch.setattr(hop2.collectives, "ReplicaAverage", counting)

    def take(self) -> list[tuple[int, int]]:
        """Those since the last time; to rank 0 only."""
        if dist.get_rank():
            return []
        parts, self.parts = self.parts, []
        return parts


@each_way
@each_lane
@pytest.mark.parametrize("repeated", [None, *BUCKETS], ids=str)
def test_every_order_of_buckets_with_early_hop2(sliced, lane, repeated):
    """Three optimizer steps of two micro-steps, each bucket order against each other one, and a repeated bucket."""

    def body() -> None:
        for first, second in itertools.product(itertools.permutations(BUCKETS), repeat=2):
            replica = Replica(lane, sliced=sliced)
            again = () if repeated is None else (repeated,)
            for _ in range(3):
                replica.backward((*first, *again), last=False)
                assert replica.schedule.is_partial
                replica.backward((*second, *again), last=True)
                assert replica.schedule.changed == set(RANGES)
                replica.boundary()

    on_threads(REPLICAS, body)


@each_way
@each_lane
@pytest.mark.parametrize("late", [subset for n in (1, 2) for subset in itertools.combinations(BUCKETS, n)], ids=str)
def test_parameters_without_a_gradient_in_the_last_micro_step_are_swept_up(sliced, lane, late):
    def body() -> None:
        replica = Replica(lane, sliced=sliced)
        some = [bucket for bucket in BUCKETS if bucket not in late]
        for _ in range(3):
            replica.step(BUCKETS, some)

    on_threads(REPLICAS, body)


@each_way
@each_lane
@pytest.mark.parametrize("reads", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("early", [True, False])
def test_a_read_between_micro_steps_changes_nothing(sliced, lane, reads, early):
    def body() -> None:
        replica = Replica(lane, early, sliced=sliced)
        for _ in range(3):
            for number, read in enumerate(reads):
                replica.backward(BUCKETS if number % 2 else BUCKETS[::-1], last=number == len(reads) - 1)
                assert replica.schedule.is_partial
                if read:
                    replica.schedule.complete()
                    replica.expect_mean()
            replica.boundary()

    on_threads(REPLICAS, body)


@each_way
def test_a_boundary_that_only_the_step_knows(sliced):
    """Unmanaged accumulation: no backward pass is the last one, and somebody reads before the step."""

    def body() -> None:
        replica = Replica(sliced=sliced)
        for _ in range(3):
            for _ in range(3):
                replica.backward(BUCKETS, last=False)
            replica.schedule.complete()
            replica.boundary()

    on_threads(REPLICAS, body)


# --------------------------------------------------------------------------------------------------
# Replicas that do different things


@each_way
@each_lane
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_that_use_any_subset_in_any_order(sliced, lane, early, replicas):
    """Also a parameter that nobody uses in a step, one that a replica uses first in a later micro-step, and reads."""

    def body() -> None:
        replica = Replica(lane, early, sliced=sliced)
        common, mine = random.Random(7), random.Random(1000 + replica.rank)
        for _ in range(30):
            micro_steps = common.choice([1, 1, 2, 3])
            nobody = common.choice([None, None, *BUCKETS])
            for index in range(micro_steps):
                used = [bucket for bucket in BUCKETS if bucket != nobody and mine.random() < 0.6]
                mine.shuffle(used)
                replica.backward(used, last=index == micro_steps - 1)
                if common.random() < 0.2:
                    replica.schedule.complete()
                    replica.expect_mean()
            replica.boundary(look=common.random() < 0.5)

    on_threads(replicas, body)


@each_way
@pytest.mark.parametrize("early", [True, False])
def test_a_gradient_of_one_replica_is_not_mixed_with_what_the_other_got_before(sliced, early):
    """The issue, in the smallest case: step 2 is a text-only batch on replica 1."""

    def body() -> None:
        replica = Replica(early=early, sliced=sliced)
        replica.step(BUCKETS)
        replica.step(BUCKETS if replica.rank == 0 else BUCKETS[:2])

    on_threads(REPLICAS, body)


@each_way
@pytest.mark.parametrize("first", [0, 1])
def test_accumulation_that_replicas_begin_at_different_micro_steps(sliced, first):
    """One replica writes over the old mean in micro-step 0, the other one adds in micro-step 1 to nothing."""

    def body() -> None:
        replica = Replica(sliced=sliced)
        replica.step(BUCKETS, BUCKETS)
        without = BUCKETS[1:]
        replica.step(*((BUCKETS, without) if replica.rank == first else (without, BUCKETS)))
        replica.step(without, BUCKETS)  # and where nobody writes over it, it stays
        replica.step(*((without, BUCKETS) if replica.rank == first else (without, without)))

    on_threads(REPLICAS, body)


def test_a_repeat_on_one_replica_only_after_its_hop2_had_started(monkeypatch):
    """Everybody averages once more, and the parameter waits for the end of the pass from then on."""
    counting = Counting(monkeypatch)

    def body() -> None:
        replica = Replica()
        replica.step((), BUCKETS)
        replica.step((), BUCKETS)
        counting.take()
        dist.barrier()
        again = (BUCKETS[0],) if replica.rank == 1 else ()
        replica.step((), (*BUCKETS, *again))
        whole = [(0, 4), (4, 5), (9, 2)]
        assert replica.rank or counting.take() == [*whole, *whole]
        dist.barrier()
        replica.step((), (*BUCKETS, *again))
        assert replica.rank or counting.take() == whole

    on_threads(REPLICAS, body)


@each_way
def test_an_overflow_leaves_no_difference_between_replicas(sliced):
    """The step is skipped before anybody has looked whether gradients are settled."""

    def body() -> None:
        replica = Replica(sliced=sliced)
        replica.step((), BUCKETS)
        replica.backward((), last=False)
        replica.backward((*BUCKETS, *((BUCKETS[0],) if replica.rank else ())), last=True)
        replica.schedule.complete_for_step(look=False)
        replica.schedule.next_boundary()
        replica.expect_mean()

    on_threads(REPLICAS, body)


def test_units_follow_what_is_frozen_and_used_later(monkeypatch):
    """Replicas agree again after boundaries 1, 2, 4 and 8, and are right in between."""
    counting = Counting(monkeypatch)

    def body() -> None:
        replica = Replica()
        seen = []
        for step in range(1, 10):
            replica.step(BUCKETS[:2] if step < 3 else BUCKETS[1:])
            seen.append(sorted(counting.take()))
            dist.barrier()
        assert replica.rank or seen == [[(0, 4), (4, 5), (9, 2)]] * 9
        started = [[tuple(unit) for unit in replica.schedule._units]]
        assert started == [[*BUCKETS[1:], BUCKETS[0]]], "the last unit is what does not come any more"

    on_threads(REPLICAS, body)


def test_a_unit_that_did_not_come_holds_up_only_those_after_it():
    def body() -> None:
        replica = Replica()
        replica.step(BUCKETS)
        schedule = replica.schedule
        started = []
        original = schedule.end_of_pass

        def end_of_pass(last: bool) -> bool:
            schedule.finish_hop1()
            started.append({key for key, shard in schedule.shards.items() if shard.phase is Phase.AVERAGING})
            return original(last)

        schedule.end_of_pass = end_of_pass
        for missing in [None, *BUCKETS[:2]]:
            replica.step([bucket for bucket in BUCKETS if bucket != missing])
        # as in the first pass: the last unit is empty, so every bucket has one of its own
        assert started == [{10, 11, 12, 13}, set(), {10, 11}]

    on_threads(REPLICAS, body)


# --------------------------------------------------------------------------------------------------
# Several backward passes


@pytest.mark.parametrize("early", [True, False])
def test_several_passes_before_one_step_average_every_element_once(early, monkeypatch):
    """PPO's policy and value losses: each might be the last. In the first step hop 2 starts after each, later ones
    know better."""
    counting = Counting(monkeypatch)

    def body() -> None:
        replica = Replica(early=early)
        for step in range(5):
            for losses in range(2):
                replica.backward(BUCKETS, last=True)
                assert replica.rank or bool(counting.parts) == (losses == 1 or step == 0), step
            replica.boundary()
            assert replica.rank or sum(size for _, size in counting.take()) == (11 if step else 22), step
            dist.barrier()

    on_threads(REPLICAS, body)


def test_steps_of_one_and_two_passes_by_turns(monkeypatch):
    counting = Counting(monkeypatch)

    def body() -> None:
        replica = Replica()
        covered = []
        for step in range(8):
            for _ in range(1 + step % 2):
                replica.backward(BUCKETS, last=True)
            replica.boundary()
            covered.append(sum(size for _, size in counting.take()))
            dist.barrier()
        # once the schedule was wrong: it had not yet seen a step of two
        assert replica.rank or covered == [11, 22, *([11] * 6)]

    on_threads(REPLICAS, body)


@each_way
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("reads", list(itertools.product([False, True], repeat=2)), ids=str)
def test_one_rank_alone_reads_at_the_boundary(sliced, early, reads):
    """Hop 2 was started on all ranks, so none of the others has to know, even if another pass follows."""

    def body() -> None:
        replica = Replica(early=early, sliced=sliced)
        for _ in range(3):
            replica.backward(BUCKETS, last=False)
            assert not replica.schedule.complete_alone()
            for read in reads:
                # one pass too many in the first step, and then those that might have been the last are known
                replica.backward(BUCKETS, last=True)
                if read and replica.rank == 1 and replica.schedule._said is not None:
                    assert replica.schedule.complete_alone()
                    assert replica.schedule.complete_alone()
            replica.boundary()

    on_threads(REPLICAS, body)


def test_one_rank_alone_cannot_read_what_takes_all_of_them():
    def body() -> None:
        replica = Replica()
        replica.step(BUCKETS)
        again = (BUCKETS[0],) if replica.rank else ()
        replica.backward(BUCKETS, last=False)
        replica.backward((*BUCKETS, *again), last=True)
        assert not replica.schedule.complete_alone() if replica.rank else True
        replica.boundary()
        replica.backward(BUCKETS, last=False)
        replica.backward(BUCKETS, last=True)
        replica.schedule.complete()
        replica.boundary()

    on_threads(REPLICAS, body)


@each_way
@each_lane
@pytest.mark.parametrize("replicas", [2, 3])
def test_any_number_of_passes_with_any_subset(sliced, lane, replicas):
    def body() -> None:
        replica = Replica(lane, sliced=sliced)
        common, mine = random.Random(3), random.Random(2000 + replica.rank)
        for _ in range(30):
            for _ in range(common.choice([1, 1, 2, 3])):
                used = [bucket for bucket in BUCKETS if mine.random() < 0.6]
                replica.backward(used, last=True)
                if common.random() < 0.2:
                    replica.schedule.complete()
                    replica.expect_mean()
            replica.boundary()

    on_threads(replicas, body)


# --------------------------------------------------------------------------------------------------
# What is averaged in one collective


def test_a_parameter_that_comes_twice_is_never_averaged_early(monkeypatch):
    """An early hop 2 on it would be wasted: it would have to be done again after the second time."""
    counting = Counting(monkeypatch)

    def body() -> None:
        replica = Replica()
        replica.step(((12,), (12,)))
        replica.step(((12,), (12,)))
        assert replica.rank or counting.take() == [(4, 5), (0, 4), (9, 2)] * 2

    on_threads(REPLICAS, body)


def test_neighbours_share_a_collective_and_every_element_is_averaged_once(monkeypatch):
    counting = Counting(monkeypatch)

    def body() -> None:
        replica = Replica()
        replica.step(((10, 13), (12, 11)))
        replica.step(((10, 13), (12, 11)))

    on_threads(REPLICAS, body)
    assert counting.parts == [(0, 3), (9, 2), (3, 6)] * 2


def test_by_way_of_another_device_in_parts_of_the_size_asked_for(monkeypatch):
    """Gradients of an offloaded optimizer: never more than two parts are on the device."""
    counting = Counting(monkeypatch)

    def body() -> None:
        replica = Replica(early=False, on_device=False)
        mine = random.Random(replica.rank)
        for _ in range(4):
            replica.step([bucket for bucket in BUCKETS if mine.random() < 0.6], BUCKETS[:1])
            assert replica.rank or counting.take() == [(0, 4), (4, 4), (8, 3)]
            dist.barrier()

    on_threads(REPLICAS, body)


def test_slices_by_way_of_another_device():
    def body() -> None:
        replica = Replica(early=False, on_device=False, sliced=True)
        mine = random.Random(replica.rank)
        for _ in range(6):
            replica.step([bucket for bucket in BUCKETS if mine.random() < 0.6], BUCKETS[:1])

    on_threads(3, body)


def test_a_value_that_all_replicas_set_is_what_further_gradients_are_added_to():
    def body() -> None:
        replica = Replica(sliced=True)
        replica.step(BUCKETS)
        replica.backward(BUCKETS, last=False)
        replica.schedule.complete()
        start, end = RANGES[12]
        replica.buffer[start:end] = 6.0
        replica.schedule.mean(12).fill_(6.0)
        replica.schedule.replaced(12)
        replica.own[start:end] = 6.0
        replica.backward(BUCKETS, last=True)
        replica.boundary()

    on_threads(REPLICAS, body)


# --------------------------------------------------------------------------------------------------
# One replica, errors, phases


def test_one_replica_has_no_hop2():
    buffer = torch.ones(11)
    schedule = TwoHop(RANGES, lambda: buffer, None, inline(), CPU)

    def hop1(_) -> None:
        schedule.adding([10], overwriting=False)
        schedule.added([10])

    schedule.reduce(hop1, nbytes=0, beside=False, last=True)
    schedule.end_of_pass(last=True)
    assert not schedule.is_partial
    assert not schedule.complete()
    assert not schedule.complete_for_step(look=True)
    assert not schedule.came_again
    assert torch.equal(buffer, torch.ones(11))
    assert schedule.changed == {10}


def test_a_failing_hop1_reaches_whoever_finishes():
    schedule = TwoHop(RANGES, lambda: torch.ones(11), None, inline(), CPU)

    def hop1(_) -> None:
        raise ValueError("hop 1 broke")

    schedule.reduce(hop1, nbytes=0, beside=True, last=False)
    with pytest.raises(ValueError, match="hop 1 broke"):
        schedule.finish_hop1()


@pytest.mark.parametrize("pair", list(itertools.product(Phase, Phase)), ids=str)
def test_only_legal_transitions(pair):
    shard = GradientShard(0, 1, phase=pair[0])
    if pair in LEGAL_TRANSITIONS:
        shard.move(pair[1])
        assert shard.phase is pair[1]
    else:
        with pytest.raises(AssertionError, match="cannot go from"):
            shard.move(pair[1])


def test_nobody_adds_to_a_shard_while_it_is_averaged():
    def body() -> None:
        replica = Replica()
        replica.step(BUCKETS)
        replica.schedule._start_all_units()
        with pytest.raises(AssertionError, match="cannot go from"):
            replica.schedule.added([10])
        replica.schedule._finish_hop2()

    on_threads(REPLICAS, body)
