"""The turns that submodules have in one micro-step, and what each computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..errors import MicsPlanError
from .machine import Machine
from .model import Unit
from .workload import Workload


class Visit(NamedTuple):
    """One turn of a submodule."""

    unit: int | None
    """``None`` for a module without parameters of its own."""
    seconds: float
    gradients: tuple[int, ...]
    """Elements of the gradients that are ready after it."""
    backward: bool


def number_parameters(units: list[Unit]) -> tuple[list[int], list[tuple[int, ...]]]:
    """Number the parameters, tied ones once. Returns elements by number, and the numbers of each unit's."""
    numels: list[int] = []
    owned: list[tuple[int, ...]] = []
    first: dict[int, int] = {}
    for unit in units:
        mine = []
        for numel in (*unit.numels, *unit.frozen):
            if unit.again and numel in first:
                mine.append(first[numel])
                continue
            first.setdefault(numel, len(numels))
            mine.append(len(numels))
            numels.append(numel)
        owned.append(tuple(mine))
    return numels, owned


def compute_seconds(machine: Machine, job: Workload) -> float:
    """Seconds of compute per operation of the forward pass, on one rank."""
    if job.compute_s is not None:
        share = 3 * job.model.flops + (job.model.recomputed_flops if job.checkpointing else 0.0)
        return job.compute_s / (share * job.micro_batch) if share else 0.0
    if job.precision not in machine.flops:
        raise MicsPlanError(
            f"Machine {machine.name!r} has no peak for {job.precision}, only for {', '.join(machine.flops)}. Choose "
            f"one of those, or add it to the machine's flops."
        )
    return 1 / (machine.flops[job.precision] * machine.efficiency)


def visits(units: list[Unit], job: Workload, seconds_per_flop: float) -> Iterator[Visit]:
    """The turns of one micro-step: forwards, then backwards.

    A module without parameters of its own has its turn before those inside it, both ways: the model itself, and
    every layer that is such a container.
    """
    costs = [unit.flops * job.micro_batch * seconds_per_flop for unit in units]
    start = 0
    yield Visit(None, 0.0, (), False)
    for block in job.model.blocks:
        for _ in range(block.repeat):
            if block.container:
                yield Visit(None, 0.0, (), False)
            for index in range(start, start + len(block.units)):
                yield Visit(index, costs[index], (), False)
            start += len(block.units)
    yield Visit(None, 0.0, (), True)
    end = len(units)
    for block in reversed(job.model.blocks):
        for _ in range(block.repeat):
            start = end - len(block.units)
            if block.checkpointed and job.checkpointing:
                if block.container:
                    yield Visit(None, 0.0, (), True)
                for index in range(start, end):
                    yield Visit(index, costs[index], (), True)
            if block.container:
                yield Visit(None, 0.0, (), True)
            for index in range(end - 1, start - 1, -1):
                gradients = () if units[index].again else units[index].numels
                yield Visit(index, 2 * costs[index], gradients, True)
            end = start
