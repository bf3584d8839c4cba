"""The ranks that hold the same shard, one of each replica, as hop 2 sees them.

Hop 2 asks for three things: an average, an elementwise maximum, and whether a step may be used. The replication group
of a job with all replicas in it answers with collectives, and ends with an error if a rank is gone. Managed replicas
(:mod:`mics_ds.replicas.membership`) come and go: their group never raises an error, works on with what it has, and
tells at the end of the step whether that was of any use.
"""

from __future__ import annotations

import torch

from ..comm import collectives
from ..comm.async_exec import Handle
from ..comm.rank_group import RankGroup


class Replication:
    """Ranks of the replicas that hold the same shard, the calling one among them. These do not change."""

    votes = False
    """Whether members come and go, so that :meth:`commit` has to be asked before a step uses the means."""

    def __init__(self, group: RankGroup) -> None:
        self._members = group

    def start_average_(self, tensor: torch.Tensor) -> Handle[torch.Tensor]:
        """Start to take the mean over the members, in place. See :func:`mics_ds.comm.collectives.start_average_`."""
        return collectives.start_average_(tensor, self._members)

    def start_max_(self, tensor: torch.Tensor, what: str) -> Handle[torch.Tensor]:
        """Start to take the elementwise maximum over the members, in place. ``what`` names it in an error."""
        return collectives.start_max_over_(tensor, self._members, what)

    def commit(self) -> bool:
        """Return whether the optimizer may use what the members have averaged since the last call.

        All ranks of a replica call it after the last collective of a step, and get the same answer.
        """
        return True

    def close(self) -> None:
        """Leave the other members."""


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
