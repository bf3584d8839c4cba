"""What ``comms_logger`` is told of a collective on a device: its time there, not the time that it took to enqueue."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mics_ds.deepspeed_compat import engine


class Device:
    """A device that works beside its host, in virtual seconds."""

    def __init__(self) -> None:
        self.now = 100.0
        self.free_at = 100.0
        """When the current stream is done with everything that it was given so far."""
        self.logged: list[tuple[Any, ...]] = []

    def enqueue(self, seconds: float) -> Device:
        self.now += 1e-6  # all that the host notices
        self.free_at = max(self.free_at, self.now) + seconds
        return self

    def wait(self) -> None:
        """As of NCCL's work: the stream waits, and not the host."""

    def synchronize(self) -> None:
        self.now = max(self.now, self.free_at)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    accelerator = SimpleNamespace(is_synchronized_device=lambda: False, current_stream=lambda: made)
    monkeypatch.setattr(engine, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(engine, "time", SimpleNamespace(perf_counter=lambda: made.now))
    log = SimpleNamespace(enabled=True, prof_all=True, prof_ops=[], append=lambda *entry: made.logged.append(entry))
    monkeypatch.setattr(engine.comm.comm, "comms_logger", log)
    return made


def test_the_time_is_that_of_the_work_and_of_nothing_before_it(device):
    device.enqueue(30.0)  # of a backward pass
    engine.log_collective("hop 1", "all_to_all_single", 4096, lambda: device.enqueue(0.25))
    ((operator, name, milliseconds, nbytes),) = device.logged
    assert (operator, name, nbytes) == ("all_to_all_single", "mics hop 1", 4096)
    assert milliseconds == pytest.approx(250.0, abs=0.01)


@pytest.mark.parametrize(
    ("enabled", "prof_all", "prof_ops", "logged"),
    [(False, True, [], 0), (True, False, [], 0), (True, False, ["all_reduce"], 1), (True, True, [], 1)],
)
def test_nothing_is_waited_for_that_is_not_logged(device, enabled, prof_all, prof_ops, logged):
    log = engine.comm.comm.comms_logger
    log.enabled, log.prof_all, log.prof_ops = enabled, prof_all, prof_ops
    assert engine.log_collective("hop 2", "all_reduce", 8, lambda: device.enqueue(5.0)) is device
    assert len(device.logged) == logged
    assert (device.now < 101) == (logged == 0)
