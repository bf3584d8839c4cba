"""Start-up of large jobs, as one of their ranks sees it: communicators, and requests to the rendezvous store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_streams import FakeStreams
from torch.distributed import distributed_c10d as c10d
from torch.testing._internal.distributed import fake_pg

from mics_ds.checkpoint.coordination import Roles
from mics_ds.checkpoint.memory import mirrors
from mics_ds.comm import agreement, groups, placement
from mics_ds.comm.groups import MicsGroups
from mics_ds.comm.rank_group import RankGroup
from mics_ds.config import MicsConfig
from mics_ds.plugin.context import Build, Request, compare

RANKS_PER_NODE = 8
TRAY, RACK = 4, 72
PATIENCE = timedelta(minutes=47)


def tray_of(rank: int) -> placement.Claim:
    """A rank of GB200 NVL72: hosts of four GPUs, eighteen of them on one NVLink fabric."""
    return placement.Claim("hostname", f"tray-{rank // TRAY}", rank % TRAY, f"rack-{rank // RACK}/1")


def place_of(rank: int) -> placement.Claim:
    node = f"node-{rank // RANKS_PER_NODE:05d}.cluster.internal"
    return placement.Claim("hostname", node, rank % RANKS_PER_NODE)


class Store:
    """A rendezvous store in which all other ranks state what this one states. Counts its requests.

    Args:
        comes: whether this rank is the first one to come, or the last one, which ends the round.
    """

    def __init__(self, n: int, comes: str) -> None:
        self.n, self.comes = n, comes
        self.keys: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        self.nbytes = 0

    def set(self, key: str, value: str) -> None:
        self._count("set", value)
        self.keys[key] = value

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        found = self.keys.setdefault(key, value)
        self._count("compare_set", value, found)
        return found.encode()

    def add(self, key: str, amount: int) -> int:
        self._count("add")
        self.keys[key] = str(self.n)
        if self.comes == "first":
            self.keys[key.replace("same", "verdict")] = "ok"  # by the rank that comes last
            return amount
        return self.n

    def check(self, keys: list[str]) -> bool:
        self._count("check", *keys)
        return all(key in self.keys for key in keys)

    def get(self, key: str) -> bytes:
        self._count("get", self.keys[key])
        return self.keys[key].encode()

    def delete_key(self, key: str) -> bool:
        self._count("delete_key", key)
        return self.keys.pop(key, None) is not None

    def _count(self, request: str, *moved: str) -> None:
        self.requests[request] += 1
        self.nbytes += sum(map(len, moved))


class SplitGroup:
    """``torch.distributed.split_group`` as it was in torch 2.5 to 2.9, on the options of communicators alone.

    Without ``pg_options`` a split took the parent's own options, and not a copy: it wrote the child's name, its map of
    ranks and its parent there (pytorch #167125, #192110). In 2.9 the next split of that parent looked ranks up in that
    map.

    Args:
        version: of torch.
    """

    def __init__(self, version: tuple[int, int]) -> None:
        self._reads_map = version >= (2, 9)
        self.calls = 0
        self.options: dict[Any, dict[str, Any]] = {}

    def options_of(self, group: Any) -> dict[str, Any]:
        ranks = dist.get_process_group_ranks(group)
        return self.options.setdefault(group, {"name": group.group_name, "ranks": ranks, "split_from": None})

    def __call__(
        self, parent: Any, split: list[list[int]], timeout: Any = None, pg_options: Any = None, **_: Any
    ) -> Any:
        self.calls += 1
        live = self.options_of(parent)
        ranks = dist.get_process_group_ranks(parent)
        own = next(part for part in split if ranks.index(dist.get_rank()) in part)
        options = dict(live) if pg_options is not None else live
        members = [(live["ranks"] if self._reads_map else ranks)[place] for place in own]
        options.update(name=f"split {self.calls}", ranks=members, split_from=parent)
        return parent


class Job:
    """One rank of a large job on the ``fake`` backend, with every call that makes a communicator on record."""

    def __init__(
        self,
        n: int,
        rank: int,
        monkeypatch: pytest.MonkeyPatch,
        comes: str = "last",
        place_of: Callable[[int], placement.Claim] = place_of,
    ) -> None:
        self.place_of = place_of
        dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=rank, world_size=n)
        self.store = Store(n, comes)
        self.made: list[tuple[tuple[int, ...], timedelta | None]] = []
        """Ranks and timeout of each communicator."""
        self.exchanges = 0
        self._new_group = dist.new_group
        monkeypatch.setattr(c10d, "_get_default_store", lambda: self.store)
        monkeypatch.setattr(dist, "new_group", self.new_group)
        monkeypatch.setattr(agreement, "timeout_of", lambda *_: PATIENCE)
        monkeypatch.setattr(placement, "claim", place_of)
        monkeypatch.setattr(groups, "exchange", self.exchange)

    def new_group(self, ranks: list[int], **options: Any) -> Any:
        self.made.append((tuple(ranks), options.get("timeout")))
        assert options["use_local_synchronization"], "no rank outside is needed"
        assert dist.group.WORLD.bound_device_id is None, "torch would split the world"
        return self._new_group(ranks, **options)

    def exchange(self, note: Any, group: RankGroup, what: str) -> list[Any]:
        """What a collective brings: the places of all ranks, and the ranks of the one data-parallel group."""
        self.exchanges += 1
        return [(self.place_of(rank), group.ranks if rank == 0 else None) for rank in group.ranks]

    def start(self, config: MicsConfig, streams: Any = None) -> MicsGroups:
        """What ``zero.Init`` and an engine do: each compares, or builds its groups."""

        def build() -> MicsGroups:
            return groups.build_groups(config, dist.group.WORLD, streams=streams)

        in_init = build()
        compare(Request(config))
        in_engine = build()
        assert in_init.partition.group is in_engine.partition.group
        return in_engine


@pytest.fixture(autouse=True)
def _no_process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# Communicators


@pytest.mark.parametrize(
    ("n", "p", "staged"),
    [(64, 8, False), (64, 16, False), (64, 16, True), (512, 16, True), (4096, 16, True), (10240, 8, False)],
)
@pytest.mark.parametrize("streams", [True, False])
def test_communicators_do_not_grow_with_the_job(n, p, staged, streams, monkeypatch):
    """Partition and replication, between and inside nodes; and on a device without streams those of hop 1 once more."""
    job = Job(n, n - 1, monkeypatch)
    config = MicsConfig(p, hierarchical_params_gather=staged, hierarchical_grad_scatter=staged)
    made = job.start(config, FakeStreams() if streams else None)
    assert len(job.made) == (2 + 2 * staged if streams else 3 + 4 * staged)
    assert {timeout for _, timeout in job.made} == {PATIENCE}
    assert made.partition.ranks == made.scatter.ranks == tuple(range(n - p, n))
    assert (made.scatter.group is made.partition.group) == streams
    assert made.replication.ranks == tuple(range(p - 1, n, p))
    assert (made.hierarchy is not None) == staged
    if staged:
        assert made.hierarchy.inter.ranks == (n - 9, n - 1)
        assert made.hierarchy.intra.ranks == tuple(range(n - 8, n))
    assert [ranks for ranks, _ in job.made].count(made.replication.ranks) == 1


@pytest.mark.parametrize("known", ["by the configuration", "by NVML"])
@pytest.mark.parametrize("p", [TRAY, RACK, 2 * RACK])
def test_stages_and_hop2_are_between_domains_and_disks_of_hosts(p, known, monkeypatch):
    """72 hosts of four ranks in four domains of 72, where two stages by host would be slower than one."""
    n, rank = 4 * RACK, 4 * RACK - 1

    def by_host(rank: int) -> placement.Claim:
        return replace(tray_of(rank), fabric="")

    job = Job(n, rank, monkeypatch, place_of=tray_of if known == "by NVML" else by_host)
    config = MicsConfig(p, domain_size=None if known == "by NVML" else RACK)
    made = job.start(config, FakeStreams())
    assert made.layout.domains == tuple(rank // RACK for rank in range(n))
    if p <= RACK:
        assert made.layout.why_not_hierarchical == "partition group 0 lies inside one fast domain"
        assert made.hierarchy is made.scatter_hierarchy is None
    else:
        assert made.hierarchy.inter.ranks == (rank - RACK, rank)
        assert made.hierarchy.intra.ranks == tuple(range(n - RACK, n))
    if p == RACK:
        assert {made.layout.domain_of[member] for member in made.replication.ranks} == {0, 1, 2, 3}
    # Disks, and copies in memory, are those of hosts.
    assert made.node_of == {rank: rank // TRAY for rank in range(n)}
    roles = Roles(made, node_local=True)
    assert roles.peers == list(range(n - TRAY, n))
    assert len(roles.publishers) == n // TRAY
    assert all(made.node_of[member] != made.node_of[keeper] for member, keeper in mirrors(made.node_of).items())
    assert roles.describe("t", 1, "s", {}).ranks_per_node == (TRAY,) * (n // TRAY)


@pytest.mark.parametrize("version", [(2, 5), (2, 8), (2, 9)])
def test_several_groups_of_one_job_are_made_without_a_split(version, monkeypatch):
    """DeepSpeed binds ranks to devices with NCCL, and there torch would rather split."""
    job, split_group = Job(64, 63, monkeypatch), SplitGroup(version)
    monkeypatch.setattr(dist, "split_group", split_group)
    device = dist.group.WORLD.bound_device_id = torch.device("cuda:0")
    made = [job.start(MicsConfig(p), FakeStreams()) for p in (8, 16)]
    assert split_group.calls == 0
    assert dist.group.WORLD.bound_device_id == device
    assert [groups.replication.ranks for groups in made] == [tuple(range(7, 64, 8)), tuple(range(15, 64, 16))]


def test_the_stand_in_breaks_as_torch_did():
    """Otherwise it would show nothing."""
    halves, quarters = [list(range(4)), list(range(4, 8))], [[place, place + 1] for place in range(0, 8, 2)]
    for version in ((2, 8), (2, 9)):
        dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=7, world_size=8)
        split_group, world = SplitGroup(version), dist.group.WORLD
        split_group(world, halves)
        assert split_group.options_of(world) == {"name": "split 1", "ranks": [4, 5, 6, 7], "split_from": world}
        again: Callable[[], Any] = lambda: split_group(world, quarters)  # noqa: B023, E731
        if version >= (2, 9):
            with pytest.raises(IndexError):
                again()
        else:
            again()
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# Requests


@pytest.mark.parametrize("comes", ["first", "last"])
@pytest.mark.parametrize("place", ["first", "last"])
def test_requests_of_a_rank_do_not_grow_with_the_job(place, comes, monkeypatch):
    """``zero.Init`` takes one round, an engine two. What is read is a statement and a verdict in each."""
    found = []
    for n in (64, 4096, 10240):
        with monkeypatch.context() as patch:
            job = Job(n, 0 if place == "first" else n - 1, patch, comes)
            job.start(MicsConfig(16))
            assert job.exchanges == 2, "one for each time that groups are asked for"
            assert {key.split("/")[2] for key in job.store.keys} >= {"3"}
            assert len(job.store.keys) <= (3 if place == "first" else 9), "the first rank cleans up"
            found.append((job.store.requests.total(), job.store.nbytes))
            dist.destroy_process_group()
    # Post, state, agree, look, read, forget. The last rank ends rounds, the first one cleans up after two of them.
    assert {requests for requests, _ in found} == {3 * (6 + (comes == "last")) + (place == "first") * 2 * 3}
    assert max(nbytes for _, nbytes in found) < 2500


def test_a_rank_without_mics_asks_little_and_waits_for_nobody(monkeypatch):
    job = Job(10240, 5, monkeypatch)
    compare(Request())
    assert job.store.requests == {"compare_set": 1}


def test_a_build_makes_its_groups_once(monkeypatch):
    job = Job(64, 5, monkeypatch)
    build = Build(Request(MicsConfig(8)))
    assert build.groups(dist.group.WORLD) is build.groups(dist.group.WORLD)
    assert len(job.made) == 3
