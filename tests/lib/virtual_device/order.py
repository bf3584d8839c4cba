"""Do all ranks issue the collectives of all groups in one order?

NCCL runs the collectives of a communicator in the order in which each rank issues them, and those of different
communicators may wait for each other on a busy device. So there has to be one order of all collectives, of all
groups, that every rank follows: if each one's collectives are drawn as a chain, collectives that several ranks take
part in being one node, the drawing must have no circle.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence

from .comm import Issued

Node = tuple[str, int]


def differences(issued: Mapping[int, Sequence[Issued]]) -> list[str]:
    """What is wrong with the collectives that each rank issued, in words. Empty if nothing is.

    Args:
        issued: by rank, in the order of issue.
    """
    by_group: dict[str, dict[int, list[Issued]]] = defaultdict(dict)
    chains: dict[int, list[Node]] = {}
    for rank, items in issued.items():
        counts: dict[str, int] = defaultdict(int)
        chains[rank] = []
        for item in items:
            by_group[item.group].setdefault(rank, []).append(item)
            chains[rank].append((item.group, counts[item.group]))
            counts[item.group] += 1
    found = []
    for lists in by_group.values():
        ranks = next(iter(lists.values()))[0].ranks
        said = {rank: [(item.kind, item.payload) for item in lists.get(rank, [])] for rank in ranks if rank in issued}
        first = next(iter(said))
        for rank, mine in said.items():
            if mine != said[first]:
                at = next(
                    (i for i, (a, b) in enumerate(zip(mine, said[first])) if a != b), min(len(mine), len(said[first]))
                )
                found.append(
                    f"group {list(ranks)}: collective {at} is {mine[at : at + 1]} on rank {rank}, "
                    f"{said[first][at : at + 1]} on rank {first}"
                )
    return found or _circle(chains)


def _circle(chains: Mapping[int, Sequence[Node]]) -> list[str]:
    after: dict[Node, set[Node]] = defaultdict(set)
    waits_for: dict[Node, int] = defaultdict(int)
    for chain in chains.values():
        for node, following in itertools.pairwise(chain):
            if following not in after[node]:
                after[node].add(following)
                waits_for[following] += 1
    nodes = {node for chain in chains.values() for node in chain}
    ready = [node for node in nodes if not waits_for[node]]
    left = set(nodes)
    while ready:
        node = ready.pop()
        left.discard(node)
        for following in after[node]:
            waits_for[following] -= 1
            if not waits_for[following]:
                ready.append(following)
    if not left:
        return []
    named = sorted(left)[:6]
    return [f"no order of all collectives suits all ranks; in the circle: {named}"]
