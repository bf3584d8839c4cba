"""The stream of samples that replicas share."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch.distributed as dist

from mics_ds.errors import MicsUsageError
from mics_ds.replicas.data import Deal, ReplicaBatches

RANKS = 2


@dataclass
class Engine:
    """One rank's engine, and its replicas, as far as the stream asks."""

    micro_batch: int = 2
    micro_steps: int = 3
    global_samples: int = 0
    mics_replicas: Any = None
    size: int = 1
    rank: int = 0
    begun: int = 0
    global_steps: int = 0
    lost_steps: int = 0
    members: list[tuple[int, int]] = field(default_factory=list)
    """Rank and number of replicas for each quorum to come."""

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.micro_batch

    def gradient_accumulation_steps(self) -> int:
        return self.micro_steps

    def begin_step(self) -> None:
        self.begun += 1
        if self.members:
            self.rank, self.size = self.members.pop(0)


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Which rank of its replica asks."""
    current = [0]
    monkeypatch.setattr(dist, "get_rank", lambda: current[0])
    monkeypatch.setattr(dist, "get_world_size", lambda: RANKS)
    return current


def managed(**options: Any) -> Engine:
    engine = Engine(**options)
    engine.mics_replicas = engine
    return engine


def take_steps(engine: Engine, batches: Any, outcomes: list[bool]) -> list[list[int]]:
    """Return the samples of each step that was committed, by this rank."""
    found = []
    stream = iter(batches)
    for committed in outcomes:
        step = [int(index) for _ in range(engine.micro_steps) for index in next(stream)]
        engine.lost_steps += not committed
        engine.global_steps += committed
        if committed:
            engine.global_samples += engine.size * RANKS * engine.micro_batch * engine.micro_steps
            found.append(step)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_no_sample_is_left_out_or_comes_twice_where_replicas_come_and_go(rank, seed):
    draws = random.Random(seed)
    length, steps = 101, 12
    sizes = [draws.randrange(1, 5) for _ in range(steps)]
    outcomes = [draws.random() < 0.7 for _ in range(steps)]
    taken: list[list[int]] = [[] for _ in range(steps)]
    for replica in range(max(sizes)):
        for own in range(RANKS):
            rank[0] = own
            for step, (size, committed) in enumerate(zip(sizes, outcomes)):
                if replica < size and committed:
                    before = sum(RANKS * 6 * s for s, done in zip(sizes[:step], outcomes[:step]) if done)
                    engine = managed(global_samples=before, members=[(replica, size)])
                    [samples] = take_steps(engine, ReplicaBatches(range(length), engine, seed=seed), [True])
                    taken[step] += samples
    counted = Counter(sample for step in taken for sample in step)
    drawn = sum(RANKS * 6 * size for size, done in zip(sizes, outcomes) if done)
    assert counted.total() == drawn
    assert {counted[sample] for sample in range(length)} <= {drawn // length, drawn // length + 1}


def test_a_step_that_is_not_committed_is_dealt_again_to_those_who_are_there(rank):
    engine = managed(members=[(0, 2), (0, 1), (0, 1)])
    samples = take_steps(engine, ReplicaBatches(range(100), engine, shuffle=False), [False, True, True])
    # Alone, the rank has its own place in every micro-batch of the first 12 samples, then in those of the next 12.
    assert samples == [[0, 1, 4, 5, 8, 9], [12, 13, 16, 17, 20, 21]]
    assert engine.begun == 3


def test_samples_are_fetched_by_one_loader_as_long_as_nothing_changes(rank, monkeypatch):
    import mics_ds.replicas.data as data

    made = []
    loader = data.DataLoader
    monkeypatch.setattr(data, "DataLoader", lambda *args, **kwargs: made.append(1) or loader(*args, **kwargs))
    engine = managed(members=[(1, 2), (1, 2), (1, 2), (0, 1)])
    take_steps(engine, ReplicaBatches(range(100), engine), [True] * 4)
    assert len(made) == 2


def test_epochs_end_without_a_quorum_that_others_would_not_come_to(rank):
    engine = managed(micro_steps=1, members=[(0, 2)] * 10)
    batches = iter(ReplicaBatches(range(20), engine, shuffle=False, epochs=1))
    for step in range(2):
        assert next(batches).tolist() == [8 * step, 8 * step + 1]
        engine.global_steps += 1
        engine.global_samples += 8
    assert next(batches, None) is None
    assert engine.begun == 2


def test_without_managed_replicas_the_ranks_of_the_job_share_the_stream(rank):
    rank[0] = 1
    engine = Engine(micro_steps=1)
    batches = iter(ReplicaBatches(range(20), engine, shuffle=False))
    first = next(batches).tolist()
    engine.global_steps += 1
    engine.global_samples += 4
    assert [first, next(batches).tolist()] == [[2, 3], [6, 7]]


@pytest.mark.parametrize("make", [Engine, managed])
def test_a_loader_that_fetches_ahead_is_refused(rank, make):
    """It would get the samples of the step under way once more."""
    batches = iter(ReplicaBatches(range(100), make()))
    for _ in range(3):
        next(batches)
    with pytest.raises(MicsUsageError, match="before the engine's step had ended"):
        next(batches)


def test_an_engine_may_be_built_later(rank):
    built = []
    batches = iter(ReplicaBatches(range(20), lambda: built[0], shuffle=False))
    built.append(Engine())
    assert next(batches).tolist() == [0, 1]


def test_places_of_a_step_cover_it_once():
    deals = [Deal(100, member, 6, 2, 3) for member in range(6)]
    places = [place for deal in deals for micro_step in range(3) for place in deal.places(micro_step)]
    assert sorted(places) == list(range(100, 136))
    assert deals[0].next.position == 136
