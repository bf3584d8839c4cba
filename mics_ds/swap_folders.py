"""A folder of its own for whatever a process swaps to a disk.

DeepSpeed names swap files by rank and parameter, below the ``nvme_path`` of the JSON. So two jobs on one node that are
given the same path write over each other's files, and whoever starts deletes what the other has. Here a process gets a
new folder below that path, which goes when the process does. What a killed process has left there is removed by the
next one: a folder belongs to a living process exactly as long as its lock is held.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from itertools import count
from pathlib import Path

_PREFIX, _LOCK = "mics-", "lock"

_claimed: dict[tuple[int, str], Path] = {}
"""By process, as a fork must not use its parent's, and path."""
_numbers = count()


def new_folder(path: str | os.PathLike) -> Path:
    """A new, empty folder below ``path``, which nobody else uses.

    Raises:
        OSError: it cannot be made there.
    """
    key = (os.getpid(), os.path.realpath(path))
    if key not in _claimed:
        os.makedirs(path, exist_ok=True)
        _remove_orphans(Path(path))
        _claimed[key] = _claim(Path(path))
    folder = _claimed[key] / str(next(_numbers))
    folder.mkdir()
    return folder


def _claim(path: Path) -> Path:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=path))
        # Never closed: the lock lasts as long as the process and its forks.
        lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            here = os.stat(folder / _LOCK)
        except FileNotFoundError:  # taken for an orphan a moment ago
            os.close(lock)
            continue
        if os.path.samestat(here, os.fstat(lock)):
            atexit.register(_remove, folder, os.getpid())
            return folder
        os.close(lock)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a fork inherits what its parent does at exit
        shutil.rmtree(folder, ignore_errors=True)


def _remove_orphans(path: Path) -> None:
    for folder in path.glob(_PREFIX + "*"):
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR)
        except OSError:  # just being made, or somebody else's
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass  # its process lives
        finally:
            os.close(lock)
