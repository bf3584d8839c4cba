"""Streams, events and the host of the virtual accelerator: what happens before what, and when.

Every stream has a *vector clock*: for each stream, how many of its operations are known to be finished before whatever
is put on this stream next. An operation is ordered behind another if its clock has reached the other's number. The
host has such a clock too, for what it has waited for; everything it launches is ordered behind that.

For virtual time, each operation and each launch is written down as a task that follows those in the clock
(:mod:`virtual_device.schedule`).
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .schedule import Task

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

    def includes(self, other: Clock) -> bool:
        return bool((other.values <= self.fit(len(other.values))[: len(other.values)]).all())

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
        self.launched_after = Clock()
        """The clock of its last operation."""

    def wait_stream(self, other: Stream) -> None:
        self._machine.before_order_changes()
        self.clock.join(other.clock)
        self._machine.launched()

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(machine=self._machine)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._machine.host_waits(self.clock, f"synchronize {self.name} stream")

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
        self._machine.events.add(self)

    @property
    def _clock(self) -> Clock | None:
        """``None`` for what has happened in any case: it was not recorded, or before everything was forgotten."""
        return self._recorded if self._epoch == self._machine.epoch else None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self._machine.current
        self._recorded, self._epoch = stream.clock.copy(), self._machine.epoch
        self._machine.launched()

    def wait(self, stream: Stream | None = None) -> None:
        stream = stream or self._machine.current
        self._machine.before_order_changes()
        if self._clock is not None:
            stream.clock.join(self._clock)
        self._machine.launched()

    def synchronize(self) -> None:
        if self._clock is not None:
            self._machine.host_waits(self._clock, "synchronize event")

    def query(self) -> bool:
        """Return whether the host has waited for it. The host is ahead of the device, and sees nothing else."""
        return self._clock is None or self._machine.host_clock.includes(self._clock)


@dataclass
class Machine:
    """The device and host of this process."""

    streams: list[Stream] = field(default_factory=list)
    events: weakref.WeakSet[Event] = field(default_factory=weakref.WeakSet)
    """All events that some object still refers to. A CUDA event costs memory of the driver until then."""
    operations: dict[tuple[int, int], Operation] = field(default_factory=dict)
    """By stream and number."""
    host_clock: Clock = field(default_factory=Clock)
    launch_cost: float | None = None
    """Seconds of host time for each launch, if tasks are to be written down."""
    tasks: list[Task] = field(default_factory=list)
    synchronisations: list[str] = field(default_factory=list)
    """One entry for each time the host waited for the device, with where it did."""
    watched: bool = False
    epoch: int = 0
    """How often the past was forgotten."""
    listeners: list[Any] = field(default_factory=list)
    """Called before the order of events changes, so that what was freed until then is seen with the order of then."""

    def __post_init__(self) -> None:
        self._local = threading.local()
        self._task_of: dict[tuple[int, int], int] = {}
        """By stream and number of an operation."""
        self.default = Stream(machine=self, name="compute")
        self._host = Stream(machine=self, name="host")

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
        self.tasks.clear()
        self._task_of.clear()
        self.host_clock = Clock()

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

    def launched(self) -> None:
        """Let the time of one launch go by for the host."""
        if self.launch_cost is not None:
            self._host.clock.join(self.host_clock)
            self._write_down("launch", self._host, self.launch_cost)

    def launch(self, name: str, stream: Stream, seconds: float = 0.0, link: str = "", transfer: float = 0.0) -> int:
        """Put an operation on a stream. Returns its number there."""
        self.launched()
        stream.clock.join(self.host_clock)
        stream.clock.join(self._host.clock)
        number = self._write_down(name, stream, seconds, link, transfer)
        self.operations[stream.id, number] = Operation(name, stream.name, caller())
        return number

    def _write_down(self, name: str, stream: Stream, seconds: float, link: str = "", transfer: float = 0.0) -> int:
        values, before = stream.clock.fit(len(self.streams)), stream.launched_after.fit(len(self.streams))
        news = [] if self.launch_cost is None else np.flatnonzero(values > before).tolist()
        values[stream.id] += 1
        number = int(values[stream.id])
        stream.launched_after = stream.clock.copy()
        if self.launch_cost is not None:
            earlier = [(stream.id, number - 1), *((other, int(values[other])) for other in news)]
            after = {self._task_of[item] for item in earlier if item in self._task_of}
            self._task_of[stream.id, number] = len(self.tasks)
            self.tasks.append(Task(name, stream.name, list(after), seconds, link, transfer))
        return number

    def last_task(self, stream: Stream) -> Task:
        return self.tasks[self._task_of[stream.id, int(stream.clock.values[stream.id])]]

    def host_waits(self, clock: Clock, why: str) -> None:
        """The host stands still until this has happened."""
        self.before_order_changes()
        if self.watched:
            self.synchronisations.append(f"{why}, from {' < '.join(caller())}")
        self.host_clock.join(clock)

    def synchronize(self) -> None:
        everything = Clock()
        for stream in self.streams:
            everything.join(stream.clock)
        self.host_waits(everything, "synchronize device")


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
