"""Text for terminals."""

from __future__ import annotations

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], *, right: bool = False) -> list[str]:
    """Lines of a table, each column as wide as its widest cell, two spaces between.

    Args:
        rows: all of one length.
        right: align to the right, not to the left. Left-aligned lines have no spaces at their ends.
    """
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    if right:
        return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def abbreviate(ranks: Sequence[int]) -> str:
    """A list of ranks, at most eight of them by number."""
    return str(list(ranks)) if len(ranks) <= 8 else f"[{', '.join(map(str, ranks[:8]))}, ... {len(ranks)} in all]"
