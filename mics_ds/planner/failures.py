"""Cost of a failure: restart the whole job from disk, from copies in memory, or go on with the other replicas.

All costs are seconds of the whole job, so that ways compare: a replica that is missing for t seconds costs t/r of them.
The parts are inputs. What is measured of them, and where, is in docs/replicas.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import MicsPlanError

STATE_BYTES = 14
"""Bytes per parameter that a rank has to be given: weights in 16 bits, fp32 masters and two moments."""


@dataclass(frozen=True)
class Parts:
    """Parts of the costs of a failure, in seconds and bytes per second."""

    start_s: float = 120.0
    """Time from the start of a job to its first step: scheduler, imports, process groups, compilation."""
    detect_s: float = 10.0
    """Time until a failed job is known to have failed, and its ranks have ended."""
    notice_s: float = 5.0
    """Time until the other replicas go on: the lighthouse's heartbeat timeout."""
    disk: float = 2e9
    """Bytes per second that a node reads from storage."""
    network: float = 2.5e9
    """Bytes per second that a node gets from others for copies in memory and for states of a sibling."""
    save_s: float = 2.0
    """Seconds that a checkpoint stops training."""
    memory_steps: int = 20
    """Optimizer steps between two copies in memory."""
    gpu_hours: float = 50_000.0
    """Hours of GPUs between two failures."""

    def __post_init__(self) -> None:
        if min(vars(self).values()) <= 0:
            raise MicsPlanError(f"Parts of the cost of a failure must be positive, got {self}.")


@dataclass(frozen=True)
class FailureCost:
    """Seconds of the whole job that one failure costs, by way."""

    disk: float
    memory: float
    go_on: float
    interval_s: float
    """Seconds between two checkpoints that lose the least together with restarts from disk."""
    between_s: float
    """Seconds of the job between two failures."""

    def lost(self, way: str, save_s: float) -> float:
        """Return the fraction of the job's time that failures take, with the saves of that way."""
        cost = float(getattr(self, way)) / self.between_s
        return cost + save_s / self.interval_s if way == "disk" else cost


def failure_cost(
    parameters: float, n: int, p: int, step_s: float, gpus_per_node: int = 8, parts: Parts | None = None
) -> FailureCost:
    """Return what a failure costs a job.

    Args:
        parameters: of the model.
        n: ranks.
        p: partition size.
        step_s: seconds of an optimizer step.
        gpus_per_node: ranks of a node.
        parts: parts of the costs.

    Raises:
        MicsPlanError: p does not divide n, or there is one replica only, so that none is left to go on.
    """
    parts = parts or Parts()
    if n % p or n == p:
        raise MicsPlanError(f"Going on needs two replicas or more, so p must divide n and be smaller, got {n} and {p}.")
    replicas = n // p
    between = 3600 * parts.gpu_hours / n
    interval = math.sqrt(2 * parts.save_s * between)  # Young's rule: saves and lost steps cost the same
    per_node = STATE_BYTES * parameters / p * min(gpus_per_node, p)
    again = parts.detect_s + parts.start_s
    return FailureCost(
        disk=again + per_node / parts.disk + interval / 2,
        memory=again + per_node / parts.network + parts.memory_steps * step_s / 2,
        # All lose a step and wait for the lighthouse. One replica of r is missing until it has started, and all wait
        # while it gets its states.
        go_on=step_s + parts.notice_s + again / replicas + per_node / parts.network,
        interval_s=interval,
        between_s=between,
    )
