"""Ranks as processes of this machine, for a start without a launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import torch.distributed as dist

from .ranks import GRACE_S

POLL_S = 0.1
END_S = 3.0
"""Seconds that ranks have to clean up after Ctrl-C."""


def run_ranks(n: int, command: Sequence[str]) -> int:
    """Run ``python COMMAND`` n times, as ranks of one job, and return the exit code: the first one that is not 0.

    When one has failed, the others have a while to say so. None is left behind.
    """
    # The store lives here, so that no rank has to outlive the others, and no port can be taken meanwhile.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "LOCAL_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # have torch connect to it, as under torchrun
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    processes: list[subprocess.Popen] = []
    try:
        for rank in range(n):
            mine = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen([sys.executable, *command], env=mine))
        return _wait(processes)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        # The terminal has told the ranks too, but not somebody who meant this process only.
        for told in (False, True):
            for process in processes:
                if told and process.poll() is None:
                    process.send_signal(signal.SIGINT)
            end = time.monotonic() + END_S
            while time.monotonic() < end and any(process.poll() is None for process in processes):
                time.sleep(POLL_S)
        return 130
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def _wait(processes: Sequence[subprocess.Popen]) -> int:
    deadline = float("inf")
    while True:
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        if None not in codes or time.monotonic() > deadline:
            break
        if failed and deadline == float("inf"):
            deadline = time.monotonic() + 4 * GRACE_S
        time.sleep(POLL_S)
    killed = {rank: -code for rank, code in enumerate(codes) if code is not None and code < 0}
    for rank, number in killed.items():
        print(f"rank {rank} was killed by signal {number}", file=sys.stderr)
    own = [code for code in failed if code > 0]
    return own[0] if own else int(bool(failed))
