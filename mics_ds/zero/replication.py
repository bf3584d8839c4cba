"""The ranks that hold the same shard, one of each replica, as hop 2 sees them.

Hop 2 asks for three things: an average, an elementwise maximum, and whether a step may be used. A *fixed* replication
group, the one of a job with all replicas in it, answers with collectives, and ends with an error if a rank is gone. A
*managed* one (:mod:`mics_ds.replicas.membership`) has members that come and go: it never raises an error, works on with
what it has, and tells at the end of the step whether that was of any use.
"""

from __future__ import annotations

from typing import Protocol

import torch

from ..comm import collectives
from ..comm.async_exec import Handle
from ..comm.rank_group import RankGroup


class Replication(Protocol):
    """Ranks of the replicas that hold the same shard, the calling one among them."""

    votes: bool
    """Whether members come and go, so that :meth:`commit` has to be asked before a step uses the means."""

    def start_average_(self, tensor: torch.Tensor) -> Handle[torch.Tensor]:
        """Start to take the mean over the members, in place. See :func:`mics_ds.comm.collectives.start_average_`."""
        ...

    def start_max_(self, tensor: torch.Tensor, what: str) -> Handle[torch.Tensor]:
        """Start to take the elementwise maximum over the members, in place. ``what`` names it in an error."""
        ...

    def commit(self) -> bool:
        """Return whether the optimizer may use what the members have averaged since the last call.

        All ranks of a replica call it after the last collective of a step, and get the same answer.
        """
        ...

    def close(self) -> None:
        """Leave the other members."""
        ...


class FixedReplication(Replication):
    """Members that do not change: the replication group of a job with all replicas in it."""

    votes = False

    def __init__(self, group: RankGroup) -> None:
        self._group = group

    def start_average_(self, tensor: torch.Tensor) -> Handle[torch.Tensor]:
        return collectives.start_average_(tensor, self._group)

    def start_max_(self, tensor: torch.Tensor, what: str) -> Handle[torch.Tensor]:
        return collectives.start_max_over_(tensor, self._group, what)

    def commit(self) -> bool:
        return True

    def close(self) -> None:
        return


def agree_on_norms(norms: torch.Tensor, replication: Replication) -> torch.Tensor:
    """Return the maximum over replicas, so that all clip by the same scalar.

    Each replica sums squares in its own partition group; the values are equal, but not always to
    the last bit (a group inside a node may be reduced in another order than one across nodes). A
    clipping factor that differs in one bit would make replicas drift apart for good.

    Args:
        norms: 1-D, -1 where invalid. That must win over any number, on all replicas.
    """
    norms = torch.where(norms < 0, torch.inf, norms)
    replication.start_max_(norms, "gradient norm").wait()
    return torch.where(norms.isinf(), -1.0, norms)
