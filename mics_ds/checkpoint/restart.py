"""Resuming from memory: the newest copies of all shards that exist somewhere, brought to where they are needed.

All ranks agree on the step. Nodes that lack a shard, because they are new or ranks were numbered anew, get it from a
sibling. Each node then has a checkpoint in its memory, which is loaded like any other.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..deepspeed_compat import checkpoint as seam
from ..deepspeed_compat.engine import communication_device
from ..errors import MicsCheckpointError, words
from ..log import log_rank0, logger
from . import manifest, memory, names
from .memory import Copy
from .snapshot import MemoryTier, set_random_states
from .together import Site, attempt, exchange, greatest, on_publishers, raise_together
from .transfers import is_good, transfer

_RESTORED = "restored"
_OWN = "own-rank{rank}.pt"


class _Source(NamedTuple):
    """Copies of the step that all shards have."""

    step: int
    slices: int
    """Into how many each shard is cut."""
    holders: list[int]
    """Global rank that has a good copy of each, by model-parallel rank, shard and slice."""
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
    agreed = time.monotonic()
    try:
        with ExitStack() as stack:
            shard, count = _fetch(tier, engine, source, stack)
            fetched = time.monotonic()
            tag = f"global_step{source.step}"
            _write(tier.site, shard, folder, tag, source.step)
            what = "their shard from a sibling" if source.slices == 1 else "slices of their shard from siblings"
            said = (
                f"memory at step {source.step} (on disk: {f'step {on_disk}' if on_disk >= 0 else 'nothing'}); "
                f"{count} ranks got {what}. Checked in {agreed - started:.2f} s, fetched in {fetched - agreed:.2f} s, "
                f"put into files in {time.monotonic() - fetched:.2f} s"
            )
        yield Restored(folder, tag, tier.site, _own_part(folder / tag), source.step, said)
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
    model_parallel = dist.get_world_size() // tier.site.groups.layout.world_size
    usable = _usable(tier, engine, home)
    below = memory.NEVER
    for _ in range(2 * memory.SLOTS):
        steps = [copy.description.step for copy in usable]
        [newest] = greatest([max((step for step in steps if step < below), default=-1)])
        if newest < 0:
            break
        here = [copy for copy in usable if copy.description.step == newest]
        [slices] = greatest([max((copy.description.slices for copy in here), default=1)])
        here = [copy for copy in here if copy.description.slices == slices]
        own = _good(tier, here, shards)
        places = range(model_parallel * shards * slices)
        holders = [dist.get_rank() if place in own else memory.NOBODY for place in places]
        holders = [-negated for negated in greatest([-holder for holder in holders])]
        if max(holders) < memory.NOBODY:
            return _Source(newest, slices, holders, own, here)
        lost = sorted({place // slices for place, holder in enumerate(holders) if holder == memory.NOBODY})
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
        good[copy.place(shards)] = copy
    return good


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


def _fetch(tier: MemoryTier, engine: Any, source: _Source, stack: ExitStack) -> tuple[memory.Assembly | None, int]:
    """This rank's shard, on the ranks that assemble one for their node. Collective over the world.

    Everybody asks for one slice at a time, each for another one, so that all who have one send at the same time.

    Returns:
        The shard, and how many ranks got something from another node.

    Raises:
        MicsCheckpointError: on every rank: one of them has no room for it.
    """
    site, slices = tier.site, source.slices
    shards = site.groups.layout.partition_size
    assembles = site.writer == site.rank
    first = (seam.model_parallel_rank(engine) * shards + site.shard) * slices
    here = {}
    for copy in source.here if assembles else ():
        place = copy.place(shards)
        if place in range(first, first + slices) and (place in source.own or is_good(copy)):
            here[place] = copy
    shard, errors, received = memory.Assembly(), list[str](), False
    stack.callback(shard.close)
    turn = site.groups.layout.replication_groups[site.shard].index(site.rank)
    lacking = {number for number in range(slices) if assembles and first + number not in here}
    wants = _wants_of_all(first, turn, lacking, slices)
    for wave in range(slices):
        wanted = first + (turn + wave) % slices
        asked = [(rank, want.at(wave)) for rank, want in enumerate(wants)]
        sends = [
            (source.own[place], rank)
            for rank, place in asked
            if place is not None and source.holders[place] == site.rank
        ]
        lacks = wants[site.rank].at(wave) is not None
        got = transfer(sends, source.holders[wanted] if lacks else None, errors)
        received |= got is not None
        if assembles and not lacks:
            got = here[wanted].open()
        if got is not None:
            attempt(functools.partial(shard.add, *got), errors)
    notes = exchange({"errors": errors, "received": received}, "fetching states from memory")
    raise_together(notes, _FAILED, memory.REMEDY)
    return shard if assembles else None, sum(note["received"] for note in notes)


class _Wants(NamedTuple):
    """Which slices a rank has to get from others."""

    first: int
    """The place of the first slice of its shard."""
    turn: int
    """The one that it asks for first."""
    lacking: frozenset[int]
    slices: int

    def at(self, wave: int) -> int | None:
        """The place of what it asks for now, if that is something it lacks."""
        number = (self.turn + wave) % self.slices
        return self.first + number if number in self.lacking else None


_BITS = 32


def _wants_of_all(first: int, turn: int, lacking: set[int], slices: int) -> list[_Wants]:
    """What each rank of the world wants, by 16 bytes and 2 bits for each slice of all of them. Collective."""
    masks = [sum(1 << bit for bit in range(_BITS) if start + bit in lacking) for start in range(0, slices, _BITS)]
    own = torch.tensor([first, turn, *masks], dtype=torch.int64, device=communication_device())
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    wants = []
    for first_, turn_, *masks in torch.stack(found).tolist():
        numbers = (_BITS * word + bit for word, mask in enumerate(masks) for bit in range(_BITS) if mask >> bit & 1)
        wants.append(_Wants(first_, turn_, frozenset(numbers), slices))
    return wants


def _write(site: Site, shard: memory.Assembly | None, folder: Path, tag: str, step: int) -> None:
    """Make a checkpoint of the copies on each node, in its memory. Collective over the world."""
    staging = manifest.staging_folder(folder / tag)

    def make() -> None:
        memory.remove(folder)
        memory.make_region(folder.parent)
        staging.mkdir(parents=True)

    raise_together(on_publishers(site, make, "resuming from memory"), _FAILED, memory.REMEDY)
    note: dict[str, Any] = {"errors": [], "files": {}}

    def write() -> None:
        if shard is not None:
            written = shard.write(staging)
            note["files"] = manifest.noted({path.name: manifest.seal(path, site.rank) for path in written})
            for rank, part in shard.own.items():
                if int(rank) in site.peers:
                    (staging / _OWN.format(rank=rank)).write_bytes(part)

    attempt(write, note["errors"])
    notes = exchange(note, "resuming from memory")
    raise_together(notes, _FAILED, memory.REMEDY)

    def publish() -> None:
        files = manifest.recorded(notes[rank]["files"] for rank in site.peers)
        manifest.publish(staging, folder / tag, site.describe(tag, step, files))

    raise_together(on_publishers(site, publish, "resuming from memory"), _FAILED, memory.REMEDY)


def _own_part(folder: Path) -> dict[str, Any] | None:
    """This rank's client state and random numbers."""
    path = folder / _OWN.format(rank=dist.get_rank())
    return torch.load(path, weights_only=False) if path.exists() else None


_FAILED = "States in memory could not be used."
