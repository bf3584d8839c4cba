"""How long a job takes from the loss of a node to its next step, by what takes it, from memory and from disk.

    python -m bench.restart [--hidden 2048 --layers 20 --states world]        # in scripts/, as root

Two emulated nodes of two ranks, p = 2, torchrun; node 1 is killed and comes back with empty memory. Once the other
node's memory is there, once only the disk.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from . import cluster as emulation

PROGRAM = str(Path(__file__).with_name("train_and_restart.py"))
LIMIT_S = 240


class Job:
    """torchrun on two emulated nodes, each with memory of its own.

    Args:
        shm_bytes: of each node's ``/dev/shm``; by default half of this machine's memory.
    """

    def __init__(self, cluster: emulation.Cluster, root: Path, *arguments: str, shm_bytes: int | None = None) -> None:
        self.cluster, self.root, self.arguments = cluster, root, arguments
        self._size = [] if shm_bytes is None else ["-o", f"size={shm_bytes}"]
        self.disk = root / "disk"
        self.lines: list[str] = []
        self._processes: dict[int, subprocess.Popen] = {}

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for node in (0, 1):
            with suppress(OSError):  # what has ended already
                self.kill(node)
            self.forget(node)

    def memory(self, node: int) -> Path:
        """What the node has in place of /dev/shm: real memory, which outlives its processes."""
        path = self.root / f"memory{node}"
        if not path.exists():
            path.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", *self._size, "tmpfs", str(path)], check=True)
        return path

    def start(self, node: int) -> None:
        own_memory = f'mount --bind {self.memory(node)} /dev/shm && exec "$@"'
        command = ["ip", "netns", "exec", self.cluster.node(node), "unshare", "-m", "sh", "-c", own_memory, "sh"]
        command += [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2"]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{self.cluster.address(0)}:29556"]
        rendezvous = f"is_host={node == 0},keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=1"
        command += ["--rdzv_conf", rendezvous]
        command += ["--local_addr", self.cluster.address(node), "--max_restarts", "3", PROGRAM]
        command += ["--folder", str(self.disk), *self.arguments]
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

    def ranks(self, node: int) -> list[int]:
        """Process ids of the ranks that run on a node."""
        pids = subprocess.run(["ip", "netns", "pids", self.cluster.node(node)], capture_output=True, text=True).stdout
        return [pid for pid in map(int, pids.split()) if b"RANK=" in read(pid, "environ")]

    def kill(self, node: int) -> None:
        """As when its power fails."""
        pids = subprocess.run(["ip", "netns", "pids", self.cluster.node(node)], capture_output=True, text=True).stdout
        for pid in pids.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        self._processes[node].wait()

    def forget(self, node: int) -> None:
        path = self.root / f"memory{node}"
        if path.exists():
            subprocess.run(["umount", "--lazy", str(path)], check=True)
            path.rmdir()

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


def read(pid: int, what: str) -> bytes:
    """A file of /proc; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:
        return b""


def await_end(pids: list[int]) -> float:
    """When the first of some processes has ended, in seconds since the epoch."""
    deadline = time.monotonic() + LIMIT_S
    while all(read(pid, "environ") for pid in pids):
        assert time.monotonic() < deadline, "the ranks of the other node go on"
        time.sleep(0.02)
    return time.time()


def when(job: Job, number: int) -> float:
    """Seconds since the epoch, as the program printed them."""
    found = re.search(r"AT (\S+)", job.lines[number])
    assert found, job.lines[number]
    return float(found[1])


def run(cluster: emulation.Cluster, root: Path, arguments: list[str], *, from_memory: bool) -> dict[str, float]:
    root.mkdir()
    with Job(cluster, root, "--save-at", "3", "--memory-every", "2", "--pause", "3", *arguments) as job:
        for node in (0, 1):
            job.start(node)
        job.await_line(r"STEP 5 ")
        survivors = job.ranks(0)
        assert len(survivors) >= 2, "ranks, and the processes that write for them"
        killed = time.time()
        job.kill(1)
        start = len(job.lines)
        job.forget(1)
        if not from_memory:
            for region in job.memory(0).iterdir():
                shutil.rmtree(region)
            Path("/proc/sys/vm/drop_caches").write_text("1")  # another node has not just written these files
        job.start(1)
        noticed = await_end(survivors)
        loading = when(job, job.await_line(r"AT \S+ LOADING", start))
        loaded = when(job, job.await_line(r"AT \S+ LOADED", start))
        stepped = when(job, job.await_line(r"AT \S+ STEP", start))
    said = [line for line in job.lines[start:] if "resumed from" in line]
    assert bool(said) == from_memory, "\n".join(job.lines[start:])
    print("\n".join(said), flush=True)
    return {
        "detection": noticed - killed,
        "rendezvous, processes, engine": loading - noticed,
        "states": loaded - loading,
        "first step": stepped - loaded,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", default="2048")
    parser.add_argument("--layers", default="20")
    parser.add_argument("--states", default="partition")
    asked = parser.parse_args()
    size = ["--hidden", asked.hidden, "--layers", asked.layers, "--states", asked.states]
    print(f"{12 * int(asked.layers) * (int(asked.hidden) ** 2 + int(asked.hidden)) / 1e9:.2f} GB of states")
    with tempfile.TemporaryDirectory() as folder, emulation.Cluster(2, None) as cluster:
        for name, from_memory in (("memory", True), ("disk", False)):
            times = run(cluster, Path(folder) / name, size, from_memory=from_memory)
            print(
                f"from {name}: " + ", ".join(f"{what} {seconds:.2f} s" for what, seconds in times.items()), flush=True
            )


if __name__ == "__main__":
    main()
