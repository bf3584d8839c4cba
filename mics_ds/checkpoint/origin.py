"""Who wrote a checkpoint that has no manifest: stock ZeRO-3, or MiCS, and the manifest is gone.

MiCS marks the files of optimizer states that it writes. DeepSpeed reads only the keys that it knows there, and hands
none of them to users, as it would with keys among the model states.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..deepspeed_compat.checkpoint import load_states
from ..errors import MicsCheckpointError
from . import manifest

MARK = "mics_ds"


def marked(states: Mapping[str, Any]) -> dict[str, Any]:
    """Optimizer states as they are written into a checkpoint with a manifest."""
    return {**states, MARK: __version__}


def refuse_lost_manifest(folder: Path, shard: int) -> None:
    """See to it that a folder without a manifest never had one, as far as the files of one shard tell.

    Raises:
        MicsCheckpointError: MiCS wrote it, and ``MICS_DS_ALLOW_UNCHECKED=1`` is not set.
    """
    if os.environ.get(manifest.ALLOW_UNCHECKED_ENV) == "1":
        return
    for path in sorted(folder.glob(f"*zero_pp_rank_{shard}_mp_rank_*_optim_states.pt")):
        version = load_states(path, mmap=True).get(MARK)
        if version is not None:
            raise MicsCheckpointError(
                f"{folder} was written by mics_ds {version}, and its {manifest.NAME} is gone: nothing tells whether "
                f"its files are those that were written. Restore that file, or load another checkpoint, or set "
                f"{manifest.ALLOW_UNCHECKED_ENV}=1 on all ranks to load this one unchecked"
            )
