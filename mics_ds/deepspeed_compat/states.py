"""States that one rank keeps from step to step, as named tensors: shards of weights, masters, optimizer states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..comm.packing import ChunkLayout

WEIGHTS, MASTER, NUMBERS = "weights", "master", "numbers"
NO_GROUP = -1
"""Stands in place of a sub-group, for parameters that the optimizer does not train."""


class Piece(NamedTuple):
    """A part of a state that belongs to one parameter. What belongs to none is padding, which is zero."""

    parameter: str
    start: int
    stop: int
    offset: int
    """Index of the first element in the flat parameter."""


@dataclass(frozen=True)
class State:
    """One tensor that training continues from."""

    name: str
    """``weights``, ``master``, ``numbers``, or the optimizer's name for it. Where weights and masters are the same
    memory (fp32), there is a ``master`` only."""
    group: int
    """Sub-group, or :data:`NO_GROUP`."""
    tensor: torch.Tensor
    """1-D and live: writing to it changes the state."""
    pieces: tuple[Piece, ...]
    """Pieces in ascending order."""
    replicated: bool
    """Whether the other ranks of the replication group must have the same bits."""
    made_from_it: State | None = field(default=None, compare=False)
    """Weights of the slice, as a copy, where the state is a slice of a master."""
    put_back: Callable[[], None] = field(default=lambda: None, compare=False)
    """Function to call after writing to :attr:`tensor`, which is a copy for :data:`NUMBERS`."""

    @property
    def layout(self) -> tuple[str, int, str, int]:
        """Return what has to be equal on all copies before their values can be compared."""
        return self.name, self.group, str(self.tensor.dtype), self.tensor.numel()


def states_of(optimizer: Any, replicated: bool) -> list[State]:
    """Everything that the next step of a stage 3 optimizer starts from, in the same order on all ranks.

    Not among it: gradients, what is gathered, buffers of modules (replicas may have their own), random numbers.
    """
    names = {param.ds_id: name for name, param in optimizer.module.named_parameters()}
    world = getattr(optimizer, "world_states", None)
    if world is not None:
        world.finish_updates()
    found: list[State] = []
    for group, params in enumerate(optimizer.fp16_groups):
        pieces = tuple(_pieces(params, names))
        weights, master = optimizer.fp16_partitioned_groups_flat[group], optimizer.fp32_partitioned_groups_flat[group]
        if weights.data_ptr() != master.data_ptr():
            found.append(State(WEIGHTS, group, weights.detach(), pieces, replicated))
        if world is not None:
            cut = world.cuts[group]
            pieces = tuple(_slices(params, names, cut, world.replica))
            own = State(WEIGHTS, group, cut.take(weights.detach(), world.replica), pieces, replicated=False)
            found.append(State(MASTER, group, master.detach(), pieces, replicated=False, made_from_it=own))
        else:
            found.append(State(MASTER, group, master.detach(), pieces, replicated))
        found += _optimizer_states(
            optimizer, group, master, pieces, replicated, elementwise=replicated and world is None
        )
    trained = {param.ds_id for params in optimizer.fp16_groups for param in params}
    for param in optimizer.module.parameters():
        if param.ds_id not in trained:
            found.append(
                State(WEIGHTS, NO_GROUP, param.ds_tensor.detach().view(-1), tuple(_pieces([param], names)), replicated)
            )
    found += _loss_scale(optimizer, replicated)
    found += _residuals(optimizer, names)
    return found


def _pieces(params: Sequence[Any], names: dict[int, str]) -> Iterator[Piece]:
    start = 0
    for param in params:
        width = param.partition_numel()
        offset = torch.distributed.get_rank(param.ds_process_group) * width
        length = max(0, min(width, param.ds_numel - offset))
        if length:
            yield Piece(names[param.ds_id], start, start + length, offset)
        start += width


def _slices(params: Sequence[Any], names: dict[int, str], cut: ChunkLayout, replica: int) -> Iterator[Piece]:
    """Yield the pieces of masters and states of a replica's slices."""
    for index, param in enumerate(params):
        first, last = cut.real(index, replica)
        start = torch.distributed.get_rank(param.ds_process_group) * param.partition_numel()
        length = max(0, min(last, param.ds_numel - start) - first)
        if length:
            yield Piece(names[param.ds_id], cut.starts[index], cut.starts[index] + length, start + first)


def _optimizer_states(
    optimizer: Any,
    group: int,
    master: torch.Tensor,
    pieces: tuple[Piece, ...],
    replicated: bool,
    elementwise: bool,
) -> Iterator[State]:
    """``elementwise``: whether those of the shape of masters are replicated."""
    for inner in (optimizer.optimizer, getattr(optimizer, "backup_optimizer", None)):
        held = {} if inner is None else inner.state.get(master, {})
        numbers = []
        for key, value in sorted(held.items(), key=lambda item: str(item[0])):
            if isinstance(value, torch.Tensor):
                tensor = value.detach().view(-1)
                if value.numel() == master.numel() and value.dim() > 0:
                    yield State(str(key), group, tensor, pieces, elementwise)
                else:
                    yield State(
                        str(key), group, tensor, (Piece(f"sub-group {group}", 0, value.numel(), 0),), replicated
                    )
            elif isinstance(value, (int, float)):
                numbers.append((held, key))
        # torch's Adam counts steps in the state, others in the parameter group
        owner = None if inner is None else inner.param_groups[optimizer.sub_group_to_group_id[group]]
        if owner is not None and isinstance(owner.get("step"), int):
            numbers.append((owner, "step"))
        if numbers:
            yield _numbers(f"sub-group {group}", group, numbers, replicated)


def _residuals(optimizer: Any, names: dict[int, str]) -> Iterator[State]:
    """Yield what hop 2 has rounded off. Each rank has its own."""
    sync = getattr(optimizer, "sync", None)
    for name, tensor in ({} if sync is None else sync.residuals()).items():
        pieces, start = [], 0
        for key, first, numel, width in residual_extents(optimizer, name):
            if numel:
                pieces.append(Piece(names[key], start, start + numel, first))
            start += width
        yield State(f"{name} residual", NO_GROUP, tensor, tuple(pieces), replicated=False)


def residual_extents(optimizer: Any, name: str) -> Iterator[tuple[int, int, int, int]]:
    """Yield for each parameter, in the order of a residual: its ``ds_id``, the first element that is there, how many
    there are, and how many there are with padding."""
    params = {param.ds_id: param for group in optimizer.fp16_groups for param in group}
    groups = optimizer.mics_groups
    for key, (start, end) in optimizer.gradient_ranges().items():
        first = groups.partition.rank * (end - start)
        numel = max(0, min(end - start, params[key].ds_numel - first))
        if name == "unsent":
            yield key, first, numel, end - start
        else:
            cut = ChunkLayout([numel], groups.replication.size)
            real = cut.real(0, groups.replication.rank)
            yield key, first + real[0], real[1] - real[0], cut.width


def _loss_scale(optimizer: Any, replicated: bool) -> Iterator[State]:
    scaler = vars(optimizer.loss_scaler)
    keys = [key for key in ("cur_scale", "cur_iter", "cur_hysteresis", "last_overflow_iter") if key in scaler]
    if keys:
        yield _numbers("loss scale", NO_GROUP, [(scaler, key) for key in keys], replicated)


def _numbers(owner: str, group: int, places: list[tuple[dict, Any]], replicated: bool) -> State:
    """Plain numbers as a tensor. Counters are exact in fp64."""
    tensor = torch.tensor([float(held[key]) for held, key in places], dtype=torch.float64)

    def put_back() -> None:
        for (held, key), value in zip(places, tensor.tolist()):
            held[key] = type(held[key])(value)

    pieces = tuple(Piece(f"{key} of {owner}", index, index + 1, 0) for index, (_, key) in enumerate(places))
    return State(NUMBERS, group, tensor, pieces, replicated, put_back=put_back)


def regather_persistent(optimizer: Any) -> None:
    """Parameters that stay gathered between steps follow their shards, which somebody has changed. Collective over the
    partition group."""
    persistent = optimizer.persistent_parameters
    if persistent:
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)
