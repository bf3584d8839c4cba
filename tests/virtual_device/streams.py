"""Streams, events and the host of the virtual accelerator: what happens before what, and when.

Every stream has a *vector clock*: for each stream, how many of its operations are known to be finished before whatever
is put on this stream next. An operation is ordered behind another if its clock has reached the other's number. The
host has such a clock too, for what it has waited for; everything it launches is ordered behind that.

Virtual time runs beside it: a stream is free at some time, an event has one, and the host has its own.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_SKIPPED = ("/torch/", "/virtual_device/", "/contextlib.py", "/functools.py", "importlib")


@dataclass(frozen=True)
class Operation:
    """Something that a stream does, for reports."""

    name: str
    stream: str
    where: tuple[str, ...]
    """Python frames that launched it, the innermost first."""

    def __str__(self) -> str:
        return f"{self.name} on {self.stream} stream, from {' < '.join(self.where)}"


@dataclass
class Span:
    """A stretch of virtual time in which a stream did something."""

    stream: str
    name: str
    start: float
    end: float


class Clock:
    """A vector clock that grows with the number of streams."""

    __slots__ = ("values",)

    def __init__(self, values: np.ndarray | None = None) -> None:
        self.values = np.zeros(0, np.int64) if values is None else values

    def copy(self) -> Clock:
        return Clock(self.values.copy())

    def fit(self, size: int) -> np.ndarray:
        if len(self.values) < size:
            self.values = np.concatenate([self.values, np.zeros(size - len(self.values), np.int64)])
        return self.values

    def join(self, other: Clock) -> None:
        mine = self.fit(len(other.values))
        np.maximum(mine[: len(other.values)], other.values, out=mine[: len(other.values)])

    def has(self, stream: int, number: int) -> bool:
        return stream < len(self.values) and bool(self.values[stream] >= number)


class Stream:
    """In place of ``torch.cuda.Stream``."""

    def __init__(
        self, device: Any = None, priority: int = 0, *, machine: Machine | None = None, name: str = ""
    ) -> None:
        self._machine = machine or MACHINE
        self.id = self._machine.register(self)
        self.name = name or f"side {self.id}"
        self.reset()

    def reset(self) -> None:
        """Forget the past."""
        self.clock = Clock()
        self.time = 0.0

    def wait_stream(self, other: Stream) -> None:
        self._machine.before_order_changes()
        self.clock.join(other.clock)
        self.time = max(self.time, other.time)
        self._machine.launched("wait_stream")

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(machine=self._machine)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._machine.host_waits(self.clock, self.time, f"synchronize {self.name} stream")

    def query(self) -> bool:
        return self.time <= self._machine.host_time

    def __enter__(self) -> Stream:
        self._context = self._machine.on(self)
        self._context.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._context.__exit__(*exc)

    def __repr__(self) -> str:
        return f"<virtual {self.name} stream>"


class Event:
    """In place of ``torch.cuda.Event``."""

    def __init__(self, enable_timing: bool = False, *_: Any, machine: Machine | None = None, **__: Any) -> None:
        self._machine = machine or MACHINE
        self._recorded: Clock | None = None
        self._epoch = -1
        self.time = 0.0

    @property
    def _clock(self) -> Clock | None:
        """``None`` for what has happened in any case: it was not recorded, or before everything was forgotten."""
        return self._recorded if self._epoch == self._machine.epoch else None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self._machine.current
        self._recorded, self.time, self._epoch = stream.clock.copy(), stream.time, self._machine.epoch
        self._machine.launched("record_event")

    def wait(self, stream: Stream | None = None) -> None:
        stream = stream or self._machine.current
        self._machine.before_order_changes()
        if self._clock is not None:
            stream.clock.join(self._clock)
            stream.time = max(stream.time, self.time)
        self._machine.launched("wait_event")

    def synchronize(self) -> None:
        if self._clock is not None:
            self._machine.host_waits(self._clock, self.time, "synchronize event")

    def query(self) -> bool:
        if self._clock is None:
            return True
        if not self._machine.timed or self.time > self._machine.host_time:
            return False
        self._machine.host_clock.join(self._clock)
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.time - self.time)


@dataclass
class Machine:
    """The device and host of this process."""

    streams: list[Stream] = field(default_factory=list)
    operations: dict[tuple[int, int], Operation] = field(default_factory=dict)
    """By stream and number."""
    host_clock: Clock = field(default_factory=Clock)
    host_time: float = 0.0
    launch_cost: float = 0.0
    """Seconds of host time for each launch."""
    timed: bool = False
    synchronisations: list[str] = field(default_factory=list)
    """One entry for each time the host waited for the device, with where it did."""
    spans: list[Span] = field(default_factory=list)
    watched: bool = False
    epoch: int = 0
    """How often the past was forgotten."""
    listeners: list[Any] = field(default_factory=list)
    """Called before the order of events changes, so that what was freed until then is seen with the order of then."""

    def __post_init__(self) -> None:
        self._local = threading.local()
        self.default = Stream(machine=self, name="compute")

    def register(self, stream: Stream) -> int:
        self.streams.append(stream)
        return len(self.streams) - 1

    def reset(self) -> None:
        """Start anew: everything so far is over, and the host knows it."""
        for stream in self.streams:
            stream.reset()
        self.epoch += 1
        self.operations.clear()
        self.synchronisations.clear()
        self.spans.clear()
        self.host_clock, self.host_time = Clock(), 0.0

    @property
    def current(self) -> Stream:
        return getattr(self._local, "current", self.default)

    @contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        before = self.current
        self._local.current = stream or before
        try:
            yield
        finally:
            self._local.current = before

    def before_order_changes(self) -> None:
        for listener in self.listeners:
            listener()

    def launched(self, what: str) -> None:
        """The host has spent the time of one launch."""
        self.host_time += self.launch_cost

    def launch(self, name: str, stream: Stream, seconds: float = 0.0, not_before: float = 0.0) -> int:
        """Put an operation on a stream. Returns its number there."""
        self.launched(name)
        stream.clock.join(self.host_clock)
        values = stream.clock.fit(len(self.streams))
        values[stream.id] += 1
        number = int(values[stream.id])
        self.operations[stream.id, number] = Operation(name, stream.name, caller())
        if self.timed:
            start = max(stream.time, self.host_time, not_before)
            stream.time = start + seconds
            if seconds:
                self.spans.append(Span(stream.name, name, start, stream.time))
        return number

    def host_waits(self, clock: Clock, time: float, why: str) -> None:
        """The host stands still until this has happened."""
        self.before_order_changes()
        if self.watched:
            self.synchronisations.append(f"{why}, from {' < '.join(caller())}")
        self.host_clock.join(clock)
        self.host_time = max(self.host_time, time)

    def synchronize(self) -> None:
        everything = Clock()
        for stream in self.streams:
            everything.join(stream.clock)
        self.host_waits(everything, max(stream.time for stream in self.streams), "synchronize device")


def caller(depth: int = 4) -> tuple[str, ...]:
    """The innermost Python frames that are neither torch's nor this package's."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < depth:
        path = frame.f_code.co_filename
        if not any(part in path for part in _SKIPPED):
            found.append(f"{path.rsplit('/', 1)[-1]}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(found)


MACHINE = Machine()
