"""Saving and loading under MiCS: one replica's worth of files, published when complete, checked before use.

DeepSpeed's own ``save_checkpoint`` and ``load_checkpoint`` do the work, in DeepSpeed's file layout for p shards.
Around them, this module decides which rank writes what, sends the files to a folder that nobody reads yet,
and lets no rank go on before all have succeeded.

Shard i is written by replica i mod r, so that r replicas share the writing. On folders local to each node
(``"checkpoint": {"use_node_local_storage": true}``), each node writes the shards that its own ranks need.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from . import __version__, compat, manifest, reshard
from .errors import MicsCheckpointError
from .groups import MicsGroups
from .log import log_rank0
from .manifest import FileRecord, Manifest

CLIENT_STATE = "mics_client_state_rank_{rank}.pt"
RESHAPE_COMMAND = "python -m mics_ds.reshape"


def _exchange(note: dict[str, Any], doing: str) -> list[dict[str, Any]]:
    """The notes of all ranks of the world.

    By a collective and not through the store, because that tells at once when a rank has died.

    Raises:
        MicsCheckpointError: it has.
    """
    if dist.get_world_size() == 1:
        return [note]
    notes: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(notes, note)
    except RuntimeError as error:
        raise MicsCheckpointError(
            f"Another rank has most likely died while {doing}; its own output says why. Checkpoints that were complete "
            f"before are untouched."
        ) from error
    return notes


def _raise_together(notes: list[dict[str, Any]], failed: str, remedy: str) -> None:
    """Raise the same error on all ranks if any of them noted errors."""
    by_message: dict[str, list[int]] = {}
    for rank, note in enumerate(notes):
        for message in note["errors"]:
            by_message.setdefault(message, []).append(rank)
    if by_message:
        said = "; ".join(
            f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks[:8]))}"
            f"{' and more' if len(ranks) > 8 else ''}: {message}"
            for message, ranks in list(by_message.items())[:6]
        )
        more = f"; and {len(by_message) - 6} more" if len(by_message) > 6 else ""
        raise MicsCheckpointError(f"{failed} {said}{more}. {remedy}")


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().rstrip(".")


class _Site:
    """Who does what in saving and loading, from this rank's point of view."""

    def __init__(self, groups: MicsGroups, node_local: bool) -> None:
        self.rank = dist.get_rank()
        self.groups = groups
        self.node_local = node_local
        self.shard = groups.partition.rank

    @cached_property
    def peers(self) -> list[int]:
        """Global ranks that see the same folder."""
        nodes = self.groups.world_nodes
        return [rank for rank, node in enumerate(nodes) if not self.node_local or node == nodes[self.rank]]

    @cached_property
    def publishes(self) -> bool:
        return self.rank == self.peers[0]

    @cached_property
    def writer(self) -> int:
        """Global rank that writes the files of this rank's shard, where this rank can see them."""
        layout = self.groups.layout
        same_shard = layout.replication_groups[self.shard]
        if not self.node_local:
            return same_shard[self.shard % layout.replication_size]
        return next(rank for rank in same_shard if rank in self.peers)


def _site(engine: Any) -> _Site:
    return _Site(engine.optimizer.mics_groups, engine.use_node_local_storage())


# --------------------------------------------------------------------------------------------------
# Saving


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
            self.errors.append(_words(error))

    def write(self, path: str, write: Callable[[], Any]) -> None:
        if self.errors:
            return
        try:
            write()
            self.files[os.path.basename(path)] = manifest.seal(Path(path), self.rank)
        except Exception as error:  # torch reports a full disk as RuntimeError, pickle has several kinds
            free = shutil.disk_usage(os.path.dirname(path)).free
            self.errors.append(f"{path}: {_words(error)} ({free / 1e6:.1f} MB free there)")


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
    site = _site(engine)
    tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
    target = Path(save_dir) / tag
    staging = manifest.staging_folder(target)
    client_state = dict(client_state or {})
    failed = f"Checkpoint {target} could not be saved."
    remedy = "Nothing was published, and older checkpoints are as they were."

    fingerprints = _prepare(site, str(save_dir), tag, staging, client_state, failed, remedy)
    session = _Saving(site.rank, site.shard)
    compat.set_writer(engine, site.writer == site.rank)
    try:
        try:
            with compat.CheckpointFiles.of(engine).through(session):
                original(
                    engine,
                    save_dir,
                    tag=str(staging.relative_to(save_dir)),
                    client_state=client_state,
                    save_latest=False,
                    exclude_frozen_parameters=exclude_frozen_parameters,
                )
        except RuntimeError as error:  # of a barrier, when another rank has died
            raise MicsCheckpointError(f"{failed} {_words(error)}. {remedy}") from error
        _save_own_client_state(session, site, staging, client_state, fingerprints)
        written = _exchange({"errors": session.errors, "files": session.files}, f"saving {target}")
        _raise_together(written, failed, remedy)

        def publish() -> None:
            manifest.publish(staging, target, _describe(engine, site, tag, [written[rank] for rank in site.peers]))

        _raise_together(_on_publishers(site, publish, f"publishing {target}"), failed, remedy)
    except BaseException:
        _remove(staging, site)
        raise

    latest = Path(save_dir) / manifest.LATEST
    notes = _on_publishers(site, lambda: save_latest and manifest.write_text(latest, tag), f"publishing {target}")
    _raise_together(
        notes, f"Checkpoint {target} is complete, but {latest} could not be updated.", "Load it by its tag."
    )
    if site.publishes:
        for remains in manifest.interrupted_saves(Path(save_dir)):
            log_rank0(f"{remains} is left from an interrupted save and can be deleted")
    return True


def _prepare(
    site: _Site, save_dir: str, tag: str, staging: Path, client_state: Mapping[str, Any], failed: str, remedy: str
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
        note["errors"].append(f"client_state cannot be pickled, {_words(error)}")
    notes = _on_publishers(site, make, f"saving {tag}", note)
    try:
        _raise_together(notes, failed, remedy)
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


def _on_publishers(
    site: _Site, work: Callable[[], Any], doing: str, note: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Do something on the ranks that publish, and tell all ranks how it went."""
    mine: dict[str, Any] = {"errors": [], **(note or {})}
    if site.publishes:
        try:
            work()
        except MicsCheckpointError as error:
            mine["errors"].append(str(error).rstrip("."))
        except OSError as error:
            mine["errors"].append(_words(error))
    return _exchange(mine, doing)


def _remove(staging: Path, site: _Site) -> None:
    if site.publishes:
        shutil.rmtree(staging, ignore_errors=True)


def _describe(engine: Any, site: _Site, tag: str, notes: Iterable[Mapping[str, Any]]) -> Manifest:
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
    session: _Saving, site: _Site, staging: Path, client_state: Mapping[str, Any], fingerprints: list[dict[str, Any]]
) -> None:
    """ZeRO-3 gives every rank its own client state back. Replicas share their files, so whoever has another client
    state than the writer of its shard keeps it in a small file of its own."""
    writers = fingerprints[site.writer]
    if writers["digest"] == fingerprints[site.rank]["digest"]:
        return
    path = staging / CLIENT_STATE.format(rank=site.rank)
    state = {"client_state": dict(client_state), "instead_of": writers["keys"]}
    session.write(str(path), lambda: torch.save(state, path))


# --------------------------------------------------------------------------------------------------
# Loading


class _Saved:
    """A checkpoint on disk, as far as it matters before it is loaded."""

    def __init__(self, engine: Any, target: Path) -> None:
        self._engine, self._folder = engine, target
        self.manifest: Manifest | None = None
        self.reshapes = False
        self.layout: reshard.ShardLayout | None = None
        try:
            self.manifest = manifest.read(target)
            self.shards = self.manifest.shards
        except FileNotFoundError:
            self.shards = count_shards(target)

    def model_states(self, shard: int) -> Path:
        return self._folder / compat.model_states_name(self._engine, shard)

    def optimizer_states(self, shard: int) -> Path:
        return self._folder / compat.optimizer_states_name(self._engine, shard)


class _Loading:
    """Between DeepSpeed and the files while loading: makes old shards look like this job's."""

    def __init__(self, engine: Any, saved: _Saved) -> None:
        self._engine, self._saved = engine, saved
        self._shard = engine.optimizer.mics_groups.partition.rank
        self.model_states_shard = self._shard % saved.shards

    def make(self, make: Callable[[], Any]) -> None:
        make()

    def read(self, path: str) -> dict[str, Any]:
        name = os.path.basename(path)
        if name.endswith("_model_states.pt"):
            return self._model_states(path)
        return self._optimizer_states(path)

    def _model_states(self, path: str) -> dict[str, Any]:
        states = compat.load_states(path)
        # Only the number of shards must fit, and that was seen to; DeepSpeed compares the number of ranks.
        states[reshard.DP_WORLD_SIZE] = self._engine.seq_dp_world_size
        frozen = states.get(reshard.FROZEN_SHARDS)
        if frozen and self._saved.shards != self._size:
            states[reshard.FROZEN_SHARDS] = reshard.reshard_frozen(
                lambda shard: compat.load_states(self._saved.model_states(shard), mmap=True),
                states[reshard.FROZEN_SHAPES],
                self._saved.shards,
                self._size,
                self._shard,
            )
        return states

    def _optimizer_states(self, path: str) -> dict[str, Any]:
        if not self._saved.reshapes:
            return compat.load_states(path)
        old, new = self._saved.layout, reshard.ShardLayout(self._size, compat.param_shapes(self._engine))
        assert old is not None, "read before loading is allowed"
        states: dict[str, Any] = {}

        def load(shard: int) -> dict[str, Any]:
            whole = compat.load_states(self._saved.optimizer_states(shard), mmap=True)
            states.update({key: value for key, value in whole.items() if key != reshard.BASE_STATE})
            return whole[reshard.BASE_STATE]

        cut = reshard.reshard_optimizer(load, old, new, self._shard, compat.sub_group_owners(self._engine))
        return {**states, reshard.BASE_STATE: cut}

    @property
    def _size(self) -> int:
        return self._engine.optimizer.mics_groups.partition.size


def count_shards(folder: Path) -> int:
    """p of a checkpoint without a manifest, from the names of its files. 0 if there are none."""
    found = (re.match(r"zero_pp_rank_(\d+)_mp_rank_\d+_model_states\.pt$", path.name) for path in folder.glob("*.pt"))
    return 1 + max((int(match[1]) for match in found if match), default=-1)


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
) -> tuple[str | None, dict[str, Any] | None]:
    """``engine.load_checkpoint`` of an engine with MiCS. Collective over the world.

    Raises:
        MicsCheckpointError: on every rank, before anything was changed: the checkpoint is missing,
            incomplete, damaged, of another model, or in another number of shards.
    """
    if load_module_only:
        # Asked for the module *and* optimizer states, its default, DeepSpeed restores no sharded weights at all.
        load_optimizer_states = False
    site = _site(engine)
    folder = Path(load_dir)
    tag = _agree_on_tag(site, folder, tag)
    if tag is None:  # nothing saved yet: DeepSpeed warns and returns (None, None), which frameworks rely on
        return original(engine, load_dir)
    target = folder / tag
    notes: dict[str, Any] = {"errors": [], "complete": manifest.complete_tags(folder)}
    saved: _Saved | None = None
    try:
        if not target.is_dir():
            raise MicsCheckpointError(f"{target} does not exist")
        saved = _Saved(engine, target)
        notes["errors"] = _objections(engine, site, target, saved, load_optimizer_states)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        notes["errors"].append(str(error).rstrip(".") if isinstance(error, MicsCheckpointError) else _words(error))
    everybody = _exchange(notes, f"checking {target}")
    complete = sorted(set.intersection(*(set(item["complete"]) for item in everybody)) - {tag})
    others = f" Complete checkpoints in {folder}: {', '.join(complete)}." if complete else ""
    _raise_together(everybody, f"Checkpoint {target} cannot be loaded.", f"No state was changed.{others}")
    assert saved is not None, "a rank without it has an objection"

    if saved.reshapes:
        log_rank0(f"{target} has {saved.shards} shards; they are cut into {site.groups.partition.size} while loading")
    elif saved.manifest is not None and saved.manifest.ranks != site.groups.layout.world_size:
        log_rank0(f"{target} was saved by {saved.manifest.ranks} ranks, with as many shards as now; it loads as it is")
    session = _Loading(engine, saved)
    with compat.CheckpointFiles.of(engine).through(session), compat.weights_from(tag):
        path, client_state = original(
            engine,
            load_dir,
            tag=tag,
            load_module_strict=load_module_strict,
            load_optimizer_states=load_optimizer_states,
            load_lr_scheduler_states=load_lr_scheduler_states,
            load_module_only=load_module_only,
            custom_load_fn=custom_load_fn,
        )
    return path, _own_client_state(target, saved, site, client_state)


def _agree_on_tag(site: _Site, folder: Path, tag: Any) -> str | None:
    """The tag to load, the same on all ranks; ``None`` if there is no latest one.

    ``latest`` is replaced after everything else, node by node on local folders. If that was interrupted, the
    newer checkpoint is complete on all nodes, and is taken.
    """
    asked = None if tag is None else str(tag)
    note: dict[str, Any] = {"asked": asked, "latest": None, "steps": -1, "errors": []}
    try:
        if site.publishes:
            for remains in manifest.interrupted_saves(folder):
                log_rank0(f"{remains} is left from an interrupted save; it is not a checkpoint and is ignored")
        if asked is None and (folder / manifest.LATEST).is_file():
            note["latest"] = (folder / manifest.LATEST).read_text().strip()
        wanted = note["latest"] if asked is None else asked
        if wanted and site.publishes and manifest.recover(folder / wanted):
            log_rank0(f"{folder / wanted} was being replaced when that was interrupted; the older one is back")
        if wanted and (folder / wanted / manifest.NAME).is_file():
            note["steps"] = manifest.read(folder / wanted).global_steps
    except (OSError, MicsCheckpointError) as error:
        note["errors"].append(_words(error))
    notes = _exchange(note, f"looking for a checkpoint in {folder}")
    _raise_together(notes, f"No checkpoint can be loaded from {folder}.", "No state was changed.")
    if len({item["asked"] for item in notes}) > 1:
        raise MicsCheckpointError(
            f"All ranks must load the same tag, got {', '.join(repr(item['asked']) for item in notes[:8])} in rank "
            f"order. Give every rank the same one."
        )
    if asked is not None:
        return asked
    found = {item["latest"] for item in notes}
    if len(found) == 1:
        return note["latest"]
    seeing = [rank for rank, item in enumerate(notes) if item["latest"] is not None]
    if not site.node_local:
        raise MicsCheckpointError(
            f"{folder / manifest.LATEST} says "
            + "; ".join(f"{name} on rank {rank}" for rank, name in enumerate(item["latest"] for item in notes))
            + ". The folder has to be on storage that all nodes share; for folders local to each node set "
            '"checkpoint": {"use_node_local_storage": true}.'
        )
    newest = max((notes[rank] for rank in seeing), key=lambda item: item["steps"])["latest"]
    log_rank0(f"nodes disagree on the latest checkpoint in {folder}, as after an interrupted save; taking {newest}")
    return newest


def _objections(engine: Any, site: _Site, target: Path, saved: _Saved, with_optimizer: bool) -> list[str]:
    """Why this checkpoint cannot be loaded, as far as this rank can see. Empty if it can."""
    p = site.groups.partition.size
    if saved.shards == 0:
        return [f"{target} has no *_model_states.pt of ZeRO stage 3"]
    if saved.manifest is not None and saved.manifest.model_parallel != dist.get_world_size() // len(
        site.groups.layout.ranks
    ):
        return [f"it was saved by a job with model parallelism {saved.manifest.model_parallel}"]
    shards = [site.shard] if saved.shards == p else range(saved.shards)
    needed = [compat.model_states_name(engine, shard) for shard in shards]
    if with_optimizer:
        needed += [compat.optimizer_states_name(engine, shard) for shard in shards]
    else:  # DeepSpeed takes the weights from all fp32 shards then
        needed += [compat.optimizer_states_name(engine, shard) for shard in range(saved.shards)]
    records = {} if saved.manifest is None else saved.manifest.files
    # Sizes of what this rank will read; contents are shared out, so that every file is read once for it.
    content = needed if site.node_local else sorted(records)[site.rank :: len(site.peers)]
    found = manifest.damages(target, [name for name in needed if name not in content], records, contents=False)
    found += manifest.damages(target, content, records)
    if found:
        other = compat.optimizer_states_name(engine, 0, not engine.bfloat16_enabled())
        if with_optimizer and (target / other).exists():
            found.append("it was saved by a job of another 16-bit type (bf16 or not), whose optimizer states differ")
        elif saved.manifest is not None and saved.manifest.node_local and not site.node_local:
            found.append("it was saved with use_node_local_storage: this folder has the shards of one node only")
        elif saved.manifest is not None and saved.manifest.node_local and saved.shards != p:
            found.append("it is spread over node-local folders: copy all its files to one folder to cut it anew")
        return found
    if with_optimizer:
        states = compat.load_states(saved.model_states(site.shard % saved.shards), mmap=True)
        saved.layout = reshard.ShardLayout(saved.shards, states[reshard.PARAM_SHAPES])
        mine = reshard.ShardLayout(p, compat.param_shapes(engine))
        strange = mine.differences(saved.layout)
        if strange:
            return [f"it is of another model: {'; '.join(strange[:3])}{' and more' if len(strange) > 3 else ''}"]
        saved.reshapes = not mine.same_as(saved.layout)
    else:
        saved.reshapes = saved.shards != p
    if saved.reshapes and not site.groups.config.reshape_checkpoint:
        how = (
            f"it has {saved.shards} shards and this job {p}"
            if saved.shards != p
            else "its optimizer sub-groups (sub_group_size, parameter groups) are not this job's"
        )
        return [
            f'{how}: set "mics_reshape_checkpoint": true under zero_optimization to have it cut anew while loading, or '
            f"do so once with {RESHAPE_COMMAND} {target} NEW_FOLDER --shards {p}"
        ]
    return []


def _own_client_state(
    target: Path, saved: _Saved, site: _Site, client_state: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Replace the client state of the shard's writer by this rank's, where they differed."""
    name = CLIENT_STATE.format(rank=site.rank)
    if client_state is None or saved.manifest is None or name not in saved.manifest.files:
        return client_state
    if saved.manifest.ranks != site.groups.layout.world_size:
        return client_state
    own = compat.load_states(target / name)
    rest = {key: value for key, value in client_state.items() if key not in own["instead_of"]}
    return {**rest, **own["client_state"]}


# --------------------------------------------------------------------------------------------------
# Engines without MiCS, in folders where MiCS has saved


def save_stock(engine: Any, save_dir: str, tag: str) -> None:
    """A stock engine is about to write over a checkpoint that has a manifest, which would be wrong from then on."""
    path = Path(save_dir) / tag / manifest.NAME
    if dist.get_rank() == 0 and path.exists():
        path.unlink()


def load_stock(engine: Any, load_dir: str, tag: str | None) -> None:
    """A stock engine is about to load a checkpoint that MiCS saved.

    Raises:
        MicsCheckpointError: in another number of shards than it has ranks.
    """
    folder = Path(load_dir)
    latest = folder / manifest.LATEST
    if tag is None:
        tag = latest.read_text().strip() if latest.is_file() else None
    if tag is None or not (folder / tag / manifest.NAME).is_file():
        return
    saved, ranks = manifest.read(folder / tag), engine.seq_dp_world_size
    if saved.shards != ranks:
        raise MicsCheckpointError(
            f"Checkpoint {folder / tag} was saved by MiCS in {saved.shards} shards, and stock ZeRO-3 on {ranks} ranks "
            f"needs {ranks}. Cut it with {RESHAPE_COMMAND} {folder / tag} NEW_FOLDER --shards {ranks}, or load it "
            f'under MiCS with "mics_shard_size": {ranks} and "mics_reshape_checkpoint": true.'
        )
