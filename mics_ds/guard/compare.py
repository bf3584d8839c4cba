"""Verdicts on which copy is right: by majority, or by the rule that ties weights to their masters."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from ..deepspeed_compat.states import WEIGHTS, State


@dataclass(frozen=True)
class Verdict:
    """Verdict on one block of all copies."""

    good: int | None
    """Replica that the others can be repaired from, or ``None`` where nothing tells which is right."""
    bad: tuple[int, ...]
    """Replicas that differ from it; without a good one, from replica 0."""
    by: str = ""
    """Rule that decided."""


Block = tuple[State, int, int]
"""Elements [start, stop) of a state."""
Damage = tuple[Block, Verdict]
"""A block that is not equal on all copies, and what is right."""


def judge(copies: Sequence[Hashable], holds: Sequence[bool] | None) -> Verdict | None:
    """``None`` if all copies are equal.

    More than half of all copies are right. Failing that, so is the one value whose copies keep the cast rule, if all of
    them do and no copy of another value does.

    Args:
        copies: the digest of each replica.
        holds: for each, whether ``weights == cast(masters)`` in this block; ``None`` where the rule does not apply.
    """
    if len(set(copies)) == 1:
        return None
    classes: dict[Hashable, list[int]] = {}
    for replica, copy in enumerate(copies):
        classes.setdefault(copy, []).append(replica)
    largest = max(classes.values(), key=len)
    right, by = (largest, "majority") if 2 * len(largest) > len(copies) else (None, "")
    if right is None and holds is not None:
        keeping = [members for members in classes.values() if any(holds[replica] for replica in members)]
        if len(keeping) == 1 and all(holds[replica] for replica in keeping[0]):
            right, by = keeping[0], "cast"
    good = None if right is None else right[0]
    like = classes[copies[0]] if right is None else right
    return Verdict(good, tuple(replica for replica in range(len(copies)) if replica not in like), by)


def cast_violations(weights: torch.Tensor, masters: torch.Tensor) -> torch.Tensor:
    """Return where weights are not what DeepSpeed's step makes of their masters.

    That is a copy into the narrower type, rounded to nearest. All NaNs are equal.
    """
    cast = masters.to(weights.device, weights.dtype)
    return (bits(cast) != bits(weights)) & ~(cast.isnan() & weights.isnan())


def violations(state: State, start: int, stop: int) -> torch.Tensor:
    """Apply :func:`cast_violations` to elements [start, stop) of a state with a twin."""
    assert state.twin is not None, "only asked where there is one"
    held, twin = state.tensor[start:stop], state.twin[start:stop]
    return cast_violations(held, twin) if state.name == WEIGHTS else cast_violations(twin, held)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same memory as integers."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
