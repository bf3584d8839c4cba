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
from . import manifest
from .manifest import FileRecord, Manifest
from .together import Site, exchange, on_publishers, raise_together, site_of, words

CLIENT_STATE = "mics_client_state_rank_{rank}.pt"


class _Saving:
    """Between DeepSpeed and the files while saving. An error, of whatever kind, is noted and raised on all ranks
    later, because DeepSpeed has a barrier further on, where the other ranks wait."""

    def __init__(self, rank: int, shard: int) -> None:
        self.rank = rank
        self.model_states_shard = shard
        self.files: dict[str, FileRecord] = {}
        self.errors: list[str] = []

    def make(self, make: Callable[[], Any]) -> None:
        try:
            make()
        except Exception as error:
            self.errors.append(words(error))

    def write(self, path: str, write: Callable[[], Any]) -> None:
        if self.errors:
            return
        try:
            write()
            self.files[os.path.basename(path)] = manifest.seal(Path(path), self.rank)
        except Exception as error:  # torch reports a full disk as RuntimeError, pickle has several kinds
            free = shutil.disk_usage(os.path.dirname(path)).free
            self.errors.append(f"{path}: {words(error)} ({free / 1e6:.1f} MB free there)")


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
    tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
    target = Path(save_dir) / tag
    staging = manifest.staging_folder(target)
    client_state = dict(client_state or {})
    failed = f"Checkpoint {target} could not be saved."
    remedy = "Nothing was published, and older checkpoints are as they were."

    fingerprints = _prepare(site, str(save_dir), tag, staging, client_state, failed, remedy)
    session = _Saving(site.rank, site.shard)
    seam.set_writer(engine, site.writer == site.rank)
    try:
        try:
            with seam.CheckpointFiles.of(engine).through(session):
                original(
                    engine,
                    save_dir,
                    tag=str(staging.relative_to(save_dir)),
                    client_state=client_state,
                    save_latest=False,
                    exclude_frozen_parameters=exclude_frozen_parameters,
                )
        except RuntimeError as error:  # of a barrier, when another rank has died
            raise MicsCheckpointError(f"{failed} {words(error)}. {remedy}") from error
        _save_own_client_state(session, site, staging, client_state, fingerprints)
        written = exchange({"errors": session.errors, "files": session.files}, f"saving {target}")
        raise_together(written, failed, remedy)

        def publish() -> None:
            manifest.publish(staging, target, _describe(engine, site, tag, [written[rank] for rank in site.peers]))

        raise_together(on_publishers(site, publish, f"publishing {target}"), failed, remedy)
    except BaseException:
        _remove(staging, site)
        raise

    _update_latest(site, Path(save_dir), tag, save_latest)
    return True


def _update_latest(site: Site, folder: Path, tag: str, wanted: bool) -> None:
    """Name the published checkpoint in ``latest``, if that is wanted, and mention what crashes left."""
    latest = folder / manifest.LATEST

    def update() -> None:
        if wanted:
            manifest.write_text(latest, tag)

    notes = on_publishers(site, update, f"publishing {folder / tag}")
    raise_together(
        notes, f"Checkpoint {folder / tag} is complete, but {latest} could not be updated.", "Load it by its tag."
    )
    if site.publishes:
        for remains in manifest.interrupted_saves(folder):
            log_rank0(f"{remains} is left from an interrupted save and can be deleted")


def _prepare(
    site: Site, save_dir: str, tag: str, staging: Path, client_state: Mapping[str, Any], failed: str, remedy: str
) -> list[dict[str, Any]]:
    """Make an empty folder to write to, and see to it that all ranks mean the same one.

    Returns:
        What tells the client states of all ranks apart, see :func:`_fingerprint`.

    Raises:
        MicsCheckpointError: the ranks disagree, or the folder cannot be made.
    """

    def make() -> None:
        if staging.exists():
            log_rank0(f"an earlier save of tag {tag} was interrupted; its remains in {staging} are removed")
            shutil.rmtree(staging)
        staging.mkdir(parents=True)

    note: dict[str, Any] = {"tag": tag, "folder": save_dir, "client": None, "errors": []}
    try:
        note["client"] = _fingerprint(client_state)
    except Exception as error:  # what pickle raises depends on the object; all ranks raise it below
        note["errors"].append(f"client_state cannot be pickled, {words(error)}")
    notes = on_publishers(site, make, f"saving {tag}", note)
    try:
        raise_together(notes, failed, remedy)
    except MicsCheckpointError:
        _remove(staging, site)
        raise
    for field in ("tag",) if site.node_local else ("tag", "folder"):
        said = {item[field]: rank for rank, item in reversed(list(enumerate(notes)))}
        if len(said) > 1:
            _remove(staging, site)
            raise MicsCheckpointError(
                f"All ranks must save to the same {field}, but "
                + "; ".join(f"rank {rank} said {value!r}" for value, rank in sorted(said.items(), key=lambda x: x[1]))
                + ". Give every rank the same one (a folder local to each node needs use_node_local_storage)."
            )
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
    session: _Saving, site: Site, staging: Path, client_state: Mapping[str, Any], fingerprints: list[dict[str, Any]]
) -> None:
    """ZeRO-3 gives every rank its own client state back. Replicas share their files, so whoever has another client
    state than the writer of its shard keeps it in a small file of its own."""
    writers = fingerprints[site.writer]
    if writers["digest"] == fingerprints[site.rank]["digest"]:
        return
    path = staging / CLIENT_STATE.format(rank=site.rank)
    state = {"client_state": dict(client_state), "instead_of": writers["keys"]}
    session.write(str(path), lambda: torch.save(state, path))
