"""Do all ranks mean the same thing? Asked through the rendezvous store, before any collective.

A collective cannot ask this question: if one rank runs MiCS and another does not, they would issue
different collectives on the same group and wait for each other forever. The store that brought the
process group up has no such problem.

In each *round* every participant posts a small JSON payload. Some ranks join the payloads of 31 others
into a table, fewer join those tables, and the first participant posts the whole, which everybody
reads. A table keeps each column as runs of equal values and is compressed, so at 10,240 ranks nobody
reads more than a few kB, where one list of all payloads would be 1.2 MB for each of them.

Ranks that do not run MiCS (no key, key switched off by the environment, a configuration error) post
too, so that the others learn of it at once and not by a timeout. Rounds are numbered for each set of
participants, so they must be taken at the same places on every rank of that set: wherever DeepSpeed
builds a partitioner or an engine over it (:mod:`mics_ds.activation`), and where MiCS builds its
groups. What a subset of the ranks does among itself does not disturb the rounds of the others.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, ClassVar

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from ..errors import MicsAgreementError
from ..log import logger
from .layout import Ranks

TIMEOUT_ENV = "MICS_DS_AGREEMENT_TIMEOUT"
_REMIND_AFTER_S = 30.0
FAN_IN = 32
"""Tables that one rank joins into one."""

STATE, CONFIG = "state", "config"
ON, DISABLED, OFF, ERROR = "on", "disabled", "off", "error"

Payload = Mapping[str, Any]


class _Rounds:
    """Counts rounds of the current world, by participants. A new world (after destroy and init) starts again at 0."""

    world: dist.ProcessGroup | None = None
    numbers: ClassVar[dict[Ranks, int]] = {}
    posted: ClassVar[dict[Ranks, list[str]]] = {}

    @classmethod
    def take(cls, ranks: Ranks) -> int:
        if cls.world is not dist.group.WORLD:
            cls.world, cls.numbers, cls.posted = dist.group.WORLD, {}, {}
        cls.numbers[ranks] = cls.numbers.get(ranks, 0) + 1
        return cls.numbers[ranks]

    @classmethod
    def forget(cls, ranks: Ranks, store: dist.Store, posted: list[str]) -> None:
        """Delete what this rank posted in the round before this one, and remember what it posted in this one."""
        for key in cls.posted.pop(ranks, []):
            store.delete_key(key)
        cls.posted[ranks] = posted


def job_timeout_s() -> float:
    """How long the job lets a collective wait, in seconds: ranks may reach DeepSpeed as far apart as that."""
    world = dist.group.WORLD
    assert world is not None, "only asked for in an initialised process group"
    backends: list[Any] = [world._get_backend(device) for device in world._device_types]
    timeouts = [getattr(getattr(backend, "options", None), "_timeout", None) for backend in backends]
    return min(
        (timeout.total_seconds() for timeout in timeouts if timeout is not None),
        default=c10d.default_pg_timeout.total_seconds(),
    )


def world_ranks() -> Ranks:
    return tuple(range(dist.get_world_size())) if dist.is_initialized() else (0,)


class _RoundEndedError(Exception):
    """The round's result is there, while this rank was still waiting for a part of it."""


class _Round:
    """One round among ``ranks``, from the calling rank's point of view."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.place = ranks.index(dist.get_rank())
        self._store = c10d._get_default_store()
        among = "world" if len(ranks) == dist.get_world_size() else digest(ranks)
        self._prefix = f"mics_ds/{among}/{_Rounds.take(ranks)}/"
        self._posted: list[str] = []
        patience = os.environ.get(TIMEOUT_ENV)
        self._deadline = time.monotonic() + (job_timeout_s() if patience is None else float(patience))

    def post(self, table: Sequence[Payload], level: int = 0) -> None:
        """Post what this rank has joined: at level 0, its own payload."""
        key = f"{self._prefix}{level}/{self.place}"
        self._posted.append(key)
        self._store.set(key, pack_table(table))  # type: ignore[arg-type]  # takes bytes, whatever its stub says

    def result(self, payload: Payload) -> list[dict[str, Any]]:
        """Join tables where that is this rank's part, and return the whole."""
        try:
            table = self._join([dict(payload)])
        except _RoundEndedError:
            return self._read("all")
        # Everybody has posted in this round, and so has read the one before.
        _Rounds.forget(self.ranks, self._store, [*self._posted, *([f"{self._prefix}all"] if self.place == 0 else [])])
        return table

    def _join(self, table: list[dict[str, Any]]) -> list[dict[str, Any]]:
        n, span, level = len(self.ranks), 1, 0
        while span < n and self.place % (span * FAN_IN) == 0:
            for child in range(self.place + span, min(self.place + span * FAN_IN, n), span):
                self._require_willing(child)
                table += self._await(f"{level}/{child}", range(child, min(child + span, n)))
            span, level = span * FAN_IN, level + 1
            self.post(table, level)
        if self.place == 0:
            self._publish(table)
            return table
        self._require_willing(self.place - self.place % (span * FAN_IN))
        return self._await("all", range(n))

    def _require_willing(self, place: int) -> None:
        """If this rank will not join tables, for it does not run MiCS, end the round with what each rank has said."""
        if self._await(f"0/{place}", [place])[0][STATE] in (OFF, ERROR):
            self._publish([self._await(f"0/{other}", [other])[0] for other in range(len(self.ranks))])
            raise _RoundEndedError

    def _publish(self, table: Sequence[Payload]) -> None:
        # Several ranks may end a round at once. The first one's words are for all, so that all raise the same error.
        self._store.compare_set(f"{self._prefix}all", "", pack_table(table).hex())

    def _await(self, what: str, awaited: Sequence[int]) -> list[dict[str, Any]]:
        """Wait for a table by polling: a blocking ``store.wait`` would not let Ctrl-C through.

        Raises:
            _RoundEndedError: the result of the round came first.
            MicsAgreementError: the job's patience is over.
        """
        started, pause, reminded = time.monotonic(), 0.001, False
        while not self._store.check([self._prefix + what]):
            if what != "all" and self._store.check([f"{self._prefix}all"]):
                raise _RoundEndedError
            now = time.monotonic()
            if now > self._deadline:
                raise MicsAgreementError(
                    f"Expected every rank to report its MiCS configuration, but nothing came from ranks "
                    f"{_short(self._silent(awaited))} in {now - started:.0f} s. Either they died (look at their "
                    f"output), or they do not have mics_ds installed and imported; {TIMEOUT_ENV} (seconds) sets how "
                    f"long to wait, by default the timeout of the job's process group."
                )
            if now - started > _REMIND_AFTER_S and not reminded:
                reminded = True
                logger.warning(
                    "rank %d still waits for other ranks to report their MiCS configuration", dist.get_rank()
                )
            time.sleep(pause)
            pause = min(pause * 1.5, 0.2)
        return self._read(what)

    def _silent(self, awaited: Sequence[int]) -> list[int]:
        return [self.ranks[place] for place in awaited if not self._store.check([f"{self._prefix}0/{place}"])]

    def _read(self, what: str) -> list[dict[str, Any]]:
        packed = self._store.get(self._prefix + what)
        return unpack_table(bytes.fromhex(packed.decode()) if what == "all" else packed)


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits for anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def pack_table(rows: Sequence[Payload]) -> bytes:
    """Rows as columns of runs, ``[count, value]`` or ``[count]`` where rows lack the column; compressed JSON."""
    columns = {
        name: [
            [sum(1 for _ in run), *json.loads(said)]
            for said, run in groupby(json.dumps([row[name]] if name in row else []) for row in rows)
        ]
        for name in dict.fromkeys(name for row in rows for name in row)
    }
    return zlib.compress(json.dumps(columns, separators=(",", ":")).encode(), 9)


def unpack_table(packed: bytes) -> list[dict[str, Any]]:
    columns = json.loads(zlib.decompress(packed))
    rows: list[dict[str, Any]] = [{} for _ in range(max(sum(run[0] for run in runs) for runs in columns.values()))]
    for name, runs in columns.items():
        place = 0
        for count, *value in runs:
            if value:
                for row in rows[place : place + count]:
                    row[name] = value[0]
            place += count
    return rows


def alone(ranks: Ranks | None = None) -> bool:
    """Whether there is nobody to agree with."""
    return not dist.is_initialized() or len(ranks or world_ranks()) == 1


def post(payload: Payload, ranks: Ranks | None = None) -> None:
    """Take part in a round without waiting for its result. For ranks that will not run MiCS.

    Args:
        ranks: global ranks of the participants, in an order that all of them share; by default the world.
    """
    if not alone(ranks):
        _Round(ranks or world_ranks()).post([payload])


def post_error(error: BaseException, ranks: Ranks | None = None) -> None:
    """Tell the other ranks why this one will not go on. It still has to raise ``error`` itself."""
    post({STATE: ERROR, "message": str(error)}, ranks)


def exchange(payload: Payload, ranks: Ranks | None = None) -> list[dict[str, Any]]:
    """Post this rank's payload and return those of all participants, in their order. Blocks until all have posted.

    Raises:
        MicsAgreementError: a rank did not report in the time that the job lets collectives wait, or within
            ``MICS_DS_AGREEMENT_TIMEOUT`` seconds. Raised on every rank that waits.
    """
    if alone(ranks):
        return [dict(payload)]
    round_ = _Round(ranks or world_ranks())
    round_.post([payload])
    return round_.result(payload)


def require_same(
    payloads: list[dict[str, Any]], fields: Mapping[str, str] | None = None, ranks: Ranks | None = None
) -> None:
    """Check that all ranks are in the same state, with the same configuration and the same named fields.

    Args:
        payloads: one per rank, as returned by :func:`exchange`.
        fields: further field names, with the words that describe them in an error.
        ranks: whose payloads they are, as given to :func:`exchange`.

    Raises:
        MicsAgreementError: some rank failed, runs without MiCS, or differs in a field. The message is
            the same on every rank.
    """
    by_rank = dict(zip(ranks or range(len(payloads)), payloads))
    failed = {rank: item["message"] for rank, item in by_rank.items() if item[STATE] == ERROR}
    if failed:
        rank, message = next(iter(failed.items()))
        others = f" (and on ranks {list(failed)[1:]})" if len(failed) > 1 else ""
        raise MicsAgreementError(f"The MiCS configuration was refused on rank {rank}{others}: {message}")
    for field, words in {STATE: "whether MiCS is on", CONFIG: "the MiCS configuration", **(fields or {})}.items():
        values: dict[str, list[int]] = {}
        for rank, item in by_rank.items():
            values.setdefault(json.dumps(item.get(field)), []).append(rank)
        if len(values) > 1:
            said = "; ".join(f"{value} on ranks {_short(ranks)}" for value, ranks in values.items())
            raise MicsAgreementError(
                f"All ranks must agree on {words}, but it is {said}. Give every node the same ds_config JSON and the "
                f"same MICS_DS_* environment variables (the deepspeed launcher forwards those to other nodes only "
                f"from a .deepspeed_env file)."
            )


def _short(ranks: list[int]) -> str:
    return str(ranks) if len(ranks) <= 8 else f"[{', '.join(map(str, ranks[:8]))}, ... {len(ranks)} in all]"
