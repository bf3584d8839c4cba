"""Replicas that come and go: real jobs over gloo, a real lighthouse, and kills."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from bench import cluster as emulation
from bench import replica_kills
from bench.replica_jobs import Jobs, Training, committed, compare_with_reference, running

pytest.importorskip("torchft")
LIMIT_S = 120


def states(jobs: Jobs) -> dict[tuple[int, int], Any]:
    """Return what each rank of the whole has got in each step."""
    ranks = jobs.training.ranks
    return {
        (line["step"], line["replica"] * ranks + line["rank"]): (
            line["position"],
            line["losses"],
            line["lr"],
            line["before"],
            line["after"],
        )
        for line in jobs.records()
    }


def until(jobs: Jobs, reached: Any, *, restart: bool = True) -> None:
    """Wait until a condition on the records holds."""
    deadline = time.monotonic() + LIMIT_S
    while not reached(jobs.records()):
        assert time.monotonic() < deadline, jobs.logs()
        if restart:
            jobs.restart_failed()
        time.sleep(0.05)


def until_all_take_part(jobs: Jobs) -> None:
    """Wait until each rank that runs has committed a step of all replicas. The first to start may take steps alone."""
    training, current = jobs.training, jobs.generation

    def reached(records: list[dict[str, Any]]) -> bool:
        together = {
            (line["replica"], line["rank"])
            for line in records
            if line.get("members") == training.replicas and line["generation"] == current[line["replica"]]
        }
        return len(together) == training.replicas * training.ranks

    until(jobs, reached)


def log(jobs: Jobs, replica: int, generation: int = 0) -> str:
    return (Path(jobs.training.folder) / f"log-{replica}-{generation}-0").read_text()


def test_a_replica_is_killed_and_comes_back(tmp_path):
    """The survivor goes on after one lost step, and the one that comes back continues from its states."""
    training = Training(str(tmp_path), replicas=2, ranks=1, steps=10**9, sleep_s=0.05)
    with running(training, heartbeat_timeout_s=1.0) as jobs:
        until_all_take_part(jobs)
        jobs.orders[1][0].value = 4  # hop 2
        until(jobs, lambda _: jobs.generation[1] == 1)
        until_all_take_part(jobs)
        records = jobs.records()
        assert "continues from a sibling" in log(jobs, 1, 1)
    assert sum(line["lost"] for line in records if line["replica"] == 0) <= 1
    steps = committed(training, records)
    assert {line["members"] for lines in steps for line in lines} == {1, 2}
    assert steps[-1][0]["members"] == 2
    assert compare_with_reference(training, steps) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("replicas", "ranks"), [(3, 2), (4, 1)])
@pytest.mark.parametrize("extra", [{}, {"bf16": {"enabled": True}}, {"offload_optimizer": {"device": "cpu"}}], ids=str)
def test_fixed_members_give_the_bits_of_one_job(tmp_path, replicas, ranks, extra):
    if "offload_optimizer" in extra:
        extra = {"zero_optimization": extra}
    got = {}
    for managed in (True, False):
        folder = tmp_path / str(managed)
        folder.mkdir()
        training = Training(str(folder), replicas, ranks, steps=6, managed=managed, min=replicas, extra=extra)
        with running(training, join_timeout_s=60) as jobs:
            jobs.wait(LIMIT_S, restart=False)
            got[managed] = states(jobs)
    assert len(got[True]) == 6 * replicas * ranks
    assert got[True] == got[False]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("replicas", "ranks"), [(3, 2), (4, 1)])
def test_kills_at_seeded_moments(tmp_path, replicas, ranks, seed):
    training = Training(str(tmp_path), replicas, ranks, steps=10**9, save_every=5)
    phases = [phase for phase in [replica_kills.ANY_TIME, *replica_kills.PHASES] if ranks > 1 or phase != "hop 1"]
    found = replica_kills.run(training, kills=8, seed=seed, phases=phases)
    assert found["greatest difference of a loss"] < 1e-6
    assert all(item["lost"] <= item["killed"] for item in found["results"])


@pytest.mark.slow
def test_a_step_that_is_given_up_leaves_loss_scale_and_schedule_alone(tmp_path):
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 1000}}
    training = Training(str(tmp_path), replicas=2, ranks=2, steps=10**9, extra=fp16, sleep_s=0.05)
    with running(training, heartbeat_timeout_s=1.0) as jobs:
        until_all_take_part(jobs)
        jobs.orders[1][1].value = 4  # hop 2
        until(jobs, lambda _: jobs.generation[1] == 1)
        until_all_take_part(jobs)
        records = jobs.records()
    assert [line["step"] for line in records if line["lost"]], "nothing was given up"
    assert {line["scale"] for line in records} == {256.0}
    rates = [lines[0]["lr"] for lines in committed(training, records)]
    assert rates == sorted(rates)
    moved = len(set(rates[:20]))
    assert moved >= min(len(rates), 20) - 1, "the schedule moves with every step that is committed"


@pytest.mark.slow
def test_below_the_least_number_training_waits_and_says_so(tmp_path):
    training = Training(str(tmp_path), replicas=2, ranks=1, steps=30, min=2, timeout_s=2.0, sleep_s=0.05)
    with running(training, heartbeat_timeout_s=1.0) as jobs:
        until_all_take_part(jobs)
        jobs.kill(1)
        until(jobs, lambda _: "has waited" in log(jobs, 0), restart=False)
        [alone] = {line["step"] for line in jobs.records()[-1:]}
        assert not jobs.is_done(0)
        jobs.wait(LIMIT_S)
        steps = committed(training, jobs.records())
    assert alone < 29
    assert {line["members"] for lines in steps for line in lines} == {2}
    assert compare_with_reference(training, steps) < 1e-6


@pytest.mark.slow
def test_a_lighthouse_that_is_restarted(tmp_path):
    """Without it replicas wait. A new one counts anew, and a replica that is killed then is replaced all the same."""
    training = Training(str(tmp_path), replicas=3, ranks=1, steps=10**9, sleep_s=0.05)
    with running(training, heartbeat_timeout_s=1.0) as jobs:
        until_all_take_part(jobs)
        jobs.kill(2)  # the lighthouse has counted to 2 when it dies
        until(jobs, lambda _: jobs.generation[2] == 1)
        until_all_take_part(jobs)
        jobs._lighthouse.stop()
        time.sleep(1.0)
        jobs._lighthouse.start()
        last = max(line["step"] for line in jobs.records())
        until(jobs, lambda records: any(line["step"] > last + 3 for line in records))
        jobs.kill(1)
        until(jobs, lambda _: jobs.generation[1] == 1)
        until_all_take_part(jobs)
        steps = committed(training, jobs.records())
    assert compare_with_reference(training, steps) < 1e-6


@pytest.mark.slow
def test_a_job_is_restarted_from_disk_with_another_number_of_replicas(tmp_path):
    first = Training(str(tmp_path), replicas=3, ranks=2, steps=10, min=3, save_every=5)
    with running(first, join_timeout_s=60) as jobs:
        jobs.wait(LIMIT_S, restart=False)
        before = jobs.records()
    for path in tmp_path.glob("re*"):
        path.unlink()
    again = Training(str(tmp_path), replicas=2, ranks=2, steps=20, min=2)
    with running(again, join_timeout_s=60) as jobs:
        jobs.wait(LIMIT_S, restart=False)
        after = jobs.records()
    assert min(line["step"] for line in after) == 10
    steps = committed(first, before + after)
    assert [lines[0]["members"] for lines in steps] == [3] * 10 + [2] * 10
    assert compare_with_reference(first, steps) < 1e-6


@pytest.mark.slow
def test_a_replica_with_another_model_ends_and_leaves_the_others_alone(tmp_path):
    training = Training(str(tmp_path), replicas=2, ranks=1, steps=60, sleep_s=0.05)
    with running(training, heartbeat_timeout_s=1.0) as jobs:
        until(jobs, lambda records: any(line["step"] == 2 for line in records))
        other = Jobs(Training(str(tmp_path), replicas=3, ranks=1, steps=60, layers=4), jobs._lighthouse)
        other.start(2)
        for process in other.ranks[2]:
            process.join(LIMIT_S)
        assert other.codes(2) == [1]
        assert "must train the same model" in log(other, 2)
        jobs.wait(LIMIT_S, restart=False)
        steps = committed(training, [line for line in jobs.records() if line["replica"] != 2])
    assert len(steps) == 60
    assert compare_with_reference(training, steps) < 1e-6


@pytest.mark.slow
@pytest.mark.skipif(
    emulation.why_unavailable() is not None, reason=f"cannot emulate a cluster: {emulation.why_unavailable()}"
)
def test_a_node_is_cut_off_and_comes_back(tmp_path):
    """The others go on after the timeout. The node that was cut off continues from a sibling's states."""
    training = Training(str(tmp_path), replicas=3, ranks=2, steps=10**9, timeout_s=3.0, sleep_s=0.05)
    with emulation.Cluster(4, None) as cluster, running(training, cluster, heartbeat_timeout_s=1.0) as jobs:
        until_all_take_part(jobs)
        link(cluster, 3, "down")
        last = max(line["step"] for line in jobs.records())
        until(jobs, lambda records: any(line["step"] > last + 5 and line.get("members") == 2 for line in records))
        back = max(line["step"] for line in jobs.records()) + 1
        link(cluster, 3, "up")
        until(jobs, lambda records: any(line["step"] > back and line.get("members") == 3 for line in records))
        records = jobs.records()
    steps = committed(training, records)
    assert steps[-1][0]["members"] == 3
    lost = {
        replica: sum(line["lost"] for line in records if line["replica"] == replica and line["rank"] == 0)
        for replica in (0, 1)
    }
    assert max(lost.values()) <= 2  # one when it is cut off, one if it comes back within a step
    assert compare_with_reference(training, steps) < 1e-6


def link(cluster: emulation.Cluster, node: int, state: str) -> None:
    subprocess.run(["ip", "-n", cluster.node(node), "link", "set", cluster.interface, state], check=True)
