"""Run a training command as stock ZeRO-3 and as MiCS, and summarise what its ranks recorded (``mics-ds ab``)."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..config import DISABLE_ENV
from .recorder import REPORT_ENV

NAMES = ("stock ZeRO-3", "MiCS")


class RunFailedError(RuntimeError):
    """One of the two runs failed or recorded too little."""


def summarise(folder: Path, skip: int) -> dict[str, Any]:
    """Medians over steps of one run's records.

    Args:
        folder: holds ``rankN.jsonl`` as written by :class:`mics_ds.ab.recorder.StepRecorder`.
        skip: leading steps to leave out of times and bytes (not of losses).

    Raises:
        ValueError: no rank recorded more than ``skip`` steps.
    """
    ranks = [
        [json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.glob("rank*.jsonl"))
    ]
    steps = min((len(rank) for rank in ranks), default=0)
    if steps <= skip:
        raise ValueError(
            f"expected more than {skip} recorded optimizer steps (the first {skip} are warm-up), found {steps}. Train "
            f"longer, lower --skip, and see that the script uses deepspeed with mics_ds installed."
        )
    by_step = list(zip(*(rank[:steps] for rank in ranks)))
    interfaces = {name for items in by_step for item in items for name in item["sent"]}
    sent = {
        name: statistics.median(sum(item["sent"].get(name, 0) for item in items) for items in by_step[skip:])
        for name in interfaces
    }
    losses = [
        statistics.fmean(item["loss"] for item in items) if all(item["loss"] is not None for item in items) else None
        for items in by_step
    ]
    return {
        "ranks": len(ranks),
        "steps": steps,
        "seconds": statistics.median(max(item["seconds"] for item in items) for items in by_step[skip:]),
        "sent": {name: count for name, count in sorted(sent.items()) if count},
        "losses": losses,
    }


def worst_loss_difference(stock: dict[str, Any], mics: dict[str, Any]) -> tuple[float, int] | None:
    """Return the largest relative difference of two losses and the number of steps that have both."""
    pairs = [(a, b) for a, b in zip(stock["losses"], mics["losses"]) if a is not None and b is not None]
    return (max(abs(a - b) / max(abs(a), 1e-12) for a, b in pairs), len(pairs)) if pairs else None


def run_both(
    command: Sequence[str], skip: int, keep: Path | None, announce: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a command as stock ZeRO-3, then as MiCS. Returns the summary of each run.

    Args:
        command: a command; one that begins with a ``.py`` file gets the ``deepspeed`` launcher in front.
        keep: a new folder to keep the records in.
        announce: called before each run with its name and command.

    Raises:
        RunFailedError: a run failed, or recorded no more than ``skip`` steps.
    """
    command = list(command)
    if command[0].endswith(".py"):
        command = [shutil.which("deepspeed") or str(Path(sys.executable).with_name("deepspeed")), *command]
    folder = keep or Path(tempfile.mkdtemp(prefix="mics_ab_"))
    try:
        stock, mics = (
            _run(name, command, folder / records, disable, skip, announce)
            for name, records, disable in zip(NAMES, ("stock", "mics"), ("1", "0"))
        )
        return stock, mics
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def _run(
    name: str, command: Sequence[str], records: Path, disable: str, skip: int, announce: Callable[[str], None]
) -> dict[str, Any]:
    announce(f"{name}: {' '.join(command)}")
    environment = {**os.environ, DISABLE_ENV: disable, REPORT_ENV: str(records)}
    code = subprocess.run(command, env=environment).returncode
    if code != 0:
        raise RunFailedError(f"the {name} run ended with exit code {code}; its output above says why")
    try:
        return summarise(records, skip)
    except ValueError as error:
        raise RunFailedError(f"the {name} run left nothing to compare: {error}") from error
