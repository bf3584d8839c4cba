"""Slices of shards: cut, packed, scattered and put together again."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mics_ds.comm.slices import Slices

SHARDS = [(1,), (7,), (8, 3, 1), (5, 0, 12), (2, 2, 2, 2), ()]


@pytest.mark.parametrize("shards", SHARDS, ids=str)
@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
def test_slices_of_all_replicas_are_the_shards(shards, replicas):
    flat = torch.arange(1.0, 1 + sum(shards))
    cuts = [Slices(shards, replicas, replica) for replica in range(replicas)]
    taken = torch.stack([cut.take(flat) for cut in cuts])
    assert taken.shape == (replicas, sum(-(-numel // replicas) for numel in shards)) == (replicas, cuts[0].numel)
    filled = torch.zeros_like(flat)
    cuts[0].put(taken, filled)
    assert torch.equal(filled, flat)
    again = torch.zeros_like(flat)
    for cut, packed in zip(cuts, taken):
        cut.give(packed, again)
    assert torch.equal(again, flat), "one replica after the other"
    assert taken.sum() == flat.sum(), "padding is zero"
    for index in range(len(shards)):
        owned = [cut.own(index) for cut in cuts]
        assert owned[0][0] == 0
        assert owned[-1][1] == shards[index]
        assert all(before[1] == after[0] for before, after in pairwise(owned))


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_rows_for_a_reduce_scatter_are_what_each_replica_takes(pieces):
    shards = (8, 3, 1, 11)
    flat = torch.randn(sum(shards))
    rows = torch.cat(Slices(shards, 3, 0).rows(flat.split(shards), pieces), dim=1)
    assert torch.equal(rows, torch.stack([Slices(shards, 3, replica).take(flat) for replica in range(3)]))


def test_some_of_the_shards():
    shards = (8, 3, 1, 11)
    cut, flat = Slices(shards, 3, 0), torch.randn(23)
    rows = torch.stack([Slices(shards, 3, replica).take(flat) for replica in range(3)])
    filled = torch.zeros(23)
    cut.put(rows[:, cut.starts[1] : cut.starts[3]].contiguous(), filled, [1, 2])
    expected = torch.zeros(23)
    expected[8:12] = flat[8:12]
    assert torch.equal(filled, expected)


@pytest.mark.parametrize("indices", [[], [0], [1, 2], [0, 3], [0, 1, 3]], ids=str)
def test_packed_slices_of_some_shards(indices):
    shards = (8, 3, 1, 11)
    flat = torch.randn(23)
    cuts = [Slices(shards, 3, replica) for replica in range(3)]
    rows = torch.stack([cut.packed(cut.take(flat), indices) for cut in cuts])
    filled, expected = torch.zeros(23), torch.zeros(23)
    for index in indices:
        span = slice(cuts[0].shard_starts[index], cuts[0].shard_starts[index + 1])
        expected[span] = flat[span]
    cuts[0].put(rows, filled, indices)
    assert torch.equal(filled, expected)
