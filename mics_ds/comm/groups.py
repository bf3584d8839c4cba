"""The process groups of MiCS, made once and carried as one small object.

:mod:`mics_ds.comm.layout` computes who belongs together; this module checks across ranks that everybody
computed the same, and only then creates process groups: one call for each kind of group, in which a
rank takes part with its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from ..config import MicsConfig
from ..errors import MicsConfigError
from ..log import log_rank0
from . import agreement, placement
from .lanes import Lane, Streams, make_lane
from .layout import MicsLayout, Ranks

ReduceScatterMethod = Literal["native", "all_to_all"]


@dataclass(frozen=True)
class RankGroup:
    """A process group with what is asked of it all the time."""

    group: dist.ProcessGroup
    ranks: Ranks
    """Global ranks of the members; the index in this tuple is the rank in the group."""
    rank: int
    """The calling rank's place in :attr:`ranks`."""

    @property
    def size(self) -> int:
        return len(self.ranks)

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> RankGroup:
        return cls(group, tuple(dist.get_process_group_ranks(group)), dist.get_rank(group))


@dataclass(frozen=True)
class NodeGroups:
    """This rank's two groups for hierarchical collectives. See :class:`mics_ds.comm.layout.NodeGrid`."""

    inter: RankGroup
    intra: RankGroup
    chunk_of_slot: tuple[int, ...]


@dataclass(frozen=True)
class MicsGroups:
    """Every group one rank needs. Equal arguments give the same process groups."""

    config: MicsConfig
    layout: MicsLayout
    full: RankGroup
    """All data-parallel ranks."""
    partition: RankGroup
    """Ranks that together hold one copy of the model states. For p = n this *is* :attr:`full`."""
    replication: RankGroup | None
    """Ranks that hold the same shard. ``None`` for p = n, where there is nothing to average. Hop 2 runs beside the
    backward pass, which may have collectives of the model's own: on a device without streams this is never
    :attr:`full`, for the reason given at :attr:`scatter`."""
    hierarchy: NodeGroups | None
    """Set when parameters are gathered in two stages."""
    scatter: RankGroup
    """The ranks of :attr:`partition` once more, for hop 1. On a device without streams it is another process group,
    because hop 1 runs on a thread of its own, and two threads cannot agree on an order within one group."""
    scatter_hierarchy: NodeGroups | None
    """Set when gradients are reduced in two stages. See :attr:`scatter`."""
    reduce_scatter: ReduceScatterMethod
    """How hop 1 moves gradients."""
    node_of: Mapping[int, int]
    """Node of every rank that took part in the agreement, by global rank: all of the world, as a rule."""
    gather_lane: Lane
    """Where hierarchical gathers run. One for all engines that share the process groups."""
    scatter_lane: Lane
    """Where hop 1 and hop 2 run."""
    update: RankGroup | None
    """With world-sharded optimizer states, the ranks of :attr:`replication` once more, for updated weights: another
    process group where :attr:`scatter` is one, and for the same reason. Otherwise ``None``."""
    update_lane: Lane
    """Where they are gathered, beside the next forward pass."""


class _Cache:
    """This rank's process groups by purpose and by all groups of their kind, for the lifetime of one world.

    Creating a group costs a communicator, so a model with many ``zero.Init`` contexts must not
    create one for each, nor an engine that follows another. A world that was destroyed took its groups with it.
    """

    world: dist.ProcessGroup | None = None
    groups: ClassVar[dict[tuple[str, tuple[Ranks, ...]], dist.ProcessGroup]] = {}
    created: ClassVar[dict[tuple[str, Ranks], int]] = {}
    """How many groups this rank has made of these ranks under this description, those that failed among them."""
    lanes: ClassVar[dict[tuple[str, tuple[Ranks, ...], Streams | None], Lane]] = {}
    announced: ClassVar[set[MicsLayout]] = set()

    @classmethod
    def fresh(cls) -> type[_Cache]:
        if cls.world is not dist.group.WORLD:
            cls.world, cls.groups, cls.created, cls.lanes, cls.announced = dist.group.WORLD, {}, {}, {}, set()
        return cls


@dataclass(frozen=True)
class _Agreed:
    """What all ranks have agreed on, before any group is made."""

    own: MicsLayout
    node_of: Mapping[int, int]
    stages_gather: bool
    stages_scatter: bool
    scatter_apart: bool
    """Whether hops get process groups of their own, see :attr:`MicsGroups.scatter`."""

    @property
    def can_stage(self) -> bool:
        return self.stages_gather or self.stages_scatter

    spreads_states: bool
    """Whether optimizer states are sharded over the replicas as well."""

    @property
    def scatter_purpose(self) -> str:
        return "scatter" if self.scatter_apart else "gather"

    @property
    def update_purpose(self) -> str:
        return "update" if self.scatter_apart else "gather"


def build_groups(
    config: MicsConfig,
    full: dist.ProcessGroup,
    participants: Ranks | None = None,
    streams: Streams | None = None,
) -> MicsGroups:
    """Agree with all other ranks on the configuration and return this rank's groups.

    Collective over the participants: every one of them must call it the same number of times.

    Args:
        config: what was asked for; must be equal on all ranks.
        full: the data-parallel group of this rank. Ranks of different data-parallel groups (under
            tensor parallelism) call with their own.
        participants: global ranks that have to agree, all of ``full`` among them; by default the world.
        streams: of the device that the groups work on, ``None`` for the CPU.

    Raises:
        MicsAgreementError: the ranks disagree.
        MicsConfigError: p does not divide the data-parallel size.
    """
    scatter_apart = streams is None
    agreed = _agree(config, full, participants or agreement.world_ranks(), scatter_apart)
    device = torch.device("cpu" if streams is None else streams.current_device_name())
    cache = _Cache.fresh()
    own = _create(agreed, full, device, cache)
    partition, scatter = own["gather", "partition"], own[agreed.scatter_purpose, "partition"]

    def node_groups(purpose: str, staged: bool) -> NodeGroups | None:
        if not staged:
            return None
        chunk_of_slot = agreed.own.node_grid(partition.ranks).chunk_of_slot
        return NodeGroups(own[purpose, "inter"], own[purpose, "intra"], chunk_of_slot)

    def lane(purpose: str, name: str, ahead: int | None = None, apart: bool = False) -> Lane:
        key = (purpose, agreed.own.partition_groups, streams)
        if key not in cache.lanes:
            cache.lanes[key] = make_lane(name, streams, ahead=ahead, apart=apart)
        return cache.lanes[key]

    method = reduce_scatter_method(config, full, device)
    if agreed.own not in cache.announced:
        cache.announced.add(agreed.own)
        log_rank0(agreed.own.describe(agreed.stages_gather, agreed.stages_scatter, method))
    return MicsGroups(
        config=config,
        layout=agreed.own,
        full=RankGroup.of(full),
        partition=partition,
        replication=own.get((agreed.scatter_purpose, "replication")),
        hierarchy=node_groups("gather", agreed.stages_gather),
        scatter=scatter,
        scatter_hierarchy=node_groups(agreed.scatter_purpose, agreed.stages_scatter),
        reduce_scatter=method,
        node_of=agreed.node_of,
        gather_lane=lane("gather", "all-gather"),
        scatter_lane=lane("scatter", "reduction", ahead=2),
        update=own.get((agreed.update_purpose, "replication")) if agreed.spreads_states else None,
        update_lane=lane("update", "weight update", ahead=2, apart=True),
    )


def _agree(config: MicsConfig, full: dist.ProcessGroup, participants: Ranks, scatter_apart: bool) -> _Agreed:
    """Compare configuration, data-parallel groups and placement with all participants."""
    mine = tuple(dist.get_process_group_ranks(full))
    with agreement.failing_together(participants):
        if not set(mine) <= set(participants):
            raise MicsConfigError(
                f"Expected the parameters to be partitioned over ranks that build the engine together, {participants}, "
                f"but their data-parallel group is {mine}. Give zero.Init the engine's data_parallel_group."
            )
        # The groups of others are worked out from their first rank. Nobody has to where only our own takes part.
        stride = 0 if mine == participants else _stride(mine)
        place = placement.claim(dist.get_rank())
    payloads = agreement.exchange(
        {
            agreement.STATE: agreement.ON,
            agreement.CONFIG: config.to_json(),
            "size": len(mine),
            "first": mine[0],
            "stride": stride,
            **place.as_json(),
        },
        participants,
    )
    same = {"size": "the data-parallel size", "stride": "the spacing of data-parallel ranks"}
    agreement.require_same(payloads, same, participants)
    nodes = placement.resolve([placement.Claim.from_json(item) for item in payloads], participants)
    node_of = dict(zip(participants, nodes))
    layouts = {mine[0]: MicsLayout(mine, tuple(node_of[rank] for rank in mine), int(config.shard_size))}
    for first in sorted({item["first"] for item in payloads} - {mine[0]}):
        members = tuple(first + stride * index for index in range(len(mine)))
        layouts[first] = MicsLayout(members, tuple(node_of[rank] for rank in members), int(config.shard_size))
    can_stage = not any(item.why_not_hierarchical() for item in layouts.values())
    return _Agreed(
        own=layouts[mine[0]],
        node_of=node_of,
        # "auto" is two stages wherever the placement allows them: with p = 4 on four nodes of two ranks at
        # 100 Mbit/s a step took 3.35 s in two stages and 5.79 s flat (docs/results.md).
        stages_gather=config.hierarchical_params_gather is not False and can_stage,
        stages_scatter=config.hierarchical_grad_scatter is not False and can_stage,
        scatter_apart=scatter_apart,
        spreads_states=config.optimizer_states == "world",
    )


def _wanted(agreed: _Agreed) -> Iterator[tuple[str, str, tuple[Ranks, ...]]]:
    """(purpose, kind, ranks of each group) of all groups of the data-parallel group, in order of creation."""
    layout = agreed.own
    yield "gather", "partition", layout.partition_groups
    yield agreed.scatter_purpose, "partition", layout.partition_groups
    if layout.replication_size > 1:
        yield agreed.scatter_purpose, "replication", layout.replication_groups
        if agreed.spreads_states and agreed.scatter_apart:
            yield agreed.update_purpose, "replication", layout.replication_groups
    grids = [layout.node_grid(group) for group in layout.partition_groups] if agreed.can_stage else []
    for purpose, staged in (("gather", agreed.stages_gather), (agreed.scatter_purpose, agreed.stages_scatter)):
        if staged:
            yield purpose, "inter", tuple(ranks for grid in grids for ranks in grid.inter)
            yield purpose, "intra", tuple(ranks for grid in grids for ranks in grid.intra)


def _create(
    agreed: _Agreed, full: dist.ProcessGroup, device: torch.device, cache: type[_Cache]
) -> dict[tuple[str, str], RankGroup]:
    """Create the process groups and return this rank's, by purpose and kind."""
    own: dict[tuple[str, str], RankGroup] = {}
    for purpose, kind, groups in _wanted(agreed):
        ranks = next(ranks for ranks in groups if dist.get_rank() in ranks)
        if ranks == agreed.own.ranks and purpose == "gather":
            group = full
        else:
            if (purpose, groups) not in cache.groups:
                cache.groups[purpose, groups] = _new_group(full, groups, ranks, device, f"{purpose} {kind}")
            group = cache.groups[purpose, groups]
        own[purpose, kind] = RankGroup(group, ranks, ranks.index(dist.get_rank()))
    return own


def _new_group(
    full: dist.ProcessGroup, groups: tuple[Ranks, ...], own: Ranks, device: torch.device, kind: str
) -> dist.ProcessGroup:
    """Create all groups of one kind, in one call whatever their number, and return this rank's own.

    Where the job has bound its ranks to devices, torch makes every new group by a split of a communicator, by all
    ranks of it: then ``full`` is split into all of ``groups`` at once. Elsewhere only the members of a group meet.
    Either way no rank outside ``full`` is needed, and the new groups are as patient as ``full`` is, where torch would
    give them its default. (A DeviceMesh would do the same by the world, with torch's timeout, and could not make a
    second set of groups of the same ranks.)
    """
    cache, timeout = _Cache.fresh(), agreement.timeout_of(full, device)
    number = cache.created[kind, own] = cache.created.get((kind, own), 0) + 1
    with _named(f"mics {kind} {agreement.digest(own)} {number}"):
        if _can_split(full, device):
            place = {rank: index for index, rank in enumerate(dist.get_process_group_ranks(full))}
            split = [[place[rank] for rank in ranks] for ranks in groups]
            group = dist.split_group(full, split, timeout=timeout, group_desc=f"mics {kind}")
        else:
            with _unbound():
                group = dist.new_group(
                    list(own), timeout=timeout, use_local_synchronization=True, group_desc=f"mics {kind}"
                )
    assert isinstance(group, dist.ProcessGroup), "this rank is a member"
    return group


def _can_split(full: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether ``full`` has one communicator, which is up, so that it can be split."""
    return (
        getattr(dist.group.WORLD, "bound_device_id", None) is not None
        # Of a group with backends for several devices, torch splits each: with the options of one, or twice the same.
        and len(full._device_types) == 1
        and bool(getattr(full._get_backend(device), "supports_splitting", False))
    )


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Give the group that is created in this context this name.

    It is where the members look for each other in the store. torch hashes their ranks together with the number of
    groups that the process has: ranks with different numbers (of a pipeline's first stage, say) never meet, and after
    a group was destroyed the next one of its ranks finds the addresses of the old one.
    """
    theirs = c10d._process_group_name
    c10d._process_group_name = lambda *_, **__: name  # type: ignore[assignment]
    try:
        yield
    finally:
        c10d._process_group_name = theirs


@contextmanager
def _unbound() -> Iterator[None]:
    """Keep torch from a split of the world's communicator, which all ranks of the world would have to join."""
    world: Any = dist.group.WORLD
    device = getattr(world, "bound_device_id", None)
    if device is None:
        yield
        return
    world.bound_device_id = None
    try:
        yield
    finally:
        world.bound_device_id = device


def reduce_scatter_method(config: MicsConfig, group: dist.ProcessGroup, device: torch.device) -> ReduceScatterMethod:
    """``"native"`` or ``"all_to_all"``: what the configuration says, or what suits the backend.

    gloo's reduce-scatter sends as many bytes as its all-reduce, 2(p-1)/p · M, where an all-to-all sends
    half of that: 1.35 s and not 2.15 s for 64 MB on two nodes of two ranks at 400 Mbit/s. NCCL's is
    as good as it gets.
    """
    if config.reduce_scatter != "auto":
        return config.reduce_scatter
    # A group may have a backend for each device, so its own name says little.
    backend: Any = group._get_backend(device)
    return "all_to_all" if backend.name() == "gloo" else "native"


def _stride(ranks: Ranks) -> int:
    """Distance between neighbours of a data-parallel group: 1, or the model-parallel size.

    Raises:
        MicsConfigError: the distances differ, or the ranks do not ascend.
    """
    steps = {b - a for a, b in pairwise(ranks)} or {1}
    if len(steps) > 1 or min(steps) < 1:
        raise MicsConfigError(
            f"The data-parallel ranks must ascend and be evenly spaced in the world, got {ranks}. mics_ds supports the "
            f"usual tensor-parallel layouts, in which data-parallel neighbours are the model-parallel size apart."
        )
    return steps.pop()
