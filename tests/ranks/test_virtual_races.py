"""The code that runs on CUDA, under the virtual accelerator: no race, one order of collectives, no added waiting.

Stock ZeRO-3 is the control: it must be clean under the same eyes. The mutants show that the eyes see.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from helpers import batch, build, destroy_engines, ds_config, environment, train
from packaging.version import Version
from virtual_device import order
from virtual_device.accelerator import DEVICE
from virtual_device.comm import Issued, Work
from virtual_device.streams import caller

from mics_ds.comm import lanes
from mics_ds.optimizer import MicsOptimizer
from mics_ds.partitioner import MicsPartitioner
from mics_ds.two_hop import TwoHop

# DeepSpeed records its trace in the first two steps, and replicas agree on units after the first, second, fourth ...
WARM_UP, STEPS = 4, 2
SYSTEMS: dict[str, tuple[int | None, int]] = {  # p, ranks per node
    "zero3": (None, 4),
    "p=1": (1, 4),
    "p=2": (2, 4),
    "p=4 flat": (4, 4),
    "p=4 hierarchical": (4, 2),
}
WORLD: dict[str, tuple[int | None, int]] = {"p=1 world": (1, 4), "p=2 world": (2, 4)}
"""With world-sharded optimizer states."""


@dataclass
class Seen:
    """What a rank saw of some steps."""

    races: list[str]
    disorder: list[str]
    waits: list[str]
    """Where the host waited for the device."""
    issued: list[Issued]
    losses: list[float]


def engine_of(
    system: str, method: str = "native", inside_init: bool = False, synchronized: bool = False, **config: Any
) -> Any:
    p, per_node = {**SYSTEMS, **WORLD}[system]
    zero = dict(config.pop("zero", {}))
    if p is not None:
        zero["mics_reduce_scatter"] = method
        zero["mics_optimizer_states"] = "world" if system in WORLD else "partition"
    if system in WORLD and not synchronized:
        # By default DeepSpeed waits for the whole device between two steps, and nothing that is too early can be seen.
        config["timers"] = {"throughput": {"synchronized": False}}
    with environment(MICS_DS_RANKS_PER_NODE=str(per_node)):
        return build(ds_config(p, zero=zero, **config), inside_init=inside_init)


def watch(engine: Any, work: Callable[[Any], Any] = lambda engine: train(engine, STEPS)) -> Seen:
    with DEVICE.watching() as device:
        losses = work(engine)
    issued = list(device.communication.issued)
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, issued)
    return Seen(
        device.races,
        order.differences(dict(enumerate(everybody))),
        list(device.machine.synchronisations),
        issued,
        losses,
    )


def evaluate_and_gather(engine: Any) -> list[float]:
    """Evaluation between two steps, weights changed on one rank, gradients read whole."""
    losses = train(engine, 1)
    engine.eval()
    with torch.no_grad():
        engine(*batch(7, 0, dist.get_rank()))
    engine.train()
    weights = [engine.module.embed.weight, engine.module.gain]
    with deepspeed.zero.GatheredParameters(weights, modifier_rank=1):
        if dist.get_rank() == 1:
            for weight in weights:
                weight.data.mul_(0.5)
    loss = engine(*batch(8, 0, dist.get_rank()))
    engine.backward(loss)
    gradient = deepspeed.utils.safe_get_full_grad(engine.module.head.weight)
    assert gradient is not None
    engine.step()
    return losses + train(engine, 1)


SCENARIOS: dict[str, dict[str, Any]] = {
    "fp16": {"dtype": "fp16", "clip": 0.5},
    "bf16, all-to-all": {"dtype": "bf16", "method": "all_to_all"},
    "fp16, no overlap": {"dtype": "fp16", "zero": {"overlap_comm": False}},
    "accumulation": {"micro_steps": 3, "clip": 0.5, "inside_init": True},
    "offload": {"dtype": "bf16", "clip": 0.5, "zero": {"offload_optimizer": {"device": "cpu"}}},
    # Stock itself has a race here where it does not wait for the device.
    "evaluation": {"work": evaluate_and_gather, "synchronized": True},
    "persistent parameters": {"zero": {"stage3_param_persistence_threshold": 50}},
}

MORE: dict[str, dict[str, Any]] = {
    "sub-groups": {"dtype": "bf16", "zero": {"sub_group_size": 60}},
}
"""Of interest where updated weights are on their way while the next pass begins."""

ALLOWED = {
    # The host needs the averaged gradients and the norm that replicas agreed on, as it makes the update.
    "offload": 2 * STEPS,
    # Somebody has read gradients: replicas have to know of each other whether they are final.
    "evaluation": 1,
}
"""Further times that the host may wait."""
if Version(deepspeed.__version__) < Version("0.19"):  # stock does not look at the norm, which replicas agree on
    ALLOWED = {
        scenario: ALLOWED.get(scenario, 0) + (3 if scenario == "evaluation" else STEPS) for scenario in SCENARIOS
    }


@pytest.mark.ranks(4, virtual=True)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_race_one_order_and_no_more_waiting_than_stock(scenario):
    no_more_than_stock(scenario, SYSTEMS)


@pytest.mark.ranks(4, virtual=True)
@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(scenario, marks=[] if scenario in ("accumulation", "fp16", "sub-groups") else [pytest.mark.slow])
        for scenario in [*SCENARIOS, "sub-groups"]
    ],
)
def test_the_same_of_world_sharded_states(scenario):
    no_more_than_stock(scenario, ["zero3", *WORLD])


def no_more_than_stock(scenario: str, systems: Iterable[str]) -> None:
    settings = dict({**SCENARIOS, **MORE}[scenario])
    work = settings.pop("work", lambda engine: train(engine, STEPS))
    stock = None
    for system in systems:
        engine = engine_of(system, **settings)
        train(engine, WARM_UP)
        seen = watch(engine, work)
        stock = stock or seen
        assert not seen.races, f"{system}: {len(seen.races)} races, among them\n" + "\n".join(seen.races[:5])
        assert not seen.disorder, f"{system}: {seen.disorder}"
        added, missing = more_than(seen.waits, stock.waits), more_than(stock.waits, seen.waits)
        assert added.total() <= missing.total() + ALLOWED.get(scenario, 0), f"{system}: {added}"
        assert torch.tensor(seen.losses).isfinite().all()
        destroy_engines()


def more_than(waits: list[str], others: list[str]) -> Counter[str]:
    """Where the host waits more often, by the two innermost functions and whatever the stream is called."""

    def places(items: list[str]) -> Counter[str]:
        return Counter(" < ".join(item.partition("from ")[2].split(" < ")[:2]) for item in items)

    return places(waits) - places(others)


@pytest.mark.ranks(4, virtual=True)
def test_one_replica_does_what_stock_does():
    """p = n: the same collectives in the same order, the same bits, not one more wait of the host."""
    runs = []
    for system in ("zero3", "p=4 flat"):
        engine = engine_of(system, micro_steps=2, clip=0.5)
        train(engine, WARM_UP)
        runs.append(watch(engine))
        destroy_engines()
    stock, mics = runs
    assert [item[:1] + item[2:] for item in map(what, mics.issued)] == [
        item[:1] + item[2:] for item in map(what, stock.issued)
    ]
    assert mics.losses == stock.losses
    assert len(mics.waits) == len(stock.waits), more_than(mics.waits, stock.waits)


def what(issued: Issued) -> tuple[str, str, tuple[int, ...], int]:
    return issued.kind, issued.group, issued.ranks, issued.payload


# --------------------------------------------------------------------------------------------------
# Mutants: each takes one thing away that orders work, and must be reported by the name of what then runs too early


def without_wait(function: str, ranks: set[int] | None = None) -> Any:
    """Collectives are not waited for by this function (if they are over so many ranks)."""
    stock = Work.wait

    def wait(work: Work, timeout: Any = None) -> bool:
        named = any(function in frame for frame in caller())
        return (named and (ranks is None or work.ranks == ranks)) or stock(work, timeout)

    return mock.patch.object(Work, "wait", wait)


def without_record(function: str) -> Any:
    """This function records no tensor on a stream."""
    stock = torch.Tensor.record_stream

    def record(tensor: torch.Tensor, stream: Any) -> None:
        if not any(function in frame for frame in caller()):
            stock(tensor, stream)

    return mock.patch.object(torch.Tensor, "record_stream", record)


def nothing(owner: Any, name: str) -> Any:
    return mock.patch.object(owner, name)


@contextmanager
def result_without_waiting() -> Iterator[None]:
    with mock.patch.object(lanes._OnItsWay, "wait", lambda pending: pending._result):
        yield


NODES = ({0, 2}, {1, 3})  # inter-node groups of p = 4 on two nodes
MUTANTS: dict[str, tuple[str, Callable[[], Any], str]] = {
    # name: (system, mutation, what the report must name)
    "gather, between nodes": (
        "p=4 hierarchical",
        lambda: without_wait("all_gather_hierarchical", inter()),
        "all_gather",
    ),
    "gather, inside a node": (
        "p=4 hierarchical",
        lambda: without_wait("all_gather_hierarchical", intra()),
        "all_gather",
    ),
    "gather, the reader": ("p=4 hierarchical", result_without_waiting, "all_gather"),
    "gather, its memory": ("p=4 hierarchical", lambda: without_record("all_gather_hierarchical"), "memory reused"),
    "hop 1, flat": ("p=2", lambda: without_wait("complete"), "reduce_scatter"),
    "hop 1, inside a node": ("p=4 hierarchical", lambda: without_wait("complete", intra()), "reduce_scatter"),
    "hop 1, between nodes": ("p=4 hierarchical", lambda: without_wait("complete", inter()), "reduce_scatter"),
    "hop 1, its memory": ("p=2", lambda: without_record("complete"), "memory reused"),
    "hop 1, the result's memory": ("p=2", lambda: without_record("reduce_scatter_mean"), "memory reused"),
    "hop 1, the first stage": ("p=1", lambda: nothing(lanes._OnStreams, "wait_for_first"), "write"),
    "hop 2": ("p=2", lambda: without_wait("_finish_averaging"), "all_reduce"),
    "the lane's end": ("p=4 flat", lambda: nothing(lanes.StreamLane, "drain"), "write"),
    "DeepSpeed's stream": ("p=2", lambda: nothing(MicsOptimizer, "order_behind_current_stream"), "write"),
    "updated weights, the reader": ("p=2 world", lambda: nothing(MicsPartitioner, "before_gather"), "write"),
    "updated weights, their collective": ("p=2 world", lambda: without_wait("wait", replicas()), "all_gather"),
    "updated weights, their memory": ("p=2 world", lambda: without_record("gather"), "memory reused"),
    "updated weights, what they are made from": (
        "p=2 world",
        lambda: nothing(lanes.StreamLane, "_wait_for_caller"),
        "write",
    ),
    "hop 2, sliced": ("p=1 world", lambda: without_wait("complete", {0, 1, 2, 3}), "reduce_scatter"),
    "gradients of the bucket": ("p=2", lambda: without_record("partition_grads"), "memory reused"),
}


def replicas() -> set[int]:
    return {dist.get_rank(), (dist.get_rank() + 2) % 4}


def inter() -> set[int]:
    return {dist.get_rank(), (dist.get_rank() + 2) % 4}


def intra() -> set[int]:
    return {dist.get_rank(), dist.get_rank() ^ 1}


@pytest.mark.ranks(4, virtual=True)
@pytest.mark.parametrize(
    "system",
    ["p=1", "p=2", "p=4 flat", *(pytest.param(name, marks=pytest.mark.slow) for name in ("p=4 hierarchical", *WORLD))],
)
def test_what_is_taken_away_is_missed(system):
    engine = engine_of(system, dtype="fp16", micro_steps=2, zero={"contiguous_gradients": False})
    train(engine, WARM_UP)
    missed = {}
    for name, (where, mutation, words) in MUTANTS.items():
        if where != system:
            continue
        with mutation():
            seen = watch(engine)
        if not any(words in race for race in seen.races):
            missed[name] = seen.races[:3]
        train(engine, 1)
        clean = watch(engine, functools.partial(train, steps=1))
        assert not clean.races, f"after {name}: {clean.races[:3]}"
    assert not missed, f"these mutants live: {missed}"


@pytest.mark.ranks(4, virtual=True)
def test_another_order_on_one_rank_is_seen():
    """One rank starts hop 2 of a unit piece by piece."""
    engine = engine_of("p=2")
    train(engine, WARM_UP)
    start = TwoHop._start_averaging

    def one_by_one(self: TwoHop, shards: Any) -> None:
        for shard in list(shards):
            start(self, [shard])

    with mock.patch.object(TwoHop, "_start_averaging", one_by_one):
        alike = watch(engine, functools.partial(train, steps=1))
    assert not alike.disorder
    issued = alike.issued
    if dist.get_rank() == 1:
        first = next(index for index, item in enumerate(issued) if item.kind == "all_reduce")
        issued[first], issued[first + 1] = issued[first + 1], issued[first]
    everybody: list[Any] = [None] * 4
    dist.all_gather_object(everybody, issued)
    assert order.differences(dict(enumerate(everybody)))


@pytest.mark.ranks(4, virtual=True)
def test_one_more_look_at_a_number_is_counted():
    engine = engine_of("p=2")
    train(engine, WARM_UP)
    step = functools.partial(train, steps=1)
    before = watch(engine, step)
    reduce = MicsOptimizer.reduce_bucket

    def looking(self: MicsOptimizer, ids: Any, gradients: Any, store: Any) -> None:
        gradients[0].sum().item()
        reduce(self, ids, gradients, store)

    with mock.patch.object(MicsOptimizer, "reduce_bucket", looking):
        after = watch(engine, step)
    added = more_than(after.waits, before.waits)
    assert added
    assert all("looking" in place for place in added), added
