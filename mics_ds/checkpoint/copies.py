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
import os
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import TypeAdapter

from ..errors import MicsCheckpointError
from ..files import write_text
from ..shared_memory import SharedMemory, require_host_memory
from .staging import Recorded, Staged, bytes_of

PREFIX = "mics_ds"
_RANDOM_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


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
