"""Copies in memory: where they are, what describes them, and which rank keeps a mirror of another one's."""

from __future__ import annotations

import os
import sys
from collections import Counter
from contextlib import closing

import pytest

from mics_ds.checkpoint import copies
from mics_ds.checkpoint.copies import Copy, Description, Place, describe, forget, job_key, read, require_own, understood
from mics_ds.checkpoint.memory import mirrors
from mics_ds.checkpoint.staging import Share, Staged, StagedFile
from mics_ds.errors import MicsCheckpointError


@pytest.mark.parametrize(
    "nodes", [[1, 1], [2, 2], [1] * 512, [4, 4, 4], [1, 3], [3, 1, 2], [0, 0, 2, 2]], ids=lambda nodes: str(nodes)[:20]
)
def test_every_copy_is_on_two_nodes(nodes):
    node_of = {
        3 * rank: node for rank, node in enumerate(node for node, count in enumerate(nodes) for _ in range(count))
    }
    found = mirrors(node_of)
    assert set(found) == set(node_of)
    assert all(node_of[rank] != node_of[keeper] for rank, keeper in found.items())
    used = [count for count in nodes if count]
    if len(set(used)) == 1:
        assert set(Counter(found.values()).values()) == {1}, "and each rank keeps one"


def test_ranks_that_alternate_between_nodes():
    assert mirrors({0: 0, 1: 1, 2: 0, 3: 1}) == {0: 1, 2: 3, 1: 0, 3: 2}


def test_there_is_nobody_on_one_node():
    assert mirrors({0: 0, 2: 0, 4: 0}) == {}


DESCRIPTION = Description(
    step=3,
    framework_step=-1,
    engine=0,
    place=Place(0, 1, 0, 2, 2),
    rank=5,
    layout="l",
    homes={"/a": [3, 4]},
    stale="",
    staged=Staged((StagedFile("f", (0, 8), (0, 1)),), (Share(2, (5, 1), 4), Share(1, (24,), 1)), (1, 2), 9),
    crc32=7,
)


def test_a_description_survives_its_text(tmp_path):
    path = tmp_path / "e0-g0-shard1-slice0of2.0"
    describe(path, DESCRIPTION)
    assert read(path) == (DESCRIPTION, path)
    text = copies.described_by(path).read_text()
    assert understood(text.replace("24", "25"), path) is None
    older, empty = text.replace(" 4,", " 3,"), f"{copies._head('[]')}\n[]"
    for wrong in ("", "{}", "[]", "null", "[" * 100_000, "5 {}", "\ud800", older, empty):
        assert understood(wrong, path) is None
    forget(path)
    assert read(path) is None


@pytest.mark.parametrize("size", [0, 8])
def test_a_copy_that_became_shorter_is_no_copy(tmp_path, size):
    path = tmp_path / "e0-g0-shard1-slice0of2.0"
    path.write_bytes(bytes(size))
    copy = Copy(DESCRIPTION, path)
    with closing(copy.open()) as memory, pytest.raises(MicsCheckpointError, match="other content"):
        copy.require_same(memory)


def test_places_of_one_cut_are_numbered_through():
    numbers = [Place(g, s, i, 3, 4).number for g in range(2) for s in range(3) for i in range(4)]
    assert numbers == list(range(24))


def test_a_folder_of_others_is_not_used(tmp_path):
    (tmp_path / "own").mkdir(mode=0o700)
    require_own(tmp_path / "own")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "own")
    for name in ("open", "link"):
        with pytest.raises(MicsCheckpointError, match="can be written by others"):
            require_own(tmp_path / name)


def test_a_job_and_its_restarts_have_one_key(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "1", "--local_rank=3"])
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    plain = job_key(None)
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "1", "--local_rank=0"])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "2f6b9d3c-0a8e-4f5e-9a51-3a1b5c7d9e0f")  # made up by torchrun
    assert job_key(None) == plain
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # its default
    assert job_key(None) == plain
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    of_run = job_key(None)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    of_both = job_key(None)
    assert len({plain, of_run, of_both, job_key("a"), job_key("b")}) == 5
    assert job_key("a") == job_key("a")
    monkeypatch.chdir(os.path.dirname(os.getcwd()))
    assert job_key(None) != of_both
    assert job_key("a") == job_key("a")
