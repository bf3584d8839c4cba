"""State that one process keeps about its job."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from .layout import Ranks


@dataclass
class Job:
    """State for the lifetime of one ``torch.distributed`` world."""

    world: dist.ProcessGroup | None
    rounds: Counter[Ranks] = field(default_factory=Counter)
    """Agreements taken so far among each set of ranks, see :mod:`mics_ds.comm.agreement`."""
    groups: dict[Any, dist.ProcessGroup] = field(default_factory=dict)
    """This rank's process groups, by purpose and by the ranks of all groups of their kind. Each costs a communicator,
    so several ``zero.Init`` contexts and engines share them."""
    attempts: Counter[Any] = field(default_factory=Counter)
    """Process groups that this rank has tried to make, by description and ranks."""
    executors: dict[Any, Any] = field(default_factory=dict)
    ways: dict[Any, Any] = field(default_factory=dict)
    """Ways that collectives take, by what they were measured for, see :mod:`mics_ds.planner.measure`."""
    said: set[Any] = field(default_factory=set)
    """Messages that were logged already, see :meth:`is_news`."""

    def is_news(self, what: Any) -> bool:
        """Return whether this is the first call with ``what``, so that it is logged once."""
        first = what not in self.said
        self.said.add(what)
        return first


_job = Job(None)


def current_job() -> Job:
    """Return the state of the current world. A world that was destroyed took its process groups with it."""
    global _job
    if _job.world is not dist.group.WORLD:
        _job = Job(dist.group.WORLD)
    return _job
