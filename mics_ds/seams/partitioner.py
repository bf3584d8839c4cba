"""DeepSpeed's partitioner and parameter manager, with their private methods as named hooks."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import partition_parameters as pp
from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator_module
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partitioned_param_coordinator import iter_params
from deepspeed.utils import z3_leaf_module

from . import support
from .patch import for_a_while

ZeroParam = Any
"""A ``torch.nn.Parameter`` with the attributes that DeepSpeed adds to it."""

is_zero_param = pp.is_zero_param
GatheredParameters = pp.GatheredParameters


class PartitionerSeam(pp.Init):
    """``deepspeed.zero.Init`` with hooks around the birth and the gathering of a parameter."""

    def before_first_partition(self, param: ZeroParam) -> None:
        """``param`` still holds its full data, as this rank initialised it."""

    def after_conversion(self, param: ZeroParam) -> None:
        """``param`` has just become a ZeRO-3 parameter, not yet partitioned."""

    def is_replicated(self) -> bool:
        """Return whether ranks of other partition groups hold the same shards."""
        return False

    def start_gather(self, shard: torch.Tensor) -> Any | None:
        """Gather ``shard`` from all ranks of the partition group, or return ``None`` to let DeepSpeed do it.

        Returns a handle whose ``wait()`` returns what :class:`mics_ds.comm.packing.GatheredShards` is: ``pieces``, the
        tensors it was gathered into, and ``copy_out(full, start, width)``, which fills a full parameter from the
        elements [start, start + width) of all shards.
        """
        return None

    def before_gather(self, params: list[ZeroParam]) -> None:
        """Shards of these parameters are about to be read, on the current stream."""

    def shard_was_written(self, param: ZeroParam) -> None:
        """The full parameter was changed, and its shard after it."""

    def broadcast_after_apply(self, params: list[ZeroParam]) -> None:
        """A function given to ``Module.apply`` has changed these gathered parameters; make all ranks equal."""
        raise NotImplementedError

    def _zero_init_param(self, param: ZeroParam) -> None:
        support.refuse_unpartitionable([("", param)])
        self.before_first_partition(param)
        super()._zero_init_param(param)

    def _ensure_availability_of_partitioned_params(self, params: list[ZeroParam]) -> None:
        super()._ensure_availability_of_partitioned_params(params)
        self.before_gather(params)

    def _partition_param(
        self, param: ZeroParam, buffer: Any = None, has_been_updated: bool = False, free_data: bool = True
    ) -> None:
        written = has_been_updated and param.ds_tensor is not None
        super()._partition_param(param, buffer, has_been_updated, free_data)
        if written:
            self.shard_was_written(param)

    # The coordinator gathers for a module's forward or backward, through all_gather_coalesced. Every other gather comes
    # through one of the next two: a context, a function that is applied, parameters that stay gathered, a script.
    # Users may write into what they get and keep it, so it is never the memory of the shard. (With one rank in all,
    # stock shares that memory, and so does this.)

    def _allgather_params_sequential(self, param_list: list, *args: Any, **kwargs: Any) -> None:
        if self.is_replicated() and self._are_whole(param_list):
            copy_whole(param_list)
        else:
            super()._allgather_params_sequential(param_list, *args, **kwargs)

    def _allgather_params_coalesced(self, param_list: list, *args: Any, **kwargs: Any) -> None:
        if self.is_replicated() and self._are_whole(param_list):
            copy_whole(param_list)
            return
        if not support.gathers_race():
            super()._allgather_params_coalesced(param_list, *args, **kwargs)
            return
        for param in param_list:  # one at a time, so that the last is waited for
            super()._allgather_params_coalesced([param], *args, **kwargs)

    def _convert_to_deepspeed_param(self, param: ZeroParam) -> None:
        if hasattr(param, "ds_zero_partition_process_group"):
            # Under AutoTP the engine has noted its data-parallel group, which would come before ours.
            param.ds_zero_partition_process_group = self.ds_process_group
        super()._convert_to_deepspeed_param(param)
        stock = param.all_gather_coalesced

        @functools.wraps(stock)
        def all_gather_coalesced(params: Iterable, safe_mode: bool = False, quantize: bool = False) -> Any:
            params = list(params)
            handle = None if quantize or safe_mode or not params else self._gather_by_hook(params)
            return stock(params, safe_mode=safe_mode, quantize=quantize) if handle is None else handle

        param.all_gather_coalesced = all_gather_coalesced
        self.after_conversion(param)

    def _are_whole(self, params: list[ZeroParam]) -> bool:
        """Whether the shards at hand, on their device, are the whole parameters."""
        return self.ds_process_group.size() == 1 and all(
            param.ds_tensor.device == param.device and param.ds_tensor.final_location != OffloadDeviceEnum.nvme
            for param in params
        )

    def _gather_by_hook(self, params: list[ZeroParam]) -> Any | None:
        """All parameters of one fetch in one buffer per dtype, through :meth:`start_gather`."""
        if self.allgather_sequential or self.use_all_reduce_for_fetch_params:
            return None  # whoever asks for a way of gathering gets DeepSpeed's
        if any(self.get_partition_dp_group(param) is not self.ds_process_group for param in params):
            return None
        if self._are_whole(params):
            self.before_gather(params)
            return _WholeHandle(params, shares=not self.is_replicated())
        self._ensure_availability_of_partitioned_params(params)
        by_dtype: dict[torch.dtype, list[ZeroParam]] = {}
        for param in sorted(params, key=lambda item: item.ds_id):  # one order on all ranks
            if param.ds_status != pp.ZeroParamStatus.NOT_AVAILABLE:
                raise RuntimeError(f"expected a parameter that is not gathered yet, got {param.ds_summary()}")
            by_dtype.setdefault(pp.get_allgather_dtype(param, param.ds_tensor), []).append(param)
        device = get_accelerator().current_device_name()
        handles: list[_SeamGatherHandle] = []
        for dtype, members in by_dtype.items():
            # cat also copies a single shard: gathering straight from it would let the optimizer
            # overwrite what is still being sent
            shard = torch.cat([param.ds_tensor.to(device).to(dtype).view(-1) for param in members])
            started = self.start_gather(shard)
            if started is None:
                assert not handles, "start_gather must answer alike for all dtypes"
                return None
            for param in members:
                param.ds_status = pp.ZeroParamStatus.INFLIGHT
            handles.append(_SeamGatherHandle(started, members))
        return pp.MultipleAllGatherHandles(handles)

    def patch_init_and_builtins(self) -> None:
        """DeepSpeed wraps ``Module.apply`` to broadcast from global rank 0 *in the partition group*, which
        raises wherever rank 0 is not a member. Put a wrapper in its place that asks the hook instead."""
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
                    (param for param in module.parameters(recurse=False) if is_zero_param(param)),
                    key=operator.attrgetter("ds_id"),
                )
                for param in params:
                    param.all_gather()
                fn(module)
                self.broadcast_after_apply(params)
                for param in params:
                    param.partition(has_been_updated=True)

            # apply() recurses through itself; gather once per module.
            wrapped.wrapped = True  # type: ignore[attr-defined]
            return wrapped

        torch.nn.Module.apply = apply  # type: ignore[method-assign,assignment]


def copy_whole(params: Iterable[ZeroParam]) -> None:
    """Give parameters whose shard is whole a full value in memory of its own."""
    for param in params:
        param.data = param.ds_tensor.data.clone().view(param.ds_shape)


def unshare(param: ZeroParam) -> None:
    """Give a gathered parameter memory of its own, if it is in that of its shard."""
    if param.ds_tensor is not None and param.data.data_ptr() == param.ds_tensor.data_ptr():
        param.data = param.data.clone()


class _WholeHandle:
    """What DeepSpeed waits on where a module needs parameters whose shards are whole.

    Nothing moves, so there is nothing to wait for. DeepSpeed's own handle lets the host wait for the device each time.
    """

    def __init__(self, params: list[ZeroParam], shares: bool) -> None:
        self._params = params
        self._shares = shares
        """Whether parameters that stay gathered share the memory of their shards too."""
        for param in params:
            param.ds_status = pp.ZeroParamStatus.INFLIGHT

    def wait(self, handle_dependency: bool = True) -> None:
        for param in self._params:
            if param.ds_persist and not self._shares:  # users see it between steps
                copy_whole([param])
            else:
                param.data = param.ds_tensor.data.view(param.ds_shape)
            param.ds_status = pp.ZeroParamStatus.AVAILABLE
        self._params = []


class _SeamGatherHandle:
    """What DeepSpeed waits on for a gather that :meth:`PartitionerSeam.start_gather` started."""

    def __init__(self, started: Any, params: list[ZeroParam]) -> None:
        self._started = started
        self._params = params
        self._complete = False

    def wait(self, handle_dependency: bool = True) -> None:
        """Give every parameter its full data. ``handle_dependency`` is ignored: it is always handled."""
        if self._complete:
            return
        gathered, offset = self._started.wait(), 0
        for param in self._params:
            width = param.ds_tensor.ds_numel
            full = gathered.pieces[0].new_empty(param.ds_numel, dtype=param.ds_tensor.dtype)
            gathered.copy_out(full, offset, width)
            param.data = full.view(param.ds_shape)
            param.ds_status = pp.ZeroParamStatus.AVAILABLE
            offset += width
        if not get_accelerator().is_synchronized_device():
            for piece in gathered.pieces:
                piece.record_stream(get_accelerator().current_stream())
        self._complete = True


def gathers_for(module: torch.nn.Module, forward: bool) -> int:
    """Return how many parameters DeepSpeed gathers for a module.

    0 for leaf modules in backward, where threads of autograd compete for the gather.
    """
    is_leaf = z3_leaf_module(module)
    if is_leaf and not forward:
        return 0
    params: Iterable[Any] = iter_params(module, recurse=is_leaf)
    return sum(param.ds_status == pp.ZeroParamStatus.NOT_AVAILABLE for param in params)


def number_of(module: torch.nn.Module) -> int:
    """Return DeepSpeed's number of a module among those of its engine, the same on all ranks."""
    number: Any = module.ds_id
    return int(number)


def repartition(partitioner: PartitionerSeam, param: ZeroParam) -> None:
    """Take a parameter that another ``zero.Init`` partitioned, and partition it anew. Collective.

    Needs the memory of this one full parameter.
    """
    param.all_gather()
    partitioner._zero_init_param(param)


class ParamManagerSeam(DeepSpeedZeRoOffload):
    """DeepSpeed's parameter manager with a hook after it has made all parameters ZeRO-3 parameters."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        coordinator = self.get_param_coordinator()
        # As stock's: hooks that call these may be compiled.
        for name, ours in (
            ("reset_step", self._reset_step),
            ("trace_prologue", self._trace_prologue),
            ("fetch_sub_module", self._fetch_sub_module),
        ):
            wrapped = functools.partial(ours, getattr(coordinator, name))
            setattr(coordinator, name, torch.compiler.disable(wrapped))

    def require_same_modules(self, order: list[int]) -> bool:
        """DeepSpeed has recorded which modules run in which order, and has all ranks of the world compare that.

        Args:
            order: of modules or parameters, as numbers.

        Returns:
            Whether the comparison has been made here. If not, DeepSpeed makes its own.
        """
        return False

    def before_unforeseen_fetch(self, module: torch.nn.Module, forward: bool) -> None:
        """DeepSpeed is about to gather a module's parameters, without a complete record of the order to rely on."""

    def leaves_recorded_order(self, module: torch.nn.Module) -> None:
        """This rank has run the recorded modules so far, and now runs another one."""

    def _reset_step(self, stock: Callable[[], None]) -> None:
        stock_comparison = coordinator_module.assert_ints_same_as_other_ranks

        def compare(ints: list[int]) -> None:
            if not self.require_same_modules(ints):
                stock_comparison(ints)

        with for_a_while(coordinator_module, "assert_ints_same_as_other_ranks", compare):
            stock()

    def _trace_prologue(self, stock: Callable[[torch.nn.Module], None], module: torch.nn.Module) -> None:
        coordinator = self.get_param_coordinator()
        was_complete = coordinator.is_complete_trace()
        stock(module)
        if was_complete and not coordinator.is_complete_trace():
            self.leaves_recorded_order(module)

    def _fetch_sub_module(self, stock: Callable[..., None], module: torch.nn.Module, forward: bool) -> None:
        if not self.get_param_coordinator().is_complete_trace():
            self.before_unforeseen_fetch(module, forward)
        stock(module, forward)

    def after_all_converted(self, make_partitioner: Callable[[], PartitionerSeam], module: torch.nn.Module) -> None:
        """Every parameter of ``module`` is partitioned, by whichever ``zero.Init`` came first."""

    def before_autotp_shards_convert(
        self, make_partitioner: Callable[[], PartitionerSeam], module: torch.nn.Module
    ) -> None:
        """AutoTP has cut layers of ``module``, and its shards of them are about to become ZeRO-3 parameters. If others
        are already, their partitioner will take up the shards, as stock's can: it goes by a group that the engine has
        noted in each."""

    def _convert_to_zero_parameters(self, ds_config: Any, module: torch.nn.Module, mpu: Any) -> None:
        def make_partitioner() -> PartitionerSeam:
            return pp.Init(
                data_parallel_group=mpu.get_data_parallel_group() if hasattr(mpu, "get_data_parallel_group") else None,
                dtype=self.dtype,
                config_dict_or_path=ds_config,
                remote_device=self.offload_device,
                pin_memory=self.offload_param_pin_memory,
                mpu=mpu,
            )

        if getattr(module, "ds_autotp_parsed", False):
            self.before_autotp_shards_convert(make_partitioner, module)
        super()._convert_to_zero_parameters(ds_config, module, mpu)
        self.after_all_converted(make_partitioner, module)


def make_stock_gathers_wait() -> None:
    """An oracle must not race: where stock gathers do (:func:`mics_ds.seams.support.gathers_race`), have them wait."""
    if not support.gathers_race():
        return
    gather = pp.Init._allgather_params_coalesced

    def one_by_one(self: Any, params: list, *args: Any, **kwargs: Any) -> None:
        for param in params:
            gather(self, [param], *args, **kwargs)

    pp.Init._allgather_params_coalesced = one_by_one
