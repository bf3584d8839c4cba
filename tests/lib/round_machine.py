"""A machine and a model with round numbers, for tests of the planner."""

from __future__ import annotations

from mics_ds.planner.machine import Link, Machine
from mics_ds.planner.model import Block, Model, Unit
from mics_ds.planner.workload import ZeroSettings

KB = 1000
NO_LIMITS = ZeroSettings(prefetch_bucket_size=0, max_reuse_distance=0, param_persistence_threshold=0)


def machine(k: int = 2, **values) -> Machine:
    """Return a machine whose links have round numbers: 1000 B/s inside, 100 B/s between nodes, 1 and 10 s per step."""
    given = {
        "name": "round",
        "gpus_per_node": k,
        "memory": 1e9,
        "flops": {"fp32": 1.0, "bf16": 1.0},
        "efficiency": 1.0,
        "intra": Link(1000, 1),
        "inter": Link(100, 10),
        "memory_bandwidth": 1e30,
    }
    return Machine(**{**given, **values})


def layers(count: int, numel: int, flops: float = 0.0, **block) -> Model:
    """Return a model of equal layers with one parameter each."""
    return Model("layers", (Block((Unit((numel,), flops),), count, **block),))
