"""Hop counts and bytes, held to the formulas of the README."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..comm.collectives import GATHER_INTER, HOP1_INTER, HOP2
from .meter import Collective, CommMeter
from .model import Chain, batch
from .runs import Measure, Place, Setup, engine_of

MICRO_STEPS = 3
HOP1_KINDS = ("reduce_scatter", "all_to_all")
# Layers are gathered one by one and again for the backward pass, as the formulas assume.
NO_REUSE = (
    ("stage3_max_live_parameters", 1),
    ("stage3_max_reuse_distance", 0),
    ("stage3_prefetch_bucket_size", 0),
)


def bytes_by_formula(place: Place, setup: Setup) -> list[Measure]:
    """Return the traffic by the formula, per rank and step, for M bytes of parameters and s micro-steps.

    2s all-gathers and s reduce-scatters of M stay in the partition group. Nothing leaves it before the boundary, where
    one all-reduce of M/p does.
    """
    assert setup.p is not None, "stock ZeRO-3 has other formulas"
    p, r, s = setup.p, place.size // setup.p, MICRO_STEPS
    width = p * -(-16 // p)
    m = 4 * Chain.LAYERS * width * width
    with engine_of(replace(setup, micro_steps=s, zero=NO_REUSE), partial(Chain, width)) as engine:
        for step in range(2):  # while DeepSpeed traces the order of modules, it gathers differently
            for index in range(s):
                _metered(engine, place, step, index, width)
        meters = [_metered(engine, place, 2, index, width) for index in range(s)]
        groups = engine.optimizer.mics_groups
    *before, boundary = [meter.collectives for meter in meters]
    everything = [item for meter in meters for item in meter.collectives]
    early = [item for collectives in before for item in collectives]
    hop1 = [item for item in everything if item.kind in HOP1_KINDS]
    outside = [item for item in early if not set(item.ranks) <= set(groups.partition.ranks)]
    found = [
        ("all-gather bytes", _sent(everything, kind="all_gather"), 2 * s * m * (p - 1) / p),
        ("reduce-scatter bytes", _sent(hop1), s * m * (p - 1) / p),
        ("hop 2 bytes", _sent(boundary, label=HOP2), 2 * (m / p) * (r - 1) / r),
        ("hop 2 before the boundary", _sent(early, label=HOP2), 0.0),
        ("other ranks before the boundary", float(len(outside)), 0.0),
    ]
    if groups.hierarchy is not None:
        between = (len(groups.hierarchy.inter.ranks) - 1) / p * m
        found.append(("gather bytes between nodes", _sent(everything, label=GATHER_INTER), 2 * s * between))
    if groups.scatter_hierarchy is not None:
        between = (len(groups.scatter_hierarchy.inter.ranks) - 1) / p * m
        found.append(("scatter bytes between nodes", _sent(everything, label=HOP1_INTER), s * between))
    return [
        Measure(what if actual == right else f"{what}: {actual:g} and not {right:g}, off by", abs(actual - right), 0.0)
        for what, actual, right in found
    ]


def _metered(engine: Any, place: Place, step: int, index: int, width: int) -> CommMeter:
    x, y = batch(step, index, place.rank, torch.float32, engine.device, width)
    with CommMeter() as meter:
        # a leaf that asks for gradients: without it the first layer would not be gathered for the backward pass
        engine.backward(engine(x.requires_grad_(), y))
        engine.step()
    return meter


def _sent(collectives: list[Collective], kind: str | None = None, label: str | None = None) -> float:
    return sum(item.bytes_sent for item in collectives if kind in (None, item.kind) and label in (None, item.label))
