"""Engines without MiCS, in folders where MiCS has saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..errors import MicsCheckpointError
from . import manifest, names
from .load import RESHAPE_COMMAND


def drop_stale_manifest(engine: Any, save_dir: str, tag: str) -> None:
    """A stock engine is about to write over a checkpoint that has a manifest, which would be wrong from then on."""
    if dist.get_rank() != 0 or not _is_tag(tag):
        return
    names.forget_note(Path(save_dir))
    (Path(save_dir) / tag / manifest.NAME).unlink(missing_ok=True)


def refuse_other_shard_count(engine: Any, load_dir: str, tag: str | None) -> None:
    """A stock engine is about to load a checkpoint that MiCS saved.

    Raises:
        MicsCheckpointError: in another number of shards than it has ranks; or its manifest or ``latest`` is damaged.
    """
    folder = Path(load_dir)
    tag = names.read_latest(folder) if tag is None else tag
    if tag is None or not _is_tag(tag) or not (folder / tag / manifest.NAME).is_file():
        return
    saved, ranks = manifest.read(folder / tag), engine.seq_dp_world_size
    if saved.shards != ranks:
        raise MicsCheckpointError(
            f"Checkpoint {folder / tag} was saved by MiCS in {saved.shards} shards, and stock ZeRO-3 on {ranks} ranks "
            f"needs {ranks}. Cut it with {RESHAPE_COMMAND} {folder / tag} NEW_FOLDER --shards {ranks}, or load it "
            f'under MiCS with "mics_shard_size": {ranks} and "mics_reshape_checkpoint": true.'
        )


def _is_tag(tag: str) -> bool:
    """Whether MiCS can have written that. What is wrong with other tags is for DeepSpeed to say."""
    try:
        names.check_tag(tag)
    except MicsCheckpointError:
        return False
    return True
