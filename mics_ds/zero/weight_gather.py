"""The gather of updated slices to whole shards on all replicas, beside the next forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from ..comm import collectives
from ..comm.async_exec import Deferred, Executor, Handle, Memory
from ..comm.packing import ChunkLayout
from ..comm.rank_group import RankGroup
from ..comm.sizes import runs


class WeightGather:
    """All-gathers updated slices over the replicas, bucket by bucket in the order of the shards.

    Args:
        replication: the ranks that have the same shards.
        executor: where the collectives run.
        bucket_bytes: of the gathered shards.
    """

    def __init__(self, replication: RankGroup, executor: Executor, bucket_bytes: int) -> None:
        self._replication = replication
        self._executor = executor
        self._bucket_bytes = bucket_bytes

    def start(
        self, row: torch.Tensor, cut: ChunkLayout, flat: torch.Tensor, indices: Sequence[int]
    ) -> dict[int, Handle[None]]:
        """Begin to fill shards. Collective over the replicas.

        Args:
            row: (cut.width,), this rank's slices, on the device of the collectives. Not to be changed until the
                executor is drained.
            flat: (sum of shards,), of the same dtype.
            indices: of the shards to fill, ascending.

        Returns:
            For each shard what to wait for, on every stream that reads it; any number of times. None for a shard
            without elements.
        """
        handles: dict[int, Handle[None]] = {}
        filled = [index for index in indices if cut.widths[index]]
        for bucket in runs(filled, cut.widths, self._bucket_bytes // (row.element_size() * cut.size)):
            handle = self._executor.submit(partial(self._start_bucket, row, cut, flat, bucket))
            handles.update(dict.fromkeys(bucket, handle))
        return handles

    def _start_bucket(
        self, row: torch.Tensor, cut: ChunkLayout, flat: torch.Tensor, indices: list[int], memory: Memory
    ) -> Handle[None]:
        own = cut.columns(row, indices)
        rows = memory.scratch(cut.size * own.numel(), row).view(cut.size, -1)
        gathering = collectives.start_all_gather(rows, own, self._replication, collectives.UPDATES)
        memory.record_stream(own, row)

        def fill() -> None:
            shards = [flat[cut.flat_starts[index] : cut.flat_starts[index + 1]] for index in indices]
            cut.copy_out(gathering.wait().to(flat.device), shards, indices)

        return Deferred(fill)
