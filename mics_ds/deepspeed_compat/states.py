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
    twin: torch.Tensor | None = field(default=None, compare=False)
    """Weights of masters, or masters of weights: element by element, in memory of their own. ``None`` if there are
    none here. Weights of a slice of masters are a copy."""
    put_back: Callable[[], None] = field(default=lambda: None, compare=False)
    """Function to call after writing to :attr:`tensor`, which is a copy for :data:`NUMBERS`."""

    @property
    def layout(self) -> tuple[str, int, str, int]:
        """Return what has to be equal on all copies before their values can be compared."""
        return self.name, self.group, str(self.tensor.dtype), self.tensor.numel()


def states_of(optimizer: Any) -> list[State]:
    """Everything that the next step of a stage 3 optimizer starts from, in the same order on all ranks.

    Not among it: gradients, what is gathered, buffers of modules (replicas may have their own), random numbers.
    """
    names = {param.ds_id: name for name, param in optimizer.module.named_parameters()}
    replicated, world = optimizer.mics_groups.replication is not None, optimizer.world_states
    if world is not None:
        world.finish_updates()
    found: list[State] = []
    for group, params in enumerate(optimizer.fp16_groups):
        whole = ChunkLayout([param.partition_numel() for param in params], 1)
        pieces = tuple(_pieces(params, names, whole, 0))
        weights = optimizer.fp16_partitioned_groups_flat[group].detach()
        master = optimizer.fp32_partitioned_groups_flat[group]
        is_apart = weights.data_ptr() != master.data_ptr()
        if is_apart:
            twin = master.detach() if world is None else None
            found.append(State(WEIGHTS, group, weights, pieces, replicated, twin))
        if world is not None:
            pieces = tuple(_pieces(params, names, world.cuts[group], world.replica))
            weights = world.cuts[group].take(weights, world.replica)
        has_twin, has_copies = is_apart or world is not None, replicated and world is None
        found.append(State(MASTER, group, master.detach(), pieces, has_copies, weights if has_twin else None))
        found += _optimizer_states(optimizer, group, master, pieces, replicated, has_copies)
    trained = {param.ds_id for params in optimizer.fp16_groups for param in params}
    for param in optimizer.module.parameters():
        if param.ds_id not in trained:
            whole = ChunkLayout([param.partition_numel()], 1)
            shard, pieces = param.ds_tensor.detach().view(-1), tuple(_pieces([param], names, whole, 0))
            found.append(State(WEIGHTS, NO_GROUP, shard, pieces, replicated))
    found += _loss_scale(optimizer, replicated)
    found += _residuals(optimizer, names)
    return found


def _pieces(params: Sequence[Any], names: dict[int, str], cut: ChunkLayout, replica: int) -> Iterator[Piece]:
    """Yield the pieces of a replica's slices of the shards of these parameters."""
    for index, param in enumerate(params):
        first, last = cut.real(index, replica)
        start = torch.distributed.get_rank(param.ds_process_group) * param.partition_numel()
        length = max(0, min(last, param.ds_numel - start) - first)
        if length:
            yield Piece(names[param.ds_id], cut.starts[index], cut.starts[index] + length, start + first)


def inner_states(optimizer: Any, master: torch.Tensor) -> Iterator[tuple[torch.optim.Optimizer, dict[Any, Any]]]:
    """Yield each inner optimizer with its live state of a master. With a partial offload there are two, of which each
    updates some of the masters."""
    for inner in (optimizer.optimizer, getattr(optimizer, "backup_optimizer", None)):
        if inner is not None:
            yield inner, inner.state.get(master, {})


def bytes_of_moments_to_come(optimizer: Any) -> int:
    """Return the bytes of optimizer states that the first step makes on this rank, by the settings of the optimizer.

    DeepSpeed lets optimizers make their states when they need them.
    """
    settings = optimizer.optimizer.defaults
    moments = len(settings.get("betas", ())) or bool(settings.get("momentum")) + ("alpha" in settings)
    masters = (
        master
        for master in optimizer.fp32_partitioned_groups_flat
        if not any(held for _, held in inner_states(optimizer, master))
    )
    return moments * sum(master.nbytes for master in masters)


def is_elementwise(value: Any, numel: int) -> bool:
    """Return whether a state of an optimizer has an element for each of so many of its master."""
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.numel() == numel


def _optimizer_states(
    optimizer: Any, group: int, master: torch.Tensor, pieces: tuple[Piece, ...], replicated: bool, elementwise: bool
) -> Iterator[State]:
    """``elementwise``: whether those of the shape of masters are replicated."""
    owner = f"sub-group {group}"
    for inner, held in inner_states(optimizer, master):
        numbers = []
        for key, value in sorted(held.items(), key=lambda item: str(item[0])):
            if is_elementwise(value, master.numel()):
                yield State(str(key), group, value.detach().view(-1), pieces, elementwise)
            elif isinstance(value, torch.Tensor):
                yield State(str(key), group, value.detach().view(-1), (Piece(owner, 0, value.numel(), 0),), replicated)
            elif isinstance(value, (int, float)):
                numbers.append((held, key))
        # torch's Adam counts steps in the state, others in the parameter group
        settings = inner.param_groups[optimizer.sub_group_to_group_id[group]]
        if isinstance(settings.get("step"), int):
            numbers.append((settings, "step"))
        if numbers:
            yield _numbers(owner, group, numbers, replicated)


def _residuals(optimizer: Any, names: dict[int, str]) -> Iterator[State]:
    """Yield what hop 2 has rounded off. Each rank has its own."""
    for name, tensor in optimizer.sync.residuals().items():
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
