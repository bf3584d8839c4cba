"""Lanes: order, results, errors, and who waits for whom."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from fake_streams import FakeStream, FakeStreams

from mics_ds.comm.lanes import INLINE, StreamLane, ThreadLane, make_lane


def lane_thread(name: str) -> threading.Thread | None:
    return next((thread for thread in threading.enumerate() if thread.name == f"mics {name}"), None)


# --------------------------------------------------------------------------------------------------
# A thread


def test_tasks_run_in_order_beside_the_caller():
    lane, seen, gate = ThreadLane("test"), [], threading.Event()

    def task(index: int) -> int:
        gate.wait()
        seen.append((index, threading.current_thread().name))
        return index * index

    pending = [lane.submit(lambda _, index=index: task(index)) for index in range(3)]
    assert seen == []
    assert not pending[0].done()
    gate.set()
    assert [item.wait() for item in pending] == [0, 1, 4]
    assert seen == [(index, "mics test") for index in range(3)]


def test_without_beside_the_task_runs_on_the_caller_after_those_before_it():
    lane, seen, gate = ThreadLane("test"), [], threading.Event()
    lane.submit(lambda _: (gate.wait(), seen.append("first")))
    threading.Timer(0.02, gate.set).start()
    assert lane.submit(lambda _: seen.append(threading.current_thread()), beside=False).done()
    assert seen == ["first", threading.main_thread()]


def test_both_stages_run_on_the_thread():
    def task(stages):
        first = threading.current_thread().name
        with stages.second():
            return first, threading.current_thread().name

    assert ThreadLane("test").submit(task).wait() == ("mics test", "mics test")


def test_a_failure_reaches_the_caller_and_stops_the_lane():
    lane, ran, gate = ThreadLane("test"), [], threading.Event()

    def fail(_) -> None:
        gate.wait()
        raise ValueError("on the lane")

    lane.submit(fail)
    later = lane.submit(lambda _: ran.append(1))
    gate.set()
    with pytest.raises(ValueError, match="on the lane"):
        lane.drain()
    with pytest.raises(ValueError, match="on the lane"):
        later.wait()
    assert ran == []


@pytest.mark.parametrize(("nbytes", "most_expected"), [(0, 6), (4, 3), (10, 2), (99, 2)])
def test_tasks_under_way_hold_no_more_than_the_limit(nbytes, most_expected):
    """One task, whatever it holds, and more as long as they fit together; plus the one that submit is about."""
    lane, running, most, gate = ThreadLane("test", limit=10), [0], [0], threading.Event()

    def task(_) -> None:
        gate.wait(0.02)
        running[0] -= 1

    for _ in range(6):
        running[0] += 1
        most[0] = max(most[0], running[0])
        lane.submit(task, nbytes=nbytes)
    lane.drain()
    assert most[0] <= most_expected


def test_the_lane_keeps_no_autograd_graph():
    assert ThreadLane("test").submit(lambda _: torch.is_grad_enabled()).wait() is False


def test_nothing_large_is_kept_after_a_task():
    lane = ThreadLane("test")
    buffer = torch.zeros(10)
    dies = weakref.ref(buffer)
    pending = lane.submit(lambda _, buffer=buffer: buffer * 2)
    del buffer
    result = pending.wait()
    also_dies = weakref.ref(result)
    del result
    lane.submit(lambda _: None).check()
    gc.collect()
    assert dies() is None
    assert also_dies() is None
    assert pending.done()


def test_a_closed_lane_has_no_thread_and_starts_another_with_the_next_task():
    lane = ThreadLane("closing")
    lane.close()  # nothing to close
    assert lane.submit(lambda _: 1).wait() == 1
    assert lane_thread("closing") is not None
    lane.close()
    assert lane_thread("closing") is None
    assert lane.submit(lambda _: 2).wait() == 2
    lane.close()


def test_a_failure_ends_with_the_lane():
    """Another engine may use it next."""
    lane, gate = ThreadLane("failing"), threading.Event()

    def fail(_) -> None:
        gate.wait()
        raise ValueError("on the lane")

    pending = [lane.submit(fail), lane.submit(lambda _: 1)]
    gate.set()
    with pytest.raises(ValueError, match="on the lane"):
        pending[1].wait()
    lane.close()
    assert lane_thread("failing") is None
    assert lane.submit(lambda _: 2).wait() == 2
    lane.drain()
    lane.close()


def test_closing_does_not_wait_for_a_task_that_hangs():
    lane, gate = ThreadLane("hanging"), threading.Event()
    pending = lane.submit(lambda _: gate.wait())
    lane.close()
    assert lane_thread("hanging") is not None
    gate.set()
    pending.check()


# --------------------------------------------------------------------------------------------------
# Streams


def two_stages(streams: FakeStreams, name: str):
    def task(stages):
        streams.current_stream().do(f"{name} first")
        with stages.second():
            stages.wait_for_first()
            streams.current_stream().do(f"{name} second")
        return name

    return task


def test_the_first_stage_is_on_the_callers_stream_and_the_second_on_the_lanes_own():
    streams = FakeStreams()
    lane = StreamLane("streams", streams)
    pending = [lane.submit(two_stages(streams, name)) for name in "ab"]
    current, (own,) = streams.current_stream(), streams.made
    assert current.log == ["a first", "b first"]
    assert own.log == ["a second", "b second"]
    assert lane_thread("streams") is None
    # the first stage of b is not held up by the second of a; the second of each sees its first
    assert current.after == set()
    assert own.after == {"a first", "b first"}
    assert pending[0].wait() == "a"
    assert current.after == {"a first", "a second"}


def test_whoever_waits_on_another_stream_sees_both_stages():
    streams = FakeStreams()
    lane = StreamLane("test", streams)
    issuing, using = FakeStream("issuing"), FakeStream("using")
    with streams.stream(issuing):
        pending = lane.submit(two_stages(streams, "a"))
        lane.submit(two_stages(streams, "b"))
    with streams.stream(using):
        pending.wait()
    assert using.after == {"a first", "a second"}, "and nothing of b"


def test_a_result_is_handed_over_once():
    streams = FakeStreams()
    pending = StreamLane("test", streams).submit(lambda _: torch.zeros(3))
    dies = weakref.ref(pending.wait())
    gc.collect()
    assert dies() is None


def test_without_beside_everything_is_on_the_callers_stream():
    streams = FakeStreams()
    lane = StreamLane("test", streams)
    lane.submit(two_stages(streams, "a"), beside=False)
    assert streams.made == []
    assert streams.current_stream().log == ["a first", "a second"]
    assert streams.current_stream().after == set()


def test_drain_lets_the_current_stream_see_everything():
    streams = FakeStreams()
    lane = StreamLane("test", streams)
    elsewhere = FakeStream("reduction")
    with streams.stream(elsewhere):
        lane.submit(two_stages(streams, "a"))
        lane.submit(two_stages(streams, "b"), beside=False)
    lane.drain()
    assert streams.current_stream().after == {"a first", "a second", "b first", "b second"}
    waited = len(streams.current_stream().after)
    lane.drain()  # nothing is left to wait for
    assert len(streams.current_stream().after) == waited


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_the_first_stage_is_no_more_than_so_many_tasks_ahead(ahead):
    streams = FakeStreams()
    lane = StreamLane("test", streams, ahead=ahead)
    for index in range(5):
        before = {f"{done} second" for done in range(index - ahead + 1)}
        lane.submit(two_stages(streams, str(index)))
        waited = {item for item in streams.current_stream().after if item.endswith("second")}
        assert waited == before, index


def test_a_failure_is_raised_where_the_task_was_handed_over():
    def fail(_):
        raise ValueError("at once")

    with pytest.raises(ValueError, match="at once"):
        StreamLane("test", FakeStreams()).submit(fail)


def test_a_closed_lane_of_streams_takes_a_new_stream():
    streams = FakeStreams()
    lane = StreamLane("test", streams)
    lane.submit(two_stages(streams, "a"))
    lane.close()
    assert streams.current_stream().after == {"a first", "a second"}
    lane.submit(two_stages(streams, "b"))
    assert [stream.log for stream in streams.made] == [["a second"], ["b second"]]


def test_the_device_decides_which_lane():
    assert isinstance(make_lane("test", None), ThreadLane)
    assert isinstance(make_lane("test", FakeStreams()), StreamLane)


def test_inline_stages_are_where_the_task_is():
    with INLINE.second():
        INLINE.wait_for_first()
        INLINE.used(torch.zeros(1))


EXITS = """
import torch
from mics_ds.comm.lanes import ThreadLane

lane = ThreadLane("exits")
held = [torch.ones(1 << 22) for _ in range(40)]
pending = lane.submit(lambda stages, held=held: None)
del held
pending.wait()  # the task is done; the thread is about to free what it held
"""


def test_a_process_ends_cleanly_right_after_its_last_task():
    """A thread that frees a tensor while the interpreter goes away would abort the process."""
    for _ in range(3):
        result = subprocess.run([sys.executable, "-c", EXITS], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr[-2000:]
