"""Which checkpoint is meant: tags that are names in a folder, and ``latest``, with a note beside it to check it by.

    DIR/latest             the tag and nothing else, as DeepSpeed's own tools read it
    DIR/mics_latest.json   the same tag, with a checksum; absent while ``latest`` changes, and where others wrote it

A damaged ``latest`` would otherwise often name another checkpoint that is good (``global_step10`` for
``global_step11``), and nobody would notice.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from ..errors import MicsCheckpointError
from ..log import log_rank0
from . import manifest

NOTE = "mics_latest.json"
_READS = 5
_SHOWN = 80
_LONGEST = 1024
_LONGEST_PART = 255  # bytes, on all file systems of Linux


def check_tag(tag: str) -> None:
    """See to it that a tag is the name of something inside the folder of checkpoints.

    Raises:
        MicsCheckpointError: it is not.
    """
    parts = tag.split("/")
    if len(tag) > _LONGEST:
        problem = "it is too long"
    elif all(part in ("", ".") for part in parts):
        problem = "it names no folder"
    elif tag.startswith("/"):
        problem = "it is an absolute path"
    elif ".." in parts:
        problem = "'..' leaves the folder of the checkpoints"
    elif "\0" in tag:
        problem = "no file name has a NUL character"
    elif not _utf8(tag):
        problem = "it has half of a surrogate pair, which UTF-8 cannot express"
    elif max(len(part.encode()) for part in parts) > _LONGEST_PART:
        problem = "it is too long for a file name"
    elif tag != tag.strip():
        problem = f"{manifest.LATEST!r} keeps no white space around it"
    elif manifest.is_remains(Path(tag).name):
        problem = "such names are those of checkpoints that are not complete"
    else:
        return
    shown = ascii(tag) if len(tag) <= _SHOWN else f"{tag[:_SHOWN]!a}..."
    raise MicsCheckpointError(
        f"{shown} cannot be the tag of a checkpoint: {problem}. A tag is the name of a folder inside the one that "
        f"checkpoints are kept in, global_step100 say"
    )


def _utf8(tag: str) -> bool:
    try:
        tag.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_latest(folder: Path) -> str | None:
    """The tag that ``latest`` names; ``None`` if nothing has been saved yet.

    Raises:
        MicsCheckpointError: ``latest`` is gone or damaged, or is not what MiCS wrote.
        OSError: it cannot be read.
    """
    path = folder / manifest.LATEST
    found = _content(path)
    for _ in range(_READS):
        noted = _noted(folder)
        before, found = found, _content(path)
        if found == before:
            return _tag_in(folder, found, noted)
    raise MicsCheckpointError(f"{path} changed {_READS} times while it was read. Load a checkpoint by its tag")


def _tag_in(folder: Path, found: bytes | None, noted: str | None) -> str | None:
    path, note = folder / manifest.LATEST, folder / NOTE
    remedy = f"Load a checkpoint by its tag, or write its tag into {path} and remove {note}"
    wrote = "" if noted is None else f", where MiCS wrote {noted!r}"
    if found is None:
        if noted is None:
            return None
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
    """What MiCS wrote into ``latest``, if that is known. A damaged note says nothing."""
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
    log_rank0(f"{path} is damaged; {manifest.LATEST} is used without it. It is written anew by the next save")
    return None


def _note_on(tag: str) -> dict[str, str | int]:
    return {"tag": tag, "crc32": zlib.crc32(tag.encode())}


def write_latest(folder: Path, tag: str) -> None:
    """Name a published checkpoint in ``latest``, which at any moment has its old or its new content."""
    forget_note(folder)
    manifest.write_text(folder / manifest.LATEST, tag)
    manifest.write_text(folder / NOTE, json.dumps(_note_on(tag)) + "\n")


def forget_note(folder: Path) -> None:
    """Somebody writes ``latest``: what it should say is not known from now on."""
    (folder / NOTE).unlink(missing_ok=True)
