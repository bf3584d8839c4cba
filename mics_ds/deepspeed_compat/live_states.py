"""States of an engine that a rank of another job with the same shard continues from, taken and set between steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..errors import MicsConfigError
from .states import MASTER, NO_GROUP, WEIGHTS, State, inner_states, regather_persistent, states_of

COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")


def take(engine: Any) -> dict[str, Any]:
    """Return everything that the next step of an engine starts from, but gradients and random numbers.

    Shards, masters and optimizer states are live: they must not change until they have been sent. What a forward pass
    changes is copied.
    """
    optimizer = engine.optimizer
    states = list(_shards(optimizer))
    return {
        "layouts": [state.layout for state in states],
        "tensors": [state.tensor for state in states],
        "optimizer": [dict(held) for held, *_ in _optimizer_states(optimizer)],
        "param_groups": [{**group, "params": None} for group in optimizer.param_groups],
        "units": optimizer.sync.used,
        "buffers": [buffer.detach().clone() for buffer in engine.module.buffers()],
        "scheduler": engine.lr_scheduler.state_dict() if hasattr(engine.lr_scheduler, "state_dict") else None,
        "counters": counters(engine),
    }


def shards(engine: Any) -> list[torch.Tensor]:
    """Return the weights and masters that :func:`take` sends, live."""
    return [state.tensor for state in _shards(engine.optimizer)]


def put(engine: Any, taken: Mapping[str, Any]) -> None:
    """Continue from what :func:`take` has returned on another rank. Without collectives.

    Raises:
        MicsConfigError: the other rank trains another model, or with another optimizer.
    """
    optimizer = engine.optimizer
    states = list(_shards(optimizer))
    if [state.layout for state in states] != list(taken["layouts"]):
        raise MicsConfigError(
            "A replica that joins must train the same model with the same optimizer and as many ranks as the others, "
            "but its shards have other shapes. Start every replica with the same script and JSON."
        )
    with torch.no_grad():
        for state, tensor in zip(states, taken["tensors"]):
            state.tensor.copy_(tensor)
            state.put_back()
        for (held, master, on_device), values in zip(_optimizer_states(optimizer), taken["optimizer"]):
            _set_optimizer_states(held, master, values, on_device)
        for buffer, tensor in zip(engine.module.buffers(), taken["buffers"]):
            buffer.copy_(tensor)
    for group, settings in zip(optimizer.param_groups, taken["param_groups"]):
        group.update({**settings, "params": group["params"]})
    if taken["scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(taken["scheduler"])
    set_counters(engine, taken["counters"])
    optimizer.sync.restart(taken["units"])


def shards_changed(engine: Any) -> None:
    """Release parameters that are gathered from shards as they were. Collective over the partition group."""
    optimizer = engine.optimizer
    optimizer._partition_all_parameters()
    regather_persistent(optimizer)


def counters(engine: Any) -> dict[str, int]:
    """Return what an engine counts: steps, samples, steps that were skipped."""
    return {name: getattr(engine, name) for name in COUNTERS}


def set_counters(engine: Any, values: Mapping[str, int]) -> None:
    """Set what an engine counts."""
    for name, value in values.items():
        setattr(engine, name, value)


def _shards(optimizer: Any) -> Iterator[State]:
    """Yield weights, masters and the loss scale."""
    return (s for s in states_of(optimizer) if s.group == NO_GROUP or s.name in (WEIGHTS, MASTER))


def _optimizer_states(optimizer: Any) -> Iterator[tuple[dict, torch.Tensor, bool]]:
    """Yield the states of each sub-group, live and empty before the first step, with its master, and whether counters
    of steps are on the device of that."""
    for master in optimizer.fp32_partitioned_groups_flat:
        for inner, _ in inner_states(optimizer, master):
            on_device = any(group.get("fused") or group.get("capturable") for group in inner.param_groups)
            yield inner.state[master], master, on_device


def _set_optimizer_states(held: dict, master: torch.Tensor, values: Mapping[Any, Any], on_device: bool) -> None:
    for key in held.keys() - values.keys():
        del held[key]
    for key, value in values.items():
        there = held.get(key)
        if isinstance(value, torch.Tensor) and isinstance(there, torch.Tensor) and there.shape == value.shape:
            there.copy_(value)
        elif isinstance(value, torch.Tensor):  # before this rank's first step
            follows = on_device or value.numel() == master.numel()
            held[key] = value.to(master.device if follows else "cpu", copy=True)
        else:
            held[key] = value


def nbytes(taken: Mapping[str, Any]) -> int:
    """Return the bytes of tensors in what :func:`take` has returned."""
    tensors = [*taken["tensors"], *taken["buffers"], *(value for held in taken["optimizer"] for value in held.values())]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
