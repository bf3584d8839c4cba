"""Encodings of values that travel between replicas in fewer bytes than they have in memory: pure functions of tensors.

| wire   | an element is                                     | bytes per element, scales included |
|--------|---------------------------------------------------|------------------------------------|
| 16-bit | rounded to bf16, or as it is if it has 16 bits    | 2                                  |
| int8   | one of 255 levels, and 256 of them share a scale  | 1.0156                             |
| int4   | one of 15 levels, and 128 of them share a scale   | 0.5313                             |

A scale is the largest magnitude of its block divided by the highest level, in fp32. An infinity or a NaN makes its
block NaN for every receiver, so whoever gets the values sees that some rank had no number there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch

SCALE_BYTES = 4
LEAST_MAGNITUDE = 1e-30
"""Blocks of smaller values are sent as zeros, because the inverse of their scale would not be a number."""


@dataclass(frozen=True)
class Cast:
    """Values in 16 bits."""

    dtype: torch.dtype = torch.bfloat16
    feedback: bool = False
    """Whether the error of rounding is kept, and added to the next values."""

    def nbytes(self, width: int) -> int:
        """Return the bytes of an encoded row of ``width`` elements."""
        return width * self.dtype.itemsize

    def encode(self, rows: torch.Tensor, encoded: torch.Tensor) -> None:
        """Encode (g, width) values.

        Args:
            encoded: (g, nbytes) of uint8, contiguous. Filled.
        """
        encoded.view(self.dtype).copy_(rows)

    def decode(self, encoded: torch.Tensor, width: int) -> torch.Tensor:
        """Return (g, width) in fp32, new, of (g, nbytes): equal bytes give equal bits on every rank."""
        return encoded.view(self.dtype).float()


@dataclass(frozen=True)
class Blockwise:
    """Signed integers, and one scale for each block of a row. A row has its scales first, then its integers.

    Has the methods of :class:`Cast`.
    """

    bits: int
    block: int
    feedback: bool = True

    @property
    def highest(self) -> int:
        """The highest level; the lowest is its negative."""
        return (1 << (self.bits - 1)) - 1

    def nbytes(self, width: int) -> int:
        size = self._scales(width) * SCALE_BYTES + -(-width * self.bits // 8)
        return -(-size // SCALE_BYTES) * SCALE_BYTES  # so that the scales of the next row are aligned

    def _scales(self, width: int) -> int:
        return -(-width // self.block)

    def encode(self, rows: torch.Tensor, encoded: torch.Tensor) -> None:
        scales, packed = self._parts(encoded, rows.shape[1])
        codes = packed.view(torch.int8) if self.bits == 8 else torch.empty_like(rows, dtype=torch.int8)
        for blocks, scale, levels in self._blocks(rows, scales, codes):
            magnitude = blocks.abs().amax(dim=-1)
            sent = magnitude.isfinite().logical_and_(magnitude > LEAST_MAGNITUDE)
            inverse = torch.where(sent, self.highest / magnitude, 0.0)
            # Zero times a magnitude that is no number is NaN.
            scale.copy_(torch.where(sent, magnitude / self.highest, magnitude.mul_(0.0)))
            levels.copy_((blocks * inverse.unsqueeze(-1)).round_())
        if self.bits == 4:
            low, high = codes[:, ::2], codes[:, 1::2]
            torch.bitwise_and(low.view(torch.uint8), 15, out=packed)
            packed[:, : high.shape[1]].bitwise_or_(high.view(torch.uint8) << 4)

    def decode(self, encoded: torch.Tensor, width: int) -> torch.Tensor:
        scales, packed = self._parts(encoded, width)
        codes = packed.view(torch.int8)
        if self.bits == 4:
            codes = codes.new_empty(len(encoded), width)
            codes[:, ::2] = (packed << 4).view(torch.int8) >> 4
            codes[:, 1::2] = packed[:, : width // 2].view(torch.int8) >> 4
        values = torch.empty_like(codes, dtype=torch.float32)
        for levels, scale, blocks in self._blocks(codes, scales, values):
            torch.mul(levels, scale.unsqueeze(-1), out=blocks)
        return values

    def _parts(self, encoded: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of the scales, (g, scales) in fp32, and of the bytes with integers."""
        end = self._scales(width) * SCALE_BYTES
        return encoded[:, :end].view(torch.float32), encoded[:, end : end + -(-width * self.bits // 8)]

    def _blocks(
        self, rows: torch.Tensor, scales: torch.Tensor, others: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield views (g, blocks, elements) of rows, (g, blocks) of their scales, and again of other rows.

        The last block of a row may be shorter, and comes alone then: what lies behind it is in no scale.
        """
        whole = rows.shape[1] // self.block
        end = whole * self.block
        if whole:
            shape = (whole, self.block)
            yield rows[:, :end].unflatten(1, shape), scales[:, :whole], others[:, :end].unflatten(1, shape)
        if end < rows.shape[1]:
            yield rows[:, end:].unsqueeze(1), scales[:, whole:], others[:, end:].unsqueeze(1)


Wire: TypeAlias = Cast | Blockwise
"""A format of rows of values."""


def wire_of(name: str, values: torch.dtype) -> Wire:
    """Return the wire of that name for values of a dtype.

    Args:
        name: ``"bf16"``, ``"int8"`` or ``"int4"``.
    """
    if name == "bf16":
        return Cast(values if values.itemsize == 2 else torch.bfloat16)
    return {"int8": Blockwise(8, 256), "int4": Blockwise(4, 128)}[name]
