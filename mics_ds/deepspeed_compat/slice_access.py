"""Access of users and checkpoints to masters, states and gradients of which a rank has slices only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ..comm import collectives
from ..comm.packing import ChunkLayout
from ..errors import noting
from .engine import communication_device
from .patching import replace_methods, temporarily
from .states import inner_states, is_elementwise

if TYPE_CHECKING:
    from .world_states import WorldStates

GRADIENTS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
_MASTERS, _STATES = "fp32_flat_groups", "optimizer_state_dict"
_SLICE_ELEMENTS = 4 << 20
"""Elements of each replica's slice that are on the device at a time, where slices are joined."""


class SliceAccess:
    """DeepSpeed's ``safe_get_*`` and ``safe_set_*`` on slices."""

    REPLACED = (
        "_get_fp32_grad_state_partition",
        "_fp32_state_allgather",
        "set_full_hp_param",
        "set_local_hp_param",
        "set_fp32_grad_for_param",
        "set_local_grad_for_param",
        "update_fp32_grad_for_param_vectorized",
    )

    def __init__(self, optimizer: Any, world: WorldStates) -> None:
        self._optimizer, self._world = optimizer, world
        replace_methods(optimizer, self, self.REPLACED)

    def _get_fp32_grad_state_partition(self, stock: Callable[..., Any], param: Any, release_swap_buffers: bool) -> Any:
        with temporarily(self._optimizer, GRADIENTS, {param.ds_id: self._world.mean(param)}):
            return stock(param, release_swap_buffers)

    def _fp32_state_allgather(self, stock: Callable[..., Any], param: Any, fp32_state_partition: torch.Tensor) -> Any:
        cut, device = self._world.cut_of(param), communication_device()
        self._world.finish_updates()
        rows = collectives.all_gather_rows(
            fp32_state_partition.detach().to(device).contiguous(), self._world.replication, "slices of a state"
        )
        shard = rows.new_empty(cut.numels[0])
        cut.copy_out(rows, [shard])
        return stock(param, shard)

    def _own_part(self, value: torch.Tensor, param: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's shard of a full value, and its slice of that, both padded with zeros."""
        flat, width = value.detach().flatten(), param.partition_numel()
        start = min(self._optimizer._get_param_partition_rank(param) * width, flat.numel())
        shard = flat.new_zeros(width)
        own = flat[start : start + width]
        shard[: own.numel()] = own
        return shard, self._world.cut_of(param).take(shard, self._world.replica)

    def set_full_hp_param(
        self, stock: Callable[..., None], value: torch.Tensor, param: Any, optim_state_key: str | None = None
    ) -> None:
        if not param.requires_grad:
            stock(value, param, optim_state_key)
            return
        _expect(value, param.ds_numel, param)
        self.set_state(param, optim_state_key, self._own_part(value, param)[1])

    def set_local_hp_param(
        self, stock: Callable[..., None], value: torch.Tensor, param: Any, optim_state_key: str | None = None
    ) -> None:
        if not param.requires_grad:
            stock(value, param, optim_state_key)
            return
        _expect(value, self._world.cut_of(param).width, param)
        self.set_state(param, optim_state_key, value.flatten())

    def set_state(self, param: Any, key: str | None, piece: torch.Tensor) -> None:
        state, _ = self._optimizer._get_fp32_opt_state_partition(param, release_swap_buffers=False, optim_state_key=key)
        state.data.copy_(piece.data)

    def set_fp32_grad_for_param(self, stock: Callable[..., None], value: torch.Tensor, param: Any) -> None:
        if not param.requires_grad:
            return
        _expect(value, param.ds_numel, param)
        shard, piece = self._own_part(value, param)
        # What is accumulated further has to find it too.
        getattr(self._optimizer, GRADIENTS)[param.ds_id].copy_(shard)
        self._optimizer.sync.replaced(param.ds_id)
        self._set_mean(param, piece)

    def set_local_grad_for_param(self, stock: Callable[..., None], value: torch.Tensor, param: Any) -> None:
        if not param.requires_grad:
            return
        _expect(value, self._world.cut_of(param).width, param)
        self._set_mean(param, value.flatten())

    def _set_mean(self, param: Any, piece: torch.Tensor) -> None:
        optimizer = self._optimizer
        self._world.mean(param).copy_(piece)
        if optimizer.offload_optimizer:
            sub_group, start, width = optimizer.grad_position[optimizer.get_param_id(param)]
            optimizer.fp32_partitioned_groups_flat[sub_group].grad.narrow(0, start, width).copy_(piece)
            optimizer.norm_for_param_grads[optimizer.get_param_id(param)] = optimizer._constant_buffered_norm2(piece)

    def update_fp32_grad_for_param_vectorized(
        self, stock: Callable[..., Any], update_func: Callable, param_list: list
    ) -> None:
        for param in (param for param in param_list if param.requires_grad):
            gradient = self._optimizer.get_fp32_grad_for_param(param)
            self._optimizer.set_fp32_grad_for_param(update_func(gradient, param), param)


class SliceCheckpoints:
    """State dictionaries of an optimizer without slices, made of one with slices and the other way round."""

    REPLACED = (
        "_rigid_load_state_dict",
        "_restore_from_bit16_weights",
        "_load_universal_checkpoint",
        "load_hp_checkpoint_state",
    )

    def __init__(self, optimizer: Any, world: WorldStates) -> None:
        self._optimizer, self._world = optimizer, world
        replace_methods(optimizer, self, self.REPLACED)

    def elementwise_states(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (sub-group, packed slices) of all masters and of all optimizer states of their shape.

        In the same order on all replicas.
        """
        for sub_group, master in enumerate(self._optimizer.fp32_partitioned_groups_flat):
            yield sub_group, master
            for _, held in inner_states(self._optimizer, master):
                values = [held[key] for key in sorted(held, key=str)]
                yield from ((sub_group, value) for value in values if is_elementwise(value, master.numel()))

    @contextmanager
    def whole_shards(self, wholes: Iterable[torch.Tensor]) -> Iterator[None]:
        """Let the optimizer's ``state_dict`` be that of an optimizer without slices.

        Args:
            wholes: shards in place of :meth:`elementwise_states`, in that order.
        """
        whole_of = {id(held): whole for (_, held), whole in zip(self.elementwise_states(), wholes)}
        states = self._optimizer.state_dict()
        inner = states[_STATES]
        held = {
            index: {key: whole_of.get(id(value), value) for key, value in state.items()}
            for index, state in inner["state"].items()
        }
        masters = [whole_of[id(master)] for master in self._optimizer.fp32_partitioned_groups_flat]
        whole = {**states, _STATES: {**inner, "state": held}, _MASTERS: masters}
        with temporarily(self._optimizer, "state_dict", lambda: whole):
            yield

    @contextmanager
    def joined(self, keeps: bool, errors: list[str]) -> Iterator[None]:
        """Let the optimizer's ``state_dict`` be that of an optimizer without slices on the replicas that keep whole
        shards, in host memory. Collective over the replicas. What this rank alone could not do is noted.

        Raises:
            MicsCommError: another rank has died.
        """
        self._world.finish_updates()
        wholes = list[torch.Tensor]()
        for sub_group, held in self.elementwise_states():
            rows: torch.Tensor | None = None
            with noting(errors):
                if keeps and not errors:
                    rows = held.new_empty(self._world.replication.size, held.numel(), device="cpu")
            # A ring brings a shard to all replicas in the time that one of them alone would need to receive it.
            for start in range(0, held.numel(), _SLICE_ELEMENTS):
                part = held.detach()[start : start + _SLICE_ELEMENTS].to(communication_device())
                found = collectives.all_gather_rows(part, self._world.replication, "slices of optimizer states")
                if rows is not None:
                    rows[:, start : start + part.numel()].copy_(found)
            with noting(errors):
                if rows is not None:
                    cut = self._world.cuts[sub_group]
                    wholes.append(rows.new_empty(cut.flat_starts[-1]))
                    cut.copy_out(rows, wholes[-1].split(list(cut.numels)))
        with self.whole_shards(wholes) if keeps and not errors else nullcontext():
            yield

    def _rigid_load_state_dict(
        self, stock: Callable[..., None], state_dict: dict[str, Any], load_optimizer_states: bool = True
    ) -> None:
        with self._world.slices_stand_in(loads=True):
            stock(self._cut_states(state_dict), load_optimizer_states)

    def _cut_states(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        inner = state_dict[_STATES]
        by_group: dict[int, list[int]] = {}
        for sub_group in range(len(self._world.cuts)):
            by_group.setdefault(self._optimizer.sub_group_to_group_id[sub_group], []).append(sub_group)
        # The inner optimizer numbers its parameters, one for each sub-group, by parameter group.
        order = [sub_group for group in range(len(inner["param_groups"])) for sub_group in by_group.get(group, [])]

        def slice_of(value: Any, cut: ChunkLayout) -> Any:
            return cut.take(value, self._world.replica) if is_elementwise(value, cut.flat_starts[-1]) else value

        held = {
            index: {key: slice_of(value, self._world.cuts[order[index]]) for key, value in state.items()}
            for index, state in inner["state"].items()
        }
        masters = [cut.take(flat, self._world.replica) for cut, flat in zip(self._world.cuts, state_dict[_MASTERS])]
        return {**state_dict, _STATES: {**inner, "state": held}, _MASTERS: masters}

    def _restore_from_bit16_weights(self, stock: Callable[..., None]) -> None:
        with self._world.slices_stand_in(loads=False):
            stock()

    def _load_universal_checkpoint(self, stock: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        with self._world.slices_stand_in(loads=True):
            stock(*args, **kwargs)

    def load_hp_checkpoint_state(self, stock: Callable[..., Any], folder: str, key: str, param: Any = None) -> Any:
        shard = stock(folder, key, param)
        return shard if param is None else self._world.cut_of(param).take(shard, self._world.replica)


def _expect(value: torch.Tensor, numel: int, param: Any) -> None:
    if value.numel() != numel:
        raise ValueError(
            f"Expected {numel} elements for parameter {getattr(param, 'ds_id', '?')} of shape "
            f"{tuple(getattr(param, 'ds_shape', param.shape))}, got {value.numel()}."
        )
