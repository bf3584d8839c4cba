"""A rank dies or raises: the others fail with a cause, and neither hang nor poison the next test."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import slow
from helpers import batch, build, ds_config, environment, train
from local_ranks import LocalRanks
from rank_pool import Pools, RankError

from mics_ds.config import MicsConfig
from mics_ds.plugin.context import Build, Request, compare


def die_in_the_middle_of_a_step(victim: int) -> None:
    engine = build(ds_config(2))
    train(engine, 2)
    rank = dist.get_rank()
    loss = engine(*batch(2, 0, rank))
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        engine.backward(loss)
        engine.step()
    except BaseException:
        # as in a script of one's own: a rank that fails ends, and that is how the next one learns of it
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


@pytest.mark.parametrize("victim", [slow(0), 3])
def test_nobody_waits_forever_for_a_rank_that_was_killed(pools: Pools, victim: int) -> None:
    """Nothing kills the survivors here, unlike under a launcher: each has to notice by itself."""
    with pytest.raises(RankError) as failure:
        pools.run(4, __name__, "die_in_the_middle_of_a_step", {"victim": victim}, timeout=60)
    report = str(failure.value)
    assert "died with exit code -9" in report
    # its partner in the partition group fails in hop 1, its replica in hop 2, and the last one after them
    for rank in {0, 1, 2, 3} - {victim}:
        output = report.split(f"──── end of rank {rank}'s output ────")[1].split("────")[0]
        assert "by peer" in output or "MicsCommError" in output, report
    assert f"MiCS gradient all-reduce (hop 2) over ranks {[victim % 2, victim % 2 + 2]} failed on rank" in report


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("collective", "p"),
    [("all_gather_into_tensor", 2), ("all_gather_into_tensor", 4), ("all_to_all_single", 2), ("all_reduce", 2)],
    ids=["gather", "gather in two stages", "hop 1", "hop 2"],
)
def test_lack_of_memory_keeps_its_type(collective, p):
    """Programs that look for a batch size go by it. Here every rank lacks memory, so no rank waits for another one."""
    with environment(MICS_DS_RANKS_PER_NODE="2"):
        engine = build(ds_config(p))
    train(engine, 1)
    lacking = mock.patch.object(dist, collective, side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    with lacking as issued, pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory$"):
        train(engine, 1)
    assert issued.called
    engine.destroy()
    train(build(ds_config(2)), 1)


def disagree_on_purpose() -> None:
    if dist.get_rank() == 1:
        raise ValueError("one rank raises")
    dist.all_reduce(torch.ones(1))


def test_a_red_test_shows_every_rank_and_does_not_poison_the_next(pools: Pools) -> None:
    with pytest.raises(RankError) as failure:
        pools.run(2, __name__, "disagree_on_purpose", {}, timeout=30)
    report = str(failure.value)
    assert "ValueError: one rank raises" in report
    assert "──── rank 0 of 2 ────" in report
    assert "all_reduce" in report  # where rank 0 was
    assert pools.run(2, "torch.distributed", "get_rank", {}, timeout=30) == [0, 1]


def die_between_two_rounds(rank: int, folder: Path, pipe: Connection) -> None:
    store = dist.FileStore(str(folder / "store"), 4)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4, timeout=timedelta(seconds=3))
    asked = Request(MicsConfig(2))
    compare(asked)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    Build(asked).groups(dist.group.WORLD)


def test_a_rank_that_dies_while_the_job_starts_is_named() -> None:
    context = multiprocessing.get_context("forkserver")
    with LocalRanks(4, die_between_two_rounds, context, grace_s=20) as ranks, pytest.raises(RankError) as failure:
        ranks.collect(40)
    report = str(failure.value)
    assert "died with exit code -9" in report
    words = "MicsAgreementError: Expected every rank to report its MiCS configuration, but nothing came from ranks [2]"
    assert report.count(words) == 3
