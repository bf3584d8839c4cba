"""A node dies in the middle of training, and torchrun starts the job again: it goes on from a sibling's memory."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from bench import cluster as emulation

PROGRAM = str(Path(__file__).resolve().parents[1] / "programs" / "train_and_restart.py")
LIMIT_S = 240
STEPS = 12

pytestmark = pytest.mark.skipif(
    emulation.why_unavailable() is not None, reason=f"cannot emulate a cluster: {emulation.why_unavailable()}"
)


class Job:
    """torchrun on two emulated nodes, each with memory of its own."""

    def __init__(self, cluster: emulation.Cluster, root: Path, *arguments: str) -> None:
        self.cluster, self.root, self.arguments = cluster, root, arguments
        self.disk = root / "disk"
        self.lines: list[str] = []
        self._processes: dict[int, subprocess.Popen] = {}

    def memory(self, node: int) -> Path:
        path = self.root / f"memory{node}"
        path.mkdir(exist_ok=True)
        return path

    def start(self, node: int) -> None:
        own_memory = f'mount --bind {self.memory(node)} /dev/shm && exec "$@"'
        command = ["ip", "netns", "exec", self.cluster.node(node), "unshare", "-m", "sh", "-c", own_memory, "sh"]
        command += [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2"]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{self.cluster.address(0)}:29556"]
        rendezvous = f"is_host={node == 0},keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=1"
        command += ["--rdzv_conf", rendezvous]
        command += ["--local_addr", self.cluster.address(node), "--max_restarts", "3", PROGRAM]
        command += ["--folder", str(self.disk), "--steps", str(STEPS), *self.arguments]
        env = {**os.environ, "GLOO_SOCKET_IFNAME": self.cluster.interface, "OMP_NUM_THREADS": "1"}
        # With the store shared, torchrun 2.13 never tells a new node where it is (docs/checkpoints.md).
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._processes[node] = process
        threading.Thread(target=self._read, args=(process,), daemon=True).start()

    def _read(self, process: subprocess.Popen) -> None:
        with open(self.root / "output", "a") as output:
            for line in process.stdout or ():
                output.write(line)
                self.lines.append(line.rstrip())

    def kill(self, node: int) -> None:
        """As when its power fails."""
        pids = subprocess.run(["ip", "netns", "pids", self.cluster.node(node)], capture_output=True, text=True).stdout
        for pid in pids.split():
            os.kill(int(pid), signal.SIGKILL)
        self._processes[node].wait()

    def forget(self, node: int) -> None:
        shutil.rmtree(self.memory(node))

    def await_line(self, pattern: str, start: int = 0) -> int:
        """The number of the first line that matches."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            for number, line in enumerate(self.lines[start:], start):
                if re.search(pattern, line):
                    return number
            time.sleep(0.05)
        raise AssertionError(f"no {pattern!r} in\n" + "\n".join(self.lines[-80:]))

    def finish(self) -> None:
        codes = {node: process.wait(timeout=LIMIT_S) for node, process in self._processes.items()}
        assert set(codes.values()) == {0}, "\n".join(self.lines[-80:])

    def losses(self, start: int = 0) -> dict[int, str]:
        """Exact losses by step, as first printed from a line on."""
        found: dict[int, str] = {}
        for line in self.lines[start:]:
            match = re.search(r"STEP (\d+) (\S+)$", line)
            if match:
                found.setdefault(int(match[1]), match[2])
        return found


def uninterrupted(cluster: emulation.Cluster, root: Path) -> dict[int, str]:
    root.mkdir()
    job = Job(cluster, root, "--pause", "0")
    job.start(0)
    job.start(1)
    job.finish()
    return job.losses()


def loses(cluster: emulation.Cluster, root: Path, *, both_copies: bool) -> tuple[Job, int]:
    """A job that loses node 1 after step 7, of which copies were taken at 6, 4 and 2, and step 3 was saved."""
    root.mkdir()
    job = Job(cluster, root)
    job.start(0)
    job.start(1)
    job.await_line(r"STEP 7 ")
    job.kill(1)
    killed = len(job.lines)
    job.forget(1)
    if both_copies:
        for copy in job.memory(0).glob("mics_ds-*/mp0-shard1*"):
            copy.unlink()
    else:
        job.disk.rename(root / "gone")
        job.disk.write_text("unreadable as a folder")
    job.start(1)
    job.await_line(r"LOADED", killed)
    if not both_copies:
        job.disk.unlink()
    job.finish()
    return job, killed


@pytest.mark.slow
def test_a_lost_node_costs_the_steps_since_the_last_copy(tmp_path):
    with emulation.Cluster(2, None) as cluster:
        expected = uninterrupted(cluster, tmp_path / "whole")
        job, killed = loses(cluster, tmp_path / "one", both_copies=False)
        said = re.search(
            r"resumed from memory at step (\d) \(on disk: nothing\); 2 ranks got their shard from a sibling",
            "\n".join(job.lines[killed:]),
        )
        assert said, "\n".join(job.lines[killed:])
        step = int(said[1])
        assert step in (4, 6), "of 7; on a busy machine the last copy may not be summed up yet"
        assert job.losses(killed) == {later: expected[later] for later in range(step + 1, STEPS + 1)}


@pytest.mark.slow
def test_without_both_nodes_that_held_a_shard_the_disk_is_used(tmp_path):
    with emulation.Cluster(2, None) as cluster:
        job, killed = loses(cluster, tmp_path / "both", both_copies=True)
        said = "\n".join(job.lines[killed:])
        assert re.search(r"of step [46], shards \[1\] are in no node's memory", said)
        assert "no complete set of copies in memory" in said
        assert "LOADED 3" in said
        assert set(job.losses(killed)) == set(range(4, STEPS + 1))
