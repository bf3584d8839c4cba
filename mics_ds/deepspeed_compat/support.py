"""Features of a configuration or a model that MiCS refuses, or does in another way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.layer import MoE
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import partition_parameters as pp
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from ..comm.job import current_job
from ..config import MicsConfig
from ..errors import MicsConfigError
from ..log import log_rank0
from .ds_config import offload_device

MUON_FOLLOWS_GRADIENTS = hasattr(DeepSpeedZeroOptimizer_Stage3, "_apply_muon_to_accumulated_grads")
"""Since 0.19.8 Muon waits for the gradients of a whole step."""
NEWEST = "0.19.8"


class Feature(NamedTuple):
    """A feature of DeepSpeed that is refused under MiCS, or switched off because MiCS serves its purpose."""

    name: str
    instead: str
    """Remedy for a refusal, or the feature that serves the purpose."""
    is_asked_for: Callable[[DeepSpeedConfig], bool]
    switch_off: Callable[[DeepSpeedConfig], None] | None = None
    """Changes a parsed configuration. ``None`` for a refusal."""


def _on(path: str) -> Callable[[DeepSpeedConfig], bool]:
    """Return whether an attribute of a configuration is set, which some versions do not have."""

    def is_on(config: DeepSpeedConfig) -> bool:
        return bool(functools.reduce(lambda section, name: getattr(section, name, None), path.split("."), config))

    return is_on


def _switch_off(name: str) -> Callable[[DeepSpeedConfig], None]:
    return lambda config: setattr(config.zero_config, name, False)


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

FEATURES = (
    Feature("zero_quantized_gradients (ZeRO++ qgZ)", "set it to false", _on("zero_config.zero_quantized_gradients")),
    Feature("zero_quantized_weights (ZeRO++ qwZ)", "set it to false", _on("zero_config.zero_quantized_weights")),
    Feature(
        "zero_quantized_nontrainable_weights", "set it to false", _on("zero_config.zero_quantized_nontrainable_weights")
    ),
    Feature(
        "zenflow",
        "remove the zenflow section",
        _on("zero_config.zenflow"),
    ),
    Feature(
        "offload_optimizer to NVMe",
        "offload to cpu: of gradients that it has written there, DeepSpeed 0.19.8 reads others back, on a CPU at least",
        lambda config: offload_device(config.zero_config.offload_optimizer) == "nvme",
    ),
    Feature(
        "offload_param to NVMe",
        "DeepSpeed's async_io cannot be built here, which `ds_report` explains; install libaio-dev on all nodes, or "
        "offload to cpu",
        lambda config: offload_device(config.zero_config.offload_param) == "nvme" and not can_swap(),
    ),
    Feature(
        "compile.deepcompile (DeepCompile)",
        "set it to false: its extension reduces gradients by itself, over one group and on CUDA only; engine.compile() "
        "is not affected",
        _on("compile_config.deepcompile"),
    ),
    Feature(
        "the Muon optimizer",
        f"use Adam, AdamW or SGD, or DeepSpeed {NEWEST}: this one updates momentums while it reduces "
        f"gradients, before they are final",
        lambda config: not MUON_FOLLOWS_GRADIENTS and str(config.optimizer_name).lower() == "muon",
    ),
    Feature(
        "tensor_parallel.autotp_size (AutoTP)",
        f"this DeepSpeed's own AutoTP does not go with stage 3; install deepspeed=={NEWEST}",
        lambda config: autotp_size(config) > 1 and not SHARDS_AUTOTP,
    ),
    Feature(
        "expert_parallel (AutoEP)",
        "it sets partition groups of its own; remove the section",
        _on("expert_parallel_config.enabled"),
    ),
    Feature("hybrid_engine", "set enabled to false", _on("hybrid_engine.enabled")),
    Feature(
        "datastates or nebula checkpoints",
        "set enabled to false",
        lambda config: _on("datastates_config.enabled")(config) or _on("nebula_config.enabled")(config),
    ),
    Feature(
        "zero_hpz_partition_size (ZeRO++ hpZ)",
        "all parameter gathers, forward too, stay inside the partition group, whose size is mics_shard_size",
        lambda config: config.zero_config.zero_hpz_partition_size > 1,
        lambda config: setattr(config.zero_config, "zero_hpz_partition_size", 1),
    ),
    Feature(
        "offload_optimizer.super_offload (SuperOffload)",
        "the optimizer is offloaded to the CPU without it, because hop 2 comes between gradients and their update",
        _on("zero_config.offload_optimizer.super_offload"),
        lambda config: setattr(config.zero_config.offload_optimizer, "super_offload", False),
    ),
    Feature(
        "elastic_checkpoint",
        "it stands for mics_reshape_checkpoint, which resumes in any number of shards",
        _on("zero_config.elastic_checkpoint"),
        _switch_off("elastic_checkpoint"),
    ),
    Feature(
        "pipeline_loading_checkpoint",
        "ranks do not take turns, each reads the file of its own shard",
        _on("zero_config.pipeline_loading_checkpoint"),
        _switch_off("pipeline_loading_checkpoint"),
    ),
    Feature(
        "checkpoint.writer",
        "files are written by torch.save, with checksums, and published when all are complete",
        lambda config: bool(config.checkpoint_config.get("writer")),
        lambda config: config.checkpoint_config.update(writer=None),
    ),
)


def swaps(ds_config: DeepSpeedConfig) -> bool:
    """Return whether parameters are to be kept on NVMe."""
    return offload_device(ds_config.zero_config.offload_param) == "nvme"


def refuse_unsupported(ds_config: DeepSpeedConfig, mics: MicsConfig) -> None:
    """Name what the parsed configuration asks for that does not work under MiCS.

    Raises:
        MicsConfigError: with every such feature and what to do about it.
    """
    refused = (item for item in FEATURES if item.switch_off is None and item.is_asked_for(ds_config))
    found = [f"{item.name}: {item.instead}" for item in refused]
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
    assert mics.replicas is not None, "asked for"
    if mics.replicas.hold_global_batch:
        yield (
            "hold_global_batch: loops count the micro-steps of a step themselves, and with a number of replicas that "
            "does not divide them ranks would take different numbers; remove it, and let the learning rate follow "
            "engine.mics_replicas.size"
        )
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
    if str(ds_config.optimizer_name).lower() == "muon":
        yield "Muon: replicas take turns at its matrices, and one that is gone would take its turn with it"
    if autotp_size(ds_config) > 1:
        yield "tensor parallelism: the ranks of a replica must be one partition group; set autotp_size to 1"


def supersede(ds_config: DeepSpeedConfig) -> None:
    """Switch off, in a parsed configuration, what MiCS does in its own way, and say so once."""
    for item in FEATURES:
        if item.switch_off is not None and item.is_asked_for(ds_config):
            item.switch_off(ds_config)
            if current_job().is_news(item.name):
                log_rank0(f"{item.name} has no effect under MiCS: {item.instead}")


def refuse_native_moe(module: torch.nn.Module) -> None:
    """Stage 3 does not go with DeepSpeed's own expert layers, and says so late.

    Raises:
        MicsConfigError: ``module`` has some.
    """
    names = [name for name, part in module.named_modules() if isinstance(part, MoE)]
    if names:
        raise MicsConfigError(
            f"MiCS needs ZeRO stage 3, which deepspeed.moe is not for, but {names[0] or 'the model'} is a "
            f"deepspeed.moe.layer.MoE. Remove the mics_ keys and use stage 1 or 2, or write experts as ordinary "
            f"modules and declare the module that chooses among them a leaf module "
            f"(deepspeed.utils.set_z3_leaf_modules)."
        )


def refuse_unpartitionable(params: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse what stage 3 cannot partition, where DeepSpeed would fail later and without a name.

    Args:
        params: names, empty where nobody knows them, and parameters.

    Raises:
        MicsConfigError: some have no element or no dimension.
    """
    strange = [
        f"{name or 'a parameter'} of shape {tuple(param.shape)}"
        for name, param in params
        if not pp.is_zero_param(param) and (param.dim() == 0 or param.numel() == 0)
    ]
    if strange:
        raise MicsConfigError(
            f"ZeRO stage 3, stock DeepSpeed's too, needs parameters with at least one dimension and one element, but "
            f"found {', '.join(strange)}. Give a scalar the shape (1,); leave empty parameters out, or register them "
            f"as buffers."
        )
