"""Groups of ranks by arithmetic: no process group, no torch.

Ranks are the *data-parallel* ranks of the job in their data-parallel order, given as global ranks;
under tensor parallelism that is a strided subset of the world. With n of them and a partition size
p, partition group g is the p consecutive ranks from g·p on, and the ranks with the same place in
their partition group form a replication group. See README, "What MiCS is".

    n = 8, p = 4, two ranks in each fast domain

               domain A  domain B  domain C  domain D
    ranks      0   1     2   3     4   5     6   7
               └── partition 0 ──┘ └── partition 1 ──┘
    replication groups: {0,4} {1,5} {2,6} {3,7}
    in partition 0:  inside domains {0,1} {2,3}   between domains {0,2} {1,3}

A *fast domain* is a set of ranks whose links are much faster than the network: those of one node, as a rule. See
:mod:`mics_ds.comm.placement`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from ..errors import MicsConfigError
from ..formatting import abbreviate

Ranks = tuple[int, ...]
"""Global ranks, in an order that all ranks share."""


@dataclass(frozen=True)
class MicsLayout:
    """Partition and replication groups of one data-parallel group, and the groups of two stages.

    Args:
        ranks: global ranks of the data-parallel group, in data-parallel order.
        domains: for each of them, the index of its fast domain.
        partition_size: p.

    Raises:
        MicsConfigError: p does not divide n.
    """

    ranks: Ranks
    domains: tuple[int, ...]
    partition_size: int

    def __post_init__(self) -> None:
        n, p = len(self.ranks), self.partition_size
        assert len(self.domains) == n, "one index per rank"
        if p > n or n % p:
            divisors = ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
            raise MicsConfigError(
                f"zero_optimization.mics_shard_size = {p} must divide the number of data-parallel ranks, which is {n}. "
                f"Choose one of {divisors}."
            )

    @property
    def world_size(self) -> int:
        """n: number of data-parallel ranks."""
        return len(self.ranks)

    @property
    def replication_size(self) -> int:
        """r = n / p: number of copies of the model states."""
        return self.world_size // self.partition_size

    @cached_property
    def partition_groups(self) -> tuple[Ranks, ...]:
        p = self.partition_size
        return tuple(self.ranks[start : start + p] for start in range(0, self.world_size, p))

    @cached_property
    def replication_groups(self) -> tuple[Ranks, ...]:
        p = self.partition_size
        return tuple(self.ranks[place::p] for place in range(p))

    @cached_property
    def domain_of(self) -> dict[int, int]:
        """Fast domain of each rank, by global rank."""
        return dict(zip(self.ranks, self.domains))

    def domain_counts(self, group: Ranks) -> dict[int, int]:
        """Return how many ranks of ``group`` each fast domain has, in order of first appearance."""
        return dict(Counter(self.domain_of[rank] for rank in group))

    @cached_property
    def why_not_hierarchical(self) -> str | None:
        """``None`` if every partition group is an N × k grid with N, k > 1, else the reason in words.

        One answer for the whole job: ranks that took different paths would issue collectives that
        their peers never join.
        """
        for index, group in enumerate(self.partition_groups):
            runs = [domain for domain, _ in groupby(group, self.domain_of.__getitem__)]
            counts = self.domain_counts(group)
            if len(counts) == 1:
                return f"partition group {index} lies inside one fast domain"
            if len(runs) > len(counts):
                return f"ranks of partition group {index} are on its fast domains by turns, and not one after another"
            if len(set(counts.values())) > 1:
                spread = ", ".join(f"{count} in domain {domain}" for domain, count in counts.items())
                return f"partition group {index} spans fast domains unevenly ({spread})"
            if set(counts.values()) == {1}:
                return f"partition group {index} has one rank in each of its fast domains, so there is no inner stage"
        return None

    def domain_grid(self, group: Ranks) -> tuple[tuple[Ranks, ...], tuple[Ranks, ...]]:
        """Arrange one partition group as N domains × k places. Requires :attr:`why_not_hierarchical` to be ``None``.

        Returns:
            One group of N ranks for each place in a domain, and one of k ranks for each domain.
        """
        assert self.why_not_hierarchical is None, "caller must check that the group is a grid"
        k = len(group) // len(self.domain_counts(group))
        inter = tuple(group[place::k] for place in range(k))
        return inter, tuple(group[start : start + k] for start in range(0, len(group), k))

    def describe(self, domains_from: str, gather_in_stages: bool, scatter_in_stages: bool, reduce_scatter: str) -> str:
        """Return one readable block for the log.

        Args:
            domains_from: how the fast domains are known.
        """
        n, p, r = self.world_size, self.partition_size, self.replication_size
        members: dict[int, list[int]] = {}
        for rank, domain in zip(self.ranks, self.domains):
            members.setdefault(domain, []).append(rank)
        flat = f"flat ({self.why_not_hierarchical or 'as configured'})"
        return (
            f"MiCS: {n} data-parallel ranks in {len(members)} fast domain{'s' * (len(members) > 1)} = "
            f"{r} replica{'s' * (r > 1)} x {p} shard{'s' * (p > 1)}\n"
            f"  partition groups   {_some(self.partition_groups)}\n"
            f"  replication groups {_some(self.replication_groups)}\n"
            f"  fast domains       {_some(list(members.values()))}, {domains_from}\n"
            f"  parameter gather   {'hierarchical' if gather_in_stages else flat}\n"
            f"  gradient scatter   {'hierarchical' if scatter_in_stages else flat}, by {reduce_scatter}"
        )


def _some(groups: Sequence[Sequence[int]], limit: int = 8) -> str:
    shown = [
        f"[{ranks[0]}-{ranks[-1]}]"
        if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1))
        else abbreviate(ranks)
        for ranks in groups[:limit]
    ]
    return " ".join(shown) + (f" ... ({len(groups)} in all)" if len(groups) > limit else "")
