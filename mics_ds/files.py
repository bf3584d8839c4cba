"""Files that are replaced as a whole, whatever ends the process meanwhile."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


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
