"""Manifests of checkpoints: sizes and checksums of all files, and the comparison of files with them.

A folder with a manifest was complete once; the manifest tells whether it still is. It has a checksum of its own and a
strict schema. Checksums of files are CRC-32. Plain files and JSON: no ranks, no DeepSpeed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, BinaryIO, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ..errors import MicsCheckpointError

NAME = "mics_manifest.json"
FORMAT: Literal[3] = 3
"""Version of manifests. 2 has no name of the save, 1 has no checksum of its own either; both are only read."""
ALLOW_UNCHECKED_ENV = "MICS_DS_ALLOW_UNCHECKED"
"""Load what MiCS wrote although its manifest is gone."""
OWN_STATE = "mics_client_state_rank_{rank}.pt"
"""File with the state of one rank."""
_STRICT = ConfigDict(strict=True, extra="forbid")

Count = Annotated[int, Field(ge=1, le=1 << 20)]
"""A number of ranks. Bounded, because loops run over it."""
Size = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class FileRecord:
    """One file, as it was when it had been written."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    bytes: Size
    crc32: Annotated[int, Field(ge=0, lt=1 << 32)]
    """CRC-32 of the whole content. It finds every change of up to 32 neighbouring bits, at several GB/s."""
    writer: Size
    """Global rank."""


@dataclass(frozen=True)
class Manifest:
    """Files of a published checkpoint, and the job that wrote it."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    tag: str
    shards: Count
    """p: number of partitions of the model states."""
    replicas: Count
    """r: number of copies of the model states in the job."""
    ranks: Count
    """Data-parallel size n = p · r."""
    ranks_per_node: tuple[Count, ...]
    """Data-parallel ranks on each node of the job, in order of node."""
    model_parallel: Count
    global_steps: Size
    node_local: bool
    """Whether this folder has the shards of one node only."""
    versions: dict[str, str]
    files: dict[str, FileRecord]
    """Files by name, relative to the folder."""
    save: str = ""
    """Names the save that wrote it, unlike that of any other save."""
    format: Literal[1, 2, 3] = FORMAT

    def __post_init__(self) -> None:
        if self.shards * self.replicas != self.ranks or sum(self.ranks_per_node) != self.ranks:
            raise ValueError(
                f"{self.shards} shards x {self.replicas} replicas, ranks_per_node {list(self.ranks_per_node)} and "
                f"{self.ranks} ranks do not go together"
            )
        strange = [name for name in self.files if not _FILE_NAME.fullmatch(name)]
        if strange:
            raise ValueError(f"{strange[0]!r} is not the name of a file in the checkpoint's folder")

    @property
    def protected(self) -> bool:
        """Return whether it was read with a checksum of its own, which was right."""
        return self.format > 1

    @property
    def total_bytes(self) -> int:
        return sum(record.bytes for record in self.files.values())

    def dumps(self) -> str:
        data = asdict(self)
        if self.format < FORMAT:
            del data["save"]
        if self.protected:
            data[_CHECKSUM] = _checksum(json.dumps(data, sort_keys=True))
        return json.dumps(data, indent=1, sort_keys=True) + "\n"

    @classmethod
    def loads(cls, text: str | bytes) -> Manifest:
        """Parse what :meth:`dumps` returns, layout of the text apart.

        Raises:
            ValueError, RecursionError: it is anything else.
        """
        data = json.loads(text)
        version = data.get("format") if isinstance(data, dict) else None
        if type(version) is not int:
            raise ValueError("there is no format number in it")
        if version not in (1, 2, FORMAT):
            raise ValueError(f"it has format {version}, and this mics_ds knows formats up to {FORMAT}")
        if ("save" in data) != (version == FORMAT):
            raise ValueError("save: it belongs to the newest format, and to that alone")
        written = data.pop(_CHECKSUM, None) if version > 1 else None
        # What is checked is also what is read: spaces and the order of keys do not count, everything else does.
        body = json.dumps(data, sort_keys=True)
        if version > 1 and written != _checksum(body):
            raise ValueError("its own checksum is wrong")
        return _SCHEMA.validate_json(body)


_SCHEMA = TypeAdapter(Manifest)
_CHECKSUM = "checksum"
_FILE_NAME = re.compile(r"(?!\.{1,2}$)[^/\0]+")


def _checksum(body: str) -> str:
    return f"sha256:{hashlib.sha256(body.encode()).hexdigest()}"


def as_json(files: Mapping[str, FileRecord]) -> dict[str, list[int]]:
    """Records of files as something that JSON can hold."""
    return {name: [record.bytes, record.crc32, record.writer] for name, record in files.items()}


def from_json(notes: Iterable[Mapping[str, Sequence[int]]]) -> dict[str, FileRecord]:
    """Return the records in what several ranks made with :func:`as_json`."""
    return {name: FileRecord(*record) for note in notes for name, record in note.items()}


def read(folder: Path) -> Manifest:
    """Read the manifest of a published checkpoint.

    Raises:
        FileNotFoundError: it has none: written by stock DeepSpeed, or by an interrupted save of it.
        MicsCheckpointError: it cannot be understood.
    """
    text = (folder / NAME).read_bytes()
    try:
        return Manifest.loads(text)
    except (ValueError, RecursionError) as error:
        raise MicsCheckpointError(
            f"{folder / NAME} is damaged or from a newer mics_ds ({_reason(error)}). Restore it, or load another "
            f"checkpoint. To load this one although nothing can be checked, remove that file and set "
            f"{ALLOW_UNCHECKED_ENV}=1"
        ) from error


def _reason(error: ValueError | RecursionError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    more = f", and {error.error_count() - 1} more" if error.error_count() > 1 else ""
    return f"{where}: {first['msg']}{more}".removeprefix(": ")


def count_shards(folder: Path) -> int:
    """Find p of a checkpoint without a manifest by the names of its files. 0 if there are none."""
    found = (re.match(r"zero_pp_rank_(\d+)_mp_rank_\d+_model_states\.pt$", path.name) for path in folder.glob("*.pt"))
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def damages(
    folder: Path, names: Iterable[str], records: Mapping[str, FileRecord], *, contents: bool = True
) -> list[str]:
    """Say what is wrong with these files, one sentence each. Files without a record need only exist.

    Args:
        contents: read them and compare checksums, not sizes only.
    """
    found = []
    for name in names:
        path, record = folder / name, records.get(name)
        if not path.is_file():
            found.append(f"{path} is missing")
        elif record is None:
            continue
        elif path.stat().st_size != record.bytes:
            found.append(f"{path} has {path.stat().st_size} bytes where {record.bytes} were written")
        elif contents and file_checksum(path)[1] != record.crc32:
            found.append(other_content(path))
    return found


def other_content(path: Path) -> str:
    return f"{path} has other content than was written (checksum)"


# --------------------------------------------------------------------------------------------------
# Checksums of files. torch sums up every record of an archive from memory while it writes, and CRCs of neighbouring
# parts can be joined by arithmetic: of a file that was just written only headers, small records and padding are read.

_CHUNK = 1 << 22
_POLYNOMIAL = 0xEDB88320
WORTH_JOINING = 1 << 16
"""Bytes of a record from which on it is treated by itself."""
_LOCAL_HEADER = struct.Struct("<4s22xHH")


def seal(path: Path, writer: int) -> FileRecord:
    """Force a file that this process has written to the disk and describe it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(*written_checksum(path), writer)


def file_checksum(path: Path) -> tuple[int, int]:
    """Bytes and CRC-32 of a file, from all of its content."""
    with open(path, "rb", buffering=0) as file:
        size = file.seek(0, 2)
        return size, range_checksum(file, 0, size)


def written_checksum(path: Path) -> tuple[int, int]:
    """Return bytes and CRC-32 of a file that this process has just written, of large records what was in memory. If the
    disk has something else, the result differs from that of :func:`file_checksum`."""
    with open(path, "rb", buffering=0) as file:
        size, checksum, start = file.seek(0, 2), 0, 0
        for entry, begin in large_records(path, file) if _sums_are_kept() else ():
            checksum = join(range_checksum(file, start, begin, checksum), entry.CRC, entry.file_size)
            start = begin + entry.file_size
        return size, range_checksum(file, start, size, checksum)


def large_records(path: Path, file: BinaryIO) -> Iterator[tuple[zipfile.ZipInfo, int]]:
    """Large records of an archive of torch, and where their content begins, in the order of the file."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size < WORTH_JOINING:
            continue
        file.seek(entry.header_offset)
        magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        if magic == b"PK\3\4":
            yield entry, entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes


def _sums_are_kept() -> bool:
    """Return whether torch writes real CRCs, which users can switch off."""
    from torch import serialization  # here: tools that only read manifests need no torch

    return bool(getattr(serialization, "get_crc32_options", lambda: True)())


def range_checksum(file: BinaryIO, start: int, stop: int, checksum: int = 0) -> int:
    """Continue a CRC-32 over a part of a file."""
    file.seek(start)
    while start < stop:
        chunk = file.read(min(_CHUNK, stop - start))
        if not chunk:
            raise OSError(f"{file.name} became shorter while it was read")
        checksum = zlib.crc32(chunk, checksum)
        start += len(chunk)
    return checksum


def join(first: int, second: int, length: int) -> int:
    """Return the CRC-32 of two parts one after the other, from theirs and the bytes of the second."""
    return _times(_shift(length), first) ^ second


def _times(a: int, b: int) -> int:
    """Product of two polynomials over GF(2) modulo that of CRC-32; the highest bit is the coefficient of x^0."""
    product, mask = 0, 1 << 31
    while mask:
        if a & mask:
            product ^= b
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
        mask >>= 1
    return product


@lru_cache(maxsize=1024)
def _shift(length: int) -> int:
    """x to the power of ``8 * length``: what appending so many bytes multiplies by."""
    power, square = 1 << 31, 1 << 23  # x^0, x^8
    while length:
        if length & 1:
            power = _times(square, power)
        square = _times(square, square)
        length >>= 1
    return power
