"""``mics_shard_size: "auto"``: one planned size on all ranks, the same numbers as that size given, or one error."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from unittest import mock

import deepspeed
import psutil
import pytest
import torch
import torch.distributed as dist
from cases import every, slow
from helpers import (
    OddNet,
    assert_losses_close,
    build,
    destroy_engines,
    ds_config,
    environment,
    full_params,
    same_on_all_ranks,
    train,
)

from mics_ds.comm.placement import Claim
from mics_ds.config import MicsConfig, PlanRequest, split_ds_config
from mics_ds.errors import MicsAgreementError, MicsConfigError, MicsPlanError
from mics_ds.planner import auto as auto_module
from mics_ds.planner.auto import Facts, Report, Situation, as_configured, assess, decide, find_machine
from mics_ds.planner.machine import GroupForm, Link, Machine, Sweep
from mics_ds.planner.model import NAMED
from mics_ds.planner.plan import LEVEL, RESERVE, make_plan, mics, predict
from mics_ds.planner.presets import load_machine
from mics_ds.planner.timeline import Scheme
from mics_ds.planner.trace import model_from_module
from mics_ds.planner.workload import Workload, ZeroSettings

SLOW = {"intra": {"bandwidth": 1e6, "latency": 0}, "inter": {"bandwidth": 1e4, "latency": 0}}


def auto(tmp_path: Any = None, word: str = "auto", zero: dict[str, Any] | None = None, **plan: Any) -> dict[str, Any]:
    """A configuration on a cluster with slow links between nodes."""
    if tmp_path is not None:
        path = tmp_path / "cluster.json"
        machine = {"name": "slow", "gpus_per_node": 2, "memory": 1e9, "flops": {"fp32": 1e9}, "efficiency": 1.0, **SLOW}
        if dist.is_initialized() and dist.get_rank() == 0:
            path.write_text(json.dumps({**machine, "backend": "gloo", "streams": False}))  # rank 0 alone has it
        plan["cluster"] = str(path)
    config = ds_config(zero={"reduce_bucket_size": 300, **(zero or {})})
    config["zero_optimization"]["mics_shard_size"] = word
    if plan:
        config["zero_optimization"]["mics_plan"] = plan
    return config


def enough_for(p: int, world: bool = False) -> float:
    """Memory in GB that is just enough for p shards of the odd net, and so not for fewer."""
    zero = ZeroSettings.from_ds(auto()["zero_optimization"])
    job = Workload(model_from_module(OddNet()), 2, 1, "fp32", optimizer="sgd_momentum", zero=zero)
    machine = Machine("", 2, 1.0, {"fp32": 1.0}, 1.0, Link(1.0, 0.0), Link(1.0, 0.0), backend="gloo", streams=False)
    job = replace(job, model=job.model.with_activations(0.0))
    return (
        predict(machine, job, mics(machine, job, 4, p, world_states=world), 4).memory.peak / (1 - RESERVE) * 1.001 / 1e9
    )


def size(engine: Any) -> int:
    return engine.optimizer.mics_groups.partition.size


# ---------------------------------------------------------------------------------------- on engines


@pytest.mark.ranks(4)
@pytest.mark.parametrize("inside_init", [slow(True), False])
def test_auto_trains_as_the_size_it_chose(tmp_path, inside_init):
    """Also where zero.Init had to spread the parameters before anyone knew the model."""
    with environment(MICS_DS_RANKS_PER_NODE="2"):
        engine = build(auto(tmp_path, memory_gb=1.0), inside_init=inside_init)
        p = size(engine)
        losses, params = train(engine, 4), full_params(engine)
        same_on_all_ranks(params)
        destroy_engines()
        given = build(ds_config(p), inside_init=inside_init)
        assert train(given, 4) == losses
        destroy_engines()
        stock = build(ds_config(None), inside_init=inside_init)
        assert_losses_close(losses, train(stock, 4), 1e-6)


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("p", "inside_init"), every((2, "auto"), (True, False), default=[(2, True), ("auto", False)]))
def test_states_are_spread_where_only_that_fits(tmp_path, p, inside_init):
    """Also with a size that was given, which zero.Init knows then."""
    memory, found = enough_for(2, world=True), []
    assert memory < enough_for(2)
    for gigabytes in (1.0, memory):
        asked = auto(tmp_path, p, {"mics_optimizer_states": "auto"}, memory_gb=gigabytes, activations_gb=0)
        with environment(MICS_DS_RANKS_PER_NODE="2"):
            engine = build(asked, inside_init=inside_init)
            losses = train(engine, 3)
            found.append((size(engine), engine.optimizer.world_states is not None))
        destroy_engines()
        given = ds_config(found[-1][0], zero={"mics_optimizer_states": "world" if found[-1][1] else "partition"})
        with environment(MICS_DS_RANKS_PER_NODE="2"):
            assert train(build(given, inside_init=inside_init), 3) == losses
        destroy_engines()
    assert p == "auto" or (found[0][0] == 2 and found[1] == (2, True)), found
    assert found[1] != (2, False), "which does not fit"


@pytest.mark.ranks(4)
def test_less_memory_makes_more_shards(tmp_path):
    found = []
    for memory in (1.0, enough_for(2), enough_for(4)):
        with environment(MICS_DS_RANKS_PER_NODE="2"):
            found.append(size(build(auto(tmp_path, memory_gb=memory, activations_gb=0))))
        destroy_engines()
    # one shard is slower than two, whose replicas share the cards for half the bytes
    assert found == [2, 2, 4], f"got {found}"


@pytest.mark.ranks(4)
def test_the_choice_is_logged_with_its_reason_by_rank_0(tmp_path):
    with mock.patch.object(auto_module, "log_rank0") as log:
        build(auto(tmp_path, memory_gb=1.0))
    said = [call.args[0] for call in log.call_args_list]
    if dist.get_rank() == 0:
        assert len(said) == 1
        assert said[0].startswith('mics_shard_size "auto": p = ')
        assert "times as fast as ZeRO-3" in said[0]
        assert "on slow" in said[0]
    else:
        assert said == []


@pytest.mark.ranks(4)
def test_where_nothing_fits_every_rank_says_so(tmp_path):
    expected = MicsPlanError if dist.get_rank() == 0 else MicsAgreementError
    with pytest.raises(expected, match="no partition size fits"):
        build(auto(tmp_path, memory_gb=1e-6))
    train(build(ds_config(2)), 1)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("inside_init", [True, False])
def test_a_cluster_that_does_not_exist_is_an_error_on_every_rank(inside_init):
    expected = MicsPlanError if dist.get_rank() == 0 else MicsAgreementError
    with pytest.raises(expected, match="neither a preset nor a file"):
        build(auto(cluster="nowhere.json"), inside_init=inside_init)
    train(build(ds_config(2)), 1)


@pytest.mark.ranks(4)
def test_the_rank_with_the_least_memory_decides(tmp_path):
    class Available:
        # of a node with two ranks
        available = 2e9 * enough_for(2) if dist.get_rank() == 3 else 1e9

    with environment(MICS_DS_RANKS_PER_NODE="2"), mock.patch.object(psutil, "virtual_memory", return_value=Available):
        assert size(build(auto(tmp_path, activations_gb=0))) == 2


@pytest.mark.ranks(4)
def test_ranks_that_disagree_on_auto():
    with pytest.raises(MicsAgreementError, match=r"agree on whether MiCS is on.*\[1\]"):
        build(ds_config(2) if dist.get_rank() == 1 else auto())
    train(build(ds_config(2)), 1)


@pytest.mark.ranks(4)
def test_the_callers_dictionary_stays_auto_and_serves_a_second_model(tmp_path):
    config = auto(tmp_path, memory_gb=enough_for(2), activations_gb=0)
    before = json.dumps(config)
    with environment(MICS_DS_RANKS_PER_NODE="2"), mock.patch.object(auto_module, "log_rank0") as log:
        assert size(build(config)) == 2
        assert json.dumps(config) == before
        train(build(config, Scaled), 1)
    assert log.call_count == (2 if dist.get_rank() == 0 else 0), "planned for each model"


class Scaled(torch.nn.Linear):
    def __init__(self) -> None:
        super().__init__(7, 7)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (super().forward(x) - y).pow(2).mean()


@pytest.mark.ranks(4)
def test_evaluation_without_an_optimizer_is_planned_without_its_states(tmp_path):
    """In memory that is enough for parameters, and not for training."""
    config = auto(tmp_path, memory_gb=enough_for(4) * 0.6, activations_gb=0)
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = OddNet()
    engine, *_ = deepspeed.initialize(model=model, config=config)
    with torch.no_grad():
        engine(torch.ones(2, 7), torch.ones(2, 7))
    assert next(engine.module.parameters()).mics_groups.partition.size in (1, 2, 4)
    engine.destroy()
    with pytest.raises((MicsPlanError, MicsAgreementError), match="no partition size fits"):
        build(config)


@pytest.mark.ranks(4)
def test_a_failure_on_one_rank_reaches_all(tmp_path):
    """Whatever it is that fails while a rank looks at itself, or while rank 0 plans."""
    for rank, name in ((2, "describe"), (0, "decide")):
        broken = mock.patch.object(auto_module, name, side_effect=ZeroDivisionError("broken"))
        expected = ZeroDivisionError if dist.get_rank() == rank else MicsAgreementError
        with broken if dist.get_rank() == rank else environment(), pytest.raises(expected, match="broken"):
            build(auto(tmp_path))
    train(build(ds_config(2)), 1)


@pytest.mark.ranks(4)
def test_a_path_works_as_well(tmp_path):
    path = tmp_path / f"ds{dist.get_rank()}.json"
    path.write_text(json.dumps(auto()))
    torch.manual_seed(0)
    model = OddNet()
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, config=str(path), optimizer=optimizer)
    assert size(engine) in (1, 2, 4)
    train(engine, 1)
    engine.destroy()


# ---------------------------------------------------------------------------------------- parsing


@pytest.mark.parametrize("word", ["auto", "planned"])
def test_both_words_mean_auto(word):
    mics, rest = split_ds_config(auto(word=word, sequence=2048))
    assert mics.is_auto
    assert mics.plan == PlanRequest(sequence=2048)
    assert not any(key.startswith("mics_") for key in rest["zero_optimization"])


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        ({"memory": 3}, "Unknown key under 'zero_optimization.mics_plan': memory. Known keys: cluster"),
        ({"sequence": 0}, "sequence must be greater than or equal to 1, got 0"),
        ({"memory_gb": "40"}, "memory_gb must be a valid number, got '40'"),
        ({"memory_gb": -1}, "memory_gb must be greater than or equal to 0"),
        ({"cluster": 3}, "cluster must be a valid string, got 3"),
        ({"checkpointing": "yes"}, "checkpointing must be a valid boolean, got 'yes'"),
    ],
)
def test_wrong_plans_are_refused(plan, match):
    with pytest.raises(MicsConfigError, match=match):
        split_ds_config(auto(**plan))


def test_a_plan_is_a_section():
    config = auto()
    config["zero_optimization"]["mics_plan"] = "p4d"
    with pytest.raises(MicsConfigError, match="must be a section"):
        split_ds_config(config)


# ---------------------------------------------------------------------------------------- deciding


def facts(n: int, device: str = "cpu", precision: str = "bf16", **job: Any) -> Facts:
    settings = {"micro_batch": 1, "micro_steps": 4, "precision": precision, "optimizer": "fusedadam"}
    place = Claim("hostname", "here", 0)
    return Facts(tuple(range(n)), place, 1e9, 1e12, device, {**settings, "zero": ZeroSettings(), **job})


def config(**plan: Any) -> MicsConfig:
    return MicsConfig("auto", plan=PlanRequest(**plan))


@pytest.mark.parametrize(
    ("device", "preset", "words"),
    [
        ("NVIDIA H100 80GB HBM3", "p5.48xlarge", "the network is assumed to be p5.48xlarge's"),
        ("NVIDIA H100 NVL", "unknown GPUs", "the GPU 'NVIDIA H100 NVL' is not known and counts as 100 TFLOPS, 50 GB/s"),
        ("cpu", "unknown processors", "the network is a guess"),
    ],
)
def test_what_is_assumed_of_a_cluster_nobody_named(device, preset, words):
    machine, assumed = find_machine(PlanRequest(), facts(8, device))
    assert machine.name == preset
    assert assumed.startswith(words)
    assert "mics_plan.cluster" in assumed
    assert find_machine(PlanRequest(cluster="p4d.24xlarge"), facts(8, device))[1] == ""


def test_states_of_the_world_where_the_size_is_given_and_nothing_else_fits():
    model, subject, memory = NAMED["llama-13b"].model(2048), facts(64), 40 * 2**30
    situation = Situation(64, 8, memory, 1e12)
    for p, states in ((2, "world"), (8, "partition")):
        request = replace(config(cluster="p4d.24xlarge", checkpointing=True, sequence=2048), shard_size=p)
        choice, reason = decide(replace(request, optimizer_states="auto"), subject, model, situation)
        assert choice == (p, states, "full"), reason
    choice, reason = decide(replace(request, shard_size=1, optimizer_states="auto"), subject, model, situation)
    assert choice == (1, "world", "full")
    assert "no partition size fits" in reason


@pytest.mark.parametrize(("per_domain", "sharing"), [(72, 1), (64, 1), (36, 2)])
def test_ranks_of_a_domain_share_the_network_of_its_hosts(per_domain, sharing):
    """Hop 2 between racks, with the network cards of as many hosts as the ranks of a domain take up."""
    model, subject = NAMED["llama-13b"].model(2048), facts(2 * per_domain)
    request = config(cluster="gb200-nvl72", checkpointing=True, sequence=2048)
    situation = Situation(2 * per_domain, per_domain, 1.9e11, 1e13, sharing)
    with mock.patch.object(auto_module.planning, "predict", side_effect=predict) as asked:
        choice, _ = decide(request, subject, model, situation)
    used = asked.call_args.args[0]
    assert (used.domain, used.inter.bandwidth) == (per_domain, 170e9 * per_domain / 4)
    assert choice.p <= per_domain


@pytest.mark.parametrize(
    ("bits_per_second", "accumulation", "wire"),
    [(10e9, 4, "bf16"), (10e9, None, "full"), (400e9 * 8, None, "full")],
    ids=["fp32 sums on a slow network", "16-bit sums", "fast network"],
)
def test_fewer_bytes_where_they_make_a_step_shorter(tmp_path, bits_per_second, accumulation, wire):
    """16-bit gradients take as many bytes either way. Integers are never chosen."""
    cluster = tmp_path / "cluster.json"
    link = {"bandwidth": bits_per_second / 8, "latency": 1e-5}
    cluster.write_text(json.dumps({"preset": "p5.48xlarge", "name": "subject", "inter": link}))
    model, subject = NAMED["llama-13b"].model(2048), facts(32, accumulation_itemsize=accumulation)
    request = config(cluster=str(cluster), checkpointing=True, sequence=2048)
    request = replace(request, shard_size=8, replica_wire="auto")
    choice, reason = decide(request, subject, model, Situation(32, 8, 80 * 2**30, 1e12))
    assert choice == (8, "partition", wire), reason
    assert ("the bf16 wire" in reason.split(":")[0]) == (wire == "bf16")


@pytest.mark.parametrize("gib", [20.0, 40.0, 80.0, 140.0])
@pytest.mark.parametrize("n", [8, 64, 512])
def test_never_a_size_that_does_not_fit_its_own_estimate(gib, n):
    """And of those that do, the fastest."""
    model, subject, memory = NAMED["llama-13b"].model(2048), facts(n), gib * 2**30
    request, situation = (
        config(cluster="p4d.24xlarge", checkpointing=True, sequence=2048),
        Situation(n, 8, memory, 1e12),
    )
    machine = replace(load_machine("p4d.24xlarge"), memory=memory, gpus_per_node=8)
    rows = make_plan(machine, Workload(model, checkpointing=True, **subject.job), n)
    fitting = [row for row in rows if row.system.p is not None and row.fits]
    if not fitting:
        with pytest.raises(MicsPlanError, match="no partition size fits"):
            decide(request, subject, model, situation)
        return
    (p, _, _), reason = decide(request, subject, model, situation)
    fastest = min(row.time.total for row in fitting)
    assert p == min(row.p for row in fitting if row.time.total <= fastest * (1 + LEVEL))
    assert f"p = {p}" in reason


def test_a_measured_network_is_believed_over_the_formula(tmp_path):
    """Inside a node, gathers measured as dreadfully slow: pairs are then no longer worth it."""
    found = []
    for sweeps in ((), (Sweep("all_gather", GroupForm(1, 2), False, (1000, 10**6), (10.0, 1000.0)),)):
        machine = Machine("odd", 2, 1e12, {"bf16": 1e12}, 1.0, Link(1e11, 0), Link(1e8, 0), sweeps=sweeps)
        path = tmp_path / "odd.json"
        path.write_text(json.dumps(machine.to_json()))
        request = config(cluster=str(path), activations_gb=0)
        model = NAMED["bert-10b"].model(128)
        found.append(decide(request, facts(4, micro_steps=1), model, Situation(4, 2, 2e11, 1e12))[0].p)
    assert found[0] == 2
    assert found[1] != 2


@pytest.mark.parametrize(("nodes", "fine"), [("0011", True), ("0012", False), ("0101", False), ("0001", False)])
def test_ranks_have_to_be_placed_evenly(nodes, fine):
    ours = facts(4)
    reports = [Report(Claim("hostname", node, None), 0, "x", 1.0, 1.0) for node in nodes]
    if fine:
        assert assess(reports, ours) == Situation(4, 2, 0.5, 1.0)
    else:
        with pytest.raises(MicsPlanError, match="same number of consecutive ranks on every node"):
            assess(reports, ours)


def test_models_must_be_alike_in_each_data_parallel_group():
    """Two tensor-parallel ranks may have different parts, and share a node's card."""
    ours = replace(facts(2, "GPU"), ranks=(0, 2))
    reports = [
        Report(Claim("hostname", str(rank // 2), None), rank % 2, str(rank % 2), 9.0 - rank, 8.0) for rank in range(4)
    ]
    assert assess(reports, ours) == Situation(2, 1, 6.0, 8.0, sharing=2)
    reports[2] = reports[2]._replace(model="other")
    with pytest.raises(MicsPlanError, match="must have the same model"):
        assess(reports, ours)


def test_the_stages_and_the_reduce_scatter_that_were_asked_for_are_planned():
    flat = {"hierarchical_params_gather": False, "hierarchical_grad_scatter": False}
    system = as_configured(MicsConfig("auto", **flat, reduce_scatter="native"), Scheme(4, True, True))
    assert system == Scheme(4, native_scatter=True)
    assert as_configured(MicsConfig("auto"), Scheme(4, True, True)) == Scheme(4, True, True)
