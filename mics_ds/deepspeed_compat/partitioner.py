"""Partitioning parameters over p ranks: the ``zero.Init``, ``GatheredParameters`` and parameter manager of MiCS.

Two groups matter. A parameter is *sharded and gathered* in its partition group. But whenever a value is *decided* (a
fresh parameter, a function given to ``Module.apply``, a change under ``GatheredParameters``), it has to be the same in
all replicas, so it is broadcast over the whole data-parallel group.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import partition_parameters as pp
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from typing_extensions import override

from ..comm import collectives
from ..comm.async_exec import Handle
from ..comm.groups import MicsGroups
from ..comm.packing import ChunkLayout
from ..comm.rank_group import RankGroup
from ..errors import MicsConfigError
from ..formatting import abbreviate
from ..log import log_rank0
from .engine import communication_device, ensure_distributed
from .same_order import SameOrder

ZeroParam = Any
"""A ``torch.nn.Parameter`` with the attributes that DeepSpeed adds to it."""


def _bytes(param: ZeroParam) -> torch.Tensor:
    """Return a full parameter as bytes: gloo and NCCL do not broadcast every dtype."""
    return param.data.view(torch.uint8)


def _groups_of(param: Any) -> MicsGroups | None:
    return getattr(param, "mics_groups", None)


class MicsPartitioner(pp.Init):
    """``deepspeed.zero.Init`` that shards over a partition group. Takes the same arguments.

    ``data_parallel_group`` keeps its meaning: all data-parallel ranks, the world by default.
    """

    mics_build: Any
    """See :attr:`mics_ds.deepspeed_compat.optimizer.MicsOptimizer.mics_build`."""
    mics_groups: MicsGroups
    constructed = False
    """Whether this process has any MiCS parameters at all."""

    def __init__(
        self,
        module: torch.nn.Module | None = None,
        data_parallel_group: dist.ProcessGroup | None = None,
        *args: Any,
        sequence_data_parallel_group: dist.ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        ensure_distributed()
        group = sequence_data_parallel_group if data_parallel_group is None else data_parallel_group
        full = dist.group.WORLD if group is None else group
        assert full is not None, "initialised a line above"
        self.mics_groups = self.mics_build.groups(full)
        MicsPartitioner.constructed = True
        if self.mics_groups.replication is not None:
            group = self.mics_groups.partition.group
        # hpZ is switched off in our configuration, so a group for it is left from an earlier engine of this
        # process: DeepSpeed keeps it in a global and hands it to every engine that follows.
        kwargs["zero_param_parallel_group"] = None
        # For p = n the caller's own argument goes on, so that this is ZeRO-3 to the letter.
        with self.mics_build.active():
            super().__init__(module, group, *args, **kwargs)

    # --------------------------------------------------------------------------------- values

    @override
    def _zero_init_param(self, param: ZeroParam) -> None:
        # Ranks may have drawn different random numbers. DeepSpeed broadcasts from the first rank of
        # the group it shards over, which leaves replicas different; this makes them equal first.
        if self.mics_groups.replication is not None:
            collectives.broadcast_([_bytes(param)], 0, self.mics_groups.full)
        super()._zero_init_param(param)

    @override
    def _ensure_availability_of_partitioned_params(self, params: list[ZeroParam]) -> None:
        super()._ensure_availability_of_partitioned_params(params)
        for param in params:
            # With world-sharded optimizer states, updated weights may still be on their way from other replicas.
            update: Handle[None] | None = getattr(param, "mics_update", None)
            if update is not None:
                update.wait()

    @override
    def _partition_param(
        self, param: ZeroParam, buffer: Any = None, has_been_updated: bool = False, free_data: bool = True
    ) -> None:
        had_shard = param.ds_tensor is not None
        super()._partition_param(param, buffer, has_been_updated, free_data)
        has_copies = self.mics_groups.replication is not None or self.mics_groups.config.replicas is not None
        if not had_shard and has_copies and _is_in_memory(param):
            # DeepSpeed leaves in the padding what was in memory. Copies are compared whole, so it has to be equal.
            width = param.ds_tensor.numel()
            param.ds_tensor.data[max(0, param.ds_numel - self._partition_rank(param) * width) :].zero_()
        if had_shard and has_been_updated and hasattr(param, "mics_master_follows"):
            param.mics_master_follows()

    @override
    def patch_init_and_builtins(self) -> None:
        """Put our wrapper of ``Module.apply`` in place of DeepSpeed's.

        That one broadcasts from global rank 0 *in the partition group*, which raises wherever rank 0 is not a member.
        """
        super().patch_init_and_builtins()
        if not pp.Init.override_module_apply:
            return
        # Put there by super(), and restored by it from there.
        original = torch.nn.Module._old_apply  # type: ignore[attr-defined]

        @functools.wraps(original)
        def apply(module: torch.nn.Module, fn: Callable[[torch.nn.Module], None]) -> torch.nn.Module:
            return original(module, fn if hasattr(fn, "wrapped") else gathering(fn))

        def gathering(fn: Callable[[torch.nn.Module], None]) -> Callable[[torch.nn.Module], None]:
            @functools.wraps(fn)
            def wrapped(module: torch.nn.Module) -> None:
                params: list[ZeroParam] = sorted(
                    (param for param in module.parameters(recurse=False) if pp.is_zero_param(param)),
                    key=operator.attrgetter("ds_id"),
                )
                for param in params:
                    param.all_gather()
                fn(module)
                collectives.broadcast_([_bytes(param) for param in params], 0, self.mics_groups.full)
                for param in params:
                    param.partition(has_been_updated=True)

            # apply() recurses through itself; gather once per module.
            wrapped.wrapped = True  # type: ignore[attr-defined]
            return wrapped

        torch.nn.Module.apply = apply  # type: ignore[method-assign,assignment]

    # --------------------------------------------------------------------------------- gathers

    @override
    def _convert_to_deepspeed_param(self, param: ZeroParam) -> None:
        if hasattr(param, "ds_zero_partition_process_group"):
            # Under AutoTP the engine has noted its data-parallel group, which would come before ours.
            param.ds_zero_partition_process_group = self.ds_process_group
        super()._convert_to_deepspeed_param(param)
        param.mics_groups = self.mics_groups
        stock = param.all_gather_coalesced

        @functools.wraps(stock)
        def all_gather_coalesced(params: Iterable, safe_mode: bool = False, quantize: bool = False) -> Any:
            params = list(params)
            if quantize or safe_mode or not params or not self._gathers(params):
                return stock(params, safe_mode=safe_mode, quantize=quantize)
            self._ensure_availability_of_partitioned_params(params)
            if any(param.ds_status != pp.ZeroParamStatus.NOT_AVAILABLE for param in params):
                raise RuntimeError(f"expected parameters that are not gathered yet, got {params[0].ds_summary()}")
            for param in params:
                param.ds_status = pp.ZeroParamStatus.INFLIGHT
            return self._start_gather(params, may_share=True)

        param.all_gather_coalesced = all_gather_coalesced

    # The coordinator gathers for a module's forward or backward, through all_gather_coalesced. Every other gather comes
    # through one of the next two: a context, a function that is applied, parameters that stay gathered, a script.
    # Users may write into what they get and keep it, so it is never the memory of the shard. Stock lets the host wait
    # for the whole device there, and with it for updated weights that are still on their way.

    @override
    def _allgather_params_sequential(self, param_list: list, *args: Any, **kwargs: Any) -> None:
        if self._gathers(param_list):
            self._start_gather(param_list, may_share=False).wait()
        else:
            super()._allgather_params_sequential(param_list, *args, **kwargs)

    @override
    def _allgather_params_coalesced(self, param_list: list, *args: Any, **kwargs: Any) -> None:
        if param_list and self._gathers(param_list):
            self._start_gather(param_list, may_share=False).wait()
        else:
            super()._allgather_params_coalesced(param_list, *args, **kwargs)

    def _gathers(self, params: Sequence[ZeroParam]) -> bool:
        """Return whether these are gathered here, and not by DeepSpeed."""
        if self.mics_groups.replication is None and not any(param.mics_groups.hierarchy for param in params):
            return False  # ZeRO-3 to the letter
        if self.allgather_sequential or self.use_all_reduce_for_fetch_params:
            return False  # who asks for a way of gathering gets DeepSpeed's
        return all(self.get_partition_dp_group(param) is self.ds_process_group for param in params)

    def _start_gather(self, params: Iterable[ZeroParam], may_share: bool) -> Any:
        """Gather parameters, those of one dtype in one buffer.

        Args:
            may_share: whether a parameter may get the memory of its shard, where that is whole.

        Returns:
            What DeepSpeed waits for.
        """
        params = sorted(params, key=operator.attrgetter("ds_id"))  # one order on all ranks
        if self.mics_groups.partition.size == 1 and all(_is_here(param) for param in params):
            # Users see parameters that stay gathered between steps.
            shared = [may_share and not param.ds_persist for param in params]
            shards = [param.ds_tensor.data for param in params]
            return _Gather(params, lambda: [shard if share else shard.clone() for shard, share in zip(shards, shared)])
        by_dtype: dict[torch.dtype, list[ZeroParam]] = {}
        for param in params:
            by_dtype.setdefault(pp.get_allgather_dtype(param, param.ds_tensor), []).append(param)
        gathers = [_start_gather(params[0].mics_groups, *item) for item in by_dtype.items()]
        return pp.MultipleAllGatherHandles(gathers)


def _is_in_memory(param: ZeroParam) -> bool:
    return bool(param.ds_tensor.final_location != OffloadDeviceEnum.nvme)


def _is_here(param: ZeroParam) -> bool:
    """Return whether a shard is on the device of its parameter."""
    return param.ds_tensor.device == param.device and _is_in_memory(param)


def unshare(param: ZeroParam) -> None:
    """Give a gathered parameter memory of its own, if it is in that of its shard."""
    if param.ds_tensor is not None and param.data.data_ptr() == param.ds_tensor.data_ptr():
        param.data = param.data.clone()


class _Gather:
    """Handle of a gather that DeepSpeed waits on.

    Args:
        fulls: waits, and returns each parameter, flat, with its padding or without.
    """

    def __init__(self, params: list[ZeroParam], fulls: Callable[[], list[torch.Tensor]]) -> None:
        self._params = params
        self._fulls: Callable[[], list[torch.Tensor]] | None = fulls

    def wait(self, handle_dependency: bool = True) -> None:
        """Give every parameter its full data. ``handle_dependency`` is ignored: it is always handled."""
        if self._fulls is None:
            return
        for param, full in zip(self._params, self._fulls()):
            param.data = full[: param.ds_numel].to(param.ds_tensor.dtype).view(param.ds_shape)
            param.ds_status = pp.ZeroParamStatus.AVAILABLE
        self._fulls = None


def _start_gather(groups: MicsGroups, dtype: torch.dtype, params: list[ZeroParam]) -> _Gather:
    partition, hierarchy = groups.partition, groups.hierarchy
    domains = 1 if hierarchy is None else hierarchy.inter.size
    layout = ChunkLayout([param.ds_numel for param in params], partition.size, domains)
    memory = torch.empty(0, dtype=dtype, device=communication_device())
    is_single, numel = len(params) == 1, layout.size * layout.width

    def fill(row: torch.Tensor) -> torch.Tensor:
        torch._foreach_copy_(list(row.split(list(layout.widths))), [param.ds_tensor.view(-1) for param in params])
        return row

    gathered: Handle[torch.Tensor]
    if hierarchy is None:
        rows = memory.new_empty(layout.size, layout.width)
        as_it_is = is_single and _is_here(params[0]) and params[0].ds_tensor.dtype == dtype
        own = params[0].ds_tensor.view(-1) if as_it_is else fill(rows[partition.rank])
        gathered = collectives.start_all_gather(rows, own, partition, collectives.GATHER)
        in_order = is_single
    else:
        # A copy also of a single shard: the optimizer may write the next weights while this one is being sent.
        shard = fill(memory.new_empty(layout.width))
        is_large = numel * dtype.itemsize >= groups.sizes.whole
        in_order = is_single and is_large
        start = (
            collectives.start_all_gather_whole_hierarchical if in_order else collectives.start_all_gather_hierarchical
        )
        gathered = groups.gather_executor.submit(functools.partial(start, shard, hierarchy))

    def fulls() -> list[torch.Tensor]:
        rows = gathered.wait()
        if in_order:
            return [rows.view(-1)]
        copies = [memory.new_empty(param.ds_numel) for param in params]
        layout.copy_out(rows, copies)
        if not get_accelerator().is_synchronized_device():
            rows.record_stream(get_accelerator().current_stream())
        return copies

    return _Gather(params, fulls)


class MicsGatheredParameters(pp.GatheredParameters):
    """``deepspeed.zero.GatheredParameters`` whose ``modifier_rank`` counts over all data-parallel ranks.

    Without this, ``modifier_rank=0`` would mean the first rank of *each* partition group, and weights
    that a framework loads on global rank 0 would never reach the other replicas. Given none but stock
    ZeRO-3 parameters, it is the stock context.
    """

    def __init__(
        self,
        params: torch.nn.Parameter | Iterable[torch.nn.Parameter],
        modifier_rank: int | None = None,
        fwd_module: torch.nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        if enabled and isinstance(params, Iterable) and not isinstance(params, torch.Tensor):
            params = list(params)  # it may be a generator, and is read twice
        items = params if isinstance(params, list) else [params]
        self._is_replicated = enabled and any(groups and groups.replication for groups in map(_groups_of, items))
        self._modifier_rank = modifier_rank if self._is_replicated else None
        # After our broadcast every rank has the value, so DeepSpeed's own may start from any member.
        first_member = 0 if self._modifier_rank is not None else modifier_rank
        super().__init__(params, first_member, fwd_module, enabled)

    @override
    def __enter__(self) -> None:
        super().__enter__()
        if self._is_replicated:
            for param in self.params:
                unshare(param)

    @override
    def __exit__(self, *exc: Any) -> Any:
        if self.enabled and self._modifier_rank is not None:
            if any(param.data.device != communication_device() for param in self.params):
                try:
                    return super().__exit__(*exc)  # says what is wrong with that
                finally:
                    self.params[0].partition(param_list=self.params)
            by_group: dict[RankGroup, list[torch.Tensor]] = {}
            for param in self.params:
                groups = _groups_of(param)
                full = RankGroup.of(param.ds_process_group) if groups is None else groups.full
                by_group.setdefault(full, []).append(_bytes(param))
            for full, tensors in by_group.items():
                collectives.broadcast_(tensors, self._modifier_rank, full)
        return super().__exit__(*exc)


class MicsParamManager(DeepSpeedZeRoOffload):
    """DeepSpeed's parameter manager. Used by the optimizer, and alone when there is none (evaluation)."""

    mics_build: Any
    """See :attr:`mics_ds.deepspeed_compat.optimizer.MicsOptimizer.mics_build`."""
    mics_groups: MicsGroups
    """Groups of the parameters. The optimizer checks that they are its own too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.same_order: SameOrder | None = None
        """Comparison of what the partition group does, where replicas may do something else."""
        if self.mics_groups.replication is not None:
            self.same_order = SameOrder(self.module, self.mics_groups.partition, self.get_param_coordinator())

    @override
    def _convert_to_zero_parameters(self, ds_config: Any, module: torch.nn.Module, mpu: Any) -> None:
        def make_partitioner() -> MicsPartitioner:
            return pp.Init(
                data_parallel_group=mpu.get_data_parallel_group() if hasattr(mpu, "get_data_parallel_group") else None,
                dtype=self.dtype,
                config_dict_or_path=ds_config,
                remote_device=self.offload_device,
                pin_memory=self.offload_param_pin_memory,
                mpu=mpu,
            )

        if getattr(module, "ds_autotp_parsed", False):
            # AutoTP has cut layers, and its shards of them are about to become ZeRO-3 parameters. What zero.Init has
            # partitioned over all ranks goes over this rank's data-parallel group first: its partitioner, which takes
            # up the shards otherwise, would make those of the first rank those of all.
            _repartition(make_partitioner, [param for param in module.parameters() if pp.is_zero_param(param)])
        super()._convert_to_zero_parameters(ds_config, module, mpu)
        # zero.Init may have been called without a configuration, and know nothing of MiCS.
        strangers = [param for param in module.parameters() if _groups_of(param) is None]
        _repartition(make_partitioner, strangers)
        if strangers:
            log_rank0(
                f"re-partitioned {len(strangers)} parameters that deepspeed.zero.Init had spread over all ranks. Give "
                f"it the configuration (config_dict_or_path=...) with a number as size, and they start out right."
            )
        params: list[ZeroParam] = list(module.parameters())
        self.mics_groups = self.mics_build.groups(params[0].mics_groups.full.group)
        refuse_other_groups(module, self.mics_groups)
        for param in params:  # those of zero.Init were gathered by rule so far: the ways of the engine are measured
            param.mics_groups = self.mics_groups

    @override
    def destroy(self) -> None:
        super().destroy()
        self.mics_groups.gather_executor.close()


def _repartition(make_partitioner: Callable[[], MicsPartitioner], params: list[ZeroParam]) -> None:
    """Take parameters that another ``zero.Init`` has partitioned, and partition them anew, one by one. Collective."""
    if params:
        partitioner = make_partitioner()
        for param in params:
            param.all_gather()
            partitioner._zero_init_param(param)


def refuse_other_groups(module: torch.nn.Module, groups: MicsGroups) -> None:
    """Refuse parameters that were partitioned over other ranks than an engine's.

    Raises:
        MicsConfigError: some were.
    """
    named: dict[str, ZeroParam] = dict(module.named_parameters())
    own = groups.full.ranks, groups.partition.ranks
    strange = [
        name
        for name, param in named.items()
        if (param.mics_groups.full.ranks, param.mics_groups.partition.ranks) != own
    ]
    if strange:
        raise MicsConfigError(
            f"Parameters must be partitioned over the group the optimizer uses, ranks {list(groups.partition.ranks)} "
            f"of {abbreviate(groups.full.ranks)}, but zero.Init used another for {strange[:3]}"
            f"{' and others' if len(strange) > 3 else ''}. Give zero.Init the configuration and the data-parallel "
            f"group that deepspeed.initialize gets."
        )
