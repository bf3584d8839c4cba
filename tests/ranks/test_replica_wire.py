"""Hop 2 in fewer bytes, in engines: the numbers of ZeRO-3 where nothing is rounded, and equal replicas where it is."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import every, pairs, slow
from checkpoint_engines import digest
from deepspeed.utils import safe_get_full_grad, safe_set_full_grad
from helpers import (
    OddNet,
    assert_close,
    assert_losses_close,
    batch,
    build,
    ds_config,
    full_params,
    replicas_agree,
    same_on_all_ranks,
    stock_reference,
    train,
)
from memory_tier import nodes, restarted, sealed
from muon_engines import kernels, muon_engine
from torch import nn

from mics_ds.check.meter import CommMeter
from mics_ds.checkpoint.background import wait_for_saves
from mics_ds.comm.collectives import HOP2, HOP2_EXCHANGE, HOP2_GATHER, HOP2_SCATTER
from mics_ds.comm.wire import Cast
from mics_ds.deepspeed_compat import checkpoint, replica_wire
from mics_ds.deepspeed_compat.checkpoint import RESIDUALS
from mics_ds.deepspeed_compat.states import states_of
from mics_ds.errors import MicsCheckpointError, MicsConfigError
from mics_ds.zero.replica_reducers import ReplicaReducer
from mics_ds.zero.replica_wire import Residual
from mics_ds.zero.residuals import missing_mean

STATES = ["partition", "world"]
WIRES = ["bf16", "int8", "int4"]


def config(wire: str, states: str = "partition", p: int = 2, zero: dict[str, Any] | None = None, **more: Any) -> Any:
    keys = {"mics_replica_wire": wire, "mics_optimizer_states": states}
    return ds_config(p, zero={**keys, **(zero or {})}, **more)


def adamw(params: list) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


SETTINGS = [
    {},
    {"sub_group_size": 40},
    {"overlap_comm": False},
    {"reduce_scatter": False},
    {"stage3_param_persistence_threshold": 100_000},
    {"offload_optimizer": {"device": "cpu"}, "sub_group_size": 90},
    {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
]


# The others change nothing of hop 2 that these do not. test_world_states.py has them all.
FEW = [(states, 1 + place % 2, SETTINGS[place]) for states, place in zip([*STATES, *STATES], (0, 1, 2, 5))]


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("states", "p", "zero"), every(STATES, (1, 2), SETTINGS, default=FEW))
def test_as_zero3_where_nothing_is_rounded(states, p, zero):
    reference = stock_reference(3, optimizer=adamw, zero=zero, micro_steps=2, clip=0.5)
    with mock.patch.object(replica_wire, "wire_of", return_value=Cast(torch.float32)):
        engine = build(config("int8", states, p, zero, micro_steps=2, clip=0.5), optimizer=adamw)
    assert_losses_close(train(engine, 3), reference.losses, 1e-6)
    params = full_params(engine)
    same_on_all_ranks(params)
    assert_close(params, reference.params, 1e-6, reference.initial)
    replicas_agree(engine)


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("wire", "states", "types"), pairs(WIRES, STATES, [("fp32", None), ("bf16", "fp32"), ("fp16", None)])
)
def test_replicas_stay_equal_and_losses_near_zero3(wire, states, types):
    dtype, accumulation = types
    more = {"data_types": {"grad_accum_dtype": accumulation}} if accumulation else {}
    reference = stock_reference(4, dtype=dtype, micro_steps=2, clip=0.5, **more)
    engine = build(config(wire, states, dtype=dtype, micro_steps=2, clip=0.5, **more))
    losses = train(engine, 4)
    assert_losses_close(losses, reference.losses, {"bf16": 0.02, "int8": 0.02, "int4": 0.1}[wire])
    same_on_all_ranks(full_params(engine))
    replicas_agree(engine)


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("wire", "states"),
    every(
        ["full", *WIRES],
        STATES,
        default=[*(("full", states) for states in STATES), ("int8", "world"), ("int4", "partition")],
    ),
)
def test_collectives_of_hop2_and_their_bytes(wire, states):
    """Each unit travels once, as rows of encoded values, and comes back once where means replace gradients."""
    engine = build(config(wire, states, 1, {"overlap_comm": False}))
    train(engine, 1)  # learns which parameters are used
    with CommMeter() as meter:
        train(engine, 1)
    found: dict[str, int] = {}
    for item in meter.collectives:
        if "hop 2" in item.label:
            found[item.label] = found.get(item.label, 0) + item.payload
    if wire == "full":
        assert set(found) == {HOP2 if states == "partition" else HOP2_SCATTER}
        return
    reducer = engine.optimizer.sync._reducer
    units = [*engine.optimizer.sync._units.early, *engine.optimizer.sync._units.late]
    row = sum(reducer._wire.nbytes(sum(reducer._cut.widths[place] for place in unit)) for unit in units)
    assert found == dict.fromkeys([HOP2_EXCHANGE, HOP2_GATHER][: 1 + (states == "partition")], 4 * row)


class Scaled(nn.Module):
    """Gradients overflow in fp16 on the rank that is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.net = OddNet()

    def forward(self, x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
        return self.net(x, y) * scale


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("wire", "states"), every(WIRES, STATES, default=[("bf16", "world"), ("int8", "partition"), ("int4", "world")])
)
def test_an_overflow_on_one_rank_discards_the_step_and_leaves_residuals_alone(wire, states):
    engine = build(config(wire, states, dtype="fp16"), Scaled)
    reducer = engine.optimizer.sync._reducer
    skipped = []
    for step in range(9):
        x, y = batch(step, 0, dist.get_rank(), torch.float16)
        before = [item.committed.clone() for item in residuals(reducer)]
        scale = 1e4 if step in (3, 7) and dist.get_rank() == 3 else 1.0
        engine.backward(engine(x, y, scale))
        engine.step()
        if engine.optimizer.overflow:
            skipped.append(step)
            assert all(torch.equal(item.committed, held) for item, held in zip(residuals(reducer), before))
        assert all(item.committed.isfinite().all() for item in residuals(reducer))
        replicas_agree(engine)
    assert skipped == [3, 7]


def residuals(reducer: Any) -> list[Residual]:
    return list(reducer._residuals.values())


@pytest.mark.ranks(4)
def test_with_one_replica_the_key_warns_once():
    with mock.patch.object(replica_wire.logger, "warning") as warning:
        for _ in range(2):
            engine = build(config("int8", p=4))
            assert type(engine.optimizer.sync._reducer) is ReplicaReducer
    assert warning.call_count == (dist.get_rank() == 0)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("states", STATES)
def test_what_a_script_reads_and_sets_counts_once(states):
    """Gradients are read after each micro-step, and one is set to what was read. Residuals hold no more afterwards."""
    engines = [build(config("int8", states, 1, micro_steps=2), seed=7) for _ in range(2)]
    for step in range(2):
        for engine, reads in zip(engines, (True, False)):
            for micro_step in range(2):
                engine.backward(engine(*batch(step, micro_step, dist.get_rank())))
                if reads:
                    for param in engine.module.parameters():
                        safe_get_full_grad(param)
                    weight = engine.module.head.weight
                    safe_set_full_grad(weight, safe_get_full_grad(weight))
                engine.step()
    with_reads, without = (full_params(engine) for engine in engines)
    assert_close(with_reads, without, 0.05)  # int8; test_residuals.py is exact
    same_on_all_ranks(with_reads)
    replicas_agree(engines[0])


@pytest.mark.ranks(4)
@pytest.mark.parametrize("wire", ["int8", slow("int4")])
def test_muon_with_integers_is_refused(wire):
    with pytest.raises(MicsConfigError, match=rf'"{wire}" does not go with Muon.*Use "bf16" or "full"'):
        muon_engine(2, zero={"mics_replica_wire": wire})
    with kernels():
        engine = muon_engine(2, zero={"mics_replica_wire": "bf16"})
        train(engine, 2)
        replicas_agree(engine)


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("wire", "p", "states"),
    [("int8", 2, "partition"), ("int4", 1, "world"), slow("int8", 2, "world"), slow("int4", 1, "partition")],
)
def test_a_run_goes_on_from_its_checkpoint_with_the_same_bits(tmp_path, wire, p, states):
    """The digest has the residuals too. In another number of shards as much of the mean is missing as before."""
    engine = build(config(wire, states, p, micro_steps=2), optimizer=adamw)
    train(engine, 2)
    engine.save_checkpoint(str(tmp_path), client_state={"mine": dist.get_rank()})
    assert any(tensor.any() for tensor in engine.optimizer.sync.residuals().values())
    before = missing(engine)
    expected = train(engine, 2), digest(engine)
    resumed = build(config(wire, states, p, micro_steps=2), optimizer=adamw, seed=9)
    train(resumed, 1)  # residuals of its own are replaced
    _, client_state = resumed.load_checkpoint(str(tmp_path))
    assert client_state["mine"] == dist.get_rank()
    assert RESIDUALS not in client_state
    assert (train(resumed, 2), digest(resumed)) == expected
    other = build(config(wire, states, 3 - p, {"mics_reshape_checkpoint": True}, micro_steps=2), optimizer=adamw)
    train(other, 1)
    other.load_checkpoint(str(tmp_path))
    after = missing(other)
    assert sum(values.any().item() for values in before.values()) > 5
    for name, values in before.items():
        tolerance = 2.0**-40 if states == "partition" else 2.0**-14 if p == 1 else 2.0**-26
        assert (after[name] - values).abs().max() <= tolerance * values.abs().max(), name
    train(other, 1)
    replicas_agree(other)


@pytest.mark.ranks(4)
def test_residuals_of_other_ranks_are_read_by_all_or_none_and_for_one_model_parallel_rank(tmp_path):
    engine = build(config("int8", "partition", 2), optimizer=adamw)
    train(engine, 2)
    engine.save_checkpoint(str(tmp_path))
    other = build(config("int8", "partition", 1, {"mics_reshape_checkpoint": True}), optimizer=adamw)
    found = checkpoint._residuals_in

    def unreadable(folder: str) -> Any:
        if dist.get_rank() == 1:
            raise OSError("the disk is gone")
        return found(folder)

    on_rank_1 = pytest.raises(MicsCheckpointError, match="rank 1: OSError: the disk is gone")
    with mock.patch.object(checkpoint, "_residuals_in", unreadable), on_rank_1:
        other.load_checkpoint(str(tmp_path))
    other.optimizer.model_parallel_rank = 1  # whose residuals are of other parameters with the same names
    other.load_checkpoint(str(tmp_path))
    assert not any(tensor.any() for tensor in other.optimizer.sync.residuals().values())
    other.optimizer.model_parallel_rank = 0
    other.load_checkpoint(str(tmp_path))
    assert any(tensor.any() for tensor in other.optimizer.sync.residuals().values())


def missing(engine: Any) -> dict[str, torch.Tensor]:
    """Return what has not arrived yet of the mean gradient of each parameter."""
    held = replica_wire.held_residuals(engine.optimizer)
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, held)
    return {name: missing_mean(of_all, name, 0, numel) for name, numel in held.numels.items()}


@pytest.mark.ranks(4)
@pytest.mark.parametrize("states", every(STATES, default=["world"]))
def test_the_guard_at_every_step_finds_equal_replicas(states):
    engine = build(config("int8", states, 2, {"mics_guard": {"every": 1}}), optimizer=adamw)
    train(engine, 4)
    assert engine.optimizer.mics_guard.checks == 4
    names = {state.name for state in states_of(engine.optimizer) if not state.replicated}
    assert {"unsent residual"} <= names


@pytest.mark.ranks(4)
@pytest.mark.parametrize("states", every(STATES, default=["partition"]))
def test_an_asynchronous_save_has_the_residuals_of_its_moment(tmp_path, states):
    engine = build(config("int8", states, 2, {"mics_checkpoint": {"async": True}}), optimizer=adamw)
    train(engine, 2)
    engine.save_checkpoint(str(tmp_path))
    saved = digest(engine)
    train(engine, 3)
    wait_for_saves()
    dist.barrier()
    resumed = build(config("int8", states, 2), optimizer=adamw, seed=9)
    resumed.load_checkpoint(str(tmp_path))
    assert digest(resumed) == saved


@pytest.mark.ranks(4)
@pytest.mark.parametrize("states", every(STATES, default=["world"]))
def test_copies_in_memory_have_residuals(tmp_path, states):
    with nodes(tmp_path):
        zero = {"mics_checkpoint": {"memory_every": 2}}
        restarted()
        engine = build(config("int8", states, 2, zero), optimizer=adamw)
        assert engine.load_checkpoint(str(tmp_path / "disk")) == (None, None)
        train(engine, 2)
        sealed()
        copied = digest(engine)
        train(engine, 1)
        restarted()
        resumed = build(config("int8", states, 2, zero), optimizer=adamw, seed=9)
        resumed.load_checkpoint(str(tmp_path / "disk"))
        assert resumed.global_steps == 2
        assert digest(resumed) == copied
