"""Loading under MiCS: checked before anything is changed, in as many shards as were saved or cut anew.

DeepSpeed's own ``load_checkpoint`` does the work. :class:`_Loading` stands between it and the files, and makes old
shards look like this job's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..deepspeed_compat import checkpoint as seam
from ..deepspeed_compat.engine import is_fresh
from ..errors import MicsCheckpointError
from ..log import log_rank0
from . import manifest, mismatch, names, origin, rank_state, reshape, restart
from .background import Background
from .manifest import CLIENT_STATE, Manifest
from .mismatch import Parameters
from .snapshot import MemoryTier
from .together import Site, attempt, exchange, raise_together, site_of

RESHAPE_COMMAND = "python -m mics_ds.reshape"
_PARTLY = "States may have been loaded in part: load another checkpoint before training."


class _Saved:
    """A checkpoint on disk, as far as it matters before it is loaded."""

    def __init__(self, engine: Any, target: Path, shard: int) -> None:
        self._engine, self._folder = engine, target
        self._groups = engine.optimizer.mics_groups
        self.manifest: Manifest | None = None
        self.reshapes = False
        self.layout: reshape.ShardLayout | None = None
        try:
            self.manifest = manifest.read(target)
            self.shards = self.manifest.shards
        except FileNotFoundError:
            self.shards = manifest.count_shards(target)
            origin.refuse_lost_manifest(target, shard % max(self.shards, 1))

    @property
    def model_states_shard(self) -> int:
        """The shard whose file of model states has what belongs to this rank beside it: the one that this rank had, if
        as many ranks have saved."""
        return self._groups.full.rank % self.shards

    @property
    def own_state(self) -> Path | None:
        """The file with what this rank had of its own."""
        path = self._folder / CLIENT_STATE.format(rank=dist.get_rank())
        if self.manifest is None or path.name not in self.manifest.files:
            return None
        return path if self.manifest.ranks == self._groups.layout.world_size else None

    def model_states(self, shard: int) -> Path:
        return self._folder / seam.model_states_name(self._engine, shard)

    def optimizer_states(self, shard: int) -> Path:
        return self._folder / seam.optimizer_states_name(self._engine, shard)


class _Loading:
    """Between DeepSpeed and the files while loading: makes old shards look like this job's."""

    def __init__(self, engine: Any, saved: _Saved, own: Path | Mapping[str, Any] | None, with_optimizer: bool) -> None:
        self._engine, self._saved, self._own, self._with_optimizer = engine, saved, own, with_optimizer
        self._shard = engine.optimizer.mics_groups.partition.rank
        self.model_states_shard = saved.model_states_shard

    def make(self, make: Callable[[], Any]) -> None:
        make()

    def read(self, path: str) -> dict[str, Any]:
        """The states in a file. All ranks read as often as each other, and one that cannot stops all of them here:
        further on, they would wait for it."""
        states: dict[str, Any] = {}
        note: dict[str, Any] = {"errors": []}
        part = self._model_states if path.endswith("_model_states.pt") else self._optimizer_states
        attempt(lambda: states.update(part(path)), note["errors"])
        notes = exchange(note, f"reading {os.path.dirname(path)}")
        raise_together(notes, f"Checkpoint {os.path.dirname(path)} could not be read.", _PARTLY)
        return states

    def _model_states(self, path: str) -> dict[str, Any]:
        states = seam.load_states(path)
        if isinstance(self._own, Path):
            rank_state.restore_from(states, self._own)
        elif self._own is not None:
            rank_state.restore(states, self._own)
        # The number of shards has been checked. DeepSpeed would compare the number of ranks, which may differ.
        states[reshape.DP_WORLD_SIZE] = self._engine.seq_dp_world_size
        if not self._with_optimizer:  # all weights come consolidated, and other ones may be frozen now
            states[reshape.FROZEN_SHARDS] = None
        frozen = states.get(reshape.FROZEN_SHARDS)
        if frozen and self._saved.shards != self._size:
            states[reshape.FROZEN_SHARDS] = reshape.reshape_frozen(
                lambda shard: seam.load_states(self._saved.model_states(shard), mmap=True),
                states[reshape.FROZEN_SHAPES],
                self._saved.shards,
                self._size,
                self._shard,
            )
        return states

    def _optimizer_states(self, path: str) -> dict[str, Any]:
        if not self._saved.reshapes:
            return seam.load_states(path)
        old, new = self._saved.layout, reshape.ShardLayout(self._size, seam.param_shapes(self._engine))
        assert old is not None, "read before loading is allowed"
        states: dict[str, Any] = {}

        def load(shard: int) -> dict[str, Any]:
            whole = seam.load_states(self._saved.optimizer_states(shard), mmap=True)
            states.update({key: value for key, value in whole.items() if key != reshape.BASE_STATE})
            return whole[reshape.BASE_STATE]

        cut = reshape.reshape_optimizer(load, old, new, self._shard, seam.sub_group_owners(self._engine))
        return {**states, reshape.BASE_STATE: cut}

    @property
    def _size(self) -> int:
        return self._engine.optimizer.mics_groups.partition.size


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
    if Background.current is not None:
        Background.current.wait()
    how = {
        "load_module_strict": load_module_strict,
        # Asked for the module *and* optimizer states, its default, DeepSpeed restores no sharded weights at all.
        "load_optimizer_states": load_optimizer_states and not load_module_only,
        "load_lr_scheduler_states": load_lr_scheduler_states,
        "load_module_only": load_module_only,
        "custom_load_fn": custom_load_fn,
    }
    tier = getattr(engine, "mics_memory", None)
    resumes = tag is None and load_optimizer_states and not (load_module_only or custom_load_fn)
    if tier is not None and resumes and tier.may_resume(load_dir, load_lr_scheduler_states) and is_fresh(engine):
        with restart.restored(tier, engine, load_dir) as found:
            if found is not None:
                return _resume(original, engine, found, tier, load_dir, how)
    site = site_of(engine)
    tag = _agree_on_tag(site, load_dir, tag)
    if tag is None:  # nothing saved yet: DeepSpeed warns and returns (None, None), which frameworks rely on
        if tier is not None:
            tier.begins_in(load_dir)
        return original(engine, load_dir)
    return _load(original, engine, site, load_dir, tag, how)


def _resume(
    original: Callable[..., tuple],
    engine: Any,
    found: restart.Restored,
    tier: MemoryTier,
    load_dir: str | os.PathLike,
    how: Mapping[str, Any],
) -> tuple[str | None, dict[str, Any] | None]:
    """Load the checkpoint that memory had, and what else was in it."""
    # Its content was compared with a checksum on its way here.
    own = (found.own or {}).get("states")
    path, client_state = _load(original, engine, found.site, found.folder, found.tag, how, own, contents=False)
    restart.resume_random_numbers(found)
    if found.own is not None:
        client_state = {**(client_state or {}), **found.own["client_state"]}
    tier.begins_in(load_dir)
    log_rank0(f"resumed from {found.words}")
    return path, client_state


def _load(
    original: Callable[..., tuple],
    engine: Any,
    site: Site,
    load_dir: str | os.PathLike,
    tag: str,
    how: Mapping[str, Any],
    own: Mapping[str, Any] | None = None,
    *,
    contents: bool = True,
) -> tuple[str | None, dict[str, Any] | None]:
    """Load a checkpoint that is there. Collective over the world.

    Args:
        own: what this rank had of its own, if that is not in a file of the checkpoint.
        contents: compare files with their checksums first.
    """
    target = Path(load_dir) / tag
    saved = _check(engine, site, Path(load_dir), tag, how["load_optimizer_states"], contents)
    _report(site, target, saved)
    session = _Loading(engine, saved, saved.own_state or own, how["load_optimizer_states"])
    with seam.CheckpointFiles.of(engine).through(session), seam.weights_from(tag):
        path, client_state = original(engine, load_dir, tag=tag, **how)
    if engine.optimizer.mics_guard is not None:
        engine.optimizer.mics_guard.loaded(engine, target)
    return path, client_state


def _check(engine: Any, site: Site, folder: Path, tag: str, with_optimizer: bool, contents: bool) -> _Saved:
    """What is in a checkpoint that can be loaded.

    Raises:
        MicsCheckpointError: on every rank: it cannot.
    """
    target = folder / tag
    note: dict[str, Any] = {"errors": []}
    found: list[_Saved] = []

    def check() -> None:
        if not target.is_dir():
            raise MicsCheckpointError(f"{target} does not exist")
        found.append(_Saved(engine, target, site.shard))
        note["errors"] += _objections(engine, site, target, found[0], with_optimizer, contents)

    attempt(check, note["errors"])
    notes = exchange(note, f"checking {target}")
    if not any(item["errors"] for item in notes):
        return found[0]
    mine: list[str] = []
    attempt(lambda: mine.extend(manifest.complete_tags(folder)), [])
    seen = exchange({"complete": mine}, f"checking {target}")
    complete = sorted(set.intersection(*(set(item["complete"]) for item in seen)) - {tag})
    others = f" Complete checkpoints in {folder}: {', '.join(complete)}." if complete else ""
    raise_together(notes, f"Checkpoint {target} cannot be loaded.", f"No state was changed.{others}")
    raise AssertionError("some rank had an objection")


def _report(site: Site, target: Path, saved: _Saved) -> None:
    """Say what is unusual about a checkpoint that is about to be loaded."""
    if saved.manifest is None:
        log_rank0(f"{target} has no {manifest.NAME}, as after stock ZeRO-3: its files are loaded unchecked")
    elif not saved.manifest.protected:
        log_rank0(f"{target} is of an older mics_ds, whose {manifest.NAME} has no checksum of its own")
    if saved.reshapes:
        log_rank0(f"{target} has {saved.shards} shards; they are cut into {site.groups.partition.size} while loading")
    elif saved.manifest is not None and saved.manifest.ranks != site.groups.layout.world_size:
        log_rank0(f"{target} was saved by {saved.manifest.ranks} ranks, with as many shards as now; it loads as it is")


def _agree_on_tag(site: Site, load_dir: Any, tag: Any) -> str | None:
    """The tag to load, the same on all ranks; ``None`` if there is no latest one.

    ``latest`` is replaced after everything else, node by node on local folders. If that was interrupted, the
    newer checkpoint is complete on all nodes, and is taken.
    """
    note: dict[str, Any] = {"asked": None, "latest": None, "steps": -1, "errors": []}

    def look() -> None:
        folder = Path(load_dir)
        if tag is not None:
            note["asked"] = str(tag)
            names.check_tag(note["asked"])
        if site.publishes:
            for remains in manifest.interrupted_saves(folder):
                log_rank0(f"{remains} is left from an interrupted save; it is not a checkpoint and is ignored")
        if tag is None:
            note["latest"] = names.read_latest(folder)
        wanted = note["latest"] if tag is None else note["asked"]
        if wanted and site.publishes and manifest.recover(folder / wanted):
            log_rank0(f"{folder / wanted} was being replaced when that was interrupted; the older one is back")
        if wanted and tag is None and site.node_local and (folder / wanted / manifest.NAME).is_file():
            note["steps"] = manifest.read(folder / wanted).global_steps

    attempt(look, note["errors"])
    folder, asked = load_dir, note["asked"]
    notes = exchange(note, f"looking for a checkpoint in {folder}")
    raise_together(notes, f"No checkpoint can be loaded from {folder}.", "No state was changed.")
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
            f"{Path(folder) / manifest.LATEST} says "
            + "; ".join(f"{name} on rank {rank}" for rank, name in enumerate(item["latest"] for item in notes))
            + ". The folder has to be on storage that all nodes share; for folders local to each node set "
            '"checkpoint": {"use_node_local_storage": true}.'
        )
    newest = max((notes[rank] for rank in seeing), key=lambda item: item["steps"])["latest"]
    log_rank0(f"nodes disagree on the latest checkpoint in {folder}, as after an interrupted save; taking {newest}")
    return newest


def _objections(
    engine: Any, site: Site, target: Path, saved: _Saved, with_optimizer: bool, contents: bool
) -> list[str]:
    """Why this checkpoint cannot be loaded, as far as this rank can see. Empty if it can."""
    p = site.groups.partition.size
    if saved.shards == 0:
        return [mismatch.what_else_it_is(target)]
    if saved.manifest is not None and saved.manifest.model_parallel != dist.get_world_size() // len(
        site.groups.layout.ranks
    ):
        return [f"it was saved by a job with model parallelism {saved.manifest.model_parallel}"]
    shards = [site.shard] if saved.shards == p else range(saved.shards)
    needed = [seam.model_states_name(engine, shard) for shard in shards]
    if with_optimizer:
        needed += [seam.optimizer_states_name(engine, shard) for shard in shards]
    else:  # DeepSpeed takes the weights from all fp32 shards then
        needed += [seam.optimizer_states_name(engine, shard) for shard in range(saved.shards)]
    needed += [] if saved.own_state is None else [saved.own_state.name]
    records = {} if saved.manifest is None else saved.manifest.files
    # Sizes of what this rank will read; contents are shared out, so that every file is read once for it.
    content = needed if site.node_local else sorted(records)[site.rank :: len(site.peers)]
    found = _unrecorded(target, saved, [*needed, CLIENT_STATE.format(rank=site.rank)])
    found += manifest.damages(target, [name for name in needed if name not in content], records, contents=False)
    found += manifest.damages(target, content, records, contents=contents)
    if found:
        other = seam.optimizer_states_name(engine, 0, not engine.bfloat16_enabled())
        if with_optimizer and (target / other).exists():
            found.append("it was saved by a job of another 16-bit type (bf16 or not), whose optimizer states differ")
        elif saved.manifest is not None and saved.manifest.node_local and not site.node_local:
            found.append("it was saved with use_node_local_storage: this folder has the shards of one node only")
        elif saved.manifest is not None and saved.manifest.node_local and saved.shards != p:
            found.append("it is spread over node-local folders: copy all its files to one folder to cut it anew")
        return found
    if with_optimizer:
        states = seam.load_states(saved.model_states(saved.model_states_shard), mmap=True)
        saved.layout = reshape.ShardLayout(saved.shards, states[reshape.PARAM_SHAPES])
        mine = reshape.ShardLayout(p, seam.param_shapes(engine))
        there = Parameters(saved.layout.shapes, states.get(reshape.FROZEN_SHAPES))
        strange = mismatch.why_not_these(Parameters(mine.shapes, seam.frozen_shapes(engine)), there)
        if strange:
            return strange
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


def _unrecorded(target: Path, saved: _Saved, wanted: list[str]) -> list[str]:
    """Files that are there and that a complete manifest would have. One of a node has that node's only."""
    if saved.manifest is None or saved.manifest.node_local:
        return []
    lost = [name for name in wanted if name not in saved.manifest.files and (target / name).exists()]
    return [f"{target / name} is not in its {manifest.NAME}, which is damaged" for name in lost]
