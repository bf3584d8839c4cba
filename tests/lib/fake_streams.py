"""An accelerator of streams on which nothing happens, and collectives for it: for questions of who waits for whom.

Every entry of a stream is a name. A stream *has seen* what was put on it before and what it was told to wait for.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class FakeStream:
    def __init__(self, name: str) -> None:
        self.name = name
        self.log: list[str] = []
        self.after: set[str] = set()
        """Work of others that this one waits for."""

    def do(self, what: str) -> None:
        self.log.append(what)

    def seen(self) -> set[str]:
        return {*self.log, *self.after}

    def wait_stream(self, other: FakeStream) -> None:
        self.after |= other.seen()

    def wait_event(self, event: FakeEvent) -> None:
        self.after |= event.seen


class FakeEvent:
    def __init__(self) -> None:
        self.seen: set[str] = set()

    def record(self, stream: FakeStream) -> None:
        self.seen = stream.seen()


class FakeStreams:
    """What :class:`mics_ds.comm.async_exec.Streams` asks of an accelerator."""

    def __init__(self) -> None:
        self.made: list[FakeStream] = []
        self._current = [FakeStream("default")]
        self._events: weakref.WeakSet[FakeEvent] = weakref.WeakSet()

    def Stream(self) -> Any:  # noqa: N802
        self.made.append(FakeStream(f"own {len(self.made)}"))
        return self.made[-1]

    def Event(self) -> Any:  # noqa: N802
        event = FakeEvent()
        self._events.add(event)
        return event

    def live_events(self) -> int:
        """Return how many events something still refers to."""
        gc.collect()
        return len(self._events)

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    def current_stream(self) -> FakeStream:
        return self._current[-1]

    def current_device_name(self) -> str:
        return "cpu"


class FakeCollectives:
    """In place of ``torch.distributed``: each collective has a name, and starts when what its stream has seen is done.

    Like NCCL's: of one group they run one after another, and ``wait()`` stops the current stream, not the host.
    """

    def __init__(self, streams: FakeStreams, names: dict[Any, str]) -> None:
        self._streams = streams
        self._names = names
        self._last: dict[Any, set[str]] = {}
        self.started_after: dict[str, set[str]] = {}
        """For each collective, everything that had to be done before it could start."""

    def _issue(self, group: Any) -> _FakeWork:
        number = sum(name.startswith(self._names[group]) for name in self.started_after)
        name = f"{self._names[group]} {number}"
        before = self._streams.current_stream().seen() | self._last.get(group, set())
        self.started_after[name] = before
        self._last[group] = {*before, name}
        return _FakeWork(self._streams, self._last[group])

    def all_gather_into_tensor(self, output: Any, shard: Any, group: Any, async_op: bool) -> _FakeWork:
        return self._issue(group)

    def reduce_scatter_tensor(self, output: Any, blocks: Any, group: Any, async_op: bool) -> _FakeWork:
        return self._issue(group)

    all_to_all_single = reduce_scatter_tensor


class _FakeWork:
    def __init__(self, streams: FakeStreams, done: set[str]) -> None:
        self._streams = streams
        self._done = done

    def wait(self) -> None:
        self._streams.current_stream().after |= self._done
