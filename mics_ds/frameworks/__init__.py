"""Frameworks that keep states of their own beside an engine's, and what MiCS does for each of them.

A framework is noticed when it is imported. The module for it here is imported when it trains with a ``mics_checkpoint``
section in its DeepSpeed JSON; without one it does what it always does.
"""

from __future__ import annotations

import functools

from ..plugin.import_hook import after_import

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any


def arm() -> None:
    """Hook into the frameworks that are imported, now or later. Calling it again does nothing."""
    for name, hook in _HOOKS.items():
        after_import(name, hook)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Have ``wrapper(original, self, ...)`` called in place of a method, once. What is missing is left alone."""
    original = getattr(owner, name, None)
    if original is None or hasattr(original, "mics_wraps"):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    method.mics_wraps = original  # type: ignore[attr-defined]
    setattr(owner, name, method)


def _is_asked_for(ds_config: Any) -> bool:
    """Return whether a parsed configuration says something of checkpoints to MiCS."""
    zero: Any = ds_config.get("zero_optimization") if hasattr(ds_config, "get") else None
    return hasattr(zero, "keys") and "mics_checkpoint" in zero


def _hook_hf_trainer(module: ModuleType) -> None:
    def train(original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
        plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
        if plugin is None or not _is_asked_for(getattr(plugin.hf_ds_config, "config", None)):
            return original(trainer, *args, **kwargs)
        from . import hf_trainer

        return hf_trainer.train(original, trainer, *args, **kwargs)

    _wrap(getattr(module, "Trainer", None), "train", train)


def _hook_lightning(module: ModuleType) -> None:
    def setup(original: Callable[..., Any], strategy: Any, trainer: Any) -> None:
        original(strategy, trainer)
        if hasattr(strategy.model, "mics_memory"):
            from . import lightning

            lightning.keep_in_memory(trainer, strategy.model)

    def remove_checkpoint(original: Callable[..., Any], strategy: Any, path: Any) -> None:
        if hasattr(getattr(strategy.model, "optimizer", None), "mics_groups"):
            from .deletions import may_delete

            if not may_delete(path):
                return
        original(strategy, path)

    _wrap(getattr(module, "DeepSpeedStrategy", None), "setup", setup)
    _wrap(getattr(module, "DeepSpeedStrategy", None), "remove_checkpoint", remove_checkpoint)


_HOOKS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.trainer": _hook_hf_trainer,
    "lightning.pytorch.strategies.deepspeed": _hook_lightning,
    "pytorch_lightning.strategies.deepspeed": _hook_lightning,
}
