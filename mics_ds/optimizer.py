"""Two-hop gradient synchronisation: the stage 3 optimizer of MiCS.

[Note: the two hops]

    micro-step 1        micro-step 2        micro-step s = boundary         step
    ┌──────────┐        ┌──────────┐        ┌──────────┐
    │ backward │        │ backward │        │ backward │                    norm, clip, update
    └──────────┘        └──────────┘        └──────────┘                    │
     hop 1 ······        hop 1 ······        hop 1 ······                   │
                                                hop 2 ········              │
    shard  =       g1      +=          g2      +=          gs  → mean over replicas,
                                                                 the same on every replica

Hop 1, a reduce-scatter on the partition group, leaves a *partial gradient*, the mean over p ranks, in
one flat buffer per rank. Hop 2 averages that buffer over the replication group, once per boundary. In
the last micro-step it follows hop 1 bucket by bucket, beside the backward pass of earlier layers; what
is left (parameters that got gradients only in earlier micro-steps, or everything, where only ``step``
knows the boundary) is swept up before norms are taken. Together that is the whole buffer, every element
once. What did not change since the last boundary is equal on all replicas already, and averaging equals
changes nothing.

With ``overlap_comm: false`` both hops block, and hop 2 is one all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from . import collectives, compat
from .errors import MicsConfigError, MicsUsageError
from .groups import MicsGroups, build_groups, reduce_scatter_method


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
        overlap_comm: bool = False,
        **kwargs: Any,
    ) -> None:
        config = compat.mics_config_of(ds_config)
        self.mics_groups = build_groups(config, dp_process_group)
        self._method: collectives.ReduceScatterMethod = reduce_scatter_method(config, dp_process_group)
        self._overlap = overlap_comm
        self._unaveraged: set[int] = set()
        """``ds_id`` of parameters whose shard was changed since it was averaged over replicas, or is being."""
        self._incomplete: set[int] = set()
        """``ds_id`` of parameters whose shard was changed since the last boundary."""
        self._averaging: dict[int, collectives.ReplicaAverage] = {}
        """``ds_id`` of parameters whose hop 2 was started before this boundary's sweep."""
        self._reduced: set[int] = set()
        """``ds_id`` of parameters that went through hop 1 in this backward pass."""
        self._reduced_again: set[int] = set()
        """Those for which that ever happened twice in one pass: tied parameters under reentrant checkpointing.
        Starting their hop 2 after the first time would mean doing it twice, so they wait for the sweep."""
        if self.mics_groups.replication is not None:
            # The constructor decides padding and buffer sizes from this group; setting it later is too late.
            dp_process_group = self.mics_groups.partition.group
        super().__init__(
            module,
            init_optimizer,
            param_names,
            timers,
            ds_config,
            *args,
            dp_process_group=dp_process_group,
            overlap_comm=overlap_comm,
            **kwargs,
        )
        self._refuse_unsupported(module)
        self._ranges = self.gradient_ranges()

    def _refuse_unsupported(self, module: torch.nn.Module) -> None:
        if getattr(self, "use_muon", False):
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

    # ---------------------------------------------------------------------------------------- hop 1

    def takes_over_hop1(self) -> bool:
        """DeepSpeed's own does where it is as good: flat, native, and not to be run beside the backward pass.

        On a device with streams its reduce-scatter overlaps by itself; on a CPU it blocks.
        """
        beside_on_cpu = self._overlap and self.communication_device.type == "cpu"
        return beside_on_cpu or self._method != "native" or self.mics_groups.scatter_hierarchy is not None

    def reduce_bucket(
        self,
        ids: list[int],
        gradients: list[torch.Tensor],
        store: Callable[[list[torch.Tensor]], None],
    ) -> None:
        groups = self.mics_groups
        hierarchy = groups.scatter_hierarchy
        order = tuple(range(groups.partition.size)) if hierarchy is None else hierarchy.chunk_of_slot
        plan = collectives.ScatterPlan(tuple(gradient.numel() for gradient in gradients), order)
        # the backend's own reduce-scatter gives DeepSpeed's bits only for the bucket as a whole
        whole = self._method == "native" and hierarchy is None
        payload = sum(gradient.nbytes for gradient in gradients)
        count = 1 if whole else collectives.pieces_worth(payload, staged=hierarchy is not None)
        pieces = plan.pack(gradients, count)
        device = gradients[0].device
        # Offloaded gradients go on to host buffers at the boundary, all at once: no early hop 2 for them.
        start_hop2 = self._overlap and not self.offload_optimizer and self.at_boundary()

        def job() -> None:
            if hierarchy is None:
                shard = collectives.reduce_scatter_mean(pieces, groups.scatter, self._method)
            else:
                shard = collectives.reduce_scatter_mean_hierarchical(pieces, hierarchy, self._method)
            self._reduced_again.update(self._reduced & set(ids))
            self._reduced.update(ids)
            self._stop_averaging(ids)
            store(plan.unpack(shard, groups.partition.rank))
            if start_hop2:
                self._start_averaging(ds_id for ds_id in ids if ds_id not in self._reduced_again)

        groups.scatter_lane.submit(job, device, nbytes=payload, beside=self._overlap)

    def finish_hop1(self) -> None:
        self.mics_groups.scatter_lane.drain()
        self._reduced.clear()

    # ---------------------------------------------------------------------------------------- hop 2

    def defers_reduction(self) -> bool:
        return self.mics_groups.replication is not None

    def shards_changed(self, ids: list[int]) -> None:
        self._unaveraged.update(ids)
        self._incomplete.update(ids)

    def _start_averaging(self, ids: Iterable[int]) -> None:
        """Start hop 2 on the shards of these parameters, joined where they are neighbours in the buffer."""
        replication = self.mics_groups.replication
        if replication is None:
            return
        for start, end, members in _joined([(*self._ranges[ds_id], ds_id) for ds_id in ids]):
            work = collectives.ReplicaAverage(self.gradient_shards[start:end], replication)
            self._averaging.update(dict.fromkeys(members, work))

    def _stop_averaging(self, ids: Iterable[int]) -> None:
        """Wait for hop 2 on these shards, and forget that they are averaged.

        Called for all of them in the end, and for those that are about to change again: adding a partial
        gradient to a mean and averaging once more gives the mean of the sum.
        """
        for work in {self._averaging.pop(ds_id) for ds_id in ids if ds_id in self._averaging}:
            work.wait()

    def complete_reduction_if_needed(self) -> None:
        """Finish both hops. Afterwards the gradient shards are means over all ranks, bitwise equal on all replicas.

        Called at the boundary of the backward pass, and again before the step, because with unmanaged
        accumulation only the step knows where the boundary is. All ranks reach both places, and all
        had gradients or none had, so they agree on whether there is something to do.
        """
        self.finish_hop1()
        if self._incomplete and self.mics_groups.replication is not None:
            self._average_everything()
            self.finish_offloaded_gradients(self._incomplete)
        self._incomplete.clear()

    def before_gradients_are_read(self, local: bool) -> None:
        """Between boundaries a shard is only the mean over its partition group: make it whole.

        That is hop 2, early. It does not disturb the one at the boundary: the mean of (a mean over all + new
        partial gradients) is the mean of the sum.

        Raises:
            MicsUsageError: one rank alone asked, and hop 2 takes all of them.
        """
        self.finish_hop1()
        if not self._unaveraged or self.mics_groups.replication is None:
            return
        if local:
            raise MicsUsageError(
                "Before the gradient accumulation boundary, a local gradient shard under MiCS is the mean over the "
                "partition group only, and the mean over all ranks takes a collective. Ask at the boundary, or call "
                "safe_get_full_grad on all ranks first."
            )
        self._average_everything()

    def _average_everything(self) -> None:
        """Hop 2 on whatever it was not done for yet, and wait for all of it. Collective if anything is left to do."""
        if not self._unaveraged:
            return
        with self.reduction_stream():
            if self.gradient_shards.device == self.communication_device:
                self._start_averaging(ds_id for ds_id in self._ranges if ds_id not in self._averaging)
                self._stop_averaging(list(self._ranges))
            else:
                # Offloaded shards live in host memory, where only gloo could reduce them.
                on_device = self.gradient_shards.to(self.communication_device)
                collectives.average_over_replicas_(on_device, self.mics_groups.replication)
                self.gradient_shards.copy_(on_device)
        self._unaveraged.clear()

    # ------------------------------------------------------------------------------ agreed scalars

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


def _joined(ranges: list[tuple[int, int, int]]) -> list[tuple[int, int, list[int]]]:
    """Join (start, end, id) that touch each other into (start, end, ids), in ascending order."""
    joined: list[tuple[int, int, list[int]]] = []
    for start, end, ds_id in sorted(ranges):
        if joined and joined[-1][1] == start:
            first, _, ids = joined.pop()
            joined.append((first, end, [*ids, ds_id]))
        else:
            joined.append((start, end, [ds_id]))
    return joined
