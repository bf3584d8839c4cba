"""Whoever keeps only the last checkpoints deletes an old one as soon as a new one was saved.

In the background it is not saved yet, so the old one may be all there is. The HF Trainer and Lightning delete by
``shutil.rmtree`` and look for checkpoints by ``glob``, and Python tells of both before it does them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import manifest

_DELETES = "shutil.rmtree"
_EVENTS = (_DELETES, "glob.glob")


def watch(before: Callable[[str, bool], None]) -> None:
    """Call ``before`` when a folder with checkpoints of MiCS is about to be deleted or looked through: with the path,
    and whether it is deleted.

    For the rest of the process: such hooks cannot be removed.
    """

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
    try:
        return (folder / manifest.NAME).exists() or any(
            (inner / manifest.NAME).exists() for inner in folder.iterdir() if inner.is_dir()
        )
    except OSError:
        return False
