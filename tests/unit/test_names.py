"""Tags, ``latest``, and random damage to it and to manifests. No ranks."""

from __future__ import annotations

import json
import random

import pytest
from faults import Work, mutate
from staged_manifest import staged

from mics_ds.checkpoint import folder as folders
from mics_ds.checkpoint import manifest
from mics_ds.errors import MicsCheckpointError

BAD_TAGS = {
    "": "names no folder",
    ".": "names no folder",
    "./": "names no folder",
    "..": "leaves the folder",
    "a" * 5000: "it is too long",
    "b/" + 128 * "é": "too long for a file name",
    "/": "names no folder",
    "/tmp/elsewhere": "absolute",
    "../elsewhere": "leaves the folder",
    "a/../../elsewhere": "leaves the folder",
    "a\0b": "NUL",
    "a\ud800": "surrogate",
    "\udcff": "surrogate",
    " a": "white space",
    "a\n": "white space",
    ".a.partial": "not complete",
    "b/.a.replaced": "not complete",
}


@pytest.mark.parametrize("tag", BAD_TAGS, ids=lambda tag: ascii(tag)[:20])
def test_what_is_no_name_in_the_folder_is_no_tag(tag):
    with pytest.raises(MicsCheckpointError, match=BAD_TAGS[tag]) as error:
        folders.check_tag(tag)
    str(error.value).encode()  # can be printed


@pytest.mark.parametrize("tag", ["global_step1", "a/b", "a b", "...", "..a", "é", "7", ".hidden", "a//b/"])
def test_other_names_are_tags(tag):
    folders.check_tag(tag)


@pytest.fixture
def folder(tmp_path):
    for steps in (9, 10, 11):
        folders.publish(*staged(tmp_path, tag=f"global_step{steps}", content=b"%d" % steps, steps=steps))
        folders.write_latest(tmp_path, f"global_step{steps}")
    return tmp_path


def test_latest_is_the_tag_and_nothing_else(folder):
    assert (folder / "latest").read_text() == "global_step11"
    assert folders.read_latest(folder) == "global_step11"


def test_nothing_saved_yet(tmp_path):
    assert folders.read_latest(tmp_path) is None
    assert folders.read_latest(tmp_path / "absent") is None


def test_every_flipped_bit_of_latest_is_noticed(folder):
    content = b"global_step11"
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / "latest").write_bytes(flipped)
        with pytest.raises(MicsCheckpointError, match=r"latest is damaged.*where MiCS wrote 'global_step11'"):
            folders.read_latest(folder)


def test_a_latest_that_is_gone_or_empty_is_not_taken_for_nothing_saved(folder):
    (folder / "latest").unlink()
    with pytest.raises(MicsCheckpointError, match=r"latest is missing, where MiCS wrote 'global_step11'"):
        folders.read_latest(folder)
    (folder / "latest").write_text("")
    with pytest.raises(MicsCheckpointError, match=r"latest is damaged.*names no folder"):
        folders.read_latest(folder)


def test_a_damaged_note_leaves_latest_in_charge(folder):
    note = folder / folders.NOTE
    for content in (b"", b"\xff", b"[" * 100_000, b"{}", b"[]", b'{"tag": 7}', b'{"crc32": 1, "tag": "global_step10"}'):
        note.write_bytes(content)
        assert folders.read_latest(folder) == "global_step11"


def test_latest_may_be_changed_by_hand_where_the_note_is_removed(folder):
    (folder / "latest").write_text("global_step9\n")
    with pytest.raises(MicsCheckpointError, match=r"by hand: it names 'global_step9'.*remove .*mics_latest.json"):
        folders.read_latest(folder)
    (folder / folders.NOTE).unlink()
    assert folders.read_latest(folder) == "global_step9"


def test_a_job_without_mics_may_have_saved_last(folder):
    (folder / "global_step12").mkdir()
    (folder / "latest").write_text("global_step12")
    assert folders.read_latest(folder) == "global_step12"


@pytest.mark.parametrize("moment", range(4))
def test_latest_is_readable_wherever_writing_it_was_interrupted(folder, monkeypatch, moment):
    real, calls = folders.write_text, []

    def write_text(path, text):
        """Interrupted before it (0, 2) or after it (1, 3)."""
        calls.append(path)
        if moment == 2 * (len(calls) - 1):
            raise KeyboardInterrupt
        real(path, text)
        if moment == 2 * (len(calls) - 1) + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(folders, "write_text", write_text)
    with pytest.raises(KeyboardInterrupt):
        folders.write_latest(folder, "global_step10")
    assert folders.read_latest(folder) == ("global_step11" if moment == 0 else "global_step10")


def test_latest_may_be_replaced_while_it_is_read(folder, monkeypatch):
    real, once = folders._noted, []

    def noted(where):
        if not once:
            once.append(True)
            folders.write_latest(folder, "global_step10")
        return real(where)

    monkeypatch.setattr(folders, "_noted", noted)
    assert folders.read_latest(folder) == "global_step10"


# ------------------------------------------------------------------------------- random damage


def what_loads(folder):
    """All that is read before a checkpoint is loaded, as one rank alone would do it."""
    tag = folders.read_latest(folder)
    described = manifest.read(folder / tag)
    found = manifest.damages(folder / tag, described.files, described.files)
    if found or not described.files:
        raise MicsCheckpointError(str(found))
    return tag, described, folders.complete_tags(folder)


@pytest.mark.parametrize("protected", [True, False])
def test_random_damage_is_an_error_or_changes_nothing(folder, protected):
    chance = random.Random(15)
    path, latest = folder / "global_step11" / manifest.NAME, folder / "latest"
    if not protected:
        data = json.loads(path.read_text())
        del data["checksum"], data["save"]
        path.write_text(json.dumps({**data, "format": 1}))
    content = path.read_bytes()
    expected = what_loads(folder)
    ends = {"error": 0, "same": 0, "other": 0}
    for number in range(500 if protected else 200):
        mutate(folder, "global_step11", chance)
        try:
            with Work(20_000):
                ends["same" if what_loads(folder) == expected else "other"] += 1
        except MicsCheckpointError:
            ends["error"] += 1
        except Exception as error:
            raise AssertionError(f"mutation {number}: {path.read_bytes()[:999]} {latest.read_bytes()[:99]}") from error
        path.write_bytes(content)
        latest.write_text("global_step11")
    assert ends["error"] > ends["same"] > 0
    if protected:  # without a checksum, a good value for another one cannot be told
        assert ends["other"] == 0
