"""Shadow memory: for each byte of each storage, the last write and the last read of every stream.

An access races if the last write of some byte it touches, or, for a write, the last read by some stream, does not
happen before it. Memory that is freed may be handed out again at once, for work on the stream it was allocated on. So
at that moment every access has to happen before whatever that stream does next, or before the end of what has been put
on a stream that the tensor was recorded on (``record_stream``): the allocator waits for those.

Bytes *held* are those that the allocator cannot hand out: of live storages, and of freed ones until the host has seen
the end of the streams that they were recorded on. They count for the stream that they were allocated on, which alone
can have them again. The host counts as infinitely far ahead of the device, and sees only what it has waited for.
"""

from __future__ import annotations

from collections import Counter
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

    def __init__(self, storage: torch.UntypedStorage, home: Stream, fresh: bool, by_byte: bool) -> None:
        self.alive = StorageWeakRef(storage)
        self.nbytes = storage.nbytes()
        self.home = home
        self.fresh = fresh
        """Whether it was seen from its allocation on."""
        self.on_host = False
        """Whether it is in host memory: what was copied there, and what the host has computed from it."""
        self.recorded: set[int] = set()
        self.writer = np.zeros(self.nbytes if by_byte else 0, np.int32)
        self.written = np.zeros(len(self.writer), np.int64)
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
class Freed:
    """A storage that nobody refers to, but that streams may still use."""

    home: str
    nbytes: int
    uses: list[tuple[int, int]]
    """Stream and number of the last operation on each stream that it was recorded on."""


@dataclass
class Memory:
    """All storages that were seen."""

    machine: Machine
    shadows: dict[int, Shadow] = field(default_factory=dict)
    races: dict[tuple[str, ...], Race] = field(default_factory=dict)
    """By kind and code, each once."""

    held: Counter[str] = field(default_factory=Counter)
    """Bytes that were allocated since the last reset and cannot be handed out again, by stream."""
    peak: Counter[str] = field(default_factory=Counter)
    """The most of :attr:`held` there was at a time."""
    _freed: list[Freed] = field(default_factory=list)
    _by_byte: bool = True

    def reset(self, by_byte: bool = True) -> None:
        """Forget everything.

        Args:
            by_byte: whether to look for races from now on.
        """
        self._by_byte = by_byte
        self.shadows.clear()
        self.races.clear()
        self.held.clear()
        self.peak.clear()
        self._freed.clear()

    def shadow(self, tensor: torch.Tensor, fresh: bool = False) -> Shadow | None:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return None
        key = storage._cdata
        known = self.shadows.get(key)
        if known is None or known.alive.expired() or known.nbytes != storage.nbytes():
            if known is not None:
                self._free(known)
            # What was there before anybody watched belongs to the compute stream.
            home = self.machine.current if fresh else self.machine.default
            known = self.shadows[key] = Shadow(storage, home, fresh, self._by_byte)
            if fresh:
                self.take_back()
                self.held[home.name] += storage.nbytes()
                self.peak[home.name] = max(self.peak[home.name], self.held[home.name])
        return known

    def _free(self, shadow: Shadow) -> None:
        if shadow.fresh:
            users = [self.machine.streams[stream] for stream in shadow.recorded - {shadow.home.id}]
            uses = [(user.id, int(user.clock.fit(user.id + 1)[user.id])) for user in users]
            self._freed.append(Freed(shadow.home.name, shadow.nbytes, uses))

    def take_back(self) -> None:
        """No longer count freed memory as held where the host knows that its last use is over."""
        host, still = self.machine.host_clock, []
        for item in self._freed:
            if all(host.has(*use) for use in item.uses):
                self.held[item.home] -= item.nbytes
            else:
                still.append(item)
        self._freed = still

    def on_host(self, tensor: torch.Tensor) -> bool:
        shadow = self.shadows.get(tensor.untyped_storage()._cdata)
        return shadow is not None and shadow.on_host and not shadow.alive.expired()

    def access(self, tensor: torch.Tensor, *, write: bool, stream: Stream, number: int) -> None:
        shadow = self.shadow(tensor)
        if shadow is None or tensor.numel() == 0 or not self._by_byte:
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
        expired = torch.UntypedStorage._expired  # what ``StorageWeakRef.expired`` calls, without the way there
        gone = [key for key, shadow in self.shadows.items() if expired(shadow.alive.cdata)]
        for key in gone:
            shadow = self.shadows.pop(key)
            home = shadow.home
            clock = home.clock.copy()
            clock.join(self.machine.host_clock)
            for recorded in shadow.recorded:
                clock.join(self.machine.streams[recorded].clock)
            self._free(shadow)
            for stream, number in shadow.streams_not_before(clock, len(self.machine.streams)):
                self._report("memory reused", (stream, number), f"freed while {home.name} stream may reuse it")

    def _report(self, kind: str, first: tuple[int, int], second: tuple[int, int] | str) -> None:
        said = [
            item if isinstance(item, str) else str(self.machine.operations.get(item, f"operation {item}"))
            for item in (first, second)
        ]
        self.races.setdefault((kind, *said), Race(kind, *said))
