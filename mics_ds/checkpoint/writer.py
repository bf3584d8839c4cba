"""The process that writes a rank's part of checkpoints while that rank trains.

It has the memory that the rank stages to, a pipe to the rank, and the store that all such processes share. When the
rank dies, it ends at once, whatever it is doing: what was not published never will be.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..errors import MicsCheckpointError, words
from . import manifest, memory, names
from .arena import Arena
from .board import NOTHING_PUBLISHED, Heartbeat, Round, RoundFailedError, not_saved
from .joints import Joint, Staged
from .manifest import FileRecord, Manifest
from .memory import Description
from .neighbours import Mirror, chunks, pass_on
from .recording import Recorded, replay

_PROGRESS_S = 10.0
_BROKEN_S = 2.0
_FAREWELL_S = 0.5


class Station(NamedTuple):
    """Where a process that writes stands among the others. Sent once."""

    host: str
    port: int
    """Of the store."""
    rank: int
    ranks: int
    patience_s: float

    def connect(self, patience_s: float) -> dist.TCPStore:
        """A new client of the store, whose waits end after so long."""
        timeout = timedelta(seconds=patience_s)
        return dist.TCPStore(self.host, self.port, is_master=False, wait_for_workers=False, timeout=timeout)


class Publication(NamedTuple):
    """What a rank that publishes needs."""

    manifest: Manifest
    """Without the files."""
    folder: str
    tag: str
    latest: bool
    """Whether ``latest`` is to name it."""
    scripts: tuple[str, ...]
    """What is to lie beside it."""


class Job(NamedTuple):
    """One save, as far as one process is concerned."""

    number: int
    connection: int
    """Which of the connections between the processes; another one after a failure."""
    target: str
    """The folder of the checkpoint."""
    staged: Staged
    sharers: tuple[int, ...]
    """Ranks that stage a shard together."""
    owner: int
    """The one of them that writes it."""
    publisher: int
    """Whose folder this rank's files are in."""
    publishers: tuple[int, ...]
    """The first one leads."""
    peers: int
    """How many ranks have this publisher."""
    publication: Publication | None
    """On publishers."""


class Seal(NamedTuple):
    """A copy in memory that is to be summed up and described, and sent to where it is kept too."""

    path: str
    description: Description | None
    """``None`` if this rank could not make one; those of others are awaited all the same."""
    mirror: Mirror | None = None


class Sealed(NamedTuple):
    path: str
    error: str
    broken: bool = False
    """Whether a connection between the processes is."""
    leaves: bool = False
    """Whether this process is about to end, and another has to be started."""


class Done(NamedTuple):
    """The result of a job, the same on all ranks."""

    number: int
    error: str
    """Empty if the checkpoint is there."""
    seconds: float
    nbytes: int
    """Written by this process."""
    leaves: bool = False
    """As in :class:`Sealed`."""


class Progress(NamedTuple):
    number: int
    written: int
    nbytes: int


class _Writer:
    def __init__(self, pipe: Connection, arena: Arena, station: Station) -> None:
        self._pipe, self._arena, self._station = pipe, arena, station
        self._store = station.connect(max(station.patience_s, 10.0))
        self._heartbeat = Heartbeat(
            self._store, station.rank, station.ranks, station.patience_s, self._leave_if_waiting_for_peers
        )
        self._joining: Job | Seal | None = None
        self._held = threading.Lock()
        """While :attr:`_joining` changes, or is the reason to leave."""
        self._round: Round | None = None
        self._groups: dict[tuple[int, ...], Any] = {}

    def run(self, job: Job) -> Done:
        """Do a job to its end, whatever that is."""
        started = time.monotonic()
        self._round = round_ = Round(self._store, job.number, self._station.ranks)
        self._heartbeat.watch(round_)
        written: list[FileRecord] = []
        try:
            error = self._take_part(round_, job, written)
            round_.acknowledge()
            if self._station.rank == job.publishers[0]:
                Round(self._store, job.number - 1, self._station.ranks).forget(self._station.ranks)
        except RoundFailedError as failed:
            error = not_saved(job.target, failed)
        except RuntimeError as gone:  # torch's errors of the store
            error = (
                f"Whether checkpoint {job.target} was saved is not known: the store that the writing processes share "
                f"does not answer, as when rank 0 has ended ({words(gone)}). If it was, it is complete."
            )
        finally:
            self._heartbeat.watch(None)
            self._round = None
        if error and job.publication is not None:
            manifest.discard(manifest.staging_folder(Path(job.target)))
        return Done(job.number, error, time.monotonic() - started, sum(record.bytes for record in written))

    def leave(self, why: str) -> None:
        """The rank has ended, or was killed: nothing of its may appear from now on. The others need not wait."""
        threading.Timer(_FAREWELL_S, os._exit, (0,)).start()  # the store may be gone as well
        round_ = self._round
        if round_ is not None:
            with suppress(RuntimeError):
                round_.lose(f"rank {self._station.rank} {why}")
        os._exit(0)

    def _leave_if_waiting_for_peers(self, round_: Round, failure: RoundFailedError) -> None:
        """A transfer between processes cannot be called off. The rank starts another process for the next save."""
        with self._held:
            job = self._joining
            if job is None or round_ is not self._round:  # who has gone on to the next one is not concerned
                return
            if isinstance(job, Seal):
                self._pipe.send(Sealed(job.path, words(failure), leaves=True))
            else:
                self._pipe.send(Done(job.number, not_saved(job.target, failure), 0.0, 0, leaves=True))
            os._exit(0)

    @contextmanager
    def _waiting_for_peers(self, job: Job | Seal) -> Iterator[None]:
        with self._held:
            self._joining = job
        try:
            yield
        finally:
            with self._held:
                self._joining = None

    # --------------------------------------------------------------------------- copies in memory

    def seal(self, job: Seal) -> Sealed:
        """Sum up and describe a copy, and have it kept on another node too."""
        path, described = Path(job.path), job.description
        try:
            if described is not None:
                with memory.opened(path) as arena:
                    arena.map(described.nbytes)
                    described = memory.seal(path, described, arena)
        except Exception as error:
            described, failed = None, words(error)
        else:
            failed = ""
        if job.mirror is None:
            return Sealed(job.path, failed)
        self._round = round_ = Round(self._store, job.mirror.number, self._station.ranks, "copy")
        self._heartbeat.watch(round_)
        try:
            with self._waiting_for_peers(job):
                group = self._group(job.mirror.connection, job.mirror.sharers)
                pass_on(group, job.mirror, path, described, job.mirror.sharers.index(self._station.rank))
        except Exception as error:
            broken = isinstance(error, RuntimeError) and not isinstance(error, MicsCheckpointError)
            return Sealed(job.path, failed or words(error), broken)
        finally:
            self._heartbeat.watch(None)
            self._round = None
        return Sealed(job.path, failed)

    def _take_part(self, round_: Round, job: Job, written: list[FileRecord]) -> str:
        files: dict[str, FileRecord] = {}
        try:
            with self._waiting_for_peers(job):
                try:
                    self._join_pieces(job)
                except RuntimeError:
                    self._await_the_cause(round_)
                    raise
            for name, record in self._write(job):
                files[name] = record
                written.append(record)
        except Exception as error:  # whatever it is, the others wait
            round_.fail(f"rank {self._station.rank}: {words(error)}")
        else:
            round_.report(job.publisher, manifest.noted(files) or None)
        if job.publication is not None:
            self._publish(round_, job, job.publication)
        return round_.await_key("result")

    def _await_the_cause(self, round_: Round) -> None:
        """A connection broke. Give the rank whose process has died the time to say so first."""
        deadline = time.monotonic() + _BROKEN_S
        while round_.failure() is None and time.monotonic() < deadline:
            time.sleep(0.05)

    # ------------------------------------------------------------------------------------ files

    def _join_pieces(self, job: Job) -> None:
        """Bring what several ranks have staged to the one that writes it."""
        sharers, joints = job.sharers, job.staged.joints
        if not joints or len(sharers) == 1:
            return
        group = self._group(job.connection, sharers)
        place, owner = sharers.index(self._station.rank), sharers.index(job.owner)
        plan = torch.tensor([len(joints), sum(joint.nbytes for joint in joints)])
        if place != owner:
            group.send([plan], owner, job.number).wait()
            for joint in joints:
                for chunk in chunks(self._arena.view(joint.piece, joint.sizes[place])):
                    group.send([chunk], owner, job.number).wait()
            return
        others = [other for other in range(len(sharers)) if other != owner]
        for other in others:
            theirs = torch.empty_like(plan)
            group.recv([theirs], other, job.number).wait()
            if not torch.equal(plan, theirs):
                raise RuntimeError(
                    f"rank {sharers[other]} staged {theirs[1]} bytes in {theirs[0]} parts of what should be the same "
                    f"{plan[1]} bytes in {plan[0]} parts"
                )
        for joint in joints:
            self._receive(group, joint, owner, others, job.number)

    def _receive(self, group: Any, joint: Joint, owner: int, others: Sequence[int], tag: int) -> None:
        whole = self._arena.view(joint.whole, joint.nbytes)
        if joint.shards:
            pieces = [torch.empty(size, dtype=torch.uint8) for size in joint.sizes]
            pieces[owner] = self._arena.view(joint.piece, joint.sizes[owner])
        else:
            pieces = list(whole.split(list(joint.sizes)))  # they arrive where they belong
        waits = [group.recv([chunk], other, tag) for other in others for chunk in chunks(pieces[other])]
        for wait in waits:
            wait.wait()
        joint.join(pieces, whole)

    def _group(self, connection: int, sharers: tuple[int, ...]) -> Any:
        return self._groups.get((connection, *sharers)) or self._connect(connection, sharers)

    def _connect(self, connection: int, sharers: tuple[int, ...]) -> Any:
        self._groups = {key: group for key, group in self._groups.items() if key[0] == connection}
        patience_s = max(self._station.patience_s, 10.0) * 10
        # A client of its own: while peers are awaited it is locked, and the heartbeat must go on.
        store = dist.PrefixStore(f"group/{connection}/{'-'.join(map(str, sharers))}", self._station.connect(patience_s))
        place = sharers.index(self._station.rank)
        group = dist.ProcessGroupGloo(store, place, len(sharers), timedelta(seconds=patience_s))
        key = (connection, *sharers)
        self._groups[key] = group
        return group

    def _write(self, job: Job) -> Iterator[tuple[str, FileRecord]]:
        staging = manifest.staging_folder(Path(job.target))
        total = sum(nbytes for file in job.staged.files for _, nbytes in file.places)
        done, told = 0, time.monotonic()
        for file in job.staged.files:
            storages = [self._arena.storage(start, nbytes) for start, nbytes in file.places]
            path = staging / file.name
            replay(Recorded(file.pickled, storages), path)
            yield file.name, manifest.seal(path, self._station.rank)
            done += sum(nbytes for _, nbytes in file.places)
            if time.monotonic() - told > _PROGRESS_S:
                told = time.monotonic()
                self._pipe.send(Progress(job.number, done, total))

    # -------------------------------------------------------------------------------- publishing

    def _publish(self, round_: Round, job: Job, publication: Publication) -> None:
        """Turn the folder into a checkpoint, together with the other publishers, and tell everybody."""
        leads, publishers = self._station.rank == job.publishers[0], len(job.publishers)
        target, folder = Path(job.target), Path(publication.folder)
        files = manifest.recorded(round_.notes(job.publisher, job.peers))
        round_.publishers_reach("ready", publishers, leads)
        round_.begin_publishing(leads)
        described = replace(publication.manifest, files=files)

        def publish() -> None:
            manifest.add_scripts(publication.scripts, folder)
            manifest.publish(manifest.staging_folder(target), target, described)

        self._attempt(round_, publish)
        round_.publishers_reach("published", publishers, leads)
        if leads:
            round_.set("published by all", "; ".join(round_.errors()))
        failed = round_.await_key("published by all")
        if failed and leads:
            round_.set("result", f"Checkpoint {job.target} could not be saved. {failed}. {NOTHING_PUBLISHED}")
        if failed:
            return
        if publication.latest:
            self._attempt(round_, lambda: names.write_latest(folder, publication.tag))
        round_.publishers_reach("named", publishers, leads)
        if leads:
            said = "; ".join(round_.errors())
            latest = folder / manifest.LATEST
            round_.set(
                "result", said and f"Checkpoint {target} is complete, but {latest} could not be updated. {said}."
            )

    def _attempt(self, round_: Round, work: Any) -> None:
        try:
            work()
        except Exception as error:
            round_.add_error(f"rank {self._station.rank}: {words(error)}")


def serve(pipe_descriptor: int, arena_descriptor: int) -> None:
    """Do jobs until the pipe closes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # launchers send them to all processes; the rank says when to end
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):
        os.nice(10)
    torch.set_num_threads(1)
    pipe, arena = Connection(pipe_descriptor), Arena(arena_descriptor)
    jobs: list[Job | Seal] = []
    changed = threading.Condition()
    station: Station = pipe.recv()
    writers: list[_Writer] = []

    def listen() -> None:
        while True:
            try:
                job = pipe.recv()
            except (EOFError, OSError):
                if writers:
                    writers[0].leave("has ended")
                os._exit(0)
            with changed:
                jobs.append(job)
                changed.notify()

    # At once: when the rank is dead, the store may be too, and connecting to it would take long to fail.
    threading.Thread(target=listen, name="mics listener", daemon=True).start()
    writer = _Writer(pipe, arena, station)
    writers.append(writer)
    while True:
        with changed:
            changed.wait_for(lambda: jobs)
            job = jobs.pop(0)
        done: Done | Sealed
        if isinstance(job, Seal):
            done = writer.seal(job)
        else:
            arena.map(job.staged.nbytes)
            done = writer.run(job)
        with suppress(OSError):  # the listener ends this process
            pipe.send(done)
