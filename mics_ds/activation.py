"""Switching MiCS on from the DeepSpeed JSON, without a change to anybody's script.

``import mics_ds`` arms this module, and so does ``import torch`` where the package is installed (the
``torch.backends`` entry point). It waits until ``deepspeed.runtime.engine`` has been imported, or acts
at once if it has been; then every construction of a DeepSpeed configuration, partitioner, parameter
manager or stage 3 optimizer first asks whether the configuration at hand has a ``mics_shard_size``.

Only the standard library is imported here: this runs at the end of ``import torch``, possibly in the
middle of ``import deepspeed``.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

# Importing it imports all the modules with classes we replace; its end is the earliest safe moment.
_TRIGGER = "deepspeed.runtime.engine"


def arm() -> None:
    """Install into DeepSpeed now, or as soon as it is imported. Calling it again does nothing."""
    module = sys.modules.get(_TRIGGER)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        _install_or_warn()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself; gives the trigger module's own loader something to do afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TRIGGER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _install_or_warn()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _install_or_warn() -> None:
    """A DeepSpeed with other modules than we know must stay usable for those who do not use MiCS."""
    try:
        install()
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"mics_ds could not hook into this DeepSpeed, so mics_ keys will not work: {error!r}. Install a version "
            f"that mics_ds was tested with (see its README).",
            stacklevel=2,
        )


class Request(NamedTuple):
    """What a DeepSpeed configuration asks of MiCS."""

    state: str
    """One of the states of :mod:`mics_ds.agreement`: on, disabled, off."""
    mics: Any
    """The :class:`mics_ds.config.MicsConfig` when on or disabled."""
    rest: dict[str, Any] | None
    """The configuration without our keys, if it had any."""


def read_request(ds_config: Any) -> Request:
    """Parse the MiCS part of a configuration in any form DeepSpeed takes.

    Raises:
        MicsConfigError: the keys are wrong. The other ranks are told before it is raised.
    """
    from . import agreement, compat
    from .config import DISABLE_ENV, disabled_by_environment, split_ds_config
    from .errors import MicsConfigError
    from .log import log_rank0

    try:
        param_dict = compat.load_ds_config(ds_config)
        if param_dict is None:
            return Request(agreement.OFF, None, None)
        mics, rest = split_ds_config(param_dict)
        if mics is None:
            return Request(agreement.OFF, None, rest)
        if disabled_by_environment():
            if not _Said.disabled:
                _Said.disabled = True
                log_rank0(f"{DISABLE_ENV} is set: mics_ keys are ignored and this is stock ZeRO-3 over all ranks.")
            return Request(agreement.DISABLED, mics, rest)
        return Request(agreement.ON, mics, rest)
    except MicsConfigError as error:
        _tell_others(error)
        raise


class _Said:
    """What was logged already in this process."""

    disabled = False


def _compare(request: Request) -> None:
    """Check with the other ranks that they have the same request. Ranks without the key only report that.

    Raises:
        MicsAgreementError: they have not.
    """
    from . import agreement

    if request.state == agreement.OFF:
        # Ranks whose file has the key must not wait for one whose file lacks it.
        agreement.post({agreement.STATE: agreement.OFF})
    else:
        payload = {agreement.STATE: request.state, agreement.CONFIG: request.mics.to_json()}
        agreement.require_same(agreement.exchange(payload))


def _resolve_auto(request: Request, engine_arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the partition size for the model of an engine that is about to be built. Collective over the world.

    Returns:
        The configuration with that size, for the engine to hand on. The caller's own is left alone: it may be used
        for another model next.

    Raises:
        MicsError: no size could be chosen, the same on every rank.
    """
    import torch.distributed as dist

    from . import compat
    from .config import with_shard_size
    from .planner import auto

    compat.ensure_distributed()
    try:
        ds_config = compat.load_ds_config(engine_arguments.get("config"))
        assert ds_config is not None, "whoever asked for auto has a configuration"
        facts = compat.plan_facts(engine_arguments)
        model = auto.describe(engine_arguments["model"], facts, request.mics.plan)
    except Exception as error:  # whatever it is, the others wait for this rank's facts
        _tell_others(error)
        raise
    return with_shard_size(ds_config, auto.choose_partition_size(request.mics, facts, model, dist.get_rank()))


def _tell_others(error: Exception) -> None:
    from . import agreement

    agreement.post({agreement.STATE: agreement.ERROR, "message": str(error)})


def install() -> None:
    """Patch the imported DeepSpeed. Idempotent. Nothing behaves differently without a ``mics_`` key."""
    import deepspeed.runtime.zero as zero

    from . import agreement, checkpointing, collectives, compat, report
    from .errors import MicsError
    from .optimizer import MicsOptimizer
    from .partitioner import MicsGatheredParameters, MicsParamManager, MicsPartitioner

    def parse_config(original: Any, self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        self.mics_request = request = read_request(config)
        original(self, config if request.rest is None else request.rest, *args, **kwargs)
        if request.state == agreement.ON:
            try:
                compat.check_deepspeed()
                compat.refuse_unsupported(self)
            except MicsError as error:
                _tell_others(error)
                raise

    def build_engine(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        # Building an engine starts with collectives, so this is the last moment to compare notes.
        request = getattr(kwargs.get("config_class"), "mics_request", Request(agreement.OFF, None, None))
        _compare(request)
        if request.state == agreement.ON and request.mics.is_auto:
            kwargs["config"] = _resolve_auto(request, kwargs)
        original(self, *args, **kwargs)

    def choose_partitioner(cls: type, arguments: Mapping[str, Any]) -> type:
        ds_config = compat.config_argument(arguments)
        if ds_config is None:
            return cls  # whoever wants MiCS finds these parameters later, see MicsParamManager
        request = read_request(ds_config)
        if request.state == agreement.ON:
            compat.check_deepspeed()
            if not request.mics.is_auto:
                return MicsPartitioner  # compares when it builds its groups
            # Nobody knows the whole model yet. Over all ranks its parameters fit if they ever do, and when the
            # engine is built and the size is chosen, they are partitioned anew one by one.
            compat.ensure_distributed()
        if request.state == agreement.DISABLED:
            compat.ensure_distributed()
        _compare(request)
        return cls

    def choose(replacement: type) -> Any:
        def choose_class(cls: type, arguments: Mapping[str, Any]) -> type:
            return replacement if read_request(compat.config_argument(arguments)).state == agreement.ON else cls

        return choose_class

    compat.replace_method(compat.DeepSpeedEngine, "__init__", build_engine)
    compat.replace_method(compat.DeepSpeedConfig, "__init__", parse_config)
    compat.replace_new(compat.pp.Init, choose_partitioner)
    compat.replace_new(compat.DeepSpeedZeRoOffload, choose(MicsParamManager))
    compat.replace_new(compat.DeepSpeedZeroOptimizer_Stage3, choose(MicsOptimizer))
    compat.replace_new(
        compat.GatheredParameters, lambda cls, _: MicsGatheredParameters if MicsPartitioner.constructed else cls
    )
    if compat.log_stage not in collectives.observers:
        collectives.observers.append(compat.log_stage)
    report.record_engine(compat.DeepSpeedEngine)
    compat.install_checkpoints(
        lambda engine: isinstance(engine.optimizer, MicsOptimizer),
        checkpointing.save,
        checkpointing.load,
        checkpointing.save_stock,
        checkpointing.load_stock,
    )
    zero.MiCS_Init = MiCS_Init


def MiCS_Init(*args: Any, **kwargs: Any) -> Any:  # noqa: N802 (the name old scripts use)
    """``deepspeed.zero.Init``, which does the right thing by itself. Kept for scripts written for in-tree MiCS."""
    import deepspeed

    return deepspeed.zero.Init(*args, **kwargs)
