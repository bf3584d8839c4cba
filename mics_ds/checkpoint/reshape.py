"""Model states saved in one number of shards, cut anew into another.

ZeRO-3 and MiCS shard alike: a parameter of ``numel`` elements is cut into p chunks of
``ceil(numel / p)``, the last ones padded, and a *sub-group* is the concatenation of one chunk of each
of its parameters. So an element's place in either layout is arithmetic, and one pass over the old shards
fills the new one, with no more than the wanted bytes copied. Works for whatever optimizer keeps, as long as it
is elementwise.

Needs neither DeepSpeed nor a process group: states are the plain dictionaries of its files.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from ..errors import MicsCheckpointError

# Keys of DeepSpeed's stage 3 files.
BASE_STATE, FP32_GROUPS, SHARD_COUNT = "optimizer_state_dict", "fp32_flat_groups", "partition_count"
PARAM_SHAPES, FROZEN_SHAPES, FROZEN_SHARDS = "param_shapes", "frozen_param_shapes", "frozen_param_fragments"
MODULE, DP_WORLD_SIZE, TIED_NAMES = "module", "dp_world_size", "shared_params"

Shapes = Sequence[Mapping[str, Sequence[int]]]
"""Per sub-group, the shape of each parameter by name, in the order of the flat buffer."""


class Copy(NamedTuple):
    """``length`` elements of one old shard that belong to the new one."""

    name: str
    old_group: int
    old_start: int
    new_group: int
    new_start: int
    length: int


@dataclass(frozen=True)
class ShardLayout:
    """Where each parameter lies in flat sub-group buffers of ``shards`` shards."""

    shards: int
    groups: Shapes

    def width(self, numel: int) -> int:
        """Length of one shard of a parameter, padding included."""
        return -(-numel // self.shards)

    @cached_property
    def places(self) -> dict[str, tuple[int, int, int]]:
        """(sub-group, offset in its buffer, number of elements of the whole parameter) by name."""
        places = {}
        for index, group in enumerate(self.groups):
            offset = 0
            for name, shape in group.items():
                numel = math.prod(shape)
                places[name] = (index, offset, numel)
                offset += self.width(numel)
        return places

    def length(self, group: int) -> int:
        """Elements of one shard of a sub-group."""
        return sum(self.width(math.prod(shape)) for shape in self.groups[group].values())

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(shape) for group in self.groups for name, shape in group.items()}

    def same_as(self, other: ShardLayout) -> bool:
        """Whether shards of the one are shards of the other."""
        return self.shards == other.shards and [
            [(name, tuple(shape)) for name, shape in group.items()] for group in self.groups
        ] == [[(name, tuple(shape)) for name, shape in group.items()] for group in other.groups]


def regroup(shapes: Shapes, owners: Sequence[int], shards: int, sub_group_size: int) -> tuple[list[dict], list[int]]:
    """Cut parameters into sub-groups as ZeRO-3 does on ``shards`` ranks.

    A sub-group is closed when the shards of its parameters reach ``sub_group_size`` elements, and at the
    end of a parameter group.

    Args:
        shapes: of the old sub-groups.
        owners: the parameter group that each old sub-group belongs to.

    Returns:
        The new sub-groups and their owners.
    """
    groups: list[dict[str, Sequence[int]]] = []
    new_owners: list[int] = []
    for owner in sorted(set(owners)):
        params = {name: shape for group, its in zip(shapes, owners) if its == owner for name, shape in group.items()}
        total = sum(-(-math.prod(shape) // shards) for shape in params.values())
        current: dict[str, Sequence[int]] = {}
        size = 0
        for name, shape in params.items():
            current[name] = shape
            size += -(-math.prod(shape) // shards)
            if total > sub_group_size <= size:
                groups.append(current)
                new_owners.append(owner)
                current, size = {}, 0
        if current:
            groups.append(current)
            new_owners.append(owner)
    return groups, new_owners


def copies(old: ShardLayout, old_shard: int, new: ShardLayout, new_shard: int) -> Iterator[Copy]:
    """Everything in ``old_shard`` that ``new_shard`` consists of, for parameters that both layouts know."""
    for name, (new_group, new_offset, numel) in new.places.items():
        if name not in old.places:
            continue
        old_group, old_offset, _ = old.places[name]
        old_width, new_width = old.width(numel), new.width(numel)
        low = max(old_shard * old_width, new_shard * new_width)
        high = min((old_shard + 1) * old_width, (new_shard + 1) * new_width, numel)
        if low < high:
            yield Copy(
                name,
                old_group,
                old_offset + low - old_shard * old_width,
                new_group,
                new_offset + low - new_shard * new_width,
                high - low,
            )


def reshape_optimizer(
    load: Callable[[int], dict[str, Any]],
    old: ShardLayout,
    new: ShardLayout,
    new_shard: int,
    new_owners: Sequence[int],
) -> dict[str, Any]:
    """The optimizer state of one new shard, as ZeRO-3's ``state_dict()`` would give it.

    Args:
        load: returns the optimizer state of one old shard. Called once for each that is needed, one after another.
        new_owners: the parameter group that each new sub-group belongs to.

    Raises:
        MicsCheckpointError: the optimizer keeps tensors that are not one value per element.
    """
    template = load(min(new_shard, old.shards - 1))
    _check_elementwise(template)
    result = _empty_optimizer(template, old, new, new_owners)
    del template  # one old shard in memory at a time
    for shard in range(old.shards):
        pieces = list(copies(old, shard, new, new_shard))
        if pieces:
            _copy_pieces(pieces, load(shard), result)
    return result


def _empty_optimizer(
    template: Mapping[str, Any], old: ShardLayout, new: ShardLayout, new_owners: Sequence[int]
) -> dict[str, Any]:
    """The optimizer state of a new shard with zeros for everything that has one value per element."""
    base = template[BASE_STATE]
    if len(base["param_groups"]) != len(set(new_owners)):
        raise MicsCheckpointError(
            f"The checkpoint has {len(base['param_groups'])} optimizer parameter groups and this optimizer "
            f"{len(set(new_owners))}. Build the optimizer with the groups it had."
        )
    fp32: list[torch.Tensor] = []
    state: dict[int, dict[str, Any]] = {}
    for number, group in enumerate(new.groups):
        # What is not one value per element, such as the step, comes from where the first parameter was.
        origin = old.places[next(iter(group))][0] if group else 0
        flat = template[FP32_GROUPS][origin]
        fp32.append(flat.new_zeros(new.length(number)))
        if origin in base["state"]:
            state[number] = {
                # A copy for each sub-group, because the optimizer counts a step up in place.
                key: value.new_zeros(new.length(number)) if _elementwise(value, flat) else copy.deepcopy(value)
                for key, value in base["state"][origin].items()
            }
    groups = [
        {**copy.deepcopy(group), "params": [index for index, owner in enumerate(new_owners) if owner == number]}
        for number, group in enumerate(base["param_groups"])
    ]
    result = {key: value for key, value in template.items() if key not in (BASE_STATE, FP32_GROUPS)}
    result.update({SHARD_COUNT: new.shards, BASE_STATE: {"state": state, "param_groups": groups}, FP32_GROUPS: fp32})
    return result


def _copy_pieces(pieces: Iterable[Copy], source: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Copy what an old shard (``source``) has of a new one (``result``)."""
    old_fp32, old_state = source[FP32_GROUPS], source[BASE_STATE]["state"]
    new_fp32, new_state = result[FP32_GROUPS], result[BASE_STATE]["state"]
    for piece in pieces:
        pairs = [(new_fp32[piece.new_group], old_fp32[piece.old_group])]
        for key, target in new_state.get(piece.new_group, {}).items():
            value = old_state.get(piece.old_group, {}).get(key)
            if _elementwise(value, old_fp32[piece.old_group]):
                pairs.append((target, value))
        for target, value in pairs:
            part = value.narrow(0, piece.old_start, piece.length)
            target.narrow(0, piece.new_start, piece.length).copy_(part)


def _elementwise(value: Any, flat: torch.Tensor) -> bool:
    return torch.is_tensor(value) and value.dim() == 1 and value.shape == flat.shape


def _check_elementwise(template: dict[str, Any]) -> None:
    for group, state in template[BASE_STATE]["state"].items():
        strange = [
            key
            for key, value in state.items()
            if torch.is_tensor(value) and value.numel() > 1 and not _elementwise(value, template[FP32_GROUPS][group])
        ]
        if strange:
            raise MicsCheckpointError(
                f"Optimizer state {strange} has not one value per parameter element, so it cannot be cut into another "
                f"number of shards. Resume with as many shards as were saved, or load the weights only."
            )


def owners_of(optimizer_state: Mapping[str, Any], count: int) -> list[int]:
    """The parameter group of each of ``count`` sub-groups, from a saved optimizer state."""
    owners = [0] * count
    for number, group in enumerate(optimizer_state[BASE_STATE]["param_groups"]):
        for index in group["params"]:
            owners[index] = number
    return owners


def reshape_frozen(
    load: Callable[[int], Mapping[str, Any]],
    shapes: Mapping[str, Sequence[int]],
    old_shards: int,
    shards: int,
    shard: int,
) -> dict[str, torch.Tensor]:
    """Frozen parameters of one new shard. ``load`` returns the model states of one old shard.

    They are not in the flat buffers: each has its own chunk, padding included.
    """
    old, new = ShardLayout(old_shards, [shapes]), ShardLayout(shards, [shapes])
    result: dict[str, torch.Tensor] = {}
    for old_shard in range(old_shards):
        wanted = list(copies(old, old_shard, new, shard))
        if not wanted and result:
            continue
        source = load(old_shard)[FROZEN_SHARDS]
        for name, (_, _, numel) in new.places.items():
            result.setdefault(name, source[name].new_zeros(new.width(numel)))
        for piece in wanted:
            old_offset, new_offset = old.places[piece.name][1], new.places[piece.name][1]
            part = source[piece.name].reshape(-1).narrow(0, piece.old_start - old_offset, piece.length)
            result[piece.name].narrow(0, piece.new_start - new_offset, piece.length).copy_(part)
    return result
