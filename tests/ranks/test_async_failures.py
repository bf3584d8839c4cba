"""Saves in the background that fail: one error on every rank, at the next save, and the older checkpoint stays."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
from cases import slow
from checkpoint_engines import ASYNC, Wide, adamw, digest, engine_of, everything_is_shared, writer
from faults import Once, needs_root, outcome, small_disk, unforeseen
from helpers import build, ds_config, train

from mics_ds.checkpoint import folder as folders
from mics_ds.checkpoint import save, staging
from mics_ds.checkpoint.background import Background, wait_for_saves
from mics_ds.errors import MicsCheckpointError
from mics_ds.frameworks import deletions
from mics_ds.shared_memory import SharedMemory

LOG = {"mics_checkpoint": {"async": True, "on_error": "log"}}
SKIP = {"mics_checkpoint": {"async": True, "busy": "skip"}}


def stop_writers():
    os.kill(writer(), signal.SIGSTOP)
    dist.barrier()


def let_writers_go():
    dist.barrier()
    os.kill(writer(), signal.SIGCONT)


def remove_staging(folder):
    [staging] = folder.glob(".global_step2.*.partial")
    shutil.rmtree(staging)


def delete(folder):
    """As a framework does."""
    if deletions.may_delete(folder):
        shutil.rmtree(folder)


def saved_once(folder, zero=ASYNC, p=2):
    everything_is_shared()
    engine = engine_of(p, zero=zero)
    train(engine, 1)
    engine.save_checkpoint(str(folder))
    wait_for_saves()
    train(engine, 1)
    return engine


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("victim", "zero"), [(0, ASYNC), slow(3, LOG), slow(1, ASYNC)], ids=str)
def test_a_writer_that_is_killed(tmp_path, victim, zero):
    engine = saved_once(tmp_path, zero)
    stop_writers()
    engine.save_checkpoint(str(tmp_path))
    if dist.get_rank() == victim:
        os.kill(writer(), signal.SIGKILL)
    let_writers_go()
    train(engine, 1)
    if zero == ASYNC:
        with pytest.raises(
            MicsCheckpointError, match=rf"An earlier asynchronous save failed.*rank {victim}: the process that"
        ):
            engine.save_checkpoint(str(tmp_path))
    dist.barrier()
    assert (tmp_path / "latest").read_text() == "global_step1"
    assert folders.complete_tags(tmp_path) == ["global_step1"]
    dist.barrier()
    engine.save_checkpoint(str(tmp_path))  # by a new process
    saved = digest(engine)
    other = engine_of(2, seed=3)
    other.load_checkpoint(str(tmp_path))
    assert digest(other) == saved
    assert other.global_steps == 3


@pytest.mark.ranks(4)
def test_a_writer_that_dies_between_saves_is_replaced(tmp_path):
    engine = saved_once(tmp_path)
    if dist.get_rank() == 2:
        os.kill(writer(), signal.SIGKILL)
        Background.current._process.wait()
    dist.barrier()
    engine.save_checkpoint(str(tmp_path))
    wait_for_saves()
    dist.barrier()
    assert (tmp_path / "latest").read_text() == "global_step2"


@pytest.mark.ranks(4)
def test_a_folder_that_is_taken_away(tmp_path):
    engine = saved_once(tmp_path)
    stop_writers()
    engine.save_checkpoint(str(tmp_path))
    dist.barrier()
    if dist.get_rank() == 0:
        remove_staging(tmp_path)
    let_writers_go()
    with pytest.raises(MicsCheckpointError, match=r"global_step2 could not be saved. rank \d: .*Nothing was published"):
        wait_for_saves()
    with pytest.raises(
        MicsCheckpointError, match=r"An earlier asynchronous save failed. ranks 0, 1, 2, 3: .*save again"
    ):
        engine.save_checkpoint(str(tmp_path))
    dist.barrier()
    assert (tmp_path / "latest").read_text() == "global_step1"


@pytest.mark.ranks(4)
def test_a_save_meanwhile_waits_or_is_skipped(tmp_path):
    engine = saved_once(tmp_path, SKIP)
    stop_writers()
    assert engine.save_checkpoint(str(tmp_path), tag="second")
    train(engine, 1)
    assert not engine.save_checkpoint(str(tmp_path), tag="third")
    let_writers_go()
    wait_for_saves()
    dist.barrier()
    assert folders.complete_tags(tmp_path) == ["global_step1", "second"]


@pytest.mark.ranks(2)
def test_who_deletes_what_has_a_complete_successor_does_not_wait(tmp_path):
    """As the frameworks do, by :func:`deletions.may_delete`."""
    engine = saved_once(tmp_path / "checkpoint-1", p=1)
    engine.save_checkpoint(str(tmp_path / "other-1"))
    train(engine, 1)
    engine.save_checkpoint(str(tmp_path / "checkpoint-2"))
    wait_for_saves()
    stop_writers()
    engine.save_checkpoint(str(tmp_path / "checkpoint-3"))
    dist.barrier()
    if dist.get_rank() == 0:
        delete(tmp_path / "checkpoint-1")
        assert Background.current.is_busy, "checkpoint-2 stays, and is complete"
        subprocess.Popen(f"sleep 0.3; kill -CONT {writer()}", shell=True)
    else:
        os.kill(writer(), signal.SIGCONT)
    if dist.get_rank() == 0:
        delete(tmp_path / "other-1")  # nothing of its kind is newer
        assert not Background.current.is_busy
    wait_for_saves()
    dist.barrier()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("fails", [False, True])
def test_who_deletes_the_older_one_waits_for_the_newer(tmp_path, fails):
    """As the HF Trainer does, which keeps checkpoints in folders of their own."""
    engine = saved_once(tmp_path / "checkpoint-1", p=1)
    stop_writers()
    engine.save_checkpoint(str(tmp_path / "checkpoint-2"))
    dist.barrier()
    if dist.get_rank() == 0:
        if fails:
            remove_staging(tmp_path / "checkpoint-2")
        subprocess.Popen(f"sleep 0.3; kill -CONT {writer()}", shell=True)
        delete(tmp_path / "checkpoint-1")
        assert not Background.current.is_busy
    else:
        os.kill(writer(), signal.SIGCONT)
    if fails:
        with pytest.raises(MicsCheckpointError, match="An earlier asynchronous save failed"):
            engine.save_checkpoint(str(tmp_path / "checkpoint-2"))
    else:
        wait_for_saves()
    dist.barrier()
    assert (tmp_path / "checkpoint-1").exists() == fails
    assert (tmp_path / "checkpoint-2" / "global_step2").exists() != fails


@pytest.mark.ranks(2)
@pytest.mark.parametrize("zero", [ASYNC, LOG], ids=["raise", "log"])
def test_nobody_deletes_the_last_good_one_after_a_save_that_failed_at_once(tmp_path, zero):
    """Before anybody asks. Who deletes goes on, and the folder stays."""
    engine = saved_once(tmp_path / "checkpoint-1", zero, p=1)
    stop_writers()
    engine.save_checkpoint(str(tmp_path / "checkpoint-2"))
    dist.barrier()
    if dist.get_rank() == 0:
        remove_staging(tmp_path / "checkpoint-2")
    let_writers_go()
    Background.current.wait()
    if dist.get_rank() == 0:
        delete(tmp_path / "checkpoint-1")
    dist.barrier()
    assert folders.complete_tags(tmp_path / "checkpoint-1") == ["global_step1"]
    dist.barrier()
    if zero == ASYNC:
        with pytest.raises(MicsCheckpointError, match="An earlier asynchronous save failed"):
            engine.save_checkpoint(str(tmp_path / "checkpoint-3"))
    engine.save_checkpoint(str(tmp_path / "checkpoint-3"))
    if dist.get_rank() == 0:
        delete(tmp_path / "checkpoint-1")
    wait_for_saves()
    dist.barrier()
    assert not (tmp_path / "checkpoint-1").exists()
    assert folders.complete_tags(tmp_path / "checkpoint-3") == ["global_step2"]


def fill_the_disk(folder, space):
    engine = build(ds_config(2, zero=ASYNC), Wide, optimizer=adamw)
    train(engine, 1)
    engine.save_checkpoint(folder)
    train(engine, 1)
    engine.save_checkpoint(folder)
    train(engine, 1)
    with pytest.raises(MicsCheckpointError, match=r"global_step2 could not be saved.*Nothing was published"):
        engine.save_checkpoint(folder)
    dist.barrier()
    assert folders.complete_tags(Path(folder)) == ["global_step1"]
    assert (Path(folder) / "latest").read_text() == "global_step1"
    dist.barrier()
    if dist.get_rank() == 0:
        subprocess.run(["mount", "-o", f"remount,size={4 * space}", folder], check=True)
    dist.barrier()
    engine.save_checkpoint(folder)  # and goes on once there is room
    wait_for_saves()
    dist.barrier()
    assert folders.complete_tags(Path(folder)) == ["global_step1", "global_step3"]


@needs_root
def test_a_full_disk(pools, tmp_path):
    with small_disk(tmp_path / "disk", 1_200_000) as disk:
        pools.run(4, __name__, "fill_the_disk", disk, 60)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("states", ["partition", "world"])
def test_whatever_one_rank_raises_while_staging_is_the_error_of_all(tmp_path, states):
    engine = saved_once(tmp_path, {**ASYNC, "mics_optimizer_states": states})
    cases = {
        "no memory": (3, SharedMemory, "reserve"),
        "copying": (2, SharedMemory, "copy_in"),
        "pickling": (0, staging, "record"),
        "describing": (0, save._Save, "describe"),
        "the optimizer's states": (3, engine.optimizer, "state_dict"),
        "starting a process again": (1, Background, "revive"),
    }
    for case, (culprit, owner, name) in cases.items():
        with Once(culprit, owner, name, unforeseen):
            said = outcome(lambda: engine.save_checkpoint(str(tmp_path), tag="second"))
        assert re.search(rf"could not be saved. rank {culprit}: .*unforeseen", said), f"{case}: {said}"
        dist.barrier()
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["global_step1"], case
        dist.barrier()
    engine.save_checkpoint(str(tmp_path), tag="second")
    wait_for_saves()
    dist.barrier()
    assert (tmp_path / "latest").read_text() == "second"


@pytest.mark.ranks(4)
@pytest.mark.parametrize("culprit", [0, 3])
def test_ranks_that_mean_another_save_say_so_after_the_copy(tmp_path, culprit):
    """Nothing of it stays on disk, and the next save is as good as any."""
    engine = saved_once(tmp_path)
    other = dist.get_rank() == culprit
    cases = {
        "tag": ({"tag": "other" if other else "second"}, "must save to the same tag"),
        "folder": (
            {"save_dir": str(tmp_path / "elsewhere") if other else str(tmp_path)},
            "must save to the same folder",
        ),
        "place": ({"async_save": not other}, "must save to the same way, asynchronous"),
        "bad tag": ({"tag": "" if other else "second"}, f"rank {culprit}: .*tag"),
        "client state": (
            {"client_state": {"f": lambda: 0} if other else {}},
            f"rank {culprit}: client_state cannot be",
        ),
    }
    for case, (asked, expected) in cases.items():
        said = outcome(partial(engine.save_checkpoint, **{"save_dir": str(tmp_path), **asked}))
        assert re.search(expected, said), f"{case}: {said}"
        dist.barrier()
        assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == ["global_step1"], case
        dist.barrier()
    engine.save_checkpoint(str(tmp_path))
    wait_for_saves()
    dist.barrier()
    assert folders.complete_tags(tmp_path) == ["global_step1", "global_step2"]


@pytest.mark.ranks(4)
def test_client_states_that_differ_at_some_saves_only(tmp_path):
    """Ranks learn of it after they have copied, or, the next time, before."""
    engine = saved_once(tmp_path)
    rank = dist.get_rank()
    for number, differs in enumerate([False, True, True, False, False, True]):
        engine.save_checkpoint(str(tmp_path), tag=f"{number}", client_state={"rank": rank if differs else -1})
    wait_for_saves()
    dist.barrier()
    for number, differs in enumerate([False, True, True, False, False, True]):
        _, client_state = engine.load_checkpoint(str(tmp_path), tag=f"{number}")
        assert client_state["rank"] == (rank if differs else -1)
        assert len([*(tmp_path / f"{number}").glob("*client*")]) == (2 if differs else 0)
