"""The replica guard on ranks: seeded faults are found, named and put right, clean steps are left alone."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import traceback
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import every, slow
from guard_faults import adam, copies, guarded, raw, real, restore, states
from helpers import (
    DataParallelUnit,
    OddNet,
    batch,
    build,
    copies_differ,
    ds_config,
    replicas_agree,
    same_on_all_ranks,
    stock_reference,
    train,
)
from rank_pool import Pools, RankError

from mics_ds.check.meter import CommMeter
from mics_ds.errors import MicsAgreementError, MicsConfigError, MicsGuardError
from mics_ds.log import logger

OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
SUB_GROUPS = {"sub_group_size": 100}

# ranks, p, dtype, bytes of a block, the wide net, zero keys
CAMPAIGNS = {
    "r4-bf16": (4, 1, "bf16", 64, False, SUB_GROUPS),
    "r4-fp32-wide": (4, 1, "fp32", 16384, True, {}),
    "r2-bf16": (4, 2, "bf16", 64, False, {}),
    "r3-fp16": (6, 2, "fp16", 64, False, {}),
    "r4p2-bf16": (8, 2, "bf16", 64, False, SUB_GROUPS),
    "r2-fp16-offload": (4, 2, "fp16", 64, False, {**OFFLOAD, **SUB_GROUPS}),
}
SHARES = {"r4-bf16": 250, "r4-fp32-wide": 100, "r2-bf16": 250, "r3-fp16": 150, "r4p2-bf16": 150, "r2-fp16-offload": 100}


def run_campaign(pools: Pools, name: str, faults: int, seed: int) -> dict[str, int]:
    ranks, p, dtype, block_bytes, wide, zero = CAMPAIGNS[name]
    arguments = {"p": p, "faults": faults, "seed": seed, "dtype": dtype, "block_bytes": block_bytes}
    counts = pools.run(ranks, "guard_faults", "campaign", {**arguments, "wide": wide, "zero": zero}, 500)
    assert all(item == counts[0] for item in counts), "all ranks see the same"
    found = counts[0]
    assert found["faults"] == found["detected"] == faults
    assert found["located"] == faults
    assert found["repaired"] == faults - found.get("stopped", 0)
    assert ranks // p == 2 or "stopped" not in found
    return found


@pytest.mark.parametrize("name", ["r4-bf16", "r2-bf16"])
def test_some_seeded_faults(pools, name):
    run_campaign(pools, name, 12, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARES)
def test_a_thousand_seeded_faults(pools, name):
    print(name, json.dumps(run_campaign(pools, name, SHARES[name], seed=2), sort_keys=True))


SETTINGS = {
    "fp32": ("fp32", {}),
    "bf16": ("bf16", {}),
    "fp16": ("fp16", {}),
    "offload": ("bf16", OFFLOAD),
    "sub-groups": ("bf16", SUB_GROUPS),
}


def no_false_alarm(p: int, steps: int, setting: str) -> None:
    dtype, zero = SETTINGS[setting]
    engine = build(guarded(p, dtype=dtype, zero=zero, every=1, action="stop", block_bytes=64), optimizer=adam)
    train(engine, steps)
    assert engine.optimizer.mics_guard.checks == steps


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [1, slow(2), slow(4)])
def test_clean_steps_raise_no_alarm(p):
    for setting in SETTINGS:
        no_false_alarm(p, 3, setting)


@pytest.mark.slow
@pytest.mark.ranks(4, timeout=500)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("setting", SETTINGS)
def test_two_thousand_clean_steps(p, setting):
    no_false_alarm(p, 200, setting)


@pytest.mark.ranks(4)
def test_the_same_losses_with_the_guard():
    expected = stock_reference(4, dtype="bf16")
    plain, watched = (build(config) for config in (ds_config(2, dtype="bf16"), guarded(2, dtype="bf16", every=1)))
    losses = train(plain, 4)
    assert train(watched, 4) == losses
    assert losses == pytest.approx(expected.losses, rel=0.02)
    assert plain.optimizer.mics_guard is None


def flip(engine, rank: int, state: str, element: int = 0) -> None:
    """Change an element of embed.weight, or of a counter, by a bit in its highest byte."""
    if dist.get_rank() == rank:
        found = next(item for item in states(engine) if item.name == state)
        start = next((piece.start for piece in found.pieces if piece.parameter == "embed.weight"), 0)
        raw(found.tensor)[start + element, -1] ^= 1


@pytest.mark.ranks(4)
def test_a_fault_is_named_counted_and_suspected(tmp_path):
    """One step before a check; p = 1, so four copies."""
    told = []
    config = guarded(1, dtype="bf16", every=2, repairs=1, block_bytes=64)
    config["csv_monitor"] = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    engine = build(config, optimizer=adam)
    logger.addFilter(told.append)
    train(engine, 2)
    for _ in range(2):
        train(engine, 1)
        flip(engine, 2, "weights", 3)  # overwritten by the next step
        flip(engine, 2, "exp_avg", 4)  # spreads to masters and weights
        train(engine, 1)
    logger.removeFilter(told.append)
    guard = engine.optimizer.mics_guard
    assert (guard.checks, dict(guard.repairs)) == (3, {2: 2})
    replicas_agree(engine)
    if dist.get_rank() == 0:
        said = "\n".join(record.getMessage() for record in told)
        assert "copies differ after step 4; repaired" in said
        assert "rank 2 (node 0): exp_avg of embed.weight[4:5]: 1 elements and" in said
        assert said.count("rank 2 on node 0 was repaired 2 times. Suspect its hardware") == 1
        assert "copies differ after step 6; repaired" in said
        written = (tmp_path / "job" / "Train_MiCS_guard_repairs.csv").read_text().splitlines()
        assert [line.split(",")[1].strip() for line in written[1:]] == ["0", "1", "2"]


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("zero", "inside_init"), every(({}, OFFLOAD), (True, False), default=[({}, True), (OFFLOAD, False)])
)
def test_padding_is_zero_so_that_copies_are_compared_whole(zero, inside_init, monkeypatch):
    stock = torch.empty

    def dirty(*args: Any, **kwargs: Any) -> torch.Tensor:
        return stock(*args, **kwargs).fill_(dist.get_rank() + 1)

    monkeypatch.setattr(torch, "empty", dirty)
    engine = build(guarded(2, dtype="bf16", every=1, action="stop", zero=zero), optimizer=adam, inside_init=inside_init)
    monkeypatch.undo()
    train(engine, 2)
    padding = [state.tensor[~real(state)] for state in states(engine) if state.name != "step"]
    assert not any(item.any() for item in padding)
    total = torch.tensor(sum(item.numel() for item in padding))
    dist.all_reduce(total)
    assert total > 0


@pytest.mark.ranks(4)
@pytest.mark.parametrize("state", ["master", "exp_avg_sq", "step"])
def test_two_copies_without_a_rule_stop_all_ranks_and_change_nothing(state):
    engine = build(guarded(2, every=1), optimizer=adam)
    train(engine, 1)
    flip(engine, 3, state)
    before = copies(engine)
    with pytest.raises(MicsGuardError, match=rf"after step 9.*(?s:.*)rank 3 \(node 0\): {state} of .*from rank 1"):
        engine.optimizer.mics_guard.check(engine, "after step 9", stepped=True)
    assert all(torch.equal(raw(item.tensor), raw(tensor)) for item, tensor in zip(states(engine), before))


@pytest.mark.ranks(4)
def test_a_rank_that_is_a_step_behind_in_everything():
    engine = build(guarded(1, dtype="bf16", block_bytes=64, zero=SUB_GROUPS), optimizer=adam)
    train(engine, 2)
    behind = copies(engine)
    train(engine, 1)
    saved = copies(engine)
    expected = train(engine, 2)
    restore(engine, behind if dist.get_rank() == 2 else saved)
    findings = engine.optimizer.mics_guard.check(engine, "now", stepped=True)
    assert {finding.rank for finding in findings} == {2}
    assert {finding.state for finding in findings} == {"weights", "master", "exp_avg", "exp_avg_sq", "step"}
    assert train(engine, 2) == expected


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [1, 2])
def test_warn_goes_on(p):
    engine = build(guarded(p, dtype="bf16", every=1, action="warn"), optimizer=adam)
    train(engine, 1)
    flip(engine, 3, "exp_avg")
    train(engine, 1)
    assert copies_differ(engine)


@pytest.mark.ranks(4)
def test_with_one_replica_weights_are_held_to_their_masters():
    engine = build(guarded(4, dtype="bf16", every=1), optimizer=adam)
    train(engine, 2)
    flip(engine, 1, "weights")
    with pytest.raises(MicsGuardError, match=r"rank 1 \(node 0\): weights of .*1 bits differ from its own masters"):
        engine.optimizer.mics_guard.check(engine, "now", stepped=True)


WORLD = {"mics_optimizer_states": "world"}


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [1, 2])
def test_world_sharded_masters_have_no_copies_and_are_held_to_weights(p):
    engine = build(guarded(p, dtype="bf16", zero=WORLD, every=1, block_bytes=64), optimizer=adam)
    train(engine, 3)
    guard = engine.optimizer.mics_guard
    assert guard.checks == 3
    flip(engine, 1, "exp_avg")
    assert not guard.check(engine, "now", stepped=True), "nothing is known of these"
    flip(engine, 1, "exp_avg")
    flip(engine, 1, "master")
    with pytest.raises(MicsGuardError, match=r"rank 1 \(node 0\): weights of .* differ from its own masters"):
        guard.check(engine, "now", stepped=True)


@pytest.mark.ranks(4, fresh=True)  # DeepSpeed keeps the mpu in a module global
def test_the_other_ranks_of_a_tensor_parallel_job_stop_as_well():
    """Copies are compared in the data-parallel groups {0, 2} and {1, 3}. Only in the first one they differ."""
    engine = build(guarded(1, dtype="bf16"), mpu=DataParallelUnit(), optimizer=adam)
    train(engine, 1, rank=dist.get_rank() // 2)
    guard = engine.optimizer.mics_guard
    assert guard.action == "stop"
    flip(engine, 2, "exp_avg")
    with pytest.raises(MicsGuardError, match=r"rank 2 \(node 0\): exp_avg of embed.weight") as stopped:
        guard.check(engine, "now", stepped=True)
    assert {finding.rank for finding in stopped.value.findings} == {2}


@pytest.mark.ranks(4)
def test_world_sharded_copies_of_weights_are_repaired_by_majority():
    engine, twin = (build(guarded(1, dtype="bf16", zero=WORLD, block_bytes=64), optimizer=adam) for _ in range(2))
    train(engine, 2)
    train(twin, 2)
    guard = engine.optimizer.mics_guard
    for element in range(4):  # in and beyond the slice whose master this rank has
        flip(engine, 2, "weights", 12 * element)
        found = guard.check(engine, "now", stepped=True)
        assert {(item.rank, item.by) for item in found} == {(2, "majority")}
    assert train(engine, 2) == train(twin, 2)
    replicas_agree(engine)


@pytest.mark.ranks(4)
def test_parameters_that_stay_gathered_follow_a_repair():
    zero = {"stage3_param_persistence_threshold": 10**6}
    engine = build(guarded(1, dtype="bf16", zero=zero, action="repair"), optimizer=adam)
    twin = build(ds_config(1, dtype="bf16", zero=zero), optimizer=adam)
    train(engine, 2)
    train(twin, 2)
    if dist.get_rank() == 1:  # and what was gathered from the damaged shard
        param = engine.module.embed.weight
        param.ds_tensor.view(-1)[0] = torch.nan
        param.data.view(-1)[0] = torch.nan
    assert engine.optimizer.mics_guard.check(engine, "now", stepped=True)
    assert train(engine, 2) == train(twin, 2)


@pytest.mark.ranks(4)
def test_what_a_check_sends():
    engine = build(guarded(1, dtype="bf16", block_bytes=64), optimizer=adam)
    train(engine, 1)
    guard, everybody = engine.optimizer.mics_guard, tuple(range(4))
    with CommMeter() as clean:
        guard.check(engine, "now", stepped=True)
    sent = [(item.kind, item.ranks, item.bytes_sent) for item in clean.collectives]
    assert sent == [("all_gather", everybody, 3 * 16.0), ("all_reduce", everybody, 2 * 3 / 4 * 8)]
    flip(engine, 2, "master")
    with CommMeter() as repairing:
        guard.check(engine, "now", stepped=True)
    blocks = repairing.select("broadcast", label="replica guard repair")
    assert [item.payload for item in blocks] == [64]


@pytest.mark.ranks(4)
@pytest.mark.parametrize("damage", [False, True])
def test_loading_ends_with_a_check(tmp_path, damage, monkeypatch):
    engine = build(guarded(2, dtype="bf16"), optimizer=adam)
    train(engine, 2)
    engine.save_checkpoint(str(tmp_path))
    expected = train(engine, 2)
    again = build(guarded(2, dtype="bf16"), optimizer=adam)
    guard = again.optimizer.mics_guard
    if not damage:
        again.load_checkpoint(str(tmp_path))
        assert guard.checks == 1
        assert train(again, 2) == expected
        return
    load_state_dict = again.optimizer.load_state_dict

    def bad_memory(*args, **kwargs):
        load_state_dict(*args, **kwargs)
        flip(again, 0, "exp_avg")

    monkeypatch.setattr(again.optimizer, "load_state_dict", bad_memory)
    with pytest.raises(MicsGuardError, match=r"global_step2 was loaded"):
        again.load_checkpoint(str(tmp_path))


@pytest.mark.ranks(4)
def test_ranks_that_disagree_on_how_often():
    with pytest.raises(
        MicsAgreementError, match=r"agree on whether MiCS is on(?=.*100[^;]*\[0, 1, 2\])(?=.*50[^;]*\[3\])"
    ):
        build(guarded(2, every=50 if dist.get_rank() == 3 else 100))
    with pytest.raises(MicsConfigError, match=r"mics_guard\.every must be greater than or equal to 0"):
        build(guarded(2, every=-1))
    train(build(guarded(2, every=1)), 1)


def die_within_a_check(victim: int) -> None:
    engine = build(guarded(2, every=2, block_bytes=64), OddNet)
    train(engine, 1)
    guard = engine.optimizer.mics_guard
    loss = engine(*batch(1, 0, dist.get_rank()))
    engine.backward(loss)
    if dist.get_rank() == victim:
        guard._digests = lambda states: os.kill(os.getpid(), signal.SIGKILL)
    try:
        engine.step()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


@pytest.mark.parametrize("victim", [slow(0), 3])
def test_nobody_waits_forever_for_a_rank_that_died_within_a_check(pools: Pools, victim: int) -> None:
    with pytest.raises(RankError) as failure:
        pools.run(4, __name__, "die_within_a_check", {"victim": victim}, timeout=60)
    report = str(failure.value)
    assert "died with exit code -9" in report
    for rank in {0, 1, 2, 3} - {victim}:
        output = report.split(f"──── end of rank {rank}'s output ────")[1].split("────")[0]
        assert re.search("MicsCommError: MiCS (agreement on the )?replica guard over ranks", output), report


@pytest.mark.ranks(4)
def test_other_states_on_one_rank_are_named():
    engine = build(guarded(1, every=1), optimizer=adam)
    train(engine, 1)
    if dist.get_rank() == 2:
        inner = engine.optimizer.optimizer
        inner.state[engine.optimizer.fp32_partitioned_groups_flat[0]]["extra"] = torch.ones(1)
    with pytest.raises(MicsGuardError, match=r"rank 2 has other states than rank 0.*'extra'"):
        engine.optimizer.mics_guard.check(engine, "now", stepped=True)
    same_on_all_ranks({"alive": torch.ones(1)})
