"""Host memory that processes share, filled from a device beside its other work."""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import MicsCheckpointError
from .host_memory import host_memory_left
from .log import logger

_STEP, _MARGIN, _LEAST = 256 << 20, 64 << 20, 1 << 20


class Copying:
    """A copy that the device makes beside what it is given next."""

    def __init__(self, event: Any = None, sources: Sequence[torch.Tensor] = ()) -> None:
        self._event, self._sources = event, list(sources)

    def wait(self) -> None:
        """Have the host wait for the copy."""
        if self._event is not None:
            self._event.synchronize()
        self._sources.clear()


class SharedMemory:
    """Memory that two processes share. Every copy uses it again: mapping and pinning cost more than copying.

    Args:
        descriptor: of the memory, if another process has made it.
        path: a file in a file system in memory, made if it does not exist. By default the memory has no name, and goes
            away with the last process that has it.
    """

    stream: Any = None
    """Stream of all copies from the device."""

    def __init__(self, descriptor: int | None = None, path: Path | None = None) -> None:
        if path is not None:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self.descriptor = os.memfd_create("mics_ds", os.MFD_CLOEXEC) if descriptor is None else descriptor
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._pinned = False

    @property
    def nbytes(self) -> int:
        """Bytes that are mapped."""
        return self._bytes.numel()

    def reserve(self, nbytes: int) -> None:
        """Provide so much memory, pinned where there is an accelerator of CUDA's kind.

        Raises:
            MicsCheckpointError, OSError: there is not so much. What was there before still is.
        """
        size = os.fstat(self.descriptor).st_size
        wanted = -(-(nbytes + nbytes // 16) // _LEAST) * _LEAST if nbytes > size else size
        # In steps, because the other ranks of the node take their memory at the same time. An error now is better than
        # SIGBUS, or the end of the process, later.
        while size < wanted:
            step = min(_STEP, wanted - size)
            require_host_memory(step + _MARGIN, f"to stage states in, {wanted / 1e9:.2f} GB in all")
            os.posix_fallocate(self.descriptor, size, step)
            size += step
        self.map(nbytes)
        if not self._pinned and self.nbytes and torch.cuda.is_available():
            code = torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), self.nbytes, 0)
            self._pinned = int(code) == 0
            if not self._pinned:
                logger.warning("memory to stage states in could not be pinned (error %s); copies take longer", code)

    def map(self, nbytes: int) -> None:
        """Map all of it, unless ``nbytes`` are mapped already."""
        if nbytes > self.nbytes and os.fstat(self.descriptor).st_size:
            self.unmap()
            self._bytes = torch.frombuffer(mmap.mmap(self.descriptor, 0), dtype=torch.uint8)

    def unmap(self) -> None:
        """Let go of the mapping, as soon as no view of it is left."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
            self._pinned = False
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def close(self) -> None:
        self.unmap()
        os.close(self.descriptor)

    def view(self, start: int, nbytes: int) -> torch.Tensor:
        """Return a part of the memory itself, (nbytes,) uint8."""
        return self._bytes[start : start + nbytes]

    def buffer(self, start: int, nbytes: int) -> memoryview:
        """Return a part of the memory itself, for code that does not use torch."""
        return self.view(start, nbytes).numpy().data

    def storage(self, start: int, nbytes: int) -> torch.UntypedStorage:
        """Return a part of the memory itself, for ``torch.save``."""
        return self._bytes.untyped_storage()[start : start + nbytes] if nbytes else torch.UntypedStorage(0)

    def checksum(self, nbytes: int) -> int:
        """Return the CRC-32 of the first bytes."""
        return zlib.crc32(self.buffer(0, nbytes))

    def copy_in(self, parts: Sequence[tuple[int, torch.Tensor]], streams: Any) -> Copying:
        """Copy tensors to given places, from whatever device. Those from the host are there when this returns.

        Args:
            parts: where each begins, in bytes, and what is to be copied, 1-D uint8.
            streams: of the device, ``None`` for the CPU.
        """
        if streams is None:
            for start, part in parts:
                self.view(start, part.numel()).copy_(part)
            return Copying()
        if SharedMemory.stream is None:
            SharedMemory.stream = streams.Stream()
        side = SharedMemory.stream
        side.wait_stream(streams.current_stream())
        with streams.stream(side):
            for start, part in parts:
                self.view(start, part.numel()).copy_(part, non_blocking=True)
            event = streams.Event()
            event.record(side)
        return Copying(event, [part for _, part in parts])


def require_host_memory(nbytes: int, purpose: str) -> None:
    """Raise MicsCheckpointError unless there is so much host memory."""
    left, of = host_memory_left()
    if nbytes > left:
        raise MicsCheckpointError(
            f"{nbytes / 1e9:.2f} GB of host memory are needed {purpose}, and {left / 1e9:.2f} GB are left of {of}"
        )
