"""Executors: work that goes on beside the forward and backward pass, in the order in which it is submitted.

A task has two stages. The *issue stage* is a function: it starts collectives, and returns a handle. The *wait stage* is
``wait()`` of that handle: it waits for the collectives, works on what they bring, and may start others. What a wait
stops depends on the device:

- With streams, ``work.wait()`` stops the current stream and never the host. The issue stage runs on the stream that is
  current when the task is submitted, the wait stage on a stream of the executor's own (:class:`StreamExecutor`). So the
  issue stage of the next task is not held up by the wait stage of this one.
- On a CPU it stops the thread. The issue stage runs on the caller's thread, the wait stage on a thread of the
  executor's own (:class:`ThreadExecutor`).

An executor may have a stream or thread of its own for the issue stage too, for tasks that wait there. All ranks have to
issue the collectives of a group in the same order: stages of a kind run in the order of their tasks, and executors have
process groups of their own (:mod:`mics_ds.comm.groups`).
"""

from __future__ import annotations

import atexit
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import torch

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Streams(Protocol):
    """Part of an accelerator that an executor needs. DeepSpeed's ``get_accelerator()`` has it."""

    def Stream(self) -> Any: ...  # noqa: N802 (DeepSpeed's name)

    def Event(self) -> Any: ...  # noqa: N802

    def stream(self, stream: Any) -> AbstractContextManager: ...

    def current_stream(self) -> Any: ...

    def current_device_name(self) -> str: ...


class Handle(Protocol[T_co]):
    """The result of work that may still be going on."""

    def wait(self) -> T_co:
        """Let the caller's thread or stream wait for the work, and return its result.

        Raises what the work raised.
        """
        ...


@dataclass(frozen=True)
class Deferred(Generic[T]):
    """A handle of work that a function finishes."""

    wait: Callable[[], T]


class Memory:
    """Memory of a task. This class gives each task memory of its own, for both stages in one place."""

    def scratch(self, numel: int, like: torch.Tensor) -> torch.Tensor:
        """Return (numel,) uninitialised elements of the dtype and device of ``like``, valid until the task is done."""
        return like.new_empty(numel)

    def record_stream(self, *tensors: torch.Tensor) -> None:
        """Keep the memory of tensors from the issue stage until the wait stage is done with them."""


INLINE = Memory()

Task = Callable[[Memory], Handle[T]]


# --------------------------------------------------------------------------------------------------
# With streams


class StreamExecutor(Memory):
    """An executor with a stream. Tasks are run by the caller's thread, which never waits for a device.

    Args:
        ahead: how many tasks the issue stage may be ahead of the wait stage, ``None`` for no limit. The issue stage
            waits for older tasks on its stream. With a limit, tasks share that many scratch buffers in turn, which are
            kept: this bounds the memory of tasks, however far the host is ahead of the device.
        own_issue: whether the issue stage has a stream of the executor's own too, which waits for the caller's. Then
            the caller's stream is never held up.
    """

    def __init__(self, streams: Streams, *, ahead: int | None = None, own_issue: bool = False) -> None:
        self._streams = streams
        self._ahead, self._own_issue = ahead, own_issue
        self._issue: Any = None
        self._wait: Any = None
        self._ends: deque[Any] = deque()
        """Ends of the last ``ahead`` tasks. Nobody looks at them without a limit, so none are kept then."""
        self._scratch: deque[list[torch.Tensor]] = deque([] for _ in range(ahead or 0))
        """Buffers of each task in the turn, the last one's first, in the order in which it has asked for them."""
        self._asked = 0
        """Buffers that the task has asked for so far."""

    def submit(self, task: Task[T]) -> Handle[T]:
        """Run both stages of a task on their streams."""
        if self._wait is None:
            self._issue = self._streams.Stream() if self._own_issue else None
            self._wait = self._streams.Stream()
        if self._issue is None:
            return self._run(task)
        self._issue.wait_stream(self._streams.current_stream())
        with self._streams.stream(self._issue):
            return self._run(task)

    def _run(self, task: Task[T]) -> Handle[T]:
        issue = self._streams.current_stream()
        if len(self._ends) == self._ahead:
            issue.wait_event(self._ends.popleft())
        self._scratch.rotate()
        self._asked = 0
        issued = task(self)
        self._wait.wait_stream(issue)  # what the wait stage issues may need what the issue stage has packed
        with self._streams.stream(self._wait):
            result = issued.wait()
            end = self._streams.Event()
            end.record(self._wait)
        if self._ahead is not None:
            self._ends.append(end)

        def follow() -> T:
            self._streams.current_stream().wait_event(end)
            return result

        return Deferred(follow)

    def scratch(self, numel: int, like: torch.Tensor) -> torch.Tensor:
        """Return memory that the task with the same place in the turn had before; its end was waited for."""
        if self._ahead is None:
            return like.new_empty(numel)
        held, nbytes = self._scratch[0], numel * like.element_size()
        index, self._asked = self._asked, self._asked + 1
        if index == len(held) or held[index].numel() < nbytes or held[index].device != like.device:
            self.record_stream(*held[index : index + 1])
            held[index : index + 1] = [torch.empty(nbytes, dtype=torch.uint8, device=like.device)]
        return held[index][:nbytes].view(like.dtype)

    def record_stream(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            tensor.record_stream(self._wait)

    def drain(self) -> None:
        """Let the caller's stream wait for all tasks submitted so far."""
        if self._wait is not None:
            self._streams.current_stream().wait_stream(self._wait)

    def close(self) -> None:
        """Free what the executor holds, once its tasks are done. It may be used again."""
        self.drain()
        self._ends.clear()
        for held in self._scratch:
            self.record_stream(*held)
            held.clear()
        self._issue = self._wait = None


# --------------------------------------------------------------------------------------------------
# With threads


class _ThreadHandle(Future[T]):
    def wait(self) -> T:
        return self.result()


class ThreadExecutor:
    """An executor with a thread, which starts with the first task.

    Args:
        name: shown as the thread's name in traces and stack dumps.
        ahead: how many tasks may be unfinished, ``None`` for no limit. ``submit`` waits for the oldest.
        own_issue: whether the issue stage has a thread of the executor's own too.
    """

    def __init__(self, name: str, *, ahead: int | None = None, own_issue: bool = False) -> None:
        self.name = name
        self._ahead, self._own_issue = ahead, own_issue
        self._to_issue: SimpleQueue[Any] = SimpleQueue()
        self._to_wait: SimpleQueue[Any] = SimpleQueue()
        self._threads: list[tuple[SimpleQueue[Any], threading.Thread]] = []
        """Each thread with the queue that it works off."""
        self._unfinished: deque[_ThreadHandle] = deque()
        self._failures: list[BaseException] = []
        """Failures of tasks since the executor was closed: no later one runs."""

    def submit(self, task: Task[T]) -> Handle[T]:
        """Run both stages of a task on their threads. What they raise is raised by the handle."""
        while self._unfinished and (self._unfinished[0].done() or len(self._unfinished) == self._ahead):
            self._unfinished.popleft().wait()
        if not self._threads:
            self._start()
        handle: _ThreadHandle[T] = _ThreadHandle()
        self._unfinished.append(handle)
        if self._own_issue:
            self._to_issue.put((handle, task, self._failures))
        else:
            self._issue(handle, task, self._failures)
        return handle

    def _start(self) -> None:
        stages: list[tuple[SimpleQueue[Any], Callable[..., None]]] = [(self._to_wait, self._finish)]
        if self._own_issue:
            stages.insert(0, (self._to_issue, self._issue))
        for queue, stage in stages:
            # Daemons: after a failure elsewhere the process must be able to end while a collective
            # still waits for a rank that is gone.
            thread = threading.Thread(target=_work, args=(queue, stage), name=f"mics {self.name}", daemon=True)
            thread.start()
            self._threads.append((queue, thread))
        _started.add(self)

    def _issue(self, handle: _ThreadHandle, task: Task, failures: list[BaseException]) -> None:
        # Inference mode is one thread's: what is allocated in it could not be changed by the other stage.
        with torch.inference_mode(False), torch.no_grad():
            _attempt(handle, failures, lambda: self._to_wait.put((handle, task(INLINE), failures)))

    def _finish(self, handle: _ThreadHandle, issued: Handle, failures: list[BaseException]) -> None:
        _attempt(handle, failures, lambda: handle.set_result(issued.wait()))

    def drain(self) -> None:
        """Let the caller's thread wait for all tasks submitted so far. Raises what one of them raised."""
        while self._unfinished:
            self._unfinished.popleft().wait()

    def close(self) -> None:
        """Let the threads end, unless a task hangs. The executor may be used again, and failures are forgotten."""
        is_done = all(handle.done() for handle in self._unfinished)
        self._unfinished.clear()
        self._failures = []
        if is_done:
            self.end(time.monotonic() + PATIENCE_S)
        else:  # a task behind those under way: who drains the executor waits for them, and not for their failures
            self.submit(lambda memory: Deferred(lambda: None))

    def end(self, deadline: float) -> None:
        """Let the threads end when their tasks are done, and wait for that until ``deadline``, of a monotonic clock."""
        for queue, thread in self._threads:
            queue.put(None)
            thread.join(max(0.0, deadline - time.monotonic()))
        self._threads.clear()


def _work(queue: SimpleQueue[Any], stage: Callable[..., None]) -> None:
    """Run a stage of tasks until the queue says ``None``."""
    torch.set_grad_enabled(False)
    while (submitted := queue.get()) is not None:
        stage(*submitted)
        del submitted  # and with it the buffers it worked on, while this thread sleeps


def _attempt(handle: _ThreadHandle, failures: list[BaseException], stage: Callable[[], None]) -> None:
    """Run a stage, unless another task has failed: it would issue collectives that no other rank expects next."""
    try:
        if failures:
            raise failures[0]
        stage()
    except BaseException as error:  # raised by wait()
        failures.append(error)
        handle.set_exception(error)


Executor: TypeAlias = StreamExecutor | ThreadExecutor

_started: weakref.WeakSet[ThreadExecutor] = weakref.WeakSet()
PATIENCE_S = 60.0
PATIENCE_AFTER_AN_ERROR_S = 1.0  # what an executor still waits for may never come


@atexit.register
def _end_executors() -> None:
    """End all threads. One that frees a tensor, or waits, while the interpreter goes away aborts the process."""
    failed = getattr(sys, "last_value", None) is not None
    deadline = time.monotonic() + (PATIENCE_AFTER_AN_ERROR_S if failed else PATIENCE_S)
    for executor in list(_started):
        executor.end(deadline)
