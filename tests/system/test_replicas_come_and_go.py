"""Replicas that come and go: real jobs over gloo, a real lighthouse, and kills."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from bench import cluster as emulation
from bench import replica_kills
from bench.replica_jobs import LIMIT_S, PUBLISH, Jobs, Training, committed, compare_with_reference, running
from replica_kill import kill_one, records_with_a_kill

pytest.importorskip("torchft")


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


def log(folder: Path, replica: int, generation: int = 0) -> str:
    return (folder / f"log-{replica}-{generation}-0").read_text()


def test_a_replica_is_killed_and_comes_back(tmp_path):
    """The survivor goes on after one lost step, and the one that comes back continues from its states."""
    records, steps = kill_one(Training(str(tmp_path), replicas=2, ranks=1, steps=10**9, sleep_s=0.05))
    assert "continues from a sibling" in log(tmp_path, 1, 1)
    assert sum(line["lost"] for line in records if line["replica"] == 0) <= 1
    assert steps[-1][0]["members"] == 2


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
    assert found["more than a step lost for each that died"] == []


@pytest.mark.slow
def test_two_replicas_die_in_one_step(tmp_path):
    training = Training(str(tmp_path), replicas=3, ranks=1, steps=10**9, sleep_s=0.05)
    with running(training, heartbeat_timeout_s=1.0) as jobs:
        jobs.until_all_take_part()
        for replica in (1, 2):
            jobs.aim(replica, 0, "hop 2")
        jobs.until(lambda _: jobs.generation[1] == jobs.generation[2] == 1)
        jobs.until_all_take_part()
        records = jobs.records()
    assert sum(line["lost"] for line in records if line["replica"] == 0) <= 2
    steps = committed(training, records)
    assert steps[-1][0]["members"] == 3
    assert compare_with_reference(training, steps) < 1e-6


@pytest.mark.slow
def test_a_replica_that_is_merely_slow_comes_back(tmp_path):
    """Its process lives on: the others go on after their timeout, and it continues from a sibling's states."""
    training = Training(str(tmp_path), replicas=3, ranks=2, steps=10**9, timeout_s=2.0, sleep_s=0.05)
    with running(training, heartbeat_timeout_s=1.0, join_timeout_s=1.0) as jobs:
        jobs.until_all_take_part()
        begun = max(line["step"] for line in jobs.records())
        jobs.stall(2, 1, 12)
        jobs.until(lambda records: any(line["step"] > begun and line.get("members") == 2 for line in records))
        last = max(line["step"] for line in jobs.records())
        jobs.until(lambda records: any(line["step"] > last and line.get("members") == 3 for line in records))
        records = jobs.records()
        assert set(jobs.generation.values()) == {0}, "nobody has died"
        assert "continues from a sibling" in log(tmp_path, 2)
    for replica in (0, 1):
        mine = [line for line in records if line["replica"] == replica and line["rank"] == 0]
        assert sum(line["lost"] for line in mine if line["step"] >= begun) == 1
    steps = committed(training, records)
    assert {2, 3} <= {line["members"] for lines in steps for line in lines}
    assert compare_with_reference(training, steps) < 1e-6


@pytest.mark.slow
def test_a_rank_dies_inside_a_save(tmp_path):
    """The checkpoint does not appear. The next one is written by another replica, and all of them can start from it."""
    training = Training(str(tmp_path), replicas=2, ranks=2, steps=10**9, save_every=10, sleep_s=0.05)
    latest = tmp_path / "checkpoints/latest"
    with running(training, heartbeat_timeout_s=1.0) as jobs:
        jobs.until_all_take_part()
        jobs.until(lambda _: latest.exists())
        before = latest.read_text()
        jobs.aim(0, 0, PUBLISH)  # the first replica of a step writes
        jobs.until(lambda _: jobs.has_failed(0), restart=False)
        assert latest.read_text() == before
        jobs.until(lambda _: latest.read_text() != before)
        jobs.until_all_take_part()
        assert sum(line["lost"] for line in jobs.records() if line["replica"] == 1 and line["rank"] == 0) <= 1
        first = jobs.records()
    for path in tmp_path.glob("re*"):
        path.unlink()
    found = int(latest.read_text().removeprefix("global_step"))
    again = Training(str(tmp_path), replicas=2, ranks=2, steps=found + 3, min=2)
    with running(again, join_timeout_s=60) as jobs:
        jobs.wait(LIMIT_S, restart=False)
        after = jobs.records()
    assert min(line["step"] for line in after) == found
    steps = committed(training, [line for line in first if line["step"] < found] + after)
    assert compare_with_reference(training, steps) < 1e-6


@pytest.mark.slow
def test_a_step_that_is_given_up_leaves_loss_scale_and_schedule_alone(tmp_path):
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 1000}}
    training = Training(str(tmp_path), replicas=2, ranks=2, steps=10**9, extra=fp16, sleep_s=0.05)
    records = records_with_a_kill(training, rank=1)
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
        jobs.until_all_take_part()
        jobs.kill(1)
        jobs.until(lambda _: "has waited" in log(tmp_path, 0), restart=False)
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
        jobs.until_all_take_part()
        jobs.kill(2)  # the lighthouse has counted to 2 when it dies
        jobs.until(lambda _: jobs.generation[2] == 1)
        jobs.until_all_take_part()
        jobs._lighthouse.stop()
        time.sleep(1.0)
        jobs._lighthouse.start()
        last = max(line["step"] for line in jobs.records())
        jobs.until(lambda records: any(line["step"] > last + 3 for line in records))
        jobs.kill(1)
        jobs.until(lambda _: jobs.generation[1] == 1)
        jobs.until_all_take_part()
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
        jobs.until(lambda records: any(line["step"] == 2 for line in records))
        other = Jobs(Training(str(tmp_path), replicas=3, ranks=1, steps=60, layers=4), jobs._lighthouse)
        other.start(2)
        for process in other.ranks[2]:
            process.join(LIMIT_S)
        assert other.codes(2) == [1]
        assert "must train the same model" in log(tmp_path, 2)
        jobs.wait(LIMIT_S, restart=False)
        steps = committed(training, [line for line in jobs.records() if line["replica"] != 2])
    assert len(steps) == 60
    assert compare_with_reference(training, steps) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_replicas_with_other_weights_do_not_start(tmp_path, ranks):
    """On all ranks, those of the same replica too."""
    training = Training(str(tmp_path), replicas=2, ranks=ranks, steps=5, min=2, seeds=(7, 8))
    with running(training, join_timeout_s=60) as jobs:
        for replica in range(2):
            for process in jobs.ranks[replica]:
                process.join(LIMIT_S)
            assert jobs.codes(replica) == [1] * ranks
            assert "from the same weights" in log(tmp_path, replica)
        assert not jobs.records()


@pytest.mark.slow
@pytest.mark.skipif(
    emulation.why_unavailable() is not None, reason=f"cannot emulate a cluster: {emulation.why_unavailable()}"
)
@pytest.mark.parametrize("cut", [(2,), (1, 2)], ids=str)
def test_nodes_are_cut_off_and_come_back(tmp_path, cut):
    """The others go on after the timeout. The nodes that were cut off continue from a sibling's states."""
    training = Training(str(tmp_path), replicas=3, ranks=2, steps=10**9, timeout_s=3.0, sleep_s=0.05)
    with emulation.Cluster(4, None) as cluster, running(training, cluster, heartbeat_timeout_s=1.0) as jobs:
        jobs.until_all_take_part()
        for replica in cut:
            link(cluster, replica + 1, "down")
        last, left = max(line["step"] for line in jobs.records()), 3 - len(cut)
        jobs.until(lambda records: any(line["step"] > last + 5 and line.get("members") == left for line in records))
        back = max(line["step"] for line in jobs.records()) + 1
        for replica in cut:
            link(cluster, replica + 1, "up")
        jobs.until(lambda records: any(line["step"] > back and line.get("members") == 3 for line in records))
        records = jobs.records()
    steps = committed(training, records)
    assert steps[-1][0]["members"] == 3
    lost = {
        replica: sum(line["lost"] for line in records if line["replica"] == replica and line["rank"] == 0)
        for replica in {0, 1, 2} - set(cut)
    }
    assert max(lost.values()) <= 1 + len(cut)  # one when they are cut off, one for each that comes back within a step
    assert compare_with_reference(training, steps) < 1e-6


def link(cluster: emulation.Cluster, node: int, state: str) -> None:
    subprocess.run(["ip", "-n", cluster.node(node), "link", "set", cluster.interface, state], check=True)
