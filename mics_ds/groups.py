"""The process groups of MiCS, made once and carried as one small object.

:mod:`mics_ds.layout` computes who belongs together; this module checks across ranks that everybody
computed the same, and only then creates process groups, in the same order on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch.distributed as dist

from . import agreement, placement
from .config import MicsConfig
from .errors import MicsConfigError
from .lanes import Lane
from .layout import MicsLayout, Ranks
from .log import log_rank0


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
    """This rank's two groups for hierarchical collectives. See :class:`mics_ds.layout.NodeGrid`."""

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
    """Where hop 1 and hop 2 run. Likewise."""


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
    mine = tuple(dist.get_process_group_ranks(full))
    place = placement.claim(dist.get_rank())
    payloads = agreement.exchange(
        {
            agreement.STATE: agreement.ON,
            agreement.CONFIG: config.to_json(),
            "size": len(mine),
            "first": mine[0],
            "stride": _stride(mine),
            "place": place.as_json(),
        }
    )
    agreement.require_same(payloads, {"size": "the data-parallel size", "stride": "the spacing of data-parallel ranks"})
    nodes = placement.resolve([placement.Claim(*item["place"]) for item in payloads])

    stride = _stride(mine)
    layouts = {
        first: MicsLayout(members, tuple(nodes[rank] for rank in members), config.shard_size)
        for first in sorted({item["first"] for item in payloads})
        for members in [tuple(first + stride * index for index in range(len(mine)))]
    }
    layout = layouts[mine[0]]
    why_flat = next((reason for reason in (item.why_not_hierarchical() for item in layouts.values()) if reason), None)
    # "auto" is two stages wherever the placement allows them: with p = 4 on four nodes of two ranks at
    # 100 Mbit/s a step took 3.35 s in two stages and 5.79 s flat (docs/results.md).
    gather_in_stages = config.hierarchical_params_gather is not False and why_flat is None
    scatter_in_stages = config.hierarchical_grad_scatter is not False and why_flat is None
    apart = "scatter" if dist.get_backend(full) == "gloo" else "gather"
    cache = _Cache.fresh()

    # Every rank creates every group, its own or not, in one order: NCCL splits them off the world
    # communicator, which takes all of its ranks.
    own: dict[tuple[str, str], RankGroup] = {}
    for item in layouts.values():
        wanted: list[tuple[str, str, tuple[Ranks, ...]]] = [("gather", "partition", item.partition_groups)]
        wanted.append((apart, "partition", item.partition_groups))
        if item.replication_size > 1:
            wanted.append(("gather", "replication", item.replication_groups))
        grids = [] if why_flat else [item.node_grid(group) for group in item.partition_groups]
        for purpose, staged in (("gather", gather_in_stages), (apart, scatter_in_stages)):
            if staged:
                wanted += [(purpose, "inter", grid.inter) for grid in grids]
                wanted += [(purpose, "intra", grid.intra) for grid in grids]
        for purpose, kind, groups in wanted:
            for ranks in groups:
                group = full if ranks == mine and purpose == "gather" else _group_of(cache, purpose, ranks)
                if dist.get_rank() in ranks:
                    own[purpose, kind] = RankGroup(group, ranks, ranks.index(dist.get_rank()))

    partition = own["gather", "partition"]

    def node_groups(purpose: str, staged: bool) -> NodeGroups | None:
        if not staged:
            return None
        chunk_of_slot = layout.node_grid(partition.ranks).chunk_of_slot
        return NodeGroups(own[purpose, "inter"], own[purpose, "intra"], chunk_of_slot)

    if layout not in cache.announced:
        cache.announced.add(layout)
        log_rank0(layout.describe(gather_in_stages, scatter_in_stages, reduce_scatter_method(config, full)))
    return MicsGroups(
        config=config,
        layout=layout,
        full=RankGroup.of(full),
        partition=partition,
        replication=own.get(("gather", "replication")),
        hierarchy=node_groups("gather", gather_in_stages),
        scatter=own[apart, "partition"],
        scatter_hierarchy=node_groups(apart, scatter_in_stages),
        world_nodes=tuple(nodes),
        gather_lane=cache.lanes.setdefault(("gather", config.shard_size), Lane("all-gather")),
        scatter_lane=cache.lanes.setdefault(("scatter", config.shard_size), Lane("reduction")),
    )


def reduce_scatter_method(config: MicsConfig, group: dist.ProcessGroup) -> str:
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
