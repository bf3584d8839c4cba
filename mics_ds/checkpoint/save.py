"""Saving under MiCS: one replica's worth of files, written by all replicas, published when complete.

DeepSpeed's own ``save_checkpoint`` does the work, in DeepSpeed's file layout for p shards. Around it, this module
decides which rank writes what, sends the files to a folder that nobody reads yet, and lets no rank go on before all
have succeeded. An asynchronous save collects the same states, and has them copied and written beside training.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ..comm import collectives
from ..comm.packing import ChunkLayout
from ..config import CheckpointRequest
from ..deepspeed_compat import checkpoint as seam
from ..deepspeed_compat.engine import communication_device, device_streams, steps_taken
from ..errors import MicsCheckpointError, describe_error
from ..log import log_rank0
from . import folder, manifest
from .background import Background
from .coordination import (
    Fingerprint,
    RankState,
    Roles,
    Run,
    attempt,
    exchange,
    exchange_and_compare,
    on_publishers,
    raise_together,
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
    original: Callable[..., bool],
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
            _save_and_wait(original, one)
            _update_latest(one, save_latest)
    except BaseException:
        one.end(abandoned=True)
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
        self.own_states_agree = True
        """Whether all ranks have the same :attr:`own`, as far as :meth:`agree` has told."""
        self.errors: list[str] = []
        self._staging: folder.Staging | None = None
        self.started = time.monotonic()

        def understand() -> None:
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

        def take_client_state() -> None:
            self.client_state = dict(client_state or {})

        def look_at_own_state() -> None:
            states = seam.model_states(engine, self.client_state)
            self.own = RankState.within(states, seam.parameter_names(engine), frozenset(self.client_state))
            self.owners_fingerprint = self.own.fingerprint

        attempt(understand, self.errors)
        attempt(
            take_client_state, self.errors, lambda error: f"client_state cannot be pickled, {describe_error(error)}"
        )
        attempt(look_at_own_state, self.errors)

    @property
    def target(self) -> Path:
        return Path(self.folder) / self.tag

    @property
    def staging(self) -> Path:
        return folder.staging_folder(self.target, self.name)

    @property
    def failed(self) -> str:
        return f"Checkpoint {self.target} could not be saved."

    @property
    def marker(self) -> str:
        return folder.marker(self.tag, self.name)

    def begin(self) -> None:
        """Make the folder to write to. On a rank that publishes."""
        if self._staging is None:
            self._staging = folder.Staging(self.target, self.name)
            self._staging.begin()

    def end(self, *, abandoned: bool = False) -> None:
        """Let others save that tag, and remove what this rank has made for nothing."""
        if self._staging is not None:
            (self._staging.abandon if abandoned else self._staging.end)()

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
        notes, self.own_states_agree = exchange_and_compare(
            note, self.own.fingerprint, "preparing to save a checkpoint"
        )
        raise_together(
            [{"errors": item["earlier"]} for item in notes],
            "An earlier asynchronous save failed.",
            "This one was not begun; save again.",
        )
        raise_together(notes, "The checkpoint could not be saved.", NOTHING_PUBLISHED)
        for field, what in _AGREED.items():
            said = {item[field]: rank for rank, item in reversed(list(enumerate(notes)))}
            if len(said) > 1 and not (field == "folder" and self.roles.node_local):
                values = sorted(said.items(), key=lambda item: item[1])
                raise MicsCheckpointError(
                    f"All ranks must save to the same {what}, but "
                    + "; ".join(f"rank {rank} said {value!r}" for value, rank in values)
                    + ". Give every rank the same one (a folder local to each node needs use_node_local_storage)."
                )
        raise_together([{"errors": item["copying"]} for item in notes], self.failed, NOTHING_PUBLISHED)
        if not self.own_states_agree:
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
    """Between DeepSpeed and the files while saving. An error, of whatever kind, is noted and raised on all ranks
    later, because DeepSpeed has a barrier further on, where the other ranks wait."""

    copies_scripts = True

    def __init__(self, roles: Roles) -> None:
        self._rank = roles.rank
        self.model_states_shard = roles.shard
        self.records: dict[str, FileRecord] = {}
        self.errors: list[str] = []

    def make(self, make: Callable[[], Any]) -> None:
        attempt(make, self.errors)

    def write(self, states: Mapping[str, Any], path: str, write: Callable[[Any, str], Any]) -> None:
        if self.errors:
            return
        name = os.path.basename(path)

        def seal() -> None:
            write(marked(states) if name.endswith("_optim_states.pt") else states, path)
            self.records[name] = manifest.seal(Path(path), self._rank)

        # torch reports a full disk as RuntimeError, pickle has several kinds
        attempt(seal, self.errors, lambda error: f"{path}: {describe_error(error)} ({_free(os.path.dirname(path))})")


def _free(path: str) -> str:
    try:
        return f"{shutil.disk_usage(path).free / 1e6:.1f} MB free there"
    except OSError as error:
        return f"the folder: {describe_error(error)}"


def _save_and_wait(original: Callable[..., bool], one: _Save) -> None:
    roles, target = one.roles, one.target
    raise_together(on_publishers(roles, one.begin, f"preparing to save {target}"), one.failed, NOTHING_PUBLISHED)
    session = _Files(roles)
    seam.set_writer(one.engine, roles.owns, roles.owns)
    try:
        with (
            _whole_shards(one.engine.optimizer, roles, session.errors),
            seam.CheckpointFiles.of(one.engine).through(session),
        ):
            original(
                one.engine,
                one.folder,
                tag=str(one.staging.relative_to(one.folder)),
                client_state=one.client_state,
                save_latest=False,
                exclude_frozen_parameters=one.exclude_frozen,
            )
    except RuntimeError as error:  # of a collective, when another rank has died
        raise MicsCheckpointError(f"{one.failed} {describe_error(error)}. {NOTHING_PUBLISHED}") from error
    own = one.own_file()
    if own is not None:
        session.write(own[1], str(one.staging / own[0]), torch.save)
    _post(one, session.records)
    raise_together(exchange({"errors": session.errors}, f"saving {target}"), one.failed, NOTHING_PUBLISHED)

    def publish() -> None:
        described = one.describe(_posted(one))
        folder.publish(one.staging, target, described)
        tell_speed(target, described.total_bytes, one.started)

    raise_together(on_publishers(roles, publish, f"publishing {target}"), one.failed, NOTHING_PUBLISHED)


def _post(one: _Save, records: Mapping[str, FileRecord]) -> None:
    """Tell the rank that publishes what this rank has written, if it has."""
    if records:
        store, key = shared_store(), f"files/{one.name}/{one.roles.publisher}"
        store.set(f"{key}/{store.add(key, 1)}", json.dumps(manifest.as_json(records)))


def _posted(one: _Save) -> dict[str, FileRecord]:
    """Return the records of all files in this rank's folder. All ranks have posted theirs by now."""
    store, key = shared_store(), f"files/{one.name}/{one.roles.publisher}"
    notes = []
    for place in range(1, store.add(key, 0) + 1):
        notes.append(json.loads(store.get(f"{key}/{place}")))
        store.delete_key(f"{key}/{place}")
    store.delete_key(key)
    return manifest.from_json(notes)


def _update_latest(one: _Save, wanted: bool) -> None:
    """Name the published checkpoint in ``latest``, if that is wanted, and let others save that tag."""
    latest = Path(one.folder) / folder.LATEST

    def update() -> None:
        if wanted:
            folder.write_latest(Path(one.folder), one.tag)
        one.end()

    notes = on_publishers(one.roles, update, f"publishing {one.target}")
    raise_together(notes, f"Checkpoint {one.target} is complete, but {latest} could not be updated.", "Load it by tag.")


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
    writes, wholes = roles.rank in roles.owners, list[torch.Tensor]()
    for sub_group, held in world.checkpoints.elementwise_states():
        rows: list[torch.Tensor] = []
        if writes and not errors:
            attempt(lambda: rows.append(held.new_empty(world.replication.size, held.numel(), device="cpu")), errors)  # noqa: B023
        # A ring brings a shard to all replicas in the time that one of them alone would need to receive it.
        for start in range(0, held.numel(), _SLICE_ELEMENTS):
            part = held.detach()[start : start + _SLICE_ELEMENTS].to(communication_device())
            found = collectives.all_gather_rows(part, world.replication, "slices of optimizer states")
            for row in rows:
                row[:, start : start + part.numel()].copy_(found)
        if rows:
            attempt(lambda: wholes.append(_joined(rows[0], world.cuts[sub_group])), errors)  # noqa: B023
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

    Ranks copy before they know that all mean the same save, because that has to be asked after it in any case. The
    first save asks before it, because the processes that write are started together.

    Raises:
        MicsCheckpointError: on every rank, if any rank could not copy, or as :meth:`_Save.agree` does.
    """
    is_first = not Background.is_there()
    if is_first:
        one.agree(asked)
    background = Background.of_job()
    errors: list[str] = []
    copies: list[_Copy] = []
    if not (one.errors or (asked.on_error == "raise" and background.error)):
        attempt(lambda: copies.append(_Copy(one, background)), errors)
    if is_first:
        raise_together(exchange({"errors": errors}, f"copying {one.target}"), one.failed, NOTHING_PUBLISHED)
    else:
        one.agree(asked, errors)
    copies[0].submit(asked, save_latest)


class _Copy:
    """The states of this rank on their way to host memory."""

    def __init__(self, one: _Save, background: Background) -> None:
        self._one, self._background = one, background
        roles, streams = one.roles, device_streams()
        if roles.publishes:
            one.begin()
        stager = Stager(roles.shard, len(roles.sharers), roles.sharers.index(roles.rank), roles.owns, streams)
        collect(one.engine, stager, roles, one.folder, one.tag, one.client_state, one.exclude_frozen)
        plan: Plan = stager.plan()
        background.revive()
        background.memory.reserve(plan.staged.nbytes)
        self._staged = plan.staged
        self._copying = background.memory.copy_in(plan.parts, streams)
        self._manifest = one.describe({})

    def submit(self, asked: CheckpointRequest, save_latest: bool) -> None:
        """Have it written. What goes wrong from now on is the writer's to tell."""
        one, roles, errors = self._one, self._one.roles, list[str]()
        own: list[tuple[str, bytes]] = []
        attempt(lambda: own.extend(self._own_file()), errors)
        publication = None
        if roles.publishes:
            scripts = tuple(seam.recovery_scripts()) if roles.rank == 0 else ()
            model = seam.model_config(one.engine) if asked.export else ""
            publication = Publication(self._manifest, one.folder, one.tag, save_latest, scripts, asked.export, model)
        self._background.submit(
            Job(
                number=Run.next_number(),
                target=str(one.target),
                staging=str(one.staging),
                staged=self._staged,
                own=tuple(own),
                error="; ".join(errors),
                sharers=tuple(map(self._background.neighbour, roles.sharers)) if roles.owns else (),
                parent=None if roles.parent is None else self._background.neighbour(roles.parent),
                children=tuple(roles.children),
                publishers=tuple(roles.publishers),
                publication=publication,
                limit_s=asked.time_limit,
            ),
            self._copying,
            one.end,
        )

    def _own_file(self) -> list[tuple[str, bytes]]:
        found = self._one.own_file()
        return [] if found is None else [(found[0], pickled(found[1]))]


def collect(
    engine: Any,
    stager: Stager,
    roles: Roles,
    path: str,
    tag: str,
    client_state: Mapping[str, Any],
    exclude_frozen: bool,
) -> None:
    """Have DeepSpeed say what it would write, as far as this rank has a part in it. No collective."""
    shares = roles.owns or (len(roles.sharers) > 1 and engine.optimizer.world_states is None)
    seam.set_writer(engine, roles.owns, shares)
    with stager.slices_of(engine.optimizer):
        if not roles.owns and not exclude_frozen:
            for held in seam.frozen_shards(engine):
                stager.stand_in(held)
        which = {"model_states": roles.owns, "optimizer_states": shares, "exclude_frozen_parameters": exclude_frozen}
        seam.collect_states(engine, stager, path, tag, client_state, **which)
