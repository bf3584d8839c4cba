"""How a process ends that has a checkpoint under way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from test_launch import free_port

from mics_ds.checkpoint import manifest

PROGRAM = Path(__file__).resolve().parents[1] / "programs" / "save_async.py"


def start(folder: Path, how: str, ranks: int = 1) -> list[subprocess.Popen]:
    job = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder), how],
            env={**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=open(folder.with_suffix(f".{rank}"), "w"),  # not a pipe, which a stopped process would hold open
            stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_ends_of_a_process_with_a_save_under_way(tmp_path):
    """It waits, at its end and when it is asked to end; a failure is its exit code; killed, it takes all along."""
    asked = {"normal": 2, "terminated": 1, "fails": 1, "killed": 1}
    jobs = {how: start(tmp_path / how, how, ranks) for how, ranks in asked.items()}
    codes = {how: [process.wait(timeout=150) for process in job] for how, job in jobs.items()}
    said = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert codes == {
        "normal": [0, 0],
        "terminated": [-signal.SIGTERM],
        "fails": [1],
        "killed": [-signal.SIGKILL],
    }, said
    for how, tags in {
        "normal": ["first", "second"],
        "terminated": ["first", "second"],
        "fails": ["first"],
        "killed": ["first"],
    }.items():
        assert sorted(manifest.complete_tags(tmp_path / how)) == tags
        assert (tmp_path / how / "latest").read_text() == tags[-1]
    assert "the last checkpoint was not saved: Checkpoint" in said["fails.0"]
    writers = {name: int(text.partition("WRITER ")[2].split()[0]) for name, text in said.items()}
    assert len(writers) == 5
    os.kill(writers["killed.0"], signal.SIGCONT)  # it had been stopped
    deadline = time.monotonic() + 30
    while any(map(is_alive, writers.values())):
        assert time.monotonic() < deadline, "writers outlive their ranks"
        time.sleep(0.05)
