"""Two-hop gradient synchronisation: which shard is where between hop 1 and the optimizer step.

[Note: the two hops]

    micro-step 1        micro-step 2        micro-step s = boundary         step
    ┌──────────┐        ┌──────────┐        ┌──────────┐
    │ backward │        │ backward │        │ backward │                    norm, clip, update
    └──────────┘        └──────────┘        └──────────┘                    │
     hop 1 ······        hop 1 ······        hop 1 ······                   │
                                                hop 2 ········              │
    shard  =       g1      +=          g2      +=          gs  → mean over replicas,
                                                                 the same on every replica

Hop 1, a reduce-scatter on the partition group, leaves a *partial gradient*, the mean over p ranks, in one flat buffer
per rank. Hop 2 averages that buffer over the replication group, once per boundary. In the last micro-step it follows
hop 1 unit by unit, beside the backward pass of earlier layers. The rest starts when that pass ends, and the caller's
stream or thread waits for all of it there, so gradients that are read after ``backward()`` are means. Where only the
step knows the boundary, everything is averaged at that time.

[Note: units]

The buffer has the shards in reverse order of the parameters, about the order in which gradients come. A *unit* is a
stretch of it of a fixed size, the same on all replicas. Units are averaged in their order, each as soon as the ones
before it have started and all of its shards are final. Replicas need not do the same: one of them may skip a module (a
text-only batch, an expert without tokens). It is late with a unit then, and never different. Parameters that no replica
has used since the start are left out, and follow in units of their own when the pass ends. Which ones those are, all
replicas learn together, from the flags below.

[Note: old means]

Gradients overwrite a shard in the first micro-step of a boundary and are added to it in later ones. So in stock
ZeRO-3 a parameter without a gradient in the first one adds to the mean of the boundary before, and one that gets none
keeps that mean. Replicas see the same only together: if one of them overwrites, the old mean must be gone on all, and
if none does, it counts once. So a replica that did not overwrite a shard sets the old mean aside and contributes only
what is new. An all-reduce of one flag per parameter tells whether another replica did. Where none did, the old mean is
added again, on the device: the host does not wait for the flags before it waits for the norm.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch

from ..comm.async_exec import Executor, Handle, Memory, Task
from ..errors import MicsUsageError
from ..log import logger
from .replica_reducers import ReplicaReducer
from .replication import Replication
from .units import UnitPlan

USE_NON_REENTRANT = (
    "Use torch.utils.checkpoint with use_reentrant=False (gradient_checkpointing_kwargs={'use_reentrant': False} in "
    "Hugging Face's Trainer), or keep modules that share weights out of checkpoints."
)


class Given(enum.IntEnum):
    """Kind of gradient that a shard got since the last boundary. The greatest over all replicas holds."""

    NOTHING = 0
    ADDED = 1
    """A gradient on top of the old mean."""
    WRITTEN = 2
    """A gradient over the old mean."""
    UNUSABLE = 3
    """A second gradient in one pass, in the bucket of the first, or after hop 2 had started on the shard."""


@dataclass
class _Boundary:
    """State of the gradients since the last optimizer step, by places of parameters in the buffer."""

    used_before: frozenset[int]
    """Parameters that replicas had used before."""
    given: dict[int, Given] = field(default_factory=dict)
    fresh: set[int] = field(default_factory=set)
    """Parameters whose shard holds nothing of the boundary before."""
    old: dict[int, torch.Tensor] = field(default_factory=dict)
    """Old means that were set aside, see [Note: old means]."""
    passes: int = 0
    """Backward passes that might have been the last one before the step."""
    arrived: set[int] = field(default_factory=set)
    """Parameters with a gradient in this pass."""
    started: int = 0
    """Early units that hop 2 has started on, in this pass."""
    flags: torch.Tensor | None = None
    """(parameters,), on the device: what all replicas were given, after hop 2 and until the host has looked."""
    is_mean: bool = True
    """Whether every shard is the mean over all ranks. The same on all replicas."""


class GradSync:
    """Both hops over one flat buffer of gradient shards. Knows neither DeepSpeed nor modules.

    All ranks of the replication group call :meth:`end_pass`, :meth:`average` and :meth:`next_boundary` in the same
    order, with the same arguments.

    Args:
        keys: for each shard, in the order of the buffer, an id that all ranks share.
        replication: the group of hop 2, ``None`` for one replica, where hop 2 does nothing.
        hop1, hop2: executors.
        reducer: how hop 2 is done on the shards.
        unit_numel: least elements of a unit.
        early: whether hop 2 may start before a pass ends.
    """

    def __init__(
        self,
        keys: Iterable[int],
        replication: Replication | None,
        hop1: Executor,
        hop2: Executor,
        reducer: ReplicaReducer,
        *,
        unit_numel: int,
        early: bool = True,
    ) -> None:
        self._place = {key: place for place, key in enumerate(keys)}
        self._replication = replication
        self._hop1, self._hop2 = hop1, hop2
        self._reducer = reducer
        self._units = UnitPlan(reducer.shards.bounds, unit_numel)
        self._early = early and replication is not None
        self._repeated: set[int] = set()
        """Places of parameters that ever got two gradients in one pass: hop 2 on them waits for the end of the pass."""
        self._passes_per_step = 1
        """Backward passes before the last step: several may precede one (policy and value losses, say)."""
        self._boundary = _Boundary(self._units.used)

    # ---------------------------------------------------------------------------------------- hop 1

    def reduce(
        self,
        ids: Sequence[int],
        hop1: Callable[[Callable[[], None]], Handle[None] | None],
        *,
        overwriting: bool,
        last: bool,
    ) -> None:
        """Run hop 1 on one bucket, and hop 2 on units that are complete with it.

        Args:
            ids: the parameters of the bucket.
            hop1: starts to reduce the bucket and to store the result in the shards. It gets a function that it has to
                call before it stores anything, on the same stream or thread. Returns what hop 2 has to wait for,
                ``None`` if nothing.
            overwriting: whether their gradients are written over the shards, and not added to them.
            last: whether this micro-step ends the accumulation, so that hop 2 may follow at once.
        """
        done = hop1(self._note([self._place[key] for key in ids], overwriting))
        if self._early and last and self._is_last_pass:
            for unit in self._units.early[self._boundary.started :]:
                if not self._boundary.arrived.issuperset(unit) or not self._repeated.isdisjoint(unit):
                    break
                self._boundary.started += 1
                self._start(unit, after=done)

    def _note(self, places: Sequence[int], overwriting: bool) -> Callable[[], None]:
        """Note which gradients come, and return what is to be called before they are stored."""
        if self._replication is None:
            return lambda: None
        boundary, aside = self._boundary, []
        boundary.is_mean = False
        for place in places:
            given = Given.WRITTEN if overwriting else Given.ADDED
            if place in boundary.arrived:
                self._comes_again(place, overwriting)
                if any(place in unit for unit in self._units.early[: boundary.started]):
                    given = Given.UNUSABLE
            boundary.arrived.add(place)
            boundary.given[place] = max(given, boundary.given.get(place, Given.NOTHING))
            if overwriting:
                boundary.old.pop(place, None)
                self._reducer.overwritten(place)
            elif place not in boundary.fresh:
                aside.append(place)
            boundary.fresh.add(place)
        return lambda: self._set_aside(aside)

    def _comes_again(self, place: int, overwriting: bool) -> None:
        if overwriting and not self._repeated:
            logger.warning(
                "a parameter got two gradients in one backward pass, and ZeRO-3 keeps the last one only, in stock "
                "DeepSpeed too: its weights are shared with or between reentrant activation checkpoints. %s",
                USE_NON_REENTRANT,
            )
        self._repeated.add(place)

    def refuse(self, key: int) -> None:
        """Note a gradient that cannot be used, so that all replicas raise an error when they look.

        Raises:
            MicsUsageError: at once, where there is one replica only.
        """
        self._boundary.given[self._place[key]] = Given.UNUSABLE
        if self._replication is None:
            self.refuse_unusable([Given.UNUSABLE])

    @property
    def _is_last_pass(self) -> bool:
        """Return whether this pass is the last one before the step, as far as the last step tells."""
        return self._boundary.passes + 1 >= self._passes_per_step

    # ---------------------------------------------------------------------------------------- hop 2

    @property
    def is_mean(self) -> bool:
        """Return whether every shard is the mean over all ranks. The same on all replicas."""
        return self._boundary.is_mean

    @property
    def flags(self) -> torch.Tensor | None:
        """(parameters,), on the device: for :meth:`look`, whenever the host waits for the device anyway."""
        return self._boundary.flags

    def mean(self, key: int) -> torch.Tensor:
        """Return the mean of a shard, or this replica's slice of that, as hop 2 leaves it: 1-D and live."""
        return self._mean(self._place[key])

    def _mean(self, place: int) -> torch.Tensor:
        return self._reducer.mean(range(place, place + 1))

    def residuals(self) -> dict[str, torch.Tensor]:
        """Return what hop 2 has rounded off so far, by name: 1-D and live. See :mod:`mics_ds.zero.replica_wire`."""
        return self._reducer.residuals()

    def end_pass(self, last: bool) -> bool:
        """End a backward pass, and do hop 2 if it was the last one before the step, as far as can be known.

        Args:
            last: whether it ends the accumulation. Several passes may, before one step.

        Returns:
            Whether hop 2 has run.
        """
        self._hop1.drain()
        boundary = self._boundary
        was_last = last and self._is_last_pass
        boundary.passes += last
        boundary.arrived.clear()
        if self._replication is not None:
            boundary.is_mean = False  # also where only another replica got gradients
        return was_last and self.average()

    def average(self) -> bool:
        """Do hop 2, or what is left of it, and let the caller's stream or thread wait for it.

        Returns:
            Whether there was anything to do.
        """
        self._hop1.drain()
        boundary, places = self._boundary, range(len(self._place))
        if boundary.is_mean or self._replication is None:
            return False
        stale = [place for place in places if place not in boundary.fresh]
        self._set_aside(stale)
        boundary.fresh.update(stale)
        leave_alone = self._reducer.protect([place for place in places if place not in boundary.given])
        for unit in self._units.early[boundary.started :]:
            self._start(unit)
        flags = self._start_flags(self._replication)
        if not self._units.early:
            # The first step of a process averages the units of all later ones: how they are cut decides about the
            # last bit of a sum, and a resumed job has to go on as if it had not been interrupted.
            self._hop2.drain()
            self._units.learn(_used(flags.tolist()))
            for unit in self._units.early:
                self._start(unit)
        for unit in self._units.late:
            self._start(unit)
        self._hop2.drain()
        boundary.flags, boundary.started, boundary.is_mean = flags, 0, True
        leave_alone(flags)
        self._add_old_means(flags)
        return True

    def look(self, given: Sequence[int]) -> set[int]:
        """Learn what the flags say. Called by all replicas at the same time, with the values of :attr:`flags`.

        Returns:
            Parameters that got a gradient on some replica since the last boundary.

        Raises:
            MicsUsageError: as :meth:`refuse_unusable`.
        """
        self._boundary.flags = None
        self.refuse_unusable(given)
        self._units.learn(_used(given))
        return {key for key, value in zip(self._place, given) if value}

    @staticmethod
    def refuse_unusable(given: Sequence[int]) -> None:
        """Raise an error if a gradient cannot be used.

        Args:
            given: the values of :attr:`flags`.

        Raises:
            MicsUsageError: this replica, or another one, got a gradient that cannot be used.
        """
        if Given.UNUSABLE in given:
            raise MicsUsageError(
                f"ZeRO-3 takes one gradient per parameter in a backward pass, but on some rank a parameter got a "
                f"second one before the first had been stored, or after it had been averaged: its weights are shared "
                f"with or between reentrant activation checkpoints. Stock DeepSpeed stops with an assertion, or loses "
                f"one of them. {USE_NON_REENTRANT}"
            )

    def replaced(self, key: int) -> None:
        """Note that all replicas have set a shard and its mean to one value."""
        place = self._place[key]
        self._boundary.given[place] = Given.WRITTEN
        self._boundary.fresh.add(place)
        self._boundary.old.pop(place, None)
        self._reducer.replaced(place)

    def next_boundary(self, *, discarded: bool = False) -> None:
        """Begin a new accumulation: the gradients of this one were used, or discarded.

        Raises:
            MicsUsageError: as :meth:`look`.
        """
        if self._boundary.flags is not None:  # the step was skipped, so nobody has looked
            self.look(self._boundary.flags.tolist())
        self._passes_per_step = max(1, self._boundary.passes)
        self._boundary = _Boundary(self._units.used)
        self._reducer.end_step(discarded=discarded)

    @property
    def used(self) -> list[int]:
        """Parameters that replicas have used since the start, by place, on which the cut of units depends."""
        return sorted(self._units.used)

    def restart(self, used: Iterable[int] | None = None) -> None:
        """Begin a new accumulation without gradients and old means, as all replicas do where their number changes.

        Args:
            used: parameters that replicas have used, by place. By default those before this accumulation.
        """
        self._units.reset(self._boundary.used_before if used is None else used)
        self._boundary = _Boundary(self._units.used)
        self._reducer.shards.buffer().zero_()
        self._reducer.end_step(discarded=True)

    def _start(self, unit: range, after: Handle[None] | None = None) -> None:
        """Start hop 2 on a unit, once what it is ``after`` is done."""
        for task in self._reducer.tasks(unit):
            self._hop2.submit(task if after is None else _following(after, task))

    # ------------------------------------------------------------------- replicas that do different things

    def _set_aside(self, places: Iterable[int]) -> None:
        for place in places:
            self._boundary.old[place] = self._mean(place).clone()
            self._reducer.shards.at(range(place, place + 1)).zero_()

    def _add_old_means(self, flags: torch.Tensor) -> None:
        """Add old means again where no replica has written over them, see [Note: old means]."""
        old_means = self._boundary.old
        if old_means:
            device = next(iter(old_means.values())).device
            written = (flags if flags.device == device else flags.to(device)) >= Given.WRITTEN
            for place, old in old_means.items():
                # Computed where it is, so that the host need not wait.
                self._mean(place).add_(torch.where(written[place], torch.zeros_like(old), old))
        if not self._reducer.keeps_partials:
            old_means.clear()

    def _start_flags(self, replication: Replication) -> torch.Tensor:
        """Ask what the other replicas did with each shard."""
        given = [int(self._boundary.given.get(place, Given.NOTHING)) for place in range(len(self._place))]
        flags = torch.empty(len(given), dtype=torch.uint8, device=self._reducer.shards.device)
        start = 0
        for value, run in groupby(given):  # filled there: a copy from the host would have to wait for it
            end = start + sum(1 for _ in run)
            flags[start:end].fill_(value)
            start = end

        def agree(memory: Memory) -> Handle[torch.Tensor]:
            memory.record_stream(flags)
            return replication.start_max_(flags, "gradients at hand")

        self._hop2.submit(agree)
        return flags


def _used(given: Sequence[int]) -> list[int]:
    """Return the places of parameters that got a gradient on some replica."""
    return [place for place, value in enumerate(given) if value]


def _following(first: Handle[None], task: Task[None]) -> Task[None]:
    def run(memory: Memory) -> Handle[None]:
        first.wait()
        return task(memory)

    return run
