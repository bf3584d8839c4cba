"""What ``python -m mics_ds.check`` measures: right where MiCS is right, and wrong where it is broken on purpose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mics_ds.check import checks, parity, resuming, traffic
from mics_ds.check.runs import Place, Setup
from mics_ds.comm import collectives
from mics_ds.comm.async_exec import INLINE, Deferred, ThreadExecutor
from mics_ds.zero.grad_sync import GradSync


def place(folder: Path | None = None) -> Place:
    return Place(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), folder)


def wrong(measures) -> list[str]:
    return [item.what for item in measures if not item.is_right]


def averaging(change, monkeypatch):
    """Hop 2 with something done to each part of the gradients before it."""
    start = collectives.start_average_

    def changed(tensor, replication):
        change(tensor, replication)
        return start(tensor, replication)

    monkeypatch.setattr(collectives, "start_average_", changed)
    return start


QUICK = Setup(2, overlap=True, micro_steps=2, steps=2)


@pytest.mark.ranks(4)
def test_a_sum_in_place_of_a_mean_is_seen():
    with pytest.MonkeyPatch.context() as patch:
        assert wrong(parity.same_as_stock(place(), QUICK)) == []
        averaging(lambda tensor, replication: tensor.mul_(replication.size), patch)
        assert wrong(parity.same_as_stock(place(), QUICK)) == ["losses", "parameters"]


@pytest.mark.ranks(4)
def test_replicas_that_drift_apart_are_seen():
    """On one rank, the averaged gradients are changed after hop 2."""
    with pytest.MonkeyPatch.context() as patch:
        average = GradSync.average

        def nudged(self):
            completed = average(self)
            if dist.get_rank() == 3 and completed:
                for key in self._place:
                    self.mean(key).add_(1e-3)
            return completed

        patch.setattr(GradSync, "average", nudged)
        found = wrong(parity.same_as_stock(place(), QUICK))
    # rank 0 compares with itself
    assert (parity.REPLICAS in found) == (dist.get_rank() in (2, 3))


@pytest.mark.ranks(4)
def test_bytes_beyond_the_formula_are_seen():
    with pytest.MonkeyPatch.context() as patch:
        assert wrong(traffic.bytes_by_formula(place(), QUICK)) == []
        assert wrong(traffic.bytes_by_formula(place(), Setup(4, overlap=True, per_node=2))) == []

        def again(tensor, replication):
            # a hop 2 too many; equal bits on all replicas afterwards, so the mean of them is what it was
            once(tensor, replication).wait()

        once = averaging(again, patch)
        found = wrong(traffic.bytes_by_formula(place(), QUICK))
    assert [what.partition(":")[0] for what in found] == ["hop 2 bytes"]


@pytest.mark.ranks(4)
def test_a_result_that_nobody_waits_for_is_seen():
    """An executor that says that it is done before it is: the end of a pass uses what has arrived so far."""
    setup = Setup(4, "bf16", steps=3, mics=(("mics_reduce_scatter", "all_to_all"),))
    assert wrong(parity.late_results(place(), setup)) == []
    with pytest.MonkeyPatch.context() as patch:
        _hold_last_bucket_back(patch)
        assert "states against blocking" in wrong(parity.late_results(place(), setup))


def _hold_last_bucket_back(patch):
    """Hop 1 of each bucket runs when the next one comes, and that of the last one of a step after the step."""
    submit, held = ThreadExecutor.submit, []

    def late_submit(self, task):
        if self.name != "reduction":
            return submit(self, task)
        held.append(task(INLINE))
        return submit(self, lambda memory: held.pop(0) if len(held) > 1 else Deferred(lambda: None))

    patch.setattr(ThreadExecutor, "submit", late_submit)


@pytest.mark.ranks(4)
def test_a_checkpoint_that_is_not_loaded_is_seen(tmp_path):
    setup = Setup(2, overlap=True, steps=2)
    assert wrong(resuming.as_if_nothing_happened(place(tmp_path), setup)) == []
    with pytest.MonkeyPatch.context() as patch:
        import deepspeed

        patch.setattr(deepspeed.DeepSpeedEngine, "load_checkpoint", lambda self, folder, tag=None: (folder, {}))
        found = wrong(resuming.as_if_nothing_happened(place(tmp_path / "again"), setup))
    assert found == ["loaded parameters", "losses after it", "states after it"]


@pytest.mark.slow
@pytest.mark.ranks(4)
def test_a_background_save_of_another_moment_is_seen(tmp_path):
    setup = Setup(2, overlap=True, steps=2)
    assert wrong(resuming.in_background(place(tmp_path), setup)) == []
    with pytest.MonkeyPatch.context() as patch:
        from mics_ds.shared_memory import Copying, SharedMemory

        patch.setattr(SharedMemory, "copy_in", lambda self, parts, streams: Copying())  # what was there before
        found = wrong(resuming.in_background(place(tmp_path / "again"), replace(setup, steps=1)))
    assert found == ["loaded parameters", "losses after it", "states after it"]


@pytest.mark.ranks(3)
@pytest.mark.slow
def test_three_ranks_do_what_they_can():
    here = checks.Surroundings((0,) * 3, ("fp32", "bf16"), folder_problem="not needed")
    for check in checks.all_checks(here):
        if not check.why_not:
            assert wrong(check.run(place())) == [], check.name


@pytest.mark.ranks(4)
def test_references_are_kept_and_do_not_depend_on_what_is_compared():
    here = place()
    parity.same_as_stock(here, QUICK)
    parity.same_as_stock(here, replace(QUICK, p=4, overlap=False))
    assert list(here.references) == [QUICK.stock()]
