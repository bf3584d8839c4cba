"""Whoever keeps only the last checkpoints deletes an old one as soon as a new one was saved.

In the background it is not saved yet, so the old one may be the newest there is. The HF Trainer and Lightning delete by
``shutil.rmtree`` and look for checkpoints by ``glob``, and Python tells of both before it does them.
"""

from __future__ import annotations

import functools
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import MicsCheckpointError
from ..log import logger
from . import manifest

_DELETES = "shutil.rmtree"
_EVENTS = (_DELETES, "glob.glob")


class KeptError(MicsCheckpointError):
    """A folder is not deleted, and this rank, which alone deletes, goes on: all ranks are told together, by the next
    save. ``shutil.rmtree`` logs it and returns; it reaches those only who have imported the function earlier."""


def watch(before: Callable[[str, bool], None]) -> None:
    """Call ``before`` when a folder with checkpoints of MiCS is about to be looked through, or to be deleted while no
    newer one is complete: with the path, and whether it is deleted. What it raises, who deletes gets to see, but for
    :class:`KeptError`.

    For the rest of the process: such hooks cannot be removed.
    """
    original = shutil.rmtree

    @functools.wraps(original)
    def rmtree(*args: Any, **kwargs: Any) -> None:
        try:
            original(*args, **kwargs)
        except KeptError as kept:
            logger.warning("%s", kept)

    shutil.rmtree = rmtree  # type: ignore[assignment]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS and arguments and isinstance(arguments[0], (str, Path)) and _concerns(event, arguments[0]):
            before(str(arguments[0]), event == _DELETES)

    sys.addaudithook(hook)


def _concerns(event: str, path: str | Path) -> bool:
    if event == "glob.glob":
        return "global_step" in str(path)
    folder = Path(path)
    if manifest.is_remains(folder.name):
        return False  # our own cleaning up
    step = max(_steps(folder), default=-1)
    return step >= 0 and not _has_successor(folder, step)


def _steps(folder: Path) -> Iterator[int]:
    """Of complete checkpoints in a folder, or of the one that it is. Of what cannot be understood, 0."""
    try:
        described = [inner for inner in (folder, *folder.iterdir()) if (inner / manifest.NAME).is_file()]
    except OSError:
        return
    for inner in described:
        try:
            yield manifest.read(inner).global_steps
        except (OSError, MicsCheckpointError):
            yield 0


def _has_successor(folder: Path, step: int) -> bool:
    """Whether a complete checkpoint that is newer stays beside this one, with a name that is the same but for numbers:
    checkpoints of something else in the same place are no substitute."""
    kind = re.sub(r"\d+", "", folder.name)
    beside = (
        other
        for other in folder.parent.iterdir()
        if other.name != folder.name and re.sub(r"\d+", "", other.name) == kind
    )
    return any(newer > step for other in beside for newer in _steps(other))
