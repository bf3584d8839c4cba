"""Real launchers, real processes, and a script that knows nothing of MiCS."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from typing import Any

import pytest
from cases import slow
from forks import Parent
from helpers import ds_config
from launching import (
    BIN,
    LIMIT_S,
    PROGRAM,
    alone_command,
    deepspeed_command,
    finish,
    free_port,
    results,
    run_well,
    start,
    torchrun_command,
)

NOT_LOADED = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


@functools.cache
def runs_alone() -> dict[str, tuple[int, str]]:
    """Exit code and output of one process each."""
    loaded = start(*alone_command(ds_config()))
    absent: dict[str, tuple[Any, tuple[str, ...]]] = {
        "absent": (ds_config(), ()),
        "key without the package": (ds_config(1), ()),
        "imported, with the key": (ds_config(1), ("--import-mics", "after")),
    }
    commands = [alone_command(*asked) for asked in absent.values()]
    without = Parent("import helpers, torch._inductor.compile_fx", **NOT_LOADED)
    done = without.run(*((words, job) for [_, *words], job in commands))
    said = {name: (item.returncode, item.stdout + item.stderr) for name, item in zip(absent, done)}
    return {"loaded": finish(loaded), **said}


def ran_well(name: str) -> list[dict[str, Any]]:
    code, output = runs_alone()[name]
    assert code == 0, output[-5000:]
    return results(output)


@functools.cache
def stock_run() -> list[dict[str, Any]]:
    return run_well(torchrun_command(ds_config()))


@pytest.mark.slow  # the next one and others start with it as well
def test_deepspeed_launcher():
    ranks = run_well(deepspeed_command(ds_config(2)))
    assert [item["optimizer"] for item in ranks] == ["MicsOptimizer"] * 4
    assert [item["partition"] for item in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert ranks[0]["nodes"] == [0, 0, 0, 0]


@pytest.mark.slow  # others start with torchrun as well
def test_torchrun():
    ranks = run_well(torchrun_command(ds_config(2), 4))
    assert [item["optimizer"] for item in ranks] == ["MicsOptimizer"] * 4


@pytest.mark.slow
def test_two_nodes_without_ssh(tmp_path):
    """One launcher per node. The group of four spans both, so parameters are gathered hierarchically."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("127.0.0.1 slots=2\nlocalhost slots=2\n")
    port = str(free_port())
    nodes = [
        start(
            [
                *[str(BIN / "deepspeed"), "--no_ssh", "--node_rank", str(node), "--hostfile", str(hostfile)],
                *["--master_addr", "127.0.0.1", "--master_port", port, PROGRAM, "--config", json.dumps(ds_config(4))],
            ]
        )
        for node in range(2)
    ]
    outputs = [finish(node) for node in nodes]
    assert [code for code, _ in outputs] == [0, 0], outputs[0][1][-3000:] + outputs[1][1][-3000:]
    ranks = results(outputs[0][1] + outputs[1][1])
    assert len(ranks) == 4
    for item in ranks:
        assert item["nodes"] == [0, 0, 1, 1]
        assert item["hierarchical"] is True
        assert item["partition"] == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after", "late"])
def test_importing_it_is_enough_where_it_is_not_loaded_by_torch(when):
    ranks = run_well(torchrun_command(ds_config(1), 2, ("--import-mics", when)), NOT_LOADED)
    assert [item["optimizer"] for item in ranks] == ["MicsOptimizer"] * 2


def is_stock(item: dict[str, Any]) -> bool:
    return item["optimizer"] == "DeepSpeedZeroOptimizer_Stage3"


def test_inert_without_the_key():
    """Losses of stock ZeRO-3 are the same to the last bit with the package absent and loaded."""
    [absent], [loaded] = map(ran_well, ("absent", "loaded"))
    assert [item["loaded"] for item in (absent, loaded)] == [False, True]
    assert all(is_stock(item) and item["losses"] == absent["losses"] for item in (absent, loaded))


def test_with_the_key_the_package_is_needed_and_importing_it_is_enough():
    code, output = runs_alone()["key without the package"]
    assert code != 0
    assert "MiCS ZeRO-3 sharding has been removed" in output
    [imported] = ran_well("imported, with the key")
    assert imported["optimizer"] == "MicsOptimizer"


@pytest.mark.slow  # the same as the two above, on two ranks
def test_inert_and_disabled_under_a_launcher():
    absent, loaded = run_well(torchrun_command(ds_config()), NOT_LOADED), stock_run()
    imported = run_well(torchrun_command(ds_config(), more=("--import-mics", "before")))
    disabled = run_well(torchrun_command(ds_config(1)), {"MICS_DS_DISABLE": "1"})
    assert [item["loaded"] for item in absent + loaded + imported] == [False, False, True, True, True, True]
    for run in (absent, loaded, imported, disabled):
        assert all(map(is_stock, run))
        assert [item["losses"] for item in run] == [item["losses"] for item in absent]


@pytest.mark.slow  # test_bad_input.py has them without a launcher
@pytest.mark.parametrize(
    ("config", "more", "message"),
    [
        pytest.param(
            *(ds_config(3), ()),
            "mics_shard_size = 3 must divide the number of data-parallel ranks, which is 2",
            id="size 3",
        ),
        pytest.param(
            *(ds_config(2), ("--other-config", json.dumps(ds_config(1)))),
            "All ranks must agree on whether MiCS is on",
            id="two sizes",
        ),
        pytest.param(
            *(ds_config(2), ("--other-config", json.dumps(ds_config()))),
            "All ranks must run MiCS or none, but rank 1 runs without it",
            id="key on some ranks",
        ),
        pytest.param(
            *(ds_config(2), ("--other-config", json.dumps(ds_config(0)))),
            "mics_shard_size must be greater than or equal to 1",
            id="wrong on one rank",
        ),
        pytest.param(
            *(ds_config(2), ("--disable-on", "1")),
            "All ranks must agree on whether MiCS is on",
            id="disabled on one rank",
        ),
    ],
)
def test_the_launcher_ends_with_the_reason(config, more, message):
    code, output = finish(start(deepspeed_command(config, 2, more=more)))
    assert code != 0
    assert message in output, output[-5000:]
    assert not results(output)


@pytest.mark.parametrize("victim", [slow(0), slow(1)])
def test_a_killed_rank_ends_the_job_with_a_named_cause(victim):
    code, output = finish(start(torchrun_command(ds_config(1), 2, ("--kill", str(victim)))))
    assert code != 0
    assert "Signal 9 (SIGKILL)" in output, output[-5000:]
    assert not results(output)


def test_ctrl_c_ends_the_launcher_and_all_ranks():
    import signal
    import time

    process = start(deepspeed_command(ds_config(1), 2, more=("--steps", "100000")))
    deadline = time.monotonic() + LIMIT_S
    lines = []
    assert process.stdout is not None
    for line in process.stdout:  # wait until MiCS has started
        lines.append(line)
        assert time.monotonic() < deadline, "".join(lines)
        if "parameter gather" in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    code, _ = finish(process)
    assert code != 0
    pids = subprocess.run(["pgrep", "-f", str(PROGRAM) + ".*100000"], capture_output=True, text=True).stdout
    assert pids == ""


def test_pgrep_is_there():
    """The test above would pass without looking if it were not."""
    assert shutil.which("pgrep")
