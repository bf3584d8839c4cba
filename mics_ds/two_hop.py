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
the last micro-step it follows hop 1 unit by unit, beside the backward pass of earlier layers; what is
left is started when that pass ends, and the caller's stream or thread waits for it there: whoever reads
gradients after backward() finds means. Where the boundary is known to the step only, everything is averaged
at that time. Either way that is the whole buffer, every element once.

[Note: units]

Replicas need not fill the same buckets: one of them may skip a module (a text-only batch, an expert that nobody was
sent to), or get its gradients in another order. But collectives of the replication group have to be the same on all
replicas. So hop 2 works in *units*, sets of shards that the replicas agree on: the buckets of the first replica, in
the order in which they came, and last a unit with whatever did not come. They agree at the end of the first pass that
ends an accumulation (before its hop 2, because bits may depend on what is averaged in one collective, and a run that
was resumed shall have those of one that was not), and anew after the second boundary, the fourth and so on, because
modules may be frozen, or used at last. Units are always averaged in that order, each as soon as those before it are and
every shard in it is final. A replica that does something else is late with them, and never different.

[Note: old means]

Gradients overwrite a shard in the first micro-step of a boundary and are added to it in later ones. So in stock
ZeRO-3 a parameter without a gradient in the first one adds to the mean of the boundary before, and one that gets none
keeps that mean. Replicas see the same only together: if one of them overwrites, the old mean must be gone on all, and
if none does, it counts once. So each replica averages only what is new, and keeps an old mean aside where it did not
overwrite it. A small all-reduce of flags, just before the last unit, tells whether some replica did.

[Note: phases of a shard]

    | phase     | meaning                                        | what may come next                        |
    |-----------|------------------------------------------------|-------------------------------------------|
    | MEAN      | the mean over all ranks, equal on all replicas | PARTIAL (hop 1), AVERAGING                |
    | PARTIAL   | hop 1 has added to it since                    | PARTIAL (hop 1 again), AVERAGING          |
    | AVERAGING | hop 2 is under way; nobody may touch it        | MEAN (waited for)                         |

A mean may be repeated: averaging what is equal on all replicas changes nothing, and adding a partial gradient to
a mean and averaging once more gives the mean of the sum. So a shard whose hop 2 was early, because somebody read it or
because it got another gradient after all, simply becomes PARTIAL again. If that happens within one pass on one replica
only, the others have to know: the flags say so too, and :meth:`TwoHop.settle` averages once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import groupby

import torch

from .comm import collectives
from .comm.groups import RankGroup
from .comm.lanes import Lane, Stages
from .hop2 import Given, GradientShard, InPlace, Means, Phase
from .repeats import Lost, Repeats


class TwoHop:
    """Both hops over one flat buffer of gradient shards. Knows neither DeepSpeed nor modules.

    Hop 1 runs on a lane, and so does the early hop 2, in the order in which buckets were handed over. All other
    methods drain the lane first. Where there is one replica only, hop 2 does nothing.

    All ranks of the replication group call :meth:`end_of_pass`, :meth:`complete`, :meth:`complete_for_step`,
    :meth:`settle` and :meth:`next_boundary` in the same order, with the same arguments.

    Args:
        ranges: for each parameter, by an id that all ranks share, where its shard lies in the buffer.
        buffer: returns the buffer, 1-D. Asked every time, because its owner may replace it.
        replication: the group of hop 2, ``None`` for one replica.
        lane: where hop 1 runs.
        device: where collectives of ``replication`` can work. A buffer elsewhere is copied there and back, in parts of
            at most ``part`` elements, two of them at a time.
        early: whether hop 2 may start before it has to be complete.
        means: how hop 2 is done; by default in place.
    """

    def __init__(
        self,
        ranges: Mapping[int, tuple[int, int]],
        buffer: Callable[[], torch.Tensor],
        replication: RankGroup | None,
        lane: Lane,
        device: torch.device,
        *,
        early: bool = True,
        part: int = 1 << 24,
        means: Means | None = None,
    ) -> None:
        self.shards = {key: GradientShard(start, end) for key, (start, end) in ranges.items()}
        self._buffer = buffer
        self._replication = replication
        self._lane = lane
        self._device = device
        self._early = early and replication is not None
        self._means = means
        if means is None and replication is not None:
            self._means = InPlace(buffer, replication, device, part)
        self._units: list[list[int]] | None = None
        """See [Note: units]. None until they are agreed on, or for good where hop 2 never starts early."""
        self._started = 0
        """How many of them hop 2 was started for."""
        self._arrivals: list[list[int]] = []
        """The parameters of this pass, bucket by bucket."""
        self._order: list[list[int]] = []
        """The same of the last pass that ended the accumulation."""
        self._boundaries = 0
        self._passes = 0
        """Backward passes since gradients were last complete."""
        self._last_passes = 0
        """Those since the last boundary that might have been the last one before the step."""
        self._passes_before = [1, 1]
        """How many of those the last two boundaries had: a step may follow several backward passes."""
        self._completed = False
        """Whether gradients were complete after the last pass of this boundary."""
        self._again = False
        """Whether a shard got another gradient in the pass in which its hop 2 had started."""
        self.repeats = Repeats()
        self._flags: collectives.Maximum | None = None
        self._said: torch.Tensor | None = None
        """What the flags of the last hop 2 said, until the host has looked at it."""

    # ---------------------------------------------------------------------------------------- hop 1

    def reduce(self, hop1: Callable[[Stages], None], *, nbytes: int, beside: bool, last: bool) -> None:
        """Hand one bucket over to the lane.

        Args:
            hop1: reduces the bucket in the first stage and adds the result to the shards in the second, between
                :meth:`adding` and :meth:`added`.
            nbytes: what ``hop1`` holds until it is done.
            beside: whether this may return before it is done.
            last: whether this micro-step ends the accumulation, so that hop 2 may follow at once.
        """
        starts_hop2 = self._early and last and self._is_last_pass

        def work(stages: Stages) -> None:
            hop1(stages)
            if starts_hop2:
                with stages.second():
                    self._start_ready_units()

        self._lane.submit(work, nbytes=nbytes, beside=beside)

    def adding(self, ids: list[int], *, overwriting: bool) -> None:
        """Partial gradients of one bucket are about to be added to these shards, or written over them."""
        self._learn_from_earlier_pass()
        self._arrivals.append(ids)
        for shard in (self.shards[key] for key in ids):
            shard.comes_twice |= shard.reduced
            shard.reduced = True
            self._again |= shard.phase is Phase.AVERAGING
            self._finish_averaging(shard)
            if overwriting:
                shard.given, shard.old = Given.WRITTEN, None
            elif shard.given is Given.NOTHING:
                shard.given = Given.ADDED
                self._set_aside(shard)

    def added(self, ids: Iterable[int]) -> None:
        """Partial gradients were added to these shards."""
        for key in ids:
            self.shards[key].move(Phase.PARTIAL)

    def finish_hop1(self) -> None:
        """Let the caller's stream or thread wait until every bucket of this backward pass has been stored.

        Raises what failed on the lane.
        """
        self._lane.drain()

    # ---------------------------------------------------------------------------------------- hop 2

    @property
    def changed(self) -> set[int]:
        """Parameters that got a gradient since the last boundary: once gradients are settled, on any replica."""
        return {key for key, shard in self.shards.items() if shard.given is not Given.NOTHING}

    @property
    def is_partial(self) -> bool:
        """Whether some shard is not the mean over all ranks yet. The same on all replicas."""
        return self._replication is not None and self._passes > 0

    def end_of_pass(self, last: bool) -> bool:
        """A backward pass has ended. Start hop 2 if it was the last one, as far as anybody can know.

        Args:
            last: whether it ends the accumulation. Several passes may, before one step.

        Returns:
            Whether hop 2 has run. Unless somebody asks :attr:`came_again`, it may have to be done once more.
        """
        self.finish_hop1()
        for shard in self.shards.values():
            shard.reduced = False
        was_last = last and self._is_last_pass
        if last:
            self._order = self._arrivals
        self._arrivals = []
        self._passes += 1
        self._last_passes += last
        self._completed = False
        self._learn_from_earlier_pass()  # where this replica had no gradient in this one
        if not was_last or self._replication is None:
            return False
        if self._early and self._units is None:
            self._agree_on_units(self._replication)
        # The caller's stream or thread waits: tensors of gradients that the user holds are means from here on.
        self._hop2()
        return True

    def complete(self) -> bool:
        """Finish both hops, for a reader. Afterwards every shard is the mean over all ranks, bitwise equal on all
        replicas. Returns whether there was anything to do."""
        self.finish_hop1()
        if not self.is_partial:
            return False
        if self._said is None:
            self._hop2()
        self.settle(self._look())
        return True

    def complete_alone(self) -> bool:
        """Return whether gradients are means over all ranks, for one rank that reads by itself.

        They are, if hop 2 ran after the last backward pass, and no replica got a gradient after its hop 2 had started.
        """
        self.finish_hop1()
        if self.is_partial and self._said is not None and not self.came_again.item():
            self.settle(self._look())
        return not self.is_partial

    def complete_for_step(self, *, look: bool) -> bool:
        """The same, before a step.

        Args:
            look: whether the host waits to learn what other replicas did. Otherwise somebody has to look at
                :attr:`came_again` before gradients are used, and to call :meth:`settle`; and :attr:`changed` speaks of
                this replica only.
        """
        self.finish_hop1()
        if self._replication is None or self._completed:
            return False
        if self._said is None:
            self._hop2()
        if look:
            self.settle(self._look())
        return True

    def mean(self, key: int) -> torch.Tensor:
        """What hop 2 has made of a shard, or makes: its mean, or this replica's slice of that. 1-D and live."""
        shard = self.shards[key]
        return self._buffer()[shard.start : shard.end] if self._means is None else self._means.of(shard)

    def replaced(self, key: int) -> None:
        """All replicas have set both gradient and mean of a shard to one value, whatever they were before."""
        self.shards[key].given, self.shards[key].old = Given.WRITTEN, None

    @property
    def came_again(self) -> torch.Tensor:
        """(1,), on the device: not 0 if on some replica a shard got another gradient after its hop 2 had started, or
        lost one."""
        return torch.zeros(1, device=self._device) if self._said is None else self._said[-2:].amax(0, keepdim=True)

    def settle(self, again: bool) -> None:
        """:attr:`came_again` was looked at. Average once more if that is what it said."""
        if again and (self._said is None or self._look()):
            self._hop2()
            self._look()
        self._said = None
        self._completed, self._passes = True, 0

    def next_boundary(self) -> None:
        """The gradients of this boundary were used, or not; what comes now is for the next one."""
        if self._replication is None:
            return
        if self._said is not None:  # nobody has asked, so they were not used
            self.settle(self._look())
        for shard in self.shards.values():
            shard.given, shard.old = Given.NOTHING, None
        self.repeats.next_boundary()
        self._passes_before = [self._passes_before[-1], max(1, self._last_passes)]
        self._last_passes, self._completed = 0, False
        self._boundaries += 1
        power_of_two = self._boundaries > 1 and self._boundaries & (self._boundaries - 1) == 0
        if power_of_two and self._units is not None:
            self._agree_on_units(self._replication)

    @property
    def _is_last_pass(self) -> bool:
        return self._last_passes + 1 >= max(self._passes_before)

    @property
    def _on_device(self) -> bool:
        return self._buffer().device == self._device

    def _hop2(self) -> None:
        """All of hop 2, or what is left of it."""
        assert self._replication is not None
        if self._on_device:
            self._start_all_units()
        else:
            self._start_flags(self._replication)
            self._contribute_nothing(self.shards.values())
            for shard in self.shards.values():
                shard.move(Phase.AVERAGING)
            self._how.by_way_of_device(self.shards.values())
        self._finish_hop2()

    def _learn_from_earlier_pass(self) -> None:
        """If hop 2 was started after one, that was not the last after all."""
        if self._said is not None:
            self._look()

    def _start_ready_units(self) -> None:
        """Start hop 2 on the units whose turn it is and whose shards are all final; never on the last."""
        while self._units is not None and self._started < len(self._units) - 1:
            shards = [self.shards[key] for key in self._units[self._started]]
            if not all(shard.reduced and not shard.comes_twice for shard in shards):
                return
            self._start_averaging(shards)
            self._started += 1

    def _start_all_units(self) -> None:
        assert self._replication is not None
        units = [list(self.shards)] if self._units is None else self._units
        while self._started < len(units):
            if self._started == len(units) - 1:
                self._start_flags(self._replication)
            shards = [self.shards[key] for key in units[self._started]]
            self._contribute_nothing(shards)
            self._start_averaging(shards)
            self._started += 1

    def _start_averaging(self, shards: list[GradientShard]) -> None:
        """Start hop 2 on these shards."""
        for shard in shards:
            shard.move(Phase.AVERAGING)
        self._how.start(shards)

    @property
    def _how(self) -> Means:
        assert self._means is not None, "there are replicas"
        return self._means

    @staticmethod
    def _finish_averaging(shard: GradientShard) -> None:
        """Wait for hop 2 on this shard, if it is under way."""
        if shard.phase is Phase.AVERAGING:
            if shard.average is not None:
                shard.average.wait()
            shard.average = None
            shard.move(Phase.MEAN)

    def _finish_hop2(self) -> None:
        """Wait for all that was started. Where no replica has written over an old mean, add it again."""
        for shard in self.shards.values():
            self._finish_averaging(shard)
        assert self._flags is not None, "started with the last unit"
        self._flags.wait()
        self._said, self._flags = self._flags.tensor, None
        self._started = 0
        said = self._said if self._on_device else self._said.cpu()
        for place, shard in enumerate(self.shards.values()):
            if shard.old is not None:
                counts = said[place] < Given.WRITTEN  # where it is, so that the host need not wait
                self._how.of(shard).add_(torch.where(counts, shard.old, torch.zeros_like(shard.old)))
                if self._on_device:
                    self._lane.used(shard.old)
                if not self._how.keeps_partials:
                    shard.old = None
        self._lane.used(self._said)

    # ------------------------------------------------------------------- replicas that do different things

    def _set_aside(self, shard: GradientShard) -> None:
        if self._replication is not None and shard.old is None:
            shard.old = self._how.of(shard).clone()
            self._buffer()[shard.start : shard.end].zero_()

    def _contribute_nothing(self, shards: Iterable[GradientShard]) -> None:
        for shard in shards:
            if shard.given is Given.NOTHING:
                self._set_aside(shard)

    def _start_flags(self, replication: RankGroup) -> None:
        """Ask what the others did with each shard, and whether one of them was too early, or has lost something."""
        values = [*(int(shard.given) for shard in self.shards.values()), int(self.repeats.lost), int(self._again)]
        self._again = False
        flags = torch.empty(len(values), dtype=torch.uint8, device=self._device)
        start = 0
        for value, run in groupby(values):  # filled there: a copy from the host would have to wait for it
            end = start + sum(1 for _ in run)
            flags[start:end].fill_(value)
            start = end
        self._flags = collectives.Maximum(flags, replication, "gradients at hand")

    def _look(self) -> bool:
        """Have the host learn what the flags said. Returns whether gradients have to be averaged once more.

        Raises:
            MicsUsageError: on all replicas, if gradients were lost, see :mod:`mics_ds.repeats`.
        """
        assert self._said is not None, "hop 2 is complete"
        (*given, lost, again), self._said = self._said.tolist(), None
        for shard, value in zip(self.shards.values(), given):
            shard.given = Given(value)
        if lost:
            assert self._replication is not None, "there are replicas"
            self.repeats.judge(Lost(lost), self._replication, self._device)
        return bool(again)

    def _agree_on_units(self, replication: RankGroup) -> None:
        """Take the first replica's buckets for units. One small broadcast."""
        places = {key: place for place, ids in reversed(list(enumerate(self._order))) for key in ids}
        last = len(self._order)
        numbers = [*(places.get(key, last) for key in self.shards), last]
        agreed = torch.tensor(numbers, dtype=torch.int64).to(self._device)
        collectives.broadcast_([agreed], 0, replication)
        *numbers, last = agreed.tolist()
        units: list[list[int]] = [[] for _ in range(last + 1)]
        for key, number in zip(self.shards, numbers):
            units[number].append(key)
        self._units = [*(unit for unit in units[:-1] if unit), units[-1]]
