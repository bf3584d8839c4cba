"""Kills at random moments of training with copies in memory: of a rank, of a process that writes, of a whole node.

The same command goes on from a step that is no older than the last one of which every rank had a sealed copy, or than
what is on disk, and goes on exactly. A node that is killed loses its memory too.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from checkpoint_engines import engine_of, everything_is_shared, steps, writer
from faults import SURVIVED
from helpers import environment
from memory_tier import nodes, resumed, sealed, trained
from rank_pool import RankError

from mics_ds.checkpoint import manifest
from mics_ds.checkpoint.background import wait_for_saves
from mics_ds.errors import MicsError

KILLS = 150
MOST_STEPS = 8
EVERY_STEP = {"memory_every": 1}


def begin(root: str, count: int) -> tuple[list[float], float]:
    """Leave a copy of the first step in memory.

    Returns:
        The losses of all steps without an interruption, and the seconds that a step takes.
    """
    everything_is_shared()
    engine = engine_of(2)
    started = time.monotonic()
    losses = steps(engine, count)
    seconds = (time.monotonic() - started) / count
    with nodes(Path(root)):
        assert trained(Path(root), 1, **EVERY_STEP)[1] == losses[:1]
    return losses, seconds


def resume(root: str, losses: list[float]):
    """Return an engine that has gone on from memory or disk, and note the step that it begins at."""
    everything_is_shared()
    engine, _, _ = resumed(Path(root), **EVERY_STEP)
    if dist.get_rank() == 0:
        (Path(root) / "begun").write_text(str(engine.global_steps))
    return engine


def step_exactly(engine, losses: list[float]) -> None:
    loss = steps(engine, 1)
    assert loss == [losses[engine.global_steps - 1]], f"step {engine.global_steps} after a crash"


def train_and_die(
    root: str, losses: list[float], victims: list[int], with_writers: bool, delay: float, save: bool | None
) -> None:
    """Train until ranks, or only their writers, are killed.

    Args:
        with_writers: kill the victims' writers.
        save: save in the second step: asynchronously, or not; ``None`` does not save.
    """
    with nodes(Path(root)), environment(MICS_DS_WRITER_PATIENCE="3"):
        engine = resume(root, losses)
        step_exactly(engine, losses)
        sealed()
        if dist.get_rank() == 0:
            (Path(root) / "sealed").write_text(str(engine.global_steps))
        dist.barrier()
        if dist.get_rank() in victims:
            threading.Timer(delay, kill, (with_writers, len(victims) < 4)).start()
        try:
            for number in range(MOST_STEPS):
                step_exactly(engine, losses)
                if number == 1 and save is not None:
                    engine.save_checkpoint(str(Path(root) / "disk"), async_save=save)
            wait_for_saves()
            time.sleep(delay + 1)
            dist.barrier()
        except (MicsError, RuntimeError) as error:
            print(f"ended by {type(error).__name__}", flush=True)
    Path(root, f"ended{dist.get_rank()}").touch()
    os._exit(SURVIVED)


def kill(with_writer: bool, itself: bool) -> None:
    if with_writer:
        os.kill(writer(), signal.SIGKILL)
    if itself:
        os.kill(os.getpid(), signal.SIGKILL)


def on_disk(root: Path) -> int:
    """The step of the latest checkpoint, which is good; -1 if there is none."""
    latest = root / "disk" / "latest"
    if not latest.exists():
        return -1
    folder = latest.with_name(latest.read_text())
    found = manifest.read(folder)
    assert not manifest.damages(folder, found.files, found.files)
    return found.global_steps


KINDS = {"rank": [[0], [1], [2], [3]], "node": [[0, 1], [2, 3]], "writers": [[0, 1, 2, 3]]}


@pytest.mark.slow  # test_memory_tier.py kills one writer, and whole jobs between steps
@pytest.mark.parametrize("kills", [1, KILLS])
def test_killed_at_random_moments_of_copying(pools, tmp_path, kills):
    chance, count = random.Random(20261130), (MOST_STEPS + 2) * kills + 20
    losses, seconds = pools.run(4, __name__, "begin", {"root": str(tmp_path), "count": count}, 300, fresh=True)[0]
    kept, saved, from_memory = 1, -1, 0
    for number in range(kills):
        kind = chance.choice(list(KINDS))
        arguments = {
            "root": str(tmp_path),
            "losses": losses,
            "victims": chance.choice(KINDS[kind]),
            "with_writers": kind != "rank",
            "delay": chance.uniform(0, 2 * MOST_STEPS * seconds),
            "save": chance.choice([True, False, None]),
        }
        with pytest.raises(RankError) as error:
            pools.run(4, __name__, "train_and_die", arguments, 120, fresh=True)
        dead = set() if kind == "writers" else set(arguments["victims"])
        ended = {int(path.name[-1]) for path in tmp_path.glob("ended*")}
        assert ended == set(range(4)) - dead, f"{number}, {arguments | {'losses': 0}}: {error.value}"
        begun = int((tmp_path / "begun").read_text())
        assert begun >= max(kept, saved), f"{number} began at step {begun}; memory had {kept}, and the disk {saved}"
        from_memory += begun > saved
        for path in tmp_path.glob("ended*"):
            path.unlink()
        time.sleep(0.3)  # writers end with their ranks
        if kind == "node":
            shutil.rmtree(tmp_path / f"node{arguments['victims'][0] // 2}")
        kept, saved = int((tmp_path / "sealed").read_text()), on_disk(tmp_path)
    assert from_memory > kills // 4
