"""The code that runs on CUDA, under the virtual accelerator: no race, one order of collectives, no added waiting.

Stock ZeRO-3 is the control: it must be clean under the same eyes. The mutants show that the eyes see.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from cases import every, slow
from helpers import batch, destroy_engines, train
from packaging.version import Version
from virtual_device import order
from virtual_device.comm import Issued, Work
from virtual_device.streams import Stream, caller
from virtual_engines import STEPS, SYSTEMS, WARM_UP, WIRED, WORLD, engine_of, watch

from mics_ds.comm import async_exec
from mics_ds.deepspeed_compat.optimizer import MicsOptimizer
from mics_ds.deepspeed_compat.partitioner import MicsPartitioner


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
    "fp16": {
        "dtype": "fp16",
        "micro_steps": 2,
        "clip": 0.5,
        "inside_init": True,
        "zero": {"stage3_param_persistence_threshold": 13},
    },
    "bf16, all-to-all": {"dtype": "bf16", "method": "all_to_all"},
    "fp16, no overlap": {"dtype": "fp16", "zero": {"overlap_comm": False}},
    "offload": {"dtype": "bf16", "clip": 0.5, "zero": {"offload_optimizer": {"device": "cpu"}}},
    # Stock itself has a race here where it does not wait for the device.
    "evaluation": {"work": evaluate_and_gather, "synchronized": True},
    # Updated weights are on their way while the next sub-group is updated, and the next pass begins.
    "sub-groups": {"dtype": "bf16", "zero": {"sub_group_size": 60}},
}

FEW_SYSTEMS = ("zero3", "p=2", "p=4 hierarchical")
FEW_WIRES = ("p=1 int8", "p=2 world int8")

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
@pytest.mark.parametrize(
    ("scenario", "systems"),
    every(
        [*SCENARIOS],
        [(*SYSTEMS,), FEW_SYSTEMS],
        default=[("fp16", (*SYSTEMS,)), ("offload", FEW_SYSTEMS), ("evaluation", FEW_SYSTEMS)],
    ),
)
def test_no_race_one_order_and_no_more_waiting_than_stock(scenario, systems):
    no_more_than_stock(scenario, systems)


@pytest.mark.ranks(4, virtual=True)
@pytest.mark.parametrize("scenario", every([*SCENARIOS], default=["fp16"]))
def test_the_same_of_world_sharded_states(scenario):
    no_more_than_stock(scenario, ["zero3", *WORLD])


@pytest.mark.ranks(4, virtual=True)
@pytest.mark.parametrize(
    ("scenario", "wires"),
    every([*SCENARIOS], [FEW_WIRES, (*WIRED,)], default=[("fp16", FEW_WIRES)]),
)
def test_the_same_in_fewer_bytes(scenario, wires):
    no_more_than_stock(scenario, ["zero3", *wires])


def no_more_than_stock(scenario: str, systems: Iterable[str]) -> None:
    settings = dict(SCENARIOS[scenario])
    work = settings.pop("work", None)
    stock = None
    for system in systems:
        engine = engine_of(system, **settings)
        train(engine, WARM_UP)
        seen = watch(engine, work)
        stock = stock or seen
        assert not seen.races, f"{system}: {len(seen.races)} races, among them\n" + "\n".join(seen.races[:5])
        assert not seen.disorder, f"{system}: {seen.disorder}"
        assert not seen.growth, f"{system}: {seen.growth}"
        added, missing = more_than(seen.waits, stock.waits), more_than(stock.waits, seen.waits)
        assert added.total() <= missing.total() + ALLOWED.get(scenario, 0), f"{system}: {added}"
        if "world" in system and not settings.get("synchronized"):
            updates_wait = [place for place in seen.waits if place.startswith("synchronize device")]
            assert not updates_wait, f"{system}: the host waits for weights on their way: {updates_wait}"
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


def without(owner: type, name: str, function: str, ranks: Callable[[], set[int]] | None = None) -> Any:
    """A method does nothing where this function is among the innermost callers (if ``owner`` is over these ranks)."""
    stock = getattr(owner, name)

    def method(self: Any, *args: Any) -> Any:
        named = any(frame.split()[-1] == function for frame in caller())
        return (named and (ranks is None or self.ranks == ranks())) or stock(self, *args)

    return mock.patch.object(owner, name, method)


def wait(function: str, ranks: Callable[[], set[int]] | None = None) -> Callable[[], Any]:
    """Collectives are not waited for by this function (if they are over these ranks)."""
    return lambda: without(Work, "wait", function, ranks)


def event(function: str) -> Callable[[], Any]:
    """No event is waited for by this function."""
    return lambda: without(Stream, "wait_event", function)


def stream(function: str) -> Callable[[], Any]:
    """No stream is waited for by this function."""
    return lambda: without(Stream, "wait_stream", function)


def record(function: str) -> Callable[[], Any]:
    """This function records no tensor on a stream."""
    return lambda: without(torch.Tensor, "record_stream", function)


def method(owner: type, name: str) -> Callable[[], Any]:
    return lambda: mock.patch.object(owner, name)


def everybody() -> set[int]:
    return {0, 1, 2, 3}


def replicas() -> set[int]:
    """Of p = 2; and the inter-node group of p = 4 on two nodes."""
    return {dist.get_rank(), (dist.get_rank() + 2) % 4}


def neighbours() -> set[int]:
    return {dist.get_rank(), dist.get_rank() ^ 1}


MUTANTS: dict[str, tuple[str, Callable[[], Any], str]] = {
    # name: (system, mutation, what the report must name)
    "gather, flat": ("p=2", wait("fulls"), "all_gather"),
    "gather, between nodes": ("p=4 hierarchical", wait("spread", replicas), "all_gather"),
    "gather, inside a node": ("p=4 hierarchical", wait("spread", neighbours), "all_gather"),
    "gather, its memory": ("p=4 hierarchical", record("start_all_gather_hierarchical"), "memory reused"),
    "gather of one, between nodes": ("p=4 hierarchical", wait("spread_whole", replicas), "all_gather"),
    "gather of one, inside": ("p=4 hierarchical", wait("spread_whole", neighbours), "all_gather"),
    "gather of one, its memory": ("p=4 hierarchical", record("start_all_gather_whole_hierarchical"), "memory reused"),
    "gather, the reader": ("p=4 hierarchical", event("follow"), "all_gather"),
    "hop 1, flat": ("p=2", wait("complete"), "reduce_scatter"),
    "hop 1, inside a node": ("p=4 hierarchical", wait("complete", neighbours), "reduce_scatter"),
    "hop 1, between nodes": ("p=4 hierarchical", wait("complete", replicas), "reduce_scatter"),
    "hop 1 of whole shards, before hop 2": ("p=1", stream("submit"), "write"),
    "hop 1, its buffers' last users": ("p=2", event("_run"), "write"),
    "hop 1, its end": ("p=4 flat", method(async_exec.StreamExecutor, "drain"), "write"),
    "hop 1, before hop 2": ("p=2", event("run"), "start_average_"),
    "hop 2": ("p=2", wait("put_back"), "all_reduce"),
    "hop 2, its end": ("p=2", method(async_exec.StreamExecutor, "drain"), "all_reduce"),
    "hop 2, flags": ("p=2", stream("submit"), "fill_"),
    "hop 2, sliced": ("p=1 world", wait("complete", everybody), "reduce_scatter"),
    "hop 2, sliced, its buffers' last users": ("p=2 world", event("_run"), "write"),
    "DeepSpeed's stream": ("p=2", method(MicsOptimizer, "_order_reduction_stream"), "write"),
    "gradients of the bucket": ("p=2", record("_start_hop1"), "memory reused"),
    "updated weights, the reader": (
        "p=2 world",
        method(MicsPartitioner, "_ensure_availability_of_partitioned_params"),
        "write",
    ),
    "updated weights, their collective": ("p=2 world", wait("fill", replicas), "all_gather"),
    "updated weights, their memory": ("p=2 world", record("_start_bucket"), "memory reused"),
    "updated weights, what they are made from": (
        "p=2 world",
        stream("submit"),
        "write",
    ),
}


@pytest.mark.ranks(4, virtual=True)
@pytest.mark.parametrize(
    "system",
    ["p=1", "p=2", "p=4 flat", *(slow(name) for name in ("p=4 hierarchical", *WORLD))],
)
def test_what_is_taken_away_is_missed(system):
    # Biases stay gathered. Weights are gathered ahead one by one, and in pairs.
    zero = {"stage3_param_persistence_threshold": 13, "stage3_prefetch_bucket_size": 100}
    engine = engine_of(system, dtype="fp16", micro_steps=2, zero={"contiguous_gradients": False, **zero})
    train(engine, WARM_UP)
    clean = watch(engine)
    assert not clean.races, clean.races[:3]
    missed = {}
    for name, (where, mutation, words) in MUTANTS.items():
        if where != system:
            continue
        with mutation():
            seen = watch(engine)
        if not any(words in race for race in seen.races):
            missed[name] = seen.races[:3]
    assert not missed, f"these mutants live: {missed}"


@pytest.mark.ranks(4, virtual=True)
def test_another_order_on_one_rank_is_seen():
    engine = engine_of("p=2")
    train(engine, WARM_UP)
    seen = watch(engine, functools.partial(train, steps=1))
    assert not seen.disorder
    if dist.get_rank() == 1:  # two units of hop 2
        first, second, *_ = [index for index, item in enumerate(seen.issued) if item.kind == "all_reduce"]
        seen.issued[first], seen.issued[second] = seen.issued[second], seen.issued[first]
    said: list[Any] = [None] * 4
    dist.all_gather_object(said, seen.issued)
    assert order.differences(dict(enumerate(said)))


@pytest.mark.ranks(4, virtual=True)
def test_one_more_look_at_a_number_is_counted():
    engine = engine_of("p=2")
    train(engine, WARM_UP)
    step = functools.partial(train, steps=1)
    before = watch(engine, step)
    start_hop1 = MicsOptimizer._start_hop1

    def looking(self: MicsOptimizer, params: Any, gradients: Any, before_storing: Any) -> Any:
        gradients[0].sum().item()
        return start_hop1(self, params, gradients, before_storing)

    with mock.patch.object(MicsOptimizer, "_start_hop1", looking):
        after = watch(engine, step)
    added = more_than(after.waits, before.waits)
    assert added
    assert all("looking" in place for place in added), added
