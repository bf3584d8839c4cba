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
from typing import TYPE_CHECKING, Any

from . import frameworks

if TYPE_CHECKING:
    from .request import Build, Request
    from .seams.patch import Patches

# Importing it imports all the modules with classes we replace; its end is the earliest safe moment.
_TRIGGER = "deepspeed.runtime.engine"
_OURS = __package__ + "."


class _Installation:
    """How far this process is."""

    due = False
    """DeepSpeed was imported, but modules of ours were in the middle of their own import."""
    done = False


def arm() -> None:
    """Install into DeepSpeed now, or as soon as it is imported. Calling it again does nothing."""
    frameworks.arm()
    module = sys.modules.get(_TRIGGER)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        _install_or_warn()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself; notices when DeepSpeed, and what we import ourselves, is there.

    Whoever imports ``mics_ds.optimizer`` first imports DeepSpeed from the middle of it. Installing needs that very
    module whole, so it waits for the end of the outermost of our own imports.
    """

    def __init__(self) -> None:
        self._own_imports = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if _Installation.done or not (fullname == _TRIGGER or fullname.startswith(_OURS)):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute, own = spec.loader.exec_module, fullname != _TRIGGER

        def exec_module(module: ModuleType) -> None:
            self._own_imports += own
            try:
                execute(module)
            finally:
                self._own_imports -= own
            _Installation.due |= not own
            if _Installation.due and not self._own_imports:
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
            f"that mics_ds was tested with (see docs/versions.md).",
            stacklevel=2,
        )


def install() -> None:
    """Patch the imported DeepSpeed. Idempotent. Nothing behaves differently without a ``mics_`` key.

    Raises:
        ImportError, AttributeError: this DeepSpeed lacks something. Nothing was patched then.
    """
    if _Installation.done:
        return
    _Installation.done = True  # before our own imports, which must not come back here
    try:
        from .seams.patch import Patches

        with Patches() as patches:
            _patch_construction(patches)
            _patch_checkpoints(patches)
    except BaseException:
        _Installation.done = False
        raise


def _patch_construction(patches: Patches) -> None:
    """Have configurations parsed with our keys, and our subclasses built where they ask for them."""
    import deepspeed.runtime.zero as zero
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import partition_parameters as pp
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    from .ab import recorder
    from .comm import collectives
    from .optimizer import MicsOptimizer
    from .partitioner import MicsGatheredParameters, MicsParamManager, MicsPartitioner
    from .seams import ds_config, engine

    def gathered_parameters(_: Mapping[str, Any]) -> Any:
        return object.__new__(MicsGatheredParameters if MicsPartitioner.constructed else pp.GatheredParameters)

    patches.wrap_method(DeepSpeedEngine, "__init__", _build_engine)
    patches.wrap_method(DeepSpeedConfig, "__init__", _parse_config)
    patches.make_instances(pp.Init, _make_partitioner)
    patches.make_instances(DeepSpeedZeRoOffload, _maker(DeepSpeedZeRoOffload, MicsParamManager))
    patches.make_instances(DeepSpeedZeroOptimizer_Stage3, _maker(DeepSpeedZeroOptimizer_Stage3, MicsOptimizer))
    patches.make_instances(pp.GatheredParameters, gathered_parameters)
    patches.set(zero, "MiCS_Init", MiCS_Init)
    for module in ds_config.readers():
        patches.set(module, "load_ds_config", _reading(module.load_ds_config))
    recorder.record_engine(patches, DeepSpeedEngine)
    engine.after_each_step(patches, DeepSpeedEngine, _after_step)
    if engine.log_stage not in collectives.observers:
        collectives.observers.append(engine.log_stage)


def _patch_checkpoints(patches: Patches) -> None:
    from .checkpoint import stock
    from .checkpoint.load import load
    from .checkpoint.save import save
    from .optimizer import MicsOptimizer
    from .seams import checkpoint

    checkpoint.install(
        patches,
        runs_mics=lambda engine: isinstance(engine.optimizer, MicsOptimizer),
        save=save,
        load=load,
        before_stock_saves=stock.drop_stale_manifest,
        before_stock_loads=stock.refuse_other_shard_count,
    )


# --------------------------------------------------------------------------------------------------
# In place of DeepSpeed's constructors


def _reading(original: Any) -> Any:
    """``deepspeed.initialize`` reads its file before anything else is known, the ranks that take part among it."""

    def load_ds_config(config: Any) -> Any:
        from .comm import agreement
        from .seams.ds_config import naming_missing_file

        with agreement.failing_together(), naming_missing_file(config):
            parsed = original(config)
            if not isinstance(parsed, Mapping):  # some paths are base64 of "null"
                raise ValueError(f"a configuration is a section of keys, got {parsed!r}")
            return parsed

    return load_ds_config


def _parse_config(original: Any, self: Any, config: Any, mpu: Any = None, *args: Any, **kwargs: Any) -> None:
    """``DeepSpeedConfig(config)``: hide our keys from DeepSpeed, and keep what they ask for."""
    from . import request, swap_folders
    from .comm import agreement
    from .seams import ds_config, engine, support

    outer = request.current_build()
    among = engine.participants(mpu)
    self.mics_request = asked = request.read_request(config, among) if outer is None else outer.request
    with agreement.failing_together(among), ds_config.naming_missing_file(config):
        original(self, config if asked.rest is None else asked.rest, mpu, *args, **kwargs)
        if asked.is_on and asked.mics is not None:
            support.check_deepspeed()
            support.refuse_unsupported(self, asked.mics)
            support.supersede(self)
            ds_config.swap_to_own_folders(self, swap_folders.new_folder)


def _build_engine(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """``DeepSpeedEngine(...)``: its construction starts with collectives, so compare notes first."""
    from contextlib import nullcontext

    from . import request
    from .comm import agreement
    from .seams import engine, support

    asked = getattr(kwargs.get("config_class"), "mics_request", request.OFF)
    among = engine.participants(kwargs.get("mpu"))
    request.compare(asked, among)
    if asked.is_undecided:
        asked, kwargs["config"] = _resolve_auto(asked, kwargs, among)
    # The next round is taken in there. Ranks that run stock ZeRO-3 have nobody who waits for them.
    together = agreement.failing_together(among) if asked.is_on else nullcontext()
    with together, request.building(request.Build(asked, among)):
        if asked.is_on and kwargs.get("model") is not None:
            support.refuse_native_moe(kwargs["model"])
            support.refuse_unpartitionable(kwargs["model"].named_parameters())
        original(self, *args, **kwargs)
    optimizer = getattr(self, "optimizer", None)
    groups, guard = getattr(optimizer, "mics_groups", None), getattr(optimizer, "mics_guard", None)
    if groups is not None:
        engine.count_ranks(self, groups.full.size)
    if guard is not None:
        guard.watch(self)
    if asked.mics is not None and asked.mics.checkpoint is not None and asked.mics.checkpoint.memory_every:
        _keep_in_memory(self, asked.mics.checkpoint)


def _keep_in_memory(engine: Any, asked: Any) -> None:
    from .checkpoint.snapshot import MemoryTier
    from .optimizer import MicsOptimizer

    if isinstance(engine.optimizer, MicsOptimizer):
        engine.mics_memory = MemoryTier(asked, engine.optimizer.mics_groups)


def _after_step(engine: Any) -> None:
    tier = getattr(engine, "mics_memory", None)
    if tier is not None:
        tier.step_ended(engine)


def _resolve_auto(
    asked: Request, engine_arguments: Mapping[str, Any], among: tuple[int, ...] | None
) -> tuple[Request, dict[str, Any]]:
    """Choose what is left to the planner, for an engine that is about to be built. Collective over its ranks.

    Returns:
        The request and the configuration with the choice, for the engine to hand on. The caller's own is left alone:
        it may be used for another model next.

    Raises:
        MicsError: no size could be chosen, the same on every rank.
    """
    from dataclasses import replace

    import torch.distributed as dist

    from .comm import agreement
    from .config import with_choice
    from .planner import auto
    from .seams.ds_config import load_ds_config
    from .seams.engine import engine_facts, ensure_distributed

    ensure_distributed()
    mics = asked.mics
    assert mics is not None, "whoever asked for auto has a configuration"
    with agreement.failing_together(among):
        ds_config = load_ds_config(engine_arguments.get("config"))
        assert ds_config is not None, "whoever asked for auto has a configuration"
        if mics.optimizer_states == "auto" and not _may_slice(engine_arguments):
            mics = replace(mics, optimizer_states="partition")
        facts = auto.facts_from(engine_facts(engine_arguments), dist.get_rank())
        model = auto.describe(engine_arguments["model"], facts, mics.plan)
    choice = auto.choose(mics, facts, model, dist.get_rank(), among)
    chosen: Any = {"shard_size": choice.p, "optimizer_states": choice.states}
    return asked._replace(mics=replace(mics, **chosen)), with_choice(ds_config, *choice)


def _may_slice(engine_arguments: Mapping[str, Any]) -> bool:
    """Whether the engine's optimizer may be given slices of parameters."""
    import torch

    from .elementwise import is_known_by_name, why_not
    from .seams import support

    if support.swaps(engine_arguments["config_class"]):
        return False
    optimizer = engine_arguments.get("optimizer")
    if optimizer is None:
        return is_known_by_name(str(engine_arguments["config_class"].optimizer_name or "adam"))
    return isinstance(optimizer, torch.optim.Optimizer) and why_not(optimizer) is None


def _make_partitioner(arguments: Mapping[str, Any]) -> Any:
    """``zero.Init(...)``: one of ours if its configuration, or the engine it is built in, asks for MiCS."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero import partition_parameters as pp

    from . import request
    from .comm import agreement
    from .partitioner import MicsPartitioner
    from .seams import support
    from .seams.ds_config import config_argument, is_readable
    from .seams.engine import ensure_distributed, participants

    build = request.current_build()
    if build is not None:
        return _with_build(MicsPartitioner, build) if build.request.is_on else object.__new__(pp.Init)
    ds_config = config_argument(arguments)
    if ds_config is None:
        return object.__new__(pp.Init)  # whoever wants MiCS finds these parameters later, see MicsParamManager
    group = arguments.get("data_parallel_group") or arguments.get("sequence_data_parallel_group")
    among = None if group is None else participants(arguments.get("mpu"), group)  # over the world, whatever the mpu
    if not is_readable(ds_config):
        DeepSpeedConfig(ds_config, arguments.get("mpu"))  # DeepSpeed's own complaint, of which the others are told
    asked = request.read_request(ds_config, among)
    if asked.is_on:
        with agreement.failing_together(among):
            support.check_deepspeed()
        if not asked.is_auto:
            return _with_build(MicsPartitioner, request.Build(asked, among))  # compares when it builds its groups
        # Nobody knows the whole model yet. Over all ranks its parameters fit if they ever do, and when the
        # engine is built and the size is chosen, they are partitioned anew one by one.
    if asked.mics is not None:
        ensure_distributed()
    request.compare(asked, among)
    return object.__new__(pp.Init)


def _maker(stock: type, ours: type) -> Any:
    """Makes an instance of ``ours`` where the engine under construction asks for MiCS, else of ``stock``."""

    def make(arguments: Mapping[str, Any]) -> Any:
        from . import request
        from .seams.ds_config import config_argument

        build = request.current_build()
        if build is None:  # constructed by hand
            build = request.Build(request.read_request(config_argument(arguments)))
        return _with_build(ours, build) if build.request.is_on else object.__new__(stock)

    return make


def _with_build(cls: type, build: Build) -> Any:
    instance: Any = object.__new__(cls)
    instance.mics_build = build
    return instance


def MiCS_Init(*args: Any, **kwargs: Any) -> Any:  # noqa: N802 (the name old scripts use)
    """``deepspeed.zero.Init``, which does the right thing by itself. Kept for scripts written for in-tree MiCS."""
    import deepspeed

    return deepspeed.zero.Init(*args, **kwargs)
