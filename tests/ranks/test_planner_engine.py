"""The planner against real engines: bytes they hold, collectives they issue, their peak."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from cases import slow
from helpers import OddNet, build, destroy_engines, ds_config, train
from packaging.version import Version
from torch import nn

from mics_ds.check.meter import CommMeter
from mics_ds.planner.machine import Link, Machine
from mics_ds.planner.memory import memory
from mics_ds.planner.plan import mics, predict, zero3
from mics_ds.planner.timeline import Player, Scheme, StepTime
from mics_ds.planner.trace import model_from_module
from mics_ds.planner.workload import Workload, ZeroSettings

CPU = Machine(
    name="these processors",
    gpus_per_node=4,
    memory=2**30,
    flops={"fp32": 1e9, "bf16": 1e9, "fp16": 1e9},
    efficiency=1.0,
    intra=Link(1e9, 0),
    inter=Link(1e9, 0),
    backend="gloo",
    streams=False,
)

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01),
    "sgd_momentum": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01),
}


def storages(tensors: Any) -> dict[int, int]:
    """Bytes by address, views of one storage once."""
    found = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def held(engine: Any) -> dict[str, int]:
    """Bytes of what an engine keeps between steps, by part."""
    optimizer, params = engine.optimizer, list(engine.module.parameters())
    masters = optimizer.fp32_partitioned_groups_flat
    states = [value for state in optimizer.optimizer.state.values() for value in state.values()]
    world = getattr(optimizer, "world_states", None)
    gradients = [vars(optimizer)["grad_partitions_flat_buffer"], getattr(world, "_mean_slices", None)]
    buckets = [getattr(bucket, "buffer", None) for bucket in optimizer.ipg_buckets.values()]
    parts = {
        "parameters": storages(param.ds_tensor for param in params),
        "gradients": storages(gradients),
        "master": storages(masters),
        "optimizer": storages(value for value in states if isinstance(value, torch.Tensor)),
        "exchange": storages(master.grad for master in masters),
        "persistent": storages(param.data for param in params if param.data.numel()),
        "bucket": storages(buckets),
    }
    # no two parts share a storage, so the table of the planner counts nothing twice
    for shared in parts["persistent"].keys() & parts["parameters"].keys():
        del parts["persistent"][shared]  # with p = 1 a parameter is its own shard
    keys = [(key, name) for name, part in parts.items() for key in part]
    assert len(keys) == len(dict(keys)), sorted(keys)
    return {name: sum(part.values()) for name, part in parts.items()}


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("dtype", "optimizer", "zero", "extra"),
    [
        ("fp32", "adamw", {}, {}),
        slow("bf16", "adamw", {}, {}),
        ("fp16", "sgd_momentum", {}, {}),
        slow("fp32", "sgd", {"contiguous_gradients": False}, {}),
        slow("fp32", "adagrad", {}, {}),
        slow("bf16", "adamw", {"stage3_param_persistence_threshold": 20}, {}),
        slow("fp32", "adamw", {"sub_group_size": 60}, {}),
        ("bf16", "adamw", {}, {"data_types": {"grad_accum_dtype": "fp32"}}),
        ("bf16", "adamw", {"offload_optimizer": {"device": "cpu"}}, {}),
        slow("fp32", "adamw", {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}, {}),
    ],
)
def test_model_states_to_the_byte(dtype, optimizer, zero, extra):
    for p, states in [(None, ""), *((p, "partition") for p in (4, 2, 1)), *((p, "world") for p in (2, 1))]:
        more = {"mics_optimizer_states": states} if p else {}
        config = ds_config(p, dtype=dtype, zero={**zero, **more}, **extra)
        engine = build(config, optimizer=OPTIMIZERS[optimizer])
        train(engine, 1)
        found = held(engine)
        settings = ZeroSettings.from_ds(config["zero_optimization"])
        accumulation = 4 if extra else 0
        job = Workload(
            model_from_module(engine.module), 2, 1, dtype, optimizer=optimizer, zero=settings,
            accumulation_itemsize=accumulation,
        )  # fmt: skip
        planned = memory(job, Scheme(p, world_states=states == "world"), 4, StepTime(), streams=False)
        expected = {name: getattr(planned, name) for name in ("parameters", "gradients", "master", "optimizer")}
        on_host = 0
        if settings.offload_optimizer:
            on_host += sum(found.pop(name) for name in ("gradients", "master", "optimizer", "exchange"))
            assert expected["gradients"] == expected["master"] == expected["optimizer"] == 0
        else:
            assert found.pop("exchange") == 0
        if settings.offload_param:
            on_host += found.pop("parameters")
            assert expected["parameters"] == 0
        assert planned.host.offloaded == on_host, (p, states)
        assert found.pop("bucket") == planned.bucket, (p, states)
        persistent = found.pop("persistent")
        assert persistent == planned.persistent, f"p = {p} {states}: {persistent}, planned {planned.persistent}"
        assert found == {name: value for name, value in expected.items() if name in found}, (p, states)


class Deep(nn.Module):
    """Layers of several sizes, so that what is gathered together shows in the bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(7, 7) for _ in range(6))
        self.wide = nn.Linear(7, 31)
        self.back = nn.Linear(31, 7)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return (self.back(self.wide(x)) - y).float().pow(2).mean()


class Recorder(Player):
    """Writes down what the play gathers and reduces."""

    def _gather(self, params: list[int], backward: bool) -> None:
        p = self.costs.p
        self.gathered.append(sum(-(-self.numel[param] // p) * p for param in params))
        super()._gather(params, backward)


@pytest.mark.ranks(4)
@pytest.mark.skipif(Version(deepspeed.__version__) < Version("0.19"), reason="0.18 groups its gathers otherwise")
@pytest.mark.parametrize("p", [slow(None), 2])
@pytest.mark.parametrize(
    "limits",
    [
        {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0},
        {"stage3_prefetch_bucket_size": 100, "stage3_max_reuse_distance": 0},
        {"stage3_prefetch_bucket_size": 100, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 200},
        {"stage3_prefetch_bucket_size": 60, "stage3_max_reuse_distance": 300},
        {"stage3_prefetch_bucket_size": 10**6, "stage3_max_reuse_distance": 10**6},
    ],
)
def test_gathers_are_those_of_the_engine(p, limits):
    """Every all-gather of two micro-steps in order, its bytes to the last one."""
    config = ds_config(p, zero=limits, micro_steps=2)
    engine = build(config, Deep, optimizer=OPTIMIZERS["sgd"])
    train(engine, 2)
    with CommMeter() as meter:
        train(engine, 1)
    # DeepSpeed gathers a fetch of several parameters in one collective
    actual = [item.payload // 4 for item in meter.select("all_gather") if len(item.ranks) == (p or 4)]
    job = Workload(
        model_from_module(engine.module), 2, 2, "fp32", optimizer="sgd",
        zero=ZeroSettings.from_ds(config["zero_optimization"]),
    )  # fmt: skip
    player = Recorder(CPU, job, Scheme(p), 4)
    player.gathered = []
    for _ in range(3):  # two to get going, as the engine had
        player.micro_step(last=False)
        player.micro_step(last=True)
        before, player.gathered = player.gathered, []
    assert actual == before, f"{actual}\n{before}"


def resident(field: str) -> int:
    """Bytes of a field of this process's status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def give_back_freed_blocks() -> None:
    """Let glibc return every block of some size when it is freed; otherwise the peak is mostly what nobody uses."""
    m_mmap_threshold, m_trim_threshold = -3, -1
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_threshold, 1 << 18)
    libc.mallopt(m_trim_threshold, 1 << 18)


class Wide(nn.Module):
    """Big enough that libraries and small change do not count."""

    def __init__(self, width: int = 1024, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width, bias=False), nn.Tanh(), nn.Linear(4 * width, width, bias=False))
            for _ in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.pow(2).mean()


@pytest.mark.ranks(4, fresh=True, timeout=300)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the peak")
@pytest.mark.parametrize(
    ("p", "optimizer", "batch", "overlap"),
    [
        slow(2, "adamw", 8, True),
        slow(2, "sgd", 1024, True),
        slow(None, "sgd", 8, True),
        slow(2, "sgd", 8, True),
        slow(4, "adamw", 512, True),
        slow(1, "sgd_momentum", 512, False),
    ],
)
def test_the_peak_within_a_tenth(p, optimizer, batch, overlap):
    """Resident memory that a rank needs beyond its libraries, at its fullest moment."""
    give_back_freed_blocks()
    width = 1024
    layer = 8 * width * width
    config = ds_config(
        p,
        zero={
            "stage3_prefetch_bucket_size": layer // 2,
            "stage3_max_live_parameters": layer,
            "stage3_max_reuse_distance": 0,
            "reduce_bucket_size": layer // 2,
            "overlap_comm": overlap,
        },
        micro_steps=2,
    )
    with torch.device("meta"):
        model = model_from_module(Wide(), (torch.zeros(1, width),), precision="fp32")
    settings = ZeroSettings.from_ds(config["zero_optimization"])
    job = Workload(model, batch, 2, "fp32", optimizer=optimizer, zero=settings)
    warm_up(config)
    before = resident("VmRSS")
    engine = build(config, Wide, optimizer=OPTIMIZERS[optimizer], inside_init=True)
    for step in range(3):
        if step == 1:  # the first steps allocate and trace
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        for _ in range(2):
            loss = engine(torch.ones(batch, width))
            engine.backward(loss)
            engine.step()
        del loss
    measured = resident("VmHWM") - before
    machine = replace(CPU, flops={"fp32": 1e12})
    system = zero3(machine, job) if p is None else mics(machine, job, 4, p)
    planned = predict(machine, job, system, 4).memory
    error = torch.tensor([abs(planned.peak / measured - 1)])
    dist.all_reduce(error, op=dist.ReduceOp.MAX)
    assert error.item() <= 0.10, f"{measured / 1e6:.0f} MB measured, {planned.peak / 1e6:.0f} MB planned: {planned}"


def warm_up(config: dict[str, Any]) -> None:
    """Load and start everything that the first engine of a process would."""
    engine = build(config, OddNet)
    train(engine, 2)
    destroy_engines()
