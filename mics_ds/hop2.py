"""Hop 2: what it does with a shard, and where it leaves the mean over all ranks.

There are two ways. :class:`InPlace` replaces partial gradients by their mean, on every replica. :class:`Sliced` leaves
them as they are, and gives each replica its slice of the mean, in a buffer of its own. Both may be repeated: averaging
what is equal on all replicas changes nothing, and partial gradients that were kept give the same mean again.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

from .comm import collectives
from .comm.groups import RankGroup, ReduceScatterMethod
from .comm.slices import Slices


class Phase(enum.Enum):
    """See [Note: phases of a shard] in :mod:`mics_ds.two_hop`."""

    MEAN = "mean"
    PARTIAL = "partial"
    AVERAGING = "averaging"


LEGAL_TRANSITIONS = frozenset(
    {
        (Phase.MEAN, Phase.PARTIAL),
        (Phase.PARTIAL, Phase.PARTIAL),
        (Phase.MEAN, Phase.AVERAGING),
        (Phase.PARTIAL, Phase.AVERAGING),
        (Phase.AVERAGING, Phase.MEAN),
    }
)


class Given(enum.IntEnum):
    """What a shard got since the last boundary, see [Note: old means] in
    :mod:`mics_ds.two_hop`. The greatest of all replicas' holds."""

    NOTHING = 0
    ADDED = 1
    """On top of the old mean."""
    WRITTEN = 2
    """Over the old mean."""


class UnderWay(Protocol):
    """A collective that can be waited for."""

    def wait(self) -> None: ...


@dataclass
class GradientShard:
    """This rank's shard of one parameter's gradient."""

    start: int
    end: int
    """Where it lies in the buffer: elements [start, end)."""
    phase: Phase = Phase.MEAN
    average: UnderWay | None = None
    """Hop 2, while AVERAGING. Neighbours in the buffer share one."""
    given: Given = Given.NOTHING
    old: torch.Tensor | None = None
    """The old mean, while the buffer holds only what is new."""
    reduced: bool = False
    """Whether it went through hop 1 in this backward pass."""
    comes_twice: bool = False
    """Whether it ever did so twice in one pass: tied parameters under reentrant checkpointing. An early hop 2 after
    the first time would have to be done again, so from then on it waits for the end of the pass."""

    def move(self, phase: Phase) -> None:
        assert (self.phase, phase) in LEGAL_TRANSITIONS, f"a gradient shard cannot go from {self.phase} to {phase}"
        self.phase = phase


AHEAD = 2
"""How many reduce-scatters of hop 2 may hold their buffers at a time."""


class Means(Protocol):
    """How hop 2 is done, and where its results are."""

    keeps_partials: bool
    """Whether partial gradients outlast hop 2, so that doing it again computes the mean from nothing."""

    def of(self, shard: GradientShard) -> torch.Tensor:
        """The mean of a shard, or this replica's slice of it: 1-D and live."""
        ...

    def start(self, shards: Iterable[GradientShard]) -> None:
        """Start hop 2 on shards in the memory of the device: :attr:`GradientShard.average` can be waited for then."""
        ...

    def by_way_of_device(self, shards: Iterable[GradientShard]) -> None:
        """Hop 2 on all shards, in host memory, where only gloo could reduce them. One part is copied while another is
        averaged, and no more than two are on the device."""
        ...


class InPlace:
    """Hop 2 as an all-reduce: partial gradients become means.

    Args:
        buffer: returns the buffer of gradients, 1-D.
        device: where collectives of ``replication`` work.
        part: elements that go to the device at a time, for a buffer elsewhere.
    """

    keeps_partials = False

    def __init__(
        self, buffer: Callable[[], torch.Tensor], replication: RankGroup, device: torch.device, part: int
    ) -> None:
        self._buffer = buffer
        self._replication = replication
        self._device = device
        self._part = max(1, part)

    def of(self, shard: GradientShard) -> torch.Tensor:
        return self._buffer()[shard.start : shard.end]

    def start(self, shards: Iterable[GradientShard]) -> None:
        for run in _neighbours(shards):
            average = collectives.ReplicaAverage(self._buffer()[run[0].start : run[-1].end], self._replication)
            for shard in run:
                shard.average = average

    def by_way_of_device(self, shards: Iterable[GradientShard]) -> None:
        def parts() -> Iterator[Callable[[], None]]:
            for part in self._buffer().split(self._part):
                on_device = part.to(self._device, non_blocking=True)
                yield _and_back(collectives.ReplicaAverage(on_device, self._replication), on_device, part)

        _one_behind(parts())


class Sliced:
    """Hop 2 as a reduce-scatter: each replica gets its slice of every shard's mean.

    Args:
        buffer: returns the buffer of partial gradients, 1-D.
        means: returns the buffer for the slices, 1-D, in the order of the shards.
        ranges: of the shards in ``buffer``: all of it, in ascending order.
        replication: the group of hop 2.
        device, part: as for :class:`InPlace`.
        method: how a reduce-scatter is done.
        used: see :class:`mics_ds.comm.collectives.ReplicaScatter`.
    """

    keeps_partials = True

    def __init__(
        self,
        buffer: Callable[[], torch.Tensor],
        means: Callable[[], torch.Tensor],
        ranges: Iterable[tuple[int, int]],
        replication: RankGroup,
        device: torch.device,
        part: int,
        *,
        method: ReduceScatterMethod,
        used: Callable[..., None],
    ) -> None:
        self._buffer, self._means = buffer, means
        self._replication = replication
        self._device = device
        self._part = max(1, part)
        self._method: ReduceScatterMethod = method
        self._used = used
        self._under_way: deque[collectives.ReplicaScatter] = deque()
        """Those that may hold buffers as large as what they scatter."""
        shards = list(ranges)
        cut = Slices(tuple(stop - start for start, stop in shards), replication.size, replication.rank)
        self._places = {start: place for (start, stop), place in zip(shards, pairwise(cut.starts)) if stop > start}
        """By the start of a shard, its slice in the buffer of means."""

    def of(self, shard: GradientShard) -> torch.Tensor:
        start, end = self._places.get(shard.start, (0, 0)) if shard.end > shard.start else (0, 0)
        return self._means()[start:end]

    def start(self, shards: Iterable[GradientShard]) -> None:
        for run in _neighbours(shards):
            while len(self._under_way) >= AHEAD:
                self._under_way.popleft().wait()
            rows = self._rows(run, collectives.pieces_worth(self._nbytes(run), staged=False))
            scatter = self._scatter(rows, self._output(run))
            self._under_way.append(scatter)
            for shard in run:
                shard.average = scatter

    def by_way_of_device(self, shards: Iterable[GradientShard]) -> None:
        def parts() -> Iterator[Callable[[], None]]:
            for run in _limited(_neighbours(shards), self._part):
                count = -(-self._nbytes(run) // (self._part * self._buffer().element_size()))
                end = 0
                for rows in self._rows(run, count):
                    start, end = end, end + rows.shape[1]
                    mean = rows.new_empty(end - start, device=self._device)
                    scatter = self._scatter([rows.to(self._device, non_blocking=True)], mean)
                    yield _and_back(scatter, mean, self._output(run)[start:end])

        _one_behind(parts())

    def _rows(self, run: Sequence[GradientShard], pieces: int) -> list[torch.Tensor]:
        cut = Slices(tuple(shard.end - shard.start for shard in run), self._replication.size, self._replication.rank)
        return cut.rows([self._buffer()[shard.start : shard.end] for shard in run], pieces)

    def _output(self, run: Sequence[GradientShard]) -> torch.Tensor:
        full = [shard for shard in run if shard.end > shard.start]
        if not full:
            return self._means()[:0]
        return self._means()[self._places[full[0].start][0] : self._places[full[-1].start][1]]

    def _nbytes(self, run: Sequence[GradientShard]) -> int:
        return (run[-1].end - run[0].start) * self._buffer().element_size()

    def _scatter(self, rows: list[torch.Tensor], output: torch.Tensor) -> collectives.ReplicaScatter:
        return collectives.ReplicaScatter(rows, output, self._replication, self._method, self._used)


def _and_back(under_way: UnderWay, on_device: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
    def complete() -> None:
        under_way.wait()
        target.copy_(on_device)

    return complete


def _one_behind(parts: Iterable[Callable[[], None]]) -> None:
    """Complete each part when the next has been started."""
    previous: Callable[[], None] | None = None
    for part in parts:
        if previous is not None:
            previous()
        previous = part
    if previous is not None:
        previous()


def _limited(runs: Iterable[list[GradientShard]], limit: int) -> Iterator[list[GradientShard]]:
    """Runs of at most ``limit`` elements, or of one shard."""
    for run in runs:
        part: list[GradientShard] = []
        for shard in run:
            if part and shard.end - part[0].start > limit:
                yield part
                part = []
            part.append(shard)
        yield part


def _neighbours(shards: Iterable[GradientShard]) -> list[list[GradientShard]]:
    """Group shards that touch each other in the buffer, in ascending order."""
    runs: list[list[GradientShard]] = []
    for shard in sorted(shards, key=lambda item: (item.start, item.end)):
        if runs and runs[-1][-1].end == shard.start:
            runs[-1].append(shard)
        else:
            runs.append([shard])
    return runs
