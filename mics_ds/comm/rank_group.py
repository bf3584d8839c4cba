"""One small object for a process group and this rank's place in it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch.distributed as dist

from .layout import Ranks

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

    @cached_property
    def nodes_follow_each_other(self) -> bool:
        """Return whether the partition group is one node's ranks after another's, and not nodes by turns."""
        k, p = self.intra.size, len(self.chunk_of_slot)
        return self.chunk_of_slot == tuple(rank for place in range(k) for rank in range(place, p, k))
