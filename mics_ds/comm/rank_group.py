"""One small object for a process group and this rank's place in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch.distributed as dist

from .layout import Ranks

ReduceScatterMethod = Literal["native", "all_to_all"]
REDUCE_SCATTER_METHODS: tuple[ReduceScatterMethod, ...] = get_args(ReduceScatterMethod)


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
class Ways:
    """Ways that collectives over the partition group take. They differ in time, and in the order of sums."""

    staged_gather: bool
    """Whether parameters are gathered in two stages, and not in one."""
    staged_scatter: bool
    """Whether gradients are reduced in two stages."""
    reduce_scatter: ReduceScatterMethod
    """Method by which hop 1 moves gradients."""

    @property
    def gather(self) -> str:
        """Name the way of gathers for the log."""
        return "hierarchical" if self.staged_gather else "flat"

    @property
    def scatter(self) -> str:
        """Name the way of hop 1 for the log."""
        return f"{'hierarchical' if self.staged_scatter else 'flat'}, by {self.reduce_scatter}"


@dataclass(frozen=True)
class StageGroups:
    """This rank's groups between and inside fast domains, for collectives in two stages.

    The partition group is N domains of k ranks, one domain's ranks after another's.
    """

    inter: RankGroup
    intra: RankGroup
