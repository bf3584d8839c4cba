"""Which stage of a two-stage collective waits for which: the gathers and reductions themselves, on a fake device."""

from __future__ import annotations

import threading

import pytest
import torch
from fake_streams import FakeCollectives, FakeStream, FakeStreams

from mics_ds.comm import collectives
from mics_ds.comm.groups import NodeGroups, RankGroup
from mics_ds.comm.lanes import StreamLane, ThreadLane

INTER, INTRA = RankGroup("inter", (0, 2), 0), RankGroup("intra", (0, 1), 0)
GROUPS = NodeGroups(INTER, INTRA, (0, 2, 1, 3))
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


def reduce(method: str, pieces: int = 1):
    buffers = [torch.ones(4, 3) for _ in range(pieces)]
    return lambda stages: collectives.reduce_scatter_mean_hierarchical(buffers, GROUPS, method, stages)


def gather(stages):
    return collectives.all_gather_hierarchical(torch.ones(6), GROUPS, 1, stages)


@pytest.mark.parametrize("method", METHODS)
def test_reductions_of_consecutive_buckets_overlap(streams, issued, method):
    """While one bucket crosses between the nodes, the next is reduced inside them, as far ahead as the lane allows."""
    lane = StreamLane("reduction", streams, ahead=2)
    for _ in range(4):
        lane.submit(reduce(method))
    after = issued.started_after
    for bucket in range(4):
        assert f"inside {bucket}" in after[f"between nodes {bucket}"]
        waits = {name for name in after[f"inside {bucket}"] if name.startswith("between")}
        assert waits == {f"between nodes {before}" for before in range(bucket - 1)}


@pytest.mark.parametrize("method", METHODS)
def test_pieces_of_one_bucket_overlap(streams, issued, method):
    StreamLane("reduction", streams).submit(reduce(method, pieces=3))
    after = issued.started_after
    for piece in range(3):
        assert f"inside {piece}" in after[f"between nodes {piece}"]
        assert not any(name.startswith("between") for name in after[f"inside {piece}"])


@pytest.mark.parametrize("method", METHODS)
def test_without_overlap_comm_pieces_still_do(streams, issued, method):
    """Everything is on the caller's stream, one piece behind."""
    StreamLane("reduction", streams).submit(reduce(method, pieces=3), beside=False)
    waits = {name for name in issued.started_after["inside 2"] if name.startswith("between")}
    assert waits == {"between nodes 0"}
    assert streams.current_stream().after >= {"between nodes 2", "inside 2"}


def test_a_gather_does_not_hold_up_the_stream_it_is_issued_on(streams, issued):
    """DeepSpeed makes compute wait for that stream at every module. The next gather's first stage is free, too."""
    lane = StreamLane("all-gather", streams)
    gathering, computing = FakeStream("all-gather"), streams.current_stream()
    with streams.stream(gathering):
        pending = [lane.submit(gather) for _ in range(3)]
    assert gathering.after == set()
    assert not any(name.startswith("inside") for name in issued.started_after["between nodes 2"])
    pending[0].wait()
    assert computing.after >= {"between nodes 0", "inside 0"}
    assert not computing.after & {"between nodes 1", "inside 1"}


@pytest.mark.parametrize("method", METHODS)
def test_on_a_thread_one_bucket_follows_another(streams, issued, method):
    """On a CPU a wait stops the thread, so stages overlap within a bucket only, and beside the caller's own work."""
    lane, threads = ThreadLane("reduction"), set()

    def watched(stages):
        threads.add(threading.current_thread().name)
        return reduce(method, pieces=2)(stages)

    for _ in range(2):
        lane.submit(watched)
    lane.drain()
    lane.close()
    assert threads == {"mics reduction"}
    assert list(issued.started_after) == [
        f"{stage} {piece}" for piece in range(4) for stage in ("inside", "between nodes")
    ]
    assert "between nodes 1" in issued.started_after["inside 2"]
