"""Train a small causal transformer with plain DeepSpeed. The JSON alone decides whether MiCS runs.

deepspeed --num_gpus 4 train.py --deepspeed_config ds_config.json
"""

import argparse
import sysconfig
from pathlib import Path

import deepspeed
import torch
from torch import nn

HERE = Path(__file__).parent
CONTEXT, WIDTH, STEPS = 64, 64, 6


class GPT(nn.Module):
    """A causal language model over bytes. Returns the mean loss."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(3)
        )
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, text: torch.Tensor) -> torch.Tensor:  # (batch, CONTEXT + 1) bytes -> ()
        x = self.bytes(text[:, :-1]) + self.places.weight
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT, device=text.device, dtype=x.dtype)
        for block in self.blocks:
            x = block(x, mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), text[:, 1:].flatten())


def batches(rank: int, size: int, rows: int):
    """Yield batches of bytes of the standard library, different ones on each rank."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:30]
    text = torch.tensor(list(b"".join(path.read_bytes() for path in paths)))
    rows_of_text = text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    mine = rows_of_text[rank::size]
    for start in range(0, len(mine) - rows, rows):
        yield mine[start : start + rows]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"))
    config = parser.parse_args().deepspeed_config

    deepspeed.init_distributed()
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = GPT()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    data = batches(rank, size, engine.train_micro_batch_size_per_gpu())
    for step in range(STEPS):
        for _ in range(engine.gradient_accumulation_steps()):
            loss = engine(next(data).to(engine.device))
            engine.backward(loss)
            engine.step()
        mean = loss.detach() / size
        torch.distributed.all_reduce(mean)
        if rank == 0:
            print(f"step {step + 1} loss {mean.item():.6f}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
