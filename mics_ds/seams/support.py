"""Is this a DeepSpeed we know, has it what we need, and does the configuration ask for something MiCS cannot do?"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.layer import MoE
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import partition_parameters as pp
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from packaging.version import Version

from ..config import MicsConfig
from ..errors import MicsCompatError, MicsConfigError
from ..log import log_rank0
from .ds_config import offload_device

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
            "reduce_independent_p_g_buckets_and_remove_grads",
            "get_param_comm_dtype",
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
    if untested_version() is not None and os.environ.get(ALLOW_UNTESTED_ENV) != "1":
        raise MicsCompatError(
            f"mics_ds was tested with DeepSpeed {', '.join(TESTED_VERSIONS)}, but this is {deepspeed.__version__}. "
            f"Install a tested version. To know whether yours works, run `python -m mics_ds.check` under your "
            f"launcher; if it passes, set {ALLOW_UNTESTED_ENV}=1 on all ranks (docs/versions.md)."
        )


def untested_version() -> str | None:
    """The installed version of DeepSpeed, if mics_ds was not tested with it."""
    return None if deepspeed.__version__.split("+")[0] in TESTED_VERSIONS else deepspeed.__version__


# What older versions lack.
BOUNDARY_IS_A_METHOD = hasattr(DeepSpeedZeroOptimizer_Stage3, "is_gradient_accumulation_boundary")  # 0.19
FINALIZES_OFFLOAD = hasattr(DeepSpeedZeroOptimizer_Stage3, "_finalize_offload_gradient_accumulation")  # 0.19
MUON_FOLLOWS_GRADIENTS = hasattr(DeepSpeedZeroOptimizer_Stage3, "_apply_muon_to_accumulated_grads")  # 0.19.8


class Refusal(NamedTuple):
    """A feature that does not work under MiCS yet."""

    feature: str
    remedy: str
    is_asked_for: Callable[[DeepSpeedConfig], bool]


def _zero(name: str) -> Callable[[DeepSpeedConfig], bool]:
    """Whether a switch of the ``zero_optimization`` section is on."""
    return lambda config: bool(getattr(config.zero_config, name))


def autotp_size(config: DeepSpeedConfig) -> int:
    """Ranks that share each layer under AutoTP, 1 without it."""
    return getattr(getattr(config, "tensor_parallel_config", None), "autotp_size", 0) or 1


def _enabled(section: str) -> Callable[[DeepSpeedConfig], bool]:
    """Whether a section, which older versions do not have, is enabled."""
    return lambda config: bool(getattr(getattr(config, section, None), "enabled", False))


@functools.cache
def can_swap() -> bool:
    """Whether DeepSpeed can be built to read and write files by libaio. Compiles a few lines to find out."""
    builder = get_accelerator().create_op_builder("AsyncIOBuilder")
    return builder is not None and bool(builder.is_compatible(verbose=False))


SHARDS_AUTOTP = hasattr(DeepSpeedEngine, "_resolve_zero3_param_placement")
"""Whether stage 3 knows which ranks share a parameter that AutoTP has cut."""

REFUSALS = (
    Refusal("zero_quantized_gradients (ZeRO++ qgZ)", "set it to false", _zero("zero_quantized_gradients")),
    Refusal("zero_quantized_weights (ZeRO++ qwZ)", "set it to false", _zero("zero_quantized_weights")),
    Refusal("zero_quantized_nontrainable_weights", "set it to false", _zero("zero_quantized_nontrainable_weights")),
    Refusal(
        "zenflow",
        "remove the zenflow section",
        lambda config: getattr(config.zero_config, "zenflow", None) is not None,
    ),
    Refusal(
        "offload_optimizer to NVMe",
        "offload to cpu: of gradients that it has written there, DeepSpeed 0.19.8 reads others back, on a CPU at least",
        lambda config: offload_device(config.zero_config.offload_optimizer) == "nvme",
    ),
    Refusal(
        "offload_param to NVMe",
        "DeepSpeed's async_io cannot be built here, which `ds_report` explains; install libaio-dev on all nodes, or "
        "offload to cpu",
        lambda config: offload_device(config.zero_config.offload_param) == "nvme" and not can_swap(),
    ),
    Refusal(
        "compile.deepcompile (DeepCompile)",
        "set it to false: its extension reduces gradients by itself, over one group and on CUDA only; engine.compile() "
        "is not affected",
        lambda config: bool(getattr(getattr(config, "compile_config", None), "deepcompile", False)),
    ),
    Refusal(
        "the Muon optimizer",
        f"use Adam, AdamW or SGD, or DeepSpeed {TESTED_VERSIONS[0]}: this one updates momentums while it reduces "
        f"gradients, before they are final",
        lambda config: not MUON_FOLLOWS_GRADIENTS and str(config.optimizer_name).lower() == "muon",
    ),
    Refusal(
        "tensor_parallel.autotp_size (AutoTP)",
        f"this DeepSpeed's own AutoTP does not go with stage 3; install deepspeed=={TESTED_VERSIONS[0]}",
        lambda config: autotp_size(config) > 1 and not SHARDS_AUTOTP,
    ),
    Refusal(
        "expert_parallel (AutoEP)",
        "it sets partition groups of its own; remove the section",
        _enabled("expert_parallel_config"),
    ),
    Refusal("hybrid_engine", "set enabled to false", _enabled("hybrid_engine")),
    Refusal(
        "datastates or nebula checkpoints",
        "set enabled to false",
        lambda config: _enabled("datastates_config")(config) or _enabled("nebula_config")(config),
    ),
)


def swaps(ds_config: DeepSpeedConfig) -> bool:
    """Whether parameters are to be kept on NVMe."""
    return offload_device(ds_config.zero_config.offload_param) == "nvme"


def refuse_unsupported(ds_config: DeepSpeedConfig, mics: MicsConfig) -> None:
    """Name what the parsed configuration asks for that does not work under MiCS.

    Raises:
        MicsConfigError: with every such feature and what to do about it.
    """
    found = [f"{item.feature}: {item.remedy}" for item in REFUSALS if item.is_asked_for(ds_config)]
    if swaps(ds_config):
        if mics.optimizer_states == "world":
            found.append('mics_optimizer_states "world" with offload to NVMe: use "partition", or offload to cpu')
        if mics.guard is not None and mics.guard.every:
            found.append("mics_guard with offload to NVMe, as it compares what is in memory: set it to false")
    if found:
        raise MicsConfigError(
            "MiCS (zero_optimization.mics_shard_size) does not support the following yet. "
            + "; ".join(found)
            + ". Or remove the mics_ keys to run stock ZeRO-3 with it."
        )


class Superseded(NamedTuple):
    """A key that changes no number, and whose purpose MiCS serves in its own way. DeepSpeed does not get to see it."""

    key: str
    instead: str
    is_asked_for: Callable[[DeepSpeedConfig], bool]
    switch_off: Callable[[DeepSpeedConfig], None]


SUPERSEDED = (
    Superseded(
        "zero_hpz_partition_size (ZeRO++ hpZ)",
        "all parameter gathers, forward too, stay inside the partition group, whose size is mics_shard_size",
        lambda config: config.zero_config.zero_hpz_partition_size > 1,
        lambda config: setattr(config.zero_config, "zero_hpz_partition_size", 1),
    ),
    Superseded(
        "offload_optimizer.super_offload (SuperOffload)",
        "the optimizer is offloaded to the CPU without it, because hop 2 comes between gradients and their update",
        lambda config: bool(getattr(config.zero_config.offload_optimizer, "super_offload", False)),
        lambda config: setattr(config.zero_config.offload_optimizer, "super_offload", False),
    ),
    Superseded(
        "elastic_checkpoint",
        "it stands for mics_reshape_checkpoint, which resumes in any number of shards",
        _zero("elastic_checkpoint"),
        lambda config: setattr(config.zero_config, "elastic_checkpoint", False),
    ),
    Superseded(
        "pipeline_loading_checkpoint",
        "ranks do not take turns, each reads the file of its own shard",
        _zero("pipeline_loading_checkpoint"),
        lambda config: setattr(config.zero_config, "pipeline_loading_checkpoint", False),
    ),
    Superseded(
        "checkpoint.writer",
        "files are written by torch.save, with checksums, and published when all are complete",
        lambda config: bool(config.checkpoint_config.get("writer")),
        lambda config: config.checkpoint_config.update(writer=None),
    ),
)
_said: set[str] = set()


def supersede(ds_config: DeepSpeedConfig) -> None:
    """Switch off, in a parsed configuration, what MiCS does in its own way, and say so once."""
    for item in SUPERSEDED:
        if item.is_asked_for(ds_config):
            item.switch_off(ds_config)
            if item.key not in _said:
                _said.add(item.key)
                log_rank0(f"{item.key} has no effect under MiCS: {item.instead}")


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


@functools.cache
def gathers_race() -> bool:
    """Whether a gather of several parameters waits for the last of them only, as it does up to 0.19.7. Under gloo the
    others may still be on their way then."""
    try:
        return "launch_handles[-1].wait()" in inspect.getsource(pp.Init._allgather_params_coalesced)
    except (OSError, TypeError):  # installed without sources, or compiled
        return Version(deepspeed.__version__) < Version("0.19.8")
