"""The collectives on plain tensors, with closed forms."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers import environment

from mics_ds.comm import collectives, packing
from mics_ds.comm.groups import MicsGroups, build_groups
from mics_ds.comm.meter import CommMeter
from mics_ds.config import MicsConfig


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
@pytest.mark.parametrize("pieces", [None, 1, 3, 7])
def test_hierarchical_gather_equals_flat_gather_bit_for_bit(dtype, numel, pieces):
    made = groups(4, ranks_per_node=2)
    shard = torch.randn(numel, generator=torch.Generator().manual_seed(dist.get_rank())).to(dtype)
    flat = torch.empty(4 * numel, dtype=dtype)
    dist.all_gather_into_tensor(flat, shard)
    gathered = collectives.all_gather_hierarchical(shard, made.hierarchy, pieces)
    full = torch.empty(4 * numel, dtype=dtype)
    gathered.copy_out(full, 0, numel)
    assert torch.equal(full, flat)
    # and any parameter of a coalesced gather, across the cuts
    start, width = numel // 3, numel // 2
    part = torch.empty(4 * width, dtype=dtype)
    gathered.copy_out(part, start, width)
    assert torch.equal(part, flat.view(4, numel)[:, start : start + width].flatten())


@pytest.mark.ranks(4)
def test_hierarchical_gather_sends_less_between_nodes():
    made = groups(4, ranks_per_node=2)
    shard = torch.zeros(1000)
    with CommMeter() as meter:
        collectives.all_gather_hierarchical(shard, made.hierarchy)
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


METHODS = ["native", "all_to_all"]
SHAPES = [(1,), (3,), (4,), (7, 13), (64,), (2, 3, 5)]


def integer_gradients(rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Small integers, so that sums and means over 4 ranks are exact in every dtype and order."""
    generator = torch.Generator().manual_seed(rank)
    return [4.0 * torch.randint(-8, 8, shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.mark.ranks(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("p", "ranks_per_node", "pieces"), [(1, 4, 1), (1, 4, 3), (2, 4, 1), (4, 4, 3), (4, 2, 1), (4, 2, 3)]
)
def test_reduce_scatter_gives_each_rank_the_mean_of_its_chunks(dtype, method, p, ranks_per_node, pieces):
    made, rank = groups(p, ranks_per_node), dist.get_rank()
    hierarchy = made.scatter_hierarchy
    assert (hierarchy is not None) == (ranks_per_node == 2)
    gradients = integer_gradients(rank, dtype)
    order = tuple(range(p)) if hierarchy is None else hierarchy.chunk_of_slot
    plan = packing.BucketLayout(tuple(item.numel() for item in gradients), order)
    packed = plan.pack(gradients, pieces)
    assert torch.equal(torch.cat(packed, 1), plan.pack(gradients)[0])
    if hierarchy is None:
        shard = collectives.reduce_scatter_mean(packed, made.scatter, method)
    else:
        shard = collectives.reduce_scatter_mean_hierarchical(packed, hierarchy, method)
    assert packed == []
    assert shard.dtype == dtype
    everybodys = [integer_gradients(member, dtype) for member in made.partition.ranks]
    for index, chunk in enumerate(plan.unpack(shard, made.partition.rank)):
        mean = torch.stack([theirs[index].float() for theirs in everybodys]).mean(0).flatten()
        width = -(-mean.numel() // p)
        expected = mean[made.partition.rank * width : (made.partition.rank + 1) * width]
        assert torch.equal(chunk.float(), expected)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("method", METHODS)
def test_reduce_scatter_of_large_fp16_values_does_not_overflow(method):
    for ranks_per_node in (4, 2):
        made = groups(4, ranks_per_node)
        blocks = torch.full((4, 10), 60000.0, dtype=torch.float16)
        if made.scatter_hierarchy is None:
            shard = collectives.reduce_scatter_mean([blocks], made.scatter, method)
        else:
            shard = collectives.reduce_scatter_mean_hierarchical([blocks], made.scatter_hierarchy, method)
        assert torch.equal(shard, torch.full((10,), 60000.0, dtype=torch.float16))


@pytest.mark.ranks(4)
def test_sixteen_bit_values_are_added_up_in_fp32():
    """1 + 2^-8 + 2^-8 + 2^-8: in bf16 each addition would round back to 1."""
    made, rank = groups(4), dist.get_rank()
    blocks = torch.full((4, 2), 1.0 if rank == 0 else 2.0**-8, dtype=torch.bfloat16)
    shard = collectives.reduce_scatter_mean([blocks], made.scatter, "all_to_all")
    assert torch.equal(shard, torch.full((2,), (1 + 3 * 2.0**-8) / 4).to(torch.bfloat16))
    assert shard[0] != 0.25


@pytest.mark.ranks(4)
def test_hierarchical_reduce_scatter_sends_less_between_nodes():
    made = groups(4, ranks_per_node=2)
    blocks = torch.zeros(4, 1000)
    with CommMeter() as meter:
        collectives.reduce_scatter_mean_hierarchical([blocks], made.scatter_hierarchy, "all_to_all")
    full = blocks.numel() * blocks.element_size()
    assert meter.bytes_sent("all_to_all", made.scatter_hierarchy.inter.ranks) == full / 4
    assert meter.bytes_sent("all_to_all", made.scatter_hierarchy.intra.ranks) == full / 2


@pytest.mark.ranks(4)
def test_hop1_has_process_groups_of_its_own_on_gloo():
    made = groups(4, ranks_per_node=2)
    assert made.scatter.ranks == made.partition.ranks
    assert made.scatter.group is not made.partition.group
    assert made.scatter_hierarchy.inter.group is not made.hierarchy.inter.group
