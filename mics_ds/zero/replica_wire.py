"""Hop 2 in fewer bytes: values travel encoded, are added up in fp32, and errors of rounding are made good later.

    replica 0    g + e ──encode──▶ a row for each replica ─┐
                 e' = what rounding has left               ├─ exchange ─▶ mean of this replica's slice, in fp32
    replica 1    ...                                       ┘                │
                                                            mean + f ──encode──▶ all-gather ─▶ mean of all slices
                                                            f' = what rounding has left        decoded by all alike

With world-sharded states nothing follows the exchange: a replica needs the mean of its own slice, and has it in fp32.

[Note: residuals]

e (of a whole shard, *unsent*) and f (of a slice, *unpublished*) are *residuals*, the part of a gradient that has not
reached the weights yet. They are added to the next gradients, so over many steps nothing is lost, however coarse the
encoding. A residual counts once:

- There are two copies of each. Hop 2 reads the *committed* one and writes the *pending* one. A step that is taken
  swaps them. A step that is discarded does not.
- Hop 2 may be repeated in one step. Where means replace partial gradients (:class:`EncodedMean`), means hold the
  residual by then, so the next hop 2 starts from the pending one. Where partial gradients are kept
  (:class:`EncodedSlices`), all is computed again, from the committed one. A gradient that is written over a shard, or a
  value that all replicas set, changes which one holds for that shard.
- A shard that no replica has a gradient for keeps its old mean and its residuals. The flags of all replicas say so
  after hop 2, so it is undone on such a shard, on the device.
- Residuals are in units of the true gradient, without the loss scale, which changes from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..comm import collectives
from ..comm.async_exec import Deferred, Handle, Memory
from ..comm.packing import ChunkLayout
from ..comm.rank_group import RankGroup
from ..comm.wire import Wire
from .replica_reducers import ReplicaReducer
from .units import GradientShards

UNSENT_DTYPE = torch.bfloat16
"""A residual is at most half a level, so rounding it in turn loses a 512th of that at most."""


class Residual:
    """Residual that rounding has left of values, in two copies, see [Note: residuals].

    Args:
        starts: where the values of each shard begin, and the end of the last.
        device: where it is kept.
    """

    def __init__(self, starts: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._starts = starts
        self.committed = torch.zeros(starts[-1], dtype=dtype, device=device)
        self.pending = torch.zeros_like(self.committed)

    def span(self, places: range) -> slice:
        """Return where the values of shards that follow each other lie."""
        return slice(self._starts[places.start], self._starts[places.stop])

    def commit(self) -> None:
        """Let the pending values hold."""
        self.committed, self.pending = self.pending, self.committed

    def restart(self, place: int) -> None:
        """Begin again from the committed values of a shard."""
        span = self.span(range(place, place + 1))
        self.pending[span].copy_(self.committed[span])

    def keep_where(self, advanced: torch.Tensor, place: int) -> None:
        """Begin again from the committed values of a shard unless ``advanced``, which is on their device."""
        span = self.span(range(place, place + 1))
        self.pending[span].copy_(torch.where(advanced, self.pending[span], self.committed[span]))


class _Encoded(ReplicaReducer):
    """The exchange of encoded rows, which both reducers share.

    Args:
        numels: how many elements of each shard travel, from its first one on.
        replication: the group of hop 2.
        wire: how values travel.
        loss_scale: returns what gradients are multiplied by.
    """

    def __init__(
        self,
        shards: GradientShards,
        numels: Sequence[int],
        replication: RankGroup,
        wire: Wire,
        loss_scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        super().__init__(shards)
        self._numels = numels
        self._replication = replication
        self._wire = wire
        self._loss_scale = loss_scale
        self._cut = ChunkLayout(numels, replication.size)
        self._rounds = 0
        """How often hop 2 has run in this step."""
        self._residuals: dict[str, Residual] = {}
        if wire.feedback:
            starts = [0, *(end for _, end in shards.bounds)]
            self._residuals["unsent"] = Residual(starts, UNSENT_DTYPE, shards.buffer().device)

    def _start(self, places: range, memory: Memory) -> Handle[None]:
        layout = ChunkLayout(self._numels[places.start : places.stop], self._replication.size)
        if not layout.width:
            return Deferred(lambda: None)
        count, nbytes = layout.size, self._wire.nbytes(layout.width)
        sent, received = (self._bytes(count, nbytes, memory) for _ in range(2))
        self._encode(places, layout, sent)
        exchange = collectives.start_exchange(received, sent, self._replication, collectives.HOP2_EXCHANGE)

        def mean() -> torch.Tensor:
            return self._wire.decode(exchange.wait(), layout.width).mean(dim=0)

        return self._deliver(places, layout, mean, memory)

    def _bytes(self, rows: int, nbytes: int, memory: Memory) -> torch.Tensor:
        return self._scratch(rows * nbytes, torch.uint8, memory).view(rows, nbytes)

    def _encode(self, places: range, layout: ChunkLayout, sent: torch.Tensor) -> None:
        """Encode a row for each replica, and note what that leaves."""
        shards, device = self.shards.at(places), self.shards.device
        if not self._residuals:
            self._wire.encode(layout.pack(self._shares(shards.to(device, non_blocking=True), places)), sent)
            return
        unsent, scale = self._residuals["unsent"], self._loss_scale()
        span = unsent.span(places)
        values = torch.empty(shards.shape, dtype=torch.float32, device=device)
        values.copy_(shards, non_blocking=True)
        # Means that replace partial gradients hold the committed residual after a first round.
        before = unsent.pending if self._rounds and not self.keeps_partials else unsent.committed
        values.add_(before[span].to(device), alpha=scale)
        shares = self._shares(values, places)
        rows = layout.pack(shares)
        self._wire.encode(rows, sent)
        layout.copy_out(_unscaled(rows.sub_(self._wire.decode(sent, layout.width)), scale), shares)
        unsent.pending[span].copy_(values)

    def _shares(self, stretch: torch.Tensor, places: range) -> list[torch.Tensor]:
        """Return what travels of each shard, of a part of the buffer with these shards."""
        bounds = self.shards.bounds
        first = bounds[places.start][0]
        return [stretch[bounds[place][0] - first :][: self._numels[place]] for place in places]

    def _deliver(
        self, places: range, layout: ChunkLayout, mean: Callable[[], torch.Tensor], memory: Memory
    ) -> Handle[None]:
        """Do what follows the exchange.

        Args:
            mean: waits for the exchange and returns (width,) in fp32, of this replica's slices.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------------------- what becomes of residuals

    def residuals(self) -> dict[str, torch.Tensor]:
        return {name: residual.committed for name, residual in self._residuals.items()}

    def protect(self, places: Sequence[int]) -> Callable[[torch.Tensor], None]:
        # Without the old mean: partial gradients that are kept are zero, and means are if it was set aside.
        means = {place: self.mean(range(place, place + 1)) for place in places}
        kept = {place: torch.zeros_like(mean) if self.keeps_partials else mean.clone() for place, mean in means.items()}

        def leave_alone(flags: torch.Tensor) -> None:
            self._rounds += 1
            used = flags.to(self.shards.buffer().device, torch.bool) if kept else flags
            for place, before in kept.items():
                means[place].copy_(torch.where(used[place], means[place], before))
                for residual in self._residuals.values():
                    residual.keep_where(used[place], place)

        return leave_alone

    def end_step(self, *, discarded: bool) -> None:
        if self._rounds and not discarded:
            for residual in self._residuals.values():
                residual.commit()
        self._rounds = 0


def _unscaled(values: torch.Tensor, scale: float) -> torch.Tensor:
    """Divide values by a loss scale, in place."""
    return values if scale == 1.0 else values.div_(scale)


class EncodedMean(_Encoded):
    """Hop 2 in fewer bytes in place of an all-reduce: partial gradients become means, the same bits on all replicas.

    Takes the arguments of :class:`_Encoded`. Elements behind ``numels`` are padding, and stay as they are: a block that
    is not a number would stay one there for good.
    """

    def __init__(self, shards: GradientShards, *args: Any) -> None:
        super().__init__(shards, *args)
        if self._residuals:
            self._residuals["unpublished"] = Residual(self._cut.starts, torch.float32, shards.buffer().device)

    def _deliver(
        self, places: range, layout: ChunkLayout, mean: Callable[[], torch.Tensor], memory: Memory
    ) -> Handle[None]:
        wire, residual = self._wire, self._residuals.get("unpublished")
        row = self._bytes(1, wire.nbytes(layout.width), memory)
        rows = self._bytes(layout.size, row.numel(), memory)
        # Waits for the exchange in the issue stage: the gather, in the same group, is issued before the next exchange.
        values = mean()
        if residual is not None:
            scale, span = self._loss_scale(), residual.span(places)
            before = residual.pending if self._rounds else residual.committed
            values.add_(before[span].to(values.device), alpha=scale)
        wire.encode(values.unsqueeze(0), row)
        gathering = collectives.start_all_gather(rows, row.view(-1), self._replication, collectives.HOP2_GATHER)
        if residual is not None:
            left = values.sub_(wire.decode(row, layout.width)[0])
            residual.pending[span].copy_(_unscaled(left, scale))

        def spread() -> None:
            means = wire.decode(gathering.wait(), layout.width).to(self.shards.buffer().device)
            layout.copy_out(means, self._shares(self.shards.at(places), places))

        return Deferred(spread)

    def overwritten(self, place: int) -> None:
        if self._rounds:
            for residual in self._residuals.values():
                residual.restart(place)


class EncodedSlices(_Encoded):
    """Hop 2 in fewer bytes in place of a reduce-scatter: each replica gets its slice of every shard's mean.

    Args:
        means: returns the buffer for the slices, 1-D, in the order of the shards.
        args: as for :class:`_Encoded`.
    """

    keeps_partials = True

    def __init__(self, shards: GradientShards, means: Callable[[], torch.Tensor], *args: Any) -> None:
        super().__init__(shards, *args)
        self._means = means

    def mean(self, places: range) -> torch.Tensor:
        return self._means()[self._cut.starts[places.start] : self._cut.starts[places.stop]]

    def _deliver(
        self, places: range, layout: ChunkLayout, mean: Callable[[], torch.Tensor], memory: Memory
    ) -> Handle[None]:
        def keep() -> None:
            self.mean(places).copy_(mean())

        return Deferred(keep)

    def replaced(self, place: int) -> None:
        # The value holds the committed residual, which is added when hop 2 runs again.
        if self._rounds and self._residuals:
            unsent, places = self._residuals["unsent"], range(place, place + 1)
            owed = unsent.pending[unsent.span(places)].float() - unsent.committed[unsent.span(places)].float()
            self.shards.at(places).add_(owed, alpha=self._loss_scale())
