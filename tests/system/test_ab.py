"""``mics-ds ab``: a training script of the user's, as stock ZeRO-3 and as MiCS."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from forks import ForkingPopen
from helpers import ds_config
from launching import BIN, LIMIT_S, PROGRAM, finish, free_port, start

from mics_ds.ab.compare import summarise
from mics_ds.ab.recorder import nic_bytes
from mics_ds.cli.ab import comparison
from mics_ds.cli.output import rendered


def records(folder: Path, seconds: list[float], loss: float, sent: int) -> Path:
    for rank in range(2):
        lines = [{"loss": loss + rank, "seconds": value, "sent": {"eth0": sent, "lo": 0}} for value in seconds]
        folder.mkdir(exist_ok=True)
        (folder / f"rank{rank}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def test_summary_takes_the_slowest_rank_and_leaves_out_the_warm_up(tmp_path):
    run = summarise(records(tmp_path / "stock", [9.0, 9.0, 2.0, 2.0, 4.0], 1.0, 1000), skip=2)
    assert run["seconds"] == 2.0
    assert run["losses"] == [1.5] * 5
    assert run["sent"] == {"eth0": 2000}
    other = summarise(records(tmp_path / "mics", [0.5] * 5, 1.0, 100), skip=2)
    text = rendered(comparison(run, other))
    assert "4.00x" in text
    assert "largest relative loss difference in 5 steps: 0.0e+00" in text


def test_too_few_steps_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"more than 5 recorded optimizer steps.*found 3"):
        summarise(records(tmp_path / "stock", [1.0] * 3, 1.0, 0), skip=5)


def test_interface_counters_are_read_from_the_right_column():
    text = (
        "Inter-|   Receive                                                |  Transmit\n"
        " face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop\n"
        "    lo:  100 1 0 0 0 0 0 0  200 2 0 0 0 0 0 0\n"
        "  eth0: 300 3 0 0 0 0 0 0 400 4 0 0 0 0 0 0\n"
    )
    assert nic_bytes(text) == {"lo": 200, "eth0": 400}


@pytest.mark.slow
def test_a_script_of_ones_own_is_run_twice_and_compared():
    program = [PROGRAM, "--config", json.dumps(ds_config(2)), "--steps", "8"]
    launcher = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port())]
    code, output = finish(start([sys.executable, "-m", "mics_ds", "ab", "--skip", "2", "--", *launcher, *program]))
    assert code == 0, output[-5000:]
    assert "MICS_DS_DISABLE is set" in output
    assert "DeepSpeedZeroOptimizer_Stage3" in output
    assert "MicsOptimizer" in output
    assert "largest relative loss difference in 8 steps" in output
    assert "1.00x" in output


def test_a_failing_script_is_an_error():
    command = [sys.executable, "-m", "mics_ds", "ab", "--", sys.executable, "-c", "raise SystemExit(3)"]
    with ForkingPopen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0
    assert "the stock ZeRO-3 run ended with exit code 3" in output
