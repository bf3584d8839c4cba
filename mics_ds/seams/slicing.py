"""DeepSpeed's stage 3 optimizer with masters and optimizer states of a slice of each shard, instead of all of it.

DeepSpeed takes for granted that a master has the shape of the 16-bit shard it belongs to. Where it makes one from the
other, it finds *stand-ins* here: the slices of the shards, packed, in place of the shards. Where it has changed the
stand-ins, the hook :meth:`SlicingSeam.publish` brings the changes to the shards of all replicas.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from ..comm.slices import Slices
from .optimizer import OptimizerSeam

_GRADIENTS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
_MASTERS, _STATES = "fp32_flat_groups", "optimizer_state_dict"


class _Means:
    """Slices of final gradients, by ``ds_id``."""

    def __init__(self, ids: Container[int], mean: Callable[[int], torch.Tensor]) -> None:
        self._ids, self._mean = ids, mean

    def __contains__(self, ds_id: int) -> bool:
        return ds_id in self._ids

    def __getitem__(self, ds_id: int) -> torch.Tensor:
        return self._mean(ds_id)


class SlicingSeam(OptimizerSeam):
    """The stage 3 optimizer with hooks for slices. Without them it is DeepSpeed's."""

    _slices: list[Slices] | None = None
    """By sub-group; ``None`` where masters are of whole shards."""
    _stand_in = False
    _shared: list[bool]
    """By sub-group, whether DeepSpeed would have one tensor for masters and weights."""
    gathered_states: dict[str, Any] | None = None
    """What :meth:`state_dict` returns while set."""

    # ------------------------------------------------------------------------------------ hooks

    def cut_shards(self, shards: tuple[int, ...]) -> Slices | None:
        """How to cut the shards of a sub-group, or ``None`` not to. The same answer for all sub-groups."""
        return None

    def mean_slice(self, ds_id: int) -> torch.Tensor:
        """(elements of a slice,): this rank's slice of a parameter's gradient, once that is final. Live."""
        raise NotImplementedError

    def publish(self, sub_group: int, packed: torch.Tensor) -> None:
        """Begin to fill the sub-group's shards, of all replicas, from the packed slices of all of them."""
        raise NotImplementedError

    def whole_shard(self, param: Any, piece: torch.Tensor) -> torch.Tensor:
        """The shard that ``piece`` is this rank's slice of, from all replicas. Collective over them."""
        raise NotImplementedError

    def gradient_was_set(self, ds_id: int) -> None:
        """All replicas have set the gradient of a parameter: the whole shard, and :meth:`mean_slice`."""

    def shards_are_read(self) -> None:
        """Somebody is about to read or write weights other than by gathering them. What was published is there when
        this returns."""

    # ------------------------------------------------------------------------- stand-ins for shards

    @property
    def is_sliced(self) -> bool:
        return self._slices is not None

    def shards_become_final(self) -> bool:
        return self._slices is None

    def slices_of(self, sub_group: int) -> Slices:
        assert self._slices is not None, "only asked for where there are some"
        return self._slices[sub_group]

    @staticmethod
    def stays_gathered(param: Any) -> bool:
        """Whether a parameter stays gathered between steps."""
        return bool(param.ds_persist)

    def new_gradients(self, numel: int) -> torch.Tensor:
        """(numel,) zeros, in the kind of memory that gradients are accumulated in."""
        like = self.gradient_shards
        made = torch.zeros(numel, dtype=like.dtype, device=like.device)
        return get_accelerator().pin_memory(made) if self.offload_optimizer_pin_memory else made

    @contextmanager
    def _slices_stand_in(self) -> Iterator[None]:
        """DeepSpeed finds packed slices where it looks for shards: copies, whatever it does to them."""
        if self._slices is None or self._stand_in:
            yield
            return
        self.shards_are_read()
        names = ("fp16_partitioned_groups_flat", "fp16_partitioned_groups_flat_numel", "fp16_partitioned_groups")
        shards = {name: getattr(self, name) for name in names}
        packed = [cut.take(flat) for cut, flat in zip(self._slices, shards[names[0]])]
        self.fp16_partitioned_groups_flat = packed
        self.fp16_partitioned_groups_flat_numel = [cut.numel for cut in self._slices]
        self.fp16_partitioned_groups = [
            [_as_stand_in(flat[start:end]) for start, end in pairwise(cut.starts)]
            for cut, flat in zip(self._slices, packed)
        ]
        self._stand_in = True
        try:
            yield
        finally:
            self._stand_in = False
            for name, value in shards.items():
                setattr(self, name, value)

    def _publish_all(self) -> None:
        """After masters were loaded."""
        if self._slices is not None and not self._stand_in:
            for sub_group in range(len(self._slices)):
                self._publish(sub_group)
            self.shards_are_read()

    def _publish(self, sub_group: int) -> None:
        master, flat = self.fp32_partitioned_groups_flat[sub_group], self.fp16_partitioned_groups_flat[sub_group]
        self.publish(sub_group, master.detach().to(self.communication_device, flat.dtype))

    def _setup_for_real_optimizer(self) -> None:
        cuts = [
            self.cut_shards(tuple(param.partition_numel() for param in sub_group)) for sub_group in self.fp16_groups
        ]
        found = [cut for cut in cuts if cut is not None]
        if found:
            assert len(found) == len(cuts), "cut_shards answers alike for all sub-groups"
            self._slices = found
        with self._slices_stand_in():
            super()._setup_for_real_optimizer()
            pairs = zip(self.fp32_partitioned_groups_flat, self.fp16_partitioned_groups_flat)
            self._shared = [bool(found) and master.data_ptr() == flat.data_ptr() for master, flat in pairs]

    def _link_all_hp_params(self) -> None:
        super()._link_all_hp_params()
        if self._slices is None:
            return
        for shared, params in zip(self._shared, self.fp16_groups):
            if shared:  # then whoever changes weights changes masters
                for param in params:
                    param.mics_master_follows = functools.partial(self._master_follows, param)

    def _master_follows(self, param: Any) -> None:
        cut = self.cut_shards((param.partition_numel(),))
        assert cut is not None, "only set for slices"
        self._set(param, None, cut.take(param.ds_tensor.data))

    def set_grad_positions(self) -> None:
        super().set_grad_positions()
        if self._slices is None:
            return
        for sub_group, (cut, params) in enumerate(zip(self._slices, self.fp16_groups)):
            for param, start, width in zip(params, cut.starts, cut.widths):
                self.grad_position[self.get_param_id(param)] = [sub_group, start, width]

    # ---------------------------------------------------------------------------------- the step

    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None:
        if self._slices is None:
            super()._reassign_or_swap_out_partitioned_parameters(sub_group_id)
        else:
            self._publish(sub_group_id)

    def independent_gradient_partition_epilogue(self) -> None:
        super().independent_gradient_partition_epilogue()
        if self._slices is not None and not self.offload_optimizer:
            self.averaged_gradients = {
                sub_group: [self._mean_or_zeros(param) for param in params]
                for sub_group, params in enumerate(self.fp16_groups)
            }

    def _mean_or_zeros(self, param: Any) -> torch.Tensor:
        mean = self.mean_slice(param.ds_id)
        return mean if param.requires_grad else torch.zeros_like(mean)

    @contextmanager
    def _means_stand_in(self) -> Iterator[None]:
        """DeepSpeed finds slices of final gradients where it looks for shards of gradients."""
        if self._slices is None:
            yield
            return
        shards = getattr(self, _GRADIENTS)
        setattr(self, _GRADIENTS, _Means(shards, self.mean_slice))
        try:
            yield
        finally:
            setattr(self, _GRADIENTS, shards)

    def finish_offloaded_gradients(self, ids: set[int]) -> None:
        with self._means_stand_in():
            super().finish_offloaded_gradients(ids)

    def finalize_gradient_accumulation_boundary(self) -> None:
        self.before_gradients_are_read(local=False)
        with self._means_stand_in():
            super().finalize_gradient_accumulation_boundary()

    def gradient_width(self, param: Any) -> int:
        width: int = self.grad_position[self.get_param_id(param)][2]
        return width

    # ------------------------------------------------------------------------- reading and setting

    def _get_fp32_grad_state_partition(self, param: Any, release_swap_buffers: bool) -> Any:
        with self._means_stand_in():
            return super()._get_fp32_grad_state_partition(param, release_swap_buffers)

    def _fp32_state_allgather(self, param: Any, fp32_state_partition: torch.Tensor) -> Any:
        if self._slices is not None:
            fp32_state_partition = self.whole_shard(param, fp32_state_partition)
        return super()._fp32_state_allgather(param, fp32_state_partition)

    def _own_part(self, value: torch.Tensor, param: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's shard of a full value, and its slice of that, both padded with zeros."""
        cut = self.cut_shards((param.partition_numel(),))
        assert cut is not None, "only asked for where shards are cut"
        flat, width = value.detach().flatten(), param.partition_numel()
        start = min(self._get_param_partition_rank(param) * width, flat.numel())
        shard = flat.new_zeros(width)
        own = flat[start : start + width]
        shard[: own.numel()] = own
        return shard, cut.take(shard)

    def set_full_hp_param(self, value: torch.Tensor, param: Any, optim_state_key: str | None = None) -> None:
        if self._slices is None or not param.requires_grad:
            super().set_full_hp_param(value, param, optim_state_key)
            return
        _expect(value, param.ds_numel, param)
        self._set(param, optim_state_key, self._own_part(value, param)[1])

    def set_local_hp_param(self, value: torch.Tensor, param: Any, optim_state_key: str | None = None) -> None:
        if self._slices is None or not param.requires_grad:
            super().set_local_hp_param(value, param, optim_state_key)
            return
        _expect(value, self.gradient_width(param), param)
        self._set(param, optim_state_key, value.flatten())

    def _set(self, param: Any, key: str | None, piece: torch.Tensor) -> None:
        state, _ = self._get_fp32_opt_state_partition(param, release_swap_buffers=False, optim_state_key=key)
        state.data.copy_(piece.data)

    def set_fp32_grad_for_param(self, value: torch.Tensor, param: Any) -> None:
        if self._slices is None or not param.requires_grad:
            super().set_fp32_grad_for_param(value, param)
            return
        self.before_gradients_are_read(local=False)
        self._set_gradient(param, value)

    def _set_gradient(self, param: Any, value: torch.Tensor) -> None:
        _expect(value, param.ds_numel, param)
        shard, piece = self._own_part(value, param)
        # What is accumulated further has to find it too.
        getattr(self, _GRADIENTS)[param.ds_id].copy_(shard)
        self.mean_slice(param.ds_id).copy_(piece)
        self.gradient_was_set(param.ds_id)
        self._set_offloaded_gradient(param, piece)

    def _set_offloaded_gradient(self, param: Any, piece: torch.Tensor) -> None:
        if self.offload_optimizer:
            sub_group, start, width = self.grad_position[self.get_param_id(param)]
            self.fp32_partitioned_groups_flat[sub_group].grad.narrow(0, start, width).copy_(piece)
            self.norm_for_param_grads[self.get_param_id(param)] = self._constant_buffered_norm2(piece)

    def set_local_grad_for_param(self, value: torch.Tensor, param: Any) -> None:
        if self._slices is None or not param.requires_grad:
            super().set_local_grad_for_param(value, param)
            return
        self.before_gradients_are_read(local=True)
        _expect(value, self.gradient_width(param), param)
        self.mean_slice(param.ds_id).copy_(value.flatten())
        self._set_offloaded_gradient(param, value.flatten())

    def update_fp32_grad_for_param_vectorized(self, update_func: Callable, param_list: list) -> Any:
        if self._slices is None:
            return super().update_fp32_grad_for_param_vectorized(update_func, param_list)
        for param in (param for param in param_list if param.requires_grad):
            self._set_gradient(param, update_func(self.get_fp32_grad_for_param(param), param))
        return None

    def offload_states(self, *args: Any, **kwargs: Any) -> Any:
        self.shards_are_read()
        return super().offload_states(*args, **kwargs)

    # -------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> Any:
        return super().state_dict() if self.gathered_states is None else self.gathered_states

    def elementwise_states(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(sub-group, packed slices) of all masters and of all optimizer states of their shape, in the same order on
        all replicas."""
        for sub_group, master in enumerate(self.fp32_partitioned_groups_flat):
            yield sub_group, master
            for _, held in sorted(self._held(master).items(), key=lambda item: str(item[0])):
                if _is_elementwise(held, master.numel()):
                    yield sub_group, held

    def _held(self, master: torch.Tensor) -> Mapping[Any, Any]:
        for inner in (self.optimizer, getattr(self, "backup_optimizer", None)):
            if inner is not None and inner.state.get(master):
                return inner.state[master]
        return {}

    def state_dict_with(self, wholes: Iterable[torch.Tensor]) -> dict[str, Any]:
        """The state dictionary of an optimizer without slices.

        Args:
            wholes: shards in place of :meth:`elementwise_states`, in that order.
        """
        whole_of = {id(held): whole for (_, held), whole in zip(self.elementwise_states(), wholes)}
        states = super().state_dict()
        inner = states[_STATES]
        held = {
            index: {key: whole_of.get(id(value), value) for key, value in state.items()}
            for index, state in inner["state"].items()
        }
        masters = [whole_of[id(master)] for master in self.fp32_partitioned_groups_flat]
        return {**states, _STATES: {**inner, "state": held}, _MASTERS: masters}

    def _rigid_load_state_dict(self, state_dict: dict[str, Any], load_optimizer_states: bool = True) -> None:
        with self._slices_stand_in():
            cut = state_dict if self._slices is None else self._cut_states(state_dict, self._slices)
            super()._rigid_load_state_dict(cut, load_optimizer_states)
        self._publish_all()

    def _cut_states(self, state_dict: Mapping[str, Any], slices: list[Slices]) -> dict[str, Any]:
        inner = state_dict[_STATES]
        by_group: dict[int, list[int]] = {}
        for sub_group in range(len(slices)):
            by_group.setdefault(self.sub_group_to_group_id[sub_group], []).append(sub_group)
        # The inner optimizer numbers its parameters, one for each sub-group, by parameter group.
        order = [sub_group for group in range(len(inner["param_groups"])) for sub_group in by_group.get(group, [])]
        held = {
            index: {key: _cut(value, slices[order[index]]) for key, value in state.items()}
            for index, state in inner["state"].items()
        }
        masters = [cut.take(flat) for cut, flat in zip(slices, state_dict[_MASTERS])]
        return {**state_dict, _STATES: {**inner, "state": held}, _MASTERS: masters}

    def _restore_from_bit16_weights(self) -> None:
        with self._slices_stand_in():
            super()._restore_from_bit16_weights()

    def _load_universal_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._slices_stand_in():
            super()._load_universal_checkpoint(*args, **kwargs)
        self._publish_all()

    def load_hp_checkpoint_state(self, folder: str, key: str, param: Any = None) -> Any:
        shard = super().load_hp_checkpoint_state(folder, key, param)
        cut = None if param is None else self.cut_shards((param.partition_numel(),))
        return shard if cut is None else cut.take(shard)


def _as_stand_in(piece: Any) -> Any:
    """Like a shard, it knows its size."""
    piece.ds_numel = piece.numel()
    return piece


def _cut(value: Any, cut: Slices) -> Any:
    return cut.take(value) if _is_elementwise(value, cut.shard_starts[-1]) else value


def _is_elementwise(value: Any, numel: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.numel() == numel


def _expect(value: torch.Tensor, numel: int, param: Any) -> None:
    if value.numel() != numel:
        raise ValueError(
            f"Expected {numel} elements for parameter {getattr(param, 'ds_id', '?')} of shape "
            f"{tuple(getattr(param, 'ds_shape', param.shape))}, got {value.numel()}."
        )
