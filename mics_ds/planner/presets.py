"""Machines that can be named.

Every value has its source beside it. ``efficiency``, ``inter.bandwidth`` and ``inter.latency`` are the free constants
of a kind of cluster, at most these three; docs/planner.md says on which published points they were fitted, and what
follows from them is prediction. Memory is what torch reports as the device's total.
"""

from __future__ import annotations

from typing import Any

from .machine import GB, GIB, PRESETS, Link, Machine

US = 1e-6

_A100 = {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12}
_H100 = {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12}

_P4: dict[str, Any] = {
    "gpus_per_node": 8,
    "flops": _A100,
    "efficiency": 0.58,
    "intra": Link(230 * GB, 10 * US),
    "inter": Link(45 * GB, 225 * US),
    "memory_bandwidth": 1.4e12,
    "host_link": 12 * GB,
    "host_memory": 1152 * GIB,
}
_P4_SOURCES = {
    "flops": "NVIDIA A100 data sheet, dense",
    "intra": "NCCL all-reduce on one p4d, 230.8 GB/s bus bandwidth (NVIDIA/nccl#527)",
    "inter": "400 Gb/s EFA; fitted, see docs/planner.md",
    "efficiency": "fitted, see docs/planner.md",
    "host_memory": "AWS instance types",
    "host_link": "PCIe 3 x16, two GPUs to a switch",
}

for _machine in (
    Machine(
        name="p3dn.24xlarge",
        gpus_per_node=8,
        memory=31.7 * GIB,
        flops={"fp16": 125e12, "fp32": 15.7e12},
        efficiency=0.45,
        intra=Link(130 * GB, 10 * US),
        inter=Link(7 * GB, 45 * US),
        memory_bandwidth=0.8e12,
        host_link=11 * GB,
        host_memory=768 * GIB,
        sources={
            "flops": "NVIDIA V100 data sheet, tensor cores",
            "intra": "NVLink 2, 150 GB/s one way",
            "inter": "100 Gb/s EFA: NCCL measures 6 to 8 GB/s on 8 to 32 nodes (NVIDIA/nccl#235); an all-reduce of 8 "
            "bytes takes 631 us on 8 nodes, 45 us for each of its 14 hops between nodes",
            "efficiency": "an assumption: fitted to nothing",
            "host_link": "11.25 GB/s pinned (NVIDIA/nccl#398)",
        },
    ),
    Machine(name="p4d.24xlarge", memory=39.5 * GIB, sources=_P4_SOURCES, **_P4),
    Machine(name="p4de.24xlarge", memory=79.2 * GIB, sources=_P4_SOURCES, **_P4),
    Machine(
        name="p5.48xlarge",
        gpus_per_node=8,
        memory=79.1 * GIB,
        flops=_H100,
        efficiency=0.50,
        intra=Link(350 * GB, 8 * US),
        inter=Link(300 * GB, 20 * US),
        memory_bandwidth=2.6e12,
        host_link=50 * GB,
        host_memory=2048 * GIB,
        sources={
            "flops": "NVIDIA H100 data sheet, dense",
            "intra": "NCCL all-gather 350 GB/s (NVIDIA/nccl#1281)",
            "inter": "3200 Gb/s EFA; NCCL on 2 nodes reaches 260 GB/s algorithm bandwidth (aws-samples, nccl-tests)",
            "efficiency": "an assumption: fitted to nothing",
        },
    ),
    Machine(
        name="h200-8x400g",
        gpus_per_node=8,
        memory=139.8 * GIB,
        flops=_H100,
        efficiency=0.52,
        intra=Link(360 * GB, 8 * US),
        inter=Link(340 * GB, 12 * US),
        memory_bandwidth=3.8e12,
        host_link=50 * GB,
        host_memory=2000 * GIB,
        sources={
            "flops": "NVIDIA H200 data sheet, dense",
            "intra": "as the H100, whose links it has",
            "inter": "8 x 400 Gb/s InfiniBand at 85% of the line",
            "efficiency": "an assumption: fitted to nothing",
        },
    ),
    Machine(
        name="a800-4x200g",
        gpus_per_node=8,
        memory=79.2 * GIB,
        flops=_A100,
        efficiency=0.54,
        intra=Link(152 * GB, 10 * US),
        inter=Link(50 * GB, 350 * US),
        memory_bandwidth=1.4e12,
        host_link=24 * GB,
        host_memory=1024 * GIB,
        sources={
            "flops": "as the A100",
            "intra": "NVLink at 400 GB/s both ways; all-reduce of 1 GB measured at 152 GB/s bus bandwidth",
            "inter": "4 x 200 Gb/s InfiniBand (AMSP, arXiv 2311.00257); fitted, see docs/planner.md",
            "efficiency": "fitted, see docs/planner.md",
        },
    ),
):
    PRESETS[_machine.name] = _machine
