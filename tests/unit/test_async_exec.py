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

from mics_ds.comm.async_exec import INLINE, StreamExecutor, ThreadExecutor, make_executor


def executor_thread(name: str) -> threading.Thread | None:
    return next((thread for thread in threading.enumerate() if thread.name == f"mics {name}"), None)


# --------------------------------------------------------------------------------------------------
# With a thread


def test_tasks_run_in_order_beside_the_caller():
    executor, seen, gate = ThreadExecutor("test"), [], threading.Event()

    def task(index: int) -> int:
        gate.wait()
        seen.append((index, threading.current_thread().name))
        return index * index

    handles = [executor.submit(lambda _, index=index: task(index)) for index in range(3)]
    assert seen == []
    gate.set()
    assert [handle.wait() for handle in handles] == [0, 1, 4]
    assert seen == [(index, "mics test") for index in range(3)]


@pytest.mark.parametrize("beside", [True, False])
def test_a_pack_runs_on_the_callers_thread_before_submit_returns(beside):
    executor, seen = ThreadExecutor("test"), []

    def note(what: str) -> None:
        seen.append((what, threading.current_thread().name))

    handle = executor.submit(lambda _: note("task"), pack=lambda _: note("pack"), beside=beside)
    assert seen[0] == ("pack", "MainThread")
    handle.wait()
    assert seen == [("pack", "MainThread"), ("task", "mics test" if beside else "MainThread")]


def test_without_beside_the_task_runs_on_the_caller_after_the_tasks_before_it():
    executor, seen, gate = ThreadExecutor("test"), [], threading.Event()
    executor.submit(lambda _: (gate.wait(), seen.append("first")))
    threading.Timer(0.02, gate.set).start()
    executor.submit(lambda _: seen.append(threading.current_thread()), beside=False)
    assert seen == ["first", threading.main_thread()]


def test_both_stages_run_on_the_thread():
    def task(stages):
        first = threading.current_thread().name
        with stages.wait_stage():
            return first, threading.current_thread().name

    assert ThreadExecutor("test").submit(task).wait() == ("mics test", "mics test")


def overlapping_task(seen: list[str], name: str, may_end: threading.Event):
    def task(stages):
        seen.append(f"issue {name}")
        with stages.wait_stage():
            seen.append(f"wait {name}")
            may_end.wait()
            seen.append(f"end {name}")

    return task


def test_a_task_is_issued_while_the_one_before_it_waits():
    """Each stage is for one task at a time, in their order."""
    executor, seen, may_end = ThreadExecutor("overlapping"), [], threading.Event()
    for name in "abc":
        executor.submit(overlapping_task(seen, name, may_end))
    while len(seen) < 3:
        threading.Event().wait(0.001)
    threading.Event().wait(0.02)
    assert sorted(seen) == ["issue a", "issue b", "wait a"]
    assert seen[0] == "issue a"
    may_end.set()
    executor.drain()
    for stage in ("issue", "wait", "end"):
        assert [what for what in seen if what.startswith(stage)] == [f"{stage} {name}" for name in "abc"]
    assert all(seen.index(f"end {a}") < seen.index(f"wait {b}") for a, b in ("ab", "bc"))
    executor.close()
    assert executor_thread("overlapping") is None


def test_nothing_is_issued_while_a_task_issues_again():
    """Ranks would issue its second collective before that of the next task, or after it, by chance."""
    executor, seen, may_end = ThreadExecutor("test"), [], threading.Event()

    def task(stages) -> None:
        seen.append("issue a")
        with stages.wait_stage(issues_again=True):
            seen.append("wait a")
            may_end.wait()
            seen.append("issue a again")

    executor.submit(task)
    executor.submit(overlapping_task(seen, "b", may_end))
    while len(seen) < 2:
        threading.Event().wait(0.001)
    threading.Event().wait(0.02)
    assert seen == ["issue a", "wait a"]
    may_end.set()
    executor.drain()
    assert seen == ["issue a", "wait a", "issue a again", "issue b", "wait b", "end b"]
    executor.close()


def test_a_task_does_not_wait_after_a_failure_of_the_one_before_it():
    """It would issue collectives that no other rank expects, in a group that they have given up."""
    executor, seen, gate = ThreadExecutor("test"), [], threading.Event()

    def fail(stages) -> None:
        with stages.wait_stage():
            gate.wait()
            raise ValueError("in the task")

    executor.submit(fail)
    issued = executor.submit(overlapping_task(seen, "b", gate))
    never = executor.submit(overlapping_task(seen, "c", gate))
    while not seen:
        threading.Event().wait(0.001)
    gate.set()
    for handle in (issued, never):
        with pytest.raises(ValueError, match="in the task"):
            handle.wait()
    assert seen == ["issue b"]
    executor.close()


def test_a_failure_reaches_the_caller_and_stops_the_executor():
    executor, ran, gate = ThreadExecutor("test"), [], threading.Event()

    def fail(_) -> None:
        gate.wait()
        raise ValueError("in the task")

    executor.submit(fail)
    later = executor.submit(lambda _: ran.append(1))
    gate.set()
    with pytest.raises(ValueError, match="in the task"):
        executor.drain()
    with pytest.raises(ValueError, match="in the task"):
        later.wait()
    assert ran == []


@pytest.mark.parametrize(("ahead", "most_expected"), [(None, 6), (1, 1), (2, 2), (3, 3)])
def test_no_more_tasks_are_unfinished_than_allowed(ahead, most_expected):
    """Their memory is bounded so. A pack belongs to its task: it allocates."""
    executor, held, most, gate = ThreadExecutor("test", ahead=ahead), [0], [0], threading.Event()

    def pack(_) -> None:
        held[0] += 1
        most[0] = max(most[0], held[0])

    def task(_) -> None:
        gate.wait(0.02)
        held[0] -= 1

    for _ in range(6):
        executor.submit(task, pack=pack)
    executor.drain()
    assert most[0] == most_expected


def test_tasks_keep_no_autograd_graph():
    assert ThreadExecutor("test").submit(lambda _: torch.is_grad_enabled()).wait() is False


def test_nothing_large_is_kept_after_a_task():
    executor = ThreadExecutor("test")
    buffer = torch.zeros(10)
    dies = weakref.ref(buffer)
    handle = executor.submit(lambda _, buffer=buffer: buffer * 2)
    del buffer
    result = handle.wait()
    also_dies = weakref.ref(result)
    del result
    executor.submit(lambda _: None).wait()
    executor.submit(lambda _: None).wait()
    del handle
    gc.collect()
    assert dies() is None
    assert also_dies() is None


def test_a_closed_executor_has_no_thread_and_starts_another_with_the_next_task():
    executor = ThreadExecutor("closing")
    executor.close()  # nothing to close
    assert executor.submit(lambda _: 1).wait() == 1
    assert executor_thread("closing") is not None
    executor.close()
    assert executor_thread("closing") is None
    assert executor.submit(lambda _: 2).wait() == 2
    executor.close()


def test_a_failure_ends_with_close():
    """Another engine may use the executor next."""
    executor, gate = ThreadExecutor("failing"), threading.Event()

    def fail(_) -> None:
        gate.wait()
        raise ValueError("in the task")

    handles = [executor.submit(fail), executor.submit(lambda _: 1)]
    gate.set()
    with pytest.raises(ValueError, match="in the task"):
        handles[1].wait()
    executor.close()
    assert executor_thread("failing") is None
    assert executor.submit(lambda _: 2).wait() == 2
    executor.drain()
    executor.close()


def test_closing_does_not_wait_for_a_task_that_hangs():
    executor, gate = ThreadExecutor("hanging"), threading.Event()
    handle = executor.submit(lambda _: gate.wait())
    executor.close()
    assert executor_thread("hanging") is not None
    gate.set()
    handle.wait()


def test_what_is_under_way_when_an_executor_is_closed_can_be_waited_for():
    """Engines share an executor. One of them is destroyed while the other's weights are on their way."""
    executor, seen, gate = ThreadExecutor("shared"), [], threading.Event()

    def task(_) -> None:
        gate.wait()
        seen.append("first")

    executor.submit(task)
    executor.close()
    threading.Timer(0.05, gate.set).start()
    executor.submit(lambda _: seen.append("second"))
    executor.drain()
    assert seen == ["first", "second"], "in their order, by whichever threads"
    gate.clear()
    executor.submit(task)
    executor.close()
    threading.Timer(0.05, gate.set).start()
    executor.drain()
    assert seen == ["first", "second", "first"]
    executor.close()


def test_a_failure_after_an_executor_was_closed_is_not_that_of_the_next_task():
    executor, gate = ThreadExecutor("shared"), threading.Event()

    def fail(_) -> None:
        gate.wait()
        raise ValueError("of the engine that is gone")

    for later in (lambda: executor.submit(lambda _: 2).wait(), executor.drain):
        executor.submit(fail)
        executor.submit(fail)
        executor.close()
        threading.Timer(0.05, gate.set).start()
        assert later() in (2, None)
        executor.drain()
        executor.close()
        gate.clear()


EXITS = """
import torch
from mics_ds.comm.async_exec import ThreadExecutor

executor = ThreadExecutor("exits")
held = [torch.ones(1 << 22) for _ in range(40)]
handle = executor.submit(lambda stages, held=held: None)
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
    def task(stages):
        streams.current_stream().do(f"{name} issue")
        issued = streams.Event()  # as of a collective
        issued.record(streams.current_stream())
        with stages.wait_stage():
            streams.current_stream().wait_event(issued)
            streams.current_stream().do(f"{name} wait")
        return name

    return task


def test_the_issue_stage_is_on_the_callers_stream_and_the_wait_stage_on_the_executors_own():
    streams = FakeStreams()
    executor = StreamExecutor("streams", streams)
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
    executor = StreamExecutor("streams", streams, ahead=1, own_issue_stream=True)
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
    executor = StreamExecutor("test", streams)
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
    handle = StreamExecutor("test", streams).submit(two_stages(streams, "a"))
    for name in ("first", "second"):
        using = FakeStream(name)
        with streams.stream(using):
            handle.wait()
        assert using.after == {"a issue", "a wait"}


def test_a_result_is_handed_over_once():
    streams = FakeStreams()
    handle = StreamExecutor("test", streams).submit(lambda _: torch.zeros(3))
    dies = weakref.ref(handle.wait())
    gc.collect()
    assert dies() is None


def test_without_beside_everything_is_on_the_callers_stream():
    streams = FakeStreams()
    for own_issue_stream in (False, True):
        executor = StreamExecutor("test", streams, own_issue_stream=own_issue_stream)
        executor.submit(two_stages(streams, "a"), beside=False)
    assert streams.made == []
    assert streams.current_stream().log == ["a issue", "a wait"] * 2


def test_drain_lets_the_current_stream_see_everything():
    streams = FakeStreams()
    executor = StreamExecutor("test", streams)
    elsewhere = FakeStream("reduction")
    with streams.stream(elsewhere):
        executor.submit(two_stages(streams, "a"))
        executor.submit(two_stages(streams, "b"), beside=False)
    executor.drain()
    assert streams.current_stream().after == {"a issue", "a wait", "b issue", "b wait"}
    waited = len(streams.current_stream().after)
    executor.drain()  # nothing is left to wait for
    assert len(streams.current_stream().after) == waited


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_the_issue_stage_is_no_more_than_so_many_tasks_ahead(ahead):
    streams = FakeStreams()
    executor = StreamExecutor("test", streams, ahead=ahead)
    for index in range(5):
        before = {f"{done} wait" for done in range(index - ahead + 1)}
        executor.submit(two_stages(streams, str(index)))
        waited = {item for item in streams.current_stream().after if item.endswith("wait")}
        assert waited == before, index


@pytest.mark.parametrize("ahead", [None, 1, 2])
@pytest.mark.parametrize("own_issue_stream", [False, True])
def test_an_executor_keeps_a_bounded_number_of_events(ahead, own_issue_stream):
    """Of tasks that nobody has drained: the executor of gathers never is."""
    streams = FakeStreams()
    executor = StreamExecutor("test", streams, ahead=ahead, own_issue_stream=own_issue_stream)
    for _ in range(100):
        executor.submit(two_stages(streams, "a")).wait()
    assert streams.live_events() <= 2 * (ahead or 0)


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_tasks_share_so_many_scratch_buffers_in_turn(ahead, record_stream):
    executor = StreamExecutor("test", FakeStreams(), ahead=ahead)

    def places(numel: int, dtype: torch.dtype) -> list[int]:
        def task(stages):
            taken = [stages.scratch(numel, torch.empty(0, dtype=dtype)) for _ in range(2)]
            assert [(item.numel(), item.dtype) for item in taken] == [(numel, dtype)] * 2
            return [item.data_ptr() for item in taken]

        return executor.submit(task).wait()

    first = [places(64, torch.float32) for _ in range(ahead)]
    assert len({place for of_task in first for place in of_task}) == 2 * ahead, "each task has memory of its own"
    assert [places(64, torch.float32) for _ in range(ahead)] == first
    assert [places(100, torch.bfloat16) for _ in range(ahead)] == first, "fewer bytes, of another dtype"
    assert record_stream == [], "nothing was freed"


def test_a_scratch_buffer_that_is_too_small_is_freed_after_the_work_on_it(record_stream):
    streams = FakeStreams()
    executor = StreamExecutor("test", streams, ahead=1)
    for numel in (10, 20):
        executor.submit(lambda stages, numel=numel: stages.scratch(numel, torch.empty(0)).fill_(1.0))
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
        StreamExecutor("test", FakeStreams()).submit(fail)


def test_a_closed_executor_of_streams_takes_new_streams():
    streams = FakeStreams()
    executor = StreamExecutor("test", streams)
    executor.submit(two_stages(streams, "a"))
    executor.close()
    assert streams.current_stream().after == {"a issue", "a wait"}
    executor.submit(two_stages(streams, "b"))
    assert [stream.log for stream in streams.made] == [["a wait"], ["b wait"]]


def test_the_device_decides_which_executor():
    assert isinstance(make_executor("test", None), ThreadExecutor)
    assert isinstance(make_executor("test", FakeStreams()), StreamExecutor)


def test_inline_stages_are_where_the_task_is():
    with INLINE.wait_stage():
        INLINE.record_stream(torch.zeros(1))
        assert INLINE.scratch(3, torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
