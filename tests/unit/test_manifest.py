"""Folders, manifests and the order of things on disk. No ranks."""

from __future__ import annotations

import json
import os

import pytest
from staged_manifest import staged

from mics_ds.checkpoint import folder as folders
from mics_ds.checkpoint import manifest
from mics_ds.errors import MicsCheckpointError


def test_what_is_published_is_read_back(tmp_path):
    staging, target, written = staged(tmp_path)
    folders.publish(staging, target, written)
    assert manifest.read(target) == written
    assert written.total_bytes == 3
    assert not staging.exists()
    assert manifest.damages(target, written.files, written.files) == []
    assert folders.complete_tags(tmp_path) == ["t"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b"ab"), "has 2 bytes where 3"),
        (lambda path: path.write_bytes(b"abb"), "other content"),
    ],
)
def test_damage_is_found_and_named(tmp_path, damage, words):
    staging, target, written = staged(tmp_path)
    folders.publish(staging, target, written)
    damage(target / "a_model_states.pt")
    (found,) = manifest.damages(target, written.files, written.files)
    assert words in found
    assert "a_model_states.pt" in found


def test_every_flipped_bit_changes_the_checksum(tmp_path):
    content = bytes(range(64))
    staging, target, written = staged(tmp_path, content=content)
    folders.publish(staging, target, written)
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (target / "a_model_states.pt").write_bytes(flipped)
        assert manifest.damages(target, written.files, written.files)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "7",
        "null",
        '{"format": 2}',
        '{"format": "2"}',
        '{"format": 1, "files": {}}',
        "nonsense",
        "[" * 100_000,
        '{"format":' * 100_000,
        b"\xff\xfe",
        b'{"format": 1, "tag": "\xff"}',
    ],
    ids=lambda text: repr(text)[:12],
)
def test_a_damaged_manifest_is_an_error_and_not_a_checkpoint(tmp_path, text):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / manifest.NAME).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(MicsCheckpointError, match="damaged"):
        manifest.read(tmp_path / "t")
    assert folders.complete_tags(tmp_path) == []


UNPROTECTED = {
    "files": {"a_model_states.pt": {"bytes": 3, "crc32": 891568578, "writer": 3}},
    "format": 1,
    "global_steps": 1,
    "model_parallel": 1,
    "node_local": False,
    "ranks": 4,
    "ranks_per_node": [2, 2],
    "replicas": 2,
    "shards": 2,
    "tag": "t",
    "versions": {"mics_ds": "0"},
}
"""As it was written before manifests had a checksum."""


def test_a_manifest_without_a_checksum_is_read(tmp_path):
    staging, target, written = staged(tmp_path)
    folders.publish(staging, target, written)
    (target / manifest.NAME).write_text(json.dumps(UNPROTECTED))
    old = manifest.read(target)
    assert not old.protected
    assert written.protected
    assert old.files == written.files
    assert json.loads(old.dumps()) == UNPROTECTED
    assert manifest.damages(target, old.files, old.files) == []


def changed(**values):
    return {**UNPROTECTED, **values}


def with_record(name="a_model_states.pt", **values):
    record = {**UNPROTECTED["files"]["a_model_states.pt"], **values}
    return changed(files={name: {key: value for key, value in record.items() if value is not Ellipsis}})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (changed(shards="2"), "shards"),
        (changed(shards=None), "shards"),
        (changed(shards=2.0), "shards"),
        (changed(shards=True, ranks=2, ranks_per_node=[2]), "shards"),
        (changed(shards=10**9, ranks=2 * 10**9), "shards"),
        (changed(shards=0), "shards"),
        (changed(shards=4), "do not go together"),
        (changed(ranks_per_node=[1, 2]), "do not go together"),
        (changed(ranks_per_node="22"), "ranks_per_node"),
        (changed(global_steps=None), "global_steps"),
        (changed(global_steps=-1), "global_steps"),
        (changed(node_local=0), "node_local"),
        (changed(versions=None), "versions"),
        (changed(tag="\ud800"), "JSON"),
        (changed(files=[]), "files"),
        (changed(files={"a": None}), "files"),
        (changed(extra=1), "extra"),
        (changed(checksum="sha256:00"), "checksum"),
        (with_record(bytes="3"), "bytes"),
        (with_record(bytes=-3), "bytes"),
        (with_record(crc32=None), "crc32"),
        (with_record(crc32=1 << 32), "crc32"),
        (with_record(crc32=...), "crc32"),
        (with_record(name="../latest"), "not the name of a file"),
        (with_record(name=".."), "not the name of a file"),
        (with_record(name="/etc/passwd"), "not the name of a file"),
        (with_record(name="a\0"), "not the name of a file"),
        (with_record(name=""), "not the name of a file"),
        ({key: value for key, value in UNPROTECTED.items() if key != "tag"}, "tag"),
        (changed(format=4), "format 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_that_no_manifest_has_are_named(tmp_path, data, words):
    (tmp_path / manifest.NAME).write_text(json.dumps(data))
    with pytest.raises(MicsCheckpointError, match=rf"damaged or from a newer mics_ds \(.*{words}"):
        manifest.read(tmp_path)


def test_every_flipped_bit_of_a_manifest_is_noticed_or_changes_nothing(tmp_path):
    staging, target, written = staged(tmp_path)
    folders.publish(staging, target, written)
    path = target / manifest.NAME
    content = path.read_bytes()
    unchanged = 0
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert manifest.read(target) == written, bit
            unchanged += 1
        except MicsCheckpointError:
            continue
    # Between the items of the JSON, one kind of white space for another: a space has no other one bit away, and
    # of a line's end only the tab and the carriage return have none either.
    assert unchanged < 8 * len(content) / 100


def test_a_record_that_was_dropped_or_a_value_that_was_changed_is_noticed(tmp_path):
    staging, target, written = staged(tmp_path)
    folders.publish(staging, target, written)
    path = target / manifest.NAME
    data = json.loads(path.read_text())
    for key in sorted(data):
        path.write_text(json.dumps({name: value for name, value in data.items() if name != key}))
        with pytest.raises(MicsCheckpointError, match="damaged"):
            manifest.read(target)
    for change in ({"files": {}}, {"global_steps": 2}, {"format": 1}):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(MicsCheckpointError, match="damaged"):
            manifest.read(target)
    path.write_text(json.dumps(data))
    assert manifest.read(target) == written


def test_a_damaged_manifest_of_another_tag_hides_that_tag_only(tmp_path):
    for tag, steps in (("new", 2), ("old", 1), ("bad", 3)):
        folders.publish(*staged(tmp_path, tag=tag, steps=steps))
    (tmp_path / "bad" / manifest.NAME).write_bytes(b"\xff")
    (tmp_path / ".left.partial").mkdir()
    (tmp_path / ".left.partial" / manifest.NAME).write_bytes((tmp_path / "new" / manifest.NAME).read_bytes())
    assert folders.complete_tags(tmp_path) == ["old", "new"]


def test_files_that_the_publisher_cannot_see_are_an_error(tmp_path):
    staging, target, written = staged(tmp_path)
    (staging / "a_model_states.pt").unlink()
    with pytest.raises(MicsCheckpointError, match=r"written by ranks \[3\].*use_node_local_storage"):
        folders.publish(staging, target, written)
    assert not target.exists()


def test_saving_a_tag_again_replaces_it_and_keeps_what_others_put_there(tmp_path):
    staging, target, written = staged(tmp_path)
    folders.publish(staging, target, written)
    (target / "notes.txt").write_text("mine")
    (target / "zero_pp_rank_7_mp_rank_00_model_states.pt").write_text("of a larger job")
    (target / "mics_client_state_rank_7.pt").write_text("of a larger job")
    staging, target, again = staged(tmp_path, content=b"other", steps=2)
    folders.publish(staging, target, again)
    assert manifest.read(target) == again
    assert sorted(os.listdir(target)) == ["a_model_states.pt", manifest.NAME, "notes.txt"]
    assert os.listdir(tmp_path) == ["t"]


def test_a_replacement_killed_between_its_renames_is_undone(tmp_path, monkeypatch):
    staging, target, first = staged(tmp_path)
    folders.publish(staging, target, first)
    staging, target, second = staged(tmp_path, content=b"other")
    real, calls = os.rename, []

    def rename(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*paths)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        folders.publish(staging, target, second)
    monkeypatch.undo()
    assert not target.exists()
    assert folders.recover(target)
    assert manifest.read(target) == first
    assert not folders.recover(target)


def test_a_replacement_that_the_disk_refuses_brings_the_older_one_back(tmp_path, monkeypatch):
    staging, target, first = staged(tmp_path)
    folders.publish(staging, target, first)
    staging, target, second = staged(tmp_path, content=b"other")
    real = os.rename

    def rename(source, destination):
        if source == staging:
            raise OSError("no")
        real(source, destination)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="no"):
        folders.publish(staging, target, second)
    assert manifest.read(target) == first


def test_a_text_file_is_old_or_new_at_every_moment(tmp_path, monkeypatch):
    path = tmp_path / "latest"
    folders.write_text(path, "one")

    def refuse(*_):
        raise OSError("no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        folders.write_text(path, "two")
    assert path.read_text() == "one"
