"""Compare the ways that MiCS chooses at start with the fastest ones: on emulated clusters, collectives only.

    python scripts/bench/ways.py [--shape 2x2:100mbit:4 ...] [--json FILE]

For each cluster, rate of its links and partition size: MiCS chooses as it does at the start of a job. Then every way is
timed much longer, in turns, on the same groups. A choice is right if its gathers and its hop 1 are each the fastest, or
within 3% of it. Needs root, for network namespaces.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["DS_ACCELERATOR"] = "cpu"
if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import torch.distributed as dist
from ab_gpt import table
from torch import nn

from bench.formula import Shape
from bench.job import EmulatedJob
from bench.runner import Session, run
from mics_ds.comm.groups import build_groups
from mics_ds.comm.job import current_job
from mics_ds.config import MicsConfig
from mics_ds.planner import measure, race

SHAPES = (
    *("2x2:25mbit:4", "2x2:25mbit:2", "2x2:100mbit:4", "2x2:none:4"),
    *("2x4:25mbit:8", "2x4:100mbit:8", "2x4:100mbit:4", "2x4:none:8"),
    *("4x2:25mbit:8", "4x2:25mbit:4", "4x2:100mbit:8", "4x2:100mbit:4", "4x2:100mbit:2", "4x2:none:8", "4x2:none:4"),
    *("8x2:25mbit:16", "8x2:25mbit:4", "8x2:100mbit:16", "8x2:100mbit:8", "8x2:none:16"),
)
"""Cluster, rate of its links, and partition size: inside a node, over some nodes, and over all."""
TOLERANCE = 0.03
REFERENCE_S = 12.0
MOST_ROUNDS = 41
CONFIG = {"zero_optimization": {"stage3_param_persistence_threshold": 5000}}


def model() -> nn.Module:
    """Return six layers in three sizes, 2.4 MB in all."""
    return nn.Sequential(*(nn.Linear(256, width) for width in (256, 256, 256, 512, 512, 640)))


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    dist.barrier()
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def in_a_rank(
    sizes: Sequence[int], folder: str, rank: int, session: Session, interface: str, say: Callable[[str | None], None]
) -> list[dict[str, Any]]:
    """Choose ways, and time all of them, for each partition size. Rank 0's records are used."""
    del session, interface
    os.environ.update(XDG_CACHE_HOME=folder, MICS_DS_MEASURE_SECONDS="2")
    found = []
    for p in sizes:
        say(f"p = {p}")
        groups = build_groups(MicsConfig(p), dist.group.WORLD)
        demand = measure.demand_of(model(), CONFIG, groups)
        choose = functools.partial(measure.choose_ways, groups, demand)
        with mock.patch.object(measure, "describe", wraps=measure.describe) as described:
            first_s, chosen = seconds_of(choose)
        current_job().ways.clear()  # as in a process that starts anew
        later_s, again = seconds_of(choose)
        assert again.ways == chosen.ways
        found.append(
            {
                "p": p,
                "chosen": [chosen.ways.gather, chosen.ways.scatter],
                "measured": described.call_args.args[0] if described.called else None,  # None: too slow
                "first_s": first_s,
                "later_s": later_s,
                **reference(groups, demand, say),
            }
        )
    return found if rank == 0 else []


def reference(groups: Any, demand: measure.Demand, say: Callable[[str | None], None]) -> dict[str, dict[str, float]]:
    """Return median seconds of one pass over the model, for all ways of gathers and of hop 1, in turns."""
    clock = race.Clock(groups.full)
    kinds: dict[str, dict[str, Callable[[], Any]]] = {"gathers": {}, "scatters": {}}
    for ways in groups.choices:
        for kind, name, prepare, shapes in (
            ("gathers", ways.gather, measure.gather, demand.gathers),
            ("scatters", ways.scatter, measure.scatter, demand.scatters),
        ):
            works = [(prepare(groups, ways, demand.dtype, shape.nbytes), shape.times) for shape in shapes]
            kinds[kind][name] = functools.partial(one_pass, works)
    medians: dict[str, dict[str, float]] = {}
    for kind, passes in kinds.items():
        until_s = clock.elapsed + REFERENCE_S / 2
        rounds: list[list[float]] = []
        while len(rounds) < 3 or (clock.elapsed < until_s and len(rounds) < MOST_ROUNDS):
            rounds.append([clock.time(work) for work in passes.values()])
            say(None)
        # The first round warms up.
        medians[kind] = {
            name: statistics.median(taken) / measure.AT_ONCE for name, taken in zip(passes, zip(*rounds[1:]))
        }
    return medians


def one_pass(works: Sequence[tuple[Callable[[], Any], int]]) -> None:
    for work, times in works:
        for _ in range(times):
            work()


def excess(record: dict[str, Any]) -> list[float]:
    """Return by how much gathers and hop 1 take longer than in the fastest way."""
    pairs = zip(record["chosen"], (record["gathers"], record["scatters"]))
    return [times[chosen] / min(times.values()) - 1 for chosen, times in pairs]


def row(record: dict[str, Any]) -> tuple[str, ...]:
    """Return one line of the table."""
    gathers, scatters = ({name: f"{1e3 * value:.0f}" for name, value in record[kind].items()} for kind in KINDS)
    more = max(excess(record))
    return (
        record["cluster"],
        record["rate"],
        str(record["p"]),
        f"{gathers.get('hierarchical', '-')} / {gathers['flat']}",
        record["chosen"][0],
        " / ".join(scatters.get(name, "-") for name in SCATTERS),
        record["chosen"][1],
        f"{100 * more:.0f}%" if more > TOLERANCE else "",
        f"{record['first_s']:.2f}",
        f"{record['later_s']:.3f}",
    )


KINDS = ("gathers", "scatters")
SCATTERS = tuple(f"{where}, by {method}" for where in ("hierarchical", "flat") for method in ("all_to_all", "native"))
HEAD = ("cluster", "rate", "p", "gather ms: staged / flat", "chosen", "hop 1 ms", "chosen", "slower", "s", "s later")


def tell(where: str, text: str | None) -> None:
    if text:
        print(f"{where}: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", default=SHAPES, metavar="NODESxRANKS:RATE:P")
    parser.add_argument("--json", type=Path, help="file for one record per line")
    given = parser.parse_args(arguments)
    asked = [tuple(item.split(":")) for item in given.shape]
    records = []
    for (cluster, rate), items in itertools.groupby(asked, key=lambda item: item[:2]):
        with tempfile.TemporaryDirectory() as folder:
            work = functools.partial(in_a_rank, [int(p) for _, _, p in items], folder)
            limit = None if rate == "none" else rate
            session = Session(Shape.parse(cluster), limit, EmulatedJob(), (), 0, 0, 0, 300.0, work=work)
            by_rank = run(session, functools.partial(tell, f"{cluster} {rate}"))
        records += [{"cluster": cluster, "rate": rate, **record} for record in by_rank[0]]
    print(table([HEAD, *map(row, records)]))
    right = [max(excess(record)) <= TOLERANCE for record in records]
    print(f"{sum(right)} of {len(right)} choices are the fastest, or within {TOLERANCE:.0%} of it")
    print(f"longest choice {max(record['first_s'] for record in records):.2f} s")
    if given.json is not None:
        given.json.write_text("".join(json.dumps(record) + "\n" for record in records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
