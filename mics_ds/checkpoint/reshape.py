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
from itertools import islice, zip_longest
from pathlib import Path
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

    def same_as(self, other: ShardLayout) -> bool:
        """Return whether shards of the one are shards of the other."""
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


class Sharers(NamedTuple):
    """Ranks that want the same shard: each copies another part of it, and has zeros elsewhere."""

    place: int = 0
    size: int = 1
    incomplete: Callable[[torch.Tensor], None] = lambda _flat: None
    """Called with each buffer to which the parts of the others are to be added."""


ALONE = Sharers()

Flats = Sequence[Mapping[Any, torch.Tensor]]
"""Per sub-group, what has one value per element, by its name: flat buffers of one length."""


def cut(
    load: Callable[[int], Flats], old: ShardLayout, new: ShardLayout, shard: int, sharers: Sharers
) -> list[dict[Any, torch.Tensor]]:
    """Flat buffers of one new shard, with zeros for padding.

    Args:
        load: returns those of one old shard. Called once for each that is needed, one after another.
    """
    template = load(min(shard, old.shards - 1))
    result = [
        {key: flat.new_zeros(new.length(number)) for key, flat in template[old.places[name][0]].items()}
        for number, name in enumerate(next(iter(group)) for group in new.groups)
    ]
    del template  # one old shard in memory at a time
    for old_shard in range(old.shards):
        pieces = list(islice(copies(old, old_shard, new, shard), sharers.place, None, sharers.size))
        source = load(old_shard) if pieces else ()
        for piece in pieces:
            for key, target in result[piece.new_group].items():
                flat = source[piece.old_group].get(key)
                if flat is not None:
                    part = flat.narrow(0, piece.old_start, piece.length)
                    target.narrow(0, piece.new_start, piece.length).copy_(part)
    for flats in result:
        for flat in flats.values():
            sharers.incomplete(flat)
    return result


def reshape_optimizer(
    load: Callable[[int], Mapping[str, Any]],
    old: ShardLayout,
    new: ShardLayout,
    shard: int,
    owners: Sequence[int],
    sharers: Sharers = ALONE,
) -> dict[str, Any]:
    """The file of optimizer states of one new shard, as ZeRO-3 would write it.

    Args:
        load: returns such a file of one old shard.
        owners: the parameter group that each new sub-group belongs to.

    Raises:
        MicsCheckpointError: the optimizer keeps tensors that are not one value per element.
    """
    whole = load(min(shard, old.shards - 1))
    _check(whole[BASE_STATE], owners)
    rest = {key: value for key, value in whole.items() if key != BASE_STATE}
    states = {key: value for key, value in whole[BASE_STATE].items() if key not in (BASE_STATE, FP32_GROUPS)}
    base = whole[BASE_STATE][BASE_STATE]
    # What is not one value per element, such as the step, comes from where the first parameter was. A copy for each
    # sub-group, because the optimizer counts a step up in place.
    origins = [old.places[next(iter(group))][0] for group in new.groups]
    elementwise = _flats(whole[BASE_STATE])
    others = {
        number: {key: copy.deepcopy(value) for key, value in base["state"][origin].items() if key not in known}
        for number, origin, known in ((number, origin, elementwise[origin]) for number, origin in enumerate(origins))
        if origin in base["state"]
    }
    groups = [
        {**copy.deepcopy(group), "params": [index for index, owner in enumerate(owners) if owner == number]}
        for number, group in enumerate(base["param_groups"])
    ]
    del whole, base, elementwise
    flats = cut(lambda old_shard: _flats(load(old_shard)[BASE_STATE]), old, new, shard, sharers)
    masters = [found.pop(FP32_GROUPS) for found in flats]
    state = {number: {**flats[number], **values} for number, values in others.items()}
    base = {"state": state, "param_groups": groups}
    return {**rest, BASE_STATE: {**states, SHARD_COUNT: new.shards, BASE_STATE: base, FP32_GROUPS: masters}}


def _flats(states: Mapping[str, Any]) -> Flats:
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
    sharers: Sharers = ALONE,
) -> dict[str, torch.Tensor]:
    """Frozen parameters of one new shard. They are not in the flat buffers: each has its own chunk, padding included.

    Args:
        load: returns the model states of one old shard.
    """

    def flats(old_shard: int) -> Flats:
        held = load(old_shard)[FROZEN_SHARDS]
        return [{name: held[name].reshape(-1)} for name in shapes]

    found = cut(flats, _one_by_one(old_shards, shapes), _one_by_one(shards, shapes), shard, sharers)
    return {name: flat for item in found for name, flat in item.items()}


def weights_of(
    load: Callable[[int], Mapping[str, Any]],
    old: ShardLayout,
    shapes: Mapping[str, Sequence[int]],
    shards: int,
    shard: int,
    sharers: Sharers = ALONE,
) -> dict[str, torch.Tensor]:
    """The masters of some parameters in one new shard, by name.

    Args:
        load: returns the file of optimizer states of one old shard.
    """

    def flats(old_shard: int) -> Flats:
        return [{FP32_GROUPS: flat} for flat in load(old_shard)[BASE_STATE][FP32_GROUPS]]

    found = cut(flats, old, _one_by_one(shards, shapes), shard, sharers)
    return {name: item[FP32_GROUPS] for name, item in zip(shapes, found)}


def _one_by_one(shards: int, shapes: Mapping[str, Sequence[int]]) -> ShardLayout:
    """Each parameter in a buffer of its own."""
    return ShardLayout(shards, [{name: shape} for name, shape in shapes.items()])


# --------------------------------------------------------------------------------------------------
# Why a checkpoint does not fit, by what users do most often, with the flag or the tool that helps

_WEIGHTS_ALONE = "load_checkpoint(..., load_module_only=True) loads the weights alone, and the optimizer begins anew"
_NOT_STRICT = (
    "load_checkpoint(..., load_module_only=True, load_module_strict=False) loads the weights of those that are in both"
)
_RESIZE = (
    "If embeddings were resized, resize them alike before deepspeed.initialize; otherwise the model was built with "
    "other sizes"
)
_SINCE = "since (an adapter, a head)"


class Parameters(NamedTuple):
    """Parameters by name, with their shapes."""

    trained: Mapping[str, Sequence[int]]
    """Parameters that the optimizer has."""
    frozen: Mapping[str, Sequence[int]] | None
    """All others; ``None`` if they were not saved."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(shape) for name, shape in {**self.trained, **(self.frozen or {})}.items()}


def why_not_these(here: Parameters, there: Parameters) -> list[str]:
    """Why optimizer states of some parameters cannot be loaded for others, the most likely cause first.

    Args:
        here: those of the engine.
        there: those of the checkpoint.

    Returns:
        Whole phrases; none if all parameters fit.
    """
    if there.frozen is None:  # whoever leaves frozen ones out has them from elsewhere
        here = here._replace(
            frozen={name: shape for name, shape in (here.frozen or {}).items() if name in there.trained}
        )
    mine, theirs = here.shapes, there.shapes
    missing = [f"{name} is missing" for name in mine if name not in theirs]
    unexpected = [f"{name} is unexpected" for name in theirs if name not in mine]
    if missing and len(missing) == len(mine):
        return [_renamed(mine, theirs) or f"it is of another model: {_some([*missing, *unexpected], 2)}"]
    reshaped = [
        f"{name} has shape {theirs[name]} there and {mine[name]} here"
        for name in mine
        if name in theirs and mine[name] != theirs[name]
    ]
    frozen_there = [
        f"{name} is trained here and was frozen there" for name in here.trained if name in (there.frozen or ())
    ]
    frozen_here = [
        f"{name} is frozen here and was trained there" for name in here.frozen or () if name in there.trained
    ]
    refrozen = [said for pair in zip_longest(frozen_there, frozen_here) for said in pair if said]
    kinds = [
        (refrozen, "other parameters were frozen", 2, f"Freeze the same ones to resume, or {_WEIGHTS_ALONE}"),
        (reshaped, "shapes differ", 1, _RESIZE),
        (missing, "it lacks parameters", 1, f"If they were added {_SINCE}, {_NOT_STRICT}"),
        (unexpected, "it has more parameters", 1, f"If they were removed {_SINCE}, {_NOT_STRICT}"),
    ]
    return [f"{what}: {_some(said, count)}. {remedy}" for said, what, count, remedy in kinds if said]


def _renamed(mine: Iterable[str], theirs: Iterable[str]) -> str:
    """Return an explanation if all names of one side have a prefix that the other side lacks."""
    one, other = sorted(mine, key=len), sorted(theirs, key=len)
    for longer, shorter, places in (
        (one, other, ("here", "in the checkpoint")),
        (other, one, ("in the checkpoint", "here")),
    ):
        known, first = set(shorter), longer[0] if longer else ""
        prefixes = (first[: -len(name)] for name in shorter if first.endswith(f".{name}"))
        prefix = next((item for item in prefixes if all(name.removeprefix(item) in known for name in longer)), "")
        if prefix:
            return (
                f"names {places[0]} begin with {prefix!r}, which those {places[1]} do not. Wrap the model as the job "
                f"that saved it did (PEFT, torch.compile, a module around it) before deepspeed.initialize"
            )
    return ""


def _some(said: Sequence[str], count: int) -> str:
    return "; ".join(said[:count]) + (f" and {len(said) - count} more" if len(said) > count else "")


def why_not_these_weights(here: Parameters, there: Parameters) -> list[str]:
    """Return why a checkpoint's weights alone do not fit.

    It does not matter which parameters are frozen: optimizer states begin anew.
    """
    mine, theirs = Parameters(here.shapes, {}), Parameters(there.shapes, {})
    return why_not_these(mine, theirs._replace(frozen=None) if there.frozen is None else theirs)


def what_else_it_is(target: Path) -> str:
    """Return what a folder holds that has no files of ZeRO stage 3."""
    inner = sorted(path.parent.name for path in target.glob("*/*_model_states.pt"))
    if list(target.glob("mp_rank_*_model_states.pt")):
        return (
            f"{target} was saved by ZeRO stage 0 to 2. Convert it with DeepSpeed's ds_to_universal and set "
            f'"checkpoint": {{"load_universal": true}}'
        )
    if (target / "zero").is_dir():
        return f'{target} is a universal checkpoint. Set "checkpoint": {{"load_universal": true}} to load it'
    if list(target.glob("*.safetensors")) or list(target.glob("pytorch_model*.bin")):
        return f"{target} has weights alone, and no states of an engine. Load it with from_pretrained instead"
    if inner:
        return f"{target} is the folder of a checkpoint, not the checkpoint. Give tag={f'{target.name}/{inner[-1]}'!r}"
    return f"{target} has no *_model_states.pt of ZeRO stage 3"
