"""The arithmetic and the plumbing of the benchmarks, without a network."""

from __future__ import annotations

import os

import pytest
from bench import formula, runner
from bench.cluster import Cluster
from bench.formula import Shape
from bench.job import EmulatedJob, GPTJob, model_bytes
from bench.runner import Measured, Ranks, Session
from bench.systems import Spec, deepspeed_config
from local_ranks import RankError

M, S = 6.0, 4


@pytest.mark.parametrize(
    ("kind", "shape", "p", "staged", "expected"),
    [
        ("zero3", "2x2", 4, False, 3 * S * M * 3 / 4),
        ("fsdp", "8x2", 16, False, 3 * S * M * 15 / 16),
        ("hpz", "2x2", 4, False, 2 * S * M * 3 / 4),
        ("hpz", "4x1", 4, False, 3 * S * M * 3 / 4),
        ("ddp", "2x2", 1, False, 2 * M * 3 / 4),
        ("mics", "2x2", 2, True, M),  # k · 2 · M/p · (r-1)/r with k = p = r = 2
        ("mics", "2x4", 2, True, 2 * M * 3 / 4),  # two replicas on each node: no more bytes than one ring
        ("hsdp", "4x2", 4, False, 3 * S * M * 3 / 4 + M / 2),
        ("mics", "4x2", 4, True, 3 * S * M * 2 / 4 + M / 2),
        ("mics", "4x2", 4, False, 3 * S * M * 3 / 4 + M / 2),
        ("mics", "1x4", 2, True, 0),
        ("zero3", "1x4", 4, False, 0),
    ],
)
def test_bytes_between_nodes(kind, shape, p, staged, expected):
    assert formula.nic_bytes(kind, M, S, Shape.parse(shape), p, staged) == pytest.approx(expected)


def test_mics_with_one_rank_per_group_sends_what_ddp_sends():
    shape = Shape(3, 2)
    assert formula.nic_bytes("mics", M, S, shape, 1) == formula.nic_bytes("ddp", M, S, shape, 1)


def test_the_bound_is_the_longer_part_or_their_sum():
    limit = formula.bound(12.5e6 / formula.FRAMING, 100e6, 0.25)
    assert (limit.overlapped, limit.serial) == pytest.approx((1.0, 1.25))
    assert formula.bound(0, 100e6, 0.25) == formula.Bound(0.25, 0.25)


@pytest.mark.parametrize(("rate", "bits"), [("100mbit", 10**8), ("1.5gbit", 1.5e9), ("64kbit", 64_000)])
def test_rates_read_as_tc_reads_them(rate, bits):
    assert formula.parse_rate(rate) == bits


@pytest.mark.parametrize("text", ["2", "0x2", "2x2x2", "axb"])
def test_senseless_shapes_are_refused(text):
    with pytest.raises(ValueError, match="shape"):
        Shape.parse(text)


def test_specs_read_back_what_they_print():
    for text in ("zero3", "hsdp:2", 'mics:4:mics_hierarchical_params_gather="auto":x=true', "hsdp:4:async=true"):
        assert str(Spec.parse(text)) == text
    assert Spec.parse("mics:p=4:overlap_comm=false") == Spec("mics", 4, {"overlap_comm": False})


@pytest.mark.parametrize("text", ["zero4", "mics", "zero3:2", "mics:two"])
def test_senseless_specs_are_refused(text):
    with pytest.raises(ValueError, match=r"unknown|partition size"):
        Spec.parse(text)


def test_deepspeed_is_told_not_to_clip_as_its_peers_do_not():
    config = deepspeed_config(Spec.parse("mics:2:overlap_comm=false"), EmulatedJob(), Shape(2, 2), layer_numel=10)
    assert config["gradient_clipping"] == 0
    assert config["zero_optimization"]["mics_shard_size"] == 2
    assert config["zero_optimization"]["overlap_comm"] is False


def test_deepspeed_buckets_are_of_so_many_layers_or_its_own():
    for layers, size in ((3, 30), (None, None)):
        config = deepspeed_config(Spec.parse("zero3"), EmulatedJob(bucket_layers=layers), Shape(2, 2), layer_numel=10)
        assert config["zero_optimization"].get("reduce_bucket_size") == size


@pytest.mark.parametrize("job", [EmulatedJob(hidden=8, layer_s=0), GPTJob(hidden=8, depth=1)], ids=["emulated", "gpt"])
def test_a_job_repeats_its_weights_and_data(job):
    def loss(rank: int) -> float:
        return job.model()(*next(job.data(rank))).item()

    assert loss(0) == loss(0) != loss(1)
    assert len(job.layers(job.model())) == job.depth


def _records() -> list[dict]:
    session = Session(
        Shape(1, 2), None, EmulatedJob(hidden=8), (Spec.parse("zero3"), Spec.parse("hsdp:1")), 1, 2, 1, timeout_s=1
    )
    slow = [
        Measured([2.0, 4.0], [], [3.0, 2.0, 1.0], [0.2, 0.4]),
        Measured([3.0, 1.0], [], [5.0, 4.0, 3.0], [0.4, 0.8]),
    ]
    fast = [
        Measured([1.0, 1.0], [], [3.0, 2.0, 1.0], [0.5, 0.4]),
        Measured([0.5, 2.0], [], [5.0, 4.0, 3.5], [0.7, 0.6]),
    ]
    return runner.merge(session, list(zip(slow, fast)))


def test_records_take_the_slowest_rank_and_the_mean_loss():
    zero3, hsdp = _records()
    assert (zero3["seconds"], zero3["median_s"], zero3["losses"]) == ([3.0, 4.0], 3.5, [4.0, 3.0, 2.0])
    assert hsdp["seconds"] == [1.0, 2.0]
    assert zero3["cpu_s"] == pytest.approx((0.3 + 0.6) / 2)  # the mean of ranks, and the median of steps
    assert zero3["model_bytes"] == model_bytes(EmulatedJob(hidden=8).model()) == 6 * 8 * 8 * 4


def test_the_table_compares_with_the_references_and_shows_a_wrong_loss():
    records = _records()
    runner.compare(records)
    assert records[1]["speedup_over_zero3"] == pytest.approx(3.5 / 1.5)
    assert records[0]["cpu_over_hsdp"] == pytest.approx(0.45 / 0.55)
    assert records[1]["loss_difference"] == pytest.approx(0.25)
    lines = runner.render(records).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "2.33" in lines[2]
    assert "2.5e-01" in lines[2]


def test_a_dead_rank_and_a_raising_one_are_both_reported(monkeypatch):
    def serve(session, cluster, port, rank, folder, pipe) -> None:
        try:
            if rank == 0:
                pipe.send(("error", "Traceback: something broke"))
        finally:
            os._exit(3)

    monkeypatch.setattr(runner, "_serve", serve)
    session = Session(Shape(1, 2), None, EmulatedJob(hidden=8), (), 1, 1, 0, timeout_s=20)
    with pytest.raises(RankError) as caught, Cluster(1) as cluster, Ranks(session, cluster) as ranks:
        ranks.results(print)
    assert "something broke" in str(caught.value)
    assert "died with exit code 3" in str(caught.value)


def test_timeline_ranges_find_their_lane():
    plots = pytest.importorskip("bench.plots", reason="needs matplotlib")
    names = [
        "step",
        "compute forward",
        "gloo:all_gather",
        "mics all-gather between domains",
        "gloo:all_gather",
        "c10d::_reduce_scatter_base_",
        "gloo:all_reduce",  # gloo's reduce-scatter
        "mics gradient all-reduce (hop 2)",
        "c10d::allreduce_",
        "gloo:all_reduce",
        "mics agreement on the gradient norm",
        "c10d::allreduce_",
        "gloo:all_reduce",
    ]
    events = [
        {"name": name, "start": float(place), "end": place + 1.5, "thread": 1} for place, name in enumerate(names)
    ]
    starts = {lane: [start for start, _ in spans] for lane, spans in plots.lanes_of(events).items()}
    assert starts == {"compute": [1], plots.GATHER: [2, 3, 4], plots.HOP_1: [6], plots.HOP_2: [7, 9], "other": [10, 12]}
