"""Saving and resuming real engines, on the same ranks and on others."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from cases import slow
from checkpoint_engines import RESHAPE, adamw, digest, engine_of, reshape
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from helpers import DataParallelUnit, assert_losses_close, build, ds_config, environment, full_params, train
from torch import nn

from mics_ds.check.meter import CommMeter
from mics_ds.checkpoint import folder as folders
from mics_ds.checkpoint import manifest, save
from mics_ds.checkpoint.background import wait_for_saves
from mics_ds.errors import MicsCheckpointError

# ------------------------------------------------------------------------- resuming after kill -9

OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
RUNS = [(p, {}) for p in (1, 2, 4)] + [(2, OFFLOADED)]


STEPS = 2


def train_save_train(folder, dtype):
    """Train, save and train on, for every partition size. Return what to compare with."""
    results = []
    for index, (p, zero) in enumerate(RUNS):
        engine = engine_of(p, dtype=dtype, zero=zero)
        train(engine, STEPS)
        engine.save_checkpoint(f"{folder}/{index}", client_state={"of": dist.get_rank(), "p": p})
        results.append((train(engine, STEPS), digest(engine)))
    return results


def resume_train(folder, dtype):
    results = []
    for index, (p, zero) in enumerate(RUNS):
        engine = engine_of(p, dtype=dtype, zero=zero, seed=99)
        _, client_state = engine.load_checkpoint(f"{folder}/{index}")
        assert {key: client_state[key] for key in ("of", "p")} == {"of": dist.get_rank(), "p": p}
        results.append((train(engine, STEPS), digest(engine)))
    return results


@pytest.mark.parametrize("dtype", ["fp32", *(slow(dtype) for dtype in ("bf16", "fp16"))])
def test_resuming_after_kill_9_is_as_if_nothing_had_happened(pools, tmp_path, dtype):
    arguments = {"folder": str(tmp_path), "dtype": dtype}
    # fresh: the pool, that is all ranks, is killed by SIGKILL when it has answered
    expected = pools.run(4, __name__, "train_save_train", arguments, 120, fresh=True)
    actual = pools.run(4, __name__, "resume_train", arguments, 120, fresh=True)
    for rank in range(4):
        for (losses, states), (same_losses, same_states), (p, zero) in zip(expected[rank], actual[rank], RUNS):
            assert same_losses == losses, (rank, p, zero)
            assert same_states == states, (rank, p, zero)


# ------------------------------------------------------------------------------- other shapes


@pytest.mark.ranks(4)
@pytest.mark.parametrize("optimizer", ["adamw", slow("sgd")])
@pytest.mark.parametrize(
    ("old", "new"),
    [(2, 4), slow(4, 2), (None, 2), *(slow(*pair) for pair in [(2, 1), (1, 4), (None, 1)])],
)
def test_resume_in_another_number_of_shards(tmp_path, old, new, optimizer):
    make = {"adamw": adamw, "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9)}[optimizer]
    engine = engine_of(old, optimizer=make, zero={"sub_group_size": 150})
    train(engine, 3)
    engine.save_checkpoint(str(tmp_path))
    expected = train(engine, 3)
    refusing = engine_of(new, optimizer=make, seed=7)
    before = digest(refusing)
    with pytest.raises(MicsCheckpointError, match=rf"{old or 4} shards and this job {new}.*mics_reshape_checkpoint"):
        refusing.load_checkpoint(str(tmp_path))
    assert digest(refusing) == before, "a refused checkpoint must leave everything as it was"
    resumed = engine_of(new, optimizer=make, seed=8, zero=RESHAPE)
    resumed.load_checkpoint(str(tmp_path))
    assert resumed.global_steps == 3
    assert_losses_close(train(resumed, 3), expected, 1e-6)


@pytest.mark.ranks(4)
def test_keys_of_stock_that_mics_serves_in_its_own_way(tmp_path):
    """Stock trains with elastic_checkpoint, and fails when it saves. Here it lets another number of shards resume."""
    zero = {"elastic_checkpoint": True, "pipeline_loading_checkpoint": True}
    extra = {"zero": zero, "checkpoint": {"writer": {"type": "python", "decoupled": True}}}
    engine = engine_of(2, **extra)
    train(engine, 2)
    engine.save_checkpoint(str(tmp_path), tag="two")
    expected = train(engine, 2)
    again = engine_of(4, seed=7, **extra)
    again.load_checkpoint(str(tmp_path), tag="two")
    assert_losses_close(train(again, 2), expected, 1e-6)
    strict = engine_of(4, zero={**zero, "mics_reshape_checkpoint": False})
    with pytest.raises(MicsCheckpointError, match="mics_reshape_checkpoint"):
        strict.load_checkpoint(str(tmp_path), tag="two")


@pytest.mark.ranks(4)
def test_other_sub_groups_need_the_flag_too(tmp_path):
    engine = engine_of(2)
    train(engine, 3)
    engine.save_checkpoint(str(tmp_path))
    expected = train(engine, 3)
    with pytest.raises(MicsCheckpointError, match=r"sub_group_size"):
        engine_of(2, zero={"sub_group_size": 100}).load_checkpoint(str(tmp_path))
    resumed = engine_of(2, seed=8, zero={"sub_group_size": 100, **RESHAPE})
    resumed.load_checkpoint(str(tmp_path))
    assert_losses_close(train(resumed, 3), expected, 1e-6)


def save_on(folder, p, steps):
    engine = engine_of(p)
    train(engine, steps, rank=dist.get_rank() % 2)
    engine.save_checkpoint(folder)
    return train(engine, steps, rank=dist.get_rank() % 2)


def resume_on(folder, p, steps, zero=None):
    engine = engine_of(p, seed=5, zero=zero)
    engine.load_checkpoint(folder)
    return train(engine, steps, rank=dist.get_rank() % 2)


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4)])
@pytest.mark.parametrize("p", [slow(1), 2])
def test_resume_on_another_number_of_ranks(pools, tmp_path, before, after, p):
    # Ranks 2 and 3 train on the data of ranks 0 and 1, so that n = 2 and n = 4 have the same mean gradients.
    expected = pools.run(before, __name__, "save_on", {"folder": str(tmp_path), "p": p, "steps": 4}, 60)
    actual = pools.run(after, __name__, "resume_on", {"folder": str(tmp_path), "p": p, "steps": 4}, 60)
    assert_losses_close(actual[0], expected[0], 1e-6)


def test_resume_on_other_ranks_in_other_shards(pools, tmp_path):
    expected = pools.run(4, __name__, "save_on", {"folder": str(tmp_path), "p": 4, "steps": 4}, 60)
    arguments = {"folder": str(tmp_path), "p": 2, "steps": 4, "zero": RESHAPE}
    assert_losses_close(pools.run(2, __name__, "resume_on", arguments, 60)[0], expected[0], 1e-6)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("sub_group_size", [slow(10**9), 150])
def test_from_mics_to_stock_zero3_and_back_by_the_command(tmp_path, sub_group_size):
    zero = {"sub_group_size": sub_group_size}
    engine = engine_of(2, zero=zero)
    train(engine, 4)
    engine.save_checkpoint(str(tmp_path / "mics"))
    expected = train(engine, 4)
    with pytest.raises(MicsCheckpointError, match=r"in 2 shards, and stock ZeRO-3 on 4 ranks.*mics-ds reshape"):
        engine_of(None).load_checkpoint(str(tmp_path / "mics"))
    if dist.get_rank() == 0:
        for source, target, shards in (("mics", "stock", 4), ("stock", "one", 1)):
            result = reshape(tmp_path / source / "global_step4", tmp_path / target, "--shards", shards)
            assert result.returncode == 0, result.stderr
            assert "could not hook" not in result.stderr
    dist.barrier()
    stock = engine_of(None, seed=6, zero=zero)
    stock.load_checkpoint(str(tmp_path / "stock"))
    assert_losses_close(train(stock, 4), expected, 1e-6)
    back = engine_of(1, seed=6, zero=zero)
    back.load_checkpoint(str(tmp_path / "one"))
    assert_losses_close(train(back, 4), expected, 1e-6)


@pytest.mark.ranks(4)
def test_stock_engines_and_folders_of_mics(tmp_path):
    """p = n is stock's own layout, and stock may save where MiCS has saved."""
    engine = engine_of(4)
    train(engine, 3)
    engine.save_checkpoint(str(tmp_path), tag="t")
    expected = train(engine, 3)
    stock = engine_of(None, seed=6)
    stock.load_checkpoint(str(tmp_path), tag="t")
    assert_losses_close(train(stock, 3), expected, 1e-6)
    stock.save_checkpoint(str(tmp_path), tag="t")
    assert not (tmp_path / "t" / manifest.NAME).exists()
    again = engine_of(4, seed=7)
    again.load_checkpoint(str(tmp_path), tag="t")
    assert again.global_steps == 6


# ----------------------------------------------------------------------------- other ways to load


@pytest.mark.ranks(4)
@pytest.mark.parametrize("dtype", [slow("fp32"), "bf16"])
def test_zero_to_fp32_and_the_16_bit_model_equal_the_live_weights(tmp_path, dtype):
    engine = engine_of(2, dtype=dtype, zero={"stage3_gather_16bit_weights_on_model_save": True})
    train(engine, 3)
    engine.save_checkpoint(str(tmp_path))
    engine.save_16bit_model(str(tmp_path), "model.bin")
    live = {name: deepspeed.utils.safe_get_full_fp32_param(param) for name, param in engine.module.named_parameters()}
    gathered = full_params(engine)
    saved = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    for name, param in engine.module.named_parameters():
        expected = live[name] if param.requires_grad else gathered[name].float()
        assert torch.equal(saved[name].float(), expected), name
    script = tmp_path / "zero_to_fp32.py"
    if dist.get_rank() == 0:
        command = [sys.executable, str(script), str(tmp_path), str(tmp_path / "out")]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert len(list((tmp_path / "out").glob("*.bin"))) == 1
    sixteen = torch.load(tmp_path / "model.bin", weights_only=True)
    for name, value in gathered.items():
        assert torch.equal(sixteen[name], value), name


def convert_to_universal(folder, tag):
    arguments = ["--input_folder", f"{folder}/{tag}", "--output_folder", f"{folder}/universal"]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def one_group(params):
    return torch.optim.AdamW(params, lr=0.01)  # DeepSpeed's conversion keeps the settings of one group only


def save_for_universal(folder):
    engine = engine_of(2, optimizer=one_group)
    train(engine, 4)
    engine.save_checkpoint(folder, tag="t")
    return train(engine, 4)


def resume_universal(folder, p):
    # the seed it was trained from, because DeepSpeed restores no frozen parameters from universal checkpoints
    engine = engine_of(p, optimizer=one_group, checkpoint={"load_universal": True})
    engine.load_checkpoint(folder, tag="universal")
    return train(engine, 4)


def test_universal_checkpoints_round_trip(pools, tmp_path):
    expected = pools.run(4, __name__, "save_for_universal", {"folder": str(tmp_path)}, 60)[0]
    convert_to_universal(tmp_path, "t")
    for p in (4, None):
        actual = pools.run(4, __name__, "resume_universal", {"folder": str(tmp_path), "p": p}, 60)[0]
        assert_losses_close(actual, expected, 1e-6)


@pytest.mark.ranks(4)
def test_weights_only_modules_only_and_without_frozen_parameters(tmp_path):
    engine = engine_of(2)
    train(engine, 2)
    engine.save_checkpoint(str(tmp_path), tag="a", exclude_frozen_parameters=True)
    expected = full_params(engine)
    train(engine, 2)
    engine.save_checkpoint(str(tmp_path), tag="b")
    other = engine_of(2, seed=5)
    frozen = full_params(other)["frozen.weight"]
    # not the latest one: stock DeepSpeed would take the weights of "b"
    other.load_checkpoint(str(tmp_path), tag="a", load_optimizer_states=False, load_module_strict=False)
    actual = full_params(other)
    for name, value in expected.items():
        assert torch.equal(actual[name], frozen if name == "frozen.weight" else value), name


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [1, slow(2), 4])
def test_module_only(tmp_path, p):
    """Stock DeepSpeed restores nothing but frozen parameters, unless told to leave the optimizer states as well."""
    engine = engine_of(2)
    train(engine, 2)
    engine.save_checkpoint(str(tmp_path))
    expected = full_params(engine)
    other = engine_of(p, seed=5, zero=RESHAPE)
    other.load_checkpoint(str(tmp_path), load_module_only=True)
    for name, value in full_params(other).items():
        assert torch.equal(value, expected[name]), name
    assert other.global_steps == 0
    train(other, 1)


@pytest.mark.slow
@pytest.mark.ranks(4, fresh=True)  # DeepSpeed keeps the mpu in a module global
@pytest.mark.parametrize("p", [1, 2])
def test_under_tensor_parallelism(tmp_path, p):
    mpu = DataParallelUnit()
    rank = mpu.get_data_parallel_rank()

    def engine(size, seed, **zero):
        torch.manual_seed(seed)
        return build(ds_config(size, zero=zero), mpu=mpu, seed=seed, optimizer=adamw)

    saved = engine(p, 1 + dist.get_rank() % 2)
    train(saved, 2, rank=rank)
    saved.save_checkpoint(str(tmp_path))
    expected = train(saved, 2, rank=rank)
    described = manifest.read(tmp_path / "global_step2")
    assert (described.shards, described.replicas, described.model_parallel) == (p, 2 // p, 2)
    assert len(described.files) == 2 * 2 * p
    again = engine(p, 9)
    again.load_checkpoint(str(tmp_path))
    assert train(again, 2, rank=rank) == expected
    other = engine(3 - p, 9, **RESHAPE)
    other.load_checkpoint(str(tmp_path))
    assert_losses_close(train(other, 2, rank=rank), expected, 1e-6)
    if dist.get_rank() == 0:
        result = reshape(tmp_path / "global_step2", tmp_path / "cut", "--shards", 3 - p)
        assert result.returncode == 0, result.stderr
    dist.barrier()
    cut = engine(3 - p, 9)
    cut.load_checkpoint(str(tmp_path / "cut"))
    assert_losses_close(train(cut, 2, rank=rank), expected, 1e-6)


@pytest.mark.ranks(4)
def test_two_engines_in_one_process(tmp_path):
    engines = [engine_of(2), engine_of(1, seed=3)]
    for index, engine in enumerate(engines):
        train(engine, 2 + index)
        engine.save_checkpoint(str(tmp_path / str(index)))
    expected = [digest(engine) for engine in engines]
    for index, p in enumerate((2, 1)):
        again = engine_of(p, seed=9)
        again.load_checkpoint(str(tmp_path / str(index)))
        assert digest(again) == expected[index]


@pytest.mark.ranks(4)
def test_parameters_that_leave_shards_empty(tmp_path):
    """Three elements on four shards: the last one is all padding."""

    def tiny():
        return nn.Linear(1, 3)

    config = ds_config(4)
    make = lambda params: torch.optim.Adam(params, lr=0.1)  # noqa: E731
    engine = build(config, tiny, optimizer=make)
    for _ in range(3):
        engine.backward(engine(torch.ones(2, 1)).sum())
        engine.step()
    engine.save_checkpoint(str(tmp_path))
    expected = full_params(engine)
    for p in (4, 2, 1):
        config = ds_config(p, zero=RESHAPE)
        again = build(config, tiny, seed=4, optimizer=make)
        again.load_checkpoint(str(tmp_path))
        for name, value in full_params(again).items():
            assert torch.equal(value, expected[name])


# ------------------------------------------------------------------------------ who writes what


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("p", "writers"), [slow(1, {0: 0}), (2, {0: 0, 1: 3}), slow(4, {0: 0, 1: 1, 2: 2, 3: 3})])
def test_one_writer_per_file_and_one_replica_of_bytes(tmp_path, p, writers):
    with environment(MICS_DS_RANKS_PER_NODE="2"):
        engine = engine_of(p)
    stock = engine_of(None)
    for one in (engine, stock):
        train(one, 2)
    with CommMeter() as meter:
        engine.save_checkpoint(str(tmp_path / "mics"))
    stock.save_checkpoint(str(tmp_path / "stock"))
    described = manifest.read(tmp_path / "mics" / "global_step2")
    on_disk = {path.name for path in (tmp_path / "mics" / "global_step2").iterdir()} - {manifest.NAME}
    assert on_disk == set(described.files)
    assert len(on_disk) == 2 * p, "one replica's files"
    for name, record in described.files.items():
        shard = int(re.search(r"zero_pp_rank_(\d+)", name)[1])
        assert record.writer == writers[shard], "shard i by replica i mod r"
        assert (tmp_path / "mics" / "global_step2" / name).stat().st_size == record.bytes
    assert (described.shards, described.replicas, described.ranks_per_node) == (p, 4 // p, (2, 2))
    # no more than stock's, but for what each file repeats: the mics key in the configuration, and hop 1's way
    in_stock = sum(path.stat().st_size for path in (tmp_path / "stock" / "global_step2").iterdir())
    assert described.total_bytes <= in_stock + 2 * p * 200
    # no parameter is gathered for saving: what is sent is notes of the ranks
    assert not [call for call in meter.select("all_gather") if call.label == "" and call.payload > 65536]


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [2, slow(4)])
def test_folders_local_to_each_node(tmp_path, p):
    """Two "nodes" of two ranks, each with a folder of its own."""
    own = str(tmp_path / f"node{dist.get_rank() // 2}")
    local = {"checkpoint": {"use_node_local_storage": True}}
    with environment(MICS_DS_RANKS_PER_NODE="2"):
        engine = engine_of(p, **local)
        train(engine, 3)
        engine.save_checkpoint(own)
        expected = train(engine, 3)
        again = engine_of(p, seed=8, **local)
        again.load_checkpoint(own)
        assert train(again, 3) == expected
        described = manifest.read(Path(own) / "global_step3")
        shards = {int(re.search(r"zero_pp_rank_(\d+)", name)[1]) for name in described.files}
        assert shards == {engine.optimizer.mics_groups.partition.ranks.index(r) for r in node_ranks(engine)}
        assert {record.writer // 2 for record in described.files.values()} == {dist.get_rank() // 2}
        # not shared, although nobody said so
        with pytest.raises(MicsCheckpointError, match=r"use_node_local_storage"):
            engine_of(p, seed=8).save_checkpoint(own)
        # a node whose folder was lost
        dist.barrier()
        if dist.get_rank() == 3:
            for path in (Path(own) / "global_step3").glob("*_optim_states.pt"):
                path.unlink()
        dist.barrier()
        with pytest.raises(MicsCheckpointError, match=r"ranks? .*3.*node1.*optim_states.pt is missing"):
            engine_of(p, seed=8, **local).load_checkpoint(own)


def node_ranks(engine):
    """Members of this rank's partition group on its node."""
    return [r for r in engine.optimizer.mics_groups.partition.ranks if r // 2 == dist.get_rank() // 2]


@pytest.mark.ranks(4)
def test_nodes_that_disagree_on_latest_take_the_newer_complete_one(tmp_path):
    own = str(tmp_path / f"node{dist.get_rank() // 2}")
    local = {"checkpoint": {"use_node_local_storage": True}}
    with environment(MICS_DS_RANKS_PER_NODE="2"):
        engine = engine_of(2, **local)
        for _ in range(2):
            train(engine, 1)
            engine.save_checkpoint(own)
        dist.barrier()
        if dist.get_rank() == 2:
            folders.write_latest(Path(own), "global_step1")
        dist.barrier()
        again = engine_of(2, seed=8, **local)
        again.load_checkpoint(own)
        assert again.global_steps == 2


@pytest.mark.ranks(4)
def test_files_that_need_unpickling_can_be_forbidden(tmp_path):
    engine = engine_of(2)
    train(engine, 1)
    engine.save_checkpoint(str(tmp_path), tag="plain", client_state={"epoch": 3})
    engine.save_checkpoint(str(tmp_path), tag="objects", client_state={"path": Path("x")})
    with environment(MICS_DS_WEIGHTS_ONLY="1"):
        _, state = engine_of(2).load_checkpoint(str(tmp_path), tag="plain")
        assert state["epoch"] == 3
        with pytest.raises(MicsCheckpointError, match=r"MICS_DS_WEIGHTS_ONLY=1 forbids it.*Path"):
            engine_of(2).load_checkpoint(str(tmp_path), tag="objects")
    _, state = engine_of(2).load_checkpoint(str(tmp_path), tag="objects")
    assert state["path"] == Path("x")


# --------------------------------------------------------------------- metadata at thousands of ranks


@pytest.mark.ranks(4)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_rank_hears_from_all_others_when_nothing_is_wrong(tmp_path, asynchronous):
    """Notes that are all the same cost 32 bytes, whatever the number of ranks; files are told to the publisher only."""
    engine, again = engine_of(2), engine_of(2)
    engine.save_checkpoint(str(tmp_path), tag="first", async_save=asynchronous)
    wait_for_saves()
    read, compared = [], []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dist, "all_gather_object", None)
        patched.setattr(dist, "gather_object", None)
        posted, all_reduce = save._posted_files, dist.all_reduce

        def counting(*arguments):
            found = posted(*arguments)
            read.extend(found)
            return found

        def all_reduced(tensor, *args, **kwargs):
            compared.append(tensor.nbytes)
            return all_reduce(tensor, *args, **kwargs)

        patched.setattr(save, "_posted_files", counting)
        patched.setattr(dist, "all_reduce", all_reduced)
        engine.save_checkpoint(str(tmp_path), tag="second", async_save=asynchronous)
        wait_for_saves()
        again.load_checkpoint(str(tmp_path), tag="second")
    assert 4 <= compared.count(32) <= 16
    publishes = dist.get_rank() == 0 and not asynchronous  # else another process does
    assert len(read) == (4 if publishes else 0), "two files of each of the two owners"
