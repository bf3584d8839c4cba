"""The collectives on plain tensors, with closed forms."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers import environment

from mics_ds import collectives
from mics_ds.config import MicsConfig
from mics_ds.groups import MicsGroups, build_groups
from mics_ds.meter import CommMeter


def groups(p: int, ranks_per_node: int | None = None, gather: bool | str = "auto") -> MicsGroups:
    if ranks_per_node is None:
        return build_groups(MicsConfig(p, gather), dist.group.WORLD)
    with environment(MICS_DS_RANKS_PER_NODE=str(ranks_per_node)):
        return build_groups(MicsConfig(p, gather), dist.group.WORLD)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [1, 2, 4])
def test_groups_have_the_right_members(p):
    rank, made = dist.get_rank(), groups(p)
    assert made.partition.ranks == tuple(range(rank // p * p, rank // p * p + p))
    assert made.partition.rank == rank % p == dist.get_rank(made.partition.group)
    assert made.full.ranks == (0, 1, 2, 3)
    if p == 4:
        assert made.replication is None
        assert made.partition.group is made.full.group
    else:
        assert made.replication.ranks == tuple(range(rank % p, 4, p))
        assert made.replication.rank == rank // p


@pytest.mark.ranks(4)
def test_equal_requests_share_process_groups():
    first, second = groups(2), groups(2)
    assert first.partition.group is second.partition.group
    assert first.replication.group is second.replication.group


@pytest.mark.ranks(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [1, 5, 1000])
def test_hierarchical_gather_equals_flat_gather_bit_for_bit(dtype, numel):
    made = groups(4, ranks_per_node=2)
    shard = torch.randn(numel, generator=torch.Generator().manual_seed(dist.get_rank())).to(dtype)
    flat = torch.empty(4 * numel, dtype=dtype)
    dist.all_gather_into_tensor(flat, shard)
    chunks, handle = collectives.all_gather_hierarchical(shard, made.hierarchy)
    handle.wait()
    handle.wait()  # allowed, and does nothing
    assert torch.equal(torch.cat(chunks), flat)


@pytest.mark.ranks(4)
def test_hierarchical_gather_sends_less_between_nodes():
    made = groups(4, ranks_per_node=2)
    shard = torch.zeros(1000)
    with CommMeter() as meter:
        collectives.all_gather_hierarchical(shard, made.hierarchy).handle.wait()
    full = 4 * shard.numel() * shard.element_size()
    # each rank: (N-1)/N of half the buffer between nodes; k ranks share a link, so (p-k)/p of it per node
    assert meter.bytes_sent("all_gather", made.hierarchy.inter.ranks) == full / 4
    assert meter.bytes_sent("all_gather", made.hierarchy.intra.ranks) == full / 2
    assert len(meter.collectives) == 2


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("ranks_per_node", "gather"), [(4, "auto"), (4, True), (3, True), (1, "auto"), (2, False)])
def test_no_hierarchy_where_it_cannot_be_or_is_not_wanted(ranks_per_node, gather):
    assert groups(4, ranks_per_node, gather).hierarchy is None


@pytest.mark.ranks(4)
def test_hop2_is_a_mean_and_may_be_repeated():
    made, rank = groups(2), dist.get_rank()
    tensor = torch.arange(8.0) * 4 + rank
    collectives.average_over_replicas_(tensor, made.replication)
    expected = torch.arange(8.0) * 4 + rank % 2 + 1
    assert torch.equal(tensor, expected)
    collectives.average_over_replicas_(tensor, made.replication)
    assert torch.equal(tensor, expected)


@pytest.mark.ranks(4)
def test_hop2_of_large_fp16_values_does_not_overflow():
    made = groups(1)
    tensor = torch.full((3,), 60000.0, dtype=torch.float16)
    collectives.average_over_replicas_(tensor, made.replication)
    assert torch.equal(tensor, torch.full((3,), 60000.0, dtype=torch.float16))


@pytest.mark.ranks(4)
def test_broadcast_starts_from_a_rank_of_the_group():
    made, rank = groups(2), dist.get_rank()
    tensors = [torch.full((3,), float(rank)), torch.full((2,), float(10 * rank))]
    collectives.broadcast_(tensors, 1, made.partition)
    source = rank // 2 * 2 + 1
    assert torch.equal(tensors[0], torch.full((3,), float(source)))
    assert torch.equal(tensors[1], torch.full((2,), 10.0 * source))
