"""Agreement of all ranks through the rendezvous store, before any collective.

A collective cannot ask this question. If one rank runs MiCS and another does not, they issue different collectives on
the same group and wait for each other forever. The store that brought the process group up has no such problem.

In each *round* every rank makes a statement, a small JSON object:

    | key     | who writes it             | what                                                |
    |---------|---------------------------|-----------------------------------------------------|
    | here/i  | the i-th rank             | it has come; the digest of its statement            |
    | stated  | the first rank to come    | its statement, which all others compare with theirs |
    | same    | each rank that agrees     | a counter; the rank that completes it writes "ok"   |
    | verdict | one rank, the first wins  | "ok", or the error that all ranks raise             |

A rank that runs no MiCS, or has failed, writes the verdict and does not wait. The others read their peers' statement
and the verdict, a few hundred bytes in any job. Rounds are numbered for each set of ranks, so ranks of a set must take
them at the same places: wherever DeepSpeed builds a partitioner or an engine, and where MiCS builds its groups.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from ..errors import MicsAgreementError, MicsError
from ..formatting import abbreviate
from ..log import logger
from .job import current_job
from .layout import Ranks

TIMEOUT_ENV = "MICS_DS_AGREEMENT_TIMEOUT"
_REMIND_AFTER_S = 30.0
_GRACE_S = 30.0
"""Further seconds that ranks wait while one of them finds out which ranks are missing."""
_LATECOMERS_S = 5.0
"""Seconds that a rank with a difference waits for further ranks, so that the error names more of them."""
_AGREED = "ok"
_MOST_ASKED = 64
"""Ranks that a rank with a difference waits for."""

Statement = Mapping[str, Any]


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> timedelta | None:
    """Return how long a collective of ``group`` may take on ``device``, ``None`` where its backend does not say."""
    backend: Any = group._get_backend(device)
    while hasattr(backend, "wrapped_pg"):  # TORCH_DISTRIBUTED_DEBUG=DETAIL
        backend = backend.wrapped_pg
    try:
        return getattr(backend.options, "_timeout", None)
    except (AttributeError, RuntimeError):  # a backend from outside torch need not have options
        return None


def job_timeout_s() -> float:
    """Return how long the job lets a collective wait, in seconds: ranks may reach DeepSpeed as far apart as that."""
    world = dist.group.WORLD
    assert world is not None, "only asked for in an initialised process group"
    timeouts = [timeout_of(world, device) for device in world._device_types]
    default = c10d.default_pg_timeout.total_seconds()
    return min((timeout.total_seconds() for timeout in timeouts if timeout is not None), default=default)


def patience_s() -> float:
    """Return how long ranks wait for each other's statements: as long as collectives, or as the environment says."""
    said = os.environ.get(TIMEOUT_ENV)
    return job_timeout_s() if said is None else float(said)


def digest(value: Any) -> str:
    """Return sixteen hexadecimal digits for anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class _Round:
    """One round among ``ranks``, by default the world, from the calling rank's point of view."""

    def __init__(self, ranks: Ranks | None) -> None:
        self._ranks = ranks or tuple(range(dist.get_world_size()))
        self._place = self._ranks.index(dist.get_rank())
        self._store = c10d._get_default_store()
        rounds = current_job().rounds
        rounds[self._ranks] += 1
        self._number = rounds[self._ranks]
        self._among = "world" if len(self._ranks) == dist.get_world_size() else digest(self._ranks)

    def _key(self, name: str) -> str:
        return f"mics_ds/{self._among}/{self._number}/{name}"

    def end(self, verdict: str) -> None:
        """End the round for all ranks, those that have not come yet among them. The first verdict holds."""
        self._store.compare_set(self._key("verdict"), "", verdict)

    def forget(self, earlier: int) -> None:
        """Delete what is left of so many rounds before."""
        if self._place == 0 and self._number > earlier:
            for name in ("stated", "same", "verdict"):
                self._store.delete_key(f"mics_ds/{self._among}/{self._number - earlier}/{name}")

    def state(self, statement: Statement, what: str, patience: float) -> str | None:
        """Compare a statement with those of all others.

        Returns:
            The verdict, ``None`` if there is none after ``patience`` seconds.
        """
        mine = json.dumps(statement, sort_keys=True)
        self._store.set(self._key(f"here/{self._place}"), digest(statement))
        first = self._store.compare_set(self._key("stated"), "", mine).decode()
        if first != mine:
            self.end(self._difference(json.loads(first), statement, what))
        elif self._store.add(self._key("same"), 1) == len(self._ranks):
            self.end(_AGREED)
        verdict = self._await_verdict(patience)
        if verdict == _AGREED:  # otherwise ranks that find out who differs still look for this one
            self._store.delete_key(self._key(f"here/{self._place}"))
            self.forget(1)  # all ranks are in this round, so they have read the last one's verdict
        return verdict

    def _await_verdict(self, patience: float) -> str | None:
        """Poll for the verdict: a blocking ``store.wait`` would not let Ctrl-C through."""
        started, pause, reminded = time.monotonic(), 0.001, False
        longest_pause = 0.2 + 5e-5 * len(self._ranks)  # one process answers all of them
        while not self._store.check([self._key("verdict")]):
            waited = time.monotonic() - started
            if waited > patience:
                return None
            if waited > _REMIND_AFTER_S and not reminded:
                reminded = True
                logger.warning(
                    "rank %d still waits for other ranks to report their MiCS configuration", dist.get_rank()
                )
            time.sleep(pause)
            pause = min(pause * 1.5, longest_pause)
        return self._store.get(self._key("verdict")).decode()

    def name_missing(self, patience: float) -> str:
        """Find out which ranks have not come, and tell all the others.

        Returns:
            The verdict.
        """
        if self._store.add(self._key("late"), 1) == 1:  # one rank asks for all, or the store drowns in questions
            missing = [
                rank for place, rank in enumerate(self._ranks) if not self._store.check([self._key(f"here/{place}")])
            ]
            self.end(
                f"Expected every rank to report its MiCS configuration, but nothing came from ranks "
                f"{abbreviate(missing)} in {patience:.0f} s. Either they died (look "
                f"at their output), or they do not build the same model with mics_ds installed and imported; "
                f"{TIMEOUT_ENV} (seconds) sets how long to wait, by default the timeout of the job's process group."
            )
        return self._await_verdict(_GRACE_S) or (
            "Expected a verdict on the MiCS configuration, but the rank that looks who is missing has stopped."
        )

    def _difference(self, theirs: Statement, mine: Statement, what: str) -> str:
        fields = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
        keys = {rank: self._key(f"here/{place}") for place, rank in enumerate(self._ranks[:_MOST_ASKED])}
        with suppress(RuntimeError):  # some may never come
            self._store.wait(list(keys.values()), timedelta(seconds=_LATECOMERS_S))
        came = {rank: self._store.get(key).decode() for rank, key in keys.items() if self._store.check([key])}
        came[dist.get_rank()] = digest(mine)
        told = []
        for said in (theirs, mine):
            ranks = sorted(rank for rank, own in came.items() if own == digest(said))
            where = f"ranks {abbreviate(ranks)}" if ranks else "others"
            told.append(f"{json.dumps({name: said.get(name) for name in fields})} on {where}")
        return (
            f"All ranks must agree on {what}, but it is {'; '.join(told)}. Give every node the same ds_config JSON and "
            f"the same MICS_DS_* environment variables (the deepspeed launcher forwards those to other nodes only from "
            f"a .deepspeed_env file)."
        )


def is_alone(ranks: Ranks | None = None) -> bool:
    """Return whether there is no other rank to agree with."""
    return not dist.is_initialized() or (len(ranks) if ranks else dist.get_world_size()) == 1


def report_off(ranks: Ranks | None = None) -> None:
    """Take part in a round as a rank that does not run MiCS, without waiting for the result.

    Args:
        ranks: global ranks of the participants, in an order that all of them share; by default the world.
    """
    if is_alone(ranks):
        return
    try:
        round_ = _Round(ranks)
        round_.end(
            f"All ranks must run MiCS or none, but rank {dist.get_rank()} runs without it: its configuration has no "
            f"mics_ key, or mics_ds is not imported there. Give every node the same ds_config JSON and environment."
        )
        round_.forget(16)  # who does not wait is at most a few rounds ahead of the others
    except RuntimeError as error:
        # MPI and the "fake" backend have no store. Ranks that run MiCS say so; stock ZeRO-3 has no use for one.
        logger.debug("rank %d could not report that it does not run MiCS: %s", dist.get_rank(), error)


def require_same(statement: Statement, what: str, ranks: Ranks | None = None) -> None:
    """Check that all ranks make the same statement. Blocks until all have made theirs.

    Args:
        statement: fields that JSON can hold.
        what: describes the statement in an error.
        ranks: as for :func:`report_off`.

    Raises:
        MicsAgreementError: the ranks disagree, or one runs no MiCS, has failed, or did not come in the time that the
            job lets collectives wait, or within ``MICS_DS_AGREEMENT_TIMEOUT`` seconds. The same on every rank.
    """
    if is_alone(ranks):
        return
    patience = patience_s()
    try:
        round_ = _Round(ranks)
        verdict = round_.state(statement, what, patience) or round_.name_missing(patience)
    except RuntimeError as error:
        raise MicsAgreementError(
            f"Expected to compare MiCS configurations through the rendezvous store of the process group, but it does "
            f"not answer: {error}. If it did before, the process that serves it (rank 0, as a rule) has died, and its "
            f"output says why. Backends without a store (MPI) cannot run MiCS."
        ) from error
    if verdict != _AGREED:
        raise MicsAgreementError(verdict)


def peers_agree(statement: Statement, what: str, ranks: Ranks, patience: float) -> bool | None:
    """Compare a statement with peers that may not be asking.

    For a rank that has come to a place where its peers may have gone another way: a collective would meet whatever
    collective they have issued.

    Returns:
        Whether all ranks state the same, or ``None`` if some rank did not come within ``patience`` seconds.
    """
    verdict = _Round(ranks).state(statement, what, patience)
    return None if verdict is None else verdict == _AGREED


@contextmanager
def failing_together(ranks: Ranks | None = None) -> Iterator[None]:
    """Report exceptions to the participants of the next round, who would wait for this rank. They are raised here too.

    An exception is reported once, however many of these contexts it leaves. All ranks have a MicsAgreementError.
    """
    try:
        yield
    except Exception as error:
        if not (isinstance(error, MicsAgreementError) or getattr(error, "mics_reported", False) or is_alone(ranks)):
            error.mics_reported = True  # type: ignore[attr-defined]
            words = str(error) if isinstance(error, MicsError) else f"{type(error).__name__}: {error}"
            verdict = f"The MiCS configuration was refused on rank {dist.get_rank()}: {words}"
            with suppress(RuntimeError):  # without a store nobody can be told
                _Round(ranks).end(verdict)
        raise
