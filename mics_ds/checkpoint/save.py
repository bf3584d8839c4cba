"""Save under MiCS: one replica's worth of files, written by all replicas, published when complete.

DeepSpeed says what it would write, in its file layout for p shards. This module sends that to files in a folder that
nobody reads yet, and lets no rank go on before all have succeeded. An asynchronous save has the same states copied and
written beside training.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..config import CheckpointRequest
from ..deepspeed_compat import checkpoint as seam
from ..deepspeed_compat.engine import device_streams, steps_taken
from ..errors import MicsCheckpointError, describe_error, noting
from ..log import log_rank0
from . import folder, manifest
from .background import Background
from .coordination import (
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
from .staging import Plan, Stager, marked, pickled, record
from .writer import NOTHING_PUBLISHED, Job

_AGREED = {"tag": "tag", "folder": "folder", "asynchronous": "way, asynchronous (async_save) or not"}


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
    current, tier = Background.current, getattr(engine, "mics_memory", None)
    if current is not None:
        note = {"busy": current.is_busy}
        if asked.busy == "skip" and any(each["busy"] for each in exchange(note, "preparing to save")):
            log_rank0("a checkpoint is still being written, so this one is skipped")
            return False
        current.wait()
    if tier is not None:
        tier.settle()
    Run.begin()
    one = _Save(engine, save_dir, tag, client_state, asynchronous, exclude_frozen_parameters)
    try:
        (_save_beside_training if asynchronous else _save_and_wait)(one, asked, save_latest)
    except BaseException:
        if not one.errors:
            one.staging.abandon()
        raise
    if tier is not None:
        marker = folder.marker(one.tag, one.name) if save_latest else None
        tier.saved(one.folder, marker, client_state, steps_taken(engine), asynchronous)
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
        self._own, self._own_digest = RankState({}), ""
        self.own_file: tuple[str, dict[str, Any]] | None = None
        """Name and content of the file with what differs between this rank and the owner of its shard."""
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
        with noting(self.errors):
            try:
                self.client_state = dict(client_state or {})
                record(self.client_state)
            except Exception as error:  # what pickle raises depends on the object
                raise MicsCheckpointError(f"client_state cannot be pickled, {describe_error(error)}") from error
        with noting(self.errors):
            if not self.errors:
                states = seam.model_states(engine, self.client_state)
                self._own = RankState.within(states, seam.parameter_names(engine))
                self._own_digest = self._own.digest

    @cached_property
    def staging(self) -> folder.Staging:
        return folder.Staging(Path(self.folder) / self.tag, self.name)

    def agree(self, asked: CheckpointRequest, copying_errors: Sequence[str] = ()) -> None:
        """See to it that all ranks mean the same save, and that none has to tell of an earlier one. One all-reduce, if
        all have the same state of their own.

        Raises:
            MicsCheckpointError: on every rank: something is wrong on one of them.
        """
        current = Background.current
        earlier = "" if current is None else current.take_error().rstrip(".")
        note = {
            "errors": [*self.errors, *copying_errors],
            "earlier": [earlier] if earlier and asked.on_error == "raise" else [],
            **{name: getattr(self, name) for name in _AGREED},
        }
        notes, own_states_agree = exchange_and_compare(note, self._own_digest, "preparing to save a checkpoint")
        raise_together(notes, "An earlier asynchronous save failed.", "This one was not begun; save again.", "earlier")
        raise_together(notes, "The checkpoint could not be saved.", NOTHING_PUBLISHED)
        for field, what in _AGREED.items():
            if field != "folder" or not self.roles.node_local:
                require_same(notes, field, f"save to the same {what}")
        if not own_states_agree:
            store, key = shared_store(), f"own/{self.roles.owner}"  # read before any rank can begin another save
            if self.roles.owns:
                store.set(key, json.dumps(self._own.fingerprint))
            exchange({}, "comparing states of ranks")
            content = self._own.beside(json.loads(store.get(key)))
            self.own_file = None if content is None else (OWN_STATE.format(rank=self.roles.rank), content)

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
            try:
                free = f"{shutil.disk_usage(self._staging).free / 1e6:.1f} MB free there"
            except OSError as gone:
                free = f"the folder: {describe_error(gone)}"
            raise MicsCheckpointError(f"{self._staging / name}: {describe_error(error)} ({free})") from error

    def stand_in(self, held: torch.Tensor) -> torch.Tensor:
        return held.cpu()


def _save_and_wait(one: _Save, asked: CheckpointRequest, save_latest: bool) -> None:
    one.agree(asked)
    roles, files = one.roles, _Files(one.roles, one.staging.folder)

    def write(errors: list[str]) -> Mapping[str, FileRecord]:
        owns, excluded, world = roles.owns, one.exclude_frozen, one.engine.optimizer.world_states
        with nullcontext() if world is None else world.checkpoints.joined(owns, errors), noting(errors):
            which = {"model_states": owns, "optimizer_states": owns, "exclude_frozen": excluded}
            if not errors:
                seam.collect_states(one.engine, files, one.client_state, **which)
            if one.own_file is not None:
                name, content = one.own_file
                files.write(content, name, torch.save)
        return files.records

    root = Path(one.folder)
    write_together(one.staging, root, roles.publisher, write, one.describe, NOTHING_PUBLISHED, latest=save_latest)


def write_together(
    staging: folder.Staging,
    root: Path,
    publisher: int,
    write: Callable[[list[str]], Mapping[str, FileRecord]],
    describe: Callable[[Mapping[str, FileRecord]], Manifest],
    remedy: str,
    *,
    latest: bool = True,
) -> None:
    """Write a checkpoint, publish it when all ranks have written their part, and make it the latest one. Collective
    over the world.

    Args:
        staging: to be abandoned by the caller, if this raises.
        root: the folder of checkpoints.
        publisher: publishes where this rank's files are.
        write: writes this rank's files and returns their records. It may be collective, and note errors.
        describe: returns the manifest.
        remedy: if it could not be written. Nothing was published then.
        latest: whether ``latest`` is to name it.

    Raises:
        MicsCheckpointError: on every rank: something could not be written.
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
    failed = f"Checkpoint {target} is complete, but {root / folder.LATEST} could not be updated."
    with raised_on_all_ranks(f"publishing {target}", failed, "Load it by tag."):
        if publishes and latest:
            folder.write_latest(root, described.tag)
        if dist.get_rank() == 0:
            seam.add_recovery_scripts(root)
        staging.end()


def _post_files(save: str, publisher: int, records: Mapping[str, FileRecord]) -> None:
    """Tell the rank that publishes what this rank has written, if it has."""
    if records:
        store, key = shared_store(), f"files/{save}/{publisher}"
        store.set(f"{key}/{store.add(key, 1)}", json.dumps(manifest.as_json(records)))


def _posted_files(save: str, publisher: int) -> dict[str, FileRecord]:
    """Return the records of all files in this rank's folder. All ranks have posted theirs by now."""
    store, key = shared_store(), f"files/{save}/{publisher}"
    keys = [f"{key}/{place}" for place in range(1, store.add(key, 0) + 1)]
    found = manifest.from_json(json.loads(store.get(each)) for each in keys)
    for each in (*keys, key):
        store.delete_key(each)
    return found


# --------------------------------------------------------------------------------------------------
# Training goes on


def _save_beside_training(one: _Save, asked: CheckpointRequest, save_latest: bool) -> None:
    """Copy the states to host memory and have them written. Collective over the world: one all-reduce, once the copy
    was begun.

    Ranks copy before they know that all mean the same save, because the host waits for what they say. The first save
    asks before it too, because the processes that write are started together.
    """
    roles, copying_errors = one.roles, list[str]()
    if not Background.is_there():
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
    one.agree(asked, copying_errors)
    # What goes wrong from now on is the writer's to tell.
    own: tuple[str, bytes] | None = None
    errors: list[str] = []
    with noting(errors):
        if one.own_file is not None:
            own = one.own_file[0], pickled(one.own_file[1])
        if roles.rank == 0:
            seam.add_recovery_scripts(Path(one.folder))
    job = Job(
        number=Run.next_number(),
        root=one.folder,
        target=str(one.staging.target),
        staging=str(one.staging.folder),
        staged=plan.staged,
        own=own,
        error="; ".join(errors),
        sharers=tuple(roles.sharers) if roles.owns else (),
        parent=None if roles.parent is None else background.neighbour(roles.parent),
        children=tuple(roles.children),
        publishers=tuple(roles.publishers),
        limit_s=asked.time_limit,
        manifest=described if roles.publishes else None,
        latest=save_latest,
        export=asked.export,
        model=seam.model_config(one.engine) if asked.export and roles.publishes else "",
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
