"""Terminal output that all subcommands share: two consoles, tables, progress bars and errors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_UNLIMITED = 500
"""Columns of output that is not a terminal, so that lines for other programs are never wrapped."""


def _console(stream: TextIO, *, stderr: bool = False) -> Console:
    width = None if stream.isatty() else _UNLIMITED
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


out = _console(sys.stdout)
errors = _console(sys.stderr, stderr=True)


def table(*columns: str, right: bool = False) -> Table:
    """Return an empty table without lines; ``right`` aligns all columns but the first to the right."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if right and index else "left", no_wrap=True)
    return made


def rendered(renderable: RenderableType) -> str:
    """Return what would be printed, without spaces at the ends of lines."""
    with out.capture() as capture:
        out.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def cell(text: object) -> Text:
    """Return a table's cell that shows text as it is, brackets included."""
    return Text(str(text))


def progress_bar(*, disable: bool) -> Progress:
    """Return a progress bar on standard error that disappears at its end."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=errors, transient=True, disable=disable)


@contextmanager
def exit_with(code: int, *kinds: type[BaseException]) -> Iterator[None]:
    """Print an exception of these kinds as one line and end the command with ``code``."""
    try:
        yield
    except kinds as error:
        errors.print(f"error: {error}")
        raise typer.Exit(code) from error
