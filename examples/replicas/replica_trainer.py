"""Hugging Face's Trainer on replicas that come and go: a trainer that draws, counts and saves as they do.

mics-ds replicas -n 2 -- torchrun --nproc_per_node 1 replica_trainer.py
"""

import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback, TrainingArguments, set_seed

from mics_ds.replicas import ReplicaBatches

HERE = Path(__file__).parent
CONTEXT = 64


class ReplicaTrainer(Trainer):
    """A Trainer whose job is one replica. Needs ``max_steps``, and ``ignore_data_skip=True`` to resume."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_FollowReplicas(self))

    def get_train_dataloader(self) -> ReplicaBatches:
        """Deal the samples to all ranks of all replicas, and not to those of this job alone."""
        return ReplicaBatches(
            self.train_dataset,
            lambda: self.model_wrapped,  # the engine, which is built later
            seed=self.args.seed,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )


class _FollowReplicas(TrainerCallback):
    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if self.trainer.lr_scheduler is not None:  # DeepSpeed does not know it, so it is not sent otherwise
            self.trainer.model_wrapped.mics_replicas.register("scheduler", self.trainer.lr_scheduler)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.global_step = self.trainer.model_wrapped.global_steps - 1  # Trainer adds one, for a discarded step too

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.trainer.model_wrapped.mics_replicas.publishes:
            control.should_save = False


class Text(Dataset):
    """Rows of bytes of the standard library."""

    def __init__(self) -> None:
        paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:30]
        text = torch.tensor(list(b"".join(path.read_bytes() for path in paths)))
        self.rows = text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def main() -> None:
    arguments = TrainingArguments(
        output_dir="out",  # the same for all replicas: one of them writes
        deepspeed=str(HERE / "trainer_config.json"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=50,
        learning_rate=3e-3,
        logging_steps=1,
        save_steps=20,
        report_to=[],
    )
    shape = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
    )
    set_seed(0)
    ReplicaTrainer(model=AutoModelForCausalLM.from_config(shape), args=arguments, train_dataset=Text()).train()


if __name__ == "__main__":
    main()
