"""World-sharded optimizer states on their way into files for p shards: the writer of a shard gets all of its slices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..comm import collectives
from ..deepspeed_compat.engine import communication_device
from .together import Site, attempt

PIECE_BYTES = 64 << 20
"""Of the slices of one replica, on the device at a time."""


@contextmanager
def gathered(optimizer: Any, site: Site, errors: list[str]) -> Iterator[None]:
    """Let ``optimizer.state_dict()`` be that of whole shards, on the ranks that write one. Collective.

    One state of one sub-group after the other comes to the writer's host memory.

    Args:
        errors: for what this rank alone could not do.

    Raises:
        MicsCommError: another rank has died.
    """
    if optimizer.world_states is None:
        yield
        return
    optimizer.world_states.finish_updates()
    wholes: list[torch.Tensor] = []
    for sub_group, held in optimizer.world_states.checkpoints.elementwise_states():
        for writer in site.writers:
            _gather(optimizer, site, sub_group, held, writer, wholes, errors)
    if site.rank in site.writers and not errors:
        optimizer.world_states.checkpoints.gathered_states = optimizer.world_states.checkpoints.state_dict_with(wholes)
    try:
        yield
    finally:
        optimizer.world_states.checkpoints.gathered_states = None


def _gather(
    optimizer: Any,
    site: Site,
    sub_group: int,
    held: torch.Tensor,
    writer: int,
    wholes: list[torch.Tensor],
    errors: list[str],
) -> None:
    group, cut = site.groups.replication, optimizer.world_states.cuts[sub_group]
    assert group is not None, "there are slices"
    rows: list[torch.Tensor] = []
    if writer == site.rank:
        attempt(lambda: rows.append(torch.empty(cut.size, cut.width, dtype=held.dtype)), errors)
    place, count = group.ranks.index(writer), -(-held.nbytes // PIECE_BYTES)
    for first, part in collectives.gather_to(
        held.detach(), place, group, "slices of optimizer states", communication_device(), count
    ):
        if rows:  # if there is no memory for them, the others must not wait for this rank
            rows[0][:, first : first + part.shape[1]].copy_(part)

    def put() -> None:
        whole = torch.empty(cut.flat_starts[-1], dtype=held.dtype)
        cut.copy_out([rows[0]], whole.split(list(cut.numels)))
        wholes.append(whole)

    if rows:
        attempt(put, errors)
