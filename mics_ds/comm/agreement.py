"""Do all ranks mean the same thing? Asked through the rendezvous store, before any collective.

A collective cannot ask this question: if one rank runs MiCS and another does not, they would issue
different collectives on the same group and wait for each other forever. The store that brought the
process group up has no such problem. In each *round* every rank posts a small JSON payload; rank 0
joins them and posts the result; everybody reads it. That is O(n) store operations in all.

Ranks that do not run MiCS (no key, key switched off by the environment, a configuration error) post
too, so that the others learn of it at once and not by a timeout. Rounds are numbered, so they must be
taken at the same places on every rank: wherever DeepSpeed builds a partitioner or an engine
(:mod:`mics_ds.activation`), and where MiCS builds its groups.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from ..errors import MicsAgreementError
from ..log import logger

TIMEOUT_ENV = "MICS_DS_AGREEMENT_TIMEOUT"
# Ranks may reach DeepSpeed minutes apart (rank 0 prepares a data set while the others wait), so this
# is as patient as the collectives that follow. It only bounds a wait for ranks that died silently.
DEFAULT_TIMEOUT_S = 600.0
_REMIND_AFTER_S = 30.0

STATE, CONFIG = "state", "config"
ON, DISABLED, OFF, ERROR = "on", "disabled", "off", "error"

Payload = Mapping[str, Any]


class _Round:
    """Counts rounds of the current world. A new world (after destroy and init) starts again at 0."""

    world: dist.ProcessGroup | None = None
    number = 0

    @classmethod
    def take(cls) -> int:
        if cls.world is not dist.group.WORLD:
            cls.world, cls.number = dist.group.WORLD, 0
        cls.number += 1
        return cls.number


def _key(number: int, what: str | int) -> str:
    return f"mics_ds/{number}/{what}"


def alone() -> bool:
    """Whether there is nobody to agree with."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def post(payload: Payload) -> None:
    """Take part in a round without waiting for its result. For ranks that will not run MiCS."""
    if not alone():
        store = c10d._get_default_store()
        store.set(_key(_Round.take(), dist.get_rank()), json.dumps(payload))


def post_error(error: BaseException) -> None:
    """Tell the other ranks why this one will not go on. It still has to raise ``error`` itself."""
    post({STATE: ERROR, "message": str(error)})


def exchange(payload: Payload) -> list[dict[str, Any]]:
    """Post this rank's payload and return those of all ranks, in rank order. Blocks until all have posted.

    Raises:
        MicsAgreementError: a rank reported that it is not running MiCS or failed, or did not report
            within ``MICS_DS_AGREEMENT_TIMEOUT`` seconds. Raised on every rank that waits.
    """
    if alone():
        return [dict(payload)]
    store, rank, world = c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    number = _Round.take()
    store.set(_key(number, rank), json.dumps(payload))
    deadline = time.monotonic() + float(os.environ.get(TIMEOUT_ENV, DEFAULT_TIMEOUT_S))

    if rank == 0:
        payloads = [_read(store, number, peer, [peer], deadline) for peer in range(world)]
        store.set(_key(number, "all"), json.dumps(payloads))
        return payloads
    # Rank 0 posts the result only if it runs MiCS itself, so look at its own payload first.
    first = _read(store, number, 0, [0], deadline)
    if first[STATE] in (OFF, ERROR):
        return [first] + [dict(payload)] * (world - 1)
    return _read(store, number, "all", list(range(world)), deadline)


def _read(store: dist.Store, number: int, what: str | int, awaited: list[int], deadline: float) -> Any:
    """Wait for a key by polling: a blocking ``store.wait`` would not let Ctrl-C through."""
    started, pause, reminded = time.monotonic(), 0.001, False
    while not store.check([_key(number, what)]):
        now = time.monotonic()
        if now > deadline:
            missing = [peer for peer in awaited if not store.check([_key(number, peer)])]
            raise MicsAgreementError(
                f"Expected every rank to report its MiCS configuration, but nothing came from ranks {missing} in "
                f"{now - started:.0f} s. Either they died (look at their output), or they do not have mics_ds "
                f"installed and imported; {TIMEOUT_ENV} (seconds) sets how long to wait."
            )
        if now - started > _REMIND_AFTER_S and not reminded:
            reminded = True
            logger.warning("rank %d still waits for other ranks to report their MiCS configuration", dist.get_rank())
        time.sleep(pause)
        pause = min(pause * 1.5, 0.2)
    return json.loads(store.get(_key(number, what)))


def require_same(payloads: list[dict[str, Any]], fields: Mapping[str, str] | None = None) -> None:
    """Check that all ranks are in the same state, with the same configuration and the same named fields.

    Args:
        payloads: one per rank, as returned by :func:`exchange`.
        fields: further field names, with the words that describe them in an error.

    Raises:
        MicsAgreementError: some rank failed, runs without MiCS, or differs in a field. The message is
            the same on every rank.
    """
    failed = {rank: item["message"] for rank, item in enumerate(payloads) if item[STATE] == ERROR}
    if failed:
        rank, message = next(iter(failed.items()))
        others = f" (and on ranks {list(failed)[1:]})" if len(failed) > 1 else ""
        raise MicsAgreementError(f"The MiCS configuration was refused on rank {rank}{others}: {message}")
    for field, words in {STATE: "whether MiCS is on", CONFIG: "the MiCS configuration", **(fields or {})}.items():
        values: dict[str, list[int]] = {}
        for rank, item in enumerate(payloads):
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
