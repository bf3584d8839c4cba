"""Patches an imported DeepSpeed, so that whatever is built from a configuration with ``mics_`` keys is ours.

What is put in place here is light: it imports :mod:`mics_ds.plugin.construct`, and with it the rest of the package,
when an engine or a partitioner is built.
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module

from .import_hook import after_import

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any

# Importing it imports all the modules with classes we replace; its end is the earliest safe moment.
_TRIGGER = "deepspeed.runtime.engine"
_installed = False


def arm() -> None:
    """Install into DeepSpeed now, or as soon as it is imported. Calling it again does nothing."""
    from .. import frameworks

    frameworks.arm()
    after_import(_TRIGGER, _install_or_warn)


def _install_or_warn(_: ModuleType) -> None:
    """A DeepSpeed with other modules than we know must stay usable for those who do not use MiCS."""
    try:
        install()
    except Exception as error:
        warnings.warn(
            f"mics_ds could not hook into this DeepSpeed, so mics_ keys will not work: {error!r}. Install a version "
            f"that mics_ds was tested with (see docs/versions.md).",
            stacklevel=2,
        )


def install() -> None:
    """Patch the imported DeepSpeed. Idempotent. Nothing behaves differently without a ``mics_`` key.

    Raises:
        ImportError, AttributeError: this DeepSpeed lacks something. Nothing was patched then.
    """
    global _installed
    if _installed:
        return
    import deepspeed.runtime.zero as zero
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.tensor_parallel import init_utils
    from deepspeed.runtime.zero import partition_parameters as pp
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    from ..deepspeed_compat import checkpoint
    from ..deepspeed_compat.patching import Patches

    construct = "mics_ds.plugin.construct"
    with Patches() as patches:
        patches.wrap_method(DeepSpeedEngine, "__init__", _late(construct, "build_engine"))
        patches.wrap_method(DeepSpeedConfig, "__init__", _late(construct, "parse_config"))
        patches.make_instances(pp.Init, _late(construct, "make_partitioner"))
        patches.make_instances(DeepSpeedZeRoOffload, _late(construct, "make_param_manager"))
        patches.make_instances(DeepSpeedZeroOptimizer_Stage3, _late(construct, "make_optimizer"))
        patches.make_instances(pp.GatheredParameters, _late(construct, "make_gathered_parameters"))
        patches.wrap_method(DeepSpeedEngine, "step", _step)
        patches.wrap_method(pp.GatheredParameters, "__exit__", _changing_states)
        # All ways to set a parameter's optimizer states find them by this method.
        patches.wrap_method(DeepSpeedZeroOptimizer_Stage3, "_get_fp32_opt_state_partition", _changing_states)
        patches.set(zero, "MiCS_Init", MiCS_Init)
        # ``deepspeed`` has taken it from there if it is imported already, and takes ours if it is being imported.
        for module in (init_utils, sys.modules["deepspeed"]):
            if hasattr(module, "load_ds_config"):
                patches.wrap_method(module, "load_ds_config", _late(construct, "read_config"))
        checkpoint.install(
            patches,
            runs_mics=lambda engine: hasattr(engine.optimizer, "mics_groups"),
            save=_late("mics_ds.checkpoint.save", "save"),
            load=_late("mics_ds.checkpoint.load", "load"),
            before_stock_saves=_late("mics_ds.checkpoint.coordination", "drop_stale_manifest"),
            before_stock_loads=_late("mics_ds.checkpoint.coordination", "refuse_other_shard_count"),
        )
        if os.environ.get("MICS_DS_REPORT"):
            import_module("mics_ds.ab.recorder").record_engine(patches, DeepSpeedEngine)
        patches.pop_all()
    _installed = True


def _late(module: str, name: str) -> Callable[..., Any]:
    """Return a function that imports the one of that name when it is called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(module), name)(*args, **kwargs)

    return call


def _step(original: Any, engine: Any, *args: Any, **kwargs: Any) -> Any:
    """``engine.step()``: a check by the replica guard and copies in memory follow an optimizer step."""
    before = engine.global_steps
    replicas = getattr(engine, "mics_replicas", None)
    if replicas is not None:
        result = replicas.step(_changing_states, original, *args, **kwargs)
    else:
        result = _changing_states(original, engine, *args, **kwargs)
    if engine.global_steps > before:
        for follower in (getattr(engine.optimizer, "mics_guard", None), getattr(engine, "mics_memory", None)):
            if follower is not None:
                follower.step_ended(engine)
    return result


def _changing_states(original: Any, owner: Any, *args: Any, **kwargs: Any) -> Any:
    """Call what may change states: copies for an asynchronous save that are still under way come before it."""
    module = sys.modules.get("mics_ds.checkpoint.background")  # no save was asynchronous before that is imported
    if module is not None and module.Background.current is not None:
        module.Background.current.before_states_change()
    return original(owner, *args, **kwargs)


def MiCS_Init(*args: Any, **kwargs: Any) -> Any:  # noqa: N802 (the name old scripts use)
    """``deepspeed.zero.Init``, which does the right thing by itself. Kept for scripts written for in-tree MiCS."""
    import deepspeed

    return deepspeed.zero.Init(*args, **kwargs)
