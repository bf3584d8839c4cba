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
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
import torch
from pydantic import TypeAdapter

from ..errors import MicsCheckpointError
from ..files import write_text
from ..log import logger
from .staging import Recorded, Staged, Stored

_STEP, _MARGIN, _LEAST = 256 << 20, 64 << 20, 1 << 20
FORMAT: Literal[3] = 3
PREFIX = "mics_ds"
_RANDOM_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Copying:
    """A copy that the device makes beside what it is given next."""

    def __init__(self, event: Any = None, sources: Sequence[torch.Tensor] = ()) -> None:
        self._event, self._sources = event, list(sources)

    def wait(self) -> None:
        """Have the host wait for it."""
        if self._event is not None:
            self._event.synchronize()
        self._sources.clear()

    def comes_before(self, stream: Any) -> None:
        """Have a stream wait for it: what is put there next overwrites what is copied."""
        if self._event is not None:
            stream.wait_event(self._event)


class SharedMemory:
    """Memory that two processes share, mapped here as far as :meth:`reserve` or :meth:`map` asked for.

    It grows in generous steps and is used again by every copy: mapping and pinning cost more than copying. Without a
    path it has no name, and goes away with the last process that has it.

    Args:
        descriptor: of the memory, if another process has made it.
        path: a file in a file system in memory, made if it does not exist.
    """

    _stream: Any = None
    """Stream of all copies from the device that this process makes."""

    def __init__(self, descriptor: int | None = None, path: Path | None = None) -> None:
        if path is not None:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self.descriptor = os.memfd_create("mics_ds", os.MFD_CLOEXEC) if descriptor is None else descriptor
        self.path = path
        self.nbytes = 0
        self._map: mmap.mmap | None = None
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._pinned = False

    def is_lost(self) -> bool:
        """Return whether its file was removed, so that nobody will find what is copied there."""
        try:
            return self.path is not None and not os.path.samestat(os.stat(self.path), os.fstat(self.descriptor))
        except FileNotFoundError:
            return True

    def reserve(self, nbytes: int) -> None:
        """See to it that there is so much, pinned where there is an accelerator of CUDA's kind.

        Raises:
            MicsCheckpointError, OSError: there is not. What was there before still is.
        """
        size = os.fstat(self.descriptor).st_size
        if nbytes > size:
            self._grow(size, -(-(nbytes + nbytes // 16) // _LEAST) * _LEAST)
        self.map(nbytes)
        if not self._pinned and self.nbytes and torch.cuda.is_available():
            code = torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), self._bytes.numel(), 0)
            self._pinned = int(code) == 0
            if not self._pinned:
                logger.warning("memory to stage states in could not be pinned (error %s); copies take longer", code)

    def _grow(self, size: int, wanted: int) -> None:
        """Grow in steps, because the other ranks of the node take their memory at the same time.

        An error now is better than SIGBUS, or the end of the process, later.
        """
        while size < wanted:
            step = min(_STEP, wanted - size)
            require_host_memory(step + _MARGIN, f"to stage states in, {wanted / 1e9:.2f} GB in all")
            os.posix_fallocate(self.descriptor, size, step)
            size += step

    def map(self, nbytes: int) -> None:
        """Map what there is, up to at least ``nbytes``."""
        if nbytes <= self.nbytes:
            return
        self.unmap()
        size = os.fstat(self.descriptor).st_size
        self._map = mmap.mmap(self.descriptor, size)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self.nbytes = size

    def unmap(self) -> None:
        """Let go of the mapping, as soon as no view of it is left."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
            self._pinned = False
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._map = None  # unmapped with the last view of it
        self.nbytes = 0

    def close(self) -> None:
        self.unmap()
        os.close(self.descriptor)

    def view(self, start: int, nbytes: int) -> torch.Tensor:
        """(nbytes,) uint8: a part of the memory itself."""
        return self._bytes[start : start + nbytes]

    def buffer(self, start: int, nbytes: int) -> memoryview:
        """Return (nbytes,) bytes of the memory as a buffer, for code that does not use torch."""
        return memoryview(b"" if self._map is None else self._map)[start : start + nbytes]

    def storage(self, start: int, nbytes: int) -> torch.UntypedStorage:
        """A part of the memory itself, as what ``torch.save`` writes."""
        if not nbytes:
            return torch.UntypedStorage(0)
        return self._bytes.untyped_storage()[start : start + nbytes]

    def checksum(self, nbytes: int) -> int:
        """The CRC-32 of what the memory begins with."""
        crc = 0
        for start in range(0, nbytes, _STEP):
            crc = zlib.crc32(self.buffer(start, min(_STEP, nbytes - start)), crc)
        return crc

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


def host_memory_left() -> tuple[int, str]:
    """Bytes of host memory that can be taken, and what limits them: the machine, or a cgroup of this process."""
    found = [(psutil.virtual_memory().available, "this machine's memory")]
    for folder in _cgroups():
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with suppress(OSError, ValueError):
                most, taken = int((folder / limit).read_text()), int((folder / used).read_text())
                # What files of the disk take up is given back when it is asked for.
                lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
                cached = next((int(value) for name, value in lines if name == "inactive_file"), 0)
                found.append((most - taken + cached, f"{most / 1e9:.2f} GB, the limit of its cgroup"))
    left, of = min(found)
    return max(left, 0), of


def _cgroups() -> Iterator[Path]:
    """Folders of the memory cgroups that this process is in, of either version."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "memory" in controllers.split(","):
                root = Path("/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup")
                inner = root / path.lstrip("/")
                yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(root))


class Shard:
    """A shard that is put together from what its replicas have copied, in host memory.

    Args:
        lasting: whether it is used beyond the copies, which others write over.
    """

    def __init__(self, *, lasting: bool = False) -> None:
        self._wholes: list[torch.Tensor] = []
        self._lasting = lasting
        self.files: list[tuple[str, Recorded]] = []
        """By name, whole when all replicas were added."""

    def add(self, staged: Staged, replica: int, memory: SharedMemory) -> None:
        """Take what a replica has copied, or raise MicsCheckpointError if host memory is too small for it."""
        if not self._wholes:
            require_host_memory(sum(share.nbytes for share in staged.shares), "to put a shard together")
            self._wholes = [torch.empty(share.nbytes, dtype=torch.uint8, device="cpu") for share in staged.shares]
        for share, (start, nbytes), whole in zip(staged.shares, staged.pieces(replica), self._wholes):
            share.put(memory.view(start, nbytes), replica, whole)
        for file in staged.files:
            if self._lasting:
                require_host_memory(sum(item.nbytes for item in file.storages if item.share < 0), "to load a shard")
            storages = [self._storage(item, memory) for item in file.storages]
            self.files.append((file.name, Recorded(bytes(memory.buffer(*file.pickled)), storages)))

    def _storage(self, item: Stored, memory: SharedMemory) -> torch.UntypedStorage:
        if item.share >= 0:
            return self._wholes[item.share].untyped_storage()
        found = memory.storage(item.start, item.nbytes)
        return found.clone() if self._lasting else found


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
    """First rank of the data-parallel group. There are several groups with model parallelism."""
    shard: int
    slice: int
    shards: int
    """p."""
    slices: int
    """r, when the copy was made."""

    @property
    def number(self) -> int:
        """Number of this place among all places with the same cut."""
        return (self.group * self.shards + self.shard) * self.slices + self.slice

    def name(self, engine: int) -> str:
        """The name of copies of it, without the number of the slot."""
        return f"e{engine}-g{self.group}-shard{self.shard}-slice{self.slice}of{self.slices}"


class Description(NamedTuple):
    """Description of the content of one copy."""

    format: Literal[3]
    step: int
    """Optimizer steps before it."""
    engine: int
    """Index of the engine among those of the job, in the order in which they were made."""
    place: Place
    rank: int
    layout: str
    """Tells whether a model and its optimizer are cut into the same shards."""
    homes: dict[str, list[int]]
    """Folders that the job resumes from, each with the markers that its disk may have for the copy to count."""
    stale: str
    """Why a script could not go on from here, if it could not."""
    staged: Staged


_SCHEMA = TypeAdapter(Description)


class Copy(NamedTuple):
    """A copy that was found."""

    description: Description
    checksum: int
    path: Path

    def require_same(self, memory: SharedMemory) -> None:
        """Raise MicsCheckpointError unless this is what is in memory."""
        nbytes = self.description.staged.nbytes
        if memory.nbytes < nbytes or memory.checksum(nbytes) != self.checksum:
            raise MicsCheckpointError(f"{self.path} has other content than was written (checksum)")


def described_by(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def forget(path: Path) -> None:
    """Mark the content of a copy as undefined."""
    described_by(path).unlink(missing_ok=True)


def describe(path: Path, description: Description, checksum: int) -> None:
    """Make a copy complete."""
    body = json.dumps({"content": checksum, "description": _SCHEMA.dump_python(description, mode="json")})
    write_text(described_by(path), json.dumps({"crc32": zlib.crc32(body.encode()), "body": body}))


def understood(text: str | bytes, path: Path) -> Copy | None:
    """The copy that such a text describes; ``None`` for any other."""
    try:
        said = json.loads(text)
        if zlib.crc32(said["body"].encode()) != said["crc32"]:
            return None
        body = json.loads(said["body"])
        return Copy(_SCHEMA.validate_python(body["description"]), int(body["content"]), path)
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
        return None


def read(path: Path) -> Copy | None:
    """Read the description of a copy; ``None`` if it has none that can be understood."""
    try:
        return understood(described_by(path).read_bytes(), path)
    except OSError:
        return None


def copies(region: Path) -> Iterator[Copy]:
    """All complete copies in a job's region, judged by their descriptions.

    Raises:
        MicsCheckpointError: others than this user can write there.
    """
    if region.is_dir():
        require_own(region)
        yield from filter(None, map(read, sorted(region.glob("e*-shard*.[01]"))))


def job_key(name: str | None) -> str:
    """Return what a job and its restarts have in common.

    That is the name it was given, or else its job in the cluster, its command and its folder.
    """
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    run = "" if run == "none" or _RANDOM_ID.fullmatch(run) else run  # torchrun makes one up for each start
    # The deepspeed launcher tells each rank its number by an argument.
    command = [word for word in sys.argv if not word.startswith(("--local_rank", "--local-rank"))]
    unnamed = ["command", os.environ.get("SLURM_JOB_ID", ""), run, os.getcwd(), *command]
    return hashlib.sha256(json.dumps(unnamed if name is None else ["named", name]).encode()).hexdigest()[:16]


def region(folder: str | os.PathLike, key: str) -> Path:
    return Path(folder) / f"{PREFIX}-{os.getuid()}-{key}"


def require_own(path: Path) -> None:
    """Raise MicsCheckpointError if another user can write to ``path``, who could have put anything there."""
    found = path.stat(follow_symlinks=False)
    if found.st_uid != os.getuid() or found.st_mode & 0o022 or path.is_symlink():
        raise MicsCheckpointError(
            f"{path} can be written by others than {getpass.getuser()}; it is not used. Remove it"
        )
