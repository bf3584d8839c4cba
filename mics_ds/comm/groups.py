"""The process groups of MiCS, made once and carried as one small object.

:mod:`mics_ds.comm.layout` computes who belongs together. This module checks that all ranks computed the same, and only
then creates process groups: one call for each kind of group, in which a rank takes part with its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from ..config import MicsConfig
from ..errors import MicsConfigError
from ..log import log_rank0
from . import agreement, placement
from .async_exec import Executor, StreamExecutor, Streams, ThreadExecutor
from .collectives import exchange
from .job import current_job
from .layout import MicsLayout, Ranks
from .placement import Placement
from .rank_group import REDUCE_SCATTER_METHODS, RankGroup, ReduceScatterMethod, StageGroups, Ways
from .sizes import Sizes, sizes_of


@dataclass(frozen=True)
class MicsGroups:
    """Every group one rank needs. Equal arguments give the same process groups."""

    config: MicsConfig
    layout: MicsLayout
    everyone: RankGroup
    """All ranks that build the engine together: the world, as a rule. It holds :attr:`full` of all of them."""
    full: RankGroup
    """All data-parallel ranks."""
    partition: RankGroup
    """Ranks that together hold one copy of the model states. For p = n this *is* :attr:`full`."""
    replication: RankGroup | None
    """Ranks that hold the same shard. ``None`` for p = n, where there is nothing to average. Hop 2 runs beside the
    backward pass, which may have collectives of the model's own: on a device without streams this is never
    :attr:`full`, for the reason given at :attr:`scatter`."""
    gather_stages: StageGroups | None
    """Groups for gathers in two stages. Set where placement and configuration allow those."""
    scatter: RankGroup
    """The ranks of :attr:`partition` once more, for hop 1. On a device without streams it is another process group:
    hop 1 issues its second stage on a thread of its own, and two threads cannot agree on an order within one group."""
    scatter_stages: StageGroups | None
    """Groups for hop 1 in two stages, as :attr:`gather_stages`. See :attr:`scatter`."""
    ways: Ways
    """Ways that gathers and hop 1 take: by rule, until they are measured (:mod:`mics_ds.planner.measure`)."""
    node_of: Mapping[int, int]
    """Node (host) of every rank of :attr:`everyone`, by global rank. Fast domains are in :attr:`layout`."""
    sizes: Sizes
    gather_executor: Executor
    """Executor of hierarchical gathers, one for all engines that share the process groups."""
    scatter_executor: Executor
    """Executor of hop 1."""
    replica_executor: Executor
    """Executor of hop 2, and with world-sharded states of gathers of updated weights. The main thread may use
    :attr:`replication` once this is drained."""

    @property
    def hierarchy(self) -> StageGroups | None:
        """Groups for gathers of parameters in two stages; ``None`` where these are flat."""
        return self.gather_stages if self.ways.staged_gather else None

    @property
    def scatter_hierarchy(self) -> StageGroups | None:
        """Groups for hop 1 in two stages; ``None`` where it is flat."""
        return self.scatter_stages if self.ways.staged_scatter else None

    @property
    def choices(self) -> tuple[Ways, ...]:
        """Ways among which configuration and placement leave a choice. The first one is the rule without measurement:
        two stages, by the method of which the backend sends the least."""
        gathers = [False] if self.gather_stages is None else [True, False]
        scatters = [False] if self.scatter_stages is None else [True, False]
        if self.config.hierarchical_params_gather != "auto":
            gathers = gathers[:1]
        if self.config.hierarchical_grad_scatter != "auto":
            scatters = scatters[:1]
        methods = [self.ways.reduce_scatter]
        if self.config.reduce_scatter == "auto" and self.partition.size > 1:
            methods += [method for method in REDUCE_SCATTER_METHODS if method not in methods]
        return tuple(Ways(*way) for way in itertools.product(gathers, scatters, methods))

    @property
    def spreads_states(self) -> bool:
        """Return whether optimizer states are sharded over the replicas as well."""
        return self.replication is not None and self.config.optimizer_states == "world"


def build_groups(
    config: MicsConfig,
    full: dist.ProcessGroup,
    participants: Ranks | None = None,
    streams: Streams | None = None,
) -> MicsGroups:
    """Agree with all other ranks on the configuration and return this rank's groups.

    Collective over the participants: every one of them must call it the same number of times.

    Args:
        config: what was asked for; must be equal on all ranks.
        full: the data-parallel group of this rank. Ranks of different data-parallel groups (under
            tensor parallelism) call with their own.
        participants: global ranks that have to agree: those of ``full``, or ``None`` for the world.
        streams: of the device that the groups work on, ``None`` for the CPU.

    Raises:
        MicsAgreementError: the ranks disagree.
        MicsConfigError: p does not divide the data-parallel size.
    """
    world = dist.group.WORLD
    assert world is not None, "initialised by whoever has a data-parallel group"
    everyone = RankGroup.of(world if participants is None else full)
    own, all_layouts, placed = _agree(config, RankGroup.of(full), everyone)
    can_stage = not any(layout.why_not_hierarchical for layout in all_layouts)
    device = torch.device("cpu" if streams is None else streams.current_device_name())
    ways = Ways(
        staged_gather=config.hierarchical_params_gather is not False and can_stage,
        staged_scatter=config.hierarchical_grad_scatter is not False and can_stage,
        reduce_scatter=reduce_scatter_method(config, full, device),
    )
    make = _GroupMaker(full, own, device)
    # On a device without streams, each executor has process groups of its own, see MicsGroups.scatter.
    scatter_purpose = "scatter" if streams is None else "gather"
    if current_job().is_news(own):
        log_rank0(own.describe(placed.domains_from, *astuple(ways)))
    sizes = sizes_of(streams is not None)
    return MicsGroups(
        config=config,
        layout=own,
        everyone=everyone,
        full=RankGroup.of(full),
        partition=make("gather", own.partition_groups),
        scatter=make(scatter_purpose, own.partition_groups),
        replication=make(scatter_purpose, own.replication_groups) if own.replication_size > 1 else None,
        gather_stages=make.of_stages("gather") if ways.staged_gather else None,
        scatter_stages=make.of_stages(scatter_purpose) if ways.staged_scatter else None,
        ways=ways,
        node_of=dict(zip(everyone.ranks, placed.nodes)),
        sizes=sizes,
        gather_executor=_executor("all-gather", own, streams),
        scatter_executor=_executor("reduction", own, streams, ahead=sizes.ahead),
        replica_executor=_executor("replicas", own, streams, ahead=sizes.ahead, own_issue=True),
    )


def _executor(name: str, layout: MicsLayout, streams: Streams | None, **options: Any) -> Executor:
    """Return the executor of that name that engines with these partition groups share."""
    key, executors = (name, layout.partition_groups, streams), current_job().executors
    if key not in executors:
        executors[key] = ThreadExecutor(name, **options) if streams is None else StreamExecutor(streams, **options)
    executor: Executor = executors[key]
    return executor


def _agree(config: MicsConfig, full: RankGroup, everyone: RankGroup) -> tuple[MicsLayout, list[MicsLayout], Placement]:
    """Compare configuration, data-parallel groups and placement with all participants.

    Returns:
        The layout of this rank's data-parallel group, those of all groups, and the placement of all ranks.
    """
    with agreement.failing_together(everyone.ranks):
        if not set(full.ranks) <= set(everyone.ranks):
            raise MicsConfigError(
                f"Expected the parameters to be partitioned over ranks that build the engine together, "
                f"{everyone.ranks}, but their data-parallel group is {full.ranks}. Give zero.Init the engine's "
                f"data_parallel_group."
            )
        claim = placement.claim(dist.get_rank())
    agreement.require_same(
        {"state": "on", **config.to_json(), "data-parallel size": full.size},
        "whether MiCS is on, its configuration, and the size of data-parallel groups",
        everyone.ranks,
    )
    note = claim, full.ranks if full.rank == 0 else None
    notes = exchange(note, everyone, "agreement on the placement of ranks")
    placed = placement.resolve([claim for claim, _ in notes], everyone.ranks, config.domain_size)
    domain_of = dict(zip(everyone.ranks, placed.domains))
    p = int(config.shard_size)

    def layout(ranks: Ranks) -> MicsLayout:
        return MicsLayout(ranks, tuple(domain_of[rank] for rank in ranks), p)

    return layout(full.ranks), [layout(ranks) for _, ranks in notes if ranks is not None], placed


class _GroupMaker:
    """Creates process groups and returns this rank's, or the one it has already.

    Only the members of a group meet, through the store: no rank outside is needed, and no communicator is split. A
    ``split_group`` of one parent twice needs options of its own each time before torch 2.10 (pytorch #167125, #192110),
    and fails in a process whose first NCCL group is gone (#192109). New groups are as patient as ``full`` is, where
    torch would give them its default.
    """

    def __init__(self, full: dist.ProcessGroup, layout: MicsLayout, device: torch.device) -> None:
        self._full = full
        self._layout = layout
        self._timeout = agreement.timeout_of(full, device)

    def __call__(self, purpose: str, groups: tuple[Ranks, ...]) -> RankGroup:
        """Return the one of ``groups`` that this rank is in."""
        own = next(ranks for ranks in groups if dist.get_rank() in ranks)
        job = current_job()
        if own == self._layout.ranks and purpose == "gather":
            group = self._full
        elif (purpose, groups) in job.groups:
            group = job.groups[purpose, groups]
        else:
            job.attempts[purpose, own] += 1
            description = f"mics {purpose} of {len(own)}"
            name = f"{description} {agreement.digest(own)} {job.attempts[purpose, own]}"
            with _met_by_members(name):
                group = dist.new_group(
                    list(own), timeout=self._timeout, use_local_synchronization=True, group_desc=description
                )
            job.groups[purpose, groups] = group
        return RankGroup(group, own, own.index(dist.get_rank()))

    def of_stages(self, purpose: str) -> StageGroups:
        """Return this rank's groups between and inside fast domains."""
        grids = [self._layout.domain_grid(group) for group in self._layout.partition_groups]
        inter, intra = (self(purpose, tuple(ranks for kind in kinds for ranks in kind)) for kinds in zip(*grids))
        return StageGroups(inter, intra)


@contextmanager
def _met_by_members(name: str) -> Iterator[None]:
    """Have members of the group that is created in this context meet under this name, and no other rank join them.

    The name is where they look for each other in the store. torch hashes their ranks together with the number of groups
    that the process has: ranks with different numbers (of a pipeline's first stage, say) never meet, and after a group
    was destroyed the next one of its ranks finds the addresses of the old one. And where ranks are bound to devices,
    torch would split the world's communicator, which takes all ranks of the world.
    """
    world: Any = dist.group.WORLD
    naming, device = c10d._process_group_name, getattr(world, "bound_device_id", None)
    c10d._process_group_name = lambda *_, **__: name  # type: ignore[assignment]
    if device is not None:
        world.bound_device_id = None
    try:
        yield
    finally:
        c10d._process_group_name = naming
        if device is not None:
            world.bound_device_id = device


def reduce_scatter_method(config: MicsConfig, group: dist.ProcessGroup, device: torch.device) -> ReduceScatterMethod:
    """Return ``"native"`` or ``"all_to_all"``: what the configuration says, or the rule for the backend.

    gloo's reduce-scatter sends as many bytes as its all-reduce, 2(p-1)/p · M, where an all-to-all sends
    half of that: 1.35 s and not 2.15 s for 64 MB on two nodes of two ranks at 400 Mbit/s. NCCL's is
    as good as it gets.
    """
    if config.reduce_scatter != "auto":
        return config.reduce_scatter
    # A group may have a backend for each device, so its own name says little.
    backend: Any = group._get_backend(device)
    return "all_to_all" if backend.name() == "gloo" else "native"
