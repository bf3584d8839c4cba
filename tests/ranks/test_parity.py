"""Same numbers as stock ZeRO-3, on the same ranks."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from cases import every, slow
from helpers import (
    WIDTH,
    DataParallelUnit,
    OddNet,
    assert_close,
    assert_losses_close,
    batch,
    build,
    ds_config,
    environment,
    full_params,
    same_on_all_ranks,
    stock_reference,
    train,
)
from torch import nn

from mics_ds.comm import groups as groups_module
from mics_ds.comm.sizes import Sizes

STEPS = {"fp32": 6, "bf16": 6, "fp16": 6}
# Relative. fp32 is the promise; in 16 bits one addition in another order moves a value by half a unit
# in the last place (bf16: 2^-8, fp16: 2^-11), and every step carries that on.
TOLERANCE = {"fp32": 1e-6, "bf16": 0.05, "fp16": 0.01}


def compare(sizes: list[int], tolerance: float, steps: int | None = None, **kwargs: Any) -> None:
    model = kwargs.pop("model", None)
    more = {} if model is None else {"model": model}
    steps = steps or STEPS[kwargs.get("dtype", "fp32")]
    stock_zero = {key: value for key, value in kwargs.get("zero", {}).items() if not key.startswith("mics_")}
    initial, expected_losses, expected = stock_reference(steps, **more, **{**kwargs, "zero": stock_zero})
    for p in sizes:
        exact = p == 4
        if exact:
            # gloo's own reduce-scatter, as stock uses it; our all-to-all adds up in another order
            zero = {"mics_reduce_scatter": "native", "mics_hierarchical_grad_scatter": False, **kwargs.get("zero", {})}
        else:
            zero = kwargs.get("zero", {})
        engine = build(ds_config(p, **{**kwargs, "zero": zero}), **more)
        assert engine.optimizer.mics_groups.partition.size == p
        losses, params = train(engine, steps), full_params(engine)
        assert_losses_close(losses, expected_losses, 0 if exact else tolerance)
        assert_close(params, expected, 0 if exact else tolerance, initial)
        same_on_all_ranks(params)


# In fp32 every pair of values of two settings comes up: micro-steps, clipping, reduce_scatter, contiguous_gradients,
# overlap_comm. One of these cases has all partition sizes, the others the size with both hops. All combinations take
# many minutes more: those are the slow tests.
LONG = ("fp32", 3, 0.5, True, True, True)
FAST = {
    LONG,
    ("fp32", 1, 0.0, True, False, True),
    ("fp32", 3, 0.0, False, True, False),
    ("fp32", 1, 0.5, False, False, True),
    ("fp32", 3, 0.5, True, False, False),
    ("fp32", 1, 0.5, True, True, False),
    ("fp32", 1, 0.0, False, True, True),
    ("bf16", 3, 0.5, True, True, True),
    ("bf16", 1, 0.5, False, False, False),
    ("fp16", 3, 0.5, True, True, True),
    ("fp16", 1, 0.5, False, False, False),
}
CASES = every(("fp32", "bf16", "fp16"), (1, 3), (0.0, 0.5), *[(True, False)] * 3, default=FAST)


def test_every_pair_of_settings_comes_up_in_fp32():
    fast = [case[1:] for case in FAST if case[0] == "fp32"]
    for a, b in itertools.combinations(range(5), 2):
        assert len({(case[a], case[b]) for case in fast}) == 4


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("dtype", "micro_steps", "clip", "reduce_scatter", "contiguous", "overlap"), CASES)
def test_losses_and_parameters_equal_zero3(dtype, micro_steps, clip, reduce_scatter, contiguous, overlap):
    short = (dtype, micro_steps, clip, reduce_scatter, contiguous, overlap) in FAST - {LONG}
    compare(
        [2] if short else [1, 2, 4],
        TOLERANCE[dtype],
        steps=3 if short else STEPS[dtype],
        dtype=dtype,
        micro_steps=micro_steps,
        clip=clip,
        zero={"reduce_scatter": reduce_scatter, "contiguous_gradients": contiguous, "overlap_comm": overlap},
    )


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("checkpointing", "micro_steps"),
    [
        ("reentrant", 3),
        *(slow(*case) for case in [("reentrant", 1), ("non-reentrant", 1)]),
        slow("non-reentrant", 3),  # in test_hops.py with a count of what is sent
    ],
)
def test_activation_checkpointing_changes_nothing(checkpointing, micro_steps):
    compare([2, 4], 1e-6, steps=3, model=lambda: OddNet(checkpointing), micro_steps=micro_steps, clip=0.5)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("dtype", [slow("fp32"), "bf16"])
def test_hierarchical_gather_changes_nothing(dtype):
    """Two simulated nodes of two ranks. The gather is exact, so even p = n stays bit for bit ZeRO-3."""
    with environment(MICS_DS_RANKS_PER_NODE="2"):
        compare([4], 0, steps=3, dtype=dtype, micro_steps=3, clip=0.5, zero={"mics_hierarchical_params_gather": True})


@pytest.mark.ranks(4)
@pytest.mark.parametrize("nodes", ["0011", "0101"])
def test_large_parameters_are_gathered_straight_to_their_place(nodes):
    """Where the nodes of a partition group take turns, they cannot be, and come by way of a buffer."""
    rank, sizes = dist.get_rank(), Sizes(unit=1, bucket=1, whole=1)
    launcher = environment(CROSS_RANK=nodes[rank], LOCAL_RANK=str(nodes[:rank].count(nodes[rank])))
    with launcher, mock.patch.object(groups_module, "sizes_of", return_value=sizes):
        compare([4], 0, steps=3)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("micro_steps", [slow(1), 3])
@pytest.mark.parametrize("method", ["native", "all_to_all"])
@pytest.mark.parametrize(
    ("p", "ranks_per_node"),
    [slow(4, 4), (4, 2), slow(2, 1), (2, 2)],
)
def test_every_reduce_scatter_path_gives_zero3_losses_and_equal_replicas(p, ranks_per_node, method, micro_steps):
    initial, expected_losses, expected = stock_reference(4, micro_steps=micro_steps, clip=0.5)
    with environment(MICS_DS_RANKS_PER_NODE=str(ranks_per_node)):
        config = ds_config(p, micro_steps=micro_steps, clip=0.5, zero={"mics_reduce_scatter": method})
        engine = build(config, inside_init=True)
    assert (engine.optimizer.mics_groups.scatter_hierarchy is not None) == ((p, ranks_per_node) == (4, 2))
    assert_losses_close(train(engine, 4), expected_losses, 1e-6)
    params = full_params(engine)
    assert_close(params, expected, 1e-6, initial)
    same_on_all_ranks(params)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("sub_group_size", [50, slow(200)])
def test_many_sub_groups(sub_group_size):
    compare([1, 2], 1e-6, steps=3, clip=0.5, zero={"sub_group_size": sub_group_size})


@pytest.mark.ranks(4)
def test_persistent_parameters():
    compare([1, 2], 1e-6, steps=3, clip=0.5, micro_steps=2, zero={"stage3_param_persistence_threshold": 100})


@pytest.mark.ranks(4)
@pytest.mark.parametrize("micro_steps", [slow(1), 3])
@pytest.mark.parametrize("where", ["offload_optimizer", slow("offload_param")])
def test_offload_to_host_memory(where, micro_steps):
    compare([1, 2], 1e-6, steps=3, clip=0.5, micro_steps=micro_steps, zero={where: {"device": "cpu"}})


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [slow(1), 2, slow(4)])
@pytest.mark.parametrize("micro_steps", [slow(1), 3])
@pytest.mark.parametrize("clip", [slow(0.0), 0.5])
def test_equals_one_process_on_the_whole_batch(p, micro_steps, clip):
    """Plain PyTorch, without DeepSpeed: the mean loss over all ranks' and micro-steps' data."""
    engine = build(ds_config(p, micro_steps=micro_steps, clip=clip))
    losses, params = train(engine, 8), full_params(engine)

    torch.manual_seed(1234)
    model = OddNet()
    initial = {name: param.detach().clone() for name, param in model.named_parameters()}
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    expected = []
    for step in range(8):
        parts = [model(*batch(step, micro, rank)) for micro in range(micro_steps) for rank in range(4)]
        loss = torch.stack(parts).mean()
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
    # Both sum 4 ranks' gradients in their own order, and clip with 1e-6 added in different places.
    assert_losses_close(losses, expected, 1e-5)
    assert_close(params, {name: param.detach() for name, param in model.named_parameters()}, 1e-5, initial)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [slow(1), 2, slow(4)])
def test_gradient_norm_is_that_of_zero3(p):
    norms = []
    for size in (None, p):
        engine = build(ds_config(size, clip=0.5, micro_steps=2))
        train(engine, 3)
        norms.append(float(engine.get_global_grad_norm()))
    assert abs(norms[0] - norms[1]) <= 1e-6 * norms[0]


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [slow(1), 2, slow(4)])
@pytest.mark.parametrize("first", ["inside", slow("outside")])
def test_a_model_built_inside_zero_init_trains_alike(p, first):
    results = []
    for inside in (first == "inside", first != "inside"):
        engine = build(ds_config(p, clip=0.5), inside_init=inside)
        results.append((train(engine, 3), full_params(engine)))
    assert results[0][0] == results[1][0]
    assert_close(results[0][1], results[1][1], 0)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [slow(1), 2])
def test_a_model_built_partly_inside_and_partly_outside(p):
    """LoRA adapters and resized embeddings come to be outside of a model that was built inside."""

    class Mixed(nn.Module):
        def __init__(self, config: dict | None, given: dict | None) -> None:
            super().__init__()
            torch.manual_seed(dist.get_rank())  # replicas must not depend on it
            with deepspeed.zero.Init(config_dict_or_path=given, enabled=config is not None):
                self.inside = nn.Linear(WIDTH, 13)
            self.outside = nn.Linear(13, WIDTH)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (self.outside(torch.tanh(self.inside(x))) - y).pow(2).mean()

    stock = build(ds_config(), lambda: Mixed(ds_config(), ds_config()))
    expected_losses, expected = train(stock, 4), full_params(stock)
    # In the second case zero.Init was not told of MiCS, and only the engine is.
    for given in (ds_config(p), ds_config()):
        engine = build(ds_config(p), lambda: Mixed(ds_config(p), given))  # noqa: B023
        assert {param.mics_groups.partition.size for param in engine.module.parameters()} == {p}
        assert_losses_close(train(engine, 4), expected_losses, 1e-6)
        params = full_params(engine)
        assert_close(params, expected, 1e-6)
        same_on_all_ranks(params)


@pytest.mark.ranks(4, fresh=True)  # DeepSpeed keeps the mpu in a module global
@pytest.mark.parametrize("p", [slow(1), 2])
def test_partition_groups_are_cut_from_the_data_parallel_group(p):
    mpu = DataParallelUnit()
    results = []
    for size in (None, p):
        zero = {"mics_reduce_scatter": "native"} if size == 2 else {}
        engine = build(ds_config(size, clip=0.5, micro_steps=2, zero=zero), mpu=mpu)
        # both ranks of a model-parallel group see the same data
        results.append((train(engine, 3, rank=mpu.get_data_parallel_rank()), full_params(engine)))
    groups = engine.optimizer.mics_groups
    assert groups.full.ranks == (dist.get_rank() % 2, dist.get_rank() % 2 + 2)
    assert groups.partition.size == p
    tolerance = 0 if p == 2 else 1e-6
    assert_losses_close(results[1][0], results[0][0], tolerance)
    assert_close(results[1][1], results[0][1], tolerance)


@pytest.mark.ranks(3)
@pytest.mark.parametrize("micro_steps", [slow(1), 3])
def test_an_odd_number_of_ranks(micro_steps):
    """Three replicas: dividing by 3 rounds, so nothing is exact here but the replicas' equality."""
    initial, expected_losses, expected = stock_reference(4, micro_steps=micro_steps, clip=0.5)
    for p in (1, 3):
        engine = build(ds_config(p, micro_steps=micro_steps, clip=0.5))
        assert_losses_close(train(engine, 4), expected_losses, 1e-6)
        params = full_params(engine)
        assert_close(params, expected, 1e-6, initial)
        same_on_all_ranks(params)
