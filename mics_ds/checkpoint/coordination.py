"""Have all ranks save and load together, and fail together.

Each rank notes what goes wrong on it. Notes are exchanged at a few places, and an error of one rank is raised on all.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from .. import __version__
from ..comm.groups import MicsGroups
from ..deepspeed_compat import checkpoint as seam
from ..deepspeed_compat.engine import communication_device
from ..errors import MicsCheckpointError, noting
from ..log import log_rank0
from ..shards.cut import FROZEN_SHAPES, FROZEN_SHARDS, MODULE, PARAM_SHAPES, TIED_NAMES
from . import folder as folders
from . import manifest
from .manifest import FileRecord, Manifest
from .staging import MARK, bytes_of, record

RESHAPE_COMMAND = "mics-ds reshape"
UNCHANGED = "No state was changed."
SLOW_S = 3.0
"""Seconds after which the log says how long something takes."""


def exchange(note: dict[str, Any], doing: str) -> list[dict[str, Any]]:
    """Return the notes of all ranks of the world, things that JSON can hold.

    By a collective and not through the store, because that tells at once when a rank has died. As a rule all notes are
    the same; then 32 bytes tell, and no rank receives those of all others.

    Raises:
        MicsCheckpointError: another rank has died.
    """
    return exchange_and_compare(note, None, doing)[0]


def exchange_and_compare(note: dict[str, Any], value: Any, doing: str) -> tuple[list[dict[str, Any]], bool]:
    """Exchange notes as :func:`exchange` does, and tell whether all ranks have the same value too."""
    numbers, notes = [number_of(note), number_of(value)], [note] * dist.get_world_size()
    try:
        most = elementwise_max([*numbers, *(-number for number in numbers)])
        same_note, same_value = (high == -negated_low for high, negated_low in zip(most, most[2:]))
        if not same_note:
            dist.all_gather_object(notes, note)
    except RuntimeError as error:
        raise MicsCheckpointError(
            f"Another rank has most likely died while {doing}; its own output says why. Checkpoints that were complete "
            f"before are untouched."
        ) from error
    return notes, same_value


def number_of(value: Any) -> int:
    """Return a digest of something that JSON can hold: 56 bits, and room for a sign."""
    body = json.dumps(value, sort_keys=True).encode()
    return int.from_bytes(hashlib.sha256(body).digest()[:7], "little")


def elementwise_max(values: list[int]) -> list[int]:
    """Return the elementwise maximum over all ranks. Collective over the world."""
    most = torch.tensor(values, dtype=torch.int64, device=communication_device())
    if dist.get_world_size() > 1:
        dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.tolist()


def shared_store() -> dist.Store:
    """Return the store of the job's process group, for what few ranks have to read."""
    return dist.PrefixStore("mics_ds/checkpoint", c10d._get_default_store())


class Run:
    """This run of the job: random words that all ranks know, and numbers that are the same on all of them."""

    world: Any = None
    name = ""
    """Tells its saves from those of any other run."""
    token = ""
    """Secret by which the processes of the run recognise each other. It is in no file."""
    _last = 0

    @classmethod
    def begin(cls) -> None:
        """Agree on the words. Collective over the world, once for each process group of it."""
        if cls.world is not dist.group.WORLD:
            words: list[Any] = [secrets.token_hex(6), secrets.token_hex(16)]
            if dist.get_world_size() > 1:
                dist.broadcast_object_list(words, src=0)
            cls.world, (cls.name, cls.token) = dist.group.WORLD, words

    @classmethod
    def next_number(cls) -> int:
        cls._last += 1
        return cls._last


def raise_together(notes: list[dict[str, Any]], failed: str, remedy: str, field: str = "errors") -> None:
    """Raise the same error on all ranks if any of them noted errors."""
    ranks_with: dict[str, list[int]] = {}
    for rank, note in enumerate(notes):
        for message in note[field]:
            ranks_with.setdefault(message, []).append(rank)
    if ranks_with:
        said = "; ".join(
            f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks[:8]))}"
            f"{' and more' if len(ranks) > 8 else ''}: {message}"
            for message, ranks in list(ranks_with.items())[:6]
        )
        more = f"; and {len(ranks_with) - 6} more" if len(ranks_with) > 6 else ""
        raise MicsCheckpointError(f"{failed} {said}{more}. {remedy}")


@contextmanager
def raised_on_all_ranks(doing: str, failed: str, remedy: str | Callable[[], str] = "") -> Iterator[list[str]]:
    """Raise on all ranks what goes wrong in the block on any of them. Collective over the world, at its end.

    Args:
        remedy: a function is called on all ranks, and may be collective.

    Yields:
        The errors of this rank, for what the block does not raise.
    """
    noted: list[str] = []
    with noting(noted):
        yield noted
    notes = exchange({"errors": noted}, doing)
    if any(note["errors"] for note in notes):
        raise_together(notes, failed, remedy if isinstance(remedy, str) else remedy())


def require_same(notes: list[dict[str, Any]], field: str, what: str) -> None:
    """Raise MicsCheckpointError, on every rank, unless all ranks have noted the same."""
    said = {note[field]: rank for rank, note in reversed(list(enumerate(notes)))}
    if len(said) > 1:
        values = sorted(said.items(), key=lambda item: item[1])
        raise MicsCheckpointError(
            f"All ranks must {what}, but {'; '.join(f'rank {rank} said {value!r}' for value, rank in values[:8])}. "
            f"Give every rank the same one (a folder local to each node needs use_node_local_storage)."
        )


def tell_speed(target: Path, nbytes: int, started: float) -> None:
    """Say how long a save or a load took, if it was long."""
    seconds = time.monotonic() - started
    if seconds > SLOW_S:
        log_rank0(f"{target}: {nbytes / 1e9:.2f} GB in {seconds:.1f} s, {nbytes / 1e6 / seconds:.0f} MB/s")


# --------------------------------------------------------------------------------------------------
# Roles


class Roles:
    """Roles of ranks in saving and loading, from this rank's point of view.

    The *owner* of a shard writes its files. The *publisher* of a folder turns it into a checkpoint. All are global
    ranks.
    """

    def __init__(self, groups: MicsGroups, node_local: bool) -> None:
        self.rank, self.groups, self.node_local = dist.get_rank(), groups, node_local
        self.shard = groups.partition.rank
        first: dict[int, int] = {}
        self._publisher_of = {
            rank: first.setdefault(node if node_local else 0, rank) for rank, node in groups.node_of.items()
        }
        """The publisher of the folder that each rank sees."""
        self.publishers = sorted(first.values())
        """One, or with node-local folders one on each node."""
        self.publisher = self._publisher_of[self.rank]
        self.publishes = self.rank == self.publisher
        self.peers = [rank for rank, publisher in self._publisher_of.items() if publisher == self.publisher]
        """Ranks that see the same folder."""
        self.owner = self._owner_of[self.rank]
        """The rank that writes the files of this rank's shard, where this rank can see them."""
        self.owns = self.rank == self.owner
        replicas = groups.layout.replication_groups[self.shard]
        self.sharers = [rank for rank in replicas if self._owner_of[rank] == self.owner]
        """Ranks that hold this rank's shard and see the folder that :attr:`owner` writes it to."""
        self.parent = self._parent_of(self.rank)
        """The rank whose writer this rank's writer reports to."""

    @cached_property
    def _owner_of(self) -> dict[int, int]:
        """The owner of each rank's shard, also in other data-parallel groups."""
        found: dict[int, int] = {}
        for offset in self.offsets:
            for shard, replicas in enumerate(self.groups.layout.replication_groups):
                ranks, first = [rank + offset for rank in replicas], dict[int, int]()
                # Shard i by replica i mod r, so that replicas share the writing.
                for rank in filter(self._publisher_of.__contains__, ranks):
                    here = first.setdefault(self._publisher_of[rank], rank)
                    found[rank] = here if self.node_local else ranks[shard % len(ranks)]
        return found

    @cached_property
    def offsets(self) -> list[int]:
        """Distances of all data-parallel groups from this rank's group. All groups have the same spacing."""
        ranks, left, found = self.groups.layout.ranks, set(range(dist.get_world_size())), list[int]()
        while left:
            found.append(min(left) - ranks[0])
            left -= {rank + found[-1] for rank in ranks}
        return found

    def _parent_of(self, rank: int) -> int | None:
        """Sharers report to the owner, owners to the publisher, publishers to the first of them."""
        way_up = (self._owner_of[rank], self._publisher_of[rank], self.publishers[0])
        return next((up for up in way_up if up != rank), None) if rank != way_up[-1] else None

    @property
    def children(self) -> list[int]:
        """Ranks whose writers report to this rank's writer."""
        return sorted(rank for rank in self._owner_of if self._parent_of(rank) == self.rank)

    def describe(self, tag: str, steps: int, save: str, files: Mapping[str, FileRecord]) -> Manifest:
        """Return the manifest of a checkpoint of this job, as this rank's folder has it."""
        layout = self.groups.layout
        return Manifest(
            tag=tag,
            shards=layout.partition_size,
            replicas=layout.replication_size,
            ranks=layout.world_size,
            ranks_per_node=tuple(Counter(self.groups.node_of[rank] for rank in layout.ranks).values()),
            model_parallel=dist.get_world_size() // layout.world_size,
            global_steps=steps,
            node_local=self.node_local,
            versions=versions(),
            files=dict(files),
            save=save,
        )


def versions() -> dict[str, str]:
    """Return the versions of the packages that a checkpoint depends on."""
    return {"mics_ds": __version__, "deepspeed": deepspeed.__version__, "torch": torch.__version__}


def roles_of(engine: Any) -> Roles:
    return Roles(engine.optimizer.mics_groups, engine.use_node_local_storage())


# --------------------------------------------------------------------------------------------------
# Which checkpoint


def agree_on_tag(roles: Roles, load_dir: Any, tag: Any) -> str | None:
    """Return the tag to load, the same on all ranks; ``None`` if there is no latest one.

    ``latest`` is replaced after everything else, node by node on local folders. If that was interrupted, the
    newer checkpoint is complete on all nodes, and is taken.
    """
    note: dict[str, Any] = {"asked": None, "latest": None, "steps": -1, "errors": []}
    with noting(note["errors"]):
        folder = Path(load_dir)
        if tag is None:
            wanted = note["latest"] = folders.read_latest(folder)
        else:
            wanted = note["asked"] = str(tag)
            folders.check_tag(wanted)
        if roles.publishes:
            for remains in folders.interrupted_saves(folder):
                log_rank0(f"{remains} is left from an interrupted save; it is not a checkpoint and is ignored")
            if wanted and folders.recover(folder / wanted):
                log_rank0(f"{folder / wanted} was being replaced when that was interrupted; the older one is back")
        if note["latest"] and roles.node_local and (folder / note["latest"] / manifest.NAME).is_file():
            note["steps"] = manifest.read(folder / note["latest"]).global_steps
    notes = exchange(note, f"looking for a checkpoint in {load_dir}")
    raise_together(notes, f"No checkpoint can be loaded from {load_dir}.", UNCHANGED)
    require_same(notes, "asked", "load the same tag")
    if note["asked"] is not None:
        return note["asked"]
    latest = Path(load_dir) / folders.LATEST
    if not roles.node_local:
        require_same(notes, "latest", f"find the same tag in {latest}")
    newest = max(notes, key=lambda item: (item["latest"] is not None, item["steps"]))["latest"]
    if any(item["latest"] != newest for item in notes):
        log_rank0(f"nodes disagree on {latest}, as after an interrupted save; taking {newest}")
    return newest


def manifest_or_shards(folder: Path, shard: int) -> tuple[Manifest | None, int]:
    """Return the manifest of a checkpoint, if it has one, and its number of shards, 0 if it has none.

    Args:
        shard: whose files tell whether a manifest is gone.

    Raises:
        MicsCheckpointError: MiCS wrote it, its manifest is gone, and ``MICS_DS_ALLOW_UNCHECKED=1`` is not set.
    """
    with suppress(FileNotFoundError):
        found = manifest.read(folder)
        return found, found.shards
    shards = manifest.count_shards(folder)
    if os.environ.get(manifest.ALLOW_UNCHECKED_ENV) != "1":
        for path in sorted(folder.glob(f"*zero_pp_rank_{shard % max(shards, 1)}_mp_rank_*_optim_states.pt")):
            version = seam.load_states(path, mmap=True).get(MARK)
            if version is not None:
                raise MicsCheckpointError(
                    f"{folder} was written by mics_ds {version}, and its {manifest.NAME} is gone: nothing tells "
                    f"whether its files are those that were written. Restore it, or load another checkpoint, or set "
                    f"{manifest.ALLOW_UNCHECKED_ENV}=1 on all ranks to load this one unchecked"
                )
    return None, shards


def drop_stale_manifest(_engine: Any, save_dir: str, tag: str) -> None:
    """Remove the manifest of a checkpoint that an engine without MiCS is about to write over."""
    if dist.get_rank() == 0:
        folders.forget_note(Path(save_dir))
        with suppress(OSError, ValueError):  # the engine itself will object to such a name
            (Path(save_dir) / tag / manifest.NAME).unlink(missing_ok=True)


def refuse_other_shard_count(engine: Any, load_dir: str, tag: str | None) -> None:
    """Raise MicsCheckpointError if an engine without MiCS cannot load what MiCS saved."""
    folder = Path(load_dir)
    tag = folders.read_latest(folder) if tag is None else tag
    if tag is None or not os.path.isfile(folder / tag / manifest.NAME):  # false for any name that none can have
        return
    saved, ranks = manifest.read(folder / tag), engine.seq_dp_world_size
    if saved.shards != ranks:
        raise MicsCheckpointError(
            f"Checkpoint {folder / tag} was saved by MiCS in {saved.shards} shards, and stock ZeRO-3 on {ranks} ranks "
            f"needs {ranks}. Cut it with {RESHAPE_COMMAND} {folder / tag} NEW_FOLDER --shards {ranks}, or load it "
            f'under MiCS with "mics_shard_size": {ranks} and "mics_reshape_checkpoint": true.'
        )


# --------------------------------------------------------------------------------------------------
# What of model states is a rank's own. Stock ZeRO-3 writes one file of model states for each rank, MiCS one for each
# shard. A rank whose own state differs from that of the file's writer keeps what differs in a small file.

_SECTIONS = {MODULE: "module_instead_of", "client_state": "instead_of"}
"""Sections of the file, buffers and all else, each with the list of what does not hold for the rank. Files of older
versions have the second one only."""
_OF_MODEL = (PARAM_SHAPES, FROZEN_SHAPES, FROZEN_SHARDS, TIED_NAMES)
"""Shards, and what describes parameters. Of tied names DeepSpeed tells on global rank 0 only."""

Fingerprint = dict[str, dict[str, str]]
"""Digest of each value, by section and name."""


@dataclass(frozen=True)
class RankState:
    """State of one rank beside its shard: buffers of modules, schedulers, samplers, the client state."""

    values: dict[str, dict[Any, Any]]
    """Values by section and name."""

    @classmethod
    def within(cls, states: Mapping[str, Any], parameters: frozenset[str]) -> RankState:
        """Return the part of model states that is not sharded.

        Args:
            states: with tensors in host memory.
            parameters: names of parameters, whose shards are elsewhere.
        """
        module = {name: _alone(value) for name, value in (states[MODULE] or {}).items() if name not in parameters}
        rest = {key: value for key, value in states.items() if key != MODULE and key not in _OF_MODEL}
        return cls({MODULE: module, "client_state": rest})

    @cached_property
    def digest(self) -> str:
        """Digest of all values together. Pickling them one by one takes four times as long."""
        return _digest(self.values)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Digest of each value, for ranks whose digests of all differ."""
        return {
            section: {str(key): _digest(value) for key, value in held.items()} for section, held in self.values.items()
        }

    def beside(self, others: Fingerprint) -> dict[str, Any] | None:
        """Return the content of the file that this rank needs beside model states with another fingerprint, if any."""
        if self.fingerprint == others:
            return None
        content: dict[str, Any] = {}
        for section, instead_of in _SECTIONS.items():
            mine, theirs = self.fingerprint[section], others.get(section, {})
            content[section] = {
                key: value for key, value in self.values[section].items() if theirs.get(str(key)) != mine[str(key)]
            }
            content[instead_of] = sorted(name for name, digest in theirs.items() if mine.get(name) != digest)
        return content


def restore_own(states: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Replace in model states what a rank has of its own, by the content of its file."""
    for section, instead_of in _SECTIONS.items():
        held = states[MODULE] if section == MODULE else states
        for key in [key for key in held or () if str(key) in own.get(instead_of, ())]:
            del held[key]
        if own.get(section):
            held.update(own[section])


def _alone(value: Any) -> Any:
    """Return a tensor without what else is in its storage."""
    is_part = isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() != value.nbytes
    return value.clone() if is_part else value


def _digest(value: Any) -> str:
    recorded = record(value)
    found = hashlib.sha256(recorded.pickled)
    for storage in recorded.storages:
        found.update(bytes_of(storage).cpu().numpy().data)
    return found.hexdigest()[:32]
