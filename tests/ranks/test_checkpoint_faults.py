"""What rarely happens to jobs that save asynchronously or keep copies in memory, each as it was once reported."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys

import psutil
import pytest
import torch
import torch.distributed as dist
from cases import slow
from checkpoint_engines import ASYNC, digest, engine_of, everything_is_shared, steps, writer
from faults import needs_root
from helpers import environment
from memory_tier import logged, nodes, restarted, resumed, sealed, trained, zero

from mics_ds import shared_memory
from mics_ds.checkpoint import background, load, manifest, memory
from mics_ds.checkpoint.background import Background, wait_for_saves
from mics_ds.errors import MicsCheckpointError

DISK, MEMORY = 3, 4
"""Steps that are there when a test begins."""


def on_disk_and_in_memory(root, **more):
    """A job that has saved after step 3 and copied after step 4; digests of both."""
    engine, _, _ = trained(root, DISK, **more)
    engine.save_checkpoint(str(root / "disk"))
    saved = digest(engine)
    steps(engine, 1)
    sealed()
    return engine, saved, digest(engine)


def each_says(value) -> list:
    """Return the values of all ranks, in their order."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def all_say(value) -> set:
    """Return the values of all ranks, as a set."""
    return set(each_says(value))


def files_in(root):
    return sorted((str(path), path.stat().st_size) for path in root.glob("node*/*/*"))


# ------------------------------------------------------------------------------------- restarts (1, 2, 4)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("culprit", [slow(0), 3])
def test_a_restart_without_room_uses_the_disk_on_all_ranks(tmp_path, culprit):
    with nodes(tmp_path), pytest.MonkeyPatch.context() as patched:
        _, saved, copied = on_disk_and_in_memory(tmp_path)
        dist.barrier()
        before = files_in(tmp_path)
        dist.barrier()
        again, _, _ = resumed(tmp_path)
        assert (again.global_steps, digest(again)) == (MEMORY, copied)
        dist.barrier()
        assert files_in(tmp_path) == before, "nothing is written to memory to load from it"
        if dist.get_rank() == culprit:
            patched.setattr(shared_memory, "host_memory_left", lambda: (1000, "1000 bytes"))
        with logged() as said:
            engine, _path, _ = resumed(tmp_path)
        assert (engine.global_steps, digest(engine)) == (DISK, saved)
        if dist.get_rank() == 0:
            assert any("the disk is used" in line and f"rank {culprit}" in line for line in said), said


@pytest.fixture
def small_memory(tmp_path):
    """The memory of each node as a file system of its own, of 16 MiB."""
    places = [tmp_path / name for name in ("node0", "node1")]
    for place in places:
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(place)], check=True)
    yield [str(place) for place in places]
    for place in places:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@needs_root
@pytest.mark.ranks(4)
def test_a_restart_where_memory_has_become_full_uses_the_disk(tmp_path, small_memory):
    with nodes(tmp_path):
        engine, saved, _ = on_disk_and_in_memory(tmp_path)
        assert engine.mics_memory.is_on
        dist.barrier()
        for place in small_memory if dist.get_rank() == 0 else ():
            left = os.statvfs(place)
            with open(f"{place}/others", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, left.f_bavail * left.f_frsize)
        dist.barrier()
        again, _, _ = resumed(tmp_path)
        assert (again.global_steps, digest(again)) == (DISK, saved)


@pytest.mark.ranks(4)
def test_two_engines_of_a_process_get_their_own_states_back(tmp_path):
    def pair(seeds):
        restarted()
        engines = [engine_of(2, seed=seed, zero=zero()) for seed in seeds]
        for number, engine in enumerate(engines):
            engine.load_checkpoint(str(tmp_path / f"disk{number}"))
        return engines

    with nodes(tmp_path):
        engines = pair((1, 2))
        for _ in range(2):
            for engine in engines:
                steps(engine, 1)
                sealed()
        copied = [digest(engine) for engine in engines]
        assert copied[0] != copied[1]
        again = pair((3, 4))
        assert [engine.global_steps for engine in again] == [2, 2]
        assert [digest(engine) for engine in again] == copied


@pytest.mark.ranks(4)
def test_an_operator_who_goes_back_on_disk_goes_back(tmp_path):
    with nodes(tmp_path):
        engine, _, _ = trained(tmp_path, 1)
        engine.save_checkpoint(str(tmp_path / "disk"), tag="good")
        good = digest(engine)
        steps(engine, 1)
        sealed()
        steps(engine, 1)
        engine.save_checkpoint(str(tmp_path / "disk"), tag="spike")
        steps(engine, 1)
        sealed()
        again, _, _ = resumed(tmp_path)
        assert again.global_steps == MEMORY
        dist.barrier()
        if dist.get_rank() == 0:
            (tmp_path / "disk" / "latest").write_text("good")
            (tmp_path / "disk" / "mics_latest.json").unlink()
        dist.barrier()
        with logged() as said:
            again, _, _ = resumed(tmp_path)
        assert (again.global_steps, digest(again)) == (1, good)
        if dist.get_rank() == 0:
            assert "set back, or removed" in "\n".join(said)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(tmp_path / "disk")
        dist.barrier()
        _, path, _ = resumed(tmp_path)
        assert path is None, "a folder that was removed is a fresh start"


@pytest.mark.ranks(4)
def test_what_a_rank_kept_of_its_own_is_not_unpickled_where_that_is_forbidden(tmp_path):
    with nodes(tmp_path):
        engine, _, _ = trained(tmp_path, DISK)
        engine.save_checkpoint(str(tmp_path / "disk"))
        engine.mics_memory.client_state = lambda: {"theirs": pickle.PickleBuffer if dist.get_rank() == 2 else 0}
        steps(engine, 1)
        sealed()
        with environment(MICS_DS_WEIGHTS_ONLY="1"):
            again, _, _ = resumed(tmp_path)
        assert again.global_steps == DISK
        again, _, client_state = resumed(tmp_path)
        assert again.global_steps == MEMORY
        assert client_state["theirs"] == (pickle.PickleBuffer if dist.get_rank() == 2 else 0)


# ------------------------------------------------------------------------------------- loads (5)


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("p", "states"), [(1, "partition"), (2, "partition"), (2, "world"), (4, "partition")])
def test_a_load_reads_the_checkpoint_once(tmp_path, p, states):
    engine = engine_of(p, zero={"mics_optimizer_states": states})
    steps(engine, 1)
    engine.save_checkpoint(str(tmp_path), tag="t")
    again, saved, read = engine_of(p, seed=5, zero={"mics_optimizer_states": states}), digest(engine), [0]
    preadv, load_states = os.preadv, load.seam.load_states

    def counting(descriptor, buffers, start):
        count = preadv(descriptor, buffers, start)
        read[0] += count
        return count

    def of_memory(path, **how):
        assert not str(path).startswith(str(tmp_path)), "files are read together"
        return load_states(path, **how)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "preadv", counting)
        patched.setattr(load.seam, "load_states", of_memory)
        again.load_checkpoint(str(tmp_path), tag="t")
    assert digest(again) == saved
    total = torch.tensor(read[0])
    dist.all_reduce(total)
    assert int(total) == manifest.read(tmp_path / "t").total_bytes


# ------------------------------------------------------------------------------------- writers (9, time limit)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("culprit", [slow(0), 1])
def test_a_writer_that_cannot_start_is_the_error_of_all(tmp_path, culprit):
    def refuse(*_, **__):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    if Background.current is not None:
        Background.current.close()
    with nodes(tmp_path):
        restarted()
        engine = engine_of(2, zero={"mics_checkpoint": {"async": True, "memory_every": 2}})
        with pytest.MonkeyPatch.context() as patched:
            if dist.get_rank() == culprit:
                patched.setattr(background.subprocess, "Popen", refuse)
            with pytest.raises(MicsCheckpointError, match=rf"rank {culprit}: .*Resource temporarily unavailable"):
                engine.save_checkpoint(str(tmp_path / "disk"))
            assert Background.current is None
            steps(engine, 2)  # a copy would be due
        assert not engine.mics_memory.is_on
        steps(engine, 1)
        engine.save_checkpoint(str(tmp_path / "disk"))
        wait_for_saves()
        assert Background.current.error == ""
    dist.barrier()


@pytest.mark.ranks(2)
def test_a_save_that_takes_too_long_is_given_up(tmp_path):
    engine = engine_of(1, zero={"mics_checkpoint": {"async": True, "time_limit": 1}})
    steps(engine, 1)
    engine.save_checkpoint(str(tmp_path), tag="good")
    wait_for_saves()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(background, "_GRACE_S", 1.0)
        os.kill(writer(), signal.SIGSTOP)
        dist.barrier()
        engine.save_checkpoint(str(tmp_path), tag="late")
        with pytest.raises(MicsCheckpointError, match="did not come to an end within 1 s"):
            wait_for_saves()
    dist.barrier()
    with pytest.raises(MicsCheckpointError, match="An earlier asynchronous save failed"):
        engine.save_checkpoint(str(tmp_path), tag="again")
    engine.save_checkpoint(str(tmp_path), tag="again", async_save=False)
    dist.barrier()
    assert (tmp_path / "latest").read_text() == "again"
    assert not (tmp_path / "late").exists()
    dist.barrier()


# ------------------------------------------------------------------------------------- connections (14)


def connections(process: int) -> int:
    return sum(each.status == psutil.CONN_ESTABLISHED for each in psutil.Process(process).net_connections("tcp"))


@pytest.mark.ranks(4)
@pytest.mark.parametrize("states", ["partition", "world"])
def test_no_connection_outlasts_a_save(tmp_path, states):
    """Each writer had two to a store in rank 0, and one to each writer that shares its shard, for as long as it ran."""
    everything_is_shared()
    if Background.current is not None:
        Background.current.close()
    engine = engine_of(1, zero={**ASYNC, "mics_optimizer_states": states})
    steps(engine, 1)
    engine.save_checkpoint(str(tmp_path), async_save=False)  # ranks connect to each other
    dist.barrier()
    before = connections(os.getpid())
    engine.save_checkpoint(str(tmp_path))
    wait_for_saves()
    dist.barrier()
    assert each_says((connections(os.getpid()) - before, connections(writer()))) == [(0, 0)] * 4


@pytest.mark.ranks(4)
def test_few_descriptors_are_enough_on_rank_0(tmp_path):
    """Descriptors of a store would grow with the job, up to the soft limit."""
    everything_is_shared()
    if Background.current is not None:
        Background.current.close()
    engine = engine_of(1, zero=ASYNC)
    steps(engine, 1)
    engine.save_checkpoint(str(tmp_path), tag="waited", async_save=False)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if dist.get_rank() == 0:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 16, before[1]))
    try:
        engine.save_checkpoint(str(tmp_path), tag="asynchronous")
        wait_for_saves()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    dist.barrier()
    assert (tmp_path / "latest").read_text() == "asynchronous"
    dist.barrier()


# ------------------------------------------------------------------------------------- regions (10, 11)


HOLDING = """
import sys
from pathlib import Path
from mics_ds.files import FileLock
assert FileLock(Path(sys.argv[1]), ("", "")).take()
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.mark.ranks(4)
def test_a_region_that_a_running_job_holds_is_left_alone(tmp_path):
    with nodes(tmp_path):
        restarted()
        path = memory.region("", None)
        job = None
        if dist.get_rank() == 2:
            path.mkdir(mode=0o700, parents=True)
            command = [sys.executable, "-c", HOLDING, str(path / "lock")]
            job = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert job.stdout.readline() == "held\n"
        dist.barrier()
        with logged() as said:
            engine = engine_of(2, zero=zero())
        assert all_say(engine.mics_memory.is_on) == {False}
        if job is not None:
            assert f"is in use by a running job, process {job.pid} on" in "\n".join(said)
        engine.load_checkpoint(str(tmp_path / "disk"))
        steps(engine, 2)
        if job is not None:
            assert [file.name for file in path.iterdir()] == ["lock"]
        if job is not None:
            job.communicate("\n")
        dist.barrier()
        engine, _, copied = trained(tmp_path, 2)
        assert engine.mics_memory.is_on
        again, _, _ = resumed(tmp_path)
        assert digest(again) == copied[2]


@pytest.mark.ranks(4)
def test_a_region_that_is_removed_in_mid_run_is_made_anew(tmp_path):
    with nodes(tmp_path):
        engine, _, _ = trained(tmp_path, 4)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(tmp_path / "node0")
        dist.barrier()
        with logged() as said:
            steps(engine, 2)
            sealed()
            steps(engine, 2)
            sealed()
        if dist.get_rank() == 0:
            assert "was removed while the job runs" in "\n".join(said)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(tmp_path / "node1")  # what node 0 keeps is complete again
        dist.barrier()
        again, _, _ = resumed(tmp_path)
        assert (again.global_steps, digest(again)) == (8, digest(engine))


@pytest.mark.ranks(4)
@pytest.mark.parametrize("states", ["partition", "world"])
def test_the_room_for_a_copy_is_known_before_the_optimizer_has_states(tmp_path, states):
    with nodes(tmp_path, states):
        restarted()
        engine = engine_of(2, zero=zero())
        assert not any(engine.optimizer.optimizer.state.values()), "DeepSpeed leaves them to the first step"
        planned = sum(each_says(engine.mics_memory.copy_bytes(engine)))
        steps(engine, 1)
        taken = sum(each_says(engine.mics_memory.copy_bytes(engine)))
        assert taken > 12 * sum(param.ds_numel for param in engine.module.parameters())
        assert 0 <= taken - planned <= 4 * 4096, "what is aligned, and Adam's count of steps"


@pytest.mark.ranks(4)
def test_too_little_room_is_told_at_the_start_with_numbers_and_the_disk_is_used(tmp_path):
    with nodes(tmp_path), pytest.MonkeyPatch.context() as patched:
        restarted()
        if dist.get_rank() >= 2:
            patched.setattr(memory, "_room", lambda path: 5_000_000)
        with logged() as said:
            engine = engine_of(2, zero=zero())
        assert all_say(engine.mics_memory.is_on) == {False}
        if dist.get_rank() == 0:
            [line] = [line for line in said if "not copied to memory" in line]
            assert "that takes 0.01 GB on a node, in /dev/shm, which has 0.01 GB" in line, line
        engine.load_checkpoint(str(tmp_path / "disk"))
        steps(engine, 3)
        engine.save_checkpoint(str(tmp_path / "disk"))
        steps(engine, 1)
        again, _, _ = resumed(tmp_path)
        assert again.global_steps == 3
