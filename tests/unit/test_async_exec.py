"""Executors: order, results, errors, memory, and which stream or thread waits for which work."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from fake_streams import FakeStream, FakeStreams

from mics_ds.comm.async_exec import INLINE, Deferred, StreamExecutor, ThreadExecutor


def executor_thread(name: str) -> threading.Thread | None:
    return next((thread for thread in threading.enumerate() if thread.name == f"mics {name}"), None)


# --------------------------------------------------------------------------------------------------
# With threads


def finished_by(function):
    """A task without an issue stage."""
    return lambda memory: Deferred(function)


def value(result):
    return finished_by(lambda: result)


each_own_issue = pytest.mark.parametrize("own_issue", [False, True])


@each_own_issue
def test_tasks_run_in_order_beside_the_caller(own_issue):
    executor, seen, gate = ThreadExecutor("test", own_issue=own_issue), [], threading.Event()

    def task(index: int) -> int:
        gate.wait()
        seen.append((index, threading.current_thread().name))
        return index * index

    handles = [executor.submit(finished_by(lambda index=index: task(index))) for index in range(3)]
    assert seen == []
    gate.set()
    assert [handle.wait() for handle in handles] == [0, 1, 4]
    assert seen == [(index, "mics test") for index in range(3)]
    executor.close()


def test_the_issue_stage_runs_on_the_callers_thread_before_submit_returns():
    """The caller may use again what it has packed."""
    executor, seen = ThreadExecutor("test"), []

    def task(memory):
        seen.append(threading.current_thread().name)
        return Deferred(lambda: threading.current_thread().name)

    handle = executor.submit(task)
    assert seen == ["MainThread"]
    assert handle.wait() == "mics test"


def test_with_an_issue_thread_of_its_own_the_caller_goes_on():
    """Also where the issue stage waits, as hop 2 does for hop 1."""
    executor, gate = ThreadExecutor("apart", own_issue=True), threading.Event()

    def task(memory):
        gate.wait()
        issuing = threading.current_thread()
        return Deferred(lambda: (issuing, threading.current_thread()))

    handle = executor.submit(task)
    gate.set()
    issuing, waiting = handle.wait()
    assert issuing.name == waiting.name == "mics apart"
    assert len({issuing, waiting, threading.current_thread()}) == 3
    executor.close()
    assert executor_thread("apart") is None


def overlapping_task(seen: list[str], name: str, may_end: threading.Event):
    def task(memory):
        seen.append(f"issue {name}")

        def finish() -> None:
            seen.append(f"wait {name}")
            may_end.wait()
            seen.append(f"end {name}")

        return Deferred(finish)

    return task


@each_own_issue
def test_tasks_are_issued_while_the_one_before_them_waits(own_issue):
    """Each stage is for one task at a time, in their order."""
    executor, seen, may_end = ThreadExecutor("overlapping", own_issue=own_issue), [], threading.Event()
    for name in "abc":
        executor.submit(overlapping_task(seen, name, may_end))
    while len(seen) < 4:
        threading.Event().wait(0.001)
    threading.Event().wait(0.02)
    assert sorted(seen) == ["issue a", "issue b", "issue c", "wait a"]
    assert seen[0] == "issue a"
    may_end.set()
    executor.drain()
    for stage in ("issue", "wait", "end"):
        assert [what for what in seen if what.startswith(stage)] == [f"{stage} {name}" for name in "abc"]
    assert all(seen.index(f"end {a}") < seen.index(f"wait {b}") for a, b in ("ab", "bc"))
    executor.close()
    assert executor_thread("overlapping") is None


@each_own_issue
def test_after_a_failure_no_task_is_issued_or_waited_for(own_issue):
    """It would issue collectives that no other rank expects, in a group that they have given up."""
    executor, seen, gate = ThreadExecutor("test", own_issue=own_issue), [], threading.Event()

    def fail() -> None:
        gate.wait()
        raise ValueError("in the task")

    handles = [executor.submit(finished_by(fail)), executor.submit(overlapping_task(seen, "b", gate))]
    while not seen:
        threading.Event().wait(0.001)
    gate.set()
    for handle in handles:
        with pytest.raises(ValueError, match="in the task"):
            handle.wait()
    executor._unfinished.clear()  # as if nobody had looked yet
    with pytest.raises(ValueError, match="in the task"):
        executor.submit(overlapping_task(seen, "c", gate)).wait()
    assert seen == ["issue b"]
    executor.close()


@each_own_issue
def test_a_failure_of_an_issue_stage_reaches_whoever_waits(own_issue):
    executor = ThreadExecutor("test", own_issue=own_issue)

    def fail(memory):
        raise ValueError("at once")

    executor.submit(fail)
    with pytest.raises(ValueError, match="at once"):
        executor.drain()
    executor.close()


@pytest.mark.parametrize(("ahead", "most_expected"), [(None, 6), (1, 1), (2, 2), (3, 3)])
def test_no_more_tasks_are_unfinished_than_allowed(ahead, most_expected):
    """Their memory is bounded so: the issue stage allocates."""
    executor, held, most, gate = ThreadExecutor("test", ahead=ahead), [0], [0], threading.Event()

    def task(memory):
        held[0] += 1
        most[0] = max(most[0], held[0])
        return Deferred(finish)

    def finish() -> None:
        gate.wait(0.02)
        held[0] -= 1

    for _ in range(6):
        executor.submit(task)
    executor.drain()
    assert most[0] == most_expected


@each_own_issue
def test_tasks_keep_no_autograd_graph(own_issue):
    executor = ThreadExecutor("test", own_issue=own_issue)
    issued = []
    executor.submit(lambda memory: issued.append(torch.is_grad_enabled()) or Deferred(lambda: None)).wait()
    assert issued == [executor.submit(finished_by(torch.is_grad_enabled)).wait()] == [False]


@each_own_issue
def test_the_wait_stage_may_change_what_was_allocated_in_inference_mode(own_issue):
    """Evaluation gathers parameters in it."""
    executor = ThreadExecutor("test", own_issue=own_issue)

    def task(memory):
        buffer = memory.scratch(3, torch.empty(0))
        return Deferred(lambda: buffer.fill_(2.0))

    with torch.inference_mode():
        assert executor.submit(task).wait().tolist() == [2.0] * 3


@each_own_issue
def test_nothing_large_is_kept_after_a_task(own_issue):
    executor = ThreadExecutor("test", own_issue=own_issue)
    buffer = torch.zeros(10)
    dies = weakref.ref(buffer)
    handle = executor.submit(finished_by(lambda buffer=buffer: buffer * 2))
    del buffer
    result = handle.wait()
    also_dies = weakref.ref(result)
    del result
    executor.submit(value(None)).wait()
    executor.submit(value(None)).wait()
    del handle
    gc.collect()
    assert dies() is None
    assert also_dies() is None


def test_a_closed_executor_has_no_thread_and_starts_another_with_the_next_task():
    executor = ThreadExecutor("closing")
    executor.close()  # nothing to close
    assert executor.submit(value(1)).wait() == 1
    assert executor_thread("closing") is not None
    executor.close()
    assert executor_thread("closing") is None
    assert executor.submit(value(2)).wait() == 2
    executor.close()


@each_own_issue
def test_a_failure_ends_with_close(own_issue):
    """Another engine may use the executor next."""
    executor, gate = ThreadExecutor("failing", own_issue=own_issue), threading.Event()

    def fail() -> None:
        gate.wait()
        raise ValueError("in the task")

    handles = [executor.submit(finished_by(fail)), executor.submit(value(1))]
    gate.set()
    with pytest.raises(ValueError, match="in the task"):
        handles[1].wait()
    executor.close()
    assert executor_thread("failing") is None
    assert executor.submit(value(2)).wait() == 2
    executor.drain()
    executor.close()


@each_own_issue
def test_closing_does_not_wait_for_a_task_that_hangs(own_issue):
    executor, gate = ThreadExecutor("hanging", own_issue=own_issue), threading.Event()
    handle = executor.submit(finished_by(gate.wait))
    executor.close()
    assert executor_thread("hanging") is not None
    gate.set()
    handle.wait()
    executor.drain()
    executor.close()
    assert executor_thread("hanging") is None


@each_own_issue
def test_what_is_under_way_when_an_executor_is_closed_can_be_waited_for(own_issue):
    """Engines share an executor. One of them is destroyed while the other's weights are on their way."""
    executor, seen, gate = ThreadExecutor("shared", own_issue=own_issue), [], threading.Event()

    def first() -> None:
        gate.wait()
        seen.append("first")

    executor.submit(finished_by(first))
    executor.close()
    threading.Timer(0.05, gate.set).start()
    executor.submit(finished_by(lambda: seen.append("second")))
    executor.drain()
    assert seen == ["first", "second"], "in their order, by whichever threads"
    gate.clear()
    executor.submit(finished_by(first))
    executor.close()
    threading.Timer(0.05, gate.set).start()
    executor.drain()
    assert seen == ["first", "second", "first"]
    executor.close()


@each_own_issue
def test_a_failure_after_an_executor_was_closed_is_not_that_of_the_next_task(own_issue):
    executor, gate = ThreadExecutor("shared", own_issue=own_issue), threading.Event()

    def fail() -> None:
        gate.wait()
        raise ValueError("of the engine that is gone")

    for later in (lambda: executor.submit(value(2)).wait(), executor.drain):
        executor.submit(finished_by(fail))
        executor.submit(finished_by(fail))
        executor.close()
        threading.Timer(0.05, gate.set).start()
        assert later() in (2, None)
        executor.drain()
        executor.close()
        gate.clear()


EXITS = """
import torch
from mics_ds.comm.async_exec import Deferred, ThreadExecutor

executor = ThreadExecutor("exits")
held = [torch.ones(1 << 22) for _ in range(40)]
handle = executor.submit(lambda memory, held=held: Deferred(lambda held=held: None))
del held
handle.wait()  # the task is done; the thread is about to free what it held
"""


def test_a_process_ends_cleanly_right_after_its_last_task():
    """A thread that frees a tensor while the interpreter goes away would abort the process."""
    result = subprocess.run([sys.executable, "-c", EXITS], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr[-2000:]


# --------------------------------------------------------------------------------------------------
# With streams


def two_stages(streams: FakeStreams, name: str):
    def task(memory):
        streams.current_stream().do(f"{name} issue")
        issued = streams.Event()  # as of a collective
        issued.record(streams.current_stream())

        def finish() -> str:
            streams.current_stream().wait_event(issued)
            streams.current_stream().do(f"{name} wait")
            return name

        return Deferred(finish)

    return task


def test_the_issue_stage_is_on_the_callers_stream_and_the_wait_stage_on_the_executors_own():
    streams = FakeStreams()
    executor = StreamExecutor(streams)
    handles = [executor.submit(two_stages(streams, name)) for name in "ab"]
    current, (own,) = streams.current_stream(), streams.made
    assert current.log == ["a issue", "b issue"]
    assert own.log == ["a wait", "b wait"]
    assert executor_thread("streams") is None
    # the issue stage of b is not held up by the wait stage of a; the wait stage of each sees its own issue stage
    assert current.after == set()
    assert own.after == {"a issue", "b issue"}
    assert handles[0].wait() == "a"
    assert current.after == {"a issue", "a wait"}


def test_an_issue_stream_of_its_own_follows_the_callers_and_holds_it_up_nowhere():
    streams = FakeStreams()
    executor = StreamExecutor(streams, ahead=1, own_issue=True)
    caller = streams.current_stream()
    caller.do("gradients")
    for name in "abc":
        executor.submit(two_stages(streams, name))
    issue, wait = streams.made
    assert issue.log == ["a issue", "b issue", "c issue"]
    assert wait.log == ["a wait", "b wait", "c wait"]
    assert "gradients" in issue.after
    assert caller.after == set(), "also where the issue stage waits for older tasks"
    executor.drain()
    assert caller.after >= {*issue.log, *wait.log}


def test_a_waiting_stream_sees_both_stages_and_nothing_later():
    streams = FakeStreams()
    executor = StreamExecutor(streams)
    issuing, using = FakeStream("issuing"), FakeStream("using")
    with streams.stream(issuing):
        handle = executor.submit(two_stages(streams, "a"))
        executor.submit(two_stages(streams, "b"))
    with streams.stream(using):
        handle.wait()
    assert using.after == {"a issue", "a wait"}, "and nothing of b"


def test_any_number_of_streams_may_wait_for_a_task():
    """Updated weights are waited for by each gather that reads them."""
    streams = FakeStreams()
    handle = StreamExecutor(streams).submit(two_stages(streams, "a"))
    for name in ("first", "second"):
        using = FakeStream(name)
        with streams.stream(using):
            handle.wait()
        assert using.after == {"a issue", "a wait"}


def test_a_result_is_kept_by_its_handle_alone():
    executor = StreamExecutor(FakeStreams())
    dies = weakref.ref(executor.submit(lambda memory: Deferred(lambda: torch.zeros(3))).wait())
    gc.collect()
    assert dies() is None


def test_drain_lets_the_current_stream_see_everything():
    streams = FakeStreams()
    executor = StreamExecutor(streams)
    elsewhere = FakeStream("reduction")
    with streams.stream(elsewhere):
        executor.submit(two_stages(streams, "a"))
        executor.submit(two_stages(streams, "b"))
    executor.drain()
    assert streams.current_stream().after == {"a issue", "a wait", "b issue", "b wait"}


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_the_issue_stage_is_no_more_than_so_many_tasks_ahead(ahead):
    streams = FakeStreams()
    executor = StreamExecutor(streams, ahead=ahead)
    for index in range(5):
        before = {f"{done} wait" for done in range(index - ahead + 1)}
        executor.submit(two_stages(streams, str(index)))
        waited = {item for item in streams.current_stream().after if item.endswith("wait")}
        assert waited == before, index


@pytest.mark.parametrize("ahead", [None, 1, 2])
@pytest.mark.parametrize("own_issue", [False, True])
def test_an_executor_keeps_a_bounded_number_of_events(ahead, own_issue):
    """Of tasks that nobody has drained: the executor of gathers never is."""
    streams = FakeStreams()
    executor = StreamExecutor(streams, ahead=ahead, own_issue=own_issue)
    for _ in range(100):
        executor.submit(two_stages(streams, "a")).wait()
    assert streams.live_events() <= 2 * (ahead or 0)


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_tasks_share_so_many_scratch_buffers_in_turn(ahead, record_stream):
    executor = StreamExecutor(FakeStreams(), ahead=ahead)

    def places(numel: int, dtype: torch.dtype) -> list[int]:
        def task(memory):
            def take() -> torch.Tensor:
                taken = memory.scratch(numel, torch.empty(0, dtype=dtype))
                assert (taken.numel(), taken.dtype) == (numel, dtype)
                return taken

            issuing = take()
            return Deferred(lambda: [issuing.data_ptr(), take().data_ptr()])

        return executor.submit(task).wait()

    first = [places(64, torch.float32) for _ in range(ahead)]
    assert len({place for of_task in first for place in of_task}) == 2 * ahead, "each task has memory of its own"
    assert [places(64, torch.float32) for _ in range(ahead)] == first
    assert [places(100, torch.bfloat16) for _ in range(ahead)] == first, "fewer bytes, of another dtype"
    assert record_stream == [], "nothing was freed"


def test_a_scratch_buffer_that_is_too_small_is_freed_after_the_work_on_it(record_stream):
    streams = FakeStreams()
    executor = StreamExecutor(streams, ahead=1)
    for numel in (10, 20):
        executor.submit(lambda memory, numel=numel: Deferred(lambda: memory.scratch(numel, torch.empty(0)).fill_(1.0)))
    (own,) = streams.made
    assert record_stream == [(40, own)]
    executor.close()
    assert record_stream == [(40, own), (80, own)]


@pytest.fixture
def record_stream(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, FakeStream]]:
    """(bytes, stream) of each call of ``Tensor.record_stream``."""
    calls: list[tuple[int, FakeStream]] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: calls.append((tensor.nbytes, stream)))
    return calls


def test_a_failure_is_raised_where_the_task_was_submitted():
    def fail(_):
        raise ValueError("at once")

    with pytest.raises(ValueError, match="at once"):
        StreamExecutor(FakeStreams()).submit(fail)


def test_a_closed_executor_of_streams_takes_new_streams():
    streams = FakeStreams()
    executor = StreamExecutor(streams)
    executor.submit(two_stages(streams, "a"))
    executor.close()
    assert streams.current_stream().after == {"a issue", "a wait"}
    executor.submit(two_stages(streams, "b"))
    assert [stream.log for stream in streams.made] == [["a wait"], ["b wait"]]


def test_memory_of_a_task_without_an_executor_is_its_own():
    INLINE.record_stream(torch.zeros(1))
    assert INLINE.scratch(3, torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
