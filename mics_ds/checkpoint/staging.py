"""States in parts: pickled first, copied to memory, and written or loaded later.

:func:`record` pickles, which fixes structure and plain values, and returns the storages that the tensors are in. Once
those are copied, training may go on. :func:`replay` writes the file from the copies, byte for byte as ``torch.save``
would have written it. An :class:`Image` is such a file in memory, with holes where storages are; ``torch.load`` loads
it with storages that came some other way.

All replicas of a shard hold the same states, so each copies 1/r of every large storage; with world-sharded optimizer
states each has other bytes in the first place, its slices. What is small, and the model states, the owner copies alone.
A :class:`Stager` plans that. The same copy is what an asynchronous save writes, and what a copy in memory consists of.

Nothing here needs DeepSpeed: the process that writes reads what was staged.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from .. import __version__
from ..comm.packing import ChunkLayout
from .manifest import large_records

MARK = "mics_ds"


def marked(states: Mapping[str, Any]) -> dict[str, Any]:
    """Optimizer states with the mark that tells the files of MiCS from those of stock ZeRO-3, should the manifest be
    gone. DeepSpeed reads only the keys that it knows there."""
    return {**states, MARK: __version__}


class Recorded(NamedTuple):
    """Bytes and storages that :func:`torch.save` would write."""

    pickled: bytes
    storages: list[torch.UntypedStorage]
    """Storages in the order of the file, on any device. They are live."""


class _Pickler(pickle.Pickler):
    """Pickler that ``torch.save`` derives its own from, with a ``persistent_id`` that numbers the storages."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol=protocol)
        self._file = file


class _RecordedError(Exception):
    """Everything is pickled; nothing has been written."""


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
        self._numbers: list[int] = []
        """Of all storages that are not empty, in the order in which they are first met."""
        self._storages: dict[int, torch.UntypedStorage] = {}
        self.holes: list[tuple[int, torch.Tensor]] = []
        """Where each begins in the file, in ascending order, and its storage as (nbytes,) uint8."""

    @classmethod
    def of(cls, recorded: Recorded) -> Image:
        """Make the image of a file that was never written. All of its storages are given."""
        image = cls()
        # Without it, before torch 2.6, holes are filled: the same, but for memory and time.
        with getattr(torch.serialization, "skip_data", nullcontext)():
            replay(recorded, image.path)
        image._storages = {number: storage for number, storage in enumerate(recorded.storages) if storage.nbytes()}
        image._numbers = list(image._storages)
        return image

    def leave_holes(self, path: Path) -> None:
        """Provide memory for the large storages of an archive, for :meth:`fill`. A file that is no archive has none."""
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            found = ((_STORAGE.search(entry.filename), entry.file_size) for entry in archive.infolist())
            self._numbers = sorted(int(match[1]) for match, nbytes in found if match and nbytes)
        with open(path, "rb", buffering=0) as file:
            for entry, start in large_records(path, file):
                match = _STORAGE.search(entry.filename)
                if match:
                    storage = self._storages[int(match[1])] = torch.UntypedStorage(entry.file_size)
                    self.holes.append((start, bytes_of(storage)))

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
        """Load what is in the file, and close the image.

        Args:
            load: :func:`mics_ds.deepspeed_compat.checkpoint.load_states`.
        """
        try:
            return load(self.path, mmap=bool(self._numbers), placing=self._placing if self._numbers else lambda: "cpu")
        finally:
            os.close(self.descriptor)

    def _placing(self) -> Callable[[torch.UntypedStorage, str], torch.UntypedStorage]:
        numbers = iter(self._numbers)

        def place(storage: torch.UntypedStorage, _location: str) -> torch.UntypedStorage:
            if not storage.nbytes():
                return storage
            given = self._storages.get(next(numbers))
            if given is None:
                return storage.clone()  # not to keep the image
            assert given.nbytes() == storage.nbytes(), "storages are met in the order of their numbers"
            return given

        return place


_STORAGE = re.compile(r"/data/(\d+)$")


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """(nbytes,) uint8: the storage itself."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


# --------------------------------------------------------------------------------------------------
# What one rank copies

ALIGNMENT = 64
"""Bytes. Every storage begins at a multiple, so that it can be viewed in any dtype."""
SHARED_FROM = 64 << 10
"""Bytes. The owner copies smaller storages alone: a message costs more than they do."""


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Share(NamedTuple):
    """One storage that all replicas of a shard copy together: consecutive ranges of bytes, or slices of shards."""

    nbytes: int
    """Bytes of the whole storage."""
    replicas: int
    shards: tuple[int, ...] = ()
    """Elements of each shard, if replicas hold packed slices of them."""
    itemsize: int = 1

    def range(self, replica: int) -> tuple[int, int]:
        """The bytes of the whole that a replica copies, if these are consecutive. Parts begin at multiples of
        :data:`ALIGNMENT` and may be empty."""
        width = aligned(-(-self.nbytes // self.replicas))
        return min(self.nbytes, width * replica), min(self.nbytes, width * (replica + 1))

    def piece_bytes(self, replica: int) -> int:
        """Bytes that a replica copies."""
        if self.shards:
            return self._slices.width * self.itemsize
        start, stop = self.range(replica)
        return stop - start

    def put(self, piece: torch.Tensor, replica: int, whole: torch.Tensor) -> None:
        """Put the piece of one replica where it belongs.

        Args:
            piece: (piece_bytes,) uint8.
            whole: (nbytes,) uint8, written.
        """
        if self.shards:
            dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[self.itemsize]
            self._slices.give(piece.view(dtype), whole.view(dtype), replica)
        else:
            whole[slice(*self.range(replica))].copy_(piece)

    @property
    def _slices(self) -> ChunkLayout:
        return ChunkLayout(self.shards, self.replicas)


class Stored(NamedTuple):
    """One storage of a file."""

    nbytes: int
    start: int
    """Place in memory, if the owner has copied the storage alone."""
    share: int = -1
    """Else the number of the share that it is made of."""


class StagedFile(NamedTuple):
    """A file that is still to be written, of what its owner has copied."""

    name: str
    pickled: tuple[int, int]
    """Start and bytes of its pickled part in memory."""
    storages: tuple[Stored, ...]


class Staged(NamedTuple):
    """Copies of one rank in memory: first its piece of each share, in order, then all else."""

    files: tuple[StagedFile, ...]
    """Files of the shard; on its owner only."""
    shares: tuple[Share, ...]
    """Shares of the shard, equal on all its replicas."""
    own: tuple[int, int]
    """Start and bytes of what belongs to the rank alone."""
    nbytes: int

    def pieces(self, replica: int) -> Iterator[tuple[int, int]]:
        """Start and bytes of each piece, in the memory of a replica."""
        start = 0
        for share in self.shares:
            nbytes = share.piece_bytes(replica)
            yield start, nbytes
            start += aligned(nbytes)

    def pieces_bytes(self, replica: int) -> int:
        """Bytes of the memory of a replica that all of its pieces take."""
        return sum(aligned(nbytes) for _, nbytes in self.pieces(replica))


class Stager:
    """Stands between DeepSpeed and the files while states are collected, and plans the copy. It raises at once.

    Args:
        replicas, replica: how many ranks copy the shard together, and this rank's place among them.
        owns: whether this rank copies what is not shared.
        streams: of the device, ``None`` for the CPU.
    """

    def __init__(self, shard: int, replicas: int, replica: int, owns: bool, streams: Any) -> None:
        self.model_states_shard = shard
        self._replicas, self._replica, self._owns, self._streams = replicas, replica, owns, streams
        self._files: list[tuple[str, Recorded]] = []
        self._shared: list[tuple[Share, torch.Tensor]] = []
        """Each with this rank's piece, live."""
        self._share_at: dict[int, int] = {}
        """By the address of a storage in a file, the number of its share."""
        self._stood_for: dict[int, torch.Tensor] = {}
        """By the address of a stand-in, the live tensor whose content it has in the file."""
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
        """A tensor in host memory for a shard of a frozen parameter, which will have its content in the file."""
        whole = held.untyped_storage().nbytes() == held.nbytes
        given = held if self._streams is None and whole else torch.empty(held.shape, dtype=held.dtype, device="cpu")
        content = held.detach().contiguous().view(-1).view(torch.uint8)
        if held.numel() and given is not held:  # an empty one is never touched, so the system gives no memory for it
            self._stood_for[given.data_ptr()] = content
        self._share(content, given.data_ptr())
        return given

    def _share(self, content: torch.Tensor, address: int) -> None:
        if self._replicas > 1 and content.numel() >= SHARED_FROM:
            share = Share(content.numel(), self._replicas)
            self._share_at[address] = len(self._shared)
            self._shared.append((share, content[slice(*share.range(self._replica))]))

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
            share = Share(cut.flat_starts[-1] * held.itemsize, self._replicas, cut.numels, held.itemsize)
            wholes.append(torch.empty(cut.flat_starts[-1] if self._owns else 0, dtype=held.dtype, device="cpu"))
            if wholes[-1].numel():
                self._share_at[wholes[-1].data_ptr()] = len(self._shared)
            self._shared.append((share, held.detach().view(-1).view(torch.uint8)))
        with world.checkpoints.whole_shards(wholes) if self._owns else nullcontext():
            yield

    def plan(self, own: bytes = b"") -> Plan:
        """Give everything that was collected a place in memory.

        Args:
            own: what belongs to this rank alone.
        """
        parts: list[tuple[int, torch.Tensor]] = []
        taken = 0

        def place(content: torch.Tensor) -> tuple[int, int]:
            nonlocal taken
            start, taken = taken, taken + aligned(content.numel())
            parts.append((start, content))
            return start, content.numel()

        for _, piece in self._shared:
            place(piece)
        files = []
        for name, found in self._files if self._owns else ():
            pickled, storages = place(_as_tensor(found.pickled)), []
            for storage in found.storages:
                address, nbytes = storage.data_ptr(), storage.nbytes()
                if nbytes and address in self._share_at:
                    storages.append(Stored(nbytes, 0, self._share_at[address]))
                else:
                    start, _ = place(self._stood_for.get(address, bytes_of(storage)))
                    storages.append(Stored(nbytes, start))
            files.append(StagedFile(name, pickled, tuple(storages)))
        shares = tuple(share for share, _ in self._shared)
        at = place(_as_tensor(own))
        return Plan(Staged(tuple(files), shares, at, taken), parts)


def _as_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


class Plan(NamedTuple):
    """A copy that is to be made."""

    staged: Staged
    parts: list[tuple[int, torch.Tensor]]
    """Start of each part, and the tensor to copy there: live, contiguous."""
