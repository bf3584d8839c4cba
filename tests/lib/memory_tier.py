"""Jobs that copy their training state to memory, on two simulated nodes of two ranks."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from checkpoint_engines import digest, engine_of, steps
from helpers import environment

from mics_ds.checkpoint import memory, restart
from mics_ds.checkpoint.background import Background
from mics_ds.config import CheckpointRequest
from mics_ds.frameworks import hf_trainer
from mics_ds.log import logger

EVERY = 2
TWO_NODES = {"MICS_DS_RANKS_PER_NODE": "2"}


def node() -> int:
    return dist.get_rank() // 2


class Now:
    """Settings of the test that is running."""

    states = "partition"


@contextlib.contextmanager
def nodes(root: Path, states: str = "partition"):
    """Place two ranks on a node, and give each node memory of its own."""
    original = memory.region
    with environment(**TWO_NODES), pytest.MonkeyPatch.context() as patched:
        for module in (memory, restart):
            patched.setattr(module, "region", lambda folder, job: original(root / f"node{node()}", job))
        patched.setattr(Now, "states", states)
        yield


@contextlib.contextmanager
def logged():
    """Collect what this rank logs."""
    lines: list[str] = []

    class Keeping(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    handler = Keeping()
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def zero(**more):
    return {"mics_checkpoint": {"memory_every": EVERY, **more}, "mics_optimizer_states": Now.states}


def restarted():
    """Count engines anew, as in a process that begins."""
    memory._Current.engines = 0


def sealed():
    """Wait for the checksum of the last copy, without which the next copy is left out."""
    if Background.current is not None:
        Background.current.wait_for_seals()
    dist.barrier()


def trained(root: Path, count: int, p: int = 2, **more):
    """Return an engine that has trained from an empty folder, its losses, and the digest of each copy by step."""
    restarted()
    engine = engine_of(p, zero=zero(**more))
    assert engine.load_checkpoint(str(root / "disk")) == (None, None)
    losses, copied = [], {}
    for _ in range(count):
        losses += steps(engine, 1)
        sealed()
        if engine.global_steps % EVERY == 0:
            copied[engine.global_steps] = digest(engine)
    return engine, losses, copied


def resumed(root: Path, p: int = 2, **more):
    restarted()
    engine = engine_of(p, seed=random.randrange(1000), zero=zero(**more))
    path, client_state = engine.load_checkpoint(str(root / "disk"))
    return engine, path, client_state


def remove(root: Path, pattern: str):
    dist.barrier()
    if dist.get_rank() == 0:
        found = list(root.glob(pattern))
        assert found, f"{pattern} in {[str(path) for path in root.rglob('*')]}"
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    dist.barrier()


ASKED = CheckpointRequest(memory_every=EVERY)


def arguments(root: Path) -> SimpleNamespace:
    """Return what the package reads of ``TrainingArguments``."""
    return SimpleNamespace(output_dir=str(root / "out"), should_save=dist.get_rank() == 0)


def resolved(root: Path, wanted=True, asked=ASKED):
    found = hf_trainer._resolve(arguments(root), asked, wanted)
    return found if found is True else os.path.relpath(found, root / "out")


def trainer_state(step: int) -> bytes:
    return json.dumps({"global_step": step}).encode()
