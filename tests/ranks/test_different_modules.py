"""Replicas that use different modules in one step, as text-only batches in multimodal training do.

Inside a partition group ranks use the same ones, as in ZeRO-3, where all ranks have to. There, a rank that has nothing
for a module sends zeros through it; that is the oracle.
"""

from __future__ import annotations

import dataclasses
import random
import re

import pytest
import torch
import torch.distributed as dist
from cases import every
from helpers import (
    WIDTH,
    assert_close,
    assert_losses_close,
    batch,
    build,
    ds_config,
    environment,
    full_params,
    same_on_all_ranks,
)
from local_ranks import RankError
from torch import nn
from torch.utils.checkpoint import checkpoint

from mics_ds.check.meter import CommMeter
from mics_ds.comm import sizes
from mics_ds.comm.collectives import HOP2
from mics_ds.deepspeed_compat import same_order
from mics_ds.errors import MicsUsageError

BRANCHES = 4


class Branches(nn.Module):
    """Every branch gets the same input, so the order in which they run changes nothing but the order of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.branches = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BRANCHES))
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, y: torch.Tensor, weights: dict[int, float]) -> torch.Tensor:
        """``weights``: of the branches to run, in the order to run them in."""
        x = torch.tanh(self.first(x))
        outputs = {index: self.branches[index](x) * weight for index, weight in weights.items()}
        for index in sorted(outputs):
            x = x + outputs[index]
        return (self.last(x) - y).pow(2).mean()


def used_by(seed: int, step: int, micro_step: int, replica: int) -> list[int]:
    """The branches of one replica in one micro-step, in some order. In each step there is one that nobody uses."""
    nobody = random.Random(f"{seed} {step}").randrange(BRANCHES)
    draws = random.Random(f"{seed} {step} {micro_step} {replica}")
    used = [index for index in range(BRANCHES) if index != nobody and draws.random() < 0.5]
    draws.shuffle(used)
    return used


def train(engine, p: int, seed: int, steps: int) -> list[float]:
    stock = not hasattr(engine.optimizer, "mics_groups")
    rank, losses = dist.get_rank(), []
    for step in range(steps):
        for micro_step in range(engine.gradient_accumulation_steps()):
            used = [used_by(seed, step, micro_step, replica) for replica in range(4 // p)]
            mine = used[rank // p]
            some = sorted({index for branches in used for index in branches})
            weights = {index: float(index in mine) for index in some} if stock else dict.fromkeys(mine, 1.0)
            loss = engine(*batch(step, micro_step, rank), weights)
            engine.backward(loss)
            engine.step()
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses.append(total.item() / 4)
    return losses


FAST = {(1, 3, False), (2, 1, True)}
CASES = every((1, 2), (1, 3), (True, False), range(5), default=[(*case, 0) for case in FAST])


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("p", "micro_steps", "overlap", "seed"), CASES)
def test_any_pattern_equals_zero3(p, micro_steps, overlap, seed):
    zero = {"overlap_comm": overlap, "reduce_bucket_size": 60}
    results = []
    for size in (None, p):
        engine = build(ds_config(size, micro_steps=micro_steps, clip=0.5, zero=zero), Branches)
        initial = full_params(engine)
        results.append((train(engine, p, seed, steps=5), full_params(engine)))
        same_on_all_ranks(results[-1][1])
    (expected_losses, expected), (losses, params) = results
    assert_losses_close(losses, expected_losses, 1e-6)
    assert_close(params, expected, 1e-6, initial)


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("micro_steps", "clip", "zero"),
    [
        # Offloaded, stock forgets what came in earlier micro-steps only, and clips an old gradient once more.
        (1, 0.0, {"offload_optimizer": {"device": "cpu"}}),
        (2, 0.5, {"reduce_scatter": False}),
    ],
)
def test_offloaded_and_reduced_by_deepspeed(micro_steps, clip, zero):
    results = []
    for size in (None, 2):
        config = ds_config(size, micro_steps=micro_steps, clip=clip, zero={**zero, "reduce_bucket_size": 60})
        engine = build(config, Branches)
        initial = full_params(engine)
        results.append((train(engine, 2, 0, steps=4), full_params(engine)))
    assert_losses_close(results[1][0], results[0][0], 1e-6)
    assert_close(results[1][1], results[0][1], 1e-6, initial)


@pytest.mark.ranks(4)
def test_hop2_is_the_same_whoever_uses_what(monkeypatch):
    """As many collectives over as many bytes as if all used all, beside the backward pass where they do."""
    monkeypatch.setattr(sizes, "ON_CPUS", dataclasses.replace(sizes.ON_CPUS, unit=400))
    engine = build(ds_config(2, zero={"reduce_bucket_size": 60}), Branches)
    everything = dict.fromkeys(range(BRANCHES), 1.0)
    counts = []
    for step in range(6):
        mine = everything if step < 4 or dist.get_rank() < 2 else {1: 1.0}
        with CommMeter() as meter:
            engine.backward(engine(*batch(step, 0, dist.get_rank()), mine))
            engine.step()
        hop2 = meter.select(label=HOP2)
        assert sum(item.payload for item in hop2) == engine.optimizer.gradient_shards.nbytes
        counts.append(len(hop2))
    assert counts[0] > 1
    assert counts == [counts[0]] * 6


@pytest.mark.ranks(4)
def test_sanity_checks_compare_inside_a_partition_group():
    """DeepSpeed's own comparison of buckets is over the world, where replicas may differ."""
    engine = build(ds_config(2, micro_steps=2, zero={"enable_sanity_checks": True, "reduce_bucket_size": 60}), Branches)
    train(engine, 2, seed=0, steps=3)
    same_on_all_ranks(full_params(engine))
    mine = [0, 1] if dist.get_rank() % 2 else [1, 0]
    with pytest.raises(MicsUsageError, match=r"\[[02], [13]\].*rank [02] reduces the gradients.*leaf module"):
        engine.optimizer.parameter_offload.same_order.require_bucket(mine)


# ------------------------------------------------------------ inside a partition group


class WithTower(nn.Module):
    """A text model with a vision tower, which only batches with images go through. The tower is much larger, so that
    gloo would abort the process in a gather of the one with the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.tower = nn.Sequential(nn.Linear(WIDTH, 200), nn.Tanh(), nn.Linear(200, WIDTH))
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor, y: torch.Tensor, images: bool) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        if images:
            x = x + self.tower(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return (x - y).pow(2).mean()


def tower_step(engine, step: int, images: bool) -> float:
    loss = engine(*batch(step, 0, dist.get_rank()), images)
    engine.backward(loss)
    engine.step()
    return loss.item()


@pytest.mark.ranks(4)
@pytest.mark.parametrize("ranks_per_node", [4, 1])
def test_a_tower_that_one_rank_of_a_group_runs_in_the_first_pass(ranks_per_node):
    """Hugging Face's multimodal models, batch by batch (DeepSpeed #7170). The other group goes on."""
    with environment(MICS_DS_RANKS_PER_NODE=str(ranks_per_node)):
        engine = build(ds_config(2), WithTower)
    inputs = batch(0, 0, dist.get_rank())
    if dist.get_rank() < 2:
        with pytest.raises(MicsUsageError) as caught:
            engine(*inputs, dist.get_rank() == 0)
        said = str(caught.value)
        assert "rank 0 gathers parameters of Linear 'tower.0'" in said
        assert "rank 1 gathers parameters of Linear 'blocks.0'" in said
        assert "set_z3_leaf_modules" in said
    else:
        engine(*inputs, False)


@pytest.mark.ranks(4)
def test_ranks_of_a_group_that_leave_the_recorded_order_together_train_as_in_stock():
    results = []
    for p in (None, 2, 1):
        engine = build(ds_config(p), WithTower)
        losses = [tower_step(engine, step, images=step in (0, 1, 4, 5, 8)) for step in range(9)]
        results.append((losses, full_params(engine)))
    for losses, params in results[1:]:
        assert_losses_close(losses, results[0][0], 1e-6)
        assert_close(params, results[0][1], 1e-6)


@pytest.mark.ranks(4)
def test_ranks_of_a_group_that_leave_the_recorded_order_for_different_modules_are_told():
    engine = build(ds_config(2), Branches)
    rank = dist.get_rank()
    for step in range(3):
        loss = engine(*batch(step, 0, rank), {0: 1.0, 1: 1.0})
        engine.backward(loss)
        engine.step()
    with pytest.raises(MicsUsageError, match=r"other ranks of its group run another module"):
        engine(*batch(3, 0, rank), {2 + rank % 2: 1.0, 1: 1.0})


def leave_the_recorded_order_alone() -> None:
    same_order.PATIENCE_S = 2.0
    engine = build(ds_config(2), WithTower)
    for step in range(3):
        tower_step(engine, step, images=False)
    tower_step(engine, 3, images=dist.get_rank() == 0)


@pytest.mark.slow
def test_a_rank_that_leaves_the_recorded_order_alone_says_so(pools):
    """Its peer is in a gather meanwhile, which ends when the launcher ends the job."""
    with pytest.raises(RankError) as caught:
        pools.run(4, __name__, leave_the_recorded_order_alone.__name__, {}, timeout=60, fresh=True)
    assert re.search(
        r"MicsUsageError: Ranks \[0, 1\].*rank 0 runs Sequential 'tower', which is not next.*have not left that order",
        str(caught.value),
    )


class SharedBetweenCheckpoints(nn.Module):
    """One weight in two reentrant checkpoints, each of which has a backward pass of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.layers[2].weight = self.layers[0].weight

    def forward(self, x: torch.Tensor, y: torch.Tensor, order: tuple[int, ...] = (0, 1, 2)) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        for index in order:
            x = x + checkpoint(self.layers[index], x, use_reentrant=True)
        return (x - y).pow(2).mean()


@pytest.mark.ranks(4)
def test_a_gradient_that_stock_loses_is_lost_here_too_where_replicas_do_the_same():
    """Each gradient in a bucket of its own: the second one of the shared weight is written over the first."""
    results = []
    for size in (None, 2):
        engine = build(ds_config(size, zero={"reduce_bucket_size": 30}), SharedBetweenCheckpoints)
        losses = [loss_of(engine, step) for step in range(4)]
        results.append((losses, full_params(engine)))
    assert_losses_close(results[1][0], results[0][0], 1e-6)
    assert_close(results[1][1], results[0][1], 1e-6)


def loss_of(engine, step, order=(0, 1, 2)):
    loss = engine(*batch(step, 0, dist.get_rank()), order)
    engine.backward(loss)
    engine.step()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("bucket", "orders"),
    [
        (10_000, [(0, 1, 2), (0, 1, 2)]),  # both gradients in one bucket, where stock stops with an assertion
        (10_000, [(0, 1, 2), (0, 1)]),
    ],
)
def test_all_ranks_refuse_what_stock_stops_for(bucket, orders):
    engine = build(ds_config(2, zero={"reduce_bucket_size": bucket}), SharedBetweenCheckpoints)
    before = full_params(engine)
    with pytest.raises(MicsUsageError, match=r"one gradient per parameter.*use_reentrant=False"):
        loss_of(engine, 0, orders[dist.get_rank() // 2])
    after = full_params(engine)
    assert all(torch.equal(after[name], before[name]) for name in before), "no step was taken"
