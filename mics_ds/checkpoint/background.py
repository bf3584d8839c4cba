"""A rank's own process that writes checkpoints: started with the first asynchronous save, and watched from here.

At most one save is under way. Its result is kept until it is asked for: by the next save, or the end of the process.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import util
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import ClassVar

import torch.distributed as dist

from ..deepspeed_compat.engine import device_streams
from ..errors import MicsCheckpointError, describe_error
from ..log import log_rank0, logger
from ..shared_memory import Copying, SharedMemory
from .coordination import Run, raised_on_all_ranks, shared_store
from .links import LostError, Neighbour, connect_for_save, listen, writer_of
from .writer import Done, Job, Seal

_ROOT = str(Path(__file__).resolve().parents[2])
_START = (
    f"import sys; sys.path[0] = {_ROOT!r}; from mics_ds.checkpoint.writer import serve; serve(*map(int, sys.argv[1:]))"
)
_END_S = 10.0
_GRACE_S = 60.0
_POLL_S = 0.2


class Background:
    """This rank's writing process. One for all engines of the job. Made on all ranks at the same time."""

    current: ClassVar[Background | None] = None

    def __init__(self) -> None:
        self.memory = SharedMemory()
        self._world, self._rank = dist.group.WORLD, dist.get_rank()
        self._listening, *address = listen()
        self._neighbours: dict[int, Neighbour] = {}
        self._changed = threading.Condition()
        self._job: Job | None = None
        self._since = 0.0
        self._when_done: Callable[[], None] = lambda: None
        self.error = ""
        """Why the last save came to nothing; empty if it did not."""
        self.sealing: set[int] = set()
        """Copies in memory that are still being summed up."""
        self._handed: queue.SimpleQueue[tuple[Job | Seal, Copying]] = queue.SimpleQueue()
        """Jobs for the process, each to be sent once its copy has arrived."""
        self._ends = threading.Event()
        self._start()
        threading.Thread(target=self._hand_over, name="mics hand-over", daemon=True).start()
        shared_store().set(f"writer/{Run.name}/{self._rank}", json.dumps(address))

    @classmethod
    def is_there(cls) -> bool:
        """Return whether there is one of this process group. The same on all ranks."""
        return cls.current is not None and cls.current._world is dist.group.WORLD

    @classmethod
    def of_job(cls) -> Background:
        """Return the one of this process group, made if need be. Collective over the world.

        Raises:
            MicsCheckpointError: on every rank: one of them could not start its process.
        """
        if not cls.is_there():
            cls._close_current()
            Run.begin()
            try:
                with raised_on_all_ranks(
                    "starting the processes that write checkpoints",
                    "The processes that write checkpoints could not be started.",
                    'Save without "mics_checkpoint": {"async": true} and "memory_every", or give ranks what they lack.',
                ):
                    cls.current = cls()
                    _prepare_for_the_end()
            except BaseException:
                cls._close_current()
                raise
        assert cls.current is not None, "there were no errors"
        return cls.current

    @classmethod
    def _close_current(cls) -> None:
        if cls.current is not None:
            cls.current.close()

    # ------------------------------------------------------------------------------------- saves

    @property
    def is_busy(self) -> bool:
        return self._job is not None

    def neighbour(self, rank: int) -> Neighbour:
        """The writer of another rank."""
        if rank not in self._neighbours:
            self._neighbours[rank] = Neighbour(rank, *json.loads(shared_store().get(f"writer/{Run.name}/{rank}")))
        return self._neighbours[rank]

    def revive(self) -> None:
        """Start the process again if it has died."""
        if self._process.poll() is not None:
            self._end()
            self._start()

    def submit(self, job: Job, copying: Copying, when_done: Callable[[], None]) -> None:
        """Have a staged checkpoint written. The memory belongs to the writer until that is done."""
        with self._changed:
            self._job, self._since, self._when_done = job, time.monotonic(), when_done
        self._handed.put((job, copying))
        log_rank0(f"{job.target} is written asynchronously")

    def seal(self, job: Seal, copying: Copying) -> None:
        """Have a copy in memory summed up and described."""
        with self._changed:
            self.sealing.add(job.number)
        self._handed.put((job, copying))

    def serve(self, folder: Path) -> None:
        """Have the copies in a folder given to other ranks."""
        self._handed.put((Seal(0, str(folder)), Copying()))

    def _hand_over(self) -> None:
        while True:
            job, copying = self._handed.get()
            try:
                copying.wait()
                self._pipe.send(job)
            except OSError:  # and the thread that listens may have looked before there was a job
                self._gone()
            except Exception as error:  # of the device
                failed = f"rank {self._rank}: states could not be copied, {describe_error(error)}"
                self._finish(Done(job.number, failed))

    @staticmethod
    def before_states_change() -> None:
        """Have the device finish copies before it changes what is copied. The host does not wait."""
        streams = device_streams()
        if streams is not None and SharedMemory.stream is not None:
            streams.current_stream().wait_stream(SharedMemory.stream)

    def wait_for_seals(self) -> None:
        """Wait until no copy in memory is being summed up."""
        with self._changed:
            self._changed.wait_for(lambda: not self.sealing)

    def wait(self) -> None:
        """Wait until no save is under way."""
        job = self._job
        if job is not None:
            started = time.monotonic()
            with self._changed:
                left = self._since + job.limit_s + _GRACE_S - started
                is_done = self._changed.wait_for(lambda: self._job is None, left)
            if not is_done:
                self._process.kill()
                ended = f"{writer_of(self._rank)} did not come to an end within {job.limit_s:.0f} s"
                self._lose(job, ended)
            log_rank0(f"waited {time.monotonic() - started:.1f} s for a checkpoint that was being written")

    def take_error(self) -> str:
        """Why the last save came to nothing, once; empty if it did not."""
        with self._changed:
            error, self.error = self.error, ""
        return error

    # ----------------------------------------------------------------------------- the process

    def _start(self) -> None:
        """Start the process, and the thread that listens to it."""
        ours, theirs = socket.socketpair()
        descriptors = (theirs.fileno(), self.memory.descriptor, self._listening.fileno())
        environment = {**os.environ, "MICS_DS_AUTOLOAD": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        arguments = map(str, (*descriptors, self._rank, os.getpid()))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *arguments], pass_fds=descriptors, stdin=subprocess.DEVNULL, env=environment
        )
        theirs.close()
        self._pipe = Connection(ours.detach())
        self._pipe.send(Run.token)
        self._ends.clear()
        self._listener = threading.Thread(target=self._listen, name="mics writer", daemon=True)
        self._listener.start()

    def _end(self) -> None:
        """End the process, if it has not died, and the thread that listens to it."""
        self._ends.set()
        self._process.kill()
        self._listener.join(_END_S)
        self._pipe.close()

    def _listen(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                self._finish(self._pipe.recv())
        self._gone()
        while not self._ends.is_set():  # close what connects to the dead process, until there is another one
            if select.select([self._listening], [], [], _POLL_S)[0]:
                self._listening.accept()[0].close()

    def _finish(self, done: Done) -> None:
        """Take a result."""
        with self._changed:
            was_sealed = done.number in self.sealing
            self.sealing.discard(done.number)
            self._changed.notify_all()
        if was_sealed and done.error:
            logger.warning("a copy of the states in memory is lost: %s", done.error)
        job = self._job
        if job is None or job.number != done.number:
            return
        self._when_done()  # before the next save may begin
        with self._changed:
            if self._job is not job:
                return
            self._job, self.error = None, self.error or done.error
            self._changed.notify_all()
        if done.error:
            logger.error("%s", done.error)
        else:
            speed = f", {done.nbytes / 1e6 / done.seconds:.0f} MB/s on rank 0" if done.seconds > 1 else ""
            log_rank0(f"{job.target} is complete, written asynchronously in {done.seconds:.1f} s{speed}")

    def _lose(self, job: Job, why: str) -> None:
        self._finish(Done(job.number, f"Whether checkpoint {job.target} was saved is not known: {why}"))

    def _gone(self) -> None:
        """The process has ended: so have the jobs that it had."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        with self._changed:
            job = self._job
            self.sealing.clear()
            self._changed.notify_all()
        if job is not None:
            ended = f"{writer_of(self._rank)} has ended with code {self._process.returncode}"
            if job.parent is not None:  # which it may not have reached yet
                with suppress(LostError):
                    link = connect_for_save(job.parent, Run.token, job.number, self._rank, time.monotonic() + _GRACE_S)
                    link.send({"errors": [ended], "files": {}})
                    link.close()
            self._lose(job, ended)

    def drain(self) -> str:
        """Wait until what is under way is done. Returns what went wrong since it was last asked for."""
        self.wait()
        self.wait_for_seals()
        return self.take_error()

    def close(self) -> None:
        """End the process and give the memory back. What is under way is lost."""
        with self._changed:
            self._job = None
        self._end()
        self._listening.close()
        self.memory.close()
        if Background.current is self:
            Background.current = None


def wait_for_saves() -> None:
    """Wait until no asynchronous save is under way.

    Raises:
        MicsCheckpointError: on this rank, if the last one failed. The next save will say so too.
    """
    current = Background.current
    if current is not None:
        current.wait()
        if current.error:
            raise MicsCheckpointError(current.error)


# --------------------------------------------------------------------------------------------------
# The end of the process

at_end: list[Callable[[], None]] = []
"""Called when the process ends without an error."""


@functools.cache
def _prepare_for_the_end() -> None:
    """Have the process drain when it ends, by itself or by SIGTERM."""
    atexit.register(_drain_and_exit)
    util.Finalize(None, _drain_and_exit, exitpriority=100)  # children of multiprocessing know nothing of atexit
    os.register_at_fork(after_in_child=_forget_in_child)
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        _drain_on_sigterm()


def _drain_and_exit() -> None:
    current = Background.current
    if current is None:
        return
    error = current.drain()
    if not error and getattr(sys, "last_value", None) is None:
        for act in at_end:
            act()
    current.close()
    if error:
        # As with a save that training waited for, the job has failed. The other callbacks still get their turn.
        logger.error("the last checkpoint was not saved: %s", error)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _forget_in_child() -> None:
    """A process that was forked has no part in this: its end is its own."""
    Background.current = None
    if signal.getsignal(signal.SIGTERM) is _stand_still:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _drain_on_sigterm() -> None:
    """Have SIGTERM end the process when the save under way is done; at once if there is none, and also where the main
    thread is in a call that no handler of Python's interrupts: a thread hears of it by the wake-up descriptor."""
    heard, tells = os.pipe()
    os.set_blocking(tells, False)
    before = signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
    if before != -1:  # somebody else's, asyncio's say: leave signals to them
        signal.set_wakeup_fd(before)
        return
    signal.signal(signal.SIGTERM, _stand_still)
    threading.Thread(target=_await_sigterm, args=(heard,), name="mics SIGTERM", daemon=True).start()


def _stand_still(_number: int, frame: FrameType | None) -> None:
    """Stop the main thread, unless it may hold a lock that the thread which ends the process needs."""
    while frame is not None:
        if frame.f_globals.get("__name__") in (__name__, "logging"):
            return
        frame = frame.f_back
    while signal.getsignal(signal.SIGTERM) is _stand_still:
        time.sleep(1.0)


def _await_sigterm(heard: int) -> None:
    while True:
        [number] = os.read(heard, 1)
        if number != signal.SIGTERM or signal.getsignal(signal.SIGTERM) is not _stand_still:
            continue  # the script has a handler of its own by now
        current = Background.current
        if current is not None and current.is_busy:
            logger.info("asked to end; waiting for the checkpoint that is being written")
            current.drain()
        if current is not None:
            current.close()
        ctypes.CDLL(None).signal(int(signal.SIGTERM), 0)  # what only the main thread may do in Python
        os.kill(os.getpid(), signal.SIGTERM)
