"""Faults planted in saves and loads: an error on one rank, a killed process, a full disk, damaged files."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch.distributed as dist

from mics_ds.checkpoint import manifest
from mics_ds.errors import MicsCheckpointError


def outcome(action) -> str:
    """Return the words of the error that all ranks raised, or nothing; where ranks differ, what each of them says."""
    try:
        with Work(5_000_000):  # a load has some 100 000 calls
            action()
        mine = ""
    except MicsCheckpointError as error:
        mine = str(error)
    except Exception as error:
        mine = f"a bare {type(error).__name__}: {error}"
    said: list = [None] * dist.get_world_size()
    dist.all_gather_object(said, mine)
    return said[0] if len(set(said)) == 1 else f"ranks differ: {said}"


class Once:
    """Replace an attribute on one rank, for one call."""

    def __init__(self, culprit, owner, name, replacement):
        self.here, self.owner, self.name, self.replacement = dist.get_rank() == culprit, owner, name, replacement

    def __enter__(self):
        if self.here:
            self.own, self.over = self.name in vars(self.owner), False
            self.before = getattr(self.owner, self.name)
            setattr(self.owner, self.name, lambda *a, **k: self._replaced(*a, **k))

    def _replaced(self, *args, **kwargs):
        self._restore()
        return self.replacement(self.before, *args, **kwargs)

    def __exit__(self, *_):
        if self.here and not self.over:
            self._restore()
            raise AssertionError(f"{self.name} was never called")

    def _restore(self):
        self.over = True
        if self.own:
            setattr(self.owner, self.name, self.before)
        else:
            delattr(self.owner, self.name)


def unforeseen(_original, *_args, **_kwargs):
    raise ZeroDivisionError("unforeseen")


SURVIVED = 17  # exit code


class Events:
    """Count the function calls of this thread, Python's and C's, and kill the process at one of them if asked to."""

    def __init__(self, fatal: int | None = None) -> None:
        self.count, self.fatal = 0, fatal

    def __enter__(self) -> Events:
        sys.setprofile(self._called)
        return self

    def __exit__(self, *_) -> None:
        sys.setprofile(None)
        if self.fatal is not None:
            os.kill(os.getpid(), signal.SIGKILL)  # later than the last event: then right after saving

    def _called(self, _frame, event, _argument) -> None:
        if event in ("call", "c_call"):
            self.count += 1
            if self.count == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)


needs_root = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0, reason="needs root to mount a small tmpfs"
)


@contextmanager
def small_disk(folder, space):
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={space}", "mics_ds_test", str(folder)], check=True)
    try:
        yield {"folder": str(folder), "space": space}
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


STRANGE = [None, True, -1, 0, 1, 2, 10**9, 10**30, 1.5, float("nan"), "", "2", "\ud800", "..", [], {}, [[[]]]]


def mutated_bytes(content: bytes, chance: random.Random) -> bytes:
    data = bytearray(content)
    at = chance.randrange(len(data) + 1)
    end = min(len(data), at + chance.randrange(1, 20))
    kind = chance.randrange(8)
    if kind == 0 and at < len(data):
        data[at] ^= 1 << chance.randrange(8)
    elif kind == 1 and at < len(data):
        data[at] = chance.randrange(256)
    elif kind == 2:
        del data[at:end]
    elif kind == 3:
        data[at:at] = data[at:end]
    elif kind == 4:
        data[at:at] = chance.randbytes(chance.randrange(1, 9))
    elif kind == 5:
        del data[at:]
    elif kind == 6:
        data[at:end] = bytes(end - at)
    else:
        data[at:at] = chance.choice([b"[", b'{"a":']) * chance.choice([1, 50, 100_000])
    return bytes(data)


def mutated_json(content: bytes, chance: random.Random) -> bytes:
    data = json.loads(content)
    inside = [data, *data["files"].values(), data["files"], data["versions"], data["ranks_per_node"]]
    where = chance.choice(inside)
    key = chance.choice(list(where) if isinstance(where, dict) else range(len(where)))
    kind = chance.randrange(5)
    if kind == 0:
        del where[key]
    elif kind == 1:
        where[key] = chance.choice(STRANGE)
    elif kind == 2:
        where[key] = chance.choice(inside)
    elif kind == 3 and isinstance(where, dict):
        where[chance.choice(["", "x", "checksum", "format", "../latest", key])] = where.pop(key)
    else:
        other = chance.choice(list(where) if isinstance(where, dict) else range(len(where)))
        where[key], where[other] = where[other], where[key]
    try:
        return json.dumps(data, sort_keys=chance.random() < 0.5, indent=chance.choice([None, 1, 3])).encode()
    except ValueError:  # in itself
        return content


def mutate(folder, tag: str, chance: random.Random) -> None:
    """Damage the manifest of a tag, ``latest`` or both, once or a few times."""
    paths = [folder / tag / manifest.NAME, folder / "latest"]
    for path in chance.choice([paths[:1], paths[:1], paths[1:], paths]):
        for _ in range(chance.choice([1, 1, 1, 2, 3])):
            content = path.read_bytes()
            kinds = [mutated_bytes, mutated_json] if path.name == manifest.NAME else [mutated_bytes]
            try:
                path.write_bytes(chance.choice(kinds)(content, chance))
            except (ValueError, RecursionError, TypeError, AttributeError, KeyError, IndexError):
                path.write_bytes(mutated_bytes(content, chance))  # no longer a manifest


class Work:
    """End what calls more functions than reading a good file takes: a loop over a number from a damaged file."""

    def __init__(self, limit: int) -> None:
        self.left = limit

    def __enter__(self):
        sys.setprofile(self._called)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _called(self, *_):
        self.left -= 1
        assert self.left > 0, "endless work"
