"""Engines whose checkpoints are saved, loaded and compared, and ways to look at a save."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import OddNet, build, ds_config, full_params, patched, train
from torch import nn

from mics_ds.checkpoint import background, manifest, staging
from mics_ds.deepspeed_compat.states import WEIGHTS, states_of

RESHAPE = {"mics_reshape_checkpoint": True}


def adamw(params):
    """Two parameter groups, with settings of their own."""
    half = len(params) // 2
    return torch.optim.AdamW(
        [{"params": params[:half]}, {"params": params[half:], "lr": 0.003, "weight_decay": 0.1}], lr=0.01
    )


class WithBuffer(OddNet):
    """A model with a buffer that training changes and that has to come back as well."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x, y):
        self.seen += 1
        return super().forward(x, y)


def engine_of(p, *, seed=1234, optimizer=adamw, zero=None, **extra):
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 12}}
    config = ds_config(p, clip=0.5, zero=zero, scheduler=scheduler, **extra)
    return build(config, WithBuffer, seed=seed, optimizer=optimizer)


class AsMics:
    """Stock ZeRO-3's optimizer, with what an optimizer of MiCS has besides."""

    mics_groups = SimpleNamespace(replication=None)
    world_states = None
    sync = SimpleNamespace(residuals=dict)

    def __init__(self, optimizer) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


def digest(engine) -> dict[str, str]:
    """Return everything a checkpoint has to bring back, as hashes and numbers."""
    optimizer = engine.optimizer
    items = {f"param {name}": value for name, value in full_params(engine).items()}
    items |= {f"buffer {name}": value for name, value in engine.module.named_buffers()}
    for state in states_of(optimizer if hasattr(optimizer, "mics_groups") else AsMics(optimizer)):
        if state.name != WEIGHTS:
            # DeepSpeed leaves whatever the memory held in the padding of a shard, and never uses it.
            parts = [state.tensor[piece.start : piece.stop] for piece in state.pieces]
            items[f"{state.name} {state.group}"] = torch.cat(parts) if parts else state.tensor[:0]
    found = {
        name: hashlib.sha256(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, value in items.items()
        if value.numel()
    }
    found["loss scale"] = str(optimizer.loss_scale)
    found["counters"] = f"{engine.global_steps} {engine.skipped_steps} {engine.global_samples}"
    found["scheduler"] = json.dumps(engine.lr_scheduler.state_dict()) if engine.lr_scheduler else ""
    return found


def reshape(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mics_ds", "reshape", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


ASYNC = {"mics_checkpoint": {"async": True}}


def writer() -> int:
    """Return the process id of this rank's writer."""
    assert background.Background.current is not None
    return background.Background.current._process.pid


def everything_is_shared():
    """Hand tensors of any size to the writer through shared memory, until the test ends."""
    patched.setattr(staging, "SHARED_FROM", 64)


COLLECTIVES = [
    *("all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "all_to_all_single"),
    *("barrier", "monitored_barrier", "broadcast", "broadcast_object_list"),
    *("reduce_scatter_tensor", "gather", "scatter"),
]


@contextmanager
def collectives() -> Iterator[list[tuple[str, int | None]]]:
    """Note the name of each collective that this rank takes part in, and the bytes of its first argument."""
    called = []
    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            original = getattr(dist, name)

            def counting(*args, name=name, original=original, **kwargs):
                called.append((name, args[0].nbytes if torch.is_tensor(args[0]) else None))
                return original(*args, **kwargs)

            patch.setattr(dist, name, counting)
        yield called


def records(folder: Path, tag: str):
    return {name: (record.bytes, record.crc32) for name, record in manifest.read(folder / tag).files.items()}


def steps(engine, count):
    """Return the losses of ``count`` steps on the data of step 0 each time, as after a resume."""
    return [loss for _ in range(count) for loss in train(engine, 1)]


class Wide(nn.Module):
    """60 000 parameters: 720 kB of weights and Adam states."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 7500)

    def forward(self, x, y):
        return (self.layer(x)[:, :7] - y).pow(2).mean()
