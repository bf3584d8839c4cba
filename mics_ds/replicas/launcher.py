"""Starts a lighthouse and several replicas of a job on one machine, and starts those again that die."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..log import logger
from .membership import LIGHTHOUSE_ENV, REPLICA_ENV, import_torchft

_POLL_S = 0.2
_PAUSE_S = 1.0
"""Seconds before a replica is started again."""
_GRACE_S = 60.0
"""Seconds that replicas have to end once one of them has."""
_TERM_S = 10.0


class Launcher:
    """Replicas of one job, each a command of its own.

    Args:
        command: what starts one replica. ``{replica}`` and ``{port}`` in it stand for its number and a free port.
        replicas: how many.
        lighthouse: address of a lighthouse.
        restarts: how often each may be started again.
        gpus: GPUs of each replica, ``None`` to leave the choice to the command.
    """

    def __init__(
        self, command: Sequence[str], replicas: int, lighthouse: str, restarts: int, gpus: int | None = None
    ) -> None:
        self._command, self._lighthouse, self._gpus = list(command), lighthouse, gpus
        self._left = dict.fromkeys(range(replicas), restarts)
        self._processes: dict[int, subprocess.Popen] = {}
        self._again: dict[int, float] = {}
        """When to start a replica again."""
        self._succeeded = False

    def run(self) -> int:
        """Run until all replicas have ended. Returns 0 if one of them has done its work."""
        try:
            for replica in self._left:
                self._start(replica)
            deadline = None
            while self._processes or self._again:
                self._collect()
                if self._succeeded and deadline is None:
                    deadline = time.monotonic() + _GRACE_S
                if deadline is not None and time.monotonic() > deadline and self._processes:
                    logger.warning("replicas %s are ended: another one is done", sorted(self._processes))
                    break
                time.sleep(_POLL_S)
        finally:
            _end(self._processes.values())
        return int(not self._succeeded)

    def _start(self, replica: int) -> None:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = str(probe.getsockname()[1])
        environment = {**os.environ, LIGHTHOUSE_ENV: self._lighthouse, REPLICA_ENV: str(replica)}
        environment |= {"PET_MASTER_PORT": port, "MASTER_PORT": port}  # PET_: torchrun's names of its own options
        if self._gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(_visible(replica * self._gpus, self._gpus))
        command = [part.replace("{replica}", str(replica)).replace("{port}", port) for part in self._command]
        self._processes[replica] = subprocess.Popen(command, env=environment, start_new_session=True)

    def _collect(self) -> None:
        for replica, process in list(self._processes.items()):
            code = process.poll()
            if code is None:
                continue
            _end([process])  # what it has left behind
            del self._processes[replica]
            if code == 0:
                self._succeeded = True
            elif self._succeeded or not self._left[replica]:
                logger.error("replica %d ended with code %d, and is not started again", replica, code)
            else:
                self._left[replica] -= 1
                self._again[replica] = time.monotonic() + _PAUSE_S
                logger.warning("replica %d ended with code %d; starting it again", replica, code)
        for replica in [replica for replica, due in self._again.items() if time.monotonic() >= due]:
            del self._again[replica]
            if not self._succeeded:
                self._start(replica)


def _visible(first: int, count: int) -> list[str]:
    """Return the GPUs ``first`` to ``first + count - 1`` of those that this process may use."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(first + count)] if given is None else given.split(",")
    return names[first : first + count]


def _end(processes: Iterable[subprocess.Popen]) -> None:
    """End processes with all that they have started: kindly, then for good."""
    processes = list(processes)
    for process in processes:
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + _TERM_S
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def start_lighthouse(least: int, port: int = 0) -> tuple[Any, str]:
    """Start a lighthouse in this process.

    Args:
        least: replicas that have to be there before any of them begins a step.

    Returns:
        The server, which is to be kept, and its address.

    Raises:
        MicsConfigError: torchft is not installed.
    """
    import_torchft()
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind=f"[::]:{port}", min_replicas=least, join_timeout_ms=30_000)
    return server, f"http://127.0.0.1:{server.address().rpartition(':')[2]}"


def launch(
    command: Sequence[str],
    replicas: int,
    least: int,
    restarts: int,
    gpus: int | None = None,
    announce: Callable[[str], None] = lambda text: None,
) -> int:
    """Start a lighthouse and replicas, and wait for them. Returns the exit code."""
    server, address = start_lighthouse(least)
    announce(f"lighthouse: {address}")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    try:
        return Launcher(command, replicas, address, restarts, gpus).run()
    except KeyboardInterrupt:
        return 130
    finally:
        server.shutdown()


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
