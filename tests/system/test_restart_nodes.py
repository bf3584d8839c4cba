"""A node dies in the middle of training, and torchrun starts the job again: it goes on from a sibling's memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from bench import cluster as emulation
from bench.restart import Job

STEPS = 12

pytestmark = pytest.mark.skipif(
    emulation.why_unavailable() is not None, reason=f"cannot emulate a cluster: {emulation.why_unavailable()}"
)


def uninterrupted(cluster: emulation.Cluster, root: Path, states: str) -> dict[int, str]:
    root.mkdir()
    with Job(cluster, root, "--steps", str(STEPS), "--pause", "0", "--states", states) as job:
        job.start(0)
        job.start(1)
        job.finish()
        return job.losses()


def loses(cluster: emulation.Cluster, root: Path, states: str, *, both_copies: bool) -> tuple[Job, int]:
    """A job that loses node 1 after step 7, of which copies were taken at 6, 4 and 2, and step 3 was saved."""
    root.mkdir()
    with Job(cluster, root, "--steps", str(STEPS), "--pause", "1", "--states", states) as job:
        job.start(0)
        job.start(1)
        job.await_line(r"STEP 7 ")
        job.kill(1)
        killed = len(job.lines)
        job.forget(1)
        if both_copies:
            for copy in job.memory(0).glob("mics_ds-*/e0-g0-shard1*"):
                copy.unlink()
        job.start(1)
        job.finish()
        return job, killed


@pytest.mark.slow
@pytest.mark.parametrize("states", ["partition", "world"])
def test_a_lost_node_costs_the_steps_since_the_last_copy(tmp_path, states):
    with emulation.Cluster(2, None) as cluster:
        expected = uninterrupted(cluster, tmp_path / "whole", states)
        job, killed = loses(cluster, tmp_path / "one", states, both_copies=False)
        said = re.search(
            r"resumed from memory at step (\d) \(on disk: step 3\)",
            "\n".join(job.lines[killed:]),
        )
        assert said, "\n".join(job.lines[killed:])
        step = int(said[1])
        assert step in (4, 6), "of 7; on a busy machine the last copy may not be summed up yet"
        assert job.losses(killed) == {later: expected[later] for later in range(step + 1, STEPS + 1)}


@pytest.mark.slow
def test_without_both_nodes_that_held_a_shard_the_disk_is_used(tmp_path):
    with emulation.Cluster(2, None) as cluster:
        job, killed = loses(cluster, tmp_path / "both", "partition", both_copies=True)
        said = "\n".join(job.lines[killed:])
        assert re.search(r"of step [46], shards \[1\] are in no node's memory", said)
        assert "no complete set of copies in memory" in said
        assert "LOADED 3" in said
        assert set(job.losses(killed)) == set(range(4, STEPS + 1))


def said_with(cluster: emulation.Cluster, root: Path, shm_bytes: int | None) -> tuple[str, str]:
    """Return what a job says at its start, and after the loss of a node, on nodes with so much ``/dev/shm``."""
    root.mkdir()
    size = ["--hidden", "1024", "--layers", "8"]
    with Job(cluster, root, "--steps", "8", "--pause", "3", *size, shm_bytes=shm_bytes) as job:
        job.start(0)
        job.start(1)
        job.await_line(r"STEP 6 ")
        job.kill(1)
        killed = len(job.lines)
        job.forget(1)
        job.start(1)
        job.finish()
        return "\n".join(job.lines[:killed]), "\n".join(job.lines[killed:])


@pytest.mark.slow
def test_the_smallest_dev_shm_that_holds_the_copies_will_do_and_less_is_told_at_the_start(tmp_path):
    with emulation.Cluster(2, None) as cluster:
        before, after = said_with(cluster, tmp_path / "plenty", None)
        [takes] = {float(each) for each in re.findall(r"copies in memory take (\S+) GB on a node", before)}
        assert takes > 0.1, "hundredths of a GB are told"
        assert "resumed from memory" in after
        for name, room in (("enough", takes + 0.01), ("short", takes - 0.01)):
            before, after = said_with(cluster, tmp_path / name, int(room * 1e9))
            short = f"a restart uses the disk: that takes {takes:.2f} GB on a node, in /dev/shm, which has"
            assert (short in before) == (name == "short"), before
            assert ("resumed from memory" in after) == (name == "enough"), after
            assert ("LOADED 3" in after) == (name == "short"), after
