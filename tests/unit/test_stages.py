"""Which stage of a two-stage collective waits for which: the gathers and reductions themselves, on a fake device."""

from __future__ import annotations

import threading

import pytest
import torch
from fake_streams import FakeCollectives, FakeStream, FakeStreams

from mics_ds.comm import collectives
from mics_ds.comm.async_exec import INLINE, Deferred, StreamExecutor, ThreadExecutor
from mics_ds.comm.rank_group import RankGroup, StageGroups

INTER, INTRA = RankGroup("inter", (0, 2), 0), RankGroup("intra", (0, 1), 0)
GROUPS = StageGroups(INTER, INTRA)
METHODS = ["native", "all_to_all"]


@pytest.fixture
def streams() -> FakeStreams:
    return FakeStreams()


@pytest.fixture
def issued(streams: FakeStreams, monkeypatch: pytest.MonkeyPatch) -> FakeCollectives:
    fake = FakeCollectives(streams, {"inter": "between nodes", "intra": "inside"})
    monkeypatch.setattr(collectives, "dist", fake)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    return fake


def reduce(method: str):
    rows, output = torch.ones(4, 3), torch.empty(3)
    return lambda memory: collectives.start_reduce_scatter_mean_hierarchical(rows, output, GROUPS, method, memory)


def gather(memory):
    return collectives.start_all_gather_hierarchical(torch.ones(6), GROUPS, memory)


def gather_whole(memory):
    return collectives.start_all_gather_whole_hierarchical(torch.ones(6), GROUPS, memory)


@pytest.mark.parametrize("method", METHODS)
def test_reductions_of_consecutive_buckets_overlap(streams, issued, method):
    """While one bucket crosses between the nodes, the next is reduced inside them, as far ahead as is allowed."""
    executor = StreamExecutor(streams, ahead=2)
    for _ in range(4):
        executor.submit(reduce(method))
    after = issued.started_after
    for bucket in range(4):
        assert f"inside {bucket}" in after[f"between nodes {bucket}"]
        waits = {name for name in after[f"inside {bucket}"] if name.startswith("between")}
        assert waits == {f"between nodes {before}" for before in range(bucket - 1)}


@pytest.mark.parametrize("method", METHODS)
def test_without_overlap_comm_everything_is_on_the_callers_stream(streams, issued, method):
    for _ in range(2):
        reduce(method)(INLINE).wait()
    assert streams.made == []
    assert "between nodes 0" in issued.started_after["inside 1"]
    assert streams.current_stream().after >= {"between nodes 1", "inside 1"}


@pytest.mark.parametrize("task", [gather, gather_whole])
def test_a_gather_does_not_hold_up_the_stream_it_is_issued_on(streams, issued, task):
    """DeepSpeed makes compute wait for that stream at every module. The next gather's issue stage is free, too."""
    executor = StreamExecutor(streams)
    gathering, computing = FakeStream("all-gather"), streams.current_stream()
    with streams.stream(gathering):
        handles = [executor.submit(task) for _ in range(3)]
    assert gathering.after == set()
    assert not any(name.startswith("inside") for name in issued.started_after["between nodes 2"])
    handles[0].wait()
    assert computing.after >= {"between nodes 0", "inside 0"}
    assert not computing.after & {"between nodes 1", "between nodes 2"}


@pytest.mark.parametrize(
    ("task", "inside"), [(gather, 1), (gather_whole, 2), (reduce("native"), 1), (reduce("all_to_all"), 1)]
)
def test_each_stage_is_one_collective(streams, issued, task, inside):
    """Pieces would cost a latency each. Only a gather of one large tensor has a collective for each of its nodes."""
    StreamExecutor(streams).submit(task)
    assert [name for name in issued.started_after if name.startswith("between")] == ["between nodes 0"]
    assert len(issued.started_after) == 1 + inside


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("own_issue", [False, True])
def test_on_threads_each_stage_is_for_one_bucket_after_another(streams, issued, method, own_issue):
    """On a CPU a wait stops the thread, so another one issues meanwhile. All ranks issue in one order."""
    executor, issuing, waiting = ThreadExecutor("reduction", own_issue=own_issue), set(), set()

    def watched(memory):
        issuing.add(threading.current_thread().name)
        reducing = reduce(method)(memory)

        def finish() -> None:
            waiting.add(threading.current_thread().name)
            reducing.wait()

        return Deferred(finish)

    for _ in range(3):
        executor.submit(watched)
    executor.drain()
    executor.close()
    assert (issuing, waiting) == ({"mics reduction" if own_issue else "MainThread"}, {"mics reduction"})
    for stage in ("inside", "between nodes"):
        assert [name for name in issued.started_after if name.startswith(stage)] == [f"{stage} {n}" for n in range(3)]
    assert all(f"inside {n}" in issued.started_after[f"between nodes {n}"] for n in range(3))
