"""The memory tier: every so many steps, states are copied to memory that outlives the process.

On each node, one rank for each shard that the node's ranks have copies its shard whole: two copies in turns, so that
one is complete at any moment. Replicas are on other nodes and do the same, so the loss of a node costs nothing.

With world-sharded optimizer states every rank copies its slices, and another node gets the same copy.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ..comm.groups import MicsGroups
from ..config import CheckpointRequest
from ..deepspeed_compat import checkpoint as seam
from ..deepspeed_compat.engine import device_streams, steps_taken, wait_for_device
from ..errors import MicsCheckpointError, MicsConfigError, words
from ..log import log_rank0, logger
from . import memory
from .arena import Arena
from .background import Background, at_end
from .holdings import Holdings, holdings_of
from .joints import Staged, StagedFile
from .memory import Description
from .neighbours import Mirror
from .rank_state import RankState
from .staging import Staging
from .together import Site, greatest, number_of
from .writer import Seal

ClientState = Callable[[], Mapping[str, Any]]


class Caller(NamedTuple):
    """A framework that trains with an engine. It calls :meth:`MemoryTier.copy` when its own states are those of the end
    of a step."""

    home: str
    """The folder that it resumes from, if it is always the same."""
    files: Callable[[], dict[str, bytes]]
    """What it needs beside the engine's states, on this rank."""
    takes_memory_for: Callable[[str], bool]
    """Whether ``load_checkpoint`` of this folder may go on from memory."""


class _Own(NamedTuple):
    """What belongs to one rank alone."""

    alone: dict[str, Any]
    states: RankState
    pickled: bytes
    """Of ``alone``."""

    def with_states(self) -> _Own:
        """With its model states beside the shard too, where those of the ranks differ."""
        whole = {**self.alone, "states": self.states.beside({})}
        return _Own(whole, self.states, _pickled(whole))


class _Current:
    caller: Caller | None = None


@contextmanager
def called_by(caller: Caller, engine: Any = None) -> Iterator[None]:
    """Engines that are built meanwhile, and this one, are trained by a framework."""
    before, _Current.caller = _Current.caller, caller
    if hasattr(engine, "mics_memory"):
        engine.mics_memory.belongs_to(caller)
    try:
        yield
    finally:
        _Current.caller = before


class MemoryTier:
    """Copies of one engine's states in memory, on one rank.

    Args:
        request: with ``memory_every`` > 0.

    Raises:
        MicsConfigError: the job has ranks that do not take part.
    """

    def __init__(self, request: CheckpointRequest, groups: MicsGroups) -> None:
        if len(groups.node_of) != dist.get_world_size():
            raise MicsConfigError(
                f"mics_checkpoint.memory_every needs all ranks of the job, which is {dist.get_world_size()}, and "
                f"{len(groups.node_of)} take part. Leave it out."
            )
        self.request, self._groups = request, groups
        self.site = Site(groups, node_local=True)
        self.folder = memory.region(request.memory_folder, memory.job_key(request.job))
        self.homes: set[str] = set()
        """Folders that this job resumes from: where it has saved, or found nothing to begin with."""
        self.caller: Caller | None = None
        self.is_due = False
        """Whether the states are those of a step of which there should be a copy, and none was made yet."""
        self.client_state: ClientState | None = None
        """What a script would give to ``save_checkpoint``."""
        self.gave_client_state = False
        self.newest_on_disk = -1
        self._arenas: dict[Path, Arena] = {}
        self._complained = False
        self._layout = ""
        self._held: Holdings | None = None
        if _Current.caller is not None:
            self.belongs_to(_Current.caller)
        at_end.append(self.end)

    def belongs_to(self, caller: Caller) -> None:
        """A framework trains with this engine, and says when copies are made."""
        self.caller = caller
        if caller.home:
            self.begins_in(caller.home)

    def step_ended(self, engine: Any) -> None:
        """Copy the states if it is time to. Collective over the world then."""
        self.is_due = steps_taken(engine) % self.request.memory_every == 0
        if self.is_due and self.caller is None:
            self.copy(engine)

    def copy(self, engine: Any) -> None:
        """Copy the states. Collective over the world.

        A copy that cannot be made is a warning: training needs none. All ranks make the same ones, so that whichever
        is complete is complete everywhere, or leave the same ones out.
        """
        self.is_due = False
        background = Background.of_job()
        own, states = list[_Own](), dict[str, Any]()
        self._or_warn(lambda: own.append(self._own(engine, states)))
        holdings, newest = self._holdings(engine), list[int]()
        self._or_warn(lambda: newest.append(self._newest(engine, holdings)))
        unable = not own or not newest
        digest = number_of(own[0].states.fingerprint) if own else 0
        hindered, negated, cut_off, high, negated_low = greatest(
            [
                int(unable or background.is_sealing),
                -min(newest, default=memory.NEVER),
                int(background.is_cut_off),
                digest,
                -digest,
            ]
        )
        if cut_off:
            background.connect_anew()
        if hindered:
            log_rank0(f"no copy of step {steps_taken(engine)}: the last ones are not summed up yet, or a rank cannot")
            return
        kept, number = -negated, background.next_copy()
        if high != -negated_low:  # ranks differ in what is beside their shards
            self._or_warn(lambda: own.append(own[0].with_states()))
        parts = self._own_parts(own[-1].pickled, holdings)
        taken: list[tuple[Path, Description]] = []
        if holdings.own:
            if kept >= 0:
                self._or_warn(lambda: self._remove_strays(holdings))
            self._or_warn(lambda: taken.append(self._take(engine, holdings, parts, states, kept)))
        mirror = self._mirror(holdings, kept, number) if holdings.guests or holdings.to else None
        if taken or mirror:
            path, description = taken[0] if taken else (self.folder / holdings.own, None)
            background.seal(Seal(str(path), description, mirror))

    def _or_warn(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            if not self._complained:
                logger.warning("states could not be copied to memory: %s", words(error))
            self._complained = True

    def _newest(self, engine: Any, holdings: Holdings) -> int:
        """The step of which everything that this rank keeps is complete, or -1; never, if it keeps nothing."""
        if not holdings.here:
            return memory.NEVER
        self._forget_others(engine)
        return min(max(self._steps(name).values()) for name in holdings.here)

    def _forget_others(self, engine: Any) -> None:
        """What is later than now, or of another model, is of an earlier run that this one does not go on with."""
        for copy in memory.copies(self.folder):
            if copy.description.step >= steps_taken(engine) or copy.description.layout != self.layout(engine):
                memory.forget(copy.path)

    def _holdings(self, engine: Any) -> Holdings:
        """What this rank has to copy and to keep, the same at every step."""
        if self._held is None:
            self._held = holdings_of(engine, self._groups, self.site)
        return self._held

    def _remove_strays(self, holdings: Holdings) -> None:
        """Copies of an earlier run that nobody here writes over, now that there are newer ones of everything."""
        for path in self.folder.glob(f"mp{holdings.model_parallel}-shard*.[01]"):
            if path.stem not in holdings.of_node:
                memory.forget(path)
                path.unlink(missing_ok=True)

    def _steps(self, name: str) -> dict[Path, int]:
        """The two places for copies of that name, and the step of what is complete there, or -1."""
        places = [self.folder / f"{name}.{slot}" for slot in range(memory.SLOTS)]
        found = {path: memory.read(path) for path in places}
        return {path: -1 if description is None else description.step for path, description in found.items()}

    def _own(self, engine: Any, client_state: dict[str, Any]) -> _Own:
        """What belongs to this rank alone. Its client state, which is in the shard's files as well, is filled in."""
        client_state.update({} if self.client_state is None else self.client_state())
        files = {} if self.caller is None else self.caller.files()
        alone = {"client_state": client_state, "random": random_states(), "files": files}
        return _Own(alone, RankState.of(engine, client_state), _pickled(alone))

    def _next_place(self, name: str, kept: int) -> Path:
        """Where the next copy of that name goes: over the older one, but never over the step that is kept."""
        steps = self._steps(name)
        return min(steps, key=lambda place: (steps[place] == kept >= 0, steps[place]))

    def _own_parts(self, own: bytes, holdings: Holdings) -> dict[int, bytes]:
        """What belongs to a rank alone, by global rank: of all replicas of this shard, where one rank copies for all of
        them."""
        replication = self._groups.replication
        if replication is None or holdings.part[1] > 1:
            return {self.site.rank: own}
        parts: list[Any] = [None] * replication.size
        dist.all_gather_object(parts, own, group=replication.group)
        return dict(zip(replication.ranks, parts))

    def _mirror(self, holdings: Holdings, kept: int, number: int) -> Mirror:
        """Have copies kept on other nodes, and those of others here."""
        guests = {rank: self._next_place(name, kept) for rank, name in holdings.guests.items()}
        for path in guests.values():
            memory.forget(path)
        background, replication = Background.current, self._groups.replication
        assert background is not None, "made before"
        assert replication is not None, "there are slices"
        return Mirror(
            number=number,
            connection=background.connection,
            sharers=tuple(replication.ranks),
            to=holdings.to,
            guests=tuple((rank, str(path)) for rank, path in guests.items()),
        )

    def _take(
        self, engine: Any, holdings: Holdings, own: Mapping[int, bytes], client_state: dict[str, Any], kept: int
    ) -> tuple[Path, Description]:
        """Copy what this rank has to.

        Args:
            kept: the newest step of which all shards have a complete copy, or -1. It stays.

        Returns:
            Where the copy is, and what is in it.
        """
        background = Background.current
        assert background is not None, "made before"
        background.revive()
        memory.make_region(self.folder)
        path = self._next_place(holdings.own, kept)
        session = Staging(self.site, alone=True)
        seam.set_writer(engine, True, True)
        with session.states_of(engine.optimizer):
            seam.collect_states(engine, session, str(self.folder), "memory", client_state)
        if session.errors:
            raise MicsCheckpointError("; ".join(session.errors))
        memory.forget(path)
        arena = self._arena(path)
        extra = [part for _, part in sorted(own.items())]
        staged, places = session.stage_with(arena, wait_for_device, extra)
        return path, self._describe(engine, holdings, staged, places, sorted(own))

    def _describe(
        self, engine: Any, holdings: Holdings, staged: Staged, places: list[tuple[int, int]], ranks: list[int]
    ) -> Description:
        files = len(staged.files)
        return Description(
            job=self.folder.name,
            step=steps_taken(engine),
            shard=self.site.shard,
            shards=self._groups.layout.partition_size,
            layout=self.layout(engine),
            homes=tuple(sorted(self.homes)),
            stale=self._stale(),
            files=tuple(StagedFile(file.name, b"", file.places) for file in staged.files),
            own={str(rank): place for rank, place in zip(ranks, places[files:])},
            nbytes=staged.nbytes,
            crc32=0,
            seconds=time.time(),
            pickled=tuple(places[:files]),
            slice=holdings.part[0],
            slices=holdings.part[1],
            joints=staged.joints,
        )

    def _stale(self) -> str:
        if not self.gave_client_state or self.client_state is not None:
            return ""
        return (
            "the script saves a client_state, which copies in memory lack; let it set "
            "engine.mics_memory.client_state to a function that returns it"
        )

    def _arena(self, path: Path) -> Arena:
        if path not in self._arenas:
            self._arenas[path] = memory.open_content(path)
        return self._arenas[path]

    def layout(self, engine: Any) -> str:
        """Tells whether a copy is of this model, cut as it is now."""
        if not self._layout:
            shapes = [[(name, list(shape)) for name, shape in group.items()] for group in seam.param_shapes(engine)]
            said = [self._groups.layout.partition_size, shapes, seam.optimizer_states_name(engine, 0)]
            self._layout = hashlib.sha256(json.dumps(said).encode()).hexdigest()
        return self._layout

    def begins_in(self, load_dir: str | os.PathLike) -> None:
        """The script resumes from this folder, or found nothing there yet."""
        self.homes.add(os.path.realpath(load_dir))

    def may_resume(self, load_dir: str | os.PathLike, with_scheduler: bool) -> bool:
        """Whether who loads from this folder may get what is in memory. A framework that does not have the engine's
        scheduler loaded keeps one itself."""
        return with_scheduler if self.caller is None else self.caller.takes_memory_for(os.fspath(load_dir))

    def end(self) -> None:
        """The process ends as it should: what is on disk too need not stay in memory."""
        if not self.site.publishes or not self.folder.exists():
            return
        kept = [copy.description.step for copy in memory.copies(self.folder)]
        if max(kept, default=-1) <= self.newest_on_disk:
            memory.remove(self.folder)
        else:
            logger.info(
                "%s keeps the states of step %d, which are on no disk; python -m mics_ds.memory lists and removes them",
                self.folder,
                max(kept),
            )

    def saved(self, folder: str, client_state: object, step: int) -> None:
        """The script has saved a checkpoint."""
        self.homes.add(os.path.realpath(folder))
        self.gave_client_state |= bool(client_state)
        self.newest_on_disk = step


def _pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def random_states() -> dict[str, Any]:
    """Of all generators of random numbers that training uses by default."""
    found: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if device_streams() is not None:
        found["device"] = get_accelerator().get_rng_state()
    numpy = sys.modules.get("numpy")  # who has not imported it draws nothing from it
    if numpy is not None:
        found["numpy"] = numpy.random.get_state()
    return found


def set_random_states(found: Mapping[str, Any]) -> None:
    random.setstate(found["python"])
    torch.set_rng_state(found["torch"])
    if "device" in found and device_streams() is not None:
        get_accelerator().set_rng_state(found["device"])
    if "numpy" in found:
        importlib.import_module("numpy").random.set_state(found["numpy"])
