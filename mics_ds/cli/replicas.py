"""``mics-ds replicas``: replicas that come and go, on one machine."""

from __future__ import annotations

from typing import Annotated

import typer

from .output import errors, out


def replicas(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND", help="The command that starts one replica.")],
    number: Annotated[int, typer.Option("--replicas", "-n", min=1, help="Replicas to start.")] = 2,
    min_replicas: Annotated[int, typer.Option("--min", min=1, help="Replicas without which training waits.")] = 1,
    restarts: Annotated[int, typer.Option(min=0, help="How often a replica that dies is started again.")] = 10,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of each replica. Default: up to the command.")] = None,
) -> None:
    """Start a lighthouse and several replicas of a job on this machine.

    Example: mics-ds replicas -n 4 --gpus 2 -- torchrun --nproc_per_node 2 train.py --deepspeed_config ds_config.json

    The JSON needs "mics_replicas": {"membership": "torchft"} and mics_shard_size set to the ranks of one replica. A
    replica that dies is started again and gets its states from the others. {replica} and {port} in the command stand
    for the replica's number and a free port; torchrun gets a port of its own without that.

    For several nodes, start torchft_lighthouse once and one job per replica: docs/replicas.md has a Slurm job array
    and Kubernetes.

    Exit code: 0 if a replica has done its work.
    """
    from ..errors import MicsConfigError
    from ..replicas.launcher import launch

    try:
        code = launch(command, number, min_replicas, restarts, gpus, announce=lambda text: out.print(text))
    except MicsConfigError as error:
        errors.print(str(error))
        raise typer.Exit(1) from error
    raise typer.Exit(code)
