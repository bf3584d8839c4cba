"""Time of one optimizer step, and what it waits for.

[Note: the rules of overlap]

One rank stands for all. Its step is played event by event, as DeepSpeed's parameter coordinator and the two
hops of :mod:`mics_ds.deepspeed_compat.optimizer` would run it:

1. Modules have their turns in forward order, then backwards; a checkpointed block has its forward turns once more
   before its backward ones. Computing starts when the module's parameters have been gathered.
2. When it starts, the parameters that follow are gathered ahead in one collective: at least
   ``prefetch_bucket_size`` elements, unless ``max_live_parameters`` are there already. What is not there when
   its turn comes is gathered then, and waited for.
3. After its module's turn a parameter is released, unless the look-ahead has passed over its next use or that is
   within ``max_reuse_distance`` elements. Parameters up to ``param_persistence_threshold`` elements stay.
4. Gradients are collected until ``reduce_bucket_size`` (or the limit of MiCS) would be exceeded, then reduced
   (hop 1): beside the backward pass, one bucket after another; or, for systems and devices that cannot, while it waits.
5. Hop 2 follows hop 1 in the last micro-step, in units of a fixed size; or all of it waits for the end of that.
6. Collectives of one kind queue up behind each other, and those of different kinds behind each other where
   they need the same link (between nodes, or inside them). Links are full duplex. Computing is not slowed down by
   communication beside it.
7. Shards that are offloaded come up from the host before they are sent on.
8. The optimizer's update follows when all gradients are there: it reads and writes its states once.
9. With world-sharded optimizer states hop 2 is a reduce-scatter, and updated shards are all-gathered over the replicas
   beside the next forward pass, in buckets that whoever gathers a parameter waits for (which counts as waiting for the
   gather). Steps repeat, so that is played in the first micro-step.

Whatever a rank waits for is charged to what it waited for; a step is the sum of its parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from .machine import GroupForm, Machine
from .model import shard_numel, sliced_numel
from .turns import Visit, compute_seconds, number_parameters, visits
from .workload import OPTIMIZERS, Workload

WIRE_BYTES = {"bf16": 2.0, "int8": 1 + 4 / 256, "int4": 1 / 2 + 4 / 128}
"""Bytes of an element in hop 2, its share of a scale included."""
ENCODING_BYTES = {"bf16": 20.0, "int8": 60.0, "int4": 70.0}
"""Bytes of memory traffic for each element of a shard that is encoded, decoded and added up."""
SCALAR_BYTES = 8
"""A norm or a flag, agreed on by an all-reduce whose bytes do not matter."""


@dataclass(frozen=True)
class Scheme:
    """System that runs the job, and its settings."""

    p: int | None
    """Partition size; ``None`` for stock ZeRO-3."""
    staged_gather: bool = False
    staged_scatter: bool = False
    hop1_beside: bool = True
    """Hop 1 beside the backward pass."""
    hop2_beside: bool = True
    """Hop 2 bucket by bucket beside the last backward pass, not all at once after it."""
    prefetch: bool = True
    """Parameters are gathered ahead of use."""
    native_scatter: bool = False
    """MiCS with the backend's own reduce-scatter in one stage."""
    bucket_limit: int | None = None
    """Elements of the largest bucket, where that is less than ``reduce_bucket_size``."""
    world_states: bool = False
    """Optimizer states are sharded over all ranks, not over a partition group."""
    wire: str = "full"
    """``mics_replica_wire``."""
    secondary: bool = False
    """ZeRO++ hpZ: in the backward pass, parameters are gathered from a second copy inside the node."""

    @property
    def operation(self) -> str:
        """The collective of hop 1."""
        return "stock_reduce_scatter" if self.p is None or self.native_scatter else "reduce_scatter"

    def slices(self, n: int) -> int:
        """Return how many ranks share the masters and optimizer states of a shard."""
        return n // self.partition_size(n) if self.world_states else 1

    def partition_size(self, n: int) -> int:
        return n if self.p is None else self.p

    def bucket_size(self, configured: int) -> int:
        return configured if self.bucket_limit is None else min(configured, self.bucket_limit)


@dataclass
class StepTime:
    """Seconds of one optimizer step on one rank. The parts add up to :attr:`total`."""

    compute: float = 0.0
    gathers: float = 0.0
    """Waiting for parameters."""
    hop1: float = 0.0
    """Waiting for reduce-scatters."""
    hop2: float = 0.0
    """Waiting for the all-reduce over replicas."""
    updates: float = 0.0
    """Waiting for weights that other replicas have updated."""
    optimizer: float = 0.0
    overhead: float = 0.0
    busy: dict[str, float] = field(default_factory=dict)
    """Seconds that each kind of collective was under way, waited for or not."""
    counts: dict[str, int] = field(default_factory=dict)
    """Number of collectives of each kind."""
    live_numel: int = 0
    """Elements of parameters that are gathered or on their way, at most."""
    bucket_numel: int = 0
    """Elements of the fullest bucket of gradients, and of what each stage of its hop 1 leaves of it."""

    PARTS = ("compute", "gathers", "hop1", "hop2", "updates", "optimizer", "overhead")

    @property
    def total(self) -> float:
        return sum(getattr(self, part) for part in self.PARTS)

    @property
    def limit(self) -> str:
        """Return what limits the step: its largest part."""
        return max(self.PARTS, key=lambda part: getattr(self, part))

    def parts(self) -> dict[str, float]:
        return {part: getattr(self, part) for part in self.PARTS}


class _Cost(NamedTuple):
    whole: float
    inter: float
    intra: float
    turn: float
    """Seconds until the next collective of its kind may begin."""


class Costs:
    """Costs of the collectives of one system, by elements."""

    def __init__(self, machine: Machine, job: Workload, system: Scheme, n: int) -> None:
        p = system.partition_size(n)
        self.machine, self.job = machine, job
        self.partition = machine.partition_form(n, p)
        self.replication = machine.replication_form(n, p)
        self.world = machine.partition_form(n, n)
        self.p, self.r = p, n // p
        self.system = system
        self._cache: dict[tuple[str, int, float, GroupForm], _Cost] = {}

    def gather(self, numel: int, backward: bool = False) -> _Cost:
        if backward and self.system.secondary:
            form = self.machine.partition_form(self.p * self.r, min(self.p, self.machine.domain))
            return self._cost("all_gather", numel, self.job.itemsize, form, False)
        return self._cost("all_gather", numel, self.job.itemsize, self.partition, self.system.staged_gather)

    def scatter(self, numel: int) -> _Cost:
        return self._cost(self.system.operation, numel, self.job.itemsize, self.partition, self.system.staged_scatter)

    def average(self, numel: int) -> _Cost:
        """Hop 2 of the shards of ``numel`` elements."""
        if self.system.wire != "full":
            return self._average_encoded(-(-numel // self.p))
        itemsize = self.job.accumulation_itemsize or self.job.itemsize
        operation = "all_reduce"
        if self.system.world_states:
            operation = "stock_reduce_scatter" if self.system.native_scatter else "reduce_scatter"
        return self._cost(operation, -(-numel // self.p), itemsize, self.replication, False)

    def _average_encoded(self, numel: int) -> _Cost:
        """Hop 2 with a wire: an exchange, and a gather unless states are sharded over all ranks."""
        itemsize = WIRE_BYTES[self.system.wire]
        parts = [self._cost("all_to_all", numel, itemsize, self.replication, False)]
        if not self.system.world_states:
            parts.append(self._cost("all_gather", numel, itemsize, self.replication, False))
        whole = sum(part.whole for part in parts)
        whole += numel * ENCODING_BYTES[self.system.wire] / self.machine.memory_bandwidth
        return _Cost(whole, sum(part.inter for part in parts), sum(part.intra for part in parts), whole)

    def update(self, numel: int) -> _Cost:
        """The all-gather of updated shards of ``numel`` elements."""
        return self._cost("all_gather", -(-numel // self.p), self.job.itemsize, self.replication, False)

    def _cost(self, operation: str, numel: int, itemsize: float, form: GroupForm, staged: bool) -> _Cost:
        key = (operation, numel, itemsize, form)
        if key not in self._cache:
            payload = float(numel * itemsize)
            whole = self.machine.time(operation, payload, form, staged)
            inter, intra = self.machine.stage_seconds(operation, payload, form, staged)
            turn = max(inter, intra) if staged and self.machine.streams else whole
            self._cache[key] = _Cost(whole, inter, intra, turn)
        return self._cache[key]


class Queues:
    """Collectives of one kind run one after another; those of all kinds share the links of the network."""

    def __init__(self) -> None:
        self.free = {"gather": 0.0, "scatter": 0.0, "average": 0.0, "update": 0.0}
        self.inter = self.intra = 0.0
        self.busy = dict.fromkeys(self.free, 0.0)
        self.counts = dict.fromkeys(self.free, 0)

    def issue(self, queue: str, cost: _Cost, now: float) -> float:
        """Returns when the collective is done."""
        start = max(now, self.free[queue])
        if cost.inter:
            start = max(start, self.inter)
            self.inter = start + cost.inter
        if cost.intra:
            start = max(start, self.intra)
            self.intra = start + cost.intra
        self.free[queue] = start + cost.turn
        self.busy[queue] += cost.whole
        self.counts[queue] += 1
        return start + cost.whole


class Player:
    """Plays micro-steps one after another. Time goes on from one to the next, and so do collectives under way."""

    def __init__(self, machine: Machine, job: Workload, system: Scheme, n: int) -> None:
        self.machine, self.job, self.system = machine, job, system
        self.costs = Costs(machine, job, system, n)
        self.queues = Queues()
        units = [unit for block in job.model.blocks for _ in range(block.repeat) for unit in block.units]
        self.numel, self.params = number_parameters(units)
        """Elements of each parameter; and for each unit, which ones are its own."""
        threshold = job.zero.param_persistence_threshold
        self.stays = [self.costs.p == 1 or numel <= threshold for numel in self.numel]
        """Parameters that are never gathered for a turn: they stay, or nobody else has a part of them."""
        self.visits = list(visits(units, job, compute_seconds(machine, job)))
        self.queue: list[tuple[int, int]] = []
        """(parameter, index of the visit) in the order of use, without those that stay."""
        self.queued: list[int] = []
        """For each visit, how much of the queue is its own or earlier ones'."""
        self.before = [0]
        """Elements of the visits before each, as the reuse distance counts them."""
        for index, visit in enumerate(self.visits):
            own = self._own(visit)
            self.queue += [(param, index) for param in own if not self.stays[param]]
            self.queued.append(len(self.queue))
            self.before.append(self.before[-1] + sum(self.numel[param] for param in own))
        self.next_use = self._next_uses()
        # Alone, a rank does this beside its compute. What costs is to wait for a processor behind the others that want
        # it, slowdown - 1 of them, each of which is slowed down itself.
        self.overhead = machine.issue_overhead * machine.host_slowdown * (machine.host_slowdown - 1)
        self.ready: dict[int, float] = {}
        """Parameters that are gathered, or will be at that time."""
        itemsize = job.accumulation_itemsize or job.itemsize
        self.unit = job.unit_numel(
            machine.sizes, self.costs.p, itemsize, WIRE_BYTES.get(system.wire, itemsize) / itemsize
        )
        """Elements of a unit of hop 2, in full."""
        self.not_updated, self.bucket_of = self._update_buckets()
        self.sent = 0
        self.updated: dict[int, float] = {}
        """Parameters whose updated shards are there by then, on every replica."""
        self.to_average = 0
        """Elements whose hop 1 is done, and that do not fill a unit of hop 2 yet."""
        self.live = 0
        self.most_live = 0
        self.most_bucket = 0
        self.now = 0.0
        self.time = StepTime()

    def totals(self) -> dict[str, float]:
        """Seconds and counts so far, by name."""
        found = self.time.parts()
        found |= {"busy " + queue: seconds for queue, seconds in self.queues.busy.items()}
        return found | {"count " + queue: float(count) for queue, count in self.queues.counts.items()}

    def _own(self, visit: Visit) -> tuple[int, ...]:
        return () if visit.unit is None else self.params[visit.unit]

    def _next_uses(self) -> list[dict[int, int]]:
        """Return, for each visit, where its parameters are used next."""
        upcoming: dict[int, int] = {}
        found: list[dict[int, int]] = []
        for index in range(len(self.visits) - 1, -1, -1):
            own = self._own(self.visits[index])
            found.append({param: upcoming[param] for param in own if param in upcoming})
            upcoming.update(dict.fromkeys(own, index))
        return found[::-1]

    def _update_buckets(self) -> tuple[list[list[int]], dict[int, int]]:
        """The buckets of updated weights that are still to come, in their order, and each parameter's."""
        if not self.system.world_states or self.costs.r == 1:
            return [], {}
        trained = self.job.model.trainable
        limit = self.job.unit_numel(self.machine.sizes, self.costs.p, self.job.itemsize)
        buckets: list[list[int]] = []
        numel = 0
        for param, size in enumerate(self.numel):
            if (self.stays[param] and self.costs.p > 1) or size not in trained:
                continue  # those that stay gathered come first, and are waited for at once: see finish
            if not buckets or numel + size > limit:
                buckets.append([])
                numel = 0
            buckets[-1].append(param)
            numel += size
        return buckets, {param: number for number, bucket in enumerate(buckets) for param in bucket}

    def _updates_arrive(self, params: Iterable[int]) -> float:
        """Return when these parameters' updated shards are there.

        What comes before them and one bucket more has been sent.
        """
        needed = max((self.bucket_of[param] for param in params if param in self.bucket_of), default=-1)
        while self.sent < min(needed + 2, len(self.not_updated)):
            bucket = self.not_updated[self.sent]
            done = self.queues.issue("update", self.costs.update(sum(self.numel[param] for param in bucket)), 0.0)
            self.updated.update(dict.fromkeys(bucket, done))
            self.sent += 1
        return max((self.updated[param] for param in params if param in self.updated), default=0.0)

    def micro_step(self, last: bool) -> None:
        """Forward and backward of one micro-batch; ``last``: at the accumulation boundary."""
        zero = self.job.zero
        bucket_size = self.system.bucket_size(zero.reduce_bucket_size)
        queue, bucket, passed = 0, 0, {}
        average = last and self.costs.r > 1
        reduced: list[tuple[int, float]] = []
        for index, visit in enumerate(self.visits):
            own = self._own(visit)
            missing = [param for param in own if not self.stays[param] and param not in self.ready]
            if missing:
                self._gather(missing, visit.backward)
            for param in own:
                if param in self.ready:
                    self._wait("gathers", self.ready[param])
                elif self.costs.p == 1 and param in self.bucket_of:
                    self._wait("updates", self._updates_arrive([param]))
            queue = max(queue, self.queued[index])
            if self.system.prefetch:
                budget = min(zero.max_live_parameters - self.live, zero.prefetch_bucket_size)
                ahead: list[int] = []
                numel = 0
                while queue < len(self.queue) and numel < budget:
                    param, turn = self.queue[queue]
                    passed[param] = turn
                    queue += 1
                    if param not in self.ready and param not in ahead:
                        ahead.append(param)
                        numel += self.numel[param]
                if ahead:
                    self._gather(ahead, visit.backward)
            self._spend("compute", visit.seconds)
            for param in own:
                if param in self.ready and not self._keeps(param, index, passed):
                    del self.ready[param]
                    self.live -= self.numel[param]
            for numel in visit.gradients:
                if bucket and bucket + numel > bucket_size:
                    reduced.append(self._reduce(bucket))
                    bucket = 0
                bucket += numel
                self.most_bucket = max(self.most_bucket, bucket)
                if average and reduced and self.system.hop2_beside:
                    self._average_finished(reduced)
        if bucket:
            reduced.append(self._reduce(bucket))
        for _, done in reduced:
            self._wait("hop1", done)
        if average and self.job.model.trainable:
            self._finish_average(reduced)
        # what was kept beyond its last turn is released at the end
        self.ready.clear()
        self.live = 0

    def _finish_average(self, reduced: list[tuple[int, float]]) -> None:
        """Wait for what is left of hop 2 when a backward pass has ended, with all its reduced buckets."""
        queues = self.queues
        if not self.system.hop2_beside:
            everything = shard_numel(self.job.model.trainable, 1)
            self._wait("hop2", queues.issue("average", self.costs.average(everything), self.now))
            return
        self._average_finished(reduced)
        if self.to_average:
            queues.issue("average", self.costs.average(self.to_average), self.now)
            self.to_average = 0
        self._wait("hop2", queues.free["average"])

    def _keeps(self, param: int, index: int, passed: dict[int, int]) -> bool:
        """Return whether a parameter stays gathered after its turn.

        The look-ahead counts on it, or it is used again soon.
        """
        if passed.get(param, -1) > index:
            return True
        following = self.next_use[index].get(param)
        return following is not None and self.before[following] - self.before[index + 1] < (
            self.job.zero.max_reuse_distance
        )

    def finish(self) -> StepTime:
        """The optimizer's part of the step."""
        job, machine, p = self.job, self.machine, self.costs.p
        shard = shard_numel(job.model.trainable, p)
        slices = sliced_numel(job.model.trainable, p, self.system.slices(self.costs.p * self.costs.r))
        states = OPTIMIZERS[job.optimizer].states
        # master weights and states are read and written, the gradient is read, the working copy written
        traffic = slices * (8 * (1 + states) + 4 + job.itemsize)
        if job.zero.offload_optimizer:
            seconds = traffic / machine.host_update_bandwidth + (shard + slices) * job.itemsize / machine.host_link
        else:
            seconds = traffic / machine.memory_bandwidth
        self._spend("optimizer", seconds)
        agree = machine.time("all_reduce", SCALAR_BYTES, self.costs.world)
        self._spend("overhead", agree + machine.step_overhead * machine.host_slowdown)
        persistent = sum(numel for numel, stays in zip(self.numel, self.stays) if stays)
        if persistent and p > 1 and self.system.world_states and self.costs.r > 1:
            self._wait("updates", self.queues.issue("update", self.costs.update(persistent), self.now))
        if persistent and p > 1:
            self._wait("gathers", self.queues.issue("gather", self.costs.gather(persistent), self.now))
        self.time.busy, self.time.counts = dict(self.queues.busy), dict(self.queues.counts)
        left = [self.costs.p, *([self.costs.partition.per_node] if self.system.staged_scatter else [])]
        self.time.bucket_numel = self.most_bucket + sum(-(-self.most_bucket // ranks) for ranks in left)
        self.time.live_numel = self.most_live
        return self.time

    def _spend(self, part: str, seconds: float) -> None:
        self.now += seconds
        setattr(self.time, part, getattr(self.time, part) + seconds)

    def _wait(self, part: str, until: float) -> None:
        if until > self.now:
            self._spend(part, until - self.now)

    def _gather(self, params: list[int], backward: bool) -> None:
        numel = sum(self.numel[param] for param in params)
        self._spend("overhead", self.overhead)
        cost = self.costs.gather(numel, backward)
        if self.job.zero.offload_param:
            # each rank's shard comes up from the host before it is sent on
            cost = cost._replace(whole=cost.whole + numel / self.costs.p * self.job.itemsize / self.machine.host_link)
        arrived = self._updates_arrive(params) if self.bucket_of else 0.0
        done = self.queues.issue("gather", cost, max(self.now, arrived))
        self.live += numel
        self.most_live = max(self.most_live, self.live)
        for param in params:
            self.ready[param] = done

    def _reduce(self, bucket: int) -> tuple[int, float]:
        if self.costs.p > 1:
            self._spend("overhead", self.overhead)
        done = self.queues.issue("scatter", self.costs.scatter(bucket), self.now)
        if not self.system.hop1_beside:
            self._wait("hop1", done)
        return bucket, done

    def _average_finished(self, reduced: list[tuple[int, float]]) -> None:
        """Start hop 2 of the units whose hop 1 is done by now, in order."""
        while reduced and reduced[0][1] <= self.now:
            bucket, done = reduced.pop(0)
            self.to_average += bucket
            while self.to_average >= self.unit:
                self.queues.issue("average", self.costs.average(self.unit), done)
                self.to_average -= self.unit


def step_time(machine: Machine, job: Workload, system: Scheme, n: int) -> StepTime:
    """One optimizer step on n ranks. Beyond three micro-steps, those between the first and the last are alike."""
    player = Player(machine, job, system, n)
    played, more = min(job.micro_steps, 3), max(0, job.micro_steps - 3)
    middle: dict[str, float] = {}
    for index in range(played):
        before = player.totals()
        player.micro_step(last=index == played - 1)
        if index == 1:
            middle = {name: value - before[name] for name, value in player.totals().items()}
    result = player.finish()
    if more:
        for part in StepTime.PARTS:
            setattr(result, part, getattr(result, part) + more * middle[part])
        for queue in result.busy:
            result.busy[queue] += more * middle["busy " + queue]
            result.counts[queue] += round(more * middle["count " + queue])
    return result
