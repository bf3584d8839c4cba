"""Bytes per GPU, part by part.

Model states are exact, as DeepSpeed 0.19 allocates them; p is n for stock ZeRO-3. For every parameter, its
shard has c = ceil(numel / p) elements, padding included:

| part              | bytes                                                                         | where            |
|-------------------|-------------------------------------------------------------------------------|------------------|
| parameters        | Σ c · b                                   b: bytes of the precision           | host if offloaded|
| gradients         | Σ c · a, trainable                        a: bytes of the accumulation dtype  | host if offloaded|
| master            | Σ c · 4, trainable, in fp32 as well                                           | host if offloaded|
| optimizer         | Σ c · 4 · (states of the optimizer), 4 for the step counter of each sub-group | host if offloaded|
| residuals         | Σ c · 4 + ceil(c / r) · 8, trainable, with mics_replica_wire int8 or int4; of | host if optimizer|
|                   | the second part nothing with world-sharded states                             | is offloaded     |
| gradient exchange | Σ c · 4, trainable, with an offloaded optimizer only                          | host             |
| persistent        | Σ c · p · b of parameters that stay gathered; with replicas without padding   | GPU              |
| bucket            | reduce_bucket_size · b, with contiguous gradients                             | GPU              |
| scratch           | two tasks of hop 1: a packed bucket and what each stage leaves of it          | GPU with streams |
|                   | two units of hop 2 and of updated weights, with world-sharded states;         | GPU with streams |
|                   | parts of reduce_bucket_size / p elements, with an offloaded optimizer         | GPU with streams |

On the host as well, of the training states that a checkpoint holds, T = Σ c · 4 · (1 + states of the optimizer):

| asynchronous save | T / r, and on the owner of a shard T · (r-1) / r more while it writes; a writer process    |
| memory copies     | 4 · T / r: two slots of this rank's, and two of a rank's on the next host                 |
| loading           | T: DeepSpeed gets the states of a shard whole                                             |

A save and a load never run at once, so the larger one counts.

With world-sharded optimizer states, master, optimizer and gradient exchange are of slices of ceil(c / r) elements,
r = n / p, and gradients are Σ (c + ceil(c / r)) · a: the mean of a slice has a buffer of its own.

On top of those, at the fullest moment of the backward pass: parameters gathered ahead (as
:mod:`mics_ds.planner.timeline` computes them), the buffers of a gather and of a reduce-scatter, one submodule's full
gradients, and activations. Or, if that is more, in the optimizer's step: an fp32 copy of one sub-group's gradients and
what the update needs in between (of slices, their 16-bit copy).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..comm.sizes import ON_ACCELERATORS, sizes_of
from .model import shard_numel, sliced_numel
from .timeline import WIRE_BYTES, Scheme, StepTime
from .workload import OPTIMIZERS, Workload

MASTER_ITEMSIZE = 4


WRITER_BYTES = 240 * 10**6
"""Bytes of the process that writes asynchronous saves: Python with torch."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes of host memory that one rank needs: the rank with the most, since owners of shards need more."""

    offloaded: int = 0
    """States that live on the host."""
    save: int = 0
    """An asynchronous save."""
    copies: int = 0
    """Copies in memory that outlives the process."""
    load: int = 0
    """Loading a checkpoint."""

    PARTS = ("offloaded", "save", "copies", "load")

    @property
    def peak(self) -> int:
        """Return the bytes at the fullest moment: during a save or a load."""
        return self.offloaded + self.copies + max(self.save, self.load)

    def parts(self) -> dict[str, int]:
        return {part: getattr(self, part) for part in self.PARTS}


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    parameters: int
    gradients: int
    master: int
    optimizer: int
    persistent: int
    live: int
    """Gathered parameters, and those on their way."""
    buckets: int
    activations: int
    step: int
    """Bytes that the optimizer's step needs beyond the states."""
    other: int
    """Bytes that something else holds, as the user gave them."""
    host: HostMemory
    bucket: int = 0
    """Part of :attr:`buckets` that is held all the time."""

    STATES = ("parameters", "gradients", "master", "optimizer")
    PARTS = (*STATES, "persistent", "live", "buckets", "activations", "step", "other")

    @property
    def states(self) -> int:
        """Model states: what is sharded."""
        return sum(getattr(self, part) for part in self.STATES)

    @property
    def peak(self) -> int:
        """Return the bytes at the fullest moment: in the backward pass, or in the optimizer's step."""
        always = self.states + self.persistent + self.other
        return always + max(self.live + self.buckets + self.activations, self.bucket + self.step)

    def parts(self) -> dict[str, int]:
        """The parts that add up to :attr:`peak`: those of the fuller of the two moments."""
        in_step = self.bucket + self.step > self.live + self.buckets + self.activations
        values = {part: getattr(self, part) for part in self.PARTS}
        if in_step:
            values |= {"live": 0, "buckets": self.bucket, "activations": 0}
        else:
            values["step"] = 0
        return values


def sub_groups(job: Workload, p: int) -> int:
    """Return how many sub-groups DeepSpeed makes of one parameter group with the parameters in the order of their use.

    It closes one when it has reached ``sub_group_size``.
    """
    if not job.model.trainable:
        return 0
    groups, numel = 0, 0
    for block in job.model.blocks:
        for _ in range(block.repeat):
            for unit in block.units:
                for size in () if unit.again else unit.numels:
                    numel += -(-size // p)
                    if numel >= job.zero.sub_group_size:
                        groups, numel = groups + 1, 0
    return groups + (1 if numel else 0)


def _persistent(job: Workload, system: Scheme, n: int) -> int:
    """Return the bytes of parameters that stay gathered: with padding, unless replicas copy them out of a gather."""
    padded = system.partition_size(n) if system.partition_size(n) == n else 1
    return job.itemsize * sum(
        -(-numel // padded) * padded * count
        for counts in (job.model.trainable, job.model.frozen)
        for numel, count in counts.items()
        if numel <= job.zero.param_persistence_threshold
    )


def memory(job: Workload, system: Scheme, n: int, played: StepTime, *, streams: bool = True) -> Memory:
    """Bytes per GPU of a job on n ranks.

    Args:
        streams: whether the device is an accelerator, with memory of its own.
        played: the same job's step, for what is gathered at a time.
    """
    p, zero, b = system.partition_size(n), job.zero, job.itemsize
    model = job.model
    trained = shard_numel(model.trainable, p)
    kept = sliced_numel(model.trainable, p, system.slices(n))
    all_shards = trained + shard_numel(model.frozen, p)
    accumulation = job.accumulation_itemsize or b
    needs = OPTIMIZERS[job.optimizer]
    groups = sub_groups(job, p)

    parameters = all_shards * b
    gradients = (trained + (kept if system.slices(n) > 1 else 0)) * accumulation + _residuals(job, system, n)
    master = kept * MASTER_ITEMSIZE
    optimizer = kept * MASTER_ITEMSIZE * needs.states + (4 * groups if needs.counter else 0)
    host = 0
    if zero.offload_optimizer:
        # offloaded gradients go to the optimizer through fp32 buffers of their own
        host += gradients + master + kept * MASTER_ITEMSIZE + optimizer
        gradients = master = optimizer = 0
    if zero.offload_param:
        host += parameters
        parameters = 0
    persistent = _persistent(job, system, n)
    bucket = system.bucket_size(zero.reduce_bucket_size) * b if zero.contiguous_gradients and trained else 0
    # A gather fills a buffer of its own, from which parameters are copied, so the last ones are there twice; the same
    # holds for a bucket that is packed for its reduce-scatter, and one submodule's gradients wait to be copied there.
    ahead = min(played.live_numel, max(zero.prefetch_bucket_size, model.largest))
    live = (played.live_numel + ahead) * b if p > 1 else 0
    buckets = bucket + played.bucket_numel * b + model.largest * b
    if streams and system.p is not None:  # two tasks at a time, in buffers that executors keep
        left = min(_hop2_bytes(job, system, n), trained * accumulation)
        scratch = ON_ACCELERATORS.ahead * (played.bucket_numel * b + left)
        buckets = bucket + scratch + model.largest * b
        bucket += scratch
    return Memory(
        parameters=parameters,
        gradients=gradients,
        master=master,
        optimizer=optimizer,
        persistent=persistent,
        live=live,
        buckets=buckets,
        activations=round(activations(job)),
        step=_step_bytes(job, system, n, trained),
        other=round(job.held_bytes),
        host=_host_memory(job, system, n, host),
        bucket=bucket,
    )


def _host_memory(job: Workload, system: Scheme, n: int, offloaded: int) -> HostMemory:
    p, states = system.partition_size(n), OPTIMIZERS[job.optimizer].states
    shard = shard_numel(job.model.trainable, p) * MASTER_ITEMSIZE * (1 + states)
    share = shard // (n // p)
    # The owner of a shard has all of it while it writes: its own share, and what the other replicas send.
    save = shard + WRITER_BYTES if job.async_save and system.p is not None else 0
    copies = 4 * share if job.memory_copies and system.p is not None else 0
    return HostMemory(offloaded, save, copies, shard)


def _residuals(job: Workload, system: Scheme, n: int) -> int:
    """Return the bytes of what rounding leaves in hop 2, in two copies."""
    if system.wire not in ("int8", "int4"):
        return 0
    p, model = system.partition_size(n), job.model
    published = 0 if system.world_states else sliced_numel(model.trainable, p, n // p)
    return 4 * shard_numel(model.trainable, p) + 8 * published


def _hop2_bytes(job: Workload, system: Scheme, n: int) -> int:
    """Return the bytes that one task of hop 2, or of the gather of updated weights, holds on an accelerator.

    The gradients are not among them.
    """
    p, itemsize = system.partition_size(n), job.accumulation_itemsize or job.itemsize
    if p < n and job.zero.offload_optimizer:  # by way of the device, in parts
        return system.bucket_size(job.zero.reduce_bucket_size) // p * itemsize
    numel = job.unit_numel(sizes_of(True), p, itemsize, WIRE_BYTES.get(system.wire, itemsize) / itemsize) // p
    if system.wire != "full":  # encoded rows, sent, received and gathered; and fp32 copies while they are made
        return round(numel * (3 * WIRE_BYTES[system.wire] + 8))
    return numel * itemsize if system.slices(n) > 1 else 0


def _step_bytes(job: Workload, system: Scheme, n: int, trained: int) -> int:
    """Return the bytes needed between the backward pass and the end of the step, for ``trained`` elements of a rank."""
    p, zero, b = system.partition_size(n), job.zero, job.itemsize
    if zero.offload_optimizer:
        return 0
    slices = system.slices(n)
    group = -(-min(trained, zero.sub_group_size + -(-job.model.largest // p)) // slices) if trained else 0
    # an fp32 copy of the gradients, flattened in their own precision first
    temporaries = OPTIMIZERS[job.optimizer].temporaries
    update = group * MASTER_ITEMSIZE * (1 + temporaries) + (group * b if b < MASTER_ITEMSIZE else 0)
    return update + (group * b if slices > 1 else 0)


def activations(job: Workload) -> float:
    """Bytes that one micro-batch keeps for the backward pass; under checkpointing, every block's input and the
    largest block's all."""
    kept, largest = 0.0, 0.0
    for block in job.model.blocks:
        if block.checkpointed and job.checkpointing:
            kept += block.input_bytes * block.repeat
            largest = max(largest, block.activations)
        else:
            kept += block.activations * block.repeat
    return (kept + largest) * job.micro_batch
