"""Checks that numbers equal those of stock ZeRO-3, on all replicas, also when results arrive late."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from .model import LateNet, no_pause, pause
from .runs import Measure, Place, Setup, difference, loss_difference, stock_run, train, unequal_replicas

REPLICAS = "unequal replica tensors"


def same_as_stock(place: Place, setup: Setup, *, exact: bool = False) -> list[Measure]:
    """Train as stock ZeRO-3 (or remember it) and as MiCS.

    Args:
        exact: ask for equal bits.
    """
    stock, mics = stock_run(setup, place), train(setup, place)
    tolerance = 0.0 if exact else place.tolerance[setup.dtype]
    return [
        Measure("losses", loss_difference(mics.losses, stock.losses), tolerance),
        Measure("parameters", difference(mics.params, stock.params, stock.initial), tolerance),
        Measure(REPLICAS, unequal_replicas(place, mics.states), 0.0),
    ]


def late_results(place: Place, setup: Setup) -> list[Measure]:
    """Many small buckets in flight, and gradients that come late: the same bits as with blocking calls?

    Without races the order of events changes nothing but time. Hop 2 may add up in another order when it goes bucket
    by bucket, so there must be no more than two replicas, for whose sum the order does not matter.
    """
    small = replace(setup, micro_steps=2, clip=0.5, adamw=True, zero=(("reduce_bucket_size", 200),))
    blocking = train(replace(small, overlap=False), place, partial(LateNet, no_pause))
    overlapped = train(replace(small, overlap=True), place, partial(LateNet, pause(place.device, place.rank)))
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in overlapped.params.values())
    moved = difference(overlapped.params, overlapped.initial)
    return [
        Measure("losses against blocking", loss_difference(overlapped.losses, blocking.losses), 0.0),
        Measure("states against blocking", difference(overlapped.states, blocking.states), 0.0),
        Measure(REPLICAS, unequal_replicas(place, overlapped.states), 0.0),
        Measure("not trained", float(not finite or not moved > 1e-3), 0.0),
    ]
