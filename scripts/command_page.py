"""Write docs/command.md: the help of ``mics-ds`` and of each subcommand.

    python scripts/command_page.py          # prints it
    python scripts/command_page.py --write

A test fails when the page and the command differ.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

from mics_ds.cli import app

PAGE = Path(__file__).resolve().parents[1] / "docs" / "command.md"
HEAD = """# Command

You want to know what `mics-ds` can do. Launchers start it as a module: `torchrun --nproc_per_node 8 -m mics_ds check`.
This page is the command's own help.
"""


def help_of(*words: str) -> str:
    """Return the help of a subcommand, as a terminal of 100 columns shows it."""
    os.environ["COLUMNS"] = "100"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        app.run([*words, "--help"])
    return "\n".join(line.rstrip() for line in said.getvalue().strip().splitlines())


def page() -> str:
    """Return the page in Markdown."""
    parts = [HEAD, f"```text\n{help_of()}\n```\n"]
    for functions in app.COMMANDS.values():
        parts += [f"## {item.__name__}\n\n```text\n{help_of(item.__name__)}\n```\n" for item in functions]
    return "\n".join(parts)


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page())
    else:
        print(page())
