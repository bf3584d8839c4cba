"""States in parts: pickled first, copied to memory, and written or loaded later.

:func:`record` pickles, and returns the storages that the tensors are in. Once those are copied, training may go on.
:func:`replay` writes the file from the copies, byte for byte as ``torch.save`` would have written it. An
:class:`Image` is such a file in memory, which ``torch.load`` loads with storages that came some other way.

A :class:`Stager` plans what one rank copies: 1/r of every large storage, because all replicas of a shard hold the same
states. The owner of the shard copies all else. Nothing here needs DeepSpeed: the process that writes reads the copies.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from .. import __version__
from ..comm.packing import ChunkLayout
from .manifest import large_records

MARK = "mics_ds"


def marked(states: Mapping[str, Any]) -> dict[str, Any]:
    """Mark optimizer states as those of MiCS, should the manifest be gone. DeepSpeed reads the keys that it knows."""
    return {**states, MARK: __version__}


class Recorded(NamedTuple):
    """Content of a file of :func:`torch.save`: bytes, and live storages on any device, in the order of the file."""

    pickled: bytes
    storages: list[torch.UntypedStorage]


class _Pickler(pickle.Pickler):
    """Pickler that ``torch.save`` derives its own from, with a ``persistent_id`` that numbers the storages."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol=protocol)
        self._file = file


class _RecordedError(Exception):
    """Ends ``torch.save`` when everything is pickled."""


def record(states: Any) -> Recorded:
    """Pickle as ``torch.save`` does, without a copy of any tensor.

    Raises:
        Exception: of whatever kind, if something in ``states`` cannot be pickled.
    """
    seen: dict[str, torch.UntypedStorage] = {}
    pickled: list[bytes] = []

    class Pickler(_Pickler):
        def __init_subclass__(cls) -> None:  # by torch
            number = cls.persistent_id

            def persistent_id(self: Any, found: Any) -> Any:
                said = number(self, found)
                if said is not None:
                    seen.setdefault(said[2], getattr(found, "_untyped_storage", found))  # untyped() warns
                return said

            cls.persistent_id = persistent_id  # type: ignore[method-assign]

        def dump(self, states: Any) -> None:
            super().dump(states)
            pickled.append(self._file.getvalue())
            raise _RecordedError

    try:
        torch.save(states, io.BytesIO(), pickle_module=_module(Pickler))
    except _RecordedError:
        return Recorded(pickled[0], list(seen.values()))
    raise AssertionError("torch.save did not pickle anything")


def replay(recorded: Recorded, path: str | os.PathLike) -> None:
    """Write the file, from storages in host memory.

    Raises:
        RuntimeError, OSError: it could not be written.
    """

    class Pickler(_Pickler):
        def dump(self, storages: Sequence[torch.UntypedStorage]) -> None:
            for storage in storages:
                self.persistent_id(storage)
            self._file.write(recorded.pickled)

    # The list keeps the storages alive, by whose addresses torch numbers them.
    torch.save(list(recorded.storages), path, pickle_module=_module(Pickler))


def _module(pickler: type) -> Any:
    return SimpleNamespace(__name__=__name__, Pickler=pickler)


def pickled(value: Any) -> bytes:
    """Return the bytes that ``torch.save`` would write of a small object."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Image:
    """A file of ``torch.save`` in memory, with holes where storages are that came some other way."""

    def __init__(self, nbytes: int = 0) -> None:
        self.descriptor = os.memfd_create("mics_ds", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, nbytes)
        self.path = f"/proc/self/fd/{self.descriptor}"
        self._given: list[torch.UntypedStorage | None] = []
        """For each storage of the file that is not empty, in order, the memory that it is in; ``None`` if it is in the
        image."""
        self.holes: list[tuple[int, torch.Tensor]] = []
        """Where each begins in the file, in ascending order, and its storage as (nbytes,) uint8."""

    @classmethod
    def of(cls, recorded: Recorded) -> Image:
        """Make the image of a file that was never written. All of its storages are given."""
        image = cls()
        # Without it, before torch 2.6, holes are filled: the same, but for memory and time.
        with getattr(torch.serialization, "skip_data", nullcontext)():
            replay(recorded, image.path)
        image._given = [storage for storage in recorded.storages if storage.nbytes()]
        return image

    def leave_holes(self, path: Path) -> None:
        """Provide memory for the large storages of an archive, for :meth:`fill`. A file that is no archive has none."""
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            found = (_STORAGE.search(entry.filename) for entry in archive.infolist() if entry.file_size)
            given: dict[int, torch.UntypedStorage | None] = {int(match[1]): None for match in found if match}
        with open(path, "rb", buffering=0) as file:
            for entry, start in large_records(path, file):
                match = _STORAGE.search(entry.filename)
                if match:
                    storage = given[int(match[1])] = torch.UntypedStorage(entry.file_size)
                    self.holes.append((start, bytes_of(storage)))
        self._given = [given[number] for number in sorted(given)]

    def fill(self, block: torch.Tensor, start: int) -> None:
        """Put a part of the file, (nbytes,) uint8, into the storages that it belongs to, the rest into the image."""
        at, stop = start, start + block.numel()
        for hole, storage in self.holes:
            low, high = max(hole, start), min(hole + storage.numel(), stop)
            if low < high:
                os.pwrite(self.descriptor, block[at - start : low - start].numpy().data, at)
                storage[low - hole : high - hole].copy_(block[low - start : high - start])
                at = high
        os.pwrite(self.descriptor, block[at - start :].numpy().data, at)

    def load(self, load: Callable[..., Any]) -> Any:
        """Load what is in the file by :func:`mics_ds.deepspeed_compat.checkpoint.load_states`, and close the image."""
        try:
            return load(self.path, mmap=bool(self._given), placing=self._placing if self._given else lambda: "cpu")
        finally:
            os.close(self.descriptor)

    def _placing(self) -> Callable[[torch.UntypedStorage, str], torch.UntypedStorage]:
        given = iter(self._given)

        def place(storage: torch.UntypedStorage, _location: str) -> torch.UntypedStorage:
            if not storage.nbytes():
                return storage
            memory = next(given)
            if memory is None:
                return storage.clone()  # not to keep the image
            assert memory.nbytes() == storage.nbytes(), "storages are met in the order of their numbers"
            return memory

        return place


_STORAGE = re.compile(r"/data/(\d+)$")


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """Return the storage itself as (nbytes,) uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


# --------------------------------------------------------------------------------------------------
# What one rank copies

SHARED_FROM = 64 << 10
"""Bytes. The owner copies smaller storages alone: to share them saves nothing."""
_ALIGNMENT = 64
"""Bytes. Every storage begins at a multiple, so that it can be viewed in any dtype."""


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class Share(NamedTuple):
    """One storage that all replicas of a shard copy together, each its row of a layout of chunks."""

    replicas: int
    numels: tuple[int, ...]
    """Elements of each tensor in the storage that is cut by itself: of each shard, or of all together."""
    itemsize: int

    @property
    def layout(self) -> ChunkLayout:
        return ChunkLayout(self.numels, self.replicas)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole storage."""
        return sum(self.numels) * self.itemsize

    @property
    def piece_bytes(self) -> int:
        """Bytes that each replica copies, padding included."""
        return self.layout.width * self.itemsize

    def put(self, piece: torch.Tensor, replica: int, whole: torch.Tensor) -> None:
        """Put the piece of one replica, (piece_bytes,) uint8, into the whole, (nbytes,) uint8."""
        dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[self.itemsize]
        self.layout.give(piece.view(dtype), whole.view(dtype), replica)


class StagedFile(NamedTuple):
    """A file that is still to be written: its name, start and bytes of its pickled part in memory, and the number of
    the share that each of its storages is."""

    name: str
    pickled: tuple[int, int]
    storages: tuple[int, ...]


class Staged(NamedTuple):
    """Copies of one rank in memory: first its piece of each share, in order, then all else.

    Shares of several replicas come first. The owner of the shard has files, and shares that it copies alone.
    """

    files: tuple[StagedFile, ...]
    shares: tuple[Share, ...]
    own: tuple[int, int]
    """Start and bytes of what belongs to the rank alone."""
    nbytes: int

    @property
    def starts(self) -> list[int]:
        """Start of the piece of each share, and the end of the last."""
        return list(accumulate((_aligned(share.piece_bytes) for share in self.shares), initial=0))

    @property
    def shared_bytes(self) -> int:
        """Bytes of the pieces of all shares of several replicas."""
        return self.starts[sum(share.replicas > 1 for share in self.shares)]


class Stager:
    """Stands between DeepSpeed and the files while states are collected, and plans the copy. It raises at once.

    Args:
        replicas, replica: how many ranks copy the shard together, and this rank's place among them.
        owns: whether this rank copies all else.
    """

    def __init__(self, shard: int, replicas: int, replica: int, owns: bool) -> None:
        self.model_states_shard = shard
        self._replicas, self._replica, self._owns = replicas, replica, owns
        self._files: list[tuple[str, Recorded]] = []
        self._shared: list[tuple[Share, torch.Tensor]] = []
        """Shares of several replicas, each with this rank's piece, live."""
        self._share_at: dict[int, int] = {}
        """Number of the share that a storage in a file is, by its address."""
        self._stood_for: dict[int, torch.Tensor] = {}
        """Live content of a stand-in, by its address."""
        self._is_sliced = False

    def write(self, states: Mapping[str, Any], path: str, _write: Callable[[Any, str], Any]) -> None:
        name = os.path.basename(path)
        is_optimizer = name.endswith("_optim_states.pt")
        found = record(marked(states) if is_optimizer else states)
        self._files.append((name, found))
        if is_optimizer and not self._is_sliced:
            for storage in found.storages:
                self._share(bytes_of(storage), storage.data_ptr())

    def stand_in(self, held: torch.Tensor) -> torch.Tensor:
        """Return a tensor in host memory for a shard of a frozen parameter, whose content it will have in the file."""
        given = torch.empty(held.shape, dtype=held.dtype, device="cpu")  # never touched, so that it takes no memory
        self._stood_for[given.data_ptr()] = held.detach().contiguous().view(-1).view(torch.uint8)
        self._share(self._stood_for[given.data_ptr()], given.data_ptr())
        return given

    def _share(self, content: torch.Tensor, address: int) -> None:
        if self._replicas > 1 and content.numel() >= SHARED_FROM:
            itemsize = math.gcd(content.numel(), 8)
            share = Share(self._replicas, (content.numel() // itemsize,), itemsize)
            first, last = share.layout.real(0, self._replica)
            self._share_at[address] = len(self._shared)
            self._shared.append((share, content[first * itemsize : last * itemsize]))

    @contextmanager
    def slices_of(self, optimizer: Any) -> Iterator[None]:
        """Let ``optimizer.state_dict()`` be that of whole shards, where replicas have slices of them."""
        world = optimizer.world_states
        if world is None:
            yield
            return
        self._is_sliced = True
        world.finish_updates()
        wholes = []
        for sub_group, held in world.checkpoints.elementwise_states():
            cut = world.cuts[sub_group]
            share = Share(self._replicas, cut.numels, held.itemsize)
            wholes.append(torch.empty(cut.flat_starts[-1] if self._owns else 0, dtype=held.dtype, device="cpu"))
            self._share_at[wholes[-1].data_ptr()] = len(self._shared)
            self._shared.append((share, held.detach().view(-1).view(torch.uint8)))
        with world.checkpoints.whole_shards(wholes) if self._owns else nullcontext():
            yield

    def plan(self, own: bytes = b"") -> Plan:
        """Give everything that was collected a place in memory, and what belongs to this rank alone."""
        shares, numbers, parts, taken = list(self._shared), [], list[tuple[int, torch.Tensor]](), 0
        for _, found in self._files if self._owns else ():
            numbers.append(list[int]())
            for storage in found.storages:
                number = self._share_at.get(storage.data_ptr(), -1) if storage.nbytes() else -1
                if number < 0:
                    number, content = len(shares), self._stood_for.get(storage.data_ptr(), bytes_of(storage))
                    shares.append((Share(1, (storage.nbytes(),), 1), content))
                numbers[-1].append(number)

        def place(content: torch.Tensor, nbytes: int) -> tuple[int, int]:
            nonlocal taken
            start, taken = taken, taken + _aligned(nbytes)
            parts.append((start, content))
            return start, nbytes

        for share, piece in shares:
            place(piece, share.piece_bytes)
        files = tuple(
            StagedFile(name, place(_as_tensor(found.pickled), len(found.pickled)), tuple(its))
            for (name, found), its in zip(self._files, numbers)
        )
        at = place(_as_tensor(own), len(own))
        return Plan(Staged(files, tuple(share for share, _ in shares), at, taken), parts)


def _as_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


class Plan(NamedTuple):
    """A copy that is to be made: its description, and the start of each part with its live, contiguous tensor."""

    staged: Staged
    parts: list[tuple[int, torch.Tensor]]
