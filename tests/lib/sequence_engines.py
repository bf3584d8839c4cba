"""A causal language model under DeepSpeed's sequence parallelism (Ulysses, ALST), its data and its training loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import deepspeed.runtime.sequence_parallel.parallel_state_sp as mpu
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from deepspeed.utils import groups
from torch import nn
from torch.nn import functional

VOCABULARY, HEADS, WIDTH = 31, 12, 24


IGNORED = -100


def causal(_module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _mask: Any, **_kwargs: Any) -> Any:
    """An attention function as transformers calls it: (bs, heads, length, size) to (bs, length, heads, size)."""
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2), None


class Decoder(nn.Module):
    """A causal language model of two layers that sees ``attention`` where transformers' models see theirs."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = [attention]  # in a list: it is no part of the model
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Embedding(64, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 13), nn.GELU(), nn.Linear(13, WIDTH)) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.place(positions)
        for norm, qkv, mlp in zip(self.norms, self.qkv, self.mlp):
            q, k, v = qkv(norm(x)).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            y, _ = self.attention[0](self, q, k, v, None, position_ids=positions)
            x = x + mlp(y.reshape(x.shape))
        return self.head(x)


@contextmanager
def sequence_groups(size: int, by_mesh: bool = False) -> Iterator[None]:
    """DeepSpeed's groups for sequence parallelism, which it keeps in globals, for a while.

    Args:
        by_mesh: have them made by a device mesh, as for ``sequence_parallel_size`` and ``data_parallel_size`` in the
            JSON. By default an ``mpu`` has them, as in ALST.
    """
    if by_mesh:
        shape = (dist.get_world_size() // size, size)
        groups.mesh_device = deepspeed.comm.initialize_mesh_device(shape, ("data_parallel", "sequence_parallel"))
    else:
        mpu.initialize_sequence_parallel(size)
        groups.mpu = mpu
    try:
        yield
    finally:
        mpu._release_sequence_parallel_groups()
        groups.mpu = groups.mesh_device = None


def ulysses() -> Any:
    return UlyssesSPAttentionHF(
        attn=causal,
        batch_size=2,
        attn_head_count=HEADS,
        attn_head_size=WIDTH // HEADS,
        kv_head_count=HEADS,
        num_hidden_layers=2,
        process_group=groups._get_sequence_parallel_group(),
        seq_length_is_variable=True,
    )


def sequences(step: int, micro_step: int, replica: int) -> dict[str, torch.Tensor]:
    """(2, 12) tokens, positions and next tokens for one sequence group, of which ever more are left out: where there
    are six or more ranks in it, some have none at all."""
    generator = torch.Generator().manual_seed(1 + replica + 64 * (micro_step + 64 * step))
    rows = torch.randint(VOCABULARY, (2, 13), generator=generator)
    targets = rows[:, 1:].clone()
    targets[:, : (2 * replica + micro_step + 1) % 8] = IGNORED  # of a prompt, say
    return {"tokens": rows[:, :-1], "positions": torch.arange(12).repeat(2, 1), "targets": targets}


def share(whole: torch.Tensor) -> torch.Tensor:
    """This rank's part of (bs, length)."""
    rank, size = groups._get_sequence_parallel_rank(), groups._get_sequence_parallel_world_size()
    return whole.chunk(size, dim=1)[rank].contiguous()


def shared_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean over all tokens that count in the sequence group, as transformers computes it under ALST. (It does so
    by torch's differentiable all-gather, which on gloo fails in groups without global rank 0.)"""
    group = groups._get_sequence_parallel_group()
    summed = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    counted = (targets != IGNORED).sum()
    dist.all_reduce(counted, group=group)
    return torch.distributed.nn.functional.all_reduce(summed, group=group) / counted


def train(engine: Any, steps: int, first: int = 0) -> list[float]:
    """The loss of each step, a mean over all sequences."""
    replica = dist.get_rank() // groups._get_sequence_parallel_world_size()
    losses = []
    for step in range(first, first + steps):
        total = torch.zeros(())
        for micro_step in range(engine.gradient_accumulation_steps()):
            part = {name: share(whole) for name, whole in sequences(step, micro_step, replica).items()}
            loss = shared_loss(engine(part["tokens"], part["positions"]), part["targets"])
            engine.backward(loss)
            engine.step()
            total += loss.detach() / engine.gradient_accumulation_steps()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses
