"""A lane: work that goes on beside the forward and backward pass, in the order in which it was handed over.

A task is written once, as plain code that issues collectives and waits for them, in one or two *stages*. What
"waiting" stops depends on the device:

- With streams, ``work.wait()`` stops the current stream and never the host. So a task's first stage goes to the
  stream that is current when it is handed over, and everything that waits goes to a second stream, the lane's own
  (:class:`StreamLane`). The first stage of the next task is not held up by the second of this one, nor is a stream
  on which somebody else does other things.
- On a CPU it stops the thread, so a lane there has a thread (:class:`ThreadLane`), on which both stages run. All
  ranks have to issue the collectives of a group in the same order, and two threads cannot agree on one; hence one
  thread, a first-in-first-out queue, and process groups of its own (:mod:`mics_ds.comm.groups`).
"""

from __future__ import annotations

import atexit
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

import torch

from . import meter

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Streams(Protocol):
    """What a lane needs of an accelerator. DeepSpeed's ``get_accelerator()`` is one."""

    def Stream(self) -> Any: ...  # noqa: N802 (DeepSpeed's name)

    def Event(self) -> Any: ...  # noqa: N802

    def stream(self, stream: Any) -> AbstractContextManager: ...

    def current_stream(self) -> Any: ...

    def current_device_name(self) -> str: ...


class Stages:
    """Where the two stages of a task run. This one: where the task does."""

    def second(self) -> AbstractContextManager:
        """Everything in this context may wait, for collectives that were issued outside of it too."""
        return nullcontext()

    def wait_for_first(self) -> None:
        """Let the second stage see what the first has done so far, without a collective between them."""

    def used(self, *tensors: torch.Tensor) -> None:
        """The second stage works on tensors of the first: do not give their memory away before it has."""


INLINE = Stages()


class _OnStreams(Stages):
    def __init__(self, streams: Streams, first: Any, second: Any) -> None:
        self._streams = streams
        self._first = first
        self._second = second

    def second(self) -> AbstractContextManager:
        return self._streams.stream(self._second)

    def wait_for_first(self) -> None:
        if self._second != self._first:
            self._second.wait_stream(self._first)

    def used(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            tensor.record_stream(self._second)


Task = Callable[[Stages], T]


class Pending(Protocol[T_co]):
    """The result of work that may still be going on."""

    def wait(self) -> T_co:
        """Let the caller's thread or stream wait for the work, and hand its result over, once.

        Raises what the work raised.
        """
        ...


class Lane(Protocol):
    """Runs tasks one after another, beside the caller."""

    def submit(self, task: Task[T], *, nbytes: int = 0, beside: bool = True) -> Pending[T]:
        """Hand over a task.

        Args:
            nbytes: what the task holds until it is done.
            beside: whether it may run beside the caller's thread or stream. Without it, it has been run when this
                returns, as far as that thread or stream can see.
        """
        ...

    def drain(self) -> None:
        """Let the caller's thread or stream wait for all tasks handed over so far. Raises what one raised."""

    def used(self, *tensors: torch.Tensor) -> None:
        """The caller works on tensors that a task has made: do not give their memory away before it has."""
        ...

    def close(self) -> None:
        """Free what the lane holds, once its tasks are done. It may be used again."""


# --------------------------------------------------------------------------------------------------
# With streams


class _OnItsWay(Generic[T]):
    def __init__(self, streams: Streams, result: T, done: list[Any]) -> None:
        self._streams = streams
        self._result: T | None = result
        self._done = done

    def wait(self) -> T:
        for event in self._done:
            self._streams.current_stream().wait_event(event)
        result, self._result = self._result, None
        return result  # type: ignore[return-value]  # None to later callers only


class StreamLane:
    """A lane of two streams. Tasks are run by the caller's thread, which never waits for a device.

    Args:
        ahead: how many tasks the first stage may be ahead of the second, if there is to be a limit. It waits for
            older ones, on its stream, so that whoever bounds the memory of that stream bounds that of the second's.
        apart: whether the first stage has a stream of the lane's own too, which waits for the caller's. Then that one
            is never held up.
    """

    def __init__(self, name: str, streams: Streams, *, ahead: int | None = None, apart: bool = False) -> None:
        self.name = name
        self._streams = streams
        self._ahead = ahead
        self._apart = apart
        self._first: Any = None
        self._second: Any = None
        self._busy: list[Any] = []
        """Streams with tasks that were not waited for."""
        self._ends: deque[Any] = deque()

    def submit(self, task: Task[T], *, nbytes: int = 0, beside: bool = True) -> _OnItsWay[T]:
        if self._apart and beside:
            if self._first is None:
                self._first = self._streams.Stream()
            self._wait_for_caller(self._first)
            with self._streams.stream(self._first):
                return self._submit(task, beside)
        return self._submit(task, beside)

    def _wait_for_caller(self, stream: Any) -> None:
        stream.wait_stream(self._streams.current_stream())

    def _submit(self, task: Task[T], beside: bool) -> _OnItsWay[T]:
        first = self._streams.current_stream()
        if beside and self._second is None:
            self._second = self._streams.Stream()
        second = self._second if beside else first
        while self._ahead is not None and len(self._ends) >= self._ahead:
            first.wait_event(self._ends.popleft())
        result = task(_OnStreams(self._streams, first, second))
        done = []
        for stream in [second] if second is first else [first, second]:
            event = self._streams.Event()
            event.record(stream)
            done.append(event)
            if stream not in self._busy:
                self._busy.append(stream)
        if second is not first:
            self._ends.append(done[-1])
        return _OnItsWay(self._streams, result, done)

    def drain(self) -> None:
        current = self._streams.current_stream()
        for stream in self._busy:
            if stream != current:
                current.wait_stream(stream)
        self._busy.clear()
        self._ends.clear()

    def used(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            tensor.record_stream(self._streams.current_stream())

    def close(self) -> None:
        self.drain()
        self._first = self._second = None


# --------------------------------------------------------------------------------------------------
# With a thread


class _OnThread(Generic[T]):
    def __init__(self) -> None:
        self._finished = threading.Event()
        self._result: T | None = None
        self._error: BaseException | None = None

    def run(self, task: Task[T]) -> None:
        try:
            self._result = task(INLINE)
        except BaseException as error:  # handed to whoever waits
            self._error = error
        finally:
            self._finished.set()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._finished.set()

    @property
    def error(self) -> BaseException | None:
        return self._error

    def done(self) -> bool:
        return self._finished.is_set()

    def check(self) -> None:
        """Block until the work is done. Raises what it raised."""
        self._finished.wait()
        if self._error is not None:
            raise self._error

    def wait(self) -> T:
        self.check()
        # Not kept, because it may be large, and the lane remembers its tasks for a while.
        result, self._result = self._result, None
        return result  # type: ignore[return-value]  # None to later callers only


class ThreadLane:
    """A lane of one thread, which is started with the first task.

    Args:
        name: shown as the thread's name in traces and stack dumps.
        limit: bytes that tasks under way may hold together; one task is always allowed. ``submit`` waits.
    """

    def __init__(self, name: str, *, limit: int = 16 << 20) -> None:
        self.name = name
        self._limit = limit
        self._held: deque[int] = deque()
        self._queue: SimpleQueue[tuple[_OnThread, Task] | None] = SimpleQueue()
        self._pending: deque[_OnThread] = deque()
        self._thread: threading.Thread | None = None

    def submit(self, task: Task[T], *, nbytes: int = 0, beside: bool = True) -> _OnThread[T]:
        pending: _OnThread[T] = _OnThread()
        if not beside:
            self.drain()
            pending.run(task)
            pending.check()  # raise here and now
            return pending
        if self._thread is None:
            # A daemon: after a failure elsewhere the process must be able to end while a collective
            # still waits for a rank that is gone.
            self._thread = threading.Thread(
                target=self._work, args=(self._queue,), name=f"mics {self.name}", daemon=True
            )
            self._thread.start()
            _started.add(self)
        while self._pending and (self._pending[0].done() or sum(self._held) + nbytes > self._limit):
            self._held.popleft()
            self._pending.popleft().check()
        self._pending.append(pending)
        self._held.append(nbytes)
        self._queue.put((pending, meter.carried(task)))
        return pending

    def drain(self) -> None:
        while self._pending:
            self._held.popleft()
            self._pending.popleft().check()

    def used(self, *tensors: torch.Tensor) -> None:
        """Memory is freed when nobody refers to it."""

    def close(self) -> None:
        """Let the thread end, and wait for that unless a task hangs in it. A next task starts another."""
        if self._thread is not None:
            self._queue.put(None)
            if all(pending.done() for pending in self._pending):
                self._thread.join()
            self._thread, self._queue = None, SimpleQueue()
        # What failed was for whoever used the lane before.
        self._pending.clear()
        self._held.clear()

    def end(self, patience_s: float) -> None:
        """Let the thread end when its tasks are done, and wait so long for that."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(patience_s)

    @staticmethod
    def _work(queue: SimpleQueue[tuple[_OnThread, Task] | None]) -> None:
        torch.set_grad_enabled(False)
        error: BaseException | None = None
        while (handed := queue.get()) is not None:
            pending, task = handed
            if error is not None:
                # Going on after a failure would issue collectives that no other rank expects next.
                pending.fail(error)
                continue
            pending.run(task)
            error = pending.error
            del pending, task, handed  # and with it the buffers it worked on, while this thread sleeps


_started: weakref.WeakSet[ThreadLane] = weakref.WeakSet()
PATIENCE_S = 60.0
PATIENCE_AFTER_AN_ERROR_S = 1.0  # whatever a lane still waits for may never come


@atexit.register
def _end_lanes() -> None:
    """A thread that frees a tensor, or waits for a collective, while the interpreter goes away aborts the process."""
    failed = getattr(sys, "last_value", None) is not None
    deadline = time.monotonic() + (PATIENCE_AFTER_AN_ERROR_S if failed else PATIENCE_S)
    for lane in list(_started):
        lane.end(max(0.0, deadline - time.monotonic()))


def make_lane(name: str, streams: Streams | None, *, ahead: int | None = None, apart: bool = False) -> Lane:
    """A lane for a device with these streams, or for one without. ``ahead``, ``apart``: see :class:`StreamLane`."""
    return ThreadLane(name) if streams is None else StreamLane(name, streams, ahead=ahead, apart=apart)
