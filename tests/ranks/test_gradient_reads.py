"""Gradients that scripts read between backward() and step(): to log them, to clip them, to look for NaN.

Each way gives the mean over all ranks, as in stock ZeRO-3, or one clear error. Gradients are small integers, so
comparisons are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from cases import each_layout, every
from deepspeed.utils import safe_get_full_grad, safe_get_local_grad
from helpers import OddNet, batch, build, ds_config, full_params
from torch import nn

from mics_ds.errors import MicsUsageError

WIDTH = 512
PASSES = (2.5, 5.0, 7.5)
"""Mean over 4 ranks of rank + 1, after one, two and three backward passes without a step."""


class Product(nn.Module):
    """One weight, whose gradient is the input in every row."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).sum()


def engine_of(p: int | None, states: str = "partition", **settings: Any) -> Any:
    zero = settings.pop("zero", {})
    zero = {**zero, "mics_optimizer_states": states} if p else zero
    config = ds_config(p, zero={"reduce_bucket_size": 5_000_000, **zero}, **settings)
    return build(config, Product, optimizer=lambda items: torch.optim.SGD(items, lr=0.0))


def backward(engine: Any) -> None:
    engine.backward(engine(torch.full((1, WIDTH), float(dist.get_rank() + 1))))


def begin_anew(engine: Any) -> None:
    """Take the step, and one of a single pass: the number of passes before a step tells when hop 2 runs in the next."""
    engine.step()
    backward(engine)
    engine.step()


def own_part(p: int, states: str) -> int:
    """Elements of a final gradient on this rank. 512 x 512 divides by everything here."""
    return WIDTH * WIDTH // (dist.get_world_size() if states == "world" else p)


def averaged_gradients(engine: Any) -> torch.Tensor:
    return engine.optimizer.averaged_gradients[0][0]


def fp32_grad_partitions(engine: Any) -> torch.Tensor:
    return engine.optimizer.get_fp32_grad_partitions()[0][0]


def flat_buffer(engine: Any) -> torch.Tensor:
    return engine.optimizer.grad_partitions_flat_buffer


def local_grad(engine: Any) -> torch.Tensor:
    return safe_get_local_grad(engine.module.linear.weight)


def after_allreduce_gradients(engine: Any) -> torch.Tensor:
    engine.allreduce_gradients()
    return averaged_gradients(engine)


BY_ONE_RANK: dict[str, Callable[[Any], torch.Tensor]] = {
    "averaged_gradients": averaged_gradients,
    "grad_partitions_flat_buffer": flat_buffer,
    "get_fp32_grad_partitions": fp32_grad_partitions,
    "safe_get_local_grad": local_grad,
}


@pytest.mark.ranks(4)
@each_layout
def test_every_way_gives_the_mean_over_all_ranks_after_each_backward_pass(p, states):
    stock, engine = engine_of(None), engine_of(p, states)
    for way, read in {**BY_ONE_RANK, "allreduce_gradients": after_allreduce_gradients}.items():
        for expected in PASSES:
            backward(stock)
            assert torch.equal(read(stock), torch.full_like(read(stock), expected)), way
            backward(engine)
            if way == "grad_partitions_flat_buffer" and states == "world" and p < 4:
                with pytest.raises(MicsUsageError, match="averaged_gradients"):
                    read(engine)
                continue
            shard = read(engine)
            assert shard.numel() == own_part(p, states), way
            assert torch.equal(shard.float(), torch.full_like(shard.float(), expected)), way
            assert torch.equal(safe_get_full_grad(engine.module.linear.weight), torch.full((WIDTH, WIDTH), expected))
        begin_anew(stock)
        begin_anew(engine)


@pytest.mark.ranks(4)
@each_layout
def test_one_rank_alone_reads_the_mean_and_holds_nobody_up(p, states):
    engine = engine_of(p, states)
    for way, read in BY_ONE_RANK.items():
        if way == "grad_partitions_flat_buffer" and states == "world":
            continue
        for reader in (0, 3):
            for expected in PASSES:
                backward(engine)
                if dist.get_rank() == reader:
                    shard = read(engine)
                    assert torch.equal(shard.float(), torch.full_like(shard.float(), expected)), (way, reader)
            begin_anew(engine)


@pytest.mark.ranks(4)
@each_layout
def test_a_tensor_of_gradients_that_is_kept_follows_each_backward_pass(p, states):
    """As in stock, which adds to the same memory: custom clipping fetches its tensors once."""
    engine = engine_of(p, states)
    backward(engine)
    kept = averaged_gradients(engine)
    assert torch.equal(kept, torch.full_like(kept, PASSES[0]))
    for expected in PASSES[1:]:
        backward(engine)
        assert torch.equal(kept, torch.full_like(kept, expected))


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("p", "states"), every((1, 2), ("partition", "world"), default=[(1, "world"), (2, "partition")])
)
def test_before_the_boundary_there_is_an_error_and_then_the_mean(p, states):
    engine = engine_of(p, states, micro_steps=2)
    for way, read in BY_ONE_RANK.items():
        for _ in range(2):
            backward(engine)
            with pytest.raises(MicsUsageError, match=r"safe_get_full_grad on all ranks|averaged_gradients"):
                read(engine)
            engine.step()
            backward(engine)
            if way != "grad_partitions_flat_buffer" or states == "partition":
                shard = read(engine)
                assert torch.equal(shard.float(), torch.full_like(shard.float(), PASSES[0])), way
            engine.step()


@pytest.mark.ranks(4)
@each_layout
def test_offloaded_gradients_are_means_too(p, states):
    engine = engine_of(p, states, zero={"offload_optimizer": {"device": "cpu"}})
    for way in ("averaged_gradients", "get_fp32_grad_partitions", "safe_get_local_grad"):
        for expected in PASSES:
            backward(engine)
            if way == "averaged_gradients":  # stock keeps none with offload
                assert engine.optimizer.averaged_gradients == {}
                held = engine.optimizer.fp32_partitioned_groups_flat[0].grad
            else:
                held = BY_ONE_RANK[way](engine)
            assert torch.equal(held, torch.full_like(held, expected)), way
        begin_anew(engine)


@pytest.mark.ranks(4)
@each_layout
def test_gradients_that_a_script_changes_in_place_are_those_of_the_step(p, states):
    """Custom clipping: every rank halves what it holds, and the step sees that."""
    results = []
    for engine in (engine_of(None), engine_of(p, states)):
        for group in engine.optimizer.optimizer.param_groups:
            group["lr"] = 1.0
        with deepspeed.zero.GatheredParameters(engine.module.linear.weight):
            before = engine.module.linear.weight.detach().clone()
        backward(engine)
        for tensors in engine.optimizer.averaged_gradients.values():
            for tensor in tensors:
                tensor.mul_(0.5)
        engine.step()
        with deepspeed.zero.GatheredParameters(engine.module.linear.weight):
            results.append(before - engine.module.linear.weight.detach())
        assert engine.get_global_grad_norm() == pytest.approx(1.25 * WIDTH)
    assert torch.allclose(results[0], torch.full_like(results[0], 1.25), atol=1e-6)
    assert torch.equal(results[0], results[1])


@pytest.mark.ranks(4)
@each_layout
def test_losses_are_those_of_a_script_that_does_not_read(p, states):
    results = []
    for reads in (False, True):
        engine = build(ds_config(p, micro_steps=2, clip=0.5, zero={"mics_optimizer_states": states}), OddNet)
        for step in range(3):
            for micro_step in range(2):
                engine.backward(engine(*batch(step, micro_step, dist.get_rank())))
                if reads and micro_step == 1:
                    for tensors in engine.optimizer.averaged_gradients.values():
                        assert all(tensor.isfinite().all() for tensor in tensors)
                engine.step()
        results.append(full_params(engine))
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name
