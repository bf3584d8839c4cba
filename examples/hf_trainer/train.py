"""Train a small Llama with the Hugging Face Trainer. The JSON alone decides whether MiCS runs.

torchrun --nproc_per_node 4 train.py
"""

import sysconfig
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments, set_seed

HERE = Path(__file__).parent
CONTEXT = 64


class Text(torch.utils.data.Dataset):
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
    # Arguments come first: from_config and from_pretrained then partition the model while they make it.
    arguments = TrainingArguments(
        output_dir="out",
        deepspeed=str(HERE / "ds_config.json"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=6,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
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
    set_seed(0)  # the same weights in every run
    model = AutoModelForCausalLM.from_config(shape)  # or from_pretrained("your/model")
    trainer = Trainer(model=model, args=arguments, train_dataset=Text())
    trainer.train()
    if trainer.is_world_process_zero():
        for entry in trainer.state.log_history:
            if "loss" in entry:
                print(f"step {entry['step']} loss {entry['loss']:.6f}", flush=True)


if __name__ == "__main__":
    main()
