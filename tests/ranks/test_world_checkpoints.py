"""Checkpoints of world-sharded optimizer states are those of p shards, for every reader and both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import every
from checkpoint_engines import RESHAPE, digest, engine_of
from helpers import assert_losses_close, train

from mics_ds.checkpoint import manifest
from mics_ds.deepspeed_compat.checkpoint import load_states

WORLD = {"mics_optimizer_states": "world"}
PARTITION = {"mics_optimizer_states": "partition"}
SETTINGS: list[dict[str, Any]] = [{}, {"sub_group_size": 60}, {"offload_optimizer": {"device": "cpu"}}]


def states(folder: Path, tag: str) -> dict[str, Any]:
    """Everything in the files of optimizer states, by file and place."""
    found: dict[str, Any] = {}

    def walk(where: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{where}/{key}", item)
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                walk(f"{where}/{index}", item)
        else:
            found[where] = value

    for path in sorted((folder / tag).glob("*_optim_states.pt")):
        walk(path.name, load_states(path))
    return found


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Padding may hold NaNs, which are equal to nothing."""
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("dtype", "p", "zero"),
    every(
        ("fp32", "bf16"),
        (1, 2),
        SETTINGS,
        default=[("fp32", 1, SETTINGS[0]), ("bf16", 2, SETTINGS[1]), ("fp32", 2, SETTINGS[2])],
    ),
)
def test_files_come_through_it_bit_for_bit(tmp_path, p, dtype, zero):
    """What was saved without it, loaded and saved with it, is the same, padding included."""
    engine = engine_of(p, dtype=dtype, zero={**zero, **PARTITION})
    train(engine, 2)
    engine.save_checkpoint(str(tmp_path), tag="before")
    world = engine_of(p, dtype=dtype, zero={**zero, **WORLD}, seed=7)
    assert world.optimizer.world_states is not None
    world.load_checkpoint(str(tmp_path), tag="before")
    world.save_checkpoint(str(tmp_path), tag="after")
    before, after = states(tmp_path, "before"), states(tmp_path, "after")
    assert before.keys() == after.keys()
    tensors = 0
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            tensors += 1
            assert value.dtype == after[name].dtype, name
            assert torch.equal(as_bytes(value), as_bytes(after[name])), name
    assert tensors >= 3 * p
    assert manifest.read(tmp_path / "after").shards == p


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("dtype", "p"), every(("fp32", "bf16", "fp16"), (1, 2), default=[("fp32", 1), ("bf16", 2), ("fp16", 1)])
)
def test_resuming_in_the_same_layout_is_exact(tmp_path, p, dtype):
    engine = engine_of(p, dtype=dtype, zero=WORLD)
    train(engine, 2)
    engine.save_checkpoint(str(tmp_path))
    expected = train(engine, 2), digest(engine)
    resumed = engine_of(p, dtype=dtype, zero=WORLD, seed=9)
    resumed.load_checkpoint(str(tmp_path))
    assert (train(resumed, 2), digest(resumed)) == expected


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("old", "new"),
    [((2, WORLD), (2, PARTITION)), ((1, PARTITION), (2, WORLD)), ((None, {}), (1, WORLD)), ((2, WORLD), (4, {}))],
    ids=str,
)
def test_resuming_in_another_mode_or_number_of_shards(tmp_path, old, new):
    engine = engine_of(old[0], zero=old[1])
    train(engine, 2)
    engine.save_checkpoint(str(tmp_path))
    expected = train(engine, 2)
    resumed = engine_of(new[0], zero={**new[1], **RESHAPE}, seed=9)
    resumed.load_checkpoint(str(tmp_path))
    assert_losses_close(train(resumed, 2), expected, 1e-6)


@pytest.mark.ranks(4)
def test_weights_only_give_masters_their_slices(tmp_path):
    """Stock makes masters from the 16-bit weights then, and so does this."""
    engine = engine_of(2, dtype="bf16", zero=PARTITION)
    train(engine, 3)
    engine.save_checkpoint(str(tmp_path))
    losses = []
    for zero in (PARTITION, WORLD):
        resumed = engine_of(2, dtype="bf16", zero=zero, seed=9)
        resumed.load_checkpoint(str(tmp_path), load_optimizer_states=False, load_lr_scheduler_states=False)
        losses.append(train(resumed, 3))
    assert_losses_close(losses[1], losses[0], 2e-2)


@pytest.mark.ranks(4)
def test_folders_of_each_node_get_a_writer_each(tmp_path):
    from helpers import environment

    node = dist.get_rank() // 2
    local = {"checkpoint": {"use_node_local_storage": True}}
    with environment(MICS_DS_RANKS_PER_NODE="2"):
        folder = str(tmp_path / f"node{node}")
        engine = engine_of(2, zero=WORLD, **local)
        train(engine, 2)
        engine.save_checkpoint(folder)
        expected = train(engine, 2), digest(engine)
        resumed = engine_of(2, zero=WORLD, seed=9, **local)
        resumed.load_checkpoint(folder)
        assert (train(resumed, 2), digest(resumed)) == expected
        assert len(list(Path(folder, "global_step2").glob("*_optim_states.pt"))) == 2
