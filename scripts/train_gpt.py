"""Train a small byte-level GPT on the source code of Python's standard library, under any DeepSpeed JSON.

    deepspeed --num_gpus 4 scripts/train_gpt.py --deepspeed_config scripts/configs/mics_node_fp32.json

Nothing here knows about MiCS: whether it runs is decided by the JSON. The text is on every machine that
has Python, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

TEXT_BYTES = 4_000_000


class Block(nn.Module):
    """Pre-norm transformer block: causal attention, then an MLP four times as wide. No dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, time, width) -> the same
        batch, time_, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time_, 3, self.heads, width // self.heads).unbind(2)
        attended = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        x = x + self.out(attended.transpose(1, 2).reshape(batch, time_, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Byte-level language model with tied input and output embeddings. Returns the mean loss in nats per byte."""

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        self.apply(self._initialise)
        self.head.weight = self.bytes.weight

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # (batch, context + 1) of byte values -> ()
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.bytes(inputs) + self.places(torch.arange(inputs.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def load_text() -> torch.Tensor:
    """Return the standard library's source files in alphabetical order, cut to a few megabytes, as bytes."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
    return torch.frombuffer(text[:TEXT_BYTES], dtype=torch.uint8)


def batches(text: torch.Tensor, batch: int, context: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield random windows without end, different on every rank and the same in every run."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - context - 1, (batch,), generator=generator)
        yield torch.stack([text[start : start + context + 1] for start in starts]).long()


def loopback_bytes() -> int | None:
    """Return the bytes sent over the loopback interface so far: on one machine, the traffic between all ranks."""
    try:
        counters = Path("/proc/net/dev").read_text()
    except OSError:
        return None
    for line in counters.splitlines():
        name, _, values = line.partition(":")
        if name.strip() == "lo":
            return int(values.split()[8])
    return None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps (default 30)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=64, help="tokens (bytes) per sequence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--checkpoints", type=Path, help="resume from this folder if it has any, and save there in the end"
    )
    parser.add_argument("--report", type=Path, help="append one line of JSON with the result to this file")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser = deepspeed.add_config_arguments(parser)
    arguments = parser.parse_args()
    if not arguments.deepspeed_config:
        parser.error("--deepspeed_config is required: the DeepSpeed JSON decides how to train")
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    return arguments


def measure_traffic(engine: deepspeed.DeepSpeedEngine, data: Iterator[torch.Tensor]) -> dict[str, float]:
    """Train one more step and count what this rank's collectives have to send, in bytes by kind."""
    try:
        from mics_ds.check.meter import CommMeter
        from mics_ds.comm.collectives import HOP2_EXCHANGE, HOP2_GATHER, HOP2_SCATTER, UPDATES
    except ImportError:  # stock DeepSpeed without the plugin
        return {}
    with CommMeter() as meter:
        train_one_step(engine, data)
    names = {"all_gather": "all-gather", "reduce_scatter": "hop 1", "all_to_all": "hop 1", "all_reduce": "hop 2"}
    traffic = dict.fromkeys([*names.values(), "other"], 0.0)
    for item in meter.collectives:
        small = item.payload <= 64  # agreeing on a norm or a loss
        # with world-sharded optimizer states, or in fewer bytes, these take the place of hop 2's all-reduce
        of_hop2 = item.label in (HOP2_SCATTER, UPDATES, HOP2_EXCHANGE, HOP2_GATHER)
        kind = "all_reduce" if of_hop2 else item.kind
        traffic["other" if small else names.get(kind, "other")] += item.bytes_sent
    return traffic


def train_one_step(engine: deepspeed.DeepSpeedEngine, data: Iterator[torch.Tensor]) -> float:
    """Run all micro-steps of one optimizer step. Return the loss, averaged over micro-steps and ranks."""
    total = torch.zeros((), device=engine.device)
    for _ in range(engine.gradient_accumulation_steps()):
        loss = engine(next(data).to(engine.device))
        engine.backward(loss)
        engine.step()
        total += loss.detach().float()
    total /= engine.gradient_accumulation_steps() * dist.get_world_size()
    dist.all_reduce(total)
    return total.item()


def main() -> None:
    arguments = parse_arguments()
    deepspeed.init_distributed()
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(arguments.seed)
    with deepspeed.zero.Init(config_dict_or_path=arguments.deepspeed_config):
        model = GPT(arguments.layers, arguments.width, arguments.heads, arguments.context)
    engine, *_ = deepspeed.initialize(args=arguments, model=model, model_parameters=model.parameters())

    if arguments.checkpoints:
        engine.load_checkpoint(str(arguments.checkpoints))

    text = load_text()
    micro_batch, micro_steps = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    # other data after a resume, the same in every such run
    data = batches(text, micro_batch, arguments.context, seed=1 + (engine.global_steps + arguments.seed) * world + rank)
    tokens_per_step = world * micro_steps * micro_batch * arguments.context
    parameters = sum(getattr(param, "ds_numel", param.numel()) for param in engine.module.parameters())
    say = print if rank == 0 else lambda *_, **__: None
    say(
        f"GPT with {parameters:,} parameters on {len(text):,} bytes of Python; {world} ranks x {micro_steps} "
        f"micro-steps x {micro_batch} sequences x {arguments.context} bytes",
        flush=True,
    )

    losses, times, wire = [], [], []
    every = max(1, arguments.steps // 10)
    for step in range(arguments.steps):
        dist.barrier()
        before, start = loopback_bytes(), time.perf_counter()
        losses.append(train_one_step(engine, data))
        times.append(time.perf_counter() - start)
        dist.barrier()
        after = loopback_bytes()
        if before is not None and after is not None:
            wire.append(after - before)
        if (step + 1) % every == 0:
            speed = f"{tokens_per_step / times[-1]:,.0f} tokens/s"
            say(f"step {step + 1:4d}/{arguments.steps}  loss {losses[-1]:.5f}  {speed}", flush=True)
    # The first steps record the order of modules and allocate.
    settled = times[min(5, len(times) // 2) :]
    traffic = measure_traffic(engine, data)
    result = {
        "losses": losses,
        "tokens_per_s": tokens_per_step / statistics.median(settled),
        "step_s": statistics.median(settled),
        "sent_bytes_per_step": traffic,
        "loopback_bytes_per_step": statistics.median(wire[min(5, len(wire) // 2) :]) if wire else None,
        "ranks": world,
        "parameters": parameters,
    }
    say(
        f"final loss {losses[-1]:.5f} nats per byte, {result['tokens_per_s']:,.0f} tokens/s, each rank sends "
        + (", ".join(f"{name} {value / 1e6:.2f} MB" for name, value in traffic.items()) or "(not counted)")
        + " per step",
        flush=True,
    )
    if rank == 0 and arguments.report:
        arguments.report.parent.mkdir(parents=True, exist_ok=True)
        with arguments.report.open("a") as file:
            file.write(json.dumps(result) + "\n")
    if arguments.checkpoints:
        engine.save_checkpoint(str(arguments.checkpoints))
        say(f"saved step {engine.global_steps} to {arguments.checkpoints}", flush=True)
    dist.barrier()
    engine.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    if "LOCAL_RANK" not in os.environ:
        sys.exit("Start this with a launcher: deepspeed --num_gpus 4 scripts/train_gpt.py --deepspeed_config ...")
    main()
