"""Machines of the planner: names of devices, presets, fast domains, and latencies of collectives."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from mics_ds.errors import MicsPlanError
from mics_ds.planner import plan as planning
from mics_ds.planner.machine import GroupForm, Link, Machine
from mics_ds.planner.memory import WRITER_BYTES, memory
from mics_ds.planner.model import Block, Model, Unit
from mics_ds.planner.presets import PRESETS, machine_from_json, preset_of_device
from mics_ds.planner.timeline import Scheme, StepTime
from mics_ds.planner.workload import Workload

NVL72 = PRESETS["gb200-nvl72"]


def racks(**values) -> Machine:
    """Hosts of 2 GPUs, domains of 4, with round numbers: 1000 B/s inside a domain, 100 B/s from a host."""
    links = {"intra": Link(1000, 1), "inter": Link(100, 10)}
    return Machine("racks", 2, 1e12, {"bf16": 1.0}, 1.0, **links, gpus_per_domain=4, **values)


# ------------------------------------------------------------------------------------------ devices

DEVICES = {
    "Tesla V100-SXM2-32GB": "p3dn.24xlarge",
    "NVIDIA A100-SXM4-40GB": "p4d.24xlarge",
    "A100-SXM4-40GB": "p4d.24xlarge",
    "NVIDIA A100-SXM4-80GB": "p4de.24xlarge",
    "A100-SXM4-80GB": "p4de.24xlarge",
    "NVIDIA A100 80GB PCIe": "a100-pcie-100g",
    "NVIDIA A800-SXM4-80GB": "a800-4x200g",
    "NVIDIA H100 80GB HBM3": "p5.48xlarge",
    "NVIDIA H100 PCIe": "h100-pcie-100g",
    "NVIDIA H200": "p5en.48xlarge",
    "NVIDIA B200": "p6-b200.48xlarge",
    "NVIDIA B300 SXM6 AC": "p6-b300.48xlarge",
    "NVIDIA GB200": "gb200-nvl72",
    "NVIDIA GB300": "gb300-nvl72",
    "AMD Instinct MI300X": "nd-mi300x-v5",
    "AMD Instinct MI300X VF": "nd-mi300x-v5",
}
UNKNOWN = (
    *("Tesla V100-SXM2-16GB", "Tesla V100-PCIE-16GB", "Tesla T4", "NVIDIA A100-PCIE-40GB", "NVIDIA A100-SXM-64GB"),
    *("NVIDIA A100-PG509-200", "NVIDIA A800-SXM4-40GB", "NVIDIA A800 80GB PCIe", "NVIDIA H100 NVL", "NVIDIA H100"),
    *("NVIDIA H200 NVL", "NVIDIA H800", "NVIDIA H20", "NVIDIA GH200 120GB", "NVIDIA GH200 480GB"),
    *("NVIDIA GH200 144G HBM3e", "NVIDIA GB10", "NVIDIA A10", "NVIDIA A10G", "NVIDIA A30", "NVIDIA A40", "NVIDIA L4"),
    *("NVIDIA L40S", "NVIDIA RTX A1000", "NVIDIA RTX A6000", "NVIDIA GeForce RTX 4090"),
    "NVIDIA RTX PRO 6000 Blackwell Server Edition",
)


def test_more_than_forty_names_are_told_apart():
    assert len(DEVICES) + len(UNKNOWN) >= 40


@pytest.mark.parametrize(("device", "cluster"), DEVICES.items())
def test_a_device_is_found_by_its_whole_name(device, cluster):
    assert preset_of_device(device) is PRESETS[cluster]


@pytest.mark.parametrize("device", [*UNKNOWN, "", "cpu", "nvidia h200", "NVIDIA H200 "])
def test_other_names_are_unknown(device):
    assert preset_of_device(device) is None


# ------------------------------------------------------------------------------------------ presets


@pytest.mark.parametrize("name", PRESETS)
def test_every_value_of_a_preset_has_its_source(name):
    preset = PRESETS[name]
    needed = {"flops", "efficiency", "intra", "inter", "host_link", "host_memory"}
    needed |= {"gpus_per_domain"} if preset.gpus_per_domain else set()
    needed |= {"collective_latency"} if preset.collective_latency else set()
    assert needed <= set(preset.sources)
    assert all(source.strip() for source in preset.sources.values())


@pytest.mark.parametrize(("devices", "efficiency"), [("A100", 0.58), ("H[12]00", 0.50), ("G?B[23]00", 0.50)])
def test_a_generation_has_one_efficiency(devices, efficiency):
    found = {item.efficiency for item in PRESETS.values() if re.search(rf"\b{devices}\b", item.sources["flops"])}
    assert found - {PRESETS["a800-4x200g"].efficiency} == {efficiency}


def test_a_file_that_starts_from_a_preset_keeps_the_sources_of_what_it_does_not_replace():
    found = machine_from_json({"preset": "p5.48xlarge", "memory": 1e10, "sources": {"memory": "a partition of it"}})
    assert found.name == "p5.48xlarge"
    assert found.sources == {**PRESETS["p5.48xlarge"].sources, "memory": "a partition of it"}


# ------------------------------------------------------------------------------------------ domains


def test_groups_of_a_rack_stay_in_its_domain():
    assert NVL72.partition_form(72, 72) == GroupForm(1, 72, 1)
    assert not NVL72.can_stage(72, 72)
    assert NVL72.partition_form(144, 144) == GroupForm(2, 72)
    assert NVL72.can_stage(144, 144)
    assert NVL72.replication_form(144, 72) == GroupForm(2, 1, 72), "hop 2 crosses domains"
    assert NVL72.replication_form(144, 4) == GroupForm(2, 18, 4), "hop 2 has 18 ranks in each domain"


@pytest.mark.parametrize(
    ("n", "host", "domain"), [(1, 1, 1), (3, 3, 3), (4, 4, 4), (36, 4, 36), (72, 4, 72), (128, 4, 64), (1152, 4, 72)]
)
def test_jobs_fill_domains_evenly(n, host, domain):
    used = NVL72.for_ranks(n)
    assert (used.gpus_per_node, used.domain) == (host, domain)


@pytest.mark.parametrize(("n", "match"), [(6, "do not fill nodes"), (148, "do not fill fast domains")])
def test_jobs_that_cannot_are_refused(n, match):
    with pytest.raises(MicsPlanError, match=match):
        planning.check_ranks(NVL72, n)


def test_candidates_fit_hosts_and_domains():
    assert planning.candidates(NVL72, 144) == [1, 2, 4, 8, 12, 24, 36, 72, 144]
    assert planning.candidates(NVL72, 128) == [1, 2, 4, 8, 16, 32, 64, 128]


def test_a_domain_has_the_network_of_all_its_hosts():
    """Two domains of two hosts each: 200 B/s between them."""
    found = racks().time("all_gather", 800, GroupForm(2, 4))
    assert found == pytest.approx(6 * 1 + 1 * 10 + 7 / 8 * 800 / 200)


def test_domains_are_a_multiple_of_hosts():
    with pytest.raises(MicsPlanError, match="must be a multiple of its gpus_per_node, 4, got 6"):
        replace(NVL72, gpus_per_domain=6)


@pytest.mark.parametrize(("seconds", "p"), [(1.0, 4), (0.985, 4), (0.975, 8)])
def test_groups_leave_a_domain_only_for_a_clear_gain(seconds, p):
    job = Workload(Model("one", (Block((Unit((1000,), 1.0),), 4),)))
    rows = [planning.predict(racks(), job, Scheme(size), 8, reserve=0.0) for size in (4, 8)]
    inside, crossing = (replace(row, time=StepTime(compute=time)) for row, time in zip(rows, (1.0, seconds)))
    assert (inside.crosses, crossing.crosses) == (False, True)
    assert planning.choose([inside, crossing]).p == p


# ------------------------------------------------------------------------------------------ latencies


def test_a_collective_has_a_latency_and_each_peer_one():
    slow, fast = racks(collective_latency=5.0), racks()
    for operation in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all"):
        for form in (GroupForm(1, 4), GroupForm(2, 4), GroupForm(4, 1, 4)):
            assert slow.time(operation, 800, form) - fast.time(operation, 800, form) == pytest.approx(5.0)
    staged = [machine.time("all_gather", 800, GroupForm(2, 4), True) for machine in (slow, fast)]
    assert staged[0] - staged[1] == pytest.approx(2 * 5.0), "two stages are two collectives"
    assert slow.time("all_gather", 800, GroupForm(1, 1)) == 0


# ------------------------------------------------------------------------------------------ memory of hosts


def test_host_memory_of_saves_copies_and_loads():
    """2^20 elements on 8 ranks in shards of 4: a shard has 12 bytes per element of masters and moments."""
    job = Workload(Model("one", (Block((Unit((1 << 20,), 1.0),)),)), async_save=True, memory_copies=True)
    found = memory(job, Scheme(4), 8, StepTime()).host
    shard = 12 * (1 << 20) // 4
    assert found.parts() == {"offloaded": 0, "save": shard + WRITER_BYTES, "copies": 4 * shard // 2, "load": shard}
    assert found.peak == found.copies + found.save
    stock = memory(job, Scheme(None), 8, StepTime()).host
    assert stock.parts() == {"offloaded": 0, "save": 0, "copies": 0, "load": shard // 2}
    frozen = memory(Workload(job.model.without_training()), Scheme(4), 8, StepTime()).host
    assert frozen.peak == 0


@pytest.mark.parametrize(("copies", "fits"), [(False, True), (True, False)])
def test_what_a_host_cannot_hold_does_not_fit(copies, fits):
    job = Workload(Model("one", (Block((Unit((1 << 20,), 1.0),)),)), memory_copies=copies)
    need = 2 * 12 * (1 << 20) // 2  # two ranks of a host load a shard of half of the model each
    machine = racks(host_memory=1.5 * need)
    row = planning.predict(machine, job, Scheme(2), 4, reserve=0.0)
    assert row.memory.peak <= row.capacity
    assert (row.fits, row.fits_host) == (fits, fits)
