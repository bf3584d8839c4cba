"""Partitioning parameters over p ranks: the ``zero.Init`` and ``GatheredParameters`` of MiCS.

Two groups matter. A parameter is *sharded and gathered* in its partition group. But whenever a value
is *decided* (a fresh parameter, a function given to ``Module.apply``, a change under
``GatheredParameters``), it has to be the same in all replicas, so it is broadcast over the whole
data-parallel group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from .comm import agreement, collectives
from .comm.groups import MicsGroups, RankGroup
from .comm.lanes import Pending
from .errors import MicsConfigError, MicsUsageError
from .log import log_rank0
from .request import Build, building
from .seams import partitioner as seam
from .seams.engine import communication_device, ensure_distributed


def _bytes(param: seam.ZeroParam) -> torch.Tensor:
    """A full parameter as bytes: gloo and NCCL do not broadcast every dtype."""
    return param.data.view(torch.uint8)


class MicsPartitioner(seam.PartitionerSeam):
    """``deepspeed.zero.Init`` that shards over a partition group. Takes the same arguments.

    ``data_parallel_group`` keeps its meaning: all data-parallel ranks, the world by default.
    """

    mics_build: Build
    mics_groups: MicsGroups
    constructed = False
    """Whether this process has any MiCS parameters at all."""

    def __init__(
        self,
        module: torch.nn.Module | None = None,
        data_parallel_group: dist.ProcessGroup | None = None,
        *args: Any,
        sequence_data_parallel_group: dist.ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        ensure_distributed()
        group = sequence_data_parallel_group if data_parallel_group is None else data_parallel_group
        full = dist.group.WORLD if group is None else group
        assert full is not None, "initialised a line above"
        self.mics_groups = self.mics_build.groups(full)
        MicsPartitioner.constructed = True
        if self.mics_groups.replication is not None:
            group = self.mics_groups.partition.group
        # hpZ is switched off in our configuration, so a group for it is left from an earlier engine of this
        # process: DeepSpeed keeps it in a global and hands it to every engine that follows.
        kwargs["zero_param_parallel_group"] = None
        # For p = n the caller's own argument goes on, so that this is ZeRO-3 to the letter.
        with building(self.mics_build):
            super().__init__(module, group, *args, **kwargs)

    def before_first_partition(self, param: seam.ZeroParam) -> None:
        # Ranks may have drawn different random numbers. DeepSpeed broadcasts from the first rank of
        # the group it shards over, which leaves replicas different; this makes them equal first.
        if self.mics_groups.replication is not None:
            collectives.broadcast_([_bytes(param)], 0, self.mics_groups.full)

    def after_conversion(self, param: seam.ZeroParam) -> None:
        param.mics_groups = self.mics_groups

    def before_gather(self, params: list[seam.ZeroParam]) -> None:
        for param in params:
            # With world-sharded optimizer states, updated weights may still be on their way from other replicas.
            update: Pending[None] | None = getattr(param, "mics_update", None)
            if update is not None:
                update.wait()

    def is_replicated(self) -> bool:
        return self.mics_groups.replication is not None

    def shard_was_written(self, param: seam.ZeroParam) -> None:
        follow = getattr(param, "mics_master_follows", None)
        if follow is not None:
            follow()

    def start_gather(self, shard: torch.Tensor) -> Pending[collectives.GatheredShards] | None:
        hierarchy = self.mics_groups.hierarchy
        if hierarchy is None:
            return None
        return self.mics_groups.gather_lane.submit(
            lambda stages: collectives.all_gather_hierarchical(shard, hierarchy, stages=stages), nbytes=shard.nbytes
        )

    def broadcast_after_apply(self, params: list[seam.ZeroParam]) -> None:
        collectives.broadcast_([_bytes(param) for param in params], 0, self.mics_groups.full)


class MicsGatheredParameters(seam.GatheredParameters):
    """``deepspeed.zero.GatheredParameters`` whose ``modifier_rank`` counts over all data-parallel ranks.

    Without this, ``modifier_rank=0`` would mean the first rank of *each* partition group, and weights
    that a framework loads on global rank 0 would never reach the other replicas. Given none but stock
    ZeRO-3 parameters, it is the stock context.
    """

    def __init__(
        self,
        params: torch.nn.Parameter | Iterable[torch.nn.Parameter],
        modifier_rank: int | None = None,
        fwd_module: torch.nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        if enabled and isinstance(params, Iterable) and not isinstance(params, torch.Tensor):
            params = list(params)  # it may be a generator, and is read twice
        items = params if isinstance(params, list) else [params]
        self._is_replicated = enabled and any(groups and groups.replication for groups in map(_groups_of, items))
        self._modifier_rank = modifier_rank if self._is_replicated else None
        # After our broadcast every rank has the value, so DeepSpeed's own may start from any member.
        first_member = 0 if self._modifier_rank is not None else modifier_rank
        super().__init__(params, first_member, fwd_module, enabled)

    def __enter__(self) -> None:
        super().__enter__()
        if self._is_replicated:
            for param in self.params:
                seam.unshare(param)

    def __exit__(self, *exc: Any) -> Any:
        if self.enabled and self._modifier_rank is not None:
            by_group: dict[int, tuple[RankGroup, list[torch.Tensor]]] = {}
            for param in self.params:
                groups = _groups_of(param)
                full = RankGroup.of(param.ds_process_group) if groups is None else groups.full
                by_group.setdefault(id(full.group), (full, []))[1].append(_bytes(param))
            for full, tensors in by_group.values():
                collectives.broadcast_(tensors, self._modifier_rank, full)
        return super().__exit__(*exc)


def _groups_of(param: Any) -> MicsGroups | None:
    return getattr(param, "mics_groups", None)


class MicsParamManager(seam.ParamManagerSeam):
    """DeepSpeed's parameter manager. Used by the optimizer, and alone when there is none (evaluation)."""

    mics_groups: MicsGroups
    """Of the parameters; the optimizer checks that they are its own too."""

    def before_autotp_shards_convert(
        self, make_partitioner: Callable[[], seam.PartitionerSeam], module: torch.nn.Module
    ) -> None:
        """Partition anew, over this rank's data-parallel group, what ``zero.Init`` has partitioned over all ranks. Its
        partitioner would make the shards of the first rank those of all."""
        spread = [param for param in module.parameters() if seam.is_zero_param(param)]
        if spread:
            partitioner = make_partitioner()
            for param in spread:
                seam.repartition(partitioner, param)

    def after_all_converted(
        self, make_partitioner: Callable[[], seam.PartitionerSeam], module: torch.nn.Module
    ) -> None:
        """Re-partition what ``zero.Init`` partitioned without knowing of MiCS (called without a configuration)."""
        strangers = [param for param in module.parameters() if _groups_of(param) is None]
        if strangers:
            partitioner = make_partitioner()
            for param in strangers:
                seam.repartition(partitioner, param)
            log_rank0(
                f"re-partitioned {len(strangers)} parameters that deepspeed.zero.Init had spread over all ranks. Give "
                f"it the configuration (config_dict_or_path=...) with a number as size, and they start out right."
            )
        of_all = [groups for groups in map(_groups_of, module.parameters()) if groups is not None]
        found = {groups.config.of_parameters: groups for groups in of_all}
        if len(found) > 1:
            raise MicsConfigError(
                f"All parameters of a model must be built with one MiCS configuration, but zero.Init was given "
                f"{', '.join(str(config.to_json()) for config in found)}. Use one configuration throughout."
            )
        self.mics_groups = next(iter(found.values()))

    # ------------------------------------------------- what a partition group does together

    # Replicas may differ: they gather by themselves, and agree on hop 2 (see two_hop). If they were compared over the
    # world, one that came to record its modules anew would wait for others that did not.

    def require_same_modules(self, order: list[int]) -> bool:
        return self._require_same("order of modules", order, f"ran {len(order)} modules or parameters: {order[:20]}")

    def require_same_bucket(self, ids: list[int]) -> bool:
        return self._require_same("bucket", ids, f"reduces the gradients of parameters {ids[:20]}")

    def before_unforeseen_fetch(self, module: torch.nn.Module, forward: bool) -> None:
        count = seam.gathers_for(module, forward)
        if count:
            # Numbers of parameters count all models of the process, of which each rank may have others.
            self._require_same(
                "gather", [seam.number_of(module), count], f"gathers parameters of {self._name_of(module)}"
            )

    def leaves_recorded_order(self, module: torch.nn.Module) -> None:
        # A collective would not do here: ranks that follow the recorded order are on their way to another one.
        groups = self.mics_groups
        if groups.replication is None or groups.partition.size == 1:
            return
        doing = f"runs {self._name_of(module)}, which is not next in the order of the passes before"
        patience = min(PATIENCE_S, agreement.patience_in_s())
        said = agreement.ask_peers({"module": seam.number_of(module)}, groups.partition.ranks, patience)
        if said is None or any(item != said[0] for item in said):
            others = (
                f"the other ranks have not left that order within {patience:.0f} s"
                if said is None
                else "other ranks of its group run another module"
            )
            raise MicsUsageError(_different(groups.partition, [f"rank {dist.get_rank()} {doing}, and {others}"]))

    def _name_of(self, module: torch.nn.Module) -> str:
        names = {id(part): name for name, part in self.module.named_modules()}
        return f"{type(module).__name__} {names.get(id(module), '')!r}"

    def _require_same(self, kind: str, numbers: list[int], doing: str) -> bool:
        groups = self.mics_groups
        if groups.replication is None:
            return False
        if groups.partition.size == 1:
            return True
        number = int.from_bytes(hashlib.sha256(repr((kind, numbers)).encode()).digest()[:7], "big")
        same = torch.tensor([number, -number], device=communication_device())
        collectives.max_over_(same, groups.partition, "what a partition group does together")
        most, least = same.tolist()
        if most != -least:
            notes = collectives.exchange_notes(doing, groups.partition, "what a partition group does together")
            raise MicsUsageError(
                _different(
                    groups.partition, [f"rank {rank} {note}" for rank, note in zip(groups.partition.ranks, notes)]
                )
            )
        return True

    def destroy(self) -> None:
        super().destroy()
        self.mics_groups.gather_lane.close()


PATIENCE_S = 120.0
"""How long a rank that leaves the recorded order of modules waits for its partition group to leave it too. They are as
close to each other as their last common gather."""


def _different(partition: RankGroup, findings: list[str]) -> str:
    return (
        f"Ranks {list(partition.ranks)}, a partition group, must run the same modules in the same order and get the "
        f"gradients of the same parameters, because they gather and reduce them together, but {'; '.join(findings)}. "
        f"Make the data decide alike on all of them (send zeros through a module that has nothing to do), or "
        f"declare the module that chooses among its parts a leaf module (deepspeed.utils.set_z3_leaf_modules)."
    )
