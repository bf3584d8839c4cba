"""The memory tier: every so many steps, training states are copied to memory that outlives the process, on two nodes.

Each rank copies what it would copy for an asynchronous save, 1/r of its shard, and what is its own; the writer of a
rank on the next node fetches the same. So any one node may be lost.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from ..comm.groups import MicsGroups
from ..config import CheckpointRequest
from ..deepspeed_compat import checkpoint as seam
from ..deepspeed_compat.engine import device_streams, random_states, steps_taken
from ..deepspeed_compat.states import bytes_of_moments_to_come
from ..errors import MicsCheckpointError, MicsConfigError, noting
from ..files import FileLock
from ..host_memory import host_memory_left
from ..log import log_rank0, logger
from ..shared_memory import Copying, SharedMemory
from .background import Background, at_end
from .coordination import RankState, Roles, Run, elementwise_max, number_of
from .copies import Description, Place, copies, forget, region, require_own
from .folder import discard, newest
from .save import plan_of
from .staging import pickled
from .writer import Seal

_SLOTS = 2
_NO_CLIENT_STATE = (
    "the script saves a client_state, which copies in memory lack; let it set engine.mics_memory.client_state to a "
    "function that returns it"
)


class Caller(NamedTuple):
    """A framework that trains with an engine. It calls :meth:`MemoryTier.copy` at the end of its own step."""

    home: str
    """The folder that it resumes from, if it is always the same."""
    files: Callable[[], dict[str, bytes]]
    """Files that the framework needs beside the engine's states, on this rank."""
    takes_memory_for: Callable[[str], bool]
    """Whether ``load_checkpoint`` of this folder may go on from memory."""
    marker: Callable[[], str] = lambda: ""
    """Marker of the newest checkpoint in the folder that a framework resumes from."""
    step: Callable[[], int] = lambda: -1
    """The framework's own count of steps, if it resumes from a folder that is made of copies."""


class _Current:
    caller: Caller | None = None
    engines = 0


@contextmanager
def called_by(caller: Caller, engine: Any = None) -> Iterator[None]:
    """Have a framework train with engines that are built meanwhile, and with this one."""
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
        self.request = request
        self.roles = Roles(groups, node_local=False)
        """As for a checkpoint that all nodes share."""
        self.folder = region(request.memory_folder, request.job)
        self.engine_index, _Current.engines = _Current.engines, _Current.engines + 1
        self.homes: dict[str, list[int]] = {}
        """Folders that this job resumes from, with the markers that their disk may have: of the last checkpoint, and of
        one that is being written."""
        self.caller: Caller | None = None
        self.is_due = False
        """Whether the states are those of a step of which there should be a copy, and none was made yet."""
        self.client_state: Callable[[], Mapping[str, Any]] | None = None
        """What a script would give to ``save_checkpoint``."""
        self.gave_client_state = False
        self.newest_on_disk = -1
        self.layout = _layout(engine, groups)
        self.place = self._place_of(self.roles.rank)
        self._memories: dict[Path, SharedMemory] = {}
        here = [rank for rank, node in groups.node_of.items() if node == groups.node_of[self.roles.rank]]
        self._is_first = self.roles.rank == here[0]
        """Whether this rank does what one rank of each node has to do."""
        keepers = mirrors(groups.node_of)
        on_node = [rank for rank in groups.node_of if rank in here or keepers.get(rank) in here]
        names = {rank: self._place_of(rank).name(self.engine_index) for rank in on_node}
        self._names_here = set(names.values())
        """Names of all copies on this node: those of its ranks, and of ranks on the node before."""
        self._names = {rank: names[rank] for rank in on_node if self.roles.rank in (rank, keepers.get(rank))}
        """Names of the copies that this rank keeps, by the rank that they are of."""
        if _Current.caller is not None:
            self.belongs_to(_Current.caller)
        self.is_on = self._can_be_on(engine)
        at_end.append(self.end)

    def _place_of(self, rank: int) -> Place:
        """Return the place of the slice that a rank of the job copies."""
        layout = self.roles.groups.layout
        [(group, index)] = [
            (group, layout.ranks.index(rank - offset))
            for group, offset in enumerate(self.roles.offsets)
            if rank - offset in layout.ranks
        ]
        p = layout.partition_size
        return Place(group, index % p, index // p, p, layout.replication_size)

    def copy_bytes(self, engine: Any) -> int:
        """Return the bytes of this rank's copy of the shards, with what the first step adds to them."""
        to_come = bytes_of_moments_to_come(engine.optimizer)
        sharers = 1 if engine.optimizer.world_states is not None else len(self.roles.sharers)
        return plan_of(engine, self.roles, {}).staged.nbytes + -(-to_come // sharers)

    def _can_be_on(self, engine: Any) -> bool:
        """Return whether no other job is using the region, and there is room. Collective over the world."""
        errors, nbytes = list[str](), 0
        with noting(errors):
            nbytes = self.copy_bytes(engine)
            self._take_region()
        if errors:
            logger.warning("states are not copied to memory: %s", "; ".join(errors))
        [most] = elementwise_max([nbytes])
        needed, has = _SLOTS * len(self._names_here) * (most + most // 8 + (1 << 20)), _room(self.folder)
        [unable, short, needed, negated] = elementwise_max([int(bool(errors)), int(has < needed), needed, -has])
        said = f"{needed / 1e9:.2f} GB on a node, in {self.request.memory_folder}, which has {-negated / 1e9:.2f} GB"
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
        """Let a framework that trains with this engine decide when copies are made."""
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
        alone, own, errors = dict[str, Any](), RankState({}), list[str]()
        steps, kept, digest = dict[Path, int](), -1, 0
        with noting(errors):
            alone, own = self._alone(engine)
            digest = number_of(own.digest)
            steps = self._complete(engine)
            kept = min(max(steps.get(slot, -1) for slot in self._slots(name)) for name in self._names.values())
        hindered, negated, high, negated_low = elementwise_max(
            [int(bool(errors or background.sealing)), -kept, digest, -digest]
        )
        path, description, copying, kept = Path(), None, Copying(), -negated
        if hindered:
            log_rank0(
                f"no copy of step {steps_taken(engine)} in memory: the checksum of the last one is still being "
                f"computed, or a rank could not copy"
            )
        else:
            with noting(errors):
                if high != -negated_low:  # ranks differ in what is beside their shards
                    alone["states"] = own.beside({})
                background.revive()
                self._take_region()
                if kept >= 0 and self._is_first:
                    self._remove_strays()
                path = self._next_slot(self._names[self.roles.rank], steps, kept)
                description, copying = self._copy_to(path, engine, alone)
        if errors:
            logger.warning("states could not be copied to memory: %s", "; ".join(errors))
        if hindered:
            return
        guests = [
            (background.neighbour(rank), name, str(self._next_slot(name, steps, kept)))
            for rank, name in self._names.items()
            if rank != self.roles.rank
        ]
        job = Seal(Run.next_number(), str(self.folder), str(path), description, tuple(guests), steps_taken(engine))
        background.seal(job, copying)

    def _alone(self, engine: Any) -> tuple[dict[str, Any], RankState]:
        """Return what a copy has of this rank alone, and all state beside the shard."""
        client_state = dict(self.client_state() if self.client_state is not None else {})
        files = {} if self.caller is None else self.caller.files()
        states = seam.model_states(engine, client_state)
        own = RankState.within(states, seam.parameter_names(engine))
        return {"client_state": client_state, "random": random_states(), "files": files}, own

    def _complete(self, engine: Any) -> dict[Path, int]:
        """Return the complete copies on this node that this run goes on with, and their steps."""
        found = {}
        for copy in copies(self.folder):
            description = copy.description
            # What is later than now, or of another model, is of an earlier run.
            if description.engine == self.engine_index and (
                description.layout != self.layout or description.step >= steps_taken(engine)
            ):
                forget(copy.path)
            else:
                found[copy.path] = description.step
        return found

    def _slots(self, name: str) -> list[Path]:
        return [self.folder / f"{name}.{slot}" for slot in range(_SLOTS)]

    def _next_slot(self, name: str, steps: Mapping[Path, int], kept: int) -> Path:
        """Return the slot of the next copy of that name: the older one's, but never that of the step that is kept.

        Args:
            steps: of complete copies.
            kept: the newest step of which all shards have a complete copy, or -1.
        """
        return min(self._slots(name), key=lambda slot: (steps.get(slot, -1) == kept >= 0, steps.get(slot, -1)))

    def _remove_strays(self) -> None:
        """Remove copies that earlier runs have cut otherwise: those of this run are complete."""
        for path in self.folder.glob(f"e{self.engine_index}-*.[01]"):
            if path.stem not in self._names_here:
                forget(path)
                path.unlink()

    def _copy_to(self, path: Path, engine: Any, alone: Mapping[str, Any]) -> tuple[Description, Copying]:
        """Begin to copy what this rank has to, and describe the copy."""
        self.settle()
        plan = plan_of(engine, self.roles, alone["client_state"], pickled(alone))
        forget(path)
        memory = self._memory(path)
        memory.reserve(plan.staged.nbytes)
        copying = memory.copy_in(plan.parts, device_streams())
        description = Description(
            step=steps_taken(engine),
            framework_step=-1 if self.caller is None else self.caller.step(),
            engine=self.engine_index,
            place=self.place,
            rank=self.roles.rank,
            layout=self.layout,
            homes=dict(self.homes),
            stale=_NO_CLIENT_STATE if self.gave_client_state and self.client_state is None else "",
            staged=plan.staged,
        )
        return description, copying

    def _take_region(self) -> None:
        """Make the region and hold it on this node. Raises MicsCheckpointError if another job or user has it."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_own(self.folder)
        if self._is_first:
            busy = f"{self.folder} is in use by a running job", 'Give each job a name, "mics_checkpoint": {"job": ...}'
            _regions.setdefault(self.folder, FileLock(self.folder / "lock", busy)).take()

    def _memory(self, path: Path) -> SharedMemory:
        found = self._memories.get(path)
        if found is not None and not os.fstat(found.descriptor).st_nlink:
            logger.warning(
                "%s was removed while the job runs (RemoveIPC of logind, a job's epilogue?); made anew", path
            )
            found.close()
            found = None
        if found is None:
            found = self._memories[path] = SharedMemory(path=path)
        return found

    # ---------------------------------------------------------------------------- the disk beside it

    def begins_in(self, load_dir: str | os.PathLike) -> None:
        """Note that the script has resumed from this folder, or found nothing there yet."""
        marker = ""
        with suppress(OSError, MicsCheckpointError):  # as far as it can be read
            marker, _ = newest(Path(load_dir))
        self.homes[os.path.realpath(load_dir)] = [number_of(marker)]

    def saved(self, path: str, marker: str | None, client_state: object, step: int, asynchronous: bool) -> None:
        """Note that the script saves a checkpoint.

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
        """Remove copies at the regular end of the process, if the disk has their states too."""
        if not self._is_first or not self.folder.exists():
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


def mirrors(node_of: Mapping[int, int]) -> dict[int, int]:
    """Return for each rank the rank on the next node that mirrors its copy; nothing if there is one node.

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
    """Return a digest of the model, and of the way in which its states are cut."""
    shapes = [[(name, list(shape)) for name, shape in group.items()] for group in seam.param_shapes(engine)]
    said = [groups.layout.partition_size, shapes, seam.optimizer_states_name(engine, 0)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _room(path: Path) -> int:
    """Return the bytes for copies on this node, those of earlier copies among them."""
    existing = next(item for item in (path, *path.parents) if item.exists())
    found = os.statvfs(existing)
    used = sum(item.stat().st_blocks * 512 for item in path.glob("*")) if path.exists() else 0
    return min(found.f_bavail * found.f_frsize, host_memory_left()[0]) + used
