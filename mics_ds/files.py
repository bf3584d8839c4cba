"""Files that are replaced as a whole, and locks on files, whatever ends the process meanwhile."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path

from .errors import MicsCheckpointError
from .log import log_rank0

_CANNOT_LOCK = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
_POLL_S = 0.02


def write_text(path: Path, text: str) -> None:
    """Replace a file by one with this text; at any moment it has its old or its new content."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial-file")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush a folder to the disk, where its file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


class FileLock:
    """A POSIX lock on a file: it ends with the process that holds it, whatever that has forked.

    Args:
        busy: what to say if another process holds it, before and after the holder is named.
    """

    def __init__(self, path: Path, busy: tuple[str, str]) -> None:
        self._path, self._busy = path, busy
        self._descriptor: int | None = None

    @property
    def is_lost(self) -> bool:
        """Return whether its file was removed."""
        return self._descriptor is None or not os.fstat(self._descriptor).st_nlink

    def take(self, patience_s: float = 0.0) -> bool:
        """Take the lock, or return ``False`` if this file system has none.

        Raises:
            MicsCheckpointError: another process holds it, after so much patience.
        """
        deadline = time.monotonic() + patience_s
        while self.is_lost:  # also if its last holder has removed it meanwhile
            self._close()
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace")
                os.close(descriptor)
                if error.errno in _CANNOT_LOCK:
                    log_rank0(f"{self._path.parent} has no locks: see to it that no two jobs save the same tag there")
                    return False
                if time.monotonic() < deadline:
                    time.sleep(_POLL_S)
                    continue
                before, after = self._busy
                raise MicsCheckpointError(f"{before}, {holder}. {after}") from error
            self._descriptor = descriptor
        assert self._descriptor is not None, "taken"
        text = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)
        return True

    def release(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                self._path.unlink()
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
