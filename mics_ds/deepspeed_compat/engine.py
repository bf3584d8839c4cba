"""Access to engines of DeepSpeed and their arguments, and work around an engine in DeepSpeed's name."""

from __future__ import annotations

import importlib
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups

from ..host_memory import host_memory_left
from .support import autotp_size


def data_parallel_ranks(engine_arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the global ranks that the parameters of an engine are going to be partitioned over.

    With sequence parallelism they share sequences among them.

    Args:
        engine_arguments: of ``DeepSpeedEngine``, by name.
    """
    tensor_parallel = autotp_size(engine_arguments["config_class"])
    if tensor_parallel > 1:  # the engine makes their groups later
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return tuple(range(rank % tensor_parallel, world, tensor_parallel))
    group = data_parallel_group(engine_arguments.get("mpu")) or torch.distributed.group.WORLD
    return tuple(torch.distributed.get_process_group_ranks(group))


class Memory(NamedTuple):
    """The memory of this rank's device."""

    at_hand: float
    """Bytes that a model and its states can use. On a CPU, shared with the other ranks of the node."""
    total: float
    """Bytes that the device has."""
    device: str
    """Name of the device, or ``cpu``."""


def memory_at_hand(module: torch.nn.Module) -> Memory:
    """Return how much memory ``module`` and its states can use, with what it takes up already."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        available = float(host_memory_left()[0])
        return Memory(available, available, "cpu")
    # DeepSpeed sets the device later, when it builds the engine.
    index = int(os.environ.get("LOCAL_RANK", accelerator.current_device()))
    # What this process's allocator holds without using it counts as free.
    unused = accelerator.memory_reserved(index) - accelerator.memory_allocated(index)
    own = sum(
        held.nbytes
        for param in module.parameters()
        for held in (param.data, getattr(param, "ds_tensor", None))
        if held is not None and held.device.type == accelerator.device_name()
    )
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info(index)
        return Memory(free + unused + own, total, torch.cuda.get_device_name(index))
    free, total = accelerator.available_memory(index), accelerator.total_memory(index)
    return Memory(free + unused + own, total, accelerator.device_name())


def device_streams() -> Any | None:
    """The accelerator, if it has streams that run beside the host; ``None`` for a CPU."""
    accelerator = get_accelerator()
    return None if accelerator.is_synchronized_device() else accelerator


def communication_device() -> torch.device:
    """Return the device on which collectives of this rank work."""
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
        group = data_parallel_group(mpu) if group is None else group
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
    if groups.mesh_device is None or data_parallel_group(mpu) is not None:
        return group
    return torch.distributed.group.WORLD


def count_ranks(engine: Any, ranks: int) -> None:
    """Have the engine expect optimizer states of so many ranks in a checkpoint. With a mesh for sequence parallelism it
    would count those of the optimizer's group, see :func:`partitioned_group`."""
    engine.seq_dp_world_size = ranks


def data_parallel_group(mpu: Any) -> Any:
    """Return the ranks that an mpu has ZeRO-3 partition over, or ``None`` if it does not say."""
    both = _group(mpu, "get_sequence_data_parallel_group")
    return _group(mpu, "get_data_parallel_group") if both is None else both


def _group(mpu: Any, name: str) -> Any:
    return getattr(mpu, name)() if hasattr(mpu, name) else None


def _size(group: Any) -> int:
    return torch.distributed.get_world_size(group)


def keep_timer_from_waiting(engine: Any) -> None:
    """Let the throughput timer read the clock without a wait for the device, unless the configuration asks for one.

    It waits twice in each micro-step by default, and with it all weights that are on their way to the next one.
    """
    config = engine.tput_timer.config
    if "synchronized" not in config.model_fields_set:
        config.synchronized = False


def log_collective(name: str, operator: str, nbytes: int, issue: Callable[[], Any]) -> Any:
    """Issue a collective, and enter it into DeepSpeed's ``comms_logger`` if that is switched on.

    It is waited for then, as DeepSpeed waits for its own: nothing else tells how long a collective takes on a device.
    Hop 1, hop 2 and the two stages of hierarchical collectives get entries of their own. As for any subgroup, the
    logger computes its bandwidths as if the whole world had taken part.
    """
    log = comm.comm.comms_logger
    if not (log.enabled and (log.prof_all or operator in log.prof_ops)):
        return issue()
    wait_for_device()
    start = time.perf_counter()
    work = issue()
    work.wait()
    wait_for_device()
    log.append(operator, f"mics {name}", 1e3 * (time.perf_counter() - start), nbytes)
    return work


def steps_taken(engine: Any) -> int:
    """Optimizer steps before the one that is under way, those that were skipped among them."""
    return int(engine.global_steps)


def is_fresh(engine: Any) -> bool:
    """Return whether nothing was trained or loaded yet."""
    return int(engine.global_steps) == 0 and int(engine.micro_steps) == 0


def wait_for_device() -> None:
    """Wait for what the host has given the device to do, on the current stream."""
    accelerator = device_streams()
    if accelerator is not None:
        accelerator.current_stream().synchronize()


def random_states() -> dict[str, Any]:
    """Return the states of all generators of random numbers that training uses by default."""
    found: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if device_streams() is not None:
        found["device"] = get_accelerator().get_rng_state()
    numpy = sys.modules.get("numpy")  # who has not imported it draws nothing from it
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        found["numpy"] = (kind, torch.from_numpy(keys.astype("int64")), *rest)  # which needs no unpickling
    return found


def set_random_states(found: Mapping[str, Any]) -> None:
    random.setstate(found["python"])
    torch.set_rng_state(found["torch"])
    if "device" in found and device_streams() is not None:
        get_accelerator().set_rng_state(found["device"])
    if "numpy" in found:
        kind, keys, *rest = found["numpy"]
        importlib.import_module("numpy").random.set_state((kind, keys.numpy().astype("uint32"), *rest))


def write_monitor(engine: Any, values: Mapping[str, float]) -> None:
    """Hand numbers to DeepSpeed's monitors (TensorBoard, wandb, CSV), if there are any."""
    if engine.monitor.enabled:
        engine.monitor.write_events([(name, value, engine.global_samples) for name, value in values.items()])


def ensure_distributed() -> None:
    """Bring the process group up, and set this rank's device, as ``zero.Init`` would do a moment later."""
    if not comm.is_initialized():
        deepspeed.init_distributed()
    accelerator = get_accelerator()
    if "LOCAL_RANK" in os.environ and not accelerator.is_synchronized_device():
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))


def start_distributed(timeout_s: float) -> None:
    """Bring the process group up as a job of DeepSpeed does, but without its shared-memory extension for CPUs, which
    would be compiled for a minute, and which ZeRO-3 does not use."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(timeout=timedelta(seconds=timeout_s), verbose=False)
