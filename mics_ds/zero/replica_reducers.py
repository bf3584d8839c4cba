"""Hop 2 on a unit of gradient shards, in two ways, and where each leaves the mean over all ranks.

:class:`AllReduceMean` replaces partial gradients by their mean, on every replica. :class:`ScatterToSlices` leaves them
as they are, and gives each replica its slice of the mean, in a buffer of its own. Both may be repeated: averaging what
is equal on all replicas changes nothing, and partial gradients that were kept give the same mean again.
:mod:`mics_ds.zero.replica_wire` has a third way, which rounds values and remembers what rounding has left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from ..comm import collectives
from ..comm.async_exec import Deferred, Handle, Memory, Task
from ..comm.packing import ChunkLayout
from ..comm.rank_group import RankGroup, ReduceScatterMethod
from .replication import Replication
from .units import GradientShards


class ReplicaReducer:
    """A way to do hop 2."""

    keeps_partials = False
    """Whether partial gradients outlast hop 2, so that doing it again computes the mean from nothing."""

    def __init__(self, shards: GradientShards) -> None:
        self.shards = shards
        """Partial gradients."""

    def mean(self, places: range) -> torch.Tensor:
        """Return the means of shards that follow each other, or this replica's slices of them: 1-D and live."""
        return self.shards.at(places)

    def tasks(self, unit: range) -> Iterator[Task[None]]:
        """Yield what to run in an executor, one after another, in the same order on all replicas."""
        return (partial(self._start, places) for places in self.shards.parts(unit))

    def _start(self, places: range, memory: Memory) -> Handle[None]:
        """Start hop 2 on shards that follow each other."""
        raise NotImplementedError

    def _scratch(self, numel: int, dtype: torch.dtype, memory: Memory) -> torch.Tensor:
        """Return memory where collectives work."""
        return memory.scratch(numel, torch.empty(0, dtype=dtype, device=self.shards.device))

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

    def replaced(self, place: int) -> None:
        """Note that a shard and its mean were set to one value, after hop 2."""

    def end_step(self, *, discarded: bool) -> None:
        """Note that an optimizer step has used the means, or has discarded them."""


class AllReduceMean(ReplicaReducer):
    """Hop 2 as an all-reduce: partial gradients become means."""

    def __init__(self, shards: GradientShards, replication: Replication) -> None:
        super().__init__(shards)
        self._replication = replication

    def _start(self, places: range, memory: Memory) -> Handle[None]:
        shards, here = self.shards.at(places), self.shards.is_here
        on_device = shards
        if not here:
            on_device = self._scratch(shards.numel(), shards.dtype, memory).copy_(shards, non_blocking=True)
        averaging = self._replication.start_average_(on_device)

        def put_back() -> None:
            averaging.wait()
            if not here:
                shards.copy_(on_device)

        return Deferred(put_back)


class ScatterToSlices(ReplicaReducer):
    """Hop 2 as a reduce-scatter: each replica gets its slice of every shard's mean.

    Args:
        means: returns the buffer for the slices, 1-D, in the order of the shards.
        method: how a reduce-scatter is done. An all-to-all adds 16-bit values up in fp32.
    """

    keeps_partials = True

    def __init__(
        self,
        shards: GradientShards,
        means: Callable[[], torch.Tensor],
        replication: RankGroup,
        method: ReduceScatterMethod,
    ) -> None:
        super().__init__(shards)
        self._replication = replication
        self._means = means
        self._method: ReduceScatterMethod = method
        self._cut = ChunkLayout([end - start for start, end in shards.bounds], replication.size)

    def mean(self, places: range) -> torch.Tensor:
        return self._means()[self._cut.starts[places.start] : self._cut.starts[places.stop]]

    def _start(self, places: range, memory: Memory) -> Handle[None]:
        shards = [self.shards.at(range(place, place + 1)) for place in places]
        target, here = self.mean(places), self.shards.is_here
        layout = ChunkLayout([shard.numel() for shard in shards], self._replication.size)
        packed = memory.scratch(layout.size * layout.width, target) if here else None
        rows = layout.pack(shards, packed).to(self.shards.device, non_blocking=True)
        output = target if here else self._scratch(target.numel(), target.dtype, memory)
        reducing = collectives.start_reduce_scatter_mean(
            rows, output, self._replication, self._method, memory, collectives.HOP2_SCATTER
        )

        def put_back() -> None:
            reducing.wait()
            if not here:
                target.copy_(output)

        return Deferred(put_back)
