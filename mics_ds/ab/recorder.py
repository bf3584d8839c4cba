"""Records of the steps of a user's own script, written from inside it for an A/B comparison.

Active only when ``MICS_DS_REPORT`` names a folder; :mod:`mics_ds.ab` sets it. Each rank appends one
JSON line per optimizer step to a file of its own, and nothing is sent anywhere, so that both runs of the
A/B are disturbed alike and little.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

from ..deepspeed_compat.patching import Patches

REPORT_ENV = "MICS_DS_REPORT"
COUNTERS = Path("/proc/net/dev")


def nic_bytes(text: str) -> dict[str, int]:
    """Bytes sent so far by each network interface, from the text of ``/proc/net/dev``."""
    found = {}
    for line in text.splitlines():
        name, colon, values = line.partition(":")
        if colon:
            found[name.strip()] = int(values.split()[8])
    return found


class StepRecorder:
    """Records the steps of one engine."""

    def __init__(self, folder: Path, rank: int, local_rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"rank{rank}.jsonl"
        # One rank per node reads the counters, which are the node's.
        self._counts = local_rank == 0 and COUNTERS.exists()
        self._losses: list[float] = []
        self._file: TextIO | None = None
        self._before = time.perf_counter()
        self._nic = self._read_nic()

    def _read_nic(self) -> dict[str, int]:
        return nic_bytes(COUNTERS.read_text()) if self._counts else {}

    def saw_loss(self, loss: Any) -> None:
        self._losses.append(float(loss))

    def finished_step(self) -> None:
        now, nic = time.perf_counter(), self._read_nic()
        line = {
            "loss": sum(self._losses) / len(self._losses) if self._losses else None,
            "seconds": now - self._before,
            "sent": {name: count - self._nic.get(name, 0) for name, count in nic.items()},
        }
        if self._file is None:
            self._file = self._path.open("w")
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._before, self._nic = now, nic
        self._losses.clear()


def record_engine(patches: Patches, engine_class: type) -> None:
    """Have every engine of this class record its steps, if ``MICS_DS_REPORT`` is set."""
    folder = os.environ.get(REPORT_ENV)
    if not folder:
        return

    def recorder(engine: Any) -> StepRecorder:
        if engine._mics_recorder is None:
            engine._mics_recorder = StepRecorder(Path(folder), engine.global_rank, engine.local_rank)
        return engine._mics_recorder

    def backward(original: Any, self: Any, loss: Any, *args: Any, **kwargs: Any) -> Any:
        recorder(self).saw_loss(loss.detach())
        return original(self, loss, *args, **kwargs)

    def step(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        before = self.global_steps
        result = original(self, *args, **kwargs)
        if self.global_steps > before:
            recorder(self).finished_step()
        return result

    patches.set(engine_class, "_mics_recorder", None)
    patches.wrap_method(engine_class, "backward", backward)
    patches.wrap_method(engine_class, "step", step)
