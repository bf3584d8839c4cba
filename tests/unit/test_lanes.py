"""Lanes: order, results, errors."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest
import torch

from mics_ds.comm.lanes import Lane

CPU = torch.device("cpu")


def test_jobs_run_in_order_beside_the_caller():
    lane, seen, gate = Lane("test"), [], threading.Event()

    def job(index: int) -> int:
        gate.wait()
        seen.append((index, threading.current_thread().name))
        return index * index

    pending = [lane.submit(lambda index=index: job(index), CPU) for index in range(3)]
    assert seen == []
    assert not pending[0].done()
    gate.set()
    assert [item.wait() for item in pending] == [0, 1, 4]
    assert seen == [(index, "mics test") for index in range(3)]


def test_without_beside_the_job_runs_at_once_and_after_those_before_it():
    lane, seen = Lane("test"), []
    lane.submit(lambda: (time.sleep(0.05), seen.append("first")), CPU)
    assert lane.submit(lambda: seen.append("second"), CPU, beside=False).done()
    assert seen == ["first", "second"]


def test_a_device_with_streams_needs_no_thread():
    lane = Lane("test")
    assert lane.submit(threading.current_thread, torch.device("meta")).wait() is threading.main_thread()


def test_a_failure_reaches_the_caller_and_stops_the_lane():
    lane, ran = Lane("test"), []

    def fail() -> None:
        raise ValueError("on the lane")

    lane.submit(fail, CPU)
    later = lane.submit(lambda: ran.append(1), CPU)
    with pytest.raises(ValueError, match="on the lane"):
        lane.drain()
    with pytest.raises(ValueError, match="on the lane"):
        later.wait()
    assert ran == []


@pytest.mark.parametrize(("nbytes", "most_expected"), [(0, 6), (4, 3), (10, 2), (99, 2)])
def test_jobs_under_way_hold_no_more_than_the_limit(nbytes, most_expected):
    """One job, whatever it holds, and more as long as they fit together; plus the one that submit is about."""
    lane, running, most, gate = Lane("test", limit=10), [0], [0], threading.Event()

    def job() -> None:
        gate.wait(0.02)
        running[0] -= 1

    for _ in range(6):
        running[0] += 1
        most[0] = max(most[0], running[0])
        lane.submit(job, CPU, nbytes=nbytes)
    lane.drain()
    assert most[0] <= most_expected


def test_the_lane_keeps_no_autograd_graph():
    assert Lane("test").submit(torch.is_grad_enabled, CPU).wait() is False


def test_nothing_large_is_kept_after_a_job():
    lane = Lane("test")
    buffer = torch.zeros(10)
    dies = weakref.ref(buffer)
    pending = lane.submit(lambda buffer=buffer: buffer * 2, CPU)
    del buffer
    result = pending.wait()
    also_dies = weakref.ref(result)
    del result
    lane.submit(lambda: None, CPU).check()
    gc.collect()
    assert dies() is None
    assert also_dies() is None
    assert pending.done()
