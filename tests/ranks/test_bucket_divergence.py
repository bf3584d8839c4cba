"""Replicas that fill their buckets differently, in patterns drawn at random: as stock ZeRO-3, whatever they do.

A pattern says for each micro-step which branches each replica runs, in which order, whether it calls the mixture of
experts at all, and which experts each rank uses in it. Stock ZeRO-3 cannot do the first two, because its ranks gather
together, so there a rank sends zeros through what others use. The mixture is a leaf module, as it has to be where ranks
that gather together use different experts of it.
"""

from __future__ import annotations

import os
import random
import re
from math import ceil
from typing import Any, NamedTuple
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from cases import slow
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
from rank_pool import RankError
from torch import nn
from torch.utils.checkpoint import checkpoint

from mics_ds.deepspeed_compat import same_order

RANKS, STEPS = 4, 5
BRANCHES, EXPERTS = 4, 4
MIXTURE = BRANCHES
"""The number of the mixture among the parts that a replica runs or not."""

PATTERNS = int(os.environ.get("MICS_TEST_PATTERNS", "200"))
AT_A_TIME = 25
FEW = {1: "stock", 9: "stock", 2: "plain PyTorch", 0: "refused", 389: "refused", 641: "refused"}


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
        "checkpointing": rng.choice([None, None, "reentrant", "without"]),
        "tied": rng.random() < 0.3,
        "share": rng.choice([0.2, 0.5, 0.8]),
        "settled": rng.random() < 0.3,
        "zero": zero,
        "mics": mics,
    }
    if rng.random() < 0.2:
        zero["offload_optimizer"] = {"device": "cpu"}
        if case["micro_steps"] > 1:
            case["clip"] = 0.0  # offloaded, an old gradient is clipped anew in each step, in stock and here
    # A rank that uses no expert has nothing to recompute where others gather the experts anew.
    case["may_differ"] = case["checkpointing"] == "without" and rng.random() < 0.5
    if case["may_differ"]:  # plain PyTorch does not clip an old gradient anew, whatever its sub-group
        zero["sub_group_size"] = 1_000_000
        case["clip"] = 0.0 if "offload_optimizer" in zero else case["clip"]
    return case


def compares_with_plain(case: dict[str, Any]) -> bool:
    """Whether stock is no oracle: offloaded, it forgets what came in earlier micro-steps only, and ranks of one
    partition group that do not gather together hang in it."""
    return case["may_differ"] or ("offload_optimizer" in case["zero"] and case["micro_steps"] > 1)


def may_refuse(case: dict[str, Any]) -> bool:
    return case["may_differ"] or (case["tied"] and case["checkpointing"] == "reentrant")


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
    return used or ([rank % EXPERTS] if case["checkpointing"] == "without" and not case["may_differ"] else [])


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


class Run(NamedTuple):
    losses: list[float]
    params: dict[str, torch.Tensor]
    initial: dict[str, torch.Tensor]


def trained_by_engine(case: dict[str, Any], p: int | None) -> Run:
    zero = {**case["zero"], **(case["mics"] if p else {})}
    if case["clip"] and p is None:
        zero["sub_group_size"] = same_sub_groups(case)
    with environment(MICS_DS_RANKS_PER_NODE=str(case["ranks_per_node"]), MICS_DS_AGREEMENT_TIMEOUT="5"):
        config = ds_config(p, micro_steps=case["micro_steps"], clip=case["clip"], zero=zero)
        engine = build(config, lambda: Parts(case))
    initial = full_params(engine)
    losses, params = train(engine, case), full_params(engine)
    same_on_all_ranks(params)
    if p:
        replicas_agree(engine)
    return Run(losses, params, initial)


def same_sub_groups(case: dict[str, Any]) -> int:
    """The ``sub_group_size`` with which stock makes the sub-groups that MiCS makes with the one of the pattern.

    The size counts elements of shards, so that one size makes other groups at another p. And the gradient of a
    parameter that is alone in its group is clipped in place: if nobody has a new one in the next step, it is clipped
    again, where the gradient of a parameter with company is used as it came.
    """
    sizes = [param.numel() for param in Parts(case).parameters()]

    def groups(ranks: int, limit: int) -> list[int]:
        ends, filled = [], 0
        for index, size in enumerate(sizes):
            filled += ceil(size / ranks)
            if filled >= limit:
                ends.append(index)
                filled = 0
        return ends if ends[-1:] == [len(sizes) - 1] else [*ends, len(sizes) - 1]

    wanted = case["zero"]["sub_group_size"]
    return next(limit for limit in [*range(1, 400), wanted] if groups(RANKS, limit) == groups(case["p"], wanted))


def trained_by_torch(case: dict[str, Any]) -> Run:
    """Plain PyTorch in fp64, all ranks' data in one process.

    As in ZeRO-3, a gradient that nobody writes over in the first micro-step of a step is still there.
    """
    torch.manual_seed(1234)
    model = Parts({**case, "checkpointing": None}).double()
    named = dict(model.named_parameters())
    initial = {name: param.detach().clone() for name, param in named.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    held, losses = {name: torch.zeros_like(param) for name, param in named.items()}, []
    for step in range(STEPS):
        for micro_step in range(case["micro_steps"]):
            new, loss = plain_gradients(model, case, step, micro_step)
            losses.append(loss)
            for name, gradient in new.items():
                gradient = gradient / case["micro_steps"]
                held[name] = gradient if micro_step == 0 else held[name] + gradient
        norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in held.values()])).item()
        factor = min(1.0, case["clip"] / (norm + 1e-6)) if case["clip"] else 1.0
        for name, param in named.items():
            param.grad = held[name] * factor
        optimizer.step()
    return Run(losses, {name: param.detach() for name, param in named.items()}, initial)


def plain_gradients(
    model: nn.Module, case: dict[str, Any], step: int, micro_step: int
) -> tuple[dict[str, torch.Tensor], float]:
    """Means over all ranks, of parameters that any of them used, and the loss."""
    used = [parts_of(case, step, micro_step, replica) for replica in range(RANKS // case["p"])]
    model.zero_grad(set_to_none=True)
    total = 0.0
    for rank in range(RANKS):
        weights = dict.fromkeys(used[rank // case["p"]], 1.0)
        experts = experts_of(case, step, micro_step, rank)
        loss = model(*batch(step, micro_step, rank, torch.float64), weights, experts) / RANKS
        loss.backward()
        total += loss.item()
    leaf = any(MIXTURE in parts for parts in used)  # of which a rank gives zeros for what it does not use
    gradients = {}
    for name, param in model.named_parameters():
        if param.grad is not None:
            gradients[name] = param.grad.clone()
        elif leaf and name.startswith("mixture"):
            gradients[name] = torch.zeros_like(param)
    return gradients, total


def oracle(case: dict[str, Any]) -> Run:
    if compares_with_plain(case):
        return trained_by_torch(case)
    try:
        return trained_by_engine(case, None)
    except (AssertionError, AttributeError):
        if not may_refuse(case):
            raise
        return trained_by_torch(case)  # two gradients of one parameter in a bucket


def trains_alike(seed: int) -> None:
    """One pattern, on the ranks."""
    case = draw(seed)
    with mock.patch.object(same_order, "PATIENCE_S", 3.0):
        expected, found = oracle(case), trained_by_engine(case, case["p"])
    moved = any(not torch.equal(expected.params[name], expected.initial[name]) for name in expected.params)
    assert moved, "the oracle must train"
    assert_losses_close(found.losses, expected.losses, 1e-6)
    assert_close(found.params, expected.params, 1e-6, expected.initial)


def run_pattern(pools: Any, seed: int) -> str:
    """One pattern, from outside. Returns how it ended: an error that is not the one it may end with is raised."""
    case = draw(seed)
    try:
        pools.run(RANKS, __name__, "trains_alike", {"seed": seed}, 120)
    except RankError as error:
        raised = str(error).partition("──── end of rank")[0]  # what follows is their output, of earlier tests as well
        said = re.findall(r"^mics_ds\.errors\.MicsUsageError: (.*)$", raised, re.MULTILINE)
        other = re.findall(r"^(?!mics_ds\.errors\.MicsUsageError)[\w.]*(?:Error|Exception): .*$", raised, re.MULTILINE)
        twice = len(said) == RANKS and all("one gradient per parameter" in line for line in said)
        # Those that gather together are told, or the one that leaves the order they have recorded. The others wait for
        # them in collectives, until their processes are gone.
        apart = len(said) in (1, case["p"], RANKS) and all("same modules in the same order" in line for line in said)
        if may_refuse(case) and not other and (apart if case["may_differ"] else twice):
            return "refused"
        raise
    return "plain PyTorch" if compares_with_plain(case) else "stock"


@pytest.mark.parametrize("seed", [1, 9, 2, 0, slow(389), slow(641)])
def test_a_pattern_equals_zero3(pools, seed):
    assert run_pattern(pools, seed) == FEW[seed]


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, PATTERNS, AT_A_TIME))
def test_many_patterns_equal_zero3(pools, first):
    failed, ended = {}, []
    for seed in range(first, min(first + AT_A_TIME, PATTERNS)):
        try:
            ended.append(run_pattern(pools, seed))
        except Exception as error:
            failed[seed] = str(error)
    print({end: ended.count(end) for end in sorted(set(ended))})
    assert not failed, "\n".join(f"pattern {seed}: {text}" for seed, text in failed.items())
