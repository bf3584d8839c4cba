"""Do the ranks of a partition group run the same modules? They gather and reduce them together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator_module
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import iter_params
from deepspeed.utils import z3_leaf_module

from ..comm import agreement, collectives
from ..comm.rank_group import RankGroup
from ..errors import MicsUsageError
from .engine import communication_device
from .patching import replace_methods, temporarily

PATIENCE_S = 120.0
"""Seconds that a rank waits for its partition group after it has left the recorded order of modules.

The ranks are as close to each other as their last common gather.
"""


class SameOrder:
    """Compares what the ranks of a partition group gather and reduce, where they may differ.

    Replicas may differ: they gather by themselves, and agree on hop 2 (see :mod:`mics_ds.zero.grad_sync`). If they were
    compared over the world, as DeepSpeed does, one that came to record its modules anew would wait for others that did
    not.

    Args:
        coordinator: DeepSpeed's, whose methods are replaced by those here that have their names.
    """

    REPLACED = ("reset_step", "trace_prologue", "fetch_sub_module")

    def __init__(self, module: torch.nn.Module, partition: RankGroup, coordinator: Any) -> None:
        self._module, self._partition, self._coordinator = module, partition, coordinator
        replace_methods(coordinator, self, self.REPLACED)
        for name in self.REPLACED:  # as stock's: hooks that call these may be compiled
            setattr(coordinator, name, torch.compiler.disable(getattr(coordinator, name)))

    def require(self, kind: str, numbers: Sequence[int], doing: str) -> None:
        """Compare numbers among the ranks of the partition group.

        Args:
            doing: what this rank does, for the error.

        Raises:
            MicsUsageError: they differ.
        """
        if self._partition.size == 1:
            return
        what = "comparison of what a partition group does"
        if not collectives.all_equal((kind, list(numbers)), self._partition, communication_device(), what):
            notes = collectives.exchange(doing, self._partition, what)
            raise self._difference(f"rank {rank} {note}" for rank, note in zip(self._partition.ranks, notes))

    def require_bucket(self, ids: list[int]) -> None:
        """Compare the parameters of a bucket of gradients."""
        self.require("bucket", ids, f"reduces the gradients of parameters {ids[:20]}")

    def reset_step(self, stock: Callable[[], None]) -> None:
        # DeepSpeed has recorded which modules run in which order, and has all ranks of the world compare that.
        def compare(order: list[int]) -> None:
            self.require("order", order, f"ran {len(order)} modules or parameters: {order[:20]}")

        with temporarily(coordinator_module, "assert_ints_same_as_other_ranks", compare):
            stock()

    def trace_prologue(self, stock: Callable[[torch.nn.Module], None], sub_module: torch.nn.Module) -> None:
        was_complete = self._coordinator.is_complete_trace()
        stock(sub_module)
        if not was_complete or self._coordinator.is_complete_trace() or self._partition.size == 1:
            return
        # This rank has left the order of the passes before. A collective would not do here: ranks that follow it are on
        # their way to another one.
        patience = min(PATIENCE_S, agreement.patience_s())
        number: Any = sub_module.ds_id
        same = agreement.peers_agree({"module": int(number)}, "which module runs", self._partition.ranks, patience)
        if not same:
            others = (
                f"the other ranks have not left that order within {patience:.0f} s"
                if same is None
                else "other ranks of its group run another module"
            )
            raise self._difference(
                [
                    f"rank {dist.get_rank()} runs {self._name_of(sub_module)}, which is not next in the order of the "
                    f"passes before, and {others}"
                ]
            )

    def fetch_sub_module(self, stock: Callable[..., None], current_submodule: torch.nn.Module, forward: bool) -> None:
        module = current_submodule
        is_leaf = z3_leaf_module(module)
        # Threads of autograd compete for the gather of a leaf module in backward.
        if not self._coordinator.is_complete_trace() and (forward or not is_leaf):
            params: Iterable[Any] = iter_params(module, recurse=is_leaf)
            count = sum(param.ds_status == ZeroParamStatus.NOT_AVAILABLE for param in params)
            if count:
                # Numbers of parameters count all models of the process, of which each rank may have others.
                number: Any = module.ds_id
                self.require("gather", [int(number), count], f"gathers parameters of {self._name_of(module)}")
        stock(module, forward)

    def _name_of(self, module: torch.nn.Module) -> str:
        names = {id(part): name for name, part in self._module.named_modules()}
        return f"{type(module).__name__} {names.get(id(module), '')!r}"

    def _difference(self, findings: Iterable[str]) -> MicsUsageError:
        return MicsUsageError(
            f"Ranks {list(self._partition.ranks)}, a partition group, must run the same modules in the same order and "
            f"get the gradients of the same parameters, because they gather and reduce them together, but "
            f"{'; '.join(findings)}. Make the data decide alike on all of them (send zeros through a module that has "
            f"nothing to do), or declare the module that chooses among its parts a leaf module "
            f"(deepspeed.utils.set_z3_leaf_modules)."
        )
