"""The stage 3 optimizer of MiCS: DeepSpeed's over a partition group, with :mod:`mics_ds.two_hop` in between.

With ``overlap_comm: false`` hop 1 blocks, and hop 2 comes after the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from .comm import collectives, packing
from .comm.groups import MicsGroups, RankGroup, ReduceScatterMethod
from .comm.lanes import Stages
from .comm.sharing import share_out_
from .comm.slices import Slices
from .elementwise import refuse_others, warning_about
from .errors import MicsConfigError, MicsUsageError
from .guard.watch import Guard
from .hop2 import Sliced
from .log import logger
from .repeats import Lost
from .request import Build, building
from .seams.engine import partitioned_group
from .seams.muon import MuonSeam
from .seams.optimizer import gradient_size, is_synchronous_device
from .text import abbreviate
from .two_hop import TwoHop
from .updates import WeightUpdates


class MicsOptimizer(MuonSeam):
    """``DeepSpeedZeroOptimizer_Stage3`` over a partition group, with the second hop. Takes the same arguments.

    ``dp_process_group`` keeps its meaning: all data-parallel ranks.
    """

    mics_build: Build
    mics_groups: MicsGroups
    _updates: WeightUpdates | None = None
    """With world-sharded optimizer states."""
    _mean_slices: torch.Tensor | None = None
    """This rank's slices of final gradients, packed, with those."""

    def __init__(
        self,
        module: torch.nn.Module,
        init_optimizer: torch.optim.Optimizer,
        *args: Any,
        dp_process_group: dist.ProcessGroup,
        overlap_comm: bool = False,
        reduce_scatter: bool = True,
        reduce_bucket_size: int = 500_000_000,
        gradient_predivide_factor: float = 1.0,
        **kwargs: Any,
    ) -> None:
        dp_process_group = partitioned_group(dp_process_group, kwargs.get("mpu"))
        groups = self.mics_groups = self.mics_build.groups(dp_process_group)
        self._overlap = overlap_comm
        if groups.update is not None:
            refuse_others(init_optimizer)
            self._updates = WeightUpdates(groups.update, groups.update_lane)
        if groups.replication is not None:
            # The constructor decides padding and buffer sizes from this group; setting it later is too late.
            dp_process_group = groups.partition.group
            if not reduce_scatter:  # otherwise DeepSpeed refuses any but 1
                gradient_predivide_factor = self._undone(gradient_predivide_factor)
            if overlap_comm and reduce_scatter:
                limit = packing.bucket_limit(
                    *gradient_size(module),
                    streams=not is_synchronous_device(),
                    staged=groups.scatter_hierarchy is not None,
                )
                reduce_bucket_size = min(reduce_bucket_size, limit)
        with building(self.mics_build), _naming_mixed_dtypes(module):
            super().__init__(
                module,
                init_optimizer,
                *args,
                dp_process_group=dp_process_group,
                overlap_comm=overlap_comm,
                reduce_scatter=reduce_scatter,
                reduce_bucket_size=reduce_bucket_size,
                gradient_predivide_factor=gradient_predivide_factor,
                **kwargs,
            )
        self._refuse_unsupported(module)
        self._warn_of_other_numbers()
        asked = groups.config.guard
        self.mics_guard = None if asked is None or asked.every == 0 else Guard(asked, groups)
        self.two_hop = TwoHop(
            self.gradient_ranges(),
            lambda: self.gradient_shards,
            groups.replication,
            groups.scatter_lane,
            self.communication_device,
            # Offloaded gradients go on to host buffers at the boundary, all at once. And what DeepSpeed reduces by
            # itself (reduce_scatter: false) comes without a word about where a bucket ends.
            early=overlap_comm and self.reduce_scatter and not self.offload_optimizer,
            part=self.reduce_bucket_size // groups.partition.size,
            means=self._sliced_means(),
        )

    def _undone(self, predivide_factor: float) -> float:
        """What DeepSpeed divides by before it reduces, and multiplies by after: nothing, which gives the same mean.

        Raises:
            MicsConfigError: it would not multiply.
        """
        n = self.mics_groups.full.size
        if predivide_factor == n:
            raise MicsConfigError(
                f"MiCS takes the mean of gradients, but with gradient_predivide_factor {n} on {n} ranks DeepSpeed "
                f"divides by it and does not multiply again, so that stock ZeRO-3 trains on gradients {n} times "
                f"smaller. Use another factor, or leave it out."
            )
        return 1.0

    def _sliced_means(self) -> Sliced | None:
        replication = self.mics_groups.replication
        if not self.is_sliced or replication is None:
            return None
        means = self.new_gradients(sum(self.slices_of(index).numel for index in range(len(self.fp16_groups))))
        self._mean_slices = means
        return Sliced(
            lambda: self.gradient_shards,
            lambda: means,
            self.gradient_ranges().values(),
            replication,
            self.communication_device,
            self.reduce_bucket_size // self.mics_groups.partition.size,
            method=self._scatter_method(replication, means.element_size()),
            used=self.mics_groups.scatter_lane.used,
        )

    def _scatter_method(self, replication: RankGroup, itemsize: int) -> ReduceScatterMethod:
        """Of hop 2. An all-to-all adds 16-bit values up in fp32, where a backend would do so in 16 bits. It sends no
        more where each replica is on a node of its own; elsewhere a ring crosses the network less often."""
        nodes = {self.mics_groups.node_of[rank] for rank in replication.ranks}
        if itemsize < 4 and len(nodes) == replication.size:
            return "all_to_all"
        return self.mics_groups.reduce_scatter

    def _refuse_unsupported(self, module: torch.nn.Module) -> None:
        if self.refuses_muon():
            raise MicsConfigError(
                "MiCS needs a DeepSpeed whose Muon waits for the gradients of a whole step, as since 0.19.8. Use that, "
                "or Adam, AdamW or SGD."
            )
        named: dict[str, Any] = dict(module.named_parameters())  # ZeRO-3 parameters have more attributes than torch's
        strange = [
            name
            for name, param in named.items()
            if param.mics_groups.layout.ranks != self.mics_groups.layout.ranks
            or param.mics_groups.partition.ranks != self.mics_groups.partition.ranks
        ]
        if strange:
            raise MicsConfigError(
                f"Parameters must be partitioned over the group the optimizer uses, ranks "
                f"{list(self.mics_groups.partition.ranks)} of {abbreviate(self.mics_groups.layout.ranks)}, but "
                f"zero.Init used another for {strange[:3]}{' and others' if len(strange) > 3 else ''}. Give zero.Init "
                f"the configuration and the data-parallel group that deepspeed.initialize gets."
            )

    def _warn_of_other_numbers(self) -> None:
        groups = self.mics_groups
        if groups.replication is None or self.uses_muon():
            return
        warning = warning_about(self.optimizer, groups.partition.size, groups.full.size)
        if warning is not None and groups.full.rank == 0:
            logger.warning(warning)

    # ---------------------------------------------------------------------------------------- hop 1

    def reduce_bucket(
        self,
        ids: list[int],
        gradients: list[torch.Tensor],
        store: Callable[[list[torch.Tensor]], None],
    ) -> None:
        groups = self.mics_groups
        hierarchy, method = groups.scatter_hierarchy, groups.reduce_scatter
        order = tuple(range(groups.partition.size)) if hierarchy is None else hierarchy.chunk_of_slot
        layout = packing.BucketLayout(tuple(gradient.numel() for gradient in gradients), order)
        # the backend's own reduce-scatter gives DeepSpeed's bits only for the bucket as a whole
        whole = method == "native" and hierarchy is None
        payload = sum(gradient.nbytes for gradient in gradients)
        count = 1 if whole else collectives.pieces_worth(payload, staged=hierarchy is not None)
        pieces = layout.pack(gradients, count)

        def hop1(stages: Stages) -> None:
            if hierarchy is None:
                shard = collectives.reduce_scatter_mean(pieces, groups.scatter, method, stages)
            else:
                shard = collectives.reduce_scatter_mean_hierarchical(pieces, hierarchy, method, stages)
            with stages.second():
                store(layout.unpack(shard, groups.partition.rank))

        # DeepSpeed waits for its own stream before it looks at gradients in host memory, so that is where they have
        # to be written.
        beside = self._overlap and not self.offload_optimizer
        self.two_hop.reduce(hop1, nbytes=payload, beside=beside, last=beside and self.at_boundary())

    # ---------------------------------------------------------------------------------------- hop 2

    def defers_reduction(self) -> bool:
        return self.mics_groups.replication is not None

    def require_same_bucket(self, ids: list[int]) -> bool:
        return self.parameter_offload.require_same_bucket(ids)

    def gradient_comes(self, ds_id: int, moment: tuple[int, int], waits: Callable[[], bool]) -> bool:
        repeats = self.two_hop.repeats
        if self.mics_groups.replication is None or not repeats.comes_again(ds_id, moment):
            return True
        left_out = waits()
        repeats.loses(Lost.STOCK_STOPS if left_out else Lost.AS_IN_STOCK)
        return not left_out

    def shards_change(self, ids: list[int], overwriting: bool) -> None:
        self.two_hop.adding(ids, overwriting=overwriting)

    def shards_changed(self, ids: list[int]) -> None:
        self.two_hop.added(ids)

    def backward_pass_ended(self) -> None:
        self.two_hop.finish_hop1()  # before anybody asks for the boundary
        if self.two_hop.end_of_pass(self.at_boundary()) and self.offload_optimizer:
            self.two_hop.complete()
            self._means_are_there()
        self.order_behind_current_stream()

    def gradients_are_used(self) -> None:
        self.shards_are_read()  # of modules that nobody has used since the last step
        # Muon changes gradients in place before DeepSpeed's host looks anywhere, so they have to be final now.
        if self.two_hop.complete_for_step(look=self.offload_optimizer or self.uses_muon()):
            self._means_are_there()

    def step_ended(self) -> None:
        self.two_hop.next_boundary()
        if self.mics_guard is not None:
            self.mics_guard.step_ended(self)

    def before_gradients_are_read(self, local: bool) -> None:
        """Between boundaries a shard is only the mean over its partition group. Make it whole: hop 2, early.

        Raises:
            MicsUsageError: one rank alone asked, and hop 2 takes all of them.
        """
        if not local:
            if self.two_hop.complete():
                self._means_are_there()
        elif not self.two_hop.complete_alone():
            raise MicsUsageError(
                "Gradient shards are means over the partition group until hop 2 has run, and this rank alone cannot "
                "run it. It runs in the backward pass that ends the accumulation (where several such passes precede a "
                "step, in the last of them). Read gradients after that pass, or call "
                "deepspeed.utils.safe_get_full_grad on all ranks first."
            )
        else:
            self.order_behind_current_stream()

    # ---------------------------------------------------------------------------------------- Muon

    def muon_turn(self) -> tuple[int, int]:
        replication = self.mics_groups.replication
        return (0, 1) if replication is None else (replication.rank, replication.size)

    def take_over(self, shares: Sequence[Sequence[torch.Tensor]]) -> None:
        replication = self.mics_groups.replication
        assert replication is not None, "only called where there are replicas"
        share_out_(shares, replication, self.communication_device, "Muon's updates")

    # ------------------------------------------------------------- world-sharded optimizer states

    def cut_shards(self, shards: tuple[int, ...]) -> Slices | None:
        update = self.mics_groups.update
        return None if update is None else Slices(shards, update.size, update.rank)

    def mean_slice(self, ds_id: int) -> torch.Tensor:
        return self.two_hop.mean(ds_id)

    def gradient_was_set(self, ds_id: int) -> None:
        self.two_hop.replaced(ds_id)

    def publish(self, sub_group: int, packed: torch.Tensor) -> None:
        updates, cut = self._updates, self.slices_of(sub_group)
        assert updates is not None, "only called for slices"
        params, flat = self.fp16_groups[sub_group], self.fp16_partitioned_groups_flat[sub_group]
        # DeepSpeed gathers those that stay gathered at the end of the step.
        staying = {index for index, param in enumerate(params) if self.stays_gathered(param)}
        for param, done in zip(params, updates.start(packed, cut, flat, staying)):
            param.mics_update = done

    def shards_are_read(self) -> None:
        if self._updates is not None:
            self._updates.finish()

    def whole_shard(self, param: Any, piece: torch.Tensor) -> torch.Tensor:
        update = self.mics_groups.update
        assert update is not None, "only called for slices"
        cut = Slices((param.partition_numel(),), update.size, update.rank)
        self.shards_are_read()
        device = self.communication_device
        rows = collectives.all_gather_rows(piece.detach().to(device).contiguous(), update, "slices of a state")
        shard = rows.new_empty(cut.shards[0])
        cut.put(rows, shard)
        return shard

    def overflow_beyond(self) -> torch.Tensor | None:
        replication = self.mics_groups.replication
        if not self.is_sliced or replication is None:
            return None
        assert self._mean_slices is not None, "made with the slices"
        mark = self._mean_slices.isfinite().all().logical_not()
        mark = mark.to(self.communication_device, torch.uint8).view(1)
        collectives.max_over_(mark, replication, "gradient overflow")
        return mark.bool()

    def _means_are_there(self) -> None:
        self.finish_offloaded_gradients(self.two_hop.changed)
        self.order_behind_current_stream()

    def gradients_in_doubt(self) -> torch.Tensor:
        return self.two_hop.came_again

    def settle_gradients(self, in_doubt: bool) -> None:
        self.two_hop.settle(in_doubt)
        self.order_behind_current_stream()

    def destroy(self) -> None:
        try:
            self.shards_are_read()
        finally:  # whatever has failed on the way, what the engine holds is to be freed
            super().destroy()
            self.mics_groups.scatter_lane.close()
            self.mics_groups.update_lane.close()

    # ------------------------------------------------------------------------------ agreed scalars

    def agree_on_norms(self, norms: torch.Tensor) -> torch.Tensor:
        """The maximum over replicas, so that all clip by the same scalar.

        Each replica sums squares in its own partition group; the values are equal, but not always to
        the last bit (a group inside a node may be reduced in another order than one across nodes). A
        clipping factor that differs in one bit would make replicas drift apart for good.
        """
        replication = self.mics_groups.replication
        if replication is not None and self.is_sliced:
            # Here each replica has the norm of its slices. -1 marks an invalid one, and has to stay one.
            squares = torch.where(norms < 0, torch.inf, norms).square()
            collectives.sum_over_(squares, replication, "gradient norm")
            norms = torch.where(squares.isfinite(), squares.sqrt(), -1.0)
        elif replication is not None:
            # -1 marks an invalid norm and must win over any number, on all replicas
            norms = torch.where(norms < 0, torch.inf, norms)
            collectives.max_over_(norms, replication, "gradient norm")
            norms = torch.where(norms.isinf(), -1.0, norms)
        return norms


@contextmanager
def _naming_mixed_dtypes(module: torch.nn.Module) -> Iterator[None]:
    """Stage 3 has buffers of one dtype, and an assertion without words where parameters have several."""
    try:
        yield
    except AssertionError as error:
        names: dict[torch.dtype, list[str]] = {}
        for name, param in module.named_parameters():
            if param.requires_grad:
                names.setdefault(param.dtype, []).append(name)
        if len(names) < 2:
            raise
        found = "; ".join(f"{dtype}: {', '.join(of[:3])}{' ...' * (len(of) > 3)}" for dtype, of in names.items())
        raise MicsConfigError(
            f"ZeRO stage 3, stock DeepSpeed's too, needs one dtype for all trainable parameters, but found {found}. "
            f"Cast the module with .to(dtype), build it inside deepspeed.zero.Init, which casts it, or freeze the "
            f"others."
        ) from error
