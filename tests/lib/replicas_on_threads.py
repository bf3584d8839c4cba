"""One rank of two-hop gradient synchronisation on a thread, and the means that stock ZeRO-3 would compute."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from fake_streams import FakeStreams
from thread_ranks import on_threads

from mics_ds.comm import collectives
from mics_ds.comm.async_exec import INLINE, Deferred, Executor, StreamExecutor
from mics_ds.comm.packing import ChunkLayout
from mics_ds.comm.rank_group import RankGroup
from mics_ds.comm.wire import Cast, Wire
from mics_ds.zero.grad_sync import GradSync
from mics_ds.zero.replica_reducers import AllReduceMean, ReplicaReducer, ScatterToSlices
from mics_ds.zero.replica_wire import EncodedMean, EncodedSlices
from mics_ds.zero.replication import Replication
from mics_ds.zero.units import GradientShards

CPU = torch.device("cpu")
LOSSLESS = Cast(torch.float32)
REPLICAS = 2
SHARDS = {10: (0, 3), 11: (3, 4), 12: (4, 9), 13: (9, 11)}
BUCKETS = ((10, 11), (12,), (13,))
UNIT = 4
UNITS = [(0, 4), (4, 5), (9, 2)]
"""(offset, elements) of the units of at least four elements."""


Buckets = Sequence[Sequence[int]]


class Deferring:
    """An executor that runs its tasks later: at a random moment of each rank's own, at the latest when it is drained.

    On the caller's thread, because torch's threaded groups know a rank by its thread.
    """

    def __init__(self, most_late: int, seed: int = 0) -> None:
        self._most_late = most_late
        self._random = random.Random(seed)
        self._later: list[_Later] = []

    def submit(self, task) -> _Later:
        handle = _Later(self, task)
        self._later.append(handle)
        self.run(len(self._later) - self._random.randint(0, self._most_late))
        return handle

    def drain(self) -> None:
        self.run(len(self._later))

    def run(self, count: int) -> None:
        for _ in range(count):
            self._later.pop(0).run()

    def run_until(self, handle: _Later) -> None:
        if handle in self._later:
            self.run(self._later.index(handle) + 1)

    def close(self) -> None:
        pass


class _Later:
    def __init__(self, executor: Deferring, task: Callable[[Any], None]) -> None:
        self._executor = executor
        self._task = task

    def run(self) -> None:
        self._task(INLINE).wait()

    def wait(self) -> None:
        self._executor.run_until(self)


EXECUTORS: dict[str, Callable[[], Executor]] = {
    "inline": lambda: Deferring(0),
    "streams": lambda: StreamExecutor(FakeStreams(), ahead=2, own_issue=True),
    # each rank defers in its own way
    **{f"deferring {seed}": lambda seed=seed: Deferring(3, 100 * seed + dist.get_rank()) for seed in range(2)},
}


def on_replicas(count: int, body: Callable[[], None]) -> None:
    """Run ``body`` on ``count`` threads, where tensors of the CPU can be recorded on fake streams."""
    with mock.patch.object(torch.Tensor, "record_stream", return_value=None):
        on_threads(count, body)


each_executor = pytest.mark.parametrize("executor", EXECUTORS)


REDUCERS = ["all-reduce", "slices", "encoded", "encoded slices"]
each_reducer = pytest.mark.parametrize("kind", REDUCERS)


@dataclass
class Replica:
    """One rank: a buffer, a GradSync over it, and what the buffer should hold, by the plain words of stock ZeRO-3.

    In the first micro-step gradients are written over what is there, later they are added.
    """

    executor: str = "inline"
    early: bool = True
    kind: str = "all-reduce"
    wire: Wire = LOSSLESS
    """Wire of encoded reducers: by default one that rounds nothing."""

    def __post_init__(self) -> None:
        self.rank, self.n = dist.get_rank(), dist.get_world_size()
        self.buffer = torch.zeros(11)
        self.own = torch.zeros(11)
        """This rank's gradients since the last boundary."""
        self.written = torch.zeros(11)
        """1 where this rank has written over what was there."""
        self.old = torch.zeros(11)
        """The means of the boundary before."""
        self.micro_step = 0
        self.loss_scale = 1.0
        self.group = RankGroup.of(dist.group.WORLD)
        self.hop1, hop2 = EXECUTORS[self.executor](), EXECUTORS[self.executor]()
        shards = GradientShards(lambda: self.buffer, list(SHARDS.values()), CPU, part=4)
        self.cut = ChunkLayout([end - start for start, end in shards.bounds], self.n)
        self.slices = torch.zeros(self.cut.width)
        self.reducer = self.make_reducer(shards)
        replication = Replication(self.group)
        self.sync = GradSync(SHARDS, replication, self.hop1, hop2, self.reducer, unit_numel=UNIT, early=self.early)
        self.draws = random.Random(self.rank)

    def make_reducer(self, shards: GradientShards) -> ReplicaReducer:
        numels = [end - start for start, end in shards.bounds]
        encoded = numels, self.group, self.wire, lambda: self.loss_scale
        if self.kind == "all-reduce":
            return AllReduceMean(shards, Replication(self.group))
        if self.kind == "slices":
            return ScatterToSlices(shards, lambda: self.slices, self.group, "all_to_all")
        if self.kind == "encoded":
            return EncodedMean(shards, *encoded)
        return EncodedSlices(shards, lambda: self.slices, *encoded)

    def backward(self, buckets: Buckets, last: bool) -> bool:
        for ids in buckets:
            self.bucket(ids, last)
        averaged = self.sync.end_pass(last)
        self.micro_step += 1
        return averaged

    def bucket(self, ids: Sequence[int], last: bool) -> None:
        overwriting = self.micro_step == 0
        gradients = {key: self._gradient(key, overwriting) for key in ids}

        def hop1(before_storing: Callable[[], None]) -> Any:
            def store() -> None:
                before_storing()
                for key, gradient in gradients.items():
                    shard = self.buffer[slice(*SHARDS[key])]
                    shard.copy_(gradient if overwriting else shard + gradient)

            return self.hop1.submit(lambda memory: Deferred(store))

        self.sync.reduce(ids, hop1, overwriting=overwriting, last=last)

    def _gradient(self, key: int, overwriting: bool) -> torch.Tensor:
        span = slice(*SHARDS[key])
        gradient = torch.tensor(
            [self.n * self.n * self.draws.randint(-50, 50) for _ in range(span.stop - span.start)]
        ).float()
        self.own[span] = gradient if overwriting else self.own[span] + gradient
        self.written[span] = torch.maximum(self.written[span], torch.tensor(float(overwriting)))
        return gradient

    def mean(self) -> torch.Tensor:
        """All of it, on every rank."""
        if "slices" not in self.kind:
            return self.buffer
        mean = torch.empty_like(self.buffer)
        rows = collectives.all_gather_rows(self.slices, self.group, "slices")
        self.cut.copy_out(rows, [mean[slice(*span)] for span in SHARDS.values()])
        return mean

    def expect_mean(self) -> None:
        """Expect the mean over replicas of everything that was added, on top of what no replica has written over."""
        expected, written = self.own.clone(), self.written.clone()
        dist.all_reduce(expected)
        dist.all_reduce(written)
        expected = expected / self.n + torch.where(written > 0, 0, self.old)
        assert self.sync.is_mean
        assert torch.equal(self.mean(), expected), (self.mean(), expected)

    def boundary(self, look: bool = True) -> None:
        """The step, in the optimizer's words.

        Args:
            look: whether the host learns from the flags before it goes on, as for the norm of gradients.
        """
        self.sync.average()
        if look:
            self.sync.look(self.sync.flags.tolist())
        self.expect_mean()
        self.sync.next_boundary()
        self.old = self.mean().clone()
        self.own.zero_()
        self.written.zero_()
        self.micro_step = 0

    def step(self, *passes: Buckets) -> None:
        """One optimizer step of several micro-steps."""
        for index, buckets in enumerate(passes):
            self.backward(buckets, last=index == len(passes) - 1)
        self.boundary()


class Counting:
    """(offset, elements) of each all-reduce of hop 2 on rank 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts: list[tuple[int, int]] = []
        average = collectives.start_average_

        def counting(part: torch.Tensor, replication: RankGroup) -> Any:
            if replication.rank == 0:
                self.parts.append((part.storage_offset(), part.numel()))
            return average(part, replication)

        monkeypatch.setattr(collectives, "start_average_", counting)

    def take(self) -> list[tuple[int, int]]:
        """Return what was averaged since the last call; to rank 0 only."""
        if dist.get_rank():
            return []
        parts, self.parts = self.parts, []
        return parts
