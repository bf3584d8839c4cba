"""From the slices that replicas have updated to whole shards on all of them, beside the next forward pass."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from .comm import collectives
from .comm.groups import RankGroup
from .comm.lanes import Lane, Pending, Stages, Task
from .comm.packing import UPDATE_BUCKET_BYTES
from .comm.slices import Slices


class WeightUpdates:
    """All-gathers updated slices over the replicas, bucket by bucket in the order of the shards.

    Args:
        replication: the ranks that have the same shards, in a group that nothing else uses meanwhile.
        lane: where the collectives run.
    """

    def __init__(self, replication: RankGroup, lane: Lane, bucket_bytes: int = UPDATE_BUCKET_BYTES) -> None:
        self._replication = replication
        self._lane = lane
        self._bucket_bytes = bucket_bytes

    def start(
        self, packed: torch.Tensor, cut: Slices, flat: torch.Tensor, first: Collection[int] = ()
    ) -> list[Pending[None]]:
        """Begin to fill shards. Collective over the replicas.

        Args:
            packed: (cut.numel,), this rank's slices, on the device of the collectives. Not to be changed until the
                lane is drained.
            flat: (sum of shards,), of the same dtype.
            first: indices of shards that somebody waits for at once.

        Returns:
            For each shard what to wait for, on every stream that reads it; any number of times.
        """
        others = [index for index in range(len(cut.shards)) if index not in first]
        buckets = [*self._buckets(cut, packed, sorted(first)), *self._buckets(cut, packed, others)]
        widest = max((sum(cut.widths[index] for index in bucket) for bucket in buckets), default=0)
        buffers: list[torch.Tensor] = []
        pending: dict[int, Pending[None]] = {}
        for number, bucket in enumerate(buckets):
            done = self._lane.submit(self._bucket(packed, cut, flat, bucket, buffers, number % 2, widest))
            pending.update(dict.fromkeys(bucket, done))
        return [pending[index] for index in range(len(cut.shards))]

    def finish(self) -> None:
        """Let the caller's stream or thread wait for everything. Raises what failed."""
        self._lane.drain()

    def _buckets(self, cut: Slices, packed: torch.Tensor, indices: Sequence[int]) -> Iterator[list[int]]:
        limit = self._bucket_bytes // (packed.element_size() * cut.replicas)
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

    def _bucket(
        self,
        packed: torch.Tensor,
        cut: Slices,
        flat: torch.Tensor,
        indices: list[int],
        buffers: list[torch.Tensor],
        parity: int,
        widest: int,
    ) -> Task[None]:
        def gather(stages: Stages) -> None:
            # A lane is two tasks ahead of itself at most, so that two buffers do for all of them.
            while len(buffers) <= parity:
                buffers.append(packed.new_empty(cut.replicas * widest))
            self._lane.used(packed)
            row = cut.packed(packed, indices)
            rows = buffers[parity][: cut.replicas * row.numel()]
            arrived = collectives.start_gather_of_updates(rows, row, self._replication)
            with stages.second():
                arrived()
                gathered = rows.view(cut.replicas, -1)
                cut.put(gathered if gathered.device == flat.device else gathered.to(flat.device), flat, indices)
                stages.used(rows, row)

        return gather
