"""Saves in the background under the HF Trainer and Lightning: their own rotation, best model and resuming.

The process that writes is stopped for a moment in each save, so that whatever a framework does next it does while the
checkpoint is not there yet.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_frameworks import ds_config, gloo_for_accelerate, llama_config, on_cpu, texts
from torch import nn

from mics_ds.checkpoint import manifest

P, RANKS, STEPS = 1, 2, 6
STOPPED_S = 0.4
ASYNC = {"async": True}


def saving(section: dict[str, Any] | None, **extra: Any) -> dict[str, Any]:
    config = ds_config(P, **extra)
    del config["zero_optimization"]["mics_guard"]
    if section is not None:
        config["zero_optimization"]["mics_checkpoint"] = section
    return config


def slow_writers(deletions: list[tuple[str, list[str]]]) -> None:
    """Stop each process that writes while it has begun, and note which checkpoints are complete beside one that is
    deleted, at the moment it is."""
    from mics_ds.checkpoint.background import Background

    submit, hooked = Background.submit, list[bool]()

    def submitting(self: Background, job: Any) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)
        threading.Timer(STOPPED_S, os.kill, (self._process.pid, signal.SIGCONT)).start()
        if not hooked:  # after the one of mics_ds, which waits
            sys.addaudithook(noting)
            hooked.append(True)
        submit(self, job)

    def noting(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "shutil.rmtree" and complete(Path(arguments[0])):
            others = [path for path in Path(arguments[0]).parent.iterdir() if str(path) != str(arguments[0])]
            deletions.append((Path(arguments[0]).name, sorted(path.name for path in others if complete(path))))

    Background.submit = submitting  # type: ignore[method-assign]


def complete(checkpoint: Path) -> bool:
    """Whether there is all to go on from."""
    for described in checkpoint.glob(f"*/{manifest.NAME}"):
        found = manifest.read(described.parent)
        return not manifest.damages(described.parent, found.files, found.files, contents=False)
    return False


def weights(engine: Any) -> str:
    """A digest of all parameters."""
    import deepspeed

    found = hashlib.sha256()
    for _, param in sorted(engine.module.named_parameters()):
        with deepspeed.zero.GatheredParameters([param]):
            found.update(param.detach().numpy().tobytes())
    return found.hexdigest()


# -------------------------------------------------------------------------------------- HF Trainer


def hf(folder, section, limit, best="last", steps=STEPS, resume=None, dies_in=None, **more):
    """Train, evaluating and saving every two steps.

    Args:
        best: which evaluation is the best one, the "first" or the "last"; ``None`` to keep none.
        dies_in: the step whose save all ranks die in, while it is being written.
    """
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    gloo_for_accelerate()
    deletions: list[tuple[str, list[str]]] = []
    slow_writers(deletions)
    given = TrainingArguments(
        output_dir=f"{folder}/out",
        deepspeed=saving(section),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=2,
        max_steps=steps,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
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
                os.kill(os.getpid(), signal.SIGKILL)

    trainer = Trainer(model=model, args=given, train_dataset=texts(), eval_dataset=texts()[:16], callbacks=[Dying()])
    trainer.train(resume_from_checkpoint=resume)
    from mics_ds.checkpoint.in_background import wait_for_saves

    wait_for_saves()
    dist.barrier()
    return {
        "losses": [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
        "weights": weights(trainer.model_wrapped),
        "best": trainer.state.best_global_step,
        "kept": sorted(path.name for path in Path(folder, "out").glob("checkpoint-*")),
        "complete": sorted(path.name for path in Path(folder, "out").glob("checkpoint-*") if complete(path)),
        "deletions": deletions,
    }


def run(pools, body, folder: Path, **arguments: Any) -> dict[str, Any]:
    """Results of rank 0, from ranks of their own."""
    folder.mkdir(exist_ok=True)
    return pools.run(RANKS, __name__, body, {"folder": str(folder), **arguments}, 180, fresh=True)[0]


@pytest.mark.parametrize(
    ("limit", "best"),
    [
        (1, "first"),
        pytest.param(1, None, marks=pytest.mark.slow),
        pytest.param(2, "first", marks=pytest.mark.slow),
        pytest.param(2, "last", marks=pytest.mark.slow),
        pytest.param(2, None, marks=pytest.mark.slow),
    ],
)
def test_hf_rotation_and_best_model(pools, tmp_path, limit, best):
    waited = run(pools, "hf", tmp_path / "sync", section=None, limit=limit, best=best)
    found = run(pools, "hf", tmp_path / "async", section=ASYNC, limit=limit, best=best)
    print(found)
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


# --------------------------------------------------------------------------------------- Lightning


class Module:
    """Made on a rank, where Lightning is imported."""

    def __new__(cls) -> Any:
        import lightning.pytorch as pl

        class Small(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = None
                self.losses = []

            def configure_model(self):
                if self.net is None:
                    torch.manual_seed(3)
                    self.net = nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Dropout(0.2), nn.Linear(33, 7))

            def training_step(self, item, _index):
                x, y = item
                loss = (self.net(x) - y).pow(2).mean()
                total = loss.detach().clone()
                dist.all_reduce(total)
                self.losses.append(total.item() / RANKS)
                return loss

            def validation_step(self, item, _index):
                x, y = item
                self.log("validation", (self.net(x) - y).pow(2).mean(), sync_dist=True)

            def configure_optimizers(self):
                return torch.optim.AdamW(self.net.parameters(), lr=0.01)

        return Small()


def lightning(folder, section, epochs, top_k=1, resume=None):
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
    keep = ModelCheckpoint(dirpath=f"{folder}/out", monitor="validation", save_top_k=top_k, save_last=True)
    trainer = pl.Trainer(
        strategy=on_cpu(strategies)(config=config, process_group_backend="gloo"),
        plugins=[TorchElasticEnvironment()],
        accelerator="cpu",
        devices=RANKS,
        max_epochs=epochs,
        accumulate_grad_batches=2,
        logger=False,
        callbacks=[keep],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    trainer.fit(module, loader, loader, ckpt_path=resume)
    from mics_ds.checkpoint.in_background import wait_for_saves

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


@pytest.mark.parametrize("top_k", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_lightning_keeps_the_best_and_the_last(pools, tmp_path, top_k):
    waited = run(pools, "lightning", tmp_path / "sync", section=None, epochs=3, top_k=top_k)
    found = run(pools, "lightning", tmp_path / "async", section=ASYNC, epochs=3, top_k=top_k)
    print(found)
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
