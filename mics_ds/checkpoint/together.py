"""All ranks save and load together, and fail together.

A :class:`Site` says who does what. Notes are exchanged at a few places, and whatever one rank noted is raised on all.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from .. import __version__
from ..comm.groups import MicsGroups
from ..deepspeed_compat.engine import communication_device
from ..errors import MicsCheckpointError, words
from ..log import logger
from .manifest import FileRecord, Manifest

_EXPECTED = (MicsCheckpointError, OSError, pickle.PickleError)


def exchange(note: dict[str, Any], doing: str) -> list[dict[str, Any]]:
    """The notes of all ranks of the world.

    By a collective and not through the store, because that tells at once when a rank has died. As a rule all notes are
    the same; then 16 bytes tell, and nobody receives those of all others.

    Raises:
        MicsCheckpointError: another rank has died.
    """
    return exchange_and_compare(note, None, doing)[0]


def exchange_and_compare(note: dict[str, Any], value: Any, doing: str) -> tuple[list[dict[str, Any]], bool]:
    """The notes of all ranks of the world, and whether all have the same value, by one all-reduce as a rule.

    Args:
        note, value: something that JSON can hold.

    Raises:
        MicsCheckpointError: another rank has died.
    """
    world = dist.get_world_size()
    if world == 1:
        return [note], True
    notes: list[Any] = [None] * world
    try:
        numbers = [number_of(note), number_of(value)]
        most = greatest([*numbers, *(-number for number in numbers)])
        same_note, same_value = (high == -negated_low for high, negated_low in zip(most, most[2:]))
        if same_note:
            return [note] * world, same_value
        dist.all_gather_object(notes, note)
    except RuntimeError as error:
        raise MicsCheckpointError(
            f"Another rank has most likely died while {doing}; its own output says why. Checkpoints that were complete "
            f"before are untouched."
        ) from error
    return notes, same_value


def number_of(value: Any) -> int:
    """A digest of something that JSON can hold: 56 bits, and room for a sign."""
    body = json.dumps(value, sort_keys=True).encode()
    return int.from_bytes(hashlib.sha256(body).digest()[:7], "little")


def greatest(values: list[int]) -> list[int]:
    """The greatest that any rank says, place by place. Collective over the world."""
    said = torch.tensor(values, dtype=torch.int64, device=communication_device())
    if dist.get_world_size() > 1:
        dist.all_reduce(said, dist.ReduceOp.MAX)
    return said.tolist()


def shared_store() -> dist.Store:
    """The store of the job's process group, for what few ranks have to read."""
    return dist.PrefixStore("mics_ds/checkpoint", c10d._get_default_store())


def raise_together(notes: list[dict[str, Any]], failed: str, remedy: str) -> None:
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


def attempt(work: Callable[[], Any], errors: list[str], say: Callable[[Exception], str] = words) -> None:
    """Do what may fail on this rank only: note the error, of whatever kind, for :func:`raise_together` later.

    Raised here, it would be known to this rank alone, and the others would wait for it.
    """
    try:
        work()
    except Exception as error:
        if not isinstance(error, _EXPECTED):  # the other ranks have no use for where it happened
            logger.error("on this rank:", exc_info=True)
        errors.append(say(error))


class Site:
    """Who does what in saving and loading, from this rank's point of view."""

    def __init__(self, groups: MicsGroups, node_local: bool) -> None:
        self.rank = dist.get_rank()
        self.groups = groups
        self.node_local = node_local
        self.shard = groups.partition.rank

    @cached_property
    def peers(self) -> list[int]:
        """Global ranks that see the same folder."""
        nodes = self.groups.node_of
        return [rank for rank, node in nodes.items() if not self.node_local or node == nodes[self.rank]]

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

    @cached_property
    def sharers(self) -> list[int]:
        """Global ranks that hold this rank's shard and see the folder that :attr:`writer` writes it to."""
        same_shard = self.groups.layout.replication_groups[self.shard]
        return [rank for rank in same_shard if rank in self.peers]

    @cached_property
    def publisher(self) -> int:
        """Global rank that publishes where this rank's files are."""
        return self.peers[0]

    @cached_property
    def publishers(self) -> list[int]:
        """Global ranks that publish: one, or with node-local folders one on each node."""
        if not self.node_local:
            return [self.publisher]
        first = {node: rank for rank, node in reversed(list(self.groups.node_of.items()))}
        return sorted(first.values())

    @cached_property
    def writers(self) -> list[int]:
        """Global ranks that write the files of this rank's shard: one, or with node-local folders one on each node."""
        if not self.node_local:
            return [self.writer]
        nodes, same_shard = self.groups.node_of, self.groups.layout.replication_groups[self.shard]
        first = {nodes[rank]: rank for rank in reversed(same_shard)}
        return sorted(first.values())

    def describe(self, tag: str, steps: int, files: Mapping[str, FileRecord]) -> Manifest:
        """A checkpoint of this job, as this rank's folder has it."""
        layout = self.groups.layout
        return Manifest(
            tag=tag,
            shards=layout.partition_size,
            replicas=layout.replication_size,
            ranks=layout.world_size,
            ranks_per_node=tuple(Counter(layout.nodes).values()),
            model_parallel=dist.get_world_size() // layout.world_size,
            global_steps=steps,
            node_local=self.node_local,
            versions={"mics_ds": __version__, "deepspeed": deepspeed.__version__, "torch": torch.__version__},
            files=dict(files),
        )


def site_of(engine: Any) -> Site:
    return Site(engine.optimizer.mics_groups, engine.use_node_local_storage())


def on_publishers(site: Site, work: Callable[[], Any], doing: str) -> list[dict[str, Any]]:
    """Do something on the ranks that publish, and tell all ranks how it went."""
    errors: list[str] = []
    if site.publishes:
        attempt(work, errors)
    return exchange({"errors": errors}, doing)
