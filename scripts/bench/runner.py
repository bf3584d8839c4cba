"""Run several systems side by side in the same ranks on an emulated cluster, and compare them.

    python scripts/benchmark.py --shape 2x2 --rate 100mbit --systems zero3,hsdp:2,mics:2 --out results.jsonl

One process imports everything and forks the ranks; each moves into its node's network namespace before it
starts any thread. All systems are built once and then take turns, round by round, so that whatever else the
machine does hits all of them alike. A step's time is that of the slowest rank, between two barriers.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import json
import multiprocessing
import os
import resource
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from ab_gpt import table
from local_ranks import LocalRanks, RankError

import mics_ds

from . import formula, systems
from .cluster import Cluster, exit_on_sigterm, sent_bytes
from .formula import Shape
from .job import EmulatedJob, GPTJob, Job, model_bytes
from .systems import Spec

# Building engines needs these. Imported before forking, they are there in every rank; otherwise each pays.
PRELOAD = ("torch._dynamo", "torch._inductor.compile_fx", "torch.distributed.fsdp", "torch.distributed.tensor")
PORT = 29400  # in a namespace of its own, any port is free
GRACE_S = 3.0  # between the first failure and asking the other ranks where they are
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Session:
    """What every rank is to do."""

    shape: Shape
    rate: str | None
    job: Job
    specs: tuple[Spec, ...]
    rounds: int
    steps: int
    warmup: int
    timeout_s: float
    timelines: tuple[Spec, ...] = ()
    work: Callable[..., Any] | None = None
    """What each rank does in place of measuring: called like :func:`_measure`."""


@dataclass
class Measured:
    """One system on one rank: a number per measured step, in order. Losses include the warm-up."""

    seconds: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    """Bytes per step that this rank's node sent over its card, by round; empty on all but the node's first rank."""
    losses: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """User and system time of the process, with all its threads."""
    held_bytes: int = 0
    """Bytes of tensors the system keeps between steps."""
    timeline: list[dict[str, Any]] = field(default_factory=list)


# --------------------------------------------------------------------------------------------------
# In a rank


def _serve(session: Session, cluster: Cluster, port: int, rank: int, folder: Path, pipe: Connection) -> None:
    """Life of a rank."""
    _prepare_process(rank, session, cluster, port)
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], port, session.shape.world, rank == 0, timedelta(seconds=session.timeout_s)
    )
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=session.shape.world,
        timeout=timedelta(seconds=session.timeout_s),
    )
    # Compiling DeepSpeed's shared-memory extension takes a minute, and would bypass our network.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", dist_init_required=False)

    def say(text: str | None) -> None:
        if rank == 0:
            pipe.send(("progress", text))

    pipe.send(("result", (session.work or _measure)(rank, session, cluster.interface, say)))
    dist.barrier()


def _prepare_process(rank: int, session: Session, cluster: Cluster, port: int) -> None:
    import ctypes

    # The parent cleans up on Ctrl-C. If it is killed outright, ranks must not stay behind.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    node = session.shape.node_of(rank)
    cluster.enter_node(node)
    local, per_node = rank % session.shape.per_node, session.shape.per_node
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(session.shape.world),
        LOCAL_RANK=str(local),
        LOCAL_SIZE=str(per_node),  # the deepspeed launcher's word
        LOCAL_WORLD_SIZE=str(per_node),  # torchrun's
        CROSS_RANK=str(node),
        MASTER_ADDR=cluster.address(0),
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME=cluster.interface,
    )
    # A system is what its keys say, in two stages wherever that is possible, as the formulas assume.
    os.environ.setdefault("MICS_DS_MEASURE_SECONDS", "0")
    torch.set_num_threads(1)


def _measure(rank: int, session: Session, interface: str, say: Callable[[str | None], None]) -> list[Measured]:
    """Build all systems, warm them up, let them take turns. One result per system.

    ``say(None)`` after each step tells the parent that we are alive; it is outside what is measured.
    """
    results = [Measured() for _ in session.specs]
    data = [session.job.data(rank) for _ in session.specs]
    built: dict[int, systems.System] = {}
    # hpZ leaves its groups in a global of DeepSpeed, and every engine built after it uses them too: build it last.
    for index in sorted(range(len(session.specs)), key=lambda index: session.specs[index].kind == "hpz"):
        before = systems.held_bytes()
        built[index] = systems.build(session.specs[index], session.job, session.shape)
        for _ in range(session.warmup):
            results[index].losses.append(built[index].train_step(data[index]))
            say(None)
        built[index].settle()
        results[index].held_bytes = systems.held_bytes() - before
        say(f"{session.specs[index]} is built and warm")
    turns = [(spec, built[index], results[index], data[index]) for index, spec in enumerate(session.specs)]
    counts = rank % session.shape.per_node == 0 and interface != "lo"
    for number in range(session.rounds):
        for spec, system, result, batches in turns:
            dist.barrier()
            sent = sent_bytes(interface) if counts else 0
            for step in range(session.steps):
                dist.barrier()
                start, cpu = time.perf_counter(), time.process_time()
                result.losses.append(system.train_step(batches))
                if step == session.steps - 1:
                    system.settle()  # so that nothing of this round is done in somebody else's
                result.seconds.append(time.perf_counter() - start)
                result.cpu_seconds.append(time.process_time() - cpu)
                dist.barrier()
                say(None)
            if counts:
                result.sent.append((sent_bytes(interface) - sent) / session.steps)
            recent = statistics.median(result.seconds[-session.steps :])
            say(f"round {number + 1}/{session.rounds}  {spec}: {recent:.3f} s per step")
    for spec, system, result, batches in turns:
        if spec in session.timelines:
            dist.barrier()
            result.timeline = _record_timeline(system, batches) if rank == 0 else []
            if rank != 0:
                system.train_step(batches)
            dist.barrier()
    for system in built.values():
        system.close()
    return results


def _record_timeline(system: systems.System, batches: Any) -> list[dict[str, Any]]:
    """One more step under the profiler: compute, MiCS ranges and collectives, with seconds since its start."""
    from torch._C._profiler import _ExperimentalConfig  # has no public name
    from torch.profiler import ProfilerActivity, profile, record_function

    # Communication may run on threads of its own, which a profiler leaves out by default.
    everywhere = _ExperimentalConfig(profile_all_threads=True)
    with (
        profile(activities=[ProfilerActivity.CPU], experimental_config=everywhere) as profiler,
        record_function("step"),
    ):
        system.train_step(batches)
    events = [
        event
        for event in profiler.events()
        if event.name == "step" or event.name.startswith(("compute ", "mics", "gloo:", "c10d::"))
    ]
    origin = next(event.time_range.start for event in events if event.name == "step")
    return [
        {
            "name": event.name,
            "thread": event.thread,
            "start": (event.time_range.start - origin) / 1e6,
            "end": (event.time_range.end - origin) / 1e6,
        }
        for event in events
    ]


# --------------------------------------------------------------------------------------------------
# In the parent


class Ranks(LocalRanks):
    """Forked ranks of one session; ``with`` makes sure that none survives it."""

    def __init__(self, session: Session, cluster: Cluster) -> None:
        self._silence_s = session.timeout_s
        port = PORT if cluster.isolated else _free_port()
        serve = functools.partial(_serve, session, cluster, port)
        super().__init__(session.shape.world, serve, multiprocessing.get_context("fork"), grace_s=GRACE_S)

    def results(self, say: Callable[[str], None]) -> list[Any]:
        """Wait for all ranks. Returns their results, by rank.

        Raises:
            RankError: a rank failed, or nothing was heard of any for longer than the session's timeout.
        """
        return self.collect(self._silence_s, since_last_news=True, say=say, what="the benchmark")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(session: Session, say: Callable[[str], None]) -> list[Any]:
    """Measure on a cluster of its own. Returns the results by rank, then by system."""
    with Cluster(session.shape.nodes, session.rate) as cluster, Ranks(session, cluster) as ranks:
        return ranks.results(say)


def merge(session: Session, by_rank: list[list[Measured]]) -> list[dict[str, Any]]:
    """One record per system from those of all ranks: slowest rank, busiest card, mean loss."""
    records = []
    size = model_bytes(session.job.model())
    emulated = Cluster(session.shape.nodes, session.rate).isolated
    samples = session.job.micro_steps * session.job.micro_batch
    for index, spec in enumerate(session.specs):
        mine = [results[index] for results in by_rank]
        p = spec.partition_size(session.shape)
        ideal = formula.nic_bytes(spec.kind, size, session.job.micro_steps, session.shape, p, spec.staged)
        seconds = [max(step) for step in zip(*(item.seconds for item in mine))]
        cards = [item.sent for item in mine if item.sent]
        sent = max(statistics.median(card) for card in cards) if cards else None
        limit = None
        if session.rate is not None and emulated and session.job.compute_s is not None:
            # DeepSpeed keeps the last layer from forward to backward and the first one from backward to the next
            # forward, and so may send less than the formula, which gathers every layer twice.
            needed = ideal if sent is None else min(ideal, sent)
            limit = formula.bound(needed, formula.parse_rate(session.rate), session.job.compute_s)
        records.append(
            {
                "system": str(spec),
                "kind": spec.kind,
                "p": p,
                "shape": str(session.shape),
                "nodes": session.shape.nodes,
                "per_node": session.shape.per_node,
                "rate": session.rate if emulated else None,
                "emulated_network": emulated,
                "job": session.job.name,
                **session.job.settings(),
                "optimizer": session.job.optimizer,
                "bucket_layers": session.job.bucket_layers,
                "micro_steps": session.job.micro_steps,
                "micro_batch": session.job.micro_batch,
                "model_bytes": size,
                "seconds": seconds,
                "median_s": statistics.median(seconds),
                "cpu_s": statistics.median(map(statistics.fmean, zip(*(item.cpu_seconds for item in mine)))),
                "samples_per_s_per_rank": samples / statistics.median(seconds),
                "nic_bytes": sent,
                "nic_bytes_formula": ideal,
                "bound_overlapped_s": limit.overlapped if limit else None,
                "bound_serial_s": limit.serial if limit else None,
                "held_bytes": max(item.held_bytes for item in mine),
                "losses": [statistics.fmean(step) for step in zip(*(item.losses for item in mine))],
                "timeline": mine[0].timeline,
            }
        )
    return records


def compare(records: list[dict[str, Any]]) -> None:
    """Add to each record its ratios and its loss difference to the first. Ratios above 1: faster than the other."""
    by_kind = {kind: [item for item in records if item["kind"] == kind] for kind in ("zero3", "hsdp")}
    for record in records:
        hsdp = by_kind["hsdp"]
        # HSDP of the same partition size if there is one, as any other would compare two things at once.
        same = [item for item in hsdp if item["p"] == record["p"]]
        reference = {
            "zero3": by_kind["zero3"][0] if by_kind["zero3"] else None,
            "hsdp": min(same or hsdp, key=lambda item: item["median_s"], default=None),
        }
        for kind, other in reference.items():
            record[f"speedup_over_{kind}"] = other["median_s"] / record["median_s"] if other else None
            record[f"cpu_over_{kind}"] = record["cpu_s"] / other["cpu_s"] if other and other["cpu_s"] else None
        record["loss_difference"] = max(abs(a - b) for a, b in zip(records[0]["losses"], record["losses"], strict=True))


def render(records: list[dict[str, Any]]) -> str:
    """The comparison as a table."""

    def show(value: float | None, digits: int = 2, unit: str = "") -> str:
        return "-" if value is None else f"{value:.{digits}f}{unit}"

    def megabytes(value: float | None) -> str:
        return show(None if value is None else value / 1e6)

    head = (
        "system",
        "s/step",
        "min-max",
        "x zero3",
        "x hsdp",
        "CPU s",
        "of hsdp",
        "NIC MB",
        "formula",
        "bound overlap/serial",
    )
    rows: list[tuple[str, ...]] = [(*head, "floor s", "held MB", "last loss", "loss diff")]
    for record in records:
        limits = (record["bound_overlapped_s"], record["bound_serial_s"])
        rows.append(
            (
                record["system"],
                show(record["median_s"], 3),
                f"{min(record['seconds']):.2f}-{max(record['seconds']):.2f}",
                show(record["speedup_over_zero3"]),
                show(record["speedup_over_hsdp"]),
                show(record["cpu_s"], 3),
                show(record["cpu_over_hsdp"]),
                megabytes(record["nic_bytes"]),
                megabytes(record["nic_bytes_formula"]),
                "-" if limits[0] is None else f"{limits[0]:.2f}/{limits[1]:.2f}",
                show(record.get("floor_s"), 3),
                megabytes(record["held_bytes"]),
                show(record["losses"][-1], 6),
                f"{record['loss_difference']:.1e}",
            )
        )
    return table(rows)


NOTES = """\
s/step: median over all measured steps, slowest rank; x zero3, x hsdp: how many times faster than those (the fastest
HSDP of the same partition size where measured). CPU s: user and system time of a rank per step, mean over ranks, median
over steps; of hsdp: as a multiple of that of the same HSDP. NIC MB: what the busiest node sent per step; formula: what
rings that gather every layer twice per micro-step have to send. bound: the smaller of the two at the link's rate and
the compute, overlapped or one after the other. floor: the same run with unshaped links, where the processor decides.
held MB: tensors one rank keeps between steps."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmark.py",
        description=__doc__ + (systems.__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", default="2x2", help="NODESxRANKS, several with commas (default %(default)s)")
    parser.add_argument("--rate", default="100mbit", help="of every link, both ways, or 'none' (default %(default)s)")
    parser.add_argument("--systems", default="zero3,hsdp:2,mics:2", help="with commas (default %(default)s)")
    parser.add_argument(
        "--mics", action="append", default=[], metavar="p=N[,KEY=VALUE...]", help="one more MiCS; may be repeated"
    )
    parser.add_argument("--job", choices=["emulated", "gpt"], default="emulated")
    parser.add_argument("--hidden", type=int, help="width of the model (512; gpt: 128)")
    parser.add_argument("--layers", type=int, help="number of layers (6; gpt: 4)")
    parser.add_argument("--micro-steps", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--layer-ms", type=float, default=10.0, help="pretended compute of a layer, forward")
    parser.add_argument("--bias", action="store_true", help="give the layers of the emulated job biases")
    parser.add_argument("--optimizer", choices=["sgd", "adamw"], default="sgd")
    parser.add_argument("--bucket-layers", default="2", help="layers in DeepSpeed's reduce bucket, or 'default'")
    parser.add_argument("--rounds", type=int, default=3, help="how often the systems take turns (default %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="steps per system and round (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before measuring (default %(default)s)")
    parser.add_argument("--floor", action="store_true", help="measure with unshaped links as well")
    parser.add_argument("--timeline", action="append", default=[], metavar="SYSTEM", help="record one step of a system")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest loss difference (default %(default)s)")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds of silence that count as a hang")
    parser.add_argument("--out", type=Path, help="append one line of JSON per system to this file")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw everything in the --out file into a folder")
    given = parser.parse_args(arguments)
    for name in ("micro_steps", "micro_batch", "rounds", "steps", "hidden", "layers"):
        value = getattr(given, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if given.plots and not given.out:
        parser.error("--plots needs --out, the file to draw from")
    if given.plots and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plots needs matplotlib: pip install matplotlib")
    try:
        given.bucket_layers = None if given.bucket_layers == "default" else int(given.bucket_layers)
        given.shapes = [Shape.parse(text) for text in given.shape.split(",")]
        given.rate = None if given.rate == "none" else given.rate
        if given.rate is not None:
            formula.parse_rate(given.rate)
        texts = [text for text in given.systems.split(",") if text]
        texts += ["mics:" + text.replace(",", ":") for text in given.mics]
        given.specs = tuple(Spec.parse(text) for text in texts)
        given.timelines = tuple(Spec.parse(text) for text in given.timeline)
        for shape in given.shapes:
            for spec in given.specs:  # a size that does not divide the ranks is known before anything starts
                formula.nic_bytes(spec.kind, 1, 1, shape, spec.partition_size(shape))
                if shape.world % spec.partition_size(shape):
                    raise ValueError(f"{spec}: the partition size must divide the {shape.world} ranks of {shape}")
    except ValueError as error:
        parser.error(str(error))
    if not given.specs:
        parser.error("there is no system to measure")
    missing = [str(spec) for spec in given.timelines if spec not in given.specs]
    if missing:
        parser.error(f"--timeline names systems that are not measured: {', '.join(missing)}")
    return given


def _job(given: argparse.Namespace) -> Job:
    sizes = {"hidden": given.hidden, "depth": given.layers}
    common: dict[str, Any] = {
        name: getattr(given, name) for name in ("micro_steps", "micro_batch", "optimizer", "bucket_layers")
    }
    common |= {name: value for name, value in sizes.items() if value is not None}
    return (
        GPTJob(**common) if given.job == "gpt" else EmulatedJob(layer_s=given.layer_ms / 1e3, bias=given.bias, **common)
    )


def main(arguments: list[str] | None = None) -> int:
    given = parse_arguments(arguments)
    exit_on_sigterm()
    torch.set_num_threads(1)
    for name in PRELOAD:
        importlib.import_module(name)
    began = time.monotonic()
    job, worst = _job(given), 0.0

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", flush=True)

    for shape in given.shapes:
        session = Session(
            shape,
            given.rate,
            job,
            given.specs,
            given.rounds,
            given.steps,
            given.warmup,
            given.timeout,
            given.timelines,
        )
        say(
            f"{shape}: {job.name} model of {model_bytes(job.model()) / 1e6:.1f} MB, {job.micro_steps} micro-steps, "
            f"links {session.rate or 'unshaped'}"
        )
        load = os.getloadavg()[0]
        try:
            records = merge(session, run(session, say))
            if given.floor:
                say("the same with unshaped links")
                floor = dataclasses.replace(session, rate=None, timelines=())
                for record, other in zip(records, merge(floor, run(floor, say))):
                    record["floor_s"] = other["median_s"]
        except RankError as error:
            print(error, file=sys.stderr, flush=True)
            return 1
        compare(records)
        print(f"\n{shape}, {job.name}, {session.rate or 'unshaped'}, load {load:.1f} at the start\n{render(records)}\n")
        worst = max(worst, *(record["loss_difference"] for record in records))
        if given.out:
            _append(given.out, records, load)
    print(NOTES)
    if given.plots:
        from .plots import draw_all

        for path in draw_all(given.out, given.plots):
            say(f"drew {path}")
    if worst > given.tolerance:
        print(f"losses differ by {worst:.1e}, more than {given.tolerance:g}", file=sys.stderr)
        return 1
    print(f"losses agree: largest difference {worst:.1e}")
    return 0


def _append(path: Path, records: list[dict[str, Any]], load: float) -> None:
    about = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "mics_ds": mics_ds.__version__,
        "cores": os.cpu_count(),
        "load_at_start": load,
        "peak_rss_of_a_rank_kb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for record in records:
            file.write(json.dumps({**about, **record}) + "\n")
