"""Which cases of a parametrised test belong to the default run."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any

import pytest


def slow(*values: Any, id: str | None = None) -> Any:
    """Return one case that only scripts/test_slow.sh runs."""
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


def every(*values: Sequence[Any], default: Collection[Any]) -> list[Any]:
    """Return all combinations of ``values``; those that are not in ``default`` are slow.

    Args:
        default: combinations for the default run, each of which must exist.
    """
    combinations = [item if len(values) > 1 else item[0] for item in itertools.product(*values)]
    missing = [item for item in default if item not in combinations]
    assert not missing, f"{missing} are not among the combinations"
    as_arguments = [item if len(values) > 1 else (item,) for item in combinations]
    return [
        pytest.param(*arguments) if item in default else slow(*arguments)
        for item, arguments in zip(combinations, as_arguments)
    ]
