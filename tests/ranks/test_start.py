"""Start-up on real ranks: the job's timeout and backend, subsets of the ranks, and one rank that fails."""

from __future__ import annotations

import base64
import functools
import json
import multiprocessing
import os
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from cases import every, slow
from deepspeed.runtime.config import DeepSpeedConfig
from helpers import OddNet, batch, build, ds_config, environment, train
from local_ranks import LocalRanks
from rank_pool import Pools
from torch.distributed import distributed_c10d as c10d

from mics_ds.comm import agreement
from mics_ds.comm.groups import MicsGroups, build_groups
from mics_ds.comm.rank_group import RankGroup
from mics_ds.config import MicsConfig
from mics_ds.errors import MicsAgreementError, MicsConfigError, MicsError
from mics_ds.plugin import context

PATIENCE = timedelta(minutes=47)


def rejoin(store: str, backend: str | None, timeout: timedelta | None = None) -> None:
    """In a fresh rank: the process group of another job."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    named = {} if backend is None else {"backend": backend}
    dist.init_process_group(
        **named, store=dist.FileStore(store, world_size), rank=rank, world_size=world_size, timeout=timeout
    )


def all_groups(groups: MicsGroups) -> list[RankGroup]:
    nodes = [pair for pair in (groups.hierarchy, groups.scatter_hierarchy) if pair is not None]
    found = [
        groups.partition,
        groups.scatter,
        groups.replication,
        *(g for pair in nodes for g in (pair.inter, pair.intra)),
    ]
    return [group for group in found if group is not None]


# --------------------------------------------------------------------------------------------------
# The job's timeout and backend


@pytest.mark.ranks(4, fresh=True)
def test_groups_and_agreement_are_as_patient_as_the_job(tmp_path):
    rejoin(str(tmp_path / "store"), "gloo", PATIENCE)
    assert agreement.job_timeout_s() == PATIENCE.total_seconds()
    with environment(MICS_DS_RANKS_PER_NODE="2"):
        made = [build_groups(MicsConfig(p), dist.group.WORLD) for p in (2, 4)]
    groups = [group for item in made for group in all_groups(item)]
    assert len(groups) == 3 + 2 + 4
    for group in groups:
        assert agreement.timeout_of(group.group, torch.device("cpu")) == PATIENCE


def losses_with(backend: str | None, folder: str) -> tuple[list[float], bool, str]:
    if backend != "gloo":
        rejoin(os.path.join(folder, "store"), backend)
    engine = build(ds_config(2))
    losses = train(engine, 3)
    groups = engine.optimizer.mics_groups
    return losses, groups.scatter.group is groups.partition.group, groups.ways.reduce_scatter


@pytest.mark.parametrize("backend", [slow(None), slow("cpu:gloo"), "cpu:gloo,cuda:fake"])
def test_gloo_under_another_name(pools: Pools, backend: str | None, tmp_path: Path) -> None:
    """A backend for each device, as ``cpu:gloo,cuda:nccl``, and the one that torch chooses by itself."""
    expected = pools.run(4, __name__, "losses_with", {"backend": "gloo", "folder": ""}, timeout=60)
    arguments = {"backend": backend, "folder": str(tmp_path)}
    assert pools.run(4, __name__, "losses_with", arguments, timeout=60, fresh=True) == expected
    assert [item[1:] for item in expected] == [(False, "all_to_all")] * 4


def sums(groups: MicsGroups) -> None:
    """Each group reaches its own ranks, all of them."""
    for group in all_groups(groups):
        total = torch.tensor([10.0 ** dist.get_rank()])
        dist.all_reduce(total, group=group.group)
        assert total.item() == sum(10**rank for rank in group.ranks)
        assert group.rank == dist.get_rank(group.group)


@pytest.mark.parametrize("bound", [True, False])
def test_ranks_with_other_groups_of_their_own(bound: bool) -> None:
    """torch's names depend on how many groups a process has. Where the world is bound to a device, as it is with NCCL
    under DeepSpeed, torch would split its communicator, which takes all ranks of the world."""
    processes = multiprocessing.get_context("forkserver")
    with LocalRanks(4, functools.partial(ranks_with_other_groups, bound), processes) as ranks:
        assert ranks.collect(60) == [None] * 4


def ranks_with_other_groups(bound: bool, rank: int, folder: Path, pipe: Connection) -> None:
    store = dist.FileStore(str(folder / "store"), 4)
    dist.init_process_group("cpu:gloo", store=store, rank=rank, world_size=4, timeout=timedelta(seconds=30))
    for ranks in ([0], [0, 1], [1, 3]):
        dist.new_group(ranks)
    device = torch.device("cuda:0") if bound else None
    dist.group.WORLD.bound_device_id = device
    with pytest.MonkeyPatch.context() as patch, environment(MICS_DS_RANKS_PER_NODE="2"):
        for owner, name in ((dist, "split_group"), (c10d, "split_group"), (c10d, "_get_split_source")):
            patch.setattr(owner, name, must_not_be_called)
        made = [build_groups(MicsConfig(p), dist.group.WORLD) for p in (4, 2, 1)]
    assert dist.group.WORLD.bound_device_id == device
    dist.group.WORLD.bound_device_id = None
    for groups in made:
        sums(groups)
    dist.barrier()
    pipe.send(("result", None))


def must_not_be_called(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a communicator is split")


# --------------------------------------------------------------------------------------------------
# Engines built by hand


@pytest.mark.ranks(2)
def test_an_engine_that_is_built_with_positional_arguments_runs_mics():
    losses = []
    for by_hand in (False, True):
        if by_hand:
            torch.manual_seed(1234)
            module = OddNet()
            params = [param for param in module.parameters() if param.requires_grad]
            optimizer, config = torch.optim.SGD(params, lr=0.05, momentum=0.9), ds_config(1)
            unused = [None] * 5
            engine = deepspeed.DeepSpeedEngine(
                None, module, optimizer, params, *unused, config, DeepSpeedConfig(config)
            )
        else:
            engine = build(ds_config(1))
        assert engine.optimizer.mics_groups.partition.size == 1
        losses.append(train(engine, 2))
        engine.destroy()
    assert losses[0] == losses[1]


@pytest.mark.ranks(2, fresh=True)  # said once in a job
def test_disabled_everywhere_is_stock_zero3_and_says_so(monkeypatch):
    expected = train(build(ds_config()), 2)
    monkeypatch.setenv(context.DISABLE_ENV, "1")
    said: list[str] = []
    monkeypatch.setattr(context, "log_rank0", said.append)
    engine = build(ds_config(1), inside_init=True)
    assert not hasattr(engine.optimizer, "mics_groups")
    assert train(engine, 2) == expected
    assert said == ["MICS_DS_DISABLE is set: mics_ keys are ignored and this is stock ZeRO-3 over all ranks."]


# --------------------------------------------------------------------------------------------------
# Subsets of the ranks


class Mpu:
    """Data parallelism over some ranks, and no other parallelism."""

    def __init__(self, *sets: list[int]) -> None:
        made = {tuple(ranks): dist.new_group(ranks) for ranks in sets}
        self.group = next(group for ranks, group in made.items() if dist.get_rank() in ranks)
        self.alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]

    def get_data_parallel_group(self) -> Any:
        return self.group

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.group)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.group)

    def get_model_parallel_group(self) -> Any:
        return self.alone

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


def losses(engine: Any, steps: int) -> list[float]:
    """Of this rank alone."""
    found = []
    for step in range(steps):
        loss = engine(*batch(step, 0, dist.get_rank()))
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found


@pytest.mark.ranks(4, fresh=True)
def test_two_halves_of_the_job_each_with_mics():
    mpu = Mpu([0, 1], [2, 3])
    stock = losses(build(ds_config(), mpu=mpu), 3)
    for p in (1, 2):
        engine = build(ds_config(p), mpu=mpu)
        assert engine.optimizer.mics_groups.full.size == 2
        assert engine.optimizer.mics_groups.partition.size == p
        assert losses(engine, 3) == pytest.approx(stock, rel=1e-5)


@pytest.mark.ranks(4, fresh=True)
def test_one_part_of_the_job_is_busy_with_something_else():
    """What ranks 1 and 3 build does not disturb the agreement of all that follows.

    Not a stage 3 engine: DeepSpeed's has a barrier over the world, so nobody can build one on a subset alone. Nor the
    first engine of the job, for which DeepSpeed makes a group of the world.
    """
    build(ds_config())
    mpu = Mpu([1, 3], [0, 2])
    if dist.get_rank() in (1, 3):
        config = ds_config()
        config["zero_optimization"] = {"stage": 1}
        losses(build(config, mpu=mpu), 2)
        for p in (None, 1, 2):
            with deepspeed.zero.Init(config_dict_or_path=ds_config(p), mpu=mpu, data_parallel_group=mpu.group):
                param = torch.nn.Linear(2, 2).weight
            assert p is None or param.mics_groups.full.ranks == (1, 3)
    engine = build(ds_config(2), mpu=Mpu([0, 1, 2, 3]), inside_init=True)  # DeepSpeed remembers the last one
    assert engine.optimizer.mics_groups.full.size == 4
    train(engine, 1)


@pytest.mark.ranks(4, fresh=True)
def test_parameters_over_other_ranks_than_the_engine_are_refused():
    """zero.Init works over the world unless it is given a group. Half of the partition groups are the same here."""
    with pytest.raises(MicsConfigError, match="must be partitioned over the group the optimizer uses"):
        build(ds_config(2), mpu=Mpu([0, 1], [2, 3]), inside_init=True)


@pytest.mark.ranks(4)
def test_parameters_that_were_made_with_other_keys_than_the_engines():
    """They follow the engine's, and must be partitioned as it partitions."""

    def made_with(config: dict[str, Any]) -> torch.nn.Module:
        with deepspeed.zero.Init(config_dict_or_path=config):
            return OddNet()

    with pytest.raises(MicsConfigError, match=r"ranks \[\d, \d\] of \[0, 1, 2, 3\], but zero.Init used another"):
        build(ds_config(2), lambda: made_with(ds_config(4)))
    engine = build(ds_config(2), lambda: made_with(ds_config(2, zero={"mics_guard": True})))
    assert {param.mics_groups.config.guard for param in engine.module.parameters()} == {None}
    train(engine, 1)


# --------------------------------------------------------------------------------------------------
# One rank fails


@pytest.mark.ranks(4, fresh=True)
def test_a_key_that_one_rank_of_a_subset_lacks():
    """It is an error on the ranks of the subset that have the key; the one without runs into their end."""
    mpu = Mpu([0, 2], [1, 3])
    among = tuple(dist.get_process_group_ranks(mpu.group))
    if dist.get_rank() == 2:
        context.compare(context.Request(), among)  # what an engine does first
    elif dist.get_rank() == 0:
        with pytest.raises(MicsAgreementError, match="must run MiCS or none, but rank 2 runs without it"):
            build(ds_config(2), mpu=mpu)
    else:
        build_groups(MicsConfig(1), mpu.group, among)


UNREADABLE = {
    "missing": (lambda path: path.unlink(), ValueError, "ValueError: Expected a string path to an existing"),
    "cut off": (lambda path: path.write_text(path.read_text()[:-9]), ValueError, "HjsonDecodeError"),
    "cut off before the key": (lambda path: path.write_text(path.read_text()[:30]), ValueError, "HjsonDecodeError"),
    "not a file": (lambda path: (path.unlink(), path.mkdir()), OSError, "IsADirectoryError"),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe\x00"), ValueError, "UnicodeDecodeError"),
}


READ_BY_DEFAULT = [(name, place % 2 == 0) for place, name in enumerate(UNREADABLE)]


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("name", "inside_init"), every([*UNREADABLE], (True, False), default=READ_BY_DEFAULT))
def test_a_configuration_that_one_rank_cannot_read(name, inside_init, tmp_path):
    spoil, own_error, words = UNREADABLE[name]
    rank, path = dist.get_rank(), tmp_path / f"ds_config{dist.get_rank()}.json"
    path.write_text(json.dumps(ds_config(2)))
    if rank == 2:
        spoil(path)
    expected = pytest.raises(own_error) if rank == 2 else pytest.raises(MicsAgreementError, match=f"rank 2: {words}")
    with environment(MICS_DS_AGREEMENT_TIMEOUT="20"), expected as caught:
        build(str(path), inside_init=inside_init)
    assert rank == 2 or not isinstance(caught.value, own_error)
    train(build(ds_config(2)), 1)


@pytest.mark.ranks(2)
def test_a_configuration_in_base64():
    config = ds_config(1)
    engine = build(base64.urlsafe_b64encode(json.dumps(config).encode()).decode())
    assert engine.optimizer.mics_groups.partition.size == 1
    train(engine, 1)


@pytest.mark.ranks(4)
def test_an_engine_that_one_rank_cannot_build():
    """After the first round, in DeepSpeed's own checks, and where one rank cannot tell where it runs."""
    odd = dist.get_rank() == 1
    words = "You are using an untested ZeRO Optimizer"
    expected = pytest.raises(AssertionError) if odd else pytest.raises(MicsAgreementError, match=f"rank 1: .*{words}")
    with expected:
        build({**ds_config(2), "zero_allow_untested_optimizer": not odd})
    simulated = environment(MICS_DS_RANKS_PER_NODE="none" if odd else "2")
    with simulated, pytest.raises(MicsError, match="must be a positive integer"):
        build(ds_config(2), inside_init=True)
    train(build(ds_config(2)), 1)
