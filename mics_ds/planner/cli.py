"""mics-plan: will it fit, how fast will it be, and what limits it.

    mics-plan --model llama-7b --cluster p4d.24xlarge --gpus 64 --micro-batch 2
    mics-plan --model hidden=4096,layers=32,vocabulary=50257 --cluster cluster.json --gpus 512 --p 8,16 --json
    mics-plan --model path/to/hf/config.json --cluster h200-8x400g --gpus 1024 --checkpointing --plots figures

A model is one of the named ones (--list), a transformer's description, an HF config.json or its folder, or
package.module:function that returns a module, or a pair of it and one sample's inputs. A cluster is a
preset (--list) or a file: the profile that `python -m mics_ds.planner.calibrate` measured, or one written by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..config import parse_ds_json
from ..errors import MicsPlanError
from . import plan as planning
from .machine import PRESETS, Link, Machine, load_machine
from .model import NAMED, Model, parse_transformer
from .workload import ITEMSIZE, OPTIMIZERS, Workload, ZeroSettings, optimizer_kind


def find_model(text: str, sequence: int, precision: str, quiet: bool = True) -> Model:
    """The model that ``--model`` names. Unless ``quiet``, running one on the meta device shows its progress.

    Raises:
        MicsPlanError: there is none, or it cannot be described.
    """
    if text in NAMED:
        return replace(NAMED[text], name=text).model(sequence, ITEMSIZE[precision])
    if "=" in text:
        return parse_transformer(text).model(sequence, ITEMSIZE[precision])
    if Path(text).exists() or ":" in text:
        from .trace import model_from_factory, model_from_hf

        with tqdm(desc="running the model on the meta device", unit="layer", leave=False, disable=quiet) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            if Path(text).exists():
                return model_from_hf(Path(text), sequence, precision, progress)
            return model_from_factory(text, precision, progress)
    raise MicsPlanError(
        f"--model {text!r} is neither a named model, a description, a file nor package.module:function. Named models: "
        f"{', '.join(NAMED)}. A description: hidden=4096,layers=32,vocabulary=50257."
    )


def settings_from_ds(path: Path) -> dict[str, Any]:
    """What a DeepSpeed JSON says of a job.

    Raises:
        MicsPlanError: it cannot be read, or is not for stage 3.
    """
    try:
        data = parse_ds_json(path.read_text())
    except (OSError, ValueError) as error:
        raise MicsPlanError(f"{path} cannot be read as JSON: {error}.") from error
    zero = data.get("zero_optimization") if isinstance(data, Mapping) else None
    if not isinstance(zero, Mapping) or zero.get("stage") != 3:
        raise MicsPlanError(f"{path} is not a DeepSpeed configuration for ZeRO stage 3, which is what is planned.")
    found: dict[str, Any] = {"zero": ZeroSettings.from_ds(zero)}
    switches = {name: (data.get(name) or {}).get("enabled", False) for name in ("bf16", "fp16")}
    on = [name for name, switch in switches.items() if switch is True]
    if on:
        found["precision"] = on[0]
    elif "auto" not in switches.values():
        found["precision"] = "fp32"
    names = {
        "train_micro_batch_size_per_gpu": "micro_batch",
        "gradient_accumulation_steps": "micro_steps",
        "train_batch_size": "global_batch",
    }
    found |= {name: data[key] for key, name in names.items() if isinstance(data.get(key), int)}
    section = data.get("optimizer") or {}
    kind = optimizer_kind(str(section.get("type", "")), bool((section.get("params") or {}).get("torch_adam")))
    if kind in OPTIMIZERS:
        found["optimizer"] = kind
    accumulation = (data.get("data_types") or {}).get("grad_accum_dtype")
    if accumulation in ITEMSIZE:
        found["accumulation_itemsize"] = ITEMSIZE[accumulation]
    return found


def _batch(micro_batch: int | None, micro_steps: int | None, global_batch: int | None, gpus: int) -> dict[str, int]:
    """Micro-batch and micro-steps, one from the other where DeepSpeed would; 1 and 1 if nothing is said.

    Raises:
        MicsPlanError: the global batch cannot be shared evenly.
    """
    if global_batch is None or (micro_batch is not None and micro_steps is not None):
        return {"micro_batch": micro_batch or 1, "micro_steps": micro_steps or 1}
    share = gpus * (micro_batch or micro_steps or 1)
    if global_batch < share or global_batch % share:
        raise MicsPlanError(
            f"A global batch of {global_batch} cannot be shared by {gpus} GPUs with {micro_batch or micro_steps or 1} "
            f"{'samples per micro-batch' if micro_batch else 'micro-steps'}: it must be a multiple of {share}."
        )
    if micro_batch is not None:
        return {"micro_batch": micro_batch, "micro_steps": global_batch // share}
    return {"micro_batch": global_batch // share, "micro_steps": micro_steps or 1}


def build_job(given: argparse.Namespace, gpus: int) -> Workload:
    """The job that the command line describes.

    Raises:
        MicsPlanError: it makes no sense.
    """
    found = settings_from_ds(given.ds_config) if given.ds_config else {}
    for name in ("precision", "micro_batch", "micro_steps", "optimizer"):
        if getattr(given, name) is not None:
            found[name] = getattr(given, name)
    found.setdefault("precision", "bf16")
    if given.global_batch is not None:
        if given.micro_steps is not None:
            raise MicsPlanError("Give --global-batch or --micro-steps, not both: one follows from the other.")
        found.pop("micro_steps", None)
        found["global_batch"] = given.global_batch
        found.setdefault("micro_batch", 1)
    found |= _batch(
        found.pop("micro_batch", None), found.pop("micro_steps", None), found.pop("global_batch", None), gpus
    )
    zero = found.pop("zero", ZeroSettings())
    if given.offload_optimizer:
        zero = replace(zero, offload_optimizer=True)
    if given.offload_param:
        zero = replace(zero, offload_param=True)
    job = Workload(
        model=find_model(given.model, given.sequence, found["precision"], _quiet(given)),
        checkpointing=given.checkpointing,
        zero=zero,
        held_bytes=given.held_gb * 1e9,
        compute_s=given.compute_s,
        **found,
    )
    if given.activations_gb is not None:
        job = replace(job, model=job.model.with_activations(given.activations_gb * 1e9 / job.micro_batch))
    return job


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mics-plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="named model, description, HF config.json, or package.module:function")
    parser.add_argument("--cluster", help="preset or file")
    parser.add_argument("--list", action="store_true", help="show presets and named models")
    parser.add_argument("--gpus", type=int, help="how many (default: one node)")
    parser.add_argument("--p", help="partition sizes to plan, with commas (default: those that fit the nodes)")
    parser.add_argument(
        "--optimizer-states",
        choices=["partition", "world", "both"],
        default="both",
        help="which values of mics_optimizer_states to plan (default %(default)s)",
    )
    job = parser.add_argument_group("the job")
    job.add_argument("--ds-config", type=Path, help="a DeepSpeed JSON to take batch, precision and limits from")
    job.add_argument("--sequence", type=int, default=2048, help="tokens per sample (default %(default)s)")
    job.add_argument("--micro-batch", type=int, help="samples per GPU and micro-step (default 1)")
    job.add_argument("--micro-steps", type=int, help="gradient accumulation steps (default 1)")
    job.add_argument("--global-batch", type=int, help="samples per step on all GPUs, in place of --micro-steps")
    job.add_argument("--precision", choices=list(ITEMSIZE), help="default bf16")
    job.add_argument(
        "--optimizer", choices=list(OPTIMIZERS), help="default fusedadam, which DeepSpeed takes for Adam and AdamW"
    )
    job.add_argument("--checkpointing", action="store_true", help="activation checkpointing of every layer")
    job.add_argument("--offload-optimizer", action="store_true", help="optimizer states on the host")
    job.add_argument("--offload-param", action="store_true", help="parameter shards on the host")
    job.add_argument("--activations-gb", type=float, help="activations per GPU, in place of the estimate")
    job.add_argument("--held-gb", type=float, default=0.0, help="held per GPU by something else")
    job.add_argument("--compute-s", type=float, help="measured seconds of compute per micro-step")
    job.add_argument("--reserve", type=float, default=planning.RESERVE, help="of memory, left free (%(default)s)")
    out = parser.add_argument_group("the output")
    out.add_argument("--json", action="store_true", help="JSON in place of the table")
    out.add_argument("--parts", action="store_true", help="memory and time by part as well")
    out.add_argument("--scaling", choices=["weak", "strong"], help="curves from one node, or the smallest p, to --gpus")
    out.add_argument("--plots", type=Path, metavar="FOLDER", help="draw throughput against p, scaling and memory")
    given = parser.parse_args(arguments)
    if given.list:
        return given
    for name in ("model", "cluster"):
        if getattr(given, name) is None:
            parser.error(f"--{name} is needed (--list shows what there is)")
    for name in ("sequence", "micro_batch", "micro_steps", "global_batch", "gpus"):
        value = getattr(given, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    for name in ("held_gb", "activations_gb", "compute_s"):
        value = getattr(given, name)
        if value is not None and not value >= 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative, got {value}")
    if not 0 <= given.reserve < 1:
        parser.error(f"--reserve is a fraction of the memory, at least 0 and less than 1, got {given.reserve}")
    try:
        given.sizes = [int(word) for word in given.p.split(",")] if given.p else None
    except ValueError:
        parser.error(f"--p takes numbers with commas, got {given.p!r}")
    return given


def describe(machine: Machine, job: Workload, gpus: int) -> str:
    """What is planned, in two lines."""
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
    return f"{link.bandwidth / 1e9:.3g} GB/s"


def render_parts(rows: Sequence[planning.Row]) -> str:
    """Memory and time by part."""
    lines = []
    for row in rows:
        memory = ", ".join(f"{part} {value / 1e9:.3g}" for part, value in row.memory.parts().items() if value)
        time = ", ".join(f"{part} {value:.3g}" for part, value in row.time.parts().items() if value)
        lines.append(f"{row.label}\n  memory (GB)  {memory}\n  step (s)     {time}")
    return "\n".join(lines)


def rank_counts(machine: Machine, gpus: int, p: int, samples: int | None = None) -> list[int]:
    """Numbers of GPUs for a curve: whole nodes and whole partition groups, doubling, and at the end all of them.

    Args:
        samples: of a micro-step on one GPU, if all counts have to share one step's samples evenly (strong scaling).
    """
    first = math.lcm(min(gpus, machine.gpus_per_node), p)
    counts, n = [], first
    while n < gpus:
        if samples is None or (samples * gpus) % n == 0:
            counts.append(n)
        n *= 2
    return [*counts, gpus]


def _quiet(given: argparse.Namespace) -> bool:
    """Whether nobody watches."""
    return given.json or not sys.stderr.isatty()


def run(given: argparse.Namespace) -> int:
    machine = load_machine(given.cluster)
    gpus = given.gpus or machine.gpus_per_node
    planning.check_ranks(machine, gpus)
    job = build_job(given, gpus)
    states = planning.STATES if given.optimizer_states == "both" else [given.optimizer_states]
    rows = planning.make_plan(machine, job, gpus, given.sizes, states=states, reserve=given.reserve)
    chosen = planning.choose(rows)
    reason = planning.explain(rows, chosen)
    curves: dict[str, list[planning.Row]] = {}
    if given.scaling or given.plots:
        best = chosen or min(rows[1:], key=lambda row: row.memory.peak)
        strong = given.scaling == "strong"
        counts = rank_counts(machine, gpus, best.p, job.micro_steps if strong else None)

        def progress(points: list) -> Any:
            return tqdm(points, desc="scaling", leave=False, disable=_quiet(given))

        if strong:
            # keep the work of a step as it is on all GPUs
            job = replace(job, micro_steps=job.micro_steps * gpus // counts[0])
        how: dict[str, Any] = {"strong": strong, "world_states": best.system.world_states, "reserve": given.reserve}
        curves = planning.scaling(machine, job, [None, best.p], counts, **how, progress=progress)
    if given.json:
        data = {
            "model": job.model.name,
            "parameters": job.model.numel,
            "cluster": machine.name,
            "gpus": gpus,
            "chosen_p": chosen.p if chosen else None,
            "chosen_optimizer_states": chosen.states if chosen else None,
            "reason": reason,
            "rows": [row.to_json() for row in rows],
            "scaling": {name: [row.to_json() for row in curve] for name, curve in curves.items()},
        }
        print(json.dumps(data, indent=1))
    else:
        if not any(block.activations for block in job.model.blocks):
            print("activations are not known and count nothing: give --activations-gb, or inputs beside the module\n")
        print(describe(machine, job, gpus), planning.render(rows), sep="\n\n", end="\n\n")
        if given.parts:
            print(render_parts(rows) + "\n")
        if given.scaling:
            print(f"{given.scaling} scaling")
            for curve in curves.values():
                print(planning.render([replace(row, label=f"{row.label}, {row.n} GPUs") for row in curve]))
            print()
        print(("choose " if chosen else "") + reason)
    if given.plots:
        from .plots import draw_all

        for path in draw_all(given.plots, rows, curves, f"{job.model.name} on {machine.name}"):
            print(f"drew {path}", file=sys.stderr)
    return 0 if chosen else 3


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 0; 2 if what was asked makes no sense; 3 if no partition size fits."""
    given = parse_arguments(arguments)
    if given.list:
        print("clusters")
        for machine in PRESETS.values():
            print(
                f"  {machine.name:<15} {machine.gpus_per_node} x {machine.memory / 1e9:.0f} GB, "
                f"{_speed(machine.intra)} inside, {_speed(machine.inter)} between nodes"
            )
        print("models")
        for name, model in NAMED.items():
            print(
                f"  {name:<15} {model.layers} layers of {model.hidden}, {model.model(1).numel / 1e9:.1f} B parameters"
            )
        return 0
    try:
        return run(given)
    except MicsPlanError as error:
        print(f"mics-plan: {error}", file=sys.stderr)
        return 2


def command() -> int:
    """:func:`main`, for a shell: whoever reads the output may stop reading it."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        return 1
    return code


if __name__ == "__main__":
    sys.exit(command())
