"""The process that writes a rank's part of checkpoints while that rank trains.

It has the memory that the rank copies to, a pipe to the rank, and a socket that others connect to. One save is one tree
of links. Sharers report to the owner of their shard, which asks them for what they have copied and writes the files.
Owners report to the publisher of their folder, and publishers to the first one. That one alone decides, and the result
goes back down. When the rank dies, so does this process, whatever it is doing: what was not published never will be.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import MicsCheckpointError, describe_error, noting
from ..log import logger
from ..shared_memory import SharedMemory
from . import folder, manifest
from .copies import Description, Shard, describe, described_by, forget, read
from .links import STARTING_S, Link, Listener, LostError, Neighbour, connect_for_save, fetch
from .manifest import FileRecord, Manifest
from .staging import Staged, replay

NOTHING_PUBLISHED = "Nothing was published, and older checkpoints are as they were."
_PARENT_S = 0.1
_SHARE, _PUBLISH, _LATEST = "share", "publish", "latest"
"""Instructions to a child."""
_SHOWN = 6


class Job(NamedTuple):
    """One save, as far as one process is concerned."""

    number: int
    root: str
    """The folder of checkpoints."""
    target: str
    """The folder of this one."""
    staging: str
    """The folder that it is written to."""
    staged: Staged
    own: tuple[str, bytes] | None
    """The name and the content of a small file of this rank's own."""
    error: str
    """Errors of this rank after all ranks had agreed."""
    sharers: tuple[int, ...]
    """Ranks that share the copying of a shard, in the order of replicas. On its owner only."""
    parent: Neighbour | None
    children: tuple[int, ...]
    publishers: tuple[int, ...]
    limit_s: float
    manifest: Manifest | None
    """On publishers only, without the files."""
    latest: bool = True
    """Whether ``latest`` is to name it."""
    export: str | None = None
    """The type of weights that are to be exported too."""
    model: str = ""
    """The content of a Hugging Face model's ``config.json``, if it is one."""


class Seal(NamedTuple):
    """A copy in memory that is to be summed up and described, and those of others that are to be kept too.

    From then on, the process gives copies to others. Without a copy, it does no more than that.
    """

    number: int
    folder: str
    """The folder of all copies on this node."""
    path: str = ""
    description: Description | None = None
    """``None`` if this rank could not make one."""
    guests: tuple[tuple[Neighbour, str, str], ...] = ()
    """Writer, name and destination of each copy."""
    step: int = -1


class Done(NamedTuple):
    """The result of a job."""

    number: int
    error: str
    """Empty if the checkpoint, or the copy, is there."""
    seconds: float = 0.0
    nbytes: int = 0
    """Written by this process."""


class _Save:
    """One save, in one process."""

    def __init__(self, job: Job, writer: _Writer) -> None:
        self._job, self._writer, self._rank = job, writer, writer.rank
        self._deadline = time.monotonic() + job.limit_s
        self._children: dict[int, Link] = {}
        self._errors: list[str] = [f"rank {self._rank}: {job.error}"] if job.error else []
        self._files: dict[str, FileRecord] = {}
        """In the folder of this process, by it and by its children."""
        self.written = 0

    def run(self) -> str:
        """Take part to the end. Returns the result: empty, or why there is no checkpoint."""
        job, listener, parent = self._job, self._writer.listener, None
        if job.parent is not None:
            with self._noting():
                parent = connect_for_save(job.parent, self._writer.token, job.number, self._rank, self._deadline)
        for rank in job.children:
            with self._noting():
                self._children[rank] = listener.await_save(job.number, rank, self._deadline)
        sharers = [rank for rank in self._children if rank in job.sharers]
        for rank in sharers:
            self._take_report(rank)
        with self._noting():
            self._write()
        for rank in [rank for rank in self._children if rank not in sharers]:
            self._take_report(rank)
        result = self._decide() if job.parent is None else self._follow(parent)
        for link in self._children.values():
            with suppress(LostError):
                link.send({"result": result})
        for link in self._children.values():
            link.await_close()  # what is sent to a process that ends meanwhile may be lost
            link.close()
        listener.forget(job.number)
        return result

    def _noting(self) -> AbstractContextManager[None]:
        """Note an error: the others wait for a report."""
        return noting(self._errors, self._say)

    def _say(self, error: Exception) -> str:
        return ("" if isinstance(error, LostError) else f"rank {self._rank}: ") + describe_error(error)

    def _take_report(self, rank: int) -> None:
        """Take what a child has to tell."""
        with self._noting():
            report = self._children[rank].receive()
            self._errors += report["errors"]
            self._files |= manifest.from_json([report["files"]])

    def _take_share(self, shard: Shard, replica: int, rank: int) -> None:
        """Put what a replica has copied into the shard."""
        staged = self._job.staged
        if rank == self._rank:
            shard.add(staged, replica, self._writer.memory)
            return
        link, expected = self._children[rank], staged.shared_bytes
        with closing(SharedMemory()) as memory:
            memory.reserve(expected)
            link.send({"do": _SHARE, "first": expected})
            found = link.receive()["nbytes"]
            link.receive_into(memory.buffer(0, found))
            if found != expected:
                raise MicsCheckpointError(f"rank {rank} did not copy {expected} bytes of the same shard")
            shard.add(staged._replace(files=()), replica, memory)

    def _write(self) -> None:
        if self._errors:
            return
        staging = Path(self._job.staging)
        if self._job.own is not None:
            name, content = self._job.own
            (staging / name).write_bytes(content)
            self._note(staging / name)
        shard = Shard()
        for replica, rank in enumerate(self._job.sharers):
            self._take_share(shard, replica, rank)
        for name, recorded in shard.files:
            replay(recorded, staging / name)
            self._note(staging / name)

    def _note(self, path: Path) -> None:
        self._files[path.name] = record = manifest.seal(path, self._rank)
        self.written += record.bytes

    def _follow(self, parent: Link | None) -> str:
        """Report, do as the first publisher says, and return the result."""
        if parent is None:
            return self._not_saved()
        with closing(parent):
            try:
                # What this process publishes itself is no concern of the first publisher.
                elsewhere = {} if self._job.manifest is not None else self._files
                parent.send({"errors": self._errors, "files": manifest.as_json(elsewhere)})
                while True:
                    message = parent.receive()
                    if "result" in message:
                        return message["result"]
                    if message["do"] == _SHARE:
                        parent.send({}, self._writer.memory.buffer(0, message["first"]))
                    else:
                        parent.send({"error": self._publish(message["do"])})
            except LostError as lost:
                unknown = f"Whether checkpoint {self._job.target} was saved is not known"
                return f"{unknown}: {describe_error(lost)}. If it was, it is complete."

    # -------------------------------------------------------------------------------- publishing

    def _decide(self) -> str:
        """Publish with the other publishers, if nothing is wrong anywhere. On the first publisher."""
        job = self._job
        if not self._errors:
            self._errors += self._all_publish(_PUBLISH)
        if self._errors:
            return self._not_saved()
        failed = self._all_publish(_LATEST) if job.latest else []
        if failed:
            latest = Path(job.root) / folder.LATEST
            return f"Checkpoint {job.target} is complete, but {latest} could not be updated. {'; '.join(failed)}."
        if job.export:
            _export(job)
        return ""

    def _not_saved(self) -> str:
        errors = list(dict.fromkeys(self._errors))
        said = "; ".join(errors[:_SHOWN]) + (f"; and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else "")
        return f"Checkpoint {self._job.target} could not be saved. {said}. {NOTHING_PUBLISHED}"

    def _all_publish(self, what: str) -> list[str]:
        """Have all publishers do something, at the same time. Returns what went wrong."""
        others = [self._children[rank] for rank in self._job.publishers if rank in self._children]
        for link in others:
            with suppress(LostError):  # of which the answer tells
                link.send({"do": what})
        found = [self._publish(what)]
        for link in others:
            with noting(found):
                found.append(link.receive()["error"])
        return [error for error in found if error]

    def _publish(self, what: str) -> str:
        job, errors = self._job, list[str]()
        assert job.manifest is not None, "only publishers are asked"
        with noting(errors, self._say):
            if what == _PUBLISH:
                folder.publish(Path(job.staging), Path(job.target), replace(job.manifest, files=self._files))
            else:
                folder.write_latest(Path(job.root), job.manifest.tag)
        return "".join(errors)


def _export(job: Job) -> None:
    """Export the weights of a published checkpoint, in a process of its own, because that imports DeepSpeed.

    The checkpoint is complete without them, so a failure is a line in the log.
    """
    root = f"import sys; sys.path[0] = {sys.path[0]!r}"
    code = f"{root}; from mics_ds.export import export_saved; export_saved(*sys.argv[1:])"
    command = [sys.executable, "-c", code, job.target, str(job.export), job.model]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        logger.error("the weights of %s were not exported: %s", job.target, done.stderr.strip()[-500:])


class _Writer:
    def __init__(self, memory: SharedMemory, listening: socket.socket, rank: int, token: str) -> None:
        self.memory, self.rank, self.token = memory, rank, token
        self._sealed, self._folder = 0, ""
        """The number of the last copy that others may fetch, and the folder of all copies."""
        self._changed = threading.Condition()
        self.listener = Listener(listening, token, self._give)

    def save(self, job: Job) -> Done:
        """Do a job to its end, whatever that is."""
        started, one = time.monotonic(), _Save(job, self)
        self.memory.map(job.staged.nbytes)
        error = one.run()
        if error and job.manifest is not None:
            folder.discard(Path(job.staging))
        return Done(job.number, error, time.monotonic() - started, one.written)

    def seal(self, job: Seal) -> Done:
        """Sum up and describe this rank's copy, and keep those of others here too."""
        errors: list[str] = []
        if job.description is not None:
            with noting(errors), closing(SharedMemory(path=Path(job.path))) as memory:
                memory.map(job.description.staged.nbytes)
                checksum = memory.checksum(job.description.staged.nbytes)
                describe(Path(job.path), job.description._replace(crc32=checksum))
        with self._changed:
            self._sealed, self._folder = max(self._sealed, job.number), job.folder
            self._changed.notify_all()
        for writer, name, where in job.guests:
            with noting(errors):
                self._keep(writer, {"name": name, "step": job.step, "number": job.number}, Path(where))
        return Done(job.number, "; ".join(errors))

    def _keep(self, writer: Neighbour, which: Mapping[str, Any], path: Path) -> None:
        forget(path)
        with closing(SharedMemory(path=path)) as memory:
            copy = fetch(writer, self.token, which, memory, path)
        if copy is not None:
            describe(path, copy.description)

    def _give(self, link: Link, which: Mapping[str, Any]) -> None:
        """Send the copy that another process wants, once it is there, or nothing if it will not be."""
        with self._changed:
            self._changed.wait_for(lambda: self._folder and self._sealed >= which.get("number", 0), STARTING_S)
        slots = map(read, Path(self._folder).glob(f"{os.path.basename(which['name'])}.[01]"))
        found = next((copy for copy in slots if copy is not None and copy.description.step == which["step"]), None)
        if found is None:
            link.send({})
            return
        with closing(found.open()) as memory:
            description = {"description": described_by(found.path).read_text()}
            link.send(description, memory.buffer(0, found.description.staged.nbytes))


def serve(pipe_descriptor: int, memory_descriptor: int, socket_descriptor: int, rank: int, trainer: int) -> None:
    """Do jobs until the rank, whose process is the trainer, has ended."""
    for number in (signal.SIGINT, signal.SIGTERM):  # launchers send them to all processes; the rank says when to end
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):
        os.nice(10)
    torch.set_num_threads(1)
    # The end of the pipe would not tell during a save, nor where what the rank has forked holds it open.
    threading.Thread(target=_end_with, args=(trainer,), name="mics parent", daemon=True).start()
    pipe, memory = Connection(pipe_descriptor), SharedMemory(memory_descriptor)
    with suppress(EOFError, OSError):  # the rank has ended
        writer = _Writer(memory, socket.socket(fileno=socket_descriptor), rank, pipe.recv())
        while True:
            job = pipe.recv()
            pipe.send(writer.seal(job) if isinstance(job, Seal) else writer.save(job))
    os._exit(0)


def _end_with(trainer: int) -> None:
    while os.getppid() == trainer:
        time.sleep(_PARENT_S)
    os._exit(0)
