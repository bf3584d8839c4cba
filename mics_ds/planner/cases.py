"""Measurements of calibration: the collectives of training, on the groups that training would use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from ..comm import collectives
from ..comm.groups import MicsGroups
from ..comm.packing import ChunkLayout
from ..comm.rank_group import RankGroup, StageGroups
from .machine import GroupForm, Link, Machine

FLOAT = 4
"""Bytes of an fp32 element."""


@dataclass(frozen=True)
class Case:
    """One sweep to make."""

    operation: str
    form: GroupForm
    staged: bool
    prepare: Callable[[int], Callable[[], object]]
    """Bytes of the full buffer -> what to time."""

    def __str__(self) -> str:
        form = self.form
        where = f"{form.size} ranks on {form.nodes} node{'s' * (form.nodes > 1)}"
        return f"{self.operation.replace('_', '-')}, {where}{', in two stages' if self.staged else ''}"


def device() -> torch.device:
    """Return the device of this rank's tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def cases(groups: Mapping[int, MicsGroups], k: int) -> Iterator[Case]:
    """Every sweep, in one order on all ranks.

    Args:
        groups: by partition size.
        k: ranks on each node.
    """
    frame = Machine("", k, 1, {"fp32": 1}, 1.0, Link(1, 0), Link(1, 0))
    n = next(iter(groups.values())).layout.world_size
    for p, mine in groups.items():
        form = frame.partition_form(n, p)
        if p > 1:
            yield Case("all_gather", form, False, partial(_gather, mine))
            yield Case("reduce_scatter", form, False, partial(_scatter, mine, None))
            if mine.hierarchy is not None:
                yield Case("all_gather", form, True, partial(_gather_in_stages, mine, mine.hierarchy))
                yield Case("reduce_scatter", form, True, partial(_scatter, mine, mine.scatter_hierarchy))
        if mine.replication is not None:
            yield Case("all_reduce", frame.replication_form(n, p), False, partial(_reduce, mine.replication))
        if p == n > 1:
            yield Case("stock_reduce_scatter", form, False, partial(_stock_scatter, mine.full))


def buffer(numel: int) -> torch.Tensor:
    """Zeros on this rank's device, fp32."""
    return torch.zeros(max(1, numel), device=device())


def _gather(mine: MicsGroups, size: int) -> Callable[[], object]:
    shard = buffer(size // FLOAT // mine.partition.size)

    def run() -> None:
        # with its own output and the copy of it, as DeepSpeed does
        whole = shard.new_empty(shard.numel() * mine.partition.size)
        dist.all_gather_into_tensor(whole, shard, group=mine.partition.group)
        torch.cat(whole.chunk(mine.partition.size))

    return run


def _gather_in_stages(mine: MicsGroups, hierarchy: StageGroups, size: int) -> Callable[[], object]:
    shard = buffer(size // FLOAT // mine.partition.size)

    def run() -> None:
        whole = shard.new_empty(shard.numel() * mine.partition.size)
        rows = collectives.start_all_gather_hierarchical(shard, hierarchy).wait()
        ChunkLayout((whole.numel(),), mine.partition.size, hierarchy.inter.size).copy_out(rows, [whole])

    return run


def _scatter(mine: MicsGroups, hierarchy: StageGroups | None, size: int) -> Callable[[], object]:
    gradient = buffer(size // FLOAT)
    return lambda: collectives.start_hop1([gradient], mine.scatter, hierarchy, mine.ways.reduce_scatter).wait()


def _stock_scatter(full: RankGroup, size: int) -> Callable[[], object]:
    output = buffer(size // FLOAT // full.size)
    whole = buffer(output.numel() * full.size)
    return lambda: dist.reduce_scatter_tensor(output, whole, group=full.group)


def _reduce(replication: RankGroup, size: int) -> Callable[[], object]:
    tensor = buffer(size // FLOAT)
    return lambda: collectives.start_average_(tensor, replication).wait()
