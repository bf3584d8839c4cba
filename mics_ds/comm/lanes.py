"""A lane: work that goes on beside the backward pass, in the order in which it was handed over.

On an accelerator nothing is needed for that: collectives and kernels go to streams, and the host
hurries on. On a CPU a collective of several stages needs somebody to start the second stage when the
first has arrived, so a lane there is one thread. One thread, and a first-in-first-out queue, because
all ranks have to issue the collectives of a group in the same order; for the same reason a lane needs
process groups of its own (:mod:`mics_ds.comm.groups`).

Work is written as plain blocking code in either case.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch

from . import meter

T = TypeVar("T")


class Pending(Generic[T]):
    """The result of work that may still be going on."""

    def __init__(self) -> None:
        self._finished = threading.Event()
        self._result: T | None = None
        self._error: BaseException | None = None

    def run(self, task: Callable[[], T]) -> None:
        try:
            self._result = task()
        except BaseException as error:  # handed to whoever waits
            self._error = error
        finally:
            self._finished.set()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._finished.set()

    def done(self) -> bool:
        return self._finished.is_set()

    def check(self) -> None:
        """Block until the work is done. Raises what it raised."""
        self._finished.wait()
        if self._error is not None:
            raise self._error

    def wait(self) -> T:
        """Block until the work is done, and hand its result over: to the first caller, ``None`` to later ones.

        Raises what the work raised. The result is not kept, because it may be large, and the lane
        remembers its tasks for a while.
        """
        self.check()
        result, self._result = self._result, None
        return result  # type: ignore[return-value]


class Lane:
    """Runs tasks one after another: on a thread for CPU tensors, at once for a device with streams.

    Args:
        name: shown as the thread's name in traces and stack dumps.
        limit: bytes that tasks under way may hold together; one task is always allowed. ``submit`` waits.
    """

    def __init__(self, name: str, *, limit: int = 16 << 20) -> None:
        self.name = name
        self._limit = limit
        self._held: deque[int] = deque()
        self._queue: SimpleQueue[tuple[Pending, Callable]] = SimpleQueue()
        self._pending: deque[Pending] = deque()
        self._thread: threading.Thread | None = None

    def submit(
        self, task: Callable[[], T], device: torch.device, *, nbytes: int = 0, beside: bool = True
    ) -> Pending[T]:
        """Hand over a task on tensors of ``device``.

        Args:
            nbytes: what the task holds until it is done.
            beside: whether it may run beside the caller. Without it, or where the device has streams
                for that, the task has been run when this returns.
        """
        pending: Pending[T] = Pending()
        if not beside or device.type != "cpu":
            self.drain()
            pending.run(task)
            pending.check()  # raise here and now
            return pending
        if self._thread is None:
            # A daemon: after a failure elsewhere the process must be able to end while a collective
            # still waits for a rank that is gone.
            self._thread = threading.Thread(target=self._work, name=f"mics {self.name}", daemon=True)
            self._thread.start()
        while self._pending and (self._pending[0].done() or sum(self._held) + nbytes > self._limit):
            self._held.popleft()
            self._pending.popleft().check()
        self._pending.append(pending)
        self._held.append(nbytes)
        self._queue.put((pending, meter.carried(task)))
        return pending

    def drain(self) -> None:
        """Wait for all tasks handed over so far. Raises what the first failing one raised."""
        while self._pending:
            self._held.popleft()
            self._pending.popleft().check()

    def _work(self) -> None:
        torch.set_grad_enabled(False)
        error: BaseException | None = None
        while True:
            pending, task = self._queue.get()
            if error is not None:
                # Going on after a failure would issue collectives that no other rank expects next.
                pending.fail(error)
                continue
            pending.run(task)
            error = pending._error
            del pending, task  # and with it the buffers it worked on, while this thread sleeps
