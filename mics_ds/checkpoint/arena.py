"""Host memory that two processes share: the trainer copies states into it, its writer process reads them.

It has no name, so it goes away with the last process that has it. It only grows, and is used again by every save.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterable

import torch

from ..log import logger

ALIGNMENT = 64
"""Bytes. Every storage begins at a multiple, so that it can be viewed in any dtype."""


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Arena:
    """Shared memory, mapped in this process as far as :meth:`reserve` or :meth:`map` asked for.

    Args:
        descriptor: of the memory, made by another process; by default new memory is made.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = _make() if descriptor is None else descriptor
        self.nbytes = 0
        self._map: mmap.mmap | None = None
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._pinned = False

    def reserve(self, nbytes: int) -> None:
        """See to it that there is so much, pinned where there is an accelerator of CUDA's kind.

        Raises:
            OSError: there is not. What was there before still is.
        """
        if nbytes > os.fstat(self.descriptor).st_size:
            os.posix_fallocate(self.descriptor, 0, nbytes)  # an error now is better than SIGBUS later
        self.map(nbytes)
        if not self._pinned and self.nbytes and torch.cuda.is_available():
            self._pinned = _register(self._bytes)

    def map(self, nbytes: int) -> None:
        """Map what there is, up to at least ``nbytes``."""
        if nbytes <= self.nbytes:
            return
        self.unmap()
        size = os.fstat(self.descriptor).st_size
        self._map = mmap.mmap(self.descriptor, size)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self.nbytes = size

    def unmap(self) -> None:
        """Let go of the mapping, as soon as nobody has a view of it any more."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
            self._pinned = False
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._map = None  # unmapped with the last view of it
        self.nbytes = 0

    def close(self) -> None:
        self.unmap()
        os.close(self.descriptor)

    def view(self, start: int, nbytes: int) -> torch.Tensor:
        """(nbytes,) uint8: a part of the memory itself."""
        return self._bytes[start : start + nbytes]

    def buffer(self, start: int, nbytes: int) -> memoryview:
        """The same, for whoever knows nothing of torch."""
        return memoryview(b"" if self._map is None else self._map)[start : start + nbytes]

    def storage(self, start: int, nbytes: int) -> torch.UntypedStorage:
        """A part of the memory itself, as what ``torch.save`` writes."""
        if not nbytes:
            return torch.UntypedStorage(0)
        return self._bytes.untyped_storage()[start : start + nbytes]

    def copy_in(self, parts: Iterable[tuple[int, torch.Tensor]], finish: Callable[[], object]) -> None:
        """Copy tensors to given places, from whatever device. They are there when this returns.

        Args:
            parts: where each begins, in bytes, and the tensor, contiguous, of any dtype.
            finish: waits for what the host has given the device to do; the next step overwrites what is copied.
        """
        for start, part in parts:
            source = part.detach().reshape(-1).view(torch.uint8)
            self.view(start, source.numel()).copy_(source, non_blocking=self._pinned)
        finish()


def _make() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("mics_ds", os.MFD_CLOEXEC)
    file = tempfile.TemporaryFile()
    try:
        return os.dup(file.fileno())
    finally:
        file.close()


def _register(memory: torch.Tensor) -> bool:
    """Pin memory that is mapped already, for copies from the device at full speed."""
    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(code) != 0:
        logger.warning("memory to stage checkpoints in could not be pinned (error %s); copies take longer", code)
    return int(code) == 0
