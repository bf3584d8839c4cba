"""What makes a checkpoint folder complete: a manifest, and the order in which things reach the disk.

    DIR/.TAG.partial/      being written; never looked at by anybody who loads
    DIR/TAG/               published by one rename, with the manifest inside
    DIR/.TAG.replaced/     an older checkpoint of the same tag, for the moment between two renames
    DIR/latest             names the tag; replaced by a rename, after everything else

A folder with a manifest was therefore complete once, and the sizes and checksums in the manifest tell
whether it still is. Plain files and JSON: no torch, no ranks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import MicsCheckpointError

NAME = "mics_manifest.json"
LATEST = "latest"
FORMAT = 1
_CHUNK = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """One file, as it was when it had been written."""

    bytes: int
    crc32: int
    """Of the whole content. Finds every change of up to 32 neighbouring bits, at several GB/s."""
    writer: int
    """Global rank."""


@dataclass(frozen=True)
class Manifest:
    """What a published checkpoint consists of, and the job that wrote it."""

    tag: str
    shards: int
    """p: number of partitions of the model states."""
    replicas: int
    """r: number of copies of the model states in the job."""
    ranks: int
    """Data-parallel size n = p · r."""
    ranks_per_node: tuple[int, ...]
    """Data-parallel ranks on each node of the job, in order of node."""
    model_parallel: int
    global_steps: int
    node_local: bool
    """Whether this folder has the shards of one node only."""
    versions: dict[str, str]
    files: dict[str, FileRecord]
    """By name, relative to the folder."""

    @property
    def total_bytes(self) -> int:
        return sum(record.bytes for record in self.files.values())

    def dumps(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def loads(cls, text: str) -> Manifest:
        """Raises ValueError, KeyError or TypeError for anything but what :meth:`dumps` returns."""
        data: dict[str, Any] = json.loads(text)
        if data.pop("format") != FORMAT:
            raise ValueError("unknown format")
        files = {name: FileRecord(**record) for name, record in data.pop("files").items()}
        return cls(**{**data, "ranks_per_node": tuple(data["ranks_per_node"])}, files=files)


def staging_folder(target: Path) -> Path:
    """Where the checkpoint that will be ``target`` is written."""
    return target.with_name(f".{target.name}.partial")


def _replaced_folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def interrupted_saves(folder: Path) -> list[Path]:
    """Remains of saves that never ended."""
    return sorted(folder.glob(".*.partial"))


def seal(path: Path, writer: int) -> FileRecord:
    """Force a written file to the disk and describe it.

    Reads it back, so that what is described is what others will read.
    """
    _sync(path)
    size, checksum = _digest(path)
    return FileRecord(size, checksum, writer)


def _digest(path: Path) -> tuple[int, int]:
    size = checksum = 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return size, checksum


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
    with open(beside, "w") as file:
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
    os.rename(staging, target)
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
    return [entry.name for entry in folder.iterdir() if entry.name not in own and not entry.name.endswith("_states.pt")]


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
    text = (folder / NAME).read_text()
    try:
        return Manifest.loads(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MicsCheckpointError(
            f"{folder / NAME} is damaged or from a newer mics_ds ({error!r}). Restore it, or load another checkpoint; "
            f"without that file this one can be loaded, but nothing is checked."
        ) from error


def count_shards(folder: Path) -> int:
    """p of a checkpoint without a manifest, from the names of its files. 0 if there are none."""
    found = (re.match(r"zero_pp_rank_(\d+)_mp_rank_\d+_model_states\.pt$", path.name) for path in folder.glob("*.pt"))
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def complete_tags(folder: Path) -> list[str]:
    """Tags in ``folder`` with a manifest that can be read, oldest training step first."""
    found = []
    for path in folder.glob(f"*/{NAME}"):
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
        elif contents and _digest(path)[1] != record.crc32:
            found.append(f"{path} has other content than was written (checksum)")
    return found
