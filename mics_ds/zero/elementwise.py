"""Optimizers that update each element by itself, so that it does not matter how tensors are cut."""

from __future__ import annotations

import inspect

import torch

from ..errors import MicsConfigError
from ..log import logger

_KNOWN: frozenset[str] = frozenset(
    f"{package}.{name}"
    for package, names in {
        "torch.optim": "SGD Adam AdamW Adamax NAdam RAdam RMSprop Rprop Adagrad Adadelta ASGD",
        "deepspeed.ops": "FusedAdam DeepSpeedCPUAdam DeepSpeedCPUAdagrad DeepSpeedCPULion FusedLion",
        "apex.optimizers": "FusedAdam FusedSGD FusedAdagrad",
        "lion_pytorch.lion_pytorch": "Lion",
        "transformers.optimization": "AdamW",
    }.items()
    for name in names.split()
)
_KNOWN_IN_JSON = ("adam", "adamw", "adagrad", "lion", "sgd")

PROMISE = "mics_elementwise"
"""Attribute by which a script vouches for an optimizer that is not in the list."""


def why_not(optimizer: torch.optim.Optimizer) -> str | None:
    """Return ``None`` if each element is updated by itself, or else why that is not known.

    Known are the optimizers of a list, their subclasses that do not replace ``step``, and those with
    ``mics_elementwise = True`` on the instance or the class.
    """
    if any(group.get("use_muon") for group in optimizer.param_groups):
        return "Muon makes each update of a whole matrix of gradients"  # in DeepSpeed's engine, before the step
    if getattr(optimizer, PROMISE, False):
        return None
    kind = type(optimizer)
    # torch wraps the step of each class of which there is an instance; schedulers that of the instance.
    step = inspect.unwrap(kind.step)
    if any(
        _name(base) in _KNOWN and inspect.unwrap(base.step) is step for base in kind.__mro__ if hasattr(base, "step")
    ):
        return None
    return f"{kind.__module__}.{kind.__qualname__} is not one of those that are known to"


def _name(kind: type) -> str:
    return f"{'.'.join(kind.__module__.split('.')[:2])}.{kind.__name__}"


def is_known_by_name(name: str) -> bool:
    """Return whether DeepSpeed builds an elementwise optimizer from this name in a JSON."""
    return name.lower() in _KNOWN_IN_JSON


def refuse_others(optimizer: torch.optim.Optimizer) -> None:
    """Refuse to give slices of parameters to an optimizer that needs more than slices.

    Raises:
        MicsConfigError: the optimizer is not known to be elementwise.
    """
    why = why_not(optimizer)
    if why is None:
        return
    raise MicsConfigError(
        f'zero_optimization.mics_optimizer_states "world" gives each rank a slice of every parameter, so it needs an '
        f"optimizer that updates every element by itself, like Adam or SGD, but {why}. "
        f'Use "partition", or another optimizer; or, if its step treats all elements alike and none by the others, say '
        f"so with optimizer.{PROMISE} = True."
    )


def warn_of_others(optimizer: torch.optim.Optimizer, shards: int, ranks: int) -> None:
    """Tell users of an optimizer that is not elementwise that its numbers will not be stock's."""
    why = why_not(optimizer)
    if why is not None:
        logger.warning(
            f"{type(optimizer).__name__}: stage 3 hands optimizers flat shards, and {why} update each element by "
            f"itself. What others compute depends on how tensors are cut, here into {shards} shards, in stock ZeRO-3 "
            f"into {ranks}, so losses will differ from stock's (LAMB and Adafactor: by 2e-4 to 8e-4 in five steps). "
            f"Neither is what the optimizer computes on whole tensors. If it is elementwise, say so with "
            f"optimizer.{PROMISE} = True."
        )
