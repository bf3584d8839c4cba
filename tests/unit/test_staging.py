"""States in parts, without ranks: pickled and written later, read into given memory, copied by several replicas."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from mics_ds import shared_memory
from mics_ds.checkpoint.copies import Shard
from mics_ds.checkpoint.staging import Image, Recorded, Share, Staged, StagedFile, record, replay
from mics_ds.comm.packing import ChunkLayout
from mics_ds.errors import MicsCheckpointError
from mics_ds.shared_memory import SharedMemory


def states():
    base = torch.arange(50_000.0)
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


# ------------------------------------------------------------------------------------- record, replay


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


# -------------------------------------------------------------------------------------------- images


def load(path, *, mmap, placing):
    return torch.load(path, mmap=mmap, map_location=placing(), weights_only=False)


def equal(one, other):
    return {
        key: torch.equal(value, other[key]) if torch.is_tensor(value) and not value.is_sparse else True
        for key, value in one.items()
    } == dict.fromkeys(one, True)


def test_an_image_of_what_was_recorded_has_the_given_storages():
    saved = states()
    copied = copies_of(record(saved))
    found = Image.of(copied).load(load)
    assert equal(saved, found)
    assert found["its base"].data_ptr() == copied.storages[0].data_ptr()
    assert found["view"].data_ptr() == found["its base"][10:].data_ptr()
    assert (found["nested"][0][1]["deep"], found["plain"], found["sparse"].to_dense().tolist()) == (
        3,
        saved["plain"],
        [1.0, 2.0, 0.0],
    )


def test_an_image_of_a_file_has_holes_for_what_is_large(tmp_path):
    saved, path = states(), tmp_path / "x.pt"
    torch.save(saved, path)
    content = path.read_bytes()
    image = Image(len(content))
    image.leave_holes(path)
    holes = image.holes
    assert sorted(hole.numel() for _, hole in holes) == [100_000, 200_000]
    for start, hole in holes:
        hole.copy_(torch.frombuffer(bytearray(content[start : start + hole.numel()]), dtype=torch.uint8))
        content = content[:start] + bytes(hole.numel()) + content[start + hole.numel() :]
    os.pwrite(image.descriptor, content, 0)
    found = image.load(load)
    assert equal(saved, found)
    assert found["its base"].data_ptr() in [hole.data_ptr() for _, hole in holes]


def test_an_image_of_what_is_no_archive(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(20_000)}, path, _use_new_zipfile_serialization=False)
    image = Image(path.stat().st_size)
    image.leave_holes(path)
    assert image.holes == []
    os.pwrite(image.descriptor, path.read_bytes(), 0)
    assert image.load(load)["a"].tolist() == [1.0] * 20_000


# -------------------------------------------------------------------------------------------- memory


def as_bytes(tensor):
    return tensor.view(torch.uint8)


def test_memory_is_shared_grows_and_is_used_again():
    ours = SharedMemory()
    ours.reserve(1000)
    ours.copy_in([(64, as_bytes(torch.arange(10.0))), (0, as_bytes(torch.tensor([7])))], None).wait()
    theirs = SharedMemory(os.dup(ours.descriptor))
    theirs.map(1000)
    assert theirs.view(64, 40).view(torch.float32).tolist() == list(range(10))
    assert torch.tensor([], dtype=torch.int64).set_(theirs.storage(0, 8)).tolist() == [7]
    ours.reserve(100 << 20)
    theirs.map(100 << 20)
    ours.copy_in([((100 << 20) - 32, as_bytes(torch.arange(8.0)))], None)
    assert theirs.view(64, 40).view(torch.float32).tolist() == list(range(10))
    assert theirs.view((100 << 20) - 32, 32).view(torch.float32).tolist() == list(range(8))
    before = ours.nbytes
    ours.reserve(10)
    assert ours.nbytes == before
    for memory in (ours, theirs):
        memory.close()


def test_a_little_more_takes_no_new_memory():
    """The client state grows; mapping and pinning cost more than copying."""
    memory = SharedMemory()
    memory.reserve(32 << 20)
    before = memory.view(0, 1).data_ptr()
    memory.reserve(33 << 20)
    assert memory.view(0, 1).data_ptr() == before
    memory.close()


def test_memory_that_is_not_there_is_refused_with_numbers(monkeypatch):
    memory = SharedMemory()
    monkeypatch.setattr(shared_memory, "host_memory_left", lambda: (100 << 20, "2.00 GB, the limit of its cgroup"))
    with pytest.raises(MicsCheckpointError, match=r"1\.06 GB in all, and 0\.10 GB are left of 2\.00 GB, the limit"):
        memory.reserve(10**9)
    assert os.fstat(memory.descriptor).st_size == 0, "nothing was taken"
    memory.close()


def test_a_shard_that_does_not_fit_is_refused_with_numbers(monkeypatch):
    monkeypatch.setattr(shared_memory, "host_memory_left", lambda: (100, "2.00 GB, the limit of its cgroup"))
    with pytest.raises(MicsCheckpointError, match=r"needed to put a shard together, and 0\.00 GB are left of 2\.00"):
        Shard().add(Staged((), (Share(2, (10**9,), 1),), (0, 0), 0), 0, SharedMemory())


# ------------------------------------------------------------------------------------- several replicas


def put_together(share, pieces):
    whole = torch.zeros(share.nbytes, dtype=torch.uint8)
    for replica, piece in enumerate(pieces):
        assert piece.numel() == share.piece_bytes
        share.put(piece, replica, whole)
    return whole


@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, 1000, 64 * 15])
def test_pieces_cover_everything_once(nbytes, replicas):
    whole, share = torch.arange(nbytes).to(torch.uint8), Share(replicas, (nbytes,), 1)
    parts = [share.layout.real(0, replica) for replica in range(replicas)]
    assert [byte for start, stop in parts for byte in range(start, stop)] == list(range(nbytes))
    assert share.piece_bytes == -(-nbytes // replicas)
    assert torch.equal(put_together(share, [share.layout.take(whole, replica) for replica in range(replicas)]), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_slices_are_put_into_shards(dtype):
    shards, replicas = (7, 1, 0, 12), 3
    whole = torch.arange(float(sum(shards))).to(dtype)
    cut = ChunkLayout(shards, replicas)
    pieces = [cut.take(whole, replica).view(torch.uint8) for replica in range(replicas)]
    assert torch.equal(put_together(Share(replicas, shards, whole.itemsize), pieces), as_bytes(whole))


def shard_of(lasting):
    """A file of one shared storage and one that its owner has copied alone, put together; and its memory."""
    shared, alone = torch.arange(32.0), torch.tensor([7.0])
    recorded = record({"shared": shared, "alone": alone})
    file = StagedFile("x.pt", (128, len(recorded.pickled)), (0, 1))
    share, small = Share(2, (32,), 4), Share(1, (4,), 1)
    memories, found = [], Shard(lasting=lasting)
    for replica in range(2):
        memory = SharedMemory()
        memory.reserve(10_000)
        parts = [(0, as_bytes(shared.chunk(2)[replica]))]
        parts += [(64, as_bytes(alone)), (128, torch.frombuffer(bytearray(recorded.pickled), dtype=torch.uint8))]
        memory.copy_in(parts, None)
        files, shares = ((), (share,)) if replica else ((file,), (share, small))
        found.add(Staged(files, shares, (0, 0), 10_000), replica, memory)
        memories.append(memory)
    return found, memories


@pytest.mark.parametrize("lasting", [False, True])
def test_a_shard_is_put_together_from_what_its_replicas_have_copied(tmp_path, lasting):
    found, memories = shard_of(lasting)
    [(name, recorded)] = found.files
    replay(recorded, tmp_path / name)
    written = torch.load(tmp_path / name)
    assert (written["shared"].tolist(), written["alone"].tolist()) == (list(range(32)), [7.0])
    loaded = Image.of(recorded).load(load)
    assert loaded["shared"].tolist() == list(range(32))
    loaded["alone"] += 1
    in_memory = memories[0].view(64, 4).view(torch.float32).tolist()
    assert in_memory == ([7.0] if lasting else [8.0]), "whoever trains on has states of its own"
