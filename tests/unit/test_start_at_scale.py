"""Start-up of large jobs, as one of their ranks sees it: communicators, and bytes through the rendezvous store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.testing._internal.distributed import fake_pg

from mics_ds.comm import agreement, groups, placement
from mics_ds.comm.groups import MicsGroups
from mics_ds.config import MicsConfig
from mics_ds.errors import MicsAgreementError
from mics_ds.request import Build, Request, compare

RANKS_PER_NODE = 8
PATIENCE = timedelta(minutes=47)


def place_of(rank: int) -> placement.Claim:
    node = f"node-{rank // RANKS_PER_NODE:05d}.cluster.internal"
    return placement.Claim("hostname", node, rank % RANKS_PER_NODE)


class Store:
    """A rendezvous store in which all other ranks say what this one says, from their own place."""

    def __init__(self, n: int, own: int) -> None:
        self.n, self.own = n, own
        self.keys: dict[str, bytes] = {}
        self.read, self.calls = 0, 0
        self.rows: dict[str, list[dict[str, Any]]] = {}

    def say(self, row: dict[str, Any], rank: int) -> dict[str, Any]:
        """What ``rank`` says where this one says ``row``."""
        if "node" in row:
            row = {**row, **place_of(rank).as_json()}
        if "memory" in row:
            row = {**row, "memory": 8e10 - 7919.0 * (rank * 31337 % 99991), "host": 1e12 - 104729.0 * rank}
        return row

    def set(self, key: str, value: bytes) -> None:
        if "/0/" in key:
            (row,) = agreement.unpack_table(value)
            value = agreement.pack_table([self.say(row, self.own)])
            self.rows[key.split("/0/")[0]] = [self.say(row, rank) for rank in range(self.n)]
        self.keys[key] = value

    def theirs(self, key: str) -> bytes:
        prefix, _, place = key.rpartition("/")
        if place == "all":
            return agreement.b85encode(agreement.pack_table(self.rows[prefix]))
        prefix, _, level = prefix.rpartition("/")
        span = agreement.FAN_IN ** int(level)
        rows = [dict(row) for row in self.rows[prefix][int(place) : int(place) + span]]
        for name in ("memory", "host"):
            if span > 1 and name in rows[0]:
                rows = [{**row, name: min(item[name] for item in rows)} for row in rows]
        return agreement.pack_table(rows)

    def check(self, keys: list[str]) -> bool:
        self.calls += 1
        return all(key in self.keys or not key.endswith(f"/{self.own}") for key in keys)

    def get(self, key: str) -> bytes:
        self.calls += 1
        value = self.keys.get(key) or self.theirs(key)
        self.read += len(value)
        return value

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        self.calls += 1
        found = self.keys.setdefault(key, value.encode())
        self.read += len(found)
        return found

    def delete_key(self, key: str) -> bool:
        return self.keys.pop(key, None) is not None


class Job:
    """One rank of a large job on the ``fake`` backend, with every call that makes a communicator on record."""

    def __init__(self, n: int, rank: int, monkeypatch: pytest.MonkeyPatch, *, bound: bool = True) -> None:
        dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=rank, world_size=n)
        self.store = Store(n, rank)
        self.calls: list[tuple[str, Any, timedelta | None]] = []
        self.new_group = dist.new_group
        monkeypatch.setattr(c10d, "_get_default_store", lambda: self.store)
        monkeypatch.setattr(dist, "new_group", self._new_group)
        monkeypatch.setattr(dist, "split_group", self._split_group)
        monkeypatch.setattr(agreement, "timeout_of", lambda *_: PATIENCE)
        monkeypatch.setattr(placement, "claim", place_of)
        if bound:
            dist.group.WORLD.bound_device_id = torch.device("cuda:0")
            monkeypatch.setattr(groups, "_can_split", lambda *_: True)

    def _new_group(self, ranks: list[int], **options: Any) -> Any:
        self.calls.append(("new_group", tuple(ranks), options.get("timeout")))
        return self.new_group(ranks, **options)

    def _split_group(self, parent: Any, split: list[list[int]], timeout: timedelta, group_desc: str) -> Any:
        members = dist.get_process_group_ranks(parent)
        assert sorted(place for part in split for place in part) == list(range(len(members))), (
            "all ranks of the parent, once, by their place"
        )
        self.calls.append(("split_group", split, timeout))
        own = next(part for part in split if members.index(dist.get_rank()) in part)
        parent.bound_device_id = None
        group = self.new_group([members[place] for place in own], use_local_synchronization=True)
        parent.bound_device_id = torch.device("cuda:0")
        return group

    def start(self, config: MicsConfig) -> MicsGroups:
        """What ``zero.Init`` and an engine do: each compares, or builds its groups."""
        in_init = Build(Request(agreement.ON, config)).groups(dist.group.WORLD)
        compare(Request(agreement.ON, config))
        in_engine = Build(Request(agreement.ON, config)).groups(dist.group.WORLD)
        assert in_init.partition.group is in_engine.partition.group
        return in_engine


@pytest.fixture(autouse=True)
def _no_process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("n", "p", "staged"),
    [(64, 8, False), (64, 16, False), (64, 16, True), (512, 16, True), (4096, 16, True), (10240, 8, False)],
)
def test_communicators_do_not_grow_with_the_job(n, p, staged, monkeypatch):
    """partition, replication, inter-node and intra-node, and those for hop 1 once more on a device without streams."""
    job = Job(n, n - 1, monkeypatch)
    made = job.start(MicsConfig(p, hierarchical_params_gather=staged, hierarchical_grad_scatter=staged))
    assert [call[0] for call in job.calls] == ["split_group"] * (2 + 1 + 4 * staged)
    assert {call[2] for call in job.calls} == {PATIENCE}
    assert made.partition.ranks == tuple(range(n - p, n))
    assert made.scatter.ranks == made.partition.ranks
    assert made.scatter.group is not made.partition.group
    assert made.replication.ranks == tuple(range(p - 1, n, p))
    if staged:
        assert made.hierarchy.inter.ranks == (n - 9, n - 1)
        assert made.hierarchy.intra.ranks == tuple(range(n - 8, n))


@pytest.mark.parametrize("bound", [True, False])
def test_a_job_without_one_communicator_makes_its_groups_by_their_members(bound, monkeypatch):
    job = Job(64, 9, monkeypatch, bound=False)
    device = torch.device("cuda:0") if bound else None
    dist.group.WORLD.bound_device_id = device
    monkeypatch.setattr(groups, "_can_split", lambda *_: False)
    job.start(MicsConfig(8))
    partition, replication = tuple(range(8, 16)), tuple(range(1, 64, 8))
    assert job.calls == [("new_group", ranks, PATIENCE) for ranks in (partition, partition, replication)]
    assert dist.group.WORLD.bound_device_id == device


@pytest.mark.parametrize("n", [64, 4096, *(pytest.param(n, marks=pytest.mark.slow) for n in (512, 10240))])
def test_bytes_that_one_rank_reads(n, monkeypatch):
    """Rank 0 joins most tables, 1024 some of them, and the last one only reads the result."""
    read = {}
    for rank in sorted({0, 1024, n - 1} & set(range(n))):
        with monkeypatch.context() as patch:
            job = Job(n, rank, patch)
            job.start(MicsConfig(16))
            assert len(job.calls) == 7
            read[rank] = job.store.read
            # the posts of the last round, and nothing of those before it
            assert {key.split("/")[2] for key in job.store.keys} == {"3"}
            assert len(job.store.keys) <= 5
            dist.destroy_process_group()
    assert max(read.values()) <= 64_000, read


def test_auto_is_no_dearer(monkeypatch):
    """Free memory differs on every rank; only the least is passed on."""
    n = 10240
    job = Job(n, 0, monkeypatch)
    config = MicsConfig("auto")
    compare(Request(agreement.ON, config))  # in zero.Init
    compare(Request(agreement.ON, config))
    said = {agreement.STATE: agreement.ON, agreement.CONFIG: config.to_json(), **place_of(0).as_json()}
    said.update(job.store.say({"memory": 0}, 0), size=n, first=0, model="0" * 16)
    facts = agreement.exchange(said, least=("memory", "host"))
    everybody = [job.store.say({"memory": 0}, rank) for rank in range(n)]
    for name in ("memory", "host"):
        assert {row[name] for row in facts} == {min(row[name] for row in everybody)}
    agreement.exchange({agreement.STATE: agreement.ON, "p": 16})
    Build(Request(agreement.ON, MicsConfig(16))).groups(dist.group.WORLD)
    assert job.store.read <= 64_000


def test_tables_come_out_as_they_went_in():
    rows = [
        {"state": "on", "first": rank % 2, **({"node": str(rank // 3)} if rank % 5 else {}), "local": None}
        for rank in range(70)
    ]
    assert agreement.unpack_table(agreement.pack_table(rows)) == rows
    assert len(agreement.pack_table(rows)) < len(json.dumps(rows)) / 10


# --------------------------------------------------------------------------------------------------
# What goes wrong


def test_a_rank_that_cannot_go_on_ends_the_round_for_those_that_wait(monkeypatch):
    job = Job(64, 5, monkeypatch)
    agreement.post_error(ValueError("no such file"))
    by_all = agreement.unpack_table(agreement.b85decode(job.store.keys["mics_ds/world/1/all"]))
    with pytest.raises(MicsAgreementError, match=r"refused on rank 5: ValueError: no such file"):
        agreement.require_same(by_all)


def test_an_error_is_told_once(monkeypatch):
    job = Job(64, 5, monkeypatch)
    with pytest.raises(OSError, match="x"), agreement.failing_together(), agreement.failing_together():
        raise OSError("x")
    assert {key.split("/")[2] for key in job.store.keys} == {"1"}
    with pytest.raises(MicsAgreementError), agreement.failing_together():
        raise MicsAgreementError("all have it")
    assert {key.split("/")[2] for key in job.store.keys} == {"1"}


@pytest.mark.parametrize(
    ("place", "missing", "words"),
    [
        (1, {"0/40"}, r"nothing came from ranks \[40\]"),
        (0, {"1/32"}, r"ranks \[32\], which pass the reports of others on, sent nothing more"),
        (40, {"1/32", "1/0", "all"}, r"ranks \[0, 32\], which pass"),
        (40, {"1/0", "all"}, r"ranks \[0\], which pass"),
    ],
)
def test_who_stopped_is_named(place, missing, words, monkeypatch):
    monkeypatch.setenv(agreement.TIMEOUT_ENV, "0.01")
    job = Job(64, place, monkeypatch)
    check = job.store.check
    prefix = "mics_ds/world/1/"
    absent = {prefix + key for key in missing | {"all", "2/0"}}
    monkeypatch.setattr(job.store, "check", lambda keys: not absent & set(keys) and check(keys))
    with pytest.raises(MicsAgreementError, match=words):
        agreement.exchange({agreement.STATE: agreement.ON})


def test_a_store_that_does_not_answer_is_named(monkeypatch):
    job = Job(64, 3, monkeypatch)

    def gone(keys: list[str]) -> bool:
        raise dist.DistNetworkError("Connection was likely closed")

    monkeypatch.setattr(job.store, "check", gone)
    with pytest.raises(MicsAgreementError, match="store of the process group, but it does not answer: Connection was"):
        agreement.exchange({agreement.STATE: agreement.ON})


def test_without_a_store_stock_runs_on():
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=2)
    compare(Request(agreement.OFF))
    with pytest.raises(MicsAgreementError, match=r"Backends without a store \(MPI\) cannot run MiCS"):
        compare(Request(agreement.ON, MicsConfig(2)))


def test_what_nobody_reads_is_deleted_in_the_end(monkeypatch):
    job = Job(64, 3, monkeypatch)
    for _ in range(100):
        agreement.post({agreement.STATE: agreement.OFF})
    assert len(job.store.keys) == 17
