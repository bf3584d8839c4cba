"""Compare the planner with measured steps on emulated clusters.

    python scripts/bench/planning.py calibrate --shape 2x2,4x2,8x2 --rate 100mbit,50mbit --out profiles
    python scripts/benchmark.py --shape 4x2 --rate 100mbit --systems zero3,mics:2,mics:4 ... --out measured.jsonl
    python scripts/bench/planning.py compare --measured measured.jsonl --profiles profiles

``calibrate`` measures every cluster the way a user would (mics_ds.planner.calibrate): collectives and compute, no
training step. ``compare`` predicts the step times of the benchmark from those profiles. Two constants of the host,
seconds per gather or reduce-scatter and per step, are fitted on every third measurement; the others are predictions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Before torch is imported: ranks are forked, and forking wants a process with one thread.
    for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[_name] = "1"
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["MICS_DS_LOG_LEVEL"] = os.environ.get("MICS_DS_LOG_LEVEL", "WARNING")
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from bench.formula import Shape
from bench.job import EmulatedJob
from bench.systems import Spec, deepspeed_config
from mics_ds.cli.calibrate import description
from mics_ds.cli.output import rendered
from mics_ds.planner import plan as planning
from mics_ds.planner.machine import Machine
from mics_ds.planner.model import Block, Model, Unit
from mics_ds.planner.presets import load_machine
from mics_ds.planner.timeline import Scheme
from mics_ds.planner.workload import Workload, ZeroSettings

WIRE = "mics_replica_wire"
STRIDE = 3
"""Every third measurement is fitted on."""


def profile_path(folder: Path, shape: str, rate: str) -> Path:
    return folder / f"{shape}-{rate}.json"


def calibrate_all(shapes: Sequence[str], rates: Sequence[str], budget: float, folder: Path) -> None:
    """Write one profile per cluster."""
    import torch

    from bench.runner import Session, run
    from mics_ds.planner import calibrate

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    for rate in rates:
        for text in shapes:
            shape, path = Shape.parse(text), profile_path(folder, text, rate)

            def work(rank: int, session: Session, interface: str, say: Any, path: Path = path, text: str = text) -> str:
                machine = calibrate.calibrate(
                    # up to the whole model of the benchmark, and a little more
                    sizes=[1 << power for power in range(14, 25, 2)],
                    budget_s=budget,
                    name=f"emulated {text} at {session.rate}",
                )
                if rank == 0:
                    calibrate.write(machine, path)
                return rendered(description(machine))

            plan = Session(shape, None if rate == "none" else rate, EmulatedJob(), (), 0, 0, 0, 300.0, work=work)
            print(run(plan, lambda text: print(text, flush=True))[0], flush=True)


@dataclass(frozen=True)
class Measurement:
    """One system on one cluster."""

    record: dict[str, Any]
    machine: Machine

    @property
    def seconds(self) -> float:
        return self.record["median_s"]

    @property
    def cluster(self) -> str:
        return f"{self.record['shape']} {self.record['rate']}"

    @property
    def n(self) -> int:
        return self.record["nodes"] * self.record["per_node"]

    @property
    def spec(self) -> Spec:
        return Spec.parse(self.record["system"])

    @property
    def wire(self) -> str:
        return self.spec.options.get(WIRE, "full")

    @property
    def is_flat(self) -> bool:
        """Return whether the system was told to use one stage only."""
        return bool(self.spec.options.keys() - {WIRE})

    @property
    def label(self) -> str:
        more = ", flat" * self.is_flat + f", {self.wire} wire" * (self.wire != "full")
        return "ZeRO-3" if self.spec.kind == "zero3" else f"MiCS p={self.record['p']}{more}"

    def job(self) -> Workload:
        record = self.record
        numel = record["hidden"] ** 2
        emulated = EmulatedJob(record["hidden"], record["layers"], record["micro_steps"], record["micro_batch"])
        shape = Shape.parse(record["shape"])
        zero = ZeroSettings.from_ds(deepspeed_config(self.spec, emulated, shape, numel)["zero_optimization"])
        sizes = (numel, record["hidden"]) if record.get("bias") else (numel,)
        model = Model("emulated", (Block((Unit(sizes, 1.0),), record["layers"]),))
        compute = record["layers"] * 3 * record["layer_s"]
        optimizer = record.get("optimizer", "sgd")
        return Workload(
            model, record["micro_batch"], record["micro_steps"], "fp32", False, optimizer, zero, compute_s=compute
        )

    def predict(self, constants: tuple[float, float]) -> planning.Row:
        machine = replace(self.machine, issue_overhead=constants[0], step_overhead=constants[1])
        job = self.job()
        if self.spec.kind == "zero3":
            system = planning.zero3(machine, job)
        elif self.is_flat:
            system = Scheme(self.record["p"], wire=self.wire)
        else:
            system = planning.mics(machine, job, self.n, self.record["p"], wire=self.wire)
        return planning.predict(machine, job, system, self.n)


def load(measured: Path, profiles: Path) -> list[Measurement]:
    """Return the measurements of clusters that have a profile, in the order of the file."""
    found = []
    for line in measured.read_text().splitlines():
        record = json.loads(line)
        path = profile_path(profiles, record["shape"], record["rate"])
        if record["kind"] in ("zero3", "mics") and path.is_file():
            found.append(Measurement(record, load_machine(str(path))))
    return found


def fit(measurements: Sequence[Measurement]) -> tuple[float, float]:
    """Return the two constants of the host that give the least mean squared relative error.

    A step is linear in both as long as they change nothing about what is waited for, which is nearly so; a few rounds
    of least squares around the last values find them.
    """
    constants = (0.0, 0.0)
    for _ in range(4):
        rows = []
        step = (1e-4, 1e-3)
        for item in measurements:
            base = item.predict(constants).time.total
            slopes = tuple(
                (item.predict(_moved(constants, index, step[index])).time.total - base) / step[index]
                for index in (0, 1)
            )
            rows.append((slopes[0] / item.seconds, slopes[1] / item.seconds, (item.seconds - base) / item.seconds))
        a11, a12 = sum(a * a for a, _, _ in rows), sum(a * b for a, b, _ in rows)
        a22 = sum(b * b for _, b, _ in rows)
        b1, b2 = sum(a * c for a, _, c in rows), sum(b * c for _, b, c in rows)
        determinant = a11 * a22 - a12 * a12
        first = constants[0] + (b1 * a22 - b2 * a12) / determinant
        second = constants[1] + (a11 * b2 - a12 * b1) / determinant
        constants = (max(first, 0.0), max(second, 0.0))
    return constants


def _moved(constants: tuple[float, float], index: int, by: float) -> tuple[float, float]:
    return (constants[0] + by, constants[1]) if index == 0 else (constants[0], constants[1] + by)


def by_cluster(measurements: Sequence[Measurement]) -> Iterator[tuple[str, list[Measurement]]]:
    for name in dict.fromkeys(item.cluster for item in measurements):
        yield name, [item for item in measurements if item.cluster == name]


def compare(measurements: Sequence[Measurement]) -> str:
    """Return the comparison in Markdown."""
    constants = fit(measurements[::STRIDE])
    lines = ["| cluster | system | measured, s | spread | predicted | error | |", "|---|---|---|---|---|---|---|"]
    errors: dict[bool, list[float]] = {True: [], False: []}
    for index, item in enumerate(measurements):
        total, fitted = item.predict(constants).time.total, index % STRIDE == 0
        errors[fitted].append(abs(total / item.seconds - 1))
        spread = f"{min(item.record['seconds']):.2f}-{max(item.record['seconds']):.2f}"
        lines.append(
            f"| {item.cluster} | {item.label} | {item.seconds:.3f} | {spread} | {total:.3f} | "
            f"{total / item.seconds - 1:+.1%} | {'fitted' if fitted else ''} |"
        )
    lines += [
        "",
        f"Constants: {constants[0] * 1e3:.2f} ms per gather or reduce-scatter, {constants[1] * 1e3:.1f} ms per step.",
    ]
    for fitted, words in ((False, "predicted"), (True, "fitted on")):
        values = errors[fitted]
        if values:
            lines.append(
                f"{len(values)} {words}: median error {statistics.median(values):.1%}, largest {max(values):.1%}."
            )
    lines += ["", "| cluster | p by speed, measured | predicted | auto | |", "|---|---|---|---|---|"]
    for name, members in by_cluster(measurements):
        ours = [item for item in members if item.spec.kind == "mics" and not item.spec.options]
        measured = sorted(ours, key=lambda item: item.seconds)
        predicted = sorted(ours, key=lambda item: item.predict(constants).time.total)
        order = [[item.record["p"] for item in items] for items in (measured, predicted)]
        machine = replace(ours[0].machine, issue_overhead=constants[0], step_overhead=constants[1])
        rows = planning.make_plan(machine, ours[0].job(), ours[0].n)
        chosen = planning.choose([row for row in rows if row.p in order[0]])
        shown = [" < ".join(f"{item.record['p']} ({item.seconds:.2f})" for item in measured)]
        shown.append(" < ".join(f"{item.record['p']} ({item.predict(constants).time.total:.2f})" for item in predicted))
        verdict = "right" if order[0] == order[1] else "differs"
        lines.append(f"| {name} | {shown[0]} | {shown[1]} | p = {chosen.p if chosen else '-'} | {verdict} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("calibrate", help="make a profile of each cluster")
    measure.add_argument("--shape", default="2x2,4x2,8x2")
    measure.add_argument("--rate", default="100mbit,50mbit")
    measure.add_argument("--budget", type=float, default=120.0, help="seconds per cluster (default %(default)s)")
    measure.add_argument("--out", type=Path, required=True, help="folder for the profiles")
    check = commands.add_parser("compare", help="predict what was measured")
    check.add_argument("--measured", type=Path, required=True, help="records of scripts/benchmark.py")
    check.add_argument("--profiles", type=Path, required=True)
    given = parser.parse_args(arguments)
    if given.command == "calibrate":
        calibrate_all(given.shape.split(","), given.rate.split(","), given.budget, given.out)
        return 0
    found = load(given.measured, given.profiles)
    if not found:
        print(f"no cluster of {given.measured} has a profile in {given.profiles}", file=sys.stderr)
        return 1
    print(compare(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
