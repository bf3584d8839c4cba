"""Chunks of tensors, one for each rank of a group, and their places in the buffers of collectives.

A tensor is cut into g chunks of ``ceil(numel / g)`` elements, the last ones padded with zeros, as ZeRO-3 shards a
parameter. A buffer is (g, width): one row for each rank, with its chunk of one tensor after the other.

    tensors    | a a a a a a | b b b b b |        row of rank 0   | a a a | b b b |
                                                  row of rank 1   | a a a | b b 0 |

The same cut serves three groups: gradients and parameters in the partition group, and once more the shards of one rank
in its replication group, whose chunks are called *slices* (1/r of 1/p is 1/n).

In one stage, row d is for rank d. In two stages, over N domains of k ranks, rows are *slots*: rank a·k + b, on domain
a, has slot b·N + a, so that the buffer seen as (k, N, width) and transposed is in rank order again. The all-gather
between domains, of place b in each, fills slots b·N … b·N+N-1, and the all-gather inside a domain joins those blocks:
no chunk is ever moved to make room for another. All whole chunks of a tensor are one strided copy (two, where they end
inside a domain), and one more takes the rest. How many copies there are does not depend on g.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch


@dataclass(frozen=True)
class ChunkLayout:
    """The chunks of tensors that follow each other.

    Args:
        numels: elements of each tensor.
        size: chunks that each tensor is cut into: g.
        domains: N. Rows of a buffer are slots where there are several, and in rank order otherwise.
    """

    numels: Sequence[int]
    size: int
    domains: int = 1

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Elements of one chunk of each tensor, padding included."""
        return tuple(-(-numel // self.size) for numel in self.numels)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Starts of each tensor's chunks in a row, and the end of the last."""
        return tuple(accumulate([0, *self.widths]))

    @cached_property
    def flat_starts(self) -> tuple[int, ...]:
        """Starts of the tensors if all lie in one flat tensor, and the end of the last."""
        return tuple(accumulate([0, *self.numels]))

    @property
    def width(self) -> int:
        """Elements of a row."""
        return self.starts[-1]

    def real(self, index: int, rank: int) -> tuple[int, int]:
        """Return which elements [start, end) of a tensor are in a rank's chunk, without padding; possibly none."""
        start = min(rank * self.widths[index], self.numels[index])
        return start, min(start + self.widths[index], self.numels[index])

    # ---------------------------------------------------------------------------------------- whole buffers

    def pack(self, tensors: Sequence[torch.Tensor], memory: torch.Tensor | None = None) -> torch.Tensor:
        """Copy tensors into a buffer, (g, width). Padding is zero.

        Args:
            memory: (g · width,), for the buffer; by default new.
        """
        flats = [tensor.contiguous() for tensor in tensors]
        buffer = flats[0].new_empty(self.size * self.width) if memory is None else memory
        buffer = buffer.view(self.size, self.width)
        outside, inside, padding = [], [], []
        for index, flat in enumerate(flats):
            pairs = self._pairs_of_all(index, flat, buffer)
            outside += [pair[0] for pair in pairs]
            inside += [pair[1] for pair in pairs]
            padding += self._padding(index, buffer)
        torch._foreach_copy_(inside, outside)
        if padding:
            torch._foreach_zero_(padding)
        return buffer

    def copy_out(
        self, buffer: torch.Tensor, outputs: Sequence[torch.Tensor], indices: Sequence[int] | None = None
    ) -> None:
        """Fill tensors from the chunks of all ranks.

        Args:
            buffer: (g, columns), of the tensors that are asked for alone, contiguous.
            outputs: contiguous, with ``numels`` elements each, of any dtype.
            indices: of the tensors, ascending; by default all.
        """
        asked = range(len(self.numels)) if indices is None else indices
        pairs, column = [], 0
        for index, output in zip(asked, outputs):
            pairs += self._pairs_of_all(index, output, buffer, column)
            column += self.widths[index]
        if pairs:
            torch._foreach_copy_([outside for outside, _ in pairs], [inside for _, inside in pairs])

    def unpack(self, row: torch.Tensor, rank: int) -> list[torch.Tensor]:
        """Return views of a rank's row: its chunk of each tensor, without padding, possibly empty."""
        found = []
        for index, offset in enumerate(self.starts[:-1]):
            start, end = self.real(index, rank)
            found.append(row[offset : offset + end - start])
        return found

    # ---------------------------------------------------------------------------------------- one rank's row

    def take(self, flat: torch.Tensor, rank: int) -> torch.Tensor:
        """Return a rank's row as a copy, (width,), with zeros for padding, of tensors that lie in one flat tensor."""
        row = flat.new_zeros(self.width)
        inside, outside = self._pairs(flat, row, rank)
        if inside:
            torch._foreach_copy_(inside, outside)
        return row

    def give(self, row: torch.Tensor, flat: torch.Tensor, rank: int) -> None:
        """Put a rank's row back to where :meth:`take` found it. Both have one dtype and device."""
        inside, outside = self._pairs(flat, row, rank)
        if inside:
            torch._foreach_copy_(outside, inside)

    def columns(self, row: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
        """Return the part of a row that is of some tensors alone: a view if they follow each other, else a copy."""
        if not indices:
            return row[:0]
        if indices[-1] - indices[0] + 1 == len(indices):
            return row[self.starts[indices[0]] : self.starts[indices[-1] + 1]]
        return torch.cat([row[self.starts[index] : self.starts[index + 1]] for index in indices])

    def _pairs(self, flat: torch.Tensor, row: torch.Tensor, rank: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Views of a row, and of the same elements in the flat tensor."""
        inside, outside = [], []
        for index, (origin, place) in enumerate(zip(self.flat_starts, self.starts[:-1])):
            start, end = self.real(index, rank)
            if start < end:
                inside.append(row[place : place + end - start])
                outside.append(flat[origin + start : origin + end])
        return inside, outside

    # ---------------------------------------------------------------------------------------- views
    # Made by their strides, in one operation each: on a host that feeds an accelerator, operations count.

    def _pairs_of_all(
        self, index: int, flat: torch.Tensor, buffer: torch.Tensor, column: int | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return views of a contiguous tensor, and of the same elements in the buffer: at most three of each.

        Args:
            column: where its chunks begin in the buffer, by default as in :attr:`starts`.
        """
        width, column = self.widths[index], self.starts[index] if column is None else column
        whole, rest = divmod(self.numels[index], width) if width else (0, 0)
        pairs = []
        for rank, shape in self._spans(0, whole):
            strides = (shape[-1] * width, width)[-len(shape) :]
            outside = _at(flat, rank * width, (*shape, width), (*strides, 1))
            pairs.append((outside, self._rows(buffer, column, rank, shape, width)))
        if rest:
            pairs.append((_at(flat, whole * width, (rest,), (1,)), self._rows(buffer, column, whole, (), rest)))
        return pairs

    def _padding(self, index: int, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Return views of what belongs to no element of a tensor: at most three."""
        width, column = self.widths[index], self.starts[index]
        rank, rest = divmod(self.numels[index], width) if width else (self.size, 0)
        found = []
        if rest:
            found.append(self._rows(buffer, column + rest, rank, (), width - rest))
            rank += 1
        return found + [self._rows(buffer, column, *span, width) for span in self._spans(rank, self.size)]

    def _spans(self, rank: int, end: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Divide ranks into whole domains and parts of them: first rank of each, and (domains, places) or (places,)."""
        k = self.size // self.domains
        while rank < end:
            domains = 0 if rank % k else (end - rank) // k
            shape = (domains, k) if domains else (min(end, rank - rank % k + k) - rank,)
            yield rank, shape
            rank += math.prod(shape)

    def _rows(self, buffer: torch.Tensor, column: int, rank: int, shape: tuple[int, ...], count: int) -> torch.Tensor:
        """Return (columns), (places, columns) or (domains, places, columns) of a buffer, from ``rank`` on."""
        row = buffer.shape[1]
        domain, place = divmod(rank, self.size // self.domains)
        strides = (row, self.domains * row, 1)[2 - len(shape) :]
        return _at(buffer, (place * self.domains + domain) * row + column, (*shape, count), strides)


def _at(tensor: torch.Tensor, start: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    return tensor.as_strided(shape, strides, tensor.storage_offset() + start)
