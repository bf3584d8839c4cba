"""DeepSpeed's Muon in stage 3, with a hook that lets replicas share the work, or agree on what came of it.

Muon makes an update of a whole gradient and a whole momentum, once per step, from gradients that are final. DeepSpeed
gathers both in the group that a parameter is sharded over, and has each of its ranks do some of the matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .slicing import SlicingSeam
from .support import MUON_FOLLOWS_GRADIENTS

_MOMENTUM = "momentum_buffer"

Item = tuple[Any, int, torch.Tensor]
"""What DeepSpeed hands to Muon: a parameter, where in the sub-group its momentum starts, its full gradient."""


class MuonSeam(SlicingSeam):
    """The stage 3 optimizer with a hook for Muon's updates. Without one it is DeepSpeed's."""

    fp32_partitioned_groups_flat: list[torch.Tensor]

    # ------------------------------------------------------------------------------------ hooks

    def muon_turn(self) -> tuple[int, int]:
        """Which of the replicas this is, and how many there are."""
        return 0, 1

    def take_over(self, shares: Sequence[Sequence[torch.Tensor]]) -> None:
        """Overwrite tensors with what their owner has in them. Only called where there are replicas.

        Args:
            shares: by owner, as :meth:`muon_turn` counts them; the same shapes on all replicas.
        """
        raise NotImplementedError

    def uses_muon(self) -> bool:
        return bool(getattr(self, "use_muon", False))

    def refuses_muon(self) -> bool:
        """Whether this is Muon, and of a version that makes updates of gradients that are not final."""
        return self.uses_muon() and not MUON_FOLLOWS_GRADIENTS

    # ------------------------------------------------------------------------------------ on the device

    def _muon_update_sub_group(self, i: int, group_items: list[Item], communication_data_type: torch.dtype) -> None:
        replica, count = self.muon_turn()
        shares = [group_items[other::count] for other in range(count)]
        super()._muon_update_sub_group(i, shares[replica], communication_data_type)
        if count > 1:
            momentum = self._momentum(i)
            self.take_over([[part for item in share for part in self._parts(momentum, item)] for share in shares])

    def _momentum(self, sub_group: int) -> torch.Tensor:
        """1-D and live, of all its parameters."""
        master = self.fp32_partitioned_groups_flat[sub_group]
        state = self.optimizer.state.setdefault(master, {})
        if _MOMENTUM not in state:  # DeepSpeed makes it when it first has something to put there
            width = self.fp16_partitioned_groups_flat_numel[sub_group]
            self._create_momentum_buffer(width, sub_group, master.ds_id)  # type: ignore[attr-defined]
        momentum: torch.Tensor = state[_MOMENTUM]
        return momentum

    def _parts(self, momentum: torch.Tensor, item: Item) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's shard of an update and of the momentum."""
        param, start, update = item
        width = param.partition_numel()
        first = min(self._get_param_partition_rank(param) * width, param.ds_numel)
        return update.view(-1)[first : first + width], momentum.narrow(0, start, width)

    # ------------------------------------------------------------------------------------ offloaded

    def _apply_muon_updates_cpu_offload(self) -> None:
        super()._apply_muon_updates_cpu_offload()
        _, count = self.muon_turn()
        if not self.uses_muon() or count == 1:
            return
        # All replicas have computed everything, so whatever one of them has is right.
        for sub_group, uses_muon in enumerate(self.sub_groups_using_muon):
            if uses_muon:
                gradient = self.fp32_partitioned_groups_flat[sub_group].grad
                assert gradient is not None, "offloaded gradients live there"
                whole = [*gradient.tensor_split(count), *self._momentum(sub_group).tensor_split(count)]
                self.take_over([whole[owner::count] for owner in range(count)])

    # ------------------------------------------------------------------------------------ checkpoints

    def _rigid_load_state_dict(self, state_dict: dict[str, Any], load_optimizer_states: bool = True) -> None:
        super()._rigid_load_state_dict(state_dict, load_optimizer_states)
        # With save_muon_momentum_buffer_in_memory DeepSpeed has another reference to it, which it does not load.
        for sub_group, kept in getattr(self, "muon_momentum_buffer_partitioned_groups_flat", {}).items():
            state = self.optimizer.state.get(self.fp32_partitioned_groups_flat[sub_group], {})
            if load_optimizer_states and _MOMENTUM in state and state[_MOMENTUM] is not kept:
                kept.copy_(state[_MOMENTUM])
                state[_MOMENTUM] = kept
