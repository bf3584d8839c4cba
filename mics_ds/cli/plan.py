"""``mics-ds plan``: will a job fit, how fast will it be, and what limits it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Group
from rich.table import Table

from ..errors import MicsPlanError
from ..planner import plan as planning
from ..planner.job import Progress, build_job, rank_counts
from ..planner.machine import PRESETS, Link, Machine, load_machine
from ..planner.model import NAMED
from ..planner.workload import Workload
from .arguments import numbers
from .output import cell, errors, exit_with, out, progress_bar, table

Precision = Literal["bf16", "fp16", "fp32"]
Optimizer = Literal["adamw", "adam", "fusedadam", "deepspeedcpuadam", "adagrad", "lion", "sgd", "sgd_momentum"]
States = Literal["partition", "world", "both"]
Wire = Literal["full", "bf16", "int8", "int4", "all"]
Scaling = Literal["weak", "strong"]
NOTHING_FITS = 3


def _fraction(value: float) -> float:
    if not 0 <= value < 1:
        raise typer.BadParameter(f"is a fraction of the memory, at least 0 and less than 1, got {value:g}")
    return value


def _option(help_text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help_text, **settings)


GLOBAL = _option("Samples per step on all GPUs, in place of --micro-steps.", min=1)


def plan(
    model: Annotated[str, typer.Option(help="Named model, description, HF config.json, or module:function.")] = "",
    cluster: Annotated[str, typer.Option(help="Preset, or the file of a calibrated or hand-written profile.")] = "",
    show_list: Annotated[bool, typer.Option("--list", help="Show presets and named models.")] = False,
    gpus: Annotated[int | None, typer.Option(min=1, help="Default: one node.")] = None,
    p: Annotated[Any, typer.Option(parser=numbers, metavar="P,P", help="Default: sizes that fit the nodes.")] = None,
    optimizer_states: Annotated[States, typer.Option(help="Values of mics_optimizer_states.")] = "both",
    replica_wire: Annotated[Wire, typer.Option(help="Values of mics_replica_wire.")] = "full",
    ds_config: Annotated[Path | None, _option("DeepSpeed JSON with batch, precision and limits.")] = None,
    sequence: Annotated[int, _option("Tokens per sample.", min=1)] = 2048,
    micro_batch: Annotated[int | None, _option("Samples per GPU and micro-step. Default: 1.", min=1)] = None,
    micro_steps: Annotated[int | None, _option("Gradient accumulation steps. Default: 1.", min=1)] = None,
    global_batch: Annotated[int | None, GLOBAL] = None,
    precision: Annotated[Precision | None, _option("Of the weights. Default: bf16.")] = None,
    optimizer: Annotated[Optimizer | None, _option("Default: fusedadam, which DeepSpeed takes for Adam.")] = None,
    checkpointing: Annotated[bool, _option("Activation checkpointing of every layer.", "--checkpointing")] = False,
    offload_optimizer: Annotated[bool, _option("Optimizer states on the host.", "--offload-optimizer")] = False,
    offload_param: Annotated[bool, _option("Parameter shards on the host.", "--offload-param")] = False,
    activations_gb: Annotated[float | None, _option("Activations per GPU, in place of the estimate.", min=0)] = None,
    held_gb: Annotated[float, _option("Memory per GPU that something else holds.", min=0)] = 0.0,
    compute_s: Annotated[float | None, _option("Measured seconds of compute per micro-step.", min=0)] = None,
    reserve: Annotated[float, _option("Fraction of memory to leave free.", callback=_fraction)] = planning.RESERVE,
    as_json: Annotated[bool, _option("JSON in place of tables.", "--json")] = False,
    parts: Annotated[bool, _option("Memory and time by part as well.", "--parts")] = False,
    scaling: Annotated[Scaling | None, _option("Curves from one node, or the smallest p, to --gpus.")] = None,
    plots: Annotated[Path | None, _option("Folder for plots.", metavar="FOLDER")] = None,
) -> None:
    """Predict memory and step time for each partition size.

    Example: mics-ds plan --model llama-13b --cluster p4d.24xlarge --gpus 64 --checkpointing

    A model is a named one, a description (hidden=4096,layers=32,vocabulary=50257), an HF config.json or its folder, or
    package.module:function that returns a module, or a pair of it and one sample's inputs.

    Exit code: 0 if a partition size fits, 2 if the job makes no sense, 3 if none fits.
    """
    if show_list:
        out.print(listing())
        raise typer.Exit(0)
    for option, value in (("--model", model), ("--cluster", cluster)):
        if not value:
            raise typer.BadParameter(f"{option} is needed (--list shows what there is)")
    job = {name: value for name, value in locals().items() if name in _JOB}
    states = planning.STATES if optimizer_states == "both" else [optimizer_states]
    wires = planning.WIRES if replica_wire == "all" else [replica_wire]
    with exit_with(2, MicsPlanError):
        found = Plan(cluster, gpus, model, job, p, {"states": states, "wires": wires}, reserve, quiet=as_json)
        if scaling or plots:
            found.add_curves(strong=scaling == "strong")
    if as_json:
        out.file.write(json.dumps(found.to_json(), indent=1) + "\n")
    else:
        found.show(parts, scaling or "")
    if plots:
        from ..planner.plots import draw_all

        for path in draw_all(plots, found.rows, found.curves, f"{found.job.model.name} on {found.machine.name}"):
            errors.print(f"drew {path}")
    raise typer.Exit(0 if found.chosen else NOTHING_FITS)


_JOB = {
    *("ds_config", "sequence", "micro_batch", "micro_steps", "global_batch", "checkpointing", "offload_optimizer"),
    *("offload_param", "activations_gb", "held_gb", "compute_s", "precision", "optimizer"),
}
"""Arguments of ``plan`` that describe the job."""


class Plan:
    """Question to the planner, and the rows that answer it."""

    def __init__(
        self,
        cluster: str,
        gpus: int | None,
        model: str,
        job: Mapping[str, Any],
        sizes: Sequence[int] | None,
        keys: Mapping[str, Sequence[str]],
        reserve: float,
        *,
        quiet: bool,
    ) -> None:
        self._quiet, self._reserve = quiet or not errors.is_terminal, reserve
        self.machine = load_machine(cluster)
        self.gpus = gpus or self.machine.gpus_per_node
        planning.check_ranks(self.machine, self.gpus)
        with ExitStack() as stack:
            self.job = build_job(model, self.gpus, progress=self._layers(stack), **job)
        self.rows = planning.make_plan(self.machine, self.job, self.gpus, sizes, **keys, reserve=reserve)
        self.chosen = planning.choose(self.rows)
        self.reason = planning.explain(self.rows, self.chosen)
        self.curves: dict[str, list[planning.Row]] = {}

    def _layers(self, stack: ExitStack) -> Progress:
        bar = stack.enter_context(progress_bar(disable=self._quiet))
        task = bar.add_task("running the model on the meta device", total=None)
        return lambda done, total: bar.update(task, completed=done, total=total)

    def add_curves(self, *, strong: bool) -> None:
        """Plan ZeRO-3 and the best row on fewer GPUs as well."""
        best = self.chosen or min(self.rows[1:], key=lambda row: row.memory.peak)
        counts = rank_counts(self.machine, self.gpus, best.p, self.job.micro_steps if strong else None)
        job = self.job
        if strong:
            # keep the work of a step as it is on all GPUs
            job = replace(job, micro_steps=job.micro_steps * self.gpus // counts[0])
        with progress_bar(disable=self._quiet) as bar:
            self.curves = planning.scaling(
                self.machine,
                job,
                [None, best.p],
                counts,
                strong=strong,
                world_states=best.system.world_states,
                wire=best.system.wire,
                reserve=self._reserve,
                progress=lambda points: bar.track(points, description="scaling"),
            )

    def to_json(self) -> dict[str, Any]:
        """Return all of it for other programs."""
        return {
            "model": self.job.model.name,
            "parameters": self.job.model.numel,
            "cluster": self.machine.name,
            "gpus": self.gpus,
            "chosen_p": self.chosen.p if self.chosen else None,
            "chosen_optimizer_states": self.chosen.states if self.chosen else None,
            "chosen_replica_wire": self.chosen.system.wire if self.chosen else None,
            "reason": self.reason,
            "rows": [row.to_json() for row in self.rows],
            "scaling": {name: [row.to_json() for row in curve] for name, curve in self.curves.items()},
        }

    def show(self, parts: bool, scaling: str) -> None:
        """Print all of it for people."""
        if not any(block.activations for block in self.job.model.blocks):
            out.print("activations are not known and count nothing: give --activations-gb, or inputs beside the module")
        out.print(Group(describe(self.machine, self.job, self.gpus), "", rows_table(self.rows), ""))
        if parts:
            out.print(Group(parts_table(self.rows), ""))
        if scaling:
            out.print(f"{scaling} scaling")
            for curve in self.curves.values():
                out.print(rows_table([replace(row, label=f"{row.label}, {row.n} GPUs") for row in curve]))
            out.print()
        out.print(("choose " if self.chosen else "") + self.reason)


def listing() -> Group:
    """Return presets and named models as tables."""
    clusters = table("cluster", "node", "inside", "between nodes")
    for machine in PRESETS.values():
        node = f"{machine.gpus_per_node} x {machine.memory / 1e9:.0f} GB"
        clusters.add_row(machine.name, node, _speed(machine.intra), _speed(machine.inter))
    models = table("model", "layers", "hidden", "parameters")
    for name, model in NAMED.items():
        models.add_row(name, str(model.layers), str(model.hidden), f"{model.model(1).numel / 1e9:.1f} B")
    return Group(clusters, "", models)


def describe(machine: Machine, job: Workload, gpus: int) -> str:
    """Say in two lines what is planned."""
    numel = job.model.numel
    size = f"{numel / 1e9:.3g} B" if numel >= 1e9 else f"{numel / 1e6:.3g} M"
    micro = f"{job.micro_batch} x {job.micro_steps}"
    return (
        f"{job.model.name}: {size} parameters, {job.precision}, {job.optimizer}, {micro} samples per GPU and step"
        f"{f' of {job.model.tokens} tokens' if job.model.tokens > 1 else ''}"
        f"{', activation checkpointing' if job.checkpointing else ''}\n"
        f"{machine.name}: {gpus} GPUs, {min(gpus, machine.gpus_per_node)} on a node, {machine.memory / 1e9:.3g} GB "
        f"each; {_speed(machine.intra)} inside a node, {_speed(machine.inter)} between nodes"
        f"{f', {len(machine.sweeps)} measured sweeps' if machine.sweeps else ''}"
    )


def _speed(link: Link) -> str:
    return f"{link.bandwidth / 1e9:.3g} GB/s" if math.isfinite(link.bandwidth) else "-"


def rows_table(rows: Sequence[planning.Row]) -> Table:
    """Return one line for each system."""
    unit = "tokens/s" if rows and rows[0].job.model.tokens > 1 else "samples/s"
    made = table(
        *("system", "fits", "memory", "host", "s/step", f"{unit}/GPU", "TFLOPS", "MFU", "% linear", "limited by")
    )
    for row in rows:
        made.add_row(
            cell(row.label),
            "yes" if row.fits else "NO",
            planning.gb(row.memory.peak),
            planning.gb(row.memory.host) if row.memory.host else "-",
            f"{row.time.total:.3g}",
            f"{row.tokens_per_second:,.4g}",
            f"{row.tflops:.1f}",
            "-" if row.mfu is None else f"{row.mfu:.1%}",
            "-" if row.linear is None else f"{row.linear:.1%}",
            planning.LIMITS[row.time.limit],
        )
    return made


def parts_table(rows: Sequence[planning.Row]) -> Table:
    """Return memory and time of each system by part."""
    made = table("system", "memory by part, GB", "step by part, s")
    for row in rows:
        memory = ", ".join(f"{part} {value / 1e9:.3g}" for part, value in row.memory.parts().items() if value)
        time = ", ".join(f"{part} {value:.3g}" for part, value in row.time.parts().items() if value)
        made.add_row(cell(row.label), memory, time)
    return made
