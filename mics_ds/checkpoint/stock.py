"""Engines without MiCS, in folders where MiCS has saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..errors import MicsCheckpointError
from . import manifest
from .load import RESHAPE_COMMAND


def drop_stale_manifest(engine: Any, save_dir: str, tag: str) -> None:
    """A stock engine is about to write over a checkpoint that has a manifest, which would be wrong from then on."""
    path = Path(save_dir) / tag / manifest.NAME
    if dist.get_rank() == 0 and path.exists():
        path.unlink()


def refuse_other_shard_count(engine: Any, load_dir: str, tag: str | None) -> None:
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
