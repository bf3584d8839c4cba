"""Rank arithmetic, without processes."""

from __future__ import annotations

import pytest

from mics_ds.comm.layout import MicsLayout
from mics_ds.errors import MicsConfigError


def layout(n: int, p: int, k: int, first: int = 0, stride: int = 1) -> MicsLayout:
    ranks = tuple(first + stride * index for index in range(n))
    return MicsLayout(ranks, tuple(rank // k for rank in ranks), p)


def test_partition_groups_are_consecutive_and_replication_groups_strided():
    groups = layout(8, 4, 2)
    assert groups.partition_groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert groups.replication_groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert groups.replication_size == 2


@pytest.mark.parametrize(("n", "p"), [(1, 1), (4, 1), (4, 4), (6, 3), (64, 8), (96, 12)])
def test_every_rank_is_in_one_group_of_each_kind_and_they_cross_once(n, p):
    groups = layout(n, p, 4)
    assert sorted(sum(groups.partition_groups, ())) == list(range(n))
    assert sorted(sum(groups.replication_groups, ())) == list(range(n))
    for partition in groups.partition_groups:
        for replication in groups.replication_groups:
            assert len(set(partition) & set(replication)) == 1


def test_groups_under_tensor_parallelism_stay_inside_the_data_parallel_group():
    groups = layout(4, 2, 4, first=1, stride=2)
    assert groups.partition_groups == ((1, 3), (5, 7))
    assert groups.replication_groups == ((1, 5), (3, 7))


@pytest.mark.parametrize("p", [3, 5, 8])
def test_a_size_that_does_not_divide_is_refused_with_the_choices(p):
    with pytest.raises(MicsConfigError, match=rf"mics_shard_size = {p} must divide .* 4\. Choose one of 1, 2, 4"):
        layout(4, p, 2)


def test_two_nodes_of_two_form_a_grid():
    groups = layout(8, 4, 2)
    assert groups.why_not_hierarchical is None
    between, inside = groups.domain_grid((4, 5, 6, 7))
    assert between == ((4, 6), (5, 7))
    assert inside == ((4, 5), (6, 7))


@pytest.mark.parametrize(
    ("domains", "p", "reason"),
    [
        ((0, 0, 1, 1), 2, "inside one fast domain"),
        ((0, 0, 0, 1), 4, "unevenly"),
        ((0, 1, 0, 1), 4, "ranks of partition group 0 are on its fast domains by turns"),
        ((0, 0, 1, 1, 0, 1, 1, 0), 4, "ranks of partition group 1 are on its fast domains by turns"),
        ((0, 1, 2, 3), 4, "no inner stage"),
        ((0, 0, 0, 1, 1, 1), 2, "inside one fast domain"),
    ],
)
def test_layouts_that_cannot_gather_hierarchically_say_why(domains, p, reason):
    assert reason in MicsLayout(tuple(range(len(domains))), domains, p).why_not_hierarchical


def test_description_names_groups_and_placement():
    text = layout(8, 4, 2).describe("the nodes", True, False, "all_to_all")
    assert "8 data-parallel ranks in 4 fast domains = 2 replicas x 4 shards" in text
    assert "partition groups   [0-3] [4-7]" in text
    assert "replication groups [0, 4] [1, 5] [2, 6] [3, 7]" in text
    assert "fast domains       [0, 1] [2, 3] [4, 5] [6, 7], the nodes" in text
    assert "parameter gather   hierarchical" in text
    assert "gradient scatter   flat (as configured), by all_to_all" in text


def test_description_of_a_large_job_stays_short():
    assert len(layout(4096, 8, 8).describe("the nodes", False, False, "native")) < 1000
