"""Saving under MiCS: one replica's worth of files, written by all replicas, published when complete.

DeepSpeed says what it would write, in its file layout for p shards. This module decides which rank writes what, sends
the files to a folder that nobody reads yet, and lets no rank go on before all have succeeded. An asynchronous save
collects the same states, and has them copied and written beside training.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..comm import collectives
from ..comm.packing import ChunkLayout
from ..config import CheckpointRequest
from ..deepspeed_compat import checkpoint as seam
from ..deepspeed_compat.engine import communication_device, device_streams, steps_taken
from ..errors import MicsCheckpointError, describe_error, noting
from ..log import log_rank0
from . import folder, manifest
from .background import Background
from .coordination import (
    Fingerprint,
    RankState,
    Roles,
    Run,
    exchange,
    exchange_and_compare,
    raise_together,
    raised_on_all_ranks,
    require_same,
    roles_of,
    shared_store,
    tell_speed,
)
from .manifest import OWN_STATE, FileRecord, Manifest
from .staging import Plan, Stager, marked, pickled
from .writer import NOTHING_PUBLISHED, Job, Publication

_AGREED = {"tag": "tag", "folder": "folder", "asynchronous": "way, asynchronous (async_save) or not"}
_SLICE_ELEMENTS = 4 << 20
"""Elements of each replica's slice that are on the device at a time."""


def save(
    engine: Any,
    save_dir: str | os.PathLike,
    tag: Any = None,
    client_state: Mapping[str, Any] | None = None,
    save_latest: bool = True,
    exclude_frozen_parameters: bool = False,
    async_save: bool | None = None,
) -> bool:
    """Save as ``engine.save_checkpoint`` of an engine with MiCS. Collective over the world.

    Args:
        async_save: return as soon as the states are being copied to host memory, and write them beside training. By
            default what ``"mics_checkpoint": {"async": ...}`` says.

    Returns:
        Whether there is, or will be, a checkpoint: ``False`` only with ``"busy": "skip"``, while another is written.

    Raises:
        MicsCheckpointError: on every rank, if any rank could not write. Nothing was published then, and
            older checkpoints are as they were. Or an earlier asynchronous save has failed, and this one has not been
            begun.
    """
    replicas = getattr(engine, "mics_replicas", None)
    if replicas is not None and not replicas.publishes:
        return True
    asked = engine.optimizer.mics_groups.config.checkpoint or CheckpointRequest()
    asynchronous = asked.asynchronous if async_save is None else bool(async_save)
    tier = getattr(engine, "mics_memory", None)
    if not _may_begin(asked):
        return False
    if tier is not None:
        tier.settle()
    Run.begin()
    one = _Save(engine, save_dir, tag, client_state, asynchronous, exclude_frozen_parameters)
    try:
        if asynchronous:
            _save_beside_training(one, asked, save_latest)
        else:
            one.agree(asked)
            _save_and_wait(one)
            _update_latest(one, save_latest)
    except BaseException:
        if not one.errors:
            one.staging.abandon()
        raise
    if tier is not None:
        tier.saved(one.folder, one.marker if save_latest else None, client_state, steps_taken(engine), asynchronous)
    return True


def _may_begin(asked: CheckpointRequest) -> bool:
    """Wait until no save is under way. Collective over the world with ``"busy": "skip"``.

    Returns:
        Whether to go on. ``False`` with ``"busy": "skip"``, while another is being written.

    Raises:
        MicsCheckpointError: another rank has died.
    """
    current = Background.current
    if current is None:
        return True
    if asked.busy == "skip" and any(note["busy"] for note in exchange({"busy": current.is_busy}, "preparing to save")):
        log_rank0("a checkpoint is still being written, so this one is skipped")
        return False
    current.wait()
    return True


class _Save:
    """One save, on one rank: what was asked for, and what all ranks have agreed on. What is wrong is in ``errors``."""

    def __init__(
        self, engine: Any, save_dir: Any, tag: Any, client_state: Any, asynchronous: bool, exclude_frozen: bool
    ) -> None:
        self.engine, self.roles = engine, roles_of(engine)
        self.asynchronous, self.exclude_frozen = asynchronous, exclude_frozen
        self.name = f"{Run.name}{Run.next_number():04x}"
        self.tag = self.folder = ""
        self.client_state: dict[str, Any] = {}
        self.own = RankState({}, {})
        self.owners_fingerprint: Fingerprint = {}
        """Of the rank that writes the model states of this rank's shard."""
        self.errors: list[str] = []

        with noting(self.errors):
            if not save_dir:
                raise MicsCheckpointError(f"save_dir must be the path of a folder, got {save_dir!r}")
            self.folder = os.fspath(save_dir)
            self.tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
            folder.check_tag(self.tag)
            if asynchronous and not seam.writes_archives(engine):
                raise MicsCheckpointError(
                    'an asynchronous save writes archives; set "checkpoint": {"checkpoint_serialization": true}, its '
                    "default, or save without async"
                )
        with noting(self.errors, lambda error: f"client_state cannot be pickled, {describe_error(error)}"):
            self.client_state = dict(client_state or {})
        with noting(self.errors):
            states = seam.model_states(engine, self.client_state)
            self.own = RankState.within(states, seam.parameter_names(engine), frozenset(self.client_state))
            self.owners_fingerprint = self.own.fingerprint

    @property
    def target(self) -> Path:
        return Path(self.folder) / self.tag

    @cached_property
    def staging(self) -> folder.Staging:
        return folder.Staging(self.target, self.name)

    @property
    def failed(self) -> str:
        return f"Checkpoint {self.target} could not be saved."

    @property
    def marker(self) -> str:
        return folder.marker(self.tag, self.name)

    def agree(self, asked: CheckpointRequest, copying: Sequence[str] = ()) -> None:
        """See to it that all ranks mean the same save, and that none has to tell of an earlier one. One all-reduce, if
        all have the same state of their own.

        Args:
            copying: what has gone wrong on this rank in copying the states, where that has begun already.

        Raises:
            MicsCheckpointError: the ranks disagree, something is wrong with the request, an earlier save failed, or
                the states could not be copied.
        """
        current = Background.current
        earlier = "" if current is None else current.take_error().rstrip(".")
        note = {
            "errors": self.errors,
            "earlier": [earlier] if earlier and asked.on_error == "raise" else [],
            "copying": list(copying),
            **{name: getattr(self, name) for name in _AGREED},
        }
        notes, own_states_agree = exchange_and_compare(note, self.own.fingerprint, "preparing to save a checkpoint")
        raise_together(
            [{"errors": item["earlier"]} for item in notes],
            "An earlier asynchronous save failed.",
            "This one was not begun; save again.",
        )
        raise_together(notes, "The checkpoint could not be saved.", NOTHING_PUBLISHED)
        for field, what in _AGREED.items():
            if field != "folder" or not self.roles.node_local:
                require_same(notes, field, f"save to the same {what}")
        raise_together([{"errors": item["copying"]} for item in notes], self.failed, NOTHING_PUBLISHED)
        if not own_states_agree:
            self._hear_of_owner()

    def _hear_of_owner(self) -> None:
        """Let ranks know the state of the owner of their shard. Not all have the same."""
        store, key = shared_store(), f"own/{self.name}/{self.roles.owner}"
        if self.roles.owns:
            store.set(key, json.dumps(self.own.fingerprint))
        exchange({"errors": []}, "comparing states of ranks")
        self.owners_fingerprint = json.loads(store.get(key))
        exchange({"errors": []}, "comparing states of ranks")
        if self.roles.owns:
            store.delete_key(key)

    def own_file(self) -> tuple[str, dict[str, Any]] | None:
        """Name and content of the file with what differs between this rank and the owner of its shard, if it does."""
        content = self.own.beside(self.owners_fingerprint)
        return None if content is None else (OWN_STATE.format(rank=self.roles.rank), content)

    def describe(self, files: Mapping[str, FileRecord]) -> Manifest:
        return self.roles.describe(self.tag, self.engine.global_steps, self.name, files)


# --------------------------------------------------------------------------------------------------
# Training waits


class _Files:
    """Stands between DeepSpeed and the files, and describes each that was written. It raises at once."""

    def __init__(self, roles: Roles, staging: Path) -> None:
        self._rank, self._staging = roles.rank, staging
        self.model_states_shard = roles.shard
        self.records: dict[str, FileRecord] = {}

    def write(self, states: Mapping[str, Any], path: str, write: Callable[[Any, str], Any]) -> None:
        name = os.path.basename(path)
        try:
            write(marked(states) if name.endswith("_optim_states.pt") else states, str(self._staging / name))
            self.records[name] = manifest.seal(self._staging / name, self._rank)
        except (RuntimeError, OSError) as error:  # torch reports a full disk as RuntimeError
            free = _free(self._staging)
            raise MicsCheckpointError(f"{self._staging / name}: {describe_error(error)} ({free})") from error

    def stand_in(self, held: torch.Tensor) -> torch.Tensor:
        return held.cpu()


def _free(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(path).free / 1e6:.1f} MB free there"
    except OSError as error:
        return f"the folder: {describe_error(error)}"


def _save_and_wait(one: _Save) -> None:
    roles, files = one.roles, _Files(one.roles, one.staging.folder)

    def write(errors: list[str]) -> Mapping[str, FileRecord]:
        with _whole_shards(one.engine.optimizer, roles, errors), noting(errors):
            owns, excluded = roles.owns, one.exclude_frozen
            which = {"model_states": owns, "optimizer_states": owns, "exclude_frozen": excluded}
            if not errors:
                seam.collect_states(one.engine, files, one.client_state, **which)
            own = one.own_file()
            if own is not None:
                files.write(own[1], own[0], torch.save)
        return files.records

    write_together(one.staging, roles.publisher, write, one.describe, NOTHING_PUBLISHED)


def write_together(
    staging: folder.Staging,
    publisher: int,
    write: Callable[[list[str]], Mapping[str, FileRecord]],
    describe: Callable[[Mapping[str, FileRecord]], Manifest],
    remedy: str,
) -> None:
    """Write a checkpoint, and publish it when all ranks have written their part. Collective over the world.

    Args:
        staging: to be ended, or abandoned, by the caller.
        publisher: publishes where this rank's files are.
        write: writes this rank's files and returns their records. It may be collective, and note errors.
        describe: returns the manifest.

    Raises:
        MicsCheckpointError: on every rank: it could not be written. Nothing was published.
    """
    target, started, publishes = staging.target, time.monotonic(), dist.get_rank() == publisher
    failed = f"Checkpoint {target} could not be saved."
    with raised_on_all_ranks(f"preparing to save {target}", failed, remedy):
        if publishes:
            staging.begin()
    with raised_on_all_ranks(f"saving {target}", failed, remedy) as errors:
        _post_files(staging.save, publisher, write(errors))
    with raised_on_all_ranks(f"publishing {target}", failed, remedy):
        if publishes:
            described = describe(_posted_files(staging.save, publisher))
            folder.publish(staging.folder, target, described)
            tell_speed(target, described.total_bytes, started)


def _post_files(save: str, publisher: int, records: Mapping[str, FileRecord]) -> None:
    """Tell the rank that publishes what this rank has written, if it has."""
    if records:
        store, key = shared_store(), f"files/{save}/{publisher}"
        store.set(f"{key}/{store.add(key, 1)}", json.dumps(manifest.as_json(records)))


def _posted_files(save: str, publisher: int) -> dict[str, FileRecord]:
    """Return the records of all files in this rank's folder. All ranks have posted theirs by now."""
    store, key = shared_store(), f"files/{save}/{publisher}"
    notes = []
    for place in range(1, store.add(key, 0) + 1):
        notes.append(json.loads(store.get(f"{key}/{place}")))
        store.delete_key(f"{key}/{place}")
    store.delete_key(key)
    return manifest.from_json(notes)


def _update_latest(one: _Save, wanted: bool) -> None:
    """Name the published checkpoint in ``latest``, if that is wanted, and let others save that tag."""
    path = Path(one.folder)
    failed = f"Checkpoint {one.target} is complete, but {path / folder.LATEST} could not be updated."
    with raised_on_all_ranks(f"publishing {one.target}", failed, "Load it by tag."):
        if one.roles.publishes and wanted:
            folder.write_latest(path, one.tag)
        folder.add_scripts(seam.recovery_scripts() if one.roles.rank == 0 else (), path)
        one.staging.end()


@contextmanager
def _whole_shards(optimizer: Any, roles: Roles, errors: list[str]) -> Iterator[None]:
    """Let ``optimizer.state_dict()`` be that of whole shards, where replicas have slices of them, on the ranks that
    write one. Collective over the replicas.

    Args:
        errors: for what this rank alone could not do.

    Raises:
        MicsCommError: another rank has died.
    """
    world = optimizer.world_states
    if world is None:
        yield
        return
    world.finish_updates()
    writes, wholes = roles.owns, list[torch.Tensor]()
    for sub_group, held in world.checkpoints.elementwise_states():
        rows: torch.Tensor | None = None
        with noting(errors):
            if writes and not errors:
                rows = held.new_empty(world.replication.size, held.numel(), device="cpu")
        # A ring brings a shard to all replicas in the time that one of them alone would need to receive it.
        for start in range(0, held.numel(), _SLICE_ELEMENTS):
            part = held.detach()[start : start + _SLICE_ELEMENTS].to(communication_device())
            found = collectives.all_gather_rows(part, world.replication, "slices of optimizer states")
            if rows is not None:
                rows[:, start : start + part.numel()].copy_(found)
        with noting(errors):
            if rows is not None:
                wholes.append(_joined(rows, world.cuts[sub_group]))
    with world.checkpoints.whole_shards(wholes) if writes and not errors else nullcontext():
        yield


def _joined(rows: torch.Tensor, cut: ChunkLayout) -> torch.Tensor:
    whole = rows.new_empty(cut.flat_starts[-1])
    cut.copy_out(rows, whole.split(list(cut.numels)))
    return whole


# --------------------------------------------------------------------------------------------------
# Training goes on


def _save_beside_training(one: _Save, asked: CheckpointRequest, save_latest: bool) -> None:
    """Copy the states to host memory and have them written. Collective over the world: one all-reduce, once the copy
    was begun.

    Ranks copy before they know that all mean the same save, because the host waits for what they say. The first save
    asks before it, because the processes that write are started together.

    Raises:
        MicsCheckpointError: on every rank, if any rank could not copy, or as :meth:`_Save.agree` does.
    """
    is_first, roles, copying_errors = not Background.is_there(), one.roles, list[str]()
    if is_first:
        one.agree(asked)
    background = Background.of_job()
    with noting(copying_errors):
        if not (one.errors or (asked.on_error == "raise" and background.error)):
            if roles.publishes:
                one.staging.begin()
            plan = plan_of(one.engine, roles, one.client_state, exclude_frozen=one.exclude_frozen)
            background.revive()
            background.memory.reserve(plan.staged.nbytes)
            copying = background.memory.copy_in(plan.parts, device_streams())
            described = one.describe({})
    if is_first:
        with raised_on_all_ranks(f"copying {one.target}", one.failed, NOTHING_PUBLISHED) as noted:
            noted += copying_errors
    else:
        one.agree(asked, copying_errors)
    # What goes wrong from now on is the writer's to tell.
    own: tuple[str, bytes] | None = None
    errors: list[str] = []
    with noting(errors):
        found = one.own_file()
        own = None if found is None else (found[0], pickled(found[1]))
    publication = None
    if roles.publishes:
        scripts = tuple(seam.recovery_scripts()) if roles.rank == 0 else ()
        model = seam.model_config(one.engine) if asked.export else ""
        publication = Publication(described, one.folder, one.tag, save_latest, scripts, asked.export, model)
    job = Job(
        number=Run.next_number(),
        target=str(one.target),
        staging=str(one.staging.folder),
        staged=plan.staged,
        own=own,
        error="; ".join(errors),
        sharers=tuple(roles.sharers) if roles.owns else (),
        parent=None if roles.parent is None else background.neighbour(roles.parent),
        children=tuple(roles.children),
        publishers=tuple(roles.publishers),
        publication=publication,
        limit_s=asked.time_limit,
    )
    background.submit(job, copying, one.staging.end)


def plan_of(
    engine: Any, roles: Roles, client_state: Mapping[str, Any], own: bytes = b"", *, exclude_frozen: bool = False
) -> Plan:
    """Plan the copy of this rank's part of its shard, and of what is its own. No collective.

    Args:
        own: what belongs to this rank alone.
    """
    stager = Stager(roles.shard, len(roles.sharers), roles.sharers.index(roles.rank), roles.owns)
    shares = roles.owns or (len(roles.sharers) > 1 and engine.optimizer.world_states is None)
    with stager.slices_of(engine.optimizer):
        if not roles.owns and not exclude_frozen:
            for held in seam.frozen_shards(engine):
                stager.stand_in(held)
        which = {"model_states": roles.owns, "optimizer_states": shares, "exclude_frozen": exclude_frozen}
        seam.collect_states(engine, stager, client_state, **which)
    return stager.plan(own)
