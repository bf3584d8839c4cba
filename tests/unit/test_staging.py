"""What a save in the background consists of, without ranks: recording, memory, joining, and the round on the board."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from mics_ds.comm.slices import Slices
from torch import nn

from mics_ds.checkpoint.arena import ALIGNMENT, Arena
from mics_ds.checkpoint.board import Heartbeat, Round, RoundFailedError, RoundLostError
from mics_ds.checkpoint.joints import Joint, shares
from mics_ds.checkpoint.recording import Recorded, record, replay
from mics_ds.checkpoint.writer import Seal, Sealed, _Writer

# ------------------------------------------------------------------------------------- recording


def states():
    base = torch.arange(1000.0)
    return {
        "view": base[10:20],
        "its base": base,
        "parameter": nn.Parameter(torch.randn(3, 4)),
        "nested": [(base.half(), {"deep": torch.tensor(3)})],
        "empty": torch.empty(0),
        "bool": torch.ones(3, dtype=torch.bool),
        "sparse": torch.sparse_coo_tensor([[0, 1]], [1.0, 2.0], (3,), check_invariants=True),
        "storage": torch.randn(4).untyped_storage(),
        "module": nn.Linear(2, 2),
        "plain": {"step": 3, "text": "x" * 300},
    }


def copies_of(recorded):
    made = [torch.UntypedStorage(storage.nbytes()).copy_(storage) for storage in recorded.storages]
    return Recorded(recorded.pickled, made)


def test_a_file_in_two_halves_is_the_file(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "halves").mkdir()
    saved = states()
    torch.save(saved, tmp_path / "whole" / "x.pt")
    replay(copies_of(record(saved)), tmp_path / "halves" / "x.pt")
    assert (tmp_path / "halves" / "x.pt").read_bytes() == (tmp_path / "whole" / "x.pt").read_bytes()


def test_recording_copies_nothing_and_replaying_writes_what_was_copied(tmp_path):
    tensor = torch.zeros(5)
    recorded = record({"t": tensor})
    assert [storage.data_ptr() for storage in recorded.storages] == [tensor.data_ptr()]
    copied = copies_of(recorded)
    tensor.fill_(7)
    replay(copied, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt")["t"].tolist() == [0.0] * 5


def test_what_cannot_be_pickled_says_so():
    with pytest.raises(AttributeError, match="pickle"):
        record({"bad": lambda: None})


# ---------------------------------------------------------------------------------------- memory


def test_memory_is_shared_grows_and_is_used_again():
    ours = Arena()
    ours.reserve(1000)
    ours.copy_in([(64, torch.arange(10.0)), (0, torch.tensor([7], dtype=torch.int64))], lambda: None)
    theirs = Arena(os.dup(ours.descriptor))
    theirs.map(1000)
    assert theirs.view(64, 40).view(torch.float32).tolist() == list(range(10))
    assert torch.tensor([], dtype=torch.int64).set_(theirs.storage(0, 8)).tolist() == [7]
    ours.reserve(100_000)
    theirs.map(100_000)
    ours.copy_in([(99_968, torch.arange(8.0))], lambda: None)
    assert theirs.view(64, 40).view(torch.float32).tolist() == list(range(10))
    assert theirs.view(99_968, 32).view(torch.float32).tolist() == list(range(8))
    before = ours.nbytes
    ours.reserve(10)
    assert ours.nbytes == before
    for arena in (ours, theirs):
        arena.close()


def test_copies_are_waited_for():
    waited = []
    arena = Arena()
    arena.reserve(64)
    arena.copy_in([(0, torch.ones(4))], lambda: waited.append(arena.view(0, 16).view(torch.float32).tolist()))
    assert waited == [[1.0] * 4]
    arena.close()


# --------------------------------------------------------------------------------------- joining


@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, 1000, 64 * 15])
def test_shares_cover_everything_once(nbytes, replicas):
    parts = shares(nbytes, replicas)
    assert len(parts) == replicas
    assert [byte for start, stop in parts for byte in range(start, stop)] == list(range(nbytes))
    assert all(start % ALIGNMENT == 0 or start == nbytes for start, _ in parts)
    largest = max(stop - start for start, stop in parts)
    assert largest <= -(-nbytes // replicas) + ALIGNMENT


def test_parts_are_joined_in_order():
    whole = torch.arange(200, dtype=torch.uint8)
    parts = [whole[start:stop].clone() for start, stop in shares(200, 3)]
    joint = Joint(200, 0, 0, tuple(part.numel() for part in parts))
    joined = torch.zeros(200, dtype=torch.uint8)
    joint.join(parts, joined)
    assert torch.equal(joined, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_slices_are_joined_to_shards(dtype):
    shards, replicas = (7, 1, 0, 12), 3
    whole = torch.arange(float(sum(shards))).to(dtype)
    pieces = [Slices(shards, replicas, replica).take(whole).view(torch.uint8) for replica in range(replicas)]
    joint = Joint(whole.nbytes, 0, 0, tuple(piece.numel() for piece in pieces), shards, whole.itemsize)
    joined = torch.zeros(whole.nbytes, dtype=torch.uint8)
    joint.join(pieces, joined)
    assert torch.equal(joined.view(dtype), whole)


# ------------------------------------------------------------------------------- the round of a save


def store():
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))


def together(*parts):
    """Run functions as threads; their results, or what they raised."""

    def run(part):
        try:
            return part()
        except RoundFailedError as error:
            return error

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(run, parts))


def client(server):
    return dist.TCPStore("localhost", server.port, is_master=False, timeout=timedelta(seconds=5))


def publisher(server, number, leads, peers, publishers):
    def act():
        round_ = Round(client(server), number, 4)
        me = 0 if leads else 2
        round_.report(me, {f"file{me}": [1, 2, me]})
        notes = round_.notes(me, peers)
        round_.publishers_reach("ready", publishers, leads)
        round_.begin_publishing(leads)
        round_.publishers_reach("published", publishers, leads)
        if leads:
            round_.set("result", "")
        return notes, round_.await_key("result")

    return act


def other(server, number, publisher_, note=None):
    def act():
        round_ = Round(client(server), number, 4)
        round_.report(publisher_, note)
        return round_.await_key("result")

    return act


def test_two_folders_are_published_when_all_four_are_done():
    server = store()
    found = together(
        publisher(server, 1, True, 2, 2),
        other(server, 1, 0, {"a": [1]}),
        publisher(server, 1, False, 2, 2),
        other(server, 1, 2),
    )
    assert sorted(map(str, found[0][0])) == ["{'a': [1]}", "{'file0': [1, 2, 0]}"]
    assert found[2][0] == [{"file2": [1, 2, 2]}]
    assert [found[1], found[3], found[0][1], found[2][1]] == [""] * 4


def test_one_failure_is_the_one_error_of_all():
    server = store()

    def fails():
        round_ = Round(client(server), 1, 4)
        round_.fail("no room")
        return round_.await_key("result")

    found = together(publisher(server, 1, True, 3, 1), fails, other(server, 1, 0))
    assert [str(error) for error in found] == ["no room"] * 3
    assert not Round(server, 1, 4).fail("too late")
    assert Round(server, 2, 4).failure() is None, "the next save has nothing to do with it"


def test_who_publishes_is_not_stopped_by_a_failure_but_by_a_death():
    server = store()
    round_ = Round(server, 1, 2)
    round_.begin_publishing(leads=True)
    assert not round_.fail("too late")
    assert round_.failure() is None
    round_.lose("rank 1 has died")
    assert isinstance(round_.failure(), RoundLostError)
    with pytest.raises(RoundLostError, match="rank 1 has died"):
        round_.await_key("result")
    round_.set("result", "")
    assert round_.await_key("result") == "", "what is known is known"


def test_a_silent_neighbour_is_lost_and_everybody_hears_of_it():
    server, heard, failed = store(), [], threading.Event()

    def note(lost, error):
        assert lost is round_
        heard.append(str(error))
        failed.set()

    round_ = Round(server, 1, 3)
    hearts = [Heartbeat(client(server), rank, 3, 1.5, note) for rank in (0, 2)]
    dist.PrefixStore("heart", server).set("1", "5")  # rank 1 showed itself once, and no more
    for heart in hearts:
        heart.watch(round_)
    assert failed.wait(20)
    assert set(heard) == {"the process that writes for rank 1 has shown no sign of life for 2 s"}
    for heart in hearts:
        heart.watch(None)


def test_a_failure_that_is_heard_of_late_ends_nobody_who_has_gone_on(monkeypatch):
    """The heartbeat looks from time to time. By then a process may wait for its peers in the next save."""
    server, pipe, ends = store(), [], []
    monkeypatch.setattr(os, "_exit", ends.append)
    process = object.__new__(_Writer)
    process._pipe = SimpleNamespace(send=pipe.append)
    process._held, process._joining = threading.Lock(), None
    before, now = Round(server, 1, 2), Round(server, 2, 2)
    process._round = now
    with process._waiting_for_peers(Seal("copy", None)):
        process._leave_if_waiting_for_peers(before, RoundFailedError("a disk is full"))
        assert (pipe, ends) == ([], [])
        process._leave_if_waiting_for_peers(now, RoundFailedError("a disk is full"))
        assert (pipe, ends) == ([Sealed("copy", "a disk is full", leaves=True)], [0])
    process._leave_if_waiting_for_peers(now, RoundFailedError("a disk is full"))
    assert len(ends) == 1, "who waits for nobody finds out itself"


def test_the_process_that_writes_needs_no_deepspeed():
    """There is one beside each rank."""
    code = "import sys, mics_ds.checkpoint.writer; sys.exit('deepspeed' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "MICS_DS_AUTOLOAD": "0"}, check=True)
