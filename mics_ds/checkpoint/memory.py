"""The memory tier: every so many steps, training states are copied to memory that outlives the process, on two nodes.

Each rank copies what it would copy for an asynchronous save, 1/r of its shard, and what is its own; the writer of a
rank on the next node fetches the same. So any one node may be lost.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ..comm.groups import MicsGroups
from ..config import CheckpointRequest
from ..deepspeed_compat import checkpoint as seam
from ..deepspeed_compat.engine import device_streams, steps_taken
from ..errors import MicsCheckpointError, MicsConfigError, noting
from ..log import log_rank0, logger
from .background import Background, at_end
from .coordination import RankState, Roles, Run, elementwise_max, number_of
from .copies import (
    FORMAT,
    Copying,
    Description,
    Place,
    SharedMemory,
    copies,
    forget,
    host_memory_left,
    job_key,
    read,
    region,
    require_own,
)
from .folder import FileLock, discard, newest
from .save import plan_of
from .staging import pickled
from .writer import Seal

SLOTS = 2
NEVER = 1 << 40
"""Later than any step, where the least of all ranks' steps counts."""

ClientState = Callable[[], Mapping[str, Any]]


class Caller(NamedTuple):
    """A framework that trains with an engine. It calls :meth:`MemoryTier.copy` when its own states are those of the end
    of a step."""

    home: str
    """The folder that it resumes from, if it is always the same."""
    files: Callable[[], dict[str, bytes]]
    """Files that the framework needs beside the engine's states, on this rank."""
    takes_memory_for: Callable[[str], bool]
    """Whether ``load_checkpoint`` of this folder may go on from memory."""
    marker: Callable[[], str] = lambda: ""
    """Marker of the newest checkpoint in the folder that a framework resumes from."""


class _Current:
    caller: Caller | None = None
    engines = 0


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


_regions: dict[Path, FileLock] = {}
"""Regions that this process holds until it ends."""


class MemoryTier:
    """Copies of one engine's states in memory, on one rank. Made on all ranks at the same time.

    Args:
        request: with ``memory_every`` > 0.

    Raises:
        MicsConfigError: the job has ranks that do not take part.
    """

    def __init__(self, request: CheckpointRequest, groups: MicsGroups, engine: Any) -> None:
        if len(groups.node_of) != dist.get_world_size():
            raise MicsConfigError(
                f"mics_checkpoint.memory_every needs all ranks of the job, which is {dist.get_world_size()}, and "
                f"{len(groups.node_of)} take part. Leave it out."
            )
        self.request, self.groups = request, groups
        self.roles = Roles(groups, node_local=False)
        """As for a checkpoint that all nodes share."""
        self.on_node = [rank for rank, node in groups.node_of.items() if node == groups.node_of[self.roles.rank]]
        self.folder = region(request.memory_folder, job_key(request.job))
        self.engine_index, _Current.engines = _Current.engines, _Current.engines + 1
        self.homes: dict[str, list[int]] = {}
        """Folders that this job resumes from, with the markers that their disk may have: of the last checkpoint, and of
        one that is being written."""
        self.caller: Caller | None = None
        self.is_due = False
        """Whether the states are those of a step of which there should be a copy, and none was made yet."""
        self.client_state: ClientState | None = None
        """What a script would give to ``save_checkpoint``."""
        self.gave_client_state = False
        self.newest_on_disk = -1
        self._memories: dict[Path, SharedMemory] = {}
        self._complained = False
        self.layout = _layout(engine, groups)
        self.place = self.place_of(self.roles.rank)
        self._kept_by = {rank: [rank] for rank in self.on_node}
        """By rank of this node, whose copies it keeps: its own, and those of ranks on the node before."""
        for rank, keeper in mirrors(groups.node_of).items():
            if keeper in self._kept_by:
                self._kept_by[keeper].append(rank)
        self._names = {rank: self._name_of(rank) for rank in self._kept_by[self.roles.rank]}
        if _Current.caller is not None:
            self.belongs_to(_Current.caller)
        self.is_on = self._can_be_on(engine)
        at_end.append(self.end)

    def place_of(self, rank: int) -> Place:
        """Return the place of the slice that a rank of the job copies."""
        layout = self.groups.layout
        for group, offset in enumerate(self.roles.offsets):
            if rank - offset in layout.ranks:
                index, p = layout.ranks.index(rank - offset), layout.partition_size
                return Place(group, index % p, index // p, p, layout.replication_size)
        raise AssertionError("every rank is in a group")

    def _name_of(self, rank: int) -> str:
        return self.place_of(rank).name(self.engine_index)

    def _can_be_on(self, engine: Any) -> bool:
        """Return whether no other job is using the region, and there is room. Collective over the world."""
        errors, needs = list[str](), 0
        with noting(errors):
            needs = plan_of(engine, self.roles, {}).staged.nbytes
        with noting(errors):
            self._take_region()
        if errors:
            logger.warning("states are not copied to memory: %s", "; ".join(errors))
        [most] = elementwise_max([needs])
        copies_here = sum(map(len, self._kept_by.values()))
        needed = SLOTS * copies_here * (most + most // 8 + (1 << 20))
        has = _room(self.folder)
        [unable, short, most_needed, negated_least] = elementwise_max(
            [int(bool(errors)), int(has < needed), needed, -has]
        )
        takes, least = f"{most_needed / 1e9:.2f} GB on a node", f"{-negated_least / 1e9:.2f} GB"
        said = f"{takes}, in {self.request.memory_folder}, which has {least}"
        if short:
            log_rank0(
                f"states are not copied to memory, and a restart uses the disk: that takes {said} on the node with the "
                f"least. Enlarge it (docker run --shm-size), or name another memory_folder",
                level=30,
            )
        elif not unable:
            log_rank0(f"copies in memory take {said}")
        return not unable and not short

    # ---------------------------------------------------------------------------------- the copies

    def belongs_to(self, caller: Caller) -> None:
        """A framework trains with this engine, and says when copies are made."""
        self.caller = caller
        if caller.home:
            self.homes.setdefault(os.path.realpath(caller.home), [number_of(caller.marker())])

    def step_ended(self, engine: Any) -> None:
        """Copy the states if it is time to. Collective over the world then."""
        self.is_due = self.is_on and steps_taken(engine) % self.request.memory_every == 0
        if self.is_due and self.caller is None:
            self.copy(engine)

    def copy(self, engine: Any) -> None:
        """Copy the states. Collective over the world.

        A copy that cannot be made is a warning: training needs none. All ranks make the same ones, so that whichever
        is complete is complete everywhere, or leave the same ones out.
        """
        self.is_due = False
        try:
            background = Background.of_job()
        except MicsCheckpointError as error:  # on all ranks
            self.is_on = False
            log_rank0(f"states are not copied to memory: {error}", level=30)
            return
        own, last, errors = None, NEVER, list[str]()
        with noting(errors):
            own, last = self._own(engine), self._newest(engine)
        digest = 0 if own is None else number_of(own.states.fingerprint)
        hindered, negated, high, negated_low = elementwise_max(
            [int(own is None or bool(background.sealing)), -last, digest, -digest]
        )
        path, description, copying, kept = Path(), None, Copying(), -negated
        if hindered:
            log_rank0(
                f"no copy of step {steps_taken(engine)} in memory: the checksum of the last one is still being "
                f"computed, or a rank could not copy"
            )
        else:
            with noting(errors):
                if kept >= 0 and self.roles.rank == self.on_node[0]:
                    self._remove_strays()
                assert own is not None, "nothing hinders this rank"
                if high != -negated_low:  # ranks differ in what is beside their shards
                    own = own.with_states()
                path, description, copying = self._take(engine, own, kept)
        if errors and not self._complained:
            logger.warning("states could not be copied to memory: %s", "; ".join(errors))
            self._complained = True
        if hindered:
            return
        guests = [
            (background.neighbour(rank), name, str(self._next_slot(name, kept)))
            for rank, name in self._names.items()
            if rank != self.roles.rank
        ]
        job = Seal(Run.next_number(), str(self.folder), str(path), description, tuple(guests), steps_taken(engine))
        background.seal(job, copying)

    def _newest(self, engine: Any) -> int:
        """The step of which everything that this rank keeps is complete, or -1."""
        # What is later than now, or of another model, is of an earlier run that this one does not go on with.
        for found in copies(self.folder):
            is_ours = found.description.engine == self.engine_index and found.description.layout == self.layout
            if found.description.engine == self.engine_index and not (
                is_ours and found.description.step < steps_taken(engine)
            ):
                forget(found.path)
        return min(max(self._steps(name).values()) for name in self._names.values())

    def _remove_strays(self) -> None:
        """Remove copies that earlier runs have cut otherwise: those of this run are complete."""
        names = {self._name_of(rank) for kept in self._kept_by.values() for rank in kept}
        for path in self.folder.glob(f"e{self.engine_index}-*.[01]"):
            if path.stem not in names:
                forget(path)
                path.unlink()

    def _steps(self, name: str) -> dict[Path, int]:
        """The two slots of that name, and the step of what is complete there, or -1."""
        found = {path: read(path) for path in (self.folder / f"{name}.{slot}" for slot in range(SLOTS))}
        return {path: -1 if copy is None else copy.description.step for path, copy in found.items()}

    def _next_slot(self, name: str, kept: int) -> Path:
        """Return the slot of the next copy of that name: the older one's, but never that of the step that is kept."""
        steps = self._steps(name)
        return min(steps, key=lambda place: (steps[place] == kept >= 0, steps[place]))

    def _own(self, engine: Any) -> _Own:
        """Return the state that belongs to this rank alone."""
        client_state = dict(self.client_state() if self.client_state is not None else {})
        files = {} if self.caller is None else self.caller.files()
        alone = {"client_state": client_state, "random": random_states(), "files": files}
        states = seam.model_states(engine, client_state)
        own = RankState.within(states, seam.parameter_names(engine))
        return _Own(alone, own, pickled(alone))

    def _take(self, engine: Any, own: _Own, kept: int) -> tuple[Path, Description, Copying]:
        """Copy what this rank has to.

        Args:
            kept: the newest step of which all shards have a complete copy, or -1. It stays.
        """
        background = Background.current
        assert background is not None, "made before"
        background.revive()
        self._take_region()
        self.settle()
        plan = plan_of(engine, self.roles, own.alone["client_state"], own.pickled)
        path = self._next_slot(self._names[self.roles.rank], kept)
        forget(path)
        memory = self._memory(path)
        memory.reserve(plan.staged.nbytes)
        copying = memory.copy_in(plan.parts, device_streams())
        description = Description(
            format=FORMAT,
            step=steps_taken(engine),
            engine=self.engine_index,
            place=self.place,
            rank=self.roles.rank,
            layout=self.layout,
            homes={home: list(markers) for home, markers in self.homes.items()},
            stale=self._stale(),
            staged=plan.staged,
        )
        return path, description, copying

    def _take_region(self) -> None:
        """Make the region and hold it on this node. Raises MicsCheckpointError if another job or user has it."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_own(self.folder)
        if self.roles.rank == self.on_node[0]:
            busy = f"{self.folder} is in use by a running job", 'Give each job a name, "mics_checkpoint": {"job": ...}'
            _regions.setdefault(self.folder, FileLock(self.folder / "lock", busy)).take()

    def _memory(self, path: Path) -> SharedMemory:
        memory = self._memories.get(path)
        if memory is not None and memory.is_lost():
            logger.warning(
                "%s was removed while the job runs (RemoveIPC of logind, a job's epilogue?); made anew", path
            )
            memory.close()
            memory = None
        if memory is None:
            memory = self._memories[path] = SharedMemory(path=path)
        return memory

    def _stale(self) -> str:
        if not self.gave_client_state or self.client_state is not None:
            return ""
        return (
            "the script saves a client_state, which copies in memory lack; let it set "
            "engine.mics_memory.client_state to a function that returns it"
        )

    # ---------------------------------------------------------------------------- the disk beside it

    def begins_in(self, load_dir: str | os.PathLike) -> None:
        """The script has resumed from this folder, or found nothing there yet."""
        marker = ""
        with suppress(OSError, MicsCheckpointError):  # as far as it can be read
            marker, _ = newest(Path(load_dir))
        self.homes[os.path.realpath(load_dir)] = [number_of(marker)]

    def saved(self, path: str, marker: str | None, client_state: object, step: int, asynchronous: bool) -> None:
        """The script saves a checkpoint.

        Args:
            marker: what the disk says from then on; ``None`` if ``latest`` stays.
            asynchronous: it is not there yet, so the disk may go on saying what it says.
        """
        self.gave_client_state |= bool(client_state)
        self.newest_on_disk = step
        home = "" if self.caller is None else self.caller.home
        for each in filter(None, {path, home}):
            if marker is not None:
                before = self.homes.get(os.path.realpath(each), [number_of("")]) if asynchronous else []
                self.homes[os.path.realpath(each)] = [*before, number_of(marker)]

    def settle(self) -> None:
        """Keep one marker of each folder once an asynchronous save has ended well. After one that failed, which may
        have been published after all, the disk may go on saying what it says."""
        current = Background.current
        if current is not None and not (current.is_busy or current.error):
            self.homes = {home: markers[-1:] for home, markers in self.homes.items()}

    def may_resume(self, load_dir: str | os.PathLike, with_scheduler: bool) -> bool:
        """Return whether what is in memory may be loaded in place of this folder.

        A framework that does not have the engine's scheduler loaded keeps one itself.
        """
        if not self.is_on:
            return False
        return with_scheduler if self.caller is None else self.caller.takes_memory_for(os.fspath(load_dir))

    def end(self) -> None:
        """The process ends as it should: what is on disk too need not stay in memory."""
        if self.roles.rank != self.on_node[0] or not self.folder.exists():
            return
        kept = [found.description.step for found in copies(self.folder)]
        if max(kept, default=-1) <= self.newest_on_disk:
            discard(self.folder)
        else:
            logger.info(
                "%s keeps the states of step %d, which are on no disk; mics-ds memory lists and removes them",
                self.folder,
                max(kept),
            )


class _Own(NamedTuple):
    """State that belongs to one rank alone."""

    alone: dict[str, Any]
    states: RankState
    pickled: bytes
    """``alone`` as ``torch.save`` writes it."""

    def with_states(self) -> _Own:
        """Return this state with the model states beside the shard too, where the ranks differ in them."""
        whole = {**self.alone, "states": self.states.beside({})}
        return _Own(whole, self.states, pickled(whole))


def mirrors(node_of: Mapping[int, int]) -> dict[int, int]:
    """The rank on the next node that keeps a rank's copy, for each rank; none if there is one node.

    The ranks of a node share the work. Nodes need not have the same number of them.
    """
    nodes: dict[int, list[int]] = {}
    for rank, node in node_of.items():
        nodes.setdefault(node, []).append(rank)
    rows = list(nodes.values())
    found: dict[int, int] = {}
    for here, there in zip(rows, [*rows[1:], rows[0]]) if len(rows) > 1 else ():
        found.update({rank: there[place % len(there)] for place, rank in enumerate(here)})
    return found


def _layout(engine: Any, groups: MicsGroups) -> str:
    """Tells whether a copy is of this model, cut as it is now."""
    shapes = [[(name, list(shape)) for name, shape in group.items()] for group in seam.param_shapes(engine)]
    said = [groups.layout.partition_size, shapes, seam.optimizer_states_name(engine, 0)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _room(path: Path) -> int:
    """Bytes that there are for copies on this node, those of earlier copies among them."""
    existing = next(item for item in (path, *path.parents) if item.exists())
    found = os.statvfs(existing)
    used = sum(item.stat().st_blocks * 512 for item in path.glob("*")) if path.exists() else 0
    return min(found.f_bavail * found.f_frsize, host_memory_left()[0]) + used


def random_states() -> dict[str, Any]:
    """Return the states of all generators of random numbers that training uses by default."""
    found: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if device_streams() is not None:
        found["device"] = get_accelerator().get_rng_state()
    numpy = sys.modules.get("numpy")  # who has not imported it draws nothing from it
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        found["numpy"] = (kind, torch.from_numpy(keys.astype("int64")), *rest)  # which needs no unpickling
    return found


def set_random_states(found: Mapping[str, Any]) -> None:
    random.setstate(found["python"])
    torch.set_rng_state(found["torch"])
    if "device" in found and device_streams() is not None:
        get_accelerator().set_rng_state(found["device"])
    if "numpy" in found:
        kind, keys, *rest = found["numpy"]
        importlib.import_module("numpy").random.set_state((kind, keys.numpy().astype("uint32"), *rest))
