"""Executors: work that goes on beside the forward and backward pass, in the order in which it is submitted.

A task is plain code that issues collectives and waits for them, in one or two stages. The *issue stage* starts
collectives, the *wait stage* waits for them and works on what they bring. What a wait stops depends on the device:

- With streams, ``work.wait()`` stops the current stream and never the host. The issue stage runs on the stream that is
  current when the task is submitted, the wait stage on a stream of the executor's own (:class:`StreamExecutor`). So the
  issue stage of the next task is not held up by the wait stage of this one.
- On a CPU it stops the thread, so the executor has two threads (:class:`ThreadExecutor`): one runs the issue stage of
  the next task during the wait stage that the other is in. All ranks have to issue the collectives of a group in the
  same order. Hence a first-in-first-out queue, and process groups of the executor's own (:mod:`mics_ds.comm.groups`).
"""

from __future__ import annotations

import atexit
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

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
        """Let the caller's thread or stream wait for the work, and return its result, once.

        Raises what the work raised.
        """
        ...


class Stages:
    """Places where the stages of a task run. This class runs both where the task runs, on memory of the task's own."""

    def wait_stage(self, *, issues_again: bool = False) -> AbstractContextManager:
        """Enter the wait stage: code inside may wait for collectives that were issued outside of it.

        Args:
            issues_again: whether code inside issues collectives of a group of the issue stage. Then no other task
                issues any before this one is done, so that all ranks issue them in one order.
        """
        return nullcontext()

    def record_stream(self, *tensors: torch.Tensor) -> None:
        """Keep the memory of tensors from the issue stage until the wait stage is done with them."""

    def scratch(self, numel: int, like: torch.Tensor) -> torch.Tensor:
        """Return (numel,) uninitialised elements of the dtype and device of ``like``, valid until the task is done."""
        return like.new_empty(numel)


INLINE = Stages()

Task = Callable[[Stages], T]


class Executor(Protocol):
    """Runs tasks one after another, beside the caller."""

    def submit(self, task: Task[T], *, pack: Callable[[Stages], None] | None = None, beside: bool = True) -> Handle[T]:
        """Run a task.

        Args:
            pack: runs before the task and before this returns, on the caller's thread: for memory that the caller
                reuses.
            beside: whether the task may run beside the caller's thread or stream. Otherwise it is done when this
                returns, as far as that thread or stream can see.
        """
        ...

    def drain(self) -> None:
        """Let the caller's thread or stream wait for all tasks submitted so far. Raises what one of them raised."""

    def close(self) -> None:
        """Free what the executor holds, once its tasks are done. It may be used again."""


# --------------------------------------------------------------------------------------------------
# With streams


class _StreamHandle(Generic[T]):
    def __init__(self, streams: Streams, result: T, ends: list[Any]) -> None:
        self._streams = streams
        self._result: T | None = result
        self._ends = ends

    def wait(self) -> T:
        for event in self._ends:
            self._streams.current_stream().wait_event(event)
        result, self._result = self._result, None
        return result  # type: ignore[return-value]  # None to later callers only


class _StreamStages(Stages):
    def __init__(self, executor: StreamExecutor, issue: Any, wait: Any) -> None:
        self._executor = executor
        self._issue = issue
        self._wait = wait

    def wait_stage(self, *, issues_again: bool = False) -> AbstractContextManager:
        if self._wait is not self._issue:
            self._wait.wait_stream(self._issue)  # what the wait stage issues may need what the issue stage has packed
        return self._executor.streams.stream(self._wait)

    def record_stream(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            tensor.record_stream(self._wait)

    def scratch(self, numel: int, like: torch.Tensor) -> torch.Tensor:
        return self._executor.scratch(numel, like)


class StreamExecutor:
    """An executor with a stream. Tasks are run by the caller's thread, which never waits for a device.

    Args:
        ahead: how many tasks the issue stage may be ahead of the wait stage, ``None`` for no limit. The issue stage
            waits for older tasks on its stream. With a limit, tasks share that many scratch buffers in turn, which are
            kept: this bounds the memory of tasks, however far the host is ahead of the device.
        own_issue_stream: whether the issue stage has a stream of the executor's own too, which waits for the caller's.
            Then the caller's stream is never held up.
    """

    def __init__(
        self, name: str, streams: Streams, *, ahead: int | None = None, own_issue_stream: bool = False
    ) -> None:
        self.name = name
        self.streams = streams
        self._ahead = ahead
        self._own_issue_stream = own_issue_stream
        self._issue: Any = None
        self._wait: Any = None
        self._busy: list[Any] = []
        """Streams with tasks that no drain has waited for."""
        self._ends: deque[Any] = deque()
        """Ends of the last ``ahead`` tasks. Nobody looks at them without a limit, so none are kept then."""
        self._scratch: list[list[torch.Tensor]] = [[] for _ in range(ahead or 0)]
        """Buffers of the task at each place of the turn, in the order in which it asks for them."""
        self._count = 0
        self._asked = 0
        """Buffers that the task has asked for so far."""

    def submit(
        self, task: Task[T], *, pack: Callable[[Stages], None] | None = None, beside: bool = True
    ) -> _StreamHandle[T]:
        if not (self._own_issue_stream and beside):
            return self._run(task, pack, beside)
        if self._issue is None:
            self._issue = self.streams.Stream()
        self._wait_for_caller(self._issue)
        with self.streams.stream(self._issue):
            return self._run(task, pack, beside)

    def _wait_for_caller(self, stream: Any) -> None:
        stream.wait_stream(self.streams.current_stream())

    def _run(self, task: Task[T], pack: Callable[[Stages], None] | None, beside: bool) -> _StreamHandle[T]:
        issue = self.streams.current_stream()
        if beside and self._wait is None:
            self._wait = self.streams.Stream()
        wait = self._wait if beside else issue
        if self._ahead is not None and len(self._ends) == self._ahead:
            issue.wait_event(self._ends.popleft())
        self._count += 1
        self._asked = 0
        stages = _StreamStages(self, issue, wait)
        if pack is not None:
            pack(stages)
        result = task(stages)
        ends = []
        for stream in [wait] if wait is issue else [issue, wait]:
            event = self.streams.Event()
            event.record(stream)
            ends.append(event)
            if stream not in self._busy:
                self._busy.append(stream)
        if self._ahead is not None:
            self._ends.append(ends[-1])
        return _StreamHandle(self.streams, result, ends)

    def scratch(self, numel: int, like: torch.Tensor) -> torch.Tensor:
        """Return memory that the task with the same place in the turn had before; its end was waited for."""
        if self._ahead is None:
            return like.new_empty(numel)
        held, nbytes = self._scratch[self._count % self._ahead], numel * like.element_size()
        index, self._asked = self._asked, self._asked + 1
        if index == len(held):
            held.append(torch.empty(nbytes, dtype=torch.uint8, device=like.device))
        elif held[index].numel() < nbytes or held[index].device != like.device:
            self._release(held[index])
            held[index] = torch.empty(nbytes, dtype=torch.uint8, device=like.device)
        return held[index][:nbytes].view(like.dtype)

    def _release(self, buffer: torch.Tensor) -> None:
        if self._wait is not None:
            buffer.record_stream(self._wait)

    def drain(self) -> None:
        current = self.streams.current_stream()
        for stream in self._busy:
            if stream != current:
                current.wait_stream(stream)
        self._busy.clear()

    def close(self) -> None:
        self.drain()
        self._ends.clear()
        for buffer in (buffer for held in self._scratch for buffer in held):
            self._release(buffer)
        self._scratch = [[] for _ in self._scratch]
        self._issue = self._wait = None


# --------------------------------------------------------------------------------------------------
# With a thread


class _ThreadHandle(Future[T]):
    def wait(self) -> T:
        return self.result()

    def run(self, task: Task[T], stages: Stages) -> None:
        try:
            self.set_result(task(stages))
        except BaseException as error:  # raised by wait()
            self.set_exception(error)


class _Turns:
    """State that the threads of an executor share. One thread at a time runs a stage, in the order of the tasks."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[tuple[_ThreadHandle, Task] | None] = SimpleQueue()
        self.issuing, self.waiting = threading.Lock(), threading.Lock()
        self.error: BaseException | None = None

    def work(self) -> None:
        """Run tasks until the queue says ``None``."""
        torch.set_grad_enabled(False)
        while True:
            self.issuing.acquire()
            submitted = self.queue.get()
            if submitted is None:
                self.queue.put(None)  # for the other threads
                self.issuing.release()
                return
            handle, task = submitted
            stages = _ThreadStages(self)
            if self.error is None:
                handle.run(task, stages)
            else:
                # Going on after a failure would issue collectives that no other rank expects next.
                handle.set_exception(self.error)
            stages.enter_wait_stage(issues_again=True)
            self.error = self.error or handle.exception()
            stages.end()
            del handle, task, submitted  # and with it the buffers it worked on, while this thread sleeps


class _ThreadStages(Stages):
    def __init__(self, turns: _Turns) -> None:
        self._turns = turns
        self._is_waiting, self._is_issuing = False, True

    def enter_wait_stage(self, issues_again: bool = False) -> None:
        """Wait for the wait stages of earlier tasks, and let another thread issue if this one does not."""
        if not self._is_waiting:
            self._turns.waiting.acquire()
            self._is_waiting = True
        if self._is_issuing and not issues_again:
            self._turns.issuing.release()
            self._is_issuing = False

    def end(self) -> None:
        """Let the wait stage of the next task begin."""
        self.enter_wait_stage()
        self._turns.waiting.release()

    def wait_stage(self, *, issues_again: bool = False) -> AbstractContextManager:
        self.enter_wait_stage(issues_again)
        if self._turns.error is not None:
            raise self._turns.error
        return nullcontext()


class ThreadExecutor:
    """An executor with two threads, which start with the first task.

    Args:
        name: shown as the thread's name in traces and stack dumps.
        ahead: how many tasks may be unfinished, ``None`` for no limit. ``submit`` waits for the oldest.
    """

    def __init__(self, name: str, *, ahead: int | None = None) -> None:
        self.name = name
        self._ahead = ahead
        self._turns = _Turns()
        self._unfinished: deque[_ThreadHandle] = deque()
        self._left: list[_ThreadHandle] = []
        """Tasks under way when the executor was closed. Their failures were for the engine that closed it."""
        self._threads: list[threading.Thread] = []

    def submit(
        self, task: Task[T], *, pack: Callable[[Stages], None] | None = None, beside: bool = True
    ) -> _ThreadHandle[T]:
        handle: _ThreadHandle[T] = _ThreadHandle()
        if not beside:
            self.drain()
            if pack is not None:
                pack(INLINE)
            handle.run(task, INLINE)
            handle.wait()  # raise here and now
            return handle
        if not self._threads:
            self._wait_for_left()  # two pairs of threads would issue in any order
            # Daemons: after a failure elsewhere the process must be able to end while a collective
            # still waits for a rank that is gone.
            self._threads = [
                threading.Thread(target=self._turns.work, name=f"mics {self.name}", daemon=True) for _ in range(2)
            ]
            for thread in self._threads:
                thread.start()
            _started.add(self)
        while self._unfinished and (self._unfinished[0].done() or len(self._unfinished) == self._ahead):
            self._unfinished.popleft().wait()
        if pack is not None:
            pack(INLINE)
        self._unfinished.append(handle)
        self._turns.queue.put((handle, task))
        return handle

    def _wait_for_left(self) -> None:
        wait(self._left)
        self._left.clear()

    def drain(self) -> None:
        self._wait_for_left()
        while self._unfinished:
            self._unfinished.popleft().wait()

    def close(self) -> None:
        """Let the threads end, and wait for that unless a task hangs. A next task starts others."""
        self._turns.queue.put(None)
        if all(handle.done() for handle in self._unfinished):
            for thread in self._threads:
                thread.join()
        self._threads, self._turns = [], _Turns()
        self._left += [handle for handle in self._unfinished if not handle.done()]
        self._unfinished.clear()

    def end(self, deadline: float) -> None:
        """Let the threads end when their tasks are done, and wait for that until ``deadline``, of a monotonic clock."""
        self._turns.queue.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


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


def make_executor(
    name: str,
    streams: Streams | None,
    *,
    ahead: int | None = None,
    own_issue_stream: bool = False,
) -> Executor:
    """Return an executor for a device with these streams, or for one without.

    Args:
        ahead, own_issue_stream: see :class:`StreamExecutor`.
    """
    if streams is None:
        return ThreadExecutor(name, ahead=ahead)
    return StreamExecutor(name, streams, ahead=ahead, own_issue_stream=own_issue_stream)
