"""Train a small model on replicas that come and go. Each replica is a job of its own; the JSON asks for that.

mics-ds replicas -n 3 --min 2 -- torchrun --nproc_per_node 2 train_replica.py
"""

import argparse
import sysconfig
from pathlib import Path

import deepspeed
import torch
from torch import nn
from torch.utils.data import Dataset

from mics_ds.replicas import ReplicaBatches

HERE = Path(__file__).parent
CONTEXT, WIDTH = 32, 64


class Text(Dataset):
    """Rows of the source of the standard library."""

    def __init__(self) -> None:
        paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:30]
        text = torch.tensor(list(b"".join(path.read_bytes() for path in paths)))
        self.rows = text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]


class NextByte(nn.Module):
    """Predicts each byte from the ones before it. Returns the mean loss."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, WIDTH)
        self.memory = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, text: torch.Tensor) -> torch.Tensor:  # (batch, CONTEXT + 1) bytes -> ()
        hidden, _ = self.memory(self.bytes(text[:, :-1]))
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), text[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--checkpoints", default="checkpoints")
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"))
    arguments = parser.parse_args()
    deepspeed.init_distributed()
    torch.manual_seed(0)  # all replicas begin with the same weights
    model = NextByte()
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=arguments.deepspeed_config
    )
    engine.load_checkpoint(arguments.checkpoints)  # of a job that has ended as a whole; there may be none
    for text in ReplicaBatches(Text(), engine):
        loss = engine(text.to(engine.device))
        engine.backward(loss)
        boundary = engine.is_gradient_accumulation_boundary()
        engine.step()
        if boundary and torch.distributed.get_rank() == 0:
            replicas = engine.mics_replicas
            print(f"step {engine.global_steps} loss {loss.item():.4f} replicas {replicas.size}", flush=True)
        if boundary and engine.global_steps % 20 == 0:
            engine.save_checkpoint(arguments.checkpoints)  # one of the replicas writes
        if engine.global_steps >= arguments.steps:
            break
    engine.destroy()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
