"""Rounds of agreement between ranks that are threads of this process, on a real store."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable

import pytest
import torch.distributed as dist
from thread_ranks import on_threads
from torch.distributed import distributed_c10d as c10d

from mics_ds.comm import agreement
from mics_ds.comm.agreement import failing_together, peers_agree, report_off, require_same
from mics_ds.comm.job import Job
from mics_ds.errors import MicsAgreementError, MicsConfigError

WHAT = "the number of shards"


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    """One store for all ranks, each of which remembers its own rounds, as a process does."""
    shared, jobs = dist.HashStore(), defaultdict(lambda: Job(None))
    monkeypatch.setattr(c10d, "_get_default_store", lambda: shared)
    monkeypatch.setattr(agreement, "current_job", lambda: jobs[dist.get_rank()])
    monkeypatch.setenv(agreement.TIMEOUT_ENV, "20")
    return shared


def errors_on_threads(world_size: int, body: Callable[[int], None]) -> dict[int, str]:
    """Run ``body(rank)`` on so many ranks at slightly different moments. Returns the errors of agreement by rank."""
    found: dict[int, str] = {}

    def on_rank() -> None:
        rank = dist.get_rank()
        time.sleep(0.02 * random.Random(rank).random())
        try:
            body(rank)
        except MicsAgreementError as error:
            found[rank] = str(error)

    on_threads(world_size, on_rank)
    return found


# --------------------------------------------------------------------------------------------------
# Ranks that agree


@pytest.mark.parametrize("n", [2, 7, 32])
def test_ranks_that_state_the_same_go_on(n, store):
    def body(rank: int) -> None:
        for number in range(3):
            require_same({"p": number}, WHAT)

    assert errors_on_threads(n, body) == {}
    # The last round leaves what ranks may still have to read, and nothing else is left.
    assert store.num_keys() <= 4


def test_subsets_have_rounds_of_their_own():
    """Two halves of a job start different things, and one of them more often."""

    def body(rank: int) -> None:
        half = (0, 1) if rank < 2 else (2, 3)
        for _ in range(1 + rank // 2):
            require_same({"p": half}, WHAT, half)
        require_same({"p": 4}, WHAT)

    assert errors_on_threads(4, body) == {}


def test_a_rank_alone_asks_nobody(store):
    assert errors_on_threads(2, lambda rank: require_same({"p": rank}, WHAT, (rank,))) == {}
    assert store.num_keys() == 0


# --------------------------------------------------------------------------------------------------
# Ranks that do not


@pytest.mark.parametrize("odd", [0, 3, 6])
def test_a_rank_that_differs_is_named_on_every_rank(odd):
    errors = errors_on_threads(7, lambda rank: require_same({"p": 4 if rank == odd else 2, "r": 1}, WHAT))
    assert errors.keys() == set(range(7))
    (said,) = set(errors.values())
    others = sorted(set(range(7)) - {odd})
    assert said.startswith("All ranks must agree on the number of shards, but it is {")
    assert f'{{"p": 4}} on ranks {[odd]}' in said
    assert f'{{"p": 2}} on ranks {others}' in said
    assert '"r"' not in said, "only what differs"


def test_of_many_ranks_some_are_named():
    errors = errors_on_threads(20, lambda rank: require_same({"p": 4 if rank == 13 else 2}, WHAT))
    (said,) = set(errors.values())
    assert '{"p": 4} on ranks [13]' in said
    assert '{"p": 2} on ranks [0, 1, 2, 3, 4, 5, 6, 7, ... 19 in all]' in said


@pytest.mark.parametrize("odd", [0, 2])
@pytest.mark.parametrize("comes", ["first", "last"])
def test_a_rank_that_runs_no_mics_is_named_and_does_not_wait(odd, comes):
    def body(rank: int) -> None:
        if rank != odd:
            time.sleep(0.1 * (comes == "first"))
            require_same({"p": 2}, WHAT)
            return
        time.sleep(0.1 * (comes == "last"))
        report_off()

    errors = errors_on_threads(3, body)
    assert errors.keys() == {0, 1, 2} - {odd}
    assert all(f"must run MiCS or none, but rank {odd} runs without it" in said for said in errors.values())


@pytest.mark.parametrize(("missing", "named"), [({5}, r"[5]"), ({0, 1}, r"[0, 1]"), (set(range(1, 30)), "29 in all")])
def test_ranks_that_do_not_come_are_named(missing, named, monkeypatch):
    monkeypatch.setenv(agreement.TIMEOUT_ENV, "0.3")
    n = max(8, len(missing) + 1)

    def body(rank: int) -> None:
        if rank not in missing:
            require_same({"p": 2}, WHAT)

    errors = errors_on_threads(n, body)
    assert errors.keys() == set(range(n)) - missing
    (said,) = set(errors.values())
    assert "nothing came from ranks" in said
    assert named in said
    assert agreement.TIMEOUT_ENV in said


def test_a_difference_is_told_though_a_rank_never_comes(monkeypatch):
    monkeypatch.setattr(agreement, "_LATECOMERS_S", 0.1)

    def body(rank: int) -> None:
        if rank != 2:
            require_same({"p": rank}, WHAT)

    errors = errors_on_threads(3, body)
    assert errors.keys() == {0, 1}
    (said,) = set(errors.values())
    assert '{"p": 0} on ranks [0]' in said
    assert '{"p": 1} on ranks [1]' in said


def test_after_a_difference_ranks_agree_again():
    def body(rank: int) -> None:
        with pytest.raises(MicsAgreementError, match="must agree"):
            require_same({"p": rank}, WHAT)
        require_same({"p": 2}, WHAT)

    assert errors_on_threads(3, body) == {}


# --------------------------------------------------------------------------------------------------
# Errors of one rank


def test_an_error_of_one_rank_ends_the_next_round_of_all():
    def body(rank: int) -> None:
        if rank == 1:
            with pytest.raises(OSError, match="no such file"), failing_together(), failing_together():
                raise OSError("no such file")
        else:
            with failing_together():
                require_same({"p": 2}, WHAT)
        require_same({"p": 4}, WHAT)  # told once, so this is the next round of every rank

    def of_others(rank: int) -> None:
        try:
            body(rank)
        except MicsAgreementError:
            require_same({"p": 4}, WHAT)
            raise

    errors = errors_on_threads(3, of_others)
    assert errors == dict.fromkeys((0, 2), "The MiCS configuration was refused on rank 1: OSError: no such file")


def test_an_error_of_ours_is_told_in_its_own_words():
    def body(rank: int) -> None:
        with failing_together():
            if rank == 1:
                raise MicsConfigError("mics_shard_size must be positive")
            require_same({"p": 2}, WHAT)

    found: dict[int, str] = {}

    def catching(rank: int) -> None:
        try:
            body(rank)
        except MicsConfigError as error:
            found[rank] = str(error)

    errors = errors_on_threads(2, catching)
    assert errors == {0: "The MiCS configuration was refused on rank 1: mics_shard_size must be positive"}
    assert found == {1: "mics_shard_size must be positive"}


class NoStore:
    """As of MPI: there is none, or the process that served it is gone."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        def request(*args: object) -> None:
            raise dist.DistNetworkError("Connection was likely closed")

        return request


def test_without_a_store_the_users_own_error_is_raised(monkeypatch):
    monkeypatch.setattr(c10d, "_get_default_store", NoStore)

    def body(rank: int) -> None:
        with pytest.raises(OSError, match="no such file"), failing_together():
            raise OSError("no such file")

    assert errors_on_threads(2, body) == {}


def test_a_store_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr(c10d, "_get_default_store", NoStore)
    errors = errors_on_threads(2, lambda rank: require_same({"p": 2}, WHAT))
    assert errors.keys() == {0, 1}
    for said in errors.values():
        assert "through the rendezvous store" in said
        assert "does not answer: Connection was likely closed" in said


def test_without_a_store_stock_runs_on(monkeypatch):
    monkeypatch.setattr(c10d, "_get_default_store", NoStore)
    assert errors_on_threads(2, lambda rank: report_off()) == {}


# --------------------------------------------------------------------------------------------------
# Peers that may not be asking


def test_peers_agree_or_not_or_do_not_come():
    answers: dict[str, Counter] = defaultdict(Counter)

    def body(rank: int) -> None:
        for name, module in (("same", 1), ("different", rank)):
            answers[name][peers_agree({"module": module}, "which module runs", (0, 1, 2), 20.0)] += 1
        if rank:
            answers["missing"][peers_agree({"module": 1}, "which module runs", (0, 1, 2), 0.05)] += 1

    assert errors_on_threads(3, body) == {}
    assert answers == {"same": {True: 3}, "different": {False: 3}, "missing": {None: 2}}


def test_stock_engines_leave_little_in_the_store(store):
    """A rank without MiCS reports so for each engine, and waits for nobody. Engines themselves keep ranks together."""
    built = threading.Barrier(2)

    def build_engines(_rank: int) -> None:
        for _ in range(100):
            report_off()
            built.wait()

    assert errors_on_threads(2, build_engines) == {}
    assert store.num_keys() == 16
