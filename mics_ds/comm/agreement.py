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
from base64 import b85decode, b85encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from ..errors import MicsAgreementError, MicsError
from ..log import logger
from ..text import abbreviate
from .layout import Ranks

TIMEOUT_ENV = "MICS_DS_AGREEMENT_TIMEOUT"
_REMIND_AFTER_S = 30.0
FAN_IN = 32
"""Tables that one rank joins into one."""

STATE, CONFIG = "state", "config"
ON, DISABLED, OFF, ERROR = "on", "disabled", "off", "error"
_UNHEARD = "unheard"
"""State of a rank that had not been heard when another ended the round with an error."""
_KEPT_ROUNDS = 16

Payload = Mapping[str, Any]


class _Rounds:
    """Counts rounds of the current world, by participants. A new world (after destroy and init) starts again at 0."""

    world: dist.ProcessGroup | None = None
    numbers: ClassVar[dict[Ranks, int]] = {}
    posted: ClassVar[dict[Ranks, dict[int, list[str]]]] = {}
    """Keys of this rank that are still in the store, by round."""

    @classmethod
    def take(cls, ranks: Ranks) -> int:
        if cls.world is not dist.group.WORLD:
            cls.world, cls.numbers, cls.posted = dist.group.WORLD, {}, {}
        cls.numbers[ranks] = cls.numbers.get(ranks, 0) + 1
        return cls.numbers[ranks]

    @classmethod
    def remember(cls, ranks: Ranks, number: int, key: str) -> None:
        cls.posted.setdefault(ranks, {}).setdefault(number, []).append(key)

    @classmethod
    def forget(cls, ranks: Ranks, store: dist.Store, before: int) -> None:
        """Delete what this rank has posted in rounds before this one."""
        rounds = cls.posted.get(ranks, {})
        for number in [number for number in rounds if number < before]:
            for key in rounds.pop(number):
                store.delete_key(key)


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> timedelta | None:
    """How long a collective of ``group`` may take on ``device``, or ``None`` where its backend does not say."""
    backend: Any = group._get_backend(device)
    while hasattr(backend, "wrapped_pg"):  # TORCH_DISTRIBUTED_DEBUG=DETAIL
        backend = backend.wrapped_pg
    try:
        return getattr(backend.options, "_timeout", None)
    except (AttributeError, RuntimeError):  # a backend that somebody added to torch need not have options
        return None


def job_timeout_s() -> float:
    """How long the job lets a collective wait, in seconds: ranks may reach DeepSpeed as far apart as that."""
    world = dist.group.WORLD
    assert world is not None, "only asked for in an initialised process group"
    timeouts = [timeout_of(world, device) for device in world._device_types]
    default = c10d.default_pg_timeout.total_seconds()
    return min((timeout.total_seconds() for timeout in timeouts if timeout is not None), default=default)


def patience_in_s() -> float:
    """Return how long ranks wait for each other's reports: as long as the job's collectives, or as the user says."""
    said = os.environ.get(TIMEOUT_ENV)
    return job_timeout_s() if said is None else float(said)


def world_ranks() -> Ranks:
    return tuple(range(dist.get_world_size())) if dist.is_initialized() else (0,)


class _RoundEndedError(Exception):
    """The round's result is there, while this rank was still waiting for a part of it."""


class _Round:
    """One round among ``ranks``, from the calling rank's point of view.

    Keys in the store, under the round's prefix: ``0/i`` is what the i-th participant says, ``l/i`` the table that it
    has joined of the FAN_IN**l participants from the i-th on, and ``all`` the result.
    """

    def __init__(self, ranks: Ranks, least: Sequence[str] = (), patience_s: float | None = None) -> None:
        self.ranks = ranks
        self.place = ranks.index(dist.get_rank())
        self._least = least
        self._store = c10d._get_default_store()
        self._number = _Rounds.take(ranks)
        among = "world" if len(ranks) == dist.get_world_size() else digest(ranks)
        self._prefix = f"mics_ds/{among}/{self._number}/"
        self._deadline = time.monotonic() + (patience_in_s() if patience_s is None else patience_s)

    def post(self, table: Sequence[Payload], level: int = 0) -> None:
        """Post what this rank has joined: at level 0, its own payload."""
        key = f"{self._prefix}{level}/{self.place}"
        _Rounds.remember(self.ranks, self._number, key)
        self._store.set(key, pack_table(table))  # type: ignore[arg-type]  # takes bytes, whatever its stub says

    def leave(self, payload: Payload) -> None:
        """Post without waiting for anybody. An error ends the round, also for those who have not come yet."""
        if payload[STATE] == ERROR:
            rows: list[Payload] = [{STATE: _UNHEARD}] * len(self.ranks)
            rows[self.place] = payload
            self._publish(rows)
        self.post([payload])
        # Who does not wait never learns how far the others are, but nobody is that many rounds behind.
        _Rounds.forget(self.ranks, self._store, self._number - _KEPT_ROUNDS)

    def result(self, payload: Payload) -> list[dict[str, Any]]:
        """Join tables where that is this rank's part, and return the whole."""
        try:
            table = self._join([dict(payload)])
        except _RoundEndedError:
            return self._read("all")
        if not any(row[STATE] == _UNHEARD for row in table):
            # Everybody has posted in this round, and so has read the ones before.
            _Rounds.forget(self.ranks, self._store, self._number)
        return table

    def _join(self, table: list[dict[str, Any]]) -> list[dict[str, Any]]:
        n, span, level = len(self.ranks), 1, 0
        while span < n and self.place % (span * FAN_IN) == 0:
            for child in range(self.place + span, min(self.place + span * FAN_IN, n), span):
                own = self._require_willing(child)
                table += own if level == 0 else self._await(f"{level}/{child}", range(child, min(child + span, n)))
            self._take_least(table)
            span, level = span * FAN_IN, level + 1
            self.post(table, level)
        if self.place == 0:
            return self._publish(table)
        self._require_willing(self.place - self.place % (span * FAN_IN))
        return self._await("all", range(n))

    def _take_least(self, table: list[dict[str, Any]]) -> None:
        for name in self._least:
            least = min((row[name] for row in table if name in row), default=None)
            for row in table:
                if name in row:
                    row[name] = least

    def _require_willing(self, place: int) -> list[dict[str, Any]]:
        """What this rank has said. If it will not join tables, for it does not run MiCS, end the round."""
        said = self._await(f"0/{place}", [place])
        state = said[0][STATE]
        if state == OFF:
            self._publish([self._await(f"0/{other}", [other])[0] for other in range(len(self.ranks))])
        if state in (OFF, ERROR):
            raise _RoundEndedError
        return said

    def _publish(self, table: Sequence[Payload]) -> list[dict[str, Any]]:
        """Post the result and return it. Of several, the first is for all, so that all raise the same error."""
        key = f"{self._prefix}all"
        _Rounds.remember(self.ranks, self._number, key)
        # The store compares and sets text.
        return unpack_table(b85decode(self._store.compare_set(key, "", b85encode(pack_table(table)).decode())))

    def _await(self, what: str, awaited: Sequence[int]) -> list[dict[str, Any]]:
        """Wait for a table by polling: a blocking ``store.wait`` would not let Ctrl-C through.

        Raises:
            _RoundEndedError: the result of the round came first.
            MicsAgreementError: the job's patience is over.
        """
        started, pause, reminded = time.monotonic(), 0.001, False
        longest_pause = 0.2 + 5e-5 * len(self.ranks)  # one process answers all of them
        while not self._store.check([self._prefix + what]):
            if what != "all" and self._store.check([f"{self._prefix}all"]):
                raise _RoundEndedError
            now = time.monotonic()
            if now > self._deadline:
                raise MicsAgreementError(
                    f"Expected every rank to report its MiCS configuration, but {self._who_is_missing(awaited)} in "
                    f"{now - started:.0f} s. Either they died (look at their output), or they do not build the same "
                    f"model with mics_ds installed and imported; {TIMEOUT_ENV} (seconds) sets how long to wait, by "
                    f"default the timeout of the job's process group."
                )
            if now - started > _REMIND_AFTER_S and not reminded:
                reminded = True
                logger.warning(
                    "rank %d still waits for other ranks to report their MiCS configuration", dist.get_rank()
                )
            time.sleep(pause)
            pause = min(pause * 1.5, longest_pause)
        return self._read(what)

    def _who_is_missing(self, awaited: Sequence[int]) -> str:
        silent = self._lacking(0, awaited)
        if silent:
            return f"nothing came from ranks {abbreviate(silent)}"
        # All have reported, so one of those that join reports has stopped since. A table lacks where one below does.
        span, level = FAN_IN, 1
        while span < len(self.ranks) * FAN_IN:
            stopped = self._lacking(level, range(0, len(self.ranks), span))
            if stopped:
                break
            span, level = span * FAN_IN, level + 1
        return f"ranks {abbreviate(stopped)}, which pass the reports of others on, sent nothing more"

    def _lacking(self, level: int, places: Sequence[int]) -> list[int]:
        """Global ranks of ``places`` that have not posted their table of this level. Few, or it takes long."""
        if not places or self._store.check([f"{self._prefix}{level}/{place}" for place in places]):
            return []
        if len(places) == 1:
            return [self.ranks[places[0]]]
        middle = len(places) // 2
        return self._lacking(level, places[:middle]) + self._lacking(level, places[middle:])

    def _read(self, what: str) -> list[dict[str, Any]]:
        packed = self._store.get(self._prefix + what)
        return unpack_table(b85decode(packed) if what == "all" else packed)


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits for anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


_USUAL = (
    b'"memory":[[1,"host":[[1,"model":[["source":[[1,"hostname"]],"node":[[1,"local_rank":[[1,null]],"first":[[1,0]],'
    b'"stride":[[1,0]],"size":[[1,{"state":[[1,"off"]],"config":[[1,"message":[[1,{"state":[[1,"on"]],"config":[[1,'
    b'{"mics_shard_size":8,"mics_hierarchical_params_gather":"auto","mics_hierarchical_grad_scatter":"auto",'
    b'"mics_reduce_scatter":"auto","mics_reshape_checkpoint":false}]],"size":[[1'
)
"""What tables are made of. Without it, compression gains nothing on the many that have one row."""


def pack_table(rows: Sequence[Payload]) -> bytes:
    """Rows as columns of runs, ``[count, value]`` or ``[count]`` where rows lack the column; compressed JSON."""
    columns = {
        name: [
            [sum(1 for _ in run), *json.loads(said)]
            for said, run in groupby(json.dumps([row[name]] if name in row else []) for row in rows)
        ]
        for name in dict.fromkeys(name for row in rows for name in row)
    }
    packer = zlib.compressobj(9, zdict=_USUAL)
    return packer.compress(json.dumps(columns, separators=(",", ":")).encode()) + packer.flush()


def unpack_table(packed: bytes) -> list[dict[str, Any]]:
    columns = json.loads(zlib.decompressobj(zdict=_USUAL).decompress(packed))
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
    if alone(ranks):
        return
    try:
        _Round(ranks or world_ranks()).leave(payload)
    except RuntimeError as error:
        # MPI and the "fake" backend have no store. Whoever runs MiCS says so; stock ZeRO-3 has no use for one.
        logger.debug("rank %d could not report that it does not run MiCS: %s", dist.get_rank(), error)


def post_error(error: BaseException, ranks: Ranks | None = None) -> None:
    """Tell the other ranks why this one will not go on. It still has to raise ``error`` itself.

    An error is told once, however many places it passes on its way; a :class:`MicsAgreementError` all ranks have.
    """
    if not (isinstance(error, MicsAgreementError) or getattr(error, "mics_told", False)):
        error.mics_told = True  # type: ignore[attr-defined]
        words = str(error) if isinstance(error, MicsError) else f"{type(error).__name__}: {error}"
        post({STATE: ERROR, "message": words}, ranks)


@contextmanager
def failing_together(ranks: Ranks | None = None) -> Iterator[None]:
    """Whatever is raised in this context, tell the participants of the next round, who would wait for this rank."""
    try:
        yield
    except Exception as error:
        post_error(error, ranks)
        raise


def exchange(payload: Payload, ranks: Ranks | None = None, *, least: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Post this rank's payload and return those of all participants, in their order. Blocks until all have posted.

    Args:
        least: fields of which only the least value counts. It is what they hold in the result, in some of the rows at
            least: numbers that differ on every rank would make it long.

    Raises:
        MicsAgreementError: a rank did not report in the time that the job lets collectives wait, or within
            ``MICS_DS_AGREEMENT_TIMEOUT`` seconds. Raised on every rank that waits.
    """
    if alone(ranks):
        return [dict(payload)]
    try:
        round_ = _Round(ranks or world_ranks(), least)
        round_.post([payload])
        return round_.result(payload)
    except MicsAgreementError:
        raise
    except RuntimeError as error:
        raise MicsAgreementError(
            f"Expected to compare MiCS configurations through the rendezvous store of the process group, but it does "
            f"not answer: {error}. If it did before, the process that serves it (rank 0, as a rule) has died, and its "
            f"output says why. Backends without a store (MPI) cannot run MiCS."
        ) from error


def ask_peers(payload: Payload, ranks: Ranks, patience_s: float) -> list[dict[str, Any]] | None:
    """Exchange payloads with ranks that may not be asking.

    For a rank that has come to a place where its peers may have gone another way: a collective would meet whatever
    collective they have issued.

    Returns:
        The payloads of all ranks in their order, or ``None`` if some rank did not come in time.
    """
    try:
        round_ = _Round(ranks, patience_s=patience_s)
        said = {STATE: ON, **payload}
        round_.post([said])
        return round_.result(said)
    except MicsAgreementError:
        return None


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
            said = "; ".join(f"{value} on ranks {abbreviate(ranks)}" for value, ranks in values.items())
            raise MicsAgreementError(
                f"All ranks must agree on {words}, but it is {said}. Give every node the same ds_config JSON and the "
                f"same MICS_DS_* environment variables (the deepspeed launcher forwards those to other nodes only "
                f"from a .deepspeed_env file)."
            )
