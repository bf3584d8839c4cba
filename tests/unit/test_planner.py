"""The planner's arithmetic: closed forms, bounds, and errors. No processes."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from round_machine import NO_LIMITS, layers, machine

from mics_ds.comm import sizes as comm_sizes
from mics_ds.comm.layout import MicsLayout
from mics_ds.comm.sizes import Sizes
from mics_ds.comm.wire import wire_of
from mics_ds.errors import MicsPlanError
from mics_ds.planner import machine as planner_machine
from mics_ds.planner import plan as planning
from mics_ds.planner.machine import GroupForm, Link, Sweep
from mics_ds.planner.memory import memory
from mics_ds.planner.model import NAMED, Block, Model, Transformer, Unit
from mics_ds.planner.presets import PRESETS, load_machine
from mics_ds.planner.timeline import ENCODING_BYTES, WIRE_BYTES, Costs, Queues, Scheme, StepTime, step_time
from mics_ds.planner.workload import Workload, ZeroSettings

# ------------------------------------------------------------------------------------------ collectives


def test_a_ring_inside_a_node():
    assert machine(4).time("all_gather", 8000, GroupForm(1, 4)) == pytest.approx(3 * 1 + 3 / 4 * 8000 / 1000)


def test_a_ring_over_nodes_leaves_each_node_once():
    # 4 ranks, 2 steps inside nodes and 1 between them; the slower link decides
    assert machine(2).time("all_gather", 800, GroupForm(2, 2)) == pytest.approx(2 * 1 + 10 + 3 / 4 * 800 / 100)


def test_groups_beside_each_other_share_the_link_of_a_node():
    one, two = (machine(2).time("all_reduce", 800, GroupForm(2, 1, beside)) for beside in (1, 2))
    assert two - one == pytest.approx(2 * 1 / 2 * 800 / 100)


def test_two_stages_follow_each_other():
    subject = machine(2)
    inter = subject.time("all_gather", 400, GroupForm(2, 1, 2))
    intra = subject.time("all_gather", 800, GroupForm(1, 2))
    expected = inter + intra
    assert subject.time("all_gather", 800, GroupForm(2, 2), staged=True) == pytest.approx(expected)


def test_trees_have_logarithmic_latency_on_nccl_only():
    form = GroupForm(64, 1)
    latency = {name: machine(1, backend=name).time("all_reduce", 1e-9, form) for name in ("nccl", "gloo")}
    assert latency["nccl"] == pytest.approx(2 * 6 * 10)
    assert latency["gloo"] == pytest.approx(2 * 63 * 10)


def test_what_gloo_sends():
    subject = machine(2, backend="gloo", inter=Link(100, 0), intra=Link(1e9, 0))
    form = GroupForm(2, 2)
    assert subject.time("stock_reduce_scatter", 800, form) == pytest.approx(2 * 3 / 4 * 800 / 100)
    assert subject.time("reduce_scatter", 800, form) == pytest.approx(2 * 2 / 4 * 800 / 100)


@pytest.mark.parametrize(("n", "k"), [(16, 4), (8, 2), (12, 4), (24, 8), (6, 1)])
def test_forms_are_those_of_the_layout(n, k):
    for p in (p for p in range(1, n + 1) if n % p == 0 and (k % p == 0 or p % k == 0)):
        layout = MicsLayout(tuple(range(n)), tuple(rank // k for rank in range(n)), p)
        subject = machine(k)
        for groups, form in (
            (layout.partition_groups, subject.partition_form(n, p)),
            (layout.replication_groups, subject.replication_form(n, p)),
        ):
            counts = layout.domain_counts(groups[0])
            assert (len(counts), max(counts.values())) == (form.nodes, form.per_node), (p, groups)
            on_first_node = sum(any(rank < k for rank in group) for group in groups)
            assert form.beside == min(on_first_node, len(groups)), (p, groups)
        assert subject.can_stage(n, p) == (layout.why_not_hierarchical is None)


def test_a_group_that_fits_nodes_unevenly_shares_their_links():
    form = machine(4).partition_form(24, 6)
    assert (form.nodes, form.beside) == (2, 2)
    assert not machine(4).can_stage(24, 6)


def test_a_measured_sweep_replaces_the_formula_and_scales_it_elsewhere():
    form, other = GroupForm(2, 2), GroupForm(4, 2)
    sweep = Sweep("all_gather", form, False, (1000, 3000), (5.0, 9.0))
    subject = machine(2, sweeps=(sweep,))
    assert subject.time("all_gather", 2000, form) == pytest.approx(7.0)
    assert subject.time("all_gather", 5000, form) == pytest.approx(13.0)
    ratio = subject.formula("all_gather", 2000, other) / subject.formula("all_gather", 2000, form)
    assert subject.time("all_gather", 2000, other) == pytest.approx(7.0 * ratio)
    # nothing was measured inside a node, in two stages, or for another collective
    assert subject.time("all_gather", 2000, GroupForm(1, 2)) == subject.formula("all_gather", 2000, GroupForm(1, 2))
    assert subject.time("all_reduce", 2000, form) == subject.formula("all_reduce", 2000, form)


# ------------------------------------------------------------------------------------------ time


def test_without_overlap_a_step_is_the_sum_of_its_parts():
    job = Workload(layers(3, 100, flops=2.0), precision="fp32", zero=replace(NO_LIMITS, reduce_bucket_size=100))
    system = Scheme(4, hop1_beside=False, hop2_beside=False, prefetch=False)
    subject = machine(2)
    time = step_time(subject, job, system, 8)
    gather = subject.time("all_gather", 400, GroupForm(2, 2))
    scatter = subject.time("reduce_scatter", 400, GroupForm(2, 2))
    average = subject.time("all_reduce", 4 * 3 * 25, GroupForm(2, 1, 2))
    assert time.counts == {"gather": 6, "scatter": 3, "average": 1, "update": 0}
    assert time.compute == pytest.approx(3 * 3 * 2.0)
    assert time.gathers == pytest.approx(6 * gather)
    assert time.hop1 == pytest.approx(3 * scatter)
    assert time.hop2 == pytest.approx(average)


def test_world_sharded_states_in_a_step():
    """Hop 2 scatters, the first gather waits for all updates (one bucket), and the update does 1/r of the work."""
    job = Workload(layers(3, 100, flops=2.0), precision="fp32", zero=replace(NO_LIMITS, reduce_bucket_size=100))
    system = Scheme(4, hop1_beside=False, hop2_beside=False, prefetch=False)
    subject = machine(2)
    plain, world = (step_time(subject, job, replace(system, world_states=on), 8) for on in (False, True))
    replicas = GroupForm(2, 1, 2)
    assert world.counts == {"gather": 6, "scatter": 3, "average": 1, "update": 1}
    assert world.hop2 == pytest.approx(subject.time("reduce_scatter", 4 * 3 * 25, replicas))
    assert world.gathers - plain.gathers == pytest.approx(subject.time("all_gather", 4 * 3 * 25, replicas))
    # slices of 13 of 25 elements
    assert world.optimizer / plain.optimizer == pytest.approx(13 / 25)


def test_world_sharded_states_where_nothing_is_gathered():
    """p = 1: a module waits for its own update. Those that stay gathered are updated first, and waited for at once."""
    job = Workload(layers(3, 100, flops=2.0), precision="fp32", zero=replace(NO_LIMITS, reduce_bucket_size=100))
    subject = machine(2)
    time = step_time(subject, job, Scheme(1, world_states=True), 4)
    assert time.updates == pytest.approx(subject.time("all_gather", 4 * 300, GroupForm(2, 2)))
    staying = replace(job, zero=replace(job.zero, param_persistence_threshold=100))
    time = step_time(subject, staying, Scheme(2, world_states=True), 4)
    assert time.updates == pytest.approx(subject.time("all_gather", 4 * 3 * 50, GroupForm(2, 1, 2)))
    assert time.counts["update"] == 1


def test_bytes_of_wires_are_those_of_encoded_rows():
    many = 1 << 20
    assert {name: wire_of(name, torch.float32).nbytes(many) / many for name in WIRE_BYTES} == WIRE_BYTES
    assert set(planning.WIRES) == {"full", *WIRE_BYTES} == {"full", *ENCODING_BYTES}


@pytest.mark.parametrize("world", [False, True])
@pytest.mark.parametrize("wire", ["bf16", "int8", "int4"])
def test_hop2_with_a_wire_is_an_exchange_and_a_gather(wire, world):
    subject = machine(2, memory_bandwidth=1e9)
    job = Workload(layers(1, 1000), precision="fp32", zero=NO_LIMITS)
    cost = Costs(subject, job, Scheme(2, world_states=world, wire=wire), 8).average(1000)
    form, sent = GroupForm(4, 1, 2), 500 * WIRE_BYTES[wire]
    expected = [subject.time("all_to_all", sent, form), *([] if world else [subject.time("all_gather", sent, form)])]
    assert cost.whole == pytest.approx(sum(expected) + 500 * ENCODING_BYTES[wire] / 1e9)
    assert cost.inter == pytest.approx(sum(expected))


def test_an_exchange_between_replicas_on_shared_nodes_leaves_the_node_once_for_each():
    """Four replicas on two nodes: half of what each of a node's two has goes to the other node."""
    subject = machine(2, backend="nccl")
    ring, flat = (subject.formula(name, 1e12, GroupForm(2, 2)) for name in ("reduce_scatter", "all_to_all"))
    assert flat / ring == pytest.approx(4 / 3, rel=1e-3)


def test_residuals_take_memory_in_two_copies():
    job = Workload(layers(3, 1000), precision="fp32", zero=NO_LIMITS)
    full, bf16, int8, world, world_int8 = (
        memory(job, Scheme(2, wire=wire, world_states=world), 8, StepTime()).gradients
        for wire, world in (("full", False), ("bf16", False), ("int8", False), ("full", True), ("int8", True))
    )
    assert (bf16, int8 - full, world_int8 - world) == (full, 3 * (500 * 4 + 125 * 8), 3 * 500 * 4)


def test_13_billion_on_64_gpus_of_40_gb():
    job = Workload(NAMED["llama-13b"].model(2048), checkpointing=True)
    rows = planning.make_plan(load_machine("p4d.24xlarge"), job, 64, states=("partition", "world"))
    fits = {states: [row.p for row in rows[1:] if row.fits and row.states == states] for states in planning.STATES}
    assert fits == {"partition": [8, 16, 32, 64], "world": [2, 4, 8, 16, 32]}


@pytest.mark.parametrize("layers_in_unit", [1, 2])
def test_overlap_hides_what_fits_beside_compute(layers_in_unit):
    """Compute so slow that only the first gather and the last two reductions are waited for: a bucket is handed over
    when the next gradient would not fit."""
    job = Workload(
        layers(4, 1000, flops=1e4),
        precision="fp32",
        zero=replace(NO_LIMITS, prefetch_bucket_size=1, reduce_bucket_size=1000, max_live_parameters=10**9),
    )
    subject, sizes = machine(2), Sizes(unit=2000 * layers_in_unit, bucket=1, whole=1)
    whole_units = mock.patch.object(comm_sizes, "LEAST_PARTS", 1)
    with whole_units, mock.patch.object(planner_machine, "sizes_of", return_value=sizes):
        time = step_time(subject, job, Scheme(2), 4)
    assert time.gathers == pytest.approx(subject.time("all_gather", 4000, GroupForm(1, 2)))
    scatter = subject.time("reduce_scatter", 4000, GroupForm(1, 2))
    assert time.hop1 == pytest.approx(2 * scatter)
    assert time.counts["average"] == 4 // layers_in_unit
    hop2 = subject.time("all_reduce", 2000 * layers_in_unit, GroupForm(2, 1, 2))
    # Units of one layer: hop 2 of the last but one starts when its hop 1 is done, beside the hop 1 of the last.
    assert time.hop2 == pytest.approx(2 * hop2 - scatter if layers_in_unit == 1 else hop2)


@pytest.mark.parametrize("streams", [True, False])
def test_a_gather_in_two_stages_lets_the_next_one_start_its_first(streams):
    subject, queues = machine(2, streams=streams), Queues()
    costs = Costs(subject, Workload(layers(1, 400), precision="fp32"), Scheme(4, staged_gather=True), 4)
    first, second = (queues.issue("gather", costs.gather(400), 0.0) for _ in range(2))
    between, inside = 10 + 1 / 2 * 800 / 50, 1 + 1 / 2 * 1600 / 1000
    assert first == pytest.approx(between + inside)
    assert second - first == pytest.approx(between if streams else between + inside)


def test_one_shard_gathers_nothing_and_one_replica_averages_nothing():
    job = Workload(layers(3, 100, 1.0), precision="fp32", micro_steps=2)
    alone, all_of_them = (step_time(machine(2), job, Scheme(p), 4) for p in (1, 4))
    assert (alone.counts["gather"], alone.gathers, alone.hop1) == (0, 0, 0)
    assert (all_of_them.counts["average"], all_of_them.hop2) == (0, 0)


@pytest.mark.parametrize("p", [1, 2, 4, 8])
@pytest.mark.parametrize("system", [{}, {"hop1_beside": False}, {"prefetch": False}, {"hop2_beside": False}])
def test_a_step_lies_between_all_overlapped_and_nothing_overlapped(p, system):
    job = Workload(
        Transformer(64, 4, 100, heads=4).model(16, 4), micro_steps=3, precision="fp32", zero=replace(NO_LIMITS)
    )
    subject = machine(2, flops={"fp32": 1e4}, intra=Link(1e5, 1e-3), inter=Link(1e4, 1e-2))
    time = step_time(subject, job, Scheme(p, **system), 8)
    floor = max(time.compute, *time.busy.values())
    assert floor <= time.total * (1 + 1e-9)
    assert time.total - time.optimizer - time.overhead <= (time.compute + sum(time.busy.values())) * (1 + 1e-9)
    assert sum(time.parts().values()) == pytest.approx(time.total)


@pytest.mark.parametrize("s", [4, 7])
def test_middle_micro_steps_are_alike(s):
    """Beyond three, micro-steps are extrapolated; with nothing carried over, time is linear in them."""
    base = Workload(layers(3, 100, 50.0), precision="fp32", zero=replace(NO_LIMITS, reduce_bucket_size=100))
    times = [step_time(machine(2), replace(base, micro_steps=n), Scheme(2), 4) for n in (2, 3, s)]
    step = times[1].total - times[0].total
    assert times[2].total == pytest.approx(times[1].total + (s - 3) * step)


def test_checkpointing_computes_again_and_gathers_again():
    model = Model("one", (Block((Unit((100,), 5.0), Unit((100,), 5.0)), 2, True, True, 1000.0, 10.0),))
    job = Workload(model, precision="fp32", zero=NO_LIMITS)
    system = Scheme(2, prefetch=False)
    plain, again = (step_time(machine(2), replace(job, checkpointing=on), system, 2) for on in (False, True))
    assert again.compute == pytest.approx(plain.compute * 4 / 3)
    assert (plain.counts["gather"], again.counts["gather"]) == (8, 12)


def test_hpz_gathers_inside_the_node_in_backward():
    job = Workload(layers(3, 1000), precision="fp32", zero=NO_LIMITS)
    subject = machine(2)
    stock, secondary = (step_time(subject, job, Scheme(None, prefetch=False, secondary=on), 4) for on in (False, True))
    over, inside = (subject.time("all_gather", 4000, form) for form in (GroupForm(2, 2), GroupForm(1, 2)))
    assert stock.gathers - secondary.gathers == pytest.approx(3 * (over - inside))


# ------------------------------------------------------------------------------------------ memory and plans


def test_more_replicas_need_more_memory_and_states_halve_with_twice_the_shards():
    job = Workload(layers(4, 1 << 20), precision="bf16", optimizer="adamw")
    found = [memory(job, Scheme(p), 8, StepTime()) for p in (1, 2, 4, 8)]
    for larger, smaller in itertools.pairwise(found):
        assert larger.states - smaller.states == pytest.approx(larger.states / 2, rel=1e-6)
    assert found[0].parameters == 2 * 4 << 20
    assert found[0].optimizer == 4 * 2 * 4 * (1 << 20) + 4


def test_parts_add_up_to_the_peak():
    for optimizer in ("adamw", "sgd"):
        job = Workload(NAMED["bert-10b"].model(512), 4, 1, "fp16", optimizer=optimizer)
        for row in planning.make_plan(PRESETS["p3dn.24xlarge"], job, 64):
            assert sum(row.memory.parts().values()) == row.memory.peak


def test_offload_moves_states_to_the_host():
    job = Workload(layers(4, 1 << 20), precision="bf16", zero=ZeroSettings(offload_optimizer=True, offload_param=True))
    found = memory(job, Scheme(2), 4, StepTime())
    plain = memory(replace(job, zero=ZeroSettings()), Scheme(2), 4, StepTime())
    assert found.states == 0
    # and gradients have a second, fp32 buffer there
    assert found.host.offloaded == plain.states + 4 * (4 << 20) // 2
    # bf16 parts of hop 2 on the device, two at a time, no larger than what there is

    def parts(job: Workload, n: int = 4, streams: bool = True) -> int:
        return memory(job, Scheme(2), n, StepTime(), streams=streams).bucket - 2 * job.zero.reduce_bucket_size

    assert parts(job) == 2 * 2 * (4 << 20) // 2
    assert parts(replace(job, zero=replace(job.zero, reduce_bucket_size=1000))) == 2 * 2 * 500
    assert parts(job, n=2) == 0, "one replica has no hop 2"
    assert parts(job, streams=False) == 0, "on a CPU they are where they have to be"


def test_the_chosen_size_fits_and_is_the_fastest_that_does():
    job = Workload(NAMED["bert-10b"].model(512), 8, 2, "fp16", True)
    rows = planning.make_plan(PRESETS["p3dn.24xlarge"], job, 64)
    chosen = planning.choose(rows)
    assert chosen.fits
    inside = [row for row in rows if row.fits and row.system.p is not None and not row.crosses]
    fastest = min(row.time.total for row in rows if row.fits and row.system.p is not None)
    assert min(row.time.total for row in inside) <= fastest * (1 + planning.CROSSING)
    level = [row for row in inside if row.time.total <= min(item.time.total for item in inside) * (1 + planning.LEVEL)]
    assert chosen.p == min(row.p for row in level), "the smallest groups of those that are level"
    assert any(not row.fits for row in rows)
    assert f"p = {chosen.p}" in planning.explain(rows, chosen)


def test_nothing_is_chosen_where_nothing_fits():
    job = Workload(NAMED["gpt-175b"].model(2048), 1, 1, "fp16")
    rows = planning.make_plan(PRESETS["p3dn.24xlarge"], job, 8)
    assert planning.choose(rows) is None
    assert "no partition size fits" in planning.explain(rows, None)


def test_what_does_not_fit_the_host_does_not_fit():
    small = replace(PRESETS["p4d.24xlarge"], host_memory=1e9)
    job = Workload(NAMED["bert-10b"].model(512), zero=ZeroSettings(offload_optimizer=True))
    row = planning.predict(small, job, Scheme(8), 8)
    assert row.memory.peak <= row.capacity
    assert not row.fits


def test_weak_and_strong_scaling():
    subject, job = PRESETS["p4d.24xlarge"], Workload(NAMED["bert-10b"].model(512), 8, 8, "fp16", True)
    weak = planning.scaling(subject, job, [None, 8], [8, 16, 32])
    strong = planning.scaling(subject, job, [None, 8], [8, 16, 32], strong=True)
    assert {name: [row.n for row in curve] for name, curve in weak.items()} == {
        "ZeRO-3": [8, 16, 32],
        "MiCS p=8": [8, 16, 32],
    }
    assert [row.job.samples for row in strong["ZeRO-3"]] == [64, 32, 16]
    for curves in (weak, strong):
        assert curves["MiCS p=8"][-1].linear > curves["ZeRO-3"][-1].linear
        assert all(curve[0].linear == 1 for curve in curves.values())
    with pytest.raises(MicsPlanError, match="cannot share evenly"):
        planning.scaling(subject, replace(job, micro_steps=2), [None], [8, 32], strong=True)


@pytest.mark.parametrize(
    ("n", "p", "match"),
    [
        (12, 4, "do not fill nodes"),
        (16, 3, "must divide the 16 GPUs"),
        (16, 0, "must divide the 16 GPUs"),
        (16, 32, "must divide the 16 GPUs"),
        (0, 1, "positive integer"),
    ],
)
def test_impossible_plans_are_refused(n, p, match):
    with pytest.raises(MicsPlanError, match=match):
        planning.make_plan(PRESETS["p4d.24xlarge"], Workload(layers(2, 10)), n, [p])


def test_odd_partition_sizes_can_be_planned():
    rows = planning.make_plan(PRESETS["p4d.24xlarge"], Workload(NAMED["bert-10b"].model(512)), 48, [3, 6, 12, 24])
    assert [row.p for row in rows[1:]] == [3, 6, 12, 24]
    assert all(math.isfinite(row.time.total) for row in rows)


def test_one_node_says_nothing_of_the_network():
    alone = replace(PRESETS["p4d.24xlarge"], nodes_measured=1)
    assert planning.make_plan(alone, Workload(layers(2, 10)), 8)
    with pytest.raises(MicsPlanError, match="calibrated on a single node"):
        planning.make_plan(alone, Workload(layers(2, 10)), 16)


def test_a_sweep_of_one_size_scales_the_formula():
    form = GroupForm(1, 2)
    subject = machine(2, sweeps=(Sweep("all_gather", form, False, (1000,), (7.0,)),))
    assert subject.time("all_gather", 1000, form) == pytest.approx(7.0)
    ratio = subject.formula("all_gather", 9000, form) / subject.formula("all_gather", 1000, form)
    assert subject.time("all_gather", 9000, form) == pytest.approx(7.0 * ratio)


def test_without_overlap_nothing_runs_beside_compute():
    subject, job = PRESETS["p4d.24xlarge"], Workload(layers(2, 10), zero=ZeroSettings(overlap_comm=False))
    system = planning.mics(subject, job, 16, 8)
    assert (system.hop1_beside, system.hop2_beside) == (False, False)
    offloaded = Workload(layers(2, 10), zero=ZeroSettings(offload_optimizer=True))
    system = planning.mics(subject, offloaded, 16, 8)
    assert (system.hop1_beside, system.hop2_beside) == (True, False)


def test_evaluation_has_parameters_only():
    job = Workload(layers(4, 1 << 20).without_training(), precision="bf16")
    found = memory(job, Scheme(2), 4, StepTime())
    assert (found.parameters, found.gradients, found.master, found.optimizer) == (2 * (4 << 20) // 2, 0, 0, 0)
    time = step_time(machine(2), replace(job, precision="fp32"), Scheme(2), 4)
    assert (time.counts["scatter"], time.counts["average"]) == (0, 0)


@pytest.mark.parametrize(
    "values", [{"micro_batch": 0}, {"micro_steps": True}, {"precision": "fp8"}, {"optimizer": "muon"}]
)
def test_senseless_jobs_are_refused(values):
    with pytest.raises(MicsPlanError, match=next(iter(values))):
        Workload(layers(1, 10), **values)


def test_senseless_settings_are_refused():
    with pytest.raises(MicsPlanError, match="reduce_bucket_size"):
        ZeroSettings(reduce_bucket_size=-1)
