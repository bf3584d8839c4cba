"""Frameworks on replicas that come and go, held to plain PyTorch on the batches that were committed."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from bench.replica_jobs import LIMIT_S, Training, committed, compare_with_reference, running
from launching import BIN
from replica_frameworks import EXAMPLES, RATE
from replica_kill import Line, kill_one

pytest.importorskip("torchft")


def steps_of(folder: Path, program: str) -> list[list[Line]]:
    """Return the steps that a program commits of which one replica is killed and started again."""
    program = f"replica_frameworks:{program}"
    _, steps = kill_one(Training(str(folder), replicas=2, ranks=1, steps=10**9, sleep_s=0.05, program=program))
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("program", ["hf_trainer", "accelerate", "lightning"])
def test_a_replica_of_a_framework_is_killed_and_comes_back(tmp_path, program):
    rates = [lines[0]["lr"] for lines in steps_of(tmp_path, program)][1:]
    steps = [after - before for before, after in pairwise(rates)]
    assert steps == pytest.approx([RATE] * len(steps)), "schedules move with every step that is committed, and no other"


@pytest.mark.slow
@pytest.mark.parametrize(("script", "ranks"), [("train_replica.py", 2), ("replica_trainer.py", 1)])
def test_an_example_trains_as_its_page_says(tmp_path, script, ranks):
    command = [sys.executable, "-m", "mics_ds", "replicas", "-n", "2", "--min", "2", "--restarts", "1", "--"]
    command += [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), str(EXAMPLES / script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    losses = [float(value) for value in re.findall(r"(?:loss |'loss': '?)(\d+\.\d+)", done.stdout)]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_the_learning_rate_may_follow_the_number_of_replicas(tmp_path):
    for lines in steps_of(tmp_path, "rate_by_replicas"):
        assert {line["lr"] for line in lines} == {100 * RATE * lines[0]["members"]}


@pytest.mark.slow
def test_a_trainer_resumes_where_its_replicas_have_saved(tmp_path):
    first = Training(str(tmp_path), 2, 1, steps=10, min=2, save_every=5, program="replica_frameworks:hf_trainer")
    with running(first, join_timeout_s=60) as jobs:
        jobs.wait(LIMIT_S, restart=False)
        before = jobs.records()
    for path in tmp_path.glob("re*"):
        path.unlink()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-10", "checkpoint-5"]
    again = Training(str(tmp_path), 2, 1, steps=15, min=2, save_every=5, program="replica_frameworks:hf_trainer")
    with running(again, join_timeout_s=60) as jobs:
        jobs.wait(LIMIT_S, restart=False)
        after = jobs.records()
    assert min(line["step"] for line in after) == 10
    steps = committed(first, before + after)
    assert len(steps) == 15
    assert compare_with_reference(first, steps) < 1e-6
