"""Run somebody's own training command twice, as stock ZeRO-3 and as MiCS, and compare.

    python -m mics_ds.ab -- deepspeed --num_gpus 4 train.py --deepspeed_config ds_config.json

The command is run unchanged, first with ``MICS_DS_DISABLE=1`` in its environment and then without. It
has to use DeepSpeed with a configuration that has ``mics_shard_size``, and to end by itself. A command
that begins with a ``.py`` file gets the ``deepspeed`` launcher in front.

Under the multi-node launcher, list ``MICS_DS_DISABLE`` and ``MICS_DS_REPORT`` in ``.deepspeed_env``, or start
the command on each node yourself; the report folder must be one that all nodes share.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..config import DISABLE_ENV
from ..formatting import columns
from .recorder import REPORT_ENV

NAMES = ("stock ZeRO-3", "MiCS")


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


def compare(stock: dict[str, Any], mics: dict[str, Any]) -> str:
    """The two summaries as text."""
    interfaces = sorted({*stock["sent"], *mics["sent"]})
    rows = [("", "step, s", "ratio", "final loss", *(f"{name}, MB/step" for name in interfaces))]
    for name, run in zip(NAMES, (stock, mics)):
        loss = run["losses"][-1]
        rows.append(
            (
                name,
                f"{run['seconds']:.4f}",
                f"{stock['seconds'] / run['seconds']:.2f}x",
                "-" if loss is None else f"{loss:.6f}",
                *(f"{run['sent'].get(interface, 0) / 1e6:.2f}" for interface in interfaces),
            )
        )
    lines = columns(rows, right=True)
    pairs = [(a, b) for a, b in zip(stock["losses"], mics["losses"]) if a is not None and b is not None]
    if pairs:
        worst = max(abs(a - b) / max(abs(a), 1e-12) for a, b in pairs)
        lines.append(f"largest relative loss difference in {len(pairs)} steps: {worst:.1e}")
    lines.append(
        f"{stock['ranks']} ranks; medians of {stock['steps']} and {mics['steps']} steps, without the first ones"
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip", type=int, default=5, help="steps to leave out of the medians (default 5)")
    parser.add_argument("--keep", type=Path, help="keep the records in this new folder")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command to run")
    arguments = parser.parse_args(argv)
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        parser.error("give the command to run after --, for example: -- deepspeed --num_gpus 4 train.py ...")
    if command[0].endswith(".py"):
        command = [shutil.which("deepspeed") or str(Path(sys.executable).with_name("deepspeed")), *command]
    if arguments.keep is not None and arguments.keep.exists():
        parser.error(f"{arguments.keep} exists already; --keep takes a folder that is yet to be made")
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="mics_ab_"))
    try:
        runs = []
        for name, disable in zip(NAMES, ("1", "0")):
            print(f"--- {name}: {' '.join(command)}", flush=True)
            records = folder / ("mics" if disable == "0" else "stock")
            environment = {**os.environ, DISABLE_ENV: disable, REPORT_ENV: str(records)}
            code = subprocess.run(command, env=environment).returncode
            if code != 0:
                sys.exit(f"the {name} run ended with exit code {code}; its output above says why")
            try:
                runs.append(summarise(records, arguments.skip))
            except ValueError as error:
                sys.exit(f"the {name} run left nothing to compare: {error}")
        print("\n" + compare(*runs))
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
