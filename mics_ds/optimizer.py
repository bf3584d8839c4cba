"""Two-hop gradient synchronisation: the stage 3 optimizer of MiCS.

[Note: the two hops]

    micro-step 1        micro-step 2        micro-step s = boundary        step
    ┌──────────┐        ┌──────────┐        ┌──────────┐
    │ backward │ hop 1  │ backward │ hop 1  │ backward │ hop 1  hop 2      norm, clip, update
    └──────────┘   │    └──────────┘   │    └──────────┘   │      │            │
    shard  =       g1      +=          g2      +=          gs    mean over     same on every replica
                                                                 replicas

Hop 1 is DeepSpeed's reduce-scatter on the partition group; it leaves a *partial gradient*, the mean
over p ranks, in one flat buffer per rank. Hop 2 averages that whole buffer over the replication group,
once per boundary. Taking the whole buffer, and not the buckets of the last micro-step, covers
parameters that got a gradient only in an earlier one; what did not change since the last boundary is
already equal on all replicas, and averaging equals changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from . import collectives, compat
from .errors import MicsConfigError
from .groups import MicsGroups, build_groups


class MicsOptimizer(compat.OptimizerSeam):
    """``DeepSpeedZeroOptimizer_Stage3`` over a partition group, with the second hop. Takes the same arguments.

    ``dp_process_group`` keeps its meaning: all data-parallel ranks.
    """

    mics_groups: MicsGroups

    def __init__(
        self,
        module: torch.nn.Module,
        init_optimizer: torch.optim.Optimizer,
        param_names: dict,
        timers: Any,
        ds_config: Any,
        *args: Any,
        dp_process_group: dist.ProcessGroup,
        **kwargs: Any,
    ) -> None:
        self.mics_groups = build_groups(compat.mics_config_of(ds_config), dp_process_group)
        self._shards_are_partial = False
        if self.mics_groups.replication is not None:
            # The constructor decides padding and buffer sizes from this group; setting it later is too late.
            dp_process_group = self.mics_groups.partition.group
        super().__init__(
            module, init_optimizer, param_names, timers, ds_config, *args, dp_process_group=dp_process_group, **kwargs
        )
        self._refuse_unsupported(module)

    def _refuse_unsupported(self, module: torch.nn.Module) -> None:
        if self.use_muon:
            raise MicsConfigError("MiCS does not support the Muon optimizer yet. Use Adam, AdamW or SGD.")
        strange = [
            name
            for name, param in module.named_parameters()
            if param.mics_groups.partition.ranks != self.mics_groups.partition.ranks
        ]
        if strange:
            raise MicsConfigError(
                f"Parameters must be partitioned over the group the optimizer uses, ranks "
                f"{list(self.mics_groups.partition.ranks)}, but zero.Init used another for {strange[:3]}"
                f"{' and others' if len(strange) > 3 else ''}. Give zero.Init the configuration and the data-parallel "
                f"group that deepspeed.initialize gets."
            )

    def defers_reduction(self) -> bool:
        return self.mics_groups.replication is not None

    def shards_changed(self) -> None:
        self._shards_are_partial = True

    def complete_reduction_if_needed(self) -> None:
        """Hop 2. Afterwards the gradient shards are means over all ranks, bitwise equal on all replicas.

        Called at the boundary of the backward pass, and again before the step, because with unmanaged
        accumulation only the step knows where the boundary is. All ranks reach both places, and all
        had gradients or none had, so they agree on whether there is something to do.
        """
        replication = self.mics_groups.replication
        if replication is None or not self._shards_are_partial:
            return
        with self.reduction_stream():
            shards = self.gradient_shards
            # Offloaded shards live in host memory, where only gloo could reduce them.
            on_device = shards.to(self.communication_device)
            collectives.average_over_replicas_(on_device, replication)
            if on_device is not shards:
                shards.copy_(on_device)
        self._shards_are_partial = False
        self.finish_offloaded_gradients()

    def agree_on_norms(self, norms: torch.Tensor) -> torch.Tensor:
        """The maximum over replicas, so that all clip by the same scalar.

        Each replica sums squares in its own partition group; the values are equal, but not always to
        the last bit (a group inside a node may be reduced in another order than one across nodes). A
        clipping factor that differs in one bit would make replicas drift apart for good.
        """
        replication = self.mics_groups.replication
        if replication is None:
            return norms
        # -1 marks an invalid norm and must win over any number, on all replicas
        agreed = torch.where(norms < 0, torch.inf, norms)
        collectives.max_over_(agreed, replication, "gradient norm")
        return torch.where(agreed.isinf(), -1.0, agreed)

    def agree_on_overflow(self, overflow: bool) -> bool:
        """True if any replica overflowed. The partition group has agreed already."""
        replication = self.mics_groups.replication
        if replication is None:
            return overflow
        flag = torch.tensor([overflow], dtype=torch.uint8, device=self.communication_device)
        collectives.max_over_(flag, replication, "overflow flag")
        return bool(flag.item())
