"""Kills at random moments of saves in the background: of a rank, of a process that writes, of a whole node.

Whatever is published is complete, and the newest complete checkpoint always loads and goes on exactly.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from checkpoint_engines import engine_of, everything_is_shared, writer
from faults import SURVIVED, Events
from helpers import train
from rank_pool import RankError

from mics_ds.checkpoint import manifest
from mics_ds.checkpoint.background import Background, wait_for_saves
from mics_ds.errors import MicsCheckpointError

KILLS = 300
WRITERS_AT_A_TIME = 10
ASYNC = {"mics_checkpoint": {"async": True}}


def uninterrupted(folder: str, steps: int) -> tuple[list[float], list[int], list[float]]:
    """The losses of all steps; events of a process's first save, and of its second, which asks the other ranks only
    after the copy; and how long each takes in the background, the first with the start of the processes that write."""
    everything_is_shared()
    engine = engine_of(2, zero=ASYNC)
    losses = train(engine, 1)
    events, seconds = [], []
    for _ in range(2):
        with Events() as seen:
            engine.save_checkpoint(folder)
        started = time.monotonic()
        wait_for_saves()
        events.append(seen.count)
        seconds.append(time.monotonic() - started)
    for _ in range(steps - 1):
        losses += train(engine, 1)  # the data of step 0 each time, as after a resume
    return losses, events, seconds


def resumed(folder: str, losses: list[float]) -> Any:
    everything_is_shared()
    os.environ["MICS_DS_WRITER_PATIENCE"] = "3"  # a node that is killed says nothing
    engine = engine_of(2, seed=random.randrange(1000), zero=ASYNC)
    engine.load_checkpoint(folder)
    assert engine.global_steps >= 1
    step_exactly(engine, losses)
    return engine


def step_exactly(engine: Any, losses: list[float]) -> None:
    loss = train(engine, 1)
    assert loss == [losses[engine.global_steps - 1]], f"step {engine.global_steps} after a crash"


def die(delay: float, *, with_writer: bool) -> None:
    time.sleep(delay)
    if with_writer:
        os.kill(writer(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(
    folder: str, losses: list[float], victims: list[int], saves_before: int, fatal: int | None, delay: float
) -> None:
    engine = resumed(folder, losses)
    mine = dist.get_rank() in victims
    for _ in range(saves_before):
        engine.save_checkpoint(folder)
        wait_for_saves()
        step_exactly(engine, losses)
    try:
        if fatal is not None and mine:
            with Events(fatal):
                engine.save_checkpoint(folder)
        engine.save_checkpoint(folder)
        if mine:
            die(delay, with_writer=len(victims) > 1)
        train(engine, 1)
        wait_for_saves()
        dist.barrier()
    except (MicsCheckpointError, RuntimeError) as error:
        print(f"ended by {type(error).__name__}", flush=True)
    Path(folder).with_name(f"ended{dist.get_rank()}").touch()  # on a busy machine the exit code may come too late
    os._exit(SURVIVED)


def save_after_another(engine: Any, folder: str) -> bool:
    """Whether the other one failed."""
    try:
        engine.save_checkpoint(folder)
    except MicsCheckpointError:
        engine.save_checkpoint(folder)
        return True
    return False


def save_while_writers_die(folder: str, losses: list[float], kills: list[tuple[int, int, float]]) -> int:
    """Several in one run: the ranks go on. Returns how many saves failed."""
    engine, failed = resumed(folder, losses), 0
    for victim, saves_before, delay in kills:
        for _ in range(saves_before):  # after a kill it starts processes, and the next does not
            failed += save_after_another(engine, folder)
            wait_for_saves()
            step_exactly(engine, losses)
        failed += save_after_another(engine, folder)
        if dist.get_rank() == victim:
            time.sleep(delay)
            os.kill(writer(), signal.SIGKILL)
            Background.current._process.wait()  # else the next save may still be given to it, and be lost as well
        Background.current.wait()
        dist.barrier()
        require_good(Path(folder))
        dist.barrier()
        step_exactly(engine, losses)
    failed += save_after_another(engine, folder)
    wait_for_saves()
    return failed


def require_good(folder: Path) -> int:
    """The step of the latest checkpoint."""
    latest = folder / (folder / "latest").read_text()
    for published in folder.glob("global_step*"):
        found = manifest.read(published)
        assert not manifest.damages(published, found.files, found.files, contents=published == latest)
    return manifest.read(latest).global_steps


def kill_ranks(
    pools: Any, folder: Path, chance: random.Random, losses: list[float], events: list[int], seconds: list[float]
) -> str:
    kind, saves_before = chance.choice(["staging", "rank", "node"]), chance.randrange(2)
    victims = {"node": [[0, 1], [2, 3]]}.get(kind, [[0], [1], [2], [3]])
    arguments = {
        "folder": str(folder),
        "losses": losses,
        "victims": chance.choice(victims),
        "saves_before": saves_before,
        "fatal": chance.randrange(1, events[saves_before]) if kind == "staging" else None,
        "delay": chance.uniform(0, 2 * seconds[saves_before]),
    }
    before = require_good(folder)
    with pytest.raises(RankError) as error:
        pools.run(4, __name__, "save_and_die", arguments, 120, fresh=True)
    text = str(error.value)
    assert text.count("died with exit code -9") == len(arguments["victims"]), f"{kind}: {text}"
    ended = list(folder.parent.glob("ended*"))
    assert {int(path.name[-1]) for path in ended} == set(range(4)) - set(arguments["victims"]), f"{kind}: {text}"
    for path in ended:
        path.unlink()
    time.sleep(0.2)  # processes that write end with their ranks
    assert require_good(folder) - before - saves_before in (0, 1), kind
    return kind


@pytest.fixture
def start(pools, tmp_path):
    """A checkpoint, and what follows it without an interruption."""

    def save(steps: int) -> tuple[Path, list[float], list[int], list[float]]:
        folder = tmp_path / "saved"
        arguments = {"folder": str(folder), "steps": steps}
        return folder, *pools.run(4, __name__, "uninterrupted", arguments, 300, fresh=True)[0]

    return save


@pytest.mark.slow  # test_checkpoint_crashes.py kills ranks, and test_async_failures.py what ranks leave behind
@pytest.mark.parametrize("kills", [1, KILLS // 2])
def test_ranks_and_nodes_killed_at_random_moments(pools, start, kills):
    folder, losses, events, seconds = start(2 * kills + 20)
    chance = random.Random(20261124)
    kinds = {kill_ranks(pools, folder, chance, losses, events, seconds) for _ in range(kills)}
    assert kills == 1 or kinds == {"staging", "rank", "node"}
    assert kills == 1 or require_good(folder) > 1


@pytest.mark.slow  # test_async_failures.py kills one writer at one moment
@pytest.mark.parametrize("kills", [1, KILLS // 2])
def test_writers_killed_at_random_moments(pools, start, kills):
    folder, losses, _, seconds = start(2 * kills + 20)
    chance, failed = random.Random(20261125), 0
    for done in range(0, kills, WRITERS_AT_A_TIME):
        some = min(WRITERS_AT_A_TIME, kills - done)
        saves_before = [chance.randrange(2) for _ in range(some)]
        deaths = [(chance.randrange(4), before, chance.uniform(0, 2 * seconds[before])) for before in saves_before]
        arguments = {"folder": str(folder), "losses": losses, "kills": deaths}
        failed += pools.run(4, __name__, "save_while_writers_die", arguments, 300, fresh=True)[0]
        require_good(folder)
    assert kills == 1 or 0 < failed < kills, "some come in time and some do not"
