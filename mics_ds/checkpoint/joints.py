"""Files that several ranks stage together: who copies which bytes, and how the one that writes joins them.

All replicas of a shard hold the same bytes, so each copies 1/r of them to the host, and training waits for that alone.
The rest travels later, between the processes that write. With world-sharded optimizer states each replica has other
bytes in the first place, its slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from ..comm.packing import ChunkLayout
from .arena import ALIGNMENT, aligned

SHARED_FROM = 64 << 10
"""Bytes. The owner copies smaller storages alone: a message costs more than they do."""


class Range(NamedTuple):
    """Bytes of one replica in something that all of them have."""

    start: int
    stop: int


def shares(nbytes: int, replicas: int) -> list[Range]:
    """Who copies which part of ``nbytes``; parts begin at multiples of :data:`ALIGNMENT` and may be empty."""
    width = aligned(-(-nbytes // replicas))
    return [Range(*pair) for pair in pairwise(min(nbytes, width * place) for place in range(replicas + 1))]


class Joint(NamedTuple):
    """One storage, as one of the ranks that stage it together sees it."""

    nbytes: int
    """Of the whole."""
    whole: int
    """Where the whole is to be in the owner's memory; of no meaning to others."""
    piece: int
    """Where this rank's piece is in its memory."""
    sizes: tuple[int, ...]
    """Bytes of each replica's piece."""
    shards: tuple[int, ...] = ()
    """Elements of each shard, if the pieces are packed slices of them and not consecutive parts."""
    itemsize: int = 1

    def join(self, pieces: Sequence[torch.Tensor], whole: torch.Tensor) -> None:
        """Put the pieces of all replicas together.

        Args:
            pieces: (sizes[k],) uint8 of each replica k.
            whole: (nbytes,) uint8, written.
        """
        if not self.shards:
            for part, (start, stop) in zip(pieces, pairwise(accumulate([0, *self.sizes]))):
                if part.data_ptr() != whole[start:stop].data_ptr():
                    whole[start:stop].copy_(part)
            return
        rows = torch.stack([part.view(self._dtype) for part in pieces])
        shards = whole.view(self._dtype).split(list(self.shards))
        ChunkLayout.in_rank_order(self.shards, len(pieces)).copy_out(rows, shards)

    def put(self, piece: torch.Tensor, replica: int, whole: torch.Tensor) -> None:
        """Put the slices of one replica where they belong.

        Args:
            piece: (sizes[replica],) uint8.
            whole: (nbytes,) uint8, written.
        """
        cut = ChunkLayout.in_rank_order(self.shards, len(self.sizes))
        cut.give(piece.view(self._dtype), whole.view(self._dtype), replica)

    @property
    def _dtype(self) -> torch.dtype:
        return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[self.itemsize]


class StagedFile(NamedTuple):
    """A file that is still to be written."""

    name: str
    pickled: bytes
    places: tuple[tuple[int, int], ...]
    """Start and bytes of each storage in the arena; or ``-1 - number`` of the joint that it has to be made from."""


class Staged(NamedTuple):
    """What one rank has copied, and what becomes of it."""

    files: tuple[StagedFile, ...]
    joints: tuple[Joint, ...]
    """In the same order on all ranks that share the staging of a shard."""
    nbytes: int
    """Of the arena that are in use."""


class Room:
    """Places in memory, given out one after the other."""

    def __init__(self) -> None:
        self.nbytes = 0

    def take(self, nbytes: int) -> int:
        start, self.nbytes = self.nbytes, self.nbytes + aligned(nbytes)
        return start


assert SHARED_FROM % ALIGNMENT == 0
