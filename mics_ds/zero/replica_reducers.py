"""Hop 2 on a unit of gradient shards, in two ways, and where each leaves the mean over all ranks.

:class:`AllReduceMean` replaces partial gradients by their mean, on every replica. :class:`ScatterToSlices` leaves them
as they are, and gives each replica its slice of the mean, in a buffer of its own. Both may be repeated: averaging what
is equal on all replicas changes nothing, and partial gradients that were kept give the same mean again.
:mod:`mics_ds.zero.replica_wire` has a third way, which rounds values and remembers what rounding has left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from ..comm import collectives
from ..comm.async_exec import Stages, Task
from ..comm.packing import ChunkLayout
from ..comm.rank_group import RankGroup, ReduceScatterMethod
from .replication import Replication
from .units import Unit


def is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    """Return whether collectives on ``device`` can work on a tensor as it is."""
    return tensor.device == device


def stretches(unit: Unit, shards: Sequence[tuple[int, int]], part: int) -> Iterator[range]:
    """Divide the shards of a unit into stretches of at most ``part`` elements, and of one shard at least."""
    places, held = range(unit.places.start, unit.places.start), 0
    for place in unit.places:
        start, end = shards[place]
        if places and held + end - start > part:
            yield places
            places, held = range(place, place), 0
        places, held = range(places.start, place + 1), held + end - start
    if places:
        yield places


class ReplicaReducer(Protocol):
    """A way to do hop 2."""

    keeps_partials: bool
    """Whether partial gradients outlast hop 2, so that doing it again computes the mean from nothing."""

    def partial(self, place: int) -> torch.Tensor:
        """Return a shard in the buffer of partial gradients: 1-D and live."""
        ...

    def mean(self, place: int) -> torch.Tensor:
        """Return the mean of a shard, or this replica's slice of it: 1-D and live."""
        ...

    def tasks(self, unit: Unit) -> Iterator[Task[None]]:
        """Yield what to run in an executor, one after another, in the same order on all replicas."""
        ...

    # Rounding leaves residuals, which have to follow what becomes of gradients. Exact reducers ignore the rest.

    def residuals(self) -> dict[str, torch.Tensor]:
        """Return what training continues from beside weights and optimizer states, by name: 1-D and live."""
        return {}

    def protect(self, places: Sequence[int]) -> Callable[[torch.Tensor], None]:
        """Prepare shards that this replica has no gradient for, before their units are reduced.

        Returns:
            To be called with the flags of all replicas after hop 2: leaves those shards alone that no replica has a
            gradient for.
        """
        return lambda flags: None

    def overwritten(self, place: int) -> None:
        """Note that a gradient is about to be written over a shard, whatever hop 2 has made of it."""
        return

    def replaced(self, place: int) -> None:
        """Note that a shard and its mean were set to one value, after hop 2."""
        return

    def end_step(self, *, discarded: bool) -> None:
        """Note that an optimizer step has used the means, or has discarded them."""
        return


class AllReduceMean(ReplicaReducer):
    """Hop 2 as an all-reduce: partial gradients become means.

    Args:
        buffer: returns the buffer of gradients, 1-D.
        shards: elements [start, end) of each shard in it.
        replication: the group of hop 2.
        device: where collectives of ``replication`` work. A buffer elsewhere is copied there and back, ``part``
            elements at a time.
    """

    keeps_partials = False

    def __init__(
        self,
        buffer: Callable[[], torch.Tensor],
        shards: list[tuple[int, int]],
        replication: Replication,
        device: torch.device,
        part: int,
    ) -> None:
        self._buffer = buffer
        self._shards = shards
        self._replication = replication
        self._like = torch.empty(0, device=device)
        self._part = max(1, part)

    def partial(self, place: int) -> torch.Tensor:
        return self._buffer()[slice(*self._shards[place])]

    mean = partial

    def tasks(self, unit: Unit) -> Iterator[Task[None]]:
        shard = self._buffer()[unit.start : unit.end]
        here = is_on(shard, self._like.device)
        for part in [shard] if here else shard.split(self._part):
            yield self._task(part, here)

    def _task(self, part: torch.Tensor, here: bool) -> Task[None]:
        def average(stages: Stages) -> None:
            on_device = part
            if not here:
                on_device = stages.scratch(part.numel(), self._like.to(part.dtype))
                on_device.copy_(part, non_blocking=True)
            handle = self._replication.start_average_(on_device)
            with stages.wait_stage():
                handle.wait()
                if not here:
                    part.copy_(on_device)

        return average


class ScatterToSlices(ReplicaReducer):
    """Hop 2 as a reduce-scatter: each replica gets its slice of every shard's mean.

    Args:
        means: returns the buffer for the slices, 1-D, in the order of the shards.
        method: how a reduce-scatter is done. An all-to-all adds 16-bit values up in fp32.
        buffer, shards, replication, device, part: as for :class:`AllReduceMean`.
    """

    keeps_partials = True

    def __init__(
        self,
        buffer: Callable[[], torch.Tensor],
        means: Callable[[], torch.Tensor],
        shards: list[tuple[int, int]],
        replication: RankGroup,
        device: torch.device,
        part: int,
        *,
        method: ReduceScatterMethod,
    ) -> None:
        self._buffer, self._means = buffer, means
        self._shards = shards
        self._replication = replication
        self._like = torch.empty(0, device=device)
        self._part = max(1, part)
        self._method: ReduceScatterMethod = method
        self._cut = ChunkLayout.in_rank_order([end - start for start, end in shards], replication.size)

    def partial(self, place: int) -> torch.Tensor:
        return self._buffer()[slice(*self._shards[place])]

    def mean(self, place: int) -> torch.Tensor:
        return self._means()[self._cut.starts[place] : self._cut.starts[place + 1]]

    def tasks(self, unit: Unit) -> Iterator[Task[None]]:
        if is_on(self._buffer(), self._like.device):
            yield self._task(unit.places)
        else:
            yield from map(self._task, stretches(unit, self._shards, self._part))

    def _task(self, places: range) -> Task[None]:
        def scatter(stages: Stages) -> None:
            shards = [self.partial(place) for place in places]
            target = self._means()[self._cut.starts[places.start] : self._cut.starts[places.stop]]
            if not target.numel():
                return
            layout = ChunkLayout.in_rank_order([shard.numel() for shard in shards], self._replication.size)
            here = is_on(target, self._like.device)
            memory = stages.scratch(layout.size * layout.width, target) if here else None
            rows = layout.pack(shards, memory).to(self._like.device, non_blocking=True)
            output = target if here else stages.scratch(target.numel(), self._like.to(target.dtype))
            collectives.reduce_scatter_mean(
                rows, output, self._replication, self._method, stages, collectives.HOP2_SCATTER
            )
            if not here:
                with stages.wait_stage():
                    target.copy_(output)

        return scatter
