"""``mics-ds reshape OLD NEW --shards P``: cut a stage 3 checkpoint into another number of shards.

From MiCS to ZeRO-3 (P = number of ranks), from ZeRO-3 to MiCS (P = ``mics_shard_size``), or between
partition sizes. The result is a checkpoint as DeepSpeed itself would have written it on P ranks. OLD is
not changed. Runs in one process, with one new shard in memory at a time.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .checkpoint import folder as folders
from .checkpoint import manifest
from .checkpoint.coordination import SLOW_S, RankState, manifest_or_shards, restore_own, tell_speed, versions
from .checkpoint.manifest import OWN_STATE, FileRecord, Manifest
from .checkpoint.staging import marked
from .deepspeed_compat.checkpoint import load_states
from .errors import MicsCheckpointError
from .shards import cut as cutting

_OPTIMIZER_FILE = re.compile(r"(?P<prefix>(?:bf16_)?)zero_pp_rank_0_mp_rank_(?P<mp>\d+)_optim_states\.pt$")
_FIRST_MODEL_FILE = re.compile(r"zero_pp_rank_0_mp_rank_\d+_model_states\.pt$")
_COPIED = ("zero_to_fp32.py", "zero_to_torch.py")
DEFAULT_SUB_GROUP_SIZE = 1_000_000_000  # DeepSpeed's


def reshape(source: Path, save_dir: Path, shards: int, *, sub_group_size: int | None = None) -> Path:
    """Write ``source``, the folder of one tag, into ``save_dir`` under the same tag, in ``shards`` shards.

    Args:
        sub_group_size: of the job that will load it; by default as in the job that saved it.

    Returns:
        The folder of the new checkpoint.

    Raises:
        MicsCheckpointError: ``source`` is not a complete checkpoint of stage 3, or cannot be cut.
        OSError: reading or writing failed. Nothing was published then.
    """
    if shards < 1:
        raise MicsCheckpointError(f"--shards must be at least 1, got {shards}.")
    if not source.is_dir():
        raise MicsCheckpointError(f"{source} is not a folder. Give the folder of one tag, DIR/global_step100 say.")
    if save_dir.resolve() == source.parent.resolve():
        raise MicsCheckpointError(
            f"{save_dir} has the old checkpoint of that tag. Give another folder for the new one."
        )
    old_shards, old_manifest = _check(source)
    target = save_dir / source.name
    saving = folders.Staging(target, secrets.token_hex(8))
    saving.begin()
    staging, started = saving.folder, time.monotonic()
    try:
        files: dict[str, FileRecord] = {}
        parts = [match for match in map(_OPTIMIZER_FILE.match, _names(source)) if match is not None]
        steps, nbytes = 0, sum(path.stat().st_size for path in source.glob("*_states.pt"))
        words = f"{old_shards} -> {shards} shards"
        with tqdm(total=nbytes, unit="B", unit_scale=True, desc=words, delay=SLOW_S) as bar:
            for part in parts:
                ranks = _ranks(old_manifest, part["mp"], old_shards)
                job = _Part(source, part["prefix"], part["mp"], old_shards, shards, sub_group_size, ranks, old_manifest)
                steps = job.global_steps
                for shard in range(shards):
                    for name, states in job.files(shard):
                        torch.save(states, staging / name)
                        files[name] = manifest.seal(staging / name, ranks[shard % len(ranks)])
                        bar.update(files[name].bytes)
                        del states
        described = _describe(source.name, old_shards, shards, len(parts), steps, old_manifest, files)
        folders.publish(staging, target, described)
    except BaseException:
        saving.abandon()
        raise
    folders.write_latest(save_dir, source.name)
    saving.end()
    tell_speed(target, described.total_bytes, started)
    for name in _COPIED:
        if (source.parent / name).is_file():
            shutil.copy2(source.parent / name, save_dir / name)
    return target


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _check(source: Path) -> tuple[int, Manifest | None]:
    """Number of shards and manifest, if ``source`` is complete."""
    old, shards = manifest_or_shards(source, 0)
    if old is not None:
        found = manifest.damages(source, sorted(old.files), old.files)
    else:
        mp = {match["mp"]: match["prefix"] for match in map(_OPTIMIZER_FILE.match, _names(source)) if match}
        wanted = [
            name
            for rank, prefix in mp.items()
            for shard in range(shards)
            for name in (
                f"zero_pp_rank_{shard}_mp_rank_{rank}_model_states.pt",
                f"{prefix}zero_pp_rank_{shard}_mp_rank_{rank}_optim_states.pt",
            )
        ]
        found = manifest.damages(source, wanted, {}) if wanted else [f"{source} has no files of ZeRO stage 3"]
    if old is not None and old.node_local:
        missing = [shard for shard in range(shards) if not list(source.glob(f"*zero_pp_rank_{shard}_mp_*_optim_*"))]
        if missing:
            found.append(f"it is node-local and shards {missing} are elsewhere; copy the files of all nodes here")
    if found:
        raise MicsCheckpointError(f"{source} is not complete: {'; '.join(found[:6])}. Restore it, or take another one.")
    return shards, old


def _ranks(old: Manifest | None, mp_rank: str, shards: int) -> list[int]:
    """Global ranks of the data-parallel group that saved, in order, as far as the writers of its files tell."""
    if old is None:
        return list(range(shards))
    first = [old.files[name].writer for name in sorted(old.files) if _FIRST_MODEL_FILE.match(name)] or [0]
    stride = old.model_parallel if len(first) > 1 and first[1] - first[0] == 1 else 1
    return [first[int(mp_rank)] + stride * index for index in range(old.ranks)]


class _Part:
    """The shards of one model-parallel rank."""

    def __init__(
        self,
        source: Path,
        prefix: str,
        mp_rank: str,
        old_shards: int,
        shards: int,
        sub_group_size: int | None,
        ranks: Sequence[int],
        old: Manifest | None,
    ) -> None:
        self._source, self._prefix, self._mp, self._ranks, self._manifest = source, prefix, mp_rank, ranks, old
        first = self._model_states(0)
        self.global_steps: int = first["global_steps"]
        shapes = first[cutting.PARAM_SHAPES]
        named = [*shapes, first.get(cutting.FROZEN_SHAPES) or {}, first.get(cutting.TIED_NAMES) or {}]
        self._parameters = frozenset(name for group in named for name in group)
        if sub_group_size is None:
            zero = first["ds_config"].get("zero_optimization", {}) if isinstance(first["ds_config"], dict) else {}
            sub_group_size = int(zero.get("sub_group_size", DEFAULT_SUB_GROUP_SIZE))
        owners = cutting.owners_of(self._optimizer_states(0)[cutting.BASE_STATE], len(shapes))
        groups, self._owners = cutting.regroup(shapes, owners, shards, sub_group_size)
        self._old, self._new = cutting.ShardLayout(old_shards, shapes), cutting.ShardLayout(shards, groups)

    def _model_name(self, shard: int) -> str:
        return f"zero_pp_rank_{shard}_mp_rank_{self._mp}_model_states.pt"

    def _optimizer_name(self, shard: int) -> str:
        return f"{self._prefix}zero_pp_rank_{shard}_mp_rank_{self._mp}_optim_states.pt"

    def _model_states(self, shard: int) -> dict[str, Any]:
        return load_states(self._source / self._model_name(shard), mmap=True)

    def _optimizer_states(self, shard: int) -> dict[str, Any]:
        return load_states(self._source / self._optimizer_name(shard), mmap=True)

    def files(self, shard: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """The files of one new shard, one after the other; last, what its ranks had of their own."""
        size, ranks = self._new.shards, len(self._ranks)
        cut = cutting.Cut(self._old.shards, size, shard)
        states = self._states_of(shard)
        own = self._own(states) if ranks % size == 0 else None
        states[cutting.DP_WORLD_SIZE] = size
        states[cutting.PARAM_SHAPES] = list(self._new.groups)
        if states.get(cutting.FROZEN_SHARDS):
            shapes = states[cutting.FROZEN_SHAPES]
            states[cutting.FROZEN_SHARDS] = cutting.reshape_frozen(self._model_states, shapes, cut)
        yield self._model_name(shard), states
        optimizer = cutting.reshape_optimizer(self._optimizer_states, self._old, self._new, self._owners, cut)
        yield self._optimizer_name(shard), marked(optimizer)
        del optimizer
        for index in range(shard + size, ranks, size):
            differs = None if own is None else self._own(self._states_of(index)).beside(own.fingerprint)
            if differs is not None:
                yield OWN_STATE.format(rank=self._ranks[index]), differs

    def _states_of(self, index: int) -> dict[str, Any]:
        """Model states as one rank of the old job had them, its shards of frozen parameters apart."""
        states = self._model_states(index % self._old.shards)
        own = self._source / OWN_STATE.format(rank=self._ranks[index % len(self._ranks)])
        old = self._manifest
        if own.exists() and (old is None or old.node_local or own.name in old.files):
            restore_own(states, load_states(own))
        return states

    def _own(self, states: dict[str, Any]) -> RankState:
        return RankState.within(states, self._parameters)


def _kept_ranks(ranks: int, shards: int) -> int:
    """Ranks whose own state is in the new checkpoint: those of the old job, if they can have that many shards."""
    return ranks if ranks % shards == 0 else shards


def _describe(
    tag: str,
    old_shards: int,
    shards: int,
    model_parallel: int,
    steps: int,
    old: Manifest | None,
    files: dict[str, FileRecord],
) -> Manifest:
    if old is None:
        ranks = _kept_ranks(old_shards, shards)
        return Manifest(tag, shards, ranks // shards, ranks, (ranks,), model_parallel, steps, False, versions(), files)
    ranks = _kept_ranks(old.ranks, shards)
    return dataclasses.replace(
        old,
        shards=shards,
        replicas=ranks // shards,
        ranks=ranks,
        ranks_per_node=old.ranks_per_node if ranks == old.ranks else (ranks,),
        node_local=False,
        versions={**old.versions, **versions()},
        files=files,
        format=manifest.FORMAT,
    )


if __name__ == "__main__":
    from .cli.old_names import run

    run("python -m mics_ds.reshape", "reshape")
