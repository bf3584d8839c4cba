"""Findings of the guard, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..deepspeed_compat.states import State
from .compare import bits

_LINES = 8


@dataclass(frozen=True)
class Finding:
    """One block of one rank that is not what it should be."""

    rank: int
    node: int
    state: str
    group: int
    start: int
    """First and last differing element, in the shard."""
    stop: int
    parameters: tuple[tuple[str, int, int], ...]
    """Name, and first and last differing element in the flat parameter."""
    elements: int
    """That differ."""
    bits: int
    """That differ."""
    reference: int
    """Global rank of the copy this was compared with; its own, where weights were compared with masters."""
    by: str
    """Rule by which a copy is known to be right: ``majority`` or ``cast``. Empty if none is."""

    def words(self) -> str:
        where = ", ".join(f"{name}[{first}:{last + 1}]" for name, first, last in self.parameters[:3])
        more = f" and {len(self.parameters) - 3} more" if len(self.parameters) > 3 else ""
        against = "its own masters" if self.reference == self.rank else f"rank {self.reference}"
        right = f", right by {self.by}" if self.by else ""
        return (
            f"rank {self.rank} (node {self.node}): {self.state} of {where}{more}: {self.elements} elements and "
            f"{self.bits} bits differ from {against}{right}"
        )


def difference(
    state: State, start: int, marks: torch.Tensor, found: torch.Tensor, expected: torch.Tensor, **known: Any
) -> Finding:
    """Describe where two versions of ``state[start:start + len(marks)]`` differ.

    Args:
        marks: which elements differ; at least one.
    """
    place = marks.nonzero().view(-1).cpu() + start
    parameters = []
    for piece in state.pieces:
        inside = place[(place >= piece.start) & (place < piece.stop)] + piece.offset - piece.start
        if len(inside):
            parameters.append((piece.parameter, int(inside[0]), int(inside[-1])))
    return Finding(
        state=state.name,
        group=state.group,
        start=int(place[0]),
        stop=int(place[-1]),
        parameters=tuple(parameters),
        elements=len(place),
        bits=_bits_set((bits(found) ^ bits(expected))[marks]),
        **known,
    )


def _bits_set(words: torch.Tensor) -> int:
    counts = torch.tensor([index.bit_count() for index in range(256)], device=words.device)
    return sum(int(counts[part.contiguous().view(torch.uint8).long()].sum()) for part in words.split(1 << 16))


def lines(findings: Sequence[Finding]) -> str:
    """Some of them, one a line."""
    shown = [f"  {finding.words()}" for finding in findings[:_LINES]]
    if len(findings) > _LINES:
        shown.append(f"  and {len(findings) - _LINES} more blocks")
    return "\n".join(shown)
