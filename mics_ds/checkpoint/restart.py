"""Going on from copies in memory: the newest step of which every slice is somewhere.

All ranks agree on the step, and on a rank that vouches for each slice. Each rank that needs a shard takes its slices
from its own node, or from the writer of that rank. There are two front ends: an engine that loads (:func:`restored`),
where every rank gets its shard, and a framework that looks for a folder before there is an engine (:func:`write`).
"""

from __future__ import annotations

import functools
import io
import os
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..config import CheckpointRequest
from ..deepspeed_compat import checkpoint as seam
from ..errors import MicsCheckpointError, describe_error, noting
from ..log import log_rank0, logger
from ..shared_memory import SharedMemory
from . import folder as folders
from . import manifest
from .background import Background
from .coordination import Run, elementwise_max, number_of, raised_on_all_ranks, versions
from .copies import Copy, Place, Shard, copies, described_by, forget, region
from .links import fetch
from .manifest import OWN_STATE, FileRecord, Manifest
from .memory import MemoryTier
from .save import write_together
from .staging import Image, replay

_NOBODY = 1 << 40
_REMEDY = "Remove the memory of this job (mics-ds memory --remove) to resume from disk."


class Source(NamedTuple):
    """Copies of one step, of which every slice is somewhere."""

    step: int
    engine: int
    """Index of the engine among those of the job."""
    groups: int
    """Data-parallel groups: one, or with model parallelism several."""
    shards: int
    slices: int
    """Slices of each shard."""
    holders: list[int]
    """Rank that vouches for the copy of each place, by number of place."""
    here: dict[int, list[Copy]]
    """Copies on this node, by number of place."""
    mine: list[Copy]
    """Copies for which this rank vouches."""
    on_disk: int = -1
    """The step of what is on disk, which is older."""
    framework_step: int = -1
    """The step by a framework's own count, if copies have one."""

    def describe(self, tag: str, save: str, files: Mapping[str, FileRecord]) -> Manifest:
        """Return the manifest of a checkpoint that is made of the copies."""
        n = self.shards * self.slices
        # As if all were on one node: those that made the copies may be gone.
        cut = (self.shards, self.slices, n, (n,), self.groups)
        return Manifest(tag, *cut, self.step, node_local=False, versions=versions(), files=dict(files), save=save)


# --------------------------------------------------------------------------------------------------
# Which step, and who has it


def find(
    asked: CheckpointRequest,
    home: str,
    look: Callable[[], tuple[str, int]],
    *,
    engine: int = 0,
    layout: str | None = None,
    needed: str = "",
) -> Source | None:
    """Find the newest states in memory that are newer than what is on disk. Collective over the world.

    Args:
        home: the folder that is resumed from.
        look: returns the marker and the step of the newest checkpoint on disk.
        engine: index of the engine among those of the job.
        layout: of the model, if that is known.
        needed: state of a framework that copies must have, for messages.
    """
    marker, on_disk = _on_disk(look)
    usable, tried = _usable(asked, engine, home, marker, layout), False
    while True:
        usable = [copy for copy in usable if described_by(copy.path).exists()]  # others forget too
        [step] = elementwise_max([max((copy.description.step for copy in usable), default=-1)])
        here = [copy for copy in usable if copy.description.step == step]
        # An older copy may be of a time when the disk said this; the newest one tells that it was set back since.
        [set_back] = elementwise_max([int(not all(_fits(copy, home, marker) for copy in here))])
        if step <= on_disk or set_back:
            said = f"memory has step {step}, {home} has step {on_disk}, which is used"
            if set_back:
                said = (
                    f"memory at step {step} is not used: {home} has another newest checkpoint than it had then (saved "
                    f"since, set back, or removed)"
                )
            log_rank0("no complete set of copies in memory" if tried or step < 0 else said)
            return None
        source = _vouched_for(step, engine, here)
        if source is None:
            usable, tried = [copy for copy in usable if copy.description.step < step], True
            continue
        damaged = [copy for copy in source.mine if not _is_good(copy)]
        for copy in damaged:
            forget(copy.path)
        steps = [copy.description.framework_step for copy in source.mine]
        any_damaged, framework_step = elementwise_max([len(damaged), max(steps, default=-1)])
        if any_damaged:
            continue
        if needed and framework_step < 0:
            log_rank0(f"the copies of step {step} in memory lack {needed}, and are not used")
            return None
        return source._replace(on_disk=on_disk, framework_step=framework_step)


def _on_disk(look: Callable[[], tuple[str, int]]) -> list[int]:
    """Return the marker, as a number, and the step of what rank 0 sees on disk. Collective over the world."""
    found, errors = [0, -1], list[str]()
    if dist.get_rank() == 0:
        with noting(errors):
            marker, step = look()
            found = [number_of(marker), step]
        if errors:
            logger.warning("the newest checkpoint cannot be read: %s", errors[0])
    return elementwise_max(found)


def _fits(copy: Copy, home: str, marker: int) -> bool:
    """Return whether the disk says what it said when a copy was made. A named job may resume from any folder."""
    return marker in copy.description.homes.get(home, [marker])


def _usable(asked: CheckpointRequest, engine: int, home: str, marker: int, layout: str | None) -> list[Copy]:
    """Return copies on this node that this job may go on from, if the disk says what it said."""
    path, usable, reasons = region(asked.memory_folder, asked.job), list[Copy](), set[str]()
    try:
        found = [copy for copy in copies(path) if copy.description.engine == engine]
    except (OSError, MicsCheckpointError) as error:
        logger.warning("memory of earlier runs is not used: %s", describe_error(error))
        return []
    for copy in found:
        if layout is not None and copy.description.layout != layout:
            reasons.add("it is of another model or another number of shards")
        elif copy.description.stale:
            reasons.add(copy.description.stale)
        elif home not in copy.description.homes and asked.job is None:
            reasons.add(
                f'the job never saved to {home}; name the job ("mics_checkpoint": {{"job": ...}}) to use it anyway'
            )
        else:
            usable.append(copy)
    for reason in sorted(reasons) if not any(_fits(copy, home, marker) for copy in usable) else ():
        log_rank0(f"memory in {path} is not used: {reason}")
    return usable


def _vouched_for(step: int, engine: int, here: list[Copy]) -> Source | None:
    """Choose the rank that vouches for each slice; ``None`` if some slice is nowhere. Collective over the world."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    cuts = [(place.group + 1, place.shards, place.slices) for place in (copy.description.place for copy in here)]
    groups, shards, slices = elementwise_max([max(numbers, default=0) for numbers in zip(*cuts)] or [0, 0, 0])
    by_place: dict[int, list[Copy]] = {}
    for copy in here:
        if copy.description.place[3:] == (shards, slices):
            by_place.setdefault(copy.description.place.number, []).append(copy)
    # All ranks of a node see its copies; not always the same one vouches.
    turns = [(rank - place) % ranks if place in by_place else _NOBODY for place in range(groups * shards * slices)]
    least = [-negated for negated in elementwise_max([-turn for turn in turns])]
    if max(least) == _NOBODY:
        lost = sorted({place // slices for place, turn in enumerate(least) if turn == _NOBODY})
        log_rank0(f"of step {step}, shards {lost[:8]} are in no node's memory")
        return None
    holders = [(place + turn) % ranks for place, turn in enumerate(least)]
    mine = [copy for place, holder in enumerate(holders) if holder == rank for copy in by_place[place]]
    return Source(step, engine, groups, shards, slices, holders, by_place, mine)


def _is_good(copy: Copy) -> bool:
    """Return whether the content of a copy is what was written. If not, the log says so."""
    try:
        with closing(copy.open()) as memory:
            copy.require_same(memory)
    except (OSError, MicsCheckpointError) as error:
        logger.warning("%s", describe_error(error))
        return False
    return True


# --------------------------------------------------------------------------------------------------
# Bringing slices to where they are needed


def _fetch_shard(source: Source, group: int, shard: int, first: int) -> tuple[Shard, dict[int, bytes]]:
    """Put a shard together from its slices. No collective.

    Args:
        first: the slice to begin with. If every rank begins with another one, all that have one send at the same time.

    Returns:
        The shard, and by global rank what belongs to a rank alone.
    """
    found, own = Shard(lasting=True), dict[int, bytes]()
    for turn in range(source.slices):
        place = Place(group, shard, (first + turn) % source.slices, source.shards, source.slices)
        copy, memory = _slice(source, place)
        with closing(memory):
            found.add(copy.description.staged, place.slice, memory)
            own[copy.description.rank] = copy.own(memory)
    return found, own


def _slice(source: Source, place: Place) -> tuple[Copy, SharedMemory]:
    for copy in filter(_is_good, source.here.get(place.number, ())):
        return copy, copy.open()
    background, holder, memory = Background.current, source.holders[place.number], SharedMemory()
    assert background is not None, "all ranks have started theirs"
    which = {"name": place.name(source.engine), "step": source.step}
    try:
        fetched = fetch(background.neighbour(holder), Run.token, which, memory, Path(f"the copy of rank {holder}"))
        if fetched is None or fetched.description.place != place:
            raise MicsCheckpointError(f"rank {holder} has slice {place.slice} of shard {place.shard} no more")
        fetched.require_same(memory)
    except BaseException:
        memory.close()
        raise
    return fetched, memory


def _own_part(content: bytes) -> dict[str, Any]:
    return seam.load_states(io.BytesIO(content), name="what a rank kept in memory of its own")


# --------------------------------------------------------------------------------------------------
# For an engine


class Restored(NamedTuple):
    """States that memory had, in host memory."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    own: dict[str, Any] | None
    """This rank's client state and random numbers, if a copy had them."""
    words: str
    """Source of the states."""


def restored(tier: MemoryTier, load_dir: str | os.PathLike) -> Restored | None:
    """Return the newest states in memory, if they are newer than those in a folder. Collective over the world.

    ``None``, on every rank, has the disk used: there are none, or something went wrong on some rank.
    """
    started, home, place = time.monotonic(), os.path.realpath(load_dir), tier.place
    source = find(
        tier.request, home, lambda: folders.newest(Path(load_dir)), engine=tier.engine_index, layout=tier.layout
    )
    if source is None:
        return None
    agreed = time.monotonic()
    try:
        Background.of_job().serve(tier.folder)
        with raised_on_all_ranks("resuming from memory", "States in memory could not be used."):
            shard, parts = _fetch_shard(source, place.group, place.shard, place.slice)
            model, optimizer = (
                Image.of(each).load(functools.partial(seam.load_states, name=name))
                for kind in ("_model_states.pt", "_optim_states.pt")
                for name, each in shard.files
                if name.endswith(kind)
            )
            own = _own_part(parts[tier.roles.rank]) if tier.roles.rank in parts else None
    except MicsCheckpointError as error:
        log_rank0(f"the disk is used: {error}", level=30)
        return None
    said = (
        f"memory at step {source.step} (on disk: {f'step {source.on_disk}' if source.on_disk >= 0 else 'nothing'}). "
        f"Agreed on in {agreed - started:.2f} s, fetched in {time.monotonic() - agreed:.2f} s"
    )
    return Restored(model, optimizer, own, said)


# --------------------------------------------------------------------------------------------------
# For a framework's folder


def write(asked: CheckpointRequest, source: Source, folder: Path) -> None:
    """Make a checkpoint of the copies. Collective over the world.

    Raises:
        MicsCheckpointError: on every rank: it could not be written.
    """
    Run.begin()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    tag, save = f"global_step{source.step}", f"{Run.name}{Run.next_number():04x}"
    staging = folders.Staging(folder / tag, save)
    shards = [(group, shard) for group in range(source.groups) for shard in range(source.shards)]
    mine = [each for number, each in enumerate(shards) if number * ranks // len(shards) == rank]
    Background.of_job().serve(region(asked.memory_folder, asked.job))

    def write_shards(_errors: list[str]) -> dict[str, FileRecord]:
        written = [_write_shard(source, *each, folder, staging.folder) for each in mine]
        return {name: record for files in written for name, record in files.items()}

    try:
        write_together(staging, folder, 0, write_shards, functools.partial(source.describe, tag, save), _REMEDY)
    except BaseException:
        staging.abandon()
        raise
    log_rank0(f"{folder} was made from memory, at step {source.step}")


def _write_shard(source: Source, group: int, shard: int, folder: Path, staging: Path) -> dict[str, FileRecord]:
    """Write the files of one shard, and what its ranks had of their own."""
    found, parts = _fetch_shard(source, group, shard, 0)
    names = [name for name, _ in found.files]
    for name, each in found.files:
        replay(each, staging / name)
    for owner, content in parts.items():
        part = _own_part(content)
        for name, kept in part["files"].items():
            (folder / name).write_bytes(kept)
        if "states" in part:
            names.append(OWN_STATE.format(rank=owner))
            torch.save(part["states"], staging / names[-1])
    return {name: manifest.seal(staging / name, dist.get_rank()) for name in names}
