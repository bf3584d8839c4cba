"""Copies of training states in memory that outlives the process: where they are, and what makes one complete.

    FOLDER/mics_ds-UID-JOB/           on each node, readable by its owner only
        SHARD.0, SHARD.1              content of the two newest copies of a shard, or of a slice of one, in turns
        SHARD.0.json, SHARD.1.json    what it is, with checksums; written last, removed first

Whatever has no description, or one that its content does not match, is not there. Plain files: no ranks.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import MicsCheckpointError
from .arena import Arena
from .joints import Joint, StagedFile
from .manifest import write_text
from .recording import Recorded, replay

FORMAT = 2
SLOTS = 2
NEVER = NOBODY = 1 << 40
"""Later than any step, and no rank: where the least of all ranks' numbers counts."""
REMEDY = "Remove the memory of this job (python -m mics_ds.memory --remove) to resume from disk."
_PREFIX = "mics_ds"
_CHUNK = 64 << 20


class Description(NamedTuple):
    """What is in one copy of a shard."""

    job: str
    step: int
    """Optimizer steps before it."""
    shard: int
    shards: int
    """p."""
    layout: str
    """Tells whether a model and its optimizer are cut into the same shards."""
    homes: tuple[str, ...]
    """Folders that the job resumes from."""
    stale: str
    """Why a script could not go on from here, if it could not."""
    files: tuple[StagedFile, ...]
    own: dict[str, tuple[int, int]]
    """By global rank, where that rank's own part is: its client state and its random numbers."""
    nbytes: int
    crc32: int
    seconds: float
    """When it was taken, since the epoch."""
    pickled: tuple[tuple[int, int], ...]
    """Where the pickled part of each file is."""
    slice: int = 0
    slices: int = 1
    """With world-sharded optimizer states, a copy has one of so many slices of the shard."""
    joints: tuple[Joint, ...] = ()
    """What is to be made of the slices."""


class Copy(NamedTuple):
    """One copy of a shard that was found."""

    description: Description
    path: Path

    @property
    def model_parallel(self) -> int:
        """The model-parallel rank."""
        return int(self.path.name.partition("-")[0].removeprefix("mp"))

    def place(self, shards: int) -> int:
        """Among all copies of a step: by model-parallel rank, shard and slice."""
        shard = self.model_parallel * shards + self.description.shard
        return shard * self.description.slices + self.description.slice

    def open(self) -> tuple[Description, Arena]:
        """What it is, and its content, mapped. Whoever asks closes it."""
        arena = open_content(self.path)
        arena.map(self.description.nbytes)
        return self.description, arena


def job_key(name: str | None) -> str:
    """What a job and its restarts have in common: the name it was given, or its command, folder and user."""
    # The deepspeed launcher tells each rank its number by an argument.
    command = [word for word in sys.argv if not word.startswith(("--local_rank", "--local-rank"))]
    said = ["named", name] if name is not None else ["command", os.getcwd(), *command]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def region(folder: str | os.PathLike, key: str) -> Path:
    return Path(folder) / f"{_PREFIX}-{os.getuid()}-{key}"


def make_region(path: Path) -> None:
    """
    Raises:
        MicsCheckpointError: it belongs to somebody else, who could have put anything there.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    require_own(path)


def require_own(path: Path) -> None:
    found = path.stat(follow_symlinks=False)
    if found.st_uid != os.getuid() or found.st_mode & 0o022 or path.is_symlink():
        raise MicsCheckpointError(
            f"{path} can be written by others than {getpass.getuser()}; it is not used. Remove it"
        )


def shard_name(model_parallel_rank: int, shard: int, part: tuple[int, int] = (0, 1)) -> str:
    """
    Args:
        part: which slice of how many.
    """
    number, slices = part
    return f"mp{model_parallel_rank}-shard{shard}" + (f"-slice{number}of{slices}" if slices > 1 else "")


def described_by(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def forget(path: Path) -> None:
    """From now on the content of a copy may be anything."""
    described_by(path).unlink(missing_ok=True)


def seal(path: Path, description: Description, arena: Arena) -> Description:
    """Describe a copy that is complete. Returns the description with the checksum."""
    described = description._replace(crc32=_checksum(arena, description.nbytes))
    describe(path, described)
    return described


def describe(path: Path, description: Description) -> None:
    write_text(described_by(path), dumps(description))


def dumps(description: Description) -> str:
    fields = description._asdict()
    fields["files"] = [[file.name, file.places] for file in description.files]
    body = json.dumps(fields, sort_keys=True)
    return json.dumps({"format": FORMAT, "body": body, "crc32": zlib.crc32(body.encode())})


def loads(text: str | bytes) -> Description | None:
    """The reverse; ``None`` for anything else."""
    try:
        said = json.loads(text)
        if said["format"] != FORMAT or zlib.crc32(said["body"].encode()) != said["crc32"]:
            return None
        fields = json.loads(said["body"])
        return Description(
            **{
                **fields,
                "files": tuple(StagedFile(name, b"", _pairs(places)) for name, places in fields["files"]),
                "pickled": _pairs(fields["pickled"]),
                "own": {rank: (start, nbytes) for rank, (start, nbytes) in fields["own"].items()},
                "homes": tuple(fields["homes"]),
                "joints": tuple(_joint(*joint) for joint in fields["joints"]),
            }
        )
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
        return None


def _joint(nbytes: int, whole: int, piece: int, sizes: list[int], shards: list[int], itemsize: int) -> Joint:
    return Joint(nbytes, whole, piece, tuple(sizes), tuple(shards), itemsize)


def _pairs(places: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((start, nbytes) for start, nbytes in places)


def _checksum(arena: Arena, nbytes: int) -> int:
    crc = 0
    for start in range(0, nbytes, _CHUNK):
        crc = zlib.crc32(arena.buffer(start, min(_CHUNK, nbytes - start)), crc)
    return crc


def read(path: Path) -> Description | None:
    """The description of a copy, or ``None`` if it has none that can be understood."""
    try:
        return loads(described_by(path).read_bytes())
    except OSError:
        return None


def copies(path: Path) -> Iterator[Copy]:
    """All complete copies in a job's region, judged by their descriptions."""
    if not path.is_dir():
        return
    require_own(path)
    for file in sorted(path.glob("mp*-shard*.[01]")):
        description = read(file)
        if description is not None:
            yield Copy(description, file)


@contextmanager
def opened(path: Path) -> Iterator[Arena]:
    """The content of a copy, not yet mapped."""
    arena = open_content(path)
    try:
        yield arena
    finally:
        arena.close()


def open_content(path: Path) -> Arena:
    """The same, for whoever closes it."""
    return Arena(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))


def check(copy: Copy, arena: Arena) -> None:
    """Map the content of a copy and compare it with its checksum.

    Raises:
        MicsCheckpointError: it is not what was written.
    """
    if os.fstat(arena.descriptor).st_size < copy.description.nbytes:
        raise MicsCheckpointError(f"{copy.path} is shorter than it was")
    arena.map(copy.description.nbytes)
    if _checksum(arena, copy.description.nbytes) != copy.description.crc32:
        raise MicsCheckpointError(f"{copy.path} has other content than was written (checksum)")


class Assembly:
    """A shard that is put together from copies of its slices, or has come whole. Host memory."""

    def __init__(self) -> None:
        self.description: Description | None = None
        self._arena: Arena | None = None
        self._wholes: list[torch.Tensor] = []
        self.own: dict[str, bytes] = {}
        """By global rank, that rank's own part."""

    def add(self, description: Description, arena: Arena) -> None:
        """Take what is in a copy. The first arena stays open until :meth:`close`, others are closed here.

        Raises:
            RuntimeError: there is not enough memory.
        """
        if self._arena is None:
            self.description, self._arena = description, arena
            self._wholes = [torch.empty(joint.nbytes, dtype=torch.uint8, device="cpu") for joint in description.joints]
        for joint, whole in zip(description.joints, self._wholes):
            joint.put(arena.view(joint.piece, joint.sizes[description.slice]), description.slice, whole)
        for rank, place in description.own.items():
            self.own[rank] = bytes(arena.buffer(*place))
        if arena is not self._arena:
            arena.close()

    def close(self) -> None:
        if self._arena is not None:
            self._arena.close()

    def write(self, folder: Path) -> Sequence[Path]:
        """Write the checkpoint files of the shard."""
        assert self.description is not None, "something was added"
        assert self._arena is not None, "with it"
        written = []
        for file, (start, nbytes) in zip(self.description.files, self.description.pickled):
            pickled = bytes(self._arena.buffer(start, nbytes))
            replay(Recorded(pickled, [self._storage(*place) for place in file.places]), folder / file.name)
            written.append(folder / file.name)
        return written

    def _storage(self, start: int, nbytes: int) -> torch.UntypedStorage:
        assert self._arena is not None, "something was added"
        return self._arena.storage(start, nbytes) if start >= 0 else self._wholes[-1 - start].untyped_storage()


class Region(NamedTuple):
    """What one job keeps on this node, for people."""

    path: Path
    nbytes: int
    steps: tuple[int, ...]
    age_s: float


def regions(folder: str | os.PathLike) -> list[Region]:
    """All regions of this user."""
    found = []
    for path in sorted(Path(folder).glob(f"{_PREFIX}-{os.getuid()}-*")):
        files = [file for file in path.rglob("*") if file.is_file()]
        newest = max((file.stat().st_mtime for file in files), default=path.stat().st_mtime)
        steps = sorted({copy.description.step for copy in copies(path)})
        nbytes = sum(file.stat().st_blocks * 512 for file in files)
        found.append(Region(path, nbytes, tuple(steps), time.time() - newest))
    return found


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
