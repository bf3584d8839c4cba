"""Saves in the background under the HF Trainer and Lightning: their own rotation, best model and resuming.

The process that writes is stopped for a moment in each save, so that whatever a framework does next it does while the
checkpoint is not there yet.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import slow
from forks import ForkingPopen
from framework_models import ds_config, gloo_for_accelerate, lightning_module, llama_config, on_cpu, texts
from rank_pool import RankError
from safetensors.torch import load_file

from mics_ds.checkpoint import manifest
from mics_ds.checkpoint.background import Background, wait_for_saves

P, RANKS, STEPS = 1, 2, 6
STOPPED_S = 0.4
ASYNC = {"async": True}
NOTES = {"mics_latest.json"}


def saving(section: dict[str, Any] | None, p: int = P, **extra: Any) -> dict[str, Any]:
    config = ds_config(p, **extra)
    del config["zero_optimization"]["mics_guard"]
    if section is not None:
        config["zero_optimization"]["mics_checkpoint"] = section
    return config


def slow_writers(deletions: list[tuple[str, list[str]]], fails_in: int | None = None) -> list[str]:
    """Stop each process that writes while it has begun, and note which checkpoints are complete beside one that is
    deleted, at the moment it is. The save of step ``fails_in`` comes to nothing.

    Returns:
        The folders of all saves, one after the other.
    """
    submit, hooked, saves = Background.submit, list[bool](), list[str]()

    def submitting(self: Background, job: Any, *more: Any) -> None:
        saves.append(Path(job.target).parent.name)
        os.kill(self._process.pid, signal.SIGSTOP)
        threading.Timer(STOPPED_S, os.kill, (self._process.pid, signal.SIGCONT)).start()
        if not hooked:
            sys.addaudithook(noting)
            hooked.append(True)
        if fails_in is not None and job.target.endswith(f"/global_step{fails_in}") and dist.get_rank() == 0:
            shutil.rmtree(job.staging)
        submit(self, job, *more)

    def noting(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "shutil.rmtree" and complete(Path(arguments[0])):
            others = [path for path in Path(arguments[0]).parent.iterdir() if str(path) != str(arguments[0])]
            deletions.append((Path(arguments[0]).name, sorted(path.name for path in others if complete(path))))

    Background.submit = submitting  # type: ignore[method-assign]
    return saves


def die() -> None:
    """A process that writes and was stopped would stay."""
    os.kill(Background.current._process.pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def complete(checkpoint: Path) -> bool:
    """Whether there is all to go on from."""
    for described in checkpoint.glob(f"*/{manifest.NAME}"):
        found = manifest.read(described.parent)
        return not manifest.damages(described.parent, found.files, found.files, contents=False)
    return False


def counting_gathers() -> list[Any]:
    """Notes each time that all 16-bit weights come to one rank."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    noted, gather = list[Any](), DeepSpeedEngine._zero3_consolidated_16bit_state_dict

    def gathering(self: Any, *arguments: Any, **options: Any) -> Any:
        noted.append(self)
        return gather(self, *arguments, **options)

    DeepSpeedEngine._zero3_consolidated_16bit_state_dict = gathering
    return noted


def weights(engine: Any) -> str:
    """A digest of all parameters."""
    import deepspeed

    found = hashlib.sha256()
    for _, param in sorted(engine.module.named_parameters()):
        with deepspeed.zero.GatheredParameters([param]):
            found.update(param.detach().numpy().tobytes())
    return found.hexdigest()


# -------------------------------------------------------------------------------------- HF Trainer


def hf(folder, section, limit=None, best=None, steps=STEPS, resume=None, dies_in=None, dies_after=None, p=P, **more):
    """Train, evaluating and saving every two steps.

    Args:
        fails_in: the step whose save fails, in :func:`slow_writers`, a keyword.
        best: which evaluation is the best one, the "first" or the "last"; ``None`` to keep none.
        dies_in: the step whose save all ranks die in, while it is being written.
        dies_after: the step that all ranks die after, with the last copy in memory complete.
        gathers: whether 16-bit weights are gathered to be saved, a keyword.
    """
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    gloo_for_accelerate()
    if section is not None and "export" in section:
        # Forks of a rank find a Trainer's configuration in transformers. An interpreter that exports has none.
        subprocess.Popen = ForkingPopen.__base__
    fails_in = more.pop("fails_in", None)
    deletions: list[tuple[str, list[str]]] = []
    saves = slow_writers(deletions, fails_in)
    config = saving(section, p)
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = more.pop("gathers", True)
    given = TrainingArguments(
        output_dir=f"{folder}/out",
        deepspeed=config,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=2,
        max_steps=steps,
        learning_rate=3e-3,
        lr_scheduler_type=more.pop("lr_scheduler_type", "constant"),
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=more.pop("save_steps", 2),
        save_total_limit=limit,
        load_best_model_at_end=best is not None,
        metric_for_best_model="eval_loss",
        greater_is_better=best == "first",  # losses fall
        report_to=[],
        disable_tqdm=True,
        seed=7,
        **more,
    )
    torch.manual_seed(11)
    model = LlamaForCausalLM(llama_config(attention_dropout=0.1))

    class Dying(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == dies_in:
                die()

        def on_step_end(self, args, state, control, **kwargs):
            if Background.current is not None:  # a copy is left out while the one before is still being summed up
                Background.current.wait_for_seals()
                dist.barrier()
            if state.global_step == dies_after:
                die()

    trainer = Trainer(model=model, args=given, train_dataset=texts(), eval_dataset=texts()[:16], callbacks=[Dying()])
    gathered = counting_gathers()
    trainer.train(resume_from_checkpoint=resume)
    wait_for_saves()
    dist.barrier()
    return {
        "losses": [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
        "weights": weights(trainer.model_wrapped),
        "best": trainer.state.best_global_step,
        "noticed": "mics_ds.frameworks.hf_trainer" in sys.modules,
        "kept": sorted(path.name for path in Path(folder, "out").glob("checkpoint-*")),
        "complete": sorted(path.name for path in Path(folder, "out").glob("checkpoint-*") if complete(path)),
        "deletions": deletions,
        "gathered": len(gathered),
        "saves": saves,
    }


def run(pools, body, folder: Path, **arguments: Any) -> dict[str, Any]:
    """Results of rank 0, from ranks of their own."""
    folder.mkdir(exist_ok=True)
    return pools.run(RANKS, __name__, body, {"folder": str(folder), **arguments}, 180, fresh=True)[0]


@pytest.mark.parametrize(
    ("limit", "best"),
    [
        slow(1, "first"),
        slow(1, None),
        slow(2, "first"),
        slow(2, "last"),
        slow(2, None),
    ],
)
def test_hf_rotation_and_best_model(pools, tmp_path, limit, best):
    waited = run(pools, "hf", tmp_path / "sync", section=None, limit=limit, best=best)
    found = run(pools, "hf", tmp_path / "async", section=ASYNC, limit=limit, best=best)
    assert (waited["noticed"], found["noticed"]) == (False, True), "without the section there is nothing"
    for name in ("losses", "weights", "best", "kept"):
        assert found[name] == waited[name], name
    assert found["complete"] == found["kept"]
    assert found["deletions"], "something was rotated"
    for deleted, others in found["deletions"]:
        assert others, f"{deleted} was all there was"
    again = run(pools, "hf", tmp_path / "async", section=ASYNC, limit=limit, best=best, steps=8, resume=True)
    longer = run(pools, "hf", tmp_path / "longer", section=None, limit=limit, best=best, steps=8)
    assert again["losses"] == longer["losses"]
    assert again["weights"] == longer["weights"]


@pytest.mark.slow
def test_hf_goes_on_when_a_save_fails_that_is_only_logged(pools, tmp_path):
    """And keeps the checkpoint before, which it would have deleted, until there is another."""
    section = {"async": True, "on_error": "log"}
    found = run(pools, "hf", tmp_path, section=section, limit=1, fails_in=4)
    assert [step for step, _ in found["losses"]] == list(range(1, STEPS + 1))
    assert found["deletions"] == [("checkpoint-2", ["checkpoint-6"])]
    assert found["complete"] == ["checkpoint-6"]


@pytest.mark.slow
def test_hf_exports_weights_beside_training(pools, tmp_path):
    """In place of those that the Trainer gathers on rank 0 before each save."""
    waited = run(pools, "hf", tmp_path / "sync", section=None)
    found = run(pools, "hf", tmp_path / "async", section={**ASYNC, "export": "fp32"})
    assert (waited["gathered"], found["gathered"]) == (3, 0)
    assert found["complete"] == waited["kept"]
    for name in waited["kept"]:
        mine, theirs = tmp_path / "async" / "out" / name, tmp_path / "sync" / "out" / name
        assert {path.name for path in mine.iterdir()} == {path.name for path in theirs.iterdir()} | NOTES
        exported, gathered = load_file(mine / "model.safetensors"), load_file(theirs / "model.safetensors")
        assert exported.keys() == gathered.keys()
        assert all(torch.equal(exported[key], gathered[key]) for key in gathered)


@pytest.mark.slow
def test_hf_saves_a_checkpoint_once_where_no_weights_are_gathered(pools, tmp_path):
    """The Trainer asks for the engine's checkpoint in place of the weights, and once more for its states."""
    found = run(pools, "hf", tmp_path, section=ASYNC, gathers=False)
    assert found["saves"] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert found["complete"] == found["saves"]


def test_hf_job_killed_while_it_saves(pools, tmp_path):
    """The Trainer would take the folder that has everything but the engine's checkpoint."""
    whole = run(pools, "hf", tmp_path / "whole", section=None)
    with pytest.raises(RankError):
        run(pools, "hf", tmp_path / "killed", section=ASYNC, dies_in=4)
    assert (tmp_path / "killed" / "out" / "checkpoint-4" / "trainer_state.json").exists()
    assert not complete(tmp_path / "killed" / "out" / "checkpoint-4")
    again = run(pools, "hf", tmp_path / "killed", section=ASYNC, resume=True)
    assert again["losses"] == whole["losses"]
    assert again["weights"] == whole["weights"]
    assert again["complete"] == whole["complete"]
    assert (tmp_path / "killed" / "out" / "interrupted-checkpoint-4").exists()


@pytest.mark.slow
def test_hf_job_killed_in_its_first_save(pools, tmp_path):
    with pytest.raises(RankError):
        run(pools, "hf", tmp_path, section=ASYNC, dies_in=2)
    with pytest.raises(RankError, match=r"checkpoint-2 was still being saved when its job ended, and no older"):
        run(pools, "hf", tmp_path, section=ASYNC, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("every", "death"),
    [(3, 7), slow(4, 9)],
    ids=["in the middle of an epoch", "at its end"],
)
def test_hf_goes_on_from_memory(pools, tmp_path, every, death):
    """The same command again, after all ranks were killed; eight steps are an epoch."""
    section = {"memory_every": every, "memory_folder": str(tmp_path)}
    how = {"steps": 11, "save_steps": 5, "lr_scheduler_type": "linear"}
    whole = run(pools, "hf", tmp_path / "whole", section=None, **how)
    with pytest.raises(RankError):
        run(pools, "hf", tmp_path / "killed", section=section, dies_after=death, **how)
    again = run(pools, "hf", tmp_path / "killed", section=section, resume=True, **how)
    assert again["losses"] == whole["losses"]
    assert again["weights"] == whole["weights"]
    made = f"checkpoint-{death - death % every}"
    assert sorted([*whole["complete"], made]) == again["complete"]


@pytest.mark.slow
def test_hf_goes_back_to_an_older_checkpoint(pools, tmp_path):
    """Whoever names one that is not the newest means it, although memory has a newer state."""
    section = {"memory_every": 3, "memory_folder": str(tmp_path)}
    how = {"steps": 8, "lr_scheduler_type": "linear"}
    whole = run(pools, "hf", tmp_path / "whole", section=None, **how)
    with pytest.raises(RankError):
        run(pools, "hf", tmp_path / "killed", section=section, dies_after=7, **how)
    older = str(tmp_path / "killed" / "out" / "checkpoint-2")
    again = run(pools, "hf", tmp_path / "killed", section=section, resume=older, **how)
    assert again["losses"] == whole["losses"]
    assert again["weights"] == whole["weights"]


@pytest.mark.slow
def test_hf_goes_on_from_memory_with_fewer_replicas(pools, tmp_path):
    section = {"memory_every": 3, "memory_folder": str(tmp_path)}
    how = {"folder": str(tmp_path), "section": section, "p": 2, "save_steps": 5, "steps": 8}
    with pytest.raises(RankError):
        pools.run(4, __name__, "hf", {**how, "dies_after": 4}, 180, fresh=True)
    found = pools.run(2, __name__, "hf", {**how, "resume": True}, 180, fresh=True)[0]
    assert [step for step, _ in found["losses"]] == list(range(1, 9))
    assert found["complete"] == ["checkpoint-3", "checkpoint-5", "checkpoint-8"]


# --------------------------------------------------------------------------------------- Lightning


def lightning(folder, section, epochs, top_k=1, resume=None, every=1, dropout=0.2, dies_after=None):
    """Train, with validation at the end of each epoch of four steps.

    Args:
        every: epochs between two checkpoints.
        dies_after: the step that all ranks die after, with the last copy in memory complete.
    """
    import lightning.pytorch as pl
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import deepspeed as strategies

    deletions: list[tuple[str, list[str]]] = []
    slow_writers(deletions)
    generator = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(
        torch.randn(32, 7, generator=generator), torch.randn(32, 7, generator=generator)
    )
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    config = saving(section, train_micro_batch_size_per_gpu=2, gradient_clipping=0.0)
    del config["gradient_accumulation_steps"]
    keep = ModelCheckpoint(
        dirpath=f"{folder}/out", monitor="validation", save_top_k=top_k, save_last=True, every_n_epochs=every
    )

    class Dying(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if Background.current is not None:
                Background.current.wait_for_seals()
                dist.barrier()
            if trainer.global_step == dies_after:
                die()

    trainer = pl.Trainer(
        strategy=on_cpu(strategies)(config=config, process_group_backend="gloo"),
        plugins=[TorchElasticEnvironment()],
        accelerator="cpu",
        devices=RANKS,
        max_epochs=epochs,
        accumulate_grad_batches=2,
        logger=False,
        callbacks=[Dying(), keep],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = lightning_module(dropout)
    trainer.fit(module, loader, loader, ckpt_path=resume)
    wait_for_saves()
    dist.barrier()
    return {
        "losses": module.losses,
        "weights": weights(trainer.strategy.deepspeed_engine),
        "best": Path(keep.best_model_path).name,
        "kept": sorted(path.name for path in Path(folder, "out").glob("*.ckpt")),
        "complete": sorted(path.name for path in Path(folder, "out").glob("*.ckpt") if complete(path)),
        "deletions": deletions,
    }


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [1, slow(2)])
def test_lightning_keeps_the_best_and_the_last(pools, tmp_path, top_k):
    waited = run(pools, "lightning", tmp_path / "sync", section=None, epochs=3, top_k=top_k)
    found = run(pools, "lightning", tmp_path / "async", section=ASYNC, epochs=3, top_k=top_k)
    for name in ("losses", "weights", "best", "kept"):
        assert found[name] == waited[name], name
    assert found["complete"] == found["kept"]
    assert "last.ckpt" in found["kept"]
    assert found["deletions"]
    for deleted, others in found["deletions"]:
        assert others, f"{deleted} was all there was"
    longer = run(pools, "lightning", tmp_path / "sync", section=None, epochs=5, top_k=top_k, resume="last")
    again = run(pools, "lightning", tmp_path / "async", section=ASYNC, epochs=5, top_k=top_k, resume="last")
    for name in ("losses", "weights", "best", "kept"):
        assert again[name] == longer[name], name


def test_lightning_goes_on_from_memory(pools, tmp_path):
    """The same command again, after all ranks were killed. Without dropout: Lightning restores no random numbers."""
    section = {"memory_every": 4, "memory_folder": str(tmp_path)}
    how = {"epochs": 5, "every": 2, "dropout": 0.0}
    whole = run(pools, "lightning", tmp_path / "whole", section=None, **how)
    with pytest.raises(RankError):
        run(pools, "lightning", tmp_path / "killed", section=section, dies_after=14, **how)
    again = run(pools, "lightning", tmp_path / "killed", section=section, resume="last", **how)
    assert again["losses"] == whole["losses"][2 * 12 :], "two batches a step, and 12 steps are in memory"
    for name in ("weights", "best", "kept"):
        assert again[name] == whole[name], name
