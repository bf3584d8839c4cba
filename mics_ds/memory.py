"""``python -m mics_ds.memory``: training states that jobs keep in this node's memory, and their removal."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .checkpoint.copies import PREFIX, copies
from .checkpoint.folder import discard
from .formatting import columns


class Region(NamedTuple):
    """What one job keeps on this node."""

    path: Path
    nbytes: int
    steps: tuple[int, ...]
    """Of copies that are complete."""
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mics_ds.memory",
        description='What "mics_checkpoint": {"memory_every": ...} keeps in the memory of this node.',
    )
    parser.add_argument("--folder", default="/dev/shm", help="the memory_folder of the jobs (default: %(default)s)")
    parser.add_argument("--remove", nargs="*", metavar="NAME", help="remove these; without names, all of yours")
    asked = parser.parse_args(arguments)
    found = regions(asked.folder)
    if asked.remove is None:
        rows = [
            [
                region.path.name,
                f"{region.nbytes / 1e6:.1f} MB",
                ", ".join(map(str, region.steps)) or "none complete",
                f"{region.age_s / 60:.0f} min ago",
            ]
            for region in found
        ]
        lines = columns([["name", "memory", "steps", "last written"], *rows])
        print("\n".join(lines) if rows else "nothing is kept in memory here")
        return 0
    unknown = sorted(set(asked.remove) - {region.path.name for region in found})
    if unknown:
        print(f"there is no {', '.join(unknown)} of yours in {asked.folder}", file=sys.stderr)
        return 1
    for region in found:
        if not asked.remove or region.path.name in asked.remove:
            discard(region.path)
            print(f"removed {region.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
