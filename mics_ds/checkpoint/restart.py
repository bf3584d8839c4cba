"""Resuming from memory: the newest copies of all shards that exist somewhere, brought to where they are needed.

All ranks agree on the step. Nodes that lack a shard, because they are new or ranks were numbered anew, get it from a
sibling. Each node then has a checkpoint in its memory, which is loaded like any other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..errors import MicsCheckpointError, words
from ..log import log_rank0, logger
from ..seams import checkpoint as seam
from ..seams.engine import communication_device
from . import manifest, memory, names
from .arena import Arena
from .memory import Copy, Description
from .snapshot import MemoryTier, set_random_states
from .together import Site, attempt, exchange, greatest, on_publishers, raise_together

_CHUNK = 64 << 20
_NOBODY = 1 << 40
_RESTORED = "restored"


class _Source(NamedTuple):
    """Copies of the step that all shards have."""

    step: int
    holders: list[int]
    """Global rank that has a good copy of each shard, by model-parallel rank and shard."""
    own: dict[int, Copy]
    """Those that this rank vouches for, by place in :attr:`holders`."""
    here: list[Copy]
    """Those on this node, good or not."""


class Restored(NamedTuple):
    """A checkpoint in this node's memory."""

    folder: Path
    tag: str
    site: Site
    own: dict[str, Any] | None
    """This rank's client state and random numbers, if a copy had them."""
    step: int
    words: str
    """Where it came from."""


@contextmanager
def restored(tier: MemoryTier, engine: Any, load_dir: str | os.PathLike) -> Iterator[Restored | None]:
    """The newest checkpoint in memory, if it is newer than the one in a folder. Collective over the world.

    Raises:
        MicsCheckpointError: another rank has died.
    """
    started = time.monotonic()
    source = _agree(tier, engine, os.path.realpath(load_dir))
    on_disk = _newest_on_disk(load_dir)
    if source is None or on_disk >= source.step:
        if source is not None:
            log_rank0(f"memory has step {source.step}, {load_dir} has step {on_disk}, which is loaded")
        yield None
        return
    folder = tier.folder / _RESTORED
    try:
        with ExitStack() as stack:
            copy, arena, came_from = _fetch(tier, engine, source, stack)
            tag = f"global_step{source.step}"
            _write(tier.site, copy, arena, folder, tag, source.step)
            own = None if copy is None else memory.own_part(copy, arena, dist.get_rank())
            siblings = exchange({"sibling": came_from == "sibling"}, "fetching states from memory")
            count = sum(note["sibling"] for note in siblings)
            said = (
                f"memory at step {source.step} (on disk: {f'step {on_disk}' if on_disk >= 0 else 'nothing'}); "
                f"{count} ranks got their shard from a sibling, in {time.monotonic() - started:.2f} s"
            )
        yield Restored(folder, tag, tier.site, own, source.step, said)
    finally:
        if tier.site.publishes:
            memory.remove(folder)


def resume_random_numbers(found: Restored) -> None:
    if found.own is not None:
        set_random_states(found.own["random"])


# --------------------------------------------------------------------------------------------------
# Which step


def _agree(tier: MemoryTier, engine: Any, home: str) -> _Source | None:
    """The newest step of which every shard is somewhere, and who has it."""
    shards = tier.site.groups.layout.partition_size
    places = shards * (dist.get_world_size() // tier.site.groups.layout.world_size)
    usable = _usable(tier, engine, home)
    below = _NOBODY
    for _ in range(2 * memory.SLOTS):
        steps = [copy.description.step for copy in usable]
        [newest] = greatest([max((step for step in steps if step < below), default=-1)])
        if newest < 0:
            break
        here = [copy for copy in usable if copy.description.step == newest]
        own = _good(tier, here, shards)
        holders = [dist.get_rank() if place in own else _NOBODY for place in range(places)]
        holders = [-negated for negated in greatest([-holder for holder in holders])]
        if max(holders) < _NOBODY:
            return _Source(newest, holders, own, here)
        lost = [place for place, holder in enumerate(holders) if holder == _NOBODY]
        log_rank0(f"of step {newest}, shards {lost[:8]} are in no node's memory")
        below = newest
    log_rank0("no complete set of copies in memory")
    return None


def _usable(tier: MemoryTier, engine: Any, home: str) -> list[Copy]:
    """Copies on this node that this job may resume from."""
    try:
        found = list(memory.copies(tier.folder))
    except (OSError, MicsCheckpointError) as error:
        logger.warning("memory of earlier runs is not used: %s", words(error))
        return []
    usable = []
    for copy in found:
        description = copy.description
        if description.layout != tier.layout(engine):
            reason = "it is of another model or another number of shards"
        elif description.stale:
            reason = description.stale
        elif tier.request.job is None and home not in description.homes:
            reason = f'the job never saved to {home}; name the job ("mics_checkpoint": {{"job": ...}}) to use it anyway'
        else:
            usable.append(copy)
            continue
        logger.info("%s is not used: %s", copy.path, reason)
    return usable


def _good(tier: MemoryTier, copies: list[Copy], shards: int) -> dict[int, Copy]:
    """Those whose content is what was written. The ranks of a node share the reading."""
    neighbours = tier.site.peers
    turn = neighbours.index(tier.site.rank)
    good = {}
    for index, copy in enumerate(copies):
        if index % len(neighbours) != turn:
            continue
        if not is_good(copy):
            continue
        model_parallel = int(copy.path.name.partition("-")[0].removeprefix("mp"))
        good[model_parallel * shards + copy.description.shard] = copy
    return good


def is_good(copy: Copy) -> bool:
    try:
        with memory.opened(copy.path) as arena:
            memory.check(copy, arena)
    except (OSError, MicsCheckpointError) as error:
        logger.warning("%s", words(error))
        return False
    return True


def _newest_on_disk(load_dir: str | os.PathLike) -> int:
    """The step that ``latest`` names, as rank 0 sees it; -1 if there is none that can be read."""
    step = -1
    if dist.get_rank() == 0:
        try:
            tag = names.read_latest(Path(load_dir))
            if tag is not None:
                step = manifest.read(Path(load_dir) / tag).global_steps
        except (OSError, MicsCheckpointError) as error:
            logger.warning("%s cannot be read: %s", load_dir, words(error))
    return greatest([step])[0]


# --------------------------------------------------------------------------------------------------
# Bringing shards to where they are needed


def _fetch(tier: MemoryTier, engine: Any, source: _Source, stack: ExitStack) -> tuple[Description | None, Arena, str]:
    """The copy of this rank's shard, on the ranks that keep one for their node. Collective over the world."""
    site = tier.site
    place = seam.model_parallel_rank(engine) * site.groups.layout.partition_size + site.shard
    name = memory.shard_name(seam.model_parallel_rank(engine), site.shard)
    found = [copy for copy in source.here if copy.path.stem == name and is_good(copy)]
    wants = [-1] * dist.get_world_size()
    wants[site.rank] = place if tier.keeps and not found else -1
    received: list[tuple[Description, Arena]] = []
    for rank, wanted in enumerate(greatest(wants)):
        if wanted < 0:
            continue
        if source.holders[wanted] == site.rank:
            _send(source.own[wanted], rank)
        if rank == site.rank:
            received.append(_receive(source.holders[wanted]))
    if received:
        stack.callback(received[0][1].close)
        return *received[0], "sibling"
    if not tier.keeps or not found:
        return None, Arena(), ""
    arena = stack.enter_context(memory.opened(found[0].path))
    arena.map(found[0].description.nbytes)
    return found[0].description, arena, "node"


def _send(copy: Copy, rank: int) -> None:
    device = communication_device()
    text = torch.frombuffer(bytearray(memory.dumps(copy.description).encode()), dtype=torch.uint8)
    dist.send(torch.tensor([text.numel(), copy.description.nbytes], device=device), rank)
    dist.send(text.to(device), rank)
    with memory.opened(copy.path) as arena:
        arena.map(copy.description.nbytes)
        for start in range(0, copy.description.nbytes, _CHUNK):
            dist.send(arena.view(start, min(_CHUNK, copy.description.nbytes - start)).to(device), rank)


def _receive(rank: int) -> tuple[Description, Arena]:
    device = communication_device()
    sizes = torch.zeros(2, dtype=torch.int64, device=device)
    dist.recv(sizes, rank)
    text = torch.empty(int(sizes[0]), dtype=torch.uint8, device=device)
    dist.recv(text, rank)
    description = memory.loads(bytes(text.tolist()))
    assert description is not None, "as it was sent"
    arena = Arena()
    arena.reserve(description.nbytes)
    for start in range(0, description.nbytes, _CHUNK):
        part = torch.empty(min(_CHUNK, description.nbytes - start), dtype=torch.uint8, device=device)
        dist.recv(part, rank)
        arena.view(start, part.numel()).copy_(part)
    return description, arena


def _write(site: Site, copy: Description | None, arena: Arena, folder: Path, tag: str, step: int) -> None:
    """Make a checkpoint of the copies on each node, in its memory. Collective over the world."""
    staging = manifest.staging_folder(folder / tag)

    def make() -> None:
        memory.remove(folder)
        memory.make_region(folder.parent)
        staging.mkdir(parents=True)

    failed = "States in memory could not be used."
    raise_together(on_publishers(site, make, "resuming from memory"), failed, _REMEDY)
    note: dict[str, Any] = {"errors": [], "files": {}}

    def write() -> None:
        if copy is not None:
            written = memory.write_files(copy, arena, staging)
            note["files"] = manifest.noted({path.name: manifest.seal(path, site.rank) for path in written})

    attempt(write, note["errors"])
    notes = exchange(note, "resuming from memory")
    raise_together(notes, failed, _REMEDY)

    def publish() -> None:
        files = manifest.recorded(notes[rank]["files"] for rank in site.peers)
        manifest.publish(staging, folder / tag, site.describe(tag, step, files))

    raise_together(on_publishers(site, publish, "resuming from memory"), failed, _REMEDY)


_REMEDY = "Remove the memory of this job (python -m mics_ds.memory --remove) to resume from disk."
