"""Facts about one node, read from its file system and environment."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

AMAZON = "0x1d0f"
"""PCI vendor of EFA devices."""
_PACKAGES = {
    "mics_ds": ("mics-ds",),
    "deepspeed": ("deepspeed",),
    "torch": ("torch",),
    "nccl": ("nvidia-nccl-cu12", "nvidia-nccl-cu13", "nvidia-nccl-cu11"),
}
_OFI_FOLDERS = ("opt/amazon/ofi-nccl", "opt/aws-ofi-nccl", "opt/amazon/aws-ofi-nccl")
_UNSYNCHRONISED = 5  # TIME_ERROR of adjtimex(2)


class Finding(NamedTuple):
    """Something that would hinder a job."""

    topic: str
    expected: str
    found: str
    remedy: str


class Fabric(NamedTuple):
    """A device of EFA or InfiniBand."""

    name: str
    is_efa: bool
    active: bool
    """Whether one of its ports is."""


def version_of(text: str) -> tuple[int, ...]:
    """Return the numbers at the start of a version."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found.group().split("."))) if found else ()


def _clock_is_synchronised() -> bool | None:
    """Ask the kernel; ``None`` where it does not say."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        status = libc.adjtimex(ctypes.create_string_buffer(512))  # zeros: read and change nothing
    except (OSError, AttributeError):
        return None
    return None if status < 0 else status != _UNSYNCHRONISED


def _installed() -> dict[str, str]:
    found: dict[str, str] = {}
    for name, packages in _PACKAGES.items():
        for package in packages:
            try:
                found.setdefault(name, metadata.version(package))
            except metadata.PackageNotFoundError:
                continue
    return found


@dataclass(frozen=True)
class Node:
    """One machine. Tests give another root and environment."""

    environ: Mapping[str, str]
    root: Path = Path("/")
    hostname: str = "localhost"
    open_files: int = resource.RLIM_INFINITY
    """Soft limit of file descriptors."""
    locked_memory: int = resource.RLIM_INFINITY
    """Soft limit of locked memory, in bytes."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Versions of what is installed."""
    size_of: Callable[[Path], int] = lambda path: shutil.disk_usage(path).total
    """Bytes of the file system that holds a folder."""
    clock_is_synchronised: bool | None = None

    @classmethod
    def here(cls) -> Node:
        """Describe this machine."""
        return cls(
            environ=dict(os.environ),
            hostname=socket.gethostname(),
            open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
            packages=_installed(),
            clock_is_synchronised=_clock_is_synchronised(),
        )

    def path(self, absolute: str | Path) -> Path:
        """Return where an absolute path is below the root."""
        return self.root / str(absolute).lstrip("/")

    def read(self, absolute: str) -> str:
        """Return the text of a file, empty if there is none."""
        try:
            return self.path(absolute).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return ""

    @cached_property
    def gpus(self) -> int:
        """Number of NVIDIA GPUs that the environment lets a process see."""
        count = sum(bool(re.fullmatch(r"nvidia\d+", name)) for name in self._names("/dev"))
        visible = self.environ.get("CUDA_VISIBLE_DEVICES")
        return count if visible is None else min(count, len([word for word in visible.split(",") if word.strip()]))

    @cached_property
    def interfaces(self) -> tuple[str, ...]:
        """Names of network interfaces."""
        return self._names("/sys/class/net")

    @cached_property
    def fabrics(self) -> tuple[Fabric, ...]:
        """Devices of EFA and InfiniBand."""
        found = []
        for name in self._names("/sys/class/infiniband"):
            folder = f"/sys/class/infiniband/{name}"
            ports = [self.read(f"{folder}/ports/{port}/state") for port in self._names(f"{folder}/ports")]
            is_efa = self.read(f"{folder}/device/vendor") == AMAZON
            found.append(Fabric(name, is_efa, any("ACTIVE" in state for state in ports)))
        return tuple(found)

    @property
    def has_efa(self) -> bool:
        return any(item.is_efa for item in self.fabrics)

    @cached_property
    def ofi_plugin(self) -> str | None:
        """Version of aws-ofi-nccl, empty if the plugin is there without one, ``None`` if it is not."""
        recorded = re.search(r"(?:libnccl-ofi|aws-ofi-nccl)\S*?[ :_-]+v?(\d[\d.]*)", self.read(_INSTALLED_BY_EFA))
        if recorded:
            return recorded.group(1)
        searched = [*_OFI_FOLDERS, *self.environ.get("LD_LIBRARY_PATH", "").split(":")]
        for folder in filter(None, searched):
            if next(self.path(folder).glob("**/libnccl-net*.so*"), None):
                return ""
        return None

    def _names(self, folder: str) -> tuple[str, ...]:
        try:
            return tuple(sorted(item.name for item in self.path(folder).iterdir()))
        except OSError:
            return ()


_INSTALLED_BY_EFA = "/opt/amazon/efa_installed_packages"
