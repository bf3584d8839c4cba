"""Training states that jobs keep in this node's memory, which ``mics-ds memory`` lists and removes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

from .checkpoint.copies import PREFIX, copies


class Region(NamedTuple):
    """Memory that one job keeps on this node."""

    path: Path
    nbytes: int
    steps: tuple[int, ...]
    """Steps of copies that are complete."""
    age_s: float
    """Since it was last written."""


def regions(folder: str | os.PathLike) -> list[Region]:
    """Find all regions of this user.

    Args:
        folder: the ``memory_folder`` of the jobs.
    """
    found = []
    for path in sorted(Path(folder).glob(f"{PREFIX}-{os.getuid()}-*")):
        files = [file for file in path.rglob("*") if file.is_file()]
        newest = max((file.stat().st_mtime for file in files), default=path.stat().st_mtime)
        steps = sorted({copy.description.step for copy in copies(path)})
        nbytes = sum(file.stat().st_blocks * 512 for file in files)
        found.append(Region(path, nbytes, tuple(steps), time.time() - newest))
    return found


if __name__ == "__main__":
    from .cli.old_names import run

    run("python -m mics_ds.memory", "memory")
