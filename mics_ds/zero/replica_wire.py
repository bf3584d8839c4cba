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

from collections.abc import Callable, Iterator, Sequence

import torch

from ..comm import collectives
from ..comm.async_exec import Stages, Task
from ..comm.packing import ChunkLayout
from ..comm.rank_group import RankGroup
from ..comm.wire import Wire
from .replica_reducers import ReplicaReducer, is_on, stretches
from .units import Unit

UNSENT_DTYPE = torch.bfloat16
"""A residual is at most half a level, so rounding it in turn loses a 512th of that at most."""


class Residual:
    """Residual that rounding has left of values, in two copies, see [Note: residuals].

    Args:
        numel: elements.
        like: of its device.
    """

    def __init__(self, numel: int, dtype: torch.dtype, like: torch.Tensor) -> None:
        self.committed = torch.zeros(numel, dtype=dtype, device=like.device)
        self.pending = torch.zeros_like(self.committed)

    def commit(self) -> None:
        """Let the pending values hold."""
        self.committed, self.pending = self.pending, self.committed

    def restart(self, span: slice) -> None:
        """Begin again from the committed values."""
        self.pending[span].copy_(self.committed[span])

    def keep_where(self, advanced: torch.Tensor, span: slice) -> None:
        """Begin again from the committed values unless ``advanced``, which is on the device of the values."""
        self.pending[span].copy_(torch.where(advanced, self.pending[span], self.committed[span]))


class _Encoded(ReplicaReducer):
    """The exchange of encoded rows, which both reducers share.

    Args:
        buffer: returns the buffer of partial gradients, 1-D.
        shards: elements [start, end) of each shard in it.
        numels: how many elements of each shard travel, from its first one on.
        replication: the group of hop 2.
        device: where collectives of ``replication`` work. A buffer elsewhere is copied there, ``part`` elements at a
            time or one shard.
        wire: how values travel.
        loss_scale: returns what gradients are multiplied by.
    """

    def __init__(
        self,
        buffer: Callable[[], torch.Tensor],
        shards: list[tuple[int, int]],
        numels: Sequence[int],
        replication: RankGroup,
        device: torch.device,
        part: int,
        wire: Wire,
        loss_scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self._buffer = buffer
        self._shards = shards
        self._numels = numels
        self._replication = replication
        self._device = device
        self._part = max(1, part)
        self._wire = wire
        self._loss_scale = loss_scale
        self._cut = ChunkLayout.in_rank_order(numels, replication.size)
        self._rounds = 0
        """How often hop 2 has run in this step."""
        self.unsent = Residual(shards[-1][1] if wire.feedback and shards else 0, UNSENT_DTYPE, buffer())

    def partial(self, place: int) -> torch.Tensor:
        return self._buffer()[slice(*self._shards[place])]

    def _slice(self, places: range) -> slice:
        """Return where the slices of these shards lie, among those of all."""
        return slice(self._cut.starts[places.start], self._cut.starts[places.stop])

    def tasks(self, unit: Unit) -> Iterator[Task[None]]:
        here = is_on(self._buffer(), self._device)
        yield from map(self._task, [unit.places] if here else stretches(unit, self._shards, self._part))

    def _task(self, places: range) -> Task[None]:
        scale, repeated = self._loss_scale(), self._rounds > 0
        layout = ChunkLayout.in_rank_order(self._numels[places.start : places.stop], self._replication.size)

        def reduce(stages: Stages) -> None:
            if not layout.width:
                return
            count, nbytes = layout.size, self._wire.nbytes(layout.width)
            like = torch.empty(0, dtype=torch.uint8, device=self._device)
            sent, received = (stages.scratch(count * nbytes, like).view(count, nbytes) for _ in range(2))
            self._encode(places, layout, sent, scale, repeated)
            exchange = collectives.start_exchange(received, sent, self._replication, collectives.HOP2_EXCHANGE)
            with stages.wait_stage(issues_again=not self.keeps_partials):
                exchange.wait()
                mean = self._wire.decode(received, layout.width).mean(dim=0)
                self._finish(places, layout, mean, scale, repeated, stages)

        return reduce

    def _encode(self, places: range, layout: ChunkLayout, sent: torch.Tensor, scale: float, repeated: bool) -> None:
        """Encode a row for each replica, and note what that leaves."""
        first, end = self._shards[places.start][0], self._shards[places.stop - 1][1]
        partial = self._buffer()[first:end]
        if not self._wire.feedback:
            self._wire.encode(layout.pack(self._shares(partial.to(self._device, non_blocking=True), places)), sent)
            return
        values = torch.empty(end - first, dtype=torch.float32, device=self._device)
        values.copy_(partial, non_blocking=True)
        self._add_residual(values, first, places, scale, repeated)
        shares = self._shares(values, places)
        rows = layout.pack(shares)
        self._wire.encode(rows, sent)
        layout.copy_out(_unscaled(rows.sub_(self._wire.decode(sent, layout.width)), scale), shares)
        self.unsent.pending[first:end].copy_(values)

    def _shares(self, stretch: torch.Tensor, places: range) -> list[torch.Tensor]:
        """Return what travels of each shard, of a part of the buffer with these shards."""
        first = self._shards[places.start][0]
        starts = [self._shards[place][0] - first for place in places]
        return [stretch[start : start + self._numels[place]] for start, place in zip(starts, places)]

    def _add_residual(self, values: torch.Tensor, first: int, places: range, scale: float, repeated: bool) -> None:
        """Add what was not sent before to values, which begin at element ``first`` of the buffer."""
        from_pending = repeated and not self.keeps_partials
        unsent = self.unsent.pending if from_pending else self.unsent.committed
        values.add_(unsent[first : first + values.numel()].to(values.device), alpha=scale)

    def _finish(
        self, places: range, layout: ChunkLayout, mean: torch.Tensor, scale: float, repeated: bool, stages: Stages
    ) -> None:
        """Do what follows the exchange, in the wait stage.

        Args:
            mean: (width,) in fp32, of this replica's slices.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------------------- what becomes of residuals

    def residuals(self) -> dict[str, torch.Tensor]:
        return {"unsent": self.unsent.committed} if self._wire.feedback else {}

    def protect(self, places: Sequence[int]) -> Callable[[torch.Tensor], None]:
        kept = {place: self._before(place) for place in places}

        def leave_alone(flags: torch.Tensor) -> None:
            self._rounds += 1
            used = flags.to(self._buffer().device, torch.bool) if kept else flags
            for place, before in kept.items():
                mean = self.mean(place)
                mean.copy_(torch.where(used[place], mean, before))
                self._keep_where(used[place], place)

        return leave_alone

    def _before(self, place: int) -> torch.Tensor:
        """Return a copy of what the mean of a shard without gradients has to be after hop 2, without its old mean."""
        raise NotImplementedError

    def _keep_where(self, advanced: torch.Tensor, place: int) -> None:
        if self._wire.feedback:
            self.unsent.keep_where(advanced, slice(*self._shards[place]))

    def end_step(self, *, discarded: bool) -> None:
        if self._rounds and not discarded:
            self._commit()
        self._rounds = 0

    def _commit(self) -> None:
        self.unsent.commit()


def _unscaled(values: torch.Tensor, scale: float) -> torch.Tensor:
    """Divide values by a loss scale, in place."""
    return values if scale == 1.0 else values.div_(scale)


class EncodedMean(_Encoded):
    """Hop 2 in fewer bytes in place of an all-reduce: partial gradients become means, the same bits on all replicas.

    Takes the arguments of :class:`_Encoded`. Elements behind ``numels`` are padding, and stay as they are: a block that
    is not a number would stay one there for good.
    """

    keeps_partials = False

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]  # checked there
        self.unpublished = Residual(self._cut.width if self._wire.feedback else 0, torch.float32, self._buffer())

    mean = _Encoded.partial

    def residuals(self) -> dict[str, torch.Tensor]:
        published = {"unpublished": self.unpublished.committed} if self._wire.feedback else {}
        return {**super().residuals(), **published}

    def _finish(
        self, places: range, layout: ChunkLayout, mean: torch.Tensor, scale: float, repeated: bool, stages: Stages
    ) -> None:
        span, wire = self._slice(places), self._wire
        row = stages.scratch(wire.nbytes(layout.width), torch.empty(0, dtype=torch.uint8, device=self._device))
        rows = stages.scratch(layout.size * row.numel(), row).view(layout.size, -1)
        if wire.feedback:
            before = self.unpublished.pending if repeated else self.unpublished.committed
            mean.add_(before[span].to(mean.device), alpha=scale)
        wire.encode(mean.unsqueeze(0), row.unsqueeze(0))
        gathering = collectives.start_all_gather(rows, row, self._replication, collectives.HOP2_GATHER)
        if wire.feedback:
            left = mean.sub_(wire.decode(row.unsqueeze(0), layout.width)[0])
            self.unpublished.pending[span].copy_(_unscaled(left, scale))
        gathering.wait()
        means = wire.decode(rows, layout.width).to(self._buffer().device)
        first, end = self._shards[places.start][0], self._shards[places.stop - 1][1]
        layout.copy_out(means, self._shares(self._buffer()[first:end], places))

    def _before(self, place: int) -> torch.Tensor:
        return self.mean(place).clone()  # zero if the old mean was set aside

    def _keep_where(self, advanced: torch.Tensor, place: int) -> None:
        super()._keep_where(advanced, place)
        if self._wire.feedback:
            self.unpublished.keep_where(advanced, self._slice(range(place, place + 1)))

    def overwritten(self, place: int) -> None:
        if self._rounds and self._wire.feedback:
            self.unsent.restart(slice(*self._shards[place]))
            self.unpublished.restart(self._slice(range(place, place + 1)))

    def _commit(self) -> None:
        super()._commit()
        self.unpublished.commit()


class EncodedSlices(_Encoded):
    """Hop 2 in fewer bytes in place of a reduce-scatter: each replica gets its slice of every shard's mean.

    Args:
        means: returns the buffer for the slices, 1-D, in the order of the shards.
        args, kwargs: as for :class:`_Encoded`.
    """

    keeps_partials = True

    def __init__(self, means: Callable[[], torch.Tensor], *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]  # checked there
        self._means = means
        self._replaced: dict[int, torch.Tensor] = {}
        """Residuals of shards that were set to a value, which holds the committed ones by then."""

    def mean(self, place: int) -> torch.Tensor:
        return self._means()[self._slice(range(place, place + 1))]

    def _finish(
        self, places: range, layout: ChunkLayout, mean: torch.Tensor, scale: float, repeated: bool, stages: Stages
    ) -> None:
        self._means()[self._slice(places)].copy_(mean)

    def _before(self, place: int) -> torch.Tensor:
        return torch.zeros_like(self.mean(place))

    def _add_residual(self, values: torch.Tensor, first: int, places: range, scale: float, repeated: bool) -> None:
        super()._add_residual(values, first, places, scale, repeated)
        for place, unsent in self._replaced.items():
            if place in places:
                start, end = (element - first for element in self._shards[place])
                values[start:end].copy_(self.partial(place)).add_(unsent.to(values.device), alpha=scale)

    def overwritten(self, place: int) -> None:
        self._replaced.pop(place, None)

    def replaced(self, place: int) -> None:
        if self._rounds and self._wire.feedback:
            self._replaced[place] = self.unsent.pending[slice(*self._shards[place])].clone()

    def end_step(self, *, discarded: bool) -> None:
        super().end_step(discarded=discarded)
        self._replaced.clear()
