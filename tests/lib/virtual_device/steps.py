"""Steps in virtual time: 40 layers, weights with decay and biases without, on imagined accelerators, 8 to a node.

[Note: the lower bound]

Sizes of buckets, of units of hop 2 and of what is gathered ahead are given, and so is their order. A link carries one
collective at a time, its latency included, and L layers take f seconds each forwards and 2f backwards. A step takes the
forward pass F, the backward pass B, two agreements on the norm, and the rest: what the same step takes beside the
layers if communication takes no time (optimizer, copies, the host).

    F  >=  the rest until the first layer + L·f, or
           gather of all biases + gather of a layer + (L - 1) · max(f, gather of a layer) + f    (one is gathered ahead)
    F  >=  traffic on a link + f                     the last layer runs when all layers were gathered
    B  >=  2f + (L - 1) · max(2f, gather of a layer) + hop 1 of the last bucket
    B  >=  2f · layers + hop 1 of the bucket that completes a unit of hop 2 + hop 2 of that unit and of all that follow
    B  >=  traffic on a link, and the last unit of hop 2 if that uses another one

for each kind of link and for each unit. The layers that are still gathered from the forward pass do not count for B.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any
from unittest import mock

import torch
from helpers import build, destroy_engines, ds_config
from torch import nn

from mics_ds.comm import groups
from mics_ds.comm.sizes import ON_ACCELERATORS, Sizes
from mics_ds.planner.machine import GroupForm, Link
from mics_ds.planner.model import Block, Model, Unit
from mics_ds.planner.plan import mics
from mics_ds.planner.timeline import StepTime, step_time
from mics_ds.planner.workload import Workload, ZeroSettings
from virtual_device.accelerator import DEVICE
from virtual_device.comm import Issued
from virtual_device.costs import SMALL, Cluster, Costs
from virtual_device.fleet import imagined_ranks
from virtual_device.schedule import Task, play

PER_NODE = 8
HIDDEN, LAYERS, SAMPLES = 512, 40, 2
SCALE = 190  # a layer of 512 x 512 weights and 512 biases stands for one of 50 million and 97,000, 100 MB
WEIGHT, LAYER = HIDDEN * HIDDEN, HIDDEN * HIDDEN + HIDDEN
ITEM = 2
LIVE = 4  # layers that may be gathered at a time
FORWARD_S = {"balanced": 4e-3, "network-bound": 1e-3}  # of one layer
LIMITS = {
    # "auto" of Hugging Face's Trainer, by which a bucket has one layer, and one layer is gathered ahead
    "reduce_bucket_size": HIDDEN * HIDDEN,
    "prefetch_bucket_size": int(0.9 * HIDDEN * HIDDEN),
    # DeepSpeed's default: biases stay gathered
    "param_persistence_threshold": 100_000 // SCALE,
    "max_live_parameters": LIVE * LAYER,
    "max_reuse_distance": 0,
}
SIZES = Sizes(*(value // SCALE for value in astuple(ON_ACCELERATORS)[:3]))
HOP2 = ("all_reduce", "reduce_scatter_tensor")


@dataclass(frozen=True)
class Case:
    """MiCS on a cluster."""

    p: int
    nodes: int
    setting: str
    states: str = "partition"
    staged: bool = True

    @property
    def ranks(self) -> int:
        return PER_NODE * self.nodes

    @property
    def replicas(self) -> tuple[int, ...]:
        """The replication group of rank 0."""
        return tuple(range(0, self.ranks, self.p))

    @property
    def shard_bytes(self) -> int:
        return LAYERS * (WEIGHT + HIDDEN) // self.p * ITEM

    @property
    def unit_bytes(self) -> int:
        """Least bytes of a unit of hop 2."""
        return SIZES.unit_of(self.shard_bytes)

    @property
    def cluster(self) -> Cluster:
        """NVLink of 250 GB/s, 400 Gbit/s to a node, and matrix products that take as long as the setting says."""
        flops = SCALE * 2 * SAMPLES * WEIGHT / FORWARD_S[self.setting]
        links = Link(250e9, 2e-5), Link(50e9, 4e-5)
        return Cluster("virtual", PER_NODE, 80e9, {"bf16": flops}, 1.0, *links, memory_bandwidth=2e12)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.float().pow(2).mean()


def step(engine: Any) -> torch.Tensor:
    # so that the first layer's backward costs what others' do
    x = torch.ones(SAMPLES, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    loss = engine(x)
    engine.backward(loss)
    engine.step()
    return loss.detach()


def decay_groups(params: list[Any]) -> torch.optim.Optimizer:
    matrices = [param for param in params if getattr(param, "ds_shape", param.shape)[1:]]
    vectors = [param for param in params if not getattr(param, "ds_shape", param.shape)[1:]]
    split = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.SGD(split, lr=0.01, momentum=0.9, fused=True)


@contextmanager
def engine_of(case: Case) -> Iterator[Any]:
    limits = {name if name.startswith("reduce") else f"stage3_{name}": value for name, value in LIMITS.items()}
    zero = {"mics_reduce_scatter": "native", "mics_optimizer_states": case.states, "overlap_comm": True, **limits}
    if not case.staged:
        zero |= {"mics_hierarchical_params_gather": False, "mics_hierarchical_grad_scatter": False}
    with mock.patch.object(groups, "sizes_of", return_value=SIZES), imagined_ranks(case.ranks, PER_NODE):
        engine = build(ds_config(case.p, dtype="bf16", zero=zero), Stack, optimizer=decay_groups)
        losses = [step(engine).item() for _ in range(3)]  # DeepSpeed records its trace in the first two
        assert losses == sorted(losses, reverse=True), "imagined ranks have the same data, so the loss falls as for one"
        yield engine
        destroy_engines()


@dataclass
class Step:
    """One step out of several that follow each other."""

    seconds: float
    compute: float
    """Seconds if communication took none."""
    until_first_layer: float
    """Of those, from the first collective after the optimizer's update to the first layer."""
    issued: list[Issued]
    tasks: list[Task]

    @property
    def exposed(self) -> float:
        return self.seconds - self.compute

    def count(self, ranks: tuple[int, ...], kinds: tuple[str, ...]) -> int:
        """Return how many collectives of these kinds there were, except agreements on a few numbers."""
        return sum(item.ranks == ranks and item.kind in kinds and item.payload > SMALL for item in self.issued)


def measure(case: Case) -> Step:
    """Measure the second of two steps in a row."""
    costs, ends = Costs(case.cluster, SCALE, "bf16"), []
    with engine_of(case) as engine, DEVICE.watching(costs.operation, costs.collective, launch_cost=3e-6) as device:
        for _ in range(2):
            device.communication.issued.clear()
            step(engine)
            ends.append(device.machine.last_task(device.machine.default))
        tasks, issued = list(device.machine.tasks), list(device.communication.issued)
    alone = [replace(task, seconds=0.0, transfer=0.0) if task.link else task for task in tasks]
    play(alone)
    compute, until_first_layer = ends[1].end - ends[0].end, _until_first_layer(alone)
    play(tasks)
    seconds = ends[1].end - ends[0].end
    return Step(seconds, compute, until_first_layer, issued, [task for task in tasks if task.start >= ends[0].end])


def _until_first_layer(tasks: list[Task]) -> float:
    """Seconds from the first gather after an update to the first layer of the step that follows, the last one."""
    names = [task.name.split()[0] for task in tasks]
    layers = [index for index, name in enumerate(names) if name == "aten::addmm"]
    norm = max(index for index, name in enumerate(names[: layers[-LAYERS]]) if name == "all_reduce")
    first = next(task for task, name in zip(tasks[norm:], names[norm:]) if name == "all_gather_into_tensor")
    return tasks[layers[-LAYERS]].start - first.start


# --------------------------------------------------------------------------------------------------
# What a step must take, and what the planner says


@dataclass(frozen=True)
class Seconds:
    """Of a collective, and of each link that it needs."""

    inter: float = 0.0
    intra: float = 0.0
    beside: float = 0.0
    """How long both links are busy at the same time."""

    @property
    def whole(self) -> float:
        return self.inter + self.intra - self.beside


def exposed_at_least(case: Case, step: Step) -> float:
    """Return the seconds of communication that no schedule hides, see [Note: the lower bound]."""
    cluster, f = case.cluster, FORWARD_S[case.setting]
    partition = cluster.partition_form(case.ranks, case.p)
    replication = cluster.replication_form(case.ranks, case.p)
    nodes, k = partition.nodes, partition.per_node

    def seconds(operation: str, elements: float, form: GroupForm) -> float:
        return cluster.formula(operation, elements * SCALE * ITEM, form)

    def over_partition(operation: str, elements: float, by_node: bool = False) -> Seconds:
        if nodes == 1:
            return Seconds(intra=seconds(operation, elements, partition))
        inter = seconds(operation, elements / k, GroupForm(nodes, 1, k))
        if not by_node:
            return Seconds(inter, seconds(operation, elements, GroupForm(1, k)))
        one = seconds(operation, elements / nodes, GroupForm(1, k))  # see start_all_gather_whole_hierarchical
        return Seconds(inter, nodes * one, beside=one)

    gather = over_partition("all_gather", WEIGHT, by_node=True)
    hop1 = over_partition("stock_reduce_scatter", LAYER)
    each = -(-case.unit_bytes // (case.shard_bytes // LAYERS))  # layers in a unit
    units = [min(each, LAYERS - start) for start in range(0, LAYERS, each)] if len(case.replicas) > 1 else []
    hop2 = [seconds("all_reduce", layers * LAYER / case.p, replication) for layers in units]
    first = over_partition("all_gather", HIDDEN * LAYERS).whole + gather.whole
    forward = max(
        step.until_first_layer + LAYERS * f,
        first + (LAYERS - 1) * max(f, gather.whole) + f,
        LAYERS * max(gather.inter, gather.intra) + f,
    )
    done = [min(LAYERS, each * (index + 1)) for index in range(len(units))]
    backward = max(
        2 * f + (LAYERS - 1) * max(2 * f, gather.whole) + hop1.whole,
        *(2 * f * layers + hop1.whole + sum(hop2[index:]) for index, layers in enumerate(done)),
        (LAYERS - LIVE) * gather.inter + LAYERS * hop1.inter + sum(hop2),
        (LAYERS - LIVE) * gather.intra + LAYERS * hop1.intra + sum(hop2[-1:]),
    )
    norms = sum(cluster.formula("all_reduce", 0, form) for form in (partition, replication))
    return forward + backward + norms - step.until_first_layer - 3 * LAYERS * f


def planned(case: Case) -> StepTime:
    block = Block((Unit((WEIGHT * SCALE, HIDDEN * SCALE), 2.0 * WEIGHT * SCALE),), repeat=LAYERS)
    zero = ZeroSettings(**{name: value * SCALE for name, value in LIMITS.items()})
    job = Workload(Model("stack", (block,), 1), SAMPLES, 1, "bf16", optimizer="sgd_momentum", zero=zero)
    system = mics(case.cluster, job, case.ranks, case.p, world_states=case.states == "world")
    return step_time(case.cluster, job, replace(system, native_scatter=True), case.ranks)


def row(case: Case, step: Step) -> str:
    """Milliseconds, for people: of the step, as planned, exposed, and exposed at least."""
    times = (step.seconds, planned(case).total, step.exposed, exposed_at_least(case, step))
    shown = " | ".join(f"{1e3 * seconds:.1f}" for seconds in times)
    return f"| {case.p} | {case.nodes} | {case.setting} | {step.count(case.replicas, HOP2)} | {shown} |"
