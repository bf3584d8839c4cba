"""Which cases of a parametrised test belong to the default run. The others are slow: scripts/test_slow.sh runs them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any

import pytest


def slow(*values: Any, id: str | None = None) -> Any:
    """Return a slow case."""
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


def every(*values: Sequence[Any], default: Collection[Any]) -> list[Any]:
    """Return all combinations of ``values``; those that are not in ``default`` are slow.

    Args:
        default: combinations, each of which must exist; with one argument, its values.
    """
    combinations = list(itertools.product(*values))
    wanted = [item if len(values) > 1 else (item,) for item in default]
    missing = [item for item in wanted if item not in combinations]
    assert not missing, f"these are not among the combinations: {missing}"
    return [pytest.param(*item) if item in wanted else slow(*item) for item in combinations]


def pairs(*values: Sequence[Any]) -> list[Any]:
    """Return all combinations of ``values``; slow are those that add no new pair of values of two arguments.

    Most defects need one value or two that meet, so few combinations find them.
    """
    combinations = list(itertools.product(*values))
    left = {pair: None for item in combinations for pair in _pairs_in(item)}
    default = []
    while left:
        best = max(combinations, key=lambda item: sum(pair in left for pair in _pairs_in(item)))
        default.append(best)
        for pair in _pairs_in(best):
            left.pop(pair, None)
    return every(*values, default=default)


def _pairs_in(combination: tuple[Any, ...]) -> list[Any]:
    """Return the pairs of (argument, value) in a combination, in a form that can be looked up."""
    return list(itertools.combinations([(place, repr(value)) for place, value in enumerate(combination)], 2))


each_layout = pytest.mark.parametrize(
    ("p", "states"),
    every((1, 2, 4), ("partition", "world"), default=[(1, "world"), (2, "partition"), (4, "partition")]),
)
"""Partition size on four ranks, and where optimizer states are."""
