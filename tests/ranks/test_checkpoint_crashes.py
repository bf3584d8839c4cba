"""Ranks killed while they save, disks that fill, files that rot: an older checkpoint always survives."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest
import torch.distributed as dist
from cases import slow
from checkpoint_engines import Wide, adamw, digest, engine_of
from faults import SURVIVED, Events, needs_root, small_disk
from helpers import build, ds_config, train
from rank_pool import RankError
from torch import nn

from mics_ds.checkpoint import folder as folders
from mics_ds.checkpoint import manifest
from mics_ds.errors import MicsCheckpointError

CRASHES = 20


def uninterrupted(folder, zero, steps):
    """The losses of all steps, and how many events the first save of a process has on each rank."""
    engine = engine_of(2, zero=zero)
    losses = train(engine, 1)
    with Events() as events:
        engine.save_checkpoint(folder)
    for _ in range(steps - 1):
        losses += train(engine, 1)  # the data of step 0 each time, as after a resume
    return losses, events.count


def resume_step_and_die_saving(folder, zero, victim, fatal, losses):
    engine = engine_of(2, seed=random.randrange(1000), zero=zero)
    engine.load_checkpoint(folder)
    assert engine.global_steps >= 1
    loss = train(engine, 1)
    assert loss == [losses[engine.global_steps - 1]], f"step {engine.global_steps} after a crash"
    try:
        if dist.get_rank() == victim:
            with Events(fatal):
                engine.save_checkpoint(folder)
        engine.save_checkpoint(folder)
        dist.barrier()  # for a victim that died after its last collective
    except (MicsCheckpointError, RuntimeError) as error:
        print(f"ended by {type(error).__name__}", flush=True)
        os._exit(SURVIVED)  # as an uncaught error would; the ranks of a pool live on


@pytest.mark.parametrize(
    ("crashes", "states"),
    [(1, "partition"), *(slow(CRASHES, states) for states in ("partition", "world"))],
)
def test_killed_at_random_moments_of_saving(pools, tmp_path, crashes, states):
    folder, zero = str(tmp_path / "saved"), {"mics_optimizer_states": states}
    arguments = {"folder": folder, "zero": zero, "steps": crashes + 4}
    answers = pools.run(4, __name__, "uninterrupted", arguments, 120, fresh=True)
    losses = answers[0][0]
    chance = random.Random(20261123)
    reached = set()
    for crash in range(crashes):
        victim = chance.randrange(4)
        fatal = chance.randrange(1, answers[victim][1])
        arguments = {"folder": folder, "zero": zero, "victim": victim, "fatal": fatal, "losses": losses}
        with pytest.raises(RankError) as error:
            pools.run(4, __name__, "resume_step_and_die_saving", arguments, 60, fresh=True)
        text = str(error.value)
        assert text.count("died with exit code -9") == 1, f"crash {crash}: {text}"
        assert text.count(f"died with exit code {SURVIVED}") == 3, f"crash {crash}: {text}"
        latest = (Path(folder) / "latest").read_text()
        reached.add(latest)
        described = manifest.read(Path(folder) / latest)
        assert manifest.damages(Path(folder) / latest, described.files, described.files) == []
        for published in Path(folder).glob("global_step*"):
            assert manifest.read(published).files, "whatever has its name is complete"
    if crashes == CRASHES:  # a few moments may all be early ones
        assert len(reached) > 1, "some saves should have got through before the kill"
    pools.run(4, __name__, "resume_and_finish", {"folder": folder, "zero": zero, "losses": losses}, 60)


def resume_and_finish(folder, zero, losses):
    engine = engine_of(2, seed=5, zero=zero)
    engine.load_checkpoint(folder)
    start = engine.global_steps
    assert train(engine, 1) + train(engine, 1) == losses[start : start + 2]
    engine.save_checkpoint(folder)
    assert not list(Path(folder).glob(f".global_step{start + 2}.*"))


# ------------------------------------------------------------------------------ what is not there


@pytest.mark.ranks(4)
def test_an_interrupted_save_is_never_taken_for_a_checkpoint(tmp_path):
    engine = engine_of(2)
    train(engine, 1)
    engine.save_checkpoint(str(tmp_path), tag="a")
    if dist.get_rank() == 0:
        (tmp_path / "a").rename(tmp_path / ".a.partial")
    dist.barrier()
    with pytest.raises(MicsCheckpointError, match="a does not exist"):
        engine_of(2).load_checkpoint(str(tmp_path))
    dist.barrier()
    engine.save_checkpoint(str(tmp_path), tag="a")
    assert not (tmp_path / ".a.partial").exists()
    engine_of(2).load_checkpoint(str(tmp_path))


@pytest.mark.ranks(4)
def test_nothing_saved_yet_is_not_an_error(tmp_path):
    assert engine_of(2).load_checkpoint(str(tmp_path)) == (None, None)


@pytest.mark.ranks(4)
def test_another_model_is_refused_by_name(tmp_path):
    engine = engine_of(2)
    engine.save_checkpoint(str(tmp_path))

    def other():
        return nn.Sequential(nn.Linear(7, 3))

    with pytest.raises(MicsCheckpointError, match=r"another model: 0.weight is missing"):
        build(ds_config(2), other, optimizer=adamw).load_checkpoint(str(tmp_path))


@pytest.mark.ranks(4)
def test_ranks_that_disagree_on_where_to_save(tmp_path):
    engine = engine_of(2)
    with pytest.raises(MicsCheckpointError, match=r"same tag, but rank 0 said 'a'; rank 3 said 'b'"):
        engine.save_checkpoint(str(tmp_path), tag="b" if dist.get_rank() == 3 else "a")
    with pytest.raises(MicsCheckpointError, match="same folder"):
        engine.save_checkpoint(str(tmp_path / str(dist.get_rank())))
    with pytest.raises(MicsCheckpointError, match="same tag"):
        engine.load_checkpoint(str(tmp_path), tag=str(dist.get_rank()))
    engine.save_checkpoint(str(tmp_path))
    engine.load_checkpoint(str(tmp_path))


@pytest.mark.ranks(4)
def test_a_folder_that_cannot_be_written(tmp_path):
    engine = engine_of(2)
    if dist.get_rank() == 0:
        (tmp_path / "file").write_text("in the way")
    dist.barrier()
    with pytest.raises(MicsCheckpointError, match=r"rank 0: (NotADirectoryError|FileExistsError)"):
        engine.save_checkpoint(str(tmp_path / "file"))


@pytest.mark.ranks(4)
@pytest.mark.parametrize("culprits", [[2], [0], [0, 1, 2, 3]])
def test_client_state_that_cannot_be_pickled_is_an_error_on_every_rank(tmp_path, culprits):
    engine = engine_of(2)
    state = {"bad": lambda: None} if dist.get_rank() in culprits else {}
    with pytest.raises(MicsCheckpointError, match=rf"ranks? {culprits[0]}.*client_state cannot be pickled"):
        engine.save_checkpoint(str(tmp_path), client_state=state)
    dist.barrier()  # rank 0 cleans up after it has told the others
    assert list(tmp_path.iterdir()) == []
    dist.barrier()
    engine.save_checkpoint(str(tmp_path))


def fill_the_disk(folder, space):
    engine = build(ds_config(2), Wide, optimizer=adamw)
    train(engine, 1)
    engine.save_checkpoint(folder)
    train(engine, 1)
    before = digest(engine)
    with pytest.raises(MicsCheckpointError, match=r"\.partial/.*MB free there.*Nothing was published"):
        engine.save_checkpoint(folder)
    assert digest(engine) == before
    dist.barrier()  # rank 0 cleans up after it has told the others
    assert sorted(path.name for path in Path(folder).glob("*global_step*")) == ["global_step1"]
    assert (Path(folder) / "latest").read_text() == "global_step1"
    other = build(ds_config(2), Wide, seed=4, optimizer=adamw)
    other.load_checkpoint(folder)
    assert other.global_steps == 1
    dist.barrier()
    if dist.get_rank() == 0:
        subprocess.run(["mount", "-o", f"remount,size={4 * space}", folder], check=True)
    dist.barrier()
    engine.save_checkpoint(folder)  # and goes on once there is room
    assert folders.complete_tags(Path(folder)) == ["global_step1", "global_step2"]


@needs_root
def test_a_full_disk_is_an_error_on_every_rank_and_keeps_the_old_checkpoint(pools, tmp_path):
    with small_disk(tmp_path / "disk", 1_200_000) as disk:
        pools.run(4, __name__, "fill_the_disk", disk, 60)
