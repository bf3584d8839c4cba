"""fp32 masters and optimizer states of a slice of each shard: a strategy of the stage 3 optimizer.

DeepSpeed takes for granted that a master has the shape of the 16-bit shard it belongs to. Where it makes one from the
other, it finds *stand-ins* here: the slices of the shards, packed, in place of the shards. Where it has changed the
stand-ins, the changes are gathered into the shards of all replicas, beside the next forward pass. Where it looks for
shards of final gradients, it finds this replica's slices of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from ..comm import collectives
from ..comm.groups import MicsGroups, reduce_scatter_method
from ..comm.packing import ChunkLayout
from ..comm.rank_group import RankGroup, ReduceScatterMethod
from ..comm.wire import Wire
from ..zero.replica_reducers import ReplicaReducer, ScatterToSlices
from ..zero.replica_wire import EncodedSlices
from ..zero.units import GradientShards
from ..zero.weight_gather import WeightGather
from .engine import communication_device
from .patching import replace_methods, temporarily
from .slice_access import GRADIENTS, SliceAccess, SliceCheckpoints

MOST_PEERS = 32
"""Replicas among which hop 2 may be an all-to-all: with units of 32 MiB, a message of 1 MiB to each."""


class WorldStates:
    """World-sharded optimizer states of one stage 3 optimizer.

    Args:
        optimizer: whose methods are replaced, on the instance, by those here that have their names. Before its
            constructor has run.
        shard_bytes: bytes of this rank's shards of all gradients.
    """

    REPLACED = (
        "_setup_for_real_optimizer",
        "set_grad_positions",
        "_reassign_or_swap_out_partitioned_parameters",
        "independent_gradient_partition_epilogue",
        "has_overflow",
        "finalize_gradient_accumulation_boundary",
    )

    def __init__(self, optimizer: Any, groups: MicsGroups, shard_bytes: int) -> None:
        assert groups.replication is not None, "only where there are replicas"
        self._optimizer, self._groups = optimizer, groups
        self.replication: RankGroup = groups.replication
        self._weights = WeightGather(self.replication, groups.replica_executor, groups.sizes.unit_of(shard_bytes))
        self._mean_slices = torch.empty(0)
        self._stand_in = False
        self.cuts: list[ChunkLayout] = []
        """How the shards of each sub-group are cut into slices."""
        self._updated: list[tuple[int, torch.Tensor]] = []
        """Sub-groups with this rank's updated slices, of which the parameters that do not persist are still to come."""
        replace_methods(optimizer, self, self.REPLACED)
        self.access = SliceAccess(optimizer, self)
        self.checkpoints = SliceCheckpoints(optimizer, self)

    @property
    def replica(self) -> int:
        """Index of the replica that this rank belongs to, and of its slices."""
        return self.replication.rank

    def cut_of(self, param: Any) -> ChunkLayout:
        """Return how the shard of one parameter is cut."""
        return ChunkLayout([param.partition_numel()], self.replication.size)

    # --------------------------------------------------------------------- gradients

    def make_reducer(self, shards: GradientShards, wire: Wire | None) -> ReplicaReducer:
        """Return how hop 2 is done on these shards."""
        optimizer = self._optimizer
        like = optimizer.gradient_shards
        cut = ChunkLayout([end - start for start, end in shards.bounds], self.replication.size)
        means = torch.zeros(cut.width, dtype=like.dtype, device=like.device)
        self._mean_slices = get_accelerator().pin_memory(means) if optimizer.offload_optimizer_pin_memory else means
        if wire is not None:  # slices of masters are cut with the padding
            return EncodedSlices(
                shards,
                lambda: self._mean_slices,
                cut.numels,
                self.replication,
                wire,
                lambda: float(optimizer.loss_scale),
            )
        method = self._scatter_method(like.element_size())
        return ScatterToSlices(shards, lambda: self._mean_slices, self.replication, method)

    def _scatter_method(self, itemsize: int) -> ReduceScatterMethod:
        """Return how hop 2 is reduce-scattered.

        An all-to-all adds 16-bit values up in fp32, where a backend would do so in 16 bits. It sends no more where
        each replica is in a fast domain of its own; elsewhere a ring crosses the network less often. And it sends a
        message to each replica, so it is used while those are worth their latency.
        """
        domains = {self._groups.layout.domain_of[rank] for rank in self.replication.ranks}
        worth_it = self.replication.size <= MOST_PEERS
        if itemsize < 4 and len(domains) == self.replication.size and worth_it:
            return "all_to_all"
        # Measurement was about the partition group, so the rule counts here.
        return reduce_scatter_method(self._groups.config, self.replication.group, communication_device())

    def mean(self, param: Any) -> torch.Tensor:
        mean: torch.Tensor = self._optimizer.sync.mean(param.ds_id)
        return mean

    @contextmanager
    def means_stand_in(self) -> Iterator[None]:
        """DeepSpeed finds slices of final gradients where it looks for shards of gradients."""
        optimizer = self._optimizer
        means = {key: optimizer.sync.mean(key) for key in getattr(optimizer, GRADIENTS)}
        with temporarily(optimizer, GRADIENTS, means):
            yield

    def independent_gradient_partition_epilogue(self, stock: Callable[..., None]) -> None:
        stock()
        optimizer = self._optimizer
        if not optimizer.offload_optimizer:
            optimizer.averaged_gradients = {
                sub_group: [
                    self.mean(param) if param.requires_grad else torch.zeros_like(self.mean(param)) for param in params
                ]
                for sub_group, params in enumerate(optimizer.fp16_groups)
            }

    def finalize_gradient_accumulation_boundary(self, stock: Callable[..., None]) -> None:
        with self.means_stand_in():
            stock()

    def has_overflow(self, stock: Callable[..., bool], partition_gradients: bool = True) -> bool:
        # DeepSpeed looks at partial gradients, of which replicas have others; the means are here.
        if partition_gradients:
            optimizer = self._optimizer
            with get_accelerator().stream(optimizer.reduce_and_partition_stream):  # where DeepSpeed looks at them
                mark = self._mean_slices.isfinite().all().logical_not()
                mark = mark.to(communication_device(), torch.uint8).view(1)
                collectives.max_over_(mark, self.replication, "gradient overflow")
                tracker = optimizer.inf_or_nan_tracker
                tracker.logical_or_(mark.bool().to(tracker.device))
        return stock(partition_gradients)

    def agree_on_norms(self, norms: torch.Tensor) -> torch.Tensor:
        """Return the norms over all replicas' slices. -1 marks an invalid one, and stays one."""
        squares = torch.where(norms < 0, torch.inf, norms).square()
        collectives.sum_over_(squares, self.replication, "gradient norm")
        return torch.where(squares.isfinite(), squares.sqrt(), -1.0)

    # --------------------------------------------------------------------- weights

    def finish_updates(self) -> None:
        """Let the current stream wait for updated weights, before they are read other than by a gather."""
        self._groups.replica_executor.drain()

    def _reassign_or_swap_out_partitioned_parameters(self, stock: Callable[..., None], sub_group_id: int) -> None:
        self._publish(sub_group_id)

    def _publish(self, sub_group: int) -> None:
        """Begin to fill the sub-group's shards, of all replicas, from the masters of all of them.

        DeepSpeed gathers parameters that persist at the end of the step, and those without weight decay, most of them,
        are in the last sub-groups. So shards of other parameters wait for those, until all sub-groups were published.
        """
        optimizer = self._optimizer
        flat = optimizer.fp16_partitioned_groups_flat[sub_group]
        row = optimizer.fp32_partitioned_groups_flat[sub_group].detach().to(communication_device(), flat.dtype)
        self._updated.append((sub_group, row))
        self._start_updates(sub_group, row, persist=True)
        if sub_group == len(self.cuts) - 1:
            for earlier, slices in self._updated:
                self._start_updates(earlier, slices, persist=False)
            self._updated.clear()

    def _start_updates(self, sub_group: int, row: torch.Tensor, persist: bool) -> None:
        params, flat = self._optimizer.fp16_groups[sub_group], self._optimizer.fp16_partitioned_groups_flat[sub_group]
        indices = [index for index, param in enumerate(params) if bool(param.ds_persist) == persist]
        for index, handle in self._weights.start(row, self.cuts[sub_group], flat, indices).items():
            params[index].mics_update = handle

    @contextmanager
    def slices_stand_in(self, *, loads: bool) -> Iterator[None]:
        """DeepSpeed finds packed slices where it looks for shards: copies, whatever it does to them.

        Args:
            loads: whether masters are loaded inside, so that weights follow them afterwards.
        """
        if self._stand_in:
            yield
            return
        self.finish_updates()
        optimizer = self._optimizer
        shards = optimizer.fp16_partitioned_groups_flat
        packed = [cut.take(flat, self.replica) for cut, flat in zip(self.cuts, shards)]
        pieces = [
            [_as_shard(flat[start:end]) for start, end in pairwise(cut.starts)] for cut, flat in zip(self.cuts, packed)
        ]
        self._stand_in = True
        try:
            with (
                temporarily(optimizer, "fp16_partitioned_groups_flat", packed),
                temporarily(optimizer, "fp16_partitioned_groups_flat_numel", [cut.width for cut in self.cuts]),
                temporarily(optimizer, "fp16_partitioned_groups", pieces),
            ):
                yield
        finally:
            self._stand_in = False
        if loads:
            for sub_group in range(len(self.cuts)):
                self._publish(sub_group)
            self.finish_updates()

    def _setup_for_real_optimizer(self, stock: Callable[..., None]) -> None:
        optimizer = self._optimizer
        self.cuts = [
            ChunkLayout(tuple(param.partition_numel() for param in params), self.replication.size)
            for params in optimizer.fp16_groups
        ]
        with self.slices_stand_in(loads=False):
            stock()
            # In fp32 DeepSpeed has one tensor for masters and weights: a change of weights is one of masters.
            flats = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat)
            for params, (master, flat) in zip(optimizer.fp16_groups, flats):
                for param in params if master.data_ptr() == flat.data_ptr() else ():
                    param.mics_master_follows = functools.partial(self._follow, param)

    def _follow(self, param: Any) -> None:
        self.access.set_state(param, None, self.cut_of(param).take(param.ds_tensor.data, self.replica))

    def set_grad_positions(self, stock: Callable[..., None]) -> None:
        stock()
        optimizer = self._optimizer
        for sub_group, (cut, params) in enumerate(zip(self.cuts, optimizer.fp16_groups)):
            for param, start, width in zip(params, cut.starts, cut.widths):
                optimizer.grad_position[optimizer.get_param_id(param)] = [sub_group, start, width]


def _as_shard(piece: Any) -> Any:
    """Give a slice what DeepSpeed expects of a shard: it knows its size."""
    piece.ds_numel = piece.numel()
    return piece
