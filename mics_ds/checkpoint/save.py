"""Saving under MiCS: one replica's worth of files, published when complete.

DeepSpeed's own ``save_checkpoint`` does the work, in DeepSpeed's file layout for p shards. Around it, this module
decides which rank writes what, sends the files to a folder that nobody reads yet, and lets no rank go on before all
have succeeded.

Shard i is written by replica i mod r, so that r replicas share the writing. On folders local to each node
(``"checkpoint": {"use_node_local_storage": true}``), each node writes the shards that its own ranks need.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..config import CheckpointRequest
from ..deepspeed_compat import checkpoint as seam
from ..deepspeed_compat.engine import steps_taken
from ..errors import MicsCheckpointError, words
from ..log import log_rank0
from . import in_background, manifest, names, origin, slices
from .board import NOTHING_PUBLISHED, Round
from .manifest import CLIENT_STATE, FileRecord, Manifest
from .rank_state import Fingerprint, RankState
from .together import (
    Site,
    attempt,
    exchange,
    exchange_and_compare,
    on_publishers,
    raise_together,
    shared_store,
    site_of,
)


class _Request:
    """What this rank was asked to save, with what is wrong about it in ``errors``."""

    def __init__(self, engine: Any, save_dir: Any, tag: Any, client_state: Any, background: bool) -> None:
        self.tag = self.folder = ""
        self.background = background
        self.client_state: dict[str, Any] = {}
        self.own = RankState({}, {})
        self.writers_fingerprint: Fingerprint = {}
        """Of the rank that writes the model states of this rank's shard."""
        self.errors: list[str] = []

        def understand() -> None:
            if not save_dir:
                raise MicsCheckpointError(f"save_dir must be the path of a folder, got {save_dir!r}")
            self.folder = os.fspath(save_dir)
            self.tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
            names.check_tag(self.tag)
            if background and not seam.writes_archives(engine):
                raise MicsCheckpointError(
                    'what is saved in the background is written as archives; set "checkpoint": '
                    '{"checkpoint_serialization": true}, its default, or save without async'
                )

        def take(client_state: Any) -> None:
            self.client_state = dict(client_state or {})

        def look_at_own_state() -> None:
            self.own = RankState.of(engine, self.client_state)
            self.writers_fingerprint = self.own.fingerprint

        attempt(understand, self.errors)
        attempt(
            lambda: take(client_state), self.errors, lambda error: f"client_state cannot be pickled, {words(error)}"
        )
        attempt(look_at_own_state, self.errors)


class _Saving:
    """Between DeepSpeed and the files while saving. An error, of whatever kind, is noted and raised on all ranks
    later, because DeepSpeed has a barrier further on, where the other ranks wait."""

    copies_scripts = True

    def __init__(self, rank: int, shard: int) -> None:
        self.rank = rank
        self.model_states_shard = shard
        self.files: dict[str, FileRecord] = {}
        self.errors: list[str] = []

    def make(self, make: Callable[[], Any]) -> None:
        attempt(make, self.errors)

    def write(self, states: Mapping[str, Any], path: str, write: Callable[[Any, str], Any]) -> None:
        if self.errors:
            return
        name = os.path.basename(path)

        def seal() -> None:
            write(origin.marked(states) if name.endswith("_optim_states.pt") else states, path)
            self.files[name] = manifest.seal(Path(path), self.rank)

        # torch reports a full disk as RuntimeError, pickle has several kinds
        attempt(seal, self.errors, lambda error: f"{path}: {words(error)} ({_free(os.path.dirname(path))})")


def _free(folder: str) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:.1f} MB free there"
    except OSError as error:
        return f"the folder: {words(error)}"


class _Save:
    """One save, on one rank."""

    def __init__(self, engine: Any, request: _Request, exclude_frozen_parameters: bool) -> None:
        self.engine, self.request = engine, request
        self.site = site_of(engine)
        self.exclude_frozen_parameters = exclude_frozen_parameters
        self.made_staging = False
        self._new_folders: list[Path] = []
        """Made on the way to :attr:`staging`, innermost first."""
        self.own_states_agree = True
        """Whether all ranks have the same :attr:`_Request.own`, as far as :meth:`agree` has told."""

    @property
    def folder(self) -> Path:
        return Path(self.request.folder)

    @property
    def target(self) -> Path:
        return self.folder / self.request.tag

    @property
    def staging(self) -> Path:
        return manifest.staging_folder(self.target)

    @property
    def failed(self) -> str:
        return f"Checkpoint {self.target} could not be saved."

    def make_staging(self) -> None:
        """Make an empty folder to write to."""
        self.made_staging = True
        self._new_folders = [folder for folder in self.staging.parents if not folder.exists()]
        if self.staging.exists():
            log_rank0(
                f"an earlier save of tag {self.request.tag} was interrupted; its remains in {self.staging} are removed"
            )
            shutil.rmtree(self.staging)
        self.staging.mkdir(parents=True)

    def remove_staging(self) -> None:
        """Remove what this rank has made for nothing."""
        if self.made_staging:
            manifest.discard(self.staging)
            with suppress(OSError):  # somebody else has put something there
                for folder in self._new_folders:
                    folder.rmdir()

    def agree(self, asked: CheckpointRequest, copying: Sequence[str] = ()) -> None:
        """See to it that all ranks mean the same save, and that none has to tell of an earlier one. One all-reduce, if
        all have the same state of their own.

        Args:
            copying: what has gone wrong on this rank in copying the states, where that is done already.

        Raises:
            MicsCheckpointError: the ranks disagree, something is wrong with the request, an earlier save failed, or
                the states could not be copied.
        """
        site, request = self.site, self.request
        note = {
            "errors": request.errors,
            **{name: getattr(request, name) for name in _AGREED},
            "earlier": in_background.heard(),
            "copying": copying,
        }
        doing = "preparing to save a checkpoint"
        notes, self.own_states_agree = exchange_and_compare(note, request.own.fingerprint, doing)
        in_background.raise_earlier([item["earlier"] for item in notes], asked)
        raise_together(notes, "The checkpoint could not be saved.", NOTHING_PUBLISHED)
        for field in _AGREED:
            said = {item[field]: rank for rank, item in reversed(list(enumerate(notes)))}
            if len(said) > 1 and not (field == "folder" and site.node_local):
                values = sorted(said.items(), key=lambda item: item[1])
                raise MicsCheckpointError(
                    f"All ranks must save to the same {_AGREED[field]}, but "
                    + "; ".join(f"rank {rank} said {value!r}" for value, rank in values)
                    + ". Give every rank the same one (a folder local to each node needs use_node_local_storage)."
                )
        raise_together([{"errors": item["copying"]} for item in notes], self.failed, NOTHING_PUBLISHED)
        if not self.own_states_agree:
            _tell_fingerprints(self)

    def collect(self, original: Callable[..., bool], session: Any, states: AbstractContextManager) -> None:
        """Have DeepSpeed save, through a session.

        Raises:
            MicsCheckpointError: another rank has died.
        """
        request = self.request
        try:
            with states, seam.CheckpointFiles.of(self.engine).through(session):
                original(
                    self.engine,
                    request.folder,
                    tag=str(self.staging.relative_to(self.folder)),
                    client_state=request.client_state,
                    save_latest=False,
                    exclude_frozen_parameters=self.exclude_frozen_parameters,
                )
        except RuntimeError as error:  # of a collective, when another rank has died
            raise MicsCheckpointError(f"{self.failed} {words(error)}. {NOTHING_PUBLISHED}") from error
        session.make(lambda: self.save_own_state(session))

    def save_own_state(self, session: Any) -> None:
        """Write what differs between this rank and the writer of its shard's model states to a small file."""
        content = self.request.own.beside(self.request.writers_fingerprint)
        if content is not None:
            session.write(content, str(self.staging / CLIENT_STATE.format(rank=self.site.rank)), torch.save)

    def describe(self, files: Mapping[str, FileRecord]) -> Manifest:
        return self.site.describe(self.request.tag, self.engine.global_steps, files)


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
    """``engine.save_checkpoint`` of an engine with MiCS. Collective over the world.

    Args:
        async_save: return as soon as the states are copied to host memory, and write them in the background. By
            default what ``"mics_checkpoint": {"async": ...}`` says.

    Returns:
        Whether there is, or will be, a checkpoint: ``False`` only with ``"busy": "skip"``, while another is written.

    Raises:
        MicsCheckpointError: on every rank, if any rank could not write. Nothing was published then, and
            older checkpoints are as they were. Or an earlier save has failed in the background, and this one has not
            been begun.
    """
    asked = engine.optimizer.mics_groups.config.checkpoint or CheckpointRequest()
    background = asked.in_background if async_save is None else bool(async_save)
    one = _Save(engine, _Request(engine, save_dir, tag, client_state, background), exclude_frozen_parameters)
    if not in_background.may_begin(asked):
        return False
    try:
        if background:
            in_background.stage_and_submit(one, asked, save_latest)
        else:
            one.agree(asked)
            _write_and_publish(original, one)
    except BaseException:
        one.remove_staging()
        raise
    if not background:
        _update_latest(one.site, one.folder, one.request.tag, save_latest)
    tier = getattr(engine, "mics_memory", None)
    if tier is not None:
        tier.saved(one.request.folder, client_state, steps_taken(engine))
    return True


def _write_and_publish(original: Callable[..., bool], one: _Save) -> None:
    site, target = one.site, one.target
    raise_together(on_publishers(site, one.make_staging, f"preparing to save {target}"), one.failed, NOTHING_PUBLISHED)
    session = _Saving(site.rank, site.shard)
    writes = site.writer == site.rank
    seam.set_writer(one.engine, writes, writes)
    one.collect(original, session, slices.gathered(one.engine.optimizer, site, session.errors))
    records = Round(shared_store(), _Numbers.next(), dist.get_world_size())
    records.report(site.publisher, manifest.noted(session.files) or None)
    raise_together(exchange({"errors": session.errors}, f"saving {target}"), one.failed, NOTHING_PUBLISHED)

    def publish() -> None:
        files = manifest.recorded(records.notes(site.publisher, len(site.peers)))  # everybody's are there
        manifest.publish(one.staging, target, one.describe(files))

    raise_together(on_publishers(site, publish, f"publishing {target}"), one.failed, NOTHING_PUBLISHED)


class _Numbers:
    """Saves are numbered, the same on all ranks, to tell their notes apart."""

    last = 0

    @classmethod
    def next(cls) -> int:
        cls.last += 1
        return cls.last


def _update_latest(site: Site, folder: Path, tag: str, wanted: bool) -> None:
    """Name the published checkpoint in ``latest``, if that is wanted, and mention what crashes left."""
    latest = folder / manifest.LATEST

    def update() -> None:
        if wanted:
            names.write_latest(folder, tag)

    notes = on_publishers(site, update, f"publishing {folder / tag}")
    raise_together(
        notes, f"Checkpoint {folder / tag} is complete, but {latest} could not be updated.", "Load it by its tag."
    )
    if site.publishes:
        for remains in manifest.interrupted_saves(folder):
            log_rank0(f"{remains} is left from an interrupted save and can be deleted")


_AGREED = {"tag": "tag", "folder": "folder", "background": "place, in the background (async_save) or not"}


def _tell_fingerprints(one: _Save) -> None:
    """Let ranks know the state of the writer of their shard. Not all have the same."""
    request, site = one.request, one.site
    store, number = shared_store(), _Numbers.next()
    if site.writer == site.rank:
        store.set(f"own/{number}/{site.rank}", json.dumps(request.own.fingerprint))
    exchange({"errors": []}, "comparing states of ranks")
    request.writers_fingerprint = json.loads(store.get(f"own/{number}/{site.writer}"))
    exchange({"errors": []}, "comparing states of ranks")
    if site.writer == site.rank:
        store.delete_key(f"own/{number}/{site.rank}")
