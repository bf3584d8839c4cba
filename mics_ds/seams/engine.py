"""What is read off an engine and its arguments, and what is done around it in DeepSpeed's name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import psutil
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups

from .ds_config import offload_device
from .patch import Patches
from .support import autotp_size


@dataclass(frozen=True)
class EngineFacts:
    """An engine that is about to be built, in DeepSpeed's words, and the devices of this rank."""

    ranks: tuple[int, ...]
    """Global ranks that its parameters are partitioned over: with sequence parallelism, those that share a sequence
    among them."""
    micro_batch: int
    micro_steps: int
    precision: str
    """``fp32``, ``fp16`` or ``bf16``."""
    zero: Mapping[str, Any]
    """Numbers and switches of the ``zero_optimization`` section, under the names of DeepSpeed's own fields."""
    optimizer: str
    """Its class's name, or the name in the JSON, in small letters. Empty if there is none."""
    built_by_deepspeed: bool
    """Whether DeepSpeed makes the optimizer, from that name and :attr:`optimizer_params`."""
    optimizer_params: Mapping[str, Any]
    param_groups: tuple[Mapping[str, Any], ...]
    """Of the optimizer, or the parameters in the JSON."""
    accumulation_itemsize: int
    """Bytes of an accumulated gradient's element, 0 where the JSON leaves it to DeepSpeed."""
    memory: float
    """Bytes of its device that this rank can use. On a CPU, what it shares with the other ranks of the node."""
    device_memory: float
    """Bytes that the device has."""
    device: str
    """Its name, or ``cpu``."""
    host_memory: float
    """Bytes of free host memory on the node, shared by its ranks."""

    @property
    def trains(self) -> bool:
        return bool(self.optimizer)


_ZERO_NUMBERS = (
    "prefetch_bucket_size",
    "max_live_parameters",
    "max_reuse_distance",
    "param_persistence_threshold",
    "reduce_bucket_size",
    "sub_group_size",
)
_ZERO_SWITCHES = ("overlap_comm", "contiguous_gradients")
_ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}


def engine_facts(engine_arguments: Mapping[str, Any]) -> EngineFacts:
    """Read the keywords of ``DeepSpeedEngine`` and look at this rank's devices."""
    parsed = engine_arguments["config_class"]
    zero = parsed.zero_config
    optimizer = engine_arguments.get("optimizer")
    params = parsed.optimizer_params or {}
    name = str(parsed.optimizer_name or "").lower() if optimizer is None else type(optimizer).__name__.lower()
    memory, device_memory, device = _memory_at_hand(engine_arguments["model"])
    return EngineFacts(
        ranks=_data_parallel_ranks(engine_arguments),
        micro_batch=int(parsed.train_micro_batch_size_per_gpu),
        micro_steps=int(parsed.gradient_accumulation_steps),
        precision="bf16" if parsed.bfloat16_config.enabled else "fp16" if parsed.float16_config.enabled else "fp32",
        zero={
            **{name: int(getattr(zero, name)) for name in _ZERO_NUMBERS},
            **{name: bool(getattr(zero, name)) for name in _ZERO_SWITCHES},
            "offload_optimizer": offload_device(zero.offload_optimizer) != "none",
            "offload_param": offload_device(zero.offload_param) != "none",
        },
        optimizer=name,
        built_by_deepspeed=optimizer is None,
        optimizer_params=params,
        param_groups=tuple(getattr(optimizer, "param_groups", (params,))),
        accumulation_itemsize=_ITEMSIZE.get(str(getattr(parsed, "grad_accum_dtype", None)), 0),
        memory=float(memory),
        device_memory=float(device_memory),
        device=device,
        host_memory=float(psutil.virtual_memory().available),
    )


def _data_parallel_ranks(engine_arguments: Mapping[str, Any]) -> tuple[int, ...]:
    tensor_parallel = autotp_size(engine_arguments["config_class"])
    if tensor_parallel > 1:  # its groups come to be in the engine
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return tuple(range(rank % tensor_parallel, world, tensor_parallel))
    group = _data_parallel_group(engine_arguments.get("mpu")) or torch.distributed.group.WORLD
    return tuple(torch.distributed.get_process_group_ranks(group))


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


def device_streams() -> Any | None:
    """The accelerator, if it has streams that run beside the host; ``None`` for a CPU."""
    accelerator = get_accelerator()
    return None if accelerator.is_synchronized_device() else accelerator


def communication_device() -> torch.device:
    """Where collectives of this rank work."""
    return torch.device(get_accelerator().current_device_name())


def participants(mpu: Any = None, group: Any = None) -> tuple[int, ...] | None:
    """Global ranks that build an engine together, in ascending order; ``None`` for the world.

    Args:
        mpu: DeepSpeed's model-parallel unit. If its groups do not span the world, only the data-parallel group of
            this rank is sure to take part.
        group: the data-parallel group; by default that of the ``mpu``.
    """
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if world == 1:
        return None
    if mpu is not None:
        group = _data_parallel_group(mpu) if group is None else group
        across = [_group(mpu, "get_model_parallel_group"), _group(mpu, "get_sequence_parallel_group")]
        if group is None or any(_size(group) * _size(other) == world for other in across if other is not None):
            return None
    if group is None or _size(group) == world:
        return None
    return tuple(torch.distributed.get_process_group_ranks(group))


def partitioned_group(group: Any, mpu: Any) -> Any:
    """The group that DeepSpeed partitions parameters over, where it gives ``group`` to the optimizer.

    It is another one with a device mesh for sequence parallelism (``sequence_parallel_size`` and ``data_parallel_size``
    in the JSON, or ``mesh_param``). The optimizer gets the ranks that see the same part of their sequences, of which
    there are too few: parameters and gradients are those of all ranks.
    """
    if groups.mesh_device is None or _data_parallel_group(mpu) is not None:
        return group
    return torch.distributed.group.WORLD


def count_ranks(engine: Any, ranks: int) -> None:
    """Have the engine expect optimizer states of so many ranks in a checkpoint. With a mesh for sequence parallelism it
    would count those of the optimizer's group, see :func:`partitioned_group`."""
    engine.seq_dp_world_size = ranks


def _data_parallel_group(mpu: Any) -> Any:
    """The ranks that an mpu has ZeRO-3 partition over, or ``None`` if it does not say."""
    both = _group(mpu, "get_sequence_data_parallel_group")
    return _group(mpu, "get_data_parallel_group") if both is None else both


def _group(mpu: Any, name: str) -> Any:
    return getattr(mpu, name)() if hasattr(mpu, name) else None


def _size(group: Any) -> int:
    return torch.distributed.get_world_size(group)


def log_stage(stage: Any) -> None:
    """Enter a :class:`mics_ds.comm.collectives.StageTime` into DeepSpeed's ``comms_logger``, if that is switched on.

    Hop 1, hop 2 and the two stages of hierarchical collectives get entries of their own. As for any
    subgroup, the logger computes its bandwidths as if the whole world had taken part.
    """
    log = comm.comm.comms_logger
    if log.enabled and (log.prof_all or stage.operator in log.prof_ops):
        log.append(stage.operator, f"mics {stage.label}", 1e3 * stage.seconds, stage.payload)


def steps_taken(engine: Any) -> int:
    """Optimizer steps before the one that is under way, those that were skipped among them."""
    return int(engine.global_steps)


def is_fresh(engine: Any) -> bool:
    """Whether nothing was trained or loaded yet."""
    return int(engine.global_steps) == 0 and int(engine.micro_steps) == 0


def wait_for_device() -> None:
    """Wait for what the host has given the device to do, on the current stream."""
    accelerator = device_streams()
    if accelerator is not None:
        accelerator.current_stream().synchronize()


def after_each_step(patches: Patches, engine_class: type, act: Callable[[Any], None]) -> None:
    """Call ``act(engine)`` whenever an engine of this class has taken an optimizer step."""

    def step(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        before = self.global_steps
        result = original(self, *args, **kwargs)
        if self.global_steps > before:
            act(self)
        return result

    patches.wrap_method(engine_class, "step", step)


def write_monitor(engine: Any, values: Mapping[str, float]) -> None:
    """Hand numbers to DeepSpeed's monitors (TensorBoard, wandb, CSV), if there are any."""
    if engine.monitor.enabled:
        engine.monitor.write_events([(name, value, engine.global_samples) for name, value in values.items()])


def ensure_distributed() -> None:
    """Bring the process group up as ``zero.Init`` would do a moment later."""
    if not comm.is_initialized():
        deepspeed.init_distributed()


def start_distributed(timeout_s: float) -> None:
    """Bring the process group up as a job of DeepSpeed does, but without its shared-memory extension for CPUs, which
    would be compiled for a minute, and which ZeRO-3 does not use."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(timeout=timedelta(seconds=timeout_s), verbose=False)
