"""Train a small network with Lightning. The JSON alone decides whether MiCS runs.

torchrun --nproc_per_node 4 train.py
"""

import json
import os
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn

HERE = Path(__file__).parent
WIDTH = 64


class Denoiser(pl.LightningModule):
    """Restores vectors to which noise was added."""

    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Module | None = None

    def configure_model(self) -> None:  # called where the strategy partitions what is made
        if self.net is None:
            torch.manual_seed(0)
            layers = [layer for _ in range(3) for layer in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
            self.net = nn.Sequential(*layers, nn.Linear(WIDTH, WIDTH))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        clean, noise = batch
        loss = (self.net(clean + noise) - clean).pow(2).mean()
        mean = self.all_gather(loss.detach()).mean()
        if self.global_rank == 0:
            print(f"step {index + 1} loss {mean.item():.6f}", flush=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main() -> None:
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(64, WIDTH, generator=generator)
    data = torch.utils.data.TensorDataset(clean, 0.1 * torch.randn(64, WIDTH, generator=generator))
    config = json.loads((HERE / "ds_config.json").read_text())
    trainer = pl.Trainer(
        strategy=DeepSpeedStrategy(config=config),
        accelerator="auto",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Denoiser(), torch.utils.data.DataLoader(data, batch_size=2))


if __name__ == "__main__":
    main()
