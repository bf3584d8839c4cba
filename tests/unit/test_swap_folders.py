"""Folders for swap files: one for each process and engine, gone with the process, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mics_ds import swap_folders

PROGRAM = """
import os, signal, sys
from mics_ds.swap_folders import new_folder
folder = new_folder(sys.argv[1])
(folder / "1_param.tensor.swp").write_bytes(b"swapped")
print(folder, flush=True)
end = sys.stdin.readline().strip()
if end == "fork":
    if os.fork() == 0:
        sys.exit()  # as a child of a framework might, with all that happens at exit
    os.wait()
    assert (folder / "1_param.tensor.swp").exists()
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def start(path: Path) -> tuple[subprocess.Popen, Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def end(process: subprocess.Popen, how: str) -> int:
    process.communicate(how + "\n", timeout=60)
    return process.returncode


def test_jobs_on_one_node_and_engines_in_one_process_do_not_meet(tmp_path):
    """The same path for all of them, and two that are killed."""
    (tmp_path / "somebody's").mkdir()
    (tmp_path / "mics-without-a-lock").mkdir()
    (first, a), (second, b) = start(tmp_path), start(tmp_path)
    mine = [swap_folders.new_folder(tmp_path) for _ in range(2)]
    assert len({a, b, *mine}) == 4
    assert not list(mine[1].iterdir())
    swapped = "1_param.tensor.swp"
    assert (a / swapped).exists()
    assert (b / swapped).exists(), "nobody deletes what a living process has"
    assert end(first, "kill") == -signal.SIGKILL
    assert (a / swapped).exists()
    third, c = start(tmp_path)
    assert not a.exists(), "the next one cleans up"
    assert not a.parent.exists()
    assert (b / swapped).exists()
    assert all(folder.exists() for folder in mine)
    assert end(second, "fork") == 0
    assert not b.parent.exists()
    assert end(third, "") == 0
    assert not c.parent.exists()
    left = {item.name for item in tmp_path.iterdir()}
    assert left == {"somebody's", "mics-without-a-lock", mine[0].parent.name}


def test_a_path_that_cannot_be_used_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        swap_folders.new_folder(tmp_path / "file" / "below")
