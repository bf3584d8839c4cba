"""Shadow memory: for each byte of each storage, the last write and the last read of every stream.

An access races if the last write of some byte it touches, or, for a write, the last read by some stream, does not
happen before it. Memory that is freed may be handed out again at once, for work on the stream it was allocated on. So
at that moment every access has to happen before whatever that stream does next, or before the end of what has been put
on a stream that the tensor was recorded on (``record_stream``): the allocator waits for those.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .streams import Clock, Machine, Stream

Where = slice | np.ndarray


@dataclass(frozen=True)
class Race:
    """Two things that nothing orders."""

    kind: str
    """``read after write``, ``write after write``, ``write after read``, or ``memory reused``."""
    first: str
    second: str

    def __str__(self) -> str:
        return f"{self.kind}:\n    {self.first}\n    {self.second}"


class Shadow:
    """What happened to one storage."""

    def __init__(self, storage: torch.UntypedStorage, home: Stream, fresh: bool) -> None:
        self.alive = StorageWeakRef(storage)
        self.home = home
        self.fresh = fresh
        """Whether it was seen from its allocation on."""
        self.on_host = False
        """Whether it is in host memory: what was copied there, and what the host has computed from it."""
        self.recorded: set[int] = set()
        self.writer = np.zeros(storage.nbytes(), np.int32)
        self.written = np.zeros(storage.nbytes(), np.int64)
        self.read: dict[int, np.ndarray] = {}

    def unordered_writes(self, where: Where, clock: np.ndarray) -> tuple[int, int] | None:
        """(stream, number) of a write that is not before this clock, if there is one."""
        writer, written = self.writer[where], self.written[where]
        late = written > clock[writer]
        if not late.any():
            return None
        index = int(np.argmax(late))
        return int(writer.flat[index]), int(written.flat[index])

    def unordered_reads(self, where: Where, clock: np.ndarray) -> tuple[int, int] | None:
        for stream, numbers in self.read.items():
            latest = int(numbers[where].max(initial=0))
            if latest > clock[stream]:
                return stream, latest
        return None

    def write(self, where: Where, stream: int, number: int) -> None:
        self.writer[where] = stream
        self.written[where] = number

    def look(self, where: Where, stream: int, number: int) -> None:
        if stream not in self.read:
            self.read[stream] = np.zeros(len(self.written), np.int64)
        self.read[stream][where] = number

    def streams_not_before(self, clock: Clock, count: int) -> Iterator[tuple[int, int]]:
        """The last access of each stream that is not before this clock."""
        known = clock.fit(count)
        late = self.written > known[self.writer]
        for stream in set(self.writer[late].tolist()):
            yield stream, int(self.written[late & (self.writer == stream)].max())
        for stream, numbers in self.read.items():
            latest = int(numbers.max(initial=0))
            if latest > known[stream]:
                yield stream, latest


def bytes_of(tensor: torch.Tensor) -> Where:
    """Which bytes of its storage a tensor covers."""
    size = tensor.element_size()
    first = tensor.storage_offset() * size
    if tensor.is_contiguous():
        return slice(first, first + tensor.numel() * size)
    index = np.zeros((1,), np.int64)
    for length, stride in zip(tensor.shape, tensor.stride()):
        index = (index[:, None] + np.arange(length if stride else 1) * stride).reshape(-1)
    return (first + index[:, None] * size + np.arange(size)).reshape(-1)


@dataclass
class Memory:
    """All storages that were seen."""

    machine: Machine
    shadows: dict[int, Shadow] = field(default_factory=dict)
    races: dict[tuple[str, ...], Race] = field(default_factory=dict)
    """By kind and code, each once."""

    def reset(self) -> None:
        self.shadows.clear()
        self.races.clear()

    def shadow(self, tensor: torch.Tensor, fresh: bool = False) -> Shadow | None:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return None
        key = storage._cdata
        known = self.shadows.get(key)
        if known is None or known.alive.expired() or len(known.written) != storage.nbytes():
            # What was there before anybody watched belongs to the compute stream.
            home = self.machine.current if fresh else self.machine.default
            known = self.shadows[key] = Shadow(storage, home, fresh)
        return known

    def on_host(self, tensor: torch.Tensor) -> bool:
        shadow = self.shadows.get(tensor.untyped_storage()._cdata)
        return shadow is not None and shadow.on_host and not shadow.alive.expired()

    def access(self, tensor: torch.Tensor, *, write: bool, stream: Stream, number: int) -> None:
        shadow = self.shadow(tensor)
        if shadow is None or tensor.numel() == 0:
            return
        where, clock = bytes_of(tensor), stream.clock.fit(len(self.machine.streams))
        earlier = shadow.unordered_writes(where, clock)
        if earlier is not None:
            self._report("write after write" if write else "read after write", earlier, (stream.id, number))
        if write:
            reader = shadow.unordered_reads(where, clock)
            if reader is not None:
                self._report("write after read", reader, (stream.id, number))
            shadow.write(where, stream.id, number)
        else:
            shadow.look(where, stream.id, number)

    def sweep(self) -> None:
        """Find what was freed since the last time."""
        gone = [key for key, shadow in self.shadows.items() if shadow.alive.expired()]
        for key in gone:
            shadow = self.shadows.pop(key)
            home = shadow.home
            clock = home.clock.copy()
            clock.join(self.machine.host_clock)
            for recorded in shadow.recorded:
                clock.join(self.machine.streams[recorded].clock)
            for stream, number in shadow.streams_not_before(clock, len(self.machine.streams)):
                self._report("memory reused", (stream, number), f"freed while {home.name} stream may reuse it")

    def _report(self, kind: str, first: tuple[int, int], second: tuple[int, int] | str) -> None:
        said = [
            item if isinstance(item, str) else str(self.machine.operations.get(item, f"operation {item}"))
            for item in (first, second)
        ]
        self.races.setdefault((kind, *said), Race(kind, *said))
