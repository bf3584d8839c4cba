"""How shards are cut once more, into one slice for each replica.

With world-sharded optimizer states, replica k of r keeps masters and optimizer states of slice k of every parameter's
shard, so that 1/r of 1/p is 1/n. A shard of w elements is cut as a parameter is: into slices of ``ceil(w / r)``, the
last ones padded with zeros. *Packed*, the slices of one replica follow each other.

    shards   | a a a a a a | b b b b b |        packed, replica 0   | a a a | b b b |
                                                packed, replica 1   | a a a | b b 0 |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from .packing import BucketLayout, GatheredShards


@dataclass(frozen=True)
class Slices:
    """The slices of shards that follow each other in a flat tensor.

    Args:
        shards: elements of each shard.
        replicas: r.
        replica: whose slices are this rank's.
    """

    shards: tuple[int, ...]
    replicas: int
    replica: int

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Elements of one slice of each shard, padding included."""
        return tuple(-(-numel // self.replicas) for numel in self.shards)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each slice begins among the packed ones, and last where they end."""
        return tuple(accumulate([0, *self.widths]))

    @cached_property
    def shard_starts(self) -> tuple[int, ...]:
        """Where each shard begins in the flat tensor, and last where they end."""
        return tuple(accumulate([0, *self.shards]))

    @property
    def numel(self) -> int:
        """Elements of all packed slices of one replica."""
        return self.starts[-1]

    def own(self, index: int) -> tuple[int, int]:
        """Which elements of a shard are in this rank's slice, padding left out: [start, end), possibly empty."""
        start = min(self.replica * self.widths[index], self.shards[index])
        return start, min(start + self.widths[index], self.shards[index])

    def take(self, flat: torch.Tensor) -> torch.Tensor:
        """(numel,): a copy of this rank's slices, packed, with zeros for padding.

        Args:
            flat: (sum of shards,), any dtype and device.
        """
        packed = flat.new_zeros(self.numel)
        sources, targets = [], []
        for index in range(len(self.shards)):
            start, end = self.own(index)
            origin, place = self.shard_starts[index], self.starts[index]
            if start < end:
                sources.append(flat[origin + start : origin + end])
                targets.append(packed[place : place + end - start])
        if sources:
            torch._foreach_copy_(targets, sources)
        return packed

    def rows(self, flats: Sequence[torch.Tensor], pieces: int = 1) -> list[torch.Tensor]:
        """The slices of all replicas, packed, as new buffers: together (r, numel), cut by columns.

        Args:
            flats: the shards, one by one.
        """
        return BucketLayout(self.shards, tuple(range(self.replicas))).pack(flats, pieces)

    def packed(self, packed: torch.Tensor, indices: range | Sequence[int]) -> torch.Tensor:
        """The slices of some shards alone: a view if they follow each other, else a copy."""
        if not indices:
            return packed[:0]
        if indices[-1] - indices[0] + 1 == len(indices):
            return packed[self.starts[indices[0]] : self.starts[indices[-1] + 1]]
        return torch.cat([packed[self.starts[index] : self.starts[index + 1]] for index in indices])

    def give(self, packed: torch.Tensor, flat: torch.Tensor) -> None:
        """Put this replica's packed slices back to where :meth:`take` found them.

        Args:
            packed: (numel,).
            flat: (sum of shards,), of the same dtype and on the same device.
        """
        sources, targets = [], []
        for index in range(len(self.shards)):
            start, end = self.own(index)
            origin, place = self.shard_starts[index], self.starts[index]
            if start < end:
                sources.append(packed[place : place + end - start])
                targets.append(flat[origin + start : origin + end])
        if sources:
            torch._foreach_copy_(targets, sources)

    def put(self, rows: torch.Tensor, flat: torch.Tensor, indices: Sequence[int] | None = None) -> None:
        """Fill shards from the slices of all replicas.

        Args:
            rows: (r, elements of these slices), contiguous, packed in the order of ``indices``.
            flat: (sum of shards,), on the device of ``rows``.
            indices: of the shards, ascending; by default all.
        """
        gathered = GatheredShards([rows], [0, rows.shape[1]], tuple(range(self.replicas)))
        offset = 0
        for index in range(len(self.shards)) if indices is None else indices:
            if self.widths[index]:
                shard = flat[self.shard_starts[index] : self.shard_starts[index + 1]]
                gathered.copy_out(shard, offset, self.widths[index])
            offset += self.widths[index]
