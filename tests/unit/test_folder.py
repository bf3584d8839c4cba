"""A folder of checkpoints in unkind places: two jobs at once, disks that cannot do what others can, dead saves."""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from forks import ForkingPopen
from staged_manifest import staged

from mics_ds.checkpoint import folder as folders
from mics_ds.checkpoint import manifest
from mics_ds.errors import MicsCheckpointError
from mics_ds.files import FileLock
from mics_ds.log import logger

ROOT = Path(__file__).resolve().parents[2]
HOLDING = """
import sys
from pathlib import Path
from mics_ds.checkpoint import folder
saving = folder.Staging(Path(sys.argv[1]), sys.argv[2])
saving.begin()
(saving.folder / "mine").touch()
print("begun", flush=True)
sys.stdin.readline()
"""
SAVING = """
import random, sys, time
from pathlib import Path
from mics_ds.checkpoint import folder, manifest
from mics_ds.checkpoint.manifest import Manifest
from mics_ds.errors import MicsCheckpointError
from mics_ds.files import FileLock
root, seed = Path(sys.argv[1]), int(sys.argv[2])
draws, published = random.Random(seed), 0
for number in range(40):
    tag, save = draws.choice(["a", "b"]), f"{seed:04x}{number:04x}"
    saving = folder.Staging(root / tag, save)
    try:
        saving.begin()
    except MicsCheckpointError as error:
        assert "another job is saving" in str(error), error
        time.sleep(draws.random() * 0.005)
        continue
    path = saving.folder / "x_model_states.pt"
    path.write_bytes(draws.randbytes(20_000))
    time.sleep(draws.random() * 0.01)
    files = {path.name: manifest.seal(path, seed)}
    folder.publish(saving.folder, saving.target, Manifest(tag, 1, 1, 1, (1,), 1, number, False, {}, files, save))
    folder.write_latest(root, tag)
    saving.end()
    published += 1
print(published)
"""


def program(code: str, *arguments: str) -> subprocess.Popen:
    return ForkingPopen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


@pytest.fixture
def other_job(tmp_path):
    """Another process that is saving tag ``t``."""
    job = program(HOLDING, str(tmp_path / "t"), "0123456789ab")
    assert job.stdout.readline() == "begun\n"
    yield job
    job.kill()
    job.communicate()


def test_a_second_job_that_saves_the_same_tag_is_told_of_the_first(tmp_path, other_job):
    with pytest.raises(
        MicsCheckpointError, match=rf"another job is saving .*/t, process {other_job.pid} on .*, since "
    ):
        folders.Staging(tmp_path / "t", "ffffffffffff").begin()
    saving = folders.Staging(tmp_path / "u", "eeeeeeeeeeee")
    saving.begin()
    assert {path.name for path in folders.interrupted_saves(tmp_path)} == {
        ".t.0123456789ab.partial",
        ".u.eeeeeeeeeeee.partial",
    }, "what is alive is not removed by another tag's save either"
    saving.abandon()


def test_remains_of_a_dead_save_are_removed_by_the_next(tmp_path, other_job):
    other_job.kill()
    other_job.wait()
    assert (tmp_path / ".t.0123456789ab.partial" / "mine").exists()
    (tmp_path / ".not.ours").mkdir()
    saving = folders.Staging(tmp_path / "u", "eeeeeeeeeeee")
    saving.begin()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".not.ours", ".u.eeeeeeeeeeee.partial", ".u.lock"]
    saving.abandon()
    assert [path.name for path in tmp_path.iterdir()] == [".not.ours"]


def test_two_jobs_that_save_into_one_folder_ruin_nothing(tmp_path):
    jobs = [program(SAVING, str(tmp_path), str(seed)) for seed in (1, 2)]
    answers = [job.communicate(timeout=120)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert all(int(answer) > 0 for answer in answers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "latest", "mics_latest.json"]
    for tag in ("a", "b"):
        found = manifest.read(tmp_path / tag)
        assert manifest.damages(tmp_path / tag, found.files, found.files) == []
    assert folders.read_latest(tmp_path) in ("a", "b")


def test_a_file_system_that_cannot_rename_folders_is_refused_at_the_start(tmp_path, monkeypatch):
    def rename(old, new):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(MicsCheckpointError, match=r"folders cannot be renamed in .*\(\w+: Operation not supported\)"):
        folders.Staging(tmp_path / "t", "0123456789ab").begin()
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_a_file_system_that_cannot_flush_folders_is_good_enough(tmp_path, monkeypatch):
    fsync = os.fsync

    def refusing(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)
    staging, target, described = staged(tmp_path)
    folders.publish(staging, target, described)
    folders.write_latest(tmp_path, "t")
    assert manifest.read(target) == described


@pytest.mark.parametrize("broken", ["rmtree", "sync_folder"])
def test_what_fails_after_publication_is_a_line_in_the_log(tmp_path, monkeypatch, broken):
    said = []
    monkeypatch.setattr(logger, "warning", lambda text, *values: said.append(text % values))
    folders.publish(*staged(tmp_path, content=b"old"))
    staging, target, described = staged(tmp_path, content=b"newer")
    owner = shutil if broken == "rmtree" else folders
    original = getattr(owner, broken)

    def failing(path, *arguments, **options):
        if Path(path).name in (".t.replaced", tmp_path.name):
            raise PermissionError(errno.EACCES, "on purpose")
        return original(path, *arguments, **options)

    monkeypatch.setattr(owner, broken, failing)
    folders.publish(staging, target, described)
    assert manifest.read(target) == described
    assert (target / "a_model_states.pt").read_bytes() == b"newer"
    assert len(said) == 1
    assert f"{target} is complete; cleaning up failed" in said[0]


def test_a_lock_file_that_was_removed_is_made_anew(tmp_path):
    lock = FileLock(tmp_path / "lock", ("in use", "Wait."))
    assert lock.take()
    assert lock.take(), "its own holder may take it again"
    (tmp_path / "lock").unlink()
    assert lock.is_lost
    assert lock.take()
    assert (tmp_path / "lock").exists()
    lock.release()
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("seed", range(20))
def test_a_save_killed_anywhere_leaves_a_complete_checkpoint_or_the_older_one(tmp_path, monkeypatch, seed):
    """Killed: nothing of the process runs any more, at a random operation of the disk."""
    folders.publish(*staged(tmp_path, content=b"old"))
    folders.write_latest(tmp_path, "t")
    draws = random.Random(seed)

    class Killed(BaseException):
        pass

    left = [draws.randrange(1, 14)]

    def counting(original):
        def operation(*arguments, **options):
            left[0] -= 1
            if left[0] <= 0:
                raise Killed
            return original(*arguments, **options)

        return operation

    staging, target, described = staged(tmp_path, content=b"newer")
    with monkeypatch.context() as patched:
        for owner, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree"), (Path, "unlink")):
            patched.setattr(owner, name, counting(getattr(owner, name)))
        try:
            folders.publish(staging, target, described)
            folders.write_latest(tmp_path, "t")
        except Killed:
            left[0] = 1 << 30
    tag = folders.read_latest(tmp_path)
    assert tag == "t"
    folders.recover(tmp_path / tag)
    found = manifest.read(tmp_path / tag)
    assert manifest.damages(tmp_path / tag, found.files, found.files) == []
    assert (tmp_path / tag / "a_model_states.pt").read_bytes() in (b"old", b"newer")
