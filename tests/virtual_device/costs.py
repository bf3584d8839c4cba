"""How long things take on an imagined cluster: the planner's model of collectives, and operations by their flops.

Tensors in tests are small. ``scale`` says how many times larger the imagined ones are: time is that of a machine whose
bandwidths and flops are smaller by it. Latencies and the host's own time are not scaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from mics_ds.planner.machine import GroupForm, Machine

from .comm import Issued

_OPERATION = {
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "reduce_scatter",  # moves as much
    "all_reduce": "all_reduce",
}


@dataclass(frozen=True)
class Costs:
    """Times on a machine.

    Args:
        machine: ranks with consecutive numbers share its nodes.
        scale: of everything that is counted in elements.
        flat_out: whether communication takes no time, to see compute alone.
    """

    machine: Machine
    scale: float
    precision: str = "fp32"
    communication: bool = True

    def operation(self, func: Any, args: Any, kwargs: Any, result: Any) -> float:
        """Seconds of compute. Matrix products by their flops, everything else by the bytes it writes."""
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            flops = count(*args, **kwargs, out_val=result)
            return self.scale * flops / (self.machine.flops[self.precision] * self.machine.efficiency)
        written = sum(item.nbytes for item in tree_iter(result) if hasattr(item, "nbytes"))
        return self.scale * written / self.machine.memory_bandwidth

    def form(self, ranks: tuple[int, ...]) -> GroupForm:
        k = self.machine.gpus_per_node
        by_node: dict[int, int] = {}
        for rank in ranks:
            by_node[rank // k] = by_node.get(rank // k, 0) + 1
        per_node = max(by_node.values())
        return GroupForm(len(by_node), per_node, k // per_node)

    def collective(self, issued: Issued) -> tuple[float, str]:
        """(seconds, link)."""
        form = self.form(issued.ranks)
        link = "inter" if form.nodes > 1 else "intra"
        if not self.communication or issued.kind not in _OPERATION:
            return 0.0, link
        payload = issued.payload * (
            self.scale if issued.payload > 64 else 1
        )  # flags and norms are as small as they are
        return self.machine.formula(_OPERATION[issued.kind], payload, form), link
