"""Processes that write, as threads of one process: links between them, and the tree of one save."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from cases import every
from faults import needs_root

from mics_ds import shared_memory
from mics_ds.checkpoint import folder, links, manifest, writer
from mics_ds.checkpoint.copies import Description, Place, read
from mics_ds.checkpoint.links import Listener, LostError, Neighbour, connect_for_save, fetch, listen
from mics_ds.checkpoint.manifest import Manifest
from mics_ds.checkpoint.staging import Share, Staged, StagedFile, record
from mics_ds.checkpoint.writer import Job, Seal, _Writer
from mics_ds.shared_memory import Copying, SharedMemory


def soon(seconds=20.0):
    return time.monotonic() + seconds


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setenv(links.PATIENCE_ENV, "1")
    monkeypatch.setattr(links, "STARTING_S", 1.0)
    monkeypatch.setattr(writer, "STARTING_S", 1.0)


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
    up.send({"files": [1]}, memoryview(b"abcde"))
    message, room = down.receive(), bytearray(5)
    down.receive_into(memoryview(room))
    assert (message, bytes(room)) == ({"files": [1], "nbytes": 5}, b"abcde")
    down.send({"result": ""})
    assert up.receive()["result"] == ""
    up.close()
    with pytest.raises(LostError, match="rank 3: the process that writes its checkpoints has ended"):
        down.receive()


def test_a_process_that_takes_its_time_is_not_lost():
    end = End()
    up = connect_for_save(end.neighbour(), "t", 1, 0, soon())
    down = end.listener.await_save(1, 0, soon())
    threading.Timer(2.0, lambda: down.send({"late": 1})).start()
    assert up.receive()["late"] == 1, "after twice the time that a node may leave unanswered"


ELSEWHERE = """
import time
from mics_ds.checkpoint.links import Listener, listen
socket, _, port = listen()
print(port, flush=True)
Listener(socket, "t", None).await_save(1, 0, time.monotonic() + 60)
print("connected", flush=True)
time.sleep(60)
"""


@needs_root
def test_a_node_that_is_gone_is_an_end():
    """Its cable is pulled: neither an end of file nor a reset comes from it."""
    name = f"mics{os.getpid() % 10000}"
    peer, address = f"{name}p", "10.213.77"
    run = partial(subprocess.run, check=True)
    run(["ip", "netns", "add", name])
    try:
        run(["ip", "link", "add", name, "type", "veth", "peer", "name", peer, "netns", name])
        run(["ip", "addr", "add", f"{address}.1/24", "dev", name])
        run(["ip", "link", "set", name, "up"])
        for command in (["addr", "add", f"{address}.2/24", "dev", peer], ["link", "set", peer, "up"]):
            run(["ip", "netns", "exec", name, "ip", *command])
        code = [sys.executable, "-c", ELSEWHERE]
        environment = {**os.environ, "MICS_DS_AUTOLOAD": "0"}
        with subprocess.Popen(
            ["ip", "netns", "exec", name, *code], stdout=subprocess.PIPE, text=True, env=environment
        ) as node:
            try:
                port = int(node.stdout.readline())
                up = connect_for_save(Neighbour(1, f"{address}.2", port), "t", 1, 0, soon(60))
                assert node.stdout.readline() == "connected\n"
                run(["ip", "link", "set", name, "down"])
                with pytest.raises(LostError, match=r"rank 1: .* is lost: its node has not answered for 1 s"):
                    up.receive()
                up.close()
            finally:
                node.kill()
    finally:
        run(["ip", "netns", "del", name])


def test_a_deadline_is_an_end_whatever_the_other_shows():
    end = End()
    up = connect_for_save(end.neighbour(), "t", 1, 0, soon(1.5))
    down = end.listener.await_save(1, 0, soon())
    with pytest.raises(LostError, match=r"rank 1: .* did not come to an end within the time limit"):
        up.receive()
    down.close()


def test_a_deadline_is_an_end_where_bytes_trickle():
    end = End()
    up = connect_for_save(end.neighbour(), "t", 1, 0, soon(2.0))
    down, over = end.listener.await_save(1, 0, soon()), threading.Event()

    def trickle():
        while not over.wait(0.1):
            down._socket.sendall(b"x")

    with ThreadPoolExecutor(1) as pool:
        pool.submit(trickle)
        try:
            with pytest.raises(LostError, match="did not come to an end within the time limit"):
                up.receive_into(memoryview(bytearray(10_000)))
        finally:
            over.set()


def test_the_rest_of_content_that_was_cut_off_is_not_taken_for_a_message():
    end = End()
    up = connect_for_save(end.neighbour(), "t", 1, 0, soon())
    down = end.listener.await_save(1, 0, soon(1.0))
    with pytest.raises(LostError, match="did not come to an end within the time limit"):
        down.receive_into(memoryview(bytearray(200)))
    up._send(b"\xff" * 100)
    down.await_close()


def test_another_job_gets_nothing(tmp_path):
    asked = []
    end = End("t", lambda link, which: asked.append(which))
    with pytest.raises(LostError, match="is of another job"):
        connect_for_save(end.neighbour(), "other", 1, 0, soon())
    with pytest.raises(LostError):
        fetch(end.neighbour(), "other", {"number": 1}, SharedMemory(), tmp_path)
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
            self.writers.append(_Writer(SharedMemory(), listening, rank, "t"))
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
        file = StagedFile(f"x{rank}.pt", (64, len(recorded.pickled)), (0,))
        described = Manifest("tag", 1, 1, 1, (1,), 1, 3, False, {}, {}, "f00d")
        parent = 0 if rank in publishers else mine
        children = [other for other in range(len(self.folders)) if self._parent(other) == rank]
        return Job(
            number=number,
            root=str(path),
            target=str(path / "tag"),
            staging=str(folder.Staging(path / "tag", "f00d").folder),
            staged=Staged((file,), (Share(1, (40,), 1),), (0, 0), 1000),
            own=(f"own{rank}", b"mine"),
            error=error,
            sharers=(rank,),
            parent=None if rank == 0 else self.neighbours[parent],
            children=tuple(children),
            publishers=tuple(publishers),
            limit_s=20.0,
            manifest=described if rank in publishers else None,
            latest=latest,
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


def shared_jobs(ranks, copied_by_rank_1=128):
    """Both ranks have copied a half of one tensor, as the owner and its sharer."""
    whole = torch.arange(64, dtype=torch.float32)
    recorded, share = record({"x": whole}), Share(2, (64,), 4)
    content = whole.view(torch.uint8)
    jobs = []
    for rank in range(2):
        memory, job = ranks.writers[rank].memory, ranks.job(rank)
        memory.unmap()
        os.ftruncate(memory.descriptor, 0)
        memory.reserve(1000)
        memory.copy_in([(0, content[128 * rank : 128 * rank + 128])], None)
        if rank == 0:
            memory.copy_in([(128, torch.frombuffer(bytearray(recorded.pickled), dtype=torch.uint8))], None)
            files = (StagedFile("x.pt", (128, len(recorded.pickled)), (0,)),)
            jobs.append(job._replace(staged=Staged(files, (share,), (0, 0), 1000), sharers=(0, 1)))
        else:
            if copied_by_rank_1 < 128:
                memory.unmap()
                os.ftruncate(memory.descriptor, copied_by_rank_1)
            jobs.append(job._replace(staged=Staged((), (share,), (0, 0), copied_by_rank_1), sharers=()))
    return jobs


def test_an_owner_puts_its_shard_together(tmp_path):
    ranks = Ranks([tmp_path] * 2, tmp_path)
    assert ranks.save(shared_jobs(ranks)) == ["", ""]
    assert set(manifest.read(tmp_path / "tag").files) == {"x.pt", "own0", "own1"}
    assert torch.load(tmp_path / "tag" / "x.pt")["x"].tolist() == list(range(64))


def test_a_sharer_that_has_copied_less_is_the_one_error_of_all(tmp_path):
    ranks = Ranks([tmp_path] * 2, tmp_path)
    [said] = set(ranks.save(shared_jobs(ranks, 100)))
    assert "rank 0: rank 1 did not copy 128 bytes of the same shard. Nothing was published" in said


def test_an_owner_without_memory_for_shares_is_the_one_error_of_all(tmp_path, monkeypatch):
    ranks = Ranks([tmp_path] * 2, tmp_path)
    jobs = shared_jobs(ranks)
    monkeypatch.setattr(shared_memory, "host_memory_left", lambda: (10, "10 bytes"))
    [said] = set(ranks.save(jobs))
    assert "rank 0: 0.00 GB of host memory are needed to put a shard together" in said
    assert not list(tmp_path.glob("tag"))


# ------------------------------------------------------------------------------------------- copies


def test_a_copy_is_kept_by_a_neighbour_and_given_to_whoever_lost_it(tmp_path):
    ranks = Ranks([tmp_path / "unused"] * 2, tmp_path)
    own, guest, fetched = tmp_path / "own.0", tmp_path / "other" / "own.1", SharedMemory()
    guest.parent.mkdir()
    memory = SharedMemory(path=own)
    memory.reserve(100)
    memory.copy_in([(0, torch.arange(100, dtype=torch.uint8))], None)
    place = Place(0, 0, 0, 1, 1)
    description = Description(7, -1, 0, place, 0, "l", {}, "", Staged((), (), (0, 0), 100))
    keeps = Seal(3, str(guest.parent), "", None, ((ranks.neighbours[0], "own", str(guest)),), 7)
    with ThreadPoolExecutor(2) as pool:  # the one that keeps it may come first
        keeping = pool.submit(ranks.writers[1].seal, keeps)
        time.sleep(0.3)
        assert ranks.writers[0].seal(Seal(3, str(tmp_path), str(own), description, (), 7)).error == ""
        assert keeping.result().error == ""
    kept = read(guest)
    assert kept is not None
    assert kept.description == description._replace(crc32=zlib.crc32(bytes(range(100))))

    def fetch_of(name, step):
        return fetch(ranks.neighbours[1], "t", {"name": name, "step": step}, fetched, own)

    assert fetch_of("own", 8) is None
    assert fetch_of("../own", 7) is not None, "names, not paths"
    fetch_of("own", 7).require_same(fetched)


def test_a_copy_that_was_not_made_is_kept_by_nobody(tmp_path):
    ranks = Ranks([tmp_path / "unused"] * 2, tmp_path)
    started = time.monotonic()
    assert ranks.writers[0].seal(Seal(3, str(tmp_path), step=7)).error == ""
    keeps = Seal(3, str(tmp_path), guests=((ranks.neighbours[0], "own", str(tmp_path / "g.0")),), step=7)
    assert ranks.writers[1].seal(keeps).error == ""
    assert read(tmp_path / "g.0") is None
    assert time.monotonic() - started < 30


def test_a_copy_without_a_device_is_there_at_once():
    assert Copying().wait() is None
