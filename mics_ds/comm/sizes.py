"""Sizes of collectives, by one rule.

A collective costs a latency before its first byte arrives, and bytes at some bandwidth after it. Below latency times
bandwidth the latency is the larger part, so collectives are made several times as large; and no larger than that,
because the last one of a pass is what a step waits for. At 400 Gbit/s and some tens of microseconds per hop of a ring
that gives 32 MiB, at 100 Mbit/s and a fraction of a millisecond 2 MiB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

MIB = 1 << 20
LEAST_PARTS = 8
"""Hop 1 leaves at most an eighth of the gradients to the end of a pass, and hop 2 begins with an eighth of them."""


@dataclass(frozen=True)
class Sizes:
    """Least bytes of what is worth a collective, and how many of these may be under way."""

    unit: int
    """Gradient shards in hop 2, see :meth:`unit_of`, and gathered shards of updated weights."""
    bucket: int
    """Full gradients in hop 1."""
    whole: int
    """A parameter that is gathered in two stages without a copy, by one collective for each domain."""
    ahead: int = 2
    """Tasks of one executor that hold memory at a time, see :class:`mics_ds.comm.async_exec.StreamExecutor`. A host
    without streams would stop the backward pass to keep to fewer, and with it the gathers for the next layers."""

    def bucket_limit(self, numel: int, itemsize: int) -> int:
        """Return the elements of the largest bucket that is of use, for ``numel`` elements of gradients in all."""
        return max(self.bucket // itemsize, -(-numel // LEAST_PARTS))

    def unit_of(self, nbytes: int, sent: float = 1.0) -> int:
        """Return the least bytes of a unit of hop 2, for gradient shards of ``nbytes`` in all.

        Args:
            sent: bytes on the network for each of them, fewer with a wire. A unit has to be worth a collective there.
        """
        return min(self.unit, max(int(self.unit / sent), nbytes) // LEAST_PARTS)


ON_ACCELERATORS = Sizes(unit=32 * MIB, bucket=32 * MIB, whole=8 * MIB)
ON_CPUS = Sizes(unit=2 * MIB, bucket=2 * MIB, whole=MIB // 4, ahead=LEAST_PARTS)


def sizes_of(streams: bool) -> Sizes:
    """Return the sizes for a device with streams, or for one without."""
    return ON_ACCELERATORS if streams else ON_CPUS


def runs(indices: Iterable[int], sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Divide indices into runs of at most ``limit`` in all, and of one index at least."""
    run: list[int] = []
    held = 0
    for index in indices:
        if run and held + sizes[index] > limit:
            yield run
            run, held = [], 0
        run.append(index)
        held += sizes[index]
    if run:
        yield run
