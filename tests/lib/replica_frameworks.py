"""Training of replicas that come and go by frameworks: programs for ``bench.replica_jobs``, which run on its ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from bench.replica_jobs import Net, Samples, Training
from framework_models import gloo_for_accelerate, on_cpu

WARMUP = 10_000
RATE = 1e-5
"""By which the learning rate grows in each step."""
EXAMPLES = Path(__file__).resolve().parents[2] / "examples/replicas"


class NamedSamples(Samples):
    """Samples as keyword arguments of the model."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return dict(zip("xy", super().__getitem__(index)))


class NetWithLoss(Net):
    """Returns its loss as models of transformers do."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"loss": super().forward(x, y)}


def hf_trainer(training: Training) -> None:
    """Train with the class of the example."""
    sys.path.insert(0, str(EXAMPLES))
    from replica_trainer import ReplicaTrainer
    from transformers import TrainingArguments

    class Trainer(ReplicaTrainer):
        def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=WARMUP * RATE, eps=1e-2)
            return self.optimizer

    gloo_for_accelerate()
    given = TrainingArguments(
        output_dir=f"{training.folder}/out",
        deepspeed=without_schedule(training),
        per_device_train_batch_size=training.micro_batch,
        gradient_accumulation_steps=training.micro_steps,
        max_steps=training.steps,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=WARMUP,
        max_grad_norm=0.5,
        logging_steps=1,
        save_steps=training.save_every or 10**9,
        ignore_data_skip=True,
        report_to=[],
        seed=1,
    )
    torch.manual_seed(7)
    trainer = Trainer(model=NetWithLoss(), args=given, train_dataset=NamedSamples())
    saved = sorted(Path(training.folder, "out").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    trainer.train(resume_from_checkpoint=str(saved[-1]) if saved and training.save_every else None)
    assert trainer.state.global_step == trainer.model_wrapped.global_steps == training.steps


def rate_by_replicas(training: Training) -> None:
    """Train with DeepSpeed alone, at a learning rate that follows the number of replicas."""
    import deepspeed

    from mics_ds.replicas import ReplicaBatches

    model = Net()
    config = {key: value for key, value in training.config.items() if key != "scheduler"}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    for x, y in ReplicaBatches(Samples(), engine, seed=1):
        for group in engine.optimizer.param_groups:
            group["lr"] = 100 * RATE * engine.mics_replicas.size
        engine.backward(engine(x, y))
        engine.step()
        if engine.global_steps >= training.steps:
            return


def accelerate(training: Training) -> None:
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

    from mics_ds.replicas import ReplicaBatches

    plugin = DeepSpeedPlugin(hf_ds_config=without_schedule(training))
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    torch.manual_seed(7)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARMUP * RATE, eps=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / WARMUP)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    model.mics_replicas.register("scheduler", scheduler)
    for x, y in ReplicaBatches(Samples(), model, seed=1):
        with accelerator.accumulate(model):
            accelerator.backward(model(x, y))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if model.global_steps >= training.steps:
            return


def lightning(training: Training) -> None:
    import lightning.pytorch as pl
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import deepspeed as strategies

    from mics_ds.replicas import ReplicaBatches

    class Batches(ReplicaBatches):
        def __len__(self) -> int:
            return 10**9  # Lightning fetches ahead where it knows no length

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net: Any = None

        def configure_model(self) -> None:
            if self.net is None:
                torch.manual_seed(7)
                self.net = Net()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.net(*batch)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=WARMUP * RATE, eps=1e-2)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / WARMUP)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.step(self.trainer.model.global_steps)  # not one more for a discarded step

        def on_train_batch_end(self, *_: Any) -> None:
            self.trainer.should_stop = self.trainer.model.global_steps >= training.steps

    config = without_schedule(training)
    os.environ["GROUP_WORLD_SIZE"] = "1"
    trainer = pl.Trainer(
        strategy=on_cpu(strategies)(config=config, process_group_backend="gloo"),
        plugins=[TorchElasticEnvironment()],
        accelerator="cpu",
        devices=training.ranks,
        max_epochs=-1,
        accumulate_grad_batches=config.pop("gradient_accumulation_steps"),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), Batches(Samples(), lambda: trainer.model, seed=1))


def without_schedule(training: Training) -> dict[str, Any]:
    """Return the configuration, with optimizer and schedule left to the framework."""
    config = {key: value for key, value in training.config.items() if key not in ("optimizer", "scheduler")}
    return {**config, "zero_allow_untested_optimizer": True}
