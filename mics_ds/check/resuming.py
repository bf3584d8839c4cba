"""A saved and loaded checkpoint: training goes on as if nothing had happened."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from ..checkpoint import manifest
from ..checkpoint.background import wait_for_saves
from .parity import REPLICAS
from .runs import (
    Measure,
    Outcome,
    Place,
    Setup,
    difference,
    engine_of,
    full_params,
    loss_difference,
    outcome_of,
    steps_of,
    unequal_replicas,
)

Params = dict[str, torch.Tensor]


def as_if_nothing_happened(place: Place, setup: Setup) -> list[Measure]:
    """Train, save, train on; build another engine with other parameters, load, train on: the same bits."""
    assert place.folder is not None, "checked where the list is made"
    folder = place.folder / f"p{setup.p}-{setup.dtype}"
    setup = replace(setup, adamw=True, clip=0.5)
    saved, end = range(setup.steps), range(setup.steps, 2 * setup.steps)
    with engine_of(setup) as engine:
        steps_of(engine, setup, place, saved)
        engine.save_checkpoint(str(folder))
        at_save = full_params(engine)
        expected = outcome_of(engine, steps_of(engine, setup, place, end), at_save)
    before, loaded, actual = _loaded_and_trained(place, setup, folder, None, end)
    return [
        *_same_as_without(loaded, at_save, actual, expected),
        Measure(REPLICAS, unequal_replicas(place, actual.states), 0.0),
        Measure("nothing to load", float(difference(before, at_save) == 0.0), 0.0),
    ]


def in_background(place: Place, setup: Setup) -> list[Measure]:
    """Save once and wait, save once in the background and train on meanwhile: files of the same sizes. Then as above,
    from what was saved in the background."""
    assert place.folder is not None, "checked where the list is made"
    folder = place.folder / f"background-p{setup.p}-{setup.dtype}"
    setup = replace(setup, adamw=True, clip=0.5)
    saved, end = range(setup.steps), range(setup.steps, 2 * setup.steps)
    with engine_of(setup) as engine:
        steps_of(engine, setup, place, saved)
        engine.save_checkpoint(str(folder), tag="waited", async_save=False)
        at_save = full_params(engine)
        engine.save_checkpoint(str(folder), tag="background", async_save=True)
        expected = outcome_of(engine, steps_of(engine, setup, place, end), at_save)
        wait_for_saves()
    dist.barrier()  # all ranks have heard of it
    # Sizes: the padding of a shard may be another replica's.
    sizes = [
        {name: record.bytes for name, record in manifest.read(folder / tag).files.items()}
        for tag in ("waited", "background")
    ]
    _, loaded, actual = _loaded_and_trained(place, setup, folder, "background", end)
    return [
        Measure("files of other sizes", float(sizes[0] != sizes[1]), 0.0),
        *_same_as_without(loaded, at_save, actual, expected),
    ]


def _loaded_and_trained(
    place: Place, setup: Setup, folder: Path, tag: str | None, steps: range
) -> tuple[Params, Params, Outcome]:
    """Parameters of another engine before and after it has loaded, and how it trains on."""
    with engine_of(setup, seed=99) as engine:
        before = full_params(engine)
        engine.load_checkpoint(str(folder), tag=tag)
        loaded = full_params(engine)
        outcome = outcome_of(engine, steps_of(engine, setup, place, steps), loaded)
    dist.barrier()  # nobody reads any more
    return before, loaded, outcome


def _same_as_without(loaded: Params, saved: Params, actual: Outcome, expected: Outcome) -> list[Measure]:
    return [
        Measure("loaded parameters", difference(loaded, saved), 0.0),
        Measure("losses after it", loss_difference(actual.losses, expected.losses), 0.0),
        Measure("states after it", difference(actual.states, expected.states), 0.0),
    ]
