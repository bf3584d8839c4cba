"""One job on several clusters: an answer for each, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from . import plan as planning
from .job import rank_counts
from .machine import Machine
from .plan import Row
from .workload import Workload


@dataclass(frozen=True)
class Answer:
    """Plan of a job on one cluster."""

    machine: Machine
    job: Workload
    gpus: int
    rows: tuple[Row, ...]
    """ZeRO-3 first, then MiCS by partition size."""
    price: float | None = None
    """Dollars per hour of one host."""
    curves: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    """ZeRO-3 and the best row on fewer GPUs as well, by the system's name."""

    @cached_property
    def chosen(self) -> Row | None:
        """Return what the planner chooses; ``None`` if nothing fits."""
        return planning.choose(self.rows)

    @cached_property
    def best(self) -> Row:
        """Return what the planner chooses, or else the MiCS that needs the least memory."""
        return self.chosen or min(self.rows[1:], key=lambda row: row.memory.peak)

    @property
    def reason(self) -> str:
        return planning.explain(self.rows, self.chosen)

    @property
    def dollars_per_hour(self) -> float | None:
        """Return the price of all hosts of the job."""
        return None if self.price is None else self.price * -(-self.gpus // self.machine.gpus_per_node)

    def tokens_per_dollar(self, row: Row) -> float | None:
        """Return the tokens (or samples) that a row trains for a dollar."""
        cost = self.dollars_per_hour
        return None if cost is None else row.tokens_per_second * row.n * 3600 / cost

    def with_curves(self, *, strong: bool = False, reserve: float = planning.RESERVE, progress: Any = None) -> Answer:
        """Return the answer with ZeRO-3 and the best row on fewer GPUs as well.

        Args:
            strong: keep the samples of a step; otherwise those of a GPU.
            progress: wraps the points to show how far it is.
        """
        job, best = self.job, self.best
        counts = rank_counts(self.machine, self.gpus, best.p, job.micro_steps if strong else None)
        if strong:  # the work of a step as it is on all GPUs
            job = replace(job, micro_steps=job.micro_steps * self.gpus // counts[0])
        curves = planning.scaling(
            self.machine,
            job,
            [None, best.p],
            counts,
            strong=strong,
            world_states=best.system.world_states,
            wire=best.system.wire,
            reserve=reserve,
            progress=progress,
        )
        return replace(self, curves=curves)

    def to_json(self) -> dict[str, Any]:
        """Return all of it for other programs."""
        chosen = self.chosen
        return {
            "model": self.job.model.name,
            "parameters": self.job.model.numel,
            "cluster": self.machine.name,
            "sources": dict(self.machine.sources),
            "gpus": self.gpus,
            "dollars_per_hour": self.dollars_per_hour,
            "chosen_p": chosen.p if chosen else None,
            "chosen_optimizer_states": chosen.states if chosen else None,
            "chosen_replica_wire": chosen.system.wire if chosen else None,
            "reason": self.reason,
            "rows": [{**row.to_json(), "tokens_per_dollar": self.tokens_per_dollar(row)} for row in self.rows],
            "scaling": {name: [row.to_json() for row in curve] for name, curve in self.curves.items()},
        }
