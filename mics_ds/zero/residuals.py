"""Residuals of hop 2 for another number of shards or replicas.

What counts is the *missing mean*: what has not arrived yet of the mean gradient, which is the mean of what replicas
have not sent, and what owners have not published. It stays the same, as far as floats of each kind can hold it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from ..comm.packing import ChunkLayout

UNSENT, UNPUBLISHED = "unsent", "unpublished"


class Place(NamedTuple):
    """Shard and replica that residuals belong to."""

    shards: int
    shard: int
    replicas: int
    replica: int


@dataclass(frozen=True)
class Held:
    """The residuals of one rank.

    Args:
        widths: elements of the shard of each parameter, padding included, in the order of the buffer.
        numels: elements of each parameter.
    """

    place: Place
    widths: Mapping[str, int]
    numels: Mapping[str, int]
    tensors: Mapping[str, torch.Tensor]

    def real(self, name: str) -> tuple[int, int]:
        """Return which elements [start, end) of a parameter are in the shard, without padding."""
        start = min(self.place.shard * self.widths[name], self.numels[name])
        return start, min(start + self.widths[name], self.numels[name])

    @cached_property
    def _cut(self) -> ChunkLayout:
        real = [end - start for start, end in map(self.real, self.widths)]
        return ChunkLayout(real, self.place.replicas)

    @cached_property
    def _starts(self) -> dict[str, int]:
        starts = ChunkLayout(list(self.widths.values()), 1).flat_starts
        return dict(zip(self.widths, starts))

    def parts(self, name: str) -> Iterator[tuple[str, int, torch.Tensor]]:
        """Yield (kind of residual, first element in the parameter, live values) of what is held of it."""
        start, end = self.real(name)
        if UNSENT in self.tensors:
            first = self._starts[name]
            yield UNSENT, start, self.tensors[UNSENT][first : first + end - start]
        if UNPUBLISHED in self.tensors:
            index = list(self.widths).index(name)
            inner, stop = self._cut.real(index, self.place.replica)
            first = self._cut.starts[index]
            yield UNPUBLISHED, start + inner, self.tensors[UNPUBLISHED][first : first + stop - inner]


def missing_mean(held: Iterable[Held], name: str, start: int, end: int) -> torch.Tensor:
    """Return the missing mean of elements [start, end) of a parameter, in fp64.

    Args:
        held: of all ranks.
    """
    total = torch.zeros(end - start, dtype=torch.float64)
    for item in held:
        for kind, first, values in item.parts(name):
            share = 1 / item.place.replicas if kind == UNSENT else 1.0
            low, high = max(first, start), min(first + values.numel(), end)
            if low < high:
                total[low - start : high - start].add_(values[low - first : high - first].double(), alpha=share)
    return total


def cut_anew(old: Sequence[Held], new: Held) -> None:
    """Fill one rank's residuals from those of all ranks of before.

    With means that are published, almost all of the missing mean becomes unpublished. The rest of it, and all of it
    otherwise, is put into what replicas have not sent: each takes what its float can hold of what those before it left.
    """
    for tensor in new.tensors.values():
        tensor.zero_()
    for name in new.widths:
        start, end = new.real(name)
        missing = missing_mean(old, name, start, end)
        rest = missing - missing.float().double() if UNPUBLISHED in new.tensors else missing.clone()
        rest *= new.place.replicas
        for _ in range(new.place.replica):
            if not rest.any():  # after a few replicas, of however many
                break
            rest -= rest.to(new.tensors[UNSENT].dtype).double()
        for kind, first, values in new.parts(name):
            source = rest if kind == UNSENT else missing
            values.copy_(source[first - start : first - start + values.numel()])
