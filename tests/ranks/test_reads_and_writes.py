"""DeepSpeed's functions that read and set gradients, weights and optimizer states, beside stock ZeRO-3."""

from __future__ import annotations

import deepspeed
import pytest
import torch
import torch.distributed as dist
from cases import every
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
)
from deepspeed.utils.tensor_fragment import safe_update_full_grad_vectorized
from helpers import (
    assert_close,
    assert_losses_close,
    batch,
    build,
    ds_config,
    full_params,
    same_on_all_ranks,
    train,
)
from stock import Deep, averaged, compare

from mics_ds.errors import MicsError


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


# ------------------------------------------------------------------------------- reading and setting


def trainable(engine):
    return {
        name: param for name, param in engine.module.named_parameters() if param.requires_grad and "unused" not in name
    }


def gradients(engine):
    return {name: safe_get_full_grad(param) for name, param in trainable(engine).items()}


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("p", "offload"), every((1, 2, 4), (False, True), default=[(1, True), (2, False), (4, True)]))
def test_full_gradients_before_and_at_the_boundary(p, offload):
    """In the middle of accumulation too, they are means over all ranks, and looking at them changes nothing."""
    zero = {"offload_optimizer": {"device": "cpu"}} if offload else {}
    seen, params = [], []
    for size in (None, p):
        engine = build(ds_config(size, micro_steps=3, zero=zero))
        looked = []
        for micro_step in range(3):
            loss = engine(*batch(0, micro_step, dist.get_rank()))
            engine.backward(loss)
            if not offload or micro_step == 2:  # stock has no gradients to show before the boundary there
                looked.append(gradients(engine))
            engine.step()
        seen.append(looked)
        params.append(full_params(engine))
    for expected, actual in zip(*seen, strict=True):
        assert_close(actual, expected, 1e-6)
        same_on_all_ranks(actual)
    assert_close(params[1], params[0], 1e-6)


@pytest.mark.ranks(4)
def test_local_gradients_are_refused_while_they_are_partial():
    engine = build(ds_config(2, micro_steps=2))
    param = engine.module.head.weight
    engine.backward(engine(*batch(0, 0, dist.get_rank())))
    with pytest.raises(MicsError, match=r"this rank alone.*safe_get_full_grad"):
        safe_get_local_grad(param)
    full = safe_get_full_grad(param).flatten()  # makes them whole
    local = safe_get_local_grad(param)
    rank, width = engine.optimizer.mics_groups.partition.rank, param.partition_numel()
    shard = torch.zeros(width)
    part = full[rank * width : (rank + 1) * width]
    shard[: part.numel()] = part
    assert torch.equal(local, shard)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("overlap", [True, False])
def test_one_rank_alone_reads_its_local_gradient_at_the_boundary(overlap):
    """As for logging: nobody else has to take part, and training goes on alike."""
    results = []
    for p, reads in ((None, False), (2, True)):
        engine = build(ds_config(p, micro_steps=2, zero={"overlap_comm": overlap}))
        losses = []
        for step in range(3):
            for micro_step in range(2):
                loss = engine(*batch(step, micro_step, dist.get_rank()))
                engine.backward(loss)
                if reads and micro_step == 1 and dist.get_rank() == step:
                    local = safe_get_local_grad(engine.module.head.weight)
                    assert local.abs().max() > 0
                engine.step()
                losses.append(loss.item())
        results.append((losses, full_params(engine)))
    assert_losses_close(results[1][0], results[0][0], 1e-6)
    assert_close(results[1][1], results[0][1], 1e-6)


def set_full_gradients_unseen(engine):
    """Without a look at what is there before."""
    losses = []
    for step in range(3):
        loss = engine(*batch(step, 0, dist.get_rank()))
        engine.backward(loss)
        param = trainable(engine)["blocks.0.0.weight"]
        safe_set_full_grad(param, torch.full(param.ds_shape, 0.25))
        engine.step()
        losses.append(averaged(loss))
    return losses


def halve(value, _param):
    return value * 0.5


def set_gradients(engine):
    """At the boundary: halve one gradient in each of three ways."""
    losses = []
    for step in range(3):
        loss = engine(*batch(step, 0, dist.get_rank()))
        engine.backward(loss)
        named = trainable(engine)
        full, local = named["blocks.0.0.weight"], named["blocks.1.0.weight"]
        safe_set_full_grad(full, safe_get_full_grad(full) * 0.5)
        safe_set_local_grad(local, safe_get_local_grad(local) * 0.5)
        safe_update_full_grad_vectorized([named["blocks.0.0.bias"], named["blocks.2.2.weight"]], halve)
        engine.step()
        losses.append(averaged(loss))
    return losses


def set_states(engine):
    losses = train(engine, 2)
    named = trainable(engine)
    full, local = named["blocks.0.0.weight"], named["blocks.1.0.weight"]
    safe_set_full_fp32_param(full, safe_get_full_fp32_param(full) * 0.9)
    safe_set_full_optimizer_state(full, safe_get_full_optimizer_state(full, "exp_avg") * 0.5, "exp_avg")
    safe_set_local_fp32_param(local, safe_get_local_fp32_param(local) * 0.9)
    safe_set_local_optimizer_state(local, safe_get_local_optimizer_state(local, "exp_avg") * 0.5, "exp_avg")
    return losses + train(engine, 2)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("way", [set_gradients, set_full_gradients_unseen, set_states], ids=lambda way: way.__name__)
def test_setting_gradients_parameters_and_states(way):
    # sizes that divide by the ranks: DeepSpeed's setters cannot do without
    compare(drive=way, optimizer=adamw, model=Deep)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [1, 2, 4])
def test_gathered_parameters_nested_and_for_a_forward_module(p):
    engine = build(ds_config(p))
    head, embed = engine.module.head.weight, engine.module.embed.weight
    with deepspeed.zero.GatheredParameters([head], modifier_rank=1):
        if dist.get_rank() == 1:
            head.data.fill_(3.0)
        with deepspeed.zero.GatheredParameters(embed, modifier_rank=3):
            if dist.get_rank() == 3:
                embed.data.fill_(5.0)
    with deepspeed.zero.GatheredParameters([head], fwd_module=engine.module):
        assert torch.equal(head.data, torch.full_like(head, 3.0))
    params = full_params(engine)
    same_on_all_ranks(params)
    assert (params["head.weight"] == 3).all()
    assert (params["embed.weight"] == 5).all()
    with deepspeed.zero.GatheredParameters([head], enabled=False):
        assert head.numel() == 0 or p == 1
    train(engine, 1)
