"""The process groups of MiCS, made once and carried as one small object.

:mod:`mics_ds.comm.layout` computes who belongs together; this module checks across ranks that everybody
computed the same, and only then creates process groups, in the same order on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch.distributed as dist

from ..config import MicsConfig
from ..errors import MicsConfigError
from ..log import log_rank0
from . import agreement, placement
from .lanes import Lane
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
    """Ranks that hold the same shard. ``None`` for p = n, where there is nothing to average."""
    hierarchy: NodeGroups | None
    """Set when parameters are gathered in two stages."""
    scatter: RankGroup
    """The ranks of :attr:`partition` once more, for hop 1. On a CPU it is another process group, because
    hop 1 runs on a thread of its own, and two threads cannot agree on an order within one group."""
    scatter_hierarchy: NodeGroups | None
    """Set when gradients are reduced in two stages. See :attr:`scatter`."""
    world_nodes: tuple[int, ...]
    """Node of every rank of the world, of other data-parallel groups too."""
    gather_lane: Lane
    """Where hierarchical gathers run. One for all engines that share the process groups."""
    scatter_lane: Lane
    """Where hop 1 and hop 2 run."""


class _Cache:
    """Process groups by purpose and ranks, for the lifetime of one world.

    Creating a group costs a communicator, so a model with many ``zero.Init`` contexts must not
    create one for each. A world that was destroyed took its groups with it.
    """

    world: dist.ProcessGroup | None = None
    groups: ClassVar[dict[tuple[str, Ranks], dist.ProcessGroup]] = {}
    lanes: ClassVar[dict[tuple[str, int], Lane]] = {}
    announced: ClassVar[set[MicsLayout]] = set()

    @classmethod
    def fresh(cls) -> type[_Cache]:
        if cls.world is not dist.group.WORLD:
            cls.world, cls.groups, cls.lanes, cls.announced = dist.group.WORLD, {}, {}, set()
        return cls


@dataclass(frozen=True)
class _Agreed:
    """What all ranks have agreed on, before any group is made."""

    config: MicsConfig
    layouts: Mapping[int, MicsLayout]
    """By the first rank of each data-parallel group."""
    own: MicsLayout
    world_nodes: tuple[int, ...]
    stages_gather: bool
    stages_scatter: bool
    scatter_apart: bool
    """Whether hop 1 gets process groups of its own, see :attr:`MicsGroups.scatter`."""

    @property
    def can_stage(self) -> bool:
        return self.stages_gather or self.stages_scatter

    @property
    def scatter_purpose(self) -> str:
        return "scatter" if self.scatter_apart else "gather"


def build_groups(config: MicsConfig, full: dist.ProcessGroup) -> MicsGroups:
    """Agree with all other ranks on the configuration and return this rank's groups.

    Collective over the whole world: every rank must call it the same number of times.

    Args:
        config: what was asked for; must be equal on all ranks.
        full: the data-parallel group of this rank. Ranks of different data-parallel groups (under
            tensor parallelism) call with their own.

    Raises:
        MicsAgreementError: the ranks disagree.
        MicsConfigError: p does not divide the data-parallel size.
    """
    agreed = _agree(config, full)
    cache = _Cache.fresh()
    own = _create(agreed, full, cache)
    partition, scatter = own["gather", "partition"], own[agreed.scatter_purpose, "partition"]

    def node_groups(purpose: str, staged: bool) -> NodeGroups | None:
        if not staged:
            return None
        chunk_of_slot = agreed.own.node_grid(partition.ranks).chunk_of_slot
        return NodeGroups(own[purpose, "inter"], own[purpose, "intra"], chunk_of_slot)

    if agreed.own not in cache.announced:
        cache.announced.add(agreed.own)
        method = reduce_scatter_method(config, full)
        log_rank0(agreed.own.describe(agreed.stages_gather, agreed.stages_scatter, method))
    return MicsGroups(
        config=config,
        layout=agreed.own,
        full=RankGroup.of(full),
        partition=partition,
        replication=own.get(("gather", "replication")),
        hierarchy=node_groups("gather", agreed.stages_gather),
        scatter=scatter,
        scatter_hierarchy=node_groups(agreed.scatter_purpose, agreed.stages_scatter),
        world_nodes=agreed.world_nodes,
        gather_lane=cache.lanes.setdefault(("gather", int(config.shard_size)), Lane("all-gather")),
        scatter_lane=cache.lanes.setdefault(("scatter", int(config.shard_size)), Lane("reduction")),
    )


def _agree(config: MicsConfig, full: dist.ProcessGroup) -> _Agreed:
    """Compare configuration, data-parallel groups and placement with all ranks of the world."""
    mine = tuple(dist.get_process_group_ranks(full))
    stride = _stride(mine)
    place = placement.claim(dist.get_rank())
    payloads = agreement.exchange(
        {
            agreement.STATE: agreement.ON,
            agreement.CONFIG: config.to_json(),
            "size": len(mine),
            "first": mine[0],
            "stride": stride,
            "place": place.as_json(),
        }
    )
    agreement.require_same(payloads, {"size": "the data-parallel size", "stride": "the spacing of data-parallel ranks"})
    nodes = placement.resolve([placement.Claim(*item["place"]) for item in payloads])
    layouts = {
        first: MicsLayout(members, tuple(nodes[rank] for rank in members), int(config.shard_size))
        for first in sorted({item["first"] for item in payloads})
        for members in [tuple(first + stride * index for index in range(len(mine)))]
    }
    can_stage = not any(item.why_not_hierarchical() for item in layouts.values())
    return _Agreed(
        config=config,
        layouts=layouts,
        own=layouts[mine[0]],
        world_nodes=tuple(nodes),
        # "auto" is two stages wherever the placement allows them: with p = 4 on four nodes of two ranks at
        # 100 Mbit/s a step took 3.35 s in two stages and 5.79 s flat (docs/results.md).
        stages_gather=config.hierarchical_params_gather is not False and can_stage,
        stages_scatter=config.hierarchical_grad_scatter is not False and can_stage,
        scatter_apart=dist.get_backend(full) == "gloo",
    )


def _wanted(agreed: _Agreed, layout: MicsLayout) -> Iterator[tuple[str, str, tuple[Ranks, ...]]]:
    """(purpose, kind, ranks of each group) of all groups of one data-parallel group, in order of creation."""
    yield "gather", "partition", layout.partition_groups
    yield agreed.scatter_purpose, "partition", layout.partition_groups
    if layout.replication_size > 1:
        yield "gather", "replication", layout.replication_groups
    grids = [layout.node_grid(group) for group in layout.partition_groups] if agreed.can_stage else []
    for purpose, staged in (("gather", agreed.stages_gather), (agreed.scatter_purpose, agreed.stages_scatter)):
        if staged:
            yield purpose, "inter", tuple(ranks for grid in grids for ranks in grid.inter)
            yield purpose, "intra", tuple(ranks for grid in grids for ranks in grid.intra)


def _create(agreed: _Agreed, full: dist.ProcessGroup, cache: type[_Cache]) -> dict[tuple[str, str], RankGroup]:
    """Create the process groups and return this rank's, by purpose and kind.

    Every rank creates every group, its own or not, in one order: NCCL splits them off the world
    communicator, which takes all of its ranks.
    """
    own: dict[tuple[str, str], RankGroup] = {}
    for layout in agreed.layouts.values():
        for purpose, kind, groups in _wanted(agreed, layout):
            for ranks in groups:
                group = full if ranks == agreed.own.ranks and purpose == "gather" else _group_of(cache, purpose, ranks)
                if dist.get_rank() in ranks:
                    own[purpose, kind] = RankGroup(group, ranks, ranks.index(dist.get_rank()))
    return own


def reduce_scatter_method(config: MicsConfig, group: dist.ProcessGroup) -> ReduceScatterMethod:
    """``"native"`` or ``"all_to_all"``: what the configuration says, or what suits the backend.

    gloo's reduce-scatter sends as many bytes as its all-reduce, 2(p-1)/p · M, where an all-to-all sends
    half of that: 1.35 s and not 2.15 s for 64 MB on two nodes of two ranks at 400 Mbit/s. NCCL's is
    as good as it gets.
    """
    if config.reduce_scatter != "auto":
        return config.reduce_scatter
    return "all_to_all" if dist.get_backend(group) == "gloo" else "native"


def _group_of(cache: type[_Cache], purpose: str, ranks: Ranks) -> dist.ProcessGroup:
    if (purpose, ranks) not in cache.groups:
        cache.groups[purpose, ranks] = dist.new_group(list(ranks))
    return cache.groups[purpose, ranks]


def _stride(ranks: Ranks) -> int:
    """Distance between neighbours of a data-parallel group: 1, or the model-parallel size.

    Raises:
        MicsConfigError: the distances differ.
    """
    steps = {b - a for a, b in pairwise(ranks)} or {1}
    if len(steps) > 1:
        raise MicsConfigError(
            f"The data-parallel ranks must be evenly spaced in the world, got {ranks}. mics_ds supports the usual "
            f"tensor-parallel layouts, in which data-parallel neighbours are the model-parallel size apart."
        )
    return steps.pop()
