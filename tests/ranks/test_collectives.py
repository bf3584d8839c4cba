"""The collectives on plain tensors, with closed forms."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from helpers import DTYPES, environment

from mics_ds.check.meter import CommMeter
from mics_ds.comm import collectives
from mics_ds.comm.groups import MicsGroups, build_groups
from mics_ds.comm.packing import ChunkLayout
from mics_ds.comm.rank_group import RankGroup
from mics_ds.config import MicsConfig


def groups(p: int, ranks_per_node: int | None = None, gather: bool | str = "auto") -> MicsGroups:
    if ranks_per_node is None:
        return build_groups(MicsConfig(p, gather), dist.group.WORLD)
    with environment(MICS_DS_RANKS_PER_NODE=str(ranks_per_node)):
        return build_groups(MicsConfig(p, gather), dist.group.WORLD)


def placed(nodes: str) -> MicsGroups:
    """Groups of one partition of all ranks, each of which a launcher has put on one of the nodes."""
    rank = dist.get_rank()
    with environment(CROSS_RANK=nodes[rank], LOCAL_RANK=str(nodes[:rank].count(nodes[rank]))):
        return build_groups(MicsConfig(len(nodes)), dist.group.WORLD)


def average_(tensor: torch.Tensor, group: RankGroup) -> None:
    collectives.start_average_(tensor, group).wait()


def reduced(rows: torch.Tensor, groups: MicsGroups, method: str) -> torch.Tensor:
    """Hop 1, by the groups that there are for it. Overwrites ``rows``."""
    output = torch.empty(rows.shape[1], dtype=rows.dtype)
    if groups.scatter_hierarchy is None:
        collectives.start_reduce_scatter_mean(rows, output, groups.scatter, method).wait()
    else:
        collectives.start_reduce_scatter_mean_hierarchical(rows, output, groups.scatter_hierarchy, method).wait()
    return output


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
def test_ranks_on_nodes_by_turns_have_no_stages():
    made = placed("0101")
    assert made.hierarchy is made.scatter_hierarchy is None


@pytest.mark.ranks(4)
def test_hierarchical_gathers_equal_the_flat_one_bit_for_bit():
    """Of one tensor by way of slots, of one straight to its place, and of two tensors together."""
    made = placed("0011")
    for dtype, numel in itertools.product(DTYPES.values(), (1, 5, 1000)):
        gathers_equal_the_flat_one(made, dtype, numel)


def gathers_equal_the_flat_one(made: MicsGroups, dtype: torch.dtype, numel: int) -> None:
    shard = torch.randn(numel, generator=torch.Generator().manual_seed(dist.get_rank())).to(dtype)
    flat = torch.empty(4 * numel, dtype=dtype)
    dist.all_gather_into_tensor(flat, shard)
    buffer = collectives.start_all_gather_hierarchical(shard, made.hierarchy).wait()
    full = torch.empty(4 * numel, dtype=dtype)
    ChunkLayout((4 * numel,), 4, domains=2).copy_out(buffer, [full])
    assert torch.equal(full, flat)
    widths = (numel // 3, numel - numel // 3)
    parts = [torch.empty(4 * width, dtype=dtype) for width in widths]
    ChunkLayout([part.numel() for part in parts], 4, domains=2).copy_out(buffer, parts)
    for part, columns in zip(parts, flat.view(4, numel).split(widths, dim=1)):
        assert torch.equal(part, columns.flatten())
    whole = collectives.start_all_gather_whole_hierarchical(shard, made.hierarchy).wait()
    assert torch.equal(whole.view(-1), flat)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("way", ["start_all_gather_hierarchical", "start_all_gather_whole_hierarchical"])
def test_gathers_in_an_executor_work_in_inference_mode(way):
    """An evaluation gathers in that mode. Memory that one thread has allocated in it could not be filled by another."""
    made = placed("0011")
    with torch.inference_mode():
        shard = torch.full((3,), float(dist.get_rank()))
        start = functools.partial(getattr(collectives, way), shard, made.hierarchy)
        rows = made.gather_executor.submit(start).wait()
    assert sorted(rows[:, 0].tolist()) == [0.0, 1.0, 2.0, 3.0]
    made.gather_executor.close()


@pytest.mark.ranks(4)
def test_hierarchical_gather_sends_less_between_nodes():
    made = groups(4, ranks_per_node=2)
    shard = torch.zeros(1000)
    with CommMeter() as meter:
        collectives.start_all_gather_hierarchical(shard, made.hierarchy).wait()
    full = 4 * shard.numel() * shard.element_size()
    # each rank: (N-1)/N of half the buffer between nodes; k ranks share a link, so (p-k)/p of it per node
    assert meter.bytes_sent("all_gather", made.hierarchy.inter.ranks) == full / 4
    assert meter.bytes_sent("all_gather", made.hierarchy.intra.ranks) == full / 2
    assert len(meter.collectives) == 2


@pytest.mark.ranks(4)
def test_no_hierarchy_where_it_cannot_be_or_is_not_wanted():
    for ranks_per_node, gather in ((4, "auto"), (4, True), (3, True), (1, "auto"), (2, False)):
        assert groups(4, ranks_per_node, gather).hierarchy is None, (ranks_per_node, gather)


@pytest.mark.ranks(4)
def test_hop2_is_a_mean_and_may_be_repeated():
    made, rank = groups(2), dist.get_rank()
    tensor = torch.arange(8.0) * 4 + rank
    average_(tensor, made.replication)
    expected = torch.arange(8.0) * 4 + rank % 2 + 1
    assert torch.equal(tensor, expected)
    average_(tensor, made.replication)
    assert torch.equal(tensor, expected)


@pytest.mark.ranks(4)
def test_hop2_of_large_fp16_values_does_not_overflow():
    made = groups(1)
    tensor = torch.full((3,), 60000.0, dtype=torch.float16)
    average_(tensor, made.replication)
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
@pytest.mark.parametrize(("p", "ranks_per_node"), [(1, 4), (2, 4), (4, 4), (4, 2)])
def test_reduce_scatter_gives_each_rank_the_mean_of_its_chunks(p, ranks_per_node):
    made = groups(p, ranks_per_node)
    assert (made.scatter_hierarchy is not None) == (ranks_per_node == 2)
    for dtype, method in itertools.product(DTYPES.values(), METHODS):
        chunks_are_means(made, dtype, method)


def chunks_are_means(made: MicsGroups, dtype: torch.dtype, method: str) -> None:
    p, gradients = made.partition.size, integer_gradients(dist.get_rank(), dtype)
    chunks = collectives.start_hop1(gradients, made.scatter, made.scatter_hierarchy, method).wait()
    everybodys = [integer_gradients(member, dtype) for member in made.partition.ranks]
    for index, chunk in enumerate(chunks):
        mean = torch.stack([theirs[index].float() for theirs in everybodys]).mean(0).flatten()
        width = -(-mean.numel() // p)
        expected = mean[made.partition.rank * width : (made.partition.rank + 1) * width]
        assert torch.equal(chunk.float(), expected)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("method", METHODS)
def test_reduce_scatter_of_large_fp16_values_does_not_overflow(method):
    for ranks_per_node in (4, 2):
        shard = reduced(torch.full((4, 10), 60000.0, dtype=torch.float16), groups(4, ranks_per_node), method)
        assert torch.equal(shard, torch.full((10,), 60000.0, dtype=torch.float16))


@pytest.mark.ranks(4)
def test_sixteen_bit_values_are_added_up_in_fp32():
    """1 + 2^-8 + 2^-8 + 2^-8: in bf16 each addition would round back to 1."""
    rows = torch.full((4, 2), 1.0 if dist.get_rank() == 0 else 2.0**-8, dtype=torch.bfloat16)
    shard = reduced(rows, groups(4, 4), "all_to_all")
    assert torch.equal(shard, torch.full((2,), (1 + 3 * 2.0**-8) / 4).to(torch.bfloat16))
    assert shard[0] != 0.25


@pytest.mark.ranks(4)
def test_hierarchical_reduce_scatter_sends_less_between_nodes():
    made = groups(4, ranks_per_node=2)
    rows = torch.zeros(4, 1000)
    with CommMeter() as meter:
        reduced(rows, made, "all_to_all")
    full = rows.numel() * rows.element_size()
    assert meter.bytes_sent("all_to_all", made.scatter_hierarchy.inter.ranks) == full / 4
    assert meter.bytes_sent("all_to_all", made.scatter_hierarchy.intra.ranks) == full / 2
    assert len(meter.collectives) == 2


@pytest.mark.ranks(4)
def test_hop1_has_process_groups_of_its_own_on_gloo():
    made = groups(4, ranks_per_node=2)
    assert made.scatter.ranks == made.partition.ranks
    assert made.scatter.group is not made.partition.group
    assert made.scatter_hierarchy.inter.group is not made.hierarchy.inter.group
