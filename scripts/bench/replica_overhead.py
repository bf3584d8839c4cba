"""Measure the cost of replicas that come and go without failures, and the time that a replica takes to join.

    python -m bench.replica_overhead [--pairs 3] [--heal]      (in scripts/)

Runs the same training with managed replicas and as one job by turns, and compares medians of steps. With ``--heal`` a
replica with about 1 GB of states per rank is killed and comes back, and its log says how long the parts took.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from pathlib import Path

from bench.replica_jobs import Training, running
from mics_ds.comm import sizes

FIRST = 5
"""Steps that are left out: connections, the first cut of units."""


def median_step(training: Training) -> float:
    """Return the median seconds of a step on the first rank."""
    with running(training, join_timeout_s=60) as jobs:
        jobs.wait(300, restart=False)
        lines = [line for line in jobs.records() if line["rank"] == line["replica"] == 0 and line["step"] >= FIRST]
    return statistics.median(line["seconds"] for line in lines)


def compare(pairs: int, replicas: int, ranks: int, sleep_s: float, steps: int) -> None:
    """Print the medians of each pair, and the median ratio."""
    ratios = []
    for pair in range(pairs):
        found = {}
        for managed in (True, False) if pair % 2 else (False, True):
            folder = tempfile.mkdtemp(prefix="replica-overhead-")
            training = Training(
                folder,
                replicas,
                ranks,
                steps=steps,
                managed=managed,
                min=replicas,
                sleep_s=sleep_s,
                width=256,
                unit_bytes=sizes.ON_CPUS.unit,
            )
            found[managed] = median_step(training)
        ratios.append(found[True] / found[False])
        print(
            f"one job {1e3 * found[False]:.1f} ms, managed {1e3 * found[True]:.1f} ms, ratio {ratios[-1]:.4f}",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.4f}")


def heal() -> None:
    """Print how long a replica takes to come back."""
    training = Training(tempfile.mkdtemp(prefix="replica-heal-"), 2, 1, steps=10**9, layers=5, width=4096, timeout_s=30)
    with running(training) as jobs:
        deadline = time.monotonic() + 300
        while sum(line["step"] >= 2 for line in jobs.records()) < 2:
            assert time.monotonic() < deadline, jobs.logs()
            time.sleep(0.1)
        jobs.kill(1)
        killed = time.time()
        while not (back := [line for line in jobs.records() if line["generation"] == 1]):
            assert time.monotonic() < deadline, jobs.logs()
            jobs.restart_failed()
            time.sleep(0.1)
        log = (Path(training.folder) / "log-1-1-0").read_text()
        alone = next(line for line in jobs.records() if line["replica"] == 0 and line["time"] > killed)
        print(re.findall(r"continues from a sibling.*", log))
        print(
            f"killed, then a step of the other after {alone['time'] - killed:.1f} s; first step of the new one, with "
            f"the states, {back[0]['seconds']:.1f} s; it is committed {back[0]['time'] - killed:.1f} s after the kill"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--sleep", type=float, default=0.15, help="seconds that a forward pass takes besides")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--heal", action="store_true")
    arguments = parser.parse_args()
    if arguments.heal:
        heal()
    else:
        compare(arguments.pairs, arguments.replicas, arguments.ranks, arguments.sleep, arguments.steps)


if __name__ == "__main__":
    main()
