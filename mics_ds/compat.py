"""The one module that touches DeepSpeed's private parts.

Everything mics_ds relies on beyond DeepSpeed's documented interface is here, in three sections:

1. *Probes*: is this a DeepSpeed we know, and has it what we need?
2. *Seams*: thin subclasses of DeepSpeed's classes that turn private methods into named hooks. They
   contain no MiCS. :mod:`mics_ds.partitioner` and :mod:`mics_ds.optimizer` subclass them and
   override only the hooks.
3. *Patches*: how :mod:`mics_ds.activation` gets DeepSpeed to build our subclasses.

No method of a base class is copied; each override calls ``super()``.
"""

from __future__ import annotations

import base64
import binascii
import functools
import glob
import inspect
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import deepspeed
import hjson
import psutil
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import engine as engine_module
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import partition_parameters as pp
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from . import placement
from .config import KEY_PREFIX, MicsConfig, split_ds_config
from .errors import MicsCheckpointError, MicsCompatError, MicsConfigError

if TYPE_CHECKING:
    from .planner.auto import Facts

# --------------------------------------------------------------------------------------------------
# 1. Probes

TESTED_VERSIONS = ("0.19.8", "0.19.7", "0.19.6", "0.18.9")
ALLOW_UNTESTED_ENV = "MICS_DS_ALLOW_UNTESTED"


def missing_seams() -> list[str]:
    """What mics_ds needs of DeepSpeed and does not find in the installed one."""
    needed: dict[type, tuple[str, ...]] = {
        pp.Init: (
            "_zero_init_param",
            "_convert_to_deepspeed_param",
            "_ensure_availability_of_partitioned_params",
            "patch_init_and_builtins",
            "get_partition_dp_group",
        ),
        DeepSpeedZeRoOffload: ("_convert_to_zero_parameters",),
        DeepSpeedZeroOptimizer_Stage3: (
            "independent_gradient_partition_epilogue",
            "partition_grads",
            "_get_norm_groups",
            "has_overflow",
            "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads",
        ),
        DeepSpeedEngine: (
            "_get_ckpt_name",
            "_get_all_ckpt_names",
            "_get_rank_zero_ckpt_name",
            "_get_zero_param_shapes",
            "_copy_recovery_script",
        ),
    }
    return [f"{cls.__name__}.{name}" for cls, names in needed.items() for name in names if not hasattr(cls, name)]


def check_deepspeed() -> None:
    """Refuse a DeepSpeed that would misbehave under us. Called only when MiCS is asked for.

    Raises:
        MicsCompatError: a needed seam is missing, or the version is not among those tested and
            ``MICS_DS_ALLOW_UNTESTED=1`` is not set.
    """
    missing = missing_seams()
    if missing:
        raise MicsCompatError(
            f"mics_ds needs parts of DeepSpeed that {deepspeed.__version__} does not have: {', '.join(missing)}. "
            f"Install deepspeed=={TESTED_VERSIONS[0]}, or remove the mics_ keys to run stock ZeRO-3."
        )
    release = deepspeed.__version__.split("+")[0]
    if release not in TESTED_VERSIONS and os.environ.get(ALLOW_UNTESTED_ENV) != "1":
        raise MicsCompatError(
            f"mics_ds was tested with DeepSpeed {', '.join(TESTED_VERSIONS)}, but this is {deepspeed.__version__}. "
            f"Install a tested version, or set {ALLOW_UNTESTED_ENV}=1 on all ranks and compare your losses with stock "
            f"ZeRO-3 (MICS_DS_DISABLE=1) before you trust them."
        )


def refuse_unsupported(ds_config: DeepSpeedConfig) -> None:
    """Name what the parsed configuration asks for that does not work under MiCS.

    Raises:
        MicsConfigError: with every such feature and what to do about it.
    """
    zero = ds_config.zero_config
    offload_optimizer, offload_param = zero.offload_optimizer, zero.offload_param
    autotp = getattr(getattr(ds_config, "tensor_parallel_config", None), "autotp_size", 0) or 0
    sequence_parallel = ds_config._param_dict.get("sequence_parallel_size", 1)
    in_group = "MiCS already keeps parameter gathers inside the partition group; remove it"
    refused: list[tuple[bool, str, str]] = [
        (zero.zero_hpz_partition_size > 1, "zero_hpz_partition_size (ZeRO++ hpZ)", in_group),
        (zero.zero_quantized_gradients, "zero_quantized_gradients (ZeRO++ qgZ)", "set it to false"),
        (zero.zero_quantized_weights, "zero_quantized_weights (ZeRO++ qwZ)", "set it to false"),
        (
            zero.zero_quantized_nontrainable_weights,
            "zero_quantized_nontrainable_weights",
            "set it to false",
        ),
        (getattr(zero, "zenflow", None) is not None, "zenflow", "remove the zenflow section"),
        (
            bool(getattr(offload_optimizer, "super_offload", False)),
            "offload_optimizer.super_offload (SuperOffload)",
            "set it to false",
        ),
        (_device(offload_optimizer) == "nvme", "offload_optimizer to NVMe", "offload to cpu"),
        (_device(offload_param) == "nvme", "offload_param to NVMe", "offload to cpu"),
        (
            bool(getattr(getattr(ds_config, "compile_config", None), "deepcompile", False)),
            "compile.deepcompile (DeepCompile)",
            "set it to false; torch.compile of your model is not affected",
        ),
        (str(ds_config.optimizer_name).lower() == "muon", "the Muon optimizer", "use Adam, AdamW or SGD"),
        (ds_config.gradient_predivide_factor != 1.0, "gradient_predivide_factor", "leave it at 1.0"),
        (bool(ds_config.prescale_gradients), "prescale_gradients", "set it to false"),
        (
            zero.pipeline_loading_checkpoint,
            "pipeline_loading_checkpoint",
            "set it to false: it passes the baton by partition rank, which replicas share",
        ),
        (
            zero.elastic_checkpoint,
            "elastic_checkpoint",
            "set it to false; mics_reshape_checkpoint resumes in any number of shards",
        ),
        (autotp > 1, "tensor_parallel.autotp_size (AutoTP)", "remove the tensor_parallel section"),
        (
            bool(getattr(getattr(ds_config, "expert_parallel_config", None), "enabled", False)),
            "expert_parallel (AutoEP)",
            "it sets partition groups of its own; remove the section",
        ),
        (isinstance(sequence_parallel, int) and sequence_parallel > 1, "sequence_parallel_size", "leave it at 1"),
        (ds_config.hybrid_engine.enabled, "hybrid_engine", "set enabled to false"),
        (
            bool(ds_config.checkpoint_config.get("writer")),
            "checkpoint.writer",
            "remove it: MiCS checkpoints are published when they are complete, and files are written by torch.save",
        ),
        (
            bool(getattr(getattr(ds_config, "datastates_config", None), "enabled", False)),
            "datastates checkpoints",
            "set enabled to false",
        ),
        (
            bool(getattr(getattr(ds_config, "nebula_config", None), "enabled", False)),
            "nebula checkpoints",
            "set enabled to false",
        ),
    ]
    found = [f"{name}: {remedy}" for is_set, name, remedy in refused if is_set]
    if found:
        raise MicsConfigError(
            "MiCS (zero_optimization.mics_shard_size) does not support the following yet. "
            + "; ".join(found)
            + ". Or remove the mics_ keys to run stock ZeRO-3 with it."
        )


def plan_facts(engine_arguments: Mapping[str, Any]) -> Facts:
    """What the planner asks of an engine that is about to be built, read off its arguments and this rank's devices.

    Args:
        engine_arguments: the keywords of ``DeepSpeedEngine``.
    """
    # Not at the top: processes without a mics_ key have no use for the planner.
    from .planner.auto import Facts
    from .planner.job import OPTIMIZERS, ZeroSettings, optimizer_kind

    parsed, zero = engine_arguments["config_class"], engine_arguments["config_class"].zero_config
    mpu = engine_arguments.get("mpu")
    group = mpu.get_data_parallel_group() if mpu is not None else torch.distributed.group.WORLD
    precision = "bf16" if parsed.bfloat16_config.enabled else "fp16" if parsed.float16_config.enabled else "fp32"
    settings = ZeroSettings(
        prefetch_bucket_size=int(zero.prefetch_bucket_size),
        max_live_parameters=int(zero.max_live_parameters),
        max_reuse_distance=int(zero.max_reuse_distance),
        param_persistence_threshold=int(zero.param_persistence_threshold),
        reduce_bucket_size=int(zero.reduce_bucket_size),
        sub_group_size=int(zero.sub_group_size),
        overlap_comm=bool(zero.overlap_comm),
        contiguous_gradients=bool(zero.contiguous_gradients),
        offload_optimizer=_device(zero.offload_optimizer) != "none",
        offload_param=_device(zero.offload_param) != "none",
    )
    optimizer = engine_arguments.get("optimizer")
    params = parsed.optimizer_params or {}
    if optimizer is None:
        kind = optimizer_kind(str(parsed.optimizer_name or ""), bool(params.get("torch_adam")))
    else:
        kind = type(optimizer).__name__.lower()
    if kind == "sgd" and any(group.get("momentum") for group in getattr(optimizer, "param_groups", [params])):
        kind = "sgd_momentum"
    module = engine_arguments["model"]
    memory, total, device = _memory_at_hand(module)
    accumulation = {"fp32": 4, "fp16": 2, "bf16": 2}.get(str(getattr(parsed, "grad_accum_dtype", None)), 0)
    return Facts(
        ranks=tuple(torch.distributed.get_process_group_ranks(group)),
        place=placement.claim(torch.distributed.get_rank()),
        memory=float(memory),
        host_memory=float(psutil.virtual_memory().available),
        device=device,
        device_gib=total / 2**30,
        job={
            "micro_batch": int(parsed.train_micro_batch_size_per_gpu),
            "micro_steps": int(parsed.gradient_accumulation_steps),
            "precision": precision,
            "optimizer": kind if kind in OPTIMIZERS else "fusedadam",
            "zero": settings,
            "accumulation_itemsize": accumulation,
        },
        trains=optimizer is not None or parsed.optimizer_name is not None,
    )


def _memory_at_hand(module: torch.nn.Module) -> tuple[float, float, str]:
    """Bytes this rank can use for ``module`` and its states, bytes its device has, and the device's name.

    On a CPU, the first is shared with the other ranks of the node.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        available = float(psutil.virtual_memory().available)
        return available, available, "cpu"
    # DeepSpeed sets the device later, when the engine is built.
    index = int(os.environ.get("LOCAL_RANK", accelerator.current_device()))
    # What this process's allocator has but does not use can be used, and so can what the module takes up now: it
    # is part of the plan.
    unused = accelerator.memory_reserved(index) - accelerator.memory_allocated(index)
    own = sum(
        held.nbytes
        for param in module.parameters()
        for held in (param.data, getattr(param, "ds_tensor", None))
        if held is not None and held.device.type == accelerator.device_name()
    )
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info(index)
        return free + unused + own, total, torch.cuda.get_device_name(index)
    total = accelerator.total_memory(index)
    return accelerator.available_memory(index) + unused + own, total, accelerator.device_name()


def _device(offload: Any) -> str:
    device = getattr(offload, "device", "none")  # an enum member or its value
    return str(getattr(device, "value", device))


def load_ds_config(source: Any) -> Mapping[str, Any] | None:
    """Read a DeepSpeed configuration in any of the forms DeepSpeed takes, if it may concern MiCS.

    Args:
        source: a dictionary, the path of a JSON or HJSON file, or base64 of such a text.

    Returns:
        The parsed configuration, or ``None`` if it has no ``mics_`` key or cannot be read: then
        DeepSpeed gets it as it is and makes its own complaint.
    """
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, (str, os.PathLike)):
        return None
    if os.path.exists(source):
        with open(source) as file:
            text = file.read()
    else:
        try:
            text = base64.urlsafe_b64decode(os.fspath(source)).decode("utf-8")
        except (binascii.Error, UnicodeDecodeError, ValueError):
            return None
    if KEY_PREFIX not in text:
        return None
    return hjson.loads(text, object_pairs_hook=dict_raise_error_on_duplicate_keys)


def mics_config_of(source: Any) -> MicsConfig:
    """The MiCS configuration inside a DeepSpeed configuration that is known to have one."""
    param_dict = load_ds_config(source)
    mics = split_ds_config(param_dict)[0] if param_dict is not None else None
    assert mics is not None, "only called for configurations that ask for MiCS"
    return mics


def config_argument(arguments: Mapping[str, Any]) -> Any:
    """The DeepSpeed configuration among the bound arguments of a constructor, or ``None``."""
    for name in ("ds_config", "config_dict_or_path", "config"):
        if arguments.get(name) is not None:
            return arguments[name]
    return None


def partitioner_config(*args: Any, **kwargs: Any) -> Any:
    """The DeepSpeed configuration among the arguments of ``zero.Init``."""
    return config_argument(_INIT_SIGNATURE.bind_partial(None, *args, **kwargs).arguments)


_INIT_SIGNATURE = inspect.signature(pp.Init.__init__)

# What older versions lack.
_BOUNDARY_IS_A_METHOD = hasattr(DeepSpeedZeroOptimizer_Stage3, "is_gradient_accumulation_boundary")  # 0.19
_FINALIZES_OFFLOAD = hasattr(DeepSpeedZeroOptimizer_Stage3, "_finalize_offload_gradient_accumulation")  # 0.19
# Up to 0.19.7 a gather of several parameters waits for the last one only, and under gloo the others may
# still be on their way. Nothing but the source tells.
GATHERS_RACE = "launch_handles[-1].wait()" in inspect.getsource(pp.Init._allgather_params_coalesced)

# --------------------------------------------------------------------------------------------------
# 2. Seams

is_zero_param = pp.is_zero_param
GatheredParameters = pp.GatheredParameters


class PartitionerSeam(pp.Init):
    """``deepspeed.zero.Init`` with hooks around the birth and the gathering of a parameter."""

    def before_first_partition(self, param: torch.nn.Parameter) -> None:
        """``param`` still holds its full data, as this rank initialised it."""

    def after_conversion(self, param: torch.nn.Parameter) -> None:
        """``param`` has just become a ZeRO-3 parameter, not yet partitioned."""

    def start_gather(self, shard: torch.Tensor) -> Any | None:
        """Gather ``shard`` from all ranks of the partition group, or return ``None`` to let DeepSpeed do it.

        Returns a handle whose ``wait()`` returns an object with ``views(rank, start, length)``: 1-D
        views that together are the elements [start, start + length) of the shard of a partition rank.
        """
        return None

    def broadcast_after_apply(self, params: list[torch.nn.Parameter]) -> None:
        """A function given to ``Module.apply`` has changed these gathered parameters; make all ranks equal."""
        raise NotImplementedError

    def _zero_init_param(self, param: torch.nn.Parameter) -> None:
        self.before_first_partition(param)
        super()._zero_init_param(param)

    def _allgather_params_coalesced(self, param_list: list, *args: Any, **kwargs: Any) -> None:
        if not GATHERS_RACE:
            super()._allgather_params_coalesced(param_list, *args, **kwargs)
            return
        for param in param_list:  # then the last one is the only one
            super()._allgather_params_coalesced([param], *args, **kwargs)

    def _convert_to_deepspeed_param(self, param: torch.nn.Parameter) -> None:
        super()._convert_to_deepspeed_param(param)
        stock = param.all_gather_coalesced

        @functools.wraps(stock)
        def all_gather_coalesced(params: Iterable, safe_mode: bool = False, quantize: bool = False) -> Any:
            params = list(params)
            handle = None if quantize or safe_mode or not params else self._gather_by_hook(params)
            return stock(params, safe_mode=safe_mode, quantize=quantize) if handle is None else handle

        param.all_gather_coalesced = all_gather_coalesced
        self.after_conversion(param)

    def _gather_by_hook(self, params: list[torch.nn.Parameter]) -> Any | None:
        """All parameters of one fetch in one buffer per dtype, through :meth:`start_gather`."""
        if any(self.get_partition_dp_group(param) is not self.ds_process_group for param in params):
            return None
        self._ensure_availability_of_partitioned_params(params)
        by_dtype: dict[torch.dtype, list[torch.nn.Parameter]] = {}
        for param in sorted(params, key=lambda item: item.ds_id):  # one order on all ranks
            if param.ds_status != pp.ZeroParamStatus.NOT_AVAILABLE:
                raise RuntimeError(f"expected a parameter that is not gathered yet, got {param.ds_summary()}")
            by_dtype.setdefault(pp.get_allgather_dtype(param, param.ds_tensor), []).append(param)
        device = get_accelerator().current_device_name()
        handles = []
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
            handles.append(_SeamGatherHandle(started, members, self.get_partition_dp_group(members[0]).size()))
        return pp.MultipleAllGatherHandles(handles)

    def patch_init_and_builtins(self) -> None:
        """DeepSpeed wraps ``Module.apply`` to broadcast from global rank 0 *in the partition group*, which
        raises wherever rank 0 is not a member. Put a wrapper in its place that asks the hook instead."""
        super().patch_init_and_builtins()
        if not pp.Init.override_module_apply:
            return
        original = torch.nn.Module._old_apply  # put there by super(), and restored by it from there

        @functools.wraps(original)
        def apply(module: torch.nn.Module, fn: Callable[[torch.nn.Module], None]) -> torch.nn.Module:
            return original(module, fn if hasattr(fn, "wrapped") else gathering(fn))

        def gathering(fn: Callable[[torch.nn.Module], None]) -> Callable[[torch.nn.Module], None]:
            @functools.wraps(fn)
            def wrapped(module: torch.nn.Module) -> None:
                params = sorted(
                    (param for param in module.parameters(recurse=False) if is_zero_param(param)),
                    key=lambda param: param.ds_id,
                )
                for param in params:
                    param.all_gather()
                fn(module)
                self.broadcast_after_apply(params)
                for param in params:
                    param.partition(has_been_updated=True)

            wrapped.wrapped = True  # apply() recurses through itself; gather once per module
            return wrapped

        torch.nn.Module.apply = apply


class _SeamGatherHandle:
    """What DeepSpeed waits on for a gather that :meth:`PartitionerSeam.start_gather` started."""

    def __init__(self, started: Any, params: list[torch.nn.Parameter], partition_size: int) -> None:
        self._started = started
        self._params = params
        self._partition_size = partition_size
        self._complete = False

    def wait(self, handle_dependency: bool = True) -> None:
        """Give every parameter its full data. ``handle_dependency`` is ignored: it is always handled."""
        if self._complete:
            return
        gathered, offset = self._started.wait(), 0
        for param in self._params:
            width = param.ds_tensor.ds_numel
            views = [
                view
                for rank in range(self._partition_size)
                for view in gathered.views(rank, offset, min(width, param.ds_numel - rank * width))
            ]
            # the shards of one parameter lie apart in the buffer of a coalesced gather; DeepSpeed's own
            # handle joins them by this one copy too
            param.data = torch.cat(views).view(param.ds_shape).to(param.ds_tensor.dtype)
            param.ds_status = pp.ZeroParamStatus.AVAILABLE
            offset += width
            if not get_accelerator().is_synchronized_device():
                for view in views:
                    view.record_stream(get_accelerator().current_stream())
        self._complete = True


def repartition(partitioner: PartitionerSeam, param: torch.nn.Parameter) -> None:
    """Take a parameter that another ``zero.Init`` partitioned, and partition it anew. Collective.

    Needs the memory of this one full parameter.
    """
    param.all_gather()
    partitioner._zero_init_param(param)


class ParamManagerSeam(DeepSpeedZeRoOffload):
    """DeepSpeed's parameter manager with a hook after it has made all parameters ZeRO-3 parameters."""

    def after_all_converted(self, make_partitioner: Callable[[], PartitionerSeam], module: torch.nn.Module) -> None:
        """Every parameter of ``module`` is partitioned, by whichever ``zero.Init`` came first."""

    def _convert_to_zero_parameters(self, ds_config: Any, module: torch.nn.Module, mpu: Any) -> None:
        super()._convert_to_zero_parameters(ds_config, module, mpu)

        def make_partitioner() -> PartitionerSeam:
            return pp.Init(
                data_parallel_group=mpu.get_data_parallel_group() if hasattr(mpu, "get_data_parallel_group") else None,
                dtype=self.dtype,
                config_dict_or_path=ds_config,
                remote_device=self.offload_device,
                pin_memory=self.offload_param_pin_memory,
                mpu=mpu,
            )

        self.after_all_converted(make_partitioner, module)


class _FullGradients(list):
    """Gradients that are to be reduced yet, passed where DeepSpeed passes reduced ones."""


class _WithoutGrad:
    """A parameter, but for its gradient. Storing a reduced gradient ends with ``param.grad = None``; done late,
    on another thread, that could take away the *next* gradient of a parameter that is used twice."""

    def __init__(self, param: torch.nn.Parameter) -> None:
        self._param = param
        self.grad = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._param, name)


class OptimizerSeam(DeepSpeedZeroOptimizer_Stage3):
    """The stage 3 optimizer with hooks where gradients rest between hop 1 and the optimizer step."""

    _partitioning_grads = False

    def defers_reduction(self) -> bool:
        """Whether gradient shards are still partial after DeepSpeed has reduced them."""
        return False

    def takes_over_hop1(self) -> bool:
        """Whether :meth:`reduce_bucket` reduces gradients instead of DeepSpeed. Only for ``reduce_scatter: true``."""
        return False

    def reduce_bucket(
        self,
        ids: list[int],
        gradients: list[torch.Tensor],
        store: Callable[[list[torch.Tensor]], None],
    ) -> None:
        """Take the mean of full gradients over the partition group, now or until :meth:`finish_hop1`.

        Args:
            ids: ``ds_id`` of the parameters of one bucket.
            gradients: one per parameter, in the communication dtype. Free to be overwritten by others
                once this returns.
            store: to be called with this rank's part of each reduced gradient, without padding. May be
                called on another thread, before :meth:`finish_hop1` returns.
        """
        raise NotImplementedError

    def finish_hop1(self) -> None:
        """Return once every bucket handed to :meth:`reduce_bucket` has been stored."""

    def shards_changed(self, ids: list[int]) -> None:
        """The gradient shards of these parameters were written or added to."""

    def complete_reduction_if_needed(self) -> None:
        """Make :attr:`gradient_shards` final. Called at the boundary and once more before the step."""

    def before_gradients_are_read(self, local: bool) -> None:
        """Somebody is about to look at gradient shards: all ranks to assemble whole gradients, or, if ``local``,
        this rank alone to see its own."""

    def agree_on_norms(self, norms: torch.Tensor) -> torch.Tensor:
        """1-D gradient norms, one per sub-group, -1 where invalid. Return what all replicas shall use."""
        return norms

    def agree_on_overflow(self, overflow: bool) -> bool:
        """Return what all replicas shall believe."""
        return overflow

    @property
    def gradient_shards(self) -> torch.Tensor:
        """1-D buffer with this rank's shard of every gradient; DeepSpeed reads views of it."""
        return self.grad_partitions_flat_buffer

    def gradient_ranges(self) -> dict[int, tuple[int, int]]:
        """Where in :attr:`gradient_shards` the shard of each parameter lies: ``ds_id`` to (start, end)."""
        ranges, start = {}, 0
        for param in (param for group in self.fp16_groups for param in group):
            ranges[param.ds_id] = (start, start + param.partition_numel())
            start += param.partition_numel()
        return ranges

    @contextmanager
    def reduction_stream(self) -> Iterator[None]:
        """Order work behind hop 1, and everything that follows behind that work."""
        with get_accelerator().stream(self.reduce_and_partition_stream):
            yield
        if not get_accelerator().resolves_data_dependency():
            self.reduce_and_partition_stream.synchronize()

    @property
    def communication_device(self) -> torch.device:
        return torch.device(get_accelerator().current_device_name())

    def finish_offloaded_gradients(self, ids: set[int]) -> None:
        """With optimizer offload: compute norms and fp32 copies of the now final shards of these parameters."""
        if not self.offload_optimizer:
            return
        if _FINALIZES_OFFLOAD:
            self._finalize_offload_gradient_accumulation()
            return
        # Older versions do that while they add a gradient at the boundary, so add nothing.
        params = [param for group in self.fp16_groups for param in group if param.ds_id in ids]
        shards = [self.gradient_shards.new_zeros(param.partition_numel()) for param in params]
        step, self.micro_step_id = self.micro_step_id, 1  # the first one would overwrite
        try:
            super().partition_grads([_WithoutGrad(param) for param in params], shards)
        finally:
            self.micro_step_id = step

    def at_boundary(self) -> bool:
        """Whether this backward pass ends the accumulation."""
        value = self.is_gradient_accumulation_boundary
        return value() if callable(value) else value

    if _BOUNDARY_IS_A_METHOD:

        def is_gradient_accumulation_boundary(self) -> bool:
            return not self._holds_back_boundary() and super().is_gradient_accumulation_boundary()

    def _holds_back_boundary(self) -> bool:
        # Under offload, partition_grads copies gradients into the optimizer's buffers as soon as it
        # sees the boundary. Partial gradients must not go there: see finish_offloaded_gradients.
        return self.offload_optimizer and self._partitioning_grads and self.defers_reduction()

    def _DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(  # noqa: N802 (a private name, as Python mangles it)
        self, params_to_reduce: list, communication_data_type: torch.dtype
    ) -> Any:
        if not self.takes_over_hop1():
            return super()._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(params_to_reduce, communication_data_type)
        return _FullGradients([param.grad.to(communication_data_type) for param in params_to_reduce])

    def partition_grads(self, params_to_release: list, grad_partitions: Any) -> Any:
        if not isinstance(grad_partitions, _FullGradients):
            return self._store(params_to_release, grad_partitions)
        # DeepSpeed hands the bucket over here and uses it for others as soon as we return.
        stand_ins = [_WithoutGrad(param) for param in params_to_release]

        def store(shards: list[torch.Tensor]) -> None:
            self._store(stand_ins, [shard.to(self.gradient_accumulation_dtype) for shard in shards])

        self.reduce_bucket([param.ds_id for param in params_to_release], grad_partitions, store)
        for param in params_to_release:
            if not get_accelerator().is_synchronized_device():
                param.grad.record_stream(get_accelerator().current_stream())
            param.grad = None
        return []

    def _store(self, params: list, shards: list[torch.Tensor]) -> Any:
        self._partitioning_grads = True
        boundary = None if _BOUNDARY_IS_A_METHOD else self.is_gradient_accumulation_boundary
        if boundary is not None and self._holds_back_boundary():
            self.is_gradient_accumulation_boundary = False
        try:
            result = super().partition_grads(params, shards)
        finally:
            self._partitioning_grads = False
            if boundary is not None:
                self.is_gradient_accumulation_boundary = boundary
        self.shards_changed([param.ds_id for param in params])
        return result

    def get_fp32_grad_for_param(self, param: torch.nn.Parameter) -> Any:
        self.before_gradients_are_read(local=False)
        return super().get_fp32_grad_for_param(param)

    def update_fp32_grad_for_param_vectorized(self, update_func: Callable, param_list: list) -> Any:
        self.before_gradients_are_read(local=False)
        return super().update_fp32_grad_for_param_vectorized(update_func, param_list)

    def get_local_fp32_grad_for_param(self, param: torch.nn.Parameter) -> Any:
        self.before_gradients_are_read(local=True)
        return super().get_local_fp32_grad_for_param(param)

    def independent_gradient_partition_epilogue(self) -> None:
        super().independent_gradient_partition_epilogue()
        self.finish_hop1()
        if self.at_boundary():
            self.complete_reduction_if_needed()

    def finalize_gradient_accumulation_boundary(self) -> None:
        self.complete_reduction_if_needed()
        super().finalize_gradient_accumulation_boundary()

    def step(self, closure: Callable | None = None) -> None:
        self.complete_reduction_if_needed()
        super().step(closure)

    def has_overflow(self, partition_gradients: bool = True) -> bool:
        return self.agree_on_overflow(super().has_overflow(partition_gradients))

    def _get_norm_groups(self) -> list[torch.Tensor]:
        norms = [torch.as_tensor(norm) for norm in super()._get_norm_groups()]
        if not norms:
            return norms
        agreed = self.agree_on_norms(torch.stack([norm.to(self.communication_device) for norm in norms]))
        return [value.to(norm.device) for value, norm in zip(agreed, norms)]


class CheckpointFiles:
    """DeepSpeed's checkpoint engine, with a session that may stand between it and the files.

    Without a session, everything goes on to DeepSpeed's.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.session: Any = None
        """With ``write(path, write)``, ``make(make)`` and ``read(path)``."""

    @classmethod
    def of(cls, engine: DeepSpeedEngine) -> CheckpointFiles:
        if not isinstance(engine.checkpoint_engine, cls):
            engine.checkpoint_engine = cls(engine.checkpoint_engine)
        return engine.checkpoint_engine

    @contextmanager
    def through(self, session: Any) -> Iterator[None]:
        self.session = session
        try:
            yield
        finally:
            self.session = None

    def save(self, state_dict: Any, path: str) -> Any:
        if self.session is None:
            return self.inner.save(state_dict, path)
        return self.session.write(path, lambda: self.inner.save(state_dict, path))

    def makedirs(self, path: str, exist_ok: bool = False) -> Any:
        if self.session is None:
            return self.inner.makedirs(path, exist_ok=exist_ok)
        return self.session.make(lambda: self.inner.makedirs(path, exist_ok=exist_ok))

    def load(self, path: str, map_location: Any = None) -> Any:
        if self.session is None:
            return self.inner.load(path, map_location=map_location)
        return self.session.read(path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def model_states_name(engine: DeepSpeedEngine, shard: int) -> str:
    """File name of the model states of one shard."""
    return os.path.basename(engine._get_ckpt_name("", "", pp_placeholder=str(shard)))


def optimizer_states_name(engine: DeepSpeedEngine, shard: int, bf16: bool | None = None) -> str:
    """File name of the optimizer states of one shard, as an engine in ``bf16`` calls it (by default this one)."""
    bf16 = engine.bfloat16_enabled() if bf16 is None else bf16
    mp_rank = int(model_states_name(engine, 0).split("_mp_rank_")[1].split("_")[0])
    return os.path.basename(engine._get_rank_zero_ckpt_name("", "", mp_rank, shard, bf16))


def param_shapes(engine: DeepSpeedEngine) -> list[Mapping[str, torch.Size]]:
    """Names and shapes of the optimizer's parameters, per sub-group, in the order of the flat buffers."""
    return engine._get_zero_param_shapes()


def sub_group_owners(engine: DeepSpeedEngine) -> list[int]:
    """The parameter group of each sub-group."""
    owners = engine.optimizer.sub_group_to_group_id
    return [owners[index] for index in range(len(engine.optimizer.fp16_groups))]


def set_writer(engine: DeepSpeedEngine, writes: bool) -> None:
    """Whether this rank writes the files of its shard at the next save."""
    engine.save_non_zero_checkpoint = engine.save_zero_checkpoint = writes


def model_states_of_all_mp_ranks(engine: DeepSpeedEngine, folder: str, shard: int) -> list[str]:
    """Paths of the model states of one shard, one for each model-parallel rank that saved."""
    pattern = engine._get_ckpt_name(folder, "", mp_placeholder="*", pp_placeholder=str(shard))
    return sorted(glob.glob(os.path.normpath(pattern)))


WEIGHTS_ONLY_ENV = "MICS_DS_WEIGHTS_ONLY"


def load_states(path: str | os.PathLike, *, mmap: bool = False) -> dict[str, Any]:
    """Read one of DeepSpeed's checkpoint files to host memory.

    Tries ``weights_only`` with the few classes that DeepSpeed itself puts there. A file with others (custom
    objects in ``client_state``, say) is unpickled as DeepSpeed would, unless ``MICS_DS_WEIGHTS_ONLY=1``.

    Args:
        mmap: leave tensors in the file until they are read. Not for what is to be kept.

    Raises:
        MicsCheckpointError: the file needs unpickling and that is forbidden.
    """
    mapped = mmap and zipfile.is_zipfile(path)  # torch's older format cannot be mapped
    with torch.serialization.safe_globals(_SAFE_CLASSES):
        try:
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error).rpartition("WeightsUnpickler error: ")[2].partition(" was not")[0].splitlines()[0]
            if os.environ.get(WEIGHTS_ONLY_ENV) == "1":
                raise MicsCheckpointError(
                    f"{path} holds objects that only unpickling can load, and {WEIGHTS_ONLY_ENV}=1 forbids it: "
                    f"{reason}. If you trust whoever wrote the file, unset the variable."
                ) from error
    return torch.load(path, map_location="cpu", mmap=mapped, weights_only=False)


def _safe_classes() -> list[Any]:
    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    return [loss_scaler.LossScaler, loss_scaler.DynamicLossScaler, ZeroStageEnum]


_SAFE_CLASSES = _safe_classes()

# --------------------------------------------------------------------------------------------------
# 3. Patches

_INSTALLED = "_mics_ds_original"


def replace_method(cls: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Have ``wrapper(original, self, *args, **kwargs)`` called in place of ``cls.name``."""
    original = getattr(cls, name)
    if hasattr(original, _INSTALLED):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    setattr(method, _INSTALLED, original)
    setattr(cls, name, method)


def replace_new(cls: type, choose: Callable[..., type]) -> None:
    """Have ``cls(...)`` build an instance of ``choose(cls, arguments)``, a subclass of ``cls`` or ``cls`` itself.

    Changing the class in place reaches every alias that somebody imported earlier. Subclasses of
    ``cls`` that are constructed by name are left alone.

    Args:
        choose: called with the constructor's bound arguments by name, defaults not filled in.
    """
    if hasattr(cls.__new__, _INSTALLED):
        return
    signature = inspect.signature(cls.__init__)

    def __new__(actual: type, *args: Any, **kwargs: Any) -> Any:
        if actual is not cls or not (args or kwargs):  # copy and pickle call without arguments
            return object.__new__(actual)
        return object.__new__(choose(cls, signature.bind_partial(None, *args, **kwargs).arguments))

    setattr(__new__, _INSTALLED, cls.__new__)
    cls.__new__ = staticmethod(__new__)


_weights_tag: ContextVar[str | None] = ContextVar("weights_tag", default=None)


@contextmanager
def weights_from(tag: str) -> Iterator[None]:
    """Have DeepSpeed read consolidated weights from the checkpoint being loaded, and not from the latest one."""
    token = _weights_tag.set(tag)
    try:
        yield
    finally:
        _weights_tag.reset(token)


def _read_weights_of_tag() -> None:
    original = engine_module.get_fp32_state_dict_from_zero_checkpoint
    if hasattr(original, _INSTALLED):
        return

    @functools.wraps(original)
    def get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir: str, tag: str | None = None, **kwargs: Any) -> Any:
        return original(checkpoint_dir, tag or _weights_tag.get(), **kwargs)

    setattr(get_fp32_state_dict_from_zero_checkpoint, _INSTALLED, original)
    engine_module.get_fp32_state_dict_from_zero_checkpoint = get_fp32_state_dict_from_zero_checkpoint


def install_checkpoints(
    runs_mics: Callable[[Any], bool],
    save: Callable[..., Any],
    load: Callable[..., Any],
    save_stock: Callable[[Any, str, str], None],
    load_stock: Callable[[Any, str, str | None], None],
) -> None:
    """Have engines with MiCS saved by ``save`` and loaded by ``load``, called like the methods they replace, the
    original first; and others announced to ``save_stock`` and ``load_stock``."""
    _read_weights_of_tag()

    def save_checkpoint(original: Any, self: Any, save_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        if save_dir and runs_mics(self):
            return save(original, self, save_dir, tag, *args, **kwargs)
        if save_dir and self.zero_optimization_partition_weights():
            save_stock(self, save_dir, f"global_step{self.global_steps}" if tag is None else str(tag))
        return original(self, save_dir, tag, *args, **kwargs)

    def load_checkpoint(original: Any, self: Any, load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not self.load_universal_checkpoint():
            if runs_mics(self):
                return load(original, self, load_dir, tag, *args, **kwargs)
            if self.zero_optimization_partition_weights():
                load_stock(self, load_dir, tag)
        return original(self, load_dir, tag, *args, **kwargs)

    def _get_all_ckpt_names(original: Any, self: Any, folder: str, tag: str) -> list[str]:
        session = getattr(self.checkpoint_engine, "session", None)
        if session is None:
            return original(self, folder, tag)
        return model_states_of_all_mp_ranks(self, os.path.join(folder, tag), session.model_states_shard)

    def _copy_recovery_script(original: Any, self: Any, folder: str) -> None:
        session = getattr(self.checkpoint_engine, "session", None)
        if session is None:
            original(self, folder)
        else:
            session.make(lambda: original(self, folder))

    replace_method(DeepSpeedEngine, "save_checkpoint", save_checkpoint)
    replace_method(DeepSpeedEngine, "load_checkpoint", load_checkpoint)
    replace_method(DeepSpeedEngine, "_get_all_ckpt_names", _get_all_ckpt_names)
    replace_method(DeepSpeedEngine, "_copy_recovery_script", _copy_recovery_script)


def log_stage(stage: Any) -> None:
    """Enter a stage of :mod:`mics_ds.collectives` into DeepSpeed's ``comms_logger``, if that is switched on.

    Hop 1, hop 2 and the two stages of hierarchical collectives get entries of their own. As for any
    subgroup, the logger computes its bandwidths as if the whole world had taken part.
    """
    log = dist.comm.comms_logger
    if log.enabled and (log.prof_all or stage.operator in log.prof_ops):
        log.append(stage.operator, f"mics {stage.label}", 1e3 * stage.seconds, stage.payload)


def ensure_distributed() -> None:
    """Bring the process group up as ``zero.Init`` would do a moment later."""
    if not dist.is_initialized():
        deepspeed.init_distributed()
