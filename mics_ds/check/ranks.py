"""All ranks agree on how each check ended, whatever hangs.

A check runs on a thread of its own. The main thread watches it, and talks to the other ranks through a store, never by
a collective: one that a broken rank has left the others waiting in must not keep them from saying so. It also lets
Ctrl-C through. A rank that fails raises an alarm, upon which the others get :data:`GRACE_S` to end.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from ..errors import MicsError
from .runs import Measure

T = TypeVar("T")

GRACE_S = 10.0
"""Seconds that ranks may go on after the first one failed, and that they wait beyond the time for rank 0's word."""
POLL_S = 0.25
LONGEST_TEXT = 6000

MEASURES, ERROR, STUCK = "measures", "error", "stuck"
Said = dict[str, Any]
"""Report of a rank on a check: its measures, an error, or where it was stuck."""


class LostError(MicsError, RuntimeError):
    """Rank 0 or the store cannot be reached any more."""


class Worker:
    """The thread on which checks run."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="check")

    def start(self, work: Callable[[], T]) -> Future[T]:
        return self._threads.submit(work)

    def stack(self) -> str:
        """Return the stack of the thread."""
        thread = next(iter(self._threads._threads), None)
        frame = sys._current_frames().get(thread.ident or 0) if thread is not None else None
        return "".join(traceback.format_stack(frame)) if frame is not None else "(not started)"


class RollCall:
    """The ranks of a job, who tell each other how things went.

    Args:
        store: that all of them reach. Used by the thread that calls, and by no other.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store = store
        self.rank = rank
        self.size = size

    def watch(self, topic: str, work: Future[list[Measure]], worker: Worker, limit_s: float) -> Said:
        """Wait for the end of ``work``, for an alarm of another rank, or until the time is over."""
        deadline = time.monotonic() + limit_s
        after = f"still running after {limit_s:.0f} s"
        while not wait([work], POLL_S).done:
            if time.monotonic() > deadline:
                return {STUCK: f"{after}; it was here:\n{worker.stack()[-LONGEST_TEXT:]}"}
            if after.startswith("still running after") and self.is_alarmed(topic):
                deadline = min(deadline, time.monotonic() + GRACE_S)
                after = "still waiting when another rank had failed"
        error = work.exception()
        if error is None:
            return {MEASURES: [list(item) for item in work.result()]}
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        return {ERROR: f"{type(error).__name__}: {error}", "traceback": text[-LONGEST_TEXT:]}

    def alarm(self, topic: str) -> None:
        """Tell the others that this rank will not end well."""
        with _Reaching():
            self._store.add(f"{topic}/alarm", 1)

    def is_alarmed(self, topic: str) -> bool:
        with _Reaching():
            return self._store.add(f"{topic}/alarm", 0) > 0

    def join(self, topic: str, said: Said, decide: Callable[[list[Said | None]], Said], limit_s: float) -> Said:
        """Post what this rank says, and return what rank 0 decides when all have.

        Args:
            decide: gets what each rank said, in rank order; ``None`` for one that said nothing in time.

        Raises:
            LostError: rank 0 decided nothing in time.
        """
        deadline = time.monotonic() + limit_s + GRACE_S  # others may have begun later
        with _Reaching():
            self._store.set(f"{topic}/{self.rank}", json.dumps(said))
            self._store.add(f"{topic}/count", 1)
            if self.rank == 0:
                self._wait_for_all(topic, deadline)
                answer = decide([self._said(topic, rank) for rank in range(self.size)])
                self._store.set(f"{topic}/answer", json.dumps(answer))
                return answer
            # Rank 0 may start to wait for the others later than this one, and be as patient.
            while not self._store.check([f"{topic}/answer"]):
                if time.monotonic() > deadline + 2 * GRACE_S:
                    raise LostError("rank 0 did not say how the check ended. Look at its output.")
                time.sleep(POLL_S / 10)
            return json.loads(self._store.get(f"{topic}/answer"))

    def _wait_for_all(self, topic: str, deadline: float) -> None:
        alarmed = False
        while self._store.add(f"{topic}/count", 0) < self.size and time.monotonic() < deadline:
            if not alarmed and self.is_alarmed(topic):
                alarmed = True
                deadline = min(deadline, time.monotonic() + 2 * GRACE_S)
            time.sleep(POLL_S / 10)

    def _said(self, topic: str, rank: int) -> Said | None:
        key = f"{topic}/{rank}"
        return json.loads(self._store.get(key)) if self._store.check([key]) else None


class _Reaching:
    """Raises :class:`LostError` where the store cannot be reached."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, MicsError):
            raise LostError(
                f"The store of this job, which lives in rank 0 or in the launcher, cannot be reached any more: "
                f"{str(error).splitlines()[0]}. A rank has died; look at the output of all of them."
            ) from error


def own_connection() -> dist.Store:
    """Another connection to the store of the process group, for another thread than the one that uses that one."""
    store = c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        return dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)
    return store
