"""Train a small Llama with Accelerate. The JSON alone decides whether MiCS runs.

accelerate launch --config_file accelerate.yaml train.py
"""

import sysconfig
from pathlib import Path

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
CONTEXT, STEPS = 64, 6


def rows() -> list[dict[str, torch.Tensor]]:
    """Return rows of bytes of the standard library."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:3]
    text = torch.tensor(list(b"".join(path.read_bytes() for path in paths)))
    return [{"input_ids": row, "labels": row} for row in text[: 128 * CONTEXT].view(-1, CONTEXT)]


def main() -> None:
    # The file of `accelerate launch` may name the JSON instead; see accelerate.yaml.
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=str(HERE / "ds_config.json")))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = torch.utils.data.DataLoader(rows(), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    step = 0
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            mean = accelerator.reduce(loss.detach(), "mean")
            accelerator.print(f"step {step} loss {mean.item():.6f}", flush=True)
        if step == STEPS:
            break
    accelerator.end_training()


if __name__ == "__main__":
    main()
