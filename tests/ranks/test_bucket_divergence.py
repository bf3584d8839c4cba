"""Replicas that fill their buckets differently, in patterns drawn at random: as stock ZeRO-3, whatever they do.

A pattern says for each micro-step which branches each replica runs, in which order, whether it calls the mixture of
experts at all, and which experts each rank uses in it. Stock ZeRO-3 cannot do the first two, because its ranks gather
together, so there a rank sends zeros through what others use. The mixture is a leaf module, as it has to be where ranks
that gather together use different experts of it.
"""

from __future__ import annotations

import os
import random
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from helpers import (
    WIDTH,
    assert_close,
    assert_losses_close,
    batch,
    build,
    ds_config,
    environment,
    full_params,
    replicas_agree,
    same_on_all_ranks,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

RANKS, STEPS = 4, 5
BRANCHES, EXPERTS = 4, 4
MIXTURE = BRANCHES
"""The number of the mixture among the parts that a replica runs or not."""

PATTERNS = int(os.environ.get("MICS_TEST_PATTERNS", "200"))
AT_A_TIME = 25
FEW = 2


class Experts(nn.Module):
    """A leaf module."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=index % 2 == 0) for index in range(EXPERTS))

    def forward(self, x: torch.Tensor, used: list[int]) -> torch.Tensor:
        y = 0.5 * x
        for index in used:
            y = y + torch.tanh(self.experts[index](x))
        return y


class Parts(nn.Module):
    """What a replica runs between the first and the last layer, each part on the same input."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.branches = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BRANCHES))
        if case["tied"]:
            self.branches[1].weight = self.branches[0].weight
        self.mixture = Experts()
        deepspeed.utils.set_z3_leaf_modules(self.mixture, [Experts])
        self.last = nn.Linear(WIDTH, WIDTH)
        self.checkpointing = case["checkpointing"]

    def part(self, index: int, x: torch.Tensor, experts: list[int]) -> torch.Tensor:
        return self.mixture(x, experts) if index == MIXTURE else self.branches[index](x)

    def forward(self, x: torch.Tensor, y: torch.Tensor, weights: dict[int, float], experts: list[int]) -> torch.Tensor:
        """``weights``: of the parts to run, in the order to run them in."""
        x, outputs = torch.tanh(self.first(x)), {}
        for index, weight in weights.items():
            if self.checkpointing:
                output = checkpoint(self.part, index, x, experts, use_reentrant=self.checkpointing == "reentrant")
            else:
                output = self.part(index, x, experts)
            outputs[index] = output * weight
        for index in sorted(outputs):
            x = x + outputs[index]
        return (self.last(x) - y).pow(2).mean()


def draw(seed: int) -> dict[str, Any]:
    """How to train in one pattern."""
    rng = random.Random(seed)
    zero: dict[str, Any] = {
        "overlap_comm": rng.random() < 0.7,
        "contiguous_gradients": rng.random() < 0.7,
        "reduce_bucket_size": rng.choice([30, 60, 130, 500, 10_000]),
        "sub_group_size": rng.choice([40, 1_000_000]),
        "stage3_prefetch_bucket_size": rng.choice([0, 70, 10_000]),
        "stage3_param_persistence_threshold": rng.choice([0, 10]),
        "stage3_max_live_parameters": rng.choice([1, 1_000_000]),
        "enable_sanity_checks": rng.random() < 0.2,
    }
    mics = {
        "mics_reduce_scatter": rng.choice(["native", "all_to_all"]),
        "mics_optimizer_states": rng.choice(["partition", "partition", "world"]),
    }
    case = {
        "seed": seed,
        "p": rng.choice([1, 2, 2]),
        "ranks_per_node": rng.choice([1, 2, 4]),
        "micro_steps": rng.choice([1, 1, 2, 3]),
        "clip": rng.choice([0.0, 0.5]),
        "checkpointing": (checkpointing := rng.choice([None, None, "reentrant", "without"])),
        # Recomputed part by part, it could come twice into one bucket, which stock refuses by an assertion.
        "tied": checkpointing != "reentrant" and rng.random() < 0.3,
        "share": rng.choice([0.2, 0.5, 0.8]),
        "settled": rng.random() < 0.3,
        "zero": zero,
        "mics": mics,
    }
    if case["clip"]:
        # In a sub-group of one parameter stock clips a gradient in place, so that an old one, where nobody has a new
        # one, is clipped again. How many parameters a sub-group of a given size has depends on p.
        zero["sub_group_size"] = 1_000_000
    if rng.random() < 0.2:
        # Offloaded, stock forgets what came in earlier micro-steps only, and clips an old gradient once more.
        zero["offload_optimizer"] = {"device": "cpu"}
        case.update(micro_steps=1, clip=0.0)
    return case


def parts_of(case: dict[str, Any], step: int, micro_step: int, replica: int) -> list[int]:
    """What one replica runs. In each step there is a part that nobody does."""
    step = step // 3 if case["settled"] else step  # replicas that stay different, so that they agree on units
    nobody = random.Random(f"{case['seed']} {step}").randrange(BRANCHES + 1)
    rng = random.Random(f"{case['seed']} {step} {micro_step} {replica}")
    used = [index for index in range(BRANCHES + 1) if index != nobody and rng.random() < case["share"]]
    rng.shuffle(used)
    return used


def experts_of(case: dict[str, Any], step: int, micro_step: int, rank: int) -> list[int]:
    rng = random.Random(f"{case['seed']} {step} {micro_step} {rank} experts")
    used = [index for index in range(EXPERTS) if rng.random() < 0.4]
    # A rank without any would have nothing to recompute where others do, which stock refuses as different modules.
    return used or ([rank % EXPERTS] if case["checkpointing"] == "without" else [])


def train(engine: Any, case: dict[str, Any]) -> list[float]:
    stock = not hasattr(engine.optimizer, "mics_groups")
    rank, losses = dist.get_rank(), []
    for step in range(STEPS):
        for micro_step in range(engine.gradient_accumulation_steps()):
            used = [parts_of(case, step, micro_step, replica) for replica in range(RANKS // case["p"])]
            mine = used[rank // case["p"]]
            some = sorted({index for parts in used for index in parts})
            weights = {index: float(index in mine) for index in some} if stock else dict.fromkeys(mine, 1.0)
            loss = engine(*batch(step, micro_step, rank), weights, experts_of(case, step, micro_step, rank))
            engine.backward(loss)
            engine.step()
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses.append(total.item() / RANKS)
    return losses


def trains_alike(seed: int) -> None:
    """One pattern, on the ranks."""
    case, expected = draw(seed), None
    for p in (None, case["p"]):
        zero = {**case["zero"], **(case["mics"] if p else {})}
        with environment(MICS_DS_RANKS_PER_NODE=str(case["ranks_per_node"])):
            config = ds_config(p, micro_steps=case["micro_steps"], clip=case["clip"], zero=zero)
            engine = build(config, lambda: Parts(case))
        initial = full_params(engine)
        losses, params = train(engine, case), full_params(engine)
        same_on_all_ranks(params)
        if expected is None:
            expected = losses, params
            assert any(not torch.equal(params[name], initial[name]) for name in params), "the oracle must train"
            continue
        replicas_agree(engine)
        assert_losses_close(losses, expected[0], 1e-6)
        assert_close(params, expected[1], 1e-6, initial)


@pytest.mark.parametrize("seed", range(FEW))
def test_a_pattern_equals_zero3(pools, seed):
    pools.run(RANKS, __name__, "trains_alike", {"seed": seed}, 60)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, PATTERNS, AT_A_TIME))
def test_many_patterns_equal_zero3(pools, first):
    failed = {}
    for seed in range(first, min(first + AT_A_TIME, PATTERNS)):
        try:
            pools.run(RANKS, __name__, "trains_alike", {"seed": seed}, 60)
        except Exception as error:
            failed[seed] = str(error)
    assert not failed, "\n".join(f"pattern {seed}: {text}" for seed, text in failed.items())
