"""Ranks as processes of this machine: the one pool behind the tests, the benchmark and the GPU checks.

Each rank has a pipe of its own, so rank i is always process i, a file for its output and one for its stack. When a rank
fails, the others get a moment to fail too, the rest are asked for their stacks, and one exception carries everything
that is known.

What a rank sends through its pipe: ``("result", value)``, ``("error", text)``, or ``("progress", text or None)``.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

LOG_TAIL = 4000
REAP_S = 10.0

Serve = Callable[[int, Path, Connection], None]
"""Main function of a rank, called with its rank, the pool's folder and its pipe. Picklable, unless processes fork."""


class RankError(AssertionError):
    """A rank raised, died or did not finish. The message has every rank's traceback or stack."""


class LocalRanks:
    """``world_size`` processes. Use as a context, or call :meth:`close`: none survives it.

    Args:
        serve: runs in each process. What it raises is sent as an error.
        context: how processes start: fork, forkserver or spawn.
        grace_s: between the first failure and asking the other ranks where they are.
    """

    def __init__(self, world_size: int, serve: Serve, context: BaseContext, *, grace_s: float = 2.0) -> None:
        self.world_size = world_size
        self.folder = Path(tempfile.mkdtemp(prefix="mics_ranks_"))
        self._grace_s = grace_s
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        sys.stdout.flush()  # a forked process would print what is left once more
        sys.stderr.flush()
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                process = context.Process(target=_rank_main, args=(serve, rank, self.folder, theirs), daemon=True)
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LocalRanks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill all live ranks and remove the folder."""
        for process in self._processes:
            if process.is_alive():
                process.kill()
        for process in self._processes:
            process.join(REAP_S)
        for pipe in self._pipes:
            pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def send(self, task: Any) -> None:
        """Give every rank a task. A rank that is dead is found by :meth:`collect`."""
        for pipe in self._pipes:
            try:
                pipe.send(task)
            except OSError:
                continue

    def collect(
        self,
        timeout_s: float,
        *,
        what: str = "ranks",
        since_last_news: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> list[Any]:
        """Wait for a result of every rank and return them in rank order.

        Args:
            what: name of the task, for the error.
            since_last_news: count the time from the last message of any rank, not from now.
            say: called with the text of progress messages.

        Raises:
            RankError: at least one rank has no result. The processes cannot be used any more.
        """
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout_s
        while pending := {
            pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in results and rank not in failures
        }:
            ready = wait(list(pending), timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                failures.update({rank: self._stack(rank) for rank in pending.values()})
                break
            for pipe in ready:
                rank = pending[pipe]
                try:
                    kind, value = pipe.recv()
                except (EOFError, OSError):
                    kind, value = "error", self._death(rank)
                if kind == "result":
                    results[rank] = value
                elif kind == "error":
                    failures[rank] = value
                elif value is not None and say is not None:
                    say(value)
            if failures:
                deadline = min(deadline, time.monotonic() + self._grace_s)
            elif since_last_news:
                deadline = time.monotonic() + timeout_s
        if failures:
            raise RankError(self._report(what, failures))
        return [results[rank] for rank in range(self.world_size)]

    def _death(self, rank: int) -> str:
        self._processes[rank].join(REAP_S)
        return f"died with exit code {self._processes[rank].exitcode}"

    def _stack(self, rank: int) -> str:
        path = self.folder / f"stack{rank}"
        if self._processes[rank].is_alive() and path.exists():
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
            time.sleep(0.3)
        stack = path.read_text() if path.exists() else "(still starting)"
        return f"still running when the others had failed or time was up; it was here:\n{stack}"

    def _report(self, what: str, failures: dict[int, str]) -> str:
        lines = [f"{what} failed on ranks {sorted(failures)}"]
        for rank in range(self.world_size):
            lines.append(f"──── rank {rank} of {self.world_size} ────")
            lines.append(failures.get(rank, "had no error of its own").rstrip())
        for rank in sorted(failures):
            log = self.folder / f"log{rank}"
            text = log.read_text(errors="replace")[-LOG_TAIL:].rstrip() if log.exists() else "(none)"
            lines.append(f"──── end of rank {rank}'s output ────\n{text}")
        return "\n".join(lines)


def _rank_main(serve: Serve, rank: int, folder: Path, pipe: Connection) -> None:
    """Run a rank and end its process without a shutdown of the interpreter, which gloo's threads may abort."""
    code = 0
    try:
        log = os.open(folder / f"log{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.register(signal.SIGUSR1, file=open(folder / f"stack{rank}", "w"), all_threads=True)
        serve(rank, folder, pipe)
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve_tasks(pipe: Connection, call: Callable[[Any], Any]) -> None:
    """Answer each task that arrives with ``call(task)``, until the other end of the pipe is closed."""
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("result", call(task)))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))
