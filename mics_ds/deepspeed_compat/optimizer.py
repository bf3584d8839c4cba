"""The stage 3 optimizer of MiCS: DeepSpeed's over a partition group, with hop 2 before the step.

One gradient: DeepSpeed fills a bucket and hands it to :meth:`MicsOptimizer.partition_grads`, which packs it for
:class:`mics_ds.zero.grad_sync.GradSync`. That runs hop 1 and hop 2 in executors. The end of the backward pass waits for
both, and DeepSpeed's step finds means over all ranks where it looks for its own. World-sharded optimizer states
(:class:`WorldStates`) and Muon (:class:`MuonSharing`) are strategies that an optimizer has or has not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import stage3 as stage3_module
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from typing_extensions import override

from ..comm import collectives
from ..comm.async_exec import INLINE, Deferred, Handle, Memory
from ..comm.groups import MicsGroups
from ..errors import MicsConfigError, MicsUsageError
from ..zero.elementwise import refuse_others, warn_of_others
from ..zero.grad_sync import GradSync
from ..zero.replica_reducers import AllReduceMean, ReplicaReducer
from ..zero.replica_wire import EncodedMean
from ..zero.replication import Replication, agree_on_norms
from ..zero.units import GradientShards
from . import hop1_record
from .engine import communication_device, partitioned_group
from .gradient_access import CheckedGradients, PassWatch, check_before_reading
from .muon import MuonSharing, refuse_muon
from .partitioner import refuse_other_groups
from .patching import temporarily
from .replica_wire import chosen_wire
from .states import residual_extents
from .world_states import WorldStates

GRADIENTS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"


class _FullGradients(list):
    """Gradients still to be reduced, passed where DeepSpeed passes reduced ones."""


class _WithoutGrad:
    """A stand-in for a parameter, with a ``grad`` of its own.

    Storing a reduced gradient ends with ``param.grad = None``. Done late, on another thread, that could delete the
    *next* gradient of a parameter that is used twice.
    """

    def __init__(self, param: torch.nn.Parameter) -> None:
        self._param = param
        self.grad = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._param, name)


class MicsOptimizer(DeepSpeedZeroOptimizer_Stage3):
    """``DeepSpeedZeroOptimizer_Stage3`` over a partition group, with the second hop. Takes the same arguments.

    ``dp_process_group`` keeps its meaning: all data-parallel ranks.
    """

    mics_build: Any
    """The build that the optimizer belongs to: has ``groups(dp_process_group)`` and ``replication(groups)``."""
    mics_groups: MicsGroups
    mics_guard: Any = None
    """The replica guard, if there is one."""
    replication: Replication | None
    """Ranks of other replicas with the same shard, ``None`` where there are none."""
    was_discarded = False
    """Whether the last step was given up because a replica was gone."""
    sync: GradSync
    world_states: WorldStates | None = None
    micro_step_id: int
    _agreed_norms: list[torch.Tensor] | None = None
    """Norms of the step under way, once replicas have agreed on them."""
    internal = 0
    """Depth of calls in which DeepSpeed itself works on gradients that need not be final."""
    # Scripts read these two after backward(), to log or to clip gradients.
    averaged_gradients = CheckedGradients()
    grad_partitions_flat_buffer = CheckedGradients(
        'With "mics_optimizer_states": "world" optimizer.grad_partitions_flat_buffer holds means over this partition '
        "group, not over all ranks. Read optimizer.averaged_gradients (this rank's slices), or call "
        "deepspeed.utils.safe_get_full_grad on all ranks."
    )

    def __init__(
        self,
        module: torch.nn.Module,
        init_optimizer: torch.optim.Optimizer,
        *args: Any,
        dp_process_group: dist.ProcessGroup,
        **kwargs: Any,
    ) -> None:
        full = partitioned_group(dp_process_group, kwargs.get("mpu"))
        groups = self.mics_groups = self.mics_build.groups(full)
        refuse_muon(init_optimizer, groups.config.replicas is not None)
        self.replication = self.mics_build.replication(groups)
        self._overlaps = kwargs.get("overlap_comm", False)
        self._pass_watch = PassWatch(self)
        numel, itemsize = _gradient_size(module)
        if self.replication is not None:
            # The constructor decides padding and buffer sizes from this group; setting it later is too late.
            full = groups.partition.group
            if not kwargs.get("reduce_scatter", True):  # otherwise DeepSpeed refuses any but 1
                _undo_predivision(kwargs, groups.full.size)
            elif self._overlaps:
                limit = groups.sizes.bucket_limit(numel, itemsize)
                kwargs["reduce_bucket_size"] = min(kwargs.get("reduce_bucket_size", limit), limit)
            if groups.spreads_states:
                refuse_others(init_optimizer)
                self.world_states = WorldStates(self, groups, numel * itemsize // groups.partition.size)
        check_before_reading(self)
        with self._working_on_gradients():
            super().__init__(module, init_optimizer, *args, dp_process_group=full, **kwargs)
        refuse_other_groups(module, groups)
        if groups.replication is not None and self.use_muon:
            MuonSharing(self, groups.replication)
        elif groups.replication is not None and groups.full.rank == 0:
            warn_of_others(init_optimizer, groups.partition.size, groups.full.size)
        self.sync = self._make_sync()

    def _make_sync(self) -> GradSync:
        groups, ranges = self.mics_groups, self.gradient_ranges()
        part = self.reduce_bucket_size // groups.partition.size
        shards = GradientShards(lambda: self.gradient_shards, list(ranges.values()), communication_device(), part)
        wire, held = chosen_wire(self, groups), self.gradient_shards
        sent = 1.0 if wire is None or not held.nbytes else wire.nbytes(held.numel()) / held.nbytes
        reducer = ReplicaReducer(shards)  # of one replica: for nothing but shards
        if self.world_states is not None:
            reducer = self.world_states.make_reducer(shards, wire)
        elif groups.replication is not None and wire is not None:
            numels = [numel for _, _, numel, _ in residual_extents(self, "unsent")]
            reducer = EncodedMean(shards, numels, groups.replication, wire, lambda: float(self.loss_scale))
        elif self.replication is not None:
            reducer = AllReduceMean(shards, self.replication)
        return GradSync(
            ranges,
            self.replication,
            groups.scatter_executor,
            groups.replica_executor,
            reducer,
            unit_numel=groups.sizes.unit_of(held.nbytes, sent) // held.element_size(),
            # Offloaded gradients go on to host buffers at the boundary, all at once. And what DeepSpeed reduces by
            # itself (reduce_scatter: false) comes without a word about where a bucket ends.
            early=self._reduces_beside and self.reduce_scatter,
        )

    # ------------------------------------------------------------------------------ the gradient buffer

    @property
    def gradient_shards(self) -> torch.Tensor:
        """1-D buffer with this rank's shard of every gradient; DeepSpeed reads views of it."""
        shards: torch.Tensor = vars(self)["grad_partitions_flat_buffer"]
        return shards

    def gradient_ranges(self) -> dict[int, tuple[int, int]]:
        """Return where in :attr:`gradient_shards` the shard of each parameter lies: ``ds_id`` to (start, end).

        In reverse order of the module's parameters, about the order in which gradients come. DeepSpeed has them by
        parameter group, where those of one layer are far apart.
        """
        trained = {param.ds_id: param for group in self.fp16_groups for param in group}
        if self.replication is not None:
            of_module = [param.ds_id for param in self.module.parameters() if param.ds_id in trained]
            trained = {key: trained[key] for key in [*reversed(of_module), *trained]}
        ranges, start = {}, 0
        for key, param in trained.items():
            ranges[key] = (start, start + param.partition_numel())
            start += param.partition_numel()
        return ranges

    @override
    def _setup_for_real_optimizer(self) -> None:
        super()._setup_for_real_optimizer()
        _lay_out_gradients(self)

    @override
    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        if self.world_states is not None:
            self.world_states.finish_updates()
        with self._working_on_gradients():
            super().offload_states(*args, **kwargs)

    @override
    def reload_states(self, *args: Any, **kwargs: Any) -> None:
        with self._working_on_gradients():
            super().reload_states(*args, **kwargs)
        _lay_out_gradients(self)

    # ------------------------------------------------------------------------------------- hop 1

    @override
    def reduce_independent_p_g_buckets_and_remove_grads(self, param: Any) -> None:
        self._pass_watch.gradient_came()
        bucket = self.ipg_buckets[self.get_param_comm_dtype(param)]
        complete = getattr(param, "ds_grad_is_ready", True)  # tiled layers get it in pieces
        if complete and any(other is param for other in bucket.params):
            # Stock DeepSpeed stops with an assertion here. Another replica may have gone on, so all stop in the step.
            self.sync.refuse(param.ds_id)
            return
        super().reduce_independent_p_g_buckets_and_remove_grads(param)

    @override
    def _DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(
        self, params_to_reduce: list, communication_data_type: torch.dtype
    ) -> Any:
        full = [param.grad.to(communication_data_type) for param in params_to_reduce]
        if self.mics_groups.partition.size > 1:
            return _FullGradients(full)
        return [gradient.reshape(-1).to(self.gradient_accumulation_dtype) for gradient in full]

    @override
    def _DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(
        self, communication_data_type: torch.dtype
    ) -> None:
        # With enable_sanity_checks DeepSpeed has all ranks of the world compare what each bucket holds.
        same_order = self.parameter_offload.same_order
        compare = stage3_module.assert_ints_same_as_other_ranks if same_order is None else same_order.require_bucket
        with temporarily(stage3_module, "assert_ints_same_as_other_ranks", compare):
            super()._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(communication_data_type)

    @override
    def partition_grads(self, params_to_release: list, grad_partitions: Any) -> Any:
        def hop1(before_storing: Callable[[], None]) -> Handle[None] | None:
            if isinstance(grad_partitions, _FullGradients):
                return self._start_hop1(params_to_release, grad_partitions, before_storing)
            # Shards are whole (p = 1), or DeepSpeed has reduced them (reduce_scatter: false).
            before_storing()
            self._store(params_to_release, grad_partitions)
            return None

        self._pass_watch.bucket_was_reduced()
        ids = [param.ds_id for param in params_to_release]
        last = self._reduces_beside and self.is_gradient_accumulation_boundary()
        self.sync.reduce(ids, hop1, overwriting=self.micro_step_id == 0, last=last)
        return []

    @property
    def _reduces_beside(self) -> bool:
        """Return whether hop 1 runs beside the backward pass.

        DeepSpeed waits for its own stream before it looks at gradients in host memory, so they are written on that.
        """
        return self._overlaps and not self.offload_optimizer

    def _start_hop1(
        self, params: list, gradients: list[torch.Tensor], before_storing: Callable[[], None]
    ) -> Handle[None] | None:
        groups = self.mics_groups
        stand_ins = [_WithoutGrad(param) for param in params]

        def start(memory: Memory) -> Handle[None]:
            reducing = collectives.start_hop1(
                gradients, groups.scatter, groups.scatter_hierarchy, groups.ways.reduce_scatter, memory
            )

            def finish_hop1() -> None:
                shards = reducing.wait()
                before_storing()
                self._store(stand_ins, [item.to(self.gradient_accumulation_dtype) for item in shards])

            return Deferred(finish_hop1)

        done: Handle[None] | None = None
        if self._reduces_beside:
            done = groups.scatter_executor.submit(start)
        else:
            start(INLINE).wait()
        for param in params:
            if not get_accelerator().is_synchronized_device():
                param.grad.record_stream(get_accelerator().current_stream())
            param.grad = None
        return done

    def _store(self, params: list, shards: list[torch.Tensor]) -> Any:
        """Have DeepSpeed add reduced gradients to the shards, or write them over."""
        # With an offloaded optimizer it would copy gradients on to the optimizer as soon as it sees the boundary, when
        # they are still partial. See _finish_offloaded.
        held_back = self.offload_optimizer and self.replication is not None
        with temporarily(self, "is_gradient_accumulation_boundary", lambda: False) if held_back else nullcontext():
            return super().partition_grads(params, shards)

    # ------------------------------------------------------------------------------------- hop 2

    @override
    def independent_gradient_partition_epilogue(self) -> None:
        with self._working_on_gradients():
            super().independent_gradient_partition_epilogue()
        self._pass_watch.pass_ended()
        if self.sync.end_pass(self.is_gradient_accumulation_boundary()):
            self._means_have_come()
        self._order_reduction_stream()

    def before_gradients_are_read(self, alone: bool) -> None:
        """Make gradient shards means over all ranks, for a reader.

        Args:
            alone: whether this rank alone reads. Otherwise all ranks call, and hop 2 runs where it has not.

        Raises:
            MicsUsageError: one rank alone reads, and hop 2, which takes all of them, has not run.
        """
        if alone and not self.sync.is_mean:
            raise MicsUsageError(
                "Gradient shards are means over the partition group until hop 2 has run, and this rank alone cannot "
                "run it. It runs in the backward pass that ends the accumulation (where several such passes precede a "
                "step, in the last of them). Read gradients after that pass, or call "
                "deepspeed.utils.safe_get_full_grad on all ranks first."
            )
        if self.sync.average():
            self._means_have_come()
        if alone and self.sync.flags is not None:  # not look(): the other replicas may not read
            self.sync.refuse_unusable(self.sync.flags.tolist())
        self._order_reduction_stream()

    def _means_have_come(self) -> None:
        # Muon changes gradients in place before DeepSpeed's host looks anywhere.
        if (self.offload_optimizer or self.use_muon) and self.sync.flags is not None:
            ids = self.sync.look(self.sync.flags.tolist())
            if self.offload_optimizer:
                self._finish_offloaded(ids)

    def _finish_offloaded(self, ids: set[int]) -> None:
        """Compute norms and fp32 copies of the now final shards of these parameters, if this is the boundary."""
        for param in (param for group in self.fp16_groups for param in group if param.ds_id in ids):
            # Those that only another replica had gradients for are not among them yet; shards of padding never are.
            if param.partition_numel() * self._get_param_partition_rank(param) < param.ds_numel:
                self._offload_boundary_param_ids.add(param.ds_id)
        if self.is_gradient_accumulation_boundary():
            with nullcontext() if self.world_states is None else self.world_states.means_stand_in():
                self._finalize_offload_gradient_accumulation()

    def _order_reduction_stream(self) -> None:
        """Let DeepSpeed's reduction stream, which it looks at gradients from, wait for the current one."""
        accelerator = get_accelerator()
        if not accelerator.resolves_data_dependency():
            self.reduce_and_partition_stream.wait_stream(accelerator.current_stream())

    @override
    def step(self, closure: Callable | None = None) -> None:
        self._pass_watch.refuse_after_interruption()
        if self.world_states is not None:
            self.world_states.finish_updates()  # of modules that nobody has used since the last step
        if self.sync.average():
            self._means_have_come()
        self._order_reduction_stream()
        with self._working_on_gradients():
            self.was_discarded = False
            if self.replication is not None and self.replication.votes:
                self._agreed_norms = self._get_norm_groups()  # the last collective between replicas before the vote
                self.was_discarded = not self.replication.commit()
            if self.was_discarded:  # what DeepSpeed does with gradients that overflow, but for the loss scale
                self._pre_step()
                self._partition_all_parameters()
                self.overflow = True
                self._overflow_clean_up(self.loss_scale)
                self.sync.restart()
            else:
                super().step(closure)
                self.sync.next_boundary(discarded=self.overflow)
        self._agreed_norms = None

    @override
    def _get_norm_groups(self) -> list[torch.Tensor]:
        if self._agreed_norms is not None:
            return self._agreed_norms
        norms = super()._get_norm_groups()
        if not norms or self.replication is None:
            return norms
        device = communication_device()
        stacked = torch.stack([torch.as_tensor(norm).to(device) for norm in norms])
        agreed = (
            agree_on_norms(stacked, self.replication)
            if self.world_states is None
            else self.world_states.agree_on_norms(stacked)
        )
        # On the host, where DeepSpeed looks at norms next, so that it waits once and not twice.
        flags = agreed[:0] if self.sync.flags is None else self.sync.flags.to(agreed.dtype)
        on_host = torch.cat([agreed, flags]).cpu()
        if len(flags):
            self.sync.look([int(value) for value in on_host[len(norms) :].tolist()])
        return list(on_host[: len(norms)].unbind())

    @override
    def _rigid_state_dict(self) -> dict[str, Any]:
        return {**super()._rigid_state_dict(), hop1_record.KEY: hop1_record.record(self.mics_groups)}

    @override
    def _rigid_load_state_dict(self, state_dict: dict[str, Any], load_optimizer_states: bool = True) -> None:
        super()._rigid_load_state_dict(state_dict, load_optimizer_states)
        self.mics_groups = hop1_record.as_recorded(self.mics_groups, state_dict)

    @contextmanager
    def _working_on_gradients(self) -> Iterator[None]:
        """DeepSpeed's own code reads gradients inside, whatever state they are in."""
        self.internal += 1
        try:
            yield
        finally:
            self.internal -= 1

    @override
    def destroy(self) -> None:
        try:
            if self.world_states is not None:
                self.world_states.finish_updates()
        finally:  # whatever has failed on the way, what the engine holds is to be freed
            with self._working_on_gradients():
                super().destroy()
            self.mics_groups.scatter_executor.close()
            self.mics_groups.replica_executor.close()
            if self.replication is not None:
                self.replication.close()


def _lay_out_gradients(optimizer: MicsOptimizer) -> None:
    """Make DeepSpeed's views of the buffer those of :meth:`MicsOptimizer.gradient_ranges`."""
    views: dict[int, torch.Tensor] = getattr(optimizer, GRADIENTS)
    for key, (start, end) in optimizer.gradient_ranges().items():
        if key in views:
            views[key] = optimizer.gradient_shards[start:end]


def _undo_predivision(kwargs: dict[str, Any], ranks: int) -> None:
    """Switch off a factor that DeepSpeed divides by before it reduces, and multiplies by after.

    Raises:
        MicsConfigError: DeepSpeed would not multiply.
    """
    if kwargs.get("gradient_predivide_factor") == ranks:
        raise MicsConfigError(
            f"MiCS takes the mean of gradients, but with gradient_predivide_factor {ranks} on {ranks} ranks DeepSpeed "
            f"divides by it and does not multiply again, so that stock ZeRO-3 trains on gradients {ranks} times "
            f"smaller. Use another factor, or leave it out."
        )
    kwargs["gradient_predivide_factor"] = 1.0


def _gradient_size(module: torch.nn.Module) -> tuple[int, int]:
    """Return the elements of all gradients, in full, and the bytes of one of them."""
    trained: list[Any] = [param for param in module.parameters() if param.requires_grad]
    numel = sum(getattr(param, "ds_numel", param.numel()) for param in trained)
    return numel, max((param.element_size() for param in trained), default=1)
