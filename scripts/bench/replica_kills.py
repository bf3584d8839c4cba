"""Kills ranks and replicas of a training at seeded moments, and compares what was committed with a reference.

    python -m bench.replica_kills --kills 50 --seed 1          (in scripts/)

Each kill waits until all replicas take part, aims at a phase of a step (or at nothing, at a random time), and measures
how many steps survivors lose and how long they take to the next one that they commit. The replica is started again.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.replica_jobs import PHASES, Jobs, Training, WrongStepError, committed, compare_with_reference, running

ANY_TIME = "any time"
LIMIT_S = 60.0


class Watch:
    """The newest record of each rank."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._offsets: dict[Path, int] = {}
        self.lines: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
        """Records by replica, generation and rank."""

    def look(self) -> None:
        for path in Path(self._jobs.training.folder).glob("record-*.jsonl"):
            _, replica, generation, rank = path.stem.split("-")
            with open(path) as file:
                file.seek(self._offsets.get(path, 0))
                text = file.read()
            complete, newline, _ = text.rpartition("\n")
            self._offsets[path] = self._offsets.get(path, 0) + len((complete + newline).encode())
            found = self.lines.setdefault((int(replica), int(generation), int(rank)), [])
            found += [json.loads(line) for line in complete.splitlines()]

    def living(self, replica: int) -> list[list[dict[str, Any]]]:
        generation, ranks = self._jobs.generation[replica], self._jobs.training.ranks
        return [self.lines.get((replica, generation, rank), []) for rank in range(ranks)]

    def members(self, replica: int) -> int:
        """Return the replicas in the last step that all ranks of a replica have committed."""
        last = [next((line for line in reversed(lines) if not line["lost"]), None) for lines in self.living(replica)]
        return min(line["members"] if line else 0 for line in last)

    def committed_since(self, replica: int, moment: float) -> list[dict[str, Any]] | None:
        """Return each rank's first committed step after a moment, or ``None`` if a rank has none."""
        first = [
            next((line for line in lines if line["time"] > moment and not line["lost"]), None)
            for lines in self.living(replica)
        ]
        return None if None in first else first  # type: ignore[return-value]

    def lost_since(self, replica: int, moment: float, until: float) -> int:
        return max(
            sum(line["lost"] and moment < line["time"] <= until for line in lines) for lines in self.living(replica)
        )


class Killer:
    """One training and what was done to it."""

    def __init__(self, jobs: Jobs, seed: int) -> None:
        self.jobs, self.watch, self.random = jobs, Watch(jobs), random.Random(seed)
        self.results: list[dict[str, Any]] = []

    def wait(self, reached: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not reached():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not after {LIMIT_S} s\n{self.jobs.logs()}")
            time.sleep(0.02)
            self.watch.look()

    def all_take_part(self) -> bool:
        self.jobs.restart_failed()
        count = self.jobs.training.replicas
        return all(self.watch.members(replica) == count for replica in range(count))

    def kill_one(self, number: int, phases: list[str]) -> None:
        self.wait(self.all_take_part, f"all replicas before kill {number}")
        training = self.jobs.training
        phase = self.random.choice(phases)
        victims = [self.random.randrange(training.replicas)]
        if training.replicas > 2 and self.random.random() < 0.1:
            victims.append((victims[0] + 1) % training.replicas)
        whole = self.random.random() < 0.5
        moment = self.strike(phase, victims, whole)

        def living() -> list[int]:
            return [replica for replica in range(training.replicas) if not self.jobs.has_failed(replica)]

        def went_on() -> bool:
            self.jobs.end_rest_of_failed()  # a second victim may die a little later
            return all(self.watch.committed_since(replica, moment) for replica in living())

        self.wait(went_on, f"survivors of kill {number} ({phase}, {victims})")
        survivors = living()
        costs = []
        for replica in survivors:
            first = self.watch.committed_since(replica, moment)
            assert first is not None
            until = max(line["time"] for line in first)
            costs.append({"lost": self.watch.lost_since(replica, moment - 0.05, until), "seconds": until - moment})
        killed = training.replicas - len(survivors)
        self.results.append({"phase": phase, "whole": whole, "killed": killed, "survivors": costs})

    def strike(self, phase: str, victims: list[int], whole: bool) -> float:
        """Kill a rank of each victim in a phase, or the whole replica. Returns when the first one was dead."""
        training = self.jobs.training
        if phase == "heal":  # a replica that gets states, or the sibling that sends them
            self.jobs.kill(victims[0])
            for process in self.jobs.ranks[victims[0]]:
                process.join()
            self.jobs.start(victims[0])
            sends = self.random.random() < 0.5
            for replica in range(training.replicas):
                for rank in range(training.ranks) if (replica != victims[0]) == sends else ():
                    self.jobs.aim(replica, rank, phase)
        elif phase == ANY_TIME:
            time.sleep(self.random.random())
            for replica in victims:
                self.jobs.kill(replica, None if whole else self.random.randrange(training.ranks))
        else:
            for replica in victims:
                self.jobs.aim(replica, self.random.randrange(training.ranks), phase)
        self.wait(
            lambda: any(self.jobs.has_failed(replica) for replica in range(training.replicas)), f"death in {phase}"
        )
        moment = time.time()
        for orders in self.jobs.orders.values():
            for order in orders:
                order.value = 0
        # Of two that are aimed at, the second one may follow. A launcher ends the other ranks of a replica a bit later.
        time.sleep(0.03 if whole else 0.5)
        self.jobs.end_rest_of_failed()
        return moment


def run(training: Training, kills: int, seed: int, phases: list[str]) -> dict[str, Any]:
    """Kill and compare. Returns what was found.

    Raises:
        WrongStepError, TimeoutError: something was wrong, or a replica has waited for too long.
    """
    started = time.monotonic()
    with running(training) as jobs:
        killer = Killer(jobs, seed)
        for number in range(kills):
            killer.kill_one(number, phases)
        killer.wait(killer.all_take_part, "all replicas at the end")
        jobs_records = jobs.records()
    steps = committed(training, jobs_records)
    worst = compare_with_reference(training, steps)
    costs = [(item, cost) for item in killer.results for cost in item["survivors"]]
    seconds = sorted(cost["seconds"] for _, cost in costs)
    return {
        "kills": kills,
        "by phase": dict(Counter(item["phase"] for item in killer.results)),
        "a rank, the rest of its replica later": sum(not item["whole"] for item in killer.results),
        "two replicas at once": sum(item["killed"] > 1 for item in killer.results),
        "lost by survivors": dict(Counter(cost["lost"] for _, cost in costs)),
        "more than a step lost for each that died": [item for item, cost in costs if cost["lost"] > item["killed"]],
        "seconds to the next step": {"median": seconds[len(seconds) // 2], "greatest": seconds[-1]} if seconds else {},
        "later than timeout + 2 s": [item for item, cost in costs if cost["seconds"] > training.timeout_s + 2],
        "committed steps": len(steps),
        "greatest difference of a loss": worst,
        "minutes": (time.monotonic() - started) / 60,
        "results": killer.results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=5.0)
    parser.add_argument("--phases", nargs="*", default=[ANY_TIME, *PHASES])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="replica-kills-")
    training = Training(
        folder,
        replicas=arguments.replicas,
        ranks=arguments.ranks,
        steps=10**9,
        timeout_s=arguments.timeout,
        save_every=5,
    )
    phases = [phase for phase in arguments.phases if phase != "hop 1" or arguments.ranks > 1]
    found = run(training, arguments.kills, arguments.seed, phases)
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1))
    print(json.dumps({key: value for key, value in found.items() if key != "results"}, indent=1))
    if found["greatest difference of a loss"] > 1e-6 or found["more than a step lost for each that died"]:
        raise WrongStepError("see above")


if __name__ == "__main__":
    main()
