"""Text for logs and errors."""

from __future__ import annotations

from collections.abc import Sequence


def abbreviate(ranks: Sequence[int]) -> str:
    """A list of ranks, at most eight of them by number."""
    return str(list(ranks)) if len(ranks) <= 8 else f"[{', '.join(map(str, ranks[:8]))}, ... {len(ranks)} in all]"
