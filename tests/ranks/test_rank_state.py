"""State that each rank has of its own comes back to it, as under stock ZeRO-3: buffers, schedulers, samplers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import each_layout, every, slow
from checkpoint_engines import RESHAPE, adamw, reshape
from helpers import OddNet, build, ds_config, environment, train
from memory_tier import nodes, remove, resolved, restarted, sealed, trainer_state
from torch import nn

from mics_ds.checkpoint import manifest
from mics_ds.checkpoint.background import wait_for_saves
from mics_ds.checkpoint.memory import Caller, called_by
from mics_ds.frameworks import hf_trainer

STATES = ["partition", "world"]


class Counting(nn.Module):
    """Statistics of the batches that this rank has seen, a counter, and an extra state of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(7, 13), nn.BatchNorm1d(13), nn.Linear(13, 7)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("same", torch.arange(5.0))
        self.extra = "nothing"

    def get_extra_state(self) -> str:
        return self.extra

    def set_extra_state(self, state: str) -> None:
        self.extra = state

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.seen += 1 + dist.get_rank()
        return (self.last(self.norm(self.first(x)).relu()) - y).pow(2).mean()


class Sampler:
    """Stands for DeepSpeed's sampler of a curriculum, which is asked for its state by these names."""

    def __init__(self) -> None:
        self.drawn = 0

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.drawn = state["drawn"]


def engine_of(p: int | None, seed: int = 1234, model: type[nn.Module] = Counting, **zero: Any) -> Any:
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 100}}
    engine = build(ds_config(p, zero=zero, scheduler=scheduler), model, seed=seed, optimizer=adamw)
    engine.training_dataloader = SimpleNamespace(data_sampler=Sampler())
    engine.curriculum_learning_enabled = lambda: True
    return engine


def trained(p: int | None, steps: int = 3, **zero: Any) -> Any:
    engine = engine_of(p, **zero)
    train(engine, steps)
    rank = dist.get_rank()
    engine.module.extra = f"of rank {rank}"
    engine.training_dataloader.data_sampler.drawn = 100 + rank
    engine.lr_scheduler.last_batch_iteration = 10 + rank
    return engine


def own(engine: Any) -> dict[str, Any]:
    """What this rank has of its own."""
    found: dict[str, Any] = {name: buffer.tolist() for name, buffer in engine.module.named_buffers()}
    found["extra"] = engine.module.extra
    found["sampler"] = engine.training_dataloader.data_sampler.drawn
    found["scheduler"] = engine.lr_scheduler.last_batch_iteration
    return found


def differs(engine: Any) -> dict[str, Any]:
    """The same, where every rank has something else."""
    mine = own(engine)
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, {name: value for name, value in mine.items() if name not in ("same",)})
    for name in said[0]:
        if name != "norm.num_batches_tracked":
            assert len({json.dumps(item[name]) for item in said}) == dist.get_world_size(), name
    return mine


@pytest.mark.ranks(4)
def test_stock_gives_each_rank_its_own(tmp_path):
    """The oracle."""
    engine = trained(None)
    engine.save_checkpoint(str(tmp_path), client_state={"of": dist.get_rank()})
    again = engine_of(None, seed=5)
    _, client_state = again.load_checkpoint(str(tmp_path))
    assert own(again) == differs(engine)
    assert client_state["of"] == dist.get_rank()


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("p", "states", "asynchronous"),
    every(
        (1, 2, 4),
        STATES,
        (False, True),
        default=[(1, "world", True), (2, "partition", False), (2, "world", True), (4, "partition", False)],
    ),
)
def test_each_rank_gets_its_own_back(tmp_path, p, states, asynchronous):
    engine = trained(p, mics_optimizer_states=states)
    saved = differs(engine)
    engine.save_checkpoint(str(tmp_path), client_state={"of": dist.get_rank()}, async_save=asynchronous)
    train(engine, 1)
    wait_for_saves()
    dist.barrier()
    again = engine_of(p, seed=5, mics_optimizer_states=states)
    _, client_state = again.load_checkpoint(str(tmp_path))
    assert own(again) == saved
    assert client_state["of"] == dist.get_rank()
    described = manifest.read(tmp_path / "global_step3")
    assert not manifest.damages(tmp_path / "global_step3", described.files, described.files)
    small = [record.bytes for name, record in described.files.items() if "rank_state" in name or "client" in name]
    assert len(small) == 4 - p, "none for the writers of the shards"


@pytest.mark.ranks(4)
def test_only_what_differs_is_kept_apart(tmp_path):
    engine = engine_of(1)
    train(engine, 1, rank=0)
    engine.module.seen.fill_(dist.get_rank() // 2)
    for tag in ("together", "apart"):
        engine.save_checkpoint(str(tmp_path), tag=tag, async_save=tag == "apart")
        wait_for_saves()
        dist.barrier()
        files = manifest.read(tmp_path / tag).files
        assert sorted(name for name in files if "rank_state" in name or "client" in name) == [
            f"mics_client_state_rank_{rank}.pt" for rank in (2, 3)
        ]
        held = torch.load(tmp_path / tag / "mics_client_state_rank_3.pt", weights_only=True)
        assert list(held["module"]) == ["seen"]
        assert held["client_state"] == {}


@pytest.mark.ranks(4)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_equal_costs_no_file_and_no_message(tmp_path, asynchronous):
    engine = engine_of(2)
    train(engine, 2, rank=0)
    engine.module.seen.fill_(7)
    engine.save_checkpoint(str(tmp_path), tag="first", async_save=asynchronous)
    wait_for_saves()
    called = []
    with pytest.MonkeyPatch.context() as patched:
        for name in ("all_gather_object", "gather_object", "broadcast_object_list", "all_gather"):
            original = getattr(dist, name)
            patched.setattr(
                dist,
                name,
                lambda *args, name=name, original=original, **kwargs: (called.append(name), original(*args, **kwargs)),
            )
        engine.save_checkpoint(str(tmp_path), tag="second", async_save=asynchronous)
        wait_for_saves()
    dist.barrier()
    assert not called
    assert len(manifest.read(tmp_path / "second").files) == 4


# ------------------------------------------------------------------------------- other numbers of shards


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("old", "new"), [(2, 1), (2, 4), slow(1, 2), slow(4, 1), (None, 2), slow(None, 1), slow(1, 4)])
def test_in_another_number_of_shards_while_loading(tmp_path, old, new):
    engine = trained(old)
    saved = differs(engine)
    engine.save_checkpoint(str(tmp_path), client_state={"of": dist.get_rank()})
    again = engine_of(new, seed=5, **RESHAPE)
    _, client_state = again.load_checkpoint(str(tmp_path))
    assert own(again) == saved
    assert client_state["of"] == dist.get_rank()


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("old", "new"), [(2, None), slow(1, None), slow(1, 2), slow(2, 1), slow(None, 2), slow(4, 1)])
def test_in_another_number_of_shards_by_the_command(tmp_path, old, new):
    engine = trained(old)
    saved = differs(engine)
    engine.save_checkpoint(str(tmp_path / "old"), client_state={"of": dist.get_rank()})
    dist.barrier()
    if dist.get_rank() == 0:
        result = reshape(tmp_path / "old" / "global_step3", tmp_path / "new", "--shards", new or 4)
        assert result.returncode == 0, result.stderr
    dist.barrier()
    again = engine_of(new, seed=5)
    _, client_state = again.load_checkpoint(str(tmp_path / "new"))
    assert own(again) == saved
    assert client_state["of"] == dist.get_rank()


# -------------------------------------------------------------------------------------- copies in memory


@pytest.mark.ranks(4)
@each_layout
def test_copies_in_memory_have_it(tmp_path, p, states):
    with nodes(tmp_path, states):
        section = {"mics_checkpoint": {"memory_every": 3}, "mics_optimizer_states": states}
        restarted()
        engine = engine_of(p, **section)
        engine.load_checkpoint(str(tmp_path / "disk"))
        engine.module.extra = f"of rank {dist.get_rank()}"
        engine.training_dataloader.data_sampler.drawn = 100 + dist.get_rank()
        engine.lr_scheduler.last_batch_iteration = 10 + dist.get_rank()
        train(engine, 3)
        saved = differs(engine)
        sealed()
        remove(tmp_path, "node0")
        restarted()
        again = engine_of(p, seed=5, **section)
        again.load_checkpoint(str(tmp_path / "disk"))
        assert again.global_steps == 3
        assert own(again) == saved


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("p", "states"), [slow(1, "partition"), (2, "world"), slow(4, "partition")])
def test_a_checkpoint_that_is_made_of_memory_has_it(tmp_path, p, states):
    def files() -> dict[str, bytes]:
        return {} if dist.get_rank() else {hf_trainer.STATE: trainer_state(2)}

    with nodes(tmp_path, states):
        section = {"mics_checkpoint": {"memory_every": 2}, "mics_optimizer_states": states}
        restarted()
        with called_by(Caller(str(tmp_path / "out"), files, lambda _: False, step=lambda: 2)):
            engine = engine_of(p, **section)
        engine.module.extra = f"of rank {dist.get_rank()}"
        engine.training_dataloader.data_sampler.drawn = 100 + dist.get_rank()
        engine.lr_scheduler.last_batch_iteration = 10 + dist.get_rank()
        train(engine, 2)
        saved = differs(engine)
        engine.mics_memory.copy(engine)
        sealed()
        assert resolved(tmp_path, True, hf_trainer._request(ds_config(p, zero=section))) == "checkpoint-2"
        again = engine_of(p, seed=5, mics_optimizer_states=states)
        again.load_checkpoint(str(Path(tmp_path, "out", "checkpoint-2")))
        assert own(again) == saved


# ------------------------------------------------------------------------------------------ tied names


@pytest.mark.ranks(4)
def test_names_of_tied_parameters_are_in_the_first_file_whoever_writes_it(tmp_path):
    """DeepSpeed tells them on rank 0 only, and ``zero_to_fp32`` wants them in the first file of every folder."""
    own_folder = tmp_path / f"node{dist.get_rank() // 2}"
    with environment(MICS_DS_RANKS_PER_NODE="2"):
        engine = build(ds_config(2, checkpoint={"use_node_local_storage": True}), OddNet)
        engine.save_checkpoint(str(own_folder), tag="t")
    stock = build(ds_config(None), OddNet)
    stock.save_checkpoint(str(tmp_path / "stock"), tag="t")
    first, second = (
        torch.load(folder / "t" / f"zero_pp_rank_{shard}_mp_rank_00_model_states.pt", weights_only=False)
        for folder, shard in ((own_folder, 0), (own_folder, 1))
    )
    expected = torch.load(tmp_path / "stock" / "t" / "zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=False)
    assert first["shared_params"] == expected["shared_params"] == {"tied.weight": "middle.0.weight"}
    assert second["shared_params"] == {}
