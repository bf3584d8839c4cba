"""Copies in memory written to a framework's folder, and the folder that the HF Trainer resumes from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from cases import slow
from checkpoint_engines import digest, engine_of, steps
from memory_tier import ASKED, arguments, logged, nodes, remove, resolved, restarted, sealed, trainer_state, zero

from mics_ds.checkpoint import manifest, restart
from mics_ds.checkpoint.memory import Caller, called_by
from mics_ds.errors import MicsCheckpointError
from mics_ds.frameworks import hf_trainer


def trained(root: Path, count: int, p: int = 2):
    """An engine under a framework that keeps two files; the digest of each copy."""
    copied, engine = {}, None

    def files() -> dict[str, bytes]:
        mine = {f"rng_state_{dist.get_rank()}.pth": b"numbers"}
        return mine if dist.get_rank() else {**mine, hf_trainer.STATE: trainer_state(engine.global_steps)}

    restarted()
    marker, step = lambda: hf_trainer.marker(root / "out"), lambda: engine.global_steps
    with called_by(Caller(str(root / "out"), files, lambda _: False, marker, step)):
        engine = engine_of(p, zero=zero())
    for _ in range(count):
        steps(engine, 1)
        if engine.mics_memory.is_due:
            engine.mics_memory.copy(engine)
            sealed()
            copied[engine.global_steps] = digest(engine)
    return engine, copied


def save(root: Path, engine) -> None:
    """As the Trainer does."""
    folder = root / "out" / f"checkpoint-{engine.global_steps}"
    engine.save_checkpoint(str(folder))
    if dist.get_rank() == 0:
        (folder / hf_trainer.STATE).write_bytes(trainer_state(engine.global_steps))
    dist.barrier()


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("p", "lost", "states"),
    [
        (2, "node1", "partition"),
        (2, "node1", "world"),
        slow(1, "node1", "partition"),
        slow(1, "node0", "world"),
        slow(2, None, "partition"),
        slow(4, None, "partition"),
    ],
)
def test_memory_becomes_a_checkpoint(tmp_path, p, lost, states):
    with nodes(tmp_path, states):
        _, copied = trained(tmp_path, 5, p)
        if lost:
            remove(tmp_path, lost)
        assert resolved(tmp_path) == "checkpoint-4"
        folder = tmp_path / "out" / "checkpoint-4"
        found = manifest.read(folder / "global_step4")
        assert not manifest.damages(folder / "global_step4", found.files, found.files)
        assert (found.shards, found.replicas, found.ranks) == (p, 4 // p, 4)
        names = {path.name for path in folder.iterdir()}
        assert {"latest", "zero_to_fp32.py", hf_trainer.STATE, *(f"rng_state_{rank}.pth" for rank in range(4))} <= names
        again = engine_of(p, seed=5, zero={"mics_optimizer_states": states})
        again.load_checkpoint(str(folder))
        assert digest(again) == copied[4]
        assert steps(again, 1) == steps(engine_of_step(p, states), 1)


def engine_of_step(p: int, states: str):
    """Trained without an interruption for as long as the newest copy."""
    engine = engine_of(p, zero={"mics_optimizer_states": states})
    steps(engine, 4)
    return engine


@pytest.mark.ranks(4)
def test_the_newer_of_memory_and_disk(tmp_path):
    with nodes(tmp_path):
        engine, _ = trained(tmp_path, 3)
        save(tmp_path, engine)
        assert resolved(tmp_path) == "checkpoint-3"
        steps(engine, 1)
        engine.mics_memory.copy(engine)
        sealed()
        assert resolved(tmp_path, str(tmp_path / "out" / "checkpoint-3"), None) == "checkpoint-3", "not from memory"
        assert resolved(tmp_path, str(tmp_path / "out" / "checkpoint-3")) == "checkpoint-4", "the newest on disk"
        assert resolved(tmp_path, str(tmp_path / "out" / "checkpoint-3")) == "checkpoint-3", "and not any more"


@pytest.mark.ranks(4)
def test_the_engine_itself_does_not_go_on_from_memory(tmp_path):
    """The Trainer's own state is that of the folder."""
    with nodes(tmp_path):
        engine, _ = trained(tmp_path, 3)
        save(tmp_path, engine)
        saved = digest(engine)
        steps(engine, 1)
        engine.mics_memory.copy(engine)
        sealed()
        restarted()
        with called_by(Caller(str(tmp_path / "out"), dict, lambda _: False)):
            again = engine_of(2, seed=5, zero=zero())
        again.load_checkpoint(str(tmp_path / "out" / "checkpoint-3"))
        assert digest(again) == saved


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("damaged", "chosen"),
    [("node0/*/{}.1", 4), ("node*/*/{}.1", 2), ("node*/*/{}.*", 1)],
    ids=["on one node", "the last on both", "both on both"],
)
def test_damaged_copies_are_not_used(tmp_path, damaged, chosen):
    with nodes(tmp_path):
        engine, _ = trained(tmp_path, 1)
        save(tmp_path, engine)
        trained(tmp_path, 5)
        if dist.get_rank() == 0:
            for path in tmp_path.glob(damaged.format("e0-g0-shard1-slice0of2")):
                if path.suffix != ".json":
                    content = bytearray(path.read_bytes())
                    content[200] ^= 1
                    path.write_bytes(content)
        dist.barrier()
        assert resolved(tmp_path) == f"checkpoint-{chosen}"


@pytest.mark.ranks(4)
def test_memory_without_the_trainers_state_is_not_used(tmp_path):
    with nodes(tmp_path):
        restarted()
        with called_by(Caller(str(tmp_path / "out"), dict, lambda _: False)):
            engine = engine_of(2, zero=zero())
        steps(engine, 2)
        engine.mics_memory.copy(engine)
        sealed()
        with logged() as said:
            assert resolved(tmp_path) is True, "the Trainer says that there is none"
        assert dist.get_rank() or any("lack trainer_state.json" in line for line in said)
        assert restart.find(ASKED, str(tmp_path / "elsewhere"), lambda: ("", -1), needed=hf_trainer.STATE) is None


@pytest.mark.ranks(2)
def test_what_was_never_complete_is_set_aside(tmp_path):
    engine = engine_of(1)
    for _ in range(2):
        steps(engine, 1)
        save(tmp_path, engine)
    out = tmp_path / "out"
    if dist.get_rank() == 0:
        (out / "checkpoint-2" / "global_step2").rename(out / "checkpoint-2" / ".global_step2.partial")
        (out / "checkpoint-3").mkdir()
        (out / "checkpoint-4").mkdir()  # without states of an engine, as with save_only_model
        (out / "checkpoint-4" / hf_trainer.STATE).write_bytes(trainer_state(4))
    dist.barrier()
    assert resolved(tmp_path, str(out / "model")) == "model"
    assert resolved(tmp_path) == "checkpoint-4", "the Trainer's own error"
    assert (out / "checkpoint-3").exists(), "which is older than what was asked for"
    remove(tmp_path, "out/checkpoint-4")
    assert resolved(tmp_path) == "checkpoint-1"
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint-1",
        "interrupted-checkpoint-2",
        "interrupted-checkpoint-3",
    ]
    remove(tmp_path, "out/checkpoint-1")
    if dist.get_rank() == 0:
        (out / "checkpoint-2").mkdir()
    dist.barrier()
    with pytest.raises(
        MicsCheckpointError, match=r"checkpoint-2 was still being saved when its job ended, and no older"
    ):
        resolved(tmp_path)
    args = SimpleNamespace(**vars(arguments(tmp_path)), deepspeed_plugin=None)
    assert hf_trainer.last_checkpoint(args) is None, "so that a script begins anew"
    assert (out / "interrupted-checkpoint-2.2").exists()
