"""Replicas stay bitwise equal, whatever happens to one of them."""

from __future__ import annotations

import itertools

import deepspeed
import pytest
import torch
import torch.distributed as dist
from cases import every, slow
from helpers import OddNet, batch, build, ds_config, full_params, replicas_agree, same_on_all_ranks, train
from torch import nn


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("p", "overflowing_rank"),
    [(1, 3), (2, 0), slow(1, 0), slow(2, 3)],
)
def test_fp16_with_clipping_and_an_overflow_on_one_rank(p, overflowing_rank):
    config = ds_config(p, dtype="fp16", clip=0.1)
    engine = build(config, optimizer=lambda items: torch.optim.AdamW(items, lr=1e-2, weight_decay=0.1))
    rank = dist.get_rank()
    scales, skipped = [], []
    for step in range(12):
        x, y = batch(step, 0, rank, torch.float16)
        loss = engine(x, y)
        if step == 5 and rank == overflowing_rank:
            loss = loss * torch.inf
        before = engine.skipped_steps
        engine.backward(loss)
        engine.step()
        scales.append(engine.optimizer.loss_scale)
        if engine.skipped_steps > before:
            skipped.append(step)
    assert skipped == [5]
    # DeepSpeed tolerates `hysteresis` (2) overflows before it lowers the scale; all ranks must count alike
    same_on_all_ranks({"loss scale": torch.tensor(scales)})
    replicas_agree(engine)
    same_on_all_ranks(full_params(engine))


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("p", "inside_init"), every((1, 2), (True, False), default=[(1, False), (2, True)]))
def test_a_different_seed_on_each_rank(p, inside_init):
    engine = build(ds_config(p, clip=0.5), seed=100 + dist.get_rank(), inside_init=inside_init)
    same_on_all_ranks(full_params(engine))
    train(engine, 3)
    replicas_agree(engine)
    same_on_all_ranks(full_params(engine))


class WithApply(OddNet):
    """Initialises its children once more, as most transformer code does, with this rank's random numbers."""

    def __init__(self) -> None:
        super().__init__()
        returned = self.apply(self.initialise)
        assert returned is self

    @staticmethod
    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, mean=3.0, std=0.02)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [1, 2, 4])
def test_module_apply_with_a_different_seed_on_each_rank(p):
    engine = build(ds_config(p), WithApply, seed=100 + dist.get_rank(), inside_init=True)
    params = full_params(engine)
    assert abs(params["embed.weight"].mean().item() - 3.0) < 0.1
    same_on_all_ranks(params)
    # and it is put back afterwards
    assert torch.nn.Module.apply.__module__ == "torch.nn.modules.module"


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [1, 2, 4])
def test_weights_loaded_on_one_rank_reach_all_replicas(p):
    model = (engine := build(ds_config(p), seed=100 + dist.get_rank(), inside_init=True)).module
    for start, (modifier, how) in enumerate(itertools.product((0, 3), ("list", "generator", "one"))):
        given = {"list": list(model.parameters()), "generator": model.parameters(), "one": model.embed.weight}[how]
        with deepspeed.zero.GatheredParameters(given, modifier_rank=modifier), torch.no_grad():
            if dist.get_rank() == modifier:
                for param in [model.embed.weight] if how == "one" else model.parameters():
                    param.copy_(start + torch.arange(param.numel()).view(param.shape))
        params = full_params(engine)
        same_on_all_ranks(params)
        assert torch.equal(params["embed.weight"], start + torch.arange(13 * 7.0).view(13, 7)), (modifier, how)
        assert how == "one" or torch.equal(params["pair"], start + torch.arange(3.0)), (modifier, how)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [slow(1), 2, slow(4)])
def test_evaluation_without_an_optimizer(p):
    """The path on which DeepSpeed builds no optimizer at all."""
    outputs = []
    for size, inside in ((None, False), (p, False), (p, True)):
        config = ds_config(size)
        torch.manual_seed(7)
        if inside:
            with deepspeed.zero.Init(config_dict_or_path=config):
                model = OddNet()
        else:
            model = OddNet()
        engine, *_ = deepspeed.initialize(model=model, config=config)
        engine.eval()
        with torch.no_grad():
            outputs.append([engine(*batch(step, 0, dist.get_rank())).item() for step in range(3)])
        if size is not None:
            assert engine.optimizer.mics_groups.partition.size == p
        engine.destroy()
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [2, slow(4)])
def test_mics_init_of_old_scripts(p):
    config = ds_config(p)
    torch.manual_seed(dist.get_rank())
    with deepspeed.zero.MiCS_Init(config_dict_or_path=config):
        model = OddNet()
    engine = build(config, lambda: model)
    assert engine.optimizer.mics_groups.partition.size == p
    losses = train(engine, 5)
    assert losses[-1] < losses[0]
    same_on_all_ranks(full_params(engine))


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [slow(1), 2, slow(4)])
def test_saved_and_loaded_again(p, tmp_path):
    """One replica writes; every replica reads. Training goes on bit for bit."""
    engine = build(ds_config(p, clip=0.5), optimizer=lambda items: torch.optim.AdamW(items, lr=1e-2))
    train(engine, 3)
    engine.save_checkpoint(str(tmp_path))
    expected = train(engine, 3)
    params = full_params(engine)
    again = build(ds_config(p, clip=0.5), seed=99, optimizer=lambda items: torch.optim.AdamW(items, lr=1e-2))
    again.load_checkpoint(str(tmp_path))
    assert train(again, 3) == expected
    for name, value in full_params(again).items():
        assert torch.equal(value, params[name]), name
    written = sorted(path.name for path in tmp_path.glob("*/*optim_states.pt"))
    assert len(written) == p
    assert len(list(tmp_path.glob("*/*model_states.pt"))) == p


@pytest.mark.ranks(4)
def test_two_engines_with_different_sizes_in_one_process():
    first, second = build(ds_config(1)), build(ds_config(2))
    stock = build(ds_config(None))
    for engine in (first, second, stock):
        train(engine, 2)
        same_on_all_ranks(full_params(engine))
    replicas_agree(first)
    replicas_agree(second)
    assert first.optimizer.mics_groups.partition.size == 1
    assert second.optimizer.mics_groups.partition.size == 2
    assert not hasattr(stock.optimizer, "mics_groups")
