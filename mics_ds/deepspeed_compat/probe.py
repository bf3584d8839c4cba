"""Probes of the installed DeepSpeed: its version, and every method that our classes replace.

The names are read off the classes themselves: methods marked with ``@override``, and the ``REPLACED`` methods of
strategies. So a method that a DeepSpeed has renamed is a refusal at start, and never an override that nobody calls.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator
from typing import Any

import deepspeed
from deepspeed.runtime.zero import partition_parameters as pp
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from ..errors import MicsCompatError
from .gradient_access import READERS, PassWatch
from .muon import MuonSharing
from .optimizer import MicsOptimizer
from .partitioner import MicsGatheredParameters, MicsParamManager, MicsPartitioner
from .same_order import SameOrder
from .slice_access import SliceAccess, SliceCheckpoints
from .support import MUON_FOLLOWS_GRADIENTS
from .world_states import WorldStates

TESTED_VERSIONS = ("0.19.8", "0.19.7", "0.19.6")
ALLOW_UNTESTED_ENV = "MICS_DS_ALLOW_UNTESTED"

SUBCLASSES: dict[type, type] = {
    MicsOptimizer: DeepSpeedZeroOptimizer_Stage3,
    MicsPartitioner: pp.Init,
    MicsGatheredParameters: pp.GatheredParameters,
    MicsParamManager: DeepSpeedZeRoOffload,
}
STRATEGIES: dict[Any, type] = {
    **dict.fromkeys((PassWatch, WorldStates, SliceAccess, SliceCheckpoints), DeepSpeedZeroOptimizer_Stage3),
    **({MuonSharing: DeepSpeedZeroOptimizer_Stage3} if MUON_FOLLOWS_GRADIENTS else {}),
    SameOrder: PartitionedParameterCoordinator,
}


def replaced_methods() -> Iterator[tuple[type, str, Any]]:
    """Yield a class of DeepSpeed, the name of a method that we replace, and ours, ``None`` where any call goes."""
    for ours, stock in SUBCLASSES.items():
        for name, method in vars(ours).items():
            if getattr(method, "__override__", False):
                yield stock, name, method
    for strategy, stock in STRATEGIES.items():
        for name in strategy.REPLACED:
            yield stock, name, getattr(strategy, name)
    for name in READERS:
        yield DeepSpeedZeroOptimizer_Stage3, name, None


def misfits() -> list[str]:
    """Return what of DeepSpeed is missing, or has parameters that our methods do not take."""
    found = []
    for stock, name, ours in replaced_methods():
        theirs = getattr(stock, name, None)
        if theirs is None:
            found.append(f"{stock.__name__}.{name}")
            continue
        untaken = [] if ours is None else sorted(_parameters(theirs) - _parameters(ours))
        if untaken and not _takes_any(ours):
            found.append(f"{stock.__name__}.{name} with parameters {', '.join(untaken)}")
    return list(dict.fromkeys(found))  # two strategies may replace one method


@functools.cache  # each engine of a process asks again
def _parameters(method: Any) -> set[str]:
    """Return the names of a method's parameters; of some of DeepSpeed's decorators hide them."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(inspect.unwrap(method)).parameters.values()
    return {item.name for item in parameters if item.kind not in variadic} - {"self"}


def _takes_any(method: Any) -> bool:
    return any(item.kind is inspect.Parameter.VAR_KEYWORD for item in inspect.signature(method).parameters.values())


def check_deepspeed() -> None:
    """Refuse a DeepSpeed that would misbehave under us. Called only when MiCS is asked for.

    Raises:
        MicsCompatError: a method that we replace is missing or another, or the version is not among those tested and
            ``MICS_DS_ALLOW_UNTESTED=1`` is not set.
    """
    missing = misfits()
    if missing:
        raise MicsCompatError(
            f"mics_ds needs parts of DeepSpeed that {deepspeed.__version__} does not have: {', '.join(missing)}. "
            f"Install deepspeed=={TESTED_VERSIONS[0]}, or remove the mics_ keys to run stock ZeRO-3."
        )
    if untested_version() is not None and os.environ.get(ALLOW_UNTESTED_ENV) != "1":
        raise MicsCompatError(
            f"mics_ds was tested with DeepSpeed {', '.join(TESTED_VERSIONS)}, but this is {deepspeed.__version__}. "
            f"Install a tested version. To know whether yours works, run `-m mics_ds check` under your "
            f"launcher; if it passes, set {ALLOW_UNTESTED_ENV}=1 on all ranks (docs/versions.md)."
        )


def untested_version() -> str | None:
    """Return the installed version of DeepSpeed, if mics_ds was not tested with it."""
    return None if deepspeed.__version__.split("+")[0] in TESTED_VERSIONS else deepspeed.__version__
