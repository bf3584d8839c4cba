"""The entry point of ``mics-ds``: the list of its subcommands."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from .. import __version__
from . import ab, calibrate, check, checkpoints, doctor, plan, replicas
from .arguments import LocalRank

BEFORE, RUN, CHECKPOINTS = "Before a job", "Train and compare", "Checkpoints and memory"

COMMANDS = {
    BEFORE: (plan.plan, doctor.doctor, check.check, calibrate.calibrate),
    RUN: (ab.ab, replicas.replicas),
    CHECKPOINTS: (checkpoints.reshape, checkpoints.export, checkpoints.guard, checkpoints.memory),
}
_FOREIGN = {"ignore_unknown_options": True, "allow_interspersed_args": False}
"""Settings of a subcommand whose arguments are a user's command."""
_TAKE_COMMANDS = (ab.ab, replicas.replicas)


class GroupedHelp(TyperGroup):
    """Lists subcommands by what they are for, as ``git --help`` does."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for purpose, functions in COMMANDS.items():
            with formatter.section(purpose):
                names = [function.__name__ for function in functions]
                formatter.write_dl([(name, self.commands[name].get_short_help_str(100)) for name in names])


app = typer.Typer(
    cls=GroupedHelp,
    name="mics-ds",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _command in (_function for _functions in COMMANDS.values() for _function in _functions):
    app.command(context_settings=_FOREIGN if _command in _TAKE_COMMANDS else None)(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mics-ds {__version__}")
        raise typer.Exit


@app.callback()
def _group(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
    local_rank: LocalRank = -1,
) -> None:
    """MiCS for DeepSpeed: plan, check and compare jobs, and work on their checkpoints.

    `mics-ds COMMAND --help` describes a command. Launchers start a
    command as `-m mics_ds COMMAND`: torchrun --nproc_per_node 8 -m mics_ds check.
    """


def run(arguments: Sequence[str]) -> int:
    """Run one command. Returns its exit code."""
    try:
        app(args=list(arguments), prog_name="mics-ds", obj=tuple(arguments))
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and end the process."""
    code = run(sys.argv[1:] if arguments is None else arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    if "RANK" in os.environ:
        # A collective that hangs would keep the rank alive, and gloo's threads may abort an orderly end.
        os._exit(code)
    sys.exit(code)
