"""Muon in stage 3: a strategy of the optimizer by which replicas share the work, and agree on what came of it.

Muon makes an update of a whole gradient and a whole momentum, once per step, from gradients that are final. DeepSpeed
gathers both in the group that a parameter is sharded over, and has each of its ranks do some of the matrices. Here
replicas take turns as well, and each takes over what the others have made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..comm import collectives
from ..comm.rank_group import RankGroup
from ..errors import MicsConfigError
from .engine import communication_device
from .patching import replace_methods
from .support import MUON_FOLLOWS_GRADIENTS

_MOMENTUM = "momentum_buffer"

Item = tuple[Any, int, torch.Tensor]
"""Work that DeepSpeed hands to Muon: a parameter, where in the sub-group its momentum starts, its full gradient."""


def refuse_muon(init_optimizer: torch.optim.Optimizer, replicas_come_and_go: bool) -> None:
    """Refuse a Muon that makes updates of gradients that are not final, or whose replicas come and go.

    Raises:
        MicsConfigError: this one does.
    """
    if not any(group.get("use_muon") for group in init_optimizer.param_groups):
        return
    if replicas_come_and_go:
        raise MicsConfigError(
            "mics_replicas does not go with Muon: replicas take turns at its matrices, and one that is gone would take "
            "its turn with it. Use Adam, AdamW or SGD, or remove mics_replicas."
        )
    if not MUON_FOLLOWS_GRADIENTS:
        raise MicsConfigError(
            "MiCS needs a DeepSpeed whose Muon waits for the gradients of a whole step, as since 0.19.8. Use that, "
            "or Adam, AdamW or SGD."
        )


class MuonSharing:
    """Muon of one stage 3 optimizer, shared by its replicas.

    Args:
        optimizer: whose methods are replaced, on the instance, by those here that have their names.
    """

    REPLACED = ("_muon_update_sub_group", "_apply_muon_updates_cpu_offload", "_rigid_load_state_dict")

    def __init__(self, optimizer: Any, replication: RankGroup) -> None:
        self._optimizer, self._replication = optimizer, replication
        replace_methods(optimizer, self, self.REPLACED)

    def _take_over(self, shares: Sequence[Sequence[torch.Tensor]]) -> None:
        """Overwrite tensors with what their owner has in them, by owner."""
        collectives.share_out_(shares, self._replication, communication_device(), "Muon's updates")

    def _muon_update_sub_group(
        self, stock: Callable[..., None], i: int, group_items: list[Item], communication_data_type: torch.dtype
    ) -> None:
        count = self._replication.size
        shares = [group_items[other::count] for other in range(count)]
        stock(i, shares[self._replication.rank], communication_data_type)
        momentum = self._momentum(i)
        self._take_over([[part for item in share for part in self._parts(momentum, item)] for share in shares])

    def _momentum(self, sub_group: int) -> torch.Tensor:
        """Return the momentums of all parameters of a sub-group: 1-D and live."""
        optimizer = self._optimizer
        master = optimizer.fp32_partitioned_groups_flat[sub_group]
        state = optimizer.optimizer.state.setdefault(master, {})
        if _MOMENTUM not in state:  # DeepSpeed makes it when it first has something to put there
            width = optimizer.fp16_partitioned_groups_flat_numel[sub_group]
            optimizer._create_momentum_buffer(width, sub_group, master.ds_id)
        momentum: torch.Tensor = state[_MOMENTUM]
        return momentum

    def _parts(self, momentum: torch.Tensor, item: Item) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's shard of an update and of the momentum."""
        param, start, update = item
        width = param.partition_numel()
        first = min(self._optimizer._get_param_partition_rank(param) * width, param.ds_numel)
        return update.view(-1)[first : first + width], momentum.narrow(0, start, width)

    def _apply_muon_updates_cpu_offload(self, stock: Callable[..., None]) -> None:
        stock()
        count = self._replication.size
        # All replicas have computed everything, so whatever one of them has is right.
        for sub_group, is_muon in enumerate(self._optimizer.sub_groups_using_muon):
            if is_muon:
                gradient = self._optimizer.fp32_partitioned_groups_flat[sub_group].grad
                whole = [*gradient.tensor_split(count), *self._momentum(sub_group).tensor_split(count)]
                self._take_over([whole[owner::count] for owner in range(count)])

    def _rigid_load_state_dict(
        self, stock: Callable[..., None], state_dict: dict[str, Any], load_optimizer_states: bool = True
    ) -> None:
        stock(state_dict, load_optimizer_states)
        optimizer = self._optimizer
        # With save_muon_momentum_buffer_in_memory DeepSpeed has another reference to it, which it does not load.
        for sub_group, kept in getattr(optimizer, "muon_momentum_buffer_partitioned_groups_flat", {}).items():
            state = optimizer.optimizer.state.get(optimizer.fp32_partitioned_groups_flat[sub_group], {})
            if load_optimizer_states and _MOMENTUM in state and state[_MOMENTUM] is not kept:
                kept.copy_(state[_MOMENTUM])
                state[_MOMENTUM] = kept
