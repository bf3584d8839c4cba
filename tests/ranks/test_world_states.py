"""World-sharded optimizer states: the numbers of ZeRO-3, with masters and states of 1/n of the parameters on a rank.

Run other modules in this mode too: MICS_TEST_STATES=world pytest tests/ranks/test_features.py
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from cases import every, slow
from deepspeed.accelerator import get_accelerator
from helpers import (
    OddNet,
    assert_close,
    assert_losses_close,
    build,
    ds_config,
    environment,
    full_params,
    replicas_agree,
    same_on_all_ranks,
    stock_reference,
    train,
)
from torch import nn

from mics_ds.check.meter import CommMeter
from mics_ds.comm.collectives import HOP2, HOP2_SCATTER, UPDATES
from mics_ds.comm.sizes import MIB, ON_ACCELERATORS
from mics_ds.deepspeed_compat import world_states
from mics_ds.errors import MicsConfigError
from mics_ds.zero.units import GradientShards

TOLERANCE = 1e-6


def config(p: int, zero: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return ds_config(p, zero={"mics_optimizer_states": "world", **(zero or {})}, **more)


def adamw(params: list) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


def as_zero3(p: int, steps: int = 3, optimizer: Any = None, tolerance: float = TOLERANCE, **more: Any) -> Any:
    """Train with it and with stock ZeRO-3. Losses and parameters must agree."""
    zero = more.pop("zero", {})
    of_stock = {key: value for key, value in zero.items() if not key.startswith("mics_")}
    reference = stock_reference(steps, optimizer=optimizer, zero=of_stock, **more)
    engine = build(config(p, zero, **more), optimizer=optimizer)
    assert (engine.optimizer.world_states is not None) == (p < dist.get_world_size())
    assert_losses_close(train(engine, steps), reference.losses, tolerance)
    params = full_params(engine)
    same_on_all_ranks(params)
    assert_close(params, reference.params, tolerance, reference.initial)
    replicas_agree(engine)
    return engine


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("p", "micro_steps"), every((1, 2, 4), (1, 3), default=[(1, 3), (2, 3)]))
def test_as_zero3(p, micro_steps):
    as_zero3(p, 6, micro_steps=micro_steps, clip=0.5)


@pytest.mark.slow  # eight ranks
@pytest.mark.ranks(8)
def test_four_replicas_of_two():
    as_zero3(2, 20, optimizer=adamw, micro_steps=3, clip=0.5)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [slow(1), 2])
@pytest.mark.parametrize(
    "zero",
    [
        {"sub_group_size": 40},
        {"overlap_comm": False},
        {"reduce_scatter": False},
        {"mics_reduce_scatter": "native", "reduce_bucket_size": 10_000},
        {"stage3_param_persistence_threshold": 100_000},
        {"offload_optimizer": {"device": "cpu"}, "sub_group_size": 90},
        {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
    ],
    ids=lambda zero: ", ".join(zero),
)
def test_settings_of_zero(p, zero):
    as_zero3(p, zero=zero, optimizer=adamw, micro_steps=2, clip=0.5)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("accumulation", ["fp32", slow(None)])
def test_sixteen_bit(dtype, accumulation):
    more = {"data_types": {"grad_accum_dtype": accumulation}} if accumulation else {}
    as_zero3(2, tolerance=2e-2, dtype=dtype, micro_steps=2, clip=0.5, **more)


def spread(engine: Any) -> tuple[int, int]:
    """Elements of masters and of other optimizer states of their shape, on this rank."""
    optimizer = engine.optimizer
    masters = sum(master.numel() for master in optimizer.fp32_partitioned_groups_flat)
    states = sum(held.numel() for _, held in optimizer.world_states.checkpoints.elementwise_states()) - masters
    return masters, states


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [slow(1), 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_rank_keeps_masters_and_states_of_its_slices_to_the_element(p, dtype):
    engine = build(config(p, dtype=dtype), optimizer=adamw)
    train(engine, 1)
    shards = [-(-param.ds_numel // p) for group in engine.optimizer.fp16_groups for param in group]
    slices = sum(-(-shard // (4 // p)) for shard in shards)
    assert spread(engine) == (slices, 2 * slices)
    total = torch.tensor([slices])
    dist.all_reduce(total)
    trained = sum(param.ds_numel for group in engine.optimizer.fp16_groups for param in group)
    assert trained <= total.item() <= trained + 4 * len(shards) * 2, "1/n and padding"


class Scaled(nn.Module):
    """Gradients overflow in fp16 on whoever is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.net = OddNet()

    def forward(self, x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
        return self.net(x, y) * scale


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [slow(1), 2])
def test_fp16_steps_with_overflows_on_one_rank(p):
    engine = build(config(p, dtype="fp16", clip=0.5), Scaled, optimizer=adamw)
    skipped = 0
    for step in range(12):
        victim = step % 4 if step % 3 == 2 else -1
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        x = torch.randn(2, 7, generator=generator).half()
        y = torch.randn(2, 7, generator=generator).half()
        loss = engine(x, y, 1e7 if dist.get_rank() == victim else 1.0)
        engine.backward(loss)
        before = engine.skipped_steps
        engine.step()
        assert engine.skipped_steps - before == (victim >= 0), "all ranks skip together"
        skipped += engine.skipped_steps - before
    assert skipped == 4
    replicas_agree(engine)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [slow(1), 2])
def test_what_the_utilities_of_deepspeed_read_and_set(p):
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_grad,
        safe_get_full_optimizer_state,
        safe_get_local_fp32_param,
        safe_set_full_fp32_param,
        safe_set_full_grad,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
    )

    found = {}
    for key, engine in {
        "stock": build(ds_config(None, micro_steps=2), optimizer=adamw),
        "world": build(config(p, micro_steps=2), optimizer=adamw),
    }.items():
        train(engine, 1)
        seen: dict[str, torch.Tensor] = {}
        rank = dist.get_rank()
        generator = torch.Generator().manual_seed(rank)
        for micro_step in range(2):
            x, y = (torch.randn(2, 7, generator=generator) for _ in range(2))
            engine.backward(engine(x, y))
            for name, param in engine.module.named_parameters():
                if param.requires_grad:
                    seen[f"{name} gradient {micro_step}"] = safe_get_full_grad(param).clone()
            if micro_step == 0:
                engine.step()
        for name, param in engine.module.named_parameters():
            if param.requires_grad and fits(param):
                safe_set_full_grad(param, 0.5 * safe_get_full_grad(param))
                seen[f"{name} moment"] = safe_get_full_optimizer_state(param, "exp_avg").clone()
                safe_set_full_optimizer_state(param, 2 * seen[f"{name} moment"], "exp_avg")
                safe_set_full_fp32_param(param, safe_get_full_fp32_param(param) + 0.25)
        engine.step()
        for name, param in engine.module.named_parameters():
            if param.requires_grad:
                seen[f"{name} master"] = safe_get_full_fp32_param(param).clone()
                safe_set_local_fp32_param(param, safe_get_local_fp32_param(param) * 2)
                seen[f"{name} doubled"] = safe_get_full_fp32_param(param).clone()
        found[key] = seen
    assert_close(found["world"], found["stock"], TOLERANCE)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [slow(1), 2])
@pytest.mark.parametrize("shared", [False, True])
def test_weights_changed_by_hand_change_masters_where_they_are_one_tensor(p, shared):
    """Elsewhere the change is lost in the next step, as in stock. DeepSpeed means to have one tensor for both in fp32,
    but compares a device with its name."""
    losses, name = [], torch.device("cpu") if shared else "cpu"
    for made in (ds_config(None), config(p)):
        with mock.patch.object(get_accelerator(), "current_device_name", return_value=name):
            engine = build(made)
        train(engine, 2)
        params = [param for param in engine.module.parameters() if param.requires_grad]
        with deepspeed.zero.GatheredParameters(params, modifier_rank=0):
            if dist.get_rank() == 0:
                for param in params:
                    param.data.mul_(0.5)
        losses.append(train(engine, 3))
    assert_losses_close(losses[1], losses[0], TOLERANCE)


def fits(param: Any) -> bool:
    """Stock cannot set what does not divide by the number of ranks."""
    return param.ds_numel % dist.get_world_size() == 0


class OwnSgd(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.data.sub_(group["lr"] * self.direction(param.grad))

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class Promised(OwnSgd):
    mics_elementwise = True


class Largest(OwnSgd):
    """Divides by the largest gradient of a tensor: not elementwise."""

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient / gradient.abs().max()


def scheduled(params: list) -> torch.optim.Optimizer:
    """With a step of its own, as a scheduler leaves it."""
    optimizer = Largest(params)
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    assert "step" in vars(optimizer)
    return optimizer


@pytest.mark.ranks(4)
@pytest.mark.parametrize("optimizer", [Largest, scheduled])
def test_an_optimizer_that_looks_at_whole_tensors_is_refused_by_name(optimizer):
    with pytest.raises(MicsConfigError, match=r"test_world_states.Largest is not one of those .*mics_elementwise"):
        build(config(2), optimizer=optimizer)


@pytest.mark.ranks(4)
def test_an_unknown_optimizer_is_taken_where_the_script_vouches_for_it():
    as_zero3(2, optimizer=Promised)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [slow(1), 2])
@pytest.mark.parametrize("accumulation", ["bf16", "fp32"])
def test_one_reduce_scatter_and_one_all_gather_of_everything_per_boundary(p, accumulation):
    """By bytes, once the last step's updates have arrived: slices padded, in the types they have."""
    engine = build(config(p, dtype="bf16", micro_steps=3, data_types={"grad_accum_dtype": accumulation}))
    train(engine, 3)
    optimizer = engine.optimizer
    optimizer.world_states.finish_updates()
    with CommMeter() as meter:
        train(engine, 1)
        optimizer.world_states.finish_updates()
    r, itemsize = 4 // p, {"bf16": 2, "fp32": 4}[accumulation]
    slices = r * sum(cut.width for cut in optimizer.world_states.cuts)
    replicas = optimizer.mics_groups.replication.ranks
    assert sum(item.payload for item in meter.select(label=HOP2_SCATTER)) == slices * itemsize
    assert sum(item.payload for item in meter.select(label=UPDATES)) == slices * 2
    assert {item.ranks for item in meter.select(label=HOP2_SCATTER) + meter.select(label=UPDATES)} == {replicas}
    assert not meter.select(label=HOP2)
    assert all(item.payload <= 64 for item in meter.select("all_reduce", replicas)), "flags and norms"


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("ranks_per_node", "most_peers", "dtype", "kind"),
    [
        (1, 4, "bf16", "all_to_all"),
        (1, 4, "fp32", "reduce_scatter"),  # the backend adds up in fp32 as well
        (1, 3, "bf16", "reduce_scatter"),  # a message to each replica would be too small
        (2, 4, "bf16", "reduce_scatter"),  # replicas share nodes, where a ring crosses the network less often
        (4, 4, "bf16", "reduce_scatter"),
    ],
)
def test_hop2_is_an_all_to_all_only_where_that_is_worth_its_messages(ranks_per_node, most_peers, dtype, kind):
    """It adds 16-bit values up in fp32. Elsewhere it is the backend's own reduce-scatter, as for hop 1."""
    nodes = environment(MICS_DS_RANKS_PER_NODE=str(ranks_per_node))
    with nodes, mock.patch.object(world_states, "MOST_PEERS", most_peers):
        engine = build(config(1, {"mics_reduce_scatter": "native"}, dtype=dtype))
    train(engine, 1)
    with CommMeter() as meter:
        train(engine, 1)
    assert {item.kind for item in meter.select(label=HOP2_SCATTER)} == {kind}


def test_an_all_to_all_sends_a_megabyte_to_each_replica_at_least():
    assert ON_ACCELERATORS.unit // world_states.MOST_PEERS == MIB


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("p", "micro_steps"), [slow(1, 3), (2, 1)])
def test_offloaded_gradients_by_way_of_the_device(p, micro_steps):
    """As on a GPU, where hop 2 cannot work in host memory."""
    zero = {"offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 120}
    with mock.patch.object(GradientShards, "is_here", False):
        as_zero3(p, zero=zero, optimizer=adamw, micro_steps=micro_steps, clip=0.5)
