"""What training waits for when a checkpoint is written in the background: states copied to host memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..deepspeed_compat.engine import device_streams
from ..errors import words
from . import origin
from .arena import Arena
from .joints import SHARED_FROM, Joint, Room, Staged, StagedFile, shares
from .recording import Recorded, record
from .together import Site, attempt


class Staging:
    """Between DeepSpeed and the files: takes states down as they are now. Errors are noted, see :class:`Site`."""

    copies_scripts = False  # who publishes does

    def __init__(self, site: Site, *, alone: bool = False) -> None:
        """
        Args:
            alone: this rank copies all that it has of its shard, whatever others do. Wholes that it has a slice of get
                no place.
        """
        self._alone = alone
        self._owner = alone or site.rank == site.writer
        self._replicas = 1 if alone else len(site.sharers)
        self._place = 0 if alone else site.sharers.index(site.rank)
        self._wholes: list[tuple[torch.Tensor, Joint, torch.Tensor]] = []
        self._recorded: list[tuple[str, Recorded]] = []
        self._stood_for: dict[int, torch.Tensor] = {}
        self.model_states_shard = site.shard
        self.errors: list[str] = []

    def make(self, make: Callable[[], Any]) -> None:
        attempt(make, self.errors)

    def write(self, states: Mapping[str, Any], path: str, _write: Callable[[Any, str], Any]) -> None:
        if self.errors:
            return
        name = os.path.basename(path)

        def pickle() -> None:
            marked = origin.marked(states) if name.endswith("_optim_states.pt") else states
            self._recorded.append((name, record(marked)))

        attempt(pickle, self.errors, lambda error: f"{path}: {words(error)}")

    def stand_in(self, held: torch.Tensor) -> torch.Tensor:
        """A tensor in host memory for one on the device, which will have its content in the file."""
        if device_streams() is None:
            return held
        empty = torch.empty(held.shape, dtype=held.dtype, device="cpu")  # never touched
        if held.numel():
            self._stood_for[empty.data_ptr()] = held.contiguous()
        return empty

    @contextmanager
    def states_of(self, optimizer: Any) -> Iterator[None]:
        """Let ``optimizer.state_dict()`` be that of whole shards, where slices are still to be joined to them."""
        if optimizer.world_states is None:
            yield
            return
        optimizer.world_states.finish_updates()
        for sub_group, held in optimizer.world_states.checkpoints.elementwise_states():
            cut = optimizer.world_states.cuts[sub_group]
            # Never touched, so the system never gives memory for it.
            whole = torch.empty(cut.flat_starts[-1] if self._owner else 0, dtype=held.dtype, device="cpu")
            sizes = (held.nbytes,) * (cut.size if self._alone else self._replicas)
            joint = Joint(cut.flat_starts[-1] * held.itemsize, -1, -1, sizes, cut.numels, held.itemsize)
            self._wholes.append((whole, joint, held.detach()))
        if self._owner:
            optimizer.world_states.checkpoints.gathered_states = optimizer.world_states.checkpoints.state_dict_with(
                [whole for whole, _, _ in self._wholes]
            )
        try:
            yield
        finally:
            optimizer.world_states.checkpoints.gathered_states = None

    def stage(self, arena: Arena, finish: Callable[[], object]) -> Staged:
        """Copy everything into shared memory.

        Raises:
            OSError: there is not enough of it.
        """
        return self._stage(arena, finish, Room(), [])

    def stage_with(
        self, arena: Arena, finish: Callable[[], object], extra: Sequence[bytes]
    ) -> tuple[Staged, list[tuple[int, int]]]:
        """The same, and the pickled part of each file and further bytes with it.

        Returns:
            Where those are, in that order, besides.
        """
        room, parts, places = Room(), list[tuple[int, torch.Tensor]](), []
        for content in [*(recorded.pickled for _, recorded in self._recorded), *extra]:
            places.append((room.take(len(content)), len(content)))
            if content:
                parts.append((places[-1][0], torch.frombuffer(bytearray(content), dtype=torch.uint8)))
        return self._stage(arena, finish, room, parts), places

    def _stage(
        self, arena: Arena, finish: Callable[[], object], room: Room, parts: list[tuple[int, torch.Tensor]]
    ) -> Staged:
        files: list[StagedFile] = []
        joints: list[Joint] = []
        outlines = {whole.data_ptr(): number for number, (whole, _, _) in enumerate(self._wholes) if whole.numel()}
        whole_at: dict[int, int] = {}
        for name, recorded in self._recorded:
            shared = name.endswith("_optim_states.pt")
            places = []
            for storage in recorded.storages:
                content = _bytes_of(storage)
                if shared and self._is_shared(content):
                    joints.append(self._range(content, room, parts))
                    places.append((joints[-1].whole, content.numel()))
                    continue
                if not self._owner and shared:
                    continue
                if self._alone and storage.data_ptr() in outlines:
                    places.append((-1 - outlines[storage.data_ptr()], content.numel()))
                    continue
                places.append((room.take(content.numel()), content.numel()))
                if storage.data_ptr() in outlines:
                    whole_at[storage.data_ptr()] = places[-1][0]
                else:
                    parts.append((places[-1][0], self._stood_for.get(storage.data_ptr(), content)))
            if self._owner or not shared:
                files.append(StagedFile(name, recorded.pickled, tuple(places)))
        for whole, joint, held in self._wholes:
            piece = room.take(held.nbytes)
            parts.append((piece, held))
            start = whole_at.get(whole.data_ptr(), -1)
            joints.append(joint._replace(whole=start, piece=piece))
        arena.reserve(room.nbytes)
        arena.copy_in(parts, finish)
        self._recorded.clear()
        self._wholes.clear()
        self._stood_for.clear()
        return Staged(tuple(files), tuple(joints), room.nbytes)

    def _is_shared(self, content: torch.Tensor) -> bool:
        """Whether all replicas have this storage, and each copies a part."""
        return self._replicas > 1 and not self._wholes and content.numel() >= SHARED_FROM

    def _range(self, content: torch.Tensor, room: Room, parts: list[tuple[int, torch.Tensor]]) -> Joint:
        cut = shares(content.numel(), self._replicas)
        start, stop = cut[self._place]
        whole = room.take(content.numel() if self._owner else stop - start)
        piece = whole + start if self._owner else whole
        parts.append((piece, content[start:stop]))
        return Joint(content.numel(), whole, piece, tuple(part.stop - part.start for part in cut))


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """(nbytes,) uint8: the storage itself."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
