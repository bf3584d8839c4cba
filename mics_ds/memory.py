"""``python -m mics_ds.memory``: training states that jobs keep in this node's memory, and their removal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .checkpoint import memory
from .formatting import columns


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mics_ds.memory",
        description='What "mics_checkpoint": {"memory_every": ...} keeps in the memory of this node.',
    )
    parser.add_argument("--folder", default="/dev/shm", help="the memory_folder of the jobs (default: %(default)s)")
    parser.add_argument("--remove", nargs="*", metavar="NAME", help="remove these; without names, all of yours")
    asked = parser.parse_args(arguments)
    found = memory.regions(asked.folder)
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
        lines = (
            columns([["name", "memory", "steps", "last written"], *rows])
            if rows
            else ["nothing is kept in memory here"]
        )
        print("\n".join(lines))
        return 0
    unknown = sorted(set(asked.remove) - {region.path.name for region in found})
    if unknown:
        print(f"there is no {', '.join(unknown)} of yours in {asked.folder}", file=sys.stderr)
        return 1
    for region in found:
        if not asked.remove or region.path.name in asked.remove:
            memory.remove(region.path)
            print(f"removed {region.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
