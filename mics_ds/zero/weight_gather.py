"""The gather of updated slices to whole shards on all replicas, beside the next forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..comm import collectives
from ..comm.async_exec import Executor, Handle, Stages, Task
from ..comm.packing import ChunkLayout
from ..comm.rank_group import RankGroup


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
            For each shard what to wait for, on every stream that reads it; any number of times.
        """
        handles: dict[int, Handle[None]] = {}
        for bucket in self._buckets(cut, row, indices):
            handles.update(dict.fromkeys(bucket, self._executor.submit(self._gather(row, cut, flat, bucket))))
        return handles

    def finish(self) -> None:
        """Let the caller's stream or thread wait for everything. Raises what failed."""
        self._executor.drain()

    def _buckets(self, cut: ChunkLayout, row: torch.Tensor, indices: Sequence[int]) -> Iterator[list[int]]:
        limit = self._bucket_bytes // (row.element_size() * cut.size)
        bucket: list[int] = []
        width = 0
        for index in indices:
            if bucket and width + cut.widths[index] > limit:
                yield bucket
                bucket, width = [], 0
            bucket.append(index)
            width += cut.widths[index]
        if bucket:
            yield bucket

    def _gather(self, row: torch.Tensor, cut: ChunkLayout, flat: torch.Tensor, indices: list[int]) -> Task[None]:
        def gather(stages: Stages) -> None:
            own = cut.columns(row, indices)
            if not own.numel():
                return
            rows = stages.scratch(cut.size * own.numel(), row).view(cut.size, -1)
            handle = collectives.start_all_gather(rows, own, self._replication, collectives.UPDATES)
            with stages.wait_stage():
                handle.wait()
                gathered = rows.to(flat.device)
                shards = [flat[cut.flat_starts[index] : cut.flat_starts[index + 1]] for index in indices]
                cut.copy_out(gathered, shards, indices)
                stages.record_stream(own, row)

        return gather
