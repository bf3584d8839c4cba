"""Replacements of DeepSpeed's constructors: each asks whether the configuration at hand has ``mics_`` keys."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partition_parameters as pp
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from ..comm import agreement, collectives
from ..comm.layout import Ranks
from ..comm.rank_group import RankGroup
from ..config import MicsConfig, with_choice
from ..deepspeed_compat import ds_config as ds_configs
from ..deepspeed_compat import engine as engines
from ..deepspeed_compat import support
from ..deepspeed_compat.optimizer import MicsOptimizer
from ..deepspeed_compat.partitioner import MicsGatheredParameters, MicsParamManager, MicsPartitioner
from ..deepspeed_compat.probe import check_deepspeed
from ..zero.elementwise import is_known_by_name, why_not
from .context import Build, Request, compare, current_build, read_request


def read_config(original: Any, config: Any) -> Any:
    """``deepspeed.initialize`` reads its file before anything else is known, the ranks that take part among it."""
    with agreement.failing_together():
        return original(config)


def parse_config(original: Any, self: Any, config: Any, mpu: Any = None, *args: Any, **kwargs: Any) -> None:
    """``DeepSpeedConfig(config)``: hide our keys from DeepSpeed, and keep what they ask for."""
    outer = current_build()
    among = engines.participants(mpu)
    self.mics_request = asked = read_request(config, among) if outer is None else outer.request
    with agreement.failing_together(among):
        original(self, config if asked.rest is None else asked.rest, mpu, *args, **kwargs)
        if asked.mics is not None:
            check_deepspeed()
            support.refuse_unsupported(self, asked.mics)
            support.supersede(self)


def build_engine(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """``DeepSpeedEngine(...)``: its construction starts with collectives, so compare statements first."""
    call = inspect.signature(original).bind(self, *args, **kwargs)
    given = call.arguments
    asked = getattr(given.get("config_class"), "mics_request", Request())
    among = engines.participants(given.get("mpu"))
    compare(asked, among)
    if asked.mics is not None and asked.mics.is_undecided:
        asked, given["config"] = _resolve_auto(asked, asked.mics, given, among)
    # The next round is taken in there. Ranks that run stock ZeRO-3 have no other rank that waits for them.
    together = nullcontext() if asked.mics is None else agreement.failing_together(among)
    with together, Build(asked, among, given.get("model")).active():
        original(*call.args, **call.kwargs)
    if asked.mics is not None and isinstance(self.optimizer, MicsOptimizer):
        _equip(self, asked.mics)


def _equip(engine: Any, mics: Any) -> None:
    """Give a finished engine what works beside its optimizer."""
    groups = engine.optimizer.mics_groups
    engines.count_ranks(engine, groups.full.size)
    collectives.observer = engines.log_collective
    if engine.optimizer.world_states is not None:
        engines.keep_timer_from_waiting(engine)
    if mics.guard is not None and mics.guard.every:
        from ..guard.watch import Guard

        engine.optimizer.mics_guard = Guard(mics.guard, groups)
    if mics.checkpoint is not None and mics.checkpoint.memory_every:
        from ..checkpoint.memory import MemoryTier

        engine.mics_memory = MemoryTier(mics.checkpoint, groups, engine)
    if mics.replicas is not None:
        from ..replicas.engine import Replicas

        engine.mics_replicas = Replicas(engine, engine.optimizer.replication)


def _resolve_auto(
    asked: Request, mics: MicsConfig, arguments: Mapping[str, Any], among: Ranks | None
) -> tuple[Request, dict[str, Any]]:
    """Choose what is left to the planner, for an engine that is about to be built. Collective over its ranks.

    Returns:
        The request and the configuration with the choice, for the engine to hand on. The caller's own is left alone:
        it may be used for another model next.

    Raises:
        MicsError: no size could be chosen, the same on every rank.
    """
    from ..planner import auto

    engines.ensure_distributed()
    with agreement.failing_together(among):
        ds_config = ds_configs.load_ds_config(arguments.get("config"))
        assert ds_config is not None, "who asks for auto has a configuration"
        if mics.optimizer_states == "auto" and not _may_slice(arguments):
            mics = replace(mics, optimizer_states="partition")
        facts = auto.facts_of(arguments, dist.get_rank())
        model = auto.describe(arguments["model"], facts, mics.plan)
    group: Any = dist.group.WORLD if among is None else engines.data_parallel_group(arguments.get("mpu"))
    choice = auto.choose(mics, facts, model, RankGroup.of(group))
    chosen: Any = {"shard_size": choice.p, "optimizer_states": choice.states, "replica_wire": choice.wire}
    return asked._replace(keys=replace(mics, **chosen)), with_choice(ds_config, *choice)


def _may_slice(arguments: Mapping[str, Any]) -> bool:
    """Return whether an engine's optimizer may be given slices of parameters."""
    if support.swaps(arguments["config_class"]):
        return False
    optimizer = arguments.get("optimizer")
    if optimizer is None:
        return is_known_by_name(str(arguments["config_class"].optimizer_name or "adam"))
    return isinstance(optimizer, torch.optim.Optimizer) and why_not(optimizer) is None


def make_partitioner(arguments: Mapping[str, Any]) -> Any:
    """``zero.Init(...)``: one of ours if its configuration, or the engine it is built in, asks for MiCS."""
    if current_build() is not None:
        return _make(pp.Init, MicsPartitioner)
    given = [arguments.get(name) for name in ("config_dict_or_path", "config")]
    if given == [None, None]:
        return object.__new__(pp.Init)  # MicsParamManager finds these parameters later, if they are to be ours
    group = arguments.get("data_parallel_group") or arguments.get("sequence_data_parallel_group")
    among = None if group is None else engines.participants(arguments.get("mpu"), group)  # the world, whatever the mpu
    asked = read_request(given[1] if given[0] is None else given[0], among)
    if asked.mics is not None:
        with agreement.failing_together(among):
            check_deepspeed()
        if not asked.mics.is_auto:
            with Build(asked, among).active():
                return _make(pp.Init, MicsPartitioner)  # compares when it builds its groups
        # Nobody knows the whole model yet. Over all ranks its parameters fit if they ever do, and when the
        # engine is built and the size is chosen, they are partitioned anew one by one.
    if asked.keys is not None:
        engines.ensure_distributed()
    compare(asked, among)
    return object.__new__(pp.Init)


def make_param_manager(_: Mapping[str, Any]) -> Any:
    """``DeepSpeedZeRoOffload(...)``."""
    return _make(DeepSpeedZeRoOffload, MicsParamManager)


def make_optimizer(_: Mapping[str, Any]) -> Any:
    """``DeepSpeedZeroOptimizer_Stage3(...)``."""
    return _make(DeepSpeedZeroOptimizer_Stage3, MicsOptimizer)


def make_gathered_parameters(_: Mapping[str, Any]) -> Any:
    """``GatheredParameters(...)``: ours once the process has parameters of ours."""
    return object.__new__(MicsGatheredParameters if MicsPartitioner.constructed else pp.GatheredParameters)


def _make(stock: type, ours: type) -> Any:
    """Return an instance of ``ours`` where what is under construction asks for MiCS, else of ``stock``."""
    build = current_build()
    if build is None or build.request.mics is None:
        return object.__new__(stock)
    instance: Any = object.__new__(ours)
    instance.mics_build = build
    return instance
