"""How processes end that have a checkpoint under way, or copies in memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cases import slow
from launching import free_port

from mics_ds.checkpoint import folder as folders

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


def number_after(word: str, text: str) -> int:
    return int(text.partition(f"{word} ")[2].split()[0])


ENDS: dict[str, tuple[int, int]] = {
    "normal": (1, 0),
    "normal, of two": (2, 0),
    "terminated": (1, -signal.SIGTERM),
    "logging": (1, -signal.SIGTERM),
    "fails": (1, 1),
    "killed": (1, -signal.SIGKILL),
    "forked": (1, -signal.SIGKILL),
    "workers": (1, 0),
}
"""How processes end: their number, and their exit code."""


@pytest.mark.parametrize("ends", [["normal", "killed"], ["logging", "killed"], slow([*ENDS])], ids=", ".join)
def test_ends_of_a_process_with_a_save_under_way(tmp_path, ends):
    """A rank waits for its save when it ends or is asked to end; a failed save is its exit code; a rank that is killed
    takes its writer along, whatever it has forked."""
    jobs = {how: start(tmp_path / how, how.partition(",")[0], ENDS[how][0]) for how in ends}
    codes = {how: [process.wait(timeout=150) for process in job] for how, job in jobs.items()}
    said = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert codes == {how: [code] * count for how, (count, code) in ENDS.items() if how in ends}, said
    for how in ends:
        tags = ["first"] if how in ("fails", "killed") else ["first", "second"]
        if how == "forked":  # it may have written for a moment yet
            tags = sorted(folders.complete_tags(tmp_path / how))
            assert tags[:1] == ["first"]
        assert sorted(folders.complete_tags(tmp_path / how)) == tags, how
        assert (tmp_path / how / "latest").read_text() == tags[-1]
    if "fails" in ends:
        assert "the last checkpoint was not saved: Checkpoint" in said["fails.0"]
    if "workers" in ends:
        assert "WORKERS [-15, -15]" in said["workers.0"], "a forked child's SIGTERM is its own"
    writers = {name: number_after("WRITER", text) for name, text in said.items()}
    assert len(writers) == sum(len(job) for job in jobs.values())
    os.kill(writers["killed.0"], signal.SIGCONT)  # it had been stopped
    child = number_after("CHILD", said["forked.0"]) if "forked" in ends else None
    try:
        assert child is None or is_alive(child)
        deadline = time.monotonic() + 30
        while any(map(is_alive, writers.values())):
            assert time.monotonic() < deadline, f"writers outlive their ranks: {writers}"
            time.sleep(0.05)
    finally:
        if child is not None:
            os.kill(child, signal.SIGKILL)


@pytest.mark.slow
def test_a_rank_that_is_stuck_ends_when_it_is_asked_to(tmp_path):
    """In a collective of C++, where no handler of Python's runs, with copies in memory switched on."""
    other_is_ready = threading.Event()
    before = signal.signal(signal.SIGUSR1, lambda *_: other_is_ready.set())
    ranks = start(tmp_path / "stuck", "stuck", 2)
    try:
        deadline = time.monotonic() + 120
        while not other_is_ready.is_set():
            assert time.monotonic() < deadline
            assert [rank.poll() for rank in ranks] == [None, None], [p.read_text() for p in tmp_path.glob("stuck.*")]
            time.sleep(0.1)
        time.sleep(1.0)  # rank 0 is in the barrier
        ranks[0].terminate()
        assert ranks[0].wait(timeout=8) == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGUSR1, before)
        for rank in ranks:
            rank.kill()
            rank.wait()
