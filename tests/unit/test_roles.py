"""Who hears from whom in a save, at sizes that no test can run: a tree, in which no process has many connections."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from mics_ds.checkpoint.coordination import Roles
from mics_ds.comm.layout import MicsLayout


def roles_of_all(monkeypatch, ranks, p, per_node, node_local=False, model_parallel=1):
    """What each rank of a job has to do in a save. Model-parallel groups are consecutive ranks."""
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    node_of = {rank: rank // per_node for rank in range(ranks)}
    found = []
    for rank in range(ranks):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        members = tuple(range(rank % model_parallel, ranks, model_parallel))
        layout = MicsLayout(members, tuple(node_of[member] for member in members), p)
        partition = SimpleNamespace(rank=members.index(rank) % p)
        found.append(Roles(SimpleNamespace(partition=partition, layout=layout, node_of=node_of), node_local))
    for each in found:
        assert each.parent is not None or each.rank == 0
    return found


@pytest.mark.parametrize("node_local", [False, True])
@pytest.mark.parametrize(
    ("ranks", "p", "per_node", "model_parallel"),
    [(1, 1, 1, 1), (4, 2, 2, 1), (8, 1, 4, 1), (8, 8, 4, 1), (16, 4, 4, 2), (32, 4, 8, 4), (512, 16, 8, 1)],
)
def test_writers_of_a_save_form_a_tree(monkeypatch, ranks, p, per_node, model_parallel, node_local):
    found = roles_of_all(monkeypatch, ranks, p, per_node, node_local, model_parallel)
    assert [each.rank for each in found if each.parent is None] == [0]
    for each in found:
        assert each.children == [other.rank for other in found if other.parent == each.rank]
        assert each.owner in each.sharers
        assert found[each.owner].owns
        assert found[each.publisher].publishes
        way, at = 0, each.rank
        while at != 0:
            way, at = way + 1, found[at].parent
        assert way <= 3, "from a sharer to an owner, a publisher, and the first one"
    owners = {(each.publisher, each.groups.layout.ranks[0], each.shard, each.owner) for each in found}
    assert len(owners) == len({key[:3] for key in owners}), "a file has one writer"


def test_connections_at_512_ranks(monkeypatch):
    """A full mesh among those who share a shard would be 15,872 connections."""
    found = roles_of_all(monkeypatch, 512, 16, 8)
    assert sum(len(each.children) for each in found) == 511
    assert max(len(each.children) for each in found) == 31 + 15
