"""The collectives of MiCS: functions of tensors and groups, without DeepSpeed.

| what             | group               | when                              | bytes sent per rank      |
|------------------|---------------------|-----------------------------------|--------------------------|
| all-gather       | partition           | before a module runs              | (p-1)/p · M              |
|  … hierarchical  | inter- then intra-  | the same                          | between nodes (p-k)/p · M|
| reduce-scatter   | partition (hop 1)   | every micro-step                  | (p-1)/p · M              |
| all-reduce mean  | replication (hop 2) | at the accumulation boundary only | 2(r-1)/r · M/p           |

The flat all-gather and hop 1 are DeepSpeed's own, on the partition group. What it has no notion of
is here: the two-stage gather, the mean over replicas, and agreeing on scalars.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist

from .errors import MicsCommError
from .groups import NodeGroups, RankGroup


def _run(what: str, group: RankGroup, call, *args, **kwargs):
    """Issue a collective; if it fails, say which one it was and among whom."""
    try:
        return call(*args, group=group.group, **kwargs)
    except RuntimeError as error:
        raise MicsCommError(_failure(what, group)) from error


def _failure(what: str, group: RankGroup) -> str:
    return (
        f"MiCS {what} over ranks {list(group.ranks)} failed on rank {group.ranks[group.rank]}. Another rank of that "
        f"group has most likely died or been killed; its own output says why."
    )


def average_over_replicas_(tensor: torch.Tensor, replication: RankGroup) -> None:
    """Hop 2: replace ``tensor`` by its mean over the replication group, in place.

    The partial gradients of hop 1 are means over p ranks, so the mean over r of them is the mean over
    n = p·r. A mean may be repeated: averaging what is already equal on all replicas changes nothing,
    whereas a sum would multiply it by r each time.

    Dividing comes first, as in DeepSpeed's reduce-scatter: a sum of fp16 values could overflow where
    their mean does not. Ring all-reduce gives every rank the same bits, which keeps replicas equal.

    Args:
        tensor: any shape and floating dtype; equal shape on all ranks of the group.

    Raises:
        MicsCommError: the collective failed.
    """
    tensor.div_(replication.size)
    _run("gradient all-reduce (hop 2)", replication, dist.all_reduce, tensor)


def max_over_(tensor: torch.Tensor, group: RankGroup, what: str) -> None:
    """Elementwise maximum over a group, in place. ``what`` names the quantity in an error."""
    _run(f"agreement on the {what}", group, dist.all_reduce, tensor, op=dist.ReduceOp.MAX)


def broadcast_(tensors: Sequence[torch.Tensor], source: int, group: RankGroup) -> None:
    """Overwrite each tensor with that of ``source``, a rank *in* ``group``. Issued together, then awaited."""
    works = [
        _run("parameter broadcast", group, dist.broadcast, tensor, src=group.ranks[source], async_op=True)
        for tensor in tensors
    ]
    for work in works:
        wait(work, "parameter broadcast", group)


def wait(work: dist.Work, what: str, group: RankGroup) -> None:
    """Wait for an asynchronous collective, with the same error as a blocking one."""
    try:
        work.wait()
    except RuntimeError as error:
        raise MicsCommError(_failure(what, group)) from error


class GatheredShards(NamedTuple):
    """Result of :func:`all_gather_hierarchical`. ``chunks`` may be read only after ``handle.wait()``."""

    chunks: list[torch.Tensor]
    """p views into one flat buffer, each shaped like the shard, by partition rank."""
    handle: HierarchicalHandle


def all_gather_hierarchical(shard: torch.Tensor, groups: NodeGroups) -> GatheredShards:
    """All-gather in two stages, between nodes and then inside each node.

    The first stage runs k times side by side, each among the N ranks with the same local place, and
    moves (p-k)/p · M over a node's link instead of (p-1)/p · M; the second stays inside the node.
    Going inside first would move k times more between nodes.

    Args:
        shard: 1-D, this rank's chunk, the same length and dtype on all ranks of the partition group.
        groups: this rank's inter- and intra-node groups.

    Returns:
        Views in partition-rank order into a buffer of p · ``shard.numel()`` elements, and a handle.
    """
    slot_numel, nodes, local = shard.numel(), groups.inter.size, groups.intra.size
    buffer = shard.new_empty(slot_numel * nodes * local)
    slots = buffer.split(slot_numel)
    chunks: list[torch.Tensor] = [buffer] * len(slots)
    for slot, chunk in enumerate(groups.chunk_of_slot):
        chunks[chunk] = slots[slot]
    block = buffer.narrow(0, groups.intra.rank * nodes * slot_numel, nodes * slot_numel)
    first = _run("inter-node all-gather", groups.inter, dist.all_gather_into_tensor, block, shard, async_op=True)
    handle = HierarchicalHandle(groups, buffer, block, first)
    if buffer.device.type != "cpu":
        # On a stream, waiting for the first stage only orders the second behind it; the host goes on.
        handle.start_second_stage()
    return GatheredShards(chunks, handle)


@dataclass
class HierarchicalHandle:
    """Finishes a hierarchical all-gather. :meth:`wait` may be called again; later calls return at once."""

    groups: NodeGroups
    buffer: torch.Tensor
    block: torch.Tensor
    first: dist.Work
    second: dist.Work | None = None
    complete: bool = field(default=False, init=False)

    def start_second_stage(self) -> None:
        if self.second is None:
            wait(self.first, "inter-node all-gather", self.groups.inter)
            self.second = _run(
                "intra-node all-gather",
                self.groups.intra,
                dist.all_gather_into_tensor,
                self.buffer,
                self.block,
                async_op=True,
            )

    def wait(self) -> None:
        """Return once every chunk has arrived.

        Raises:
            MicsCommError: either stage failed.
        """
        if not self.complete:
            self.start_second_stage()
            assert self.second is not None
            wait(self.second, "intra-node all-gather", self.groups.intra)
            self.complete = True
