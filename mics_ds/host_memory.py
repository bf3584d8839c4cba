"""Host memory that this process can still take, in a container too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil


def host_memory_left() -> tuple[int, str]:
    """Bytes of host memory that can be taken, and what limits them: the machine, or a cgroup of this process."""
    found = [(psutil.virtual_memory().available, "this machine's memory")]
    for folder in _cgroups():
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with suppress(OSError, ValueError):
                most, taken = int((folder / limit).read_text()), int((folder / used).read_text())
                # What files of the disk take up is given back when it is asked for.
                lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
                cached = next((int(value) for name, value in lines if name == "inactive_file"), 0)
                found.append((most - taken + cached, f"{most / 1e9:.2f} GB, the limit of its cgroup"))
    left, of = min(found)
    return max(left, 0), of


def _cgroups() -> Iterator[Path]:
    """Folders of the memory cgroups that this process is in, of either version."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "memory" in controllers.split(","):
                root = Path("/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup")
                inner = root / path.lstrip("/")
                yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(root))
