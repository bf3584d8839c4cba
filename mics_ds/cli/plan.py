"""``mics-ds plan``: will a job fit, how fast will it be, what limits it, and on which cluster does it cost least."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer
from rich.console import Group
from rich.table import Table

from ..errors import MicsPlanError
from ..planner import plan as planning
from ..planner.compare import Answer
from ..planner.job import SEQUENCE, Progress, build_job
from ..planner.machine import Link, Machine
from ..planner.model import NAMED
from ..planner.page import check_page, draw
from ..planner.presets import PRESETS, load_machine
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


def _list(wanted: bool) -> None:
    if wanted:
        out.print(listing())
        raise typer.Exit(0)


def _drawable(path: Path | None) -> Path | None:
    """Refuse a page that cannot be drawn, before anything is planned."""
    try:
        if path is not None:
            check_page(path)
    except MicsPlanError as error:
        raise typer.BadParameter(str(error)) from error
    return path


def _in_order(kind: type) -> Any:
    """Parse numbers that are separated by commas, in their order."""

    def parse(text: str) -> list[Any]:
        try:
            found = [kind(word) for word in text.split(",")]
        except ValueError:
            found = [0]
        if not all(0 < number < math.inf for number in found):
            raise typer.BadParameter(f"takes positive numbers with commas, got {text!r}")
        return found

    return parse


def _option(help_text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help_text, **settings)


_GPUS = "For all clusters, or for each of them. Default: a fast domain."
_PAGE = "Draw all of it as FILE.html or FILE.png."
_PRICE = "Dollars per hour of one node, for each cluster."
GLOBAL = _option("Samples per step on all GPUs, in place of --micro-steps.", min=1)


def plan(
    model: Annotated[str, typer.Option(help="Named model, description, HF config.json, or module:function.")] = "",
    cluster: Annotated[list[str] | None, _option("Preset or profile. Give several to compare them.")] = None,
    show_list: Annotated[bool, _option("Show presets and models.", "--list", callback=_list, is_eager=True)] = False,
    gpus: Annotated[Any, _option(_GPUS, parser=_in_order(int), metavar="N,N")] = None,
    price: Annotated[Any, _option(_PRICE, parser=_in_order(float), metavar="$,$")] = None,
    p: Annotated[Any, typer.Option(parser=numbers, metavar="P,P", help="Default: sizes that fit the nodes.")] = None,
    optimizer_states: Annotated[States, typer.Option(help="Values of mics_optimizer_states.")] = "both",
    replica_wire: Annotated[Wire, typer.Option(help="Values of mics_replica_wire.")] = "full",
    ds_config: Annotated[Path | None, _option("DeepSpeed JSON with batch, precision and limits.")] = None,
    sequence: Annotated[int | None, _option(f"Tokens per sample. Assumed: {SEQUENCE}.", min=1)] = None,
    micro_batch: Annotated[int | None, _option("Samples per GPU and micro-step. Default: 1.", min=1)] = None,
    micro_steps: Annotated[int | None, _option("Gradient accumulation steps. Default: 1.", min=1)] = None,
    global_batch: Annotated[int | None, GLOBAL] = None,
    precision: Annotated[Precision | None, _option("Of the weights. Default: bf16.")] = None,
    optimizer: Annotated[Optimizer | None, _option("Default: fusedadam, which DeepSpeed takes for Adam.")] = None,
    checkpointing: Annotated[bool, _option("Activation checkpointing of every layer.", "--checkpointing")] = False,
    offload_optimizer: Annotated[bool, _option("Optimizer states on the host.", "--offload-optimizer")] = False,
    offload_param: Annotated[bool, _option("Parameter shards on the host.", "--offload-param")] = False,
    async_save: Annotated[bool | None, _option("Asynchronous checkpoints.", "--async-save")] = None,
    memory_copies: Annotated[bool | None, _option("Copies of states in memory.", "--memory-copies")] = None,
    activations_gb: Annotated[float | None, _option("Activations per GPU, in place of the estimate.", min=0)] = None,
    held_gb: Annotated[float, _option("Memory per GPU that something else holds.", min=0)] = 0.0,
    compute_s: Annotated[float | None, _option("Measured seconds of compute per micro-step.", min=0)] = None,
    reserve: Annotated[float, _option("Fraction of memory to leave free.", callback=_fraction)] = planning.RESERVE,
    as_json: Annotated[bool, _option("JSON in place of tables.", "--json")] = False,
    parts: Annotated[bool, _option("Memory and time by part as well.", "--parts")] = False,
    scaling: Annotated[Scaling | None, _option("Curves from one node, or the smallest p, to --gpus.")] = None,
    page: Annotated[Path | None, _option(_PAGE, callback=_drawable, metavar="FILE")] = None,
) -> None:
    """Predict memory and step time for each partition size.

    Example: mics-ds plan --model llama-13b --cluster p4d.24xlarge --gpus 64 --checkpointing

    A model is a named one, a description (hidden=4096,layers=32,vocabulary=50257), an HF config.json or its folder, or
    package.module:function that returns a module, or a pair of it and one sample's inputs.

    Exit code: 0 if a partition size fits, 2 if the job makes no sense, 3 if none fits.
    """
    if not model or not cluster:
        raise typer.BadParameter(f"{'--cluster' if model else '--model'} is needed (--list shows what there is)")
    job = {name: value for name, value in locals().items() if name in _JOB}
    states = planning.STATES if optimizer_states == "both" else [optimizer_states]
    wires = planning.WIRES if replica_wire == "all" else [replica_wire]
    keys = {"states": states, "wires": wires, "reserve": reserve}
    ask = Question(model, job, p, keys, scaling or ("weak" if page else None), as_json)
    with exit_with(2, MicsPlanError):
        each = zip(cluster, *_for_each(cluster, gpus=gpus, price=price))
        answers = [ask.of(load_machine(name), count, dollars) for name, count, dollars in each]
        if page:
            draw(page, answers)
            errors.print(f"drew {page}")
    if as_json:
        data = [answer.to_json() for answer in answers]
        out.file.write(json.dumps(data[0] if len(data) == 1 else {"clusters": data}, indent=1) + "\n")
    else:
        show(answers, parts, scaling or "", assumed_sequence=sequence is None)
    raise typer.Exit(0 if any(answer.chosen for answer in answers) else NOTHING_FITS)


_JOB = {
    *("ds_config", "sequence", "micro_batch", "micro_steps", "global_batch", "checkpointing", "offload_optimizer"),
    *("offload_param", "activations_gb", "held_gb", "compute_s", "precision", "optimizer", "async_save"),
    "memory_copies",
}
"""Arguments of ``plan`` that describe the job."""


def _for_each(clusters: Sequence[str], **given: list[Any] | None) -> list[list[Any]]:
    """Return the values of each option, one for each cluster."""
    found = []
    for option, values in given.items():
        values = values or [None]
        if len(values) not in (1, len(clusters)):
            raise typer.BadParameter(f"--{option} takes one value, or one for each of {len(clusters)} clusters")
        found.append(values * (len(clusters) if len(values) == 1 else 1))
    return found


class Question(NamedTuple):
    """Question to the planner, the same for each cluster."""

    model: str
    job: dict[str, Any]
    sizes: Sequence[int] | None
    keys: dict[str, Any]
    """Systems to plan, and the memory to leave free."""
    curves: Scaling | None
    quiet: bool

    def of(self, machine: Machine, gpus: int | None, price: float | None) -> Answer:
        """Return the answer for one cluster; by default for all GPUs of a fast domain."""
        gpus, disable = gpus or machine.domain, self.quiet or not errors.is_terminal
        planning.check_ranks(machine, gpus)
        with ExitStack() as stack:
            job = build_job(self.model, gpus, progress=_layers(stack, disable), **self.job)
        rows = planning.make_plan(machine, job, gpus, self.sizes, **self.keys)
        answer = Answer(machine, job, gpus, tuple(rows), price)
        if self.curves is None:
            return answer
        with progress_bar(disable=disable) as bar:
            points = partial(bar.track, description="scaling")
            strong = self.curves == "strong"
            return answer.with_curves(strong=strong, reserve=self.keys["reserve"], progress=points)


def _layers(stack: ExitStack, disable: bool) -> Progress:
    bar = stack.enter_context(progress_bar(disable=disable))
    task = bar.add_task("running the model on the meta device", total=None)
    return lambda done, total: bar.update(task, completed=done, total=total)


def show(answers: Sequence[Answer], parts: bool, scaling: str, *, assumed_sequence: bool) -> None:
    """Print answers for people: all rows of a single one, or what is chosen on each cluster."""
    model = answers[0].job.model
    if not any(block.activations for block in model.blocks):
        out.print("activations are not known and count nothing: give --activations-gb, or inputs beside the module")
    if assumed_sequence and model.tokens > 1:
        out.print(f"sequences of {model.tokens} tokens are assumed: give --sequence")
    for answer in answers:
        out.print(describe(answer))
        if len(answers) == 1:
            out.print(Group("", rows_table(answer), ""))
        if parts:
            out.print(Group(parts_table(answer.rows), ""))
        if scaling:
            out.print(f"{scaling} scaling")
            for curve in answer.curves.values():
                labelled = tuple(replace(row, label=f"{row.label}, {row.n} GPUs") for row in curve)
                out.print(rows_table(replace(answer, rows=labelled)))
            out.print()
        out.print(("choose " if answer.chosen else "") + answer.reason)
        if len(answers) > 1:
            out.print()
    if len(answers) > 1:
        out.print(comparison(answers))


def listing() -> Group:
    """Return presets and named models as tables."""
    clusters = table("cluster", "node", "host memory", "fast domain", "inside", "network of a node")
    for machine in PRESETS.values():
        node = f"{machine.gpus_per_node} x {machine.memory / 1e9:.0f} GB"
        where = planning.gb(machine.host_memory), f"{machine.domain} GPUs"
        clusters.add_row(machine.name, node, *where, _speed(machine.intra), _speed(machine.inter))
    models = table("model", "layers", "hidden", "parameters")
    for name, model in NAMED.items():
        models.add_row(name, str(model.layers), str(model.hidden), f"{model.model(1).numel / 1e9:.1f} B")
    return Group(clusters, "", models)


def describe(answer: Answer) -> str:
    """Say in two lines what is planned."""
    job, machine, gpus = answer.job, answer.machine, answer.gpus
    used, numel = machine.for_ranks(gpus), job.model.numel
    size = f"{numel / 1e9:.3g} B" if numel >= 1e9 else f"{numel / 1e6:.3g} M"
    micro = f"{job.micro_batch} x {job.micro_steps}"
    domain = f", {used.domain} in a fast domain" if machine.gpus_per_domain else ""
    where = "domain" if machine.gpus_per_domain else "node"
    return (
        f"{job.model.name}: {size} parameters, {job.precision}, {job.optimizer}, {micro} samples per GPU and step"
        f"{f' of {job.model.tokens} tokens' if job.model.tokens > 1 else ''}"
        f"{', activation checkpointing' if job.checkpointing else ''}\n"
        f"{machine.name}: {gpus} GPUs, {used.gpus_per_node} on a node{domain}, {machine.memory / 1e9:.3g} GB each; "
        f"{_speed(machine.intra)} inside a {where}, {_speed(machine.inter)} between nodes"
        f"{f', {len(machine.sweeps)} measured sweeps' if machine.sweeps else ''}"
    )


def _speed(link: Link) -> str:
    return f"{link.bandwidth / 1e9:.3g} GB/s" if math.isfinite(link.bandwidth) else "-"


def _columns(unit: str, first: str, *more: str) -> Table:
    return table(first, "fits", "memory", "host", "s/step", f"{unit}/s/GPU", "TFLOPS", "MFU", *more)


def _cells(row: planning.Row) -> list[str]:
    return [
        "yes" if row.fits else "NO" if row.fits_host else "NO (host)",
        planning.gb(row.memory.peak),
        planning.gb(row.memory.host.peak),
        f"{row.time.total:.3g}",
        f"{row.tokens_per_second:,.4g}",
        f"{row.tflops:.1f}",
        "-" if row.mfu is None else f"{row.mfu:.1%}",
    ]


def _unit(answer: Answer) -> str:
    return "tokens" if answer.job.model.tokens > 1 else "samples"


def rows_table(answer: Answer) -> Table:
    """Return one line for each system."""
    unit = _unit(answer)
    price = [] if answer.price is None else [f"M {unit}/$"]
    made = _columns(unit, "system", *price, "% linear", "limited by")
    for row in answer.rows:
        cost = answer.tokens_per_dollar(row)
        money = [] if cost is None else [f"{cost / 1e6:,.3g}"]
        linear = "-" if row.linear is None else f"{row.linear:.1%}"
        made.add_row(cell(row.label), *_cells(row), *money, linear, planning.LIMITS[row.time.limit])
    return made


def comparison(answers: Sequence[Answer]) -> Table:
    """Return one line for each cluster: the system that is chosen there, or the one that needs the least memory."""
    unit = _unit(answers[0])
    made = _columns(unit, "cluster", "GPUs", f"{unit}/s", "x ZeRO-3", "$/hour", f"M {unit}/$", "system", "limited by")
    for answer in answers:
        row, cost = answer.best, answer.tokens_per_dollar(answer.best)
        money = ["-", "-"] if cost is None else [f"{answer.dollars_per_hour:,.2f}", f"{cost / 1e6:,.3g}"]
        speed = f"{row.tokens_per_second * row.n:,.0f}", f"{answer.rows[0].time.total / row.time.total:.2f}"
        last = cell(row.label), planning.LIMITS[row.time.limit]
        made.add_row(cell(answer.machine.name), *_cells(row), str(answer.gpus), *speed, *money, *last)
    return made


def parts_table(rows: Sequence[planning.Row]) -> Table:
    """Return memory and time of each system by part."""
    made = table("system", "memory by part, GB", "host memory by part, GB", "step by part, s")
    for row in rows:
        memory, host = (
            ", ".join(f"{part} {value / 1e9:.3g}" for part, value in parts.items() if value)
            for parts in (row.memory.parts(), row.memory.host.parts())
        )
        time = ", ".join(f"{part} {value:.3g}" for part, value in row.time.parts().items() if value)
        made.add_row(cell(row.label), memory, host, time)
    return made
