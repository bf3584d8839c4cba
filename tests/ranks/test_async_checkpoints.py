"""Checkpoints written in the background: the same files, of the moment when they were asked for."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist
from cases import every, slow
from checkpoint_engines import (
    ASYNC,
    adamw,
    collectives,
    digest,
    engine_of,
    everything_is_shared,
    records,
    steps,
    writer,
)
from helpers import build, ds_config, train
from torch import nn

from mics_ds.checkpoint import background, manifest
from mics_ds.checkpoint.background import wait_for_saves
from mics_ds.shared_memory import SharedMemory

WORLD = {"mics_optimizer_states": "world"}


class Even(nn.Module):
    """Shards of it have no padding, whatever the number of ranks."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(7, 64, bias=False), nn.Linear(64, 7, bias=False)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x, y):
        self.seen += 1
        return (self.outer(self.inner(x).relu()) - y).pow(2).mean()


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("p", "zero"),
    every(
        (1, 2, 4),
        ({}, WORLD, {"sub_group_size": 200}),
        default=[(1, WORLD), (2, {}), (2, WORLD), (4, {"sub_group_size": 200})],
    ),
)
def test_files_are_those_of_a_save_that_training_waits_for(tmp_path, p, zero):
    everything_is_shared()
    engine = build(ds_config(p, zero={**ASYNC, **zero}), Even, optimizer=adamw)
    train(engine, 2)
    engine.save_checkpoint(str(tmp_path), tag="waited", async_save=False)
    engine.save_checkpoint(str(tmp_path), tag="background")
    wait_for_saves()
    dist.barrier()
    assert records(tmp_path, "waited") == records(tmp_path, "background")
    for tag in ("waited", "background"):
        read = manifest.read(tmp_path / tag)
        assert not manifest.damages(tmp_path / tag, read.files, read.files)
    assert (tmp_path / "latest").read_text() == "background"


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("p", "dtype", "zero"),
    [(2, "fp32", {}), (2, "bf16", WORLD), slow(1, "bf16", WORLD)],
    ids=str,
)
def test_training_goes_on_and_the_checkpoint_is_of_the_moment(tmp_path, p, dtype, zero):
    everything_is_shared()
    undisturbed = steps(engine_of(p, dtype=dtype, zero=zero), 6)
    engine = engine_of(p, dtype=dtype, zero={**ASYNC, **zero})
    losses = steps(engine, 1)
    engine.save_checkpoint(str(tmp_path), tag="first")  # starts the processes
    wait_for_saves()
    os.kill(writer(), signal.SIGSTOP)
    try:
        engine.save_checkpoint(str(tmp_path), tag="second", client_state={"rank": dist.get_rank()})
        saved = digest(engine)
        losses += steps(engine, 2)
        assert not (tmp_path / "second").exists()
    finally:
        os.kill(writer(), signal.SIGCONT)
    losses += steps(engine, 3)
    assert losses == undisturbed
    other = engine_of(p, dtype=dtype, zero=zero, seed=5)
    _, client_state = other.load_checkpoint(str(tmp_path))
    assert digest(other) == saved
    assert client_state["rank"] == dist.get_rank()
    assert (tmp_path / "latest").read_text() == "second"


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("states", ["partition", "world"])
def test_each_replica_copies_its_part(tmp_path, p, states):
    """Masters and two moments of AdamW, 12 bytes a parameter, over all ranks; the rest is the owner's. Training takes
    host memory for what is copied alone."""
    everything_is_shared()
    engine = build(ds_config(p, zero={**ASYNC, "mics_optimizer_states": states}), Even, optimizer=adamw)
    train(engine, 1)
    copied = []
    copy_in = SharedMemory.copy_in

    def counting(self, parts, streams):
        copied.extend(part.nbytes for _, part in parts)
        return copy_in(self, parts, streams)

    jobs = []
    submit = background.Background.submit

    def seen(self, job, *args):
        jobs.append(job)
        submit(self, job, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SharedMemory, "copy_in", counting)
        patched.setattr(background.Background, "submit", seen)
        engine.save_checkpoint(str(tmp_path))
    parameters, n = 2 * 7 * 64, 4
    [job] = jobs
    place = dist.get_rank() // p
    pieces = sum(share.piece_bytes for share in job.staged.shares if share.replicas > 1)
    assert pieces == (12 * parameters // n if p < 4 or states == "world" else 0)
    owner = engine.optimizer.mics_groups.partition.rank % (n // p) == place
    assert (sum(copied) > pieces) == owner  # counters and buffers, and what is pickled
    pickled = sum(file.pickled[1] for file in job.staged.files)
    assert job.staged.nbytes <= 12 * parameters // n + pickled + 1500, "buffers and alignment"
    wait_for_saves()


@pytest.mark.ranks(4)
@pytest.mark.parametrize("zero", [ASYNC, {**ASYNC, **WORLD}], ids=["partition", "world"])
def test_training_exchanges_one_short_message(tmp_path, zero):
    """After the copy: 32 bytes. The rest is for the processes that write."""
    engine = engine_of(2, zero=zero)
    train(engine, 1)
    engine.save_checkpoint(str(tmp_path), tag="first")  # starts the processes
    wait_for_saves()
    with collectives() as called:
        engine.save_checkpoint(str(tmp_path), tag="second")
    assert called == [("all_reduce", 32)]
    wait_for_saves()
    dist.barrier()
