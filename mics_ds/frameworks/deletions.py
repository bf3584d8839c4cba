"""Frameworks that keep only the last checkpoints delete an old one as soon as a new one was saved.

An asynchronous save is not complete then, so the old one may be the newest there is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint import manifest
from ..checkpoint.background import Background
from ..errors import MicsCheckpointError
from ..log import logger


def may_delete(path: str | Path) -> bool:
    """Wait until a folder that is about to be deleted is not the newest complete checkpoint.

    Returns:
        ``False`` if it is to stay, because the save that was to replace it has failed. All ranks hear of that by
        the next save; the one that deletes goes on.
    """
    current = Background.current
    if current is None or not _is_newest(Path(path)):
        return True
    if current.is_busy:
        logger.info("%s is about to be deleted; waiting for the checkpoint that is being written", path)
        current.wait()
    if current.error:
        logger.warning("%s %s was not deleted.", current.error, path)
    return not current.error


def _is_newest(folder: Path) -> bool:
    """Return whether a folder has a complete checkpoint, and no newer complete one of its kind lies beside it.

    Names of one kind differ in their numbers only. Checkpoints of another kind are no substitute.
    """
    step = max(_steps(folder), default=-1)
    kind = re.sub(r"\d+", "", folder.name)
    beside = (
        other
        for other in (folder.parent.iterdir() if step >= 0 else ())
        if other.name != folder.name and re.sub(r"\d+", "", other.name) == kind
    )
    return step >= 0 and not any(newer > step for other in beside for newer in _steps(other))


def _steps(folder: Path) -> Iterator[int]:
    """Return the steps of the complete checkpoints in a folder, or of the one that it is; 0 for damaged ones."""
    try:
        described = [inner for inner in (folder, *folder.iterdir()) if (inner / manifest.NAME).is_file()]
    except OSError:
        return
    for inner in described:
        try:
            yield manifest.read(inner).global_steps
        except (OSError, MicsCheckpointError):
            yield 0
