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

Hop 1, a reduce-scatter on the partition group, leaves a *partial gradient*, the mean over p ranks, in
one flat buffer per rank. Hop 2 averages that buffer over the replication group, once per boundary. In
the last micro-step it follows hop 1 unit by unit, beside the backward pass of earlier layers. What is
left (parameters that got gradients only in earlier micro-steps, or everything, where only ``step``
knows the boundary) is averaged when the pass ends, or before the step. Together that is the whole
buffer, every element once.

[Note: units]

Replicas need not fill the same buckets: one of them may skip a module (a text-only batch, an expert that nobody was
sent to), or get its gradients in another order. But collectives of the replication group have to be the same on all
replicas. So hop 2 works in *units*, sets of shards that the replicas agree on once, after the first boundary: the
buckets of the first replica, in the order in which they came, and last a unit with whatever did not come. They are
always averaged in that order, each as soon as those before it are and every shard in it is final. A replica that
does something else is late with them, and never different.

A replica that had no gradient for a shard still holds the mean of the boundary before. It contributes zero instead.
If *no* replica had one, everybody keeps that old mean, as stock ZeRO-3 does. A small all-reduce of flags tells which,
just before the last unit.

[Note: phases of a shard]

    | phase     | meaning                                        | what may come next                        |
    |-----------|------------------------------------------------|-------------------------------------------|
    | MEAN      | the mean over all ranks, equal on all replicas | PARTIAL (hop 1), AVERAGING                |
    | PARTIAL   | hop 1 has added to it since                    | PARTIAL (hop 1 again), AVERAGING          |
    | AVERAGING | hop 2 is under way; nobody may touch it        | MEAN (waited for)                         |

A mean may be repeated: averaging what is equal on all replicas changes nothing, and adding a partial gradient to
a mean and averaging once more gives the mean of the sum. So a shard whose hop 2 was early, because somebody read it or
because it got another gradient after all, simply becomes PARTIAL again.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from .comm import collectives
from .comm.groups import RankGroup
from .comm.lanes import Lane, Stages


class Phase(enum.Enum):
    """See [Note: phases of a shard]."""

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


@dataclass
class GradientShard:
    """This rank's shard of one parameter's gradient."""

    start: int
    end: int
    """Where it lies in the buffer: elements [start, end)."""
    phase: Phase = Phase.MEAN
    average: collectives.ReplicaAverage | None = None
    """Hop 2, while AVERAGING. Neighbours in the buffer share one."""
    changed: bool = False
    """Whether hop 1 has added to it since the last boundary."""
    reduced: bool = False
    """Whether it went through hop 1 in this backward pass."""
    comes_twice: bool = False
    """Whether it ever did so twice in one pass: tied parameters under reentrant checkpointing. An early hop 2 after
    the first time would have to be done again, so from then on it waits for the end of the pass."""
    before: torch.Tensor | None = None
    """The old mean, where this rank had no gradient to add to it and contributes zero."""

    def move(self, phase: Phase) -> None:
        assert (self.phase, phase) in LEGAL_TRANSITIONS, f"a gradient shard cannot go from {self.phase} to {phase}"
        self.phase = phase


class TwoHop:
    """Both hops over one flat buffer of gradient shards. Knows neither DeepSpeed nor modules.

    Hop 1 runs on a lane, and so does the early hop 2, in the order in which buckets were handed over. All other
    methods drain the lane first. Where there is one replica only, hop 2 does nothing.

    All ranks of the replication group call :meth:`end_of_pass`, :meth:`complete` and :meth:`next_boundary` in the same
    order, with the same arguments.

    Args:
        ranges: for each parameter, by an id that all ranks share, where its shard lies in the buffer.
        buffer: returns the buffer, 1-D. Asked every time, because its owner may replace it.
        replication: the group of hop 2, ``None`` for one replica.
        lane: where hop 1 runs.
        device: where collectives of ``replication`` can work. A buffer elsewhere is copied there and back, in parts of
            at most ``part`` elements.
    """

    def __init__(
        self,
        ranges: Mapping[int, tuple[int, int]],
        buffer: Callable[[], torch.Tensor],
        replication: RankGroup | None,
        lane: Lane,
        device: torch.device,
        part: int = 1 << 24,
    ) -> None:
        self.shards = {key: GradientShard(start, end) for key, (start, end) in ranges.items()}
        self._buffer = buffer
        self._replication = replication
        self._lane = lane
        self._device = device
        self._part = max(1, part)
        self._units: list[list[int]] | None = None
        """See [Note: units]. None until the first boundary."""
        self._started = 0
        """How many of them hop 2 was started for."""
        self._arrivals: dict[int, int] = {}
        """Before there are units: for each parameter, the number of the bucket it came in first."""
        self._buckets = 0
        self._passes = 0
        """Backward passes since gradients were last complete."""
        self._last_passes = 0
        """Those among them since the last boundary that might have been the last one before the step."""
        self._expected_passes = 1
        """How many of those the last boundary had: a step may follow several backward passes."""
        self._flags: collectives.Maximum | None = None

    # ---------------------------------------------------------------------------------------- hop 1

    def reduce(
        self,
        ids: list[int],
        hop1: Callable[[Stages], None],
        *,
        nbytes: int,
        beside: bool,
        last: bool,
    ) -> None:
        """Hand one bucket over to the lane.

        Args:
            ids: the parameters in it.
            hop1: reduces the bucket in the first stage and adds the result to the shards in the second; has to call
                :meth:`added`.
            nbytes: what ``hop1`` holds until it is done.
            beside: whether this may return before it is done.
            last: whether this micro-step ends the accumulation, so that hop 2 may follow at once.
        """
        starts_hop2 = last and self._is_last_pass

        def work(stages: Stages) -> None:
            with stages.second():
                self._before_adding(ids)
            hop1(stages)
            if starts_hop2:
                with stages.second():
                    self._start_ready_units()

        self._lane.submit(work, nbytes=nbytes, beside=beside)

    def _before_adding(self, ids: Iterable[int]) -> None:
        if self._units is None:
            for key in ids:
                self._arrivals.setdefault(key, self._buckets)
            self._buckets += 1
        for key in ids:
            shard = self.shards[key]
            shard.comes_twice |= shard.reduced
            shard.reduced = True
            self._finish_averaging(shard)

    def added(self, ids: Iterable[int]) -> None:
        """Partial gradients were written or added to these shards, by :meth:`reduce` or by somebody else."""
        for key in ids:
            shard = self.shards[key]
            shard.move(Phase.PARTIAL)
            shard.changed = True

    def finish_hop1(self) -> None:
        """Let the caller's stream or thread wait until every bucket of this backward pass has been stored.

        Raises what failed on the lane.
        """
        self._lane.drain()
        for shard in self.shards.values():
            shard.reduced = False

    # ---------------------------------------------------------------------------------------- hop 2

    @property
    def changed(self) -> set[int]:
        """Parameters whose gradient somebody has added to since the last boundary: after :meth:`complete`, on any
        replica."""
        return {key for key, shard in self.shards.items() if shard.changed}

    @property
    def is_partial(self) -> bool:
        """Whether some shard is not the mean over all ranks yet."""
        if self._replication is None:
            return False
        return self._passes > 0 or any(shard.phase is not Phase.MEAN for shard in self.shards.values())

    def end_of_pass(self, last: bool) -> None:
        """A backward pass has ended.

        Args:
            last: whether it ends the accumulation. Then it completes hop 2, unless the last boundary had more passes
                than this one has had so far.
        """
        self.finish_hop1()
        is_last = last and self._is_last_pass
        self._passes += 1
        self._last_passes += last
        if is_last:
            self.complete()

    def complete(self) -> None:
        """Finish both hops. Afterwards every shard is the mean over all ranks, bitwise equal on all replicas.

        Collective over the replication group if :attr:`is_partial`. All ranks reach the places where it is called.
        """
        self.finish_hop1()
        if not self.is_partial:
            return
        assert self._replication is not None
        if self._on_device:
            self._start_all_units()
            # What came again after its unit was started, and was not known to come twice.
            self._start_averaging(key for key, shard in self.shards.items() if shard.phase is Phase.PARTIAL)
        else:
            self._start_flags()
            self._average_by_way_of_device(self._replication)
        for shard in self.shards.values():
            self._finish_averaging(shard)
        self._keep_old_means()
        self._started = self._passes = 0

    def next_boundary(self) -> None:
        """The gradients of this boundary were used; what comes now is for the next one.

        The first time, collective over the replication group.
        """
        for shard in self.shards.values():
            shard.changed = False
        self._expected_passes, self._last_passes = max(1, self._last_passes), 0
        if self._units is None and self._buckets and self._replication is not None:
            self._agree_on_units(self._replication)

    @property
    def _is_last_pass(self) -> bool:
        return self._last_passes + 1 >= self._expected_passes

    @property
    def _on_device(self) -> bool:
        return self._buffer().device == self._device

    def _start_ready_units(self) -> None:
        """Start hop 2 on the units whose turn it is and whose shards are all final; never on the last."""
        while self._units is not None and self._started < len(self._units) - 1:
            shards = [self.shards[key] for key in self._units[self._started]]
            if not all(shard.reduced and not shard.comes_twice for shard in shards):
                return
            self._start_averaging(self._units[self._started])
            self._started += 1

    def _start_all_units(self) -> None:
        units = [list(self.shards)] if self._units is None else self._units
        while self._started < len(units):
            if self._started == len(units) - 1:
                self._start_flags()
            self._contribute_zero(units[self._started])
            self._start_averaging(units[self._started])
            self._started += 1

    def _start_averaging(self, ids: Iterable[int]) -> None:
        """Start hop 2 on these shards, in one collective where they are neighbours in the buffer."""
        if self._replication is None:
            return
        for run in _neighbours([self.shards[key] for key in ids]):
            part = self._buffer()[run[0].start : run[-1].end]
            average = collectives.ReplicaAverage(part, self._replication)
            for shard in run:
                shard.move(Phase.AVERAGING)
                shard.average = average

    @staticmethod
    def _finish_averaging(shard: GradientShard) -> None:
        """Wait for hop 2 on this shard, if it is under way."""
        if shard.phase is Phase.AVERAGING:
            if shard.average is not None:
                shard.average.wait()
            shard.average = None
            shard.move(Phase.MEAN)

    def _average_by_way_of_device(self, replication: RankGroup) -> None:
        """Hop 2 on shards in host memory, where only gloo could reduce them. One part is copied while another is
        averaged, and no more than two are on the device."""
        self._contribute_zero(self.shards)
        for shard in self.shards.values():
            shard.move(Phase.AVERAGING)
        on_its_way: tuple[torch.Tensor, torch.Tensor, collectives.ReplicaAverage] | None = None
        for part in [*self._buffer().split(self._part), None]:
            previous = on_its_way
            if part is not None:
                on_device = part.to(self._device, non_blocking=True)
                on_its_way = part, on_device, collectives.ReplicaAverage(on_device, replication)
            if previous is not None:
                previous[2].wait()
                previous[0].copy_(previous[1])

    # ------------------------------------------------------------------- replicas that do different things

    def _start_flags(self) -> None:
        """Ask which shards somebody had a gradient for."""
        assert self._replication is not None
        if self._flags is None:
            flags = torch.tensor([shard.changed for shard in self.shards.values()], dtype=torch.uint8)
            self._flags = collectives.Maximum(flags.to(self._device), self._replication, "gradients at hand")

    def _contribute_zero(self, ids: Iterable[int]) -> None:
        for shard in (self.shards[key] for key in ids):
            if not shard.changed:
                mine = self._buffer()[shard.start : shard.end]
                shard.before = mine.clone()
                mine.zero_()

    def _keep_old_means(self) -> None:
        """Where no replica had a gradient, what was there before stays."""
        assert self._flags is not None, "started with the last unit"
        flags, self._flags = self._flags, None
        flags.wait()
        if all(shard.before is None for shard in self.shards.values()):
            return  # without a look at the flags, for which the host would have to wait
        for shard, flag in zip(self.shards.values(), flags.tensor.tolist()):
            if shard.before is not None and not flag:
                self._buffer()[shard.start : shard.end].copy_(shard.before)
            shard.before = None
            shard.changed |= bool(flag)

    def _agree_on_units(self, replication: RankGroup) -> None:
        """Take the first replica's buckets for units. One small broadcast, once."""
        last = self._buckets
        numbers = torch.tensor([self._arrivals.get(key, last) for key in self.shards], dtype=torch.int64)
        last_number = torch.tensor([last], dtype=torch.int64)
        agreed = torch.cat([numbers, last_number]).to(self._device)
        collectives.broadcast_([agreed], 0, replication)
        *mine, end = agreed.tolist()
        units: list[list[int]] = [[] for _ in range(end + 1)]
        for key, number in zip(self.shards, mine):
            units[number].append(key)
        self._units = [*(unit for unit in units[:-1] if unit), units[-1]]


def _neighbours(shards: list[GradientShard]) -> list[list[GradientShard]]:
    """Group shards that touch each other in the buffer, in ascending order."""
    runs: list[list[GradientShard]] = []
    for shard in sorted(shards, key=lambda item: (item.start, item.end)):
        if runs and runs[-1][-1].end == shard.start:
            runs[-1].append(shard)
        else:
            runs.append([shard])
    return runs
