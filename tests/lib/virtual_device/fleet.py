"""One real rank among many imagined ones: virtual time for any number of ranks, in one process.

Ranks of a data-parallel job do the same things at the same times, so one of them stands for all. The other ranks are
imagined to have the same data: sums are multiples, gathered parts are copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups
from torch.testing._internal.distributed.fake_pg import FakeStore

from mics_ds.comm import agreement, groups, placement

from .accelerator import DEVICE


@contextmanager
def imagined_ranks(world_size: int, ranks_per_node: int) -> Iterator[None]:
    """This process is rank 0 of a job of that size, for as long as the context lasts. Then it is alone."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())

    def exchange(note: Any, among: Any, what: str) -> list[Any]:
        """Return the placements of all ranks, the only notes that are exchanged to make groups."""
        places = [divmod(rank, ranks_per_node) for rank in among.ranks]
        return [(placement.Claim("imagined", f"node {node}", local), note[1]) for node, local in places]

    DEVICE.communication.imagined = True
    try:
        with (
            mock.patch.object(agreement, "require_same"),
            mock.patch.object(groups, "exchange", exchange),
            mock.patch.object(deepspeed_groups, "_WORLD_GROUP", None),  # of another job
        ):
            yield
    finally:
        DEVICE.communication.imagined = False
        dist.destroy_process_group()
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
