"""When things happen: tasks with what they follow, played in virtual time once all of them are known.

A task takes its seconds, and then a transfer, if it has one, on a link that all transfers of the moment share equally.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Task:
    """Something that a stream or the host does."""

    name: str
    stream: str
    after: Sequence[int]
    """Tasks that have to end before it starts, by their index. All of them are earlier in the list."""
    seconds: float = 0.0
    link: str = ""
    transfer: float = 0.0
    """Seconds on the link, if nothing else is on it."""
    start: float = 0.0
    end: float = 0.0


@dataclass
class _Link:
    """Transfers under way. ``progress`` is how many seconds each of them has got so far."""

    progress: float = 0.0
    since: float = 0.0
    transfers: list[tuple[float, int]] = field(default_factory=list)
    """With the progress at which each ends, as a heap."""

    def advance(self, now: float) -> None:
        if self.transfers:
            self.progress += (now - self.since) / len(self.transfers)
        self.since = now

    def next_end(self) -> float:
        return self.since + (self.transfers[0][0] - self.progress) * len(self.transfers)


def play(tasks: Sequence[Task]) -> None:
    """Fill in start and end of all tasks."""
    followers: list[list[int]] = [[] for _ in tasks]
    missing = [len(task.after) for task in tasks]
    for index, task in enumerate(tasks):
        for earlier in task.after:
            followers[earlier].append(index)
    links: dict[str, _Link] = {}
    timers = [(task.seconds, index) for index, task in enumerate(tasks) if not task.after]
    heapq.heapify(timers)
    while timers or any(link.transfers for link in links.values()):
        busy = min((link for link in links.values() if link.transfers), key=_Link.next_end, default=None)
        if busy is not None and (not timers or busy.next_end() <= timers[0][0]):
            now = busy.next_end()
            busy.advance(now)
            _, index = heapq.heappop(busy.transfers)
        else:
            now, index = heapq.heappop(timers)
            if tasks[index].transfer:
                link = links.setdefault(tasks[index].link, _Link())
                link.advance(now)
                heapq.heappush(link.transfers, (link.progress + tasks[index].transfer, index))
                continue
        tasks[index].end = now
        for follower in followers[index]:
            missing[follower] -= 1
            if not missing[follower]:
                tasks[follower].start = now
                heapq.heappush(timers, (now + tasks[follower].seconds, follower))
