"""Copies of training states in memory, which processes share and which may outlive them.

    FOLDER/mics_ds-UID-JOB/      on each node, readable by its owner only
        lock                     held by the node's first rank while the job runs there
        NAME.0, NAME.1           the two newest copies of what one rank has of its shard, in turns
        NAME.0.json, NAME.1.json what they are, with checksums; written last, removed first

Whatever has no description, or one that its content does not match, is not there. Nothing here needs DeepSpeed.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import mmap
import os
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter

from ..errors import MicsCheckpointError
from ..files import write_text
from ..host_memory import host_memory_left
from ..log import logger
from .staging import Recorded, Staged, bytes_of

_STEP, _MARGIN, _LEAST = 256 << 20, 64 << 20, 1 << 20
PREFIX = "mics_ds"
_RANDOM_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Copying:
    """A copy that the device makes beside what it is given next."""

    def __init__(self, event: Any = None, sources: Sequence[torch.Tensor] = ()) -> None:
        self._event, self._sources = event, list(sources)

    def wait(self) -> None:
        """Have the host wait for the copy."""
        if self._event is not None:
            self._event.synchronize()
        self._sources.clear()

    def comes_before(self, stream: Any) -> None:
        """Have a stream wait for the copy: the next work on it overwrites the source."""
        if self._event is not None:
            stream.wait_event(self._event)


class SharedMemory:
    """Memory that two processes share. Every copy uses it again: mapping and pinning cost more than copying.

    Args:
        descriptor: of the memory, if another process has made it.
        path: a file in a file system in memory, made if it does not exist. By default the memory has no name, and goes
            away with the last process that has it.
    """

    _stream: Any = None
    """Stream of all copies from the device."""

    def __init__(self, descriptor: int | None = None, path: Path | None = None) -> None:
        if path is not None:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self.descriptor = os.memfd_create("mics_ds", os.MFD_CLOEXEC) if descriptor is None else descriptor
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._pinned = False

    @property
    def nbytes(self) -> int:
        """Bytes that are mapped."""
        return self._bytes.numel()

    def reserve(self, nbytes: int) -> None:
        """Provide so much memory, pinned where there is an accelerator of CUDA's kind.

        Raises:
            MicsCheckpointError, OSError: there is not so much. What was there before still is.
        """
        size = os.fstat(self.descriptor).st_size
        wanted = -(-(nbytes + nbytes // 16) // _LEAST) * _LEAST if nbytes > size else size
        # In steps, because the other ranks of the node take their memory at the same time. An error now is better than
        # SIGBUS, or the end of the process, later.
        while size < wanted:
            step = min(_STEP, wanted - size)
            require_host_memory(step + _MARGIN, f"to stage states in, {wanted / 1e9:.2f} GB in all")
            os.posix_fallocate(self.descriptor, size, step)
            size += step
        self.map(nbytes)
        if not self._pinned and self.nbytes and torch.cuda.is_available():
            code = torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), self.nbytes, 0)
            self._pinned = int(code) == 0
            if not self._pinned:
                logger.warning("memory to stage states in could not be pinned (error %s); copies take longer", code)

    def map(self, nbytes: int) -> None:
        """Map all of it, unless ``nbytes`` are mapped already."""
        if nbytes > self.nbytes and os.fstat(self.descriptor).st_size:
            self.unmap()
            self._bytes = torch.frombuffer(mmap.mmap(self.descriptor, 0), dtype=torch.uint8)

    def unmap(self) -> None:
        """Let go of the mapping, as soon as no view of it is left."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
            self._pinned = False
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def close(self) -> None:
        self.unmap()
        os.close(self.descriptor)

    def view(self, start: int, nbytes: int) -> torch.Tensor:
        """Return a part of the memory itself, (nbytes,) uint8."""
        return self._bytes[start : start + nbytes]

    def buffer(self, start: int, nbytes: int) -> memoryview:
        """Return a part of the memory itself, for code that does not use torch."""
        return self.view(start, nbytes).numpy().data

    def storage(self, start: int, nbytes: int) -> torch.UntypedStorage:
        """Return a part of the memory itself, for ``torch.save``."""
        return self._bytes.untyped_storage()[start : start + nbytes] if nbytes else torch.UntypedStorage(0)

    def checksum(self, nbytes: int) -> int:
        """Return the CRC-32 of the first bytes."""
        return zlib.crc32(self.buffer(0, nbytes))

    def copy_in(self, parts: Sequence[tuple[int, torch.Tensor]], streams: Any) -> Copying:
        """Copy tensors to given places, from whatever device. Those from the host are there when this returns.

        Args:
            parts: where each begins, in bytes, and what is to be copied, 1-D uint8.
            streams: of the device, ``None`` for the CPU.
        """
        if streams is None:
            for start, part in parts:
                self.view(start, part.numel()).copy_(part)
            return Copying()
        if SharedMemory._stream is None:
            SharedMemory._stream = streams.Stream()
        side = SharedMemory._stream
        side.wait_stream(streams.current_stream())
        with streams.stream(side):
            for start, part in parts:
                self.view(start, part.numel()).copy_(part, non_blocking=True)
            event = streams.Event()
            event.record(side)
        return Copying(event, [part for _, part in parts])


class Shard:
    """A shard that is put together in host memory.

    Args:
        lasting: whether it is used beyond the copies of its replicas, which the next copies write over.
    """

    def __init__(self, *, lasting: bool = False) -> None:
        self._wholes: list[torch.UntypedStorage] = []
        self._lasting = lasting
        self.files: list[tuple[str, Recorded]] = []
        """By name, whole when all replicas were added."""

    def add(self, staged: Staged, replica: int, memory: SharedMemory) -> None:
        """Add what a replica has copied, or raise MicsCheckpointError if host memory is too small for it."""
        shared = [share for share in staged.shares if share.replicas > 1]
        alone = list(zip(staged.shares, staged.starts))[len(shared) :] if staged.files else []
        if not self._wholes:
            require_host_memory(sum(share.nbytes for share in shared), "to put a shard together")
            self._wholes = [torch.UntypedStorage(share.nbytes) for share in shared]
        for share, start, whole in zip(shared, staged.starts, self._wholes):
            share.put(memory.view(start, share.piece_bytes), replica, bytes_of(whole))
        storages = [memory.storage(start, share.nbytes) for share, start in alone]
        if self._lasting:
            require_host_memory(sum(share.nbytes for share, _ in alone), "to load a shard")
            storages = [storage.clone() for storage in storages]
        by_number = self._wholes + storages
        for file in staged.files:
            found = Recorded(bytes(memory.buffer(*file.pickled)), [by_number[number] for number in file.storages])
            self.files.append((file.name, found))


def require_host_memory(nbytes: int, purpose: str) -> None:
    """Raise MicsCheckpointError unless there is so much host memory."""
    left, of = host_memory_left()
    if nbytes > left:
        raise MicsCheckpointError(
            f"{nbytes / 1e9:.2f} GB of host memory are needed {purpose}, and {left / 1e9:.2f} GB are left of {of}"
        )


# --------------------------------------------------------------------------------------------------
# Copies that outlive the process


class Place(NamedTuple):
    """Place of a slice in the states of the job: its group, its shard, and how the states were cut."""

    group: int
    """Number of the data-parallel group. There are several groups with model parallelism."""
    shard: int
    slice: int
    shards: int
    slices: int
    """Slices of each shard, r when the copy was made."""

    @property
    def number(self) -> int:
        """Number of this place among all places with the same cut."""
        return (self.group * self.shards + self.shard) * self.slices + self.slice

    def name(self, engine: int) -> str:
        """Return the name of copies of this slice, without the number of the slot."""
        return f"e{engine}-g{self.group}-shard{self.shard}-slice{self.slice}of{self.slices}"


class Description(NamedTuple):
    """Description of the content of one copy."""

    step: int
    """Optimizer steps before it."""
    framework_step: int
    """Optimizer steps by the count of a framework that resumes from folders, else -1."""
    engine: int
    """Index of the engine among those of the job, in the order in which they were made."""
    place: Place
    rank: int
    layout: str
    """Digest that models have in common whose states are cut into the same shards."""
    homes: dict[str, list[int]]
    """Folders that the job resumes from, each with the markers that its disk may have for the copy to count."""
    stale: str
    """Why a script could not go on from here, if it could not."""
    staged: Staged
    crc32: int = 0
    """Checksum of the content."""


class Copy(NamedTuple):
    """A copy that was found."""

    description: Description
    path: Path

    def open(self) -> SharedMemory:
        """Map the memory with its content."""
        memory = SharedMemory(os.open(self.path, os.O_RDWR))
        memory.map(self.description.staged.nbytes)
        return memory

    def own(self, memory: SharedMemory) -> bytes:
        """Return what belongs to the rank of the copy alone."""
        return bytes(memory.buffer(*self.description.staged.own))

    def require_same(self, memory: SharedMemory) -> None:
        """Raise MicsCheckpointError unless memory has the content of this copy."""
        nbytes = self.description.staged.nbytes
        if memory.nbytes < nbytes or memory.checksum(nbytes) != self.description.crc32:
            raise MicsCheckpointError(f"{self.path} has other content than was written (checksum)")


_SCHEMA = TypeAdapter(Description)


def described_by(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def forget(path: Path) -> None:
    """Mark the content of a copy as undefined."""
    described_by(path).unlink(missing_ok=True)


def _head(body: str) -> str:
    return f"mics_ds copy 4, CRC-32 {zlib.crc32(body.encode())}"


def describe(path: Path, description: Description) -> None:
    """Make a copy complete."""
    body = _SCHEMA.dump_json(description).decode()
    write_text(described_by(path), f"{_head(body)}\n{body}")


def understood(text: str, path: Path) -> Copy | None:
    """Return the copy that such a text describes; ``None`` for any other text."""
    head, _, body = text.partition("\n")
    try:
        return Copy(_SCHEMA.validate_json(body), path) if head == _head(body) else None
    except ValueError:
        return None


def read(path: Path) -> Copy | None:
    """Read the description of a copy; ``None`` if it has none that can be understood."""
    try:
        return understood(described_by(path).read_text(), path)
    except (OSError, UnicodeDecodeError):
        return None


def copies(region: Path) -> Iterator[Copy]:
    """Yield all complete copies in a job's region, judged by their descriptions.

    Raises:
        MicsCheckpointError: others than this user can write there.
    """
    if region.is_dir():
        require_own(region)
        yield from filter(None, map(read, sorted(region.glob("e*-shard*.[01]"))))


def job_key(name: str | None) -> str:
    """Return what a job and its restarts have in common: its name, or else its id, command and folder."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    run = "" if run == "none" or _RANDOM_ID.fullmatch(run) else run  # torchrun makes one up for each start
    # The deepspeed launcher tells each rank its number by an argument.
    command = [word for word in sys.argv if not word.startswith(("--local_rank", "--local-rank"))]
    unnamed = ["command", os.environ.get("SLURM_JOB_ID", ""), run, os.getcwd(), *command]
    return hashlib.sha256(json.dumps(unnamed if name is None else ["named", name]).encode()).hexdigest()[:16]


def region(folder: str | os.PathLike, job: str | None) -> Path:
    """Return the folder of the copies of a job, in a file system in memory."""
    return Path(folder) / f"{PREFIX}-{os.getuid()}-{job_key(job)}"


def require_own(path: Path) -> None:
    """Raise MicsCheckpointError if another user can write to ``path``, who could have put anything there."""
    found = path.stat(follow_symlinks=False)
    if found.st_uid != os.getuid() or found.st_mode & 0o022 or path.is_symlink():
        raise MicsCheckpointError(
            f"{path} can be written by others than {getpass.getuser()}; it is not used. Remove it"
        )
