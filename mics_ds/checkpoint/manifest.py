"""What makes a checkpoint folder complete: a manifest, and the order in which things reach the disk.

    DIR/.TAG.partial/      being written; never looked at by anybody who loads
    DIR/TAG/               published by one rename, with the manifest inside
    DIR/.TAG.replaced/     an older checkpoint of the same tag, for the moment between two renames
    DIR/latest             names the tag; replaced by a rename, after everything else (:mod:`.names`)

A folder with a manifest was therefore complete once, and the sizes and checksums in the manifest tell
whether it still is. The manifest has a checksum of its own. Plain files and JSON: no torch, no ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ..errors import MicsCheckpointError
from . import checksum

NAME = "mics_manifest.json"
LATEST = "latest"
FORMAT: Literal[2] = 2
UNPROTECTED_FORMAT: Literal[1] = 1
"""From before manifests had a checksum of their own. Read, never written."""
ALLOW_UNCHECKED_ENV = "MICS_DS_ALLOW_UNCHECKED"
"""Load what MiCS wrote although its manifest is gone."""
_STRICT = ConfigDict(strict=True, extra="forbid")

Count = Annotated[int, Field(ge=1, le=1 << 20)]
"""Of ranks. Bounded, because loops run over it."""
Size = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class FileRecord:
    """One file, as it was when it had been written."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    bytes: Size
    crc32: Annotated[int, Field(ge=0, lt=1 << 32)]
    """Of the whole content. Finds every change of up to 32 neighbouring bits, at several GB/s."""
    writer: Size
    """Global rank."""


@dataclass(frozen=True)
class Manifest:
    """What a published checkpoint consists of, and the job that wrote it."""

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
    """By name, relative to the folder."""
    format: Literal[1, 2] = FORMAT

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
        """Whether it was read with a checksum of its own, which was right."""
        return self.format != UNPROTECTED_FORMAT

    @property
    def total_bytes(self) -> int:
        return sum(record.bytes for record in self.files.values())

    def dumps(self) -> str:
        data = asdict(self)
        if self.protected:
            data[_CHECKSUM] = _checksum(json.dumps(data, sort_keys=True))
        return json.dumps(data, indent=1, sort_keys=True) + "\n"

    @classmethod
    def loads(cls, text: str | bytes) -> Manifest:
        """Raises ValueError or RecursionError for anything but what :meth:`dumps` returns, layout of the text apart."""
        data = json.loads(text)
        if not isinstance(data, dict) or type(data.get("format")) is not int:
            raise ValueError("there is no format number in it")
        if data["format"] not in (UNPROTECTED_FORMAT, FORMAT):
            raise ValueError(f"it has format {data['format']}, and this mics_ds knows formats up to {FORMAT}")
        written = data.pop(_CHECKSUM, None) if data["format"] != UNPROTECTED_FORMAT else None
        # What is checked is also what is read: spaces and the order of keys do not count, everything else does.
        body = json.dumps(data, sort_keys=True)
        if data["format"] == FORMAT and written != _checksum(body):
            raise ValueError("its own checksum is wrong")
        return _SCHEMA.validate_json(body)


_SCHEMA = TypeAdapter(Manifest)
_CHECKSUM = "checksum"
_FILE_NAME = re.compile(r"(?!\.{1,2}$)[^/\0]+")


def _checksum(body: str) -> str:
    return f"sha256:{hashlib.sha256(body.encode()).hexdigest()}"


CLIENT_STATE = "mics_client_state_rank_{rank}.pt"
_OURS = re.compile(r"_states\.pt$|^mics_client_state_rank_\d+\.pt$")


def staging_folder(target: Path) -> Path:
    """Where the checkpoint that will be ``target`` is written."""
    return target.with_name(f".{target.name}.partial")


def _replaced_folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def is_remains(name: str) -> bool:
    """Whether a folder with this name is not a checkpoint, but on its way to become one or to be removed."""
    return name.startswith(".") and name.endswith((".partial", ".replaced"))


def noted(files: Mapping[str, FileRecord]) -> dict[str, list[int]]:
    """Records of files as something that JSON can hold."""
    return {name: [record.bytes, record.crc32, record.writer] for name, record in files.items()}


def recorded(notes: Iterable[Mapping[str, Sequence[int]]]) -> dict[str, FileRecord]:
    """The records in what several ranks :func:`noted`."""
    return {name: FileRecord(*record) for note in notes for name, record in note.items()}


def discard(staging: Path) -> None:
    """Remove what will not become a checkpoint, as far as that is possible."""
    shutil.rmtree(staging, ignore_errors=True)


def interrupted_saves(folder: Path) -> list[Path]:
    """Remains of saves that never ended."""
    return sorted(folder.glob(".*.partial"))


def seal(path: Path, writer: int) -> FileRecord:
    """Force a file that this process has written to the disk and describe it."""
    _sync(path)
    size, crc32 = checksum.digest_written(path)
    return FileRecord(size, crc32, writer)


def add_scripts(scripts: Iterable[str | os.PathLike], folder: Path) -> None:
    """Copy scripts to the folder that checkpoints are in, as DeepSpeed does, to be run there."""
    for script in scripts:
        target = folder / os.path.basename(script)
        shutil.copyfile(script, target)
        target.chmod(target.stat().st_mode | stat.S_IEXEC)


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file by one with this text; at any moment it has its old or its new content."""
    beside = path.with_name(f".{path.name}.partial-file")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    _sync(path.parent)


def publish(staging: Path, target: Path, manifest: Manifest) -> None:
    """Turn a folder with all its files into a checkpoint.

    Files in an older ``target`` that were not part of that checkpoint move into the new one.

    Raises:
        MicsCheckpointError: files are missing in ``staging`` or have other sizes than their writers saw.
        OSError: the disk refused. Whatever was there before is still there.
    """
    absent = [
        name
        for name, record in manifest.files.items()
        if not (staging / name).is_file() or (staging / name).stat().st_size != record.bytes
    ]
    if absent:
        writers = sorted({manifest.files[name].writer for name in absent})
        raise MicsCheckpointError(
            f"{', '.join(sorted(absent)[:4])}{' and more' if len(absent) > 4 else ''}, written by ranks {writers}, "
            f"cannot be seen in {staging} by the rank that publishes it. The folder has to be on storage that all "
            f'nodes share; for folders local to each node set "checkpoint": {{"use_node_local_storage": true}}.'
        )
    write_text(staging / NAME, manifest.dumps())
    _sync(staging)
    replaced = _replaced_folder(target)
    if target.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        strangers = _strangers(target)
        os.rename(target, replaced)
    else:
        strangers = []
    try:
        os.rename(staging, target)
    except Exception:
        recover(target)
        raise
    _sync(target.parent)
    for name in strangers:
        if not (target / name).exists():
            os.rename(replaced / name, target / name)
    if replaced.exists():
        shutil.rmtree(replaced)


def _strangers(folder: Path) -> list[str]:
    """Files that somebody else keeps in a checkpoint folder."""
    try:
        own = {NAME, *read(folder).files}
    except (FileNotFoundError, MicsCheckpointError):
        own = {NAME}
    return [entry.name for entry in folder.iterdir() if entry.name not in own and not _OURS.search(entry.name)]


def recover(target: Path) -> bool:
    """Undo a publication that was killed between its two renames. Returns whether there was one."""
    replaced = _replaced_folder(target)
    if target.exists() or not replaced.exists():
        return False
    os.rename(replaced, target)
    return True


def read(folder: Path) -> Manifest:
    """The manifest of a published checkpoint.

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
    """p of a checkpoint without a manifest, from the names of its files. 0 if there are none."""
    found = (re.match(r"zero_pp_rank_(\d+)_mp_rank_\d+_model_states\.pt$", path.name) for path in folder.glob("*.pt"))
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def complete_tags(folder: Path) -> list[str]:
    """Tags in ``folder`` with a manifest that can be read, oldest training step first."""
    found = []
    for path in folder.glob(f"*/{NAME}"):
        if is_remains(path.parent.name):
            continue
        try:
            found.append((read(path.parent).global_steps, path.parent.name))
        except (OSError, MicsCheckpointError):
            continue
    return [tag for _, tag in sorted(found)]


def damages(
    folder: Path, names: Iterable[str], records: Mapping[str, FileRecord], *, contents: bool = True
) -> list[str]:
    """What is wrong with these files, one sentence each. Files without a record need only exist.

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
        elif contents and checksum.digest(path)[1] != record.crc32:
            found.append(f"{path} has other content than was written (checksum)")
    return found
