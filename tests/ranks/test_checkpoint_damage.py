"""Damaged checkpoints, tags that are none, and errors of one rank: one named error on every rank, or a right load."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from checkpoint_engines import RESHAPE, adamw, digest, engine_of, reshape
from deepspeed.checkpoint.constants import CHECKPOINT_PARALLEL_DIMS
from faults import Once, mutate, outcome, unforeseen
from helpers import build, ds_config, environment, train

from mics_ds.checkpoint import folder as folders
from mics_ds.checkpoint import load, manifest, save
from mics_ds.errors import MicsCheckpointError


def on_rank_0(work) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        work()
    dist.barrier()


def restore(pristine, folder) -> None:
    shutil.rmtree(folder)
    shutil.copytree(pristine, folder)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def flip_high(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 128
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def writes(text):
    return lambda path: path.write_text(text)


def unprotected(**changes):
    """As an older mics_ds wrote it, so that values and not the checksum have to be objected to."""

    def change(path):
        data = json.loads(path.read_text())
        for newer in ("checksum", "save"):
            del data[newer]
        path.write_text(json.dumps({**data, "format": 1, **changes}))

    return change


def drop_record(format_version, name):
    def change(path):
        data = json.loads(path.read_text())
        del data["files"][name], data["save"]
        if format_version == 1:
            del data["checksum"]
        path.write_text(json.dumps({**data, "format": format_version}))
        flip(path.parent / name)

    return change


def shutdown_of_the_writer(path):
    """Killed between the renames of replacing a checkpoint."""
    path.parent.rename(path.parent.with_name(f".{path.parent.name}.replaced"))


LATEST, OPTIM = "../latest", "zero_pp_rank_1_mp_rank_00_optim_states.pt"
DAMAGE = {
    "bit flipped": (OPTIM, flip, "other content than was written"),
    "bit flipped in model states": ("zero_pp_rank_0_mp_rank_00_model_states.pt", flip, "other content"),
    "bit flipped in a client state": ("mics_client_state_rank_1.pt", flip, "other content"),
    "shard removed": (OPTIM, Path.unlink, "is missing"),
    "shard truncated": ("zero_pp_rank_1_mp_rank_00_model_states.pt", truncate, "bytes where"),
    "manifest truncated": (manifest.NAME, halve, "damaged"),
    "manifest nonsense": (manifest.NAME, writes("{]"), "damaged"),
    "manifest flipped": (manifest.NAME, flip, "damaged"),
    "manifest not text": (manifest.NAME, flip_high, "damaged"),
    "manifest deeply nested": (manifest.NAME, writes("[" * 100_000), "damaged"),
    "manifest gone": (manifest.NAME, Path.unlink, "written by mics_ds .*mics_manifest.json is gone.*ALLOW_UNCHECKED"),
    "manifest of another tag": (
        manifest.NAME,
        lambda path: shutil.copy(path.parent.parent / "global_step1" / manifest.NAME, path),
        "other content|bytes where",
    ),
    "shards a text": (manifest.NAME, unprotected(shards="2"), "damaged.*shards"),
    "shards null": (manifest.NAME, unprotected(shards=None), "damaged.*shards"),
    "shards huge": (manifest.NAME, unprotected(shards=10**9), "damaged.*shards"),
    "steps null": (manifest.NAME, unprotected(global_steps=None), "damaged.*global_steps"),
    "a record dropped": (manifest.NAME, drop_record(2, OPTIM), "damaged"),
    "a record dropped, no checksum": (manifest.NAME, drop_record(1, OPTIM), "not in its mics_manifest.json"),
    "a client state dropped, no checksum": (
        manifest.NAME,
        drop_record(1, "mics_client_state_rank_1.pt"),
        "not in its mics_manifest.json",
    ),
    "latest points nowhere": (LATEST, writes("global_step9"), "'global_step9', which does not exist"),
    "latest points to another": (LATEST, writes("global_step1"), "MiCS wrote 'global_step2'"),
    "latest flipped": (LATEST, flip, "latest is damaged"),
    "latest not text": (LATEST, flip_high, "latest is damaged"),
    "latest empty": (LATEST, writes(""), "latest is damaged"),
    "latest leaves the folder": (LATEST, writes("../elsewhere"), "latest is damaged.*leaves the folder"),
    "latest gone": (LATEST, Path.unlink, "latest is missing"),
}
HARMLESS = {
    "another manifest not text": ("../global_step1/" + manifest.NAME, flip_high),
    "another manifest null": ("../global_step1/" + manifest.NAME, unprotected(global_steps=None)),
    "an older mics_ds": (manifest.NAME, unprotected()),
    "note not text": ("../mics_latest.json", flip_high),
    "note gone": ("../mics_latest.json", Path.unlink),
    "line end": (LATEST, writes("global_step2\n")),
    "replacing interrupted": (manifest.NAME, shutdown_of_the_writer),
}


def saved_twice(folder):
    """``global_step1`` and ``global_step2``, in which rank 1 has a client state of its own."""
    engine = engine_of(2)
    for _ in range(2):
        train(engine, 1)
        engine.save_checkpoint(str(folder), client_state={"of": dist.get_rank() == 1})
    return digest(engine)


@pytest.mark.ranks(4)
def test_damage_is_named_on_every_rank_and_changes_nothing(tmp_path):
    folder, pristine = tmp_path / "saved", tmp_path / "pristine"
    saved_twice(folder)
    on_rank_0(lambda: shutil.copytree(folder, pristine))
    engine = engine_of(2, seed=5)
    train(engine, 1)
    before = digest(engine)
    wrong = {}
    for damage, (name, spoil, words) in DAMAGE.items():
        on_rank_0(lambda: restore(pristine, folder))
        on_rank_0(lambda: spoil(folder / "global_step2" / name))  # noqa: B023
        said = outcome(lambda: engine.load_checkpoint(str(folder)))
        named = re.search(words, said) and not said.startswith(("a bare", "ranks differ"))
        if not named or digest(engine) != before or (name != LATEST and "Complete checkpoints in" not in said):
            wrong[damage] = said
    assert wrong == {}, wrong
    engine.load_checkpoint(str(folder), tag="global_step1")
    assert engine.global_steps == 1


@pytest.mark.ranks(4)
def test_damage_is_found_in_files_that_are_cut_into_other_sub_groups(tmp_path):
    saved_twice(tmp_path)
    on_rank_0(lambda: flip(tmp_path / "global_step2" / OPTIM))
    engine = engine_of(2, seed=5, zero={"sub_group_size": 100, **RESHAPE})
    before = digest(engine)
    said = outcome(lambda: engine.load_checkpoint(str(tmp_path)))
    assert re.search(f"ranks 1, 3: .*{OPTIM} has other content than was written", said), said
    assert digest(engine) == before


@pytest.mark.ranks(4)
def test_damage_elsewhere_does_not_keep_a_good_checkpoint_from_loading(tmp_path):
    folder, pristine = tmp_path / "saved", tmp_path / "pristine"
    expected = saved_twice(folder)
    on_rank_0(lambda: shutil.copytree(folder, pristine))
    engine = engine_of(2, seed=5)
    for damage, (name, spoil) in HARMLESS.items():
        on_rank_0(lambda: restore(pristine, folder))
        on_rank_0(lambda: spoil(folder / "global_step2" / name))  # noqa: B023
        train(engine, 1)
        _, client_state = engine.load_checkpoint(str(folder))
        assert digest(engine) == expected, damage
        assert client_state["of"] == (dist.get_rank() == 1), damage
        assert "mics_ds" not in client_state


@pytest.mark.ranks(4)
def test_a_lost_manifest_can_be_overridden_and_stock_checkpoints_have_none(tmp_path):
    engine = engine_of(2)
    train(engine, 1)
    engine.save_checkpoint(str(tmp_path))
    expected = digest(engine)
    on_rank_0((tmp_path / "global_step1" / manifest.NAME).unlink)
    again = engine_of(2, seed=5)
    with pytest.raises(MicsCheckpointError, match="is gone"):
        again.load_checkpoint(str(tmp_path))
    with environment(MICS_DS_ALLOW_UNCHECKED="1"):
        again.load_checkpoint(str(tmp_path))
    assert digest(again) == expected
    if dist.get_rank() == 0:
        result = reshape(tmp_path / "global_step1", tmp_path / "cut", "--shards", 1)
        assert result.returncode == 1
        assert "is gone" in result.stderr
    # stock ZeRO-3 where MiCS has saved: no manifest, and none is missed
    stock = engine_of(None)
    train(stock, 2)
    dist.barrier()
    stock.save_checkpoint(str(tmp_path), tag="global_step1")
    whole = engine_of(4, seed=6)
    whole.load_checkpoint(str(tmp_path))
    assert whole.global_steps == 2


BAD_TAGS = ["", ".", "..", "/tmp/mics_ds_elsewhere", "a\0b", "a\ud800", "../elsewhere", "a/../../elsewhere", " a"]


def everything_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.ranks(4)
def test_a_tag_that_is_none_is_one_error_and_makes_nothing(tmp_path):
    folder = tmp_path / "inside" / "saved"
    engine = engine_of(2)
    engine.save_checkpoint(str(folder), tag="good")
    dist.barrier()
    before = everything_in(tmp_path)
    dist.barrier()
    wrong = {}
    for tag in BAD_TAGS:
        for where in (range(4), [2], [0]):
            mine = tag if dist.get_rank() in where else "good"
            for action in (engine.save_checkpoint, engine.load_checkpoint):
                said = outcome(lambda: action(str(folder), tag=mine))  # noqa: B023
                dist.barrier()
                named = "cannot be the tag" in said and not said.startswith(("a bare", "ranks differ"))
                if not named or everything_in(tmp_path) != before:
                    wrong[ascii((tag, list(where), action.__name__))] = said
                dist.barrier()  # rank 0 makes a folder next
    assert wrong == {}, wrong
    assert not Path("/tmp/mics_ds_elsewhere").exists()
    engine.save_checkpoint(str(folder), tag="a/b")
    engine.load_checkpoint(str(folder), tag="a/b")


# ------------------------------------------------------------------------- errors of one rank alone


def staging_removed(original, states, path):
    staging = Path(path).parent
    while not (staging / "zero_pp_rank_0_mp_rank_00_model_states.pt").exists():
        time.sleep(0.01)  # else rank 0 might make the folder anew, and nothing be missing from it
    staging.rename(staging.parent.parent / "gone")  # at once, for rank 0 writes into it
    return original(states, path)


@pytest.mark.ranks(4)
def test_whatever_one_rank_raises_while_saving_is_the_error_of_all(tmp_path):
    """Files are written by ranks 0 and 3; rank 0 publishes."""
    folder = tmp_path / "saved"
    engine = engine_of(2)
    train(engine, 1)
    engine.save_checkpoint(str(folder), tag="first")
    dist.barrier()
    before = sorted(os.listdir(folder))
    dist.barrier()
    files = engine.checkpoint_engine.inner
    cases = {
        "publishing": (0, folders, "publish", unforeseen),
        "describing": (0, save._Save, "describe", unforeseen),
        "preparing": (0, folders.shutil, "rmtree", unforeseen),
        "latest": (0, folders, "write_latest", unforeseen),
        "model states, a writer": (3, engine, "module_state_dict", unforeseen),
        "model states, not a writer": (2, engine, "module_state_dict", unforeseen),
        "optimizer states": (3, engine.optimizer, "state_dict", unforeseen),
        "writing": (0, files, "save", unforeseen),
        "sealing": (3, manifest, "seal", unforeseen),
        "staging removed": (3, files, "save", staging_removed),
    }
    wrong = {}
    for case, (culprit, owner, name, replacement) in cases.items():
        if case == "preparing":
            on_rank_0((folder / ".second.0123456789ab.partial").mkdir)
        with Once(culprit, owner, name, replacement):
            said = outcome(lambda: engine.save_checkpoint(str(folder), tag="second"))
        words = "unforeseen"
        if case == "staging removed":
            culprit, words = r"\d", "No such file|does not exist|cannot be seen"  # as who writes, or publishes, says it
        dist.barrier()
        if not re.search(rf"ranks? .*{culprit}.*({words})", said) or said.startswith(("a bare", "ranks differ")):
            wrong[case] = said
        # What was published although latest could not be updated, is there.
        excused = {"latest": {"second"}, "preparing": {".second.0123456789ab.partial"}}.get(case, set())
        left = sorted({*os.listdir(folder)} - excused)
        if left != before:
            wrong[f"{case}, left"] = left
        if case == "latest":
            on_rank_0(lambda: shutil.rmtree(folder / "second"))
        dist.barrier()  # rank 0 makes a folder next
    assert wrong == {}, wrong
    engine.save_checkpoint(str(folder), tag="second")
    engine_of(2, seed=5).load_checkpoint(str(folder))


@pytest.mark.ranks(4)
def test_arguments_that_are_wrong_on_one_rank_are_the_error_of_all(tmp_path):
    engine = engine_of(2)
    engine.save_checkpoint(str(tmp_path), tag="first")
    mine = dist.get_rank() == 1

    class Nameless:
        def __str__(self):
            raise ZeroDivisionError("unforeseen")

    cases = {
        "reserved key": ({"client_state": {CHECKPOINT_PARALLEL_DIMS: 1}}, "rank 1: KeyError.*reserved"),
        "client state no mapping": ({"client_state": 5}, "rank 1: client_state cannot be pickled"),
        "tag without a name": ({"tag": Nameless()}, "rank 1: ZeroDivisionError: unforeseen"),
        "no folder": ({"save_dir": ""}, "rank 1: save_dir must be"),
        "folder no path": ({"save_dir": 5}, "rank 1: TypeError"),
        "folder with NUL": ({"save_dir": "a\0"}, "same folder"),
    }
    good = {"save_dir": str(tmp_path), "tag": "second"}
    wrong = {}
    for case, (change, words) in cases.items():
        arguments = {**good, **change} if mine else good
        said = outcome(lambda: engine.save_checkpoint(**arguments))  # noqa: B023
        if not re.search(words, said) or said.startswith(("a bare", "ranks differ")):
            wrong[case] = said
    dist.barrier()
    assert wrong == {}, wrong
    assert folders.complete_tags(tmp_path) == ["first"]
    said = outcome(lambda: engine.load_checkpoint(None if mine else str(tmp_path)))
    assert "TypeError" in said


@pytest.mark.ranks(4)
def test_whatever_one_rank_raises_while_loading_is_the_error_of_all(tmp_path):
    engine = engine_of(2)
    engine.save_checkpoint(str(tmp_path), client_state={"of": dist.get_rank()})
    cases = {
        "latest": (1, folders, "read_latest", unforeseen),
        "checking": (3, manifest, "damages", unforeseen),
        "reading": (2, load, "_pread", unforeseen),
        "putting into place": (1, load.Image, "fill", unforeseen),
        "the archive": (0, load.Image, "leave_holes", unforeseen),
        "unpickling": (1, load.seam, "load_states", unforeseen),
        "the model": (3, load, "_misfits", unforeseen),
        "own state": (2, load, "restore_own", unforeseen),
    }
    wrong = {}
    for case, (culprit, owner, name, replacement) in cases.items():
        with Once(culprit, owner, name, replacement):
            said = outcome(lambda: engine.load_checkpoint(str(tmp_path)))
        if f"rank {culprit}: ZeroDivisionError: unforeseen" not in said or said.startswith(("a bare", "ranks differ")):
            wrong[case] = said
    assert wrong == {}, wrong
    with Once(2, folders, "complete_tags", unforeseen):  # only whoever cannot load asks what else there is
        said = outcome(lambda: engine.load_checkpoint(str(tmp_path), tag="gone"))
    assert re.search(r"ranks 0, 1, 2, 3: .*gone does not exist", said), said
    engine.load_checkpoint(str(tmp_path))


# ------------------------------------------------------------------------------- random damage


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_random_damage_to_what_ranks_load(tmp_path):
    folder, pristine = tmp_path / "saved", tmp_path / "pristine"
    engine = build(ds_config(2), optimizer=adamw)
    for _ in range(3):
        train(engine, 1)
        engine.save_checkpoint(str(folder))
    expected = digest(engine)
    on_rank_0(lambda: shutil.copytree(folder, pristine))
    chance = random.Random(16)
    ends = {"error": 0, "same": 0}
    for number in range(60):
        on_rank_0(lambda: restore(pristine, folder))
        on_rank_0(lambda: mutate(folder, "global_step3", chance))
        train(engine, 1)
        before = digest(engine)
        said = outcome(lambda: engine.load_checkpoint(str(folder)))
        assert not said.startswith(("a bare", "ranks differ")), f"mutation {number}: {said}"
        assert digest(engine) == (before if said else expected), f"mutation {number}: {said}"
        ends["error" if said else "same"] += 1
    assert min(ends.values()) > 0, ends
