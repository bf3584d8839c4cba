"""How full tensors lie in the buffers of collectives, and the copies there and back.

A tensor is cut into p chunks of ``ceil(numel / p)``, the last one padded, as ZeRO-3 shards a parameter. A buffer is
(p, width): row d has the chunks of one partition rank, column by column those of one tensor after the other. In one
stage row d is for rank d. In two stages rows are *slots*, see :class:`mics_ds.comm.layout.NodeGrid`: rank a·k + b, on
node a of N, has slot b·N + a, so that the buffer seen as (k, N, width) and transposed is in rank order again.

So all whole chunks of a tensor are one strided copy (two, where they end inside a node), and one more takes the rest.
How many there are does not depend on p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise

import torch


def cut(numel: int, pieces: int) -> list[int]:
    """Bounds of ``pieces`` nearly equal parts of ``range(numel)``, none of them empty unless ``numel`` is 0."""
    pieces = max(1, min(pieces, numel))
    return [numel * index // pieces for index in range(pieces + 1)]


# Buckets. Both hops of one run beside the computation of the next, so the last one's are what a step waits for: no more
# than an eighth of the gradients. But each bucket costs work of the host, and collectives that are worth issuing.
LEAST_BUCKETS = 8
LEAST_BUCKET_BYTES = 2 << 20
LEAST_STAGED_BUCKET_BYTES = 4 << 20
LEAST_BUCKET_BYTES_ON_STREAMS = 32 << 20

# Gathered shards of updated weights (:mod:`mics_ds.updates`): modules wait for their own bucket only, two are held at a
# time.
UPDATE_BUCKET_BYTES = 32 << 20


def bucket_limit(numel: int, itemsize: int, *, streams: bool, staged: bool) -> int:
    """Elements of the largest bucket that is of use, for so many elements of gradients in all.

    Args:
        streams: whether collectives run on an accelerator, where many small ones cost more than they hide.
        staged: whether hop 1 is in two stages, which cut each bucket into pieces once more.
    """
    least = LEAST_STAGED_BUCKET_BYTES if staged else LEAST_BUCKET_BYTES
    if streams:
        least = LEAST_BUCKET_BYTES_ON_STREAMS
    return max(least // itemsize, -(-numel // LEAST_BUCKETS))


@dataclass(frozen=True)
class BucketLayout:
    """How the gradients of one bucket lie in the buffer that is scattered.

    Block d of the buffer holds chunk ``order[d]`` of every gradient.

        block 0 = chunk order[0] of g0 | of g1 | ...     block 1 = chunk order[1] of g0 | of g1 | ...
    """

    numels: tuple[int, ...]
    order: tuple[int, ...]
    """Partition rank that each block is for: 0 … p-1, or slot by slot for two stages."""

    @property
    def widths(self) -> list[int]:
        """Length of one chunk of each gradient, padding included."""
        return [-(-numel // len(self.order)) for numel in self.numels]

    def pack(self, gradients: Sequence[torch.Tensor], pieces: int = 1) -> list[torch.Tensor]:
        """Copy the gradients into new buffers, together (p, sum of widths), cut by columns; padding is zero."""
        per_node = _ranks_per_node(self.order)
        if per_node is None:
            sorted_by_rank = replace(self, order=tuple(range(len(self.order)))).pack(gradients, pieces)
            return [torch.stack([buffer[rank] for rank in self.order]) for buffer in sorted_by_rank]
        copies = _Copies(len(self.order), per_node)
        widths, flats = self.widths, [gradient.contiguous() for gradient in gradients]
        bounds = list(pairwise(cut(sum(widths), pieces)))
        buffers = [flats[0].new_empty(len(self.order), last - first) for first, last in bounds]
        for buffer, (first, last) in zip(buffers, bounds):
            for flat, width, offset in zip(flats, widths, accumulate([0, *widths])):
                low, high = max(first, offset), min(last, offset + width)
                if low < high:
                    copies.add(flat, width, low - offset, high - offset, buffer, low - first)
                    copies.pad(flat, width, low - offset, high - offset, buffer, low - first)
        copies.into_buffers()
        return buffers

    def unpack(self, shard: torch.Tensor, rank: int) -> list[torch.Tensor]:
        """Views of a reduced block: this rank's chunk of each gradient, without padding, possibly empty."""
        widths = self.widths
        return [
            shard[offset : offset + max(0, min(width, numel - rank * width))]
            for numel, width, offset in zip(self.numels, widths, accumulate([0, *widths]))
        ]


class GatheredShards:
    """A gathered buffer, cut into pieces: piece c holds the elements [starts[c], starts[c+1]) of all p shards.

    Args:
        pieces: (p, width of the piece) each.
        order: partition rank whose shard is in each row.
    """

    def __init__(self, pieces: list[torch.Tensor], starts: list[int], order: tuple[int, ...]) -> None:
        per_node = _ranks_per_node(order)
        if per_node is None:
            per_node = len(order)
            slot_of = {rank: slot for slot, rank in enumerate(order)}
            pieces = [torch.stack([piece[slot_of[rank]] for rank in range(len(order))]) for piece in pieces]
        self.pieces = pieces
        self._starts = starts
        self._per_node = per_node
        self._partition_size = len(order)

    def copy_out(self, full: torch.Tensor, start: int, width: int) -> None:
        """Fill a full parameter from the elements [start, start + width) of all shards.

        Args:
            full: contiguous, with at most p · width elements, of any dtype.
        """
        copies = _Copies(self._partition_size, self._per_node)
        for piece, (first, last) in zip(self.pieces, pairwise(self._starts)):
            low, high = max(start, first), min(start + width, last)
            if low < high:
                copies.add(full, width, low - start, high - start, piece, low - first)
        copies.out_of_buffers()


@cache
def _ranks_per_node(order: tuple[int, ...]) -> int | None:
    """k, if rows are the slots of N nodes of k ranks that follow each other (N = 1 for rows in rank order), else None:
    ranks may be spread over nodes in some other way."""
    p = len(order)
    k = order[1] if p > 1 and order[1] > 1 else p
    return k if p % k == 0 and order == tuple(rank for place in range(k) for rank in range(place, p, k)) else None


class _Copies:
    """Copies between tensors and buffers, collected to be made in one call.

    Views are made by their strides, in one operation each: on a host that feeds an accelerator, operations count.

    Args:
        per_node: k.
    """

    def __init__(self, p: int, per_node: int) -> None:
        self._k = per_node
        self._nodes = p // per_node
        self._outside: list[torch.Tensor] = []
        self._inside: list[torch.Tensor] = []
        self._padding: list[torch.Tensor] = []

    def into_buffers(self) -> None:
        if self._inside:
            torch._foreach_copy_(self._inside, self._outside)
        if self._padding:
            torch._foreach_zero_(self._padding)

    def out_of_buffers(self) -> None:
        if self._outside:
            torch._foreach_copy_(self._outside, self._inside)

    def add(self, full: torch.Tensor, width: int, low: int, high: int, buffer: torch.Tensor, column: int) -> None:
        """Elements [low, high) of each chunk of ``width`` of a contiguous tensor, and the buffer's columns from
        ``column`` on: at most three copies."""
        k, count = self._k, high - low
        whole, rest = divmod(full.numel(), width)  # chunks without padding, and length of the next
        node, place = divmod(whole, k)
        if node:
            self._outside.append(_at(full, low, (node, k, count), (k * width, width, 1)))
            self._inside.append(self._rows(buffer, column, 0, (node, k, count)))
        if place:
            self._outside.append(_at(full, node * k * width + low, (place, count), (width, 1)))
            self._inside.append(self._rows(buffer, column, node * k, (place, count)))
        if rest > low:
            filled = min(count, rest - low)
            self._outside.append(_at(full, whole * width + low, (filled,), (1,)))
            self._inside.append(self._rows(buffer, column, whole, (filled,)))

    def pad(self, full: torch.Tensor, width: int, low: int, high: int, buffer: torch.Tensor, column: int) -> None:
        """What :meth:`add` leaves out is to be zero: at most three stretches."""
        rank, rest = divmod(full.numel(), width)
        count, filled = high - low, max(0, rest - low)
        if filled:
            if filled < count:
                self._padding.append(self._rows(buffer, column + filled, rank, (count - filled,)))
            rank += 1
        node, place = divmod(rank, self._k)
        if place:
            self._padding.append(self._rows(buffer, column, rank, (self._k - place, count)))
            node += 1
        if node < self._nodes:
            self._padding.append(self._rows(buffer, column, node * self._k, (self._nodes - node, self._k, count)))

    def _rows(self, buffer: torch.Tensor, column: int, rank: int, shape: tuple[int, ...]) -> torch.Tensor:
        """(columns), (places, columns) or (nodes, places, columns) of a buffer, from ``rank`` on."""
        row = buffer.shape[1]
        node, place = divmod(rank, self._k)
        strides = (row, self._nodes * row, 1)[-len(shape) :]
        return _at(buffer, (place * self._nodes + node) * row + column, shape, strides)


def _at(tensor: torch.Tensor, start: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    return tensor.as_strided(shape, strides, tensor.storage_offset() + start)
