"""The mics_ keys: what is accepted, what is refused and in which words."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest

from mics_ds.config import (
    KNOWN_KEYS,
    CheckpointRequest,
    GuardRequest,
    MicsConfig,
    ReplicasRequest,
    disabled_by_environment,
    split_ds_config,
)
from mics_ds.errors import MicsConfigError


def zero(stage: int = 3, **keys) -> dict:
    return {"train_batch_size": 4, "zero_optimization": {"stage": stage, **keys}}


def test_keys_are_split_off_without_touching_the_callers_dictionary():
    config = zero(mics_shard_size=4, mics_hierarchical_params_gather=True, reduce_bucket_size=7)
    before = copy.deepcopy(config)
    mics, rest = split_ds_config(config)
    assert mics == MicsConfig(4, True)
    assert rest == zero(reduce_bucket_size=7)
    assert config == before


def test_without_keys_there_is_nothing_to_do():
    assert split_ds_config(zero()) == (None, None)
    assert split_ds_config({}) == (None, None)
    assert split_ds_config({"zero_optimization": True}) == (None, None)


@pytest.mark.parametrize("keys", [{"mics_shard_size": -1}, {"mics_hierarchical_params_gather": True}])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_minus_one_or_no_size_is_off_at_any_stage(keys, stage):
    assert split_ds_config(zero(stage, **keys)) == (None, zero(stage))


@pytest.mark.parametrize("size", [0, -2, "2", 2.5, 2.0, True, None, [2], "large"])
def test_wrong_sizes_are_refused(size):
    with pytest.raises(MicsConfigError, match="mics_shard_size must be"):
        split_ds_config(zero(mics_shard_size=size))


@pytest.mark.parametrize("value", ["yes", 1, None, "AUTO"])
@pytest.mark.parametrize(
    "key",
    [
        "mics_hierarchical_params_gather",
        "mics_hierarchical_grad_scatter",
        "mics_reduce_scatter",
        "mics_optimizer_states",
        "mics_replica_wire",
    ],
)
def test_wrong_modes_are_refused(key, value):
    with pytest.raises(MicsConfigError, match=f"{key} must be"):
        split_ds_config(zero(mics_shard_size=2, **{key: value}))


@pytest.mark.parametrize("wire", ["full", "bf16", "int8", "int4", "auto"])
def test_wires_between_replicas(wire):
    mics, _ = split_ds_config(zero(mics_shard_size=2, mics_replica_wire=wire))
    assert mics.replica_wire == wire
    assert mics.is_undecided == (wire == "auto")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_other_stages_are_refused(stage):
    with pytest.raises(MicsConfigError, match=f"needs ZeRO stage 3.*stage {stage}"):
        split_ds_config(zero(stage, mics_shard_size=2))


def test_unknown_key_is_refused_with_the_known_ones():
    with pytest.raises(MicsConfigError, match="mics_shard_siz") as error:
        split_ds_config(zero(mics_shard_siz=2))
    for key in KNOWN_KEYS:
        assert key in str(error.value)


def test_keys_outside_their_section_are_refused():
    with pytest.raises(MicsConfigError, match="belong under 'zero_optimization'"):
        split_ds_config({**zero(), "mics_shard_size": 2})


def test_configuration_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MicsConfig(2).shard_size = 4


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("true", True), ("0", False), ("", False), ("no", False)])
def test_disable_variable(value, expected):
    assert disabled_by_environment({"MICS_DS_DISABLE": value}) is expected


def test_disable_variable_refuses_nonsense():
    with pytest.raises(MicsConfigError, match="must be 1 or 0"):
        disabled_by_environment({"MICS_DS_DISABLE": "maybe"})


def test_the_guard_is_a_switch_or_a_section():
    def guard(value):
        return split_ds_config(zero(mics_shard_size=2, mics_guard=value))[0].guard

    assert guard(True) == GuardRequest() == GuardRequest(every=100, action=None, repairs=3)
    assert guard(False) is None
    assert guard({"every": 0, "action": "warn"}) == GuardRequest(every=0, action="warn")
    assert "mics_guard" not in MicsConfig(2).to_json()
    assert MicsConfig(2, guard=GuardRequest(every=7)).to_json()["mics_guard"]["every"] == 7


def test_checkpoints_have_a_section():
    def checkpoint(value):
        return split_ds_config(zero(mics_shard_size=2, mics_checkpoint=value))[0].checkpoint

    assert (
        checkpoint({}) == CheckpointRequest() == CheckpointRequest(False, "wait", "raise", 3600.0, None, 0, "/dev/shm")
    )
    assert checkpoint({"async": True, "busy": "skip"}) == CheckpointRequest(**{"async": True}, busy="skip")
    assert "mics_checkpoint" not in MicsConfig(2).to_json()
    section = {"async": True, "busy": "wait", "on_error": "log", "time_limit": 60.0, "export": "bf16"}
    section |= {"memory_every": 5, "memory_folder": "/m", "job": "j"}
    assert MicsConfig(2, checkpoint=checkpoint(section)).to_json()["mics_checkpoint"] == section


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "mics_checkpoint must be a section with some of async, busy, on_error, time_limit"),
        ({"asynchronous": True}, "Unknown key under 'zero_optimization.mics_checkpoint': asynchronous"),
        ({"in_background": True}, "Unknown key under"),
        ({"async": 1}, "async must be a valid boolean"),
        ({"busy": "drop"}, "busy must be 'wait' or 'skip'"),
        ({"on_error": "ignore"}, "on_error must be 'raise' or 'log'"),
        ({"time_limit": 0}, "time_limit must be greater than 0"),
        ({"time_limit": True}, "time_limit must be a valid number"),
        ({"export": "int8"}, "export must be 'bf16', 'fp16' or 'fp32'"),
        ({"memory_every": True}, "memory_every must be a valid integer"),
        ({"memory_every": -1}, "memory_every must be greater than or equal to 0"),
        ({"memory_folder": "shm"}, r"memory_folder must match pattern '\^/'"),
        ({"job": ""}, "job must have at least 1 character"),
    ],
)
def test_wrong_values_for_checkpoints(value, message):
    with pytest.raises(MicsConfigError, match=message):
        split_ds_config(zero(mics_shard_size=2, mics_checkpoint=value))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("yes", "mics_guard must be true, false or a section with some of every, action"),
        (1, "mics_guard must be true, false or a section"),
        ({"evry": 1}, "Unknown key under 'zero_optimization.mics_guard': evry. Known keys: every"),
        ({"every": -1}, "mics_guard.every must be greater than or equal to 0"),
        ({"every": True}, "mics_guard.every must be a valid integer"),
        ({"action": "heal"}, "mics_guard.action must be 'repair', 'stop' or 'warn'"),
        ({"block_bytes": 12}, "mics_guard.block_bytes must be a multiple of 8"),
    ],
)
def test_wrong_guards_are_refused(value, message):
    with pytest.raises(MicsConfigError, match=re.escape(message)):
        split_ds_config(zero(mics_shard_size=2, mics_guard=value))


def test_managed_replicas_are_a_section():
    def replicas(value):
        return split_ds_config(zero(mics_shard_size=2, mics_replicas=value))[0].replicas

    assert replicas({"membership": "torchft"}) == ReplicasRequest("torchft", min=1, timeout_s=30.0)
    assert replicas({"membership": "torchft", "min": 2, "timeout_s": 5.0}).min == 2
    assert "mics_replicas" not in MicsConfig(2).to_json()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "mics_replicas must be a section with some of membership, min, timeout_s"),
        ({}, "mics_replicas"),
        ({"membership": "mpi"}, "mics_replicas.membership must be 'torchft'"),
        ({"membership": "torchft", "min": 0}, "mics_replicas.min must be greater than or equal to 1"),
        ({"membership": "torchft", "timeout_s": 0}, "mics_replicas.timeout_s must be greater than 0"),
        ({"membership": "torchft", "max": 3}, "Unknown key under 'zero_optimization.mics_replicas': max"),
    ],
)
def test_wrong_managed_replicas_are_refused(value, message):
    with pytest.raises(MicsConfigError, match=re.escape(message)):
        split_ds_config(zero(mics_shard_size=2, mics_replicas=value))
