"""``mics-ds check``: does MiCS train like stock ZeRO-3 on these devices, with these versions?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .arguments import LocalRank, numbers, positive
from .output import cell, errors, out

if TYPE_CHECKING:
    from ..check.report import Result

LAUNCHED = "RANK"
CPU_RANKS = 4
DEFAULT_LIMIT_S = 120.0


def check(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(help="Run only checks whose name has all comma-separated words of one of these: parity,fp32"),
    ] = None,
    only: Annotated[bool, typer.Option("--only", hidden=True)] = False,
    show_list: Annotated[bool, typer.Option("--list", help="List the checks and end.")] = False,
    partition_sizes: Annotated[
        Any,
        typer.Option(parser=numbers, metavar="P,P", help="Partition sizes. Default: 1, the ranks of a node, and all."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints that all ranks see. Default: a temporary one.")
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the results to this file too.")] = None,
    timeout: Annotated[
        float, typer.Option(metavar="S", callback=positive, help="Seconds for each check.")
    ] = DEFAULT_LIMIT_S,
    ranks: Annotated[int | None, typer.Option(min=1, help="Ranks to start where no launcher did.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what DeepSpeed and mics_ds log.")] = False,
    local_rank: LocalRank = -1,
) -> None:
    """Train small networks as stock ZeRO-3 and as MiCS, and compare.

    Compares losses and parameters, counts collectives and bytes, saves and loads checkpoints, and looks for races.
    Takes about two minutes. Run it under your launcher, or alone: it then starts a rank per GPU, or four on a CPU.

    Exit code of every rank: 0 if all is well, 1 if a check failed on any rank, 2 if the call was wrong.
    """
    launched, sizes = LAUNCHED in os.environ, partition_sizes or ()
    _refuse_launch(launched, ranks)
    n = int(os.environ["WORLD_SIZE"]) if launched else ranks or local_ranks()
    speaks = os.environ.get(LAUNCHED, "0") == "0"
    if problem := wrong_sizes(sizes, n):
        if speaks:
            errors.print(problem)
        raise typer.Exit(2)
    if show_list:
        if speaks:
            print_list(words or [], sizes, n)
        raise typer.Exit(0)
    if launched:
        raise typer.Exit(_run(sizes, tuple(words or ()), folder, json, timeout, verbose))
    from ..check.local import run_ranks

    out.print(f"starting {n} rank{'s' * (n > 1)} on this machine")
    raise typer.Exit(run_ranks(n, ["-m", "mics_ds", *(context.obj or ())]))


def _refuse_launch(launched: bool, ranks: int | None) -> None:
    """Refuse a start that would run other ranks than the user means."""
    if ranks is not None and os.environ.get("WORLD_SIZE", str(ranks)) != str(ranks):
        raise typer.BadParameter("--ranks is for a start without a launcher; here the launcher says how many")
    if not launched and int(os.environ.get("SLURM_NTASKS", os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))) > 1:
        errors.print(
            "Started by srun or mpirun, every process would take itself for the only one. Set RANK, LOCAL_RANK, "
            "WORLD_SIZE, MASTER_ADDR and MASTER_PORT as your jobs do, or start one torchrun on each node."
        )
        raise typer.Exit(2)


def _run(*asked: Any) -> int:
    """Run the checks on this rank. Returns the exit code."""
    from ..check.ranks import LostError
    from ..check.session import Request, Session

    try:
        return Session(Request(*asked), show).run()
    except LostError as error:
        errors.print(f"rank {os.environ[LAUNCHED]}: {error}")
        return 1


def local_ranks() -> int:
    """Return how many ranks make sense on this machine alone."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    return CPU_RANKS if accelerator.device_name() == "cpu" else max(1, accelerator.device_count())


def wrong_sizes(sizes: Sequence[int], n: int) -> str:
    """Say which of these partition sizes do not divide n ranks; empty if all do."""
    wrong = [size for size in sizes if n % size]
    if not wrong:
        return ""
    divisors = ", ".join(str(size) for size in range(1, n + 1) if n % size == 0)
    return f"--partition-sizes: {', '.join(map(str, wrong))} must divide the {n} ranks. Choose from {divisors}."


def print_list(words: Sequence[str], sizes: Sequence[int], n: int) -> None:
    """Print the names of the checks that n ranks on nodes like this one would run."""
    from ..check.checks import Surroundings, all_checks, supported_dtypes

    on_a_node = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", n)))
    here = Surroundings(tuple(rank // on_a_node for rank in range(n)), supported_dtypes())
    for item in all_checks(here, sizes):
        if item.matches(words):
            out.print(item.name + (f"  (skipped: {item.why_not})" if item.why_not else ""))


def show(result: Result, name_width: int) -> None:
    """Print the line of one check as it ends; lines stand below each other like rows of one table."""
    line = Table.grid(padding=(0, 2, 0, 0))
    line.add_column(width=7)
    line.add_column(width=name_width)
    line.add_column(width=7, justify="right")
    line.add_column(overflow="fold")
    line.add_row(cell(result.state), cell(result.name), cell(f"{result.seconds:.1f} s"), cell(result.summary()))
    out.print(line)
