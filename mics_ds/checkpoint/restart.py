"""Going on from copies in memory: the newest step of which every slice is somewhere.

All ranks agree on the step and on who has what. Each rank that needs a shard fetches its slices, from its own node or
from a writer that has them, compares each with its checksum and puts it into place. There are two front ends: an engine
that loads (:func:`restored`), where every rank gets its shard, and a framework that looks for a folder before there is
an engine (:func:`write`), where one rank of each shard writes it there.
"""

from __future__ import annotations

import functools
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..config import CheckpointRequest
from ..deepspeed_compat import checkpoint as seam
from ..errors import MicsCheckpointError, describe_error
from ..log import log_rank0, logger
from . import folder as folders
from . import manifest
from .background import Background
from .coordination import Run, elementwise_max, number_of, raised_on_all_ranks, versions
from .copies import (
    Copy,
    Place,
    Shard,
    SharedMemory,
    copies,
    described_by,
    forget,
    job_key,
    region,
    understood,
)
from .links import fetch
from .manifest import OWN_STATE, FileRecord, Manifest
from .memory import NEVER, MemoryTier
from .save import write_together
from .staging import Image, replay

Files = dict[str, bytes]
_NOBODY = 1 << 40
_REMEDY = "Remove the memory of this job (mics-ds memory --remove) to resume from disk."


class Source(NamedTuple):
    """Copies of the step that all slices are there of."""

    step: int
    engine: int
    """Index of the engine among those of the job."""
    shards: int
    slices: int
    """Into how many each shard is cut."""
    groups: int
    """Data-parallel groups: one, or with model parallelism several."""
    holders: list[int]
    """Rank that vouches for the copy of each place, by number of place."""
    here: dict[int, list[Copy]]
    """Copies on this node, by number of place."""
    on_disk: int = -1
    """The step of what is on disk, which is older."""

    def of_rank(self, rank: int) -> Iterator[int]:
        """Numbers of the places that a rank vouches for."""
        return (place for place, holder in enumerate(self.holders) if holder == rank)

    def describe(self, tag: str, save: str, files: Mapping[str, FileRecord]) -> Manifest:
        """A checkpoint that is made of the copies."""
        ranks = self.shards * self.slices
        return Manifest(
            tag=tag,
            shards=self.shards,
            replicas=self.slices,
            ranks=ranks,
            ranks_per_node=(ranks,),  # of nodes that may be gone
            model_parallel=self.groups,
            global_steps=self.step,
            node_local=False,
            versions=versions(),
            files=dict(files),
            save=save,
        )


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
    """The newest states in memory that are newer than what is on disk. Collective over the world.

    Args:
        home: the folder that is resumed from.
        look: tells the marker and the step of the newest checkpoint on disk.
        engine: which of the job's.
        layout: of the model, if that is known.
        needed: a file that some rank has to have kept with its copy.

    Raises:
        MicsCheckpointError: another rank has died.
    """
    marker, on_disk = _on_disk(look)
    path = region(asked.memory_folder, job_key(asked.job))
    for source in _sources(_usable(path, engine, home, marker, asked.job is not None, layout), engine, home, marker):
        if source.step <= on_disk:
            log_rank0(f"memory has step {source.step}, {home} has step {on_disk}, which is used")
            return None
        own = [copy for place in source.of_rank(dist.get_rank()) for copy in source.here[place][:1]]
        if not needed or elementwise_max([int(any(needed in _own_files(copy) for copy in own))]) == [1]:
            return source._replace(on_disk=on_disk)
        log_rank0(f"the copies of step {source.step} in memory lack {needed}, and are not used")
    return None


def _on_disk(look: Callable[[], tuple[str, int]]) -> tuple[int, int]:
    """The marker, as a number, and the step of what is on disk, as rank 0 sees it. Collective over the world."""
    number, step = 0, -1
    if dist.get_rank() == 0:
        try:
            marker, step = look()
            number = number_of(marker)
        except (OSError, MicsCheckpointError) as error:
            logger.warning("the newest checkpoint cannot be read: %s", describe_error(error))
    number, step = elementwise_max([number, step])
    return number, step


def _sources(usable: list[Copy], engine: int, home: str, marker: int) -> Iterator[Source]:
    """Steps of which every slice is somewhere, undamaged, the newest first. Collective over the world, as far as it is
    used."""
    below = NEVER
    while True:
        usable = [copy for copy in usable if copy.description.step < below and described_by(copy.path).exists()]
        [newest] = elementwise_max([max((copy.description.step for copy in usable), default=-1)])
        here = [copy for copy in usable if copy.description.step == newest]
        # An older copy may be of a time when the disk said this; the newest one tells that it was set back since.
        [set_back] = elementwise_max([int(not all(_fits(copy, home, marker) for copy in here))])
        if newest < 0 or set_back:
            said = "no complete set of copies in memory"
            if newest >= 0 and below == NEVER:
                said = (
                    f"memory at step {newest} is not used: {home} has another newest checkpoint than it had then "
                    f"(saved since, set back, or removed)"
                )
            log_rank0(said)
            return
        source = _vouched_for(newest, engine, here)
        if source is None:
            below = newest
            continue
        bad = [copy for place in source.of_rank(dist.get_rank()) for copy in source.here[place] if not _is_good(copy)]
        for copy in bad:
            forget(copy.path)
        if elementwise_max([len(bad)]) == [0]:
            below = newest
            yield source


def _vouched_for(step: int, engine: int, here: list[Copy]) -> Source | None:
    """Return the rank that vouches for each copy, or ``None`` if a copy has none. Collective over the world."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    cuts = [(place.slices, place.shards, place.group + 1) for place in (copy.description.place for copy in here)]
    slices, shards, groups = elementwise_max([max(numbers, default=0) for numbers in zip(*cuts)] or [0, 0, 0])
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
    return Source(step, engine, shards, slices, groups, holders, by_place)


def _is_good(copy: Copy) -> bool:
    """Return whether the content of a copy is what was written. If not, the log says so."""
    with closing(SharedMemory(path=copy.path)) as memory:
        try:
            memory.map(copy.description.staged.nbytes)
            copy.require_same(memory)
        except (OSError, MicsCheckpointError) as error:
            logger.warning("%s", describe_error(error))
            return False
    return True


def _fits(copy: Copy, home: str, marker: int) -> bool:
    """Return whether the disk says what it said when a copy was made. A named job may resume from any folder."""
    return marker in copy.description.homes.get(home, [marker])


def _usable(path: Path, engine: int, home: str, marker: int, named: bool, layout: str | None) -> list[Copy]:
    """Copies on this node that this job may go on from, if the disk says what it said. Arguments as for
    :func:`find`; ``named`` tells whether the job was given a name."""
    try:
        found = list(copies(path))
    except (OSError, MicsCheckpointError) as error:
        logger.warning("memory of earlier runs is not used: %s", describe_error(error))
        return []
    usable, reasons = [], set()
    for copy in found:
        description = copy.description
        if description.engine != engine:
            continue
        if layout is not None and description.layout != layout:
            reasons.add("it is of another model or another number of shards")
        elif description.stale:
            reasons.add(description.stale)
        elif home not in description.homes and not named:
            reasons.add(
                f'the job never saved to {home}; name the job ("mics_checkpoint": {{"job": ...}}) to use it anyway'
            )
        else:
            usable.append(copy)
    for reason in sorted(reasons) if not any(_fits(copy, home, marker) for copy in usable) else ():
        log_rank0(f"memory in {path} is not used: {reason}")
    return usable


# --------------------------------------------------------------------------------------------------
# Bringing slices to where they are needed


def _fetch_shard(source: Source, group: int, shard: int, first: int) -> tuple[Shard, dict[int, bytes]]:
    """Put a shard together from its slices. No collective.

    Args:
        first: the slice to begin with. If every rank begins with another one, all that have one send at the same time.

    Returns:
        The shard, and by global rank what belongs to a rank alone.

    Raises:
        MicsCheckpointError: a slice has changed since, or its node is gone, or there is not enough memory.
    """
    found, own = Shard(lasting=True), dict[int, bytes]()
    for turn in range(source.slices):
        place = Place(group, shard, (first + turn) % source.slices, source.shards, source.slices)
        copy, memory = _slice_here(source, place) or _slice_elsewhere(source, place)
        with closing(memory):
            found.add(copy.description.staged, place.slice, memory)
            own[copy.description.rank] = bytes(memory.buffer(*copy.description.staged.own))
    return found, own


def _slice_here(source: Source, place: Place) -> tuple[Copy, SharedMemory] | None:
    for copy in filter(_is_good, source.here.get(place.number, ())):
        memory = SharedMemory(path=copy.path)
        memory.map(copy.description.staged.nbytes)
        return copy, memory
    return None


def _slice_elsewhere(source: Source, place: Place) -> tuple[Copy, SharedMemory]:
    background, holder, memory = Background.current, source.holders[place.number], SharedMemory()
    assert background is not None, "started if any rank lacks a slice"
    which = {"name": place.name(source.engine), "step": source.step}
    text = fetch(background.neighbour(holder), Run.token, which, memory)
    copy = understood(text, Path(f"the copy of rank {holder}"))
    if copy is None or copy.description.place != place:
        raise MicsCheckpointError(f"rank {holder} has slice {place.slice} of shard {place.shard} no more")
    copy.require_same(memory)
    return copy, memory


def _start_writers(source: Source, wanted: Iterable[tuple[int, int]], path: Path) -> None:
    """Start the processes that give copies to others, if some rank lacks one. Collective over the world.

    Args:
        wanted: group and shard of all that this rank needs.
    """
    places = (
        Place(group, shard, number, source.shards, source.slices).number
        for group, shard in wanted
        for number in range(source.slices)
    )
    if elementwise_max([int(any(place not in source.here for place in places))]) == [1]:
        Background.of_job().serve(path)


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
    """The newest states in memory, if they are newer than those in a folder. Collective over the world.

    Returns:
        ``None``, on every rank, if the disk is to be used: there are none, or something went wrong on some rank.

    Raises:
        MicsCheckpointError: another rank has died.
    """
    started, home, place = time.monotonic(), os.path.realpath(load_dir), tier.place
    source = find(
        tier.request, home, lambda: folders.newest(Path(load_dir)), engine=tier.engine_index, layout=tier.layout
    )
    if source is None:
        return None
    agreed, states, own = time.monotonic(), dict[str, Any](), None
    try:
        _start_writers(source, [(place.group, place.shard)], tier.folder)
        with raised_on_all_ranks("resuming from memory", "States in memory could not be used."):
            shard, parts = _fetch_shard(source, place.group, place.shard, place.slice % source.slices)
            for name, each in shard.files:
                states[name] = Image.of(each).load(functools.partial(seam.load_states, name=name))
            own = _own_part(parts[tier.roles.rank]) if tier.roles.rank in parts else None
            [model], [optimizer] = ([states[name] for name in states if name.endswith(kind)] for kind in _KINDS)
    except MicsCheckpointError as error:
        log_rank0(f"the disk is used: {error}", level=30)
        return None
    said = (
        f"memory at step {source.step} (on disk: {f'step {source.on_disk}' if source.on_disk >= 0 else 'nothing'}). "
        f"Agreed on in {agreed - started:.2f} s, fetched in {time.monotonic() - agreed:.2f} s"
    )
    return Restored(model, optimizer, own, said)


_KINDS = ("_model_states.pt", "_optim_states.pt")


def _own_part(content: bytes) -> dict[str, Any]:
    return seam.load_states(io.BytesIO(content), name="what a rank kept in memory of its own")


# --------------------------------------------------------------------------------------------------
# For a framework's folder


def _own_files(copy: Copy) -> Files:
    """Return the files that the framework kept with a copy."""
    with closing(SharedMemory(path=copy.path)) as memory:
        memory.map(copy.description.staged.nbytes)
        return _own_part(bytes(memory.buffer(*copy.description.staged.own))).get("files", {})


def write(
    asked: CheckpointRequest, source: Source, folder_of: Callable[[int], Path], step_in: Callable[[Files], int]
) -> Path:
    """Make a checkpoint of the copies. Collective over the world.

    Args:
        folder_of: the folder for it, by the framework's own step.
        step_in: that step, by some rank's files; -1 where they do not tell.

    Raises:
        MicsCheckpointError: on every rank: it could not be written.
    """
    Run.begin()
    rank = dist.get_rank()
    own = [_own_files(copy) for place in source.of_rank(rank) for copy in source.here[place][:1]]
    [step] = elementwise_max([max(map(step_in, own), default=-1)])
    folder, tag, save = folder_of(step), f"global_step{source.step}", f"{Run.name}{Run.next_number():04x}"
    staging = folders.Staging(folder / tag, save)
    shards = [(group, shard) for group in range(source.groups) for shard in range(source.shards)]
    mine = [each for number, each in enumerate(shards) if _writer_of(number, len(shards)) == rank]
    _start_writers(source, mine, region(asked.memory_folder, job_key(asked.job)))

    def write_shards(_errors: list[str]) -> dict[str, FileRecord]:
        written = [_write_shard(source, *each, folder, staging.folder) for each in mine]
        return {name: record for files in written for name, record in files.items()}

    try:
        write_together(staging, folder, 0, write_shards, functools.partial(source.describe, tag, save), _REMEDY)
    except BaseException:
        staging.abandon()
        raise
    log_rank0(f"{folder} was made from memory, at step {source.step}")
    return folder


def _writer_of(number: int, count: int) -> int:
    """The rank that writes a shard: they are spread over all."""
    ranks = dist.get_world_size()
    return number * ranks // count if count <= ranks else number % ranks


def _write_shard(source: Source, group: int, shard: int, folder: Path, staging: Path) -> dict[str, FileRecord]:
    """Write the files of one shard, and what its ranks had of their own."""
    found, parts = _fetch_shard(source, group, shard, 0)
    for name, each in found.files:
        replay(each, staging / name)
    names = [name for name, _ in found.files]
    for owner, content in parts.items():
        part = _own_part(content)
        for name, inner in part["files"].items():
            (folder / name).write_bytes(inner)
        if "states" in part:
            names.append(OWN_STATE.format(rank=owner))
            torch.save(part["states"], staging / names[-1])
    return {name: manifest.seal(staging / name, dist.get_rank()) for name in names}
