"""Calibration on real ranks: what it measures, that all ranks agree on it, and the file it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers import environment

from mics_ds.cli import app
from mics_ds.errors import MicsPlanError
from mics_ds.planner import calibrate
from mics_ds.planner.machine import GroupForm, Link, Machine, Sweep
from mics_ds.planner.plan import candidates
from mics_ds.planner.presets import load_machine

SIZES = (1 << 14, 1 << 16)


@pytest.mark.ranks(4)
def test_every_group_that_training_would_use_is_measured():
    with environment(MICS_DS_RANKS_PER_NODE="2"):
        machine = calibrate.calibrate(sizes=SIZES, budget_s=8, hidden=32, sequence=16)
    found = {(item.operation, item.form, item.staged) for item in machine.sweeps}
    pair, grid, across, world = GroupForm(1, 2), GroupForm(2, 2), GroupForm(2, 1, 2), GroupForm(2, 2)
    assert found == {
        ("all_reduce", world, False),  # p = 1: all ranks are replicas
        ("all_gather", pair, False),
        ("reduce_scatter", pair, False),
        ("all_reduce", across, False),
        ("all_gather", grid, False),
        ("all_gather", grid, True),
        ("reduce_scatter", grid, False),
        ("reduce_scatter", grid, True),
        ("stock_reduce_scatter", grid, False),
    }
    assert all(item.payload == SIZES for item in machine.sweeps)
    assert (machine.gpus_per_node, machine.backend, machine.streams) == (2, "gloo", False)
    everyone = [None] * 4
    dist.all_gather_object(everyone, machine.to_json())
    assert all(item == everyone[0] for item in everyone), "every rank has the slowest rank's times"


@pytest.mark.ranks(4)
def test_a_partition_size_that_does_not_divide_is_refused_on_every_rank():
    with pytest.raises(MicsPlanError, match="must divide the 4 ranks"):
        calibrate.calibrate(partitions=[3])
    dist.barrier()


@pytest.mark.ranks(4)
def test_a_budget_that_shows_nothing_is_refused():
    with pytest.raises(MicsPlanError, match="measured at two sizes"):
        calibrate.calibrate(sizes=SIZES, partitions=[2], budget_s=1e-6, hidden=32, sequence=16)
    dist.barrier()


@pytest.mark.ranks(2)
def test_a_missing_folder_is_told_by_all_ranks(tmp_path):
    with pytest.raises(MicsPlanError, match="there is no folder"):
        calibrate.check_out(tmp_path / "nowhere" / "x.json")
    calibrate.check_out(tmp_path / "x.json")


@pytest.mark.slow
def test_the_command_leaves_a_profile_that_plans_use(tmp_path):
    out = tmp_path / "cluster.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [
        "-m",
        "mics_ds",
        "calibrate",
        "--out",
        str(out),
        "--budget",
        "3",
        "--largest",
        "0.1",
        "--name",
        "two",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run([*command, "--hidden", "32"], capture_output=True, text=True, timeout=120, env=env)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "between nodes" in result.stdout
    machine = load_machine(str(out))
    assert (machine.name, machine.gpus_per_node) == ("two", 2)
    plan = [
        sys.executable,
        "-m",
        "mics_ds",
        "plan",
        "--cluster",
        str(out),
        "--model",
        "hidden=64,layers=2,vocabulary=99",
    ]
    result = subprocess.run(
        [*plan, "--precision", "fp32", "--json"], capture_output=True, text=True, timeout=60, env=env
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["chosen_p"] in (1, 2)
    assert not list(tmp_path.glob("*.partial"))


def test_without_a_launcher_it_says_how_to_start(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert app.run(["calibrate", "--out", str(tmp_path / "x.json")]) == 2
    assert "torchrun or deepspeed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--out", "x.json", "--hidden", "-1"], "Invalid value for '--hidden'"),
        (["--out", "x.json", "--budget", "0"], "'--budget': must be positive, got 0"),
        (["--out", "x.json", "--p", "two"], "'--p': takes positive numbers with commas, got 'two'"),
        (["--out", "x.json", "--largest", "0"], "Invalid value for '--largest'"),
        ([], "Missing option '--out'"),
    ],
)
def test_senseless_arguments(arguments, match, capsys):
    assert app.run(["calibrate", *arguments]) == 2
    assert match in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(("hidden", "heads"), [(32, 1), (400, 2), (4096, 32), (256, 2)])
def test_heads_divide_the_hidden_size(hidden, heads):
    assert calibrate.heads_of(hidden) == heads


@pytest.mark.parametrize(("n", "k"), [(4, 2), (64, 8), (512, 8), (4096, 8)])
def test_few_partition_sizes_are_measured_even_on_many_ranks(n, k):
    sizes = calibrate.partition_sizes(n, k)
    machine = Machine("", k, 1, {"fp32": 1}, 1.0, Link(1, 0), Link(1, 0))
    assert len(sizes) <= 8
    assert {1, k, 2 * k, n} <= set(sizes)
    assert set(sizes) <= set(candidates(machine, n))


def test_links_are_found_again_from_times_they_explain():
    truth = Machine("", 2, 1, {"fp32": 1}, 1.0, Link(2e9, 3e-4), Link(1e7, 2e-3), backend="gloo")
    sizes = (1 << 10, 1 << 20, 1 << 22)
    sweeps = []
    for form in (GroupForm(1, 2), GroupForm(2, 2), GroupForm(4, 2)):
        times = tuple(truth.time("all_gather", size, form) for size in sizes)
        sweeps.append(Sweep("all_gather", form, False, sizes, times))
    intra = calibrate.fit_link(sweeps, True)
    inter = calibrate.fit_link(sweeps, False, intra.latency)
    for found, expected in ((intra, truth.intra), (inter, truth.inter)):
        assert found.bandwidth == pytest.approx(expected.bandwidth, rel=1e-6)
        assert found.latency == pytest.approx(expected.latency, rel=0.1)  # the smallest buffer has a little volume too
    assert calibrate.fit_link([], True) is None


def test_the_latency_of_a_collective_is_told_from_that_of_its_steps():
    truth = Machine("", 8, 1, {"fp32": 1}, 1.0, Link(1e12, 3e-6), Link(1e11, 1e-5), collective_latency=2e-5)
    sweeps = [
        Sweep("all_gather", GroupForm(1, ranks), False, (1, 1 << 20), times)
        for ranks in (2, 4, 8)
        for times in [tuple(truth.time("all_gather", size, GroupForm(1, ranks)) for size in (1, 1 << 20))]
    ]
    first = calibrate.fit_latency(sweeps)
    assert first == pytest.approx(2e-5, rel=1e-3)
    assert calibrate.fit_link(sweeps, True, first=first).latency == pytest.approx(3e-6, rel=1e-3)
    assert calibrate.fit_latency(sweeps[:1]) == 0.0


def test_a_profile_is_written_all_or_nothing(tmp_path):
    path = tmp_path / "x.json"
    machine = Machine("x", 2, 1, {"fp32": 1}, 1.0, Link(1, 0), Link(1, 0))
    calibrate.write(machine, path)
    assert load_machine(str(path)) == machine
    assert [item.name for item in Path(tmp_path).iterdir()] == ["x.json"]
