"""A rank's own process that writes checkpoints: started with the first save in the background, and watched from here.

At most one save is under way. Its result, the same on all ranks, is kept until somebody asks: the next save, or the
end of the process.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import util
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist

from ..errors import MicsCheckpointError
from ..log import log_rank0, logger
from . import deletions
from .arena import Arena
from .board import Round, RoundLostError, not_saved
from .writer import Done, Job, Progress, Seal, Sealed, Station

PATIENCE_ENV = "MICS_DS_WRITER_PATIENCE"
_PATIENCE_S = 30.0
_ROOT = str(Path(__file__).resolve().parents[2])
_START = (
    f"import sys; sys.path[0] = {_ROOT!r}; from mics_ds.checkpoint.writer import serve; "
    "serve(int(sys.argv[1]), int(sys.argv[2]))"
)


class Background:
    """This rank's writing process. One for all engines of the job. Made on all ranks at the same time."""

    current: ClassVar[Background | None] = None

    def __init__(self) -> None:
        self.arena = Arena()
        self._world = dist.group.WORLD
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._server, self._station = _open_store(self._rank, self._ranks)
        self._changed = threading.Condition()
        self._number = self._copies = 0
        self.connection = 0
        """Counts how often the processes have to connect to each other anew; the same on all ranks."""
        self._job: Job | None = None
        self._error = ""
        self._sealing: dict[str, Seal] = {}
        self.own_states_agreed = True
        """Whether all ranks had the same state of their own at the last save. The same on all ranks."""
        self._died = self._broken = self._leaves = False
        self._process, self._pipe = self._start()

    @classmethod
    def is_there(cls) -> bool:
        """Whether there is one of this process group. The same on all ranks."""
        return cls.current is not None and cls.current._world is dist.group.WORLD

    @classmethod
    def of_job(cls) -> Background:
        """The one of this process group, made if need be. Collective over the world.

        Raises:
            MicsCheckpointError: the ranks cannot reach each other as their processes will have to.
        """
        if cls.current is not None and not cls.is_there():
            cls.current.close()
        if cls.current is None:
            cls.current = cls()
            _at_the_end()
        return cls.current

    # ------------------------------------------------------------------------------------- saves

    @property
    def is_busy(self) -> bool:
        return self._job is not None

    @property
    def is_cut_off(self) -> bool:
        """Whether other processes can no longer reach this rank's: it has ended or is about to, or a connection has."""
        return self._died or self._leaves or self._broken

    @property
    def error(self) -> str:
        """Why the last save came to nothing; empty if it did not."""
        return self._error

    def connect_anew(self) -> None:
        """One of the processes has died or given up, so connections between them are of no use any more. On all ranks
        at the same time."""
        self.connection += 1
        self._broken = False

    def revive(self) -> None:
        """Start the process again if it has died.

        Raises:
            OSError: that is not possible.
        """
        if self._leaves or self._process.poll() is not None:
            self._wait_for(lambda: self._died)  # whoever listens to it is about to notice
        if self._died:
            self._pipe.close()
            self._process.wait()
            self._process, self._pipe = self._start()
            self._died, self._leaves, self._broken = False, False, True

    def next_number(self) -> int:
        """Of a save."""
        self._number += 1
        return self._number

    def next_copy(self) -> int:
        """The number of a copy in memory."""
        self._copies += 1
        return self._copies

    def submit(self, job: Job) -> None:
        """Have a staged checkpoint written. The arena belongs to the writer until that is done."""
        with self._changed:
            self._job = job
        try:
            self._pipe.send(job)
        except OSError:  # and the listener may have looked before there was a job
            self._gone()
        nbytes = sum(nbytes for file in job.staged.files for _, nbytes in file.places)
        log_rank0(f"{job.target} is written in the background; rank 0 writes {nbytes / 1e6:.1f} MB of it")

    def seal(self, job: Seal) -> None:
        """Have a copy in memory summed up and described."""
        with self._changed:
            self._sealing[job.path] = job
        try:
            self._pipe.send(job)
        except OSError:  # and the listener may have looked before
            self._gone()

    @property
    def is_sealing(self) -> bool:
        return bool(self._sealing)

    def wait_for_seals(self) -> None:
        self._wait_for(lambda: not self._sealing)

    def wait(self) -> None:
        """Until no save is under way."""
        if self._job is not None:
            started = time.monotonic()
            self._wait_for(lambda: self._job is None)
            log_rank0(f"waited {time.monotonic() - started:.1f} s for a checkpoint that was being written")

    def take_error(self) -> str:
        """Why the last save came to nothing, once; empty if it did not."""
        with self._changed:
            error, self._error = self._error, ""
        return error

    def _wait_for(self, done: Any) -> None:
        with self._changed:
            while not done():  # with a time, so that signals get through
                self._changed.wait(0.5)

    # ----------------------------------------------------------------------------- the process

    def _start(self) -> tuple[subprocess.Popen, Connection]:
        ours, theirs = socket.socketpair()
        descriptors = (theirs.fileno(), self.arena.descriptor)
        environment = {**os.environ, "MICS_DS_AUTOLOAD": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-c", _START, *map(str, descriptors)],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        theirs.close()
        pipe = Connection(ours.detach())
        pipe.send(self._station)
        threading.Thread(target=self._listen, args=(pipe,), name="mics writer", daemon=True).start()
        return process, pipe

    def _listen(self, pipe: Connection) -> None:
        while True:
            try:
                said: Done | Progress | Sealed = pipe.recv()
            except (EOFError, OSError):
                self._gone()
                return
            if isinstance(said, Progress):
                log_rank0(f"{said.written / 1e6:.0f} of {said.nbytes / 1e6:.0f} MB of a checkpoint written")
                continue
            self._leaves |= said.leaves  # before anybody waiting for this gives it something else to do
            if isinstance(said, Sealed):
                with self._changed:
                    self._sealing.pop(said.path, None)
                    self._broken |= said.broken
                    self._changed.notify_all()
                if said.error:
                    logger.warning("a copy of the states in memory is lost: %s", said.error)
            else:
                self._finish(said.error, f" in {said.seconds:.1f} s in the background")

    def _finish(self, error: str, how: str) -> None:
        with self._changed:
            job, self._job = self._job, None
            self._error = self._error or error
            self._changed.notify_all()
        if job is None:
            return
        if error:
            logger.error("%s", error)
        else:
            log_rank0(f"{job.target} is complete, written{how}")

    def _gone(self) -> None:
        """The process has ended, and not because it was told to."""
        code = self._process.wait()
        with self._changed:
            self._died, job, sealing = True, self._job, [*self._sealing.values()]
            self._sealing.clear()
            self._changed.notify_all()
        died = f"rank {self._rank}: the process that writes its checkpoints ended with code {code}"
        if any(seal.mirror is not None for seal in sealing):
            self._lose_copies(sealing, died)
        if job is None:
            return
        try:
            round_ = self._round(job.number)
            round_.lose(died)
            error = not_saved(job.target, round_.failure() or RoundLostError(died))
        except RuntimeError as gone:
            error = f"Whether checkpoint {job.target} was saved is not known. {died}, and so has the store ({gone})"
        self._finish(error, "")

    def _lose_copies(self, sealing: Sequence[Seal], died: str) -> None:
        """Whoever exchanges copies with this rank's process need not wait."""
        try:
            for seal in sealing:
                if seal.mirror is not None:
                    self._round(seal.mirror.number, "copy").lose(died)
        except RuntimeError as gone:  # the store, with rank 0: then all are about to end
            logger.warning("%s; the store does not answer: %s", died, gone)

    def _round(self, number: int, kind: str = "save") -> Round:
        return Round(self._server or self._station.connect(10), number, self._ranks, kind)

    def drain(self) -> str:
        """Wait until what is under way is done. Returns what went wrong since somebody last asked."""
        self.wait()
        self.wait_for_seals()
        if self._server is not None and self._number and not self._died:
            # The store ends with this process, and others may still have to learn from it how the save ended.
            round_, deadline = self._round(self._number), time.monotonic() + 10
            while not self._error and not round_.is_known_to(self._ranks) and time.monotonic() < deadline:
                time.sleep(0.02)
        return self.take_error()

    def close(self) -> None:
        """End the process and give the memory back. What is under way is lost."""
        with self._changed:
            self._job = None
        self._pipe.close()
        self._process.kill()
        self._process.wait()
        self.arena.close()
        if Background.current is self:
            Background.current = None


def _open_store(rank: int, ranks: int) -> tuple[dist.TCPStore | None, Station]:
    """The store that the writing processes share, in rank 0's process, and how to reach it."""
    server: dist.TCPStore | None = None
    said: list[Any] = [None]
    if rank == 0:
        host = _own_address()
        try:
            server = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
            said = [(host, server.port)]
        except RuntimeError as error:
            said = [str(error)]
    if ranks > 1:
        dist.broadcast_object_list(said, src=0)
    if isinstance(said[0], str):
        raise MicsCheckpointError(
            f"Rank 0 could not open a store for the processes that write checkpoints: {said[0]}. Save without "
            f'"mics_checkpoint": {{"async": true}}, or make its host name resolve.'
        )
    patience = float(os.environ.get(PATIENCE_ENV, _PATIENCE_S))
    host, port = said[0]
    return server, Station(host, port, rank, ranks, patience)


def _own_address() -> str:
    """Of this host, as other nodes know it: the job's master address if that is here, else the host's name."""
    for name in (os.environ.get("MASTER_ADDR"), socket.gethostname()):
        if not name:
            continue
        try:
            found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
            with socket.socket(found[0][0], socket.SOCK_STREAM) as trial:
                trial.bind((found[0][4][0], 0))
            return name
        except OSError:
            continue
    return "localhost"


# --------------------------------------------------------------------------------------------------
# The end of the process


at_end: list[Callable[[], None]] = []
"""Called when the process ends without an error."""


class _End:
    prepared = False


def _at_the_end() -> None:
    """Have the process drain when it ends, and others wait who delete checkpoints meanwhile."""
    if _End.prepared:
        return
    _End.prepared = True
    atexit.register(_drain_and_exit)
    util.Finalize(None, _drain_and_exit, exitpriority=100)  # children of multiprocessing know nothing of atexit
    deletions.watch(_before_deletion)
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


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


def _terminate(number: int, _frame: Any) -> None:
    current = Background.current
    if current is not None:
        if current.is_busy:
            logger.info("asked to end; waiting for the checkpoint that is being written")
        current.drain()
        current.close()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _before_deletion(path: str, deletes: bool) -> None:
    """Somebody makes room for a checkpoint that is not there yet, or looks for it.

    Raises:
        KeptError: it will not be, and room is made.
    """
    current = Background.current
    if current is None:
        return
    if current.is_busy:
        logger.info("%s is about to be deleted or looked for; waiting for the checkpoint that is being written", path)
        current.wait()
    if current.error and deletes:
        raise deletions.KeptError(f"{current.error} {path} was not deleted.")
