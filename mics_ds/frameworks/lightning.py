"""Lightning: its state of a training is the client state of its DeepSpeed checkpoints, and of copies in memory too.

A copy is taken where a ``ModelCheckpoint`` would save, at the end of a batch or of an epoch. ``ckpt_path="last"`` goes
on from it, if there is a ``last.ckpt`` on disk, which is where Lightning looks.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
from typing import Any

from ..checkpoint.memory import Caller
from ..deepspeed_compat.patching import temporarily

_LAST = re.compile(r"last(-v\d+)?\.ckpt")
_ELSEWHERE = ("state_dict", "optimizer_states")
"""Key in a checkpoint of Lightning, and in the engine's part of it."""


def keep_in_memory(trainer: Any, engine: Any) -> None:
    """Have copies in memory hold what Lightning needs. For a trainer whose engine was just built."""
    engine.mics_memory.belongs_to(Caller("", dict, _is_last))
    engine.mics_memory.client_state = functools.partial(_state, trainer)
    package = type(trainer).__module__.partition(".trainer")[0]
    copying = _copying(importlib.import_module(f"{package}.callbacks").Checkpoint)
    trainer.callbacks[:] = [callback for callback in trainer.callbacks if not isinstance(callback, copying)]
    trainer.callbacks.append(copying(engine))


def _is_last(folder: str) -> bool:
    """Return whether a folder is named as the last checkpoint. A script that names another one gets its content."""
    return _LAST.fullmatch(os.path.basename(os.path.normpath(folder))) is not None


def _state(trainer: Any) -> dict[str, Any]:
    with temporarily(trainer.strategy, "_optimizers", []):  # whose states would be gathered for nothing
        found = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    return {key: value for key, value in found.items() if key not in _ELSEWHERE}


@functools.cache
def _copying(base: type) -> type:
    """The callback that takes copies. Of Lightning's class for those that save, which are called last."""

    class Copying(base):
        def __init__(self, engine: Any) -> None:
            self._engine = engine

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            # After the last batch of an epoch there may be a validation, whose outcome belongs to the copy.
            if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
                self._copy_if_due()

        def on_train_epoch_end(self, *_: Any) -> None:
            self._copy_if_due()

        def _copy_if_due(self) -> None:
            if self._engine.mics_memory.is_due:
                self._engine.mics_memory.copy(self._engine)

    return Copying
