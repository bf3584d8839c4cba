"""Start training scripts by the launchers that users have."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

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
    """Return the command and environment of one rank without a launcher, for tests of what a process has loaded."""
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
