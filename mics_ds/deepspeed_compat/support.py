"""Features of a configuration that MiCS refuses, or does in another way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from ..comm.job import current_job
from ..config import MicsConfig
from ..errors import MicsConfigError
from ..log import log_rank0
from .ds_config import offload_device

MUON_FOLLOWS_GRADIENTS = hasattr(DeepSpeedZeroOptimizer_Stage3, "_apply_muon_to_accumulated_grads")
"""Since 0.19.8 Muon waits for the gradients of a whole step."""


def autotp_size(config: DeepSpeedConfig) -> int:
    """Return how many ranks share each layer under AutoTP, 1 without it."""
    return getattr(getattr(config, "tensor_parallel_config", None), "autotp_size", 0) or 1


@functools.cache
def can_swap() -> bool:
    """Return whether DeepSpeed can be built to read and write files by libaio. Compiles a few lines to find out."""
    builder = get_accelerator().create_op_builder("AsyncIOBuilder")
    return builder is not None and bool(builder.is_compatible(verbose=False))


SHARDS_AUTOTP = hasattr(DeepSpeedEngine, "_resolve_zero3_param_placement")
"""Whether stage 3 knows which ranks share a parameter that AutoTP has cut."""


class Feature(NamedTuple):
    """A feature of DeepSpeed that is refused under MiCS, or switched off because MiCS serves its purpose."""

    name: str
    path: str
    """Attribute of a parsed configuration, which some versions do not have."""
    instead: str
    """Remedy for a refusal, or the feature that serves the purpose."""
    asks: Callable[[Any], bool] = bool
    """Whether a value of the attribute asks for the feature."""
    off: Any = False
    """Value that switches the feature off."""


REFUSED = (
    Feature("zero_quantized_gradients (ZeRO++ qgZ)", "zero_config.zero_quantized_gradients", "set it to false"),
    Feature("zero_quantized_weights (ZeRO++ qwZ)", "zero_config.zero_quantized_weights", "set it to false"),
    Feature(
        "zero_quantized_nontrainable_weights", "zero_config.zero_quantized_nontrainable_weights", "set it to false"
    ),
    Feature("zenflow", "zero_config.zenflow", "remove the zenflow section"),
    Feature(
        "offload_optimizer to NVMe",
        "zero_config.offload_optimizer",
        "offload to cpu: of gradients that it has written there, DeepSpeed 0.19.8 reads others back, on a CPU at least",
        lambda section: offload_device(section) == "nvme",
    ),
    Feature(
        "offload_param to NVMe",
        "zero_config.offload_param",
        "DeepSpeed's async_io cannot be built here, which `ds_report` explains; install libaio-dev on all nodes, or "
        "offload to cpu",
        lambda section: offload_device(section) == "nvme" and not can_swap(),
    ),
    Feature(
        "compile.deepcompile (DeepCompile)",
        "compile_config.deepcompile",
        "set it to false: its extension reduces gradients by itself, over one group and on CUDA only; engine.compile() "
        "is not affected",
    ),
    Feature(
        "tensor_parallel.autotp_size (AutoTP)",
        "tensor_parallel_config.autotp_size",
        "this DeepSpeed's own AutoTP does not go with stage 3; install deepspeed==0.19.8",
        lambda size: (size or 1) > 1 and not SHARDS_AUTOTP,
    ),
    Feature(
        "expert_parallel (AutoEP)",
        "expert_parallel_config.enabled",
        "it sets partition groups of its own; remove the section",
    ),
    Feature("hybrid_engine", "hybrid_engine.enabled", "set enabled to false"),
    Feature("datastates checkpoints", "datastates_config.enabled", "set enabled to false"),
    Feature("nebula checkpoints", "nebula_config.enabled", "set enabled to false"),
)
SUPERSEDED = (
    Feature(
        "zero_hpz_partition_size (ZeRO++ hpZ)",
        "zero_config.zero_hpz_partition_size",
        "all parameter gathers, forward too, stay inside the partition group, whose size is mics_shard_size",
        lambda size: size > 1,
        off=1,
    ),
    Feature(
        "offload_optimizer.super_offload (SuperOffload)",
        "zero_config.offload_optimizer.super_offload",
        "the optimizer is offloaded to the CPU without it, because hop 2 comes between gradients and their update",
    ),
    Feature(
        "elastic_checkpoint",
        "zero_config.elastic_checkpoint",
        "it stands for mics_reshape_checkpoint, which resumes in any number of shards",
    ),
    Feature(
        "pipeline_loading_checkpoint",
        "zero_config.pipeline_loading_checkpoint",
        "ranks do not take turns, each reads the file of its own shard",
    ),
    Feature(
        "checkpoint.writer",
        "checkpoint_config.writer",
        "files are written by torch.save, with checksums, and published when all are complete",
        off=None,
    ),
)


def _value(section: Any, path: str) -> Any:
    for name in path.split("."):
        section = section.get(name) if isinstance(section, dict) else getattr(section, name, None)
    return section


def swaps(ds_config: DeepSpeedConfig) -> bool:
    """Return whether parameters are to be kept on NVMe."""
    return offload_device(ds_config.zero_config.offload_param) == "nvme"


def refuse_unsupported(ds_config: DeepSpeedConfig, mics: MicsConfig) -> None:
    """Name what the parsed configuration asks for that does not work under MiCS.

    Raises:
        MicsConfigError: with every such feature and what to do about it.
    """
    found = [f"{item.name}: {item.instead}" for item in REFUSED if item.asks(_value(ds_config, item.path))]
    if swaps(ds_config):
        if mics.optimizer_states == "world":
            found.append('mics_optimizer_states "world" with offload to NVMe: use "partition", or offload to cpu')
        if mics.guard is not None and mics.guard.every:
            found.append("mics_guard with offload to NVMe, as it compares what is in memory: set it to false")
    if mics.replicas is not None:
        found += [f"mics_replicas with {reason}" for reason in _against_managed_replicas(ds_config, mics)]
    if found:
        raise MicsConfigError(
            "MiCS (zero_optimization.mics_shard_size) does not support the following yet. "
            + "; ".join(found)
            + ". Or remove the mics_ keys to run stock ZeRO-3 with it."
        )


def _against_managed_replicas(ds_config: DeepSpeedConfig, mics: MicsConfig) -> Iterator[str]:
    """Yield what does not go with replicas that come and go, and why."""
    if mics.optimizer_states != "partition":
        yield 'mics_optimizer_states "world": a replica that is gone would take its slices with it; use "partition"'
    if mics.replica_wire != "full":
        yield 'mics_replica_wire: residuals of a replica that is gone would be lost; use "full"'
    if mics.is_auto:
        yield 'mics_shard_size "auto": it is the number of ranks of each replica\'s job; set it to that'
    if mics.guard is not None and mics.guard.every:
        yield "mics_guard: it compares replicas of one job; set it to false"
    if mics.checkpoint is not None and mics.checkpoint.memory_every:
        yield "mics_checkpoint.memory_every: siblings have the states in memory; set it to 0"
    if swaps(ds_config):
        yield "offload to NVMe: a sibling can be sent only what is in memory; offload to cpu"
    if autotp_size(ds_config) > 1:
        yield "tensor parallelism: the ranks of a replica must be one partition group; set autotp_size to 1"


def supersede(ds_config: DeepSpeedConfig) -> None:
    """Switch off, in a parsed configuration, what MiCS does in its own way, and say so once."""
    for item in SUPERSEDED:
        if item.asks(_value(ds_config, item.path)):
            section, _, name = item.path.rpartition(".")
            owner = _value(ds_config, section)
            owner.update({name: item.off}) if isinstance(owner, dict) else setattr(owner, name, item.off)
            if current_job().is_news(item.name):
                log_rank0(f"{item.name} has no effect under MiCS: {item.instead}")
