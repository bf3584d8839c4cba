"""The process that writes a rank's part of checkpoints while that rank trains.

It has the memory that the rank copies to, a pipe to the rank, and a socket that others connect to. The owner of a shard
fetches what the other replicas have copied, and writes the files. One save is one tree of links: sharers report to the
owner of their shard, owners to the publisher of their folder, publishers to the first one. That one alone decides, and
the result goes back down. When the rank dies, so does this process, whatever it is doing: what was not published never
will be.
"""

from __future__ import annotations

import functools
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import MicsCheckpointError, describe_error
from ..log import logger
from . import folder, manifest
from .copies import Description, Shard, SharedMemory, describe, described_by, forget, read, understood
from .links import STARTING_S, Link, Listener, LostError, Neighbour, connect_for_save, fetch
from .manifest import FileRecord, Manifest
from .staging import Staged, replay

NOTHING_PUBLISHED = "Nothing was published, and older checkpoints are as they were."
_PARENT_S = 0.5
_SHOWN = 6


class Station(NamedTuple):
    """Position of a writer among the writers of the job. Sent once."""

    rank: int
    token: str
    """Secret by which the ranks of the job recognise each other."""
    trainer: int
    """The process of the rank."""


class Publication(NamedTuple):
    """Instructions for a rank that publishes."""

    manifest: Manifest
    """Without the files."""
    folder: str
    tag: str
    latest: bool
    """Whether ``latest`` is to name it."""
    scripts: tuple[str, ...]
    """Files to write beside the checkpoint."""
    export: str | None
    """The type of weights that are to be exported too."""
    model: str = ""
    """The content of a Hugging Face model's ``config.json``, if it is one."""


class Job(NamedTuple):
    """One save, as far as one process is concerned."""

    number: int
    target: str
    """The folder of the checkpoint."""
    staging: str
    """The folder that it is written to."""
    staged: Staged
    """Copies that the rank has made."""
    own: tuple[tuple[str, bytes], ...]
    """Small files of this rank's own, by name."""
    error: str
    """Errors of this rank after all ranks had agreed."""
    sharers: tuple[Neighbour, ...]
    """Ranks that share the copying of a shard."""
    parent: Neighbour | None
    children: tuple[int, ...]
    publishers: tuple[int, ...]
    publication: Publication | None
    """Set on publishers only."""
    limit_s: float


class Seal(NamedTuple):
    """A copy in memory that is to be summed up and described, and those of others that are to be kept too."""

    number: int
    path: str
    description: Description | None
    """``None`` if this rank could not make one."""
    guests: tuple[tuple[Neighbour, str, str], ...]
    """Writer, name and destination of each copy."""
    step: int


class Serve(NamedTuple):
    """Give the copies in this folder to other ranks."""

    folder: str


class Sealed(NamedTuple):
    number: int
    error: str


class Done(NamedTuple):
    """The result of a job."""

    number: int
    error: str
    """Empty if the checkpoint is there."""
    seconds: float
    nbytes: int
    """Written by this process."""


class _Save:
    """One save, in one process."""

    def __init__(self, job: Job, writer: _Writer) -> None:
        self._job, self._writer, self._rank = job, writer, writer.station.rank
        self._deadline = time.monotonic() + job.limit_s
        self._children: dict[int, Link] = {}
        self._errors: list[str] = [f"rank {self._rank}: {job.error}"] if job.error else []
        self._files: dict[str, FileRecord] = {}
        """In the folder of this process, by it and by its children."""
        self.written = 0

    def run(self) -> str:
        """Take part to the end. Returns the result: empty, or why there is no checkpoint."""
        job, parent = self._job, list[Link]()
        if job.parent is not None:
            self._attempt(functools.partial(self._connect, job.parent, parent))
        for rank in job.children:
            self._attempt(functools.partial(self._await_child, rank))
        if not self._errors:
            self._attempt(self._write)
        for rank in list(self._children):
            self._attempt(functools.partial(self._take_report, rank))
        result = self._decide() if job.parent is None else self._follow(parent)
        for link in self._children.values():
            with suppress(LostError):
                link.send({"result": result})
        for link in self._children.values():
            link.await_close()  # what is sent to a process that ends meanwhile may be lost
            link.close()
        self._writer.listener.forget(job.number)
        return result

    def _attempt(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:  # whatever it is, the others wait for a report
            self._errors.append(
                describe_error(error) if isinstance(error, LostError) else f"rank {self._rank}: {describe_error(error)}"
            )

    def _connect(self, to: Neighbour, connected: list[Link]) -> None:
        token, number = self._writer.station.token, self._job.number
        connected.append(connect_for_save(to, token, number, self._rank, self._deadline))

    def _await_child(self, rank: int) -> None:
        self._children[rank] = self._writer.listener.await_save(self._job.number, rank, self._deadline)

    def _take_report(self, rank: int) -> None:
        try:
            report = self._children[rank].receive()
        except LostError:
            self._children.pop(rank).close()
            raise
        self._errors += report["errors"]
        self._files |= manifest.from_json([report["files"]])

    def _write(self) -> None:
        staging = Path(self._job.staging)
        for name, content in self._job.own:
            (staging / name).write_bytes(content)
            self._note(staging / name)
        if self._job.staged.files:
            for name, recorded in self._shard().files:
                replay(recorded, staging / name)
                self._note(staging / name)

    def _shard(self) -> Shard:
        """This rank's shard, put together from what all who share it have copied."""
        job, found = self._job, Shard()
        for replica, sharer in enumerate(job.sharers):
            if sharer.rank == self._rank:
                found.add(job.staged, replica, self._writer.memory)
            elif job.staged.shares:
                with closing(SharedMemory()) as memory:
                    fetch(sharer, self._writer.station.token, {"number": job.number}, memory)
                    expected = job.staged.pieces_bytes(replica)
                    if memory.nbytes < expected:
                        raise MicsCheckpointError(f"rank {sharer.rank} did not copy {expected} bytes of the same shard")
                    found.add(job.staged._replace(files=()), replica, memory)
        return found

    def _note(self, path: Path) -> None:
        self._files[path.name] = record = manifest.seal(path, self._rank)
        self.written += record.bytes

    def _follow(self, parents: list[Link]) -> str:
        """Report, do as the first publisher says, and return the result."""
        if not parents:
            return self._not_saved()
        with closing(parents[0]) as parent:
            try:
                # What this process publishes itself is no concern of the first publisher.
                elsewhere = {} if self._job.publication is not None else self._files
                parent.send({"errors": self._errors, "files": manifest.as_json(elsewhere)})
                while True:
                    message = parent.receive()
                    if "result" in message:
                        return message["result"]
                    parent.send({"error": self._publish(message["do"])})
            except LostError as lost:
                unknown = f"Whether checkpoint {self._job.target} was saved is not known"
                return f"{unknown}: {describe_error(lost)}. If it was, it is complete."

    # -------------------------------------------------------------------------------- publishing

    def _decide(self) -> str:
        """Publish with the other publishers, if nothing is wrong anywhere. On the first publisher."""
        target, publication = self._job.target, self._job.publication
        assert publication is not None, "the first publisher publishes"
        failed = "" if self._errors else self._all_publish("publish")
        if self._errors or failed:
            return self._not_saved(*filter(None, [failed]))
        failed = self._all_publish("latest") if publication.latest else ""
        if failed:
            latest = Path(publication.folder) / folder.LATEST
            return f"Checkpoint {target} is complete, but {latest} could not be updated. {failed}."
        if publication.export:
            _export(Path(target), publication)
        return ""

    def _not_saved(self, *more: str) -> str:
        errors = list(dict.fromkeys([*self._errors, *more]))
        said = "; ".join(errors[:_SHOWN]) + (f"; and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else "")
        return f"Checkpoint {self._job.target} could not be saved. {said}. {NOTHING_PUBLISHED}"

    def _all_publish(self, what: str) -> str:
        """Have all publishers do something, at the same time. Returns what went wrong."""
        others = [self._children[rank] for rank in self._job.publishers if rank in self._children]
        found = []
        for link in others:
            with suppress(LostError):  # of which the answer tells
                link.send({"do": what})
        found.append(self._publish(what))
        for link in others:
            try:
                found.append(link.receive()["error"])
            except LostError as lost:
                found.append(describe_error(lost))
        return "; ".join(filter(None, found))

    def _publish(self, what: str) -> str:
        job, publication = self._job, self._job.publication
        assert publication is not None, "only publishers are asked"
        try:
            if what == "publish":
                folder.add_scripts(publication.scripts, Path(publication.folder))
                described = replace(publication.manifest, files=self._files)
                folder.publish(Path(job.staging), Path(job.target), described)
            else:
                folder.write_latest(Path(publication.folder), publication.tag)
        except Exception as error:
            return f"rank {self._rank}: {describe_error(error)}"
        return ""


def _export(target: Path, publication: Publication) -> None:
    """Export the weights of a published checkpoint, in a process of its own, because that imports DeepSpeed.

    The checkpoint is complete without them, so a failure is a line in the log.
    """
    root = f"import sys; sys.path[0] = {sys.path[0]!r}"
    code = f"{root}; from mics_ds.export import export_saved; export_saved(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(target), str(publication.export), publication.model]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        logger.error("the weights of %s were not exported: %s", target, done.stderr.strip()[-500:])


class _Writer:
    def __init__(self, memory: SharedMemory, listening: socket.socket, station: Station) -> None:
        self.memory, self.station = memory, station
        self._folder = ""
        self._reached = 0
        """The last number of which this process has what others may fetch."""
        self._staged: tuple[int, Staged | None] = (0, None)
        self._changed = threading.Condition()
        self.listener = Listener(listening, station.token, self._give)

    def serve(self, message: Serve) -> None:
        with self._changed:
            self._folder = message.folder
            self._changed.notify_all()

    def _reach(self, number: int) -> None:
        with self._changed:
            self._reached = number
            self._changed.notify_all()

    def save(self, job: Job) -> Done:
        """Do a job to its end, whatever that is."""
        started, one = time.monotonic(), _Save(job, self)
        self.memory.map(job.staged.nbytes)
        self._staged = job.number, job.staged
        self._reach(job.number)
        error = one.run()
        if error and job.publication is not None:
            folder.discard(Path(job.staging))
        return Done(job.number, error, time.monotonic() - started, one.written)

    def seal(self, job: Seal) -> Sealed:
        """Sum up and describe this rank's copy, and keep those of others here too."""
        errors: list[str] = []
        self._attempt(functools.partial(self._seal_own, Path(job.path), job.description), errors)
        self._reach(job.number)
        for guest in job.guests:
            self._attempt(functools.partial(self._keep, *guest, job), errors)
        return Sealed(job.number, "; ".join(errors))

    @staticmethod
    def _attempt(work: Callable[[], object], errors: list[str]) -> None:
        try:
            work()
        except Exception as error:
            errors.append(describe_error(error))

    def _seal_own(self, path: Path, description: Description | None) -> None:
        if description is not None:
            with closing(SharedMemory(path=path)) as memory:
                memory.map(description.staged.nbytes)
                describe(path, description, memory.checksum(description.staged.nbytes))

    def _keep(self, guest: Neighbour, name: str, where: str, job: Seal) -> None:
        path = Path(where)
        forget(path)
        which = {"name": name, "step": job.step, "number": job.number}
        with closing(SharedMemory(path=path)) as memory:
            text = fetch(guest, self.station.token, which, memory)
        copy = understood(text, path)
        if copy is not None:
            describe(path, copy.description, copy.checksum)

    def _give(self, link: Link, which: Mapping[str, Any]) -> None:
        """Send what another process wants, once it is there, or nothing if it will not be."""
        number, name = which.get("number", 0), which.get("name")
        with self._changed:
            self._changed.wait_for(lambda: self._reached >= number and (self._folder or not name), STARTING_S)
        if name:
            self._give_copy(link, name, which["step"])
        else:
            staged_number, staged = self._staged
            nbytes = staged.nbytes if staged is not None and staged_number == number else 0
            link.send({}, [self.memory.buffer(0, nbytes)])

    def _give_copy(self, link: Link, name: str, step: int) -> None:
        slots = map(read, Path(self._folder).glob(f"{os.path.basename(name)}.[01]"))
        found = next((copy for copy in slots if copy is not None and copy.description.step == step), None)
        if found is None:
            link.send({})
            return
        with closing(SharedMemory(path=found.path)) as memory:
            memory.map(found.description.staged.nbytes)
            content = memory.buffer(0, found.description.staged.nbytes)
            link.send({"description": described_by(found.path).read_text()}, [content])
            content.release()


def serve(pipe_descriptor: int, memory_descriptor: int, socket_descriptor: int) -> None:
    """Do jobs until the rank has ended."""
    for number in (signal.SIGINT, signal.SIGTERM):  # launchers send them to all processes; the rank says when to end
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):
        os.nice(10)
    torch.set_num_threads(1)
    pipe, memory = Connection(pipe_descriptor), SharedMemory(memory_descriptor)
    station: Station = pipe.recv()
    # What the rank has forked may hold the pipe open, so that its end alone does not tell.
    threading.Thread(target=_end_with, args=(station.trainer,), name="mics parent", daemon=True).start()
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        while True:
            try:
                jobs.put(pipe.recv())
            except (EOFError, OSError):
                os._exit(0)

    threading.Thread(target=listen, name="mics pipe", daemon=True).start()
    writer = _Writer(memory, socket.socket(fileno=socket_descriptor), station)
    while True:
        job = jobs.get()
        if isinstance(job, Serve):
            writer.serve(job)
            continue
        done = writer.seal(job) if isinstance(job, Seal) else writer.save(job)
        with suppress(OSError):  # the other thread ends this process
            pipe.send(done)


def _end_with(trainer: int) -> None:
    while os.getppid() == trainer:
        time.sleep(_PARENT_S)
    os._exit(0)
