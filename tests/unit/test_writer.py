"""Processes that write, as threads of one process: links between them, and the tree of one save."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import every

from mics_ds.checkpoint import copies, folder, links, manifest, writer
from mics_ds.checkpoint.copies import Copying, Description, Place, SharedMemory, read
from mics_ds.checkpoint.links import Listener, LostError, Neighbour, connect_for_save, fetch, listen
from mics_ds.checkpoint.manifest import Manifest
from mics_ds.checkpoint.staging import Staged, StagedFile, Stored, record
from mics_ds.checkpoint.writer import Job, Publication, Seal, Serve, Station, _Writer


def soon(seconds=20.0):
    return time.monotonic() + seconds


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setenv(links.PATIENCE_ENV, "2")
    monkeypatch.setattr(links, "STARTING_S", 2.0)
    monkeypatch.setattr(writer, "STARTING_S", 2.0)


# --------------------------------------------------------------------------------------------- links


class End:
    """One that listens, and answers what it is asked for."""

    def __init__(self, token="t", give=lambda link, which: None):
        self.socket, _, self.port = listen()
        self.listener = Listener(self.socket, token, give)

    def neighbour(self, rank=1):
        return Neighbour(rank, "localhost", self.port)


def test_both_ends_say_what_they_have():
    end = End()
    up = connect_for_save(end.neighbour(), "t", 5, 3, soon())
    down = end.listener.await_save(5, 3, soon())
    up.send({"files": [1]}, [memoryview(b"abc"), memoryview(b"de")])
    message, room = down.receive(), bytearray(5)
    down.receive_into(memoryview(room))
    assert (message, bytes(room)) == ({"files": [1], "nbytes": 5}, b"abcde")
    down.send({"result": ""})
    assert up.receive()["result"] == ""
    up.close()
    with pytest.raises(LostError, match="rank 3: the process that writes its checkpoints has ended"):
        down.receive()


def test_signs_of_life_go_unnoticed(monkeypatch):
    end = End()
    up = connect_for_save(end.neighbour(), "t", 1, 0, soon())
    down = end.listener.await_save(1, 0, soon())
    threading.Timer(4.0, lambda: down.send({"late": 1})).start()
    assert up.receive()["late"] == 1, "after twice the time that silence may last"


def test_silence_is_an_end(monkeypatch):
    end = End()
    up = connect_for_save(end.neighbour(), "t", 1, 0, soon())
    down = end.listener.await_save(1, 0, soon())
    links._Beats.of_process().links.clear()
    with pytest.raises(LostError, match=r"rank 1: .* has shown no sign of life for 2 s"):
        up.receive()
    down.close()


def test_a_deadline_is_an_end_whatever_the_other_shows():
    end = End()
    up = connect_for_save(end.neighbour(), "t", 1, 0, soon(2.5))
    down = end.listener.await_save(1, 0, soon())
    with pytest.raises(LostError, match=r"rank 1: .* did not come to an end within the time limit"):
        up.receive()
    down.close()


def test_another_job_gets_nothing():
    asked = []
    end = End("t", lambda link, which: asked.append(which))
    with pytest.raises(LostError, match="is of another job"):
        connect_for_save(end.neighbour(), "other", 1, 0, soon())
    with pytest.raises(LostError):
        fetch(end.neighbour(), "other", {"number": 1}, SharedMemory())
    assert asked == []


def test_what_is_no_link_at_all_does_no_harm():
    end = End()
    with socket.create_connection(("localhost", end.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + struct.pack("!i", 1 << 30) + os.urandom(100))
    connect_for_save(end.neighbour(), "t", 1, 0, soon())
    end.listener.await_save(1, 0, soon())


def test_nobody_waits_for_one_that_does_not_come():
    end = End()
    with pytest.raises(LostError, match="rank 7: the process that writes its checkpoints has not come"):
        end.listener.await_save(1, 7, soon())
    end.socket.close()


def test_what_came_for_an_earlier_save_is_closed():
    end = End()
    late = connect_for_save(end.neighbour(), "t", 4, 0, soon())
    time.sleep(0.2)
    end.listener.forget(5)
    with pytest.raises(LostError):
        late.receive()


def test_the_process_that_writes_needs_no_deepspeed():
    """There is one beside each rank."""
    code = "import sys, mics_ds.checkpoint.writer; sys.exit('deepspeed' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "MICS_DS_AUTOLOAD": "0"}, check=True)


# ------------------------------------------------------------------------------------------ one save


class Ranks:
    """Writers of several ranks. Rank 0 publishes first."""

    def __init__(self, folders, tmp_path):
        self.folders = folders
        """The folder of each rank."""
        self.writers, self.neighbours = [], []
        for rank in range(len(folders)):
            listening, _, port = listen()
            self.writers.append(_Writer(SharedMemory(), listening, Station(rank, "t", os.getpid())))
            self.neighbours.append(Neighbour(rank, "localhost", port))
        for path in {*folders}:
            folder.Staging(path / "tag", "f00d").begin()

    def job(self, rank, number=1, error="", latest=True):
        path = self.folders[rank]
        publishers = sorted(self.folders.index(each) for each in {*self.folders})
        mine = self.folders.index(path)
        tensor = torch.full((10,), float(rank))
        recorded = record({"x": tensor})
        memory = self.writers[rank].memory
        memory.reserve(1000)
        memory.copy_in(
            [(0, tensor.view(torch.uint8)), (64, torch.frombuffer(bytearray(recorded.pickled), dtype=torch.uint8))],
            None,
        )
        file = StagedFile(f"x{rank}.pt", (64, len(recorded.pickled)), (Stored(40, 0),))
        described = Manifest("tag", 1, 1, 1, (1,), 1, 3, False, {}, {}, "f00d")
        parent = 0 if rank in publishers else mine
        children = [other for other in range(len(self.folders)) if self._parent(other) == rank]
        return Job(
            number,
            str(path / "tag"),
            str(folder.staging_folder(path / "tag", "f00d")),
            Staged((file,), (), (0, 0), 1000),
            ((f"own{rank}", b"mine"),),
            error,
            (self.neighbours[rank],),
            None if rank == 0 else self.neighbours[parent],
            tuple(children),
            tuple(publishers),
            Publication(described, str(path), "tag", latest, (), None) if rank in publishers else None,
            20.0,
        )

    def _parent(self, rank):
        mine = self.folders.index(self.folders[rank])
        return None if rank == 0 else 0 if rank == mine else mine

    def save(self, jobs):
        with ThreadPoolExecutor(len(jobs)) as pool:
            return [done.error for done in pool.map(lambda pair: pair[0].save(pair[1]), zip(self.writers, jobs))]


def test_two_folders_are_published_when_all_four_are_done(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    ranks = Ranks([a, a, b, b], tmp_path)
    assert ranks.save([ranks.job(rank) for rank in range(4)]) == [""] * 4
    for path, names in ((a, {"x0.pt", "x1.pt", "own0", "own1"}), (b, {"x2.pt", "x3.pt", "own2", "own3"})):
        found = manifest.read(path / "tag")
        assert set(found.files) == names
        assert not manifest.damages(path / "tag", names, found.files)
        assert folder.read_latest(path) == "tag"
    assert torch.load(b / "tag" / "x3.pt")["x"].tolist() == [3.0] * 10


@pytest.mark.parametrize("culprit", range(4))
def test_one_failure_is_the_one_error_of_all(tmp_path, culprit):
    a, b = tmp_path / "a", tmp_path / "b"
    ranks = Ranks([a, a, b, b], tmp_path)
    jobs = [ranks.job(rank, error="no room" if rank == culprit else "") for rank in range(4)]
    [said] = set(ranks.save(jobs))
    assert f"could not be saved. rank {culprit}: no room. Nothing was published" in said
    assert not list(tmp_path.glob("*/tag"))
    assert not list(tmp_path.glob("*/.tag.f00d.partial")), "remains are removed"


@pytest.mark.parametrize("culprit", every(range(4), default=[0, 3]))
def test_one_that_never_came_is_the_one_error_of_all(tmp_path, culprit):
    a, b = tmp_path / "a", tmp_path / "b"
    ranks = Ranks([a, a, b, b], tmp_path)
    jobs = [ranks.job(rank) for rank in range(4)]
    if culprit in (0, 2):
        ranks.neighbours[culprit] = ranks.neighbours[culprit]._replace(port=1)  # whom others report to
        jobs = [ranks.job(rank) for rank in range(4)]
    ranks.writers.pop(culprit)
    jobs.pop(culprit)
    said = ranks.save(jobs)
    assert all(said)
    assert not list(tmp_path.glob("*/tag"))


def test_a_folder_that_cannot_be_published_keeps_latest_everywhere(tmp_path, monkeypatch):
    a, b = tmp_path / "a", tmp_path / "b"
    ranks = Ranks([a, b], tmp_path)
    original = folder.publish

    def publish(staging, target, described):
        if target.parent == b:
            raise OSError("no")
        original(staging, target, described)

    monkeypatch.setattr(folder, "publish", publish)
    [said] = set(ranks.save([ranks.job(rank) for rank in range(2)]))
    assert "rank 1: OSError: no" in said
    assert not list(tmp_path.glob("*/latest"))


def test_a_latest_that_cannot_be_updated_is_told_from_a_failed_save(tmp_path, monkeypatch):
    ranks = Ranks([tmp_path / "a"] * 2, tmp_path)
    monkeypatch.setattr(folder, "write_latest", lambda path, tag: (path / "missing" / "x").write_text(""))
    [said] = set(ranks.save([ranks.job(rank) for rank in range(2)]))
    assert "a/tag is complete, but" in said
    assert (tmp_path / "a" / "tag" / manifest.NAME).exists()


# ------------------------------------------------------------------------------------------- copies


def test_a_copy_is_kept_by_a_neighbour_and_given_to_whoever_lost_it(tmp_path):
    ranks = Ranks([tmp_path / "unused"] * 2, tmp_path)
    own, guest, fetched = tmp_path / "own.0", tmp_path / "other" / "own.1", SharedMemory()
    guest.parent.mkdir()
    for path, each in ((tmp_path, ranks.writers[0]), (guest.parent, ranks.writers[1])):
        each.serve(Serve(str(path)))
    memory = SharedMemory(path=own)
    memory.reserve(100)
    memory.copy_in([(0, torch.arange(100, dtype=torch.uint8))], None)
    place = Place(0, 0, 0, 1, 1)
    description = Description(copies.FORMAT, 7, 0, place, 0, "l", {}, "", Staged((), (), (0, 0), 100))
    keeps = Seal(3, "", None, ((ranks.neighbours[0], "own", str(guest)),), 7)
    with ThreadPoolExecutor(2) as pool:  # the one that keeps it may come first
        keeping = pool.submit(ranks.writers[1].seal, keeps)
        time.sleep(0.3)
        assert ranks.writers[0].seal(Seal(3, str(own), description, (), 7)).error == ""
        assert keeping.result().error == ""
    kept = read(guest)
    assert kept is not None
    assert kept.description == description
    text = fetch(ranks.neighbours[1], "t", {"name": "own", "step": 7}, fetched)
    copies.understood(text, own).require_same(fetched)
    assert fetch(ranks.neighbours[1], "t", {"name": "own", "step": 8}, SharedMemory()) == ""
    assert fetch(ranks.neighbours[1], "t", {"name": "../own", "step": 7}, SharedMemory()) != "", "names, not paths"


def test_a_copy_that_was_not_made_is_kept_by_nobody(tmp_path):
    ranks = Ranks([tmp_path / "unused"] * 2, tmp_path)
    for each in ranks.writers:
        each.serve(Serve(str(tmp_path)))
    started = time.monotonic()
    assert ranks.writers[0].seal(Seal(3, "", None, (), 7)).error == ""
    assert (
        ranks.writers[1].seal(Seal(3, "", None, ((ranks.neighbours[0], "own", str(tmp_path / "g.0")),), 7)).error == ""
    )
    assert read(tmp_path / "g.0") is None
    assert time.monotonic() - started < 30


def test_a_copy_without_a_device_is_there_at_once():
    assert Copying().wait() is None
