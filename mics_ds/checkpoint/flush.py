"""Copies in memory written to disk as a complete checkpoint, before there is an engine: for frameworks that look for a
folder to resume from first.

All ranks agree on the newest step of which every shard is somewhere. One rank writes each shard, put together from its
slices where it was cut into some, with what the framework would have written beside it, and the first rank publishes.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist

from .. import __version__
from ..config import CheckpointRequest
from ..deepspeed_compat import checkpoint as seam
from ..errors import MicsCheckpointError, words
from ..log import log_rank0, logger
from . import manifest, memory, names
from .manifest import CLIENT_STATE, Manifest
from .memory import Copy
from .together import attempt, exchange, greatest, raise_together
from .transfers import is_good, transfer

Files = dict[str, bytes]
_FAILED = "States in memory could not be written to disk."


class Source(NamedTuple):
    """Copies of the step that all shards have."""

    step: int
    mine: dict[int, Copy]
    """Those that this rank vouches for, by model-parallel rank, shard and slice."""
    holders: list[int]
    """Who vouches for each."""
    slices: int
    """Into how many each shard is cut."""
    shards: int
    models: int
    """Model-parallel ranks."""

    @property
    def writers(self) -> list[int]:
        """The rank that writes each shard, by model-parallel rank and shard: who has it, or else spread over all."""
        if self.slices == 1:
            return self.holders
        ranks, count = dist.get_world_size(), self.models * self.shards
        return [number * ranks // count if count <= ranks else number % ranks for number in range(count)]


def find(asked: CheckpointRequest, home: str, needed: str, newer_than: int) -> Source | None:
    """The newest states in memory that are newer than what is on disk. Collective over the world.

    Args:
        home: the folder that the framework resumes from.
        needed: a file that the framework cannot do without.
        newer_than: the step on disk, as any rank sees it.

    Raises:
        MicsCheckpointError: another rank has died.
    """
    usable = _usable(asked, home)
    [on_disk] = greatest([newer_than])
    below = memory.NEVER
    while True:
        [newest] = greatest([max((step for copy in usable if (step := copy.description.step) < below), default=-1)])
        if newest <= on_disk:
            if newest >= 0:
                log_rank0(f"memory has step {newest}, {home} has step {on_disk}, which is resumed from")
            return None
        here = [copy for copy in usable if copy.description.step == newest]
        [slices] = greatest([max((copy.description.slices for copy in here), default=1)])
        here = [copy for copy in here if copy.description.slices == slices]
        source = _share_out(here, newest, slices)
        if source is None:
            log_rank0(f"of step {newest}, some shards are in no node's memory")
            below = newest
            continue
        bad = [copy for copy in source.mine.values() if not is_good(copy)]
        usable = [copy for copy in usable if copy not in bad]
        own = [part for copy in source.mine.values() if copy not in bad for part in _own_files(copy)]
        damaged, known = greatest([len(bad), any(needed in files for files in own)])
        if damaged:
            continue
        if known:
            return source
        log_rank0(f"the copies of step {newest} in memory lack {needed}, and are not used")
        below = newest


def _usable(asked: CheckpointRequest, home: str) -> list[Copy]:
    """Copies on this node that this job may resume from."""
    region = memory.region(asked.memory_folder, memory.job_key(asked.job))
    try:
        found = list(memory.copies(region))
    except (OSError, MicsCheckpointError) as error:
        logger.warning("memory of earlier runs is not used: %s", words(error))
        return []
    return [
        copy
        for copy in found
        if not copy.description.stale and (asked.job is not None or home in copy.description.homes)
    ]


def _share_out(here: list[Copy], step: int, slices: int) -> Source | None:
    """Who vouches for which copy: one of the ranks that have it, not always the same. ``None`` if nobody has some."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    [shards, models] = greatest(
        [
            max((copy.description.shards for copy in here), default=0),
            max((copy.model_parallel + 1 for copy in here), default=0),
        ]
    )
    found = {copy.place(shards): copy for copy in here}
    places = range(shards * models * slices)
    negated = greatest([-((rank - place) % ranks) if place in found else -memory.NOBODY for place in places])
    if min(negated) == -memory.NOBODY:
        return None
    holders = [(place - turn) % ranks for place, turn in enumerate(negated)]
    mine = {place: found[place] for place, holder in enumerate(holders) if holder == rank}
    return Source(step, mine, holders, slices, shards, models)


def _own_files(copy: Copy) -> list[Files]:
    """What the framework kept with a shard, for each of its ranks."""
    with memory.opened(copy.path) as arena:
        arena.map(copy.description.nbytes)
        parts = (arena.buffer(*place) for place in copy.description.own.values())
        return [torch.load(io.BytesIO(part), weights_only=False).get("files", {}) for part in parts]


def write(source: Source, folder_of: Callable[[int], Path], step_in: Callable[[Files], int]) -> Path:
    """Make a checkpoint of the copies. Collective over the world.

    Args:
        folder_of: the folder for it, by the framework's own step.
        step_in: that step, by some rank's files; -1 where they do not tell.

    Raises:
        MicsCheckpointError: on every rank: it could not be written.
    """
    files: Files = {}
    for copy in source.mine.values():
        for part in _own_files(copy):
            files.update(part)
    [step] = greatest([step_in(files)])
    folder, tag = folder_of(step), f"global_step{source.step}"
    staging = manifest.staging_folder(folder / tag)
    note: dict[str, Any] = {"errors": [], "files": {}, "ranks": 0}

    def write_own() -> None:
        staging.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        for copy in source.mine.values():
            replicas = max(len(copy.description.own), copy.description.slices)
            note["ranks"] = max(note["ranks"], source.shards * replicas)

    def write_shard(shard: memory.Assembly) -> None:
        written = [*shard.write(staging), *_write_rank_states(shard, staging)]
        note["files"] |= manifest.noted({path.name: manifest.seal(path, dist.get_rank()) for path in written})

    attempt(write_own, note["errors"])
    for shard in _shards(source, note["errors"]):
        attempt(functools.partial(write_shard, shard), note["errors"])
    notes = exchange(note, f"writing {folder}")
    raise_together(notes, _FAILED, memory.REMEDY)
    note = {"errors": []}

    def publish() -> None:
        described = _describe(source, tag, max(said["ranks"] for said in notes))
        records = manifest.recorded(said["files"] for said in notes)
        manifest.publish(staging, folder / tag, Manifest(**described, files=records))
        names.write_latest(folder, tag)
        manifest.add_scripts(seam.recovery_scripts(), folder)

    if dist.get_rank() == 0:
        attempt(publish, note["errors"])
    raise_together(exchange(note, f"publishing {folder}"), _FAILED, memory.REMEDY)
    log_rank0(f"{folder} was made from memory, at step {source.step}")
    return folder


def _write_rank_states(shard: memory.Assembly, staging: Path) -> Iterator[Path]:
    """Write what each rank had of its own, where ranks differed."""
    for rank, part in shard.own.items():
        states = torch.load(io.BytesIO(part), weights_only=False).get("states")
        if states is not None:
            path = staging / CLIENT_STATE.format(rank=rank)
            torch.save(states, path)
            yield path


def _shards(source: Source, errors: list[str]) -> Iterator[memory.Assembly]:
    """The shards that this rank writes, one after the other. Collective over the world, to the end.

    Args:
        errors: for what this rank alone could not do.
    """
    rank, rounds = dist.get_rank(), list[dict[int, int]]()
    for number, writer in enumerate(source.writers):  # a rank receives one at a time
        free = next((round_ for round_ in rounds if writer not in round_), None)
        if free is None:
            rounds.append({writer: number})
        else:
            free[writer] = number
    for round_ in rounds:
        shard = memory.Assembly()
        for wave in range(source.slices):
            wanted = {
                writer: number * source.slices + (number + wave) % source.slices for writer, number in round_.items()
            }
            place = wanted.get(rank)
            sends = [
                (source.mine[wanted_], writer)
                for writer, wanted_ in wanted.items()
                if source.holders[wanted_] == rank != writer
            ]
            lacks = place is not None and place not in source.mine
            got = transfer(sends, source.holders[place] if lacks and place is not None else None, errors)
            if place is not None and not lacks:
                got = source.mine[place].open()
            if got is not None:
                attempt(functools.partial(shard.add, *got), errors)
        if rank in round_ and not errors:
            yield shard
        shard.close()


def _describe(source: Source, tag: str, ranks: int) -> Mapping[str, Any]:
    return {
        "tag": tag,
        "shards": source.shards,
        "replicas": ranks // source.shards,
        "ranks": ranks,
        "ranks_per_node": (ranks,),  # of nodes that may be gone
        "model_parallel": source.models,
        "global_steps": source.step,
        "node_local": False,
        "versions": {"mics_ds": __version__, "deepspeed": deepspeed.__version__, "torch": torch.__version__},
    }
