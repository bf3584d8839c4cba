"""How the processes that write in the background agree, without a collective and without the training processes.

They share a store. One save is one :class:`Round` of it:

    fate            first come, first served: ``publishing``, or the reason why nothing is published
    heard/K note/K  how many of those who see publisher K's folder are done, and what some of them wrote
    ready published named   how many publishers have got so far
    result          what all are told

Nobody reads more than its part: a publisher the notes of those who wrote something, the others the result. Every
process has a heartbeat in the store and watches that of its neighbour, so that a dead one is noticed by somebody.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ..errors import MicsCheckpointError
from ..log import logger

PUBLISHING = "publishing"
_HEARTBEAT_S = 1.0
STARTING_S = 120.0
"""How long a process may take from its start to its first heartbeat; it imports torch."""


NOTHING_PUBLISHED = "Nothing was published, and older checkpoints are as they were."


_LEFT = ("fate", "ready", "published", "published by all", "named", "errors", "result", "known")
"""Keys of a round that came to a result which all have heard."""


class RoundFailedError(MicsCheckpointError):
    """This round came to nothing; the message says why, the same on all ranks."""

    remedy = NOTHING_PUBLISHED


class RoundLostError(RoundFailedError):
    """A process has died while the checkpoint was being published."""

    remedy = "It may have been published; if it was, it is complete."


def not_saved(target: str, failure: RoundFailedError) -> str:
    """The whole sentence, the same on all ranks."""
    return f"Checkpoint {target} could not be saved. {failure}. {failure.remedy}"


class Round:
    """One save, from the point of view of one process that writes.

    Args:
        store: shared by all of them.
        number: of the save, the same for all.
        ranks: how many processes there are.
        kind: what is numbered.
    """

    def __init__(self, store: dist.Store, number: int, ranks: int, kind: str = "save") -> None:
        self._store = dist.PrefixStore(f"{kind}/{number}", store)
        self._longest_pause = 0.1 + 5e-5 * ranks  # one process answers all of them

    def fail(self, message: str) -> bool:
        """End the round before anything is published. Returns whether this came first."""
        return self._claim(json.dumps([message])) == json.dumps([message])

    def lose(self, message: str) -> None:
        """Say that a process will never do its part."""
        self.fail(message)
        self._store.set("lost", message)

    def report(self, publisher: int, note: dict[str, Any] | None) -> None:
        """Done, so far as this process is concerned; with what it wrote, if it did."""
        if note is not None:
            place = self._store.add(f"notes/{publisher}", 1)
            self._store.set(f"note/{publisher}/{place}", json.dumps(note))
        self._store.add(f"heard/{publisher}", 1)

    def notes(self, publisher: int, peers: int) -> list[dict[str, Any]]:
        """What was written to this publisher's folder, as soon as all of its peers are done.

        Raises:
            RoundFailedError: one of them failed, or died.
        """
        self._await_count(f"heard/{publisher}", peers)
        count = self._store.add(f"notes/{publisher}", 0)
        notes = []
        for place in range(1, count + 1):
            key = f"note/{publisher}/{place}"
            notes.append(json.loads(self._store.get(key)))
            self._store.delete_key(key)
        for counter in (f"heard/{publisher}", f"notes/{publisher}"):
            self._store.delete_key(counter)
        return notes

    def publishers_reach(self, stage: str, publishers: int, leads: bool) -> None:
        """Count a publisher in, and wait until all have got so far, on the one that leads.

        Raises:
            RoundFailedError: one of them failed, or died.
        """
        self._store.add(stage, 1)
        if leads:
            self._await_count(stage, publishers)

    def begin_publishing(self, leads: bool) -> None:
        """From here on nothing is given up because somebody else fails.

        Raises:
            RoundFailedError: somebody had failed before.
        """
        if leads:
            self._claim(PUBLISHING)
        self._await(lambda: self._store.check(["fate"]))
        self._require_fate()

    def await_key(self, key: str) -> str:
        """The text that somebody sets.

        Raises:
            RoundFailedError: it never will, because it has died.
        """
        self._await(lambda: self._store.check([key]))
        return self._store.get(key).decode()

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def add_error(self, message: str) -> None:
        """What went wrong on a publisher, after publishing began."""
        self._store.set(f"error/{self._store.add('errors', 1)}", message)

    def errors(self) -> list[str]:
        count = self._store.add("errors", 0)
        return [self._store.get(f"error/{place}").decode() for place in range(1, count + 1)]

    def acknowledge(self) -> None:
        """This process knows the result, and will not ask again."""
        self._store.add("known", 1)

    def is_known_to(self, ranks: int) -> bool:
        return self._store.add("known", 0) >= ranks

    def forget(self, ranks: int) -> None:
        """Remove what this round has left in the store, if nobody will ask again."""
        if self.is_known_to(ranks):
            for key in _LEFT:
                self._store.delete_key(key)

    def failure(self) -> RoundFailedError | None:
        """Why this round has come to nothing; ``None`` as long as it has not."""
        try:
            if self._store.check(["fate"]):
                self._require_fate()
            if self._store.check(["lost"]):
                raise RoundLostError(self._store.get("lost").decode())
        except RoundFailedError as error:
            return error
        return None

    def _claim(self, fate: str) -> str:
        return self._store.compare_set("fate", "", fate).decode()

    def _require_fate(self) -> None:
        fate = self._store.get("fate").decode()
        if fate != PUBLISHING:
            raise RoundFailedError(json.loads(fate)[0])

    def _await_count(self, key: str, count: int) -> None:
        self._await(lambda: self._store.add(key, 0) >= count)

    def _await(self, done: Callable[[], bool]) -> None:
        pause = 0.002
        while not done():
            failure = self.failure()
            if failure is not None and not done():
                raise failure
            time.sleep(pause)
            pause = min(1.5 * pause, self._longest_pause)


class Heartbeat:
    """Shows in the store that this process lives, and watches its neighbour during a round.

    Args:
        patience_s: how long the neighbour may show nothing.
        when_failed: called with the round and the reason, in a thread of its own and more than once, when it fails. By
            then another may have begun.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        ranks: int,
        patience_s: float,
        when_failed: Callable[[Round, RoundFailedError], None],
    ) -> None:
        self._store = dist.PrefixStore("heart", store)
        self._rank, self._neighbour = rank, (rank + 1) % ranks
        self._patience_s = patience_s
        self._when_failed = when_failed
        self._round: Round | None = None
        self._changed = threading.Condition()
        self._beats = 0
        threading.Thread(target=self._run, name="mics heartbeat", daemon=True).start()

    def watch(self, round_: Round | None) -> None:
        """Watch over this round; ``None``: there is none."""
        with self._changed:
            self._round = round_
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            seen, since, watched = "", time.monotonic(), self._round
            while True:
                self._beats += 1
                self._store.set(str(self._rank), str(self._beats))
                if self._next_round(watched) is not watched:
                    watched, since = self._round, time.monotonic()
                if watched is None:
                    continue
                failure = watched.failure()
                if failure is not None:
                    self._when_failed(watched, failure)
                    continue
                key = str(self._neighbour)
                shown = self._store.get(key).decode() if self._store.check([key]) else ""
                if shown != seen:
                    seen, since = shown, time.monotonic()
                patience = self._patience_s if shown else max(self._patience_s, STARTING_S)
                if time.monotonic() - since > patience:
                    watched.lose(
                        f"the process that writes for rank {self._neighbour} has shown no sign of life for "
                        f"{patience:.0f} s"
                    )
        except RuntimeError as error:  # the store is gone, and with it rank 0; whoever waits in a round says so
            logger.debug("heartbeat ends: %s", error)

    def _next_round(self, watched: Round | None) -> Round | None:
        """The round to watch, after a while or when it is another."""
        with self._changed:
            self._changed.wait_for(lambda: self._round is not watched, timeout=_HEARTBEAT_S)
            return self._round
