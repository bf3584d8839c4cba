"""The way of hop 1 in checkpoints: a resumed run adds gradients up in the order in which they were added up before.

Measurement (:mod:`mics_ds.planner.measure`) may find another way in another run, where two are about as fast. Each way
has an order of sums of its own, and losses would differ in their last bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from ..comm.groups import MicsGroups
from ..log import log_rank0

KEY = "mics_hop1"
"""Key of the record among the optimizer states of a checkpoint."""


def record(groups: MicsGroups) -> dict[str, Any]:
    """Return the way of hop 1, and the ranks that it is of."""
    way = asdict(groups.ways)
    del way["staged_gather"]  # a gather adds nothing up
    return {**way, "ranks": groups.layout.world_size, "shards": groups.layout.partition_size}


def as_recorded(groups: MicsGroups, states: Mapping[str, Any]) -> MicsGroups:
    """Return groups whose hop 1 goes the way of a checkpoint, if it was saved on as many ranks and shards."""
    saved, mine = states.get(KEY), record(groups)
    if saved is None or saved == mine or any(saved.get(name) != mine[name] for name in ("ranks", "shards")):
        return groups
    for ways in groups.choices:
        if ways.staged_gather == groups.ways.staged_gather and {**mine, **asdict(ways)}.items() >= saved.items():
            log_rank0(f"MiCS reduces gradients {ways.scatter}, as before the checkpoint was saved")
            return replace(groups, ways=ways)
    return groups
