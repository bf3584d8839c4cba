"""Model states saved in one number of shards, cut anew into another.

A parameter of ``numel`` elements is cut into p chunks of ``ceil(numel / p)``, the last ones padded. A *sub-group* is a
chunk of each of its parameters, one after the other. So an element's place in either layout is arithmetic, for whatever
an elementwise optimizer keeps. States are the dictionaries of DeepSpeed's files.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
Chunks = Mapping[str, Mapping[Any, torch.Tensor]]
"""One shard's chunk of each parameter: its master, and each elementwise state of the optimizer."""


@dataclass(frozen=True)
class ShardLayout:
    """Places of parameters in the flat sub-group buffers of ``shards`` shards."""

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

    def chunks(self, flats: Sequence[Mapping[Any, torch.Tensor]], names: Iterable[str] | None = None) -> Chunks:
        """Return views of chunks in the flat buffers of one shard, which are given per sub-group and by name.

        Args:
            names: of the parameters; by default all.
        """
        found = {}
        for name in self.places if names is None else names:
            group, start, numel = self.places[name]
            found[name] = {key: flat.narrow(0, start, self.width(numel)) for key, flat in flats[group].items()}
        return found

    def same_as(self, other: ShardLayout) -> bool:
        """Return whether shards of the one are shards of the other."""
        return (self.shards, self.places, self.shapes) == (other.shards, other.places, other.shapes)


def regroup(shapes: Shapes, owners: Sequence[int], shards: int, sub_group_size: int) -> tuple[list[dict], list[int]]:
    """Cut parameters into sub-groups as ZeRO-3 does on ``shards`` ranks.

    A sub-group ends when the shards of its parameters reach ``sub_group_size`` elements, or with its parameter group.

    Args:
        owners: the parameter group that each old sub-group belongs to.

    Returns:
        The new sub-groups and their owners.
    """
    groups: list[dict[str, Sequence[int]]] = []
    new_owners: list[int] = []
    for owner in sorted(set(owners)):
        params = {name: shape for group, its in zip(shapes, owners) if its == owner for name, shape in group.items()}
        widths = {name: -(-math.prod(shape) // shards) for name, shape in params.items()}
        current, size = None, 0
        for name, shape in params.items():
            if current is None:
                current, size = dict[str, Sequence[int]](), 0
                groups.append(current)
                new_owners.append(owner)
            current[name] = shape
            size += widths[name]
            if sum(widths.values()) > sub_group_size <= size:
                current = None
    return groups, new_owners


class Cut(NamedTuple):
    """One shard that is cut anew, and the part that this rank copies of it."""

    old_shards: int
    shards: int
    shard: int
    sharer: int = 0
    sharers: int = 1
    """Ranks that want the same shard. Each copies another part of it and has zeros elsewhere."""
    incomplete: Callable[[torch.Tensor], None] = lambda _flat: None
    """Called with each buffer to which the parts of the other sharers are to be added."""

    def fill(self, chunks: Chunks, numels: Mapping[str, int], load: Callable[[int], Chunks]) -> None:
        """Fill the chunks of the new shard, which are zero.

        Args:
            numels: elements of each whole parameter.
            load: returns the chunks of one old shard. Called once for each that is needed, one after another.
        """
        for old_shard in range(self.old_shards):
            pieces = []
            for name in chunks:
                width, old_width = -(-numels[name] // self.shards), -(-numels[name] // self.old_shards)
                low = max(self.shard * width, old_shard * old_width)
                high = min((self.shard + 1) * width, (old_shard + 1) * old_width, numels[name])
                if low < high:
                    pieces.append((name, low - self.shard * width, low - old_shard * old_width, high - low))
            pieces = pieces[self.sharer :: self.sharers]
            source = load(old_shard) if pieces else {}
            for name, start, old_start, length in pieces:
                for key, target in chunks[name].items():
                    if key in source.get(name, ()):
                        target.narrow(0, start, length).copy_(source[name][key].narrow(0, old_start, length))

    def by_name(self, shapes: Mapping[str, Sequence[int]], load: Callable[[int], Chunks]) -> dict[str, torch.Tensor]:
        """Return the chunk of each of these parameters. Old shards have one tensor of each, see :meth:`fill`."""
        template, numels = load(self.first), {name: math.prod(shape) for name, shape in shapes.items()}
        found = {
            name: {key: chunk.new_zeros(-(-numel // self.shards)) for key, chunk in template[name].items()}
            for name, numel in numels.items()
        }
        del template
        self.fill(found, numels, load)
        flats = {name: flat for name, chunks in found.items() for flat in chunks.values()}
        for flat in flats.values():
            self.incomplete(flat)
        return flats

    @property
    def first(self) -> int:
        """An old shard from which the new one can be copied in part."""
        return min(self.shard, self.old_shards - 1)


def reshape_optimizer(
    load: Callable[[int], Mapping[str, Any]], old: ShardLayout, new: ShardLayout, owners: Sequence[int], cut: Cut
) -> dict[str, Any]:
    """Return the file of optimizer states of one new shard, as ZeRO-3 would write it.

    Args:
        load: returns such a file of one old shard.
        owners: the parameter group that each new sub-group belongs to.

    Raises:
        MicsCheckpointError: the optimizer keeps tensors that are not one value per element.
    """
    whole = load(cut.first)
    _check(whole[BASE_STATE], owners)
    rest = {key: value for key, value in whole.items() if key != BASE_STATE}
    states = {key: value for key, value in whole[BASE_STATE].items() if key not in (BASE_STATE, FP32_GROUPS)}
    base = whole[BASE_STATE][BASE_STATE]
    elementwise, flats, state = _flats(whole[BASE_STATE]), list[dict[Any, torch.Tensor]](), dict[int, dict[Any, Any]]()
    for number, group in enumerate(new.groups):
        # What is not one value per element, such as the step, comes from where the first parameter was. A copy for each
        # sub-group, because the optimizer counts a step up in place.
        origin = old.places[next(iter(group))][0]
        flats.append({key: flat.new_zeros(new.length(number)) for key, flat in elementwise[origin].items()})
        if origin in base["state"]:
            state[number] = {
                key: flats[number][key] if key in flats[number] else copy.deepcopy(value)
                for key, value in base["state"][origin].items()
            }
    groups = [
        {**copy.deepcopy(group), "params": [index for index, owner in enumerate(owners) if owner == number]}
        for number, group in enumerate(base["param_groups"])
    ]
    del whole, base, elementwise  # one old shard in memory at a time

    def old_chunks(old_shard: int) -> Chunks:
        return old.chunks(_flats(load(old_shard)[BASE_STATE]))

    cut.fill(new.chunks(flats), {name: numel for name, (_, _, numel) in new.places.items()}, old_chunks)
    for flat in (flat for found in flats for flat in found.values()):
        cut.incomplete(flat)
    base = {"state": state, "param_groups": groups}
    masters = [found[FP32_GROUPS] for found in flats]
    return {**rest, BASE_STATE: {**states, SHARD_COUNT: new.shards, BASE_STATE: base, FP32_GROUPS: masters}}


def _flats(states: Mapping[str, Any]) -> list[dict[Any, torch.Tensor]]:
    """Return the tensors with one value per element: the masters, and the states of the optimizer."""
    kept = states[BASE_STATE]["state"]
    return [
        {FP32_GROUPS: flat, **{key: value for key, value in kept.get(number, {}).items() if _fits(value, flat)}}
        for number, flat in enumerate(states[FP32_GROUPS])
    ]


def _fits(value: Any, flat: torch.Tensor) -> bool:
    return torch.is_tensor(value) and value.dim() == 1 and value.shape == flat.shape


def _check(states: Mapping[str, Any], owners: Sequence[int]) -> None:
    base = states[BASE_STATE]
    if len(base["param_groups"]) != len(set(owners)):
        raise MicsCheckpointError(
            f"The checkpoint has {len(base['param_groups'])} optimizer parameter groups and this optimizer "
            f"{len(set(owners))}. Build the optimizer with the groups it had."
        )
    for group, kept in base["state"].items():
        flat = states[FP32_GROUPS][group]
        strange = [
            key
            for key, value in kept.items()
            if torch.is_tensor(value) and value.numel() > 1 and not _fits(value, flat)
        ]
        if strange:
            raise MicsCheckpointError(
                f"Optimizer state {strange} has not one value per parameter element, so it cannot be cut into another "
                f"number of shards. Resume with as many shards as were saved, or load the weights only."
            )


def owners_of(optimizer_state: Mapping[str, Any], count: int) -> list[int]:
    """Return the parameter group of each of ``count`` sub-groups, from a saved optimizer state."""
    owners = [0] * count
    for number, group in enumerate(optimizer_state[BASE_STATE]["param_groups"]):
        for index in group["params"]:
            owners[index] = number
    return owners


def reshape_frozen(
    load: Callable[[int], Mapping[str, Any]], shapes: Mapping[str, Sequence[int]], cut: Cut
) -> dict[str, torch.Tensor]:
    """Return frozen parameters of one new shard, from the model states of the old ones that ``load`` returns."""

    def chunks(old_shard: int) -> Chunks:
        held = load(old_shard)[FROZEN_SHARDS]
        return {name: {FROZEN_SHARDS: held[name].reshape(-1)} for name in shapes}

    return cut.by_name(shapes, chunks)


def weights_of(
    load: Callable[[int], Mapping[str, Any]], old: ShardLayout, shapes: Mapping[str, Sequence[int]], cut: Cut
) -> dict[str, torch.Tensor]:
    """Return masters of one new shard by name, from the optimizer states of the old ones that ``load`` returns."""

    def chunks(old_shard: int) -> Chunks:
        return old.chunks([{FP32_GROUPS: flat} for flat in load(old_shard)[BASE_STATE][FP32_GROUPS]], shapes)

    return cut.by_name(shapes, chunks)
