"""Types of arguments that several subcommands take."""

from __future__ import annotations

from typing import Annotated

import typer


def numbers(text: str) -> tuple[int, ...]:
    """Parse positive numbers that are separated by commas, and sort them."""
    words = text.split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise typer.BadParameter(f"takes positive numbers with commas, got {text!r}")
    return tuple(sorted({int(word) for word in words}))


def positive(value: float | None) -> float | None:
    """Refuse zero, negative numbers and nan."""
    if value is not None and not value > 0:
        raise typer.BadParameter(f"must be positive, got {value:g}")
    return value


LocalRank = Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)]
"""The launcher's number of the process, which the deepspeed launcher puts first. The environment says the same."""
