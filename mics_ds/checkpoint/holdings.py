"""Which copies in memory a rank makes, and which of other ranks it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..comm.groups import MicsGroups
from ..deepspeed_compat import checkpoint as seam
from . import memory
from .neighbours import receivers
from .together import Site


class Holdings(NamedTuple):
    """What one rank has to do with copies."""

    own: str
    """The name of the copy that it makes; empty if another rank of its node makes that."""
    part: tuple[int, int]
    """Which slice of how many that is."""
    to: tuple[int, ...]
    """The rank that keeps it too."""
    guests: Mapping[int, str]
    """Ranks whose copies it keeps, and the names of those."""
    of_node: frozenset[str]
    """The names of all copies that are kept on this node."""
    model_parallel: int

    @property
    def here(self) -> list[str]:
        return [*([self.own] if self.own else []), *self.guests.values()]


def holdings_of(engine: Any, groups: MicsGroups, site: Site) -> Holdings:
    """Whole shards by one rank of each node that has them; with world-sharded optimizer states, slices by every rank.

    Args:
        site: with a folder of each node.
    """
    model_parallel, layout = seam.model_parallel_rank(engine), groups.layout
    if engine.optimizer.world_states is None:
        names = {
            memory.shard_name(model_parallel, shard)
            for shard, ranks in enumerate(layout.replication_groups)
            if set(ranks) & set(site.peers)
        }
        own = memory.shard_name(model_parallel, site.shard) if site.writer == site.rank else ""
        return Holdings(own, (0, 1), (), {}, frozenset(names), model_parallel)
    replicas = layout.replication_size
    of_rank, kept_by = dict[int, str](), dict[int, int]()
    for shard, ranks in enumerate(layout.replication_groups):
        kept_by.update(receivers(ranks, groups.node_of))
        for place, rank in enumerate(ranks):
            of_rank[rank] = memory.shard_name(model_parallel, shard, (place, replicas))
    place = layout.replication_groups[site.shard].index(site.rank)
    neighbours = set(site.peers)
    return Holdings(
        own=of_rank[site.rank],
        part=(place, replicas),
        to=(kept_by[site.rank],) if site.rank in kept_by else (),
        guests={rank: of_rank[rank] for rank, keeper in kept_by.items() if keeper == site.rank},
        of_node=frozenset(name for rank, name in of_rank.items() if {rank, kept_by.get(rank)} & neighbours),
        model_parallel=model_parallel,
    )
