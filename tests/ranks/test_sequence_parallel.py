"""Sequence parallelism as DeepSpeed has it (Ulysses, ALST): ranks of a sequence group hold parts of one sequence.

Its groups have nothing to do with partition groups: ZeRO-3 partitions over all ranks of both kinds, and so does MiCS.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from cases import slow
from deepspeed.utils import groups
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from helpers import (
    OddNet,
    assert_close,
    assert_losses_close,
    build,
    ds_config,
    full_params,
    replicas_agree,
    same_on_all_ranks,
)
from helpers import train as train_oddnet
from sequence_engines import (
    Decoder,
    causal,
    sequence_groups,
    sequences,
    train,
    ulysses,
)
from torch import nn
from torch.nn import functional


def sgd(params: list) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.2, momentum=0.9)


def engine_of(p: int | None, **config: Any) -> Any:
    size = groups._get_sequence_parallel_world_size()
    keys = {"sequence_parallel_size": size}
    if groups.mesh_device is not None:
        keys["data_parallel_size"] = dist.get_world_size() // size
    engine = build(ds_config(p, **keys, **config), lambda: Decoder(ulysses()), optimizer=sgd, mpu=groups.mpu)
    assert engine.sequence_parallel_size == size
    assert engine.train_batch_size() == 2 * engine.gradient_accumulation_steps() * dist.get_world_size() // size
    return engine


def alone(steps: int, micro_steps: int, replicas: int, clip: float) -> list[float]:
    """Plain PyTorch on whole sequences, in one process."""
    torch.manual_seed(1234)
    model = Decoder(causal)
    optimizer = sgd(list(model.parameters()))
    losses = []
    for step in range(steps):
        parts = []
        for micro_step in range(micro_steps):
            for replica in range(replicas):
                item = sequences(step, micro_step, replica)
                logits = model(item["tokens"], item["positions"])
                parts.append(functional.cross_entropy(logits.flatten(0, 1), item["targets"].flatten()))
        loss = torch.stack(parts).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
        optimizer.step()
        losses.append(loss.item())
    return losses


def compare(
    sp: int,
    sizes: list[int],
    *,
    steps: int = 2,
    clip: float = 0.0,
    micro_steps: int = 1,
    by_mesh: bool = False,
    zero: dict[str, Any] | None = None,
) -> None:
    """Each partition size beside stock ZeRO-3 with the same sequence parallelism, and that beside plain PyTorch."""
    config = {"clip": clip, "micro_steps": micro_steps, "zero": zero}
    with sequence_groups(sp, by_mesh):
        stock = engine_of(None, **config)
        initial = full_params(stock)
        expected, trained = train(stock, steps), full_params(stock)
        if (zero or {}).get("reduce_scatter", True):
            assert_losses_close(expected, alone(steps, micro_steps, dist.get_world_size() // sp, clip), 1e-5)
        for p in sizes:
            engine = engine_of(p, **config)
            mics = engine.optimizer.mics_groups
            assert mics.partition.size == p
            assert mics.full.size == dist.get_world_size(), "partition groups are cut from ranks of both kinds"
            assert_losses_close(train(engine, steps), expected, 1e-6)
            params = full_params(engine)
            assert_close(params, trained, 1e-6, initial)
            same_on_all_ranks(params)
            replicas_agree(engine)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("sp", [2, slow(4)])
def test_losses_and_parameters_equal_zero3_under_sequence_parallelism(sp):
    """p smaller than, equal to and larger than sp."""
    compare(sp, [1, 4], clip=0.5, micro_steps=2)


@pytest.mark.slow
@pytest.mark.ranks(6)
@pytest.mark.parametrize(("sp", "sizes"), [(2, [1, 2, 3, 6]), (3, [1, 2, 3, 6]), (6, [2, 3])])
@pytest.mark.parametrize(("clip", "micro_steps"), [(0.0, 1), (0.5, 3)])
def test_partition_groups_need_not_line_up_with_sequence_groups(sp, sizes, clip, micro_steps):
    """With sp = 2 and p = 3, ranks 2 and 3 share their sequences and not their partition group."""
    compare(sp, sizes, steps=8, clip=clip, micro_steps=micro_steps)


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    "zero",
    [
        {"reduce_scatter": False},
        slow({"reduce_scatter": False, "contiguous_gradients": False}),
        slow({"overlap_comm": True}),
        slow({"overlap_comm": False}),
        slow({"offload_optimizer": {"device": "cpu"}}),
    ],
)
def test_ways_of_reducing_under_sequence_parallelism(zero):
    """With an all-reduce and contiguous gradients, and only so, DeepSpeed multiplies gradients by the size of a
    sequence group. So it has to be here."""
    compare(2, [1, 2], micro_steps=2, zero=zero)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("sp", [slow(2), 4])
def test_a_mesh_from_the_json(sp):
    """Without an mpu, ``sequence_parallel_size`` and ``data_parallel_size`` have DeepSpeed make the groups. It then
    gives the optimizer another group than the parameters. And a sequence group of all ranks *is* the world, in which
    hop 2 must not run beside the model's own collectives."""
    compare(sp, [1, 4] if sp == 4 else [1, 2, 4], clip=0.5, micro_steps=2, by_mesh=True)
    if sp == 4:
        with sequence_groups(sp, by_mesh=True):
            assert groups._get_sequence_parallel_group() is dist.group.WORLD, "or this tests nothing"


@pytest.mark.ranks(4)
@pytest.mark.parametrize("by_mesh", [False, slow(True)])
def test_checkpoints_under_sequence_parallelism(tmp_path, by_mesh):
    """The rank in a sequence group is no part of what files are called: any size of it resumes."""
    reshape = {"mics_reshape_checkpoint": True}
    with sequence_groups(2, by_mesh):
        engine = engine_of(2, clip=0.5)
        train(engine, 2)
        engine.save_checkpoint(tmp_path)
        saved = full_params(engine)
        following = train(engine, 2, first=2)
        again = engine_of(2, clip=0.5)
        again.load_checkpoint(tmp_path)
        assert train(again, 2, first=2) == following
        other = engine_of(4, clip=0.5, zero=reshape)
        other.load_checkpoint(tmp_path)
        assert_losses_close(train(other, 2, first=2), following, 1e-6)
    with sequence_groups(4, by_mesh):
        other = engine_of(1, zero=reshape)
        other.load_checkpoint(tmp_path)
        assert_close(full_params(other), saved, 0)
        train(other, 1)
    whole = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    assert_close({name: whole[name] for name in saved}, saved, 0)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("by_mesh", [False, slow(True)])
def test_a_planned_size_under_sequence_parallelism(by_mesh):
    with sequence_groups(2, by_mesh):
        engine = engine_of("planned", zero={"mics_plan": {"memory_gb": 1, "sequence": 6}})
        assert engine.optimizer.mics_groups.full.size == 4
        train(engine, 1)


class BothParallel:
    """The mpu of a job with tensor parallelism 2 and sequence parallelism 2, as Megatron has it."""

    def __init__(self) -> None:
        rank = dist.get_rank()
        self.sequence = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
        self.tensor = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
        self.data = [dist.new_group([other]) for other in range(4)][rank]

    def __getattr__(self, name: str) -> Any:
        of = {"sequence_data": self.sequence, "sequence": self.sequence, "data": self.data, "model": self.tensor}
        kind, _, what = name.removeprefix("get_").removeprefix("tensor_").partition("_parallel_")
        if kind not in of or what not in ("group", "world_size", "rank"):
            raise AttributeError(name)
        group = of[kind]
        return lambda: {"group": group, "world_size": group.size(), "rank": group.rank()}[what]


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [slow(1), 2])
def test_sequence_and_tensor_parallelism_by_an_mpu(p):
    unit, results = BothParallel(), []
    for size in (None, p):
        config = ds_config(size, clip=0.5, micro_steps=2)

        def model(config: dict[str, Any] = config) -> nn.Module:
            with deepspeed.zero.Init(
                data_parallel_group=unit.get_sequence_data_parallel_group(), config_dict_or_path=config, mpu=unit
            ):
                return OddNet()

        try:
            engine = build(config, model, mpu=unit)
        finally:
            groups.mpu = None
        # what a sequence group shares is its mean: here as if its parts were samples
        results.append((train_oddnet(engine, 4, rank=unit.get_sequence_parallel_rank()), full_params(engine)))
    mics = engine.optimizer.mics_groups
    assert mics.full.ranks == tuple(dist.get_process_group_ranks(unit.sequence))
    assert mics.partition.size == p
    assert_losses_close(results[1][0], results[0][0], 1e-6)
    assert_close(results[1][1], results[0][1], 1e-6)
