"""How long things take on an imagined cluster: the planner's model of collectives, and operations by flops and bytes.

Tensors in tests are small. ``scale`` says how many times larger the imagined ones are: time is that of a machine whose
bandwidths and flops are smaller by it. Latencies and the host's own time are not scaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils.flop_counter import flop_registry

from mics_ds.planner.machine import GroupForm, Machine

from .comm import Issued

_OPERATION = {
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "stock_reduce_scatter",
    "all_to_all_single": "reduce_scatter",  # moves as much
    "all_reduce": "all_reduce",
}
SMALL = 256
"""Bytes of norms and flags, which are as small as they are."""


class Cluster(Machine):
    """A machine with one latency for each collective, and for each peer of an all-to-all."""

    def latency(self, operation: str, form: GroupForm) -> float:
        latency = (self.inter if form.nodes > 1 else self.intra).latency
        if operation == "reduce_scatter":
            return (form.size - 1) * latency
        return latency / 2 if operation == "all_reduce" else latency  # it goes around the group twice


@dataclass(frozen=True)
class Costs:
    """Times on a machine.

    Args:
        machine: ranks with consecutive numbers share its nodes.
        scale: of everything that is counted in elements.
    """

    machine: Machine
    scale: float
    precision: str

    def operation(self, func: Any, args: Any, kwargs: Any, result: Any, moved: int) -> float:
        """Seconds of compute. Matrix products by their flops, everything else by the bytes it reads and writes."""
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            flops = count(*args, **kwargs, out_val=result)
            return self.scale * flops / (self.machine.flops[self.precision] * self.machine.efficiency)
        return self.scale * moved / self.machine.memory_bandwidth

    def form(self, ranks: tuple[int, ...]) -> GroupForm:
        k = self.machine.gpus_per_node
        by_node: dict[int, int] = {}
        for rank in ranks:
            by_node[rank // k] = by_node.get(rank // k, 0) + 1
        per_node = max(by_node.values())
        return GroupForm(len(by_node), per_node, k // per_node)

    def collective(self, issued: Issued) -> tuple[float, str, float]:
        """Return its latency, the link that it uses, and for how long."""
        form = self.form(issued.ranks)
        link = "inter" if form.nodes > 1 else "intra"
        if issued.kind not in _OPERATION:
            return 0.0, link, 0.0
        payload = issued.payload * (self.scale if issued.payload > SMALL else 1)
        latency, whole = (self.machine.formula(_OPERATION[issued.kind], size, form) for size in (0.0, payload))
        return latency, link, whole - latency
