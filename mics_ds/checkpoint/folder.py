"""A folder of checkpoints: tags and ``latest``, and how a checkpoint comes to be there, complete or not at all.

    DIR/.TAG.SAVE.partial/   being written by one save; never looked at by anybody who loads
    DIR/.TAG.lock            held while a save of that tag is under way, with the name of its job inside
    DIR/TAG/                 published by one rename, with the manifest inside
    DIR/.TAG.replaced/       an older checkpoint of the same tag, for the moment between two renames
    DIR/latest               the tag and nothing else, as DeepSpeed's own tools read it; replaced after everything else
    DIR/mics_latest.json     the same tag, with a checksum; absent while ``latest`` changes, and where others wrote it

Without the note, a damaged ``latest`` would often name another checkpoint that is good (``global_step10`` for
``global_step11``). Plain files: no ranks, no DeepSpeed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from contextlib import suppress
from pathlib import Path

import psutil

from ..errors import MicsCheckpointError, describe_error
from ..files import FileLock, sync_folder, write_text
from ..log import log_rank0, logger
from . import manifest
from .manifest import Manifest

LATEST = "latest"
NOTE = "mics_latest.json"
_READS = 5
_PATIENCE_S = 30.0
_SHOWN = 80
_LONGEST = 1024
_LONGEST_PART = 255  # bytes, on all file systems of Linux
_PARTIAL, _REPLACED, _LOCK = ".partial", ".replaced", ".lock"
_OURS = re.compile(r"_states\.pt$|^mics_client_state_rank_\d+\.pt$|^weights$")
_REMAINS = re.compile(r"\.(?P<tag>.+?)(\.[0-9a-f]{8,})?(\.new)?\.(partial|lock)")


# --------------------------------------------------------------------------------------------------
# Tags and latest


def check_tag(tag: str) -> None:
    """Raise MicsCheckpointError unless a tag is the name of something inside the folder of checkpoints."""
    parts = tag.split("/")
    problems = {
        "it is too long": len(tag) > _LONGEST,
        "it names no folder": all(part in ("", ".") for part in parts),
        "it is an absolute path": tag.startswith("/"),
        "'..' leaves the folder of the checkpoints": ".." in parts,
        "no file name has a NUL character": "\0" in tag,
        "it has half of a surrogate pair, which UTF-8 cannot express": tag != tag.encode(errors="ignore").decode(),
        "it is too long for a file name": max(len(part.encode(errors="replace")) for part in parts) > _LONGEST_PART,
        f"{LATEST!r} keeps no white space around it": tag != tag.strip(),
        "such names are those of checkpoints that are not complete": is_remains(parts[-1]),
    }
    for problem in (words for words, is_so in problems.items() if is_so):
        shown = ascii(tag) if len(tag) <= _SHOWN else f"{tag[:_SHOWN]!a}..."
        raise MicsCheckpointError(
            f"{shown} cannot be the tag of a checkpoint: {problem}. A tag is the name of a folder inside the one that "
            f"checkpoints are kept in, global_step100 say"
        )


def read_latest(folder: Path) -> str | None:
    """Read the tag that ``latest`` names; ``None`` if nothing has been saved yet.

    Raises:
        MicsCheckpointError: ``latest`` is gone or damaged, or is not what MiCS wrote.
    """
    path = folder / LATEST
    found = _content(path)
    for _ in range(_READS):
        noted = _noted(folder)
        before, found = found, _content(path)
        if found == before:
            return _tag_in(folder, found, noted)
    raise MicsCheckpointError(f"{path} changed {_READS} times while it was read. Load a checkpoint by its tag")


def _tag_in(folder: Path, found: bytes | None, noted: str | None) -> str | None:
    path, note = folder / LATEST, folder / NOTE
    remedy = f"Load a checkpoint by its tag, or write its tag into {path} and remove {note}"
    wrote = "" if noted is None else f", where MiCS wrote {noted!r}"
    if found is None and noted is None:
        return None
    if found is None:
        raise MicsCheckpointError(f"{path} is missing{wrote}. {remedy}")
    try:
        tag = found.decode().strip()
        check_tag(tag)
    except (UnicodeDecodeError, MicsCheckpointError) as error:
        raise MicsCheckpointError(f"{path} is damaged{wrote} ({error}). {remedy}") from error
    if noted is None or tag == noted:
        return tag
    if (folder / tag).is_dir() and not (folder / tag / manifest.NAME).exists():
        # Saved by a job that knows nothing of MiCS and of the note. If MiCS wrote it after all, its files tell.
        log_rank0(f"{path} names {tag}, which has no manifest; taken for one that stock ZeRO-3 saved after {noted}")
        return tag
    state = "" if (folder / tag).is_dir() else ", which does not exist"
    raise MicsCheckpointError(f"{path} is damaged, or was changed by hand: it names {tag!r}{state}{wrote}. {remedy}")


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _noted(folder: Path) -> str | None:
    """Return what MiCS wrote into ``latest``, or ``None`` if that is not known. A damaged note says nothing."""
    path = folder / NOTE
    try:
        note = json.loads(path.read_bytes())
        tag = note["tag"]
        if note == _note_on(tag):
            return tag
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        pass  # said below, as for a note that is merely wrong
    log_rank0(f"{path} is damaged; {LATEST} is used without it. It is written anew by the next save")
    return None


def _note_on(tag: str) -> dict[str, str | int]:
    return {"tag": tag, "crc32": zlib.crc32(tag.encode())}


def write_latest(folder: Path, tag: str) -> None:
    """Name a published checkpoint in ``latest``, which at any moment has its old or its new content."""
    lock = FileLock(folder / f".{LATEST}{_LOCK}", (f"another job is updating {folder / LATEST}", "Save again"))
    lock.take(patience_s=_PATIENCE_S)  # another job may be saving another tag, and the two files belong together
    try:
        forget_note(folder)
        write_text(folder / LATEST, tag)
        write_text(folder / NOTE, json.dumps(_note_on(tag)) + "\n")
    finally:
        lock.release()


def forget_note(folder: Path) -> None:
    """Remove the note beside ``latest``, which another writer of ``latest`` makes obsolete."""
    (folder / NOTE).unlink(missing_ok=True)


def marker(tag: str, save: str) -> str:
    """Return what identifies the save that ``latest`` names: another save of the same tag has another marker."""
    return f"{tag} {save}"


def newest(folder: Path) -> tuple[str, int]:
    """Return the marker and the step of the checkpoint that ``latest`` names; an empty marker and -1 if there is none.

    Raises:
        MicsCheckpointError, OSError: it cannot be read.
    """
    tag = read_latest(folder)
    if tag is None:
        return "", -1
    try:
        found = manifest.read(folder / tag)
    except FileNotFoundError:
        return marker(tag, ""), -1
    return marker(tag, found.save or f"of {found.global_steps}"), found.global_steps


def complete_tags(folder: Path) -> list[str]:
    """Tags in ``folder`` with a manifest that can be read, oldest training step first."""
    found = []
    for path in (path.parent for path in folder.glob(f"*/{manifest.NAME}")):
        with suppress(OSError, MicsCheckpointError):
            if not is_remains(path.name):
                found.append((manifest.read(path).global_steps, path.name))
    return [tag for _, tag in sorted(found)]


# --------------------------------------------------------------------------------------------------
# One save on its way into the folder


def is_remains(name: str) -> bool:
    """Return whether a name is not that of a checkpoint, but of one on its way to become one or to be removed."""
    return name.startswith(".") and name.endswith((_PARTIAL, _REPLACED, _LOCK))


class Staging:
    """The folder that one save writes to, and the lock on its tag, which the rank that publishes takes.

    Args:
        target: where the checkpoint will be.
        save: the name of the save, which no other has.
    """

    def __init__(self, target: Path, save: str) -> None:
        self.target, self.save = target, save
        self.folder = target.with_name(f".{target.name}.{save}{_PARTIAL}")
        self._lock = _lock_on(target)
        self._new_folders: list[Path] = []
        """Made on the way, innermost first."""

    def begin(self) -> None:
        """Take the lock, remove what dead saves have left, and make an empty folder, by a rename as publishing does.

        Raises:
            MicsCheckpointError: another job is saving the same tag, or folders cannot be renamed there.
            OSError: the disk refused.
        """
        self._new_folders = [folder for folder in self.folder.parents if not folder.exists()]
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._lock.take()
        _remove_what_died(self.folder.parent, self.target)
        made = self.folder.with_name(self.folder.name.replace(_PARTIAL, f".new{_PARTIAL}"))
        made.mkdir()
        (made / "trial").touch()  # some mounts rename empty folders only
        try:
            os.rename(made, self.folder)
        except OSError as error:
            discard(made)
            raise MicsCheckpointError(
                f"folders cannot be renamed in {made.parent} ({_file_system(made.parent)}: {error.strerror}), and a "
                f"checkpoint is published by a rename. Save to a file system that can, and copy checkpoints to an "
                f"object store from there"
            ) from error
        (self.folder / "trial").unlink()

    def abandon(self) -> None:
        """Remove what was made for nothing, as far as that is possible."""
        discard(self.folder)
        self._lock.release()
        with suppress(OSError):  # there is something else in it
            for folder in self._new_folders:
                folder.rmdir()

    def end(self) -> None:
        """Let others save that tag. The folder was published, or is gone."""
        self._lock.release()


def _lock_on(target: Path) -> FileLock:
    busy = f"another job is saving {target}", "Wait until it has ended, or save elsewhere"
    return FileLock(target.with_name(f".{target.name}{_LOCK}"), busy)


def interrupted_saves(folder: Path) -> list[Path]:
    """Folders of saves that have not ended, or never will."""
    return sorted(folder.glob(f".*{_PARTIAL}"))


def _remove_what_died(folder: Path, own: Path) -> None:
    """Remove what interrupted saves have left, each unless its job is alive."""
    for path in [*interrupted_saves(folder), *folder.glob(f".*{_LOCK}")]:
        match = _REMAINS.fullmatch(path.name)
        if match is None:
            continue
        lock = _lock_on(folder / match["tag"])
        with suppress(MicsCheckpointError, OSError):
            if (match["tag"] == own.name or lock.take()) and path.name.endswith(_PARTIAL):
                log_rank0(f"an earlier save of tag {match['tag']} was interrupted; {path} is removed")
                discard(path)
        lock.release()


def discard(folder: Path) -> None:
    """Remove what will not become a checkpoint, as far as that is possible."""
    shutil.rmtree(folder, ignore_errors=True)


def _file_system(folder: Path) -> str:
    mounts = [item for item in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(item.mountpoint)]
    return max(mounts, key=lambda item: len(item.mountpoint)).fstype if mounts else "unknown file system"


def publish(staging: Path, target: Path, described: Manifest) -> None:
    """Turn a folder with all its files into a checkpoint. Other files in an older ``target`` move into it.

    Raises:
        MicsCheckpointError: files are missing in ``staging`` or have other sizes than their writers saw.
        OSError: the disk refused. Whatever was there before is still there.
    """
    absent = [
        name
        for name, record in described.files.items()
        if not (staging / name).is_file() or (staging / name).stat().st_size != record.bytes
    ]
    if absent:
        writers = sorted({described.files[name].writer for name in absent})
        raise MicsCheckpointError(
            f"{', '.join(sorted(absent)[:4])}{' and more' if len(absent) > 4 else ''}, written by ranks {writers}, "
            f"cannot be seen in {staging} by the rank that publishes it. The folder has to be on storage that all "
            f'nodes share; for folders local to each node set "checkpoint": {{"use_node_local_storage": true}}.'
        )
    write_text(staging / manifest.NAME, described.dumps())
    sync_folder(staging)
    replaced = _replaced_folder(target)
    strangers: list[str] = []
    if target.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        strangers = _strangers(target)
        os.rename(target, replaced)
    try:
        os.rename(staging, target)
    except Exception:
        recover(target)
        raise
    try:
        sync_folder(target.parent)
        for name in strangers:
            if not (target / name).exists():
                os.rename(replaced / name, target / name)
        if replaced.exists():
            shutil.rmtree(replaced)
    except Exception as error:  # of whatever kind: there is nothing to take back
        logger.warning("%s is complete; cleaning up failed: %s", target, describe_error(error))


def _replaced_folder(target: Path) -> Path:
    return target.with_name(f".{target.name}{_REPLACED}")


def _strangers(folder: Path) -> list[str]:
    """Files in a checkpoint's folder that were not part of the checkpoint."""
    own = {manifest.NAME}
    with suppress(FileNotFoundError, MicsCheckpointError):
        own |= manifest.read(folder).files.keys()
    return [entry.name for entry in folder.iterdir() if entry.name not in own and not _OURS.search(entry.name)]


def recover(target: Path) -> bool:
    """Undo a publication that was killed between its two renames. Returns whether there was one."""
    replaced = _replaced_folder(target)
    if target.exists() or not replaced.exists():
        return False
    os.rename(replaced, target)
    return True
