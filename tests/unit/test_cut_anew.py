"""Residuals for other numbers of shards and replicas: what has not arrived of the mean stays the same, to the bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from mics_ds.comm.packing import ChunkLayout
from mics_ds.zero.residuals import UNPUBLISHED, UNSENT, Held, Place, cut_anew, missing_mean

NUMELS = {"weight": 31, "bias": 5, "scalar": 1, "even": 16}


def empty(place: Place, published: bool) -> Held:
    widths = {name: -(-numel // place.shards) for name, numel in NUMELS.items()}
    tensors = {UNSENT: torch.zeros(sum(widths.values()), dtype=torch.bfloat16)}
    held = Held(place, widths, NUMELS, tensors)
    if published:
        real = [end - start for start, end in map(held.real, widths)]
        tensors[UNPUBLISHED] = torch.zeros(ChunkLayout(real, place.replicas).width)
    return held


def ranks(shards: int, replicas: int, published: bool) -> list[Held]:
    places = itertools.product(range(replicas), range(shards))
    return [empty(Place(shards, shard, replicas, replica), published) for replica, shard in places]


def missing(held: list[Held]) -> dict[str, torch.Tensor]:
    return {name: missing_mean(held, name, 0, numel) for name, numel in NUMELS.items()}


def filled(shards: int, replicas: int, published: bool) -> list[Held]:
    """Multiples of 2^-20 below 2^-4 that fill a bf16, and an fp32."""
    draws = torch.Generator().manual_seed(shards + 10 * replicas)
    found = ranks(shards, replicas, published)
    for held in found:
        for name in NUMELS:
            for _, _, values in held.parts(name):
                digits = 1 << (8 if values.dtype == torch.bfloat16 else 16)
                drawn = torch.randint(-digits, digits, (values.numel(),), generator=draws)
                values.copy_(drawn / (1 << 20))
    return found


LAYOUTS = [(1, 2), (1, 4), (2, 2), (2, 4), (4, 2), (3, 4), (8, 2)]


@pytest.mark.parametrize("published", list(itertools.product([False, True], repeat=2)), ids=str)
def test_the_missing_mean_stays_the_same(published):
    for old, new in itertools.product(LAYOUTS, repeat=2):
        the_missing_mean_stays_the_same(old, new, published)


def the_missing_mean_stays_the_same(old: tuple[int, int], new: tuple[int, int], published: tuple[bool, bool]) -> None:
    before = filled(*old, published[0])
    expected = missing(before)
    assert all(values.any() for values in expected.values())
    after = ranks(*new, published[1])
    for held in after:
        cut_anew(before, held)
    found = missing(after)
    # Without a published part two replicas hold 16 digits between them, and what is missing has up to 20.
    tolerance = 0.0 if published[1] or new[1] > 2 else 2.0**-20
    errors = {name: (found[name] - expected[name]).abs().max().item() for name in NUMELS}
    assert max(errors.values()) <= tolerance, (old, new, errors)


def test_padding_stays_empty():
    before = filled(2, 4, True)
    after = empty(Place(4, 3, 2, 1), True)
    cut_anew(before, after)
    real = torch.zeros_like(after.tensors[UNSENT], dtype=torch.bool)
    first = 0
    for name, width in after.widths.items():
        start, end = after.real(name)
        real[first : first + end - start] = True
        first += width
    assert not after.tensors[UNSENT][~real].any()
