"""AutoTP: DeepSpeed cuts layers over neighbours, so that the ranks that share a shard of a layer are a stride apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from autotp_engines import Blocks, autotp, tensor_parallel
from cases import slow
from deepspeed.utils import groups
from helpers import (
    assert_close,
    assert_losses_close,
    batch,
    build,
    ds_config,
    environment,
    full_params,
    replicas_agree,
    train,
)

from mics_ds.errors import MicsConfigError


def engine_of(p: Any, size: int = 2, *, inside_init: bool = False, **config: Any) -> Any:
    engine = build(
        ds_config(p, tensor_parallel=tensor_parallel(size), **config),
        Blocks,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        inside_init=inside_init,
    )
    assert groups.get_tensor_model_parallel_world_size() == size
    shapes = {name: getattr(param, "ds_shape", param.shape) for name, param in engine.module.named_parameters()}
    assert shapes["up.0.weight"] == (28 // size, 12), "it was cut"
    assert shapes["down.1.weight"] == (12, 28 // size), "it was cut"
    return engine


def alone(steps: int, micro_steps: int, replicas: int, clip: float) -> list[float]:
    """Plain PyTorch on all data, in one process."""
    torch.manual_seed(1234)
    model = Blocks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        parts = [model(*batch(step, micro, rank)) for micro in range(micro_steps) for rank in range(replicas)]
        loss = torch.stack(parts).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def compare(size: int, sizes: list[int], steps: int = 5, clip: float = 0.5, **config: Any) -> Any:
    """Each partition size beside stock ZeRO-3 with AutoTP, and that beside plain PyTorch. Returns the last groups."""
    replica, replicas = dist.get_rank() // size, dist.get_world_size() // size
    stock = engine_of(None, size, micro_steps=2, clip=clip, **config)
    initial = full_params(stock)
    expected, trained = train(stock, steps, rank=replica), full_params(stock)
    norm = float(stock.get_global_grad_norm())
    assert_losses_close(expected, alone(steps, 2, replicas, clip), 1e-5)
    for p in sizes:
        engine = engine_of(p, size, micro_steps=2, clip=clip, **config)
        mics = engine.optimizer.mics_groups
        assert mics.full.ranks == tuple(range(dist.get_rank() % size, dist.get_world_size(), size))
        assert mics.partition.size == p
        assert all(param.ds_process_group.size() == p for param in engine.module.parameters())
        assert_losses_close(train(engine, steps, rank=replica), expected, 1e-6)
        assert_close(full_params(engine), trained, 1e-6, initial)
        assert abs(float(engine.get_global_grad_norm()) - norm) <= 1e-6 * norm
        replicas_agree(engine)
    return mics


@pytest.mark.ranks(4)
@pytest.mark.parametrize("inside_init", [slow(False), True])
def test_losses_and_parameters_equal_zero3_under_autotp(inside_init):
    """zero.Init partitions over all ranks, because nobody has cut anything yet."""
    with autotp():
        compare(2, [1, 2], inside_init=inside_init)


@pytest.mark.slow
@pytest.mark.ranks(8)
@pytest.mark.parametrize("size", [2, 4])
def test_partition_groups_and_nodes_under_autotp(size):
    """Two nodes of four ranks, on each of which 4 / size ranks share the shards of a layer."""
    with autotp(), environment(MICS_DS_RANKS_PER_NODE="4"):
        sizes = [1, 2, 4] if size == 2 else [1, 2]
        mics = compare(size, sizes)
    assert tuple(mics.node_of[rank] for rank in mics.full.ranks) == tuple(rank // 4 for rank in mics.full.ranks)
    assert (mics.hierarchy is not None) == (size == 2), "two ranks of each node in a partition group"


@pytest.mark.ranks(4)
def test_a_size_that_does_not_divide_what_autotp_leaves():
    with autotp(), pytest.raises(MicsConfigError, match=r"number of data-parallel ranks, which is 2\. Choose one of 1"):
        engine_of(4)


@pytest.mark.slow
@pytest.mark.ranks(4)
def test_a_planned_size_under_autotp():
    with autotp():
        engine = engine_of("planned", zero={"mics_plan": {"memory_gb": 1}})
        assert engine.optimizer.mics_groups.full.size == 2
        assert engine.optimizer.mics_groups.partition.size in (1, 2)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("inside_init", [False, slow(True)])
def test_checkpoints_under_autotp(tmp_path, inside_init):
    replica, gather = dist.get_rank() // 2, {"stage3_gather_16bit_weights_on_model_save": True}
    with autotp():
        engine = engine_of(1, inside_init=inside_init, zero=gather)
        train(engine, 2, rank=replica)
        engine.save_checkpoint(tmp_path)
        engine.save_16bit_model(tmp_path, "whole.pt")
        saved = full_params(engine)
        following = train(engine, 2, rank=replica)

        again = engine_of(1, inside_init=inside_init)
        again.load_checkpoint(tmp_path)
        assert_close(full_params(again), saved, 0)
        assert train(again, 2, rank=replica) == following

        other = engine_of(2, zero={"mics_reshape_checkpoint": True})
        other.load_checkpoint(tmp_path)
        assert_close(full_params(other), saved, 0)
        assert_losses_close(train(other, 2, rank=replica), following, 1e-6)
    if dist.get_rank() == 0:
        whole = torch.load(Path(tmp_path, "whole.pt"), weights_only=True)
        assert whole["up.0.weight"].shape == (28, 12), "joined from both"
        assert torch.equal(whole["up.0.weight"][:14], saved["up.0.weight"])
        assert torch.equal(whole["norms.0.weight"], saved["norms.0.weight"])
