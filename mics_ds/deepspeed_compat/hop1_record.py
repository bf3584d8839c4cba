"""The way of hop 1 in checkpoints: a resumed run adds gradients up in the order in which they were added up before.

Measurement (:mod:`mics_ds.planner.measure`) may find another way in another run, where two are about as fast. Each way
has an order of sums of its own, and losses would differ in their last bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from ..log import log_rank0
from .patching import replace_methods

KEY = "mics_hop1"
"""Key of the record among the optimizer states of a checkpoint."""


class Hop1Record:
    """Writes and reads the record for one optimizer.

    Args:
        optimizer: whose methods are replaced, on the instance, by those here that have their names.
    """

    REPLACED = ("_rigid_state_dict", "_rigid_load_state_dict")

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        replace_methods(optimizer, self, self.REPLACED)

    def _record(self) -> dict[str, Any]:
        groups = self._optimizer.mics_groups
        way = asdict(groups.ways)
        del way["staged_gather"]  # a gather adds nothing up
        return {**way, "ranks": groups.layout.world_size, "shards": groups.layout.partition_size}

    def _rigid_state_dict(self, stock: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        return {**stock(), KEY: self._record()}

    def _rigid_load_state_dict(
        self, stock: Callable[..., None], state_dict: dict[str, Any], load_optimizer_states: bool = True
    ) -> None:
        stock(state_dict, load_optimizer_states)
        saved, mine = state_dict.get(KEY), self._record()
        if saved is None or saved == mine or any(saved.get(name) != mine[name] for name in ("ranks", "shards")):
            return
        groups = self._optimizer.mics_groups
        for ways in groups.choices:
            if ways.staged_gather == groups.ways.staged_gather and {**mine, **asdict(ways)}.items() >= saved.items():
                self._optimizer.mics_groups = replace(groups, ways=ways)
                log_rank0(f"MiCS reduces gradients {ways.scatter}, as before the checkpoint was saved")
