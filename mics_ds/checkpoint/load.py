"""Load under MiCS: read once, check before anything is changed, in as many shards as were saved or cut anew.

Every replica of a shard reads 1/r of its files and sums that up; they exchange what they have read, and compare the
sums with the manifest. DeepSpeed's own ``load_checkpoint`` gets the states, whole, where it would read files.
"""

from __future__ import annotations

import functools
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import torch
import torch.distributed as dist
from tqdm import tqdm

from ..comm import collectives
from ..comm.rank_group import RankGroup
from ..deepspeed_compat import checkpoint as seam
from ..deepspeed_compat.checkpoint import LoadedStates
from ..deepspeed_compat.engine import communication_device, is_fresh, set_random_states
from ..errors import MicsCheckpointError, noting
from ..log import log_rank0
from ..shards import cut as cutting
from ..shards.cut import Cut, ShardLayout
from ..shards.misfits import Parameters, what_else_it_is, why_not_these, why_not_these_weights
from . import folder as folders
from . import manifest, restart
from .background import Background
from .coordination import (
    RESHAPE_COMMAND,
    SLOW_S,
    UNCHANGED,
    Roles,
    agree_on_tag,
    elementwise_max,
    exchange,
    exchange_and_compare,
    manifest_or_shards,
    raised_on_all_ranks,
    restore_own,
    roles_of,
    tell_speed,
)
from .manifest import OWN_STATE, FileRecord
from .memory import MemoryTier
from .staging import Image

How = Mapping[str, Any]
"""Arguments of ``engine.load_checkpoint``."""
Result = tuple[Union[str, None], Union[dict[str, Any], None]]
"""The path and the client state."""
_BLOCK, _SEGMENT = 64 << 20, 256 << 20


def load(
    original: Callable[..., tuple],
    engine: Any,
    load_dir: str | os.PathLike,
    tag: Any = None,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    custom_load_fn: Callable | None = None,
) -> Result:
    """Load as ``engine.load_checkpoint`` of an engine with MiCS. Collective over the world.

    Raises:
        MicsCheckpointError: on every rank, before anything was changed: the checkpoint is missing,
            incomplete, damaged, of another model, or in another number of shards.
    """
    if Background.current is not None:
        Background.current.wait()
        Background.current.before_states_change()
    if hasattr(engine, "mics_replicas"):
        engine.mics_replicas.states_loaded()
    how = {
        "load_module_strict": load_module_strict,
        # Asked for the module *and* optimizer states, its default, DeepSpeed restores no sharded weights at all.
        "load_optimizer_states": load_optimizer_states and not load_module_only,
        "load_lr_scheduler_states": load_lr_scheduler_states,
        "load_module_only": load_module_only,
        "custom_load_fn": custom_load_fn,
    }
    tier: MemoryTier | None = getattr(engine, "mics_memory", None)
    resumes = tag is None and load_optimizer_states and not (load_module_only or custom_load_fn)
    if tier is not None and resumes and tier.may_resume(load_dir, load_lr_scheduler_states) and is_fresh(engine):
        found = restart.restored(tier, load_dir)
        if found is not None:
            return _resume(original, engine, found, tier, load_dir, how)
    roles = roles_of(engine)
    tag = agree_on_tag(roles, load_dir, tag)
    # If nothing was saved yet, DeepSpeed warns and returns (None, None), which frameworks rely on.
    nothing = tag is None
    result = original(engine, load_dir) if nothing else _load(original, engine, roles, Path(load_dir), tag, how)
    if tier is not None:
        tier.begins_in(load_dir)
    return result


def _resume(original: Any, engine: Any, found: restart.Restored, tier: MemoryTier, load_dir: Any, how: How) -> Result:
    """Load what memory had, and what else was in it."""
    session = LoadedStates(found.model, found.optimizer)
    if found.own is not None and "states" in found.own:
        restore_own(session.model, found.own["states"])
    _, client_state = seam.load_instead(original, engine, session, load_dir, "memory", how)
    if found.own is not None:
        set_random_states(found.own["random"])
        client_state = {**(client_state or {}), **found.own["client_state"]}
    tier.begins_in(load_dir)
    log_rank0(f"resumed from {found.words}")
    return str(tier.folder), client_state


def _load(original: Any, engine: Any, roles: Roles, folder: Path, tag: str, how: How) -> Result:
    """Load a checkpoint that is on disk. Collective over the world."""
    started, target = time.monotonic(), folder / tag
    doing, failed = f"reading {target}", f"Checkpoint {target} cannot be loaded."
    together = functools.partial(raised_on_all_ranks, doing, failed, functools.partial(_remedy, folder, tag))
    described = ""
    with together() as errors:
        if not target.is_dir():
            raise MicsCheckpointError(f"{target} does not exist")
        saved = _Saved(engine, roles, target)
        errors += _objections(saved, how["load_optimizer_states"])
        if saved.manifest is not None and not roles.node_local:
            described = saved.manifest.dumps()
    if not exchange_and_compare({}, described, doing)[1]:
        raise MicsCheckpointError(f"Ranks see different checkpoints in {target}: it is being replaced. Load it again.")
    saved.report()
    reader = _Reader(None if roles.node_local else roles.groups.replication)
    if saved.is_recut:
        with together() as errors:
            errors += _check_contents(saved)
    with together() as errors:
        model = _states(reader, saved, saved.model_states(saved.model_states_shard), errors)
        own = saved.own_state
        if model and own is not None:
            errors += manifest.damages(target, [own.name], saved.records)
        if model and own is not None and not errors:
            restore_own(model, seam.load_states(own))
        if model and not errors:
            errors += _misfits(saved, model, how)
    with together() as errors:
        session = _read_the_rest(saved, reader, model, how, errors)
    reader.complete()
    path, client_state = seam.load_instead(original, engine, session, folder, tag, how)
    if engine.optimizer.mics_guard is not None:
        engine.optimizer.mics_guard.loaded(engine, target)
    if saved.manifest is not None:
        tell_speed(target, saved.manifest.total_bytes, started)
    return path, client_state


def _remedy(folder: Path, tag: str) -> str:
    """Say what else could be loaded. Collective over the world."""
    mine: list[str] = []
    with noting([]):
        mine = folders.complete_tags(folder)
    seen = exchange({"complete": mine}, f"looking into {folder}")
    complete = sorted(set.intersection(*(set(item["complete"]) for item in seen)) - {tag})
    return f"{UNCHANGED} Complete checkpoints in {folder}: {', '.join(complete)}." if complete else UNCHANGED


# --------------------------------------------------------------------------------------------------
# What there is, and whether it fits


class _Saved:
    """A checkpoint on disk, from the point of view of one rank that loads it."""

    def __init__(self, engine: Any, roles: Roles, target: Path) -> None:
        self.engine, self.roles, self.folder = engine, roles, target
        self.manifest, self.shards = manifest_or_shards(target, roles.shard)
        self.records: Mapping[str, FileRecord] = {} if self.manifest is None else self.manifest.files
        self.is_recut = self.shards != roles.groups.partition.size
        """Whether this job has another number of shards."""
        self.reshapes = self.is_recut
        """Whether it has other shards: of another number, or of other sub-groups."""
        self.model_states_shard = roles.groups.full.rank % max(self.shards, 1)
        """The shard that this rank had, if as many ranks have saved: its file has what belongs to this rank."""
        own = target / OWN_STATE.format(rank=roles.rank)
        same_ranks = self.manifest is not None and self.manifest.ranks == roles.groups.layout.world_size
        self.own_state = own if same_ranks and own.name in self.records else None
        """The file with what this rank had of its own."""

    def model_states(self, shard: int) -> Path:
        return self.folder / seam.model_states_name(self.engine, shard)

    def optimizer_states(self, shard: int) -> Path:
        return self.folder / seam.optimizer_states_name(self.engine, shard)

    def needed(self) -> list[str]:
        """Names of the files that this rank reads."""
        shards = range(self.shards) if self.is_recut else [self.roles.shard]
        own = [] if self.own_state is None else [self.own_state.name]
        return [path(shard).name for path in (self.model_states, self.optimizer_states) for shard in shards] + own

    def report(self) -> None:
        """Say what is unusual about it."""
        if self.manifest is None:
            log_rank0(f"{self.folder} has no {manifest.NAME}, as after stock ZeRO-3: its files are loaded unchecked")
        elif self.manifest.ranks != self.roles.groups.layout.world_size:
            log_rank0(f"{self.folder} was saved by {self.manifest.ranks} ranks")


def _objections(saved: _Saved, with_optimizer: bool) -> list[str]:
    """Return why this checkpoint cannot be loaded, as far as names and sizes of its files tell this rank."""
    target, found, roles = saved.folder, saved.manifest, saved.roles
    if saved.shards == 0:
        return [what_else_it_is(target)]
    if found is not None and found.model_parallel != len(roles.offsets):
        return [f"it was saved by a job with model parallelism {found.model_parallel}"]
    needed = saved.needed()
    damages = manifest.damages(target, needed, saved.records, contents=False)
    if found is not None and not found.node_local:
        own = OWN_STATE.format(rank=roles.rank)
        lost = [name for name in {*needed, own} if name not in found.files and (target / name).exists()]
        damages += [f"{target / name} is not in its {manifest.NAME}, which is damaged" for name in lost]
    if not damages:
        return []
    other = seam.optimizer_states_name(saved.engine, 0, not saved.engine.bfloat16_enabled())
    if with_optimizer and (target / other).exists():
        damages.append("it was saved by a job of another 16-bit type (bf16 or not), whose optimizer states differ")
    elif found is not None and found.node_local and not roles.node_local:
        damages.append("it was saved with use_node_local_storage: this folder has the shards of one node only")
    elif found is not None and found.node_local and saved.is_recut:
        damages.append("it is spread over node-local folders: copy all its files to one folder to cut it anew")
    return damages


def _misfits(saved: _Saved, states: Mapping[str, Any], how: How) -> list[str]:
    """Return why this checkpoint does not fit the engine, by its model states."""
    engine, p = saved.engine, saved.roles.groups.partition.size
    mine, theirs = ShardLayout(p, seam.param_shapes(engine)), ShardLayout(saved.shards, states[cutting.PARAM_SHAPES])
    here = Parameters(mine.shapes, seam.frozen_shapes(engine))
    there = Parameters(theirs.shapes, states.get(cutting.FROZEN_SHAPES))
    if how["load_optimizer_states"]:
        saved.reshapes = not mine.same_as(theirs)
        strange = why_not_these(here, there)
    else:
        strange = why_not_these_weights(here, there) if how["load_module_strict"] else []
    if strange or not saved.reshapes or saved.roles.groups.config.reshape_checkpoint:
        return strange
    found = (
        f"it has {saved.shards} shards and this job {p}"
        if saved.is_recut
        else "its optimizer sub-groups (sub_group_size, parameter groups) are not this job's"
    )
    return [
        f'{found}: set "mics_reshape_checkpoint": true under zero_optimization to have it cut anew while loading, or '
        f"do so once with {RESHAPE_COMMAND} {saved.folder} NEW_FOLDER --shards {p}"
    ]


# --------------------------------------------------------------------------------------------------
# Reading


class _Reader:
    """Reads files with the other replicas of this rank's shard: each reads a part, and they exchange it.

    Args:
        group: the replicas; ``None`` if this rank sees another folder than they do.
    """

    def __init__(self, group: RankGroup | None) -> None:
        self._group, self._device = group, communication_device()
        self._size, self._place = (1, 0) if group is None else (group.size, group.rank)
        self._incomplete: list[torch.Tensor] = []

    def cut(self, old_shards: int, shards: int, shard: int) -> Cut:
        """Cut a shard anew together with the other replicas. :meth:`complete` adds what they have copied."""
        return Cut(old_shards, shards, shard, self._place, self._size, self._incomplete.append)

    def read(self, path: Path, record: FileRecord, errors: list[str]) -> dict[str, Any]:
        """Return the content of a file, compared with its record; nothing if there are errors on any replica.
        Collective over the replicas."""
        image, sums, failed = Image(record.bytes), list[int](), list[str]()
        with noting(failed):
            image.leave_holes(path)
        silent = dist.get_rank() != 0
        with tqdm(total=record.bytes, desc=path.name, unit="B", unit_scale=True, delay=SLOW_S, disable=silent) as bar:
            for start in range(0, record.bytes, _BLOCK):
                stop = min(start + _BLOCK, record.bytes)
                part = torch.zeros(-(-(stop - start) // self._size), dtype=torch.uint8, device="cpu")
                first = start + self._place * part.numel()
                mine = part[: max(0, min(stop - first, part.numel()))]
                with noting(failed):
                    if not failed:
                        _pread(path, mine, first)
                sums.append(-1 if failed else zlib.crc32(mine.numpy().data))
                block = self._all_gather(part).view(-1)[: stop - start]
                with noting(failed):
                    if not failed:
                        image.fill(block, start)
                bar.update(stop - start)
        errors += failed
        rows = self._all_gather(torch.tensor(sums or [0], dtype=torch.int64)).tolist()
        if any(-1 in row for row in rows):
            return {}
        if self._joined(rows, record.bytes) != record.crc32:
            errors.append(manifest.other_content(path))
            return {}
        with noting(errors):
            return image.load(functools.partial(seam.load_states, name=path))
        return {}

    def _joined(self, rows: Sequence[Sequence[int]], nbytes: int) -> int:
        """Return the checksum of the file, joined from those of each replica's part of each block."""
        joined = 0
        for number, start in enumerate(range(0, nbytes, _BLOCK)):
            length = min(_BLOCK, nbytes - start)
            width = -(-length // self._size)
            for place, row in enumerate(rows):
                joined = manifest.join(joined, row[number], max(0, min(width, length - place * width)))
        return joined

    def _all_gather(self, row: torch.Tensor) -> torch.Tensor:
        """Return the rows of all replicas, (r, ...) in host memory."""
        if self._group is None:
            return row[None]
        return collectives.all_gather_rows(row.to(self._device), self._group, "parts of checkpoint files").cpu()

    def complete(self) -> None:
        """Add what the other replicas have copied of shards that were cut anew. Collective over the replicas."""
        if self._group is None:
            return
        for flat in self._incomplete:
            content = flat.view(torch.uint8)
            for start in range(0, content.numel(), _BLOCK):
                part = content[start : start + _BLOCK].to(self._device)
                collectives.sum_over_(part, self._group, "parts of a checkpoint")
                content[start : start + _BLOCK].copy_(part)


def _pread(path: Path, room: torch.Tensor, start: int) -> None:
    view = room.numpy().data
    with open(path, "rb", buffering=0) as file:
        while view:
            count = os.preadv(file.fileno(), [view], start)
            if not count:
                raise OSError(f"{path} became shorter while it was read")
            view, start = view[count:], start + count


def _check_contents(saved: _Saved) -> list[str]:
    """Compare all files with their records: all ranks together read every byte once. Collective over the world."""
    segments = [
        (name, start, min(start + _SEGMENT, record.bytes))
        for name, record in sorted(saved.records.items())
        for start in range(0, max(record.bytes, 1), _SEGMENT)
    ]
    sums, errors = [0] * len(segments), list[str]()
    place, count = saved.roles.peers.index(saved.roles.rank), len(saved.roles.peers)
    for number, (name, start, stop) in enumerate(segments):
        if number % count == place:
            with noting(errors), open(saved.folder / name, "rb", buffering=0) as file:
                sums[number] = 1 + manifest.range_checksum(file, start, stop)
    joined: dict[str, int] = {}
    for (name, start, stop), one_more in zip(segments, elementwise_max(sums) if segments else []):
        joined[name] = manifest.join(joined.get(name, 0), one_more - 1, stop - start)
    if not errors:
        wrong = (name for name, record in saved.records.items() if joined[name] != record.crc32)
        errors += [manifest.other_content(saved.folder / name) for name in wrong]
    return errors


def _states(reader: _Reader, saved: _Saved, path: Path, errors: list[str]) -> dict[str, Any]:
    """Return the content of a file, read together if it has a record. Those of another number of shards are mapped:
    they have been compared with their records."""
    record = saved.records.get(path.name)
    if record is not None and not saved.is_recut:
        return reader.read(path, record, errors)
    return seam.load_states(path, mmap=saved.is_recut)


def _read_the_rest(saved: _Saved, reader: _Reader, model: dict[str, Any], how: How, errors: list[str]) -> LoadedStates:
    """Read optimizer states, or of weights alone the shards, for this rank. Collective over the replicas."""
    engine, weights = saved.engine, not how["load_optimizer_states"]
    p, shard = saved.roles.groups.partition.size, saved.roles.shard
    consolidates = weights and (how["custom_load_fn"] is not None or not seam.keeps_shards_in_memory(engine))
    if saved.reshapes:
        log_rank0(f"{saved.folder} has {saved.shards} shards; they are cut into {p} while loading")
    own = {} if saved.is_recut else _states(reader, saved, saved.optimizer_states(shard), errors)
    session = LoadedStates(model, own, saved.model_states_shard)
    if errors or consolidates or not (own or saved.is_recut):
        return session
    old = ShardLayout(saved.shards, model[cutting.PARAM_SHAPES])
    cut = (reader.cut if saved.is_recut else Cut)(saved.shards, p, shard)

    def model_states(old_shard: int) -> Mapping[str, Any]:
        return seam.load_states(saved.model_states(old_shard), mmap=True) if saved.is_recut else model

    def optimizer_states(old_shard: int) -> Mapping[str, Any]:
        return seam.load_states(saved.optimizer_states(old_shard), mmap=True) if saved.is_recut else own

    def frozen() -> dict[str, torch.Tensor]:
        shapes = model[cutting.FROZEN_SHAPES] if model.get(cutting.FROZEN_SHARDS) else {}
        return cutting.reshape_frozen(model_states, shapes, cut)

    with noting(errors):
        if weights:
            masters = cutting.weights_of(optimizer_states, old, old.shapes, cut)
            session.weights = {**masters, **frozen()}
            model[cutting.FROZEN_SHARDS] = None
        elif saved.reshapes:
            if model.get(cutting.FROZEN_SHARDS) and saved.is_recut:
                model[cutting.FROZEN_SHARDS] = frozen()
            new, owners = ShardLayout(p, seam.param_shapes(engine)), seam.sub_group_owners(engine)
            session.optimizer = cutting.reshape_optimizer(optimizer_states, old, new, owners, cut)
    return session
