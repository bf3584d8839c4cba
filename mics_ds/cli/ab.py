"""``mics-ds ab``: a training command of the user's, run as stock ZeRO-3 and as MiCS."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table

from .output import errors, out, table


def ab(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND", help="The command to run.")],
    skip: Annotated[int, typer.Option(min=0, help="First steps to leave out of the medians.")] = 5,
    keep: Annotated[Path | None, typer.Option(metavar="FOLDER", help="New folder to keep the records in.")] = None,
) -> None:
    """Run a training command as stock ZeRO-3 and as MiCS, and compare.

    Example: mics-ds ab -- deepspeed --num_gpus 8 train.py --deepspeed_config ds_config.json

    The command is run unchanged, first with MICS_DS_DISABLE=1 in its environment and then without. It has to use
    DeepSpeed with a configuration that has mics_shard_size, and to end by itself. A command that begins with a .py
    file gets the deepspeed launcher in front.

    With the multi-node launcher of DeepSpeed, list MICS_DS_DISABLE and MICS_DS_REPORT in .deepspeed_env, or start the
    command on each node yourself. All nodes must share the folder given as --keep.
    """
    from ..ab.compare import RunFailedError, run_both

    if keep is not None and keep.exists():
        raise typer.BadParameter(f"{keep} exists already; --keep takes a folder that is yet to be made")
    try:
        stock, mics = run_both(command, skip, keep, announce=lambda text: out.print(f"--- {text}"))
    except RunFailedError as error:
        errors.print(str(error))
        raise typer.Exit(1) from error
    out.print()
    out.print(comparison(stock, mics))


def comparison(stock: dict[str, Any], mics: dict[str, Any]) -> Group:
    """Return the two summaries as a table and the lines below it."""
    from ..ab.compare import NAMES, worst_loss_difference

    interfaces = sorted({*stock["sent"], *mics["sent"]})
    rows: Table = table("", "step, s", "ratio", "final loss", *(f"{name}, MB/step" for name in interfaces), right=True)
    for name, run in zip(NAMES, (stock, mics)):
        loss = run["losses"][-1]
        rows.add_row(
            name,
            f"{run['seconds']:.4f}",
            f"{stock['seconds'] / run['seconds']:.2f}x",
            "-" if loss is None else f"{loss:.6f}",
            *(f"{run['sent'].get(interface, 0) / 1e6:.2f}" for interface in interfaces),
        )
    lines = []
    if (worst := worst_loss_difference(stock, mics)) is not None:
        lines.append(f"largest relative loss difference in {worst[1]} steps: {worst[0]:.1e}")
    lines.append(
        f"{stock['ranks']} ranks; medians of {stock['steps']} and {mics['steps']} steps, without the first ones"
    )
    return Group(rows, *lines)
