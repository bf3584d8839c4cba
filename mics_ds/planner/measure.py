"""Ways of gathers and of hop 1, by measurement: what ``"auto"`` means where two stages or two methods are possible.

Two stages send fewer bytes over the network, in more collectives. Which way is faster depends on the network, on the
backend and on sizes. So when an engine is built, ranks look for the answer in this order:

| where                                | what it is                                                                  |
|--------------------------------------|-----------------------------------------------------------------------------|
| the profile of ``mics_plan.cluster`` | measured by ``mics-ds calibrate``; it leaves the method to the rule         |
| this process, and the cache          | the ways of an earlier engine with the same collectives on the same ranks   |
| two seconds of measurement           | collectives of this model's sizes, each way, on its own groups, all at once |

All ranks take the same way, because they decide by numbers that an all-reduce has made the same.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..comm import agreement, collectives
from ..comm.async_exec import Handle
from ..comm.groups import MicsGroups
from ..comm.job import current_job
from ..comm.packing import ChunkLayout
from ..comm.rank_group import Ways
from ..deepspeed_compat.engine import communication_device
from ..errors import MicsError, MicsPlanError
from ..files import write_text
from ..log import log_rank0, logger
from .machine import GroupForm
from .presets import load_machine
from .race import SMALLEST, Clock, Race, Shape, hold
from .workload import ZeroSettings

SECONDS_ENV = "MICS_DS_MEASURE_SECONDS"
"""Seconds that measurement may take; 0 leaves the choice to the rule."""
DEFAULT_S = 2.0
MARGIN = 0.07
"""Another way than that of the rule has to be faster by this fraction."""
AT_ONCE = 2
"""Collectives of one kind under way at a time, as in training, which gathers ahead and reduces behind."""
SPARE = 0.2
"""Part of the time that is not planned for, because work may take longer than foretold."""
SHAPES = 3
_FORMAT = 2


@dataclass(frozen=True)
class Demand:
    """Collectives that a model asks for in one pass."""

    gathers: tuple[Shape, ...]
    scatters: tuple[Shape, ...]
    dtype: torch.dtype


def demand_of(module: nn.Module, ds_config: Mapping[str, Any] | None, groups: MicsGroups) -> Demand:
    """Return what a model asks for: a gather for each submodule with parameters, and hop 1 of full buckets.

    Args:
        ds_config: the DeepSpeed JSON, for the limits that decide sizes.
    """
    settings = _settings(ds_config)
    params: list[Any] = list(module.parameters())
    trained = [param for param in params if param.requires_grad]
    dtype = next((param.dtype for param in trained or params), torch.float32)
    least = settings.param_persistence_threshold  # smaller ones stay gathered
    owned = (
        [_numel(param) for param in part.parameters(recurse=False) if _numel(param) > least]
        for part in module.modules()
    )
    total = sum(map(_numel, trained))
    bucket = min(int(settings.reduce_bucket_size), total)
    if groups.replication is not None and settings.overlap_comm:
        bucket = min(bucket, groups.sizes.bucket_limit(total, dtype.itemsize))
    scatters = (Shape(bucket * dtype.itemsize, math.ceil(total / bucket)),) if bucket else ()
    return Demand(_shapes(sum(numels) * dtype.itemsize for numels in owned if numels), scatters, dtype)


def _settings(ds_config: Mapping[str, Any] | None) -> ZeroSettings:
    zero = (ds_config or {}).get("zero_optimization")
    try:
        return ZeroSettings.from_ds(zero if isinstance(zero, Mapping) else {})
    except MicsPlanError:  # values that DeepSpeed can read, but the planner cannot
        return ZeroSettings()


def _numel(param: Any) -> int:
    return int(getattr(param, "ds_numel", param.numel()))


def _shapes(sizes: Iterable[int]) -> tuple[Shape, ...]:
    """Put sizes together to at most :data:`SHAPES`, each with about the same bytes in all."""
    ordered = sorted(sizes)
    shapes: list[Shape] = []
    start, total, passed = 0, sum(ordered), 0
    for index, size in enumerate(ordered, 1):
        passed += size
        if passed * SHAPES >= total * (len(shapes) + 1):
            part = ordered[start:index]
            shapes.append(Shape(sum(part) // len(part), len(part)))
            start = index
    return tuple(shapes)


# --------------------------------------------------------------------------------------------------
# The choice


def choose_ways(groups: MicsGroups, demand: Demand) -> MicsGroups:
    """Return the groups with the fastest ways. Collective over :attr:`MicsGroups.full`."""
    if len(groups.choices) == 1:
        return groups
    cache = Cache(groups, demand)
    profiled, kept, budget_s = _agree(groups, demand, _by_profile(groups, demand), cache.read())
    if budget_s == 0:
        ways, why = groups.ways, "not measured"
    elif profiled is not None:
        ways, why = profiled, "by the profile"
    elif kept is not None:
        ways, why = kept, "as measured before"
        cache.write(ways)
    else:
        clock, seconds = measure(groups, demand, budget_s)
        ways = fastest(groups.choices, seconds)
        figures = describe(seconds) if seconds else "too slow to be measured, so by the fewest bytes"
        why = f"measured in {clock.elapsed:.2f} s: {figures}"
        cache.write(ways)
    if current_job().is_news((groups.layout, demand, ways)):
        log_rank0(f"MiCS gathers parameters {ways.gather} and reduces gradients {ways.scatter} ({why})")
    return replace(groups, ways=ways)


def _agree(
    groups: MicsGroups, demand: Demand, profiled: Ways | None, kept: Ways | None
) -> tuple[Ways | None, Ways | None, float]:
    """Return what some rank has found, the same on all ranks, and the seconds that measurement may take.

    These are 0 where ranks have different models: measurement would hang, and DeepSpeed has a better error.
    """
    choices = (None, *groups.choices)
    asked = int(agreement.digest(repr(demand))[:14], 16)
    mine = [choices.index(profiled), choices.index(kept), round(1e3 * _budget_s()), asked, -asked]
    tensor = torch.tensor(mine, device=communication_device())
    collectives.max_over_(tensor, groups.full, "measurement of collectives")
    by_profile, by_cache, milliseconds, most, negated_least = tensor.tolist()
    return choices[by_profile], choices[by_cache], milliseconds / 1e3 if most == -negated_least else 0.0


def _budget_s() -> float:
    given = os.environ.get(SECONDS_ENV, str(DEFAULT_S))
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        logger.warning("%s must be a number of seconds, got %r. %g is taken.", SECONDS_ENV, given, DEFAULT_S)
        return DEFAULT_S
    return seconds


Seconds = Mapping[str, float]
"""Seconds of one pass over the model, for each way of gathers (:attr:`Ways.gather`) and of hop 1."""


def fastest(choices: Sequence[Ways], seconds: Seconds) -> Ways:
    """Return the fastest way. The first choice is the rule, and the others have to be faster by :data:`MARGIN`."""

    def cost(ways: Ways) -> float:
        handicaps = (1 + MARGIN * (way != by_rule) for way, by_rule in zip(_names(ways), _names(choices[0])))
        return sum(seconds.get(way, 0.0) * handicap for way, handicap in zip(_names(ways), handicaps))

    return min(choices, key=cost)


def _names(ways: Ways) -> tuple[str, str]:
    return f"gather {ways.gather}", f"scatter {ways.scatter}"


def describe(seconds: Seconds) -> str:
    """Return the figures for the log."""
    return "; ".join(f"{name} {1e3 * value:.3g} ms" for name, value in seconds.items()) + " per pass over the model"


def _by_profile(groups: MicsGroups, demand: Demand) -> Ways | None:
    """Return the ways that are faster on a calibrated cluster. On the first rank, which alone may have the profile."""
    request = groups.config.plan
    if groups.full.rank != 0 or request is None or request.cluster is None:
        return None
    try:
        machine = load_machine(request.cluster)
    except MicsError as error:
        logger.warning("mics_plan.cluster is not used to choose how collectives run: %s", error)
        return None
    counts = groups.layout.domain_counts(groups.layout.partition_groups[0])
    form = GroupForm(len(counts), max(counts.values()))
    measured = {(item.operation, item.staged) for item in machine.sweeps if item.form.nodes > 1}
    needed = {(operation, staged) for operation in ("all_gather", "reduce_scatter") for staged in (False, True)}
    if not needed <= measured:
        return None
    seconds = {}
    for ways in groups.choices:
        gathers = ("all_gather", demand.gathers, ways.staged_gather)
        scatters = ("reduce_scatter", demand.scatters, ways.staged_scatter)
        for name, (operation, shapes, staged) in zip(_names(ways), (gathers, scatters)):
            seconds[name] = sum(shape.times * machine.time(operation, shape.nbytes, form, staged) for shape in shapes)
    by_rule = groups.ways.reduce_scatter
    return fastest([ways for ways in groups.choices if ways.reduce_scatter == by_rule], seconds)


# --------------------------------------------------------------------------------------------------
# Measurement


def measure(groups: MicsGroups, demand: Demand, budget_s: float) -> tuple[Clock, Seconds]:
    """Time all ways that are open, on all groups at once. Collective over :attr:`MicsGroups.full`.

    Args:
        budget_s: seconds that it may take, once ranks are connected. Training would have to connect them too.
    """
    gathers = {f"gather {ways.gather}": functools.partial(gather, groups, ways) for ways in groups.choices}
    scatters = {f"scatter {ways.scatter}": functools.partial(scatter, groups, ways) for ways in groups.choices}
    kinds = [(gathers, demand.gathers), (scatters, demand.scatters)]
    kinds = [(contestants, shapes) for contestants, shapes in kinds if len(contestants) > 1 and shapes]
    for contestants, _ in kinds:
        for prepare in contestants.values():
            prepare(demand.dtype, SMALLEST)()
    clock, seconds = Clock(groups.full), dict[str, float]()
    races = [
        Race([functools.partial(prepare, demand.dtype) for prepare in contestants.values()], shapes, clock)
        for contestants, shapes in kinds
    ]
    hold(races, (1 - SPARE) * budget_s)
    for (contestants, _), race in zip(kinds, races):
        seconds.update(zip(contestants, (value / AT_ONCE for value in race.seconds())))
    for executor in (groups.gather_executor, groups.scatter_executor):
        executor.close()  # frees buffers that the chosen way may not need
    return clock, seconds


def gather(groups: MicsGroups, ways: Ways, dtype: torch.dtype, nbytes: int) -> Callable[[], object]:
    """Return a function that gathers parameters as training does, :data:`AT_ONCE` at a time."""
    stages = groups.gather_stages if ways.staged_gather else None
    numel = nbytes // dtype.itemsize
    layout = ChunkLayout((numel,), groups.partition.size, 1 if stages is None else stages.inter.size)
    shard = torch.zeros(layout.width, dtype=dtype, device=communication_device())
    in_order = stages is None or nbytes >= groups.sizes.whole

    def start() -> Handle[torch.Tensor]:
        if stages is None:
            rows = shard.new_empty(layout.size, layout.width)
            return collectives.start_all_gather(rows, shard, groups.partition, collectives.GATHER)
        way = collectives.start_all_gather_whole_hierarchical if in_order else collectives.start_all_gather_hierarchical
        return groups.gather_executor.submit(functools.partial(way, shard, stages))

    def run() -> None:
        for handle in [start() for _ in range(AT_ONCE)]:
            rows = handle.wait()
            if not in_order:
                layout.copy_out(rows, [shard.new_empty(numel)])

    return run


def scatter(groups: MicsGroups, ways: Ways, dtype: torch.dtype, nbytes: int) -> Callable[[], object]:
    """Return a function that runs hop 1 as training does, :data:`AT_ONCE` at a time."""
    stages = groups.scatter_stages if ways.staged_scatter else None
    gradient = torch.zeros(nbytes // dtype.itemsize, dtype=dtype, device=communication_device())
    hop1 = functools.partial(collectives.start_hop1, [gradient], groups.scatter, stages, ways.reduce_scatter)

    def run() -> None:
        for handle in [groups.scatter_executor.submit(hop1) for _ in range(AT_ONCE)]:
            handle.wait()

    return run


# --------------------------------------------------------------------------------------------------
# Cache


def cache_folder() -> Path:
    """Return the folder of what was measured before: ``mics_ds`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mics_ds"


class Cache:
    """The ways that the same collectives on the same ranks took before: in this process, and in a file of the node."""

    def __init__(self, groups: MicsGroups, demand: Demand) -> None:
        layout, device = groups.layout, communication_device()
        backend: Any = groups.partition.group._get_backend(device)
        self._key = {
            "format": _FORMAT,
            "ranks": groups.everyone.size,
            "n": layout.world_size,
            "p": layout.partition_size,
            "domains": agreement.digest(layout.domains),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "backend": backend.name(),
            "torch": str(torch.__version__),
            "dtype": str(demand.dtype),
            "gathers": [list(shape) for shape in demand.gathers],
            "scatters": [list(shape) for shape in demand.scatters],
            "choices": [list(asdict(ways).values()) for ways in groups.choices],
        }
        self._choices = groups.choices
        self._name = agreement.digest(self._key)
        first = next(rank for rank in layout.ranks if groups.node_of[rank] == groups.node_of[dist.get_rank()])
        self._writes = first == dist.get_rank()
        self._kept: Ways | None = None

    @property
    def path(self) -> Path:
        return cache_folder() / f"ways-{self._name}.json"

    def read(self) -> Ways | None:
        """Return what is kept, ``None`` if there is nothing that can be used."""
        self._kept = current_job().ways.get(self._name)
        if self._kept is None:
            try:
                data = json.loads(self.path.read_text())
                found = Ways(**data["ways"])
                self._kept = found if data["key"] == self._key and found in self._choices else None
            except (OSError, ValueError, TypeError, KeyError, RuntimeError):  # RuntimeError: there is no home folder
                self._kept = None
        return self._kept

    def write(self, ways: Ways) -> None:
        """Keep the ways that all ranks have agreed on. One rank of each node writes, all or nothing."""
        current_job().ways[self._name] = ways
        if not self._writes or self._kept == ways:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps({"key": self._key, "ways": asdict(ways)}, indent=1) + "\n")
        except (OSError, RuntimeError) as error:  # as in read
            logger.debug("measured ways of collectives are not kept: %s", error)
