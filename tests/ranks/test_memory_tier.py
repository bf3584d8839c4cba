"""Training states in memory that outlives the process: taken, found again, fetched from a sibling, or refused."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist
from cases import slow
from checkpoint_engines import adamw, collectives, digest, engine_of, steps, writer
from helpers import build, ds_config, environment
from memory_tier import logged, nodes, remove, restarted, resumed, sealed, trained, zero
from torch import nn

from mics_ds.checkpoint import memory
from mics_ds.checkpoint.background import Background, wait_for_saves


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("p", "states"), [slow(1, "partition"), (2, "partition"), slow(4, "partition"), (1, "world"), slow(2, "world")]
)
def test_it_goes_on_from_the_last_copy(tmp_path, p, states):
    with nodes(tmp_path, states):
        uninterrupted = steps(engine_of(p, zero={"mics_optimizer_states": states}), 8)
        engine, losses, _ = trained(tmp_path, 5, p)
        engine.save_checkpoint(str(tmp_path / "disk"), tag="older", save_latest=True)
        dist.barrier()
        steps(engine, 1)
        sealed()
        assert losses == uninterrupted[:5]
        random.seed(7 + dist.get_rank())
        again, path, _ = resumed(tmp_path, p)
        assert path is not None
        assert again.global_steps == 6, "the copy is newer than step 5, which is on disk"
        assert steps(again, 2) == uninterrupted[6:]


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("lost", "states"),
    [
        ("node0", "partition"),
        slow("node1", "partition"),
        slow("node0/*/*shard0*", "partition"),
        slow("node1/*/*shard1-slice0of2.0*", "partition"),
        slow("node0", "world"),
        slow("node1", "world"),
        ("node0/*/*slice0of2*", "world"),
        slow("node1/*/*shard1-slice0of2.0*", "world"),
    ],
)
def test_what_a_node_lost_comes_from_a_sibling(tmp_path, lost, states):
    with nodes(tmp_path, states):
        _, _, copied = trained(tmp_path, 5)
        remove(tmp_path, lost)
        engine, _, _ = resumed(tmp_path)
        assert engine.global_steps == 4
        assert digest(engine) == copied[4]


@pytest.mark.ranks(4)
@pytest.mark.parametrize("states", ["partition", "world"])
def test_content_that_changed_is_not_used(tmp_path, states):
    with nodes(tmp_path, states):
        _, _, copied = trained(tmp_path, 5)
        name = "shard0-slice1of2.1"  # steps 2 and 4 are in slots 0 and 1
        for where in (1, 0):
            if dist.get_rank() == 0:
                [path] = tmp_path.glob(f"node{where}/*/e0-g0-{name}")
                with open(path, "r+b") as file:
                    file.seek(200)
                    byte = file.read(1)[0]
                    file.seek(200)
                    file.write(bytes([byte ^ 1]))
            dist.barrier()
            engine, _, _ = resumed(tmp_path)
            step = 4 if where == 1 else 2  # a sibling's is good; then only the one before is
            assert engine.global_steps == step
            assert digest(engine) == copied[step]


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("p", "states"), [(2, "partition"), slow(4, "partition"), (2, "world")])
def test_when_all_copies_of_a_shard_are_gone_the_disk_is_used(tmp_path, p, states):
    with nodes(tmp_path, states):
        engine, _, _ = trained(tmp_path, 3, p)
        engine.save_checkpoint(str(tmp_path / "disk"))
        saved = digest(engine)
        steps(engine, 1)
        sealed()
        remove(tmp_path, "node*/*/e0-g0-shard1-slice0*")
        with logged() as said:
            again, _, _ = resumed(tmp_path, p)
        assert again.global_steps == 3
        assert digest(again) == saved
        if dist.get_rank() == 0:
            assert "of step 4, shards [1] are in no node's memory" in said
            assert "no complete set of copies in memory" in said


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("p", "states"), [slow(1, "partition"), (2, "partition"), (1, "world"), slow(2, "world")])
def test_random_numbers_and_client_state_travel_with_it(tmp_path, p, states):
    with nodes(tmp_path, states):
        restarted()
        engine = engine_of(p, zero=zero())
        engine.load_checkpoint(str(tmp_path / "disk"))
        engine.mics_memory.client_state = lambda: {"batch": 10 * engine.global_steps, "rank": dist.get_rank()}
        torch.manual_seed(dist.get_rank())
        numpy.random.seed(dist.get_rank())
        random.seed(dist.get_rank())
        steps(engine, 2)
        drawn = torch.rand(3).tolist(), numpy.random.rand(), random.random()
        sealed()
        remove(tmp_path, "node0")
        _, _, client_state = resumed(tmp_path, p)
        assert client_state["batch"] == 20
        assert client_state["rank"] == dist.get_rank()
        assert (torch.rand(3).tolist(), numpy.random.rand(), random.random()) == drawn


@pytest.mark.ranks(4)
@pytest.mark.parametrize("states", ["partition", "world"])
def test_client_states_stay_on_their_ranks(tmp_path, states):
    """Training exchanges one short message, whatever is in them: 32 bytes."""
    with nodes(tmp_path, states):
        engine, _, _ = trained(tmp_path, 3)
        engine.mics_memory.client_state = lambda: {"seen": bytes([dist.get_rank()]) * 100_000}
        with collectives() as called:
            engine.mics_memory.copy(engine)
        assert called == [("all_reduce", 32)]
        sealed()
        _, _, client_state = resumed(tmp_path)
        assert client_state["seen"] == bytes([dist.get_rank()]) * 100_000


@pytest.mark.ranks(4)
def test_parameters_that_stay_gathered(tmp_path):
    """What they hold between steps is no part of a checkpoint."""
    persistent = {"stage3_param_persistence_threshold": 1_000_000, "stage3_model_persistence_threshold": 1_000_000}
    with nodes(tmp_path):
        uninterrupted = steps(engine_of(2, zero=persistent), 6)
        restarted()
        engine = engine_of(2, zero={**zero(), **persistent})
        engine.load_checkpoint(str(tmp_path / "disk"))
        for step in range(4):
            assert steps(engine, 1) == uninterrupted[step : step + 1]
            sealed()
        restarted()
        again = engine_of(2, seed=5, zero={**zero(), **persistent})
        again.load_checkpoint(str(tmp_path / "disk"))
        assert steps(again, 2) == uninterrupted[4:]


@pytest.mark.ranks(4)
def test_a_run_that_begins_anew_leaves_no_copies_of_the_one_before(tmp_path):
    """Same job, same model, but nobody asked to resume: after a crash it goes on from its own copies."""
    with nodes(tmp_path):
        trained(tmp_path, 6)
        restarted()
        engine = engine_of(2, seed=3, zero=zero())
        engine.mics_memory.begins_in(str(tmp_path / "disk"))
        steps(engine, 3)  # a copy after step 2; those after 4 and 6 are of the run before
        sealed()
        again, _, _ = resumed(tmp_path)
        assert again.global_steps == 2


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("culprit", "states"), [(0, "partition"), slow(3, "partition"), (3, "world")])
def test_a_copy_that_one_rank_cannot_make_is_made_by_none(tmp_path, culprit, states):
    """So that the last one stays complete everywhere."""
    with nodes(tmp_path, states):
        engine, _, copied = trained(tmp_path, 4)
        if dist.get_rank() == culprit:
            engine.mics_memory.client_state = lambda: 1 // 0
        steps(engine, 4)
        sealed()
        again, _, _ = resumed(tmp_path)
        assert again.global_steps == 4
        assert digest(again) == copied[4]


@pytest.mark.ranks(4)
def test_memory_that_one_rank_cannot_look_at_holds_nobody_up(tmp_path):
    with nodes(tmp_path):
        engine, _, copied = trained(tmp_path, 4)
        with pytest.MonkeyPatch.context() as patched:
            if dist.get_rank() == 1:
                patched.setattr(memory, "require_own", lambda path: 1 // 0)
            steps(engine, 2)
            sealed()
        again, _, _ = resumed(tmp_path)
        assert again.global_steps == 4
        assert digest(again) == copied[4]


@pytest.mark.ranks(4)
def test_the_newest_copy_that_all_shards_have_is_never_written_over(tmp_path):
    """Also where some rank fails to complete the next ones, again and again."""
    with nodes(tmp_path):
        engine, _, copied = trained(tmp_path, 4)
        with pytest.MonkeyPatch.context() as patched:
            if dist.get_rank() in (0, 2):  # shard 0, on both nodes
                patched.setattr(Background, "seal", lambda self, job, copying: None)
            for _ in range(4):
                steps(engine, 1)
                sealed()
        again, _, _ = resumed(tmp_path)
        assert again.global_steps == 4
        assert digest(again) == copied[4]


@pytest.mark.ranks(4)
@pytest.mark.parametrize("victim", [0, slow(3)])
def test_a_writer_that_dies_with_slices_costs_a_copy_and_no_more(tmp_path, victim):
    """Its peers do not wait for it, the copy before stays, and the next ones are made, by another process. So are
    checkpoints."""
    with nodes(tmp_path, "world"), environment(MICS_DS_WRITER_PATIENCE="5"):
        if Background.current is not None:
            Background.current.close()
        engine, _, copied = trained(tmp_path, 4)
        steps(engine, 1)
        sealed()
        if dist.get_rank() == victim:
            os.kill(writer(), signal.SIGSTOP)
        dist.barrier()
        steps(engine, 1)
        if dist.get_rank() == victim:
            os.kill(writer(), signal.SIGKILL)
        sealed()
        again, _, _ = resumed(tmp_path)
        assert again.global_steps == 4
        assert digest(again) == copied[4]
        steps(again, 1)
        again.save_checkpoint(str(tmp_path / "disk"), tag="five", async_save=True)
        wait_for_saves()
        steps(again, 1)
        sealed()
        saved = digest(again)
        last, _, _ = resumed(tmp_path)
        assert last.global_steps == 6
        assert digest(last) == saved


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 7)

    def forward(self, x, y):
        return (self.layer(x) - y).pow(2).mean()


@pytest.mark.ranks(4)
def test_memory_that_is_not_this_jobs_is_refused(tmp_path):
    with nodes(tmp_path):
        engine, _, _ = trained(tmp_path, 2)
        cases = {
            "the job never saved to": lambda: engine_of(2, zero=zero()).load_checkpoint(str(tmp_path / "elsewhere")),
            "another model or another number of shards": lambda: build(
                ds_config(2, zero=zero()), Other, optimizer=adamw
            ).load_checkpoint(str(tmp_path / "disk")),
            "no complete set": lambda: engine_of(2, zero=zero(job="another")).load_checkpoint(str(tmp_path / "disk")),
        }
        for words, load in cases.items():
            restarted()
            with logged() as said:
                assert load() == (None, None), words
            if dist.get_rank() == 0:
                assert words in "\n".join(said)
        engine.save_checkpoint(str(tmp_path / "disk"), client_state={"epoch": 1})
        steps(engine, 2)
        sealed()
        with logged() as said:
            again, _, client_state = resumed(tmp_path)
        assert (again.global_steps, client_state["epoch"]) == (2, 1), "from disk: the copy knows no epoch"
        if dist.get_rank() == 0:
            assert "the script saves a client_state, which copies in memory lack" in "\n".join(said)
        steps(again, 1)
        again.load_checkpoint(str(tmp_path / "disk"))
        assert again.global_steps == 2, "whoever goes back means what is on disk"


@pytest.mark.ranks(4)
def test_a_named_job_may_resume_from_any_folder(tmp_path):
    with nodes(tmp_path):
        _, _, copied = trained(tmp_path, 2, job="mine")
        restarted()
        engine = engine_of(2, seed=5, zero=zero(job="mine"))
        engine.load_checkpoint(str(tmp_path / "elsewhere"))
        assert digest(engine) == copied[2]


def train_and_leave(root, states):
    with nodes(Path(root), states):
        copied = trained(Path(root), 4)[2]
        engine = engine_of(2)  # which has whole shards, to compare with
        steps(engine, 4)
        return copied[4], digest(engine)


def resume_on_fewer(root, states, copied):
    with nodes(Path(root), states):
        engine, _, _ = resumed(Path(root))
        assert engine.global_steps == 4
        whole = 4 > dist.get_world_size() == 2  # one replica, so that a slice is the shard
        assert digest(engine) == copied[dist.get_rank()][int(whole)]
        for _ in range(4):
            steps(engine, 1)
            sealed()
        assert len({path.stem for path in Path(root).glob("node0/*/e0-g0-shard*.1")}) in (2, 4), "no strays"


@pytest.mark.parametrize(
    ("ranks", "states"),
    [
        (2, "partition"),
        slow(4, "partition"),
        slow(2, "world"),
        slow(4, "world"),
    ],
)
def test_on_as_many_or_fewer_replicas_after_a_kill(pools, tmp_path, ranks, states):
    arguments = {"root": str(tmp_path), "states": states}
    answers = pools.run(4, __name__, "train_and_leave", arguments, 120, fresh=True)
    pools.run(ranks, __name__, "resume_on_fewer", {**arguments, "copied": answers}, 120)


@pytest.mark.ranks(2)
def test_without_the_key_there_is_nothing(tmp_path):
    with nodes(tmp_path):
        if Background.current is not None:
            Background.current.close()
        engine = engine_of(1)
        assert not hasattr(engine, "mics_memory")
        steps(engine, 2)
        engine.save_checkpoint(str(tmp_path / "disk"))
        engine_of(1).load_checkpoint(str(tmp_path / "disk"))
        assert Background.current is None
        assert not list(tmp_path.glob("node*")), "where copies would be"
