"""``mics-ds calibrate``: measure a cluster for plans and for ``"mics_shard_size": "auto"``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group

from .arguments import LocalRank, numbers, positive
from .output import errors, out, progress_bar, table

if TYPE_CHECKING:
    from ..planner.machine import Machine


def calibrate(
    out_file: Annotated[Path, typer.Option("--out", metavar="FILE", help="Profile to write, on the node of rank 0.")],
    name: Annotated[str, typer.Option(help="Name of the cluster in plans.")] = "calibrated",
    p: Annotated[
        Any, typer.Option(parser=numbers, metavar="P,P", help="Partition sizes. Default: those that fit the nodes.")
    ] = None,
    budget: Annotated[float, typer.Option(callback=positive, metavar="S", help="Seconds for all sweeps.")] = 120.0,
    largest: Annotated[float, typer.Option(metavar="MB", min=0.02, help="Largest buffer.")] = 1073.0,
    hidden: Annotated[int, typer.Option(min=0, help="Width of the layer whose speed is measured; 0: default.")] = 0,
    sequence: Annotated[int, typer.Option(min=1, help="Sequence length of that layer.")] = 1024,
    local_rank: LocalRank = -1,
) -> None:
    """Measure the collectives and the compute of this cluster.

    Run it on all nodes, one rank per GPU: torchrun --nnodes 4 --nproc_per_node 8 ... -m mics_ds calibrate --out c.json

    It runs the collectives of training on the groups that training would use, all of them at once, and one transformer
    layer. Sizes grow until the time of each sweep is used up. Works on gloo and NCCL.
    """
    if "RANK" not in os.environ:
        errors.print("Start this with torchrun or deepspeed on all nodes of the cluster, one rank per GPU.")
        raise typer.Exit(2)
    settings = {"partitions": p, "budget_s": budget, "name": name, "hidden": hidden, "sequence": sequence}
    raise typer.Exit(_measure(out_file, largest * 1e6, settings))


def _measure(path: Path, largest: float, settings: dict[str, Any]) -> int:
    """Measure on all ranks and write on rank 0. Returns the exit code, the same on all ranks. Collective."""
    import torch
    import torch.distributed as dist

    from ..errors import MicsError
    from ..planner import calibrate as measuring

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if cuda else "gloo")
    sizes = [size for size in measuring.SIZES if size <= largest]
    try:
        measuring.check_out(path)
        with progress_bar(disable=dist.get_rank() != 0) as bar:
            task = bar.add_task("calibrating", total=None)

            def progress(done: int, total: int, case: str) -> None:
                bar.update(task, completed=done, total=total, description=case)

            machine = measuring.calibrate(sizes=sizes, progress=progress, **settings)
    except MicsError as error:
        errors.print(f"rank {dist.get_rank()}: {error}")
        return 1
    written = True
    if dist.get_rank() == 0:
        out.print(description(machine))
        try:
            measuring.write(machine, path)
            out.print(f"written to {path}; use it with: mics-ds plan --cluster {path} --model ...")
        except OSError as error:
            errors.print(f"--out {path} cannot be written: {error}")
            written = False
    code = int(measuring.slowest(float(not written)))
    if cuda:
        dist.destroy_process_group()
    return code


def description(machine: Machine) -> Group:
    """Return what was measured, for people."""
    from ..planner.machine import OPERATIONS

    links = table("", "", right=False)
    links.add_row("inside a node", f"{machine.intra.bandwidth / 1e9:.3f} GB/s", f"{machine.intra.latency * 1e6:.0f} us")
    links.add_row("between nodes", f"{machine.inter.bandwidth / 1e9:.4f} GB/s", f"{machine.inter.latency * 1e6:.0f} us")
    links.show_header = False
    speeds = ", ".join(f"{speed / 1e12:.3g} TFLOPS {precision}" for precision, speed in machine.flops.items())
    sweeps = table("collective", "nodes x ranks", "", "smallest", "time", "largest", "time", "GB/s", right=True)
    order = {operation: index for index, operation in enumerate(OPERATIONS)}
    for item in sorted(machine.sweeps, key=lambda item: (order[item.operation], item.form.size, item.staged)):
        size, seconds = item.payload[-1], item.seconds[-1]
        factor = (item.form.size - 1) / item.form.size * (2 if item.operation == "all_reduce" else 1)
        sweeps.add_row(
            item.operation,
            f"{item.form.nodes}x{item.form.per_node}",
            "staged" if item.staged else "",
            f"{item.payload[0] / 1e3:.0f} kB",
            f"{item.seconds[0] * 1e3:.2f} ms",
            f"{size / 1e6:.1f} MB",
            f"{seconds * 1e3:.1f} ms",
            f"{factor * size / seconds / 1e9:.3f}",
        )
    head = f"{machine.name}: {machine.gpus_per_node} ranks per node, {machine.backend}, {speeds}"
    return Group(head, links, sweeps)
