"""Commands of mics_ds 0.1, which work until the release after the next and name their successor."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from . import app


def run(name: str, command: str) -> NoReturn:
    """Run a subcommand under the old name, after one line of notice on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        successor = "mics-ds" if "RANK" not in os.environ else "-m mics_ds"
        print(f"{name} will go after the next release; use: {successor} {command}", file=sys.stderr, flush=True)
    app.main([command, *sys.argv[1:]])


def mics_plan() -> NoReturn:
    """Run ``mics-plan``, the old name of ``mics-ds plan``."""
    run("mics-plan", "plan")
