"""Saving under MiCS: one replica's worth of files, published when complete.

DeepSpeed's own ``save_checkpoint`` does the work, in DeepSpeed's file layout for p shards. Around it, this module
decides which rank writes what, sends the files to a folder that nobody reads yet, and lets no rank go on before all
have succeeded.

Shard i is written by replica i mod r, so that r replicas share the writing. On folders local to each node
(``"checkpoint": {"use_node_local_storage": true}``), each node writes the shards that its own ranks need.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from .. import __version__
from ..errors import MicsCheckpointError
from ..log import log_rank0
from ..seams import checkpoint as seam
from . import manifest, names, origin, slices
from .manifest import CLIENT_STATE, FileRecord, Manifest
from .together import Site, attempt, exchange, on_publishers, raise_together, site_of, words

_REMEDY = "Nothing was published, and older checkpoints are as they were."


class _Request:
    """What this rank was asked to save, with what is wrong about it in ``errors``."""

    def __init__(self, engine: Any, save_dir: Any, tag: Any, client_state: Any) -> None:
        self.tag = self.folder = ""
        self.client_state: dict[str, Any] = {}
        self.fingerprint: dict[str, Any] | None = None
        self.errors: list[str] = []

        def understand() -> None:
            if not save_dir:
                raise MicsCheckpointError(f"save_dir must be the path of a folder, got {save_dir!r}")
            self.folder = os.fspath(save_dir)
            self.tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
            names.check_tag(self.tag)

        def describe() -> None:
            self.client_state = dict(client_state or {})
            self.fingerprint = _fingerprint(self.client_state)

        attempt(understand, self.errors)
        # What pickle raises depends on the object.
        attempt(describe, self.errors, lambda error: f"client_state cannot be pickled, {words(error)}")


class _Saving:
    """Between DeepSpeed and the files while saving. An error, of whatever kind, is noted and raised on all ranks
    later, because DeepSpeed has a barrier further on, where the other ranks wait."""

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


def save(
    original: Callable[..., bool],
    engine: Any,
    save_dir: str | os.PathLike,
    tag: Any = None,
    client_state: Mapping[str, Any] | None = None,
    save_latest: bool = True,
    exclude_frozen_parameters: bool = False,
) -> bool:
    """``engine.save_checkpoint`` of an engine with MiCS. Collective over the world.

    Raises:
        MicsCheckpointError: on every rank, if any rank could not write. Nothing was published then, and
            older checkpoints are as they were.
    """
    site = site_of(engine)
    request = _Request(engine, save_dir, tag, client_state)
    fingerprints = _prepare(site, request)
    tag, folder = request.tag, Path(request.folder)
    target = folder / tag
    staging = manifest.staging_folder(target)
    failed = f"Checkpoint {target} could not be saved."
    session = _Saving(site.rank, site.shard)
    seam.set_writer(engine, site.writer == site.rank)
    try:
        try:
            whole = slices.gathered(engine.optimizer, site, session.errors)
            with whole, seam.CheckpointFiles.of(engine).through(session):
                original(
                    engine,
                    request.folder,
                    tag=str(staging.relative_to(folder)),
                    client_state=request.client_state,
                    save_latest=False,
                    exclude_frozen_parameters=exclude_frozen_parameters,
                )
        except RuntimeError as error:  # of a collective, when another rank has died
            raise MicsCheckpointError(f"{failed} {words(error)}. {_REMEDY}") from error
        session.make(lambda: _save_own_client_state(session, site, staging, request, fingerprints))
        written = exchange({"errors": session.errors, "files": session.files}, f"saving {target}")
        raise_together(written, failed, _REMEDY)

        def publish() -> None:
            manifest.publish(staging, target, _describe(engine, site, tag, [written[rank] for rank in site.peers]))

        raise_together(on_publishers(site, publish, f"publishing {target}"), failed, _REMEDY)
    except BaseException:
        _remove(staging, site)
        raise

    _update_latest(site, folder, tag, save_latest)
    return True


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


def _prepare(site: Site, request: _Request) -> list[dict[str, Any]]:
    """Make an empty folder to write to, and see to it that all ranks mean the same one.

    Returns:
        What tells the client states of all ranks apart, see :func:`_fingerprint`.

    Raises:
        MicsCheckpointError: the ranks disagree, something is wrong with the request, or the folder cannot be made.
    """

    def staging() -> Path:
        return manifest.staging_folder(Path(request.folder) / request.tag)

    def make() -> None:
        if staging().exists():
            log_rank0(f"an earlier save of tag {request.tag} was interrupted; its remains in {staging()} are removed")
            shutil.rmtree(staging())
        staging().mkdir(parents=True)

    note = {"tag": request.tag, "folder": request.folder, "client": request.fingerprint, "errors": request.errors}
    usable = not request.errors
    notes = on_publishers(site, make, "preparing to save a checkpoint", note)
    try:
        raise_together(notes, "The checkpoint could not be saved.", _REMEDY)
        for field in ("tag",) if site.node_local else ("tag", "folder"):
            said = {item[field]: rank for rank, item in reversed(list(enumerate(notes)))}
            if len(said) > 1:
                raise MicsCheckpointError(
                    f"All ranks must save to the same {field}, but "
                    + "; ".join(
                        f"rank {rank} said {value!r}" for value, rank in sorted(said.items(), key=lambda x: x[1])
                    )
                    + ". Give every rank the same one (a folder local to each node needs use_node_local_storage)."
                )
    except MicsCheckpointError:
        if usable:
            _remove(staging(), site)
        raise
    return [item["client"] for item in notes]


def _remove(staging: Path, site: Site) -> None:
    if site.publishes:
        shutil.rmtree(staging, ignore_errors=True)


def _describe(engine: Any, site: Site, tag: str, notes: Iterable[Mapping[str, Any]]) -> Manifest:
    layout = site.groups.layout
    return Manifest(
        tag=tag,
        shards=layout.partition_size,
        replicas=layout.replication_size,
        ranks=layout.world_size,
        ranks_per_node=tuple(Counter(layout.nodes).values()),
        model_parallel=dist.get_world_size() // layout.world_size,
        global_steps=engine.global_steps,
        node_local=site.node_local,
        versions={"mics_ds": __version__, "deepspeed": deepspeed.__version__, "torch": torch.__version__},
        files={name: record for note in notes for name, record in note["files"].items()},
    )


def _fingerprint(client_state: Mapping[str, Any]) -> dict[str, Any]:
    """What tells whether two ranks have the same client state."""
    buffer = io.BytesIO()
    pickle.dump(client_state, buffer)
    return {"digest": hashlib.sha256(buffer.getbuffer()).hexdigest(), "keys": sorted(map(str, client_state))}


def _save_own_client_state(
    session: _Saving, site: Site, staging: Path, request: _Request, fingerprints: list[dict[str, Any]]
) -> None:
    """ZeRO-3 gives every rank its own client state back. Replicas share their files, so whoever has another client
    state than the writer of its shard keeps it in a small file of its own."""
    writers = fingerprints[site.writer]
    if writers["digest"] == fingerprints[site.rank]["digest"]:
        return
    path = staging / CLIENT_STATE.format(rank=site.rank)
    state = {"client_state": request.client_state, "instead_of": writers["keys"]}
    session.write(state, str(path), torch.save)
