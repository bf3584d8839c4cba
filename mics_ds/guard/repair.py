"""Bad blocks beside good ones: what differs, and putting it right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..comm import collectives
from ..comm.rank_group import RankGroup
from .compare import Damage, bits
from .report import Finding, difference

LABEL = "replica guard repair"


def settle(
    damages: Sequence[Damage],
    replication: RankGroup,
    device: torch.device,
    node_of: Mapping[int, int],
    *,
    write: bool,
) -> list[Finding]:
    """Send each damaged block from a good copy (from replica 0 where there is none) to all others, one block at a time.

    Args:
        device: where collectives work.
        write: whether the ranks with bad copies take over what they got.

    Returns:
        What was wrong on this rank.
    """
    found = []
    own = replication.ranks[replication.rank]
    for (state, start, stop), verdict in damages:
        mine = state.tensor[start:stop]
        source = verdict.good or 0
        sent = mine.to(device, copy=True)
        collectives.broadcast_([sent.view(torch.uint8)], source, replication, LABEL)
        if replication.rank not in verdict.bad:
            continue
        expected = sent.to(mine.device)
        marks = bits(mine) != bits(expected)
        known = {"rank": own, "node": node_of[own], "by": verdict.by}
        reference = replication.ranks[source]
        found.append(difference(state, start, marks, mine, expected, reference=reference, **known))
        if write:
            mine.copy_(expected)
            state.put_back()
    return found
