"""The two-hop schedule on threads, without DeepSpeed: every order, repeats, late parameters, early reads.

Ranks are threads of this process with torch's threaded process group. Hop 1 is a plain addition here (p = 1), because
what is tested is which shard is averaged when. Gradients are integers, so every comparison is exact.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from thread_ranks import on_threads

from mics_ds import two_hop
from mics_ds.comm.groups import RankGroup
from mics_ds.comm.lanes import Lane
from mics_ds.two_hop import LEGAL_TRANSITIONS, GradientShard, Phase, TwoHop

CPU = torch.device("cpu")
REPLICAS = 2
RANGES = {10: (0, 3), 11: (3, 4), 12: (4, 9), 13: (9, 11)}
BUCKETS = ((10, 11), (12,), (13,))


class Deferring(Lane):
    """A lane whose work is run later: at a random moment of each rank's own, at the latest when it is drained."""

    def __init__(self, seed: int) -> None:
        super().__init__("deferring")
        self._random = random.Random(seed)
        self._later: list[Callable[[], object]] = []

    def submit(self, task, device, *, nbytes=0, beside=True):
        self._later.append(task)
        keep = self._random.randint(0, len(self._later)) if beside else 0
        self._run(len(self._later) - keep)

    def drain(self) -> None:
        self._run(len(self._later))

    def _run(self, count: int) -> None:
        for _ in range(count):
            self._later.pop(0)()


@dataclass
class Replica:
    """One rank: a buffer, a schedule over it, and what the buffer should hold at the boundary."""

    lane: Lane
    beside: bool

    def __post_init__(self) -> None:
        self.rank = dist.get_rank()
        self.buffer = torch.zeros(11)
        self.own = torch.zeros(11)
        group = RankGroup.of(dist.group.WORLD)
        self.schedule = TwoHop(RANGES, lambda: self.buffer, group, self.lane, CPU)
        self.draws = random.Random(self.rank)

    def backward(self, buckets, last: bool) -> None:
        for ids in buckets:
            gradients = {key: self._gradient(key) for key in ids}

            def hop1(ids=ids, gradients=gradients) -> None:
                for key in ids:
                    start, end = RANGES[key]
                    self.buffer[start:end] += gradients[key]
                self.schedule.added(ids)

            self.schedule.reduce(list(ids), hop1, nbytes=4, beside=self.beside, last=last)
        self.schedule.finish_hop1()

    def _gradient(self, key: int) -> torch.Tensor:
        start, end = RANGES[key]
        gradient = torch.tensor([REPLICAS * self.draws.randint(-50, 50) for _ in range(end - start)]).float()
        self.own[start:end] += gradient
        return gradient

    def expect_mean(self) -> None:
        """The mean over replicas of everything that was added, the same on all of them."""
        mean = self.own.clone()
        dist.all_reduce(mean)
        mean /= REPLICAS
        assert torch.equal(self.buffer, mean), (self.buffer, mean)
        assert {shard.phase for shard in self.schedule.shards.values()} == {Phase.MEAN}
        assert not self.schedule.is_partial

    def boundary(self) -> None:
        self.schedule.complete()
        self.expect_mean()
        self.schedule.next_boundary()
        assert not self.schedule.changed
        self.buffer.zero_()
        self.own.zero_()


def lanes() -> Iterator[tuple[str, Callable[[], Replica]]]:
    yield "inline", lambda: Replica(Lane("inline"), beside=False)
    for seed in range(3):
        # each rank defers in its own way
        yield f"deferring {seed}", lambda seed=seed: Replica(Deferring(100 * seed + dist.get_rank()), beside=True)


@pytest.mark.parametrize(("name", "make"), lanes(), ids=[name for name, _ in lanes()])
@pytest.mark.parametrize("repeated", [None, *BUCKETS], ids=str)
def test_every_order_of_buckets_with_early_hop2(name, make, repeated):
    """Two optimizer steps of two micro-steps, each bucket order against each other one, and a repeated bucket."""

    def body() -> None:
        for first, second in itertools.product(itertools.permutations(BUCKETS), repeat=2):
            replica = make()
            again = () if repeated is None else (repeated,)
            for _ in range(2):
                replica.backward((*first, *again), last=False)
                assert replica.schedule.is_partial
                replica.backward((*second, *again), last=True)
                assert replica.schedule.changed == set(RANGES)
                replica.boundary()

    on_threads(REPLICAS, body)


@pytest.mark.parametrize(("name", "make"), lanes(), ids=[name for name, _ in lanes()])
@pytest.mark.parametrize("late", [subset for n in (1, 2) for subset in itertools.combinations(BUCKETS, n)], ids=str)
def test_parameters_without_a_gradient_in_the_last_micro_step_are_swept_up(name, make, late):
    def body() -> None:
        replica = make()
        replica.backward(BUCKETS, last=False)
        replica.backward([bucket for bucket in BUCKETS if bucket not in late], last=True)
        phases = {key: shard.phase for key, shard in replica.schedule.shards.items()}
        swept = {key for bucket in late for key in bucket}
        assert phases == {key: Phase.PARTIAL if key in swept else Phase.AVERAGING for key in RANGES}
        replica.boundary()

    on_threads(REPLICAS, body)


@pytest.mark.parametrize(("name", "make"), lanes(), ids=[name for name, _ in lanes()])
@pytest.mark.parametrize("reads", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("early", [True, False])
def test_a_read_between_micro_steps_changes_nothing(name, make, reads, early):
    def body() -> None:
        replica = make()
        for number, read in enumerate(reads):
            replica.backward(BUCKETS if number % 2 else BUCKETS[::-1], last=early and number == len(reads) - 1)
            assert replica.schedule.is_partial
            if read:
                replica.schedule.complete()
                replica.expect_mean()
        replica.boundary()

    on_threads(REPLICAS, body)


def test_replicas_that_use_different_parameters_issue_the_same_collectives():
    """Without early hop 2, everything is averaged in one sweep, whoever had a gradient."""

    def body() -> None:
        for choice in itertools.product(BUCKETS, repeat=REPLICAS):
            replica = Replica(Lane("inline"), beside=False)
            replica.backward([choice[replica.rank]], last=False)
            assert replica.schedule.changed == set(choice[replica.rank])
            replica.boundary()

    on_threads(REPLICAS, body)


def test_a_boundary_that_only_the_step_knows():
    """Unmanaged accumulation: no backward pass is the last one, and ``complete`` comes twice."""

    def body() -> None:
        replica = Replica(Lane("inline"), beside=False)
        for _ in range(3):
            replica.backward(BUCKETS, last=False)
        replica.schedule.complete()
        replica.boundary()

    on_threads(REPLICAS, body)


def test_a_parameter_that_comes_twice_once_is_swept_from_then_on(monkeypatch):
    """An early hop 2 on it would be wasted: it would have to be done again after the second time."""
    averaged: list[int] = []
    average = two_hop.collectives.ReplicaAverage

    def counting(part, replication):
        if replication.rank == 0:
            averaged.append(part.numel())
        return average(part, replication)

    monkeypatch.setattr(two_hop.collectives, "ReplicaAverage", counting)

    def body() -> None:
        replica = Replica(Lane("inline"), beside=False)
        replica.backward(((12,), (12,)), last=True)
        replica.boundary()
        if replica.rank == 0:
            # early after the first time, and once more in the sweep, with its neighbours
            assert averaged == [5, 11]
            averaged.clear()
        dist.barrier()
        replica.backward(((12,), (12,)), last=True)
        replica.boundary()
        assert replica.rank or averaged == [11]

    on_threads(REPLICAS, body)


def test_neighbours_share_a_collective_and_every_element_is_averaged_once(monkeypatch):
    parts: list[tuple[int, int]] = []
    average = two_hop.collectives.ReplicaAverage

    def counting(part, replication):
        if replication.rank == 0:
            parts.append((part.storage_offset(), part.numel()))
        return average(part, replication)

    monkeypatch.setattr(two_hop.collectives, "ReplicaAverage", counting)

    def body() -> None:
        replica = Replica(Lane("inline"), beside=False)
        replica.backward(BUCKETS, last=True)
        replica.backward(((10, 13), (12, 11)), last=True)
        replica.boundary()

    on_threads(REPLICAS, body)
    assert parts == [(0, 4), (4, 5), (9, 2), (0, 3), (9, 2), (3, 6)]


def test_one_replica_has_no_hop2():
    buffer = torch.ones(11)
    schedule = TwoHop(RANGES, lambda: buffer, None, Lane("alone"), CPU)
    schedule.reduce([10], lambda: schedule.added([10]), nbytes=0, beside=False, last=True)
    assert not schedule.is_partial
    schedule.complete()
    assert torch.equal(buffer, torch.ones(11))
    assert schedule.changed == {10}


def test_a_failing_hop1_reaches_whoever_finishes():
    schedule = TwoHop(RANGES, lambda: torch.ones(11), None, Lane("failing"), CPU)

    def hop1() -> None:
        raise ValueError("hop 1 broke")

    schedule.reduce([10], hop1, nbytes=0, beside=True, last=False)
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
        replica = Replica(Lane("inline"), beside=False)
        replica.backward(BUCKETS, last=True)
        with pytest.raises(AssertionError, match="cannot go from"):
            replica.schedule.added([10])

    on_threads(REPLICAS, body)
