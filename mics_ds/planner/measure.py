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
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..comm import agreement, collectives
from ..comm.async_exec import Handle, Stages
from ..comm.groups import MicsGroups
from ..comm.job import current_job
from ..comm.packing import ChunkLayout
from ..comm.rank_group import RankGroup, Ways
from ..deepspeed_compat.engine import communication_device, wait_for_device
from ..errors import MicsError, MicsPlanError
from ..log import log_rank0, logger
from .machine import GroupForm
from .presets import load_machine
from .workload import ZeroSettings

SECONDS_ENV = "MICS_DS_MEASURE_SECONDS"
"""Seconds that measurement may take; 0 leaves the choice to the rule."""
DEFAULT_S = 2.0
MARGIN = 0.07
"""Another way than that of the rule has to be faster by this fraction."""
FEWEST, MOST = 3, 15
"""Times that a size is measured: larger ones only where there is time for the fewest."""
HOPELESS = 1.3
"""A way that takes longer than the fastest by this factor is not measured more than twice."""
AT_ONCE = 2
"""Collectives of one kind under way at a time, as in training, which gathers ahead and reduces behind."""
SPARE = 0.2
"""Part of the time that is not planned for, because a size may take longer than a smaller one foretold."""
SHAPES = 3
SMALLEST, LARGEST = 1 << 16, 1 << 28
"""Bytes of the full buffer that measurement starts with, and goes up to. Above, links are busy all the time."""
GROWTH = 4
"""Largest ratio of two sizes that are measured one after the other: each foretells the next."""
_FORMAT = 1


class Shape(NamedTuple):
    """Collectives of about one size."""

    nbytes: int
    """Bytes of the full buffer."""
    times: int
    """How many of them one pass over the model takes."""


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
    for contestants, shapes in kinds:
        for prepare in contestants.values():
            prepare(demand.dtype, ladder(shapes)[0])()
    clock, seconds = Clock(groups.full), dict[str, float]()
    for index, (contestants, shapes) in enumerate(kinds):
        until_s = clock.elapsed + ((1 - SPARE) * budget_s - clock.elapsed) / (len(kinds) - index)
        prepared = [functools.partial(prepare, demand.dtype) for prepare in contestants.values()]
        found = race(prepared, shapes, clock, until_s)
        seconds.update(zip(contestants, (value / AT_ONCE for value in found)))
    for executor in (groups.gather_executor, groups.scatter_executor):
        executor.close()  # frees buffers that the chosen way may not need
    return clock, seconds


class Clock:
    """Times work on all ranks of a group at once. Every rank gets the numbers of the slowest one."""

    def __init__(self, group: RankGroup) -> None:
        self._group = group
        self._began = time.perf_counter()
        self.elapsed = 0.0
        """Seconds since the clock was made, by the end of the last work."""
        self.time(lambda: None)

    def time(self, work: Callable[[], object]) -> float:
        """Return the seconds that ``work`` takes."""
        start = time.perf_counter()
        work()
        wait_for_device()
        end = time.perf_counter()
        taken = torch.tensor([end - start, end - self._began], dtype=torch.float64, device=communication_device())
        collectives.max_over_(taken, self._group, "time of collectives")
        seconds, self.elapsed = taken.tolist()
        return float(seconds)


Prepare = Callable[[int], Callable[[], object]]
"""Bytes of the full buffer -> work of that size."""


def race(contestants: Sequence[Prepare], shapes: Sequence[Shape], clock: Any, until_s: float) -> list[float]:
    """Time contestants in turns, from small sizes to large ones, until the next size would not fit the time.

    Only sizes of the model count. Smaller ones foretell how long the next one takes, but not which way is faster there:
    latency decides about them, and links that were idle let some bytes through faster than those that follow.

    Args:
        until_s: reading of the clock at which to end.

    Returns:
        Seconds of one pass over the model, for each contestant. Times of larger sizes that were not reached grow with
        bytes. Nothing, if there was no time to measure any size :data:`FEWEST` times: then bytes decide, and the rule
        has the way with the fewest.
    """
    found: dict[int, list[float]] = {}
    sizes = ladder(shapes)
    asked = {min(shape.nbytes, LARGEST) for shape in shapes}
    for index, size in enumerate(sizes):
        began_s = clock.elapsed
        works = [prepare(size) for prepare in contestants]
        taken = [[clock.time(work)] for work in works]
        following_s = (clock.elapsed - began_s) * sizes[min(index + 1, len(sizes) - 1)] / size
        is_last = index + 1 == len(sizes) or clock.elapsed + FEWEST * following_s > until_s
        if size in asked:
            to_come = 1 if is_last else sum(other in asked for other in sizes[index:])
            _repeat(works, taken, clock, clock.elapsed + (until_s - clock.elapsed) / to_come)
            if max(map(len, taken)) >= FEWEST:
                found[size] = [_typical(times) for times in taken]
        if is_last or clock.elapsed + FEWEST * following_s > until_s:
            break
    if not found:
        return []
    largest = max(found)

    def seconds(nbytes: int, contestant: int) -> float:
        return found[nbytes][contestant] if nbytes in found else found[largest][contestant] * nbytes / largest

    return [sum(shape.times * seconds(shape.nbytes, number) for shape in shapes) for number in range(len(contestants))]


def _typical(times: Sequence[float]) -> float:
    """Return the lower quartile: whatever else a machine does makes times longer.

    The first one does not count. Links let through the first bytes after a pause faster than those that follow.
    """
    rest = sorted(times[1:] or times)
    return rest[len(rest) // 4]


def _repeat(works: Sequence[Callable[[], object]], taken: list[list[float]], clock: Any, until_s: float) -> None:
    """Time works again in turns, while there is time, and those that may still win."""
    for _ in range(MOST - 1):
        best = min(map(min, taken))
        for work, times in zip(works, taken):
            if min(times) > HOPELESS * best and len(times) > 1:
                continue
            if clock.elapsed + times[-1] > until_s:
                return
            times.append(clock.time(work))


def ladder(shapes: Sequence[Shape]) -> list[int]:
    """Return the sizes to measure: those of the shapes, and others before them, in steps of :data:`GROWTH` at most."""
    sizes = sorted({min(shape.nbytes, LARGEST) for shape in shapes})
    steps = [min(SMALLEST, sizes[0])]
    for size in sizes:
        while steps[-1] * GROWTH < size:
            steps.append(steps[-1] * GROWTH)
        steps += [size] * (size > steps[-1])
    return steps


def _order(groups: MicsGroups, staged: Any) -> tuple[int, ...]:
    return tuple(range(groups.partition.size)) if staged is None else staged.chunk_of_slot


def gather(groups: MicsGroups, ways: Ways, dtype: torch.dtype, nbytes: int) -> Callable[[], object]:
    """Return a function that gathers parameters as training does, :data:`AT_ONCE` at a time."""
    stages = groups.gather_stages if ways.staged_gather else None
    numel = nbytes // dtype.itemsize
    layout = ChunkLayout((numel,), _order(groups, stages))
    shard = torch.zeros(layout.width, dtype=dtype, device=communication_device())
    in_order = stages is None or (nbytes >= groups.sizes.whole and stages.domains_follow_each_other)

    def start() -> Handle[torch.Tensor]:
        if stages is None:
            rows = shard.new_empty(layout.size, layout.width)
            return collectives.start_all_gather(rows, shard, groups.partition, collectives.GATHER)
        way = collectives.all_gather_whole_hierarchical if in_order else collectives.all_gather_hierarchical
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
    layout = ChunkLayout((gradient.numel(),), _order(groups, stages))
    packed: list[torch.Tensor] = []

    def pack(where: Stages) -> None:
        packed.append(layout.pack([gradient], where.scratch(layout.size * layout.width, gradient)))

    def hop1(where: Stages) -> None:
        rows = packed.pop(0)
        shard = where.scratch(layout.width, rows)
        if stages is None:
            collectives.reduce_scatter_mean(rows, shard, groups.scatter, ways.reduce_scatter, where)
        else:
            collectives.reduce_scatter_mean_hierarchical(rows, shard, stages, ways.reduce_scatter, where)

    def run() -> None:
        for handle in [groups.scatter_executor.submit(hop1, pack=pack) for _ in range(AT_ONCE)]:
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
            partial = self.path.with_name(f"{self.path.name}.{os.getpid()}")
            partial.write_text(json.dumps({"key": self._key, "ways": asdict(ways)}, indent=1) + "\n")
            os.replace(partial, self.path)
        except (OSError, RuntimeError) as error:  # as in read
            logger.debug("measured ways of collectives are not kept: %s", error)
