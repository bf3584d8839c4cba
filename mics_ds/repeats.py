"""Parameters whose gradient comes twice in one backward pass, and what replicas make of that together.

Weights that are shared between reentrant activation checkpoints, or between one and the rest of the model, come once
for each, because every checkpoint has a backward pass of its own. ZeRO-3 is not made for that. If the first gradient
still waits in the bucket when the second comes, stock stops with a bare assertion. If it has been reduced already, the
second is written over it, so that stock trains on the last of them only, without a word.

Replicas that all do the same lose the same, as stock does, and that is left as it is, with a warning. But a
replica alone must not stop while others wait for it in hop 2, and replicas that do different things lose different
parts, where stock's ranks lose the same. So what comes twice is noted here, hop 2 carries the news with its flags, and
where stock would have stopped, or where replicas differ, all ranks stop before the step.
"""

from __future__ import annotations

import enum
import hashlib

import torch

from .comm import collectives
from .comm.groups import RankGroup
from .errors import MicsUsageError
from .log import logger

REMEDY = (
    "Use torch.utils.checkpoint with use_reentrant=False (gradient_checkpointing_kwargs={'use_reentrant': False} in "
    "Hugging Face's Trainer), or keep modules that share weights out of checkpoints."
)


class Lost(enum.IntEnum):
    """What has become of gradients. The greatest of all replicas' holds."""

    NOTHING = 0
    AS_IN_STOCK = 1
    """A later gradient took the place of an earlier one."""
    STOCK_STOPS = 2
    """A later gradient was left out."""


class Repeats:
    """The gradients of one boundary, in the order in which they come. Knows neither DeepSpeed nor modules."""

    def __init__(self) -> None:
        self.lost = Lost.NOTHING
        self._order: list[int] = []
        self._moment: object = None
        self._came: set[int] = set()
        self._warned = False

    def comes_again(self, key: int, moment: object) -> bool:
        """A parameter has a gradient.

        Args:
            key: of the parameter.
            moment: something that is equal in one backward pass only.

        Returns:
            Whether it had one in this pass before.
        """
        if moment != self._moment:
            self._moment, self._came = moment, set()
        self._order.append(key)
        before = key in self._came
        self._came.add(key)
        return before

    def loses(self, lost: Lost) -> None:
        self.lost = max(self.lost, lost)

    def next_boundary(self) -> None:
        self.lost = Lost.NOTHING
        self._order.clear()

    def judge(self, lost: Lost, replication: RankGroup, device: torch.device) -> None:
        """Some replica has lost something. Called by all replicas, before gradients are used.

        Raises:
            MicsUsageError: stock would have stopped, or replicas have not done the same. Raised on every rank.
        """
        digest = hashlib.sha256(repr(self._order).encode()).digest()
        number = int.from_bytes(digest[:7], "big")
        same = torch.tensor([number, -number], device=device)
        collectives.max_over_(same, replication, "whether replicas lost the same gradients")
        most, least = same.tolist()
        if lost is Lost.AS_IN_STOCK and most == -least:
            if not self._warned:
                logger.warning(
                    "a parameter got two gradients in one backward pass, and ZeRO-3 keeps the last one only, in stock "
                    "DeepSpeed too: its weights are shared with or between reentrant activation checkpoints. %s",
                    REMEDY,
                )
            self._warned = True
            return
        raise MicsUsageError(
            f"ZeRO-3 takes one gradient per parameter in a backward pass, but some rank got two of one, from weights "
            f"that are shared with or between reentrant activation checkpoints, and one of them is lost. Stock "
            f"DeepSpeed stops with an assertion then, or goes on without it. {REMEDY}"
        )
