"""The machine a plan is for: hosts, fast domains, their links, and what collectives cost on them.

A *host* has GPUs, memory and processes. A *fast domain* has GPUs that are joined by links much faster than the network:
the GPUs of a host on most machines, a rack of 18 hosts on NVL72. Collectives see domains only.

[Note: the cost of a collective]

    group of g ranks in N domains, M bytes in the full buffer, alpha seconds per ring step, B bytes/s

    inside a domain    T = first + (g-1)·alpha_intra + (g-1)/g · M / B_intra
    over domains       T = first + (g-N)·alpha_intra + (N-1)·alpha_inter + (g-1)/g · M · c / B_domain
                       c: such groups side by side in a domain
    all-reduce         twice that, with one first; with trees, its latency is
                       2·(log2(g/N)·alpha_intra + log2(N)·alpha_inter) if less
    all-to-all         sends k·(g-k)/g · M from a domain with k of the group's ranks
    on gloo            its own reduce-scatter sends what an all-reduce does; MiCS uses an all-to-all in its place

A ring enters and leaves each domain once, whatever the number of its members there, so a group that has all ranks of
its domains has c = 1, and k replication groups of one rank per domain have c = k. In two stages (gather: between
domains, then inside each; scatter: the mirror) both stages are such collectives, one after the other.

``first`` is the latency of a collective (``collective_latency``), alpha that of a peer. The alpha-beta model is
Hockney's; the ring's volume is that of Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication
Operations in MPICH" (2005); ``first`` and the ring's latency, g-N steps inside domains and N-1 between them, are how
NCCL estimates its own (src/graph/tuning.cc). Where a :class:`Sweep` was measured on a group of the same form, it is
used in place of the formula; where one was measured on another number of ranks, the formula is scaled by
measured/formula there.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from ..comm.sizes import Sizes, sizes_of
from ..errors import MicsPlanError

OPERATIONS: tuple[str, ...] = ("all_gather", "reduce_scatter", "stock_reduce_scatter", "all_reduce", "all_to_all")
"""``stock_reduce_scatter`` is the backend's own, which ZeRO-3 uses; ``reduce_scatter`` is what MiCS uses there. On gloo
that is an ``all_to_all``."""


@dataclass(frozen=True)
class Link:
    """Cost of one hop over a kind of link."""

    bandwidth: float
    """Bytes per second, one way. Inside a domain: what one GPU sends. Between domains: what one host sends."""
    latency: float
    """alpha: seconds per ring step."""

    def __post_init__(self) -> None:
        if not 0 < self.bandwidth < math.inf:
            raise MicsPlanError(f"The bandwidth of a link must be positive (bytes per second), got {self.bandwidth!r}.")
        if not 0 <= self.latency < math.inf:
            raise MicsPlanError(f"The latency of a link must not be negative (seconds), got {self.latency!r}.")


@dataclass(frozen=True)
class GroupForm:
    """Form in which a process group lies in the domains. A collective's cost depends on nothing else of the group."""

    nodes: int
    """N: domains that the group spans."""
    per_node: int
    """Its ranks in each of them (the largest number, if they differ)."""
    beside: int = 1
    """c: groups like it that share the link of a domain."""

    @property
    def size(self) -> int:
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Sweep:
    """Measured times of one collective on groups of one form, all such groups of the job at once."""

    operation: str
    form: GroupForm
    staged: bool
    """Whether the collective runs in two stages."""
    payload: tuple[int, ...]
    """M: bytes of the full buffer, ascending."""
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise MicsPlanError(f"A sweep measures one of {', '.join(OPERATIONS)}, got {self.operation!r}.")
        if not self.payload or len(self.payload) != len(self.seconds):
            raise MicsPlanError("A sweep needs as many times as sizes, and at least one.")
        good = all(0 < value < math.inf for value in (*self.payload, *self.seconds))
        if sorted(set(self.payload)) != list(self.payload) or not good:
            raise MicsPlanError("The sizes of a sweep must ascend, and sizes and times must be positive.")

    def time(self, payload: float) -> float:
        """Seconds, between measured sizes by a straight line, beyond them by the line of the nearest two. Of a single
        size, its time."""
        sizes, times = self.payload, self.seconds
        if len(sizes) == 1:
            return times[0]
        right = min(max(bisect_left(sizes, payload), 1), len(sizes) - 1)
        left = right - 1
        slope = max(0.0, (times[right] - times[left]) / (sizes[right] - sizes[left]))
        return max(times[left] + slope * (payload - sizes[left]), min(times) * min(1.0, payload / sizes[0]))


@dataclass(frozen=True)
class Machine:
    """A cluster of equal hosts.

    Raises:
        MicsPlanError: a value makes no sense.
    """

    name: str
    gpus_per_node: int
    """GPUs of a host, which share its memory."""
    memory: float
    """Bytes of one GPU that a job can use."""
    flops: Mapping[str, float]
    """Dense peak of one GPU by precision (``fp16``, ``bf16``, ``fp32``), operations per second."""
    efficiency: float
    """Fraction of the peak that a training step reaches while it computes, everything but communication included."""
    intra: Link
    """Links inside a fast domain."""
    inter: Link
    """Links between domains. The bandwidth is one host's; a domain has that of all its hosts."""
    gpus_per_domain: int = 0
    """GPUs of a fast domain, a multiple of those of a host; 0: those of a host."""
    collective_latency: float = 0.0
    """Seconds that each collective takes beside its ring steps and bytes."""
    memory_bandwidth: float = 1e12
    """Bytes per second of a GPU's memory. What the optimizer's update is bound by."""
    host_link: float = 12e9
    """Bytes per second between a GPU and the memory of its host, for offloaded states."""
    host_memory: float = 1e12
    """Bytes of a host's own memory."""
    host_update_bandwidth: float = 10e9
    """Bytes of states per second that one rank updates on the host, for offloaded optimizers."""
    backend: str = "nccl"
    """``nccl`` or ``gloo``: what its collectives send, and whether all-reduce has logarithmic latency."""
    streams: bool = True
    """Whether stock DeepSpeed reduces gradients beside the backward pass. On a CPU it blocks."""

    @property
    def sizes(self) -> Sizes:
        """Return the sizes of collectives on such devices."""
        return sizes_of(self.streams)

    step_overhead: float = 0.0
    """Seconds per optimizer step that are spent outside compute and communication."""
    issue_overhead: float = 0.0
    """Seconds of host work for each gather and reduce-scatter. It costs time only where ranks share processors."""
    host_slowdown: float = 1.0
    """Factor by which work on the host takes longer while all ranks of the machine are busy with it."""
    nodes_measured: int = 0
    """Nodes that a calibration saw; 0 for machines that were described. One that saw a single node knows nothing of
    the links between nodes."""
    sweeps: tuple[Sweep, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    """Source of each value."""

    def __post_init__(self) -> None:
        positive = ("gpus_per_node", "memory", "efficiency", "memory_bandwidth", "host_link", "host_memory")
        for name in (*positive, "host_update_bandwidth", "host_slowdown"):
            if not 0 < getattr(self, name) < math.inf:
                raise MicsPlanError(f"{name} of machine {self.name!r} must be positive, got {getattr(self, name)!r}.")
        for name in ("gpus_per_domain", "collective_latency", "step_overhead", "issue_overhead", "nodes_measured"):
            if not 0 <= getattr(self, name) < math.inf:
                raise MicsPlanError(
                    f"{name} of machine {self.name!r} must not be negative, got {getattr(self, name)!r}."
                )
        if not self.flops or any(not 0 < value < math.inf for value in self.flops.values()):
            raise MicsPlanError(f"flops of machine {self.name!r} must name a positive peak for at least one precision.")
        if self.backend not in ("nccl", "gloo"):
            raise MicsPlanError(f"backend of machine {self.name!r} must be nccl or gloo, got {self.backend!r}.")
        if self.efficiency > 1:
            raise MicsPlanError(
                f"efficiency of machine {self.name!r} is a fraction of the peak, got {self.efficiency}."
            )

        if self.gpus_per_domain % self.gpus_per_node:
            raise MicsPlanError(
                f"gpus_per_domain of machine {self.name!r} must be a multiple of its gpus_per_node, "
                f"{self.gpus_per_node}, got {self.gpus_per_domain}."
            )

    # ------------------------------------------------------------------------------------ forms

    @property
    def domain(self) -> int:
        """Return the GPUs of a fast domain."""
        return self.gpus_per_domain or self.gpus_per_node

    def for_ranks(self, n: int) -> Machine:
        """Return the machine as a job of n ranks uses it: as many of them in each domain as fill domains evenly.

        Raises:
            MicsPlanError: n ranks do not fill hosts evenly, or would leave more than half of each domain unused.
        """
        host = min(self.gpus_per_node, n)
        if n % host:
            raise MicsPlanError(
                f"{n} GPUs do not fill nodes of {self.name!r}, which have {host}. Use a multiple of {host} or fewer."
            )
        domain = next(used for used in range(min(self.domain, n) // host * host, 0, -host) if n % used == 0)
        if 2 * domain <= min(self.domain, n) and self.gpus_per_domain:
            raise MicsPlanError(
                f"{n} GPUs do not fill fast domains of {self.name!r} evenly, which have {self.domain}. Use a multiple "
                f"of {self.domain}, or of a number up to that which is a multiple of {host}."
            )
        return replace(self, gpus_per_node=host, gpus_per_domain=domain if domain > host else 0)

    def partition_form(self, n: int, p: int) -> GroupForm:
        """Form of the groups of p consecutive ranks among n, k in a domain."""
        k = self.domain
        if p <= k and k % p == 0:
            return GroupForm(1, p, k // p)
        if p % k == 0:
            return GroupForm(p // k, k)
        # An uneven fit: some groups straddle one domain more than they need, and share its link with a neighbour.
        first = [g * p for g in range(min(n // p, k))]
        nodes = max((start + p - 1) // k - start // k + 1 for start in first)
        return GroupForm(nodes, -(-p // nodes), 2) if nodes > 1 else GroupForm(1, p, max(1, k // p))

    def replication_form(self, n: int, p: int) -> GroupForm:
        """Form of the groups {i, i+p, i+2p, …}."""
        k, r = self.domain, n // p
        if p >= k:
            return GroupForm(r, 1, min(k, n))
        per_node = min(max(1, k // p), r)
        return GroupForm(-(-r // per_node), per_node, min(p, k))

    def can_stage(self, n: int, p: int) -> bool:
        """Return whether collectives over the partition group may run in two stages: an N x k grid with N, k > 1."""
        form = self.partition_form(n, p)
        return form.nodes > 1 and form.per_node > 1 and form.size == p and form.beside == 1

    # ------------------------------------------------------------------------------------ times

    def time(self, operation: str, payload: float, form: GroupForm, staged: bool = False) -> float:
        """Seconds that a collective takes. See [Note: the cost of a collective].

        Args:
            operation: one of :data:`OPERATIONS`.
            payload: M, bytes of the full buffer.
            staged: in two stages.
        """
        if form.size == 1 or payload <= 0:
            return 0.0
        if operation == "all_to_all" and self.backend == "gloo":
            operation = "reduce_scatter"  # the same, and measured by that name
        ideal = self.formula(operation, payload, form, staged)
        sweep = self._nearest(operation, form, staged)
        if sweep is None:
            return ideal
        if len(sweep.payload) == 1:
            return ideal * sweep.seconds[0] / self.formula(operation, sweep.payload[0], sweep.form, staged)
        if sweep.form == form:
            return sweep.time(payload)
        return ideal * sweep.time(payload) / self.formula(operation, payload, sweep.form, staged)

    def formula(self, operation: str, payload: float, form: GroupForm, staged: bool = False) -> float:
        """The alpha-beta model alone."""
        if staged:
            outer = self.formula(operation, payload / form.per_node, GroupForm(form.nodes, 1, form.per_node))
            inner = self.formula(operation, payload, GroupForm(1, form.per_node))
            return outer + inner
        g, gloo = form.size, self.backend == "gloo"
        if gloo and operation == "reduce_scatter":
            operation = "all_to_all"
        if g == 1:
            return 0.0
        times = 2 if operation == "all_reduce" or (gloo and operation == "stock_reduce_scatter") else 1
        volume = payload * (g - 1) / g
        transfer = volume / self.intra.bandwidth if form.per_node > 1 or form.nodes == 1 else 0.0
        if form.nodes > 1:
            if operation == "all_to_all":
                volume = payload * form.per_node * (g - form.per_node) / g
            transfer = max(transfer, volume * form.beside / self.domain_bandwidth)
        return self.collective_latency + times * (self.latency(operation, form) + transfer)

    @property
    def domain_bandwidth(self) -> float:
        """Return the bytes per second that one domain sends over the network: all its hosts together."""
        return self.inter.bandwidth * self.domain / self.gpus_per_node

    def latency(self, operation: str, form: GroupForm) -> float:
        """Return the seconds until the first byte has gone around the group once."""
        g, intra, inter = form.size, self.intra.latency, self.inter.latency
        ring = (g - form.nodes) * intra + (form.nodes - 1) * inter
        if operation == "all_reduce" and self.backend != "gloo":
            return min(ring, math.log2(g / form.nodes) * intra + math.log2(form.nodes) * inter)
        return ring

    def stage_seconds(self, operation: str, payload: float, form: GroupForm, staged: bool) -> tuple[float, float]:
        """(seconds on the links between nodes, seconds on those inside) that a collective keeps busy."""
        whole = self.time(operation, payload, form, staged)
        if form.nodes == 1:
            return 0.0, whole
        if not staged:
            return whole, 0.0
        inter = self.formula(operation, payload / form.per_node, GroupForm(form.nodes, 1, form.per_node))
        intra = self.formula(operation, payload, GroupForm(1, form.per_node))
        # One stage follows the other. Profiles of CPUs were measured when stages were cut into pieces, and the longer
        # one lasted all the time.
        together = inter + intra if self.streams else max(inter, intra)
        share = whole / max(together, 1e-12)
        return min(whole, inter * share), min(whole, intra * share)

    @cached_property
    def _by_kind(self) -> dict[tuple[str, bool, bool], list[Sweep]]:
        kinds: dict[tuple[str, bool, bool], list[Sweep]] = {}
        for sweep in self.sweeps:
            kinds.setdefault((sweep.operation, sweep.staged, sweep.form.nodes > 1), []).append(sweep)
        return kinds

    def _nearest(self, operation: str, form: GroupForm, staged: bool) -> Sweep | None:
        """The sweep on the form most like this one; never one inside a node for one over nodes."""
        among = self._by_kind.get((operation, staged, form.nodes > 1), [])

        def distance(sweep: Sweep) -> tuple[float, ...]:
            other = sweep.form
            ratios = ((form.size, other.size), (form.per_node, other.per_node), (form.beside, other.beside))
            return tuple(abs(math.log(a / b)) for a, b in ratios)

        return min(among, key=distance, default=None)

    # ------------------------------------------------------------------------------------ files

    def to_json(self) -> dict[str, Any]:
        """Return the machine as :func:`mics_ds.planner.presets.load_machine` reads it."""
        return asdict(self)


def ranks_per_node(nodes: Sequence[int]) -> int:
    """Return how many consecutive ranks each node has.

    Args:
        nodes: node of each rank, in the order of ranks.

    Raises:
        MicsPlanError: nodes have different numbers of ranks, or theirs are not consecutive.
    """
    runs = [len(list(run)) for _, run in groupby(nodes)]
    if len(set(runs)) > 1 or len(runs) != len(set(nodes)):
        raise MicsPlanError(
            f"The planner needs the same number of consecutive ranks on every node, but they are on nodes "
            f"{list(nodes)}. Start the same number on each, node by node."
        )
    return runs[0]
