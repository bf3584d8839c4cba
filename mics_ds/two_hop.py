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
the last micro-step it follows hop 1 bucket by bucket, beside the backward pass of earlier layers. What
is left (parameters that got gradients only in earlier micro-steps, or everything, where only ``step``
knows the boundary) is swept up before norms are taken. Together that is the whole buffer, every element
once.

[Note: phases of a shard]

    | phase     | meaning                                        | what may come next                        |
    |-----------|------------------------------------------------|-------------------------------------------|
    | MEAN      | the mean over all ranks, equal on all replicas | PARTIAL (hop 1), AVERAGING (the sweep)    |
    | PARTIAL   | hop 1 has added to it since                    | PARTIAL (hop 1 again), AVERAGING          |
    | AVERAGING | hop 2 is under way; nobody may touch it        | MEAN (waited for)                         |

A mean may be repeated: averaging what is equal on all replicas changes nothing, and adding a partial gradient to
a mean and averaging once more gives the mean of the sum. Two decisions rest on that. The sweep averages *every* shard
that is not AVERAGING, so that replicas which used different parameters still issue the same collectives. And a shard
whose hop 2 was early, because somebody read it or because a bucket turned out not to be its last, simply becomes
PARTIAL again.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from .comm import collectives
from .comm.groups import RankGroup
from .comm.lanes import Lane


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
    the first time would have to be done again, so from then on it waits for the sweep."""

    def move(self, phase: Phase) -> None:
        assert (self.phase, phase) in LEGAL_TRANSITIONS, f"a gradient shard cannot go from {self.phase} to {phase}"
        self.phase = phase


class TwoHop:
    """Both hops over one flat buffer of gradient shards. Knows neither DeepSpeed nor modules.

    Hop 1 runs on a lane, and so does the early hop 2, in the order in which buckets were handed over. All other
    methods drain the lane first. Where there is one replica only, hop 2 does nothing.

    Args:
        ranges: for each parameter, by an id that all ranks share, where its shard lies in the buffer.
        buffer: returns the buffer, 1-D. Asked every time, because its owner may replace it.
        replication: the group of hop 2, ``None`` for one replica.
        lane: where hop 1 runs.
        device: where collectives of ``replication`` can work. A buffer elsewhere is copied there and back.
    """

    def __init__(
        self,
        ranges: Mapping[int, tuple[int, int]],
        buffer: Callable[[], torch.Tensor],
        replication: RankGroup | None,
        lane: Lane,
        device: torch.device,
    ) -> None:
        self.shards = {key: GradientShard(start, end) for key, (start, end) in ranges.items()}
        self._buffer = buffer
        self._replication = replication
        self._lane = lane
        self._device = device

    # ---------------------------------------------------------------------------------------- hop 1

    def reduce(
        self,
        ids: list[int],
        hop1: Callable[[], None],
        *,
        nbytes: int,
        beside: bool,
        last: bool,
    ) -> None:
        """Hand one bucket over to the lane.

        Args:
            ids: the parameters in it.
            hop1: reduces the bucket and adds the result to the shards; has to call :meth:`added`.
            nbytes: what ``hop1`` holds until it is done.
            beside: whether this may return before it is done.
            last: whether this micro-step ends the accumulation, so that hop 2 may follow at once.
        """

        def work() -> None:
            self._before_adding(ids)
            hop1()
            if last:
                self._start_averaging(key for key in ids if not self.shards[key].comes_twice)

        self._lane.submit(work, self._device, nbytes=nbytes, beside=beside)

    def _before_adding(self, ids: Iterable[int]) -> None:
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
        """Return once every bucket of this backward pass has been stored. Raises what failed on the lane."""
        self._lane.drain()
        for shard in self.shards.values():
            shard.reduced = False

    # ---------------------------------------------------------------------------------------- hop 2

    @property
    def changed(self) -> set[int]:
        """Parameters whose shards hop 1 has added to since the last boundary."""
        return {key for key, shard in self.shards.items() if shard.changed}

    @property
    def is_partial(self) -> bool:
        """Whether some shard is not the mean over all ranks yet."""
        return self._replication is not None and any(shard.phase is not Phase.MEAN for shard in self.shards.values())

    def complete(self) -> None:
        """Finish both hops. Afterwards every shard is the mean over all ranks, bitwise equal on all replicas.

        Collective over the replication group if :attr:`is_partial`. All ranks reach the places where it is called,
        and all had gradients or none had, so they agree on that.
        """
        self.finish_hop1()
        if not self.is_partial:
            return
        assert self._replication is not None
        if self._buffer().device == self._device:
            self._start_averaging(key for key, shard in self.shards.items() if shard.phase is not Phase.AVERAGING)
        else:
            # Offloaded shards live in host memory, where only gloo could reduce them.
            on_device = self._buffer().to(self._device)
            for shard in self.shards.values():
                shard.move(Phase.AVERAGING)
            collectives.average_over_replicas_(on_device, self._replication)
            self._buffer().copy_(on_device)
        for shard in self.shards.values():
            self._finish_averaging(shard)

    def next_boundary(self) -> None:
        """The gradients of this boundary were used; what comes now is for the next one."""
        for shard in self.shards.values():
            shard.changed = False

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


def _neighbours(shards: list[GradientShard]) -> list[list[GradientShard]]:
    """Group shards that touch each other in the buffer, in ascending order."""
    runs: list[list[GradientShard]] = []
    for shard in sorted(shards, key=lambda item: (item.start, item.end)):
        if runs and runs[-1][-1].end == shard.start:
            runs[-1].append(shard)
        else:
            runs.append([shard])
    return runs
