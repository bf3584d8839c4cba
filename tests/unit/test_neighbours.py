"""Which rank keeps a copy of another one's."""

from __future__ import annotations

from collections import Counter

import pytest

from mics_ds.checkpoint.joints import Joint, StagedFile
from mics_ds.checkpoint.memory import Description, dumps, loads
from mics_ds.checkpoint.neighbours import receivers


@pytest.mark.parametrize(
    "nodes", [[1, 1], [2, 2], [1] * 512, [4, 4, 4], [1, 3], [3, 1, 2], [0, 0, 2, 2]], ids=lambda nodes: str(nodes)[:20]
)
def test_every_copy_is_on_two_nodes(nodes):
    node_of = {
        3 * rank: node for rank, node in enumerate(node for node, count in enumerate(nodes) for _ in range(count))
    }
    found = receivers(list(node_of), node_of)
    assert set(found) == set(node_of)
    assert all(node_of[rank] != node_of[keeper] for rank, keeper in found.items())
    used = [count for count in nodes if count]
    if len(set(used)) == 1:
        assert set(Counter(found.values()).values()) == {1}, "and each rank keeps one"


def test_ranks_that_alternate_between_nodes():
    assert receivers([0, 1, 2, 3], {0: 0, 1: 1, 2: 0, 3: 1}) == {0: 1, 2: 3, 1: 0, 3: 2}


def test_there_is_nobody_on_one_node():
    assert receivers([0, 2, 4], {0: 0, 2: 0, 4: 0}) == {}


def test_a_description_survives_its_text():
    joint = Joint(24, -1, 64, (16, 16), (5, 1), 4)
    description = Description(
        job="j",
        step=3,
        shard=1,
        shards=2,
        layout="l",
        homes=("/a",),
        stale="",
        files=(StagedFile("f", b"", ((0, 8), (-1, 24))),),
        own={"2": (128, 5)},
        nbytes=192,
        crc32=7,
        seconds=1.5,
        pickled=((64, 3),),
        slice=1,
        slices=2,
        joints=(joint,),
    )
    assert loads(dumps(description)) == description
    assert loads(dumps(description).replace("192", "193")) is None
