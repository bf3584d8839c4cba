"""``mics-ds check`` as users start it, and with one rank broken."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cases import slow

ROOT = Path(__file__).resolve().parents[2]
BROKEN = str(ROOT / "tests" / "programs" / "check_broken.py")
LIMIT_S = 200


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(command: list[str], **environment: str) -> tuple[int, str]:
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    process = subprocess.Popen(
        [sys.executable, *command],
        env={**environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"hung for {LIMIT_S} s:\n{output[-5000:]}") from None
    return process.returncode, output


def torchrun(n: int, *command: str) -> list[str]:
    return ["-m", "torch.distributed.run", "--nproc_per_node", str(n), "--master_port", str(free_port()), *command]


def test_under_a_launcher_a_table_a_verdict_and_exit_code_0(tmp_path):
    report = tmp_path / "report.json"
    checks = ["parity,fp32,p=2,micro_steps=1", "bytes,p=2", "parity,fp16,p=2", "checkpoint,p=2,fp32"]
    code, output = run(torchrun(2, "-m", "mics_ds", "check", "--json", str(report), *checks))
    assert code == 0, output[-5000:]
    lines = output.splitlines()
    assert any(line.startswith("2 ranks in 1 fast domain, cpu, backend gloo") for line in lines)
    assert sum(line.startswith("ok       ") for line in lines) == 4
    assert sum(line.startswith("skipped  parity fp16") for line in lines) == 2
    assert output.count("PASSED: ") == 1
    found = json.loads(report.read_text())
    assert found["passed"] is True
    assert [item["state"] for item in found["checks"]].count("ok") == 4
    assert found["nodes"] == [0, 0]


@pytest.mark.parametrize("how", [slow(how) for how in ("sum", "raise")])
def test_one_broken_rank_fails_all_of_them_by_the_name_of_the_check(how):
    """Hop 2 is a sum on one rank, or hop 1 raises on one and the others wait for it."""
    code, output = run([BROKEN, how])
    assert code == 1, output[-5000:]
    codes = sorted(line.rpartition(" ")[2] for line in output.splitlines() if line.startswith("EXIT "))
    assert codes == ["1"] * 2, output[-5000:]
    assert "FAILED   parity fp32 p=1 overlap_comm=true micro_steps=3" in output
    if how == "raise":
        assert "on rank 1: RuntimeError: broken on purpose; rank 0" in output


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others_with_an_error():
    code, output = run([BROKEN, "kill"])
    assert code == 1, output[-5000:]
    assert "EXIT 0 1" in output
    assert "FAILED   parity fp32 p=1 overlap_comm=true micro_steps=3" in output


@pytest.mark.slow
def test_an_untested_deepspeed_is_checked_all_the_same_and_told_of():
    code, output = run([BROKEN, "untested"])
    assert code == 0, output[-5000:]
    assert "is not among the tested versions; for this run, MICS_DS_ALLOW_UNTESTED=1 is set" in output
    assert "Set MICS_DS_ALLOW_UNTESTED=1 on all ranks to use it" in output


@pytest.mark.slow
def test_everything_on_four_ranks_started_without_a_launcher():
    code, output = run(["-m", "mics_ds", "check", "--timeout", "60"])
    assert code == 0, output[-5000:]
    assert output.startswith("starting 4 ranks on this machine")
    assert "FAILED" not in output
