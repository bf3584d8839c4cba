"""Real launchers, real processes, and a script that knows nothing of MiCS."""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from helpers import ds_config

PROGRAM = str(Path(__file__).resolve().parents[1] / "programs" / "train_odd.py")
BIN = Path(sys.executable).parent
LIMIT_S = 150  # generous; the slowest takes half a minute on two busy cores


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen:
    assert [entry for entry in entry_points(group="torch.backends") if entry.name == "mics_ds"], (
        "these tests need the package installed, for its entry point: pip install -e ."
    )
    return subprocess.Popen(
        command,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        raise AssertionError(f"hung for {LIMIT_S} s:\n{output[-5000:]}") from None
    return process.returncode, output


def deepspeed_command(config: dict[str, Any], ranks: int = 4, more: tuple[str, ...] = ()) -> list[str]:
    launcher = [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port())]
    return [*launcher, PROGRAM, "--config", json.dumps(config), *more]


def torchrun_command(config: dict[str, Any], ranks: int = 2, more: tuple[str, ...] = ()) -> list[str]:
    launcher = [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    return [*launcher, PROGRAM, "--config", json.dumps(config), *more]


def alone_command(config: dict[str, Any], more: tuple[str, ...] = ()) -> tuple[list[str], dict[str, str]]:
    """One rank without a launcher: half the time, and as good where only what the process has loaded matters."""
    job = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [sys.executable, PROGRAM, "--config", json.dumps(config), *more], job


def results(output: str) -> list[dict[str, Any]]:
    found = [json.loads(line[len("RESULT ") :]) for line in output.splitlines() if line.startswith("RESULT ")]
    return sorted(found, key=lambda item: item["rank"])


def run_well(command: list[str], environment: dict[str, str] | None = None) -> list[dict[str, Any]]:
    code, output = finish(start(command, environment))
    assert code == 0, output[-5000:]
    return results(output)


NOT_LOADED = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


@functools.cache
def runs_alone() -> dict[str, tuple[int, str]]:
    """Exit code and output of one process each; two at a time would leave a core idle now and then."""
    asked: dict[str, tuple[Any, tuple[str, ...], dict[str, str]]] = {
        "absent": (ds_config(), (), NOT_LOADED),
        "loaded": (ds_config(), (), {}),
        "imported": (ds_config(), ("--import-mics", "before"), {}),
        "disabled": (ds_config(1), (), {"MICS_DS_DISABLE": "1"}),
        "key without the package": (ds_config(1), (), NOT_LOADED),
        "imported, with the key": (ds_config(1), ("--import-mics", "before"), NOT_LOADED),
    }
    running = {}
    for name, (config, more, environment) in asked.items():
        command, job = alone_command(config, more)
        running[name] = start(command, {**job, **environment})
    return {name: finish(process) for name, process in running.items()}


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
    """Losses of stock ZeRO-3 are the same to the last bit with the package absent, loaded and imported."""
    [absent], [loaded], [imported] = map(ran_well, ("absent", "loaded", "imported"))
    assert [item["loaded"] for item in (absent, loaded, imported)] == [False, True, True]
    assert all(is_stock(item) and item["losses"] == absent["losses"] for item in (absent, loaded, imported))


def test_with_the_key_the_package_is_needed_and_importing_it_is_enough():
    code, output = runs_alone()["key without the package"]
    assert code != 0
    assert "MiCS ZeRO-3 sharding has been removed" in output
    [imported] = ran_well("imported, with the key")
    assert imported["optimizer"] == "MicsOptimizer"


def test_disabled_everywhere_is_stock_zero3_and_says_so():
    [disabled], [stock] = ran_well("disabled"), ran_well("loaded")
    assert runs_alone()["disabled"][1].count("MICS_DS_DISABLE is set: mics_ keys are ignored") == 1
    assert is_stock(disabled)
    assert disabled["losses"] == stock["losses"]


@pytest.mark.slow  # the same as the three above, on two ranks
def test_inert_and_disabled_under_a_launcher():
    absent, loaded = run_well(torchrun_command(ds_config()), NOT_LOADED), stock_run()
    imported = run_well(torchrun_command(ds_config(), more=("--import-mics", "before")))
    disabled = run_well(torchrun_command(ds_config(1)), {"MICS_DS_DISABLE": "1"})
    assert [item["loaded"] for item in absent + loaded + imported] == [False, False, True, True, True, True]
    for run in (absent, loaded, imported, disabled):
        assert all(map(is_stock, run))
        assert [item["losses"] for item in run] == [item["losses"] for item in absent]


@pytest.mark.parametrize(
    ("config", "more", "message"),
    [
        pytest.param(
            *(ds_config(3), ()),
            "mics_shard_size = 3 must divide the number of data-parallel ranks, which is 2",
            id="size 3",
        ),
        # The rest are in test_bad_input.py too, without a launcher.
        pytest.param(
            *(ds_config(2), ("--other-config", json.dumps(ds_config(1)))),
            "All ranks must agree on whether MiCS is on",
            id="two sizes",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(ds_config(2), ("--other-config", json.dumps(ds_config()))),
            "All ranks must agree on whether MiCS is on",
            id="key on some ranks",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(ds_config(2), ("--other-config", json.dumps(ds_config(0)))),
            "mics_shard_size must be greater than or equal to 1",
            id="wrong on one rank",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(ds_config(2), ("--disable-on", "1")),
            "All ranks must agree on whether MiCS is on",
            id="disabled on one rank",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_launcher_ends_with_the_reason(config, more, message):
    code, output = finish(start(deepspeed_command(config, 2, more=more)))
    assert code != 0
    assert message in output, output[-5000:]
    assert not results(output)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
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
