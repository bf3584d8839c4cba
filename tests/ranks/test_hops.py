"""Which collectives run when: hop 1 every micro-step in the partition group, hop 2 once per boundary."""

from __future__ import annotations

from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from cases import pairs, slow
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from helpers import (
    DTYPES,
    OddNet,
    assert_close,
    assert_losses_close,
    batch,
    build,
    ds_config,
    environment,
    full_params,
    train,
)
from packaging.version import Version
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mics_ds.check.meter import CommMeter
from mics_ds.comm import groups as groups_module
from mics_ds.comm.collectives import GATHER_INTER, GATHER_INTRA, HOP1, HOP1_INTER, HOP2
from mics_ds.comm.sizes import ON_ACCELERATORS
from mics_ds.zero.units import GradientShards

HOP1_KINDS = ("reduce_scatter", "all_to_all")
SCALAR = 64  # bytes; collectives up to this size agree on norms and flags


def by_default_not(*cases: tuple) -> list[Any]:
    return [slow(*case) for case in cases]


def micro_step(engine: Any, index: int) -> CommMeter:
    with CommMeter() as meter:
        loss = engine(*batch(9, index, dist.get_rank(), next(engine.module.parameters()).dtype))
        engine.backward(loss)
        engine.step()
    return meter


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("p", "micro_steps", "checkpointing", "overlap"),
    pairs((1, 2, 4), (1, 3), (None, "reentrant", "non-reentrant"), (True, False)),
)
def test_one_hop2_per_boundary_and_only_partition_traffic_before_it(p, micro_steps, checkpointing, overlap):
    config = ds_config(p, micro_steps=micro_steps, clip=0.5, zero={"overlap_comm": overlap})
    engine = build(config, lambda: OddNet(checkpointing))
    train(engine, 2)  # the first steps trace the order of modules
    groups = engine.optimizer.mics_groups
    for index in range(micro_steps):
        meter = micro_step(engine, index)
        large = [item for item in meter.collectives if item.payload > SCALAR or item.kind in HOP1_KINDS]
        boundary = index == micro_steps - 1
        hop2 = meter.select("all_reduce", label=HOP2)
        assert hop2 == [] or groups.replication is not None
        assert {item.ranks for item in hop2} <= {groups.replication and groups.replication.ranks}
        if boundary and p < 4:
            # the whole shard of all gradients, every element once: M / p bytes
            assert sum(item.payload for item in hop2) == engine.optimizer.gradient_shards.nbytes
            # a parameter that is not used divides a unit, and comes after both parts
            assert len(hop2) <= 3 or overlap
        else:
            assert hop2 == []
        if not boundary:
            # nothing at all leaves the partition group, not even a scalar
            assert {item.ranks for item in meter.collectives} <= {groups.partition.ranks}
        for item in large:
            if item not in hop2:
                assert item.ranks == groups.partition.ranks
                assert item.kind in ("all_gather", *HOP1_KINDS)
        assert p == 1 or any(item.kind in HOP1_KINDS for item in large)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [1, 2, 4])
def test_bytes_per_step_follow_the_formula(p):
    """Per optimizer step and rank: 2s all-gathers and s reduce-scatters of M, and 2 (r-1)/r · M/p for hop 2."""
    width, layers, s = 16, 4, 3
    model = lambda: Chain(width, layers)  # noqa: E731
    live = {"stage3_max_live_parameters": 1, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    engine = build(ds_config(p, micro_steps=s, zero=live), model)
    for step in range(2):
        for index in range(s):
            chain_step(engine, step * s + index, width)
    with CommMeter() as meter:
        for index in range(s):
            chain_step(engine, index, width)
    m = 4 * layers * width * width
    share, r = (p - 1) / p, 4 // p
    assert meter.bytes_sent("all_gather") == 2 * s * share * m
    assert sum(meter.bytes_sent(kind) for kind in HOP1_KINDS) == s * share * m
    assert sum(item.bytes_sent for item in meter.select("all_reduce", label=HOP2)) == 2 * (r - 1) / r * m / p


@pytest.mark.ranks(4)
def test_a_megabyte_is_gathered_and_reduced_by_one_collective_in_each_stage():
    """With the sizes of accelerators. Pieces of 128 KiB would be bound by latency."""
    width, layers = 512, 3
    zero = {"stage3_prefetch_bucket_size": 0, "reduce_bucket_size": width * width}
    counts = []
    for p in (None, 4):
        sizes = mock.patch.object(groups_module, "sizes_of", return_value=ON_ACCELERATORS)
        with sizes, environment(MICS_DS_RANKS_PER_NODE="2"):
            engine = build(ds_config(p, zero=zero), lambda: Chain(width, layers))
        for step in range(3):
            with CommMeter() as meter:
                chain_step(engine, step, width)
        if p is None:
            counts.append((len(meter.select("all_gather")), len(meter.select("reduce_scatter"))))
        else:
            gathers, reductions = (GATHER_INTER, GATHER_INTRA), (HOP1, HOP1_INTER)
            counts += [
                (len(meter.select(label=one)), len(meter.select(label=other)))
                for one, other in zip(gathers, reductions)
            ]
        engine.destroy()
    assert counts[0] == counts[1] == counts[2]
    assert counts[0][1] == layers


class Chain(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.pow(2).mean()


def chain_step(engine: Any, index: int, width: int) -> None:
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(index)).requires_grad_()
    engine.backward(engine(x))
    engine.step()


class Alternating(nn.Module):
    """Two branches with integer-valued gradients: the data says which branch a micro-step uses."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 1, bias=False)
        self.right = nn.Linear(3, 1, bias=False)

    def forward(self, x: torch.Tensor, left: bool) -> torch.Tensor:
        return (self.left if left else self.right)(x).sum()


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [1, 2, 4])
def test_a_parameter_used_only_in_an_earlier_micro_step_is_averaged_over_replicas(p):
    from deepspeed.utils import safe_get_full_grad

    engine = build(ds_config(p, micro_steps=4), Alternating, optimizer=lambda items: torch.optim.SGD(items, lr=1.0))
    before = {name: values.clone() for name, values in gathered(engine).items()}
    rank = dist.get_rank()
    for index, left in enumerate([True, False, False, False]):
        # gas divides the loss by 4, ranks are averaged: d loss / d left = mean over ranks of 4 * (rank + 1) / 4
        x = torch.full((1, 3), 4.0 * (rank + 1) * (index + 1))
        engine.backward(engine(x, left))
        if index == 3:
            assert torch.equal(safe_get_full_grad(engine.module.left.weight), torch.full((1, 3), 2.5))
            assert torch.equal(safe_get_full_grad(engine.module.right.weight), torch.full((1, 3), 2.5 * (2 + 3 + 4)))
        engine.step()
    after = gathered(engine)
    assert torch.equal(after["left.weight"], before["left.weight"] - 2.5)
    assert torch.equal(after["right.weight"], before["right.weight"] - 2.5 * 9)


def gathered(engine: Any) -> dict[str, torch.Tensor]:
    from helpers import full_params

    return full_params(engine)


UNMANAGED = pytest.param(
    "unmanaged",
    marks=pytest.mark.skipif(
        not hasattr(DeepSpeedZeroOptimizer_Stage3, "finalize_gradient_accumulation_boundary"),
        reason="DeepSpeed 0.18 has no such mode",
    ),
)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [slow(1), 2, slow(4)])
@pytest.mark.parametrize("way", [UNMANAGED, "set_boundary", "short_window"])
def test_the_engine_is_asked_for_the_boundary(p, way):
    """Whoever decides where the boundary is, gradients are means over all ranks when the step is taken."""
    extra = {"managed_gradient_accumulation": False} if way == "unmanaged" else {}
    engine = build(
        ds_config(p, micro_steps=3, **extra), Alternating, optimizer=lambda items: torch.optim.SGD(items, lr=1.0)
    )
    before = gathered(engine)["left.weight"]
    rank = dist.get_rank()
    micro_steps = 2 if way == "short_window" else 3
    for index in range(micro_steps):
        if way != "unmanaged":
            engine.set_gradient_accumulation_boundary(index == micro_steps - 1)
        engine.backward(engine(torch.full((1, 3), 3.0 * (rank + 1)), True))
    engine.step()
    assert torch.equal(gathered(engine)["left.weight"], before - 2.5 * micro_steps)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("ranks_per_node", [4, 2])
def test_the_comms_logger_shows_each_stage_by_itself(ranks_per_node):
    import deepspeed

    p = 4 if ranks_per_node == 2 else 2
    logged = {"comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False}}
    log = deepspeed.comm.comm.comms_logger
    log.comms_dict.clear()
    try:
        with environment(MICS_DS_RANKS_PER_NODE=str(ranks_per_node)):
            engine = build(ds_config(p, **logged))
        train(engine, 3)
        summary = deepspeed.comm.log_summary(return_dict=True)
    finally:
        log.enabled = False
        log.comms_dict.clear()
    names = set(summary.get("summary", summary))
    assert f"mics {HOP1}" in names
    if ranks_per_node == 2:
        assert {f"mics {label}" for label in (GATHER_INTER, GATHER_INTRA, HOP1_INTER)} <= names
    else:
        assert f"mics {HOP2}" in names


@pytest.mark.ranks(4)
@pytest.mark.parametrize("method", ["native", "all_to_all"])
def test_with_one_replica_not_one_byte_more_than_zero3(method):
    """p = n: the same collectives as stock, and not even an agreement on a norm on top."""
    sent = []
    for p in (None, 4):
        zero = {"mics_reduce_scatter": method} if p else {}
        engine = build(ds_config(p, micro_steps=2, clip=0.5, zero=zero))
        train(engine, 2)
        meters = [micro_step(engine, index) for index in range(2)]
        sent.append([sum(item.bytes_sent for item in meter.collectives) for meter in meters])
    assert sent[1] == sent[0]


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("p", "overlap"), [(2, True), (1, False), *by_default_not((1, True), (2, False))])
def test_several_backward_passes_of_one_step_share_one_hop2(p, overlap):
    """The losses of PPO's policy and value, or of a GAN: every pass may be the last, and stock has no objection."""
    results = []
    for size in (None, p):
        engine = build(ds_config(size, clip=0.5, zero={"overlap_comm": overlap}))
        losses = []
        for step in range(3):
            with CommMeter() as meter:
                for half in range(2):
                    loss = engine(*batch(step, half, dist.get_rank()))
                    engine.backward(loss)
                    losses.append(loss.item())
                engine.step()
            if size is not None:
                averaged = sum(item.payload for item in meter.select("all_reduce", label=HOP2))
                # in the first step nobody can know yet that there will be two
                assert averaged == engine.optimizer.gradient_shards.nbytes * (1 if step else 2), step
        results.append((losses, full_params(engine)))
    assert_losses_close(results[1][0], results[0][0], 1e-6)
    assert_close(results[1][1], results[0][1], 1e-6)


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("p", "micro_steps"), [(1, 3), (2, 1), *by_default_not((1, 1), (2, 3))])
def test_offloaded_gradients_go_through_the_device_in_parts(p, micro_steps):
    """As on a GPU, where hop 2 cannot work in host memory: a part is of a reduce bucket's shard, or one parameter's."""
    zero = {"offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 120}
    results = []
    with mock.patch.object(GradientShards, "is_here", False):
        for size in (None, p):
            engine = build(ds_config(size, clip=0.5, micro_steps=micro_steps, zero=zero))
            losses = train(engine, 3)
            meters = [micro_step(engine, index) for index in range(micro_steps)]
            results.append((losses, full_params(engine)))
    parts = [item.payload for item in meters[-1].select("all_reduce", label=HOP2)]
    buffer = engine.optimizer.gradient_shards
    shards = [end - start for start, end in engine.optimizer.gradient_ranges().values()]
    assert max(parts) <= max(120 // p, *shards) * buffer.itemsize
    assert len(parts) > 1
    assert sum(parts) == buffer.nbytes
    assert all(meter.select(label=HOP2) == [] for meter in meters[:-1])
    assert_losses_close(results[1][0], results[0][0], 1e-6)
    assert_close(results[1][1], results[0][1], 1e-6)


class HostReads(TorchDispatchMode):
    """Counts where the host waits for a value of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("p", "dtype"),
    [(1, "fp16"), (2, "bf16"), (4, "fp16"), *by_default_not((2, "fp16"), (1, "bf16"), (1, "fp32"), (2, "fp32"))],
)
def test_a_step_asks_no_more_than_that_of_zero3(p, dtype):
    """Replicas see an overflow in the same bits. On top of stock's questions comes one about norms, and the flags."""
    asked, reads = [], []
    for size in (None, p):
        engine = build(ds_config(size, dtype=dtype, clip=0.5))
        train(engine, 2)
        engine.backward(engine(*batch(2, 0, dist.get_rank(), DTYPES[dtype])))
        with CommMeter() as meter, HostReads() as host:
            engine.step()
        asked.append([item.kind for item in meter.collectives if item.label != HOP2])
        reads.append(host.count)
    more = [] if p == 4 else ["all_reduce"]
    # overlap_comm starts hop 2 and asks for the flags when the pass ends
    assert asked[1] == [*asked[0], *more]
    assert reads[1] == reads[0]


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    "key",
    [
        "stage3_allgather_sequential",
        pytest.param(
            "stage3_use_all_reduce_for_fetch_params",
            marks=pytest.mark.skipif(
                Version(deepspeed.__version__) < Version("0.19"), reason="on gloo, 0.18 itself gathers garbage by it"
            ),
        ),
    ],
)
def test_another_way_of_gathering_is_deepspeeds_own(key):
    """Both are about gathers over all ranks at once, so there is none in two stages then."""
    results = []
    for p in (None, 4):
        with environment(MICS_DS_RANKS_PER_NODE="2"):
            engine = build(ds_config(p, zero={key: True}))
        losses = train(engine, 2)
        with CommMeter() as meter:
            losses.append(train(engine, 1)[0])
        results.append(losses)
        gathers = [(item.kind, item.payload) for item in meter.collectives if item.kind != "all_to_all"]
        if p is None:
            expected = sorted(item for item in gathers if item[0] != "reduce_scatter")
        else:
            assert engine.optimizer.mics_groups.hierarchy is not None
            assert meter.select(label=GATHER_INTER) == meter.select(label=GATHER_INTRA) == []
            assert sorted(gathers) == expected
    assert_losses_close(results[1], results[0], 1e-6)
