"""The plan: memory and time of ZeRO-3 and of MiCS at each partition size, and the choice among them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import MicsPlanError
from .machine import Machine
from .memory import Memory, memory
from .timeline import Scheme, StepTime, step_time
from .workload import Workload

RESERVE = 0.1
"""Fraction of a GPU's memory that is left free: for the runtime, communicators and fragmentation."""

LEVEL = 0.005
"""Steps that differ by a smaller fraction count as equally long."""

CROSSING = 0.02
"""A partition group that leaves its fast domain must make steps shorter by more than this fraction. The network is what
a plan knows least about."""

STATES = ("partition", "world")
"""Values of ``mics_optimizer_states``."""

WIRES = ("full", "bf16", "int8", "int4")
"""Values of ``mics_replica_wire``."""

LIMITS = {
    "compute": "compute",
    "gathers": "parameter gathers",
    "hop1": "reduce-scatter (hop 1)",
    "hop2": "all-reduce (hop 2)",
    "updates": "all-gather of updated weights",
    "optimizer": "optimizer update",
    "overhead": "overhead",
}


@dataclass(frozen=True)
class Row:
    """One system on one number of ranks."""

    label: str
    system: Scheme
    n: int
    p: int
    memory: Memory
    time: StepTime
    capacity: int
    """Bytes of a GPU that may be used."""
    host_capacity: int
    """Bytes of host memory per rank."""
    crosses: bool
    """Whether a partition group leaves its fast domain."""
    job: Workload
    peak_flops: float | None
    """Peak of one GPU in the job's precision; ``None`` where compute was measured and no peak is known."""
    linear: float | None = None
    """Throughput per GPU as a fraction of the same system's on one partition group, or on one node."""

    @property
    def states(self) -> str:
        """``mics_optimizer_states``."""
        return "world" if self.system.world_states else "partition"

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.capacity and self.fits_host

    @property
    def fits_host(self) -> bool:
        return self.memory.host.peak <= self.host_capacity

    @property
    def tokens_per_second(self) -> float:
        """Per GPU. Samples where the model does not know tokens."""
        return self.job.samples * self.job.model.tokens / self.time.total

    @property
    def tflops(self) -> float:
        """Per GPU, recomputation included, as MiCS and Megatron-LM report it."""
        return self.job.hardware_flops / self.time.total / 1e12

    @property
    def mfu(self) -> float | None:
        """Model flops utilisation: recomputation not counted."""
        return None if self.peak_flops is None else self.job.model_flops / self.time.total / self.peak_flops

    def to_json(self) -> dict[str, Any]:
        return {
            "system": self.label,
            "gpus": self.n,
            "p": self.p,
            "replicas": self.n // self.p,
            "optimizer_states": self.states,
            "replica_wire": self.system.wire,
            "fits": self.fits,
            "memory_bytes": self.memory.peak,
            "memory_parts": self.memory.parts(),
            "host_bytes": self.memory.host.peak,
            "host_parts": self.memory.host.parts(),
            "step_s": self.time.total,
            "step_parts_s": self.time.parts(),
            "busy_s": self.time.busy,
            "tokens_per_s_per_gpu": self.tokens_per_second,
            "tflops_per_gpu": self.tflops,
            "mfu": self.mfu,
            "linear": self.linear,
            "limit": LIMITS[self.time.limit],
        }


def candidates(machine: Machine, n: int) -> list[int]:
    """Partition sizes worth a look: divisors of n that fit hosts and fast domains evenly, and n."""
    fitted = machine.for_ranks(n)
    small = (p for p in range(1, int(n**0.5) + 1) if n % p == 0)
    divisors = sorted({d for p in small for d in (p, n // p)})
    evenly = (fitted.gpus_per_node, fitted.domain)
    return [p for p in divisors if p == n or all(k % p == 0 or p % k == 0 for k in evenly)]


def check_ranks(machine: Machine, n: int) -> None:
    """Check that ``machine`` can have n ranks.

    Raises:
        MicsPlanError: n ranks do not fill hosts or fast domains evenly.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise MicsPlanError(f"The number of GPUs must be a positive integer, got {n!r}.")
    machine.for_ranks(n)
    if machine.nodes_measured == 1 and n > machine.gpus_per_node:
        raise MicsPlanError(
            f"Machine {machine.name!r} was calibrated on a single node, so nothing is known of links between nodes, "
            f"but {n} GPUs take several. Calibrate on two nodes or more, or write inter into its file and set "
            f"nodes_measured to 0."
        )


def check_size(machine: Machine, n: int, p: int) -> None:
    """Check that n ranks can have partition groups of p.

    Raises:
        MicsPlanError: p does not divide n.
    """
    if p < 1 or n % p:
        divisors = ", ".join(str(size) for size in candidates(machine, n))
        raise MicsPlanError(f"The partition size must divide the {n} GPUs, got {p}. Among others: {divisors}.")


def mics(machine: Machine, job: Workload, n: int, p: int, *, world_states: bool = False, wire: str = "full") -> Scheme:
    """MiCS with its defaults: in two stages where the placement allows it, both hops beside the backward pass unless
    ``overlap_comm`` is off. Hop 2 of offloaded gradients follows at once, after it."""
    staged, beside = machine.can_stage(n, p), job.zero.overlap_comm
    limit = None
    if beside and p < n:
        trained = sum(numel * count for numel, count in job.model.trainable.items())
        limit = machine.sizes.bucket_limit(trained, job.itemsize)
    return Scheme(
        p,
        staged,
        staged,
        hop1_beside=beside,
        hop2_beside=beside and not job.zero.offload_optimizer,
        bucket_limit=limit,
        world_states=world_states and p < n,
        wire=wire if p < n else "full",
    )


def zero3(machine: Machine, job: Workload) -> Scheme:
    """Stock ZeRO-3. On a CPU its reduce-scatter blocks."""
    return Scheme(None, hop1_beside=machine.streams and job.zero.overlap_comm)


def predict(machine: Machine, job: Workload, system: Scheme, n: int, *, reserve: float = RESERVE) -> Row:
    """One row.

    Raises:
        MicsPlanError: p does not divide n, n does not fill hosts or domains, or the machine has no peak for the
            precision.
    """
    check_ranks(machine, n)
    p = system.partition_size(n)
    check_size(machine, n, p)
    machine = machine.for_ranks(n)
    time = step_time(machine, job, system, n)
    if system.p is None:
        label = "ZeRO-3 + hpZ" if system.secondary else "ZeRO-3"
    else:
        label = f"MiCS p={p}" + ("" if system.staged_gather or not machine.can_stage(n, p) else ", flat")
        label += _suffix(system.world_states, system.wire)
    return Row(
        label=label,
        system=system,
        n=n,
        p=p,
        memory=memory(job, system, n, time, streams=machine.streams),
        time=time,
        capacity=int(machine.memory * (1 - reserve)),
        host_capacity=int(machine.host_memory * (1 - reserve) / machine.gpus_per_node),
        crosses=machine.partition_form(n, p).nodes > 1,
        job=job,
        peak_flops=machine.flops.get(job.precision) if job.compute_s is None else None,
    )


def _suffix(world_states: bool, wire: str) -> str:
    return (", world states" if world_states else "") + (f", {wire} wire" if wire != "full" else "")


def make_plan(
    machine: Machine,
    job: Workload,
    n: int,
    sizes: Iterable[int] | None = None,
    *,
    states: Sequence[str] = ("partition",),
    wires: Sequence[str] = ("full",),
    reserve: float = RESERVE,
) -> list[Row]:
    """ZeRO-3 first, then MiCS by partition size. Each with its throughput relative to one group of its own.

    Args:
        states: values of ``mics_optimizer_states`` to plan.
        wires: values of ``mics_replica_wire`` to plan.
    """
    check_ranks(machine, n)
    sizes = list(sizes or candidates(machine, n))
    for p in sizes:
        check_size(machine, n, p)
    systems = [zero3(machine, job), *choices(machine, job, n, sizes, states, wires)]
    rows = []
    for system in systems:
        row = predict(machine, job, system, n, reserve=reserve)
        alone = math.lcm(machine.for_ranks(n).domain, system.p or 1)
        if alone >= n or n % alone:
            base = row
        else:
            kind: dict[str, Any] = {"world_states": system.world_states, "wire": system.wire}
            smaller = system if system.p is None else mics(machine, job, alone, system.p, **kind)
            base = predict(machine, job, smaller, alone, reserve=reserve)
        rows.append(replace(row, linear=base.time.total / row.time.total))
    return rows


def choices(
    machine: Machine, job: Workload, n: int, sizes: Iterable[int], states: Sequence[str], wires: Sequence[str]
) -> list[Scheme]:
    """MiCS of each size, with each kind of optimizer states and each wire. For p = n there is one kind."""
    return [
        mics(machine, job, n, p, world_states=kind == "world", wire=wire)
        for p in sizes
        for kind in states
        for wire in wires
        if p < n or (kind, wire) == (states[0], wires[0])
    ]


def choose(rows: Sequence[Row]) -> Row | None:
    """The fastest MiCS that fits; of those that are level with it, the one with the smallest groups, which depends
    least on the network, then the one that keeps optimizer states in the partition group, and then the wire with the
    most bits. Groups inside a fast domain come first, unless others are faster by :data:`CROSSING`. ``None`` if none
    fits."""
    fitting = [row for row in rows if row.system.p is not None and row.fits]
    inside = [row for row in fitting if not row.crosses]
    fastest = min((row.time.total for row in fitting), default=math.inf)
    if any(row.time.total <= fastest * (1 + CROSSING) for row in inside):
        fitting, fastest = inside, min(row.time.total for row in inside)
    level = (row for row in fitting if row.time.total <= fastest * (1 + LEVEL))
    return min(level, key=lambda row: (row.p, row.states, WIRES.index(row.system.wire)), default=None)


def explain(rows: Sequence[Row], chosen: Row | None) -> str:
    """Why, in one sentence."""
    considered = [row for row in rows if row.system.p is not None]
    if chosen is None:
        least = min(considered, key=lambda row: row.memory.peak)
        return (
            f"no partition size fits: the least is {gb(least.memory.peak)} per GPU at {_name(least)}, and "
            f"{gb(least.capacity)} may be used. Use more GPUs, a smaller micro-batch, activation checkpointing or "
            f"offload"
        )
    too_large = [_name(row) for row in considered if not row.fits]
    others = [row for row in considered if row.fits and row is not chosen]
    parts = [
        f"{_name(chosen)}: {chosen.time.total:.3g} s per step, {gb(chosen.memory.peak)} of {gb(chosen.capacity)} per "
        f"GPU, limited by {LIMITS[chosen.time.limit]}"
    ]
    if others:
        second = min(others, key=lambda row: row.time.total)
        parts.append(f"next is {_name(second)} with {second.time.total:.3g} s")
    if too_large:
        named = ", ".join(too_large)
        parts.append(f"{named[:4]}{named[4:].replace('p = ', '')} would not fit")
    stock = next((row for row in rows if row.system.p is None), None)
    if stock is not None:
        parts.append(f"{stock.time.total / chosen.time.total:.2f} times as fast as ZeRO-3 is predicted to be")
    return "; ".join(parts)


def _name(row: Row) -> str:
    more = ["world-sharded optimizer states"] if row.system.world_states else []
    more += [f"the {row.system.wire} wire"] if row.system.wire != "full" else []
    return f"p = {row.p}{' with ' * bool(more)}{' and '.join(more)}"


def gb(value: float) -> str:
    return f"{value / 1e9:,.0f} GB" if value >= 1e12 else f"{value / 1e9:.3g} GB"


def scaling(
    machine: Machine,
    job: Workload,
    systems: Sequence[int | None],
    ranks: Sequence[int],
    *,
    strong: bool = False,
    world_states: bool = False,
    wire: str = "full",
    reserve: float = RESERVE,
    progress: Any = None,
) -> dict[str, list[Row]]:
    """Curves over the number of GPUs.

    Args:
        systems: partition sizes; ``None`` for ZeRO-3.
        strong: keep the samples of a step as they are at the first number of GPUs, with fewer micro-steps where
            there are more GPUs. Otherwise the work of a GPU stays the same (weak scaling).
        world_states, wire: of MiCS.
        progress: wraps the points to show how far it is.

    Raises:
        MicsPlanError: under strong scaling, a number of GPUs leaves less than one micro-step.
    """
    total = job.samples * ranks[0]
    curves: dict[str, list[Row]] = {}
    points = [(p, n) for p in systems for n in ranks if p is None or (n % p == 0)]
    for p, n in progress(points) if progress else points:
        scaled = job
        if strong:
            micro_steps, rest = divmod(total, job.micro_batch * n)
            if micro_steps < 1 or rest:
                raise MicsPlanError(
                    f"Strong scaling keeps {total} samples per step, which {n} GPUs with micro-batches of "
                    f"{job.micro_batch} cannot share evenly. Start from more micro-steps, or scale weakly."
                )
            scaled = replace(job, micro_steps=micro_steps)
        kind: dict[str, Any] = {"world_states": world_states, "wire": wire}
        system = zero3(machine, scaled) if p is None else mics(machine, scaled, n, p, **kind)
        name = "ZeRO-3" if p is None else f"MiCS p={p}{_suffix(world_states, wire)}"
        row = predict(machine, scaled, system, n, reserve=reserve)
        first = curves.setdefault(name, [])
        base = first[0].tokens_per_second if first else row.tokens_per_second
        first.append(replace(row, linear=row.tokens_per_second / base))
    return curves
