"""Folders, manifests and the order of things on disk. No ranks."""

from __future__ import annotations

import os

import pytest

from mics_ds.checkpoint import manifest
from mics_ds.checkpoint.manifest import Manifest
from mics_ds.errors import MicsCheckpointError


def staged(folder, tag="t", content=b"abc", steps=1):
    """A folder with one file, ready to be published, and its manifest."""
    target = folder / tag
    staging = manifest.staging_folder(target)
    staging.mkdir()
    (staging / "a_model_states.pt").write_bytes(content)
    files = {"a_model_states.pt": manifest.seal(staging / "a_model_states.pt", 3)}
    return staging, target, Manifest(tag, 2, 2, 4, (2, 2), 1, steps, False, {"mics_ds": "0"}, files)


def test_what_is_published_is_read_back(tmp_path):
    staging, target, written = staged(tmp_path)
    manifest.publish(staging, target, written)
    assert manifest.read(target) == written
    assert written.total_bytes == 3
    assert not staging.exists()
    assert manifest.damages(target, written.files, written.files) == []
    assert manifest.complete_tags(tmp_path) == ["t"]


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
    manifest.publish(staging, target, written)
    damage(target / "a_model_states.pt")
    (found,) = manifest.damages(target, written.files, written.files)
    assert words in found
    assert "a_model_states.pt" in found


def test_every_flipped_bit_changes_the_checksum(tmp_path):
    content = bytes(range(64))
    staging, target, written = staged(tmp_path, content=content)
    manifest.publish(staging, target, written)
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (target / "a_model_states.pt").write_bytes(flipped)
        assert manifest.damages(target, written.files, written.files)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2}', '{"format": 1, "files": {}}', "nonsense"])
def test_a_damaged_manifest_is_an_error_and_not_a_checkpoint(tmp_path, text):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / manifest.NAME).write_text(text)
    with pytest.raises(MicsCheckpointError, match="damaged"):
        manifest.read(tmp_path / "t")
    assert manifest.complete_tags(tmp_path) == []


def test_files_that_the_publisher_cannot_see_are_an_error(tmp_path):
    staging, target, written = staged(tmp_path)
    (staging / "a_model_states.pt").unlink()
    with pytest.raises(MicsCheckpointError, match=r"written by ranks \[3\].*use_node_local_storage"):
        manifest.publish(staging, target, written)
    assert not target.exists()


def test_saving_a_tag_again_replaces_it_and_keeps_what_others_put_there(tmp_path):
    staging, target, written = staged(tmp_path)
    manifest.publish(staging, target, written)
    (target / "notes.txt").write_text("mine")
    (target / "zero_pp_rank_7_mp_rank_00_model_states.pt").write_text("of a larger job")
    staging, target, again = staged(tmp_path, content=b"other", steps=2)
    manifest.publish(staging, target, again)
    assert manifest.read(target) == again
    assert sorted(os.listdir(target)) == ["a_model_states.pt", manifest.NAME, "notes.txt"]
    assert os.listdir(tmp_path) == ["t"]


def test_a_replacement_killed_between_its_renames_is_undone(tmp_path, monkeypatch):
    staging, target, first = staged(tmp_path)
    manifest.publish(staging, target, first)
    staging, target, second = staged(tmp_path, content=b"other")
    real, calls = os.rename, []

    def rename(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*paths)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        manifest.publish(staging, target, second)
    monkeypatch.undo()
    assert not target.exists()
    assert manifest.recover(target)
    assert manifest.read(target) == first
    assert not manifest.recover(target)


def test_a_text_file_is_old_or_new_at_every_moment(tmp_path, monkeypatch):
    path = tmp_path / "latest"
    manifest.write_text(path, "one")

    def refuse(*_):
        raise OSError("no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        manifest.write_text(path, "two")
    assert path.read_text() == "one"
